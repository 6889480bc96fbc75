"""Update rules that a layer applies to itself where its gradient is made.

A rule (``SGD``, ``Adam``, ``AdamW``) is an immutable description. Each layer turns it into a
:class:`RuleState` of its own: the live hyper-parameters, the moments and the step count. Formulas
and defaults are those of ``torch.optim``; :class:`fused_dni.FusedOptimizer` shows all states of a
model as one ``torch.optim.Optimizer``.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fused_dni.backends.common.precision import accumulator
from fused_dni.functional import check
from fused_dni.ops.types import HYPER_SIZE, SKIPPED, STEP, RuleTensors


@dataclass(frozen=True)
class Rule:
    """Base of the update rules.

    All of them take ``stochastic_rounding``, for a layer whose parameters are bfloat16 themselves:
    new values are rounded up or down at random with the probabilities that make them right in the
    mean, so that small updates are not lost (Gupta et al. 2015, arXiv 1502.02551); moments are
    float32. The random numbers are a function of step, parameter and element: the same training
    gives the same bits. Without it such parameters are refused. float32 parameters with bfloat16
    inputs (autocast) are more precise and need none of this.
    """

    kind: ClassVar[str]
    stochastic_rounding: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check.flags(stochastic_rounding=self.stochastic_rounding)

    def defaults(self) -> dict[str, Any]:
        """Hyper-parameters under the names that ``torch.optim`` gives them in a param group."""
        return {k: v for k, v in asdict(self).items() if k != "stochastic_rounding"}

    def moments(self) -> int:
        """Say how many state tensors of a parameter's shape the rule keeps (0, 1 or 2)."""
        raise NotImplementedError


@dataclass(frozen=True)
class SGD(Rule):
    """Stochastic gradient descent, as ``torch.optim.SGD`` with ``dampening=0``.

    Args:
        lr: learning rate.
        momentum: momentum factor in [0, 1).
        weight_decay: L2 penalty.
        nesterov: Nesterov momentum; needs ``momentum > 0``.
        stochastic_rounding: allow bfloat16 parameters; see :class:`fused_dni.rules.Rule`.

    Raises:
        ValueError: a rate is negative or not finite, or ``nesterov`` without momentum.
    """

    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    kind: ClassVar[str] = "sgd"

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("lr", self.lr)
        check.number("momentum", self.momentum, high=1.0, below=True)
        check.number("weight_decay", self.weight_decay)
        check.flags(nesterov=self.nesterov)
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov=True needs momentum > 0, got momentum=0.0")

    def moments(self) -> int:
        return 1 if self.momentum else 0


@dataclass(frozen=True)
class Adam(Rule):
    """Adam with L2 penalty, as ``torch.optim.Adam`` (Kingma & Ba 2014, arXiv 1412.6980).

    Args:
        lr: learning rate.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: L2 penalty, added to the gradient.
        stochastic_rounding: allow bfloat16 parameters; see :class:`fused_dni.rules.Rule`.

    Raises:
        ValueError: a rate is negative or not finite, or a beta outside [0, 1).
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    kind: ClassVar[str] = "adam"

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("lr", self.lr)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas must be two numbers, (beta1, beta2), got {self.betas!r}")
        for i, beta in enumerate(self.betas):
            check.number(f"betas[{i}]", beta, high=1.0, below=True)
        check.number("eps", self.eps)
        check.number("weight_decay", self.weight_decay)

    def moments(self) -> int:
        return 2


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay, as ``torch.optim.AdamW`` (arXiv 1711.05101).

    Arguments and errors as :class:`Adam`; ``weight_decay`` is 0.01 by default.
    """

    weight_decay: float = 1e-2
    kind: ClassVar[str] = "adamw"


def require_rule(name: str, value: Any) -> None:
    """Refuse what is neither None nor an update rule."""
    if value is not None and not isinstance(value, Rule):
        raise TypeError(
            f"{name} must be None or a fused_dni rule (SGD, Adam, AdamW), got "
            f"{type(value).__name__}"
        )


