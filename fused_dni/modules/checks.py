"""What a step that was looked up once depends on, as a list of checks.

Around a kernel Python asks some dozens of questions: are the parameters still those, is autocast
on, did a gradient come by another way? A backend that can ask them itself is given this list
(:data:`fused_dni.ops.types.Check`); while all hold, what was looked up is good.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel

from fused_dni.modules import nodes
from fused_dni.ops.types import Check
from fused_dni.rules import RuleState

# What surrounds a forward, and a backward and its end too: who looks at the ops gets them.
ALWAYS: tuple[Check, ...] = (
    ("state", torch._C._len_torch_dispatch_stack, None, None, 0),
    ("state", torch._C._are_functorch_transforms_active, None, None, False),
)
# What surrounds a forward, under autocast too.
ANYWHERE: tuple[Check, ...] = (
    ("state", torch.is_grad_enabled, None, None, True),
    ("state", torch._C._get_tracing_state, None, None, None),
    ("state", torch._C._current_graph_task_id, None, None, -1),
    (
        "state",
        partial(torch._C._autograd._top_saved_tensors_default_hooks, True),
        None,
        None,
        None,
    ),
    ("attribute", DistributedDataParallel, "_active_ddp_module", None, None),
    ("item", vars(forward_ad), "_current_level", None, -1),
    ("empty", nodes.watchers(), "watching", None, None),
)
SURROUNDINGS: tuple[Check, ...] = (
    *ANYWHERE,
    ("state", partial(torch.is_autocast_enabled, "cpu"), None, None, False),
)

# What a module's call runs beside its forward.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def items(of: Mapping[str, Any], *names: str) -> list[Check]:
    return [("item", of, name, None, of[name]) for name in names]


def holder(module: nn.Module, *kinds: str) -> list[Check]:
    """List what a module holds: the dictionaries and all that is in them."""
    own = module.__dict__
    found = [*items(own, *kinds), ("attribute", module, "__class__", None, type(module))]
    for kind in kinds:
        found += items(own[kind], *own[kind])
    return found


def uncalled(module: nn.Module) -> list[Check]:
    """Require that calling the module would run its class's forward and nothing else."""
    own = module.__dict__
    return [
        *[("empty", own[name], name, None, None) for name in HOOKS],
        ("absent", own, "forward", None, None),
        ("attribute", type(module), "forward", None, type(module).forward),
        ("attribute", module, "_compiled_call_impl", None, None),
    ]


def rule_checks(rule: RuleState) -> list[Check]:
    """Require that a rule has nothing to write anew but its rate, and no gradient came by another
    way to what it updates."""
    own = rule.__dict__
    found = [
        *items(own, "_tensors", "group"),
        *items(rule.group, *[name for name in rule._names if name != "lr"]),
    ]
    found += items(own, "bound") if "bound" in own else [("absent", own, "bound", None, None)]
    found += [("attribute", p, "grad", None, None) for p in rule.bound if p is not None]
    moments = () if rule._tensors is None else (*rule._tensors.first, *rule._tensors.second)
    return found + memory([rule.hyper, *moments])


def fixed(rule: RuleState) -> bool:
    """Say whether the hyper-parameters are numbers, of which none is filled in place, and the
    moments plain memory."""
    if any(t is not None and type(t) is not Tensor for held in rule.moments() for t in held):
        return False
    return not any(isinstance(rule.group[name], Tensor) for name in rule._names if name != "lr")


def memory(tensors: Iterable[Tensor | None]) -> list[Check]:
    """Require that tensors lie where they lay, as large and of the same type."""
    found: list[Check] = []
    for t in tensors:
        if t is not None:
            found.append(("memory", t, "data_ptr", None, None))
    return found


def addresses(tensors: Sequence[Tensor | None]) -> list[Check]:
    """Require the same of parameters and buffers, and that they are trained or not as before."""
    asked: list[Check] = [
        ("attribute", t, "requires_grad", None, t.requires_grad) for t in tensors if t is not None
    ]
    return memory(tensors) + asked
