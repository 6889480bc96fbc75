"""Where the types of the ops stood before :mod:`fused_dni.ops.types`: what was pickled then looks
them up here."""

from __future__ import annotations

from typing import Any

from fused_dni.ops import types


def __getattr__(name: str) -> Any:
    return getattr(types, name)
