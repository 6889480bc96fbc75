"""Where in a whole model decoupled interfaces pay, predicted and then measured."""

from fused_dni.measure.advise.advise import Advice, advise
from fused_dni.measure.advise.errors import AdviceError

__all__ = ["Advice", "AdviceError", "advise"]
