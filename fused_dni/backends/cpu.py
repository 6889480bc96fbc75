"""The C++ backend: ``csrc/cpu`` behind the signature of :mod:`fused_dni.ops.types`.

Tensors go over as addresses, looked up anew on every call; outputs are allocated here. The kernels
run on PyTorch's own OpenMP threads (torch is imported before the extension, so that both share
one libgomp) and as many of them as ``torch.get_num_threads()`` says.

bfloat16 inputs go with float32 parameters. Where the machine has AVX512_BF16 the layer's products
are of bfloat16 operands, the weight rounded as it is read. Elsewhere x is widened (exactly), the
kernels compute in float32, and h and dx are rounded. Synthesizers compute in float32 either way,
and so do the LSTM's ops, whose results are of the parameters' dtype but for dx.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fused_dni.backends.common.built import why_missing
from fused_dni.backends.common.tensors import Unbound, moved_statistics, split_context, updated
from fused_dni.ops import results
from fused_dni.ops.types import (
    ACTIVATIONS,
    FROM_OUTPUT,
    NORMALIZATIONS,
    RULES,
    SYNTHESIZERS,
    BoundStep,
    CellGradients,
    CellTrace,
    Check,
    CrossEntropy,
    LinearConfig,
    LinearGradients,
    LinearTensors,
    LSTMBoundary,
    LSTMClosed,
    LSTMGradients,
    LSTMLayer,
    LSTMRegression,
    LSTMRows,
    LSTMTrace,
    Prediction,
    QuickLoss,
    QuickParts,
    QuickSynthesizer,
    RuleTensors,
    Saved,
    SlotGradients,
    Step,
    SynthesizerTensors,
)

try:
    import fused_dni.backends._cpu as _cpu
except ImportError as error:
    raise ImportError(f"fused_dni.backends._cpu {why_missing('_cpu', error)}") from error

_NORMALIZATION = {name: index for index, name in enumerate(NORMALIZATIONS)}
_ACTIVATION = {name: index for index, name in enumerate(ACTIVATIONS)}
_SYNTHESIZER = {name: index for index, name in enumerate(SYNTHESIZERS)}
_RULE = {name: index for index, name in enumerate(RULES)}


class _Kernels(dict[torch.dtype, bool]):
    """Whether the kernels for parameters of a dtype are those in double precision."""

    def __missing__(self, dtype: torch.dtype) -> bool:
        raise RuntimeError(f"kernels of the CPU read float32 or float64 parameters, got {dtype}")


_DOUBLE = _Kernels({torch.float32: False, torch.float64: True})
_CHECKS = {
    "item": _cpu.ITEM, "items value": _cpu.ITEMS_VALUE, "attribute": _cpu.ATTRIBUTE,
    "method": _cpu.METHOD, "state": _cpu.STATE, "empty": _cpu.EMPTY, "absent": _cpu.ABSENT,
    "memory": _cpu.MEMORY,
}  # fmt: skip
# Dtypes of x and of the parameters.
_SERVED = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
)


# An update reads delta as it is: what made it does not matter.
_PLAIN = LinearConfig()


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Make a tensor contiguous and of this dtype."""
    return (tensor if tensor.dtype is dtype else tensor.to(dtype)).contiguous()


