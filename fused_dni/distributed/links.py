"""One direction between two neighbouring stages, over ``torch.distributed``.

A ring of posted receives is the credit: gloo ends a send when the other side has posted the receive
for it, so who takes no message lets the sender wait, and memory is bounded at both ends. Gloo tells
only a ``wait()`` that something is done, so each end has a thread that waits, in order, and rings a
bell that the ends of a stage share. Whoever waits at one end takes in meanwhile what comes at the
end for gradients: two stages that wait for each other's room would wait for ever.

The first message tells the size of all that follow (:attr:`~.wire.Kind.OPEN`): a receive may be
larger than what is sent, never smaller.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fused_dni.distributed.wire import (
    HEADER,
    Kind,
    Message,
    PipelineError,
    decode,
    encode,
    error,
    size_of,
    text_of,
)

# For the text of an error, however small a link's messages are.
_LEAST = HEADER + 1024
_OPENING = HEADER + 64
# A work that times out closes its pair for good, and a direction may well have nothing to carry for
# hours: a silence counts only while something is waited for, by our own clock.
_FOR_EVER = timedelta(days=365)


class Outgoing(Protocol):
    """The end of a link that sends."""

    sent: int  # bytes
    messages: int
    waited: float  # seconds, for credit

    def send(self, message: Message, wait: bool = True) -> bool:
        """Send a message, and wait for room if there is none; else whether there was room."""
        ...

    def fail(self, text: str) -> None:
        """Tell the other end, if that is still possible, that this one has failed."""
        ...

    def close(self) -> None:
        """Say that nothing follows, and wait until all that was sent has gone."""
        ...


class Incoming(Protocol):
    """The end of a link that receives."""

    waited: float  # seconds, for messages

    def receive(self, wait: bool = True) -> Message | None:
        """The next message; without ``wait`` None if there is none yet."""
        ...


class Bell:
    """Rings whenever something is done at one of a stage's ends."""

    def __init__(self) -> None:
        self._rung = threading.Condition()
        self.count = 0

    def ring(self) -> None:
        """Wake who waits."""
        with self._rung:
            self.count += 1
            self._rung.notify_all()

    def wait(self, seen: int, seconds: float) -> None:
        """Wait until the count is another than ``seen``, at most so long."""
        with self._rung:
            self._rung.wait_for(lambda: self.count != seen, seconds)


class _Waiter(threading.Thread):
    """Waits for the works of one direction, in order."""

    def __init__(self, name: str, bell: Bell) -> None:
        super().__init__(name=name, daemon=True)
        self.bell = bell
        self.works: queue.SimpleQueue[tuple[Any, int] | None] = queue.SimpleQueue()
        # Slots whose work is done; behind an error, that error for ever.
        self.done: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while (given := self.works.get()) is not None:
            work, slot = given
            try:
                work.wait(_FOR_EVER)
            except Exception as broken:  # whatever a transport raises: it is raised where it counts
                self.done.put(broken)
                self.bell.ring()
                return
            self.done.put(slot)
            self.bell.ring()


class _End:
    """What both ends of a direction are.

    Args:
        peer: the rank at the other end. name: of it, for errors.
        group: both ranks'.
        window: messages that may be on their way.
        timeout: seconds after which a silent peer is an error.
        bell: rung when something is done here.

    Attributes:
        meanwhile: called whenever this end waits.
    """

    def __init__(
        self, peer: int, name: str, group: Any, window: int, timeout: float, bell: Bell
    ) -> None:
        self.peer, self.name, self.group = peer, name, group
        self.window, self.timeout, self.bell = window, timeout, bell
        self.meanwhile: Callable[[], None] | None = None
        self.buffers: list[torch.Tensor] = []
        self.waited = 0.0
        self.waiter = _Waiter(f"fused_dni {name}", bell)
        self.broken: str | None = None

    def _take(self, wait: bool) -> int | None:
        """The next slot whose work is done."""
        if self.broken is not None:
            raise PipelineError(self.broken)
        slot = self._next()
        if slot is None and wait:
            began = time.perf_counter()
            slot = self._wait(began + self.timeout)
            self.waited += time.perf_counter() - began
        if isinstance(slot, Exception):
            first = str(slot).strip().splitlines()
            self.broken = f"{self.name} is gone: {first[0] if first else type(slot).__name__}"
            raise PipelineError(self.broken) from slot
        return slot

    def _next(self) -> int | Exception | None:
        try:
            return self.waiter.done.get_nowait()
        except queue.Empty:
            return None

    def _wait(self, deadline: float) -> int | Exception:
        while True:
            seen = self.bell.count
            if self.meanwhile is not None:
                self.meanwhile()
            slot = self._next()
            if slot is not None:
                return slot
            left = deadline - time.perf_counter()
            if left <= 0.0:
                self.broken = (
                    f"{self.name} was silent for {self.timeout:g} s (timeout): it hangs, is "
                    "stopped, or the network between is down"
                )
                raise PipelineError(self.broken)
            self.bell.wait(seen, left)


