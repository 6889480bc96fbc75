"""A fused layer's training step as one call, where nothing has changed since the last one.

Around a kernel Python asks some dozens of questions (are the parameters still those? is autocast
on?), which takes as long as a small layer's kernels. A backend that can ask them itself is given
them here, as a list; if one is answered otherwise than before, the layer goes its usual way, which
is what gives the errors and binds anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fused_dni import context
from fused_dni.functional import check
from fused_dni.functional.linear import LinearUse
from fused_dni.modules import nodes, target_unit
from fused_dni.modules.base import NO_TARGET, How, Predicted, Regression
from fused_dni.modules.checks import (
    ALWAYS,
    ANYWHERE,
    HOOKS,
    SURROUNDINGS,
    addresses,
    fixed,
    holder,
    items,
    memory,
    rule_checks,
    uncalled,
)
from fused_dni.modules.pending import LEARN, UPDATE, applying
from fused_dni.modules.steps import Binding, LinearSteps, LossSteps, LossTrace
from fused_dni.ops import registry
from fused_dni.ops.types import (
    Backend,
    Check,
    LinearConfig,
    LinearGradients,
    LinearTensors,
    Prediction,
    QuickLoss,
    QuickParts,
    QuickSynthesizer,
    Saved,
)
from fused_dni.synthesizers import (
    CrossEntropySynthesizer,
    DiagonalSynthesizer,
    LinearSynthesizer,
    Synthesizer,
)

# Whose tensors are their parameters, and nothing else counts.
_SYNTHESIZERS = (LinearSynthesizer, DiagonalSynthesizer, CrossEntropySynthesizer)

# Who looks at the parts of a step (annotated, this method is another) gets them.
_ALWAYS: tuple[Check, ...] = (
    *ALWAYS,
    ("attribute", LinearSteps, "step_locally", None, LinearSteps.step_locally),
)


def _parts(layer: LinearSteps) -> QuickParts | None:
    """Return what a step of the layer depends on; None if a list does not say it."""
    own, norm, rule = layer.__dict__, layer._modules["norm"], layer.update
    if rule is None or rule._tensors is None:
        return None
    rules = [own[name] for name in layer.rule_names if own.get(name) is not None]
    # What is not settled, a cumulative average, is another number in every step.
    if not all(map(fixed, rules)) or (norm is not None and not layer.__dict__.get("_seen")):
        return None
    counter = None if norm is None else norm._buffers.get("num_batches_tracked")
    if counter is not None and counter.dtype is not torch.int64:
        return None
    named = ("training", "config", "max_norm", "target_scale", "backend", "statistics")
    checks: list[Check] = [
        *items(own, *named),
        *memory([layer.statistics]),
        ("item", own, "delivery", None, None),
        *items(own, *[name for name in layer.rule_names if name in own]),
        ("items value", own, "phase", "probe", None),
        *holder(layer, "_parameters", "_modules"),
        *[found for each in rules for found in rule_checks(each)],
        *addresses(layer._layer()),
    ]
    if norm is not None:
        checks += holder(norm, "_parameters", "_buffers")
        changing = ("training", "eps", "momentum", "track_running_stats")
        checks += items(norm.__dict__, *[name for name in changing if name in norm.__dict__])
        checks += memory([counter])
    return QuickParts(
        layer,
        SURROUNDINGS,
        _ALWAYS,
        checks,
        least=2 if layer.config.normalization == "batch" else 1,
        counter=counter,
        mark=NO_TARGET,
        group=rule.group,
        state=rule.__dict__,
    )


def _phase(layer: LinearSteps, target: bool) -> list[Check]:
    """Check for a step that the layer takes by its prediction alone."""
    values: list[tuple[str, Any]] = [("warmup", False), ("target", target)]
    if target:  # the numbers that were given, or the defaults
        values += [("mix", layer.phase.mix), ("lessons", layer.phase.lessons)]
    return [("items value", layer.__dict__, "phase", name, value) for name, value in values]


def quicken(layer: LinearSteps, backend: Backend, given: Tensor | None) -> None:
    """Have the layer's next step be one call, if its backend can do that. Where something changes
    from step to step that such a call does not follow, it is tried again after twice as many steps
    each time.

    Args:
        layer: a step of which has just been run, and whose rules are bound.
        backend: by which; given: the context of that call.
    """
    if torch._C._len_torch_dispatch_stack():
        return  # what was made in that step may be no memory
    bound: Binding = layer._binding
    bound.tries += 1
    if bound.tries & (bound.tries - 1):
        return
    bound.quick = bound.exact = None
    bound.lacks, bound.checks = _bind(layer, backend, given)


def _bind(
    layer: LinearSteps, backend: Backend, given: Tensor | None
) -> tuple[str, Sequence[Check]]:
    """Say why the layer's step cannot be one call; empty, and the checks of that call, if it
    can."""
    bound: Binding = layer._binding
    teacher = layer.synthesizer_update
    if teacher is not None and teacher._tensors is not None:
        try:
            teacher.tensors(layer.synthesizer_parameters())  # as they are now, and frozen or not
        except (
            RuntimeError,
            ValueError,
        ) as error:  # for the next lesson to raise: this step is over
            return f"the synthesizer's rule: {error}", ()
    parts = _parts(layer)
    if parts is None:
        return "its rule or its normalisation changes from step to step", ()
    try:
        # A step that was bound before may go on where memory still begins where it did.
        check.layer(layer._layer(), layer.config)
    except RuntimeError as error:  # for the usual way to raise
        return f"its parameters: {error}", ()
    synthesizer = layer._modules["synthesizer"]
    if synthesizer is None:
        loss = isinstance(layer, LossSteps)
        bind = getattr(backend, "quick_loss" if loss else "quick_exact", None)
        if bind is None:
            return f"backend {backend.name!r} has none", ()
        assert layer.update is not None and layer.update._tensors is not None
        bound.layer = tensors = layer._layer()
        bound.anchor = nodes.anchor(layer.local_parameters())
        how: Any = layer.config
        if isinstance(layer, LossSteps):
            how = QuickLoss(layer.label_smoothing, layer.ignore_index)
            parts = parts._replace(own=[*parts.own, *items(layer.__dict__, *QuickLoss._fields)])
        bound.exact = bind(tensors, how, layer.update._tensors, parts)
        return "", (*parts.surroundings, *parts.always, *parts.own)
    if type(synthesizer) not in _SYNTHESIZERS or teacher is None:
        return f"its synthesizer is a {type(synthesizer).__name__}", ()
    tensors = layer._layer()
    fused = layer.fused_synthesizer(tensors.weight)
    if fused is None:
        return f"its synthesizer, a {type(synthesizer).__name__}, runs under autograd", ()
    bind = getattr(layer._bound(tensors, backend, fused), "quick", None)
    bound.tries = bound.tries or 1  # which a step that is bound anew sets back
    if bind is None:
        return f"backend {backend.name!r} has none", ()
    if given is not None and (given.dtype is not torch.int64 or given.dim() != 1):
        return "its context is not labels [N]", ()
    assert isinstance(synthesizer, Synthesizer)
    slots = layer.synthesizer_parameters()
    checks = [
        *parts.own,
        *[each for m in synthesizer.modules() for each in holder(m, "_parameters", "_modules")],
        *items(synthesizer.__dict__, "unit"),
        *addresses(slots),
    ]
    phase = layer.phase
    teaches = phase.mix == 0.0 and teacher._tensors is not None
    taught = QuickSynthesizer(
        untaught=_phase(layer, False),
        taught=_phase(layer, True) if teaches else None,
        labels=given is not None,
        context=context.variable(),
        kappa=layer.target_scale,
        unit=synthesizer.unit,
        statistics=layer.statistics,
        lessons=phase.lessons,
        rule=teacher._tensors,
        group=teacher.group,
        state=teacher.__dict__,
        earliest=target_unit.EARLIEST,
        interval=target_unit.INTERVAL,
    )
    parts = parts._replace(own=checks)
    bound.anchor = nodes.anchor(slots)
    bound.quick = bind(parts, taught)
    if layer.config.interface == "output":  # and by the true gradient, or mixed with it
        assert layer.update is not None and layer.update._tensors is not None
        bound.layer, learners = tensors, (*layer.local_parameters(), *slots)
        bound.exact = cast(Any, backend).quick_exact(
            tensors, layer.config, layer.update._tensors, parts
        )
        bound.exact_anchor = nodes.anchor(learners)
    return "", (*parts.surroundings, *parts.always, *checks)


def way(layer: LinearSteps) -> str:
    """Say how the layer takes its steps, as far as is known: in one call, or why not."""
    bound: Binding = layer._binding
    predicts = layer._modules["synthesizer"] is not None
    by_truth = not predicts or layer.phase.true_share > 0.0
    quick = bound.exact if by_truth else bound.quick
    if quick is None:
        inside = bound.quick is not None and "at the preactivation, by the true gradient"
        return f"the usual way ({bound.lacks or inside or 'there was none yet'})"
    said = _said(quick.changed(), bound.checks)
    if said != "one call":
        return said
    if by_truth:
        return "one call forward and one back" + (", and a lesson" if predicts else "")
    return said if layer.config.interface == "output" else "one call, without targets"


def _said(changed: int | None, checks: Sequence[Check]) -> str:
    if changed is None:
        return "one call"
    kind, of, name, _, _ = checks[changed]
    what = getattr(of, "__name__", "what surrounds it") if kind == "state" else name
    return f"the usual way ({what} is not as it was)"


class Stacked:
    """A step of layers in a container, one behind the other, as one call; gone in a copied or
    unpickled container.

    Attributes:
        layers: one behind the other; last of them; head: the layer with the loss behind them, or
            None where it is not part of the call; members: all of these; steps: theirs, of which
            the call is made. covered: how many of the container's modules the call stands for.
    """

    def __init__(
        self,
        quick: Any,
        checks: Sequence[Check],
        container: nn.Module,
        layers: list[LinearSteps],
        head: LossSteps | None,
        steps: list[Any],
        covered: int,
    ) -> None:
        self.covered = covered
        self.quick, self.steps, self.layers, self.head = quick, steps, tuple(layers), head
        self.members = self.layers if head is None else (*layers, head)
        self.last, self._checks = layers[-1], checks
        self._container, self._held = container, tuple(container._modules.values())
        # Whether a loss is made, here or behind this.
        self._aims = isinstance(self._held[-1], LossSteps)
        learners = [p for p in self.last.learners() if p is not None and p.requires_grad]
        self.anchors: list[Tensor | None] = [*learners]
        self._call: Any = quick  # None, or a tensor, or a tuple of what a node is to keep
        self._conditioned = True
        # Those that must have been told the last one's loss scale.
        self._told: tuple[LinearSteps, ...] = () if head is None else (head,)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def way(self) -> str:
        """Say how steps are taken now: in one call, or what is in its way."""
        last = self.last
        if last._modules["synthesizer"] is not None and last.phase.true_share > 0.0:
            return "its layers, one by one (by the true gradient)"
        said = _said(self.quick.changed(), self._checks)
        ways = [said] if said != "one call" else [way(layer) for layer in self.members]
        return next((each for each in ways if not each.startswith("one call")), ways[0])

    def holds(self, container: nn.Module) -> bool:
        """Say whether it is that container's, and has in it what was there, in that order."""
        return container is self._container and self._held == tuple(container._modules.values())

    def run(
        self,
        container: nn.Module,
        input: Tensor,
        context: Tensor | None,
        target: Tensor | None,
    ) -> Tensor | None:
        """Take the step; None if anything is in its way."""
        scale = self.last.phase.loss_scale
        if (
            container is not self._container
            or self._held != tuple(container._modules.values())
            or (target is None) is self._aims
            or (self._told and any([layer.phase.loss_scale != scale for layer in self._told]))
        ):
            return None  # as holds(), without a call
        context = context if self._conditioned else None
        made = self._call(container, input, context, None if self.head is None else target)
        out: Tensor | None = self._node(made, input) if type(made) is tuple else made
        return out

    def _node(self, made: tuple[Any, ...], input: Tensor) -> Tensor:
        out: Tensor = nodes.Taught.run(self.last, made, *self.anchors, input)
        return out


