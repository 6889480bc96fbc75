"""The clock that benchmarks are timed by: it runs only while a candidate does.

pytest-benchmark reads its timer before and after a round. On a GPU that is the time to *launch*;
and a candidate that is to find its caches cold needs something done before each call that must not
count. So the timer here is one that stands still, but for what :meth:`Clock.measure` adds to it:
on a CPU the time of its calls, less that in which no core was free; on a GPU the time between two
events around them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from fused_dni.measure.waiting import Stopwatch

#: Shortest time between two readings, in seconds; shorter calls are repeated (warm ones only).
MIN_SAMPLE = 200e-6
#: Size of the last cache where the system does not tell: larger than most.
UNTOLD = 64 << 20
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class Clock:
    """Seconds that candidates have taken, per call; ``watch`` times them on a CPU."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._now = 0.0

    def now(self) -> float:
        """Say what pytest-benchmark reads."""
        return self._now

    def measure(
        self, call: Callable[[], object], device: str, repeats: int = 1, cold: bool = False
    ) -> None:
        """Call, and move on by the time of one call.

        Warm: a call that does not count comes first, and on a GPU is still running while the host
        launches those that do. Cold: before the call a buffer larger than the last cache is
        written, on a GPU in the same stream, in front of the first event.

        Args:
            device: ``cpu`` or ``cuda``.
            repeats: calls, of which the mean counts.
            cold: evict what the candidate reads; then ``repeats`` must be 1.
        """
        if cold and repeats != 1:
            raise ValueError(f"only the first of {repeats} calls would find its caches cold")
        if cold:
            _evict(device)
        else:
            call()

        def run() -> None:
            for _ in range(repeats):
                call()

        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            taken = start.elapsed_time(end) / 1e3
        else:
            taken = self._watch.time(run)
        self._now += taken / repeats

    def repeats(self, call: Callable[[], object], device: str) -> int:
        """Say how many calls make a sample that is long enough; a few are made to find out."""
        self.measure(call, device)
        before, count = self._now, 5
        self.measure(call, device, count)
        once = max(self._now - before, 1e-9)
        return max(1, round(MIN_SAMPLE / once))


def last_cache(device: str) -> int:
    """Bytes of the largest cache between the device's cores and its memory."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    found = [_size(path.read_text(encoding="utf-8")) for path in CACHES.glob("index*/size")]
    return max(found, default=UNTOLD)


def _size(written: str) -> int:
    """``32768K`` in bytes."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    written = written.strip()
    return int(written.rstrip("KMG")) * units.get(written[-1], 1)


@lru_cache(maxsize=2)
def _buffer(device: str) -> torch.Tensor:
    """Twice the cache: what is not evicted by the first half of it is by the second."""
    return torch.zeros(2 * last_cache(device) // 4, dtype=torch.int32, device=device)


def _evict(device: str) -> None:
    _buffer(device).add_(1)
