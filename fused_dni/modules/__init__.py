"""The drop-in layers."""

from fused_dni.modules.decoupled import Decoupled
from fused_dni.modules.linear import FusedDNILinear
from fused_dni.modules.sequential import DecoupledSequential

__all__ = ["Decoupled", "DecoupledSequential", "FusedDNILinear"]
