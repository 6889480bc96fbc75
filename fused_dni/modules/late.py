"""Targets that arrive later than the step they belong to: ``step_local`` and ``learn_late``.

Across a link the gradient of a step comes when the layer has long been updated, many times even. A
synthesizer that learned it as an error of its *old* prediction, or on its newest output, would be
taught something else than what it is to predict (35 % error at a delay of 20 steps, on MNIST). So
what the gradient belongs to is kept, in a :class:`Ticket`, and the prediction is made again when
the gradient is there.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fused_dni.functional.linear import LinearUse
from fused_dni.functional.node import Node
from fused_dni.modules.nodes import Delivery
from fused_dni.modules.steps import LinearSteps, Slots, Steps
from fused_dni.ops.types import Saved

_NAMES = ("h", "shape", "context", "x", "normalized", "rstd", "norm_weight", "norm_bias")


class Ticket:
    """What a late target belongs to: a step's output h and the context, as the synthesizer saw
    them (``shape`` is the output's, of which h may be the rows); of an interface at the
    preactivation also what takes a gradient at h back to there.

    It shares h, the context and, of that interface, the input with whoever else has them: do not
    change these in place. It is good for one lesson, and empty afterwards.

    Only the module that made it takes it: a copy of the module is another one. A ticket that was
    copied, pickled or made by :meth:`from_state_dict` names no maker, and any module takes it whose
    synthesizer its tensors fit.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        due: int | None = None,
        maker: weakref.ref[nn.Module] | None = None,
    ) -> None:
        self._tensors = tensors
        self._due = due  # the schedule's step, where it chooses k; not part of the state
        self._maker = maker

    def __reduce__(self) -> tuple[Any, ...]:
        return Ticket, (self._tensors, self._due)

    def made_by(self, module: nn.Module) -> bool:
        """Say whether the module made the ticket, or may have."""
        return self._maker is None or self._maker() is module

    @property
    def nbytes(self) -> int:
        """The memory that the ticket keeps alive, in bytes."""
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    @property
    def spent(self) -> bool:
        """Whether its lesson has been learned."""
        return not self._tensors

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name, references, to be saved."""
        return dict(self._tensors)

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Ticket:
        """Make the ticket again of what :meth:`state_dict` gave.

        Raises:
            ValueError: names that no ticket has, or no h.
        """
        unknown = sorted(set(state) - set(_NAMES))
        if unknown or not {"h", "shape"} <= set(state):
            raise ValueError(
                f"state must hold h, shape and what there is of {list(_NAMES[2:])}, got "
                f"{sorted(state)}"
            )
        return cls(dict(state))

    def __repr__(self) -> str:
        if self.spent:
            return "Ticket(spent)"
        return f"Ticket(h={self._tensors['shape'].tolist()}, {self.nbytes:,} bytes)"


class LateSums(NamedTuple):
    """What a late lesson added: the step that it belongs to, by the schedule's count, and the
    module's statistics and unit before and after."""

    due: int
    before: Tensor
    unit_before: float
    after: Tensor
    unit_after: float


class LocalOutput(NamedTuple):
    """What :func:`step_local` returns, without a graph.

    Attributes:
        h: the module's output.
        dx: by tensor among the arguments the gradient that the prediction makes for it (a
            bootstrapped target for what lies below); None for those that do not ask for one.
        ticket: for :func:`learn_late`.
    """

    h: Tensor
    dx: Slots
    ticket: Ticket


class _Deposit(Node):
    """Known gradients on their way to ``.grad``: hooks and accumulation are autograd's."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Slots:
        return (None, *ctx.gradients)


def _deposit(parameters: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to the parameters' ``.grad``, as a backward does."""
    pairs = [
        (p, g)
        for p, g in zip(parameters, gradients, strict=True)
        if p is not None and g is not None and p.requires_grad
    ]
    if pairs:
        with torch.enable_grad():
            _Deposit.apply([g for _, g in pairs], *[p for p, _ in pairs]).backward()