class GroupOutgoing(_End):
    """:class:`Outgoing` to a rank of a process group; ``capacity`` is the bytes of the largest
    message, None for the first one's."""

    def __init__(
        self,
        peer: int,
        name: str,
        group: Any,
        window: int,
        timeout: float,
        bell: Bell,
        capacity: int | None = None,
    ) -> None:
        super().__init__(peer, name, group, window, timeout, bell)
        self.capacity = capacity
        self.sent = self.messages = 0
        self._free: list[int] = []
        self._opening: tuple[Any, torch.Tensor] | None = None

    def send(self, message: Message, wait: bool = True) -> bool:
        if not self.buffers:
            self._open(size_of(message))
        if self.broken is not None:
            raise PipelineError(self.broken)
        slot = self._slot(wait)
        if slot is None:
            return False
        try:
            size = encode(message, self.buffers[slot])
        except PipelineError:
            self._free.append(slot)
            raise
        work = dist.isend(self.buffers[slot][:size], self.peer, group=self.group)
        self.waiter.works.put((work, slot))
        self.sent += size
        self.messages += 1
        return True

    def _slot(self, wait: bool) -> int | None:
        while (slot := self._take(False)) is not None:
            self._free.append(slot)
        return self._free.pop(0) if self._free else self._take(wait)

    def _open(self, size: int) -> None:
        capacity = max(_LEAST, self.capacity or size)
        opening = torch.zeros(_OPENING, dtype=torch.uint8)
        encode(Message(Kind.OPEN, tensors=(torch.tensor([capacity, self.window]),)), opening)
        # The posted receive is there since the other end was made: nothing to wait for.
        self._opening = (dist.isend(opening, self.peer, group=self.group), opening)
        self.buffers = [torch.empty(capacity, dtype=torch.uint8) for _ in range(self.window)]
        self._free = list(range(self.window))

    def fail(self, text: str) -> None:
        with suppress(RuntimeError):  # it is gone, or told already
            self.send(error(text), wait=False)

    def close(self) -> None:
        if not self.buffers:
            self._open(0)
        for _ in range(self.window):  # one for each receive that is posted
            self.send(Message(Kind.END))
        while len(self._free) < len(self.buffers):
            slot = self._take(True)
            assert slot is not None
            self._free.append(slot)
        if self._opening is not None:
            self._opening[0].wait(_FOR_EVER)
        self.waiter.works.put(None)
        self.waiter.join()


class GroupIncoming(_End):
    """:class:`Incoming` from a rank of a process group."""

    def __init__(
        self, peer: int, name: str, group: Any, window: int, timeout: float, bell: Bell
    ) -> None:
        super().__init__(peer, name, group, window, timeout, bell)
        self.buffers = [torch.zeros(_OPENING, dtype=torch.uint8)]
        self._opened = False
        self._post(0)

    def _post(self, slot: int) -> None:
        work = dist.irecv(self.buffers[slot], self.peer, group=self.group)
        self.waiter.works.put((work, slot))

    def receive(self, wait: bool = True) -> Message | None:
        while (slot := self._take(wait)) is not None:
            message = decode(self.buffers[slot])
            if not self._opened:
                self._open(message)
                continue
            if message.kind is Kind.END:
                self.waiter.works.put(None)  # behind what is posted, which ends fill
                self.waiter.join()
            else:
                self._post(slot)
            if message.kind is Kind.ERROR:
                told = text_of(message)  # of a stage that lies further, as it told
                origin = told.startswith("stage ")
                self.broken = told if origin else f"{self.name} failed: {told}"
                raise PipelineError(self.broken)
            return message
        return None

    def _open(self, message: Message) -> None:
        if message.kind is not Kind.OPEN or not message.tensors or message.tensors[0] is None:
            raise PipelineError(f"{self.name} began with a message of kind {message.kind.name}")
        capacity, window = message.tensors[0].tolist()
        if window != self.window or capacity < _LEAST:
            raise PipelineError(
                f"{self.name} opened its link with window={window}, here it is {self.window}"
            )
        self._opened = True
        self.buffers = [torch.empty(capacity, dtype=torch.uint8) for _ in range(self.window)]
        for slot in range(self.window):
            self._post(slot)
