"""The autograd nodes of decoupled layers, and the recipe that they share.

=============================  ================================================================
eval, or gradients disabled    no node of this file: the plain module
a layer with its loss          with a rule :class:`Loss`, as :class:`Late`; else that of
                               :func:`fused_dni.functional.linear_cross_entropy`
no rule                        :class:`Local` where a fused synthesizer and a linear layer can be
                               traced, else :class:`Late`: the node returns local gradients
rule, synthetic gradient       :class:`Stepped`: updated in the forward, dx delivered later
rule, true gradient needed     :class:`Late`: backprop, warm-up, mixing; updated at the end of the
                               backward
inside a container             :class:`Delivery`: updated in the forward, dx handed over there
=============================  ================================================================

A backward takes these steps, those that it needs and in this order:

========  =========================================================================================
spend     a second backward would deliver twice: an error (:func:`fused_dni.functional.node.spend`)
unscale   the loss scale is taken out of what arrived (:func:`unscaled`)
predict   M(h), unless the forward did
teach     what arrived is taken to the interface and made a lesson, which trains the synthesizer at
          the end of the backward by its rule, or whose gradients are returned (:func:`received`)
mix       true and synthetic gradient (:func:`mixed_gradient`)
close     back through the layer: dx, and its own gradients or a contribution to its update
rescale   the loss scale is put back into what is returned (:func:`rescaled`)
========  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.modules import module as nn_module
from torch.utils._pytree import tree_leaves

from fused_dni import ops
from fused_dni.backends.common.synthesizer import synthetic_gradient
from fused_dni.functional.linear import (
    LinearUse,
    backward_from_preactivation,
    backward_use,
)
from fused_dni.functional.node import Node, once_differentiable, spend
from fused_dni.modules.base import DecoupledModule, How, LocalStep, Predicted, Regression
from fused_dni.modules.pending import LEARN, UPDATE, at_end_of_backward
from fused_dni.modules.steps import LinearSteps, LossInputs, LossSteps, LossTrace, Steps
from fused_dni.modules.target_unit import note_replicas
from fused_dni.ops.types import (
    Backend,
    LinearConfig,
    LinearGradients,
    LinearTensors,
    Prediction,
    Saved,
    SynthesizerTensors,
)

TWICE = (
    "a decoupled layer's node was run backward a second time: its local gradient would be "
    "delivered twice; run the forward again (retain_graph=True does not help here)"
)

Slots = tuple[Tensor | None, ...]


# ---------------------------------------------------------------------------------------------
# The recipe


class Site(Protocol):
    """What the recipe asks of a layer."""

    def predict(self, h: Tensor, context: Tensor | None, learns: bool) -> Predicted:
        """Run the synthesizer on h."""
        ...

    def regression(
        self, h: Tensor, predicted: Predicted, context: Tensor | None, arrived: Tensor, trace: Any
    ) -> Regression:
        """Take what arrived at h to the interface, for the synthesizer to learn from."""
        ...


def unscaled(arrived: Tensor | None, loss_scale: float | None) -> Tensor | None:
    """Take the loss scale out of what arrived."""
    return arrived if arrived is None or loss_scale is None else arrived / loss_scale


def rescaled(made: Slots, loss_scale: float | None) -> Slots:
    """Put the loss scale back into what a node returns."""
    if loss_scale is None:
        return made
    return tuple(None if t is None else t * loss_scale for t in made)


def mixed_gradient(arrived: Tensor | None, predicted: Predicted, how: How) -> Tensor | None:
    """``share * arrived + (1 - share) * synthetic``, the synthetic gradient made from M(h); None if
    that has no defined part."""
    share = how.true_share
    if share == 1.0:
        return arrived
    scale = how.target_scale / predicted.unit
    synthetic = synthetic_gradient(Prediction(predicted.scaled), scale, how.max_norm)
    if share == 0.0:
        return synthetic
    if arrived is None:
        return (1.0 - share) * synthetic
    return share * arrived.to(synthetic.dtype) + (1.0 - share) * synthetic


def received(
    site: Site,
    how: How,
    h: Tensor,
    context: Tensor | None,
    trace: Any,
    arrived: Tensor | None,
) -> tuple[Tensor | None, Regression | None]:
    """Make of what arrived the gradient at the interface that the layer's update is made from (None
    if there is none), and the synthesizer's lesson (None if it learns nothing)."""
    arrived = unscaled(arrived, how.loss_scale)
    learns = how.learns and arrived is not None
    if not learns and how.true_share == 1.0:
        return arrived, None
    predicted = site.predict(h, context, learns)
    regression = None
    if learns and arrived is not None:
        regression = site.regression(h, predicted, context, arrived, trace)
        arrived = regression.arrived
    return mixed_gradient(arrived, predicted, how), regression


