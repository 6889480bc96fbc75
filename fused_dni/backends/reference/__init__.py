"""The reference backend: plain PyTorch on any device, written to be read.

It is the specification of every op and the oracle (in float64) that the other backends are tested
against. One function a formula; no autograd inside; checks synchronise with the device freely.
"""

from __future__ import annotations

from torch import Tensor

from fused_dni.backends.common.precision import LOW_PRECISION
from fused_dni.backends.common.synthesizer import synthesizer_predict
from fused_dni.backends.reference.linear import (
    bind_step,
    linear_backward,
    linear_forward,
    linear_step_,
    linear_update_,
)
from fused_dni.backends.reference.linear_cross_entropy import linear_cross_entropy
from fused_dni.backends.reference.lstm import (
    lstm_backward,
    lstm_cell_backward,
    lstm_cell_forward,
    lstm_forward,
    lstm_update_,
)
from fused_dni.backends.reference.lstm_close import lstm_close
from fused_dni.backends.reference.synthesizer import synthesizer_gradients, synthesizer_update_
from fused_dni.ops.types import SYNTHESIZERS


class ReferenceBackend:
    """:class:`fused_dni.ops.types.Backend` in plain PyTorch."""

    name = "reference"
    synthesizers = SYNTHESIZERS

    def available(self) -> str | None:
        """Return None: it runs wherever torch does."""
        return None

    def why_not(self, x: Tensor, weight: Tensor) -> str | None:
        """Say why these tensors cannot be served; None if they can.

        Served: floating x and weight of one dtype, or a bfloat16 or float16 x with a float32 or
        float64 weight, on one device.
        """
        if not (x.is_floating_point() and weight.is_floating_point()):
            return f"needs floating-point tensors, got x {x.dtype} and weight {weight.dtype}"
        if x.device != weight.device:
            return f"needs tensors of one device, got x on {x.device}, weight on {weight.device}"
        mixed = x.dtype in LOW_PRECISION and weight.dtype not in LOW_PRECISION
        if x.dtype != weight.dtype and not mixed:
            return (
                "needs x and weight of one dtype, or a bfloat16 or float16 x with float32 "
                f"parameters, got x {x.dtype} and weight {weight.dtype}"
            )
        return None

    linear_forward = staticmethod(linear_forward)
    linear_backward = staticmethod(linear_backward)
    linear_update_ = staticmethod(linear_update_)
    linear_step_ = staticmethod(linear_step_)
    bind_step = staticmethod(bind_step)
    linear_cross_entropy = staticmethod(linear_cross_entropy)
    synthesizer_predict = staticmethod(synthesizer_predict)
    synthesizer_gradients = staticmethod(synthesizer_gradients)
    synthesizer_update_ = staticmethod(synthesizer_update_)
    lstm_forward = staticmethod(lstm_forward)
    lstm_backward = staticmethod(lstm_backward)
    lstm_close = staticmethod(lstm_close)
    lstm_update_ = staticmethod(lstm_update_)
    lstm_cell_forward = staticmethod(lstm_cell_forward)
    lstm_cell_backward = staticmethod(lstm_cell_backward)


__all__ = ["ReferenceBackend"]
