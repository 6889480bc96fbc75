"""Whether a call may reach a backend by the address of its tensors, or goes PyTorch's way.

Kernels read memory. A tensor that has none of its own (fake, functional, wrapped by a subclass) and
a call that somebody watches or records (``torch.compile``, ``torch.export``, ``torch.jit.trace``,
a dispatch mode, as that of ``FlopCounterMode``) go through the ops registered with
``torch.library``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from fused_dni.ops import flops

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN = (Tensor, nn.Parameter)
# Looked up once: these are asked in every op of every step.
_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_transforms = torch._C._are_functorch_transforms_active


def direct(t: Tensor) -> bool:
    """Say whether an op may hand the address of ``t`` to its backend.

    Else the call is watched or recorded, or ``t`` is no memory, or not all that it means (it stands
    for zeros or for a negation): the registered op sees to that.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    if _modes():
        flops.show_to_counters()
        return False
    return (
        type(t) in _PLAIN
        and _tracing_state() is None
        and not (t.is_meta or t._is_zerotensor() or t.is_neg() or _transforms())
    )


def constant_when_traced(function: Callable[P, R]) -> Callable[P, R]:
    """Have a trace call ``function`` once and keep its result, as a constant of the graph.

    ``torch.compiler.assume_constant_result`` sets this very mark, but imports torch._dynamo and
    sympy to do so: seconds that whoever never compiles would wait for.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