def _input(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return x as the kernels for parameters of this dtype read it, and which of the kernels."""
    if x.dtype is dtype:
        return x.contiguous(), 1 if _DOUBLE[dtype] else 0
    if _cpu.bf16():
        return x.contiguous(), 2
    return x.to(dtype).contiguous(), 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    return tuple([0 if t is None else t.data_ptr() for t in tensors])


def _layer(
    x: Tensor, layer: LinearTensors, config: LinearConfig, training: bool
) -> tuple[int | float | bool, ...]:
    weight = layer.weight
    features = weight.shape
    return (
        x.shape[0],
        features[1],
        features[0],
        torch.get_num_threads(),
        _NORMALIZATION[config.normalization],
        _ACTIVATION[config.activation],
        config.eps,
        config.momentum,
        training,
        *[0 if t is None else t.data_ptr() for t in layer],
    )


def _rule(rule: RuleTensors) -> tuple[int | bool, ...]:
    return (
        _RULE[rule.kind],
        rule.nesterov,
        rule.hyper.data_ptr(),
        *[0 if t is None else t.data_ptr() for t in rule.first],
        *[0 if t is None else t.data_ptr() for t in rule.second],
        *rule.trainable,
    )


def _synthesizer(synthesizer: SynthesizerTensors) -> tuple[int, ...]:
    """Return the argument tuple but for the context, which :func:`_context` ends it with."""
    kind, weight, down, context_weight, bias, table, ignored = synthesizer
    classes = (
        0 if context_weight is None else context_weight.shape[-1] if table is None else len(table)
    )
    return (
        _SYNTHESIZER[kind],
        0 if down is None else down.shape[0],
        classes,
        weight.data_ptr(),
        0 if down is None else down.data_ptr(),
        0 if context_weight is None else context_weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if table is None else table.data_ptr(),
        table is not None and table.dtype is not weight.dtype,
        ignored,
    )


def _context(
    synthesizer: SynthesizerTensors, context: Tensor | None
) -> tuple[tuple[int, int], Tensor | None]:
    """Return the addresses of labels and vectors, and the context as kernels read it, to be
    kept."""
    labels, vectors = split_context(synthesizer, context)
    return (_address(labels), _address(vectors)), labels if vectors is None else vectors


def _slots(layer: LinearTensors) -> tuple[Tensor | None, ...]:
    return layer[:4]


class CpuBackend(Unbound):
    """:class:`fused_dni.ops.types.Backend` in C++, for float32, float64 and
    bfloat16 with float32 parameters."""

    name = "cpu"
    synthesizers = SYNTHESIZERS

    def available(self) -> str | None:
        """Return None: where the extension can be imported, it runs."""
        return None

    def why_not(self, x: Tensor, weight: Tensor) -> str | None:
        """Say why these tensors cannot be served; None if they can."""
        if x.device.type != "cpu" or weight.device.type != "cpu":
            return f"serves tensors on a CPU, got x on {x.device} and weight on {weight.device}"
        if (x.dtype, weight.dtype) not in _SERVED:
            return (
                "serves float32 or float64, x and parameters alike, or a bfloat16 x with float32 "
                f"parameters, got x {x.dtype} and weight {weight.dtype}"
            )
        return None

    def linear_forward(
        self, x: Tensor, layer: LinearTensors, config: LinearConfig, training: bool, save: bool
    ) -> tuple[Tensor, Saved]:
        """See :meth:`fused_dni.ops.types.Backend.linear_forward`."""
        given, dtype = x.dtype, layer.weight.dtype
        x, kernel = _input(x, dtype)
        h = x.new_empty(x.shape[0], layer.weight.shape[0])
        saved = results.saved_of(h, config, dtype) if save else Saved()
        _cpu.linear_forward(
            kernel,
            _layer(x, layer, config, training),
            (x.data_ptr(), h.data_ptr(), *_addresses(saved)),
        )
        moved = moved_statistics(layer, config, training)
        if moved:
            increment_version(moved)
        return h if h.dtype is given else h.to(given), saved

    def linear_backward(
        self,
        grad_h: Tensor,
        x: Tensor,
        h: Tensor,
        saved: Saved,
        layer: LinearTensors,
        config: LinearConfig,
        training: bool,
        need_dx: bool,
        need_weight: bool,
    ) -> LinearGradients:
        """See :meth:`fused_dni.ops.types.Backend.linear_backward`."""
        given, dtype = x.dtype, layer.weight.dtype
        x, kernel = _input(x, dtype)
        h, grad_h = _as(h, x.dtype), _as(grad_h, dtype)
        weight, bias, norm_weight, norm_bias = _slots(layer)
        gradients = LinearGradients(
            torch.empty_like(grad_h),
            torch.empty_like(x) if need_dx else None,
            torch.empty_like(weight) if need_weight and weight is not None else None,
            None if bias is None else torch.empty_like(bias),
            None if norm_weight is None else torch.empty_like(norm_weight),
            None if norm_bias is None else torch.empty_like(norm_bias),
        )
        _cpu.linear_backward(
            kernel,
            _layer(x, layer, config, training),
            (
                grad_h.data_ptr(),
                x.data_ptr(),
                h.data_ptr(),
                *[0 if t is None else t.data_ptr() for t in saved],
                *[0 if t is None else t.data_ptr() for t in gradients],
            ),
        )
        if x.dtype is not given and gradients.x is not None:
            return gradients._replace(x=gradients.x.to(given))
        return gradients

    def linear_update_(
        self, x: Tensor, gradients: LinearGradients, layer: LinearTensors, rule: RuleTensors
    ) -> None:
        """See :meth:`fused_dni.ops.types.Backend.linear_update_`."""
        x, kernel = _input(x, layer.weight.dtype)
        delta = gradients.delta.contiguous()
        _cpu.linear_update(
            kernel,
            _layer(x, layer, _PLAIN, False),
            _rule(rule),
            (
                x.data_ptr(),
                delta.data_ptr(),
                _address(gradients.bias),
                _address(gradients.norm_weight),
                _address(gradients.norm_bias),
            ),
        )
        increment_version(updated(_slots(layer), rule))

    def bind_step(
        self,
        layer: LinearTensors,
        config: LinearConfig,
        synthesizer: SynthesizerTensors,
        max_norm: float,
        rule: RuleTensors,
    ) -> BoundStep:
        """See :meth:`fused_dni.ops.types.Backend.bind_step`."""
        return _Step(layer, config, synthesizer, max_norm, rule)

    def linear_cross_entropy(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        label_smoothing: float,
        ignore_index: int,
        need_delta: bool,
    ) -> CrossEntropy:
        """See :meth:`fused_dni.ops.types.Backend.linear_cross_entropy`."""
        dtype = weight.dtype
        x, target = _as(x, dtype), target.contiguous()
        loss = x.new_empty(())
        delta = x.new_empty(x.shape[0], weight.shape[0]) if need_delta else None
        _cpu.linear_cross_entropy(
            _DOUBLE[dtype],
            _layer(x, LinearTensors(weight, bias), _PLAIN, False),
            (
                label_smoothing,
                ignore_index,
                x.data_ptr(),
                target.data_ptr(),
                loss.data_ptr(),
                _address(delta),
            ),
        )
        return CrossEntropy(loss, delta)

    def watch(self, checks: Sequence[Check]) -> Any:
        """Bind checks as one call that says whether all hold."""
        return _cpu.Watch(_checks(checks))

    def quick_exact(
        self, layer: LinearTensors, config: LinearConfig, rule: RuleTensors, parts: QuickParts
    ) -> Any:
        """Bind forward, backward and update by the true gradient as calls without the interpreter;
        see csrc/cpu/quick.cpp for what they return."""
        return _cpu.QuickExact(_quick_exact(layer, config, rule, parts))

    def quick_loss(
        self, layer: LinearTensors, loss: QuickLoss, rule: RuleTensors, parts: QuickParts
    ) -> Any:
        """Bind the same of a layer with its cross-entropy: forward, backward from the gradient at
        the loss, and update."""
        made = _quick_exact(layer, _PLAIN, rule, parts)
        return _cpu.QuickLoss(
            {**made, "smoothing": loss.label_smoothing, "ignored": loss.ignore_index}
        )

    def quick_stack(
        self,
        container: nn.Module,
        surroundings: Sequence[Check],
        own: Sequence[Check],
        steps: list[Any],
        exact: bool,
        head: Any,
        teachers: list[Any],
    ) -> Any:
        """Bind steps that :meth:`quick_exact`, or a bound step's ``quick``, made as one call of
        their container, with what :meth:`quick_loss` made of the head behind them, or None. Of
        exact steps of layers with synthesizers ``teachers`` are the bound steps' ``quick``. It
        looks at autocast itself."""
        autocast = (
            partial(torch.is_autocast_enabled, "cpu"),
            partial(torch.get_autocast_dtype, "cpu"),
            torch.bfloat16,
            torch.float32,
        )
        given = (container, _checks(surroundings), _checks(own), steps, head, autocast)
        return _cpu.QuickExactStack(*given, teachers) if exact else _cpu.QuickStack(*given)

    def synthesizer_predict(
        self, h: Tensor, synthesizer: SynthesizerTensors, context: Tensor | None
    ) -> Prediction:
        """See :meth:`fused_dni.ops.types.Backend.synthesizer_predict`."""
        h = _as(h, synthesizer.weight.dtype)
        prediction = results.prediction_of(h, synthesizer, synthesizer.weight.dtype)
        given, context = _context(synthesizer, context)
        _cpu.synthesizer_predict(
            _DOUBLE[h.dtype],
            _synthesizer(synthesizer) + given,
            (
                *h.shape,
                torch.get_num_threads(),
                h.data_ptr(),
                prediction.scaled.data_ptr(),
                _address(prediction.reduced),
            ),
        )
        return prediction

    def synthesizer_gradients(
        self,
        h: Tensor,
        prediction: Prediction,
        grad_h: Tensor,
        synthesizer: SynthesizerTensors,
        context: Tensor | None,
        target_scale: float,
        statistics: Tensor,
    ) -> SlotGradients:
        """See :meth:`fused_dni.ops.types.Backend.synthesizer_gradients`."""
        gradients = results.synthesizer_gradients(synthesizer)
        _train(
            h, prediction, grad_h, synthesizer, context, target_scale, statistics, (),
            [0 if g is None else g.data_ptr() for g in gradients],
        )  # fmt: skip
        increment_version(statistics)
        return gradients

    def synthesizer_update_(
        self,
        h: Tensor,
        prediction: Prediction,
        grad_h: Tensor,
        synthesizer: SynthesizerTensors,
        context: Tensor | None,
        target_scale: float,
        statistics: Tensor,
        rule: RuleTensors,
    ) -> None:
        """See :meth:`fused_dni.ops.types.Backend.synthesizer_update_`."""
        _train(
            h, prediction, grad_h, synthesizer, context, target_scale, statistics, _rule(rule), []
        )  # fmt: skip
        increment_version([statistics, *updated(synthesizer.parameters(), rule)])

    def lstm_forward(
        self,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        layers: tuple[LSTMLayer, ...],
        lengths: Tensor | None,
        dropout: tuple[Tensor, ...],
        save: bool,
    ) -> LSTMTrace:
        """See :meth:`fused_dni.ops.types.Backend.lstm_forward`."""
        dtype = layers[0].weight_ih.dtype
        x, h, c = _as(x, dtype), _as(h, dtype), _as(c, dtype)
        masks = [_as(mask, dtype) for mask in dropout] if dropout else []
        if lengths is not None:
            lengths = lengths.contiguous()
        (steps, batch, features), (depth, _, size) = x.shape, h.shape
        cells = gates = None
        if save:
            hidden = x.new_empty(depth, steps + 1, batch, size)
            cells = torch.empty_like(hidden)
            gates = x.new_empty(depth, steps, batch, 4 * size)
        else:
            hidden = x.new_empty(1, steps + 1, batch, size)
        trace = LSTMTrace(hidden, torch.empty_like(h), torch.empty_like(c), cells, gates)
        _cpu.lstm_forward(
            _DOUBLE[dtype],
            _addresses(chain.from_iterable(layers)),
            _addresses(masks) if masks else (),
            (
                steps,
                batch,
                features,
                size,
                torch.get_num_threads(),
                *_addresses((lengths, x, h, c, *trace)),
            ),
        )
        return trace

    def lstm_backward(
        self,
        grad_output: Tensor | None,
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        x: Tensor,
        layers: tuple[LSTMLayer, ...],
        lengths: Tensor | None,
        dropout: tuple[Tensor, ...],
        trace: LSTMTrace,
        need_dx: bool,
        need_weights: bool,
    ) -> LSTMGradients:
        """See :meth:`fused_dni.ops.types.Backend.lstm_backward`."""
        made, arguments, _kept = _lstm_backward(
            (grad_output, grad_h, grad_c), x, layers, lengths, dropout, trace, need_dx, need_weights
        )
        _cpu.lstm_backward(*arguments)
        if made.x is not None and made.x.dtype is not x.dtype:
            return made._replace(x=made.x.to(x.dtype))
        return made

    def lstm_close(
        self,
        grad_output: Tensor | None,
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        x: Tensor,
        layers: tuple[LSTMLayer, ...],
        lengths: Tensor | None,
        dropout: tuple[Tensor, ...],
        trace: LSTMTrace,
        need_dx: bool,
        need_weights: bool,
        boundary: LSTMBoundary,
        statistics: Tensor | None,
    ) -> LSTMClosed:
        """See :meth:`fused_dni.ops.types.Backend.lstm_close`."""
        synthesizer, ended, *factors, learns, entrance = boundary
        made, arguments, _kept = _lstm_backward(
            (grad_output, grad_h, grad_c), x, layers, lengths, dropout, trace, need_dx, need_weights
        )
        depth, batch, size = trace.h.shape
        lesson = None
        gradients: tuple[Tensor | None, ...] = (None,) * 4
        # The rows of the exit, for the prediction there, stand before those of the lesson.
        first = batch if boundary.strength else 0
        teaches = learns and (entrance or ended is not None)
        if not teaches:
            statistics = None
        elif statistics is not None:
            gradients = tuple(
                [None if p is None else torch.empty_like(p) for p in synthesizer.parameters()]
            )
        else:
            most = batch * (entrance + (ended is not None))
            rows = made.h.new_empty(first + most, 2 * depth * size)
            grad = rows.new_empty(most, 2 * depth * size)
            lesson = LSTMRegression(
                rows, grad, results.prediction_of(rows, synthesizer, rows.dtype)
            )
        if ended is not None:
            ended = ended.contiguous()
        count = _cpu.lstm_close(
            *arguments,
            (*_synthesizer(synthesizer), 0, 0),
            (
                *factors,
                entrance,
                _address(ended),
                trace.h.data_ptr(),
                trace.c.data_ptr(),
                *((0, 0, 0, 0) if lesson is None else _addresses((*lesson[:2], *lesson[2]))),
                _address(statistics),
                *_addresses(gradients),
            ),
        )
        if made.x is not None and made.x.dtype is not x.dtype:
            made = made._replace(x=made.x.to(x.dtype))
        if not count:
            return LSTMClosed(made)
        if lesson is None:
            assert statistics is not None
            increment_version(statistics)
            return LSTMClosed(made, None, gradients)
        rows, grad, (scaled, reduced) = lesson
        of = slice(first, first + count)
        prediction = Prediction(scaled[of], None if reduced is None else reduced[of])
        return LSTMClosed(made, LSTMRegression(rows[of], grad[:count], prediction))

    def lstm_update_(
        self, rows: tuple[LSTMRows, ...], layers: tuple[LSTMLayer, ...], rule: RuleTensors
    ) -> None:
        """See :meth:`fused_dni.ops.types.Backend.lstm_update_`."""
        dtype = layers[0].weight_ih.dtype
        rows = tuple([LSTMRows(*[_as(t, dtype) for t in layer]) for layer in rows])
        parameters = tuple(chain.from_iterable(layers))
        _cpu.lstm_update(
            _DOUBLE[dtype],
            _addresses(parameters),
            _rule(rule),
            (
                layers[0].weight_hh.shape[1],
                torch.get_num_threads(),
                *chain.from_iterable([(*r.input.shape, *_addresses(r)) for r in rows]),
            ),
        )
        increment_version(updated(parameters, rule))

    def lstm_cell_forward(
        self, x: Tensor, h: Tensor, c: Tensor, layer: LSTMLayer, save: bool
    ) -> CellTrace:
        """See :meth:`fused_dni.ops.types.Backend.lstm_cell_forward`."""
        dtype = layer.weight_ih.dtype
        x, h, c = _as(x, dtype), _as(h, dtype), _as(c, dtype)
        batch, size = h.shape
        trace = CellTrace(
            torch.empty_like(h),
            torch.empty_like(c),
            h.new_empty(batch, 4 * size) if save else None,
        )
        _cpu.lstm_cell_forward(
            _DOUBLE[dtype],
            _addresses(layer),
            (
                1,
                batch,
                x.shape[1],
                size,
                torch.get_num_threads(),
                *_addresses((x, h, c)),
                *_addresses(trace),
            ),
        )
        return trace

    def lstm_cell_backward(
        self,
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        layer: LSTMLayer,
        trace: CellTrace,
        need_dx: bool,
        need_weights: bool,
    ) -> CellGradients:
        """See :meth:`fused_dni.ops.types.Backend.lstm_cell_backward`."""
        if trace.gates is None:
            raise ValueError("this trace is of a forward without save")
        dtype = trace.gates.dtype
        _same(dtype, layer)
        given, x = x.dtype, _as(x, dtype)
        h, c = _as(h, dtype), _as(c, dtype)
        arriving = [None if g is None else _as(g, dtype) for g in (grad_h, grad_c)]
        made = CellGradients(
            torch.empty_like(trace.gates),
            torch.empty_like(h),
            torch.empty_like(c),
            torch.empty_like(x) if need_dx else None,
            _empty_like(layer) if need_weights else None,
        )
        _cpu.lstm_cell_backward(
            _DOUBLE[dtype],
            _addresses(layer),
            _addresses(made.layer or (None,) * 4),
            (
                1,
                *x.shape,
                h.shape[1],
                torch.get_num_threads(),
                *_addresses((*arriving, x, h, c, trace.c, trace.gates)),
                *_addresses(made[:4]),
            ),
        )
        if made.x is not None and given is not dtype:
            return made._replace(x=made.x.to(given))
        return made


class _Step:
    """A decoupled step with all addresses looked up but those of what changes with every batch."""

    def __init__(
        self,
        layer: LinearTensors,
        config: LinearConfig,
        synthesizer: SynthesizerTensors,
        max_norm: float,
        rule: RuleTensors,
    ) -> None:
        weight = layer.weight
        self.dtype = weight.dtype
        self.features = weight.shape[0]
        self.layer = _layer(weight, layer, config, True)
        self.synthesizer = synthesizer
        self.rule = _rule(rule)
        self.max_norm = max_norm
        self.config = config
        self.inside = config.interface == "preactivation"
        # Whatever the step may have written; holding the tensors keeps the addresses good.
        self.written = updated(_slots(layer), rule) + moved_statistics(layer, config, True)
        self.fixed = _synthesizer(synthesizer)

    def __call__(
        self,
        x: Tensor,
        context: Tensor | None,
        target_scale: float,
        need_dx: bool,
        need_prediction: bool,
    ) -> Step:
        given = x.dtype
        x, kernel = _input(x, self.dtype)
        rows = x.shape[0]
        h = x.new_empty(rows, self.features)
        dx = torch.empty_like(x) if need_dx else None
        prediction = (
            results.prediction_of(h, self.synthesizer, self.dtype) if need_prediction else None
        )
        saved = (
            results.saved_of(h, self.config, self.dtype)
            if need_prediction and self.inside
            else None
        )
        conditions, context = _context(self.synthesizer, context)
        _cpu.linear_step(
            kernel,
            (rows, *self.layer[1:3], torch.get_num_threads(), *self.layer[4:]),
            self.fixed + conditions,
            self.rule,
            (
                target_scale,
                self.max_norm,
                self.inside,
                x.data_ptr(),
                h.data_ptr(),
                0 if prediction is None else prediction.scaled.data_ptr(),
                0 if prediction is None else _address(prediction.reduced),
                0 if dx is None else dx.data_ptr(),
                *((0, 0) if saved is None else _addresses(saved)),
            ),
        )
        increment_version(self.written)
        if h.dtype is not given:
            h, dx = h.to(given), None if dx is None else dx.to(given)
        return Step(h, prediction, dx, saved)

    def quick(self, parts: QuickParts, taught: QuickSynthesizer) -> Any:
        """Bind the step, with a target or without one, as a call without the interpreter: of
        ``(module, input, context)``; see csrc/cpu/quick.cpp for what it returns."""
        synthesizer = self.synthesizer
        never = [("state", bool, None, None, None)]
        return _cpu.QuickStep(
            {
                **_quick(parts, self.dtype, self.layer, self.rule),
                "untaught": _checks(taught.untaught),
                "taught": _checks(never if taught.taught is None else taught.taught),
                "synthesizer": (*self.fixed, 0, 0),
                "teacher": None if taught.rule is None else _rule(taught.rule),
                "teacher group": taught.group,
                "teacher state": taught.state,
                "labels": taught.labels,
                "context": taught.context,
                "unit": taught.unit,
                "written": _moved(parts, self.written),
                "learned": []
                if taught.rule is None
                else [taught.statistics, *updated(synthesizer.parameters(), taught.rule)],
                "last": torch.clear_autocast_cache,
                "max_norm": self.max_norm,
                "preactivation": self.inside,
                "kappa": taught.kappa,
                "statistics": taught.statistics,
                "lessons": taught.lessons,
                "earliest": taught.earliest,
                "interval": taught.interval,
            }
        )


def _checks(checks: Sequence[Check]) -> list[tuple[Any, ...]]:
    return [(_CHECKS[kind], *objects) for kind, *objects in checks]


def _moved(parts: QuickParts, tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors that a quick step writes to, with the batches that it counts."""
    return tensors if parts.counter is None else [*tensors, parts.counter]


def _quick(
    parts: QuickParts, dtype: torch.dtype, layer: tuple[Any, ...], rule: tuple[Any, ...]
) -> dict[str, Any]:
    """Return what every quick step is made from."""
    return {
        "module": parts.module,
        "tensor": Tensor,
        "mark": parts.mark,
        "threads": torch.get_num_threads,
        "increment": torch._C._increment_version,  # increment_version itself, without its call
        "type": 1 if _DOUBLE[dtype] else 0,
        "least": parts.least,
        "layer": layer,
        "surroundings": _checks(parts.surroundings),
        "always": _checks(parts.always),
        "own": _checks(parts.own),
        "counter": parts.counter,
        "rule": rule,
        "group": parts.group,
        "state": parts.state,
    }


def _quick_exact(
    layer: LinearTensors, config: LinearConfig, rule: RuleTensors, parts: QuickParts
) -> dict[str, Any]:
    """Return what a quick step by the true gradient is made from."""
    weight = layer.weight
    return {
        **_quick(parts, weight.dtype, _layer(weight, layer, config, True), _rule(rule)),
        "moved": _moved(parts, moved_statistics(layer, config, True)),
        "written": updated(_slots(layer), rule),
        "keeps": config.normalization is not None or config.activation not in FROM_OUTPUT,
    }


def _lstm_backward(
    arriving: tuple[Tensor | None, ...],
    x: Tensor,
    layers: tuple[LSTMLayer, ...],
    lengths: Tensor | None,
    dropout: tuple[Tensor, ...],
    trace: LSTMTrace,
    need_dx: bool,
    need_weights: bool,
) -> tuple[LSTMGradients, tuple[Any, ...], tuple[Any, ...]]:
    """Make room for a window's gradients, the arguments of a backward that fills it, and what must
    live until that is done."""
    hidden, last_h, last_c, cells, gates = trace
    if cells is None or gates is None:
        raise ValueError("this trace is of a forward without save")
    dtype = hidden.dtype
    for layer in layers:  # no call for each: this is a part of every window
        for p in layer:
            if p is not None and (p.dtype is not dtype or not p.is_cpu):
                _same(dtype, layer)
    x = _as(x, dtype)
    arriving = tuple([None if g is None else _as(g, dtype) for g in arriving])
    masks = [_as(mask, dtype) for mask in dropout] if dropout else []
    if lengths is not None:
        lengths = lengths.contiguous()
    steps, batch, features = x.shape
    made = LSTMGradients(
        torch.empty_like(gates),
        torch.empty_like(last_h),
        torch.empty_like(last_c),
        torch.empty_like(x) if need_dx else None,
        tuple([_empty_like(layer) for layer in layers]) if need_weights else (),
    )
    arguments = (
        _DOUBLE[dtype],
        _addresses(chain.from_iterable(layers)),
        _addresses(chain.from_iterable(made.layers)) if need_weights else (),
        _addresses(masks) if masks else (),
        (
            steps,
            batch,
            features,
            last_h.shape[2],
            torch.get_num_threads(),
            *_addresses((lengths, *arriving, x, hidden, cells, gates, *made[:4])),
        ),
    )
    return made, arguments, (x, arriving, masks, lengths)


def _same(dtype: torch.dtype, parameters: Iterable[Tensor | None]) -> None:
    """Refuse parameters that were moved since the forward: their gradients get room like them."""
    for p in parameters:
        if p is not None and (p.dtype is not dtype or not p.is_cpu):
            raise RuntimeError(
                f"parameters must be {dtype}, as in the forward, got {p.dtype} on {p.device}"
            )


def _empty_like(layer: LSTMLayer) -> LSTMLayer:
    """Make room for a layer's gradients."""
    weight_ih, weight_hh, *biases = layer
    return LSTMLayer(
        torch.empty_like(weight_ih),
        torch.empty_like(weight_hh),
        *[None if p is None else torch.empty_like(p) for p in biases],
    )


def _train(
    h: Tensor,
    prediction: Prediction,
    grad_h: Tensor,
    synthesizer: SynthesizerTensors,
    context: Tensor | None,
    target_scale: float,
    statistics: Tensor,
    rule: tuple[int | bool, ...],
    gradients: list[int],
) -> None:
    dtype = synthesizer.weight.dtype
    h, grad_h, scaled = _as(h, dtype), _as(grad_h, dtype), prediction.scaled.contiguous()
    reduced = prediction.reduced
    if reduced is not None:
        reduced = reduced.contiguous()
    elif synthesizer.down is not None:
        raise ValueError(
            f"prediction.reduced must be [{h.shape[0]}, {synthesizer.down.shape[0]}], got none"
        )
    given, context = _context(synthesizer, context)
    _cpu.synthesizer_train(
        _DOUBLE[h.dtype],
        _synthesizer(synthesizer) + given,
        rule,
        (
            *h.shape,
            torch.get_num_threads(),
            target_scale,
            h.data_ptr(),
            scaled.data_ptr(),
            _address(reduced),
            grad_h.data_ptr(),
            statistics.data_ptr(),
            *gradients,
        ),
    )
