"""Times, sizes and rates on the command line: numbers with their units."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping

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


def _quantity(
    what: str, units: Mapping[str, float], example: str, positive: bool
) -> Callable[[str], float]:
    def parse(given: str) -> float:
        value = math.nan
        found = _QUANTITY.fullmatch(given)
        if found and (found[2] in units or (float_or_nan(found[1]) == 0.0 and not found[2])):
            value = float_or_nan(found[1]) * units.get(found[2], 1.0)
        if not (0.0 <= value < math.inf) or (positive and value == 0.0):
            from_zero = "a positive number" if positive else "a number from 0 on"
            raise argparse.ArgumentTypeError(
                f"{what} must be {from_zero} and its unit, like {example}; units are "
                f"{', '.join(units)}; got {given!r}"
            )
        return value

    return parse


def float_or_nan(given: str) -> float:
    """The number, NaN if it is none."""
    try:
        return float(given)
    except ValueError:
        return math.nan


def time(what: str, *, positive: bool = False) -> Callable[[str], float]:
    """Seconds from ``4ms``; 0 needs no unit."""
    return _quantity(what, TIMES, "4ms", positive)


def size(what: str) -> Callable[[str], float]:
    """Bytes from ``512KiB``."""
    return _quantity(what, SIZES, "512KiB", False)


def rate(what: str) -> Callable[[str], float]:
    """Bytes a second from ``10Gbit/s``."""
    return _quantity(what, RATES, "10Gbit/s", True)


def time_or_share(what: str) -> Callable[[str], tuple[float, float]]:
    """``(seconds, share)``, one of them 0, from ``2ms`` or ``10%``."""
    in_seconds = time(what)

    def parse(given: str) -> tuple[float, float]:
        if given.endswith("%"):
            share = float_or_nan(given[:-1]) / 100.0
            if 0.0 <= share < math.inf:
                return 0.0, share
            raise argparse.ArgumentTypeError(
                f"{what} must be a time like 2ms, or a share like 10%, got {given!r}"
            )
        return in_seconds(given), 0.0

    return parse


def percent(what: str) -> Callable[[str], float]:
    """A share from ``5%`` or ``0.05``."""

    def parse(given: str) -> float:
        value = float_or_nan(given.removesuffix("%"))
        value = value / 100.0 if given.endswith("%") else value
        if not 0.0 <= value <= 1.0:
            raise argparse.ArgumentTypeError(
                f"{what} must be from 0% to 100%, like 5%, got {given!r}"
            )
        return value

    return parse
