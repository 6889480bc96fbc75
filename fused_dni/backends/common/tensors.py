"""What backends with raw kernels share: what an op mutates, contexts, a step that is not bound."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_dni.backends.common.synthesizer import check_form
from fused_dni.ops.types import (
    BoundStep,
    LinearConfig,
    LinearTensors,
    RuleTensors,
    Step,
    SynthesizerTensors,
)


def updated(parameters: tuple[Tensor | None, ...], rule: RuleTensors) -> list[Tensor]:
    """Return what an update by ``rule`` may have written."""
    written = [rule.hyper]
    for i, trainable in enumerate(rule.trainable):
        if trainable:
            for tensor in (parameters[i], rule.first[i], rule.second[i]):
                if tensor is not None:
                    written.append(tensor)
    return written


def moved_statistics(layer: LinearTensors, config: LinearConfig, training: bool) -> list[Tensor]:
    """Return the running statistics, if a forward moves them."""
    if not training or config.normalization != "batch":
        return []
    return [t for t in (layer.running_mean, layer.running_var) if t is not None]


def split_context(
    synthesizer: SynthesizerTensors, context: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return a context as kernels read it: class indices or vectors, one of them or none.

    Raises:
        ValueError, RuntimeError: as :func:`~fused_dni.backends.common.synthesizer.check_form`.
        TypeError: class indices of another type than int64.
    """
    if synthesizer.table is not None or (context is None) != (synthesizer.context_weight is None):
        check_form(synthesizer, context)  # not called where nothing can be wrong: every step asks
    if context is None:
        return None, None
    context = context.contiguous()
    if context.dtype is torch.int64:
        return context, None
    if not context.is_floating_point():
        raise TypeError(f"class indices must be torch.int64, got {context.dtype}")
    return None, context.to(synthesizer.weight.dtype)


class Unbound:
    """A step of a backend that binds steps, taken once."""

    bind_step: Callable[
        [LinearTensors, LinearConfig, SynthesizerTensors, float, RuleTensors], BoundStep
    ]

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
