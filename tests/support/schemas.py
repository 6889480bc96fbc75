"""The arguments of a registered op, as ``opcheck`` wants them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fused_dni.ops.types import RuleTensors


def flat(value: Any) -> list[Any]:
    """An argument of a backend's method as those of the schema: a tuple with names and a
    configuration are one a field, any other tuple is a list; of tensors that may be absent, those
    that exist and which do."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, RuleTensors):  # its moments may be absent
        made = [[value.kind], [value.nesterov], [value.hyper], partly(value.first)]
        made += [partly(value.second), [list(value.trainable)], [value.stochastic]]
        return [part for parts in made for part in parts]
    if hasattr(value, "_fields"):
        return [part for item in value for part in flat(item)]
    if isinstance(value, tuple) and value and hasattr(value[0], "_fields"):
        return partly([t for item in value for t in item])
    return [list(value)] if isinstance(value, tuple) else [value]


def partly(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Those that exist, and which do."""
    return [[t for t in tensors if t is not None], [int(t is not None) for t in tensors]]