def teach_later(module: DecoupledModule, regression: Regression) -> None:
    """Train the synthesizer by its rule at the end of the running backward."""
    at_end_of_backward(module, LEARN, module.learn, regression)


# ---------------------------------------------------------------------------------------------
# The nodes


class Late(Node):
    """The gradient is made in the backward.

    Without a rule the node returns it for inputs, parameters and synthesizer, which are the
    trailing tensors. With one there is an anchor in the parameters' place, and rules are applied at
    the end of the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        module: Steps,
        inputs: Any,
        context: Tensor | None,
        need_dx: bool,
        asked: int,
        *tensors: Tensor | None,
    ) -> Tensor:
        h, ctx.trace = module.open(inputs, need_dx)
        ctx.set_materialize_grads(False)
        ctx.module, ctx.context, ctx.need_dx, ctx.spent = module, context, need_dx, False
        ctx.asked = asked
        ctx.how = module.how(module.rows_in(h))
        # Saved so that autograd sees a change between forward and backward.
        returned = tensors[asked:] if module.update is None else ()
        ctx.save_for_backward(h, *returned, *module.watched(inputs, need_dx))
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arrived: Tensor | None) -> Slots:
        spend(ctx, TWICE)
        module: Steps = ctx.module
        how: How = ctx.how
        wants = ctx.needs_input_grad
        h = ctx.saved_tensors[0]
        ruled = module.update is not None
        gradient, regression = arrived, None
        if module._modules["synthesizer"] is None:
            gradient = unscaled(arrived, how.loss_scale)
        elif arrived is not None or not ruled:  # with a rule nothing moves where nothing arrives
            gradient, regression = received(module, how, h, ctx.context, ctx.trace, arrived)
        if gradient is None:
            return (None,) * len(wants)
        learned: Slots = ()
        if ruled:
            if regression is not None:
                teach_later(module, regression)
        elif regression is not None:
            learned = (*(regression.behind or ()), *module.regression_gradients(regression))
        dx, made = module.close(ctx.trace, gradient, ctx.need_dx)
        ctx.trace = None
        if ruled:
            at_end_of_backward(module, UPDATE, module.apply_update, made)
            return (*(None,) * 5, *rescaled(dx, how.loss_scale), None)
        out = rescaled((*dx, *made, *learned), how.loss_scale)
        wanted = [t if want else None for t, want in zip(out, wants[5:], strict=False)]
        return (*(None,) * 5, *wanted, *(None,) * (len(wants) - 5 - len(wanted)))


def _keep(ctx: Any, module: DecoupledModule, *saved: Tensor | None, before: int) -> None:
    """Keep of a call what every backward with a rule asks for.

    Args:
        ctx: the node's. module: whose loss scale counts.
        saved: for the backward, and for autograd to see a change in place until then.
        before: how many of the node's arguments stand before those that get a gradient.
    """
    ctx.module, ctx.spent, ctx.before = module, False, before
    ctx.loss_scale = module.phase.loss_scale
    # As set_materialize_grads(False) and save_for_backward(*saved), without a call for each.
    ctx.materialize_grads, ctx.to_save = False, saved


class _Delivers(Node):
    """The update ran in the forward; the backward delivers dx and lets the synthesizer learn."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arrived: Tensor | None) -> Slots:
        spend(ctx, TWICE)
        scale = ctx.loss_scale
        arrived = unscaled(arrived, scale)
        if ctx.predicted is not None and arrived is not None:
            module: Steps = ctx.module
            h = ctx.saved_tensors[0]
            teach_later(
                module, module.regression(h, ctx.predicted, ctx.context, arrived, ctx.trace)
            )
        dx = rescaled(ctx.dx, scale)
        ctx.dx = ctx.predicted = ctx.trace = None
        none: Slots = (None,) * ctx.before
        return none + dx


