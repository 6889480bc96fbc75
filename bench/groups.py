"""Candidates that are measured *together*, and what the figures hold for.

Each candidate is checked first. One that fails its check, or that cannot run, is in the results
with that reason and no figure.
"""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Callable
from tempfile import gettempdir
from typing import Any

from fused_dni.measure import baseline, environment, timing

#: What keeps PyTorch, its compiler and the libraries that it calls to AVX2; read when they load.
#: The compiler's cache does not tell instruction sets apart: code of wider vectors from it is
#: wrong here.
AVX2 = {
    "TORCHINDUCTOR_CACHE_DIR": f"{gettempdir()}/torchinductor_avx2_{getpass.getuser()}",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def keep_to_avx2() -> None:
    """Keep our kernels and PyTorch's to AVX2; starts the command anew where the latter have to be
    told first.

    Raises:
        ValueError: our kernels were not built for AVX2, or the processor has none.
    """
    if any(os.environ.get(name) != value for name, value in AVX2.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | AVX2)
    from fused_dni.backends import _cpu

    _cpu.set_isa("avx2")


def device_facts() -> dict[str, Any]:
    """Say what the figures hold for: machine, versions, threads, commit, date."""
    report = environment.report()
    facts = baseline.facts()
    del facts["gpu"]  # one that is there, but not measured here
    if facts["isa"] is not None:  # a GPU's figures need no kernels of the CPU
        from fused_dni.backends import _cpu

        if _cpu.isa() != _cpu.isas()[-1]:
            facts["isa"] = f"{_cpu.isas()[-1]}, kept to {_cpu.isa()}"
    return facts | {
        "flags": report["processor"]["flags"],
        "cores": report["processor"].get("cores allowed", report["processor"]["cores seen"]),
        "C++ compiler": report["package"].get("C++ compiler"),
    }


def compared(
    candidates: dict[str, Callable[[], object]],
    failures: dict[str, str],
    *,
    floor: str | None = None,
    seconds: float | None = None,
    steps: int = 1,
    against: dict[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure one group; per candidate seconds a step and the paired ratio to the floor, if any.
    ``options`` are more of :func:`fused_dni.measure.timing.compare`."""
    timings = timing.compare(candidates, seconds=seconds, **options) if candidates else {}
    rows: dict[str, Any] = {}
    for name, taken in timings.items():
        rows[name] = {"timing": taken.scaled(1.0 / steps)}
        if floor is not None:
            rows[name]["per_floor"] = timing.ratio(taken, timings[floor])
    for name, reason in failures.items():
        rows[name] = {"failed": reason}
    group: dict[str, Any] = {"floor": floor, "rows": rows, "order": [*candidates, *failures]}
    group["ratios"] = {
        label: timing.ratio(timings[top], timings[bottom])
        for label, (top, _, bottom) in {
            label: pair.partition(" / ") for label, pair in (against or {}).items()
        }.items()
        if top in timings and bottom in timings
    }
    return group


def gather(
    makers: dict[str, Callable[[], Callable[[], object]]],
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Check and build candidates; those that fail are kept as reasons."""
    candidates, failures = {}, {}
    for name, make in makers.items():
        try:
            candidates[name] = make()
        except Exception as error:  # compilers raise what they like
            lines = str(error).splitlines() or [""]
            failures[name] = f"{type(error).__name__}: {lines[0]}"
            print(f"  no figure for {name}: {failures[name]}", file=sys.stderr)
    return candidates, failures
