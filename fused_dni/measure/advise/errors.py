"""What ``advise`` raises."""

from __future__ import annotations


class AdviceError(ValueError):
    """No advice can be given on this model; the message says why."""