def _ready(module: nn.Module, name: str) -> Steps:
    if not isinstance(module, Steps):
        raise TypeError(
            f"{name} takes a FusedDNILinear or a Decoupled, got {type(module).__name__}: put it "
            "into fused_dni.Decoupled(module, synthesizer)"
        )
    if module._modules["synthesizer"] is None:
        raise ValueError(f"{name}: module has synthesizer=None, so it predicts no gradient")
    return module


def step_local(
    module: nn.Module, *inputs: Any, context: Tensor | None = None, **named: Any
) -> LocalOutput:
    """Run a training step of a decoupled module from its own prediction, and leave no graph.

    For gradients that come later, from another process say: the module is updated now, and its
    synthesizer whenever :func:`learn_late` is given the ticket and the gradient at h::

        h, (dx,), ticket = fd.step_local(module, x, context=y)
        ...  # h goes up, dx down; other steps may come between
        fd.learn_late(module, ticket, gradient)

    Args:
        module: a :class:`FusedDNILinear` or :class:`Decoupled` with a synthesizer, in training.
        inputs, named: the module's arguments. Nothing flows back through them: what an argument
            that asks for a gradient is to get is returned.
        context: as in the module's forward.

    Returns:
        :class:`LocalOutput`. With a rule the module's parameters are updated (mutated), without
        one their gradients are added to ``.grad``, through their hooks.

    Raises:
        TypeError: a module of another kind; a segment that returns more than h.
        ValueError: a module without a synthesizer.
        RuntimeError: in ``eval()`` or without gradients, in a phase that needs the true gradient
            (warm-up, mixing): run a forward and a backward there; under a loss scale. What the
            module's forward raises.
    """
    decoupled = _ready(module, "step_local")
    if not decoupled.training or not torch.is_grad_enabled():
        raise RuntimeError(
            "step_local trains: call module.train(), and not under torch.no_grad(); for the output "
            "alone call the module"
        )
    phase = decoupled.phase
    if phase.true_share > 0.0 or phase.probe is not None:
        raise RuntimeError(
            "step_local takes the gradient from the prediction, but the schedule's phase asks for "
            "the true one (warm-up, mix, diagnostics): run the forward and a backward"
        )
    if phase.loss_scale is not None:
        raise RuntimeError("step_local knows no loss scale: give the Schedule none")
    tensors = [t for t in tree_leaves((inputs, named)) if isinstance(t, Tensor)]
    need_dx = any([t.requires_grad for t in tensors])
    cut, kept = tree_map_only(
        Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (inputs, named)
    )
    delivery = Delivery(decoupled, need_dx, True)
    h = delivery.run(*cut, context=context, **kept).detach()
    if decoupled.update is None:
        _deposit(decoupled.local_parameters(), delivery.gradients)
    decoupled.tickets += 1
    return LocalOutput(h, delivery.dx, _ticket(delivery, h.shape))


def _ticket(delivery: Delivery, shape: torch.Size) -> Ticket:
    step, _, context = delivery.waiting()
    held: dict[str, Tensor | None] = {"h": step.h.detach(), "context": context}
    held["shape"] = torch.tensor(shape, device="cpu")
    if isinstance(step.trace, LinearUse):
        # Scale and shift as they were: they may have moved when the gradient is there.
        layer, saved = step.trace.layer, step.trace.saved
        held["x"] = step.trace.x.detach()
        held["normalized"], held["rstd"] = saved
        for name, t in (("norm_weight", layer.norm_weight), ("norm_bias", layer.norm_bias)):
            held[name] = None if t is None else t.detach().clone()
    module = delivery.module
    tensors = {name: _alone(t) for name, t in held.items() if t is not None}
    return Ticket(tensors, module.due, weakref.ref(module))


def _alone(t: Tensor) -> Tensor:
    """Return the same, without the rest of what it is a part of: a ticket may be kept for long."""
    return t.clone() if t.untyped_storage().nbytes() > t.nbytes else t