class StackedLoss(Stacked):
    """The same with the loss behind them. Its backward leaves to the end what is done there: the
    last layer's lesson and the head's update are one call too."""

    head: LossSteps

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        bound: Binding = self.head._binding
        assert bound.layer is not None
        self.tensors: LinearTensors = bound.layer  # the head's
        self.anchors.insert(0, bound.anchor)
        # What waits for the end of a backward: of a step without a target, and of one with.
        self.endings = [Ending(self, taught) for taught in (False, True)]

    def _node(self, made: tuple[Any, ...], input: Tensor) -> Tensor:
        anchors = self.anchors if made[-1] is not None else self.anchors[:1]
        out: Tensor = nodes.StackLoss.run(self, made, *anchors, input)
        return out


class Ending:
    """The last layer's lesson, if it is given one, and the head's update, as one call.

    Attributes:
        shares: see :class:`fused_dni.modules.pending.Owner`.
    """

    def __init__(self, stack: StackedLoss, taught: bool) -> None:
        self._stack, self._taught = stack, taught
        self.shares: list[tuple[LinearSteps, str]] = [(stack.head, UPDATE)]
        if taught:
            self.shares.insert(0, (stack.last, LEARN))

    def refuse_other_gradients(self, added: bool) -> None:
        """Refuse what each of them does."""
        for member, _ in self.shares:
            member.refuse_other_gradients(added)

    def apply_update(self, contributions: list[Any]) -> None:
        """Teach, then update."""
        (made,) = contributions
        if self._stack.quick.finish(*made, self._stack.last.phase.lessons):
            return
        for (member, role), own in zip(self.shares, self.divided(made), strict=True):
            applying(member, role)([own])

    def divided(self, contribution: Any) -> list[Any]:
        """Return what each of the shares takes."""
        gradient, left, rows, labels, unit = contribution
        head, last = self._stack.head, self._stack.last
        h, scaled, reduced, delta = self._stack.quick.saved(left, rows, self._taught)
        trace = LossTrace(h, self._stack.tensors, delta)
        (dx,), update = head.close(trace, gradient, self._taught)
        if dx is None:
            return [update]
        predicted = Predicted(scaled, Prediction(scaled, reduced), None, unit)
        return [last.regression(h, predicted, labels, dx, None), update]


