"""What the LSTM and its cell share: the two ends of a window.

Backward through a window starts from the synthetic gradient of everything that comes after it
(Jaderberg et al. 2016, arXiv 1608.05343, section 2.1): :class:`Exit` adds the prediction. The
gradient that reaches the window's start trains the synthesizer there: :class:`Entrance`.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fused_dni import ops
from fused_dni.backends.common.windows import clip_rows, inject, rows_state, state_rows
from fused_dni.backends.reference.lstm import weight_gradients
from fused_dni.context import fold_context
from fused_dni.functional import check
from fused_dni.functional.lstm import origins
from fused_dni.modules import target_unit
from fused_dni.modules.base import DecoupledModule, Predicted, Regression, apply_given, sum_slots
from fused_dni.modules.nodes import teach_later
from fused_dni.modules.pending import UPDATE, at_end_of_backward
from fused_dni.modules.windows import BoundWindows, bind_windows, rule_of
from fused_dni.ops import registry
from fused_dni.ops.returned import Returned, by_weight, note_by_weight
from fused_dni.ops.tracing import direct
from fused_dni.ops.types import (
    G_DOT_G,
    ROWS,
    S_DOT_S,
    STATISTICS_SIZE,
    Backend,
    LSTMBoundary,
    LSTMLayer,
    LSTMRows,
    Prediction,
    SynthesizerTensors,
)
from fused_dni.rules import Rule, RuleState
from fused_dni.synthesizers import LinearSynthesizer, Synthesizer, TargetUnit

State = tuple[Tensor, Tensor]
Slots = tuple[Tensor | None, ...]

DEFAULT_RANK = 16
# With the whole prediction (1) and no bound on targets, training on characters diverged in the end;
# with 0.3 it did not: docs/recurrent.md.
DEFAULT_SCALE = 0.3
# Weight of the auxiliary head's squared error, in units of the synthesizer's target.
AUXILIARY_WEIGHT = 0.1
# How many nodes of a state's graph are looked at for the module's own.
NODES = 128
# Windows that are not continued before it is asked whether their ends were forgotten, and how many
# of those that are may stand for each of them.
UNUSED, ENDINGS = 41, 20
# Windows, none of which continued another, before that is said.
UNTAUGHT = 100
# Of predictions to what they predict; looked at every so many windows.
NORM_RATIO, WINDOWS = 100.0, 64
_INNER = ("fused_dni.", "torch.")


class Example(NamedTuple):
    """What a synthesizer learns from: a gradient for each row of a state."""

    rows: Tensor  # [N, 2 L H]
    grad: Tensor  # [N, 2 L H]
    context: Tensor | None  # [N] or [N, K]
    target_scale: float
    counted: Tensor | None = None  # bool [N]: rows to learn from, where traced code has them all

    def only(self, which: Tensor) -> Example:
        """Return the rows where ``which`` [N] is true."""
        context = None if self.context is None else self.context[which]
        return Example(self.rows[which], self.grad[which], context, self.target_scale)


def joined(parts: Sequence[Example]) -> Example:
    """Several examples as one, at the target scale of the first."""
    if len(parts) == 1:
        return parts[0]
    scale = parts[0].target_scale
    contexts = [p.context for p in parts if p.context is not None]
    return Example(
        torch.cat([p.rows for p in parts]),
        torch.cat([p.grad * (p.target_scale / scale) for p in parts]),
        torch.cat(contexts) if contexts else None,
        scale,
    )


class Arrival(NamedTuple):
    """What a backward found at a window's exit; empty where M was not asked."""

    rows: Tensor | None = None  # [B, 2 L H]: the state
    scaled: Tensor | None = None  # [B, 2 L H]: M's prediction there, zero for rows that end
    unit: float = 1.0  # that of the prediction