def _copied(moment: Tensor) -> Tensor:
    """Copy a moment as kernels read it: row by row, whatever its strides were."""
    return moment.clone(memory_format=torch.contiguous_format)


class RuleState:
    """A rule at work on a fixed list of parameter slots.

    ``group`` holds the live hyper-parameters in ``torch.optim``'s names; whoever changes it (a
    learning-rate scheduler, through :class:`fused_dni.FusedOptimizer`) is obeyed by the next
    update. The moments are allocated when they are first asked for, and follow a layer that is
    moved to another device or dtype.

    Attributes:
        bound: the tensors that :meth:`tensors` was last called with.
    """

    bound: tuple[Tensor | None, ...] = ()  # here for states that were pickled without it

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.group: dict[str, Any] = rule.defaults()
        self._names = tuple(self.group)
        # Whatever the default device is: under torch.device("meta") it would hold nothing.
        self.hyper = torch.zeros(HYPER_SIZE, dtype=torch.float64, device="cpu")
        self._wanted = rule.moments()
        self._written: tuple[Any, ...] = ()
        self._slots: tuple[Any, ...] = ()
        self._tensors: RuleTensors | None = None
        # First and second moments by slot, those of slots that are frozen now among them.
        self._held: tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]] = ((), ())

    @property
    def steps(self) -> int:
        """Updates applied so far (synchronises with the device)."""
        return int(self.hyper[STEP].item())

    @property
    def skipped(self) -> int:
        """Updates skipped because a gradient was not finite (synchronises with the device)."""
        return int(self.hyper[SKIPPED].item())

    def tensors(self, slots: Sequence[Tensor | None]) -> RuleTensors:
        """Return the rule over ``slots``, with ``group`` written to the device where it changed.

        Moments follow their parameter: they are made anew (zero) only for a slot whose shape
        changed or that has none yet, moved along with its dtype and device, and kept while it is
        frozen.
        """
        group = self.group
        written = tuple([group[name] for name in self._names])
        if written != self._written:
            self._write(group)
            # A rate may be a tensor that is filled in place: remember its value, not itself.
            self._written = tuple([float(v) if isinstance(v, Tensor) else v for v in written])
        key = tuple(
            [None if p is None else (p.data_ptr(), p.dtype, p.requires_grad) for p in slots]
        )
        if key != self._slots or self._tensors is None:
            self._tensors = self._bind(slots)
            self._slots = key
        return self._tensors

    def moments(self) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """First and second moments by slot; empty tuples before they were first asked for."""
        return self._held

    def allocate(self, slots: Sequence[Tensor | None]) -> None:
        """Make the moments of ``slots`` (zero) that an update would make."""
        if not self._held[0]:
            self._hold(slots)

    def checked(self, group: dict[str, Any]) -> Rule:
        """Return the rule with the hyper-parameters of ``group``.

        Raises:
            ValueError: one of them is out of range.
        """
        return type(self.rule)(**{k: v for k, v in group.items() if k in self._names})

    def load(
        self,
        steps: int,
        skipped: int,
        first: Sequence[Tensor | None],
        second: Sequence[Tensor | None],
    ) -> None:
        """Continue from saved moments (copied; zero before the first step) and counts."""
        self.reset()
        self.hyper[STEP] = steps
        self.hyper[SKIPPED] = skipped
        if not steps:
            return
        self._held = (
            tuple(None if t is None else _copied(t) for t in first),
            tuple(None if t is None else _copied(t) for t in second),
        )

    def rescale(self, factors: Sequence[float]) -> None:
        """Have the gradients seen so far been so many times as large, slot by slot: the moments
        are scaled, the second by the square (both in place)."""
        for order, held in enumerate(self._held, 1):
            for t, factor in zip(held, factors, strict=False):
                if t is not None:
                    t.mul_(factor**order)

    def reset(self) -> None:
        """Forget moments and counts."""
        self.hyper.zero_()
        self._written = ()
        self._slots = ()
        self._tensors = None
        self.bound = ()
        self._held = ((), ())

    def _write(self, group: dict[str, Any]) -> None:
        now = self.checked(group)
        if now.moments() > self._wanted:  # momentum raised from zero
            self._wanted = now.moments()
            self._slots = ()
        beta1, beta2 = group.get("betas", (group.get("momentum", 0.0), 0.0))
        values = (group["lr"], beta1, beta2, group.get("eps", 0.0), group["weight_decay"])
        self.hyper[: len(values)] = torch.tensor(
            [float(v) for v in values], dtype=torch.float64, device="cpu"
        )
        nesterov = bool(group.get("nesterov", False))
        if self._tensors is not None and self._tensors.nesterov is not nesterov:
            self._tensors = self._tensors._replace(nesterov=nesterov)

    def _bind(self, slots: Sequence[Tensor | None]) -> RuleTensors:
        for i, p in enumerate(slots):
            if p is not None:
                self._own(i, p)
        device = next((p.device for p in slots if p is not None), self.hyper.device)
        if self.hyper.device != device:
            self.hyper = self.hyper.to(device)

        self._hold(slots)
        self.bound = tuple(slots)
        trainable = tuple(p is not None and p.requires_grad for p in slots)
        first, second = (
            tuple(t if on else None for t, on in zip(held, trainable, strict=True))
            for held in self._held
        )
        return RuleTensors(
            self.rule.kind,
            bool(self.group.get("nesterov", False)),
            self.hyper,
            first,
            second,
            trainable,
            self.rule.stochastic_rounding,
        )

    def _hold(self, slots: Sequence[Tensor | None]) -> None:
        """Make, move or keep the moments of ``slots``."""

        def moment(previous: tuple[Tensor | None, ...], order: int) -> tuple[Tensor | None, ...]:
            made: list[Tensor | None] = []
            for i, p in enumerate(slots):
                kept = previous[i] if i < len(previous) else None
                if p is None or order > self._wanted:
                    made.append(None)
                elif kept is not None and kept.shape == p.shape and kept.is_meta <= p.is_meta:
                    made.append(kept.to(device=p.device, dtype=accumulator(p)))
                elif p.requires_grad:
                    dtype, contiguous = accumulator(p), torch.contiguous_format
                    made.append(torch.zeros_like(p, dtype=dtype, memory_format=contiguous))
                else:
                    made.append(None)
            return tuple(made)

        with torch.no_grad():
            self._held = (moment(self._held[0], 1), moment(self._held[1], 2))

    def _own(self, slot: int, p: Tensor) -> None:
        """Refuse a tensor that cannot be updated in place by this rule alone."""
        if type(p) is not nn.Parameter:
            raise RuntimeError(
                f"a fused rule (update=...) updates parameters in place; slot {slot} holds a "
                f"{type(p).__name__} that is no plain nn.Parameter (a parametrization, "
                "functional_call or sharding replaced it); use update=None"
            )
        if gathered(p):
            raise RuntimeError(
                "a fused rule (update=...) under fully_shard (FSDP) is refused: it would update a "
                "gathered copy that is thrown away; use update=None"
            )
        if not p.requires_grad:
            return
        owner = _owners.get(p)
        other = None if owner is None else owner()
        if other is not None and other is not self:
            raise RuntimeError(
                "a parameter is tied between two layers with fused rules: each would update it "
                "with moments of its own; use update=None on both"
            )
        _owners[p] = weakref.ref(self)


def gathered(p: Tensor) -> bool:
    """Say whether FSDP2 gathered ``p`` from its shards for this forward."""
    sharding = sys.modules.get("torch.distributed._composable_state")
    for reference in list(getattr(sharding, "_module_state_mapping", {}).values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # before torch 2.12
            groups = [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for managed in getattr(group, "fsdp_params", ()):
                if getattr(managed, "_unsharded_param", None) is p:
                    return True
    return False


# Which rule updates a parameter.
_owners: Any = WeakIdKeyDictionary()