class Stepped(_Delivers):
    """Of a step from the layer's own prediction."""

    @staticmethod
    def forward(
        ctx: Any,
        module: Steps,
        inputs: Any,
        context: Tensor | None,
        need_dx: bool,
        learns: bool,
        anchor: Tensor | None,
        *asked: Tensor,
    ) -> Tensor:
        step = module.step_locally(inputs, context, need_dx, learns)
        ctx.context, ctx.dx, ctx.predicted, ctx.trace = context, step.dx, step.predicted, step.trace
        _keep(ctx, module, step.h, *(module.parameters_behind() if learns else ()), before=6)
        return step.h


class Taught(_Delivers):
    """The same of a step with a target that was run as one call (quick.py). Behind ``made`` come
    the anchors, and then x."""

    @staticmethod
    def forward(ctx: Any, module: LinearSteps, made: tuple[Any, ...], *given: Tensor) -> Tensor:
        h: Tensor
        h, scaled, reduced, dx, ctx.context, unit = made
        ctx.predicted = Predicted(scaled, Prediction(scaled, reduced), None, unit)
        ctx.dx, ctx.trace = (dx,), None
        _keep(ctx, module, h, before=len(given) + 1)
        return h


class _Closed(Node):
    """:class:`Late` of calls whose input is one tensor, the node's last argument, and whose own
    gradient is applied by a rule. What they ran says in ``ctx.close`` how to go back through it:
    called with the context, the gradient and what was saved it gives dx and a contribution to the
    update of ``ctx.owner``."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arrived: Tensor | None) -> Slots:
        spend(ctx, TWICE)
        saved = ctx.saved_tensors  # raises if one was changed in place
        gradient = unscaled(arrived, ctx.loss_scale)
        none: Slots = (None,) * ctx.before
        if gradient is None:
            return (*none, None)
        dx, contribution = ctx.close(ctx, gradient, *saved)
        ctx.trace = None
        at_end_of_backward(ctx.owner, UPDATE, ctx.owner.apply_update, contribution)
        return none + rescaled((dx,), ctx.loss_scale)


class Exact(_Closed):
    """Of a linear layer without a synthesizer whose step is bound (quick.py)."""

    @staticmethod
    def forward(
        ctx: Any, module: LinearSteps, made: tuple[Any, ...], _anchor: Tensor | None, x: Tensor
    ) -> Tensor:
        return _open_exact(ctx, module, made, x, before=3)


class Mixed(Node):
    """:class:`Late` of a linear layer with a synthesizer whose steps by the true gradient, or mixed
    with it, are bound (quick.py)."""

    @staticmethod
    def forward(
        ctx: Any,
        module: LinearSteps,
        made: tuple[Any, ...],
        context: Tensor | None,
        _anchor: Tensor | None,
        x: Tensor,
    ) -> Tensor:
        ctx.context, ctx.how = context, module.how(x.shape[0])
        return _open_exact(ctx, module, made, x, before=4)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arrived: Tensor | None) -> Slots:
        spend(ctx, TWICE)
        h, *rest = ctx.saved_tensors
        if arrived is None:  # nothing moves
            return (None,) * 5
        module: LinearSteps = ctx.module
        gradient, regression = received(module, ctx.how, h, ctx.context, None, arrived)
        if regression is not None:
            teach_later(module, regression)
        assert gradient is not None
        dx, contribution = _close_exact(ctx, gradient, h, *rest)
        ctx.trace = None
        at_end_of_backward(module, UPDATE, module.apply_update, contribution)
        return (None, None, None, None, *rescaled((dx,), ctx.loss_scale))


def _open_exact(
    ctx: Any, module: LinearSteps, made: tuple[Any, ...], x: Tensor, before: int
) -> Tensor:
    h: Tensor
    h, normalized, rstd, ctx.need_dx = made
    bound = module._binding
    assert bound.layer is not None
    ctx.owner, ctx.close, ctx.bound = module, _close_exact, bound.exact
    ctx.layer, ctx.config, ctx.trace = bound.layer, module.config, (normalized, rstd)
    weight, _, *read, _, _ = bound.layer
    watched = [t for t in (weight if ctx.need_dx else None, *read) if t is not None]
    _keep(ctx, module, h, x, *watched, before=before)
    return h


def _close_exact(
    ctx: Any, gradient: Tensor, h: Tensor, x: Tensor, *_: Tensor
) -> tuple[Tensor | None, Any]:
    module: LinearSteps = ctx.module
    made = ctx.bound.backward(gradient, x, h, *ctx.trace, ctx.need_dx)
    if made is not None:
        dx, delta, *vectors = made
        return dx, (x, LinearGradients(delta, None, None, *vectors))
    backend = module.synthesizer_backend(x)
    saved = Saved(*ctx.trace)
    use = LinearUse(x, h.detach(), saved, ctx.layer, ctx.config, True, backend)
    (dx,), contribution = module.close(use, gradient, ctx.need_dx)
    return dx, contribution


class ExactStack(_Closed):
    """Of layers one behind the other, and of the :class:`Loss` behind them if there is one. Behind
    ``made`` come the anchors, and then x."""

    @staticmethod
    def forward(ctx: Any, stack: Any, made: tuple[Any, ...], *given: Tensor) -> Tensor:
        h: Tensor
        h, left, ctx.need_dx, x, labels, share = made  # x: what was multiplied of given[-1]
        ctx.trace = (left, labels, share)
        ctx.owner, ctx.close = stack, _close_stack
        kept = h if stack.head is None else None
        watched = stack.watched(ctx.need_dx)
        _keep(ctx, stack.last, kept, x, *watched, before=len(given) + 1)
        return h


def _close_stack(
    ctx: Any, gradient: Tensor, h: Tensor | None, x: Tensor, *_: Tensor
) -> tuple[Tensor | None, Any]:
    if h is not None:
        h = h.detach()  # the output itself would keep its own node alive
    made: tuple[Tensor | None, Any] = ctx.owner.backward(gradient, x, h, *ctx.trace, ctx.need_dx)
    return made


class Loss(_Closed):
    """Of a layer with its cross-entropy. The loss itself is not kept: it may be changed in place,
    as any loss (``loss /= steps``)."""

    @staticmethod
    def forward(
        ctx: Any,
        module: LossSteps,
        made: tuple[Tensor, LossTrace],
        need_dx: bool,
        _anchor: Tensor | None,
        x: Tensor,
    ) -> Tensor:
        loss, ctx.trace = made
        ctx.owner, ctx.close, ctx.need_dx = module, _close_loss, need_dx
        _keep(ctx, module, x, ctx.trace.layer.weight if need_dx else None, before=4)
        return loss


def _close_loss(ctx: Any, gradient: Tensor, *_: Tensor | None) -> tuple[Tensor | None, Any]:
    (dx,), contribution = ctx.module.close(ctx.trace, gradient, ctx.need_dx)
    return dx, contribution


class StackLoss(Node):
    """:class:`Delivered` of layers that predict and the :class:`Loss` behind them, in a step that
    was run as one call (quick.py). Behind ``made`` come the anchors, and then x."""

    @staticmethod
    def forward(ctx: Any, stack: Any, made: tuple[Any, ...], *given: Tensor) -> Tensor:
        loss: Tensor
        loss, left, rows, ctx.dx, labels, unit = made
        ctx.stack, ctx.made = stack, (left, rows, labels, unit)
        # The lesson reads the weight: a change between forward and backward is to be an error.
        read = None if unit is None else stack.head.weight
        _keep(ctx, stack.head, read, before=len(given) + 1)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arrived: Tensor | None) -> Slots:
        spend(ctx, TWICE)
        _ = ctx.saved_tensors
        gradient = unscaled(arrived, ctx.loss_scale)
        if gradient is not None:
            ending = ctx.stack.endings[ctx.made[-1] is not None]
            at_end_of_backward(ending, UPDATE, ending.apply_update, (gradient, *ctx.made))
        dx = rescaled((ctx.dx,), ctx.loss_scale)
        ctx.made = ctx.dx = None
        none: Slots = (None,) * ctx.before
        return none + dx


class Local(Node):
    """:class:`Late` of a linear layer with a fused synthesizer and without a rule, on tensors
    alone: ``torch.compile`` follows it.

    Inputs: x, 4 layer slots, 4 synthesizer slots (differentiable), then what is not; ``owner`` is
    None, and the synthesizer's ``unit`` stays as it is, where the call is traced.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        synthesizer_weight: Tensor,
        down: Tensor | None,
        context_weight: Tensor | None,
        synthesizer_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        table: Tensor | None,
        ignore_index: int,
        context: Tensor | None,
        statistics: Tensor,
        config: LinearConfig,
        backend: Backend,
        kind: str,
        how: How,
        unit: float,
        owner: DecoupledModule | None,
        need_dx: bool,
    ) -> Tensor:
        layer = LinearTensors(weight, bias, norm_weight, norm_bias, running_mean, running_var)
        h, saved = ops.linear_forward(backend, x, layer, config, True, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x,
            h,
            *saved,
            weight,
            bias,
            norm_weight,
            norm_bias,
            synthesizer_weight,
            down,
            context_weight,
            synthesizer_bias,
            context,
        )
        ctx.running, ctx.statistics = (running_mean, running_var), statistics
        ctx.call, ctx.kind = (config, True, backend), kind
        # Not saved: it is read as it is when the backward predicts.
        ctx.label_part = (table, ignore_index)
        ctx.how, ctx.need_dx, ctx.spent = how, need_dx, False
        ctx.unit, ctx.owner = unit, owner
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arrived: Tensor | None) -> Slots:
        spend(ctx, TWICE)
        how: How = ctx.how
        x, h, normalized, rstd, *slots, context = ctx.saved_tensors
        layer = LinearTensors(*slots[:4], *ctx.running)
        use = LinearUse(x, h, Saved(normalized, rstd), layer, *ctx.call)
        synthesizer = SynthesizerTensors(ctx.kind, *slots[4:], *ctx.label_part)
        site = _TensorSite(synthesizer, use, how.target_scale, ctx.statistics, ctx.unit, ctx.owner)
        none: Slots = (None,) * 22
        gradient, regression = received(site, how, h, context, use, arrived)
        if gradient is None:
            return none
        trained = none[:4] if regression is None else site.regression_gradients(regression)
        wants = ctx.needs_input_grad
        need_dx, need_weight = ctx.need_dx and wants[0], wants[1]
        if use.config.interface == "preactivation":
            made = backward_from_preactivation(use, gradient, need_dx, need_weight)
            behind = (None, None) if regression is None else regression.behind[2:]
        else:
            made = backward_use(use, gradient, need_dx, need_weight)
            behind = (made.norm_weight, made.norm_bias)
        out = rescaled((made.x, made.weight, made.bias, *behind, *trained), how.loss_scale)
        wanted = [t if want else None for t, want in zip(out, wants, strict=False)]
        return (*wanted, *none[len(wanted) :])


