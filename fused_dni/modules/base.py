"""What all decoupled modules share: the synthesizer's side, the rules, the phase.

A tensor's way goes down: a module's forward (:mod:`~fused_dni.modules.linear`, ``decoupled``,
``sequential``) hands it to a node (:mod:`~fused_dni.modules.nodes`), which calls what the module
does of a training step (:mod:`~fused_dni.modules.steps`) and what stands here, and these call the
ops. Nothing here or there calls back up.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.parallel import DistributedDataParallel

from fused_dni import ops
from fused_dni.backends.common.precision import LOW_PRECISION, accumulator
from fused_dni.backends.common.synthesizer import synthetic_gradient
from fused_dni.context import current_context
from fused_dni.functional import check
from fused_dni.functional.update import apply_
from fused_dni.modules import target_unit
from fused_dni.modules.pending import inside_backward
from fused_dni.ops.tracing import direct
from fused_dni.ops.types import (
    AFFINE,
    ROWS,
    STATISTICS_SIZE,
    Backend,
    Prediction,
    RuleTensors,
    SynthesizerTensors,
)
from fused_dni.rules import Rule, RuleState, require_rule
from fused_dni.synthesizers import SurrogateSynthesizer, Synthesizer, TargetUnit

# Set on the output of a decoupled module whose synthesizer is not trained in this step, to the
# version of that tensor: changed in place (``h += skip(x)``) it is another, and does not count. A
# decoupled consumer that sees it computes no gradient for its input.
NO_TARGET = "_fused_dni_no_target"

# What no trace can follow (a rule in the forward, what a module remembers of a state): a compiled
# model falls back to eager there, and fullgraph=True says so. Never a decorator: that would import
# torch._dynamo with this file.
untraced = torch.compiler.disable


@dataclass(frozen=True)
class Phase:
    """What a model-level schedule tells its layers for the next training step.

    Attributes:
        warmup: update from the true gradient while the synthesizer learns from it.
        target: the synthesizer is trained on what arrives.
        mix: share of the true gradient on steps with targets.
        lessons: regression steps of a synthesizer on what arrives in a step with a target.
        loss_scale: factor on the loss; None if there is none.
        probe: called as ``probe(at, predicted, kappa)`` in a forward that is run with exact
            gradients and without updates, to compare the gradient at the tensor ``at`` with its
            prediction (see ``diagnostics``).
    """

    warmup: bool = False
    target: bool = True
    mix: float = 0.0
    lessons: int = 1
    loss_scale: float | None = None
    probe: Callable[[Tensor, Predicted | None, float], None] | None = None

    @property
    def true_share(self) -> float:
        """Share of the true gradient in the gradient that updates the layer."""
        if self.warmup:
            return 1.0
        return self.mix if self.target else 0.0


class How(NamedTuple):
    """How a layer's gradient is made in one backward.

    Attributes:
        true_share: share of the arriving gradient in the gradient used: 0 is plain DNI, 1 backprop
            or warm-up, between them mixing.
        learns: the synthesizer is trained on what arrives.
        target_scale: kappa.
        max_norm: bound of the synthetic gradient's Frobenius norm; 0 for none.
        loss_scale: factor on the loss, as of a ``GradScaler``; None for none.
    """

    true_share: float
    learns: bool
    target_scale: float
    max_norm: float
    loss_scale: float | None


class Predicted(NamedTuple):
    """A prediction on its way to be trained: ``scaled`` = M(h), by fused kernels (``prediction``)
    or by a module under autograd (``graph``: M(h) with its graph, None if it will not learn), in
    the synthesizer's unit of that time."""

    scaled: Tensor
    prediction: Prediction | None
    graph: Tensor | None
    unit: float

    def within(self, unit: float) -> Predicted:
        """Return the same prediction in another unit."""
        scaled = self.scaled * (self.unit / unit)
        prediction = self.prediction
        if prediction is not None:
            prediction = prediction._replace(scaled=scaled)
        return Predicted(scaled, prediction, self.graph, unit)