class Exit:
    """The end of a window in one call: what its backward starts from.

    Args:
        site: the module. ended: bool [B], rows whose sequence ends here, or None.
        context: the synthesizer's context here.
        target_scale: kappa of this window.
    """

    def __init__(
        self,
        site: Recurrent,
        ended: Tensor | None,
        context: Tensor | None,
        target_scale: float,
    ) -> None:
        phase = site.phase
        predicts = site._modules["synthesizer"] is not None
        self.site = site
        self.ended, self.context = ended, context
        self.target_scale = target_scale
        self.strength = site.sg_scale * (1.0 - phase.true_share) if predicts else 0.0
        self.learns = predicts and (phase.target or phase.warmup)
        self.loss_scale = phase.loss_scale or 1.0
        if site.update is None and not torch.compiler.is_compiling():
            target_unit.note_replicas(site)
        self.arrival = Arrival()
        # Windows that the state came from through other ops: its gradient goes on to them.
        self.sources: list[Any] = []
        self._reached = -1  # the backward in which a later window's gradient comes here

    def begin(self) -> None:
        """Tell the windows that the state came from that its gradient is on its way to them."""
        task = torch._C._current_graph_task_id()
        for node in self.sources:
            node.ends.exit._reached = task
        self.sources = []

    @property
    def reached(self) -> bool:
        """Whether the running backward brings the gradient of a later window here: what was to be
        predicted."""
        return self._reached != -1 and self._reached == torch._C._current_graph_task_id()

    def inject(
        self, h: Tensor, c: Tensor, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Arrival]:
        """Add the synthetic gradient to what arrived at the final state, h and c [L, B, H]."""
        site = self.site
        strength = 0.0 if self._reached != -1 and self.reached else self.strength
        teaches = self.learns and (self.ended is not None or site.auxiliary_head is not None)
        if not (strength or teaches):
            return grad_h, grad_c, Arrival()
        rows = state_rows(h, c)
        scaled, _, _, unit = site.predict(rows, self.context, False)
        if self.ended is not None:
            scaled = scaled.masked_fill(self.ended.unsqueeze(1), 0.0)
        arrival = Arrival(rows, scaled, unit)
        if not strength:
            return grad_h, grad_c, arrival
        started = inject(
            scaled,
            grad_h,
            grad_c,
            h.shape[0],
            self.target_scale / unit,
            site.max_norm or 0.0,
            strength * self.loss_scale,
        )
        return (*started, arrival)

    def boundary(self, entrance: bool, x: Tensor, plain: bool) -> LSTMBoundary | None:
        """Return what a backend needs to see to both ends itself, if it can.

        Args:
            entrance: whether the window has one. x: its input; plain: known to be plain memory.
        """
        site = self.site
        if self.context is not None or self.loss_scale != 1.0:
            return None
        bound = site._bound
        if plain and bound is not None and bound.hold(False):
            fused = bound.synthesizer
        elif (
            not direct(x)
            or site.auxiliary_head is not None
            or torch.compiler.is_compiling()
            or site._modules["synthesizer"] is None
        ):
            return None
        else:
            fused = site.fused_state_synthesizer()
            if fused is not None:
                first = site._layers()[0]
                features = 2 * site.num_layers * site.hidden_size
                check.synthesizer(fused, first.weight_ih, features)
        if fused is None:
            return None
        teaches = self.learns and (entrance or self.ended is not None)
        if teaches and site.update is None and not site.count_regression():
            return None
        unit = site.unit
        return LSTMBoundary(
            fused,
            self.ended,
            self.target_scale / unit,
            0.0 if self._reached != -1 and self.reached else self.strength,
            site.max_norm or 0.0,
            (site.max_target_norm or 0.0) / unit,
            self.learns,
            entrance,
        )

    def examples(self, arrival: Arrival) -> list[Example]:
        """Return the rows that end: nothing comes after them, and M is to say so."""
        rows = arrival.rows
        if rows is None or self.ended is None or not self.learns or not bool(self.ended.any()):
            return []
        example = Example(rows, torch.zeros_like(rows), self.context, self.target_scale)
        return [example.only(self.ended)]


