"""JSON from a file that anybody may have written: what it lacks is said with the file's name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fused_dni.report.errors import ReportError
from fused_dni.report.timings import typed

#: What no terminal, page or plot can show: control characters and halves of characters.
_UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
#: What reading data raises that are not as they should be.
_WRONG = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def printable(text: str) -> str:
    """Replace what cannot be shown: of a file's name that is not UTF-8, for instance."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


@dataclass
class _Origin:
    """The file, what it says that it is, and which of its parts was looked at last."""

    path: str
    kind: str = ""
    last: str = ""


class Part(dict[str, Any]):
    """An object of a file's JSON: to ask for what it has not is a :class:`ReportError` that names
    the file and the part."""

    def __init__(self, origin: _Origin, place: str) -> None:
        super().__init__()
        self.origin = origin
        self.place = place

    @classmethod
    def like(cls, other: Part) -> Part:
        """Make an empty one of the same place."""
        return cls(other.origin, other.place)

    def __getitem__(self, key: str) -> Any:
        self.origin.last = f"{self.place}/{key}" if self.place else key
        return super().__getitem__(key)

    def __missing__(self, key: str) -> Any:
        raise ReportError(f"{self.origin.path} is incomplete: it lacks {_named(self.origin.last)}")


def parts_of(found: dict[str, Any], path: str | os.PathLike[str]) -> Part:
    """Make parts of all objects in a file's JSON, timings and ratios of those that are such, and
    strings that can be shown.

    Raises:
        ReportError: a timing or ratio lacks its numbers.
    """
    origin = _Origin(printable(os.fspath(path)), str(found.get("kind")))
    with reading(Part(origin, "")):
        made: Part = _part(found, origin, "")
    return made


def _part(value: Any, origin: _Origin, place: str) -> Any:
    if isinstance(value, str):
        return printable(value)
    inner = f"{place}/" if place else ""
    if isinstance(value, list):
        return [_part(item, origin, f"{inner}{at}") for at, item in enumerate(value)]
    if isinstance(value, dict):
        made = Part(origin, place)
        for key, item in value.items():
            made[printable(key)] = _part(item, origin, f"{inner}{key}")
        origin.last = place
        return typed(place.rpartition("/")[2], made)
    return value


def _named(place: str) -> str:
    shown = printable(place)
    return repr(shown if len(shown) <= 100 else f"...{shown[-97:]}")


@contextmanager
def reading(report: Any) -> Iterator[None]:
    """Turn what goes wrong inside into a line, if ``report`` is from a file.

    Raises:
        ReportError: the file does not hold what it should; file and place are named.
    """
    try:
        yield
    except _WRONG as error:
        report = getattr(report, "body", report)
        if not isinstance(report, Part):
            raise
        origin = report.origin
        if isinstance(error, ReportError):
            if origin.path in str(error):
                raise
            raise type(error)(f"{origin.path} {error}") from error
        if isinstance(error, AttributeError) and isinstance(error.obj, SimpleNamespace):
            raise ReportError(
                f"{origin.path} is incomplete: its settings lack {_named(str(error.name))}"
            ) from error
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, KeyError):
            reason = f"there is none for {reason}"
        raise ReportError(
            f"{origin.path} does not hold what a {origin.kind!r} report does, at "
            f"{_named(origin.last)} or near it: {reason or type(error).__name__}"
        ) from error