class StackedExact(Stacked):
    """The same of layers that are updated by the true gradient, or by that and their predictions
    mixed, and of the loss behind them if there is one. Synthesizers are taught what arrives where
    the updates are made."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.anchors = [_exact_anchor(layer) for layer in self.members]
        self._call, self._told = self.quick.forward, self.members
        self._teaches = self.last._modules["synthesizer"] is not None
        self._conditioned = self._teaches
        # A bound on a prediction's norm is kept by the layers' own steps.
        self._mixes = all([not layer.max_norm for layer in self.layers])
        self._share = 1.0  # of the true gradient, in the step that is taken
        self._scales = [layer.target_scale for layer in self.layers]
        self.shares = [(member, UPDATE) for member in self.members]
        if self._teaches:
            self.shares += [(layer, LEARN) for layer in self.layers]
        self._tensors: list[tuple[LinearTensors, LinearConfig]] = []
        for layer in self.members:
            assert layer._binding.layer is not None
            self._tensors.append((layer._binding.layer, layer.config))

    def way(self) -> str:
        if not self._teaches:
            return super().way()
        if self.last.phase.true_share < 1.0 and not self._mixes:
            return "its layers, one by one (with a max_norm)"
        if len({layer.phase.true_share for layer in self.layers}) > 1:
            return "its layers, one by one (with shares of the true gradient of their own)"
        said = _said(self.quick.changed(), self._checks)
        return way(self.last) if said == "one call" else said

    def run(self, *given: Any) -> Tensor | None:
        if self._teaches:
            self._share = share = self.layers[0].phase.true_share
            if share == 0.0 or (share < 1.0 and not self._mixes):
                return None
            for layer in self.layers[1:]:
                if layer.phase.true_share != share:
                    return None
        return super().run(*given)

    def _node(self, made: tuple[Any, ...], input: Tensor) -> Tensor:
        out: Tensor = nodes.ExactStack.run(self, (*made, self._share), *self.anchors, input)
        return out

    def watched(self, need_dx: bool) -> list[Tensor]:
        """Return what the backward reads of the layers."""
        tensors: list[Tensor | None] = []
        for i, (layer, _) in enumerate(self._tensors):
            weight = layer.weight if need_dx or i > 0 else None
            tensors += [weight, layer.norm_weight, layer.norm_bias]
        return [t for t in tensors if t is not None]

    def backward(
        self,
        gradient: Tensor,
        x: Tensor,
        h: Tensor | None,
        left: Tensor,
        labels: Tensor | None,
        share: float,
        need_dx: bool,
    ) -> tuple[Tensor | None, Any]:
        """Go back through all layers.

        Args:
            h, left, labels: of the forward; h None where its result is a loss.
            share: of the true gradient in what updates are made from.

        Returns:
            dx, and what updates and lessons are made from: of a call for all of them the tuple of
            its arguments, else a list of what each share takes.
        """
        done: tuple[Tensor | None, Tensor, Tensor | None] | None
        done = self.quick.backward(gradient, x, h, left, labels, share, need_dx)
        if done is not None:
            dx, made, passing = done
            return dx, (x, h, left, made, passing, gradient, labels)
        contributions: list[tuple[Tensor, LinearGradients]] = []
        below = x
        uses: list[LinearUse] = []
        for i, (out, *saved) in enumerate(self.quick.saved(x, h, left)):
            backend = self.layers[i].synthesizer_backend(below)
            uses.append(LinearUse(below, out, Saved(*saved), *self._tensors[i], True, backend))
            below = out
        arrived: Tensor | None = gradient
        traces: list[Any] = [*uses]
        if self.head is not None:
            traces.append(LossTrace(below, self._tensors[-1][0], self.quick.delta(x, left)))
        lessons: list[Regression] = []
        for i in reversed(range(len(traces))):
            if self._teaches and i < len(uses):
                layer, out = self.layers[i], uses[i].h
                # As the forward was asked for, whatever was changed since.
                how = How(share, True, self._scales[i] or float(out.shape[0]), 0.0, None)
                context = self._context(layer, labels)
                arrived, lesson = nodes.received(layer, how, out, context, None, arrived)
                assert lesson is not None
                lessons.insert(0, lesson)
            assert arrived is not None
            (arrived,), own = self.members[i].close(traces[i], arrived, need_dx or i > 0)
            contributions.insert(0, own)
        return arrived, [*contributions, *lessons]

    @staticmethod
    def _context(layer: LinearSteps, labels: Tensor | None) -> Tensor | None:
        synthesizer: Any = layer._modules["synthesizer"]
        return labels if synthesizer.context_features else None

    def refuse_other_gradients(self, added: bool) -> None:
        """Refuse what its layers do. What came by another way to one without a synthesizer is added
        to its update."""
        if self._teaches:
            for member in self.members:
                member.refuse_other_gradients(added)

    def apply_update(self, contributions: list[Any]) -> None:
        """Teach, and apply each layer's rule."""
        (made,) = contributions
        if type(made) is tuple:
            lessons = self.last.phase.lessons
            alike = [layer.phase.lessons == lessons for layer in self.layers]
            if all(alike) and self.quick.update(*made, lessons):
                return
        for (member, role), own in reversed(
            list(zip(self.shares, self.divided(made), strict=True))
        ):
            applying(member, role)([own])

    def divided(self, contribution: Any) -> list[Any]:
        """Return what each of the shares takes, of what :meth:`backward` returned."""
        if type(contribution) is list:
            return contribution
        x, h, left, made, passing, gradient, labels = contribution
        outputs = [out for out, _, _ in self.quick.saved(x, h, left)]
        inputs = [x, *outputs]
        gradients = [
            LinearGradients(delta, None, None, *vectors)
            for delta, *vectors in self.quick.contributions(x, made)
        ]
        updates = list(zip(inputs[: len(gradients)], gradients, strict=True))
        if not self._teaches:
            return updates
        lessons = []
        arrivals = self.quick.arrivals(x, passing, gradient)
        for layer, out, arrived in zip(self.layers, outputs, arrivals, strict=True):
            context = self._context(layer, labels)
            predicted = layer.predict(out, context, True)
            lessons.append(layer.regression(out, predicted, context, arrived, None))
        return [*updates, *lessons]


