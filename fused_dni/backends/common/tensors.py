"""What backends with raw kernels share: what an op mutates, contexts, room for results."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_dni.backends.common.synthesizer import check_form
from fused_dni.ops.types import (
    FROM_OUTPUT,
    LinearConfig,
    LinearTensors,
    Prediction,
    RuleTensors,
    Saved,
    SynthesizerTensors,
)


def updated(parameters: tuple[Tensor | None, ...], rule: RuleTensors) -> list[Tensor]:
    """What an update by ``rule`` may have written."""
    written = [rule.hyper]
    for i, trainable in enumerate(rule.trainable):
        if trainable:
            for tensor in (parameters[i], rule.first[i], rule.second[i]):
                if tensor is not None:
                    written.append(tensor)
    return written


def moved_statistics(layer: LinearTensors, config: LinearConfig, training: bool) -> list[Tensor]:
    """The running statistics, if a forward moves them."""
    if not training or config.normalization != "batch":
        return []
    return [t for t in (layer.running_mean, layer.running_var) if t is not None]


def split_context(
    synthesizer: SynthesizerTensors, context: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """A context as kernels read it: class indices or vectors, one of them or none.

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


def empty_prediction(h: Tensor, synthesizer: SynthesizerTensors, dtype: torch.dtype) -> Prediction:
    """Room for a prediction over h [N, O]."""
    down = synthesizer.down
    return Prediction(
        h.new_empty(h.shape, dtype=dtype),
        None if down is None else h.new_empty(h.shape[0], down.shape[0], dtype=dtype),
    )


def empty_saved(h: Tensor, config: LinearConfig, dtype: torch.dtype) -> Saved:
    """Room for what a backward needs beside h [N, O]."""
    rows, features = h.shape
    normalized = rstd = None
    if config.normalization is not None or config.activation not in FROM_OUTPUT:
        normalized = h.new_empty(rows, features, dtype=dtype)
    if config.normalization is not None:
        size = features if config.normalization == "batch" else rows
        rstd = h.new_empty(size, dtype=dtype)
    return Saved(normalized, rstd)
