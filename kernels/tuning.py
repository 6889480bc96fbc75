"""Which tiles a kernel runs with: forced, measured here, measured by us, or by rule of thumb.

A choice belongs to an op, a variant of it, an architecture, a dtype and a shape. Choices that
``fused-dni tune`` measured are kept on disk, in ``tiles.json`` under :func:`folder`; ``tuned.json``
beside this file, if there is one, holds those that come with the package. Both are read once a
process::

    {"format": 1, "choices": {"linear_step:sgd/sm_90/bfloat16/128x1024x1024": {"warps": 4}}}

A shape that was not measured takes the entry of the shape with every size rounded up to a power of
two, if that was. So measuring powers of two serves everything, and another shape serves itself.
Entries whose fields are not exactly those of the op's tiles today are ignored, as is a table of
another format or one that cannot be read: it is a cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T", bound=NamedTuple)

FORMAT = 1
_FILE = "tiles.json"
_SHIPPED = Path(__file__).with_name("tuned.json")

_Table = dict[str, Any]  # fields of the tiles, by :meth:`Choice.entry`

_forced: dict[str, Any] = {}
_chosen: dict[tuple[str, tuple[int, ...], torch.dtype, torch.device, str], Any] = {}
_tables: list[_Table] | None = None  # that on disk before that of the package, once read


def choose(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    default: Callable[[], T],
    variant: str = "",
) -> T:
    """Choose tiles for an op on tensors of this shape: what :func:`using` forces, else what was
    measured, else ``default()``. Asking again costs a dictionary look-up.

    Args:
        op: the op's name, by which tables know it.
        shape: the sizes that its speed depends on.
        dtype: of the products' operands.
        device: of the tensors.
        default: the rule of thumb. Its result also says what an entry of a table has to look like.
        variant: what else its speed depends on (an update rule, say), without a slash.
    """
    forced: T | None = _forced.get(op)
    if forced is not None:
        return forced
    key = (op, shape, dtype, device, variant)
    found: T | None = _chosen.get(key)
    if found is None:
        usual = default()
        found = _chosen[key] = _measured(Choice(*key), usual) or usual
    return found


class Choice(NamedTuple):
    """What :func:`choose` was asked for."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    variant: str = ""

    def entry(self) -> str:
        """Its name in a table."""
        name, sizes = str(self.dtype).removeprefix("torch."), "x".join(map(str, self.shape))
        op = f"{self.op}:{self.variant}" if self.variant else self.op
        return f"{op}/{architecture(self.device)}/{name}/{sizes}"


@contextlib.contextmanager
def recording() -> Iterator[dict[Choice, Any]]:
    """Record all that is chosen inside, whether or not it was before; forced tiles are none of
    it."""
    global _chosen
    before, _chosen = _chosen, {}
    found: dict[Choice, Any] = {}
    try:
        yield found
    finally:
        found.update({Choice(*key): tiles for key, tiles in _chosen.items()})
        _chosen = before | _chosen


@contextlib.contextmanager
def using(op: str, tiles: NamedTuple) -> Iterator[None]:
    """Force the tiles of an op, for the whole process: autograd's threads launch kernels too."""
    before = _forced.get(op)
    _forced[op] = tiles
    try:
        yield
    finally:
        if before is None:
            del _forced[op]
        else:
            _forced[op] = before


def architecture(device: torch.device) -> str:
    """Return ``sm_90`` and the like; ``interpreter`` for a CPU."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return "interpreter" if device.type == "cpu" else device.type


# ---------------------------------------------------------------------------------------------
# Tables


def folder() -> Path:
    """Return where measured choices are kept: ``$FUSED_DNI_CACHE``, or ``fused_dni`` under the
    user's cache."""
    own = os.environ.get("FUSED_DNI_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_dni"


def remember(choice: Choice, tiles: NamedTuple) -> Path:
    """Choose ``tiles`` from now on, in this process and in later ones; returns the table's path.

    Entries of other processes are kept: the table is read, changed and replaced under a lock.

    Raises:
        OSError: the table cannot be written. The choice holds in this process all the same.
    """
    entry = choice.entry()
    _read_tables()[0][entry] = tiles._asdict()
    for key in list(_chosen):  # at once: other threads choose meanwhile
        if key[0] == choice.op:
            _chosen.pop(key, None)

    path = folder() / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table = _read(path)
        table[entry] = tiles._asdict()
        text = json.dumps({"format": FORMAT, "choices": table}, indent=1, sort_keys=True)
        partial = path.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(path)  # whoever reads sees the old table or the new one
    return path


def _measured(choice: Choice, like: T) -> T | None:
    """Return the entry for a choice, of the first table that has a usable one."""
    rounded = tuple([1 << max(size - 1, 0).bit_length() for size in choice.shape])
    for table in _read_tables():
        for wanted in (choice, choice._replace(shape=rounded)):
            tiles = _tiles(table.get(wanted.entry()), like)
            if tiles is not None:
                return tiles
    return None


def _tiles(fields: Any, like: T) -> T | None:
    """Read fields of a table as the type of ``like``; None if they are others."""
    usual = like._asdict()
    if not isinstance(fields, dict) or fields.keys() != usual.keys():
        return None
    if any(type(fields[name]) is not type(value) for name, value in usual.items()):
        return None
    return like._replace(**fields)


def _read_tables() -> list[_Table]:
    global _tables
    if _tables is None:
        _tables = [_read(folder() / _FILE), _read(_SHIPPED)]
    return _tables


def _read(path: Path) -> _Table:
    """Read a table's choices; none if it is missing, damaged or of another format."""
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        return {}
    choices = held.get("choices")
    return choices if isinstance(choices, dict) else {}
