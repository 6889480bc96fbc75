"""Triton's interpreter, told not to do the same thing again and again.

It derives the types and shapes of every value of every operation anew, and patches the language
for every launch and every call of a device function. Nothing of that depends on numbers: what is
kept here is what the interpreter's own functions made of the same arguments before. It takes half
of the time without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class _PatchOnce:
    """Patches the language for the first function of a module, and leaves it so."""

    def __init__(self, patch: Callable[..., Any]) -> None:
        self.patch: Callable[..., Any] = patch
        self.modules: set[str] = set()

    def __call__(self, function: Any) -> Any:
        module = function.__globals__["__name__"]
        if module not in self.modules:
            self.modules.add(module)
            self.patch(function)
        return self

    def restore(self) -> None:
        pass


def _types_once() -> None:
    make = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def np_dtype(of: Any) -> Any:
        name = of.scalar.name  # a block's is that of its elements
        if name not in known:
            known[name] = make(of)
        return known[name]

    interpreter._get_np_dtype = np_dtype


def _shapes_once() -> None:
    block, tensor = tl.core.block_type, tl.core.tensor
    make_block, make_tensor = block.__init__, tensor.__init__
    blocks: dict[Any, Any] = {}
    tensors: dict[Any, Any] = {}
    plain = tl.core._unwrap_if_constexpr

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([s if type(s) is int else plain(s) for s in shape])
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = (self.shape, self.numel, str(self.shape))
        self.element_ty = element_ty
        self.shape, self.numel, said = blocks[key]
        self.name = f"<{said}, {element_ty}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in tensors:
            make_tensor(self, handle, type)
            tensors[key] = (self.shape, self.numel)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[key]

    block.__init__ = init_block
    tensor.__init__ = init_tensor


def quicken() -> None:
    """For all interpreted kernels of this process from now on."""
    interpreter._patch_lang = _PatchOnce(interpreter._patch_lang)
    _types_once()
    _shapes_once()
    # As compiled kernels: no check of every sum of integers, and infinities without a warning.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    np.seterr(over="ignore", invalid="ignore")
