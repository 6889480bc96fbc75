"""The drop-in layers."""

from fused_dni.modules.decoupled import Decoupled
from fused_dni.modules.late import LocalOutput, Ticket, learn_late, step_local
from fused_dni.modules.linear import FusedDNILinear
from fused_dni.modules.linear_cross_entropy import FusedDNILinearCrossEntropyLoss
from fused_dni.modules.local import backward_local
from fused_dni.modules.lstm import FusedDNILSTM
from fused_dni.modules.lstm_cell import FusedDNILSTMCell
from fused_dni.modules.recurrent import backward_boundary
from fused_dni.modules.sequential import DecoupledSequential
from fused_dni.modules.synthetic_input import SyntheticInput

__all__ = [
    "Decoupled",
    "DecoupledSequential",
    "FusedDNILSTM",
    "FusedDNILSTMCell",
    "FusedDNILinear",
    "FusedDNILinearCrossEntropyLoss",
    "LocalOutput",
    "SyntheticInput",
    "Ticket",
    "backward_boundary",
    "backward_local",
    "learn_late",
    "step_local",
]
