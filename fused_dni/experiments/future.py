"""What truncation leaves out: the true gradient of the future at the boundaries of windows.

"The gradient of the future is negligible anyway, or we would not truncate" is a statement about a
ratio, and here it is measured: by full backprop through a span far longer than the window, in a
plain ``nn.LSTM`` that holds the weights of the net in question.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fused_dni.backends.common.windows import rows_state, state_rows

State = tuple[Tensor, Tensor]

#: Windows at which a report measures.
WINDOWS = (1, 2, 4, 8, 16, 32)
#: Of a text: steps that bring the state up, steps that boundaries lie in, steps behind them.
CARRIED, REGION, HORIZON = 64, 64, 128
#: Of a linear fit: what is added to the diagonal, of its mean; batches that it is given.
RIDGE, FITTED = 1e-2, 128


class Net(Protocol):
    """Encoding, ``nn.LSTM`` and head; :class:`fused_dni.experiments.windowed.SequenceNet`."""

    encode: nn.Module
    lstm: nn.Module
    head: nn.Linear


def future_gradient(
    net: Net,
    inputs: Tensor,
    losses: Callable[[Tensor, int], Tensor],
    window: int,
    *,
    state: State | None = None,
    horizon: int = 0,
    synthesizer: nn.Module | None = None,
    target_scale: float = 1.0,
    context: Callable[[int], Tensor | None] = lambda _: None,
) -> dict[str, Any]:
    """Compute gradients at the boundaries of consecutive windows of T steps, from full backprop.

    Let s = (h, c), all layers, be the state at a boundary; L_own the losses of the T steps of the
    window that ends there, L_future those of all later steps of ``inputs``; all summed over steps
    and rows. Each window is entered with its state held constant, as under truncation. Then

    - ``state_ratio`` divides |dL_future/ds| by |dL_own/ds|, Frobenius norms over rows and units.
      L_own depends on s only through the last step's output, so dL_own/dc is zero and T matters
      only through where boundaries lie.
    - ``parameter_ratio`` divides |(dL_future/ds)(ds/dw)| by |dL_own/dw|, norms over all parameters
      w of the LSTM, ds/dw inside the window: what truncation drops of the window's update over what
      it keeps.
    - ``parameter_cosine`` is the cosine between what it keeps, dL_own/dw, and the whole,
      dL_own/dw + (dL_future/ds)(ds/dw).
    - with a synthesizer M: ``prediction_cosine`` and ``prediction_norm_ratio`` = |M/k| / |g|
      compare its prediction M(s) / k (before ``sg_scale``) with g = dL_future/ds.
      ``prediction_row_cosine`` is the mean of the cosines of rows, each counting as one, over all
      rows and boundaries where neither is zero.

    Every other norm and inner product is taken over all boundaries together (the root of the sum of
    squares), so that windows without a loss of their own count with a zero.

    Args:
        net: on ``nn.LSTM``.
        inputs: [S, B, ...], S steps.
        losses: called with a window's outputs [T, B, O] and its first step; their summed loss.
        window: T.
        state: at the first step; None for zeros.
        horizon: boundaries with fewer steps behind them are left out, their future being cut off.
        synthesizer: M, called with [h_0, c_0, h_1, c_1, ...], [B, 2 L H].
        target_scale: k: M predicts k times the gradient of the summed loss.
        context: gives M's context at the end of a window, counted from 0.

    Returns:
        ``window``, ``boundaries``, ``horizon``, the norms ``state_future``, ``state_own``,
        ``parameter_future``, ``parameter_own`` and the quotients above (NaN for 0 / 0, infinite
        for x / 0).

    Raises:
        ValueError: no boundary has ``horizon`` steps behind it.
    """
    length = len(inputs)
    starts = [t for t in range(0, length, window) if length - t - window >= max(horizon, 1)]
    if not starts:
        raise ValueError(
            f"no boundary of windows of {window} in {length} steps has {max(horizon, 1)} behind it"
        )
    parameters = [p for p in net.lstm.parameters() if p.requires_grad]
    cuts = [*range(0, length, window), length]
    entrances, boundaries, truth = full_backprop(net, inputs, losses, cuts, state, len(starts))
    sums = dict.fromkeys(("ss", "so", "ps", "po", "pp", "mm", "mg"), 0.0)
    by_row: list[Tensor] = []
    for k, start in enumerate(starts):
        g = truth[k]
        with torch.enable_grad():
            output, exit = net.lstm(net.encode(inputs[start : start + window]), entrances[k])
            loss = losses(net.head(output), start)
            own_h = _gradients(loss, [output], retain=True)[0][-1]
            own = _gradients(loss, parameters, retain=True)
            later = torch.autograd.grad(exit, parameters, g)
        sums["ss"] += _dot(g, g)
        sums["so"] += _dot([own_h], [own_h])
        sums["ps"] += _dot(later, later)
        sums["po"] += _dot(own, own)
        sums["pp"] += _dot(own, later)
        if synthesizer is not None:
            predicted = _predict(synthesizer, boundaries[k], context(start // window), target_scale)
            pairs = (state_rows(*predicted).double(), state_rows(*g).double())
            some = pairs[0].any(1) & pairs[1].any(1)
            by_row.append(cosine_similarity(pairs[0][some], pairs[1][some], eps=0.0))
            sums["mm"] += _dot(predicted, predicted)
            sums["mg"] += _dot(predicted, g)
    whole = sums["po"] + 2.0 * sums["pp"] + sums["ps"]
    found: dict[str, Any] = {
        "window": window,
        "boundaries": len(starts),
        "horizon": length - starts[-1] - window,
        "state_future": math.sqrt(sums["ss"]),
        "state_own": math.sqrt(sums["so"]),
        "state_ratio": _quotient(sums["ss"], sums["so"]),
        "parameter_future": math.sqrt(sums["ps"]),
        "parameter_own": math.sqrt(sums["po"]),
        "parameter_ratio": _quotient(sums["ps"], sums["po"]),
        "parameter_cosine": _cosine(sums["po"] + sums["pp"], sums["po"], whole),
    }
    if synthesizer is not None:
        found["prediction_cosine"] = _cosine(sums["mg"], sums["mm"], sums["ss"])
        rows = torch.cat(by_row)
        found["prediction_row_cosine"] = float(rows.mean()) if len(rows) else math.nan
        found["prediction_norm_ratio"] = _quotient(sums["mm"], sums["ss"])
    return found


def full_backprop(
    net: Net,
    inputs: Tensor,
    losses: Callable[[Tensor, int], Tensor],
    cuts: Sequence[int],
    state: State | None = None,
    boundaries: int | None = None,
) -> tuple[list[State | None], list[State], list[State]]:
    """Run all of ``inputs`` undetached, and return what there is at the boundaries of its windows.

    Args:
        net, inputs, losses, state: as of :func:`future_gradient`.
        cuts: where windows begin, from 0 on, and the end.
        boundaries: of so many windows, the first; None for all but the last.

    Returns:
        For each of these windows the state that it starts from and that it ends in (both detached),
        and the gradient that the future sends to the latter.
    """
    entrances: list[State | None] = []
    passed: list[State] = []
    count = len(cuts) - 2 if boundaries is None else boundaries
    total = torch.zeros(())
    with torch.enable_grad():
        current = state
        for start, stop in itertools.pairwise(cuts):
            if len(passed) < count:
                detached = None if current is None else (current[0].detach(), current[1].detach())
                entrances.append(detached)
            output, (h, c) = net.lstm(net.encode(inputs[start:stop]), current)
            total = total + losses(net.head(output), start)
            # Copies: only what comes later goes through them.
            current = (h.clone(), c.clone())
            if len(passed) < count:
                passed.append(current)
        if not passed:
            return [], [], []
        flat = torch.autograd.grad(total, [t for pair in passed for t in pair])
    truth = [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]
    return entrances, [(h.detach(), c.detach()) for h, c in passed], truth


def fitted_row_cosine(rows: Tensor, gradients: Tensor) -> float:
    """Fit the linear function of states, with a constant, to gradients by least squares on the
    first half; return the mean cosine of rows on the second, rows without a gradient left out.

    What ``prediction_row_cosine`` of a dense linear synthesizer could be, had it learned from true
    gradients of a net that holds still.

    Args:
        rows: states [N, F]. gradients: [N, F].
    """
    given = nn.functional.pad(rows.double(), (0, 1), value=1.0)
    wanted, half = gradients.double(), len(rows) // 2
    products = given[:half].t() @ given[:half]
    products.diagonal().add_(RIDGE * products.diagonal().mean())
    weight = torch.linalg.solve(products, given[:half].t() @ wanted[:half])
    held = wanted[half:].any(1)
    return float(cosine_similarity((given[half:] @ weight)[held], wanted[half:][held]).mean())


def _gradients(loss: Tensor, of: Sequence[Tensor], *, retain: bool) -> list[Tensor]:
    """Compute gradients, zero where the loss does not depend on something at all."""
    if not loss.requires_grad:
        return [torch.zeros_like(t) for t in of]
    made = torch.autograd.grad(loss, of, retain_graph=retain, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(of, made, strict=True)]


def _predict(
    synthesizer: nn.Module, state: State, context: Tensor | None, target_scale: float
) -> State:
    training = synthesizer.training
    synthesizer.eval()
    with torch.no_grad():
        scaled = synthesizer(state_rows(*state), context) / target_scale
    synthesizer.train(training)
    return rows_state(scaled, len(state[0]))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _quotient(a: float, b: float) -> float:
    """Divide norms, given their squares."""
    if b == 0.0:
        return math.nan if a == 0.0 else math.inf
    return math.sqrt(a / b)


def _cosine(ab: float, aa: float, bb: float) -> float:
    return ab / math.sqrt(aa * bb) if aa > 0.0 and bb > 0.0 else math.nan
