"""Between an op's flat schema and the tuples of :mod:`fused_dni.ops.types`.

What ``torch.library`` registers takes and returns tensors, numbers, strings and lists of them. An
absent tensor result is an empty one there.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_dni.ops.types import RuleTensors


def none_if_empty(t: Tensor | None) -> Tensor | None:
    return None if t is None or t.numel() == 0 else t


def empty_if_none(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t


def moments(rule: RuleTensors) -> tuple[list[Tensor], list[Tensor]]:
    """The moments that exist, in the order of the slots."""
    return [t for t in rule.first if t is not None], [t for t in rule.second if t is not None]


def rule_of(
    kind: str,
    nesterov: bool,
    stochastic: bool,
    hyper: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    trainable: Sequence[bool],
) -> RuleTensors:
    """Undo :func:`moments`: moments exist for the trainable slots, or for none."""

    def spread(made: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        left = iter(made)
        return tuple(next(left) if t and made else None for t in trainable)

    return RuleTensors(
        kind, nesterov, hyper, spread(first), spread(second), tuple(trainable), stochastic
    )
