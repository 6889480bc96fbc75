"""Optimizers of ``torch.optim`` that were given parameters which fused rules update.

Such a parameter has no ``.grad``, so the optimizer passes it by in silence: its rates, decays and
schedulers reach nothing. Who steps is seen in the first training step, by PyTorch's own hook for
all optimizers, and said once; then nothing looks any more.
"""

from __future__ import annotations

import warnings
import weakref
from functools import partial
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from fused_dni.modules.base import DecoupledModule

_said: WeakSet[Any] = WeakSet()


class OptimizerWatch:
    """Look at the optimizers that step in the first training step; nothing in a copied or unpickled
    owner.

    Args:
        owner: by whose steps training goes, a ``Schedule`` or a ``FusedOptimizer``.
        model: whose layers' rules count.
        steps: of the owner's, through which to look; or until it is gone.
    """

    def __init__(self, owner: Any, model: nn.Module, steps: int) -> None:
        self._left = steps
        ruled: Any = WeakIdKeyDictionary()
        for name, module in model.named_modules():
            if not isinstance(module, DecoupledModule):
                continue
            for part, _, slots in module.rules():
                where = ".".join(n for n in (name, part) if n) or type(module).__name__
                ruled.update({p: where for p in slots if p is not None})
        handle = register_optimizer_step_pre_hook(partial(_look, ruled))
        self._stop = weakref.finalize(owner, handle.remove)
        self._stop.atexit = False

    def step(self) -> bool:
        """Count a step of the owner's; whether that was the last to look through."""
        self._left -= 1
        if self._left > 0:
            return False
        self._stop()
        return True

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _look(ruled: Any, optimizer: Any, _args: Any, _kwargs: Any) -> None:
    if getattr(optimizer, "shows_rules", False) or optimizer in _said:
        return
    held: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    found = [p for p in held if p in ruled]
    if not found:
        return
    _said.add(optimizer)
    warnings.warn(
        f"{type(optimizer).__name__} was given {len(found)} parameters (of {len(held)}) of layers "
        f"that update themselves by a fused rule (update=...), as {ruled[found[0]]!r}: it never "
        "moves them, and its rates and schedulers do not reach them. Give it "
        "fused_dni.ordinary_parameters(model), if there are any, and take "
        "fused_dni.FusedOptimizer(model) for schedulers and checkpoints of the rules",
        stacklevel=4,
    )
