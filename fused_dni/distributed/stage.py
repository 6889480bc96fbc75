"""A stage of a pipeline, and what it does in a step, whoever carries its messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_dni.context import condition_on
from fused_dni.distributed.mailbox import Ages, Mailbox
from fused_dni.modules.base import DecoupledModule
from fused_dni.modules.decoupled import Decoupled
from fused_dni.modules.late import step_local
from fused_dni.modules.steps import Steps
from fused_dni.rules import Rule

#: How a stage comes by its gradient.
MODES = ("decoupled", "stale", "local", "exact")
#: What a decoupled stage sends down: the gradient that its own prediction makes, in its step; or
#: the one that the true gradient makes, when that has come.
TARGETS = ("bootstrapped", "true")

Loss = Callable[[Tensor, Tensor], Tensor]


class Stage(nn.Module):
    """One of the modules that a model is split into, on its own process.

    Args:
        submodule: the part of the model. In the mode "decoupled" all but the last need a
            synthesizer at their output: a :class:`fused_dni.Decoupled` or
            :class:`fused_dni.FusedDNILinear` has one, anything else is put into a ``Decoupled``
            with the one given here.
        stage_index, num_stages: as in ``torch.distributed.pipelining``.
        synthesizer, update, synthesizer_update, target_scale, max_norm: as in ``Decoupled``.
        local_loss: ``local_loss(h, target)`` of the mode "local", a module if it has parameters.

    Attributes:
        submodule: the part, in its ``Decoupled`` if it was put into one.
        local_loss: as given.

    Raises:
        TypeError: no module; one in ``DistributedDataParallel``, which is refused: replicas of a
            stage would receive targets at different steps and drift apart.
        ValueError: an index that is none of ``range(num_stages)``; a synthesizer for a submodule
            that has one already, or for the last stage, whose gradient is its loss's; what goes
            with a synthesizer without one.
    """

    def __init__(
        self,
        submodule: nn.Module,
        stage_index: int,
        num_stages: int,
        *,
        synthesizer: nn.Module | None = None,
        update: Rule | None = None,
        synthesizer_update: Rule | None = None,
        target_scale: float | None = None,
        max_norm: float | None = None,
        local_loss: Loss | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(submodule, nn.Module):
            raise TypeError(f"submodule must be an nn.Module, got {type(submodule).__name__}")
        if any(isinstance(m, DistributedDataParallel) for m in submodule.modules()):
            raise TypeError(
                "submodule is in DistributedDataParallel: data parallelism inside a stage is not "
                "supported, as replicas would receive targets at different steps and drift apart"
            )
        if num_stages < 1 or not 0 <= stage_index < num_stages:
            raise ValueError(
                f"stage_index must be in [0, {num_stages}), num_stages positive, got stage_index="
                f"{stage_index}, num_stages={num_stages}"
            )
        options: dict[str, Any] = {
            "update": update,
            "synthesizer_update": synthesizer_update,
            "target_scale": target_scale,
            "max_norm": max_norm,
        }
        if synthesizer is None and any(value is not None for value in options.values()):
            given = [name for name, value in options.items() if value is not None]
            raise ValueError(f"{', '.join(given)}: only together with synthesizer")
        if synthesizer is not None:
            if stage_index == num_stages - 1:
                raise ValueError(
                    "synthesizer: the last stage has the true gradient of its loss and needs none"
                )
            if isinstance(submodule, DecoupledModule) and submodule.synthesizer is not None:
                raise ValueError("synthesizer: the submodule has one at its output already")
            submodule = Decoupled(submodule, synthesizer, **options)
        self.submodule = submodule
        self.stage_index, self.num_stages = stage_index, num_stages
        self.local_loss = local_loss

    @property
    def is_first(self) -> bool:
        """Whether it is fed by the data."""
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        """Whether its output goes into the loss."""
        return self.stage_index == self.num_stages - 1

    @property
    def decoupled(self) -> Steps | None:
        """The submodule, if it predicts the gradient at its output."""
        module = self.submodule
        if isinstance(module, Steps) and module.synthesizer is not None:
            return module
        return None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the submodule."""
        return self.submodule(*inputs, **named)

    def extra_repr(self) -> str:
        """Say which of how many."""
        return f"{self.stage_index} of {self.num_stages}"


