"""What a node asks of a module: a step from its own prediction, or a forward and a backward, and
the update. For linear layers on fused kernels, and for any segment under autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from fused_dni import ops
from fused_dni.backends.common.precision import accumulator
from fused_dni.context import fold_context
from fused_dni.functional import check
from fused_dni.functional.linear import (
    LinearUse,
    backward_from_preactivation,
    backward_use,
    forward_use,
)
from fused_dni.functional.linear_cross_entropy import backward_from_loss
from fused_dni.modules.base import (
    NO_TARGET,
    DecoupledModule,
    LocalStep,
    Predicted,
    Regression,
    apply_given,
    run_apart,
    sum_slots,
)
from fused_dni.ops import registry
from fused_dni.ops.tracing import direct
from fused_dni.ops.types import (
    Backend,
    BoundStep,
    Check,
    LinearConfig,
    LinearGradients,
    LinearTensors,
    RuleTensors,
    Step,
    SynthesizerTensors,
)
from fused_dni.rules import RuleState
from fused_dni.synthesizers import Synthesizer

Slots = tuple[Tensor | None, ...]


class Steps(DecoupledModule):
    """A decoupled module whose training steps nodes run (:mod:`fused_dni.modules.nodes`)."""

    def step_locally(
        self, inputs: Any, context: Tensor | None, need_dx: bool, learns: bool
    ) -> LocalStep:
        """Run forward, prediction and, with a rule, the update; gradients in the result without.

        Nothing that is returned carries a graph."""
        raise NotImplementedError

    def open(self, inputs: Any, need_dx: bool) -> tuple[Tensor, Any]:
        """Run the forward alone; h and what :meth:`close` needs."""
        raise NotImplementedError

    def close(self, trace: Any, gradient: Tensor, need_dx: bool) -> tuple[Slots, Any]:
        """Run the backward of :meth:`open`: gradients of the inputs, and a contribution to an
        update (without a rule, the gradients of ``local_parameters()``)."""
        raise NotImplementedError

    def apply_update(self, contributions: list[Any]) -> None:
        """Apply ``update`` to the sum of contributions."""
        raise NotImplementedError

    def learn(self, regressions: list[Regression]) -> None:
        super().learn(regressions)
        if self.phase.lessons > 1:  # else a call for nothing
            self.learn_again(regressions)

    def watched(self, inputs: Any, need_dx: bool) -> tuple[Tensor, ...]:
        """Name what :meth:`close` reads and no graph watches: a change in place is to be an
        error."""
        return ()


# ---------------------------------------------------------------------------------------------
# Linear layers


class Binding:
    """A bound step and what it was bound to; empty again in a copied or unpickled layer."""

    def __init__(self) -> None:
        self.step: BoundStep | None = None
        self.rule: RuleTensors | None = None
        self.key: tuple[Any, ...] = ()
        self.fits: list[int | None] = []  # addresses that have been checked
        # A whole step as one call, by the prediction or by the true gradient: see quick.py.
        self.quick: Any = None
        self.exact: Any = None
        self.tries = 0  # of binding one
        self.layer: LinearTensors | None = None  # what `exact` is bound to
        self.anchor: Tensor | None = None  # see nodes.anchor
        self.exact_anchor: Tensor | None = None  # the same of `exact`, where both are bound
        self.checks: Sequence[Check] = ()  # of what that call depends on
        self.lacks = ""  # why there is none

    def __reduce__(self) -> tuple[type[Binding], tuple[()]]:
        return Binding, ()


class LinearInputs(NamedTuple):
    """What a linear layer's step is called with."""

    x: Tensor  # [N, I]
    layer: LinearTensors
    backend: Backend


