"""Which arms the table of rivals has, and its settings. Nothing here imports PyTorch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from fused_dni.experiments import settings
from fused_dni.experiments.settings import WARMUP, OnImages, rule_of
from fused_dni.measure.options import (
    DEVICE,
    RATE,
    SECONDS,
    SEED,
    TEXT,
    UPDATE,
    above_zero,
    known_to,
    number,
    one_of,
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
    "compiled-step": "stock backprop, forward, loss, backward and optimizer under torch.compile",
    "graph": "stock backprop, the whole step replayed as a CUDA graph",
    "in-backward": "stock backprop, a torch.optim optimizer a parameter, stepped in the backward",
    "fused": "backprop on our kernels, each layer updated where its gradient is made",
    "stale-K": "a gradient on every K-th step (our kernels, torch.optim), applied again in between "
    "without forward or backward",
    "delayed": "each update by the gradient of the step before (our kernels, torch.optim)",
    "delayed-corrected": "the same, each update corrected by its difference from the one before",
    "local": "decoupled greedy learning: a linear classifier a layer, no gradient between layers "
    "(our kernels)",
    "mono-forward": "local losses of projections to the classes, which are summed to predict (our "
    "kernels)",
    "feedback": "direct feedback alignment: the error at the logits through fixed random matrices "
    "(our kernels)",
    "cdni-K": "synthetic gradients conditioned on labels, synthesizers trained on every K-th step",
    "cdni-z-K": "synthetic gradients at the preactivation, conditioned on labels, synthesizers "
    "trained on every K-th step",
    "cdni-ce-K": "synthetic gradients of the form of a cross-entropy's, synthesizers trained on "
    "every K-th step",
}
#: They compute the same step, so that one rate is right for all.
EXACT = ("backprop", "compiled", "compiled-step", "graph", "in-backward", "fused")
SYNTHETIC = ("cdni-K", "cdni-z-K", "cdni-ce-K")
#: On a GPU a ``graph`` is among them.
DEFAULT_ARMS = (
    *("backprop", "compiled", "compiled-step", "in-backward", "fused"),
    *("stale-4", "delayed", "delayed-corrected", "local", "mono-forward", "feedback"),
    *("cdni-4", "cdni-z-4", "cdni-ce-4", "cdni-ce-16"),
)
#: Rates at the start, with Adam; docs/rivals.md says how they were found.
RATES = {
    "exact": 3e-3,
    "stale-K": 1e-3,
    "delayed": 3e-3,
    "delayed-corrected": 3e-3,
    "local": 1e-2,
    "mono-forward": 1e-2,
    "feedback": 1e-2,
    "cdni-K": 3e-3,
    "cdni-z-K": 3e-3,
    "cdni-ce-K": 3e-3,
}


DATASET = one_of(("digits", "mnist", "characters"))
DATASETS = (
    settings.DATASETS.removesuffix(")") + "; characters: the next character of a text, --data PATH)"
)


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
    counted = re.fullmatch(r"(.+)-[^-]*", name)
    if counted and f"{counted[1]}-K" in KINDS:
        raise ValueError(f"unknown arm {name!r}: K of {counted[1]}-K must be a number from 1 on")
    raise ValueError(text.unknown("arm", name, KINDS) + " (K: a whole number from 1 on)")


@dataclass(frozen=True)
class Settings(OnImages):
    """What the table of rivals is a function of, the machine aside.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    PRESETS: ClassVar = {
        "mnist": {},
        "digits": {"batch_size": 64, "seconds_per_run": 1.5},
        "characters": {},
    }

    dataset: str = option("mnist", DATASET, DATASETS, group="data")
    arms: tuple[str, ...] = option(
        DEFAULT_ARMS,
        known_to(arm, "ARM"),
        "of "
        + ", ".join(KINDS)
        + " (default: "
        + ", ".join(DEFAULT_ARMS)
        + "; graph on cuda alone)",
        group="training",
    )
    seeds: tuple[int, ...] = option((1, 2, 3), SEED, "one run of every arm each")
    depth: int = option(3, whole(1), "hidden layers")
    update: str = option("adam", UPDATE, "update rule")
    lr: float | None = option(
        None, RATE, "one rate for all arms, at the start, cosine to zero (each its own)"
    )
    warmup: float = option(0.1, WARMUP, "cdni: share of the steps on true gradients")
    mix: float = option(
        1.0, number(0.0, 1.0), "cdni: weight of the true gradient on steps with targets"
    )
    share: float = option(1 / 3, above_zero(), "cdni: the synthesizers' part of the layers' rate")
    lessons: int = option(
        4, whole(1), "cdni: regression steps of a synthesizer on a step with targets"
    )
    rank: int = option(16, whole(0), "of linear synthesizers; 0: dense")
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
            changes["arms"] = (*DEFAULT_ARMS[:3], "graph", *DEFAULT_ARMS[3:])
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


