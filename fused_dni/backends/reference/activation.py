"""Activation functions and their derivatives, as explicit formulas.

Write y for the input and h = phi(y) for the output, sigma for the logistic function, Phi and p for
the normal distribution function and density. The derivatives of the functions in
:data:`fused_dni.ops.types.FROM_OUTPUT` are functions of h, so that a layer without
normalisation need not keep y. Everything here is pointwise, keeps shape and dtype, and mutates
nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_INV_SQRT2 = 1.0 / math.sqrt(2.0)
_INV_SQRT2PI = 1.0 / math.sqrt(2.0 * math.pi)
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_GELU_CUBIC = 0.044715


def _log1p_exp(y: Tensor) -> Tensor:
    """Return ``log(1 + exp(y))`` without overflow and, unlike ``torch.nn.Softplus``, without a
    threshold beyond which it is replaced by y (the two differ by less than 2.1e-9)."""
    return y.clamp(min=0) + torch.log1p(torch.exp(-y.abs()))


def activate(y: Tensor, name: str) -> Tensor:
    """Return ``phi(y)``.

    Raises:
        ValueError: ``name`` is not one of :data:`fused_dni.ops.types.ACTIVATIONS`.
    """
    if name == "identity":
        return y
    if name == "relu":
        return torch.relu(y)  # NaN stays NaN
    if name == "gelu":  # y Phi(y)
        return y * 0.5 * (1 + torch.erf(y * _INV_SQRT2))
    if name == "gelu_tanh":  # Phi(y) ~ (1 + tanh(sqrt(2/pi) (y + 0.044715 y^3))) / 2
        return y * 0.5 * (1 + torch.tanh(_SQRT_2_OVER_PI * (y + _GELU_CUBIC * y * y * y)))
    if name == "silu":  # y sigma(y)
        return y * torch.sigmoid(y)
    if name == "tanh":
        return torch.tanh(y)
    if name == "sigmoid":
        return torch.sigmoid(y)
    if name == "softplus":
        return _log1p_exp(y)
    if name == "mish":  # y tanh(softplus(y))
        return y * torch.tanh(_log1p_exp(y))
    raise ValueError(f"unknown activation {name!r}")


def derivative_from_output(h: Tensor, name: str) -> Tensor:
    """Return ``phi'`` as a function of h, for the names in ``FROM_OUTPUT``."""
    if name == "identity":
        return torch.ones_like(h)
    if name == "relu":
        return (h > 0).to(h.dtype)
    if name == "tanh":
        return 1 - h * h
    if name == "sigmoid":
        return h * (1 - h)
    raise ValueError(f"the derivative of {name!r} cannot be taken from its output alone")


def derivative_from_input(y: Tensor, name: str) -> Tensor:
    """Return ``phi'(y)``, for the names that are not in ``FROM_OUTPUT``."""
    if name == "gelu":  # Phi(y) + y p(y)
        density = _INV_SQRT2PI * torch.exp(-0.5 * y * y)
        return 0.5 * (1 + torch.erf(y * _INV_SQRT2)) + y * density
    if name == "gelu_tanh":  # t = tanh(u(y)): (1 + t)/2 + y (1 - t^2) u'(y) / 2
        t = torch.tanh(_SQRT_2_OVER_PI * (y + _GELU_CUBIC * y * y * y))
        slope = _SQRT_2_OVER_PI * (1 + 3 * _GELU_CUBIC * y * y)
        return 0.5 * (1 + t) + 0.5 * y * (1 - t * t) * slope
    if name == "silu":  # sigma (1 + y (1 - sigma))
        s = torch.sigmoid(y)
        return s * (1 + y * (1 - s))
    if name == "softplus":  # sigma
        return torch.sigmoid(y)
    if name == "mish":  # t + y (1 - t^2) sigma, t = tanh(softplus(y))
        t = torch.tanh(_log1p_exp(y))
        return t + y * (1 - t * t) * torch.sigmoid(y)
    raise ValueError(f"no derivative of {name!r} from its input here")
