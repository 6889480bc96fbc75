"""The ops: their types, and for each the function that every floor above calls.

``linear``, ``linear_cross_entropy``, ``synthesizer`` and ``lstm`` hold one function an op, which
takes the backend first; :mod:`fused_dni.ops.registry` finds that backend. Backends are loaded by
name when they are first asked for: nothing here imports one.
"""

from fused_dni.ops.linear import linear_backward, linear_forward, linear_step_, linear_update_
from fused_dni.ops.linear_cross_entropy import linear_cross_entropy
from fused_dni.ops.lstm import (
    Layers,
    flat,
    layers_of,
    lstm_backward,
    lstm_cell_backward,
    lstm_cell_forward,
    lstm_forward,
    lstm_update_,
)
from fused_dni.ops.returned import lstm_returned_rows
from fused_dni.ops.synthesizer import (
    synthesizer_gradients,
    synthesizer_predict,
    synthesizer_update_,
)

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
