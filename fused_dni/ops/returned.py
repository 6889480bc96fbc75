"""Which states an LSTM returned, by their memory.

A state that comes back is known by what was handed out, never by what its autograd graph or its
Python object looks like: it is the memory that was returned, unchanged since, as a whole or some
rows in order; or, where it is a copy, equal as a whole, h and c, to the last state that was
returned. Everything else is not known.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# Tensors made in inference mode do not say whether they were changed in place, and count as not.
_NO_VERSION = -1

# How many records a registry may hold before it looks for those whose states are gone.
_RECORDS = 64


class Found(NamedTuple):
    """What was noted of a state, and which of its rows were given (None: all)."""

    noted: Any
    rows: slice | None = None


class _Record:
    """A state that was returned. Weak references to its memory, as ``StorageWeakRef`` holds them,
    keep the addresses from being used again; whoever drops a record frees them."""

    __slots__ = ("c", "c_version", "h", "h_version", "layout", "noted")

    h: int
    c: int
    h_version: int
    c_version: int
    # dtype, shape, strides and offsets of h and c
    layout: tuple[Any, ...]
    noted: Any


class Returned:
    """The states [..., B, H] that one owner returned, for as long as they live."""

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}
        self._most = _RECORDS
        self._last: tuple[Tensor, Tensor, _Record] | None = None
        # Whether something was ever noted with a state.
        self.marked = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the last state alone: copies of it are known."""
        if self._last is None or not _unchanged(*self._last):
            return Returned, ()
        h, c, record = self._last
        return _restored, (h, c, record.noted)

    def __deepcopy__(self, memo: dict[int, Any]) -> Returned:
        """Know the copies that the same ``deepcopy`` makes of the last state."""
        made = Returned()
        made.marked = self.marked
        if self._last is not None and _unchanged(*self._last):
            h, c, record = self._last
            # As torch copies a tensor: a storage that was copied before is used again.
            copies = [t.__deepcopy__(memo) for t in (h, c)]
            noted = record.noted
            if noted is not None:
                fields = [None if t is None else t.clone() for t in noted]
                noted = type(noted)(*fields)
            made.note(copies[0], copies[1], noted)
        return made

    def __del__(self, free: Any = torch.UntypedStorage._free_weak_ref) -> None:
        # Named as a default, for the interpreter's end, where the module's names are gone first.
        for record in self._records.values():
            free(record.h)
            free(record.c)

    def note(self, h: Tensor, c: Tensor, noted: Any = None) -> None:
        """Remember a state that is being returned, and what belongs to it."""
        record = _Record()
        references: Any = h.untyped_storage()._weak_ref(), c.untyped_storage()._weak_ref()
        record.h, record.c = references
        h, c = h.detach(), c.detach()
        try:
            record.h_version, record.c_version = h._version, c._version
        except RuntimeError:  # made in inference mode
            record.h_version = record.c_version = _NO_VERSION
        record.layout = _layout(h, c)
        record.noted = noted
        if noted is not None:
            self.marked = True
        records = self._records
        if len(records) >= self._most:
            for key, old in list(records.items()):
                if torch.UntypedStorage._expired(old.h):
                    _free(records.pop(key, None))
            self._most = max(_RECORDS, 2 * len(records))
        if record.h in records:
            _free(records.pop(record.h, None))
        records[record.h] = record
        self._last = h, c, record

    def changed(self, h: Tensor) -> bool:
        """Say whether this memory was returned, and changed in place since."""
        record = self._records.get(h.untyped_storage()._cdata)
        return record is not None and _changed(h, record.h, record.h_version)

    def recall(self, h: Tensor, c: Tensor) -> Found | None:
        """Find a state by its memory; None if it is not known."""
        record = self._records.get(h.untyped_storage()._cdata)
        if record is None or c.untyped_storage()._cdata != record.c or not _unchanged(h, c, record):
            return None
        if _layout(h, c) == record.layout:
            return Found(record.noted)
        return _some_rows(h, c, record)

    def recall_copy(self, h: Tensor, c: Tensor) -> Found | None:
        """Find a state that is equal, as a whole, to the last one; None if it is not known.

        Waits for the device; while a CUDA graph is captured nothing is known.
        """
        if self._last is None:
            return None
        last_h, last_c, record = self._last
        if (
            h.shape != last_h.shape
            or c.shape != last_c.shape
            or h.dtype is not last_h.dtype
            or h.device != last_h.device
            or h.device.type == "meta"
            or not _unchanged(*self._last)
            or _changed(h, record.h, record.h_version)
            or _changed(c, record.c, record.c_version)
            or (h.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            return None
        same = torch.equal(h, last_h) and torch.equal(c, last_c)
        return Found(record.noted) if same else None

    def last_ended(self) -> tuple[Tensor, Tensor] | None:
        """Return h of the last state and its rows that ended, if any were noted."""
        if self._last is None:
            return None
        ended = getattr(self._last[2].noted, "ended", None)
        return None if ended is None else (self._last[0], ended)


def _restored(h: Tensor, c: Tensor, noted: Any) -> Returned:
    made = Returned()
    made.note(h, c, noted)
    return made


def _free(record: _Record | None) -> None:
    if record is None:  # another thread was first
        return
    torch.UntypedStorage._free_weak_ref(record.h)
    torch.UntypedStorage._free_weak_ref(record.c)


def _unchanged(h: Tensor, c: Tensor, record: _Record) -> bool:
    try:
        return h._version == record.h_version and c._version == record.c_version
    except RuntimeError:
        return _version(h) == record.h_version and _version(c) == record.c_version


def _version(t: Tensor) -> int:
    """Return how often a tensor was changed in place, as far as that is known."""
    return _NO_VERSION if t.is_inference() else t._version


def _layout(h: Tensor, c: Tensor) -> tuple[Any, ...]:
    """Say how a state lies in its memory."""
    return (h.dtype, h.shape, h.stride(), h.storage_offset(), c.stride(), c.storage_offset())


def _changed(t: Tensor, memory: int, version: int) -> bool:
    """Say whether this is that memory and was changed in place."""
    same: bool = t.untyped_storage()._cdata == memory
    return same and _version(t) != version


def _some_rows(h: Tensor, c: Tensor, record: _Record) -> Found | None:
    """Rows of a state in order, as a slice of its memory."""
    dtype, shape, h_stride, h_offset, c_stride, c_offset = record.layout
    if h.dtype is not dtype or c.dtype is not dtype:
        return None
    rows = _rows(h, shape, h_stride, h_offset)
    if rows is None or rows != _rows(c, shape, c_stride, c_offset):
        return None
    return Found(record.noted, rows)


def _rows(t: Tensor, shape: torch.Size, stride: tuple[int, ...], offset: int) -> slice | None:
    if t.dim() != len(shape):
        return None
    batch = len(shape) - 2
    for i, (size, step) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if i != batch and (size != shape[i] or (size > 1 and step != stride[i])):
            return None
    row, count = stride[batch], t.shape[batch]
    ahead = t.storage_offset() - offset
    if not row or not count or ahead < 0 or ahead % row:
        return None
    first = ahead // row
    step = 1 if count == 1 else t.stride(batch) // row
    last = first + (count - 1) * step
    if step < 1 or (count > 1 and t.stride(batch) % row) or last >= shape[batch]:
        return None
    return slice(first, last + 1, step)


# ---------------------------------------------------------------------------------------------
# Compiled code: what lstm_forward returns there is noted when it runs

# By the memory of the first layer's weight, the module's own as far as an op can tell.
_by_weight: OrderedDict[tuple[Any, Any], tuple[StorageWeakRef, Returned]] = OrderedDict()


def by_weight(weight: Tensor) -> Returned | None:
    """Return the states that compiled code returned of the LSTM with this weight; None for none."""
    if not _by_weight:
        return None
    found = _by_weight.get((weight.untyped_storage()._cdata, weight.storage_offset()))
    return None if found is None else found[1]


def note_by_weight(weight: Tensor, h: Tensor, c: Tensor) -> None:
    """Remember a state that compiled code returns of the LSTM with this weight."""
    found = by_weight(weight)
    if found is None:
        reference = StorageWeakRef(weight.untyped_storage())
        found = Returned()
        _by_weight[reference.cdata, weight.storage_offset()] = reference, found
        while len(_by_weight) > _RECORDS:
            _by_weight.popitem(last=False)
    found.note(h, c)


@torch.library.custom_op("fused_dni::lstm_returned_rows", mutates_args=())
def _lstm_returned_rows(h: Tensor, c: Tensor, weight: Tensor, cut: bool) -> Tensor:
    own = h.new_zeros(h.shape[-2], dtype=torch.bool)
    registry = by_weight(weight)
    if registry is None:
        return own
    if cut and registry.changed(h):
        raise RuntimeError(
            "hx was changed in place since it was returned, and compiled code cannot tell whether "
            "another tensor asks for its gradient there: make a new tensor of it, or detach() it"
        )
    found = registry.recall(h, c) or registry.recall_copy(h, c)
    return own if found is None else own.fill_(True)


@_lstm_returned_rows.register_fake
def _(h, c, weight, cut):  # type: ignore[no-untyped-def]
    return h.new_empty(h.shape[-2], dtype=torch.bool)


def lstm_returned_rows(h: Tensor, c: Tensor, weight: Tensor, cut: bool) -> Tensor:
    """Say which rows of a state [L, B, H] the LSTM with this weight returned, for traced code.

    Args:
        h, c: the state. weight: of the first layer.
        cut: the state asked for its gradient and is cut: an error if it was changed in place.

    Returns:
        bool [B].
    """
    made: Tensor = _lstm_returned_rows(h, c, weight, cut)
    return made
