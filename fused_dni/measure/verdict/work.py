"""What a part of a step has to do at least: floating-point operations and bytes moved.

Counted, not computed: the call is made once, and what PyTorch dispatches is watched. So the call
must be made of PyTorch's own operations; kernels of ours are not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Work(NamedTuple):
    """Work of a part.

    Attributes:
        flops: of matrix products, convolutions and attention, a multiply-add being two
            (``torch.utils.flop_counter``); elementwise operations count nothing.
        bytes: that any implementation moves: everything read that was there before, once, and
            everything written that is there afterwards, once. What lives and dies inside is free.
    """

    flops: int
    bytes: int


class _Traffic(TorchDispatchMode):
    """Which storages are read, written and made."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, int] = {}  # bytes by storage that was there before
        self.written: dict[int, int] = {}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        changed = set()
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed |= {_key(t) for t in tree_leaves(value) if isinstance(t, Tensor)}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {_key(t) for t in given}
        view = func._schema.returns and all(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        for tensor in given:
            key = _key(tensor)
            if key not in self.made and not view:
                self.read.setdefault(key, tensor.untyped_storage().nbytes())
                if key in changed:
                    self.written[key] = tensor.untyped_storage().nbytes()
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in known:
                storage = tensor.untyped_storage()
                self.made[_key(tensor)] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self) -> int:
        """Compulsory traffic so far; to be asked while the call's result is still held."""
        left = sum(size for reference, size in self.made.values() if not reference.expired())
        return sum(self.read.values()) + sum(self.written.values()) + left


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def count(call: Callable[[], object]) -> Work:
    """Make the call once and count its work."""
    flops = FlopCounterMode(display=False)
    traffic = _Traffic()
    with flops, traffic:
        result = call()
        moved = traffic.bytes()
    del result
    return Work(int(flops.get_total_flops()), moved)
