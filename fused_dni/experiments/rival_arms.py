"""Which arms the table of rivals has, and its settings. Nothing here imports PyTorch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from fused_dni.experiments.settings import WARMUP, OnImages, rule_of
from fused_dni.measure.options import (
    DEVICE,
    RATE,
    SECONDS,
    SEED,
    TEXT,
    UPDATE,
    known_to,
    option,
    whole,
)
from fused_dni.report import text

if TYPE_CHECKING:
    from fused_dni.rules import Rule

#: What a step of each kind is; kinds with ``-K`` are followed by a number.
KINDS: dict[str, str] = {
    "backprop": "stock backprop, torch.optim with fused=True",
    "compiled": "stock backprop, forward and loss under torch.compile",
    "graph": "stock backprop, the whole step replayed as a CUDA graph",
    "in-backward": "stock backprop, a torch.optim optimizer a parameter, stepped in the backward",
    "fused": "backprop on our kernels, each layer updated where its gradient is made",
    "stale-K": "a gradient on every K-th step (our kernels, torch.optim), applied again in between "
    "without forward or backward",
    "delayed": "each update by the gradient of the step before (our kernels, torch.optim)",
    "local": "decoupled greedy learning: a linear classifier a layer, no gradient between layers "
    "(our kernels)",
    "feedback": "direct feedback alignment: the error at the logits through fixed random matrices "
    "(our kernels)",
    "cdni-K": "synthetic gradients conditioned on labels, synthesizers trained on every K-th step",
    "cdni-z-K": "synthetic gradients at the preactivation, conditioned on labels, synthesizers "
    "trained on every K-th step",
}
#: They compute the same step, so that one rate is right for all.
EXACT = ("backprop", "compiled", "graph", "in-backward", "fused")
SYNTHETIC = ("cdni-K", "cdni-z-K")
#: On a GPU a ``graph`` is among them.
DEFAULT_ARMS = (
    *("backprop", "compiled", "in-backward", "fused"),
    *("stale-4", "delayed", "local", "feedback"),
    *("cdni-1", "cdni-4", "cdni-z-1", "cdni-z-4"),
)
#: Rates at the start, with Adam; docs/rivals.md says how they were found.
RATES = {
    "exact": 3e-3,
    "stale-K": 1e-3,
    "delayed": 3e-3,
    "local": 1e-2,
    "feedback": 1e-2,
    "cdni-K": 3e-3,
    "cdni-z-K": 3e-3,
}
#: The synthesizers' rate as a share of the layers'.
SYNTHESIZER_SHARE = 0.5


class Arm(NamedTuple):
    """An arm: its kind, of :data:`KINDS`, and K (0 where there is none)."""

    kind: str
    every: int

    @property
    def name(self) -> str:
        """As it is asked for and reported."""
        return self.kind.replace("-K", f"-{self.every}")

    @property
    def what(self) -> str:
        """What its step is."""
        every = "" if self.every == 1 else f" {ordinal(self.every)}"
        return KINDS[self.kind].replace(" K-th", every)

    @property
    def family(self) -> str:
        """Arms of one family share a rate where none was tuned."""
        return "exact" if self.kind in EXACT else self.kind

    def phases(self, warmup: float) -> dict[str, float]:
        """List the kinds of steps that a run has, and the share of each.

        Args:
            warmup: share of the steps in which synthesizers only learn.
        """
        k = self.every
        if self.kind == "stale-K":
            shares = {"compute": 1 / k, "repeat": 1 - 1 / k}
        elif self.kind in SYNTHETIC:
            rest = 1 - warmup
            shares = {"warm-up": warmup, "target": rest / k, "no target": rest * (1 - 1 / k)}
        else:
            shares = {"step": 1.0}
        return {phase: share for phase, share in shares.items() if share > 0}


def ordinal(number: int) -> str:
    """Write ``1st``, ``2nd``, ``11th``."""
    teens = number % 100 in (11, 12, 13)
    return f"{number}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def arm(name: str) -> Arm:
    """Look up the arm of that name.

    Raises:
        ValueError: there is none.
    """
    found = re.fullmatch(r"(.+)-([1-9]\d*)", name)
    if found and f"{found[1]}-K" in KINDS:
        return Arm(f"{found[1]}-K", int(found[2]))
    if name in KINDS and not name.endswith("-K"):
        return Arm(name, 0)
    raise ValueError(text.unknown("arm", name, KINDS) + " (K: a whole number from 1 on)")


@dataclass(frozen=True)
class Settings(OnImages):
    """What the table of rivals is a function of, the machine aside.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    PRESETS: ClassVar = {"mnist": {}, "digits": {"batch_size": 64, "seconds_per_run": 1.5}}

    arms: tuple[str, ...] = option(
        DEFAULT_ARMS,
        known_to(arm, "ARM"),
        "of backprop, compiled, graph (cuda alone), in-backward, fused, stale-K, delayed, local, "
        "feedback, cdni-K, cdni-z-K (all, with K 4, and 1 and 4 for cdni)",
        group="training",
    )
    seeds: tuple[int, ...] = option((1, 2, 3), SEED, "one run of every arm each")
    depth: int = option(3, whole(1), "hidden layers")
    update: str = option("adam", UPDATE, "update rule")
    lr: float | None = option(
        None, RATE, "one rate for all arms, at the start, cosine to zero (each its own)"
    )
    warmup: float = option(0.1, WARMUP, "cdni: share of the steps on true gradients")
    rank: int = option(16, whole(0), "of the synthesizers; 0: dense")
    backend: str | None = option(None, TEXT, "force a backend of our kernels")
    device: str = option("cpu", DEVICE, "cpu or cuda")
    seconds_per_run: float = option(5.0, SECONDS, "wall-clock of a run", group="budget")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "graph" in self.arms and not self.device.startswith("cuda"):
            raise ValueError(
                f"arm 'graph' is a CUDA graph and needs device cuda, got {self.device!r}"
            )

    @classmethod
    def of(cls, subject: str, **changes: Any) -> Settings:
        """See the base; on a GPU a ``graph`` is among the arms."""
        if changes.get("arms") is None and str(changes.get("device")).startswith("cuda"):
            changes["arms"] = (*DEFAULT_ARMS[:2], "graph", *DEFAULT_ARMS[2:])
        return super().of(subject, **changes)

    def rule(self, lr: float) -> Rule:
        """Make the update rule at a rate."""
        return rule_of(self.update, lr)

    def rate(self, which: Arm) -> float:
        """Return the rate of an arm for which none was tuned.

        Raises:
            ValueError: rates are known for Adam alone.
        """
        if self.lr is not None:
            return self.lr
        if self.update != "adam":
            raise ValueError(f"no rates are known for {self.update}: give --lr, or --tune")
        return RATES[which.family]
