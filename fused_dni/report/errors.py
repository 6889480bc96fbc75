"""What goes wrong with reports, in words for whoever asked for one."""

from __future__ import annotations


class ReportError(ValueError):
    """A file is no report, or one that this version does not read; the message says why."""


class WriteError(OSError):
    """A file cannot be written; the message names it and says why."""
