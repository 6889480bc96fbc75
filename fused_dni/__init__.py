"""fused_dni: decoupled neural interfaces on fused kernels, and whether they pay.

Layers that predict their own gradient (Jaderberg et al. 2016, arXiv 1608.05343) and update in the
forward, drop-in for PyTorch's; and the measurements that say what it buys.
"""

from fused_dni import functional
from fused_dni.advise import Advice, advise
from fused_dni.annotate import annotate, from_environment
from fused_dni.context import condition_on
from fused_dni.convert import convert, revert
from fused_dni.diagnostics import diagnostics
from fused_dni.modules import (
    Decoupled,
    DecoupledSequential,
    FusedDNILinear,
    FusedDNILSTM,
    FusedDNILSTMCell,
    backward_boundary,
)
from fused_dni.optim import FusedOptimizer, ordinary_parameters
from fused_dni.rules import SGD, Adam, AdamW
from fused_dni.schedule import Schedule
from fused_dni.synthesizers import (
    ConvSynthesizer,
    DiagonalSynthesizer,
    LinearSynthesizer,
    MLPSynthesizer,
    Synthesizer,
)
from fused_dni.verdict import LSTMVerdict, Verdict, verdict, verdict_lstm

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Advice",
    "ConvSynthesizer",
    "Decoupled",
    "DecoupledSequential",
    "DiagonalSynthesizer",
    "FusedDNILSTM",
    "FusedDNILSTMCell",
    "FusedDNILinear",
    "FusedOptimizer",
    "LSTMVerdict",
    "LinearSynthesizer",
    "MLPSynthesizer",
    "Schedule",
    "Synthesizer",
    "Verdict",
    "advise",
    "annotate",
    "backward_boundary",
    "condition_on",
    "convert",
    "diagnostics",
    "functional",
    "ordinary_parameters",
    "revert",
    "verdict",
    "verdict_lstm",
]

from_environment()
