"""Options that describe themselves: type, range, default and help of each stand in one place.

A dataclass with fields made by :func:`option` is checked wherever it is made, in a program as on
the command line, which ``fused_dni.cli`` makes of them. Nothing here imports PyTorch: help and bad
arguments do not wait for it.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fused_dni.report import text


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Kind:
    """What the values of an option are.

    Attributes:
        check: ``check(name, value, given)`` raises ValueError, which says what was ``given``, where
            a value is none of them.
        read: makes a value of a word; where it raises ValueError, the word itself is checked.
        metavar: what stands for the value in help.
        show: how help writes a value.
    """

    check: Callable[[str, Any, Any], object]
    read: Callable[[str], Any] = str
    metavar: str | None = None
    show: Callable[[Any], str] = _plain

    def parse(self, name: str, word: str) -> Any:
        """Read a word of the command line.

        Raises:
            ValueError: it is none of the values.
        """
        try:
            value = self.read(word)
        except ValueError:
            value = word
        self.check(name, value, word)
        return value


def kind(
    says: str, fits: Callable[[Any], bool], read: Callable[[str], Any] = str, **more: Any
) -> Kind:
    """Make a kind of values that ``fits`` accepts; ``says`` stands behind "must be"."""

    def check(name: str, value: Any, given: Any) -> None:
        if not fits(value):
            raise ValueError(f"{name} must be {says}, got {given!r}")

    return Kind(check, read, **more)


def whole(low: int, high: int | None = None) -> Kind:
    """Take whole numbers, of 64 bits at most."""
    most = sys.maxsize if high is None else high

    def check(name: str, value: Any, given: Any) -> None:
        if not isinstance(value, int) or not low <= value <= most:
            open_ended = high is None and not (isinstance(value, int) and value > most)
            upto = "on" if open_ended else f"to {most}"
            raise ValueError(f"{name} must be a whole number from {low} {upto}, got {given!r}")

    return Kind(check, int, metavar="N")


def number(low: float = 0.0, high: float = math.inf, *, below: bool = False) -> Kind:
    """Take finite numbers from ``low`` to ``high``, without ``high`` itself if ``below``."""
    says = f"a finite number from {low:g} {'on' if high == math.inf else f'to {high:g}'}"
    if below:
        says = f"at least {low:g} and below {high:g}"

    def fits(value: Any) -> bool:
        inside = isinstance(value, (int, float)) and low <= value <= high and value != math.inf
        return inside and not (below and value == high)

    return kind(says, fits, float, metavar="X")


def above_zero(high: float = math.inf, metavar: str = "X") -> Kind:
    """Take positive, finite numbers, to ``high``."""
    says = "a positive, finite number" if high == math.inf else f"above 0 and at most {high:g}"

    def fits(value: Any) -> bool:
        return isinstance(value, (int, float)) and 0.0 < value <= high and value != math.inf

    return kind(says, fits, float, metavar=metavar)


def one_of(names: Iterable[str]) -> Kind:
    """Take one of these names; the nearest is suggested."""
    known = tuple(names)

    def check(name: str, value: Any, given: Any) -> None:
        if value not in known:
            raise ValueError(text.unknown(name.removesuffix("s"), str(given), known))

    return Kind(check, metavar="{" + ",".join(known) + "}")


def known_to(look_up: Callable[[str], object], metavar: str) -> Kind:
    """Take names of which ``look_up`` raises ValueError if it does not know them."""
    return Kind(lambda _, value, given: look_up(value), metavar=metavar)


UPDATES = ("sgd", "adam", "adamw")
ACTIVATIONS = (
    "identity",
    "relu",
    "gelu",
    "gelu_tanh",
    "silu",
    "tanh",
    "sigmoid",
    "softplus",
    "mish",
)
NORMALIZATIONS = ("none", "batch", "layer")
DTYPES = ("float32", "float64", "bfloat16", "float16")
INTERFACES = ("output", "preactivation")

#: What functions and their commands measure by default: k, None being never, and seconds.
KS = (1, 2, 4, 8, 16, None)
VERDICT_SECONDS, MAP_SECONDS, ADVICE_SECONDS, STAGE_SECONDS = 5.0, 2.5, 20.0, 2.0

UPDATE = one_of(UPDATES)
TEXT = Kind(lambda name, value, given: None, metavar="NAME")
FILE = kind("a path", bool, metavar="FILE")
FOLDER = kind("a path", bool, metavar="DIR")
PATH = kind("a path", bool, metavar="PATH")
FACTORY = kind("package.module:factory", lambda value: ":" in value, metavar="FACTORY")
_MOST = 4 * (os.cpu_count() or 1)
#: More are slower, and far more than the system starts end the process.
THREADS = kind(
    f"a whole number from 1 to {_MOST}, four for each of this machine's processors",
    lambda value: isinstance(value, int) and 1 <= value <= _MOST,
    int,
    metavar="N",
)
SECONDS = above_zero(metavar="S")
RATE = number()
SEED = whole(0)


def _every(word: str) -> int:
    if word == "0":
        raise ValueError
    return 0 if word == "never" else int(word)


#: k of "on every k-th step"; 0, on the command line "never", for no step.
EVERY = kind(
    "a whole number from 1 on, or 'never'",
    lambda value: isinstance(value, int) and value >= 0,
    _every,
    metavar="K",
    show=lambda value: str(value or "never"),
)
#: Shape of a batch.
SHAPE = kind(
    "a shape like 64x784, batch first",
    lambda value: isinstance(value, tuple) and len(value) >= 2 and min(value) >= 1,
    lambda word: tuple(int(part) for part in word.lower().split("x")),
    metavar="NxI",
)


def _device(name: str, value: Any, given: Any) -> None:
    if re.fullmatch(r"cpu|cuda(:\d+)?", str(value)) is None:
        raise ValueError(f"unknown {name} {given!r}: allowed are cpu and cuda[:N]")


DEVICE = Kind(_device, metavar="DEVICE")


# ------------------------------------------------------------------------------- with their units

TIMES = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
SIZES = {
    "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30,
}  # fmt: skip
RATES = {
    **{f"{unit}/s": size for unit, size in SIZES.items()},
    "kbit/s": 1e3 / 8, "Mbit/s": 1e6 / 8, "Gbit/s": 1e9 / 8,
    "kbit": 1e3 / 8, "Mbit": 1e6 / 8, "Gbit": 1e9 / 8,  # a second, as networks are named
}  # fmt: skip
_QUANTITY = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([^\W\d_]*(?:/s)?)\s*")


def quantity(
    units: Mapping[str, float], like: str, metavar: str, *, positive: bool = False
) -> Kind:
    """Take numbers with their unit, of which 0 needs none."""

    def read(word: str) -> float:
        found = _QUANTITY.fullmatch(word)
        if found is None or not (found[2] in units or (not found[2] and float(found[1]) == 0.0)):
            raise ValueError
        return float(found[1]) * units.get(found[2], 1.0)

    def fits(value: Any) -> bool:
        return isinstance(value, float) and 0.0 <= value < math.inf and not (positive and not value)

    def show(value: float) -> str:
        unit = next((u for u in reversed(list(units)) if value >= units[u]), None)
        return "0" if unit is None else f"{value / units[unit]:g}{unit}"

    said = "a positive number" if positive else "a number from 0 on"
    says = f"{said} and its unit, like {like}; units are {', '.join(units)}"
    return kind(says, fits, read, metavar=metavar, show=show)


TIME = quantity(TIMES, "4ms", "TIME")
SPAN = quantity(TIMES, "4ms", "TIME", positive=True)
SIZE = quantity(SIZES, "512KiB", "SIZE")
SPEED = quantity(RATES, "10Gbit/s", "RATE", positive=True)


def _share(word: str) -> float:
    return float(word.removesuffix("%")) / (100.0 if word.endswith("%") else 1.0)


#: A part of the whole, from ``5%`` or ``0.05``.
SHARE = kind(
    "from 0% to 100%, like 5%",
    lambda value: isinstance(value, float) and 0.0 <= value <= 1.0,
    _share,
    metavar="SHARE",
    show=lambda value: f"{100 * value:g}%",
)
#: ``(seconds, share)``, one of them 0, from ``2ms`` or ``10%``.
TIME_OR_SHARE = kind(
    "a time like 2ms, or a share like 10%",
    lambda value: isinstance(value, tuple) and all(0.0 <= part < math.inf for part in value),
    lambda word: (0.0, _share(word)) if word.endswith("%") else (TIME.parse("", word), 0.0),
    metavar="TIME",
    show=lambda value: "0",
)


# -------------------------------------------------------------------------------------- dataclasses


@dataclass(frozen=True)
class Option:
    """How a field of a dataclass is an option.

    Attributes:
        kind: of the value, or of each of several.
        help: a line, to which help adds the default if it does not end in brackets.
        flag: its name on the command line, if another than the field's; ``short`` a second one.
        several: as ``nargs`` of argparse: "+" or "*"; None for one value.
        group: heading in help; None for that of the field before.
        place: it is an argument without a name.
    """

    kind: Kind
    help: str
    flag: str | None = None
    short: str | None = None
    several: str | None = None
    group: str | None = None
    place: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError if a value, or one of several, is none."""
        if self.several is None:
            self.kind.check(name, value, value)
        else:
            if not value and self.several == "+":
                raise ValueError(f"{name} must hold one at least")
            for each in value:
                self.kind.check(name, each, each)


def option(default: Any, kind: Kind = TEXT, help: str = "", **more: Any) -> Any:
    """Make a field of a dataclass: a value, or a tuple of several; None where it may be left open.

    Args:
        default: the field's; False makes it a switch.
        kind: see :class:`Option`, as for what else is given.
    """
    if isinstance(default, tuple) and kind not in (SHAPE, TIME_OR_SHARE):
        more.setdefault("several", "+")
    return field(default=default, metadata={"option": Option(kind, help, **more)})


class Checked:
    """Base of dataclasses that are checked when they are made: ValueError for a field that is not
    what its option allows. None is allowed where it is the default."""

    def __post_init__(self) -> None:
        for part in fields(self):  # type: ignore[arg-type]  # of subclasses, which are dataclasses
            described, value = part.metadata.get("option"), getattr(self, part.name)
            if described is not None and not (value is None and part.default is None):
                described.check(part.name, value)
