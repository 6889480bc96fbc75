"""What backprop costs, what DNI costs, and where the break-even is, measured on this machine."""

from fused_dni.verdict.errors import GateError, VerdictError
from fused_dni.verdict.layer import BreakEven, Verdict, verdict
from fused_dni.verdict.lstm import LSTMVerdict, verdict_lstm

__all__ = [
    "BreakEven",
    "GateError",
    "LSTMVerdict",
    "Verdict",
    "VerdictError",
    "verdict",
    "verdict_lstm",
]
