"""Checks of what users hand in, before anything is changed. Messages name the argument, what was
given and what is allowed. Option errors are ``ValueError``, tensors that do not fit
``RuntimeError``, as in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fused_dni.ops import fits, registry
from fused_dni.ops.tracing import direct
from fused_dni.ops.types import (
    ACTIVATIONS,
    INTERFACES,
    NORMALIZATIONS,
    LinearConfig,
    LinearTensors,
    LSTMLayer,
    SynthesizerTensors,
)


def _typed(name: str, value: Any, says: str) -> TypeError:
    return TypeError(f"{name} must be {says}, got {value!r} ({type(value).__name__})")


def number(
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    none: bool = False,
) -> None:
    """Refuse what is no number (or tensor of one) in [low, high], NaN, infinity and flags included;
    without ``low`` if ``above``, without ``high`` if ``below``. ``none`` allows None."""
    if none and value is None:
        return
    if high < math.inf:
        says = f"in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
    else:
        says = "positive and finite" if above else f"finite and at least {low:g}"
    allowed = "None or " if none else ""
    of_numbers = isinstance(value, Tensor) and value.numel() == 1 and value.dtype != torch.bool
    if isinstance(value, bool) or not (isinstance(value, Real) or of_numbers):
        raise _typed(name, value, f"{allowed}a number, {says}")
    inside = bool(low <= value <= high and value < math.inf)
    if not inside or (above and value == low) or (below and value == high):
        raise ValueError(f"{name} must be {allowed}{says}, got {value!r}")


def share(name: str, value: Any) -> None:
    """Refuse what is no number in [0, 1]: a ``ValueError`` whatever it is, as of PyTorch's
    ``dropout``."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")


class _Checked:
    """See :func:`checked`."""

    def __init__(self, refuse: Callable[[str, Any], None]) -> None:
        self._refuse = refuse

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, instance: object, value: Any) -> None:
        self._refuse(self._name, value)
        instance.__dict__[self._name] = value


def checked(refuse: Callable[..., None] = number, **limits: Any) -> Any:
    """Make an attribute of a class that ``refuse(name, value, **limits)`` looks at whenever it is
    set.

    It lies in the instance's dictionary and is read from there, as any other: there is no
    ``__get__``, which would be a call of Python's in every step.
    """
    return _Checked(partial(refuse, **limits))


def whole(name: str, value: Any, low: int | None = 1) -> None:
    """Refuse what is no whole number of at least ``low``."""
    least = "" if low is None else f" of at least {low}"
    if value is True or value is False or not isinstance(value, Integral):
        raise _typed(name, value, f"a whole number{least}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def sizes(**given: Any) -> None:
    """Refuse what is no whole number of at least 1."""
    for name, value in given.items():
        whole(name, value)


def flags(**given: Any) -> None:
    """Refuse what is neither True nor False (nor 1 or 0)."""
    for name, value in given.items():
        if value not in (True, False):
            raise _typed(name, value, "True or False")


def module(name: str, value: Any) -> None:
    """Refuse what is no ``nn.Module``."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(value).__name__}")


def dtype(value: Any) -> None:
    """Refuse a dtype of parameters that is not floating point; None is the default one."""
    if value is None:
        return
    if not isinstance(value, torch.dtype):
        raise _typed("dtype", value, "None or a torch.dtype")
    if not value.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {value}")


def backend(name: str | None) -> None:
    """Refuse a name of no backend; None leaves the choice open."""
    if name is not None and name not in registry.names():
        raise ValueError(f"backend must be None or one of {registry.names()}, got {name!r}")


def options(normalization: str | None, activation: str, interface: str = "output") -> None:
    """Refuse an unknown normalisation, activation or interface."""
    if normalization not in NORMALIZATIONS:
        allowed = ", ".join(map(repr, NORMALIZATIONS))
        raise ValueError(f"normalization must be one of {allowed}; got {normalization!r}")
    if activation not in ACTIVATIONS:
        allowed = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be one of {allowed}; got {activation!r}")
    if interface not in INTERFACES:
        allowed = ", ".join(map(repr, INTERFACES))
        raise ValueError(f"interface must be one of {allowed}; got {interface!r}")


def no_tangents(**tensors: Tensor | None) -> None:
    """Refuse tensors with a tangent of forward-mode differentiation, which kernels would drop.

    To be called where ``forward_ad._current_level >= 0`` alone: it takes a while."""
    for name, t in tensors.items():
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            raise RuntimeError(
                f"{name} carries a tangent (torch.autograd.forward_ad, torch.func.jvp): "
                "fused_dni's layers have no forward-mode derivatives; differentiate backward, or "
                "put PyTorch's own layers back with fused_dni.revert(model)"
            )


def dense(name: str, t: Tensor) -> None:
    """Refuse a tensor of another layout than the ordinary one."""
    if t.is_nested:
        raise RuntimeError(
            f"{name} must be a dense tensor, got a nested one; call torch.nested.to_padded_tensor"
        )
    if t.layout is not torch.strided:
        raise RuntimeError(
            f"{name} must be a dense tensor (torch.strided), got {t.layout}; call to_dense()"
        )


def rows(input: Tensor, weight: Tensor, name: str) -> Tensor:
    """Return ``input`` [..., I] as contiguous rows [N, I].

    Under autocast the input is cast to its dtype, as ``F.linear`` would: not float64, nor integers.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(input).__name__}")
    dense(name, input)
    if forward_ad._current_level >= 0:
        no_tangents(**{name: input})
    if not weight.is_contiguous():
        raise RuntimeError(
            f"weight must be contiguous, got {list(weight.shape)} with strides {weight.stride()}"
        )
    handed(input.shape, input.dtype, input.device, weight, name)
    if input.dtype is not torch.float64 and _autocasts(weight):
        input = input.to(torch.get_autocast_dtype(weight.device.type))
    if input.dim() != 2:
        input = input.reshape(-1, weight.shape[1])
    return input.contiguous()


