"""``annotate``: ranges named after layer and phase, for profilers.

Off, nothing of this exists: no method of a layer is touched. On, the methods that make up a
training step are wrapped, class by class, and put back afterwards. A range is ``blocks.3: step``:

==================  ==========================================================================
``forward``         the layer's whole forward; what the schedule said for this step behind it in
                    brackets, unless it is a step with targets
``step``            in it, the update from the layer's own prediction: forward, prediction and
                    update, one launch where kernels are fused
``predict``         the synthesizer alone, where it is not part of a step
``backward``        the layer's node in the backward
``local backward``  in it, the gradients of the layer's parameters from the gradient at h
``learn``           the synthesizer's training
``update``          the update rule, where it waits for the end of the backward
==================  ==========================================================================

``schedule: ...`` is a mark between two training steps that says what the next one is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fused_dni.functional.node import Node
from fused_dni.modules.base import DecoupledModule, Phase
from fused_dni.modules.sequential import DecoupledSequential
from fused_dni.schedule import Schedule

#: Set to 1, it turns annotation on for a whole process, before its first line: how ``fused-dni
#: profile`` reaches the command that it runs.
VARIABLE = "FUSED_DNI_ANNOTATE"

#: Methods of layers and the phase that each is.
PHASES = {
    "forward": "forward",
    "step_locally": "step",
    "predict": "predict",
    "close": "local backward",
    "regression_gradients": "learn",
    "learn": "learn",
    "head_learns_from": "learn",
    "apply_update": "update",
}

C = TypeVar("C")


class _Open(threading.local):
    """This thread's open ranges, the innermost last, and the layers whose forwards these are."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.layers: list[str] = []


_open = _Open()
_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_seen: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()
_lock = threading.Lock()
_users = 0
_undo: list[Callable[[], None]] = []


@contextmanager
def annotate(model: nn.Module | None = None) -> Iterator[None]:
    """Open ranges for whatever decoupled layers do inside the ``with`` block.

    They are ranges of ``torch.profiler`` while it records and on machines without CUDA, else of
    NVTX. Uses may be nested. What ``torch.compile`` made has no ranges inside.

    Args:
        model: layers are named as in its ``named_modules()``. Without it, as in the outermost
            module that is called.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a model without decoupled layers.
    """
    if not isinstance(model, nn.Module | None):
        raise TypeError(f"model must be an nn.Module or None, got {type(model).__name__}")
    if model is not None and not any(isinstance(m, DecoupledModule) for m in model.modules()):
        raise ValueError("model has no decoupled layers (see fused_dni.convert)")
    _on()
    hook = None
    try:
        if model is not None:
            _name(model)
        else:
            hook = register_module_forward_pre_hook(_name_at_first_call)
        yield
    finally:
        if hook is not None:
            hook.remove()
        _off()


def from_environment() -> None:
    """Turn annotation on for the whole process if ``FUSED_DNI_ANNOTATE`` says so."""
    if os.environ.get(VARIABLE, "0") not in ("", "0"):
        _on()
        register_module_forward_pre_hook(_name_at_first_call)


# ---------------------------------------------------------------------------------- on and off


def _on() -> None:
    global _users
    with _lock:
        _users += 1
        if _users > 1:
            return
        for layer in (*_subclasses(DecoupledModule), DecoupledSequential):
            for method, phase in PHASES.items():
                if method in vars(layer):
                    _replace(layer, method, _in_range(vars(layer)[method], phase))
        for node in _subclasses(Node)[1:]:
            if "forward" in vars(node):
                _replace(node, "forward", staticmethod(_owned(node.forward)))
            if "backward" in vars(node):
                _replace(node, "backward", staticmethod(_in_owners_range(node.backward)))
        _replace(Schedule, "step", _marked(Schedule.step))


def _off() -> None:
    global _users
    with _lock:
        _users -= 1
        if not _users:
            while _undo:
                _undo.pop()()
            _names.clear()
            _seen.clear()


def _replace(owner: type, name: str, new: Any) -> None:
    old = vars(owner)[name]
    setattr(owner, name, new)
    _undo.append(lambda: setattr(owner, name, old))


def _subclasses(cls: type[C]) -> list[type[C]]:
    """Return a class and all that is derived from it, each once."""
    found = {cls: None}
    for derived in cls.__subclasses__():
        found.update(dict.fromkeys(_subclasses(derived)))
    return list(found)


# --------------------------------------------------------------------------------------- names


def _name_at_first_call(module: nn.Module, _: Any) -> None:
    """Name the layers as in the outermost module, which is called first."""
    if not torch.compiler.is_compiling() and module not in _seen:
        _name(module, again=False)


def _name(root: nn.Module, *, again: bool = True) -> None:
    for path, module in root.named_modules():
        if again or module not in _seen:
            _seen[module] = None
            if isinstance(module, DecoupledModule | DecoupledSequential):
                _names[module] = path or type(module).__name__


# -------------------------------------------------------------------------------------- ranges


@contextmanager
def _range(label: str) -> Iterator[None]:
    """Open a range, unless it is the innermost already (a method that calls the one it
    overrides)."""
    labels = _open.labels
    if labels and labels[-1] == label:
        yield
        return
    labels.append(label)
    try:
        with _emitted(label):
            yield
    finally:
        labels.pop()


def _emitted(label: str) -> AbstractContextManager[Any]:
    if torch.autograd.profiler._is_profiler_enabled or not torch.cuda.is_available():
        return torch.profiler.record_function(label)
    return torch.cuda.nvtx.range(label)


def _in_range(method: Callable[..., Any], phase: str) -> Callable[..., Any]:
    """Put a layer's method into a range of its own."""

    @wraps(method)
    def annotated(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        name = _names.get(self, type(self).__name__)
        if phase != "forward":
            with _range(f"{name}: {phase}"):
                return method(self, *args, **kwargs)
        said = _said(self.phase) if isinstance(self, DecoupledModule) and self.training else None
        _open.layers.append(name)
        try:
            with _range(f"{name}: forward [{said}]" if said else f"{name}: forward"):
                return method(self, *args, **kwargs)
        finally:
            _open.layers.pop()

    return annotated


def _owned(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Have a node's forward note whose it is: the layer whose forward is running."""

    @wraps(forward)
    def annotated(ctx: Any, *args: Any) -> Any:
        if not torch.compiler.is_compiling() and _open.layers:
            ctx.fused_dni_layer = _open.layers[-1]
        return forward(ctx, *args)

    return annotated


def _in_owners_range(backward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(backward)
    def annotated(ctx: Any, *grads: Any) -> Any:
        name = None if torch.compiler.is_compiling() else getattr(ctx, "fused_dni_layer", None)
        with nullcontext() if name is None else _range(f"{name}: backward"):
            return backward(ctx, *grads)

    return annotated


def _marked(step: Callable[[Schedule], None]) -> Callable[[Schedule], None]:
    @wraps(step)
    def annotated(self: Schedule) -> None:
        step(self)
        with _emitted(f"schedule: {_said(self.phase()) or 'with targets'}"):
            pass

    return annotated


def _said(phase: Phase) -> str | None:
    """Say what the schedule said, None for an ordinary step with targets."""
    if phase.probe is not None:
        return "probing"
    if phase.warmup:
        return "warm-up"
    if not phase.target:
        return "no targets"
    return "mixing" if phase.mix else None