class Entrance:
    """The start of a window that continues a state: what M learns from.

    ``exit`` is where the window ends, set before the backward gets here; ``context`` that of the
    state here; ``started`` [B] says which rows start a sequence: nothing was predicted there, and
    nothing is learned. Traced code gives ``counted`` [B], the rows that go on.
    """

    def __init__(
        self,
        context: Tensor | None,
        started: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> None:
        self.exit: Exit | None = None
        self.context, self.started, self.counted = context, started, counted

    def examples(
        self, rows: Tensor, grad: Tensor, arrival: Arrival
    ) -> tuple[list[Example], list[Example]]:
        """Lessons for the synthesizer and the auxiliary head, from the gradient [B, 2 L H] that
        arrived at ``rows``."""
        end = self.exit
        if end is None or not end.learns:
            return [], []
        if end.loss_scale != 1.0:
            grad = grad / end.loss_scale
        scaled = arrival.scaled
        example = Example(rows, grad, self.context, end.target_scale, self.counted)
        if self.started is not None and bool(self.started.any()):
            continued = ~self.started
            example = example.only(continued)
            scaled = None if scaled is None else scaled[continued]
        if not example.rows.shape[0]:
            return [], []
        if end.site.auxiliary_head is None or scaled is None:
            return [example], []
        regression = example._replace(grad=scaled * (arrival.unit / end.target_scale))
        more = end.site.auxiliary_gradient(regression)
        return [example._replace(grad=example.grad + more)], [regression]


class Known(NamedTuple):
    """What a module remembers of a state that it returned."""

    ended: Tensor | None = None  # bool [B]: rows that start anew
    context: Tensor | None = None

    def of(self, rows: slice) -> Known:
        """Return what belongs to some rows of the state."""
        return Known(*(None if t is None else t[rows] for t in self))


# What a state that nothing was noted of is known by.
_NOTHING = Known()
# Modules that were pickled when the class stood here have its name in them.
_Returned = Returned


class Windows:
    """What a module counts of its windows, to warn of uses that it cannot be right in."""

    def __init__(self) -> None:
        self.predicted = 0  # those with a prediction at their end
        self.continued = 0  # those that continue a state of the module's own
        self.told_ends = False
        self.judge_at: float = UNUSED  # at so many that were not continued
        self.warned: set[str] = set()


class Recurrent(DecoupledModule):
    """What the LSTM and its cell share: synthesizer, auxiliary head, rules, lessons."""

    auxiliary_head: LinearSynthesizer | None
    _states: int  # dimensions of h and c
    sg_scale: float = check.checked()
    max_target_norm: float | None = check.checked(above=True, none=True)

    # What windows ask for, looked up once; None where that is not so. And how often it was tried.
    _bound: BoundWindows | None = None
    _tries = 0

    rule_names = (*DecoupledModule.rule_names, "auxiliary_update")

    def __init__(
        self,
        sizes: tuple[int, int, int],
        sg_scale: float,
        update: Rule | None,
        synthesizer_update: Rule | None,
        target_scale: float | None,
        max_norm: float | None,
        max_target_norm: float | None,
        backend: str | None,
    ) -> None:
        check.sizes(**dict(zip(("input_size", "hidden_size", "num_layers"), sizes, strict=True)))
        check.backend(backend)
        super().__init__(update, synthesizer_update, target_scale, max_norm)
        self.max_target_norm = max_target_norm
        self.input_size, self.hidden_size, self.num_layers = sizes
        self.sg_scale = sg_scale
        self.backend = backend
        self.auxiliary_update: RuleState | None = None
        self.auxiliary_statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64, device="cpu")
        self._returned = Returned()
        self._windows = Windows()
        self._fits: list[tuple[int, torch.Size, bool]] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load what was pickled, by an earlier version too."""
        super().__setstate__(state)
        if "_windows" not in state:
            self._windows, self._returned = Windows(), Returned()

    def _attach_heads(
        self,
        synthesizer: nn.Module | str | None,
        auxiliary: bool,
        context_features: int,
        rule: Rule | None,
        factory: dict[str, Any],
    ) -> None:
        """Register synthesizer and auxiliary head behind the layers' own parameters."""
        check.flags(auxiliary=auxiliary)
        check.whole("context_features", context_features, 0)
        features = 2 * self.num_layers * self.hidden_size
        rank = min(DEFAULT_RANK, features)
        if isinstance(synthesizer, str):
            if synthesizer != "default":
                raise ValueError(
                    f"synthesizer must be 'default', None or a module, got {synthesizer!r}"
                )
            synthesizer = LinearSynthesizer(features, rank, context_features, **factory)
        elif context_features:
            raise ValueError(
                "context_features belongs to the default synthesizer; give it to the synthesizer "
                f"itself, got context_features={context_features} with {synthesizer!r}"
            )
        given = getattr(synthesizer, "features", features)
        if given != features:
            raise ValueError(
                f"synthesizer has features={given}, the state {features} (h and c of all layers)"
            )
        if auxiliary and synthesizer is None:
            raise ValueError("auxiliary=True predicts synthetic gradients: it needs a synthesizer")
        self.attach(synthesizer, rule)
        head = None
        if auxiliary:
            k = getattr(synthesizer, "context_features", 0)
            head = LinearSynthesizer(features, rank, k, **factory)
            self.auxiliary_update = None if rule is None else RuleState(rule)
        self.register_module("auxiliary_head", head)

    # -- parameters ----------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Draw the layers' parameters anew, as PyTorch's module does: the same from the same seed.

        Then the synthesizer and the auxiliary head start anew, rules forget moments and counts, and
        statistics and states that were returned are forgotten.
        """
        bound = 1.0 / math.sqrt(self.hidden_size)
        for name, p in self.named_parameters():
            if not name.startswith(("synthesizer.", "auxiliary_head.")):
                nn.init.uniform_(p, -bound, bound)
        for head in (self._modules["synthesizer"], self._modules["auxiliary_head"]):
            if head is not None:
                _reset_head(head)
        for _, rule, _ in self.rules():
            rule.reset()
        self.statistics.zero_()
        self.auxiliary_statistics.zero_()
        self._returned, self._windows = Returned(), Windows()

    def _layers(self) -> tuple[LSTMLayer, ...]:
        raise NotImplementedError

    def local_parameters(self) -> Slots:
        return tuple(p for layer in self._layers() for p in layer)

    def auxiliary_parameters(self) -> Slots:
        """Return the slots that ``auxiliary_update`` works on."""
        head = self._modules["auxiliary_head"]
        fused = None if head is None else cast(LinearSynthesizer, head).fused()
        return () if fused is None else fused.parameters()

    def rules(self) -> Iterator[tuple[str, RuleState, Slots]]:
        yield from super().rules()
        if self.auxiliary_update is not None:
            yield "auxiliary_head", self.auxiliary_update, self.auxiliary_parameters()

    def _learners(self) -> tuple[Tensor, ...]:
        """Return the parameters whose gradients :meth:`teach` returns. With a rule it returns none;
        then one of them, where all layers are frozen, so that there is a backward to learn in."""
        slots = (*self.synthesizer_parameters(), *self.auxiliary_parameters())
        if self.update is None:
            return tuple(p for p in slots if p is not None)
        if any(p is not None and p.requires_grad for p in self.local_parameters()):
            return ()
        return tuple(p for p in slots if p is not None and p.requires_grad)[:1]

    def fused_state_synthesizer(self) -> SynthesizerTensors | None:
        """Return the synthesizer's tensors if kernels can run it, without context."""
        synthesizer = self._modules["synthesizer"]
        fused = synthesizer.fused() if isinstance(synthesizer, Synthesizer) else None
        return None if fused is None or fused.context_weight is not None else fused

    def synthesizer_backend(self, h: Tensor) -> Backend:
        return registry.resolve(self.backend, h, self._layers()[0].weight_ih, "lstm")

    def _fit(self, layers: tuple[LSTMLayer, ...]) -> None:
        """Refuse tensors that do not go together; kernels take their addresses on trust."""
        heads = [
            module.fused()
            for module in (self._modules["synthesizer"], self._modules["auxiliary_head"])
            if isinstance(module, Synthesizer)
        ]
        if forward_ad._current_level >= 0:
            for layer in layers:
                check.no_tangents(**layer._asdict())
        tracing = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if not tracing:  # what is traced or transformed has no addresses
            tensors = ops.flat(layers)
            for head in heads:
                tensors += [p for p in (() if head is None else head.parameters()) if p is not None]
            fits = [(p.data_ptr(), p.shape, p.is_contiguous()) for p in tensors]
            if fits == self._fits:
                return
        check.lstm_layers(layers, self.input_size, self.hidden_size)
        features = 2 * len(layers) * self.hidden_size
        for head in heads:
            if head is not None:
                check.synthesizer(head, layers[0].weight_ih, features)
        if not tracing:
            self._fits = fits

    # -- learning ------------------------------------------------------------------------------

    def count_regression(self) -> bool:
        """Count a lesson that a kernel gives itself; False, and none counted, where :meth:`follow`
        is to see it."""
        if self.target_scale is not None:
            return True
        unit = cast(Synthesizer, self._modules["synthesizer"]).unit
        if target_unit.due(unit.lessons + 1):
            return False
        unit.lessons += 1
        return True

    def rescale(self, synthesizer: Synthesizer, factor: float) -> None:
        super().rescale(synthesizer, factor)
        head = self._modules["auxiliary_head"]
        if head is not None:  # it predicts in the synthesizer's unit
            slots = self.auxiliary_parameters()
            target_unit.rescale(cast(Synthesizer, head), self.auxiliary_update, slots, factor)
            self.auxiliary_statistics[:ROWS] *= factor**2

    def teach(self, regressions: list[Example], heads: list[Example], loss_scale: float) -> Slots:
        """Train synthesizer and auxiliary head, at the end of the backward if there is a rule;
        otherwise return their parameters' gradients, in the order of :meth:`_learners`."""
        if self.update is not None:
            if regressions:
                teach_later(self, self._regression(joined(regressions)))
            if heads:
                at_end_of_backward(self, "head", self.head_learns_from, joined(heads))
            return ()
        slots = self.synthesizer_parameters()
        made: Slots = (None,) * len(slots)
        if regressions:
            made = self.regression_gradients(self._regression(joined(regressions)))
        slots += self.auxiliary_parameters()
        if heads:
            made += self._head_gradients(joined(heads))
        else:
            made += (None,) * (len(slots) - len(made))
        if loss_scale != 1.0:
            made = tuple(None if g is None else g * loss_scale for g in made)
        return tuple(g for g, p in zip(made, slots, strict=True) if p is not None)

    def learn(self, regressions: list[Regression]) -> None:
        bound = self._bound
        if bound is None or len(regressions) != 1 or not bound.hold(False):
            super().learn(regressions)
            return
        unit = self.follow(regressions)
        ((h, predicted, context, arrived, kappa, _),) = regressions
        if predicted.unit != unit:
            predicted = predicted.within(unit)
        assert predicted.prediction is not None and bound.synthesizer is not None
        bound.backend.synthesizer_update_(
            h,
            predicted.prediction,
            arrived.contiguous(),
            bound.synthesizer,
            context,
            kappa / unit,
            self.statistics,
            rule_of(self.synthesizer_update),
        )

    def _regression(self, example: Example) -> Regression:
        rows, grad, context, scale, counted = example
        if self.max_target_norm is not None:
            grad = clip_rows(grad, self.max_target_norm / scale)
        predicted = self.predict(rows, context, True)
        if counted is not None and predicted.prediction is not None:
            prediction, grad = self._only_counted(
                counted, predicted.prediction, grad, self.statistics_on(rows.device)
            )
            predicted = Predicted(prediction.scaled, prediction, None, predicted.unit)
        return Regression(rows, predicted, context, grad, scale)

    @staticmethod
    def _only_counted(
        counted: Tensor, prediction: Prediction, grad: Tensor, statistics: Tensor
    ) -> tuple[Prediction, Tensor]:
        """Traced code leaves no rows out: those that count [N] have the weight that they have in a
        mean over themselves alone, and the others get no error. ``statistics``, to which all N will
        be added, are changed for it."""
        continued = counted.unsqueeze(1)
        weight = counted.shape[0] / continued.sum().clamp(min=1)
        scaled, grad = (torch.where(continued, t * weight, 0.0) for t in (prediction.scaled, grad))
        finite = torch.isfinite(scaled).all() & torch.isfinite(grad).all()
        statistics[ROWS] -= torch.where(finite, (~counted).sum(), 0)
        return prediction._replace(scaled=scaled), grad

    def auxiliary_gradient(self, example: Example) -> Tensor:
        """Return what the auxiliary head's squared error at an entrance sends to the state there.

        The head predicts kappa times the synthetic gradient at the window's exit. Its error is
        measured in those units and sent down with the weight ``AUXILIARY_WEIGHT``.
        """
        head = cast(LinearSynthesizer, self.auxiliary_head)
        scale = example.target_scale / self.unit
        with torch.no_grad():
            error = head(example.rows, example.context) - example.grad * scale
            back = error @ head.weight
            if head.down is not None:
                back = back @ head.down
        sent: Tensor = back * (AUXILIARY_WEIGHT / scale)
        return sent

    def _head_gradients(self, example: Example) -> Slots:
        rows, grad, context, scale, counted = example
        backend, fused, prediction = self._head(example)
        if counted is not None:
            prediction, grad = self._only_counted(
                counted, prediction, grad, self.auxiliary_statistics
            )
        return ops.synthesizer_gradients(
            backend,
            rows,
            prediction,
            grad,
            fused,
            context,
            scale / self.unit,
            self.auxiliary_statistics,
        )

    def head_learns_from(self, examples: list[Example]) -> None:
        """Train the auxiliary head by its rule on the sum of what each window teaches."""
        assert self.auxiliary_update is not None
        rule = self.auxiliary_update.tensors(self.auxiliary_parameters())
        if len(examples) > 1:
            made = [self._head_gradients(example) for example in examples]
            apply_given(self.auxiliary_parameters(), sum_slots(made), rule)
            return
        rows, grad, context, scale, _ = examples[0]
        backend, fused, prediction = self._head(examples[0])
        ops.synthesizer_update_(
            backend,
            rows,
            prediction,
            grad,
            fused,
            context,
            scale / self.unit,
            self.auxiliary_statistics,
            rule,
        )

    def _head(self, example: Example) -> tuple[Backend, SynthesizerTensors, Prediction]:
        """Return the auxiliary head's prediction at the rows of an example."""
        fused = cast(LinearSynthesizer, self.auxiliary_head).fused()
        assert fused is not None
        backend = self.synthesizer_backend(example.rows)
        if self.auxiliary_statistics.device != example.rows.device:
            self.auxiliary_statistics = self.auxiliary_statistics.to(example.rows.device)
        prediction = ops.synthesizer_predict(backend, example.rows, fused, example.context)
        return backend, fused, prediction

    # -- the layers' own update ----------------------------------------------------------------

    def defer(self, rows: tuple[LSTMRows, ...], loss_scale: float) -> None:
        """Have the rule applied to the products of these rows at the end of the backward."""
        if loss_scale != 1.0:
            rows = tuple(r._replace(delta=r.delta / loss_scale) for r in rows)
        at_end_of_backward(self, UPDATE, self.apply_update, rows)

    def apply_update(self, contributions: list[Any]) -> None:
        rows: tuple[LSTMRows, ...] = contributions[0]
        bound = self._bound
        if bound is not None and len(contributions) == 1 and bound.hold(False):
            bound.backend.lstm_update_(rows, bound.layers, rule_of(self.update))
            return
        if len(contributions) > 1:  # sums over uses are sums over rows
            rows = tuple(
                LSTMRows(*(torch.cat(parts) for parts in zip(*uses, strict=True)))
                for uses in zip(*contributions, strict=True)
            )
        assert self.update is not None
        layers = self._layers()
        backend = registry.resolve(self.backend, rows[0].input, layers[0].weight_ih, "lstm")
        slots = self.local_parameters()
        rule = self.update.tensors(slots)
        others = self.other_gradients(slots)
        if others:
            made = (weight_gradients(r, layer) for r, layer in zip(rows, layers, strict=True))
            own = tuple(g for gradients in made for g in gradients)
            apply_given(slots, sum_slots([own, others]), rule)
            return
        ops.lstm_update_(backend, rows, layers, rule)

    # -- what both forwards need -----------------------------------------------------------------

    def _decoupled(self, x: Tensor) -> bool:
        """Say whether this call is decoupled: in training, with gradients, and not being probed.

        Raises what a rule applied later would raise for.
        """
        if not (self.training and torch.is_grad_enabled()):
            return False
        decoupled = self._modules["synthesizer"] is not None and self.phase.probe is None
        if self.update is not None:
            self.refuse_fused_rule()
            self.update.tensors(self.local_parameters())
            if self.synthesizer_update is not None:
                self.synthesizer_update.tensors(self.synthesizer_parameters())
            if self.auxiliary_update is not None:
                self.auxiliary_update.tensors(self.auxiliary_parameters())
        if x.dtype is torch.float16 and (decoupled or self.update is not None):
            self.refuse_untold_scale(x.device.type)
        return decoupled

    def _settle(self, backend: Backend) -> None:
        """Look up what the next windows ask for, if it can be bound. Where something changes from
        window to window, it is tried again after twice as many windows each time."""
        if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
            return
        self._tries += 1
        if not self._tries & (self._tries - 1):
            self._bound = bind_windows(self, backend)

    def _bears_sign(self, t: Tensor) -> bool:
        """Say whether traced code returned this very tensor, of this module: no op passes that
        on."""
        return getattr(t, "_fused_dni_owner", None) == id(self)

    def _known(
        self, h: Tensor, c: Tensor, decoupled: bool
    ) -> tuple[Known | None, list[Any] | None]:
        """Return what is known of a state that is given.

        Args:
            h, c: the state, [L, B, H] or of a cell [B, H].
            decoupled: whether the call learns.

        Returns:
            What was noted of it, None if it is not known to be this module's; and of such a state
            the nodes of this module that its gradient will reach, None if it is to be cut: their
            backward has been run, and nothing else asks for a gradient.
        """
        returned = self._returned
        if not (decoupled or returned.marked) or torch._C._are_functorch_transforms_active():
            return None, []
        found = returned.recall(h, c)
        if found is not None:
            known = found.noted or _NOTHING
            return known if found.rows is None else known.of(found.rows), []
        others = by_weight(self._layers()[0].weight_ih)
        if others is not None:
            found = others.recall(h, c)
        nodes: list[Any] = []
        alone = True
        if found is None and decoupled and (h.requires_grad or c.requires_grad):
            nodes, alone = origins((h, c), self, NODES)
        if found is None and alone:
            found = returned.recall_copy(h, c)
            if found is None and others is not None:
                found = others.recall_copy(h, c)
        if found is None:
            self._warn_of_rows(h)
            through = alone and any([node.spent for node in nodes])
            return None, None if through else nodes
        known = found.noted or _NOTHING
        return known if found.rows is None else known.of(found.rows), []

    def remember(
        self,
        state: State,
        end_of_sequence: Tensor | None = None,
        context: Tensor | None = None,
    ) -> State:
        """Take a state for one that this module returned: from a file, or in memory of your own.

        A state is known by the memory in which it was returned, or as a copy of the last one that
        was. Any other is one from elsewhere: its gradient flows on, and nothing is learned there.

        Args:
            state: h, c, as the module returns them.
            end_of_sequence: bool [B]: rows that ended there, and start anew.
            context: what the synthesizer was conditioned on there, int64 [B] or [B, K].

        Returns:
            The same state.
        """
        check.pair(state, "state")
        h, c = state
        single = h.dim() == 2 and self._states == 3
        if single:
            h, c = h.unsqueeze(1), c.unsqueeze(1)
        if h.dim() != self._states or h.shape != c.shape or h.shape[-1] != self.hidden_size:
            raise RuntimeError(
                f"h and c in state must be as the module returns them, got {list(h.shape)} and "
                f"{list(c.shape)}"
            )
        batch = h.shape[-2]
        ended = check.ended(end_of_sequence, batch, h.device, single)
        if context is not None:
            context = self._context_rows(context, batch, h)
        told = ended is not None or context is not None
        self._returned.note(h, c, Known(ended, context) if told else None)
        note_by_weight(self._layers()[0].weight_ih, h, c)
        return state

    # -- what a user can be told -----------------------------------------------------------------

    def _warn(self, kind: str, message: str) -> None:
        """Warn once, at the line that called the library."""
        if kind in self._windows.warned:
            return
        self._windows.warned.add(kind)
        level, frame = 1, sys._getframe()
        while frame.f_back is not None and frame.f_globals["__name__"].startswith(_INNER):
            level, frame = level + 1, frame.f_back
        warnings.warn(f"{type(self).__name__}: {message}", UserWarning, stacklevel=level)

    def _judge_starts(self) -> None:
        """Warn of windows that had a prediction injected and were not continued."""
        windows = self._windows
        unused = windows.predicted - windows.continued
        windows.judge_at = 2 * unused
        if not windows.continued:
            if unused < UNTAUGHT:
                windows.judge_at = UNTAUGHT
                return
            self._warn(
                "untaught",
                f"the synthesizer was never taught: of {windows.predicted} windows none continued "
                "a state that this module returned, so it trains as plain truncated "
                "backpropagation. Hand the state on as it was returned (detached or copied if you "
                "like), say which rows end by end_of_sequence instead of changing the state, tell "
                "a state from a file by remember(state), or take synthesizer=None",
            )
        elif not windows.told_ends and ENDINGS * unused >= windows.continued:
            self._warn(
                "ends",
                f"{unused} of {windows.predicted} windows had a prediction of their future "
                "injected and were never continued, though others were. Nothing comes after the "
                "end of a sequence, and no lesson corrects the prediction there: say which rows "
                "end by end_of_sequence=, or training may diverge",
            )

    def windows(self) -> dict[str, float]:
        """Counts since the last :meth:`reset_parameters`, for ``diagnostics``."""
        counts = self._windows
        return {
            "windows": float(counts.predicted),
            "windows_continued": float(counts.continued),
        }

    def warn_of_norm(self, sums: list[float]) -> None:
        """Warn of predictions far larger than what they predict; ``sums`` are the statistics."""
        s, g = sums[S_DOT_S], sums[G_DOT_G]
        if s > NORM_RATIO**2 * g > 0.0:
            self._warn(
                "norm",
                f"the synthesizer's predictions are {(s / g) ** 0.5:.0f} times as large as the "
                "gradients that they predict: bound its targets by max_target_norm=, its "
                "predictions by max_norm=, lower sg_scale= or its learning rate, or set "
                "target_scale= to what the loss divides by",
            )

    def _warn_of_rows(self, h: Tensor) -> None:
        """Warn where a row that ended goes on in a state that is not known."""
        last = self._returned.last_ended()
        if (
            last is None
            or "rows" in self._windows.warned
            or not h.device.type == "cpu" == last[0].device.type
        ):
            return
        before, ended = last
        if before.shape[-1] != h.shape[-1] or before.dim() != h.dim() or before.dtype != h.dtype:
            return
        rows = before[..., ended, :]  # [L, those that ended, H]
        if bool((h.detach().unsqueeze(-2) == rows.unsqueeze(-3)).all(-1).any()):
            self._warn(
                "rows",
                "a row whose sequence ended goes on: hx is not the state that was returned (it was "
                "reordered, combined or changed), and the module cannot follow its rows there. "
                "Hand the state on as it was returned, or reset those rows yourself",
            )

    def _context_rows(self, context: Tensor | None, batch: int, like: Tensor) -> Tensor | None:
        features = getattr(self._modules["synthesizer"], "context_features", None)
        context = self.given_context(context, features)
        if not features:
            return context
        rows = fold_context(context, torch.Size((batch,)), features, like)
        self.check_context(rows)
        return rows

    def _probe(
        self, h: Tensor, c: Tensor, ended: Tensor | None, context: Tensor | None, scale: float
    ) -> State:
        """End of a window in a probing phase: the state goes on through one tensor of rows."""
        rows = state_rows(h, c)
        predicted: Predicted | None = None
        if self.synthesizer is not None:
            predicted = self.predict(rows.detach(), context, False)
            if ended is not None:
                scaled = predicted.scaled.masked_fill(ended.unsqueeze(1), 0.0)
                predicted = predicted._replace(scaled=scaled)
        assert self.phase.probe is not None
        if rows.requires_grad:
            self.phase.probe(rows, predicted, scale / self.unit)
        return rows_state(rows, h.shape[0])