class _TensorSite:
    """A linear layer's tensors and its synthesizer's, as :class:`Site`."""

    def __init__(
        self,
        synthesizer: SynthesizerTensors,
        use: LinearUse,
        target_scale: float,
        statistics: Tensor,
        unit: float,
        owner: DecoupledModule | None,
    ) -> None:
        self.synthesizer, self.use = synthesizer, use
        self.target_scale, self.statistics = target_scale, statistics
        self.unit, self.owner = unit, owner
        if owner is not None:
            # torch.func.functional_call may have lent the tensors for the forward alone.
            own = owner.synthesizer_parameters()[0]
            if own is not None and own.data_ptr() == synthesizer.weight.data_ptr():
                self.unit = owner.unit
            else:
                self.owner = None

    def predict(self, h: Tensor, context: Tensor | None, learns: bool) -> Predicted:
        made = ops.synthesizer_predict(self.use.backend, h, self.synthesizer, context)
        return Predicted(made.scaled, made, None, self.unit)

    def regression(
        self, h: Tensor, predicted: Predicted, context: Tensor | None, arrived: Tensor, trace: Any
    ) -> Regression:
        if self.use.config.interface == "output":
            return Regression(h, predicted, context, arrived, self.target_scale)
        true = backward_use(self.use, arrived, False, False)
        behind = (None, None, true.norm_weight, true.norm_bias)
        return Regression(h, predicted, context, true.delta, self.target_scale, behind)

    def regression_gradients(self, regression: Regression) -> Slots:
        unit, predicted = self.unit, regression.predicted
        if self.owner is not None:
            unit = self.owner.follow([regression])
            if unit != predicted.unit:
                predicted = predicted.within(unit)
        assert predicted.prediction is not None
        return ops.synthesizer_gradients(
            self.use.backend,
            regression.h,
            predicted.prediction,
            regression.arrived.contiguous(),
            self.synthesizer,
            regression.context,
            regression.target_scale / unit,
            self.statistics,
        )


