"""Checks of what users hand in, before anything is changed. Messages name the argument, what was
given and what is allowed. Option errors are ``ValueError``, tensors that do not fit
``RuntimeError``, as in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_dni.backends.base import (
    ACTIVATIONS,
    NORMALIZATIONS,
    LinearConfig,
    LinearTensors,
    SynthesizerTensors,
)


def options(normalization: str | None, activation: str) -> None:
    """Refuse an unknown normalisation or activation."""
    if normalization not in NORMALIZATIONS:
        allowed = ", ".join(map(repr, NORMALIZATIONS))
        raise ValueError(f"normalization must be one of {allowed}; got {normalization!r}")
    if activation not in ACTIVATIONS:
        allowed = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be one of {allowed}; got {activation!r}")


def rows(input: Tensor, weight: Tensor, name: str) -> Tensor:
    """``input`` [..., I] as contiguous rows [N, I].

    Under autocast the input is cast to its dtype, as ``F.linear`` would.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(input).__name__}")
    if not weight.is_contiguous():
        raise RuntimeError(
            f"weight must be contiguous, got {list(weight.shape)} with strides {weight.stride()}"
        )
    features = weight.shape[1]
    if input.dim() == 0 or input.shape[-1] != features:
        raise RuntimeError(
            f"{name} must have shape [..., {features}] (in_features), got {list(input.shape)}"
        )
    if input.device != weight.device:
        raise RuntimeError(f"{name} is on {input.device}, the weight on {weight.device}")
    if torch.is_autocast_enabled(weight.device.type):
        input = input.to(torch.get_autocast_dtype(weight.device.type))
    elif input.dtype != weight.dtype:
        raise RuntimeError(
            f"{name} has dtype {input.dtype}, the weight {weight.dtype}; cast one of them or use "
            "torch.autocast"
        )
    if input.dim() != 2:
        input = input.reshape(-1, features)
    return input.contiguous()


def batch(x: Tensor, config: LinearConfig, training: bool) -> None:
    """Refuse a batch that has nothing to train on, or a single row under batch statistics."""
    n = x.shape[0]
    if n == 0 and training:
        raise RuntimeError("the batch is empty (0 rows): nothing can be trained on it")
    if n == 1 and training and config.normalization == "batch":
        raise ValueError(
            "expected more than 1 row when training with normalization='batch', got input with "
            f"{n} row"
        )


def labels(context: Tensor | None, classes: int) -> None:
    """Refuse a class index outside ``[0, classes)``.

    Only on a CPU, where looking at the data costs no synchronisation.
    """
    if context is None or context.dtype != torch.int64 or context.device.type != "cpu":
        return
    if torch.compiler.is_compiling() or not classes or not context.numel():
        return
    low, high = (int(v) for v in torch.aminmax(context))
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise IndexError(
            f"label {wrong} in context is out of range: the synthesizer knows {classes} classes"
        )


def layer(tensors: LinearTensors, config: LinearConfig) -> None:
    """Refuse vectors of another size, dtype or device than the weight's, and what has gaps."""
    weight = tensors.weight
    if weight.dim() != 2 or not weight.is_floating_point():
        raise RuntimeError(
            f"weight must be floating point [O, I], got {weight.dtype} {list(weight.shape)}"
        )
    for name, t in zip(tensors._fields[1:], tensors[1:], strict=True):
        if t is None:
            continue
        if (
            t.shape != weight.shape[:1]
            or t.dtype != weight.dtype
            or t.device != weight.device
            or not t.is_contiguous()
        ):
            raise RuntimeError(
                f"{name} must be {weight.dtype} [{weight.shape[0]}] on {weight.device}, "
                f"contiguous, got {t.dtype} {list(t.shape)} on {t.device}"
            )
    if config.normalization == "batch" and (
        tensors.running_mean is None or tensors.running_var is None
    ):
        raise ValueError("normalization='batch' needs running_mean and running_var")


def synthesizer(tensors: SynthesizerTensors, weight: Tensor) -> None:
    """Refuse a synthesizer of another dtype or device than the layer's weight."""
    for name, t in zip(tensors._fields[1:], tensors.parameters(), strict=True):
        if t is None:
            continue
        if t.dtype != weight.dtype or t.device != weight.device or not t.is_contiguous():
            raise RuntimeError(
                f"the synthesizer's {name} must be {weight.dtype} on {weight.device}, contiguous, "
                f"as the layer's, got {t.dtype} on {t.device}"
            )
