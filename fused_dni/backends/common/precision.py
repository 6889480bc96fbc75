"""Which dtype a product runs in and which dtype everything else runs in.

Two dtypes meet in a layer: that of the activations (x, h) and that of the parameters. Where they
differ, the activations are bfloat16 or float16 and the parameters their float32 masters. Matrix
products then take operands rounded to the activations' dtype (the library accumulates them in
float32 and rounds the result once); sums, normalisation, activation functions and updates run in
the dtype given by :func:`accumulator`; h and dx are handed out in the activations' dtype. The
synthesizer reads h as it is handed out, that is rounded.

A gradient is of size 1/N and float16 has no room below 6e-5, so float16 operands are first scaled
by a power of two to a largest magnitude in [1/2, 1); the result is scaled back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_dni.ops.types import LOW_PRECISION as LOW_PRECISION
from fused_dni.ops.types import accumulator as accumulator


def product(a: Tensor, b: Tensor, operands: torch.dtype, result: torch.dtype) -> Tensor:
    """Return ``a @ b`` [n, m] with operands rounded to ``operands``, returned as ``result``."""
    if operands != torch.float16:
        return (a.to(operands) @ b.to(operands)).to(result)
    a, a_exponent = _scaled(a)
    b, b_exponent = _scaled(b)
    c = (a.to(operands) @ b.to(operands)).to(torch.float32)
    return torch.ldexp(torch.ldexp(c, a_exponent), b_exponent).to(result)


def sum_rows(a: Tensor) -> Tensor:
    """Return the sum over rows, [n, m] -> [m]."""
    return a.sum(0)


def _scaled(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``a`` divided by the least power of two above its largest magnitude, and the
    exponent."""
    a = a.to(torch.float32)
    exponent = torch.frexp(a.abs().amax()).exponent.clamp(-100, 100)  # 2^100 is a float32
    return torch.ldexp(a, -exponent), exponent


def require_masters(parameters: Sequence[Tensor | None], stochastic: bool) -> None:
    """Refuse to update parameters that would lose the update to rounding.

    Raises:
        TypeError: a parameter is bfloat16 or float16; a plain cast of the updated value would
            drop most updates, so float32 masters are needed, or (bfloat16) stochastic rounding.
    """
    for p in parameters:
        if p is None or p.dtype not in LOW_PRECISION:
            continue
        if not stochastic or p.dtype != torch.bfloat16:
            raise TypeError(
                f"a fused update needs float32 or float64 parameters, got {p.dtype}: keep float32 "
                "masters and give the layer low-precision inputs instead, or use bfloat16 and a "
                "rule with stochastic_rounding=True"
            )
