"""Which backend serves a call.

Backends are listed here in order of preference and imported when first asked for, so that a
backend whose extension was not built is a reason in a list and not an error. The outcome of a
search is remembered by dtype and device; asking again costs a dictionary look-up.
"""

from __future__ import annotations

import importlib
from typing import cast

import torch
from torch import Tensor

from fused_dni.backends.base import Backend

# Name: (module, class), most preferred first.
_KNOWN: dict[str, tuple[str, str]] = {
    "cpu": ("fused_dni.backends.cpu", "CpuBackend"),
    "cuda": ("fused_dni.backends.cuda", "CudaBackend"),
    "triton": ("fused_dni.backends.triton", "TritonBackend"),
    "reference": ("fused_dni.reference", "ReferenceBackend"),
}

_loaded: dict[str, Backend | str] = {}  # a backend, or why it cannot be had
_resolved: dict[tuple[str | None, torch.dtype, torch.dtype, torch.device], Backend] = {}


def names() -> tuple[str, ...]:
    """All backends' names, most preferred first, whether or not they can run here."""
    return tuple(_KNOWN)


def _load(name: str) -> Backend | str:
    """The backend, or the reason why it cannot run on this machine. Asked once a process."""
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


def _check(name: str) -> None:
    if name not in _KNOWN:
        allowed = ", ".join(repr(n) for n in _KNOWN)
        raise ValueError(f"unknown backend {name!r}: choose one of {allowed}, or None for the best")


def get(name: str) -> Backend:
    """The backend of that name.

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


def resolve(name: str | None, x: Tensor, weight: Tensor) -> Backend:
    """The backend that serves these tensors: the one named, or the first that can.

    Args:
        name: a backend's name, or None for the most preferred one that can serve.
        x: [N, I], the layer's input.
        weight: [O, I], on x's device.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend cannot serve (there is no silent fallback), or none can;
            the message gives the reasons.
    """
    key = (name, x.dtype, weight.dtype, x.device)
    found = _resolved.get(key)
    if found is None:
        found = _resolved[key] = _search(name, x, weight)
    return found


def _search(name: str | None, x: Tensor, weight: Tensor) -> Backend:
    if name is not None:
        backend = get(name)
        reason = backend.why_not(x, weight)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot serve this call: it {reason}")
        return backend
    reasons = []
    for candidate in _KNOWN:
        loaded = _load(candidate)
        why = loaded if isinstance(loaded, str) else loaded.why_not(x, weight)
        if why is None:
            assert not isinstance(loaded, str)
            return loaded
        reasons.append(f"{candidate} {why}")
    raise RuntimeError("no backend can serve this call: " + "; ".join(reasons))