def why_not(
    stage: Stage,
    index: int,
    world: int,
    mode: str,
    loss: Loss | None,
    targets: str = TARGETS[0],
) -> str:
    """Return what is wrong with a stage in this place of a pipeline; empty if nothing is."""
    if mode not in MODES:
        return f"mode must be one of {list(MODES)}, got {mode!r}"
    if targets not in TARGETS:
        return f"targets must be one of {list(TARGETS)}, got {targets!r}"
    if targets == "true" and mode != "decoupled":
        return f'targets="true" is of mode="decoupled", got mode={mode!r}'
    if stage.num_stages != world:
        return (
            f"the world has {world} ranks, the model num_stages={stage.num_stages} stages: one "
            "rank a stage (data parallelism inside a stage is not supported)"
        )
    if stage.stage_index != index:
        return f"stage_index={stage.stage_index} in the place of {index}: they must be the same"
    if stage.is_last:
        return "" if loss is not None else "loss is missing: the last stage needs one"
    predicts = stage.decoupled is not None
    if mode == "decoupled" and not predicts:
        return (
            'mode="decoupled" needs a synthesizer at the output of every stage but the last: '
            "Stage(..., synthesizer=...)"
        )
    if mode != "decoupled" and predicts:
        return f'mode="{mode}" uses no synthesizer: give the stage the plain submodule'
    if mode == "local" and stage.local_loss is None:
        return 'mode="local" needs Stage(..., local_loss=...)'
    if targets == "true" and not stage.is_first:
        return _why_not_back(stage.submodule)
    return ""


def _why_not_back(module: nn.Module) -> str:
    """Return why no true gradient goes back through a stage's submodule apart from a step."""
    within = list(module.modules())[1:]
    if isinstance(module, Decoupled) and not any(
        isinstance(m, DecoupledModule) and (m.synthesizer is not None or m.update is not None)
        for m in within
    ):
        return ""
    return (
        'targets="true" takes the true gradient back through a plain submodule, behind which '
        "Stage(..., synthesizer=...) puts the synthesizer: this one is a decoupled layer itself, "
        "or holds one with a synthesizer or a rule"
    )


class Arrived(NamedTuple):
    """What a stage is given in a step: h of the stage below or the data, the target of the loss,
    the context, and whether the stage below wants the gradient at its h."""

    x: Tensor
    target: Tensor | None
    context: Tensor | None
    wanted: bool


class Begun(NamedTuple):
    """The first half of a step.

    Attributes:
        h: the output, detached.
        asks: whether the gradient of this step is wanted from above; waits: and must come.
        dx: the gradient for the stage below, if it is known by now and wanted.
        loss: the last stage's, or a local one; detached.
    """

    h: Tensor
    asks: bool
    waits: bool
    dx: Tensor | None
    loss: Tensor | None


class _Flight(NamedTuple):
    """A forward whose gradient has not come."""

    x: Tensor
    h: Tensor
    wanted: bool