class Regression(NamedTuple):
    """What a synthesizer learns from: its output at h and the gradient that it was to predict."""

    h: Tensor
    predicted: Predicted
    context: Tensor | None
    arrived: Tensor
    target_scale: float
    # What the parameters behind the interface learn with it: a contribution to their update or,
    # without a rule, their gradients in the order of `parameters_behind()`.
    behind: Any = None


class LocalStep(NamedTuple):
    """Result of a module's update from its own prediction."""

    h: Tensor
    dx: tuple[Tensor | None, ...]
    predicted: Predicted | None
    # Where there is no rule: the local gradients, in the order of `local_parameters()`.
    gradients: tuple[Tensor | None, ...] = ()
    trace: Any = None  # what `regression()` needs, where a module takes what arrives further


class DecoupledModule(nn.Module):
    """Base of the drop-in layers.

    Args:
        update: rule for the module's own parameters, None to leave gradients to an optimizer.
        synthesizer_update: rule for the synthesizer; as ``update`` if None.
        target_scale: kappa, the number by which the loss divides; None for the number of rows and
            a unit that follows the size of what arrives (:mod:`fused_dni.modules.target_unit`).
        max_norm: bound of the synthetic gradient's Frobenius norm, per layer; None for none.
    """

    synthesizer: nn.Module | None
    target_scale: float | None = check.checked(above=True, none=True)
    max_norm: float | None = check.checked(above=True, none=True)

    # Steps with targets, of a Schedule, in which nothing came to learn from.
    missed_targets = 0

    # Steps whose targets come later: see late.step_local.
    tickets = 0
    #: Of :class:`fused_dni.Schedule`, where it chooses k: the step with a target that is under way,
    #: and what late lessons added to the statistics (:class:`fused_dni.modules.late.LateSums`).
    due: int | None = None
    late_sums: deque[Any] | None = None

    # See pending.Owner.
    shares: ClassVar[tuple[tuple[nn.Module, str], ...]] = ()

    # Attributes that hold the rules' states (or None).
    rule_names: ClassVar[tuple[str, ...]] = ("update", "synthesizer_update")

    def __init__(
        self,
        update: Rule | None,
        synthesizer_update: Rule | None,
        target_scale: float | None,
        max_norm: float | None,
    ) -> None:
        super().__init__()
        require_rule("update", update)
        require_rule("synthesizer_update", synthesizer_update)
        if synthesizer_update is not None and update is None:
            raise ValueError(
                "synthesizer_update needs update: without a fused rule the synthesizer is trained "
                "by the same optimizer as the layer"
            )
        self.target_scale = target_scale
        self.max_norm = max_norm
        self.phase = Phase()
        self.delivery: Any = None  # set around a call whose dx goes down at once: nodes.Delivery
        self.update = None if update is None else RuleState(update)
        self.synthesizer_update: RuleState | None = None
        # Sums over what the synthesizer was trained on (see ops.types.STATISTICS_SIZE); beside a
        # module that is made on the meta device, too, and to_empty() does not see it.
        self.statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64, device="cpu")

    def attach(self, synthesizer: nn.Module | None, rule: Rule | None) -> None:
        """Register the synthesizer, behind the subclass's own parameters in the state dict, and
        the rule that trains it."""
        if synthesizer is not None and not isinstance(synthesizer, nn.Module):
            raise TypeError(
                "synthesizer must be None or an nn.Module called as synthesizer(h, context), got "
                f"{synthesizer!r}"
            )
        _require_callable(synthesizer)
        self.register_module("synthesizer", synthesizer)
        if rule is not None and synthesizer is not None:
            self.synthesizer_update = RuleState(rule)

    def rules(self) -> Iterator[tuple[str, RuleState, tuple[Tensor | None, ...]]]:
        """Return the rules at work: the part's name (empty for the module's own parameters), the
        rule's state, the slots it works on."""
        if self.update is not None:
            yield "", self.update, self.local_parameters()
        if self.synthesizer_update is not None:
            yield "synthesizer", self.synthesizer_update, self.synthesizer_parameters()

    # -- what subclasses give ------------------------------------------------------------------

    def local_parameters(self) -> tuple[Tensor | None, ...]:
        """Return the slots that ``update`` works on."""
        raise NotImplementedError

    def parameters_behind(self) -> tuple[Tensor | None, ...]:
        """Return the slots between where the gradient is predicted and the output: no prediction
        reaches them, and they learn with the synthesizer. None by default, as h is the output."""
        return ()

    def regression(
        self, h: Tensor, predicted: Predicted, context: Tensor | None, arrived: Tensor, trace: Any
    ) -> Regression:
        """Return what is learned from the gradient that arrived at h; ``trace`` is what the forward
        left behind (see :mod:`fused_dni.modules.steps`)."""
        return Regression(h, predicted, context, arrived, self.kappa(h.shape[0]))

    # -- the synthesizer's side ----------------------------------------------------------------

    def fused_synthesizer(self, h: Tensor) -> SynthesizerTensors | None:
        """Return the synthesizer's tensors if the kernels can run it on h, else None."""
        synthesizer = self._modules["synthesizer"]
        if not isinstance(synthesizer, Synthesizer) or h.dim() != 2:
            return None
        fused = synthesizer.fused()
        if fused is None or fused.kind in AFFINE:
            return fused
        return fused if fused.kind in self.synthesizer_backend(h).synthesizers else None

    def synthesizer_parameters(self) -> tuple[Tensor | None, ...]:
        """Return the slots that ``synthesizer_update`` works on."""
        synthesizer = self._modules["synthesizer"]
        if synthesizer is None:
            return ()
        fused = synthesizer.fused() if isinstance(synthesizer, Synthesizer) else None
        return tuple(synthesizer.parameters()) if fused is None else fused.parameters()

    def learners(self) -> tuple[Tensor | None, ...]:
        """Return the slots that learn from what arrives, and in no step without it."""
        return (*self.parameters_behind(), *self.synthesizer_parameters())

    def trained(self) -> tuple[Tensor | None, ...]:
        """Return the slots of the layer's own update, and those that learn."""
        return (*self.local_parameters(), *self.learners())

    def synthesizer_backend(self, h: Tensor) -> Backend:
        """Return the backend that runs fused synthesizers on h."""
        raise NotImplementedError

    def kappa(self, rows: int) -> float:
        """Return the number by which the loss of a batch divides."""
        return float(rows) if self.target_scale is None else self.target_scale

    @property
    def unit(self) -> float:
        """The unit in which the synthesizer predicts now."""
        synthesizer = self._modules["synthesizer"]
        return synthesizer.unit.size if isinstance(synthesizer, Synthesizer) else 1.0

    def scale_of(self, h: Tensor) -> float:
        """Return by what M(h) is to be divided now, to be the gradient at h."""
        kappa = float(h.shape[0]) if self.target_scale is None else self.target_scale
        synthesizer = self._modules["synthesizer"]  # as `unit`: every step asks
        return kappa / synthesizer.unit.size if isinstance(synthesizer, Synthesizer) else kappa

    def predict(self, h: Tensor, context: Tensor | None, learns: bool) -> Predicted:
        """Run the synthesizer on (detached) h; keep what its training needs if it learns."""
        fused = self.fused_synthesizer(h)
        if fused is not None:
            prediction = ops.synthesizer_predict(self.synthesizer_backend(h), h, fused, context)
            return Predicted(prediction.scaled, prediction, None, self.unit)
        assert self.synthesizer is not None
        with torch.set_grad_enabled(learns), _autocast_to(h.dtype, h.device, self.synthesizer):
            out: Tensor = self.synthesizer(h.detach(), context)
        if out.shape != h.shape:
            raise RuntimeError(
                f"synthesizer must return the shape of h, {list(h.shape)}, got {list(out.shape)}"
            )
        graph = out if learns and out.requires_grad else None
        return Predicted(out.detach(), None, graph, self.unit)

    def synthetic(self, predicted: Predicted, h: Tensor) -> Tensor:
        """Return the synthetic gradient, clipped to ``max_norm``."""
        return synthetic_gradient(
            Prediction(predicted.scaled),
            self.kappa(h.shape[0]) / predicted.unit,
            self.max_norm or 0.0,
        )

    def rows_in(self, h: Tensor) -> int:
        """Say how many rows of h the synthesizer predicts for."""
        return h.shape[0]

    def how(self, rows: int) -> How:
        """Say how this step's gradient is made, where that is in the backward; h has so many
        rows."""
        phase = self.phase
        return How(
            phase.true_share,
            phase.target or phase.warmup,
            self.kappa(rows),
            self.max_norm or 0.0,
            phase.loss_scale,
        )

    def forget(self) -> None:
        """Draw the synthesizer anew, and forget the rules' moments and counts and the sums over
        what the synthesizer was trained on."""
        for module in () if self.synthesizer is None else self.synthesizer.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        if isinstance(self.synthesizer, Synthesizer):
            self.synthesizer.unit = TargetUnit()
        for _, rule, _ in self.rules():
            rule.reset()
        self.statistics.zero_()
        self.missed_targets = 0

    def statistics_on(self, device: torch.device) -> Tensor:
        """Return the sums that training adds to, moved along with the module."""
        if device.type == "meta":  # where nothing is kept
            return self.statistics.to(device)
        if self.statistics.device != device:
            self.statistics = self.statistics.to(device)
        return self.statistics

    def follow(self, regressions: list[Regression]) -> float:
        """Have the synthesizer's unit follow the size of what it is about to learn; the unit.
        Predictions of lessons in the list may be scaled."""
        synthesizer = self._modules["synthesizer"]
        if not isinstance(synthesizer, Synthesizer):
            return 1.0
        unit = synthesizer.unit
        if self.target_scale is not None:
            return unit.size
        unit.lessons = n = unit.lessons + 1
        if n & (n - 1) and n % target_unit.INTERVAL:  # most of them, told without a call
            return unit.size
        if not target_unit.due(n):
            return unit.size
        first = regressions[0].arrived
        if not direct(first) or (first.is_cuda and torch.cuda.is_current_stream_capturing()):
            unit.lessons -= 1  # its size cannot be seen
            return unit.size
        rows = sum([regression.h.shape[0] for regression in regressions])
        squares = [
            _square(regression.arrived) * regression.target_scale**2 for regression in regressions
        ] + [
            _square(regression.predicted.scaled) * regression.predicted.unit**2
            for regression in regressions
        ]
        means = torch.stack(squares).reshape(2, -1).sum(1) / rows
        surrogate = synthesizer if isinstance(synthesizer, SurrogateSynthesizer) else None
        untaught = n == 1 and surrogate is not None and surrogate.untaught()
        size, factor = target_unit.size_for(unit, self, means, untaught)
        if surrogate is not None and factor != 1.0:
            target_unit.resize(surrogate, factor)
            for i, regression in enumerate(regressions):
                made = regression.predicted
                regressions[i] = regression._replace(
                    predicted=made._replace(unit=made.unit * factor)
                )
        if size != unit.size:
            why = target_unit.refuses(synthesizer)
            if why is None:
                self.rescale(synthesizer, unit.size / size)
                unit.size = size
            elif unit.lessons == 1:
                target_unit.warn_of(size, why)
        return unit.size

    def rescale(self, synthesizer: Synthesizer, factor: float) -> None:
        """Scale what the synthesizer predicts and everything measured in its unit."""
        slots = self.synthesizer_parameters()
        target_unit.rescale(synthesizer, self.synthesizer_update, slots, factor)
        self.statistics[:ROWS] *= factor**2

    def regression_gradients(self, regression: Regression) -> tuple[Tensor | None, ...]:
        """Gradients of the regression loss, in the order of :meth:`synthesizer_parameters`."""
        if torch.compiler.is_compiling():
            return self._gradients_of(
                regression, self.unit, self.statistics_on(regression.h.device)
            )
        regressions = [regression]
        unit = self.follow(regressions)
        return self._gradients_of(regressions[0], unit, self.statistics_on(regression.h.device))

    def _gradients_of(
        self, regression: Regression, unit: float, statistics: Tensor
    ) -> tuple[Tensor | None, ...]:
        h, predicted, context, arrived, kappa, _ = regression
        if predicted.unit != unit:
            predicted = predicted.within(unit)
        scale = kappa / unit
        if predicted.prediction is not None:
            fused = self.fused_synthesizer(h)
            assert fused is not None
            return ops.synthesizer_gradients(
                self.synthesizer_backend(h),
                h,
                predicted.prediction,
                arrived.contiguous(),
                fused,
                context,
                scale,
                statistics,
            )
        slots = self.synthesizer_parameters()
        if predicted.graph is None:
            return (None,) * len(slots)
        target = arrived * scale
        error = predicted.scaled - target
        s, g, e = (t.double().flatten() for t in (predicted.scaled, target, error))
        sums = torch.stack([s @ g, s @ s, g @ g, e @ e, s.new_tensor(float(h.shape[0]))])
        if bool(torch.isfinite(sums).all()):
            statistics += sums
        wanted = [p for p in slots if p is not None and p.requires_grad]
        made = iter(
            torch.autograd.grad(
                predicted.graph, wanted, error * (2.0 / h.shape[0]), allow_unused=True
            )
        )
        return tuple(next(made) if p is not None and p.requires_grad else None for p in slots)

    def learn(self, regressions: list[Regression]) -> None:
        """Train the synthesizer by its rule on the sum of lessons, and what learns with it."""
        unit = self.follow(regressions)
        self._regress(regressions, unit, self.statistics_on(regressions[0].h.device))

    def learn_again(self, regressions: list[Regression]) -> None:
        """Take the rest of the phase's ``lessons`` on what was just learned from, each from the
        prediction as it is then. The statistics tell of the first one alone."""
        for _ in range(self.phase.lessons - 1):
            again = [
                each._replace(predicted=self.predict_again(each.h, each.context))
                for each in regressions
            ]
            self._regress(again, self.unit, torch.zeros_like(self.statistics))

    def predict_again(self, h: Tensor, context: Tensor | None) -> Predicted:
        """Predict as a step did, to learn; a synthesizer's running statistics moved then, and do
        not now."""
        assert self.synthesizer is not None
        buffers = [(b, b.clone()) for b in self.synthesizer.buffers()]
        predicted = self.predict(h, context, True)
        for b, before in buffers:
            b.data.copy_(before)  # the graph, which holds them, does not read them
        return predicted

    def _regress(self, regressions: list[Regression], unit: float, statistics: Tensor) -> None:
        assert self.synthesizer_update is not None
        fused = self.fused_synthesizer(regressions[0].h)
        rule = self.synthesizer_update.tensors(self.synthesizer_parameters())
        first = regressions[0]
        predicted = first.predicted
        if predicted.unit != unit:
            predicted = predicted.within(unit)
        if len(regressions) == 1 and fused is not None and predicted.prediction is not None:
            ops.synthesizer_update_(
                self.synthesizer_backend(first.h),
                first.h,
                predicted.prediction,
                first.arrived.contiguous(),
                fused,
                first.context,
                first.target_scale / unit,
                statistics,
                rule,
            )
            return
        made = [self._gradients_of(each, unit, statistics) for each in regressions]
        apply_given(self.synthesizer_parameters(), sum_slots(made), rule)

    # -- what a forward asks first -------------------------------------------------------------

    def given_context(self, context: Tensor | None, features: int | None) -> Tensor | None:
        """Return the context of this call: the argument, else the surrounding ``condition_on``.

        ``features`` is the synthesizer's ``context_features``, None if it does not say.
        """
        if features == 0:
            if context is not None:
                raise ValueError("context is unexpected: the synthesizer has context_features=0")
            return None
        return current_context() if context is None else context

    @property
    def skipped_updates(self) -> int:
        """Updates of the module's parameters skipped because a gradient was not finite."""
        return 0 if self.update is None else self.update.skipped

    def probe(self, at: Tensor, rows: Tensor, context: Tensor | None) -> None:
        """Show, in a probing phase, the prediction of the gradient at ``at``; ``rows`` is h as the
        synthesizer sees it."""
        assert self.phase.probe is not None
        predicted = None
        if self.synthesizer is not None:
            predicted = self.predict(rows.detach(), context, False)
        self.phase.probe(at, predicted, self.kappa(self.rows_in(rows)) / self.unit)

    def refuse_recording(self) -> None:
        """Raise where a step would be recorded that is to learn anew whenever it is run."""
        if torch._C._get_tracing_state() is None or not self.training:
            return
        predicts = torch.is_grad_enabled() and self._modules["synthesizer"] is not None
        if predicts or self.update is not None:
            raise RuntimeError(
                "torch.jit.trace of a decoupled module in training is refused: what was recorded "
                "would neither predict nor learn; call eval() first"
            )

    def stock_module(self) -> nn.Module:
        """Return PyTorch's module on the same parameters, which computes the same in ``eval()``."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        """Stand in for the module in ``torch.jit.script`` by PyTorch's, which computes the same."""
        if self.training and (self._modules["synthesizer"] is not None or self.update is not None):
            raise RuntimeError(
                f"torch.jit.script of a {type(self).__name__} in training is refused: a script "
                "would train by plain backpropagation; call eval() first"
            )
        if sys._getframe(1).f_code is sys._getframe(2).f_code:  # a part of what is scripted
            warnings.warn(
                f"torch.jit.script puts PyTorch's module in the place of a {type(self).__name__} "
                "in the model that it is given, too, which is then not decoupled any more: script "
                "a copy.deepcopy(model) to go on training",
                stacklevel=2,
            )
        return self.stock_module()

    def refuse_fused_rule(self) -> None:
        """Raise where an update inside the forward would silently be wrong."""
        if DistributedDataParallel._active_ddp_module is not None:
            raise RuntimeError(
                "a fused rule (update=...) under DistributedDataParallel is refused: each replica "
                "would update from its own batch and they would diverge; use update=None"
            )
        if inside_backward() or _inside_checkpoint():
            raise RuntimeError(
                "a fused rule (update=...) under activation checkpointing is refused: the forward "
                "is run again and would update twice; use update=None"
            )
        self.refuse_other_gradients()

    def refuse_other_gradients(self, added: bool = False) -> None:
        """Raise if a parameter under a rule has a gradient in ``.grad``: it came by another way
        than this module, and the rule does not see it.

        Args:
            added: whether :meth:`other_gradients` follows, for a module without a synthesizer.
        """
        own = self.__dict__
        added = added and self._modules["synthesizer"] is None
        for name in self.rule_names:
            rule = own.get(name)
            if rule is None or added:
                continue
            for p in rule.bound:
                if p is not None and p.grad is not None and p.requires_grad and nonzero(p.grad):
                    raise RuntimeError(other_gradient(self.name_of(p)))

    def other_gradients(self, slots: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Take what came to ``.grad`` of the slots in a backward at whose end the module's own
        exact gradient is applied: the two are added. Empty if nothing came."""
        if all([p is None or p.grad is None or not p.requires_grad for p in slots]):
            return ()
        scale = self.phase.loss_scale or 1.0
        taken: list[Tensor | None] = []
        for p in slots:
            grad = None
            if p is not None and p.grad is not None and p.requires_grad:
                grad = p.grad.detach().to_dense().to(accumulator(p)) / scale
                p.grad = None
            taken.append(grad)
        return tuple(taken)

    def name_of(self, parameter: Tensor) -> str:
        """Return the parameter's name in this module."""
        return next((n for n, p in self.named_parameters() if p is parameter), "(replaced)")

    def refuse_untold_scale(self, device: str) -> None:
        """Raise under float16 autocast, which implies a loss scale, if none was told."""
        if (
            self.phase.loss_scale is None
            and torch.is_autocast_enabled(device)
            and torch.get_autocast_dtype(device) == torch.float16
        ):
            raise RuntimeError(
                "float16 autocast goes with a loss scale, which decoupled layers must know: use "
                "fused_dni.Schedule(model, loss_scale=scaler), or bfloat16"
            )

    def refuse_later(self, context: Tensor | None) -> None:
        """Raise now for what an update at the end of the backward would raise for."""
        self.refuse_rules()
        self.check_context(context)

    def refuse_rules(self) -> None:
        """Raise for a parameter that a rule cannot update."""
        for _, rule, slots in self.rules():
            rule.tensors(slots)

    def check_context(self, context: Tensor | None, fused: bool = False) -> None:
        """Refuse a label out of range, and what the synthesizer cannot predict from unless it is
        ``fused``, before anything is changed (fused steps do so themselves)."""
        synthesizer = self._modules["synthesizer"]
        ignored = None
        if isinstance(synthesizer, Synthesizer):
            ignored = synthesizer.ignore_index
            if not fused:
                synthesizer.check(context)
        check.labels(context, getattr(synthesizer, "context_features", None) or 0, ignored)


def leaf(module: nn.Module, given: Any, *others: Any, **named: Any) -> Any:
    """Return what stands for a call in ``torch.fx.symbolic_trace``, if ``given``, an input, is one
    of its proxies; else None. A module is called there as a whole, as PyTorch's own are."""
    if not isinstance(given, Proxy):
        return None
    tracer: Any = given.tracer
    path = tracer.path_of_module(module)
    if not path:  # which is traced itself
        raise TypeError(
            f"torch.fx.symbolic_trace of a {type(module).__name__} alone is refused: it is called "
            "as a whole, as a part of a model"
        )
    named = {name: value for name, value in named.items() if value is not None}
    return tracer.create_proxy("call_module", path, (given, *others), named)


def _require_callable(synthesizer: nn.Module | None) -> None:
    """Refuse a module whose forward does not take h and a context."""
    try:
        signature = None if synthesizer is None else inspect.signature(synthesizer.forward)
    except (TypeError, ValueError):  # it does not say, as what was scripted
        return
    try:
        if signature is not None:
            signature.bind(None, None)
    except TypeError:
        raise TypeError(
            "synthesizer must take two arguments, as synthesizer(h, context), got "
            f"{synthesizer!r} with forward{signature}"
        ) from None


def run_apart(module: nn.Module, *inputs: Any, **named: Any) -> tuple[Any, dict[int, Tensor]]:
    """Run a module whose parameters' gradients will be taken now and returned by a node later.

    Hooks on the parameters are to see them then and not now.

    Returns:
        The output and, by the identity of each parameter with hooks, what stood in for it.
    """
    parameters = dict(module.named_parameters())
    aliases = {n: p.detach().requires_grad_() for n, p in parameters.items() if p._backward_hooks}
    if not aliases:
        return module(*inputs, **named), {}
    out = torch.func.functional_call(module, aliases, inputs, named)
    return out, {id(parameters[n]): alias for n, alias in aliases.items()}


def _autocast_to(dtype: torch.dtype, device: torch.device, module: nn.Module) -> Any:
    """Autocast if an output of that dtype came out of it (a backward usually runs outside)."""
    if dtype in LOW_PRECISION and any(p.dtype != dtype for p in module.parameters()):
        return torch.autocast(device.type, dtype, cache_enabled=False)
    return nullcontext()


def _square(t: Tensor) -> Tensor:
    """Return the sum of squares, float64 []."""
    norm: Tensor = torch.linalg.vector_norm(t, dtype=torch.float64)
    return norm.square()


def sum_slots(made: list[tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """Sum gradients slot by slot, None where nothing contributed."""
    out: list[Tensor | None] = []
    for slot in zip(*made, strict=True):
        there = [t for t in slot if t is not None]
        out.append(
            None if not there else there[0] if len(there) == 1 else torch.stack(there).sum(0)
        )
    return tuple(out)


def apply_given(
    parameters: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...], rule: RuleTensors
) -> None:
    """Apply ``rule`` to the slots that have a gradient, as ``torch.optim`` does."""
    given = tuple(t and g is not None for t, g in zip(rule.trainable, gradients, strict=True))
    if any(given):
        apply_(parameters, gradients, rule._replace(trainable=given))


def nonzero(gradient: Tensor) -> bool:
    """Say whether there is anything in a gradient (synchronises with the device)."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return bool(values.any())


def other_gradient(name: str) -> str:
    """Return the message about a gradient that no rule sees."""
    return (
        f"the parameter {name!r} is updated by a fused rule (update=...), but its .grad holds a "
        "gradient that came by another way: a penalty in the loss, a tied weight, a backward in "
        "eval(). The rule does not see it. For an L2 penalty use the rule's weight_decay; with "
        "synthesizer=None what comes in the layer's own backward is added; else use update=None "
        "and an ordinary optimizer. To drop the gradient set .grad to None "
        "(optimizer.zero_grad())"
    )


def _inside_checkpoint() -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