def _autocasts(weight: Tensor) -> bool:
    return not weight.is_meta and torch.is_autocast_enabled(weight.device.type)


def handed(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, weight: Tensor, name: str
) -> None:
    """Refuse an input of that shape, dtype and device where one is multiplied by ``weight``."""
    features = weight.shape[1]
    if not shape or shape[-1] != features:
        raise RuntimeError(
            f"{name} must have shape [..., {features}] (in_features), got {list(shape)}"
        )
    if device != weight.device:
        raise RuntimeError(f"{name} is on {device}, the weight on {weight.device}")
    # What autocast casts, of input and weight alike.
    cast = torch.float64 not in (dtype, weight.dtype) and dtype.is_floating_point
    if dtype != weight.dtype and not (cast and _autocasts(weight)):
        raise RuntimeError(
            f"{name} has dtype {dtype}, the weight {weight.dtype}; cast one of them or use "
            "torch.autocast"
        )


def batch(n: int, config: LinearConfig, training: bool) -> None:
    """Refuse a batch of n rows that has nothing to train on, or is a single one under batch
    statistics."""
    if n == 0 and training:
        raise RuntimeError("the batch is empty (0 rows): nothing can be trained on it")
    if n == 1 and training and config.normalization == "batch":
        raise ValueError(
            "expected more than 1 row when training with normalization='batch', got input with "
            f"{n} row"
        )


def labels(context: Tensor | None, classes: int, ignored: int | None = None) -> None:
    """Refuse a class index outside ``[0, classes)`` that is not the one ignored.

    Only on a CPU, where looking at the data costs no synchronisation.
    """
    if context is None or context.dtype != torch.int64 or context.device.type != "cpu":
        return
    if not classes or not direct(context) or not context.numel():
        return
    if ignored is not None:
        context = context[context != ignored]
        if not context.numel():
            return
    least, largest = torch.aminmax(context)
    low, high = int(least), int(largest)
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise IndexError(
            f"label {wrong} in context is out of range: the synthesizer has "
            f"context_features={classes}, so labels are in [0, {classes - 1}]"
        )


