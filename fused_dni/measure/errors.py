"""What a measurement raises that was asked to stop."""

from __future__ import annotations


class Interrupted(Exception):
    """The run was asked to stop and did, at a step's end; the message says what was kept."""
