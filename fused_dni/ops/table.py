"""The ops: of each its method of :class:`fused_dni.ops.types.Backend`, room for its results, and
what it mutates; see :func:`fused_dni.ops.dispatch.op`."""

from __future__ import annotations

from typing import Any

from fused_dni.ops import fits, results
from fused_dni.ops.dispatch import op
from fused_dni.ops.returned import note_by_weight
from fused_dni.ops.types import Backend

_SLOTS = ("layer_weight", "layer_bias", "layer_norm_weight", "layer_norm_bias")
_RUNNING = ("layer_running_mean", "layer_running_var")
_SYNTHESIZER = tuple(f"synthesizer_{name}" for name in ("weight", "down", "context_weight", "bias"))
_RULE = ("rule_hyper", "rule_first", "rule_second")


def _note(given: Any, made: Any) -> None:
    """Compiled code hands out states that the LSTM with this weight returned."""
    note_by_weight(given.layers[0].weight_ih, made.h, made.c)


linear_forward = op(
    Backend.linear_forward, results.linear_forward, fits.linear_forward, mutates=_RUNNING
)
linear_backward = op(
    Backend.linear_backward, results.linear_backward, fits.linear_backward, asks=("grad_h",)
)
linear_update_ = op(
    Backend.linear_update_, results.nothing, fits.linear_update_, mutates=(*_SLOTS, *_RULE)
)
linear_step_ = op(
    Backend.linear_step_,
    results.linear_step_,
    fits.linear_step_,
    mutates=(*_SLOTS, *_RUNNING, *_RULE),
)
linear_cross_entropy = op(
    Backend.linear_cross_entropy,
    results.linear_cross_entropy,
    fits.linear_cross_entropy,
    asks=("x", "target"),
)
synthesizer_predict = op(
    Backend.synthesizer_predict, results.synthesizer_predict, fits.synthesizer_predict, asks=("h",)
)
synthesizer_gradients = op(
    Backend.synthesizer_gradients,
    results.synthesizer_gradients,
    fits.synthesizer_gradients,
    mutates=("statistics",),
    asks=("grad_h",),
)
synthesizer_update_ = op(
    Backend.synthesizer_update_,
    results.nothing,
    fits.synthesizer_update_,
    mutates=(*_SYNTHESIZER, "statistics", *_RULE),
    asks=("grad_h",),
)
lstm_forward = op(Backend.lstm_forward, results.lstm_forward, fits.lstm_forward, behind=_note)
lstm_backward = op(Backend.lstm_backward, results.lstm_backward, fits.lstm_backward)
lstm_update_ = op(
    Backend.lstm_update_,
    results.nothing,
    fits.lstm_update_,
    mutates=("layers", *_RULE),
    asks=("rows",),
)
lstm_cell_forward = op(Backend.lstm_cell_forward, results.lstm_cell_forward, fits.lstm_cell_forward)
lstm_cell_backward = op(
    Backend.lstm_cell_backward, results.lstm_cell_backward, fits.lstm_cell_backward
)
