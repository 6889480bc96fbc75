"""The instrument that runs CUDA kernels on a CPU (csrc/host_emulation), on kernels with planted
defects: what it must report, and that it lets right ones through."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "csrc" / "host_emulation"
BUILD = ROOT / "build" / "host_emulation" / "planted"
SOURCES = [EMULATION / f"{name}.cpp" for name in ("planted", "machine", "fibers", "threads")]
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-pthread"]
SCHEDULERS = {
    "fibers": ["-O2"],
    "ucontext": ["-O0", "-DFUSED_DNI_NO_SWITCH"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined"],
    "thread": ["-O1", "-g", "-fsanitize=thread", "-DFUSED_DNI_EMULATED_THREADS"],
}
SEEDS = range(6)


def _compile(sources: list[Path], flags: list[str], to: Path) -> subprocess.CompletedProcess[str]:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "c++"
    command = [*compiler.split(), *FLAGS, *flags, *map(str, sources), "-o", str(to)]
    return subprocess.run(command, capture_output=True, text=True)


@functools.cache
def _program(scheduler: str) -> list[str]:
    """The command that runs planted.cpp, built if its sources changed."""
    flags = SCHEDULERS[scheduler]
    headers = [EMULATION / "device.hpp", EMULATION / "machine.hpp", ROOT / "csrc/cuda/device.cuh",
               ROOT / "csrc/cuda/barrier.hpp"]  # fmt: skip
    key = hashlib.sha256(os.environ.get("CXX", "").encode() + repr([FLAGS, flags]).encode())
    for path in [*SOURCES, *headers, ROOT / "csrc/cuda/status.hpp"]:
        key.update(path.read_bytes())
    program = BUILD / f"{scheduler}-{key.hexdigest()[:16]}"
    if not program.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            trial = Path(folder, "trial.cpp")
            trial.write_text("#include <atomic>\nint main(int i, char**) {\n"
                             "  return std::atomic_ref<int>(i).load() - 1;\n}\n")  # fmt: skip
            part = Path(folder, "planted")
            tried = _compile([trial], flags, part)
            if tried.returncode:
                what = "sanitizer's runtime" if "-g" in flags else "compiler for C++20"
                pytest.skip(f"no {what}: {tried.stderr.strip().splitlines()[-1:]}")
            made = _compile(SOURCES, flags, part)
            assert made.returncode == 0, made.stderr
            for old in BUILD.glob(f"{scheduler}-*"):
                old.unlink(missing_ok=True)
            part.replace(program)
    if scheduler == "thread" and shutil.which("setarch"):
        # Some systems lay out memory more at random than the runtime of ThreadSanitizer can bear.
        loose = ["setarch", "-R", str(program)]
        if subprocess.run([*loose, "turn_warp"], capture_output=True).returncode == 0:
            return loose
    return [str(program)]


def _run(scheduler: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_program(scheduler), *map(str, words)], capture_output=True, text=True, timeout=100
    )


def _launches(scheduler: str, *words: object) -> list[tuple[str, np.ndarray]]:
    """Status and output of the case's launch and of the one of turn_block that follows it."""
    ran = _run(scheduler, *words)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    half = len(lines) // 2
    return [(part[0], np.array(part[1:], np.float32)) for part in (lines[:half], lines[half:])]


def _right(scheduler: str, case: str, seed: int = 0) -> np.ndarray:
    status, out = _launches(scheduler, case, seed)[0]
    assert status == "0 : "
    return out


def _turned_block() -> np.ndarray:
    values = np.zeros(64)
    for turn in (1, 2, 3):
        values = np.roll(values + turn * np.arange(64), -37)
    return np.concatenate([values, values, np.zeros(384)])


def _turned_warp() -> np.ndarray:
    warp = np.roll(np.arange(32), -5)
    return np.concatenate([warp, warp + 32, warp, warp + 32, np.zeros(384)])


def _turned_grid() -> np.ndarray:
    ways = [np.zeros(128), np.zeros(128)]
    for turn in (1, 2, 3, 4):
        ways[turn % 2] = ways[(turn + 1) % 2][::-1] + turn * np.arange(128)
    return np.concatenate([*ways, np.zeros(256)])


