"""How long a thread has waited for a processor: what a busy machine adds to a time on the clock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

#: Waits found beside a measurement that are shorter than this are the cost of asking.
_ASKING = 20e-6


class Stopwatch:
    """Seconds that a call takes, less those in which its thread was ready and no core was free.

    Linux counts the latter (``schedstat``); elsewhere nothing is subtracted. On an idle machine
    both are the same. What the thread itself waits for (a device, a file, threads that work for it)
    stays in; so, with more threads than one, does what the others wait.

    To be used by the thread that makes it, and closed.

    Args:
        clock: seconds on the clock.

    Attributes:
        waited: seconds subtracted so far.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._file: int | None = None
        self.waited = 0.0
        try:
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
            self._waits()
        except (OSError, ValueError, IndexError):
            self.close()

    def close(self) -> None:
        """Let go of the system's counter."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _waits(self) -> float:
        """Seconds that this thread has waited for a core since it began."""
        if self._file is None:
            return 0.0
        return int(os.pread(self._file, 128, 0).split()[1]) * 1e-9

    def time(self, run: Callable[[], object]) -> float:
        """Seconds of one call."""
        clock = self._clock
        asked = clock()
        before = self._waits()
        start = clock()
        run()
        end = clock()
        waits = self._waits() - before
        # A wait between the question and the start (or the end and the question) is none of run's.
        outside = start - asked + clock() - end
        if outside > _ASKING:
            waits = max(0.0, waits - outside)
        waits = min(waits, end - start)
        self.waited += waits
        return end - start - waits