def learn_late(module: nn.Module, ticket: Ticket, gradient: Tensor) -> None:
    """Train the synthesizer of a module on a gradient that arrived after its step.

    The prediction is made again, at the h and with the context of the step, by the synthesizer as
    it is now. With a rule its parameters are updated (mutated), and with the interface at the
    preactivation those behind it; without one gradients are added to ``.grad``, through hooks. The
    module's statistics (:func:`fused_dni.diagnostics`) count it. An error changes nothing.

    Args:
        module: which made the ticket in :func:`step_local`.
        ticket: of the step that the gradient belongs to; spent afterwards.
        gradient: dL/dh, of h's shape, dtype and device. Without a loss scale.

    Raises:
        TypeError: ``ticket`` is no ticket, ``gradient`` no tensor, or a module of another kind.
        ValueError: a module without a synthesizer, or a gradient that is not finite: what came by
            a broken way is not to be learned.
        RuntimeError: a spent ticket, or one of another module; a shape, dtype or device that is not
            h's, or does not fit the module; a parameter under a rule whose ``.grad`` holds a
            gradient, which the rule does not see.
    """
    decoupled = _ready(module, "learn_late")
    if not isinstance(ticket, Ticket):
        raise TypeError(f"ticket must be of step_local, got {type(ticket).__name__}")
    if ticket.spent:
        raise RuntimeError("ticket is spent: its step's gradient has been learned from")
    if not ticket.made_by(decoupled):
        raise RuntimeError(
            f"ticket is of another module than this {type(module).__name__}: give it to the one "
            "that made it in step_local (for a copy of that: Ticket.from_state_dict of its "
            "state_dict())"
        )
    if not isinstance(gradient, Tensor):
        raise TypeError(f"gradient must be a torch.Tensor, got {type(gradient).__name__}")
    held = ticket._tensors
    h, context = held["h"], held.get("context")
    gradient = gradient.detach()
    shape = held["shape"].tolist()
    given = (list(gradient.shape), gradient.dtype, gradient.device)
    if given != (shape, h.dtype, h.device):
        raise RuntimeError(
            f"gradient must be as h was, {shape} {h.dtype} on {h.device}, got "
            f"{given[0]} {gradient.dtype} on {gradient.device}"
        )
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError("gradient is not finite: nothing was learned from it")
    decoupled.refuse_other_gradients()
    counted = decoupled.late_sums is not None and ticket._due is not None
    before, unit = (decoupled.statistics.clone() if counted else None), decoupled.unit
    with torch.no_grad():
        predicted = decoupled.predict_again(h, context)
        regression = decoupled.regression(
            h, predicted, context, gradient.reshape(h.shape), _trace(decoupled, held)
        )
        if decoupled.synthesizer_update is not None:
            decoupled.learn([regression])
        else:
            learned = decoupled.regression_gradients(regression)
            slots = (*decoupled.parameters_behind(), *decoupled.synthesizer_parameters())
            _deposit(slots, (*(regression.behind or ()), *learned))
    if before is not None:
        assert decoupled.late_sums is not None and ticket._due is not None
        after = decoupled.statistics.clone()
        decoupled.late_sums.append(LateSums(ticket._due, before, unit, after, decoupled.unit))
    ticket._tensors = {}


def _trace(module: Steps, held: dict[str, Tensor]) -> LinearUse | None:
    """Return what takes a gradient at h to an interface at the preactivation."""
    if "x" not in held or not isinstance(module, LinearSteps):
        return None
    x, h = held["x"], held["h"]
    layer = module._layer()._replace(
        norm_weight=held.get("norm_weight"), norm_bias=held.get("norm_bias")
    )
    saved = Saved(held.get("normalized"), held.get("rstd"))
    return LinearUse(x, h, saved, layer, module.config, True, module.synthesizer_backend(x))
