"""The ops: their types, and for each the function that every floor above calls.

Each function of :mod:`fused_dni.ops.table` takes the backend first, which
:mod:`fused_dni.ops.registry` finds. Backends are loaded by name when they are first asked for:
nothing here imports one.
"""

from fused_dni.ops.returned import lstm_returned_rows
from fused_dni.ops.table import (
    linear_backward,
    linear_cross_entropy,
    linear_forward,
    linear_step_,
    linear_update_,
    lstm_backward,
    lstm_cell_backward,
    lstm_cell_forward,
    lstm_forward,
    lstm_update_,
    synthesizer_gradients,
    synthesizer_predict,
    synthesizer_update_,
)
from fused_dni.ops.types import Layers, flat, layers_of

__all__ = [
    "Layers",
    "flat",
    "layers_of",
    "linear_backward",
    "linear_cross_entropy",
    "linear_forward",
    "linear_step_",
    "linear_update_",
    "lstm_backward",
    "lstm_cell_backward",
    "lstm_cell_forward",
    "lstm_forward",
    "lstm_returned_rows",
    "lstm_update_",
    "synthesizer_gradients",
    "synthesizer_predict",
    "synthesizer_update_",
]
