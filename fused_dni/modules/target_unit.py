"""The unit in which a synthesizer predicts, so that the loss may have any scale.

A target is ``kappa * dL/dh``, and kappa (the rows of a batch) knows nothing of the loss: of a sum,
a reward or a perceptual loss it makes targets of 1e-5 or 1e5, which no learning rate fits. So each
synthesizer learns ``kappa * dL/dh / unit``, where the unit follows the size of what arrives.

It is a power of two, so that a division by it rounds nothing. A synthesizer that was never taught
predicts zero (but for a surrogate, whose size is set with it), and is given its unit in its first
lesson: the norm of what it learns (root mean square over rows) becomes about ``MOVED_TO``. It stays
where it is while that norm lies within ``NORMS``: above them, what Adam adds in a step is too
little; below, too much. When it moves, the synthesizer's last layer, its gradients and the moments
of its rule move with it: what is predicted stays the same to the bit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parallel import DistributedDataParallel

from fused_dni.rules import RuleState, gathered
from fused_dni.synthesizers import SurrogateSynthesizer, Synthesizer, TargetUnit

# Of 1/16, 1/8, 1/4 and 1/2 (with limits in proportion) the third was best for networks of three
# and six layers on MNIST that are told the label, rates of 1e-3, and second for those that are not.
NORMS = 2.0**-5, 1.0
MOVED_TO = 0.25
# The unit is looked at in the first lesson of a synthesizer that predicts zero, in the 8th, the
# 16th, the 32nd, and from here on in every so-manieth: on a GPU that waits for the device.
EARLIEST, INTERVAL = 8, 64
# Float32 has room for the squares.
LARGEST = 2.0**60

# By module, the processes that hold replicas of it in its present forward.
_replicas: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def note_replicas(module: nn.Module) -> None:
    """Remember in a forward whether it is one of ``DistributedDataParallel``: the replicas of a
    synthesizer have one unit."""
    active = DistributedDataParallel._active_ddp_module
    if active is not None:
        _replicas[module] = active.process_group
    elif _replicas:
        _replicas.pop(module, None)


def replicas(module: nn.Module) -> Any:
    """Return the processes that held replicas of it in its last forward; None for none."""
    return _replicas.get(module)


def due(regressions: int) -> bool:
    """Say whether the unit is to be looked at in this lesson, the first being 1."""
    if regressions < EARLIEST:
        return regressions == 1
    return not regressions & (regressions - 1) or not regressions % INTERVAL


def size_for(
    unit: TargetUnit, module: nn.Module, squares: Tensor, untaught: bool
) -> tuple[float, float]:
    """Return the size that a unit should have, and the factor that predictions need.

    Args:
        unit: the present one, this lesson counted.
        squares: float64 [2], sums of squares of targets and predictions, kappa times a gradient
            both, in the mean over rows. The largest of all replicas counts.
        untaught: predictions that are not zero were learned nowhere: in the first lesson they are
            given the targets' size. Otherwise the factor is 1.
    """
    group = replicas(module)
    if group is not None:
        torch.distributed.all_reduce(squares, torch.distributed.ReduceOp.MAX, group)
    target, predicted = squares.tolist()
    size = max(target, predicted) ** 0.5
    if target == 0.0 or not math.isfinite(size):
        unit.lessons -= 1  # nothing was learned: the next lesson is looked at
        return unit.size, 1.0
    factor = 1.0
    if unit.lessons == 1:
        if predicted and not untaught:
            # It has learned elsewhere, and one batch says little against that.
            return unit.size, 1.0
        if predicted:
            size = target**0.5
            factor = size / predicted**0.5
    elif NORMS[0] <= size / unit.size <= NORMS[1]:
        return unit.size, 1.0
    size = 2.0 ** round(math.log2(size / MOVED_TO))
    return min(max(size, 1.0 / LARGEST), LARGEST), factor


def resize(synthesizer: SurrogateSynthesizer, factor: float) -> None:
    """Scale what an untaught synthesizer predicts. A graph that is kept for its lesson sees it."""
    with torch.no_grad(), _unsafe_preserve_version_counter(synthesizer.scale):
        synthesizer.scale.mul_(factor)


def rescale(
    synthesizer: Synthesizer, rule: RuleState | None, slots: Iterable[Tensor | None], factor: float
) -> None:
    """Scale a synthesizer's predictions, and what its training has come to so far.

    With W the last layer's parameters and V all others, gradients go with W as the factor and with
    V, through W and the error, as its square.

    Args:
        rule: whose moments go along; slots: what it works on.
    """
    last = {id(p): p for p in synthesizer.last_layer()}

    def of(p: Tensor) -> float:
        return factor if id(p) in last else factor**2

    with torch.no_grad():
        for p in {**last, **{id(p): p for p in synthesizer.parameters()}}.values():
            if id(p) in last:
                # No graph is to mind: whoever kept p for a backward reads the unit along with it.
                with _unsafe_preserve_version_counter(p):
                    p.mul_(factor)
            if p.grad is not None:
                p.grad.mul_(of(p))
        if rule is not None:
            rule.rescale([1.0 if p is None else of(p) for p in slots])


def refuses(synthesizer: Synthesizer) -> str | None:
    """Say why a synthesizer's last layer cannot be scaled; None if it can."""
    if not synthesizer.last_layer():
        return "its last layer is not known"
    if any(gathered(p) for p in synthesizer.parameters()):
        return "fully_shard gathered its parameters for the time of a forward"
    return None


def warn_of(size: float, why: str) -> None:
    """Warn of targets of another size than a synthesizer can learn."""
    warnings.warn(
        f"the targets of a synthesizer have a norm of about {size:.0e}, where 1 trains well, and "
        f"their unit cannot follow ({why}): give target_scale=, {1.0 / size:.0e} times what the "
        "loss divides by",
        UserWarning,
        stacklevel=2,
    )