class Sealed(Node):
    """An activation inside a container: its gradient is taken there and goes no further."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, _anchor: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Slots:
        raise RuntimeError(
            "immediate delivery: an activation inside a DecoupledSequential has one consumer, the "
            "next module; a backward came through a second one (for deferred delivery put the "
            "modules into nn.Sequential)"
        )


# ---------------------------------------------------------------------------------------------
# What a module's forward calls


class Call(NamedTuple):
    """A call of a decoupled module with a rule, as :func:`watching` reports it."""

    module: Steps
    inputs: Any
    context: Tensor | None
    need_dx: bool


_watchers: list[Callable[[Call], None]] = []


def watchers() -> list[Callable[[Call], None]]:
    """Return those that :func:`watching` lists, live."""
    return _watchers


@contextmanager
def watching(report: Callable[[Call], None]) -> Iterator[None]:
    """Have every call of a decoupled module with a rule reported, inside the ``with`` block."""
    _watchers.append(report)
    try:
        yield
    finally:
        _watchers.remove(report)


def ruled(
    module: Steps,
    inputs: Any,
    asked: tuple[Tensor, ...],
    context: Tensor | None,
    need_dx: bool,
) -> Tensor:
    """Run a module with a rule in training.

    Args:
        inputs: what the module is called with; asked: its tensors that can ask for gradients.
        need_dx: whether any producer wants one.
    """
    for report in _watchers:
        report(Call(module, inputs, context, need_dx))
    module.refuse_fused_rule()
    phase = module.phase
    if module._modules["synthesizer"] is None or phase.true_share > 0.0:
        module.refuse_later(context)
        anchored = anchor(module.trained())
        h: Tensor = Late.apply(module, inputs, context, need_dx, len(asked), *asked, anchored)
        return h
    learns = phase.target
    stepped: Tensor
    if not learns and not any([t.requires_grad for t in asked]):
        stepped = module.step_locally(inputs, context, False, False).h
    else:
        anchored = anchor(module.learners()) if learns else None
        stepped = Stepped.apply(module, inputs, context, need_dx, learns, anchored, *asked)
    torch.clear_autocast_cache()  # it may hold the parameters as they were before the update
    return stepped


def ruled_loss(module: LossSteps, inputs: LossInputs, need_dx: bool) -> Tensor:
    """:func:`ruled` of a layer with its cross-entropy."""
    for report in _watchers:
        report(Call(module, inputs, None, need_dx))
    module.refuse_fused_rule()
    module.refuse_later(None)
    with torch.no_grad():
        made = module.open(inputs, need_dx)
    loss: Tensor = Loss.apply(module, made, need_dx, anchor(module.local_parameters()), inputs.x)
    return loss


def unruled(
    module: Steps,
    inputs: Any,
    asked: tuple[Tensor, ...],
    context: Tensor | None,
    need_dx: bool,
) -> Tensor:
    """Run a module without a rule in training; arguments as of :func:`ruled`."""
    module.check_context(context)
    note_replicas(module)
    parameters = module.trained()
    h: Tensor = Late.apply(module, inputs, context, need_dx, len(asked), *asked, *parameters)
    return h


class Delivery:
    """Immediate delivery: one call of a module that updates at once and hands its dx back.

    Set on the module around the call, so that forward hooks run as ever. ``dx`` (by tensor among
    the arguments) and ``gradients`` (without a rule) are there after :meth:`run`, and ``sealed``,
    the output, which is what :meth:`run` returns unless a hook put another in its place.
    """

    def __init__(self, module: DecoupledModule, need_dx: bool, learns: bool) -> None:
        self.module = module
        self.need_dx = need_dx
        self.learns = learns
        self.dx: Slots = ()
        self.gradients: Slots = ()
        self.sealed: Tensor | None = None
        self._entered: tuple[Tensor, ...] = ()  # what reached the forward, as ``dx`` is ordered
        self._waiting: tuple[LocalStep, Predicted, Tensor | None] | None = None

    def run(self, *inputs: Any, context: Tensor | None, **named: Any) -> Tensor:
        """Call the module with detached tensors, of which those that ask for a gradient get one if
        ``need_dx``; its output is sealed: a backward through it is an error."""
        hooked = _hooked(self.module)  # before the call: a hook may remove itself
        self.module.delivery = self
        try:
            h: Tensor = self.module(*inputs, context=context, **named)
        finally:
            self.module.delivery = None
        if not hooked:  # else there may be something on the way in or out
            self.sealed = h
        elif self.dx:
            given = tuple(t for t in tree_leaves((inputs, named)) if isinstance(t, Tensor))
            self.dx = through(self._entered, given, self.dx)
        self._entered = ()
        return h

    def take(self, step: LocalStep, context: Tensor | None) -> None:
        """Take the module's side of :meth:`run`."""
        self.dx = step.dx
        self.gradients = step.gradients
        if step.predicted is not None:
            self._waiting = (step, step.predicted, context)

    def waiting(self) -> tuple[LocalStep, Predicted, Tensor | None]:
        """Return what waits for the gradient at the output: the step, its prediction and the
        context."""
        assert self._waiting is not None
        return self._waiting

    def regression(self, arrived: Tensor) -> Regression:
        """Return what the synthesizer learns from a gradient that arrived at ``sealed``."""
        step, predicted, context = self.waiting()
        arrived = arrived.reshape(step.h.shape)
        return self.module.regression(step.h, predicted, context, arrived, step.trace)


