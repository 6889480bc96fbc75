"""One point of the map: the verdict on one layer inside a network."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fused_dni.measure.map.grid import Point, Settings
from fused_dni.measure.verdict import GateError, Verdict, verdict
from fused_dni.measure.verdict.candidates import first_line
from fused_dni.report.words import row

#: What DNI is compared with.
BASES = ("fused", "backprop")


def measure(
    point: Point, settings: Settings, progress: Callable[[float], None] | None = None
) -> dict[str, Any]:
    """Measure a point, as plain data; what goes wrong is its result, not an exception.

    Returns:
        The point's own fields and ``date``, with either ``timings``, ``memory``, ``ratios``,
        ``kernels`` (our backprop against stock) and ``break_even``; or ``failed`` (``memory``,
        ``gate`` or ``error``) and ``reason``.
    """
    head = {**point.to_json(), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        return head | _result(_verdict(point, settings, progress), settings)
    except Exception as error:  # one point's failure must not cost the others
        return head | {"failed": _kind(error), "reason": first_line(error)}
    finally:
        # A layer too large for the memory must not be in the way of the next one.
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()


def _kind(error: Exception) -> str:
    if isinstance(error, GateError):
        return "gate"
    # What torch's CPU allocator raises is a plain RuntimeError; and the verdict's trial forward
    # passes on any as bad input.
    lacking = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, (RuntimeError, ValueError)) and any(w in str(error) for w in lacking)
    ):
        return "memory"
    return "error"


def _verdict(point: Point, settings: Settings, progress: Callable[[float], None] | None) -> Verdict:
    where: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype}
    width = point.width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(width, width, bias=False, **where)
        norm = nn.BatchNorm1d(width, **where)
        sample = torch.randn(point.batch, width).to(**where)

    def say(what: str, fraction: float) -> None:
        if progress is not None and what == "measuring":
            progress(fraction)

    return verdict(
        nn.Sequential(linear, norm, nn.ReLU()),
        sample,
        update=settings.update,
        target_every=settings.ks,
        synthesizer=point.synthesizer,
        interface=point.interface,
        context_features=settings.context_features,
        seconds=settings.seconds,
        compile=False,
        parts=False,
        backend=settings.backend,
        progress=say,
    )


def _result(found: Verdict, settings: Settings) -> dict[str, Any]:
    return {
        "timings": found.timings,
        "memory": found.memory,
        "kernels": found.ratio("fused", "backprop"),
        "ratios": {
            base: {str(k or "never"): found.ratio(row(k), base) for k in settings.ks}
            for base in BASES
        },
        "break_even": {base: found.break_even[base] for base in BASES},
    }