def target(
    given: Tensor | None,
    leading: torch.Size | None,
    device: torch.device,
    classes: int,
    ignore_index: int,
) -> Tensor:
    """Return ``target`` [...] as contiguous rows int64 [N]; it has the leading dimensions of an
    input on that device, where they are known.

    A class out of range is refused on a CPU alone, where looking at the data costs no
    synchronisation.
    """
    wanted = "[...]" if leading is None else list(leading)
    if given is None:
        raise ValueError(
            f"target is missing: a cross-entropy is taken of class indices, int64 {wanted}: "
            "head(input, target), or DecoupledSequential(..., head)(input, target=target); the "
            "logits alone are head.logits(input)"
        )
    if not isinstance(given, Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(given).__name__}")
    if given.dtype != torch.int64:
        raise RuntimeError(
            f"target must be class indices, torch.int64 {wanted}, got {given.dtype} "
            f"{list(given.shape)}; for class probabilities take F.cross_entropy of "
            "head.logits(input)"
        )
    if leading is not None and given.shape != leading:
        raise RuntimeError(
            f"target must have the leading dimensions of the input, {wanted}, got "
            f"{list(given.shape)}"
        )
    if given.device != device:
        raise RuntimeError(f"target is on {given.device}, the input on {device}")
    rows = given.reshape(-1).contiguous()
    if rows.device.type == "cpu" and direct(rows):
        wrong = ((rows != ignore_index) & ((rows < 0) | (rows >= classes))).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise IndexError(
                f"target {int(rows[row])} (row {row}) is out of bounds: there are {classes} "
                f"classes, and ignore_index is {ignore_index}"
            )
    return rows


def smoothing(value: float) -> None:
    """Refuse a share outside [0, 1]."""
    number("label_smoothing", value, high=1.0)


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


def synthesizer(tensors: SynthesizerTensors, weight: Tensor, features: int) -> None:
    """Refuse a synthesizer of another dtype or device than the layer's weight or another size than
    what it predicts for, and a table that kernels cannot read."""
    for name, t in zip(tensors._fields[1:5], tensors.parameters(), strict=True):
        if t is None:
            continue
        if t.dtype != weight.dtype or t.device != weight.device or not t.is_contiguous():
            raise RuntimeError(
                f"the synthesizer's {name} must be {weight.dtype} on {weight.device}, contiguous, "
                f"as the layer's, got {t.dtype} on {t.device}"
            )
    table = tensors.table
    if table is not None and (
        table.dim() != 2
        or table.shape[1] != features
        or table.dtype not in (weight.dtype, torch.bfloat16)
        or table.device != weight.device
        or not table.is_contiguous()
    ):
        raise RuntimeError(
            f"the synthesizer's table must be {weight.dtype} or torch.bfloat16 "
            f"[K, {features}] on {weight.device}, contiguous, got {table.dtype} "
            f"{list(table.shape)} on {table.device}"
        )
    fits.predicted_from(0, features, tensors, None)


def step(
    x: Tensor, weight: Tensor, given: Tensor, mismatch: type[Exception] = RuntimeError
) -> Tensor:
    """Input x [..., I] of an LSTM, contiguous; ``given`` is the input as it came, and ``mismatch``
    what another dtype raises.

    Under autocast the input is cast to the parameters' dtype.
    """
    if forward_ad._current_level >= 0:
        no_tangents(input=x)
    dense("input", given)
    if given.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"input must have {weight.shape[1]} features (input_size) in its last dimension, got "
            f"{list(given.shape)}"
        )
    if not all(given.shape):
        raise RuntimeError(f"input must not be empty, got {list(given.shape)}")
    if x.device != weight.device:
        raise RuntimeError(f"input is on {x.device}, the weights on {weight.device}")
    if x.dtype != weight.dtype:
        cast = torch.float64 not in (x.dtype, weight.dtype) and x.is_floating_point()
        if not cast or not torch.is_autocast_enabled(weight.device.type):
            raise mismatch(
                f"input has dtype {x.dtype}, the weights {weight.dtype}; cast one of them or use "
                "torch.autocast"
            )
        x = x.to(weight.dtype)
    return x.contiguous()


def lengths(given: Tensor | None, steps: int, batch: int, device: torch.device) -> Tensor | None:
    """Return the rows' own numbers of steps, int64 [B] on ``device``."""
    if given is None:
        return None
    if not isinstance(given, Tensor) or given.dtype not in (torch.int64, torch.int32):
        what = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"lengths must be an int64 tensor [B], got {what}")
    if given.shape != (batch,):
        raise RuntimeError(f"lengths must have shape [{batch}], got {list(given.shape)}")
    if direct(given):
        low, high = (int(v) for v in torch.aminmax(given))
        if low < 1 or high > steps:
            raise RuntimeError(
                f"lengths must be in [1, {steps}] (the steps of the window), got "
                f"{low if low < 1 else high}"
            )
    return given.to(device=device, dtype=torch.int64).contiguous()


