"""A command under ``torch.profiler``: a trace for the eye, and sums by range and op."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile

from fused_dni.annotate import annotate
from fused_dni.measure.timing import _quiet_stderr
from fused_dni.report.kinds.profile import NO_OP, NOWHERE


class _Recorder:
    """The profiler from the first call of a module to the first that comes ``seconds`` later."""

    def __init__(self, seconds: float) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities, profile_memory=True)
        self.seconds = seconds
        self.started: float | None = None
        self.recorded: float | None = None

    def __enter__(self) -> None:
        self._hook = register_module_forward_pre_hook(self._at_a_call)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        if self.started is None:
            self._start()
        if self.recorded is None:
            self._stop()

    def _at_a_call(self, *_: Any) -> None:
        # The profiler belongs to the thread that starts it.
        if self.recorded is not None or threading.current_thread() is not threading.main_thread():
            return
        if self.started is None:
            self._start()
        elif time.perf_counter() - self.started > self.seconds:
            self._stop()

    def _start(self) -> None:
        with _quiet_stderr():
            self.profiler.start()
        self.started = time.perf_counter()

    def _stop(self) -> None:
        assert self.started is not None
        self.recorded = time.perf_counter() - self.started
        with _quiet_stderr():
            self.profiler.stop()


def record(run: Callable[[], int], trace: Path, seconds: float) -> tuple[int, dict[str, Any]]:
    """Run a command under the profiler, annotated.

    Args:
        run: the command; its result is its exit status.
        trace: where the trace goes, for chrome://tracing or ui.perfetto.dev; packed if it ends in
            ``.gz``.
        seconds: of recording, from the first call of a module on. The command runs to its end.

    Returns:
        The exit status, and ``seconds`` recorded, ``ranges`` and ``ops`` (see :func:`sums`).
    """
    recorder = _Recorder(seconds)
    with annotate(), recorder:
        status = run()
    recorder.profiler.export_chrome_trace(str(trace))
    assert recorder.recorded is not None
    return status, {"seconds": recorder.recorded, **sums(recorder.profiler.events())}


def sums(events: Any) -> dict[str, Any]:
    """Time and memory by range, and by range and op, the dearest first.

    An op counts for the innermost range around it. Times are seconds: ``total`` of a range with,
    ``own`` without the ranges inside it; of an op ``own``, without the ops that it calls;
    ``device`` is the GPU's. ``memory`` is bytes allocated less bytes released.
    """
    ranges: dict[str, dict[str, Any]] = {}
    ops: dict[tuple[str, str], dict[str, Any]] = {}
    for event in events:
        if event.is_async:
            continue
        inner = _range_of(event)
        own = {
            "own": event.self_cpu_time_total / 1e6,
            "device": event.self_device_time_total / 1e6,
            "memory": event.self_cpu_memory_usage + event.self_device_memory_usage,
        }
        range_ = ranges.setdefault(inner, {"calls": 0, "total": 0.0, **dict.fromkeys(own, 0)})
        op = NO_OP if event.is_user_annotation else event.name
        entry = ops.setdefault((inner, op), {"calls": 0, **dict.fromkeys(own, 0)})
        entry["calls"] += 1
        for name, value in own.items():
            range_[name] += value
            entry[name] += value
        if event.is_user_annotation:
            range_["calls"] += 1
            range_["total"] += event.cpu_time_total / 1e6
    return {
        "ranges": [
            {"range": name, **found}
            for name, found in sorted(ranges.items(), key=lambda item: -item[1]["own"])
        ],
        "ops": [
            {"range": name, "op": op, **found}
            for (name, op), found in sorted(ops.items(), key=lambda item: -item[1]["own"])
        ],
    }


def _range_of(event: Any) -> str:
    """Return the innermost range that an event is or lies in."""
    while event is not None:
        if event.is_user_annotation:
            return str(event.name)
        event = event.cpu_parent
    return NOWHERE
