"""The synthesizer's formulas in PyTorch's own operations, on any device.

Jaderberg et al. 2016 (arXiv 1608.05343), section 2. With h [N, O] and a context (class indices [N]
or vectors [N, K])::

    dense      M(h) = h A^T + C[context] + c               A [O, O], C [O, K], c [O]
    low rank   M(h) = (h U^T) V^T + C[context] + c         U [R, O], V [O, R]
    diagonal   M(h) = a * h + C[context] + c               a [O]

and with the table W of a softmax's head and the learned g, N* of the N rows being in the loss::

    M(h) = N / N* (h A^T - g W[label] + c) in those, 0 in the others        W [K, O], g []

and of the form of a cross-entropy's gradient, with the probabilities or one-hot labels y [N, K]::

    M(h) = p V^T + c,  p = softmax(h U^T + u) - y          U [K, O], u [K], V [O, K]
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_dni.backends.common.precision import accumulator, product, sum_rows
from fused_dni.ops.types import Prediction, SynthesizerTensors


def is_label(context: Tensor) -> bool:
    """Say whether a context is class indices (any integer dtype) and not conditioning vectors."""
    return not context.is_floating_point()


def check_form(synthesizer: SynthesizerTensors, context: Tensor | None) -> None:
    """Refuse a context of another kind than the synthesizer takes.

    Raises:
        ValueError: context given to an unconditional synthesizer, or missing from a conditional.
        RuntimeError: vectors where there is a table, or one on another device.
    """
    if (context is None) != (synthesizer.context_weight is None):
        raise ValueError(
            "this synthesizer takes a context, got none"
            if context is None
            else "this synthesizer takes no context, got one"
        )
    table = synthesizer.table
    if table is None or context is None:
        return
    if not is_label(context):
        raise RuntimeError(
            f"context must be labels, int64 [N], got {context.dtype} {list(context.shape)}"
        )
    if table.device != context.device:
        raise RuntimeError(f"the table is on {table.device}, the labels on {context.device}")


def check_context(synthesizer: SynthesizerTensors, context: Tensor | None) -> None:
    """Refuse a context that does not go with the synthesizer (synchronises with the device).

    Raises:
        ValueError, RuntimeError: as :func:`check_form`.
        IndexError: a class index outside ``[0, K)`` that is not the one ignored.
    """
    check_form(synthesizer, context)
    if context is None or not is_label(context):
        return
    if synthesizer.table is not None:
        context = context[context != synthesizer.ignore_index]
        if not context.numel():
            return
    classes = synthesizer.classes
    low, high = (int(v) for v in torch.aminmax(context))
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise IndexError(
            f"label {wrong} is out of range: the synthesizer has context_features={classes}, so "
            f"labels are in [0, {classes - 1}]"
        )


def context_term(h: Tensor, synthesizer: SynthesizerTensors, context: Tensor) -> Tensor:
    """Return ``C[:, label]`` or ``context C^T`` or ``-g W[label]``, [N, O]."""
    weight = synthesizer.context_weight
    assert weight is not None
    dtype = accumulator(weight)
    if synthesizer.table is not None:
        return -weight.to(dtype) * label_rows(synthesizer, context).to(dtype)
    if is_label(context):
        return weight.t()[context.long()].to(dtype)  # [K, O] -> [N, O]
    return product(context, weight.t(), h.dtype, dtype)  # [N, K] @ [K, O] -> [N, O]


def label_rows(synthesizer: SynthesizerTensors, context: Tensor) -> Tensor:
    """Return ``W[label]`` [N, O], in the table's dtype; any row where the label is ignored."""
    assert synthesizer.table is not None
    known = context.ne(synthesizer.ignore_index)
    return synthesizer.table[torch.where(known, context, 0).long()]  # [K, O] -> [N, O]


def in_the_mean(rows: Tensor, synthesizer: SynthesizerTensors, context: Tensor | None) -> Tensor:
    """With a table, ``rows`` [N, O] times N over the number of those in the loss, zero in the
    others: what the division of M(h) by their share does to it, and to a gradient at it."""
    if synthesizer.table is None or context is None:
        return rows
    counted = context.ne(synthesizer.ignore_index).unsqueeze(1)  # [N, 1]
    share = counted.sum().clamp(min=1).to(rows.dtype) / rows.shape[0]
    return torch.where(counted, rows / share, 0.0)


def context_gradient(e: Tensor, h: Tensor, context: Tensor, classes: int) -> Tensor:
    """Return ``dC = e^T onehot(label)`` or ``e^T context``, [O, K]."""
    if is_label(context):
        by_class = e.new_zeros(classes, e.shape[1])  # [K, O]
        return by_class.index_add_(0, context.long(), e).t().contiguous()  # [O, K]
    return product(e.t(), context, h.dtype, e.dtype)  # [O, N] @ [N, K] -> [O, K]


def softmax(logits: Tensor) -> Tensor:
    """Return the probabilities [N, K] of logits."""
    return logits.softmax(1)


def less_known(probabilities: Tensor, context: Tensor) -> Tensor:
    """Return ``p = softmax - y`` [N, K]."""
    return probabilities - known(context, probabilities)


def known(context: Tensor, like: Tensor) -> Tensor:
    """Return y [N, K], in the dtype and of the size of ``like``: one-hot of class indices, or as it
    is given."""
    if not is_label(context):
        return context.to(like.dtype)
    return torch.zeros_like(like).scatter_(1, context.long().unsqueeze(1), 1.0)