TURNS = {
    "turn_block": _turned_block,
    "turn_warp": _turned_warp,
    "turn_grid": _turned_grid,
    "turn_cluster": _turned_grid,
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("case", TURNS)
def test_right_kernels_pass_in_every_order(scheduler: str, case: str) -> None:
    for seed in [0] if scheduler == "thread" else SEEDS:
        np.testing.assert_array_equal(_right(scheduler, case, seed), TURNS[case]())


@pytest.mark.parametrize("case", TURNS)
def test_a_missing_barrier_changes_the_result(case: str) -> None:
    outs = [_right("fibers", f"{case}_planted", seed) for seed in SEEDS]
    assert any((out != TURNS[case]()).any() for out in outs)
    assert any((out != outs[0]).any() for out in outs), "one order must differ from another"


@pytest.mark.parametrize("case", TURNS)
def test_a_missing_barrier_is_a_race(case: str) -> None:
    ran = _run("thread", f"{case}_planted")
    assert "ThreadSanitizer: data race" in ran.stderr
    assert case in ran.stderr  # the kernel's frame


def test_an_order_repeats() -> None:
    first = _right("fibers", "turn_block_planted", 3)
    np.testing.assert_array_equal(_right("fibers", "turn_block_planted", 3), first)


FAULTS = {
    "returned": "block_barrier of block 1 was reached by 63 of 64 threads: thread 63 has returned",
    "one_barrier_more": "block_barrier of block 1 was reached by 1 of 64 threads: thread 0 has "
    "returned",
    "part_of_a_cluster": "cluster_barrier of block 0 was reached by 127 of 128 threads: block 1, "
    "thread 63 waits in block_barrier",
    "warp_barrier_alone": "block_barrier of block 1 was reached by 63 of 64 threads: thread 63 "
    "waits in warp_barrier",
    "two_collectives": "came to",
    "two_votes": "came to",
    "store_out": "thread 9: store of shared memory out of bounds: 1 at element 64 of 64",
    "load_before": "thread 9: load of shared memory out of bounds: 1 at element -1 of 64",
    "words_out": "thread 9: load of shared memory out of bounds: 4 at element 61 of 64",
    "no_array": "thread 9: load of shared memory out of bounds: 1 at element 0 of 0",
    "never_written": "thread 9: load of shared memory never written: element 31 of 32",
    "misaligned_shared": "thread 9: sixteen bytes at a misaligned address",
    "misaligned_global": "thread 9: sixteen bytes at a misaligned address",
    "takes_too_much": "thread 9: takes shared memory up to byte 4416 of 1024",
}


@pytest.mark.parametrize(
    ("scheduler", "case"),
    [
        *itertools.product(["fibers", "address"], FAULTS),
        *itertools.product(["ucontext", "thread"], ["returned", "two_collectives", "store_out"]),
    ],
)
def test_faults_end_the_launch(scheduler: str, case: str) -> None:
    for seed in SEEDS if scheduler == "fibers" else [0]:
        (status, _), (after, out) = _launches(scheduler, case, seed)
        assert status.startswith("719 cudaErrorLaunchFailure: ")
        assert "block 1" in status
        assert FAULTS[case] in status
        assert after == "0 : "
        np.testing.assert_array_equal(out, _turned_block())


def test_a_wait_that_nobody_ends() -> None:
    for seed in SEEDS:
        assert "thread 63 spins in pause" in _launches("fibers", "spins", seed)[0][0]


@pytest.mark.parametrize(
    ("case", "status"),
    [
        ("too_many_blocks", "720 cudaErrorCooperativeLaunchTooLarge: asks for 4 blocks"),
        ("part_of_a_warp", "9 cudaErrorInvalidConfiguration: cannot run as 2 blocks of 48"),
        ("too_many_threads", "9 cudaErrorInvalidConfiguration: cannot run as 2 blocks of 1056"),
        ("no_blocks", "9 cudaErrorInvalidConfiguration: cannot run as 0 blocks"),
        ("odd_cluster", "912 cudaErrorInvalidClusterSize: cannot run 3 blocks in clusters of 2"),
        ("too_much_shared", "1 cudaErrorInvalidValue: asks for 232449 bytes of shared memory"),
    ],
)
def test_launches_a_device_refuses(case: str, status: str) -> None:
    (first, out), _ = _launches("fibers", case)
    assert first.startswith(status)
    assert not out.any()


@pytest.mark.parametrize(
    ("case", "report"),
    [
        ("global_read_out", "AddressSanitizer: heap-buffer-overflow"),
        ("global_write_out", "AddressSanitizer: heap-buffer-overflow"),
        ("undefined_shift", "runtime error: shift exponent 32 is too large"),
    ],
)
def test_sanitizers_see_into_kernels(case: str, report: str) -> None:
    ran = _run("address", case)
    assert report in ran.stderr
    assert "planted.cpp" in ran.stderr
    assert report not in _run("address", "turn_block").stderr


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_exchanges(scheduler: str) -> None:
    place = np.arange(128)
    expected = place.reshape(4, 32).sum(1).repeat(32) + (place // 32 * 32 + 3) / 1024
    expected[64:] += 0.5  # block_any of the second block
    for seed in [0] if scheduler == "thread" else SEEDS:
        np.testing.assert_array_equal(_right(scheduler, "exchanges", seed)[:128], expected)


def _element(row: np.ndarray, k: np.ndarray) -> np.ndarray:
    value: np.ndarray = (row * 29 + k * k * 7 + row * k * 3) % 31
    return (value - 15) / 8


@pytest.mark.parametrize("scheduler", ["fibers", "address", "thread"])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32"])
def test_products_of_fragments(scheduler: str, kind: str) -> None:
    rows, k = np.arange(24)[:, None], np.arange(16)[None, :]
    elements = _element(rows, k)
    start = np.arange(16)[:, None] - np.arange(8)[None, :]
    expected = start + elements[:16] @ elements[16:].T  # exact in float
    out = _right(scheduler, f"product_{kind}", 1)[:128]
    np.testing.assert_array_equal(out.reshape(16, 8), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_from_shared_memory(transposed: bool) -> None:
    staged = np.arange(4 * 8 * 16).reshape(4, 8, 16)[:, :, :8]
    if transposed:
        staged = staged.transpose(0, 2, 1)
    case = "matrices_transposed" if transposed else "matrices"
    out = _right("fibers", case, 1)[:256]
    np.testing.assert_array_equal(out.reshape(4, 8, 8), staged)


def test_numbers_are_rounded_as_by_the_device() -> None:
    bits, bf16, fp16, tf32, bf16_back, fp16_back = np.array(
        [line.split() for line in _run("fibers", "convert").stdout.splitlines()], np.uint32
    ).T
    values = torch.from_numpy(bits.view(np.float32))
    nan = values.isnan().numpy()
    assert 0 < nan.sum() < len(nan) // 10

    for got, back, dtype in [
        (bf16, bf16_back, torch.bfloat16),
        (fp16, fp16_back, torch.float16),
    ]:
        expected = values.to(dtype)
        as_bits = expected.view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(got[~nan], as_bits[~nan])
        np.testing.assert_array_equal(back[~nan], expected.float().numpy().view(np.uint32)[~nan])
        assert (got[nan] == 0x7FFF).all()
        assert np.isnan(back[nan].view(np.float32)).all()

    # To ten digits after the point, ties away from zero: trunc(|x| 2^(10 - e) + 1/2).
    finite = np.isfinite(values.numpy()) & (np.abs(values.numpy()) >= 2.0**-126)
    wide = values.numpy().astype(np.float64)[finite]
    scale = 2.0 ** (10 - np.floor(np.log2(np.abs(wide))))
    rounded = np.copysign(np.floor(np.abs(wide) * scale + 0.5) / scale, wide)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(tf32[finite].view(np.float32), rounded.astype(np.float32))
    assert np.isnan(tf32[nan].view(np.float32)).all()