def ended(
    given: Tensor | None, batch: int, device: torch.device, alone: bool = False
) -> Tensor | None:
    """Return ``end_of_sequence``, bool [B]; [] too if the input is unbatched (``alone``)."""
    if given is None:
        return None
    if not isinstance(given, Tensor) or given.dtype != torch.bool:
        what = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"end_of_sequence must be a bool tensor [B], got {what}")
    if given.dim() == 0 and alone:
        given = given.unsqueeze(0)
    if given.shape != (batch,):
        raise RuntimeError(f"end_of_sequence must have shape [{batch}], got {list(given.shape)}")
    if given.device != device:
        raise RuntimeError(f"end_of_sequence is on {given.device}, the input on {device}")
    return given


def pair(given: tuple[Tensor, Tensor], name: str) -> None:
    """Refuse what is no pair of tensors."""
    if (
        not isinstance(given, (tuple, list))
        or len(given) != 2
        or not all(isinstance(t, Tensor) for t in given)
    ):
        raise TypeError(f"{name} must be a tuple (h, c) of two tensors")


def state(hx: tuple[Tensor, Tensor], shape: tuple[int, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a state h, c of the given shape; x is the input it goes with."""
    if type(hx) is tuple and len(hx) == 2 and forward_ad._current_level < 0:
        h, c = hx
        if type(h) is type(c) is Tensor and h.shape == shape == c.shape:
            like = (x.dtype, x.device)
            if (h.dtype, h.device) == like == (c.dtype, c.device):
                return h, c
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise TypeError("hx must be a tuple (h, c) of two tensors")
    out = []
    for name, t in zip("hc", hx, strict=True):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} in hx must be a torch.Tensor, got {type(t).__name__}")
        if forward_ad._current_level >= 0:
            no_tangents(hx=t)
        if t.shape != shape:
            raise RuntimeError(
                f"{name} in hx must have shape {list(shape)} for this input, got {list(t.shape)}"
            )
        if t.device != x.device:
            raise RuntimeError(f"{name} in hx is on {t.device}, the input on {x.device}")
        if t.dtype != x.dtype:
            if not torch.is_autocast_enabled(x.device.type):
                raise RuntimeError(f"{name} in hx has dtype {t.dtype}, the input {x.dtype}")
            t = t.to(x.dtype)
        out.append(t)
    return out[0], out[1]


def unbatched(hx: tuple[Tensor, Tensor], shape: tuple[int, ...], dim: int) -> tuple[Tensor, Tensor]:
    """Return the state of an unbatched input, of the given shape, with a batch dimension at
    ``dim``."""
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise TypeError("hx must be a tuple (h, c) of two tensors")
    for name, t in zip("hc", hx, strict=True):
        if not isinstance(t, Tensor) or t.shape != shape:
            raise RuntimeError(
                f"{name} in hx must have shape {list(shape)} for an unbatched input, got "
                f"{list(t.shape) if isinstance(t, Tensor) else type(t).__name__}"
            )
    return hx[0].unsqueeze(dim), hx[1].unsqueeze(dim)


def lstm_layers(layers: tuple[LSTMLayer, ...], inputs: int, hidden: int) -> None:
    """Refuse parameters of another shape, dtype or device than they should have, and gaps."""
    first = layers[0].weight_ih
    biased = layers[0].bias_ih is not None
    for i, tensors in enumerate(layers):
        for name, t in zip(tensors._fields, tensors, strict=True):
            if (t is None) is (biased or name.startswith("weight")):
                raise RuntimeError(
                    f"{name} of layer {i} is {'None' if t is None else 'there'}: a layer has both "
                    "weights, and all layers have both biases or none has any"
                )
        wide = inputs if i == 0 else hidden
        shapes = ((4 * hidden, wide), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
        for name, shape, t in zip(tensors._fields, shapes, tensors, strict=True):
            if t is None:
                continue
            if (
                t.shape != shape
                or t.dtype != first.dtype
                or t.device != first.device
                or not t.is_contiguous()
            ):
                raise RuntimeError(
                    f"{name} of layer {i} must be {first.dtype} {list(shape)} on {first.device}, "
                    f"contiguous, got {t.dtype} {list(t.shape)} on {t.device}"
                )
