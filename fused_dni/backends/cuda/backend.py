"""The CUDA C++ backend: ``csrc/cuda`` behind the signature of :mod:`fused_dni.ops.types`.

Serves CUDA tensors or, where FUSED_DNI_CUDA_EMULATION names the emulated extension, tensors on a
CPU (slowly: for tests). Every op is one cooperative launch on the current stream of the tensors'
device; nothing is read back and torch allocates, so that ops can be captured in a CUDA graph.

x may be float32, bfloat16 or float16; parameters are float32. float32 products follow
``torch.get_float32_matmul_precision()``: "highest" is IEEE arithmetic, anything else TF32. Operands
of the gradients' products are in bfloat16 for a bfloat16 x, and in TF32 for a float16 one (its
digits, with room for small gradients).

What needs a look at the data, a class index out of range say, is an exception on a CPU. On a GPU
nothing waits for it: the prediction is NaN there, the update skipped and counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_dni.backends.common.precision import LOW_PRECISION, require_masters
from fused_dni.backends.common.synthesizer import check_context
from fused_dni.backends.common.tensors import (
    empty_prediction,
    empty_saved,
    moved_statistics,
    split_context,
    updated,
)
from fused_dni.backends.cuda.calls import (
    TYPES,
    capturing,
    current,
    described,
    extension,
    ieee,
    launch,
    unbuilt,
    words,
    workspace,
)
from fused_dni.backends.cuda.lstm import CudaLSTM
from fused_dni.backends.reference.linear_cross_entropy import linear_cross_entropy
from fused_dni.ops.types import (
    ACTIVATIONS,
    INTERFACES,
    NORMALIZATIONS,
    RULES,
    SYNTHESIZERS,
    BoundStep,
    LinearConfig,
    LinearGradients,
    LinearTensors,
    Prediction,
    RuleTensors,
    Saved,
    Step,
    SynthesizerTensors,
)

_NORMALIZATION = {name: index for index, name in enumerate(NORMALIZATIONS)}
_ACTIVATION = {name: index for index, name in enumerate(ACTIVATIONS)}
_INTERFACE = {name: index for index, name in enumerate(INTERFACES)}
_SYNTHESIZER = {name: index for index, name in enumerate(SYNTHESIZERS)}
_RULE = {name: index for index, name in enumerate(RULES)}


class CudaBackend(CudaLSTM):
    """:class:`fused_dni.ops.types.Backend` in CUDA C++."""

    name = "cuda"

    # PyTorch's own product, and its softmax behind it.
    linear_cross_entropy = staticmethod(linear_cross_entropy)

    def __init__(self) -> None:
        # Looked up here, once: torch.compile traces why_not and cannot look into a module.
        self.emulated: bool = extension().emulated
        self.unbuilt: dict[torch.device, str] = {}  # devices without code, and what there is
        for index in range(0 if self.emulated else torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            built = unbuilt(capability)
            if built is not None:
                self.unbuilt[torch.device("cuda", index)] = (
                    f"was built for compute capabilities {built}, got "
                    f"{torch.cuda.get_device_name(index)} of {capability[0]}.{capability[1]}: "
                    "install again with FUSED_DNI_CUDA_ARCHS set for it"
                )

    def available(self) -> str | None:
        """None if kernels can run here at all, or why not."""
        if not self.emulated and not torch.cuda.is_available():
            return "needs a CUDA device (torch.cuda.is_available() is false)"
        if not self.emulated:
            toolkit, driver = extension().toolkit, extension().driver()
            if int(driver.split(".")[0]) < int(toolkit.split(".")[0]):
                return f"was built with CUDA {toolkit}, the driver is for {driver}"
        return None

    def why_not(self, x: Tensor, weight: Tensor) -> str | None:
        """None, or why these tensors cannot be served."""
        here = "cpu" if self.emulated else "cuda"
        if x.device != weight.device:
            return f"needs tensors of one device, got x on {x.device}, weight on {weight.device}"
        if x.device.type != here:
            how = " while it is emulated (FUSED_DNI_CUDA_EMULATION)" if here == "cpu" else ""
            return f"serves tensors on {here}{how}, got x on {x.device}"
        if x.device in self.unbuilt:
            return self.unbuilt[x.device]
        if weight.dtype != torch.float32 or not (
            x.dtype == torch.float32 or x.dtype in LOW_PRECISION
        ):
            return (
                "serves a float32, bfloat16 or float16 x with float32 parameters, got x "
                f"{x.dtype} and weight {weight.dtype}"
            )
        return None

    def linear_forward(
        self, x: Tensor, layer: LinearTensors, config: LinearConfig, training: bool, save: bool
    ) -> tuple[Tensor, Saved]:
        """See :meth:`fused_dni.ops.types.Backend.linear_forward`."""
        x = _rows(x)
        h = x.new_empty(x.shape[0], layer.weight.shape[0])
        saved = empty_saved(h, config, torch.float32) if save else Saved()
        items = (
            _sizes(x, layer.weight), _config(layer, config, training), _all(layer), described(x),
            described(h), *_all(saved),
        )  # fmt: skip
        _run(extension().linear_forward, items, x)
        moved = moved_statistics(layer, config, training)
        if moved:
            increment_version(moved)
        return h, saved

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
        x, h, grad_h = _rows(x), h.contiguous(), grad_h.contiguous()
        weight, bias, norm_weight, norm_bias = layer[:4]
        made = LinearGradients(
            x.new_empty(h.shape, dtype=torch.float32),
            x.new_empty(x.shape) if need_dx else None,
            torch.empty_like(weight) if need_weight else None,
            *[None if v is None else torch.empty_like(v) for v in (bias, norm_weight, norm_bias)],
        )
        items = (
            _sizes(x, weight), _config(layer, config, training), _all(layer), described(x),
            described(grad_h), described(h), *_all(saved), *_all(made),
        )  # fmt: skip
        _run(extension().linear_backward, items, x)
        return made

    def linear_update_(
        self, x: Tensor, gradients: LinearGradients, layer: LinearTensors, rule: RuleTensors
    ) -> None:
        """See :meth:`fused_dni.ops.types.Backend.linear_update_`."""
        require_masters(layer[:4], rule.stochastic)
        x, delta = _rows(x), gradients.delta.contiguous()
        items = (
            _sizes(x, layer.weight), (*_all(layer[:4]), None, None), described(x),
            described(delta), *_all(gradients[3:]), _rule(rule),
        )  # fmt: skip
        _run(extension().linear_update, items, x)
        increment_version(updated(layer[:4], rule))

    def linear_step_(
        self,
        x: Tensor,
        layer: LinearTensors,
        config: LinearConfig,
        synthesizer: SynthesizerTensors,
        context: Tensor | None,
        target_scale: float,
        max_norm: float,
        rule: RuleTensors,
        need_dx: bool,
        need_prediction: bool,
    ) -> Step:
        """See :meth:`fused_dni.ops.types.Backend.linear_step_`."""
        step = self.bind_step(layer, config, synthesizer, max_norm, rule)
        return step(x, context, target_scale, need_dx, need_prediction)

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

    def synthesizer_predict(
        self, h: Tensor, synthesizer: SynthesizerTensors, context: Tensor | None
    ) -> Prediction:
        """See :meth:`fused_dni.ops.types.Backend.synthesizer_predict`."""
        h = h.contiguous()
        made = empty_prediction(h, synthesizer, torch.float32)
        labels, vectors = _context(synthesizer, context)
        items = _prediction(h, made, synthesizer, labels, vectors)
        _run(extension().synthesizer_predict, items, h)
        return made

    def synthesizer_gradients(
        self,
        h: Tensor,
        prediction: Prediction,
        grad_h: Tensor,
        synthesizer: SynthesizerTensors,
        context: Tensor | None,
        target_scale: float,
        statistics: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """See :meth:`fused_dni.ops.types.Backend.synthesizer_gradients`."""
        h, grad_h, prediction = h.contiguous(), grad_h.contiguous(), _contiguous(prediction)
        made = tuple([None if p is None else torch.empty_like(p) for p in synthesizer.parameters()])
        labels, vectors = _context(synthesizer, context)
        items = (
            *_prediction(h, prediction, synthesizer, labels, vectors), described(grad_h),
            target_scale, described(statistics), *_all(made),
        )  # fmt: skip
        _run(extension().synthesizer_gradients, items, h)
        increment_version(statistics)
        return made

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
        parameters = synthesizer.parameters()
        require_masters(parameters, rule.stochastic)
        h, grad_h, prediction = h.contiguous(), grad_h.contiguous(), _contiguous(prediction)
        labels, vectors = _context(synthesizer, context)
        items = (
            *_prediction(h, prediction, synthesizer, labels, vectors), described(grad_h),
            target_scale, described(statistics), _rule(rule),
        )  # fmt: skip
        _run(extension().synthesizer_update, items, h)
        increment_version([statistics, *updated(parameters, rule)])


# Streams and shapes of batches whose workspace a bound step keeps: a whole one, the last one of an
# epoch, and some more.
_ROOMS = 4


class _Step:
    """A decoupled step over tensors that stay where they are; keeps its workspace."""

    def __init__(
        self,
        layer: LinearTensors,
        config: LinearConfig,
        synthesizer: SynthesizerTensors,
        max_norm: float,
        rule: RuleTensors,
    ) -> None:
        require_masters(layer[:4], rule.stochastic)
        self.weight, self.synthesizer, self.max_norm = layer.weight, synthesizer, max_norm
        self.config = config
        # Whoever holds the step holds the tensors whose addresses it has.
        self.kept = (layer, synthesizer, rule)
        self.written = updated(layer[:4], rule) + moved_statistics(layer, config, True)
        self.fixed = (
            _config(layer, config, True), _all(layer), _rule(rule), _synthesizer(synthesizer),
        )  # fmt: skip
        # The last few that came. One is made and used on its stream alone, to which it also goes
        # back. A graph has its own, in its own memory.
        self.rooms: dict[tuple[int, int, torch.dtype], Tensor] = {}
        words(layer.weight.device).prepare()

    def __call__(
        self,
        x: Tensor,
        context: Tensor | None,
        target_scale: float,
        need_dx: bool,
        need_prediction: bool,
    ) -> Step:
        x = _rows(x)
        labels, vectors = _context(self.synthesizer, context)
        h = x.new_empty(x.shape[0], self.weight.shape[0])
        dx = x.new_empty(x.shape) if need_dx else None
        prediction = saved = None
        if need_prediction:
            prediction = empty_prediction(h, self.synthesizer, torch.float32)
            if self.config.interface == "preactivation":
                saved = empty_saved(h, self.config, torch.float32)

        def items(prediction: Prediction | None, saved: Saved | None) -> tuple[Any, ...]:
            scaled, reduced = _all(prediction or (None, None))
            return (
                _sizes(x, self.weight), *self.fixed, described(x), described(labels),
                described(vectors), target_scale, self.max_norm, _INTERFACE[self.config.interface],
                described(h), scaled, reduced, described(dx), *_all(saved or Saved()),
            )  # fmt: skip

        op = extension().linear_step
        captured = capturing(x.device)
        key = (current(x.device), x.shape[0], x.dtype)
        room = None if captured else self.rooms.get(key)
        if room is None:
            # With room for what the caller does not want to have.
            room = workspace(op, items(None, None), x)
            if not captured:
                self.rooms[key] = room
            if len(self.rooms) > _ROOMS:
                del self.rooms[next(iter(self.rooms))]
        launch(op, items(prediction, saved), room)
        increment_version(self.written)
        return Step(h, prediction, dx, saved)


def _run(op: Any, items: tuple[Any, ...], like: Tensor) -> None:
    launch(op, items, workspace(op, items, like))


def _rows(x: Tensor) -> Tensor:
    """x [N, I] with rows that are contiguous, if apart."""
    if x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x
    return x.contiguous()


def _all(tensors: Any) -> tuple[Any, ...]:
    return tuple([described(t) for t in tensors])


def _sizes(x: Tensor, weight: Tensor) -> tuple[Any, ...]:
    outputs, inputs = weight.shape
    return (x.shape[0], inputs, outputs, TYPES[x.dtype], ieee())


def _config(layer: LinearTensors, config: LinearConfig, training: bool) -> tuple[Any, ...]:
    return (
        _NORMALIZATION[config.normalization],
        config.normalization == "batch" and (training or layer.running_mean is None),
        _ACTIVATION[config.activation],
        config.eps,
        config.momentum,
    )


def _rule(rule: RuleTensors) -> tuple[Any, ...]:
    return (
        _RULE[rule.kind], rule.nesterov, described(rule.hyper), _all(rule.first),
        _all(rule.second), rule.trainable,
    )  # fmt: skip


def _synthesizer(synthesizer: SynthesizerTensors) -> tuple[Any, ...]:
    down = synthesizer.down
    return (
        _SYNTHESIZER[synthesizer.kind],
        0 if down is None else down.shape[0],
        synthesizer.classes,
        described(synthesizer.table),
        synthesizer.ignore_index,
        *_all(synthesizer.parameters()),
    )


def _prediction(
    h: Tensor,
    prediction: Prediction,
    synthesizer: SynthesizerTensors,
    labels: Tensor | None,
    vectors: Tensor | None,
) -> tuple[Any, ...]:
    return (
        (*h.shape, TYPES[h.dtype], ieee()), _synthesizer(synthesizer), described(h),
        described(labels), described(vectors), *_all(prediction),
    )  # fmt: skip


def _contiguous(prediction: Prediction) -> Prediction:
    scaled, reduced = prediction
    return Prediction(scaled.contiguous(), None if reduced is None else reduced.contiguous())


def _context(
    synthesizer: SynthesizerTensors, context: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Labels and vectors; on a CPU, where looking costs no synchronisation, checked."""
    if context is not None and context.device.type == "cpu":
        check_context(synthesizer, context)
    return split_context(synthesizer, context)