def through_softmax(p: Tensor, q: Tensor, context: Tensor) -> Tensor:
    """Take a gradient q at p [N, K] back to the logits: ``s * (q - sum_k s q)``, ``s = p + y``."""
    s = p + known(context, p)
    return s * (q - (s * q).sum(1, keepdim=True))


@torch.no_grad()
def synthesizer_predict(
    h: Tensor, synthesizer: SynthesizerTensors, context: Tensor | None
) -> Prediction:
    """Return ``M(h)`` [N, O] and, for a low-rank M, ``h U^T`` [N, R], for one of a cross-entropy p
    [N, K], in the accumulator's dtype.

    Raises:
        ValueError: unknown kind, or a context that does not go with the synthesizer.
        RuntimeError: vectors where there is a table.
        IndexError: a class index outside ``[0, K)`` that is not the one ignored.
    """
    check_context(synthesizer, context)
    kind, weight, down, shift, bias, *_ = synthesizer
    dtype = accumulator(weight)
    reduced = None
    if kind == "cross_entropy":
        assert down is not None and shift is not None and context is not None
        logits = product(h, down.t(), h.dtype, dtype)  # [N, O] @ [O, K] -> [N, K]
        reduced = less_known(softmax(logits + shift.to(dtype)), context)
        scaled = product(reduced, weight.t(), h.dtype, dtype)  # [N, K] @ [K, O] -> [N, O]
        context = None
    elif kind == "dense":
        scaled = product(h, weight.t(), h.dtype, dtype)  # [N, O] @ [O, O] -> [N, O]
    elif kind == "lowrank":
        assert down is not None
        reduced = product(h, down.t(), h.dtype, dtype)  # [N, O] @ [O, R] -> [N, R]
        scaled = product(reduced, weight.t(), h.dtype, dtype)  # [N, R] @ [R, O] -> [N, O]
    elif kind == "diagonal":
        scaled = h.to(dtype) * weight.to(dtype)  # [N, O] * [O] -> [N, O]
    else:
        raise ValueError(f"unknown synthesizer {kind!r}")
    if context is not None:
        scaled = scaled + context_term(h, synthesizer, context)
    if bias is not None:
        scaled = scaled + bias.to(dtype)
    return Prediction(in_the_mean(scaled, synthesizer, context), reduced)


def synthetic_gradient(prediction: Prediction, target_scale: float, max_norm: float) -> Tensor:
    """Return ``M(h) / kappa`` [N, O], scaled down to a Frobenius norm of ``max_norm`` if that is
    positive and exceeded. The norm is summed in float64, so that finite elements have a finite
    norm."""
    synthetic = prediction.scaled / target_scale
    if max_norm > 0:
        norm = torch.linalg.vector_norm(synthetic, dtype=torch.float64)
        synthetic = synthetic * (max_norm / norm).clamp(max=1.0).to(synthetic.dtype)
    return synthetic


def gradients_of_error(
    e: Tensor,
    h: Tensor,
    prediction: Prediction,
    synthesizer: SynthesizerTensors,
    context: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients, slot by slot, of what has the gradient ``e`` [N, O] at ``M(h)``, in e's dtype."""
    kind, weight, down, context_weight, bias, table, _ = synthesizer
    dtype = e.dtype
    e = in_the_mean(e, synthesizer, context)
    d_down = None
    if kind == "cross_entropy":
        assert prediction.reduced is not None and context is not None
        p = prediction.reduced.to(dtype)
        d_weight = product(e.t(), p, h.dtype, dtype)  # [O, N] @ [N, K] -> [O, K]
        d = through_softmax(p, product(e, weight, h.dtype, dtype), context)  # [N, K]
        d_down = product(d.t(), h, h.dtype, dtype)  # [K, N] @ [N, O] -> [K, O]
        d_bias = sum_rows(e) if bias is not None else None
        return (d_weight, d_down, sum_rows(d), d_bias)
    if kind == "dense":
        d_weight = product(e.t(), h, h.dtype, dtype)  # [O, N] @ [N, O] -> [O, O]
    elif kind == "lowrank":
        assert down is not None and prediction.reduced is not None
        d_weight = product(e.t(), prediction.reduced, h.dtype, dtype)  # [O, N] @ [N, R] -> [O, R]
        back = product(e, weight, h.dtype, dtype)  # [N, O] @ [O, R] -> [N, R]
        d_down = product(back.t(), h, h.dtype, dtype)  # [R, N] @ [N, O] -> [R, O]
    elif kind == "diagonal":
        d_weight = sum_rows(e * h.to(dtype))  # [N, O] -> [O]
    else:
        raise ValueError(f"unknown synthesizer {kind!r}")
    d_context = None
    if context is not None and table is not None:
        terms = (e * label_rows(synthesizer, context).to(dtype)).reshape(-1, 1)  # [N * O, 1]
        d_context = -sum_rows(terms)[0]  # []
    elif context is not None and context_weight is not None:
        d_context = context_gradient(e, h, context, context_weight.shape[1])  # [O, K]
    d_bias = sum_rows(e) if bias is not None else None  # [N, O] -> [O]
    return (d_weight, d_down, d_context, d_bias)