class Worker:
    """A stage's training, without links: each step is :meth:`begin`, :meth:`arrive` for all that
    has come, at least until nothing is :meth:`missing`, and :meth:`settle`.

    Args:
        stage: whose gradients are made (added to ``.grad``), or whose rules are applied: mutated.
        loss: ``loss(output, target)`` of the last stage.
        mode: of :data:`MODES`.
        max_age: see :class:`~.pipeline.Pipeline`.
        lag: exactly how many steps later a gradient is used; None: when it is there.
        targets: of :data:`TARGETS`.
    """

    def __init__(
        self,
        stage: Stage,
        loss: Loss | None,
        mode: str,
        max_age: int,
        lag: int | None,
        targets: str = TARGETS[0],
    ) -> None:
        self.stage, self.loss, self.mode = stage, loss, mode
        self.max_age, self.lag, self.relays = max_age, lag, targets == "true"
        decoupled = stage.decoupled if mode == "decoupled" else None
        self.mailbox = None if decoupled is None else Mailbox(decoupled, max_age)
        # Of steps whose true gradient the stage below wants, what goes back again.
        self._inputs: dict[int, Tensor] = {}
        self.ages = Ages() if self.mailbox is None else self.mailbox.ages
        self._flights: dict[int, _Flight] = {}
        # Steps whose gradient was asked for and has not come, in order.
        self._asked: list[int] = []
        self._come: list[tuple[int, Tensor]] = []  # gradients that no step has used yet
        self.too_old = 0
        self.busy = 0.0  # seconds

    def begin(self, step: int, given: Arrived) -> Begun:
        """Run the forward and, where no gradient from above is needed, all else."""
        module = self.stage.decoupled
        if module is not None and module.phase.loss_scale is not None:
            raise ValueError(
                "loss_scale: gradients between stages carry none; give the Schedule of a stage "
                "none, and train in bfloat16"
            )
        with self._timed():
            inside = _nothing() if given.context is None else condition_on(given.context)
            with inside:  # for decoupled layers in the submodule
                if self.stage.is_last:
                    return self._last(given)
                if self.mode == "local":
                    return self._local(given)
                if self._predicts():
                    return self._predicted(step, given)
                return self._open(step, given)

    def _predicts(self) -> bool:
        """Say whether this step's gradient is the prediction's."""
        module = self.stage.decoupled
        return self.mode == "decoupled" and module is not None and not module.phase.true_share

    def _asks(self) -> bool:
        module = self.stage.decoupled
        if self.mode != "decoupled" or module is None:
            return True
        return module.phase.target or module.phase.warmup

    def _run(self, x: Tensor) -> Tensor:
        h = self.stage(x)
        if not isinstance(h, Tensor):
            raise TypeError(f"a stage must return one tensor, got {type(h).__name__}")
        return h

    def _last(self, given: Arrived) -> Begun:
        assert self.loss is not None and given.target is not None
        x = given.x.detach()
        x.requires_grad_(given.wanted)
        with torch.enable_grad():
            h = self._run(x)
            loss = self.loss(h, given.target)
        if loss.requires_grad:
            loss.backward()
        elif given.wanted or _learns(self.stage):
            raise RuntimeError(
                "the loss carries no graph, though the stage's parameters or the stage below ask "
                "for gradients: it is detached, computed under no_grad(), or does not depend on "
                "the output"
            )
        dx = _wanted(x) if given.wanted else None
        return Begun(h.detach(), False, False, dx, loss.detach())

    def _local(self, given: Arrived) -> Begun:
        assert self.stage.local_loss is not None and given.target is not None
        with torch.enable_grad():
            h = self._run(given.x.detach())
            loss = self.stage.local_loss(h, given.target)
        if loss.requires_grad or _learns(self.stage):
            loss.backward()
        return Begun(h.detach(), False, False, None, loss.detach())

    def _predicted(self, step: int, given: Arrived) -> Begun:
        module, relays = self.stage.decoupled, self.relays and given.wanted
        asks = self._asks() or relays
        assert module is not None and self.mailbox is not None
        x = given.x.detach().requires_grad_(given.wanted and not relays)
        h, (dx, *_), ticket = step_local(module, x)  # the context is around
        if asks:
            self.mailbox.put(step, ticket)
            oldest = step - self.max_age
            self._asked = [s for s in self._asked if s >= oldest] + [step]
            self._inputs = {s: t for s, t in self._inputs.items() if s >= oldest}
            if relays:
                self._inputs[step] = x
        return Begun(h, asks, self.lag is not None, dx, None)

    def _open(self, step: int, given: Arrived) -> Begun:
        x = given.x.detach().requires_grad_(given.wanted)
        # Whose weights may be others when the gradient comes: the way back is through them as they
        # are then, as in every asynchronous pipeline that keeps no second set.
        keep = torch.autograd.graph.saved_tensors_hooks(_alone, _same)
        with torch.enable_grad(), keep if self._late() else _nothing():
            h = self._run(x)
        if not h.requires_grad:
            if given.wanted or _learns(self.stage):
                raise RuntimeError(
                    f"the stage's output, {h.dtype} {list(h.shape)}, carries no graph, though its "
                    "parameters or the stage below ask for gradients: it is of integers, detached, "
                    "or computed under no_grad()"
                )
            return Begun(h, False, False, None, None)  # a stage that is frozen
        self._flights[step] = _Flight(x, h, given.wanted)
        self._asked.append(step)
        return Begun(h.detach(), True, True, None, None)

    def _late(self) -> bool:
        return self.mode == "stale" and self.lag != 0

    def arrive(self, of: int, gradient: Tensor) -> None:
        """Take in the gradient at the output of a step, to be used when it is its turn."""
        self._come.append((of, gradient))

    def missing(self, step: int) -> bool:
        """Say whether :meth:`settle` of this step needs a gradient that has not come: by the lag,
        or as nothing was predicted, or as too many are on their way."""
        if self._late():
            last = step - (self.max_age if self.lag is None else self.lag)
            due = {s for s in self._asked if s <= last}
        elif self.lag is not None:
            due = {s for s in self._asked if s <= step - self.lag or s in self._flights}
        else:
            due = set(self._flights)
        return not due <= {of for of, _ in self._come}

    def _may_use(self, step: int, of: int) -> bool:
        """Say whether the gradient of a step that has come is used in this step, and not later."""
        if self.lag is None or (of in self._flights and not self._late()):
            return True
        return of <= step - self.lag

    def settle(self, step: int) -> list[tuple[int, Tensor]]:
        """Use the gradients at the output whose turn it is; by their steps, the gradients at the
        input that follow from them, for the stage below."""
        made = []
        come, self._come = self._come, []
        with self._timed():
            for of, gradient in come:
                if not self._may_use(step, of):
                    self._come.append((of, gradient))
                    continue
                if of in self._asked:
                    self._asked.remove(of)
                flight = self._flights.pop(of, None)
                if flight is not None:
                    h = flight.h
                    if (gradient.shape, gradient.dtype) != (h.shape, h.dtype):
                        raise RuntimeError(
                            f"the gradient at the output of step {of} must be {list(h.shape)} "
                            f"{h.dtype}, got {list(gradient.shape)} {gradient.dtype}"
                        )
                    torch.autograd.backward(h, gradient)
                    self.ages.add(step - of)
                    if flight.wanted:
                        made.append((of, _wanted(flight.x)))
                elif self.mailbox is not None:
                    self.mailbox.learn(of, step, gradient)
                    x = self._inputs.pop(of, None)
                    if x is not None:
                        made.append((of, self._back(x, gradient)))
                else:
                    self.too_old += 1
        return made

    def _back(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient at the input that one at the output makes, through the weights as
        they are now. Nothing else is changed: what a buffer counts, the step has counted, and
        generators of random numbers go on from where they were. A dropout's mask is drawn anew: the
        gradient is then that of another mask than the step's."""
        assert isinstance(self.stage.submodule, Decoupled)
        module = self.stage.submodule.module
        buffers = [(b, b.clone()) for b in module.buffers()]
        x = x.detach().requires_grad_()
        devices = [] if x.device.type == "cpu" else [x.device]
        try:
            with (
                torch.random.fork_rng(devices, device_type=x.device.type),
                torch.enable_grad(),
            ):
                h = module(x)
        finally:
            for b, before in buffers:
                b.data.copy_(before)  # past the graph, which does not read them
        torch.autograd.backward(h, gradient, inputs=[x])
        return _wanted(x)

    def let_go(self) -> int:
        """Forget what waits for gradients that will not come; how many there were."""
        left = len(self._asked)
        self._asked, self._flights, self._come, self._inputs = [], {}, [], {}
        return left

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.busy += time.perf_counter() - began


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _wanted(x: Tensor) -> Tensor:
    """Return the gradient at a stage's input, for which the stage below waits."""
    if x.grad is None:
        raise RuntimeError(
            "no gradient came to the stage's input, for which the stage below waits: what the "
            "stage returns does not depend on it"
        )
    return x.grad


def _alone(t: Tensor) -> Tensor:
    """Return the same memory without its graph, which would hold itself if no backward came."""
    return t.detach()


def _same(t: Tensor) -> Tensor:
    return t


@contextmanager
def _nothing() -> Iterator[None]:
    yield
