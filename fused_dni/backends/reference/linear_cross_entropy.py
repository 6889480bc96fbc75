"""The cross-entropy of a linear layer's outputs, and its gradient there.

With x [N, I], W [C, I], b [C], classes y [N], smoothing s (Szegedy et al. 2015, arXiv 1512.00567)
and the M rows whose y is not the one ignored::

    z = x W^T + b                                              [N, C]
    p = exp(z) / sum_C exp(z)                                  [N, C]
    t = (1 - s) onehot(y) + s / C                              [N, C]
    loss = - sum_NC t log p / M        over the rows in it
    delta = (p - t) / M                in these, 0 in the others

What is behind it is a linear layer's: dW = delta^T x, db = sum_N delta, dx = delta W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_dni.backends.common.precision import accumulator, product
from fused_dni.ops.types import CrossEntropy


@torch.no_grad()
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    need_delta: bool,
) -> CrossEntropy:
    """Return the loss [] in the weight's dtype; delta [N, C], in the accumulator's, on demand.

    Mutates nothing.

    Raises:
        IndexError: on a CPU, a target that is no class and not ``ignore_index``.
    """
    dtype, classes = accumulator(weight), weight.shape[0]
    counted = target != ignore_index  # [N]
    wrong = counted & ((target < 0) | (target >= classes))
    if target.device.type == "cpu" and bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise IndexError(f"target {int(target[row])} (row {row}) is outside [0, {classes})")
    z = product(x, weight.t(), x.dtype, dtype)  # [N, I] @ [I, C] -> [N, C]
    if bias is not None:
        z = z + bias.to(dtype)
    z = z.masked_fill(wrong[:, None], float("nan"))  # where nobody waits for a look at the data
    known = target.masked_fill(~counted | wrong, 0)[:, None]  # [N, 1]
    logs = z.log_softmax(1)  # [N, C]
    share = label_smoothing / classes
    losses = (label_smoothing - 1.0) * logs.gather(1, known)[:, 0]  # [N]
    if share:
        losses = losses - share * logs.sum(1)
    rows = counted.sum()
    loss = torch.where(counted, losses, 0.0).sum() / rows
    if not need_delta:
        return CrossEntropy(loss.to(weight.dtype))
    aimed = known == torch.arange(classes, device=known.device)  # [N, C]
    delta = logs.exp() - share + (label_smoothing - 1.0) * aimed.to(dtype)
    delta = torch.where(counted[:, None], delta / rows, 0.0)
    return CrossEntropy(loss.to(weight.dtype), delta)