#: For a look, in seconds.
QUICK: dict[str, Any] = {
    "widths": (16,),
    "depths": (1, 2),
    "steps": 20,
    "rates": (3e-3,),
    "seeds": (1, 2),
    "arms": ("fused", "stale-2", "cdni-2"),
}


@dataclass(frozen=True)
class Grid(settings.Settings):
    """What the grid of rivals is a function of, the machine aside.

    Raises:
        ValueError: an unknown name, or a number out of range; no arm by backprop.
    """

    PRESETS: ClassVar = {"mnist": {}, "digits": {"batch_size": 64}, "characters": {}}

    dataset: str = option("mnist", DATASET, DATASETS, group="data")
    arms: tuple[str, ...] = option(
        (
            *("backprop", "compiled", "fused"),
            *("stale-4", "mono-forward", "cdni-4", "cdni-ce-8"),
        ),
        known_to(arm, "ARM"),
        "as those of rivals; of the ones that compute backprop's step one is trained and all are "
        "timed: the fastest is what the others are held against",
        group="training",
    )
    widths: tuple[int, ...] = option((256, 512), whole(1), "units of the hidden layers")
    depths: tuple[int, ...] = option((3, 8), whole(1), "hidden layers")
    batch_size: int = option(256, whole(2), "rows of a step")
    steps: int = option(150, whole(1), "of a run of the budget 1")
    budgets: tuple[int, ...] = option(
        (1, 2, 4), whole(1), "runs of so many times the steps, each with a cosine of its own"
    )
    rates: tuple[float, ...] = option(
        (1e-3, 3e-3, 1e-2),
        above_zero(),
        "at the start, cosine to zero; of several the best on the held-out part of the training "
        "set, by arm, with the smallest network, the budget 1 and the seed 0",
    )
    seeds: tuple[int, ...] = option((1, 2, 3), SEED, "one run of every arm, network and budget")
    update: str = option("adam", UPDATE, "update rule")
    warmup: float = option(0.1, WARMUP, "cdni: share of the steps on true gradients")
    mix: float = option(
        Settings.mix, number(0.0, 1.0), "cdni: weight of the true gradient on steps with targets"
    )
    share: float = option(
        Settings.share, above_zero(), "cdni: the synthesizers' part of the layers' rate"
    )
    lessons: int = option(
        Settings.lessons, whole(1), "cdni: regression steps on a step with targets"
    )
    rank: int = option(16, whole(0), "of linear synthesizers; 0: dense")
    backend: str | None = option(None, TEXT, "force a backend of our kernels")
    device: str = option("cpu", DEVICE, "cpu or cuda")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(arm(name).kind in EXACT for name in self.arms):
            raise ValueError(f"arms must have one of {', '.join(EXACT)}, to hold others against")

    @classmethod
    def of(cls, subject: str, quick: bool = False, full: bool = False, **changes: Any) -> Grid:
        """See the base; ``quick`` is for a look, in seconds, ``full`` adds the width 1024."""
        given = {name: value for name, value in changes.items() if value is not None}
        more = QUICK if quick else {"widths": (256, 512, 1024)} if full else {}
        return super().of(subject, **{**more, **given})

    def cell(self, width: int, depth: int) -> Settings:
        """Return what one network's runs are a function of, but for their rate."""
        same = (
            *("dataset", "arms", "batch_size", "seeds", "update", "warmup", "mix", "share"),
            *("lessons", "rank", "backend", "device"),
        )
        return Settings(
            **{name: getattr(self, name) for name in same},
            hidden=width,
            depth=depth,
        )

    def trained(self) -> list[Arm]:
        """List the arms that are trained: of those by backprop's step one, on our kernels if they
        are among them."""
        arms = [arm(name) for name in self.arms]
        exact = [which for which in arms if which.kind in EXACT]
        first = next((which for which in exact if which.kind == "fused"), exact[0])
        return [first, *(which for which in arms if which.kind not in EXACT)]
