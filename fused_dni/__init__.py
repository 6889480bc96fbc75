"""fused_dni: decoupled neural interfaces on fused kernels, and whether they pay.

Layers that predict their own gradient (Jaderberg et al. 2016, arXiv 1608.05343) and update in the
forward, drop-in for PyTorch's; and the measurements that say what it buys.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fused_dni import functional
from fused_dni.annotate import annotate, from_environment
from fused_dni.context import condition_on
from fused_dni.convert import convert, revert
from fused_dni.diagnostics import diagnostics
from fused_dni.modules import (
    Decoupled,
    DecoupledSequential,
    FusedDNILinear,
    FusedDNILinearCrossEntropyLoss,
    FusedDNILSTM,
    FusedDNILSTMCell,
    LocalOutput,
    SyntheticInput,
    Ticket,
    backward_boundary,
    backward_local,
    learn_late,
    step_local,
)
from fused_dni.optim import FusedOptimizer, ordinary_parameters
from fused_dni.rules import SGD, Adam, AdamW
from fused_dni.schedule import Schedule
from fused_dni.synthesizers import (
    ConvSynthesizer,
    CrossEntropySynthesizer,
    DiagonalSynthesizer,
    DifferenceSynthesizer,
    LinearSynthesizer,
    MLPSynthesizer,
    SoftmaxSynthesizer,
    SurrogateSynthesizer,
    Synthesizer,
)

if TYPE_CHECKING:
    from fused_dni.measure.advise.advise import Advice, advise
    from fused_dni.measure.verdict import (
        LSTMVerdict,
        TopVerdict,
        Verdict,
        verdict,
        verdict_lstm,
        verdict_top,
    )

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Advice",
    "ConvSynthesizer",
    "CrossEntropySynthesizer",
    "Decoupled",
    "DecoupledSequential",
    "DiagonalSynthesizer",
    "DifferenceSynthesizer",
    "FusedDNILSTM",
    "FusedDNILSTMCell",
    "FusedDNILinear",
    "FusedDNILinearCrossEntropyLoss",
    "FusedOptimizer",
    "LSTMVerdict",
    "LinearSynthesizer",
    "LocalOutput",
    "MLPSynthesizer",
    "Schedule",
    "SoftmaxSynthesizer",
    "SurrogateSynthesizer",
    "Synthesizer",
    "SyntheticInput",
    "Ticket",
    "TopVerdict",
    "Verdict",
    "advise",
    "annotate",
    "backward_boundary",
    "backward_local",
    "condition_on",
    "convert",
    "diagnostics",
    "functional",
    "learn_late",
    "ordinary_parameters",
    "revert",
    "step_local",
    "verdict",
    "verdict_lstm",
    "verdict_top",
]

# The instrument, by the module that holds it: a training loop does not wait for its import.
_LATE = {
    "Advice": "fused_dni.measure.advise",
    "advise": "fused_dni.measure.advise",
    "LSTMVerdict": "fused_dni.measure.verdict",
    "TopVerdict": "fused_dni.measure.verdict",
    "Verdict": "fused_dni.measure.verdict",
    "verdict": "fused_dni.measure.verdict",
    "verdict_lstm": "fused_dni.measure.verdict",
    "verdict_top": "fused_dni.measure.verdict",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LATE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})


from_environment()