def delivered(
    module: Steps, inputs: Any, asked: tuple[Tensor, ...], context: Tensor | None
) -> Tensor:
    """Run a module inside a :class:`Delivery`; arguments as of :func:`ruled`."""
    delivery: Delivery = module.delivery
    if module.update is not None:
        module.refuse_fused_rule()
    else:
        note_replicas(module)
    with torch.no_grad():
        step = module.step_locally(inputs, context, delivery.need_dx, delivery.learns)
    if module.update is not None:
        torch.clear_autocast_cache()
    delivery.take(step, context)
    with torch.enable_grad():
        h: Tensor = Sealed.apply(step.h, torch.empty(0, requires_grad=True))
    delivery.sealed, delivery._entered = h, asked
    return h


def _hooked(module: torch.nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
    )


def through(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], gradients: Slots) -> Slots:
    """Take gradients at ``outputs`` back to ``inputs``, through what hooks did between them."""
    at = [
        (t, g.reshape(t.shape).to(t.dtype))
        for t, g in zip(outputs, gradients, strict=True)
        if g is not None and t.requires_grad
    ]
    asked = [t for t in inputs if t.requires_grad]
    made: Slots = ()
    if at and asked:
        reached, arrived = zip(*at, strict=True)
        made = torch.autograd.grad(reached, asked, arrived, allow_unused=True)
    by_id = {id(t): g for t, g in zip(asked, made, strict=False)}
    return tuple([by_id.get(id(t)) for t in inputs])


def anchor(parameters: Slots) -> Tensor | None:
    """Find a parameter that makes a node's output ask for a gradient though none is returned."""
    for p in parameters:
        if p is not None and p.requires_grad:
            return p
    return None
