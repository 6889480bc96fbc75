"""One point of the map: the verdict's candidates for one layer inside a network."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fused_dni as fd
from fused_dni import timing
from fused_dni.map.grid import Point, Settings, make_synthesizer
from fused_dni.rules import Rule
from fused_dni.timing import Timing
from fused_dni.verdict.candidates import (
    TIMING_RATE,
    at_rate,
    first_line,
    our_step,
    pose,
    spread,
    stock_step,
)
from fused_dni.verdict.errors import GateError
from fused_dni.verdict.gate import check_gate
from fused_dni.verdict.layer import break_even, row

#: What DNI is compared with.
BASES = ("fused", "backprop")


def measure(
    point: Point, settings: Settings, progress: Callable[[float], None] | None = None
) -> dict[str, Any]:
    """Measure a point, as plain data; what goes wrong is its result, not an exception.

    Returns:
        The point's own fields and ``date``, with either ``timings``, ``ratios``, ``kernels`` (our
        backprop against stock) and ``break_even``; or ``failed`` (``memory``, ``gate`` or
        ``error``) and ``reason``.
    """
    head = {**point.to_json(), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        return head | _measured(point, settings, progress)
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
    # What torch's CPU allocator raises is a plain RuntimeError.
    lacking = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in lacking)
    ):
        return "memory"
    return "error"


def _measured(
    point: Point, settings: Settings, progress: Callable[[float], None] | None
) -> dict[str, Any]:
    where: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype}
    width = point.width
    rule = at_rate(settings.update, TIMING_RATE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(width, width, bias=False, **where)
        norm = nn.BatchNorm1d(width, **where)
        sample = torch.randn(point.batch, width).to(**where)
    layer = nn.Sequential(linear, norm, nn.ReLU())
    problem, output, stock = pose(layer, sample, None, settings.context_features, rule)

    def build(synthesizer: Any, by: Rule) -> nn.Module:
        """Our layer of the same weights; any ``synthesizer`` but None stands for the point's."""
        options: dict[str, Any] = {"synthesizer": None}
        if synthesizer is not None:
            made = make_synthesizer(point, settings)
            options = {"synthesizer": made, "interface": point.interface}
        parts = copy.deepcopy(linear), copy.deepcopy(norm), "relu"
        ours = fd.FusedDNILinear.from_linear(*parts, update=by, backend=settings.backend, **options)
        return nn.Sequential(ours).train()

    with torch.random.fork_rng(devices=[]):
        check_gate(stock, output, problem, build, "default")
    steps: dict[str, Callable[[], object]] = {
        "backprop": stock_step(stock, problem),
        "fused": our_step(build(None, rule), problem, 1),
        "floor": timing.gemm_floor([(point.batch, width, width)], settings.dtype, settings.device),
    }
    for name, every in (("with targets", 1), ("without targets", None)):
        decoupled = build("default", rule)
        spread(decoupled)
        steps[name] = our_step(decoupled, problem, every)
    taken = timing.compare(
        steps, seconds=settings.seconds, device=settings.device, progress=progress
    )

    def cycle(k: int | None) -> Timing:
        share = 0.0 if k is None else 1 / k
        parts = [(share, taken["with targets"]), (1 - share, taken["without targets"])]
        return timing.combine(row(k), parts)

    cycles = {k: cycle(k) for k in settings.ks}
    timings = {name: taken[name] for name in ("backprop", "fused", "floor")}
    timings |= {timed.name: timed for timed in cycles.values()}
    return {
        "timings": {name: timed.to_json() for name, timed in timings.items()},
        "kernels": _ratio(taken["fused"], taken["backprop"]),
        "ratios": {
            base: {str(k or "never"): _ratio(timed, taken[base]) for k, timed in cycles.items()}
            for base in BASES
        },
        "break_even": {base: break_even(cycle, taken[base]).to_json() for base in BASES},
    }


def _ratio(a: Timing, b: Timing) -> dict[str, Any]:
    found = timing.ratio(a, b)
    return {**found.to_json(), "verdict": found.verdict()}
