"""Fixtures and settings that all tests share."""

from __future__ import annotations

import gc
import os
import runpy
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

# What Triton compiles is kept with everything else that is built, for all processes and later runs
# (by what it is made of: a changed kernel is compiled again).
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels are interpreted, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # And those in CUDA C++ are compiled for the CPU.
    if "FUSED_DNI_CUDA_EMULATION" not in os.environ:
        build = runpy.run_path(str(ROOT / "csrc" / "host_emulation" / "build.py"))["build"]
        os.environ["FUSED_DNI_CUDA_EMULATION"] = str(build(ROOT / "build" / "host_emulation"))

# Of each property a few examples; with what is left out unless asked for (`make test-all`), many.
for profile, examples in (("few", 10), ("many", 100)):
    settings.register_profile(
        profile,
        deadline=None,  # shared machines stall
        derandomize=True,  # the same examples in every run
        max_examples=examples,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
_profile = "few"


def pytest_configure(config: pytest.Config) -> None:
    global _profile
    _profile = "few" if config.option.markexpr else "many"  # -m gpu has no time for many
    settings.load_profile(_profile)


def _undo_torch_testing() -> None:
    """What torch.testing._internal does to a process that imports it, as opcheck does too: it loads
    a profile of hypothesis, and forbids to set the flags of torch.backends."""
    settings.load_profile(_profile)
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True


def _leave_alone() -> None:
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected lives as long as the process. The garbage collector need not
    go through it again and again: neither now nor whenever a test, or what is tested, collects."""
    gc.disable()
    try:
        return (yield)
    finally:
        _leave_alone()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """And so does what tests import (a compiler is a million objects) and keep."""
    try:
        return (yield)
    finally:
        if gc.get_count()[1]:  # some hundred objects more than before
            _leave_alone()


def pytest_collectstart(collector: pytest.Collector) -> None:
    _undo_torch_testing()


def pytest_runtest_setup(item: pytest.Item) -> None:
    _undo_torch_testing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test for each backend: one case after another, and in each the backends, so that what
    they are compared with is derived once for all of them (strategies.tolerances)."""
    first: dict[str, int] = {}

    def place(index_and_item: tuple[int, pytest.Item]) -> tuple[int, ...]:
        index, item = index_and_item
        indices = dict(item.callspec.indices) if hasattr(item, "callspec") else {}
        if "backend" not in indices:
            return (index,)
        backend = indices.pop("backend")
        function = item.nodeid.partition("[")[0]
        return (first.setdefault(function, index), *indices.values(), backend)

    items[:] = [item for _, item in sorted(enumerate(items), key=place)]


@pytest.fixture(autouse=True, scope="session")
def _interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.quicken()


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    """Same seed for every test; thread count, default dtype and determinism are put back."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # the same, but for the stack that each absent kind of device would remember
        torch.default_generator.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: an element that is never written is seen."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            t = make(*args, **kwargs)
            return t.fill_(torch.nan) if t.is_floating_point() else t

        return made

    for where, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(where, name, poison(getattr(where, name)))


@pytest.fixture
def one_thread(_isolated: None) -> None:
    """Small tensors: two threads that wait for each other on a busy machine take far longer."""
    torch.set_num_threads(1)


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that sleep are forked from a process that has imported all, as in support/ranks.py: a
    new one takes seconds to. (test_paced.py has both.)"""
    from types import SimpleNamespace

    import ranks

    from fused_dni.measure.simulate import paced

    forking = SimpleNamespace(get_context=lambda method: ranks.CONTEXT)
    monkeypatch.setattr(paced, "multiprocessing", forking)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The most that kernels take, from what tests recorded as "machine code": the kernel,
    registers, stack, shared memory (bytes), tensor-core instructions, whether a bound is broken."""
    from fused_dni.report import text

    found: dict[str, list[list[Any]]] = {}
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, value in getattr(report, "user_properties", ()):
            if name == "machine code":
                found.setdefault(value[0], []).append(value)
    if not found:
        return
    header = [
        "kernel", "specimens", "registers", "stack B", "shared KiB", "tensor cores", "broken"
    ]  # fmt: skip
    rows = []
    for kernel, codes in sorted(found.items()):
        _, registers, stacks, shared, cores, broken = zip(*codes, strict=True)
        names = sorted({name for one in cores for name in one})
        rows.append([
            kernel, str(len(codes)), str(max(registers)), str(max(stacks)),
            f"{max(shared) / 1024:.1f}", "+".join(names) or "-", str(sum(broken)),
        ])  # fmt: skip
    terminalreporter.section("machine code: the most that a specimen takes")
    terminalreporter.write_line(text.table(header, rows))