def _exact_anchor(layer: LinearSteps) -> Tensor | None:
    """Return the anchor of a layer's step by the true gradient."""
    bound: Binding = layer._binding
    return bound.anchor if layer._modules["synthesizer"] is None else bound.exact_anchor


def _apart(head: LossSteps, last: LinearSteps) -> str:
    """Say why a head's step cannot be part of the call of the layers in front; empty if it can."""
    if head._binding.exact is None:
        return "the head has no call of its own"
    if head._binding.anchor is None:
        return "the head is frozen and has no node"
    if last._modules["synthesizer"] is not None and nodes.anchor(last.learners()) is None:
        return "the last synthesizer is frozen and has no lesson from the head"
    if last.weight.shape[0] != head.weight.shape[1] or last.weight.dtype != head.weight.dtype:
        return "the head is of another size or dtype"
    return ""


def stacked(
    container: nn.Module,
    layers: list[LinearSteps],
    body: int,
    head: LossSteps | None,
    known: Stacked | None,
    exact: bool,
) -> tuple[Stacked | None, str]:
    """Have the next step of layers in a container be one call: bound to it, or None; and why there
    is none, or why the head is not in it.

    Args:
        container: which holds them, one behind the other from its first on, with nothing between
            but what hands on what it is given. body: how many of its modules those are.
        head: what is next in it, if it has the loss.
        known: what was there before, which stays while the layers' own steps do.
        exact: steps by the true gradient, in which synthesizers, if there are any, learn.
    """
    steps = [layer._binding.exact if exact else layer._binding.quick for layer in layers]
    teachers = []
    if exact and layers[0]._modules["synthesizer"] is not None:
        teachers = [layer._binding.quick for layer in layers]
    apart = "" if head is None else _apart(head, layers[-1])
    if apart:
        head = None
    steps += teachers
    if head is not None:
        steps.append(head._binding.exact)
    covered = body if head is None else len(container._modules)
    if (
        known is not None
        and known.holds(container)
        and known.covered == covered
        and len(steps) == len(known.steps)
        and all([a is b for a, b in zip(steps, known.steps, strict=True)])
    ):
        return known, apart  # what was in its way was of that step alone
    if len({id(layer) for layer in layers}) < len(layers):
        return None, "a layer stands in it twice and is updated once"
    held = [p.data_ptr() for one in layers for p in one._parameters.values() if p is not None]
    if len(set(held)) < len(held):  # one's update runs beside the next one's forward
        return None, "parameters of two layers share their memory"
    if len({layer._modules["synthesizer"] is None for layer in layers}) > 1:
        return None, "some layers have a synthesizer and some have none"
    if any(step is None for step in steps):
        return None, "a layer has no call of its own"
    if exact and any([_exact_anchor(layer) is None for layer in layers]):
        # And those in front of it may have none.
        return None, "a layer is frozen and has no node"
    backend = registry.resolve(layers[0].backend, layers[0].weight, layers[0].weight)
    bind = getattr(backend, "quick_stack", None)
    if bind is None:
        return None, f"backend {backend.name!r} has none"
    if any(
        below.weight.shape[0] != above.weight.shape[1] or below.weight.dtype != above.weight.dtype
        for below, above in pairwise(layers)
    ):
        return None, "sizes or dtypes do not fit"
    checks: list[Check] = [
        *items(container.__dict__, "training", "_modules"),
        *[("empty", getattr(nn_module, f"_global{n}"), f"_global{n}", None, None) for n in HOOKS],
    ]
    members = layers if head is None else [*layers, head]
    for module in list(container._modules.values())[:covered]:
        if module is not None and module not in members:
            checks += uncalled(module)
    for layer in members:
        checks += uncalled(layer)
        names = ["exact"] if exact or layer is head else ["quick"]
        if teachers and layer is not head:
            names.append("quick")
        bindings = layer._binding
        checks += [("attribute", bindings, name, None, getattr(bindings, name)) for name in names]
    last = None if head is None else steps[-1]
    quick = bind(container, ANYWHERE, checks, steps[: len(layers)], exact, last, teachers)
    kind = StackedExact if exact else Stacked if head is None else StackedLoss
    return kind(quick, (*ANYWHERE, *checks), container, layers, head, steps, covered), apart
