"""Where the types of the ops stood before :mod:`fused_dni.ops.types`: whole modules pickled then
look ``LinearConfig`` up here."""

from fused_dni.ops.types import ACTIVATIONS, LinearConfig

__all__ = ["ACTIVATIONS", "LinearConfig"]