class LinearSteps(Steps):
    """A linear layer, as nodes see it."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    norm: nn.BatchNorm1d | nn.LayerNorm | None
    config: LinearConfig
    backend: str | None
    norm_update: RuleState | None
    _binding: Binding

    rule_names = (*DecoupledModule.rule_names, "norm_update")

    def _layer(self) -> LinearTensors:
        # Straight from the dictionaries: nn.Module's attribute look-up costs a microsecond each.
        own: Mapping[str, Any] = self._parameters
        norm = self._modules["norm"]
        if "weight" in own and "bias" in own:
            weight, bias = own["weight"], own["bias"]
        else:  # parametrized; some parametrizations make a transposed weight
            weight, bias = self.weight.contiguous(), self.bias
        if norm is None:
            return LinearTensors(weight, bias)
        own = norm._parameters
        stats = norm._buffers
        if "weight" in own and "bias" in own:
            scale, shift = own["weight"], own["bias"]
        else:
            parametrized: Any = norm
            scale, shift = parametrized.weight, parametrized.bias
        return LinearTensors(
            weight,
            bias,
            scale,
            shift,
            stats.get("running_mean"),
            stats.get("running_var"),
        )

    def _count_batch(self) -> None:
        if self.training and self.config.normalization == "batch":
            norm = self._modules["norm"]
            assert norm is not None
            counter = norm._buffers["num_batches_tracked"]
            if counter is not None:
                counter.add_(1)

    def _inside(self) -> bool:
        """Say whether the gradient is predicted in front of normalisation and activation."""
        inside = self.config.interface == "preactivation"
        return inside and self._modules["synthesizer"] is not None

    def _slots(self, layer: LinearTensors) -> Slots:
        """Return what ``update`` works on."""
        return (layer.weight, layer.bias, None, None) if self._inside() else layer[:4]

    def local_parameters(self) -> Slots:
        return self._slots(self._layer())

    def parameters_behind(self) -> Slots:
        if not self._inside():
            return ()
        layer = self._layer()
        return (None, None, layer.norm_weight, layer.norm_bias)

    def rules(self) -> Iterator[tuple[str, RuleState, Slots]]:
        yield from super().rules()
        if self.norm_update is not None:
            yield "norm", self.norm_update, self.parameters_behind()

    @property
    def skipped_updates(self) -> int:
        behind = 0 if self.norm_update is None else self.norm_update.skipped
        return super().skipped_updates + behind

    def synthesizer_backend(self, h: Tensor) -> Backend:
        return registry.resolve(self.backend, h, self.weight)

    def _fit(self, layer: LinearTensors, synthesizer: SynthesizerTensors | None = None) -> None:
        """Refuse tensors that do not go together; kernels take their addresses on trust."""
        if forward_ad._current_level >= 0:
            check.no_tangents(**layer._asdict())
        # What is traced or transformed has no addresses.
        addressed = not (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()
        )
        if addressed:
            others: Slots = ()
            if synthesizer is not None:
                others = (*synthesizer.parameters(), synthesizer.table)
            fits = [None if t is None else t.data_ptr() for t in (*layer, *others)]
            if fits == self._binding.fits:
                return
        check.layer(layer, self.config)
        if synthesizer is not None:
            check.synthesizer(synthesizer, layer.weight, layer.weight.shape[0])
        if addressed:
            self._binding.fits = fits

    def _bound(
        self, layer: LinearTensors, backend: Backend, synthesizer: SynthesizerTensors
    ) -> BoundStep:
        """Return the decoupled step over these tensors, bound anew when one of them has moved."""
        assert self.update is not None
        rule = self.update.tensors(self._slots(layer))
        tensors = (*layer, *synthesizer.parameters(), synthesizer.table)
        key = (
            backend,
            self.config,
            self.max_norm,
            synthesizer.ignore_index,
            [None if t is None else t.data_ptr() for t in tensors],
        )
        bound = self._binding
        if bound.step is None or bound.rule is not rule or bound.key != key:
            check.layer(layer, self.config)
            check.synthesizer(synthesizer, layer.weight, layer.weight.shape[0])
            if self.norm_update is not None:  # refuse now what it would refuse in the backward
                self.norm_update.tensors(self.parameters_behind())
            bound.rule, bound.key = rule, key
            bound.step = backend.bind_step(
                layer, self.config, synthesizer, self.max_norm or 0.0, rule
            )
            bound.quick = bound.exact = None
            bound.tries = 0
        return bound.step

    def step_locally(
        self, inputs: Any, context: Tensor | None, need_dx: bool, learns: bool
    ) -> LocalStep:
        x, layer, backend = inputs
        fused = self.fused_synthesizer(x)
        if self.update is not None and fused is not None:
            if direct(x):
                run = self._bound(layer, backend, fused)
                step = run(x, context, self.scale_of(x), need_dx, learns)
            else:
                step = self._step_watched(x, layer, backend, fused, context, need_dx, learns)
            p = step.prediction
            predicted = None if p is None else Predicted(p.scaled, p, None, self.unit)
            saved = step.saved
            trace = None
            if saved is not None:
                trace = LinearUse(x, step.h.detach(), saved, layer, self.config, True, backend)
            return LocalStep(step.h, (step.dx,), predicted, trace=trace)
        with torch.no_grad():
            return self._step_composed(x, layer, backend, context, need_dx, learns)

    def _step_watched(
        self,
        x: Tensor,
        layer: LinearTensors,
        backend: Backend,
        synthesizer: SynthesizerTensors,
        context: Tensor | None,
        need_dx: bool,
        learns: bool,
    ) -> Step:
        """Return the bound step by the registered op, which dispatch modes and other tensors
        see."""
        assert self.update is not None
        self._fit(layer, synthesizer)
        rule = self.update.tensors(self._slots(layer))
        kappa, bound = self.scale_of(x), self.max_norm or 0.0
        with torch.no_grad():
            return ops.linear_step_(
                backend, x, layer, self.config, synthesizer, context, kappa, bound, rule, need_dx,
                learns,
            )  # fmt: skip

    def _step_composed(
        self,
        x: Tensor,
        layer: LinearTensors,
        backend: Backend,
        context: Tensor | None,
        need_dx: bool,
        learns: bool,
    ) -> LocalStep:
        """:meth:`step_locally` with a synthesizer that no kernel runs, or without a rule."""
        self._fit(layer, self.fused_synthesizer(x))
        self.check_context(context)
        h, trace = forward_use(x, layer, self.config, True, backend)
        predicted = self.predict(h, context, learns)
        made = self._backward(trace, self.synthetic(predicted, h), need_dx)
        if self.update is not None:
            ops.linear_update_(backend, x, made, layer, self.update.tensors(self._slots(layer)))
        if not learns:
            return LocalStep(h, (made.x,), None, self._gradients(made))
        kept = trace if self._inside() else None
        return LocalStep(h, (made.x,), predicted, self._gradients(made), kept)

    def _backward(self, use: LinearUse, gradient: Tensor, need_dx: bool) -> LinearGradients:
        """From the gradient at the interface: that of x on demand, and those of what the interface
        lets it reach (the weight's only where it is returned)."""
        back = backward_from_preactivation if self._inside() else backward_use
        return back(use, gradient, need_dx, self.update is None)

    def regression(
        self, h: Tensor, predicted: Predicted, context: Tensor | None, arrived: Tensor, trace: Any
    ) -> Regression:
        regression = super().regression(h, predicted, context, arrived, trace)
        if not self._inside():
            return regression
        true = backward_use(trace, arrived, False, False)
        behind: Any = (trace.x, true)
        if self.update is None:
            behind = (None, None, true.norm_weight, true.norm_bias)
        return regression._replace(arrived=true.delta, behind=behind)

    def learn(self, regressions: list[Regression]) -> None:
        quick = self._binding.quick
        if quick is not None and len(regressions) == 1:
            h, predicted, context, arrived, *_ = regressions[0]
            p = predicted.prediction
            if p is not None and quick.learn(
                h, p.scaled, p.reduced, context, predicted.unit, arrived, self.phase.lessons
            ):
                return
        super().learn(regressions)
        if self.norm_update is not None:
            made = [regression.behind for regression in regressions]
            self._apply_rule(self.norm_update, self.parameters_behind(), made)

    def watched(self, inputs: Any, need_dx: bool) -> tuple[Tensor, ...]:
        x, layer, _ = inputs
        read = (x, layer.weight if need_dx else None, layer.norm_weight, layer.norm_bias)
        return tuple([t for t in read if t is not None])

    def open(self, inputs: Any, need_dx: bool) -> tuple[Tensor, Any]:
        x, layer, backend = inputs
        self._fit(layer, self.fused_synthesizer(x))
        return forward_use(x, layer, self.config, True, backend)

    def close(self, trace: Any, gradient: Tensor, need_dx: bool) -> tuple[Slots, Any]:
        made = self._backward(trace, gradient, need_dx)
        if self.update is None:
            return (made.x,), self._gradients(made)
        return (made.x,), (trace.x, made._replace(x=None))

    def apply_update(self, contributions: list[Any]) -> None:
        assert self.update is not None
        exact = self._binding.exact
        if exact is not None and len(contributions) == 1 and exact.update(*contributions[0]):
            return
        self._apply_rule(self.update, self.local_parameters(), contributions)

    def _apply_rule(
        self,
        rule: RuleState,
        slots: Slots,
        contributions: list[tuple[Tensor, LinearGradients]],
    ) -> None:
        """Apply a rule over these slots to the sum of contributions."""
        x, made = contributions[0]
        if len(contributions) > 1:  # used several times: sums over uses are sums over rows
            x = torch.cat([c[0] for c in contributions])
            uses = [c[1] for c in contributions]
            made = LinearGradients(
                torch.cat([u.delta for u in uses]),
                None,
                None,
                *(_sum([u[slot] for u in uses]) for slot in (3, 4, 5)),
            )
        others = self.other_gradients(slots)
        if others:
            weight = (made.delta.t() @ x.to(made.delta.dtype)).to(accumulator(self.weight))
            own = (weight, made.bias, made.norm_weight, made.norm_bias)
            apply_given(slots, sum_slots([own, others]), rule.tensors(slots))
            return
        layer = self._layer()
        backend = registry.resolve(self.backend, x, layer.weight)
        ops.linear_update_(backend, x, made, layer, rule.tensors(slots))

    @staticmethod
    def _gradients(made: LinearGradients) -> Slots:
        return made[2:]


def _sum(parts: list[Any]) -> Tensor | None:
    return None if parts[0] is None else torch.stack(parts).sum(0)


# ---------------------------------------------------------------------------------------------
# A linear layer with its cross-entropy


class LossInputs(NamedTuple):
    """What a step of a layer with its cross-entropy is called with."""

    x: Tensor  # [N, I]
    layer: LinearTensors
    backend: Backend
    target: Tensor  # [N]


class LossTrace(NamedTuple):
    """What its forward leaves behind: the loss's gradient at the logits, [N, O]; and, where the
    forward was one call, what has the one back (see quick.py)."""

    x: Tensor
    layer: LinearTensors
    delta: Tensor
    quick: Any = None


class LossSteps(LinearSteps):
    """A linear layer with the cross-entropy of its outputs, by the true gradient, as nodes see it.
    What is h elsewhere is the loss [] here."""

    label_smoothing: float
    ignore_index: int

    def watched(self, inputs: Any, need_dx: bool) -> tuple[Tensor, ...]:
        return (inputs.x, inputs.layer.weight) if need_dx else (inputs.x,)

    def open(self, inputs: Any, need_dx: bool) -> tuple[Tensor, Any]:
        x, layer, backend, target = inputs
        self._fit(layer)
        loss, delta = ops.linear_cross_entropy(
            backend, x, layer.weight, layer.bias, target, self.label_smoothing, self.ignore_index,
            True,
        )  # fmt: skip
        assert delta is not None
        return loss, LossTrace(x, layer, delta)

    def close(self, trace: Any, gradient: Tensor, need_dx: bool) -> tuple[Slots, Any]:
        if trace.quick is not None:
            made = trace.quick.backward(gradient, trace.x, trace.delta, need_dx)
            if made is not None:
                dx, delta, *vectors = made
                return (dx,), (trace.x, LinearGradients(delta, None, None, *vectors))
        return super().close(trace, gradient, need_dx)

    def _backward(self, use: Any, gradient: Tensor, need_dx: bool) -> LinearGradients:
        x, (weight, bias, *_), delta, _ = use
        backend = self.synthesizer_backend(x)
        return backward_from_loss(
            backend, x, weight, bias, delta, gradient, need_dx, self.update is None
        )


# ---------------------------------------------------------------------------------------------
# Any segment


class SegmentCall:
    """A call of a segment.

    Attributes:
        leaves: of its arguments, tensors and others.
        structure: how they stood in lists, dictionaries and keyword arguments; None: they are the
            arguments.
        context: the synthesizer's, checked but for its leading dimensions.
        output: what the segment returned, once it ran, detached.
    """

    def __init__(self, leaves: tuple[Any, ...], structure: TreeSpec | None) -> None:
        self.leaves, self.structure = leaves, structure
        self.context: Tensor | None = None
        self.output: SegmentOutput | None = None

    def arguments(self, leaves: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """Other leaves in the place of these, as positional and keyword arguments."""
        if self.structure is None:
            return leaves, {}
        args, named = tree_unflatten(list(leaves), self.structure)
        return args, named


class SegmentOutput(NamedTuple):
    """What a segment returns: h, where the gradient is predicted; the leaves behind it, and how
    all stood in tuples and lists (None: h is all there is)."""

    h: Tensor
    others: tuple[Any, ...]
    structure: TreeSpec | None

    def detached(self) -> SegmentOutput:
        """Return the same without a graph."""
        others = [t.detach() if isinstance(t, Tensor) else t for t in self.others]
        return SegmentOutput(self.h.detach(), tuple(others), self.structure)

    def around(self, h: Tensor) -> Any:
        """Return the whole, with another h in the place of this."""
        return h if self.structure is None else tree_unflatten([h, *self.others], self.structure)


def segment_output(out: Any) -> SegmentOutput:
    """Find h in what a segment returned: the first element, or the first of that, and so on.

    Raises:
        TypeError: it is no tensor.
    """
    if isinstance(out, Tensor):
        return SegmentOutput(out, (), None)
    h, names = out, []
    while isinstance(h, (tuple, list)):
        names.append(type(h).__name__)
        h = h[0] if h else None
    leaves, structure = tree_flatten(out)
    if not isinstance(h, Tensor) or leaves[0] is not h:
        where = " in ".join([type(h).__name__, *reversed(names)])
        raise TypeError(
            "the decoupled segment must return a tensor, or a tuple or list (a named tuple, a "
            f"packed sequence) whose first element is one; got {where}"
        )
    return SegmentOutput(h, tuple(leaves[1:]), structure)


# What is no container and holds no tensor.
_ATOMS = (Tensor, type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def segment_call(args: tuple[Any, ...], named: dict[str, Any]) -> SegmentCall:
    """Find the tensors that a segment is called with, wherever they stand in its arguments.

    Raises:
        TypeError: a tensor that asks for a gradient inside an object that cannot be taken apart:
            what is below would silently get none.
    """
    if not named and all(isinstance(a, _ATOMS) for a in args):
        return SegmentCall(args, None)
    leaves, structure = tree_flatten((args, named))
    for leaf in leaves:
        if isinstance(leaf, (*_ATOMS, nn.Module)) or not hasattr(leaf, "__dict__"):
            continue
        for name, t in vars(leaf).items():
            if any(isinstance(part, Tensor) and part.requires_grad for part in tree_leaves(t)):
                raise TypeError(
                    "inputs of a decoupled segment must be tensors, or lists, tuples, dictionaries "
                    f"and packed sequences of them; got {type(leaf).__name__}, whose {name} asks "
                    "for a gradient: give its tensors, or detach them"
                )
    return SegmentCall(tuple(leaves), structure)


class Inner(NamedTuple):
    """A run of the segment: its output with its graph, and the inputs to differentiate for; by the
    identity of a parameter, what stood in for it (see :func:`run_apart`), all of them, and those
    that rules inside update."""

    h: Tensor
    leaves: list[Tensor | None]
    aliases: dict[int, Tensor]
    parameters: dict[int, nn.Parameter]
    ruled: dict[int, nn.Parameter]


class SegmentSteps(Steps):
    """Any module under autograd, as nodes see it."""

    module: nn.Module
    # Shapes of the arguments and of the context that the segment's output was last known to fit.
    _fitted: tuple[Any, ...] = ()

    def _parameters_inside(self) -> tuple[dict[int, nn.Parameter], dict[int, nn.Parameter]]:
        """Return all of the segment's parameters, in their order, and what decoupled modules inside
        it update by rules of their own, both by identity: in one walk, for each is a part of a
        step."""
        found: dict[int, nn.Parameter] = {}
        ruled: dict[int, nn.Parameter] = {}
        # In the order of modules(), which makes two calls a module.
        pending, seen = [self._modules["module"]], set()
        while pending:
            m = pending.pop()
            if m is None or m in seen:
                continue
            seen.add(m)
            pending += reversed(m._modules.values())
            for p in m._parameters.values():
                if p is not None:
                    found[id(p)] = p
            if isinstance(m, DecoupledModule) and m.update is not None:
                ruled.update({id(p): p for p in m.parameters()})
        return found, ruled

    def local_parameters(self) -> Slots:
        """Return all of the segment but what its modules update by rules of their own."""
        found, ruled = self._parameters_inside()
        return tuple([p for i, p in found.items() if i not in ruled])

    def learners(self) -> Slots:
        """And, where a module inside learns in the node's backward, a tensor for its output to ask
        for a gradient though none is returned."""
        return self._learners(self._parameters_inside()[1])

    def _learners(self, ruled: dict[int, nn.Parameter]) -> Slots:
        learners = super().learners()
        if any([p.requires_grad for p in ruled.values()]):
            learners += (torch.empty(0, requires_grad=True),)
        return learners

    def trained(self) -> Slots:
        found, ruled = self._parameters_inside()
        local = tuple([p for i, p in found.items() if i not in ruled])
        return (*local, *self._learners(ruled))

    def synthesizer_backend(self, h: Tensor) -> Backend:
        assert self.synthesizer is not None
        return registry.resolve(None, h, next(self.synthesizer.parameters()))

    # -- a synthesizer that takes rows sees all leading dimensions of h as one ------------------

    def _takes_rows(self) -> bool:
        """Say whether h is folded to rows for the synthesizer."""
        synthesizer = self._modules["synthesizer"]
        return isinstance(synthesizer, Synthesizer) and synthesizer.takes_rows

    def _folded(self, h: Tensor) -> Tensor:
        return h.flatten(0, -2) if h.dim() > 2 and self._takes_rows() else h

    def _context_of(self, context: Tensor | None, h: Tensor) -> Tensor | None:
        synthesizer: Any = self._modules["synthesizer"]
        if context is None or not self._takes_rows() or not synthesizer.context_features:
            return context
        like = next(synthesizer.parameters())
        return fold_context(context, h.shape[:-1], synthesizer.context_features, like)

    def rows_in(self, h: Tensor) -> int:
        return self._folded(h).shape[0]

    def predict(self, h: Tensor, context: Tensor | None, learns: bool) -> Predicted:
        return super().predict(self._folded(h), self._context_of(context, h), learns)

    def synthetic(self, predicted: Predicted, h: Tensor) -> Tensor:
        return super().synthetic(predicted, self._folded(h)).reshape(h.shape)

    def regression(
        self, h: Tensor, predicted: Predicted, context: Tensor | None, arrived: Tensor, trace: Any
    ) -> Regression:
        context = self._context_of(context, h)
        return super().regression(self._folded(h), predicted, context, self._folded(arrived), trace)

    # -- under autograd --------------------------------------------------------------------------

    def _inner(self, inputs: Any, need_dx: bool) -> Inner:
        """Run the segment in a graph of its own."""
        leaves: list[Tensor | None] = []
        cut: list[Any] = []
        for t in inputs.leaves:
            if isinstance(t, Tensor):
                wanted = need_dx and t.requires_grad and getattr(t, NO_TARGET, None) != t._version
                t = t.detach().requires_grad_(wanted)
                leaves.append(t if wanted else None)
            cut.append(t)
        args, named = inputs.arguments(cut)
        aliases: dict[int, Tensor] = {}
        with torch.enable_grad(), self._put_back(inputs):
            if self.update is not None:  # gradients are used here: hooks see them here
                out = self.module(*args, **named)
            else:
                out, aliases = run_apart(self.module, *args, **named)
            output = segment_output(out)
            self._fit(output, inputs, leaves)
        inputs.output = output.detached()
        return Inner(output.h, leaves, aliases, *self._parameters_inside())

    def _fit(self, output: SegmentOutput, inputs: SegmentCall, leaves: list[Tensor | None]) -> None:
        """Refuse an output that cannot be trained on, before anything is learned or updated."""
        h = output.h
        if self.delivery is not None and output.structure is not None:
            raise TypeError(
                "inside a DecoupledSequential and by step_local a segment must return one tensor, "
                f"got {len(output.others) + 1} leaves: put it into nn.Sequential, or call it "
                "yourself"
            )
        if not (h.is_floating_point() or h.is_complex()):
            raise TypeError(f"the segment's output is {h.dtype}, which carries no gradient")
        if not h.requires_grad:
            asking = [*leaves, *self.local_parameters()]
            if any([t is not None and t.requires_grad for t in asking]):
                raise RuntimeError(
                    "the segment's output carries no graph, though the segment's parameters or its "
                    "inputs ask for gradients: it is detached, computed under no_grad(), or does "
                    "not depend on them; return what is to be trained first"
                )
        synthesizer = self._modules["synthesizer"]
        context = self._context_of(inputs.context, h)
        if isinstance(synthesizer, Synthesizer):
            synthesizer.check(context, self._folded(h).shape)

    @contextmanager
    def _put_back(self, inputs: SegmentCall) -> Iterator[None]:
        """Put the segment's buffers and the random generators back if what is inside raises,
        unless arguments of these shapes gave an output that fits just before."""
        context = inputs.context
        shapes = [t.shape for t in inputs.leaves if isinstance(t, Tensor)]
        key = (*shapes, None if context is None else context.shape)
        if key == self._fitted:
            yield
            return
        buffers = [(b, b.clone()) for b in self.module.buffers() if not is_lazy(b)]
        devices = {p.device for p in self.module.parameters() if p.is_cuda}
        if devices and torch.cuda.is_current_stream_capturing():
            devices.clear()
        generators = [(d, torch.cuda.get_rng_state(d)) for d in devices]
        drawn = torch.get_rng_state()
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for b, before in buffers:
                    b.copy_(before)
            torch.set_rng_state(drawn)
            for device, state in generators:
                torch.cuda.set_rng_state(state, device)
            raise
        self._fitted = key

    def _differentiate(self, inner: Inner, gradient: Tensor) -> tuple[Slots, Slots]:
        h, leaves, aliases, found, ruled = inner
        slots = [*leaves, *[aliases.get(i, p) for i, p in found.items() if i not in ruled]]
        # All of the segment's: a module inside it whose rule is applied in the backward has one of
        # them for its anchor, and its node is not run unless that is asked for.
        asked = [*leaves, *[aliases.get(i, p) for i, p in found.items()]]
        wanted = [t for t in asked if t is not None and t.requires_grad]
        made: Slots = ()
        if wanted and h.requires_grad:
            gradient = gradient.reshape(h.shape).to(h.dtype)
            made = torch.autograd.grad(h, wanted, gradient, allow_unused=True)
        by_id = {id(t): g for t, g in zip(wanted, made, strict=False)}
        out = tuple([None if t is None else by_id.get(id(t)) for t in slots])
        return out[: len(leaves)], out[len(leaves) :]

    def step_locally(
        self, inputs: Any, context: Tensor | None, need_dx: bool, learns: bool
    ) -> LocalStep:
        self.check_context(context)
        inner = self._inner(inputs, need_dx)
        h = inner.h.detach()
        predicted = self.predict(h, context, learns)
        dx, made = self._differentiate(inner, self.synthetic(predicted, h).detach())
        if self.update is not None:
            self.apply_update([made])
            made = ()
        return LocalStep(h, dx, predicted if learns else None, made)

    def open(self, inputs: Any, need_dx: bool) -> tuple[Tensor, Any]:
        inner = self._inner(inputs, need_dx)
        return inner.h.detach(), inner

    def close(self, trace: Any, gradient: Tensor, need_dx: bool) -> tuple[Slots, Any]:
        return self._differentiate(trace, gradient)

    def apply_update(self, contributions: list[Any]) -> None:
        assert self.update is not None
        slots = self.local_parameters()
        others = self.other_gradients(slots)
        made = [*contributions, others] if others else contributions
        apply_given(slots, sum_slots(made), self.update.tensors(slots))
