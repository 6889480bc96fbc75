"""Which of the backends on a GPU is asked first: a table of measured times.

``fused-dni tune`` times every backend that serves a layer and keeps the medians in
``backends.json`` under :func:`fused_dni.kernels.tuning.folder`; ``measured.json`` beside this file,
if there is one, holds those that come with the package. Both are read once a process::

    {"format": 1,
     "seconds": {"linear/sm_90/bfloat16/128x1024x1024": {"cuda": 9e-6, "triton": 1e-5}}}

Sizes are N, I, O of "linear" (its decoupled step) and T, B, I, H of "lstm" (a window forwards and
backwards); float32 is "float32-ieee" or "float32-tf32". A call takes the nearest entry of its op,
architecture and dtype, by the ratios of sizes, if none of them is off by more than a factor of
four; the user's own table counts before the package's. Where there is none, a rule of thumb that no
measurement has confirmed yet (:func:`usual`) decides. A table of another format, or one that cannot
be read, is ignored: it is a cache.
"""

from __future__ import annotations

import fcntl
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_dni.ops.tracing import constant_when_traced

FORMAT = 1
_FILE = "backends.json"
_SHIPPED = Path(__file__).with_name("measured.json")
#: Those that a GPU's tensors may be served by, in the order of the registry.
BACKENDS = ("cuda", "triton")
#: An entry that is further off in any size says nothing.
FARTHEST = 4.0
#: Sizes of an entry, by op.
_SIZES = {"linear": 3, "lstm": 4}


class Entry(NamedTuple):
    """What was measured, or is asked for."""

    op: str
    architecture: str
    arithmetic: str  # the dtype of x, and how float32 is multiplied
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        """Its name in a table."""
        return "/".join((self.op, self.architecture, self.arithmetic, "x".join(map(str, self[3]))))


Table = dict[Entry, dict[str, float]]  # seconds by backend, the fastest first

_tables: list[Table] | None = None  # that on disk before that of the package, once read


# ------------------------------------------------------------------------------------------ calls


def sizes(op: str, x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """Return the sizes of a call, rounded up to powers of two: there are few, and a graph compiled
    for any number of rows holds for all that are rounded alike.

    Args:
        op: "linear" or "lstm".
        x: [..., I], or [T, B, I] of a window. Rows of an LSTM without an axis of time (a cell's, an
            update's) take the place of any window: 0 stands for T and B then.
        weight: [O, I], or [4 * H, I].
    """
    inputs, outputs = weight.shape[-1], weight.shape[0]
    if op == "linear":
        return (_rounded(math.prod(x.shape[:-1])), _rounded(inputs), _rounded(outputs))
    window = (_rounded(x.shape[0]), _rounded(x.shape[1])) if x.dim() == 3 else (0, 0)
    return (*window, _rounded(inputs), _rounded(outputs // 4))


def _rounded(size: int) -> int:
    """Round up by comparisons, of which torch.compile makes guards where a size is not fixed."""
    power = 1
    while power < size:
        power *= 2
    return power


@constant_when_traced
def tf32() -> bool:
    """Say whether float32 products may be TF32's; compiled graphs are guarded by it anyway."""
    return torch.get_float32_matmul_precision() != "highest"


@constant_when_traced
def order(
    op: str, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[str, ...]:
    """Return the names of backends, the fastest first, for a call on a GPU."""
    entry = _entry(op, sizes, dtype, device)
    for table in tables():
        nearest = _nearest(table, entry)
        if nearest is not None:
            return tuple(table[nearest])
    return usual(op, sizes)


def usual(op: str, sizes: tuple[int, ...]) -> tuple[str, ...]:
    """Return the order where nothing was measured: a rule of thumb that no measurement has
    confirmed yet.

    The CUDA kernels are made for what waits for the next barrier: LSTM windows, and layers of at
    most 128 rows and 1,024 features. Everything else goes to Triton first.
    """
    small = op == "lstm" or (sizes[0] <= 128 and max(sizes[1:]) <= 1024)
    return BACKENDS if small else BACKENDS[::-1]


def _entry(op: str, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Entry:
    from fused_dni.kernels import tuning

    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32:
        name += "-tf32" if tf32() else "-ieee"
    return Entry(op, tuning.architecture(device), name, sizes)


def _nearest(table: Table, wanted: Entry) -> Entry | None:
    found, least = None, math.inf
    for entry in table:
        if entry[:3] != wanted[:3]:
            continue
        pairs = zip(entry.sizes, wanted.sizes, strict=True)
        logs = [abs(math.log2(size / asked)) for size, asked in pairs if asked]
        if max(logs) <= math.log2(FARTHEST) and math.hypot(*logs) < least:
            found, least = entry, math.hypot(*logs)
    return found


# ----------------------------------------------------------------------------------------- tables


def path() -> Path:
    """Return the user's own table."""
    from fused_dni.kernels import tuning

    folder: Path = tuning.folder()
    return folder / _FILE


def tables() -> list[Table]:
    """Return the user's own table and that of the package."""
    global _tables
    if _tables is None:
        _tables = [_read(path()), _read(_SHIPPED)]
    return _tables


def remember(
    op: str,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    seconds: dict[str, float],
) -> Path:
    """Keep the medians of two or more backends, for this process and later ones; returns the
    table's path. Entries of other processes are kept.

    Raises:
        OSError: the table cannot be written. In this process it holds all the same.
    """
    entry = _entry(op, sizes, dtype, device)
    tables()[0][entry] = _sorted(seconds)
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table = _read(file)
        table[entry] = _sorted(seconds)
        partial = file.with_suffix(".partial")
        partial.write_text(text(table))
        partial.replace(file)  # whoever reads sees the old table or the new one
    return file


def text(table: Table) -> str:
    """Return a table as it lies in a file."""
    held = {"format": FORMAT, "seconds": {str(entry): found for entry, found in table.items()}}
    return json.dumps(held, indent=1, sort_keys=True) + "\n"


def _sorted(seconds: dict[str, float]) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def _read(file: Path) -> Table:
    """Return a table's usable entries; none if it is missing, damaged or of another format."""
    try:
        held = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        return {}
    entries = held.get("seconds")
    found: Table = {}
    for name, seconds in entries.items() if isinstance(entries, dict) else ():
        entry = _parsed(name)
        if entry is not None and _usable(seconds):
            found[entry] = _sorted(seconds)
    return found


def _parsed(name: str) -> Entry | None:
    op, *rest = name.split("/")
    if len(rest) != 3 or op not in _SIZES:
        return None
    numbers = rest[2].split("x")
    if len(numbers) != _SIZES[op] or not all(n.isdecimal() and int(n) for n in numbers):
        return None
    return Entry(op, rest[0], rest[1], tuple(map(int, numbers)))


def _usable(seconds: Any) -> bool:
    """Times of backends, of two at least: one alone has not won against anything."""
    return (
        isinstance(seconds, dict)
        and len(seconds) > 1
        and all(isinstance(t, float) and 0.0 < t < math.inf for t in seconds.values())
    )
