"""``Pipeline``: one process a stage, and no stage that waits for a backward."""

from __future__ import annotations

import atexit
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_dni.distributed.links import LINGER, Bell, GroupIncoming, GroupOutgoing
from fused_dni.distributed.stage import Arrived, Loss, Stage, Worker, why_not
from fused_dni.distributed.wire import PROTOCOL, Flag, Kind, Message, PipelineError
from fused_dni.modules.base import DecoupledModule

if TYPE_CHECKING:
    from typing_extensions import Self

# Bytes that ranks exchange about themselves.
_CARD = 8192


class StepOutput(NamedTuple):
    """What a stage has of a step.

    Attributes:
        step: its number, from 0.
        loss: the last stage's, or a local one, detached, []; None elsewhere.
        output: the last stage's output, detached; None elsewhere.
    """

    step: int
    loss: Tensor | None
    output: Tensor | None


class Pipeline:
    """Train a model whose stages are the ranks of the process group, each at its own pace.

    Stage i sends its output up and goes on. In the mode "decoupled" it has updated from its
    synthesizer by then; the gradient at its output comes back when it comes, on steps for which the
    stage's schedule asks for a target, and trains the synthesizer on the output that it belongs to.
    Nothing waits for the backward direction but where the schedule asks for the true gradient
    (warm-up, mixing). The forward direction waits when the next stage is ``window`` messages
    behind.

    On every rank, after ``torch.distributed.init_process_group("gloo")`` (or of another backend:
    links are gloo's in any case, and copy what is on a GPU over the host)::

        stage = Stage(modules[rank], rank, world, synthesizer=...)
        optimizer = torch.optim.Adam(stage.parameters())
        with Pipeline(stage, loss=F.cross_entropy) as pipeline:
            for out in pipeline.run(batches):  # (x, target); used on the first rank alone
                optimizer.step()
                optimizer.zero_grad()

    Gradients are in ``.grad`` when a step is handed out; stages with rules have applied them.
    Optimizers, schedulers, clipping and :class:`fused_dni.Schedule` are each rank's own, as on one
    machine; give all ranks the same warm-up.

    Args:
        stage: this rank's, whose ``stage_index`` is the rank.
        loss: ``loss(output, target)``, a mean over the batch; needed by the last stage.
        mode: "decoupled"; "stale": no prediction, each gradient used when it comes, through the
            weights as they are then; "local": each stage by its ``local_loss``, nothing comes back;
            "exact": each stage waits for its gradient (a pipeline of one microbatch).
        targets: of the mode "decoupled", what a stage sends down for the synthesizer below.
            "bootstrapped": the gradient at its input that its prediction makes, in the same step.
            "true": what the true gradient makes, once that has come: the stage runs forward again
            then, on the input kept, and back to it, through the weights as they are (a dropout
            draws another mask for it). Later by the links above, and more work on steps with
            targets, but no sum of predictions' errors: for chains of many stages.
        window: messages that may be on their way over a link in each direction, 1 or more. A link
            of one-way time t needs ``1 + 2 * t / step``; more than that lets targets grow old
            behind a slow stage.
        max_age: steps after which a target is dropped, and which "stale" does not exceed: it
            waits. Default ``8 * window``.
        lag: use each gradient exactly so many steps late, and wait for it if it is not there: the
            same numbers on every run. None: when it comes.
        timeout: seconds that a neighbour may be silent while something is waited for; at most a
            second more for each stage between that and the end of the pipeline behind it.
        capacity: bytes of the largest message; None for that of the first batch.

    Raises:
        TypeError: a stage that is none.
        ValueError: arguments out of range, a stage that does not fit its rank, the world or the
            mode, or ranks whose arguments or versions differ: each rank raises it, at once.
        RuntimeError: no process group.
        PipelineError: not every rank made its pipeline within ``timeout``.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        loss: Loss | None = None,
        mode: str = "decoupled",
        targets: str = "bootstrapped",
        window: int = 4,
        max_age: int | None = None,
        lag: int | None = None,
        timeout: float = 300.0,
        capacity: int | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                'there is no process group: call torch.distributed.init_process_group("gloo") '
                "first, in processes started by torchrun"
            )
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.stage, self.mode, self.window, self.lag = stage, mode, window, lag
        self.targets, self.timeout = targets, timeout
        problem = self._why_not(loss, capacity, max_age)
        self.max_age = max_age
        self._agree(problem)
        self.max_age = 8 * window if max_age is None else max_age
        conditioned = [card["conditioned"] for card in self.exchange(_conditions(stage))]
        self._context_above = any(conditioned[self.rank + 1 :])
        # Of their own, apart from users' collectives: a pair that breaks is broken for good.
        pairs = self._groups([[below, below + 1] for below in range(self.world - 1)])
        self._pairs = [pairs[i] for i in (self.rank - 1, self.rank) if 0 <= i < len(pairs)]
        self.worker = Worker(stage, loss, mode, self.max_age, lag, targets)
        self.steps = 0
        self._over = self._closed = False
        self._must = False  # the stage below waits for the gradient of the step at work
        self._failed: str | None = None
        self._ended = False  # no more gradients will come
        self._dropped = 0
        self.left = 0  # targets that were on their way when the pipeline was closed
        self._began: float | None = None
        self._up = self._down = self._from_up = self._from_down = None
        bell = Bell()
        # Who waits for one that waits itself is given longer: the nearest to a silent one tells.
        longer = min(1.0, timeout / 4)
        if not stage.is_last:
            above, patience = self.rank + 1, timeout + longer * (self.world - 2 - self.rank)
            at = (above, f"stage {above}", pairs[self.rank], window, patience, bell)
            self._from_up = GroupIncoming(*at)
            self._up = GroupOutgoing(*at, capacity, self._from_up)
        if not stage.is_first:
            below = self.rank - 1
            patience = timeout + longer * below
            at = (below, f"stage {below}", pairs[below], window, patience, bell)
            self._from_down = GroupIncoming(*at)
            self._down = GroupOutgoing(*at, capacity, self._from_down)
        for end in (self._up, self._down):
            if end is not None:
                end.meanwhile = self._take_in
        if self._from_down is not None:
            self._from_down.meanwhile = self._relay
        atexit.register(self._let_go)  # of threads: see links.py

    # -- before anything is changed ------------------------------------------------------------

    def _why_not(self, loss: Loss | None, capacity: Any, max_age: Any) -> Exception | None:
        """Return what is wrong with this rank's arguments."""
        stage: Any = self.stage
        if not isinstance(stage, Stage):
            return TypeError(f"stage must be a Stage, got {type(stage).__name__}")
        why = why_not(stage, self.rank, self.world, self.mode, loss, self.targets)
        if why:
            return ValueError(why)
        for name, value, least in (
            ("window", self.window, 1),
            ("max_age", max_age, 0),
            ("lag", self.lag, 0),
            ("capacity", capacity, 1),
        ):
            if (value is not None or name == "window") and (
                type(value) is not int or value < least
            ):
                return ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        given: Any = self.timeout
        if not isinstance(given, (int, float)) or not 0.0 < given < math.inf:
            return ValueError(f"timeout must be positive and finite seconds, got {given!r}")
        oldest = 8 * self.window if max_age is None else max_age
        if self.lag is not None and self.lag > oldest:
            return ValueError(
                f"lag={self.lag} is more than max_age={oldest}: every target would be dropped"
            )
        return None

    def _card(self) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "fused_dni": _version(),
            "torch": torch.__version__,
            "mode": self.mode,
            "targets": self.targets,
            "window": self.window,
            "max_age": self.max_age,
            "lag": self.lag,
        }

    def _agree(self, problem: Exception | None) -> None:
        """Raise on every rank if one has a problem, or if ranks differ."""
        if problem is not None and "timeout" in str(problem):
            self.timeout = 300.0
        (self._all,) = self._groups([list(range(self.world))])
        cards = self.exchange(self._card() if problem is None else {"why": str(problem)[:1000]})
        if problem is not None:
            raise problem
        for rank, card in enumerate(cards):
            if "why" in card:
                raise ValueError(f"rank {rank}: {card['why']}")
        for rank, card in enumerate(cards):
            for name, value in card.items():
                if value != cards[0].get(name):
                    raise ValueError(
                        f"ranks differ: {name} is {cards[0].get(name)!r} on rank 0 and {value!r} "
                        f"on rank {rank}"
                    )

    def _groups(self, ranks: list[list[int]]) -> list[Any]:
        """Process groups, which all ranks must make together; of gloo, whatever the default group
        is of: messages lie in the host's memory."""
        seconds = timedelta(seconds=self.timeout)
        try:
            return [dist.new_group(some, timeout=seconds, backend="gloo") for some in ranks]
        except RuntimeError as problem:
            raise PipelineError(
                f"not every rank came to make its Pipeline within {self.timeout:g} s (timeout)"
            ) from problem

    def exchange(self, card: dict[str, Any]) -> list[dict[str, Any]]:
        """Exchange what JSON holds in at most 8 KiB between all ranks; by rank."""
        raw = json.dumps(card).encode()
        if len(raw) > _CARD:
            raise ValueError(f"{len(raw)} bytes are too many to exchange, at most {_CARD}")
        mine = torch.zeros(_CARD, dtype=torch.uint8)
        mine[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
        all_of = [torch.empty_like(mine) for _ in range(self.world)]
        try:
            dist.all_gather(all_of, mine, group=self._all)
        except RuntimeError as problem:
            raise PipelineError(
                f"a rank is gone, or was silent for {self.timeout:g} s (timeout): {problem}"
            ) from problem
        found: list[dict[str, Any]] = []
        for t in all_of:
            found.append(json.loads(bytes(t.tolist()).rstrip(b"\0")))
        return found

    # -- steps -----------------------------------------------------------------------------------

    def run(self, batches: Iterable[Any] | None = None) -> Iterator[StepOutput]:
        """Train on batches until there are none; a step is handed out when its gradients are there.

        Args:
            batches: of (x, target) or (x, target, context), on the first stage; elsewhere not
                looked at. x [N, ...] is the submodule's one argument; target goes to the loss;
                context, for synthesizers, is the target if it is not given.

        Raises:
            PipelineError, ValueError: as :meth:`step`.
            TypeError: no batches on the first stage, or one that is no such tuple or list. This
                and what ``batches`` raise is a PipelineError on the other ranks.
        """
        if not self.stage.is_first:
            while (out := self.step()) is not None:
                yield out
        else:
            with self._telling():
                if batches is None:
                    raise TypeError("batches are missing: the first stage needs them")
                feed = iter(batches)
            while (batch := self._next(feed)) is not None:
                out = self.step(*batch)
                assert out is not None
                yield out
        self.close()

    def _next(self, feed: Iterator[Any]) -> Sequence[Any] | None:
        with self._telling():
            for batch in feed:
                if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
                    raise TypeError(
                        "a batch must be (x, target) or (x, target, context), got "
                        f"{type(batch).__name__}"
                    )
                return batch
        return None

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell the other ranks of what is raised inside."""
        try:
            yield
        except BaseException as problem:
            self._fail(str(problem) if isinstance(problem, PipelineError) else repr(problem))
            raise

    def step(
        self, x: Tensor | None = None, target: Tensor | None = None, context: Tensor | None = None
    ) -> StepOutput | None:
        """Train one step; None where the stage below has ended.

        Args:
            x, target, context: on the first stage, see :meth:`run`; on others left out.

        Raises:
            PipelineError: a neighbour that failed, vanished, is silent, or sent what does not fit;
                or a pipeline that failed before or is closed. What else the stage raises goes to
                the caller, and to the other ranks as a PipelineError.
            TypeError: arguments that are no tensors.
            ValueError: x missing on the first stage, or given on another.
        """
        if self._failed is not None or self._closed:
            raise PipelineError(self._failed or "the pipeline is closed")
        if self.stage.is_first != (x is not None):
            raise ValueError(
                "x goes to the first stage, and to no other: "
                f"this is stage {self.stage.stage_index}"
            )
        if self._began is None:
            self._began = time.perf_counter()
        with self._telling():
            for name, t in (("x", x), ("target", target), ("context", context)):
                if t is not None and not isinstance(t, Tensor):
                    raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
            return self._step(x, target, context)

    def _step(
        self, x: Tensor | None, target: Tensor | None, context: Tensor | None
    ) -> StepOutput | None:
        step = self.steps
        if x is None:
            given = self._receive(step)
            if given is None:
                self._over = True
                return None
        else:
            given = Arrived(x, target, target if context is None else context, False)
        if given.target is None and (self.stage.is_last or self.mode == "local"):
            raise ValueError("target is missing: the loss needs it")
        begun = self.worker.begin(step, given)
        if self._up is not None:
            if not self._context_above and given.context is not given.target:
                given = given._replace(context=None)
            self._up.send(_forward(step, begun.h, given, begun.asks, begun.waits))
        if given.wanted and begun.dx is not None:
            self._send_down(step, begun.dx)
        self._take_in()
        while self.worker.missing(step):
            if self._ended:
                raise PipelineError(f"stage {self.rank + 1} has ended and owes a gradient")
            self._take_in(wait=True)
        for of, dx in self.worker.settle(step):
            self._send_down(of, dx)
        self.steps = step + 1
        return StepOutput(step, begun.loss, begun.h if self.stage.is_last else None)

    def _receive(self, step: int) -> Arrived | None:
        assert self._from_down is not None
        message = self._from_down.receive()
        assert message is not None
        if message.kind is Kind.END:
            return None
        self._must = bool(message.flags & Flag.WAITS)
        if message.kind is not Kind.FORWARD or message.step != step or len(message.tensors) != 3:
            raise PipelineError(
                f"{self._from_down.name} sent {message.kind.name} of step {message.step} with "
                f"{len(message.tensors)} tensors where FORWARD of step {step} with 3 was due"
            )
        h, target, context = message.tensors
        if h is None:
            raise PipelineError(f"{self._from_down.name} sent no output in step {step}")
        if message.flags & Flag.CONTEXT:
            context = target
        like = next(self.stage.parameters(), h)
        h, target, context = (
            None if t is None else t.to(like.device) for t in (h, target, context)
        )
        assert h is not None
        return Arrived(h, target, context, bool(message.flags & Flag.TARGET))

    def _send_down(self, step: int, dx: Tensor) -> None:
        """Send a gradient down; dropped, where nobody waits for it and there is no room."""
        assert self._down is not None
        wait = self._must or self.mode == "stale"
        if not self._down.send(Message(Kind.GRADIENT, step, 0, (dx,)), wait):
            self._dropped += 1

    def _take_in(self, wait: bool = False) -> None:
        """Take in the gradients at the output that have come; or wait for one, and then."""
        incoming = self._from_up
        while incoming is not None and not self._ended:
            message = incoming.receive(wait)
            if message is None:
                return
            if message.kind is Kind.END:
                self._ended = True
                return
            (gradient,) = message.tensors if len(message.tensors) == 1 else (None,)
            if message.kind is not Kind.GRADIENT or gradient is None or message.step > self.steps:
                raise PipelineError(
                    f"{incoming.name} sent {message.kind.name} of step {message.step} where a "
                    f"gradient of a step up to {self.steps} was due"
                )
            wait = False
            device = next(self.stage.parameters(), gradient).device
            self.worker.arrive(message.step, gradient.to(device))

    def _relay(self) -> None:
        """While the input is waited for, send stale gradients on down: the stage below may wait for
        them before it sends any. What they leave in ``.grad`` is the coming step's. A lag fixes
        which step uses what, so nothing is used early then."""
        self._take_in()
        if self.mode == "stale" and self.lag is None:
            for of, dx in self.worker.settle(self.steps):
                self._send_down(of, dx)

    # -- the end ---------------------------------------------------------------------------------

    def _fail(self, text: str) -> None:
        """Tell the neighbours, once, and go no further."""
        if self._failed is None:
            self._failed = text
            for link in (self._up, self._down):
                if link is not None:
                    link.fail(text)

    def _let_go(self) -> None:
        """End the links' threads, and their groups. Of a pipeline that failed: the neighbours have
        some seconds to hear of it, then their connections break."""
        atexit.unregister(self._let_go)
        if not self._closed:
            self._fail("the process has ended")
        deadline = time.perf_counter() + min(self.timeout, LINGER)
        for end in (self._from_up, self._from_down, self._up, self._down):
            if end is not None:
                end.end(deadline - time.perf_counter())
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            with suppress(RuntimeError, ValueError, AssertionError):  # all groups are destroyed
                dist.destroy_process_group(pair)

    def close(self) -> None:
        """End the pipeline: what was sent is taken in upstream, targets that are on their way are
        counted and dropped. Called by :meth:`run` at its end and by ``with``. Of a pipeline that
        failed, let go of what it holds, which takes a few seconds if a neighbour does not answer.

        Raises:
            PipelineError: a neighbour that failed before its end.
        """
        if self._closed:
            return
        if self._failed is not None:
            self._let_go()
            return
        with self._telling():
            if self._from_down is not None and not self._over:
                while (left := self._from_down.receive()) is None or left.kind is not Kind.END:
                    pass
            if self._up is not None:
                self._up.close()
            while self._from_up is not None and not self._ended:
                left = self._from_up.receive()
                self._ended = left is not None and left.kind is Kind.END
            if self._down is not None:
                self._down.close()
        self.left = self.worker.let_go()
        self._closed = True
        self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if problem is None:
                self.close()
            else:
                self._fail(repr(problem))
        finally:
            self._let_go()

    # -- what is told of it ----------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Say what this stage did: seconds in all, at work, and waiting for input, for room to send
        and for gradients; bytes; the age of gradients in steps, and what became of the others."""
        worker, box = self.worker, self.worker.mailbox
        total = 0.0 if self._began is None else time.perf_counter() - self._began
        ends = {"sent_up": self._up, "sent_down": self._down}
        waits = {"input": self._from_down, "gradients": self._from_up, "room": self._up}
        return {
            "stage": self.rank,
            "mode": self.mode,
            "steps": self.steps,
            "seconds": total,
            "busy": worker.busy,
            "waited": {n: 0.0 if end is None else end.waited for n, end in waits.items()},
            "bytes": {n: 0 if end is None else end.sent for n, end in ends.items()},
            "age": worker.ages.report(),
            "learned": worker.ages.count,
            "dropped": {
                "too_old": worker.too_old if box is None else box.too_old,
                "not_finite": 0 if box is None else box.not_finite,
                "no_room": self._dropped,
            },
            "left": self.left,
            "expired": 0 if box is None else box.expired,
        }

    def reports(self) -> list[dict[str, Any]]:
        """Exchange :meth:`report` between all ranks, each of which must call this; by stage."""
        return self.exchange(self.report())


def _version() -> str | None:
    try:
        return version("fused-dni")
    except PackageNotFoundError:  # used from its folder
        return None


def _conditions(stage: Stage) -> dict[str, Any]:
    """Say whether anything in a stage may be conditioned on a context."""
    found = [m for m in stage.modules() if isinstance(m, DecoupledModule)]
    features = [getattr(m.synthesizer, "context_features", None) for m in found]
    return {"conditioned": any(k is None or k > 0 for k in features)}


def _forward(step: int, h: Tensor, given: Arrived, asks: bool, waits: bool) -> Message:
    same = given.context is given.target
    flags = asks * Flag.TARGET | waits * Flag.WAITS | same * Flag.CONTEXT
    context = None if same else given.context
    return Message(Kind.FORWARD, step, flags, (h, given.target, context))
