"""One direction between two neighbouring stages, over ``torch.distributed``.

A ring of posted receives is the credit: gloo ends a send when the other side has posted the receive
for it, so who takes no message lets the sender wait, and memory is bounded at both ends. Gloo tells
only a ``wait()`` that something is done, so each end has a thread that waits, in order, and rings a
bell that the ends of a stage share. Whoever waits at one end takes in meanwhile what comes at the
end for gradients: two stages that wait for each other's room would wait for ever.

The first message tells the size of all that follow (:attr:`~.wire.Kind.OPEN`): a receive may be
larger than what is sent, never smaller.

Each end has ``window`` buffers, so before the receiver takes a message the sender may have sent
``2 * window``, and no more.

Behind a full window nothing gets through, and an end that fails breaks the pair before long. So its
last word goes a second way, too: into a receive of its own (tag :data:`_WORD`) that is posted from
the beginning, which gloo fills whatever this process is busy with, and which is looked at when the
pair is broken. A direction that ends well fills it with END.

No thread may wait in gloo when the interpreter ends: what wakes it there cannot take Python's lock
any more, and the process aborts. So a direction ends with as many messages (END, or ERROR) as
receives are posted, and where the other side does not answer its pair is broken.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn, Protocol

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

# How long a stage that has failed waits for its neighbours to hear of it, in seconds.
LINGER = 5.0

# For the text of an error, however small a link's messages are.
_LEAST = HEADER + 1024
_OPENING = HEADER + 64
# The tags of last words, and of the receive that only times out.
_WORD, _BREAK = 1, 2
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
        """Tell the other end, if that is still possible, that this one has failed; never waits."""
        ...

    def close(self) -> None:
        """Say that nothing follows, and wait until all that was sent has gone."""
        ...

    def end(self, seconds: float) -> None:
        """Let go of the link, closed or failed, after at most so long."""
        ...


class Incoming(Protocol):
    """The end of a link that receives."""

    waited: float  # seconds, for messages

    def receive(self, wait: bool = True) -> Message | None:
        """Return the next message; without ``wait`` None if there is none yet."""
        ...

    def end(self, seconds: float) -> None:
        """Let go of the link; what comes meanwhile is dropped. At most so long."""
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
        # With the buffer, which must live as long, and its slot, if it has one.
        self.works: queue.SimpleQueue[tuple[Any, torch.Tensor, int | None] | None]
        self.works = queue.SimpleQueue()
        # Slots whose work is done, and behind them the error that was the end.
        self.done: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while (given := self.works.get()) is not None:
            work, _, slot = given
            try:
                work.wait(_FOR_EVER)
            except Exception as broken:  # whatever a transport raises: it is raised where it counts
                self.done.put(broken)
                self.bell.ring()
                return
            if slot is not None:
                self.done.put(slot)
                self.bell.ring()

    def finish(self, seconds: float) -> bool:
        """End behind the works that were given; whether that took at most so long."""
        self.works.put(None)
        self.join(max(seconds, 0.0))
        return not self.is_alive()


class _End:
    """What both ends of a direction are.

    Args:
        peer: the rank at the other end. name: of it, for errors.
        group: both ranks'.
        window: messages that each end has room for.
        timeout: seconds after which a silent peer is an error.
        bell: rung when something is done here.

    Attributes:
        meanwhile: called whenever this end waits.
        capacity: bytes of the largest message; None where that is not known.
    """

    def __init__(
        self, peer: int, name: str, group: Any, window: int, timeout: float, bell: Bell
    ) -> None:
        self.peer, self.name, self.group = peer, name, group
        self.window, self.timeout, self.bell = window, timeout, bell
        self.meanwhile: Callable[[], None] | None = None
        self.capacity: int | None = None
        self.buffers: list[torch.Tensor] = []
        self.waited = 0.0
        self.waiter = _Waiter(f"fused_dni {name}", bell)
        self.broken: str | None = None

    def _start(self, operation: Callable[..., Any], buffer: torch.Tensor, slot: int | None) -> None:
        """Begin to send or to receive."""
        try:
            work = operation(buffer, self.peer, group=self.group)
        except RuntimeError as problem:
            self._gone(problem)
        self.waiter.works.put((work, buffer, slot))

    def _take(self, wait: bool) -> int | None:
        """Return the next slot whose work is done."""
        if self.broken is not None:
            raise PipelineError(self.broken)
        slot = self._next()
        if slot is None and wait:
            began = time.perf_counter()
            slot = self._wait(began + self.timeout)
            self.waited += time.perf_counter() - began
        if isinstance(slot, Exception):
            self._gone(slot)
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
                self._silent()
            self.bell.wait(seen, left)

    def _silent(self) -> NoReturn:
        self.broken = (
            f"{self.name} was silent for {self.timeout:g} s (timeout): it hangs, is stopped, or "
            "the network between is down"
        )
        raise PipelineError(self.broken)

    def _gone(self, problem: Exception) -> NoReturn:
        # Of gloo's text, "[file:line] Connection closed by peer [address]. Advice", what happened.
        text = re.sub(r"^(\[.*?\] *)+", "", str(problem).strip())
        text = re.split(r" \[|\n", text)[0]
        self.broken = f"{self.name} is gone: {text or type(problem).__name__}"
        raise PipelineError(self.broken) from problem

    def _finish(self, deadline: float) -> None:
        """End the thread, by breaking the pair if need be."""
        if self.broken is None:
            self.broken = f"the link with {self.name} is closed"
        if self.waiter.finish(deadline - time.perf_counter()):
            return
        with suppress(RuntimeError):  # a wait that times out ends all others of its pair
            work: Any = dist.irecv(torch.empty(1), self.peer, group=self.group, tag=_BREAK)
            work.wait(timedelta(milliseconds=1))
        self.waiter.join(LINGER)


class GroupIncoming(_End):
    """:class:`Incoming` from a rank of a process group."""

    def __init__(
        self, peer: int, name: str, group: Any, window: int, timeout: float, bell: Bell
    ) -> None:
        super().__init__(peer, name, group, window, timeout, bell)
        self.buffers = [torch.zeros(_OPENING, dtype=torch.uint8)]
        self.ended = False
        self._word = torch.zeros(_LEAST, dtype=torch.uint8)
        self._word_work: Any = dist.irecv(self._word, peer, group=group, tag=_WORD)
        self._start(dist.irecv, self.buffers[0], 0)

    def receive(self, wait: bool = True) -> Message | None:
        while (slot := self._take(wait)) is not None:
            message = decode(self.buffers[slot])
            if self.capacity is None:
                self._open(message)
                continue
            if message.kind in (Kind.END, Kind.ERROR):
                # As many come as receives are posted.
                if not self.waiter.finish(self.timeout):
                    self._silent()
                with suppress(RuntimeError):  # of an end that is gone by now, having said why
                    self._word_work.wait(timedelta(seconds=max(self.timeout, 1e-3)))
                self.ended = True
            else:
                self._start(dist.irecv, self.buffers[slot], slot)
            if message.kind is Kind.ERROR:
                self._failed(message)
            return message
        return None

    def _failed(self, message: Message) -> NoReturn:
        told = text_of(message)  # of a stage that lies further, as it told
        origin = told.startswith("stage ")
        self.broken = told if origin else f"{self.name} failed: {told}"
        raise PipelineError(self.broken)

    def _gone(self, problem: Exception) -> NoReturn:
        word = None
        with suppress(RuntimeError):  # it did not come: the pair is broken, so this returns at once
            self._word_work.wait(timedelta(milliseconds=10))
            word = decode(self._word)
        if word is not None and word.kind is Kind.ERROR:
            self._failed(word)
        super()._gone(problem)

    def _open(self, message: Message) -> None:
        told = message.tensors[0] if message.kind is Kind.OPEN and message.tensors else None
        if told is None or told.dtype != torch.int64 or told.shape != (2,):
            raise PipelineError(f"{self.name} began with a message of kind {message.kind.name}")
        capacity, window = told.tolist()
        if window != self.window or capacity < _LEAST:
            raise PipelineError(
                f"{self.name} opened its link with window={window} and messages of {capacity:,} "
                f"bytes, here window={self.window}"
            )
        try:
            self.buffers = [torch.empty(capacity, dtype=torch.uint8) for _ in range(window)]
        except RuntimeError as problem:
            raise PipelineError(
                f"{self.name} sends messages of {capacity:,} bytes, for which there is no memory"
            ) from problem
        self.capacity = capacity
        for slot in range(window):
            self._start(dist.irecv, self.buffers[slot], slot)

    def last_word(self) -> None:
        """Take in all that came from an end that is gone.

        Raises:
            PipelineError: what it said of why, if it did.
        """
        with suppress(PipelineError):
            while not self.ended:
                self.receive()
        if self.broken is not None and " is gone: " not in self.broken:
            raise PipelineError(self.broken)

    def end(self, seconds: float) -> None:
        deadline = time.perf_counter() + seconds
        self.meanwhile, self.timeout = None, seconds
        with suppress(PipelineError):
            while not self.ended:
                self.receive()
                self.timeout = deadline - time.perf_counter()
        self._finish(deadline)


class GroupOutgoing(_End):
    """:class:`Outgoing` to a rank of a process group.

    Args:
        capacity: bytes of the largest message; None for what ``back`` knows or the first one's.
        back: the other direction of the pair.
    """

    def __init__(
        self,
        peer: int,
        name: str,
        group: Any,
        window: int,
        timeout: float,
        bell: Bell,
        capacity: int | None,
        back: GroupIncoming,
    ) -> None:
        super().__init__(peer, name, group, window, timeout, bell)
        self.capacity, self.back = capacity, back
        self.sent = self.messages = 0
        self._free: list[int] = []
        self._word: tuple[Any, torch.Tensor] | None = None  # under way

    def send(self, message: Message, wait: bool = True) -> bool:
        if self.broken is not None:
            raise PipelineError(self.broken)
        if not self.buffers:
            self._open(size_of(message))
        slot = self._slot(wait)
        if slot is None:
            return False
        try:
            size = encode(message, self.buffers[slot])
        except PipelineError:
            self._free.append(slot)
            raise
        self._start(dist.isend, self.buffers[slot][:size], slot)
        self.sent += size
        self.messages += 1
        return True

    def _slot(self, wait: bool) -> int | None:
        while (slot := self._take(False)) is not None:
            self._free.append(slot)
        return self._free.pop(0) if self._free else self._take(wait)

    def _open(self, size: int) -> None:
        # Not the first gradient's: that may be of a step with fewer rows.
        capacity = max(_LEAST, self.capacity or max(size, self.back.capacity or 0))
        opening = torch.zeros(_OPENING, dtype=torch.uint8)
        encode(Message(Kind.OPEN, tensors=(torch.tensor([capacity, self.window]),)), opening)
        self._free = list(range(self.window))
        self.buffers = [torch.empty(capacity, dtype=torch.uint8) for _ in range(self.window)]
        self._start(dist.isend, opening, None)  # a receive is posted for it

    def _gone(self, problem: Exception) -> NoReturn:
        if self.broken is None:
            self.back.last_word()
        super()._gone(problem)

    def fail(self, text: str) -> None:
        if self.broken is not None:  # it is gone, or told already
            return
        with suppress(RuntimeError):
            self._say(error(text))
        with suppress(PipelineError):
            if not self.buffers:
                self._open(0)
            # Behind all that was sent, and without waiting for room: in a buffer of its own.
            message = error(text)
            buffer = torch.zeros(size_of(message), dtype=torch.uint8)
            encode(message, buffer)
            for _ in range(self.window):
                self._start(dist.isend, buffer, None)
        self.broken = self.broken or f"this stage failed: {text}"

    def _say(self, message: Message) -> None:
        """Send the last word, besides what is in order."""
        buffer = torch.zeros(_LEAST, dtype=torch.uint8)
        encode(message, buffer)
        self._word = dist.isend(buffer, self.peer, group=self.group, tag=_WORD), buffer

    def _said(self, seconds: float) -> None:
        if self._word is not None:
            with suppress(RuntimeError):  # who is gone needs none
                self._word[0].wait(timedelta(seconds=max(seconds, 1e-3)))
            self._word = None

    def close(self) -> None:
        if not self.buffers:
            self._open(0)
        with suppress(RuntimeError):
            self._say(Message(Kind.END))
        for _ in range(self.window):  # one for each receive that is posted
            self.send(Message(Kind.END))
        while len(self._free) < len(self.buffers):
            slot = self._take(True)
            assert slot is not None
            self._free.append(slot)
        if not self.waiter.finish(self.timeout):
            self._silent()
        self._said(self.timeout)
        self.broken = f"the link to {self.name} is closed"

    def end(self, seconds: float) -> None:
        deadline = time.perf_counter() + seconds
        self._said(seconds)
        self._finish(deadline)
