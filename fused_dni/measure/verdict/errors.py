"""What a verdict raises."""

from __future__ import annotations


class VerdictError(ValueError):
    """The verdict cannot be given; the message says why."""


class GateError(VerdictError):
    """Candidates do not compute the same thing, so their times must not be compared."""
