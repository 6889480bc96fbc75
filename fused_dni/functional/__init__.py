"""The fused ops as functions of tensors."""

from fused_dni.functional.linear import linear, linear_step_
from fused_dni.functional.linear_cross_entropy import linear_cross_entropy
from fused_dni.functional.synthesizer import synthesizer_predict, synthesizer_update_

__all__ = [
    "linear",
    "linear_cross_entropy",
    "linear_step_",
    "synthesizer_predict",
    "synthesizer_update_",
]
