"""Which backend serves a call.

Backends are listed here in order of preference and imported when first asked for, so that a
backend whose extension was not built is a reason in a list and not an error. On a GPU, where
several serve, a measured table decides by op and sizes which is asked first
(:mod:`fused_dni.ops.measured`). The outcome of a search is remembered by dtype and device, and
there by op and sizes; asking again costs a dictionary look-up.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
from torch import Tensor

from fused_dni.ops import measured
from fused_dni.ops.tracing import constant_when_traced
from fused_dni.ops.types import Backend

# Name: (module, class), most preferred first.
_KNOWN: dict[str, tuple[str, str]] = {
    "cpu": ("fused_dni.backends.cpu", "CpuBackend"),
    "cuda": ("fused_dni.backends.cuda.backend", "CudaBackend"),
    "triton": ("fused_dni.backends.triton.backend", "TritonBackend"),
    "reference": ("fused_dni.backends.reference", "ReferenceBackend"),
}

_loaded: dict[str, Backend | str] = {}  # a backend, or why it cannot be had
_resolved: dict[tuple[Any, ...], Backend] = {}  # by all that the search depends on

# The type of the devices on which sizes decide.
_MEASURED = "cuda"


def names() -> tuple[str, ...]:
    """Return all backends' names, most preferred first, whether or not they can run here."""
    return tuple(_KNOWN)


def _load(name: str) -> Backend | str:
    """Return the backend, or the reason why it cannot run on this machine. Asked once a process."""
    try:
        return _loaded[name]
    except KeyError:
        pass
    module, cls = _KNOWN[name]
    found: Backend | str
    try:
        backend = cast(Backend, getattr(importlib.import_module(module), cls)())
        found = backend.available() or backend
    except ImportError as error:
        found = f"cannot be imported: {error}"
    return _loaded.setdefault(name, found)


@constant_when_traced
def _load_all() -> bool:
    """Load every backend: a trace can call what imports, but cannot follow it."""
    for name in _KNOWN:
        _load(name)
    return True


def _check(name: str) -> None:
    if name not in _KNOWN:
        allowed = ", ".join(repr(n) for n in _KNOWN)
        raise ValueError(f"unknown backend {name!r}: choose one of {allowed}, or None for the best")


def get(name: str) -> Backend:
    """Return the backend of that name.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it cannot run on this machine; the message says why.
    """
    _check(name)
    found = _load(name)
    if isinstance(found, str):
        raise RuntimeError(f"backend {name!r} is not available: it {found}")
    return found


def report() -> list[tuple[str, str | None]]:
    """For each backend, most preferred first: its name, and None or why it cannot run here."""
    return [(name, found if isinstance(found := _load(name), str) else None) for name in _KNOWN]


def forget() -> None:
    """Search anew from now on: something was measured. Compiled graphs stay as they are."""
    _resolved.clear()


def resolve(name: str | None, x: Tensor, weight: Tensor, op: str = "linear") -> Backend:
    """Return the backend that serves these tensors: the one named, or the first that can.

    Args:
        name: a backend's name, or None for the one that was measured to be the fastest for these
            sizes (on a GPU), or the most preferred, of those that can serve.
        x: [..., I], the layer's input, or rows of its output; [T, B, I] of an LSTM's window.
        weight: [O, I], or [4 * H, I] of an LSTM, on x's device.
        op: "linear" or "lstm": what sizes mean, and whose measurements count.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend cannot serve (there is no silent fallback), or none can;
            the message gives the reasons.
    """
    key: tuple[Any, ...] = (name, x.dtype, weight.dtype, x.device)
    sized = name is None and x.device.type == _MEASURED
    if sized:
        sizes = measured.sizes(op, x, weight)
        key = (*key, op, sizes, x.dtype == torch.float32 and measured.tf32())
    tracing = torch.compiler.is_compiling()  # a graph would be guarded by what is remembered
    if tracing:
        _load_all()
    found = None if tracing else _resolved.get(key)
    if found is None:
        first = measured.order(op, sizes, x.dtype, x.device) if sized else ()
        found = _search(name, x, weight, first)
        if not tracing:
            _resolved[key] = found
    return found


def _search(name: str | None, x: Tensor, weight: Tensor, first: tuple[str, ...]) -> Backend:
    if name is not None:
        backend = get(name)
        reason = backend.why_not(x, weight)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot serve this call: it {reason}")
        return backend
    reasons = []
    preferred = [known for known in first if known in _KNOWN]
    for candidate in (*preferred, *(known for known in _KNOWN if known not in preferred)):
        loaded = _load(candidate)
        why = loaded if isinstance(loaded, str) else loaded.why_not(x, weight)
        if why is None:
            assert not isinstance(loaded, str)
            return loaded
        reasons.append(f"{candidate} {why}")
    raise RuntimeError("no backend can serve this call: " + "; ".join(reasons))
