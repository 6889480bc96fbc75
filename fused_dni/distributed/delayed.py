"""Links that are as long as one likes: what arrives is handed out later."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque

from fused_dni.distributed.links import GroupIncoming
from fused_dni.distributed.pipeline import Pipeline
from fused_dni.distributed.wire import PipelineError, decode, size_of

#: A timer that rings a little early would ring in vain.
_AFTER = 1e-4


def delay_links(pipeline: Pipeline, latency: float, bandwidth: float = math.inf) -> None:
    """Hold back what arrives on a pipeline's links, as longer ones would.

    For trials on one machine: processes and messages are real, the distance is a clock's. A message
    takes its bytes over the bandwidth, one after the other, and the latency; it keeps its place in
    the receiver's window meanwhile. That room is free again is known at once, which over a real
    link takes a latency, too: give such pipelines a ``window`` that does not bind. Call it on all
    ranks before the first step, with a barrier behind it.

    Args:
        pipeline: whose links (mutated).
        latency: seconds, one way.
        bandwidth: bytes a second and direction.

    Raises:
        ValueError: a latency that is negative or not finite, or a bandwidth that is not positive.
        RuntimeError: a pipeline that has begun.
    """
    if not 0.0 <= latency < math.inf:
        raise ValueError(f"latency must be finite seconds from 0 on, got {latency!r}")
    if not bandwidth > 0.0:
        raise ValueError(f"bandwidth must be positive bytes a second, got {bandwidth!r}")
    if pipeline.steps:
        raise RuntimeError(f"the pipeline has made {pipeline.steps} steps: delay its links before")
    for end in (pipeline._from_up, pipeline._from_down):
        if end is not None:
            end.waiter.done = _Held(end, latency, bandwidth)


class _Held(queue.SimpleQueue[int | Exception]):
    """What is done at a receiving end, handed out when it would have come over the longer link."""

    def __init__(self, end: GroupIncoming, latency: float, bandwidth: float) -> None:
        self._end, self._latency, self._bandwidth = end, latency, bandwidth
        self._line = 0.0  # when the last message had left the line
        self._due: deque[tuple[float, int | Exception]] = deque()

    def put(self, item: int | Exception, block: bool = True, timeout: float | None = None) -> None:
        """Take in what is done, in the thread that waited for it."""
        now = time.monotonic()
        taken = 0.0 if isinstance(item, Exception) else self._bytes(item) / self._bandwidth
        self._line = max(now, self._line) + taken
        due = self._line + self._latency
        self._due.append((due, item))
        timer = threading.Timer(due - now + _AFTER, self._end.bell.ring)
        timer.daemon = True
        timer.start()

    def _bytes(self, slot: int) -> int:
        if math.isinf(self._bandwidth):
            return 0
        try:
            return size_of(decode(self._end.buffers[slot]))
        except PipelineError:  # said where it is received
            return 0

    def get_nowait(self) -> int | Exception:
        """Return the next that is due."""
        if not self._due or self._due[0][0] > time.monotonic():
            raise queue.Empty
        return self._due.popleft()[1]
