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

from fused_dni.backends.common.gpu import (
    Backward,
    Forward,
    GpuStep,
    Predict,
    Train,
    Update,
)
from fused_dni.backends.common.precision import LOW_PRECISION
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
from fused_dni.ops.types import (
    ACTIVATIONS,
    AFFINE,
    INTERFACES,
    NORMALIZATIONS,
    RULES,
    LinearConfig,
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
_SYNTHESIZER = {name: index for index, name in enumerate(AFFINE)}
_RULE = {name: index for index, name in enumerate(RULES)}


class _Step(GpuStep):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        device, config = self.layer.weight.device, _config(self.layer, self.config, True)
        self.fixed = (config, _all(self.layer), _rule(self.rule), _synthesizer(self.synthesizer))
        words(device).prepare()

    def launch(
        self, x: Tensor, labels: Tensor | None, vectors: Tensor | None, scale: float, made: Step
    ) -> None:
        def items(prediction: Prediction | None, saved: Saved | None) -> tuple[Any, ...]:
            scaled, reduced = _all(prediction or (None, None))
            return (
                _sizes(x, self.layer.weight), *self.fixed, described(x), described(labels),
                described(vectors), scale, self.max_norm, _INTERFACE[self.config.interface],
                described(made.h), scaled, reduced, described(made.dx), *_all(saved or Saved()),
            )  # fmt: skip

        op = extension().linear_step
        key = None if capturing(x.device) else (current(x.device), x.shape[0], x.dtype)
        # With room for what the caller does not want to have.
        room = self.workspace_for(key, lambda: workspace(op, items(None, None), x))
        launch(op, items(made.prediction, made.saved), room)


class CudaBackend(CudaLSTM):
    """:class:`fused_dni.ops.types.Backend` in CUDA C++."""

    name = "cuda"

    bind_step = _Step

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
        """Say why kernels cannot run here at all; None if they can."""
        if not self.emulated and not torch.cuda.is_available():
            return "needs a CUDA device (torch.cuda.is_available() is false)"
        if not self.emulated:
            toolkit, driver = extension().toolkit, extension().driver()
            if int(driver.split(".")[0]) < int(toolkit.split(".")[0]):
                return f"was built with CUDA {toolkit}, the driver is for {driver}"
        return None

    def why_not(self, x: Tensor, weight: Tensor) -> str | None:
        """Say why these tensors cannot be served; None if they can."""
        here = "cpu" if self.emulated else "cuda"
        how = " while it is emulated (FUSED_DNI_CUDA_EMULATION)"
        if why := self.elsewhere(x, weight, here, how):
            return why
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

    def launch_forward(self, of: Forward) -> None:
        """Launch ``linear_forward``."""
        x, layer, config, training, h, saved = of
        items = (
            _sizes(x, layer.weight), _config(layer, config, training), _all(layer), described(x),
            described(h), *_all(saved),
        )  # fmt: skip
        _run(extension().linear_forward, items, x)

    def launch_backward(self, of: Backward) -> None:
        """Launch ``linear_backward``."""
        grad_h, x, h, saved, layer, config, training, made = of
        items = (
            _sizes(x, layer.weight), _config(layer, config, training), _all(layer), described(x),
            described(grad_h), described(h), *_all(saved), *_all(made),
        )  # fmt: skip
        _run(extension().linear_backward, items, x)

    def launch_update(self, of: Update) -> None:
        """Launch ``linear_update_``."""
        x, gradients, layer, rule = of
        items = (
            _sizes(x, layer.weight), (*_all(layer[:4]), None, None), described(x),
            described(gradients.delta), *_all(gradients[3:]), _rule(rule),
        )  # fmt: skip
        _run(extension().linear_update, items, x)

    def launch_predict(self, of: Predict) -> None:
        """Launch ``synthesizer_predict``."""
        _run(extension().synthesizer_predict, _prediction(of), of.h)

    def launch_train(self, of: Train) -> None:
        """Launch ``synthesizer_gradients`` or ``synthesizer_update_``."""
        scaled = (described(of.grad_h), of.target_scale, described(of.statistics))
        items, h = (*_prediction(of.predicted), *scaled), of.predicted.h
        if isinstance(of.to, RuleTensors):
            _run(extension().synthesizer_update, (*items, _rule(of.to)), h)
        else:
            _run(extension().synthesizer_gradients, (*items, *_all(of.to)), h)


def _run(op: Any, items: tuple[Any, ...], like: Tensor) -> None:
    launch(op, items, workspace(op, items, like))


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


def _prediction(of: Predict) -> tuple[Any, ...]:
    return (
        (*of.h.shape, TYPES[of.h.dtype], ieee()), _synthesizer(of.synthesizer), described(of.h),
        described(of.labels), described(of.vectors), *_all(of.made),
    )  # fmt: skip
