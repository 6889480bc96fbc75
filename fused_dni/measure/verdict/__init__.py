"""What backprop costs, what DNI costs, and where the break-even is, measured on this machine."""

from fused_dni.measure.verdict.errors import GateError, VerdictError
from fused_dni.measure.verdict.layer import verdict
from fused_dni.measure.verdict.lstm import LSTMVerdict, verdict_lstm
from fused_dni.measure.verdict.result import BreakEven, Variant, Verdict
from fused_dni.measure.verdict.top import TopVariant, TopVerdict, verdict_top

__all__ = [
    "BreakEven",
    "GateError",
    "LSTMVerdict",
    "TopVariant",
    "TopVerdict",
    "Variant",
    "Verdict",
    "VerdictError",
    "verdict",
    "verdict_lstm",
    "verdict_top",
]
