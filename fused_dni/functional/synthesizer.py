"""Synthesizer prediction and training as functions, on the fused kernels."""

from __future__ import annotations

from torch import Tensor

from fused_dni import ops
from fused_dni.functional import check
from fused_dni.ops import fits, registry
from fused_dni.ops.types import STATISTICS_SIZE, Prediction, RuleTensors, SynthesizerTensors


def synthesizer_predict(
    h: Tensor,
    synthesizer: SynthesizerTensors,
    context: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Prediction:
    """Return ``M(h)`` [N, O] and, for low rank, ``h @ down.T`` [N, R]; nothing is mutated.

    Args:
        h: [N, O].
        synthesizer: its tensors.
        context: int64 [N] or floating point [N, K], if there is a context weight; int64 [N] if
            there is a table.
        backend: force one by name.

    Raises:
        IndexError: a class index outside ``[0, K)`` that is not the one ignored.
        RuntimeError: a shape, dtype or device that does not fit, or a backend that cannot serve.
    """
    check.synthesizer(synthesizer, synthesizer.weight, synthesizer.weight.shape[0])
    found = registry.resolve(backend, h, synthesizer.weight)
    return ops.synthesizer_predict(found, h, synthesizer, context)


def synthesizer_update_(
    h: Tensor,
    prediction: Prediction,
    grad_h: Tensor,
    synthesizer: SynthesizerTensors,
    rule: RuleTensors,
    *,
    context: Tensor | None = None,
    target_scale: float | None = None,
    statistics: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Take a step of regression of ``M(h)`` on ``target_scale * grad_h``, in one launch.

    Args:
        h: [N, O], and ``prediction`` made from it.
        grad_h: [N, O], what arrived.
        synthesizer, rule: mutated.
        context: as in :func:`synthesizer_predict`.
        target_scale: kappa; None for N.
        statistics: float64 [5] sums to add to, see ``fused_dni.ops.types``; mutated.
        backend: force one by name.

    A target that is not finite changes nothing but the rule's skip counter.

    Raises:
        IndexError, RuntimeError: as :func:`synthesizer_predict`; nothing is changed.
    """
    check.synthesizer(synthesizer, synthesizer.weight, synthesizer.weight.shape[0])
    found = registry.resolve(backend, h, synthesizer.weight)
    fits.update_rule(rule, synthesizer.parameters())
    if statistics is None:
        statistics = rule.hyper.new_zeros(STATISTICS_SIZE)
    scale = float(h.shape[0]) if target_scale is None else target_scale
    ops.synthesizer_update_(
        found, h, prediction, grad_h, synthesizer, context, scale, statistics, rule
    )
