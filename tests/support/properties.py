"""What the tests prove, as a list that can be compared with another tree's.

    python tests/support/properties.py [--pairs] [ROOT] > FILE

Collects the tests (none runs) and prints a line for each value that a parameter of theirs takes::

    op | backend | property | option = value

The op is what the file is about, without the backend in its name; the backend is the file's or the
parameter of that name; the property is the function's name. A row of an options table gives a line
for each of its options, and with ``--pairs`` one for every two of them that meet in a row. What
hypothesis draws stands as the strategy that it is drawn from. The lines are sorted and unique, so
that ``diff`` or ``comm`` of two files says what one tree has and the other does not; a test that
stands in two files, or moved from one to the other, is the same line.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from divided import Asked

BACKENDS = ("reference", "cpu", "cuda", "triton")


def shown(value: Any) -> str:
    """A parameter's value: a name where it has one, and nothing that is another in every run or
    tree (addresses, random numbers, where the tree is)."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(shown, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(v)}' for key, v in value.items())}}}"
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)}"
    if isinstance(value, Path):
        return os.path.relpath(value)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    return re.sub(r"( object)? at 0x[0-9a-f]+", "", " ".join(str(name or repr(value)).split()))


def drawn(function: Any) -> dict[str, str]:
    """The strategies of a property test, by argument."""
    given = getattr(function, "hypothesis", None)
    kwargs = getattr(given, "_given_kwargs", None) or {}
    return {name: f"drawn from {shown(repr(strategy))}" for name, strategy in kwargs.items()}


def properties(item: pytest.Function, pairs: bool) -> Iterator[str]:
    """The lines of one test."""
    words = item.path.stem.removeprefix("test_").split("_")
    backends = [word for word in words if word in BACKENDS]
    op = " ".join(word for word in words if word not in (*BACKENDS, "backends"))
    name = item.originalname.removeprefix("test_")
    parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    named = parameters.get("backend")
    if isinstance(named, str) and named in BACKENDS:
        del parameters["backend"]
        backends = [named]
    if isinstance(parameters.get("way"), Asked):  # of test_gpu_linear.py
        op, backends = op.removeprefix("gpu "), [parameters["way"].backend]
        parameters["way"] = parameters["way"].name
    prefix = f"{op or 'any'} | {' '.join(backends) or '-'} | {name} |"
    yield f"{prefix} is there"
    for argument, value in (parameters | drawn(item.obj)).items():
        if isinstance(value, dict):  # a row of a table
            options = [f"{key} = {shown(v)}" for key, v in value.items()]
            yield from (f"{prefix} {option}" for option in options)
            if pairs:
                for one, other in itertools.combinations(options, 2):
                    yield f"{prefix} {one} with {other}"
        else:
            yield f"{prefix} {argument} = {shown(value)}"


class Collected:
    """Keeps what pytest collects."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).resolve().parents[2])
    parser.add_argument("--pairs", action="store_true", help="also every two options that meet")
    given = parser.parse_args()
    os.chdir(given.root)
    found = Collected()
    with contextlib.redirect_stdout(sys.stderr):
        # Every tier: what a run leaves out by default is proven all the same.
        options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "", "tests"]
        status = pytest.main(options, plugins=[found])
    if status:
        return int(status)
    lines = {
        line
        for item in found.items
        if isinstance(item, pytest.Function)
        for line in properties(item, given.pairs)
    }
    print("\n".join(sorted(lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