def _reset_head(head: nn.Module) -> None:
    """Let a synthesizer start anew: as it says itself, or what it is made of, its last layer at
    zero if it is one of the library's."""
    if isinstance(head, Synthesizer):
        head.unit = TargetUnit()
    own = getattr(head, "reset_parameters", None)
    if own is not None:
        own()
        return
    last = None
    for module in head.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
            last = module
    if isinstance(head, Synthesizer) and last is not None:
        for p in last.parameters():
            nn.init.zeros_(p)


def backward_boundary(state: Any) -> None:
    """Close a window that has no loss of its own: run its backward from the prediction alone.

    The input phase of a copy task, say, has no loss, but what was read there matters later: the
    synthetic gradient at the window's final state is all its backward starts from.

    Args:
        state: h, c as :class:`FusedDNILSTM` returned them (or, of a cell, as given to its
            ``boundary``); or a list of such states, of several modules.

    Raises:
        RuntimeError: a state without a graph (detached, or made under ``no_grad()``).
    """
    tensors = list(_tensors(state))
    if not tensors or not any(t.requires_grad for t in tensors):
        raise RuntimeError(
            "backward_boundary: the state carries no graph; give it as the module returned it in "
            "training, not detached"
        )
    tensors = [t for t in tensors if t.requires_grad]
    torch.autograd.backward(tensors, [torch.zeros_like(t) for t in tensors])


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (tuple, list)):
        for part in state:
            yield from _tensors(part)
    else:
        raise TypeError(f"state must be tensors in tuples or lists, got {type(state).__name__}")
