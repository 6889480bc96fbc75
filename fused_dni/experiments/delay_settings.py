"""Which arms the table of delays has, and its settings. Nothing here imports PyTorch.

Formulas and sources: docs/delay.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from fused_dni.experiments.settings import WARMUP, OnImages
from fused_dni.measure.options import SEED, above_zero, known_to, one_of, option, whole
from fused_dni.report import text

#: What each arm is; R is a rank, ``dense`` or ``mlp``, K a number of steps.
KINDS: dict[str, str] = {
    "backprop": "each stage waits for its gradient; Adam",
    "stale": "late gradients, applied as they are; Adam",
    "stale-warm": "the same, behind a warm-up in which stages wait as those of cDNI do",
    "nesterov": "late gradients; NAdam with momentum 0.99 for the look-ahead",
    "feedback": "late gradients; Adam, whose updates u are applied as u + (u - the one before)",
    "local": "a linear head a stage, no gradient between stages; Adam",
    "cdni-R": "synthetic gradients conditioned on what the loss is given; Adam",
    "cdni-R-every-K": "the same, synthesizers trained on every K-th step",
    "cdni-R-unconditioned": "synthetic gradients conditioned on the stage's output alone; Adam",
    "cdni-R-true": "synthesizers trained on true gradients, which come through all stages above; "
    "Adam",
}
#: What the stage's gradient is made of, as ``fused_dni.distributed`` names it.
MODES = {"backprop": "exact", "local": "local", "cdni": "decoupled"}
TASKS = ("classification", "frozen-top", "reconstruction")
DEFAULT_ARMS = ("backprop", "stale", "nesterov", "feedback", "local", "cdni-16")
#: Of NAdam: momentum raised, as its authors do for late gradients (arXiv 2505.01099).
MOMENTUM = 0.99


class Arm(NamedTuple):
    """An arm.

    Attributes:
        name: as it is asked for and reported.
        family: arms of one family share a rate.
        synthesizer: a rank, "dense", "mlp" or, of arms without one, empty.
        every: synthesizers are trained on every so many steps.
        conditioned: whether they are given the target.
        targets: of :class:`fused_dni.distributed.Twin`.
    """

    name: str
    family: str
    synthesizer: str = ""
    every: int = 1
    conditioned: bool = True
    targets: str = "bootstrapped"

    @property
    def mode(self) -> str:
        """Of :class:`fused_dni.distributed.Twin`."""
        return MODES.get(self.family, "stale")

    @property
    def relayed(self) -> bool:
        """Whether a stage's gradient comes through all the cuts above it."""
        return self.mode == "stale" or self.targets == "true"

    @property
    def late(self) -> bool:
        """Whether a lag changes anything."""
        return self.mode in ("stale", "decoupled")


def arm(name: str) -> Arm:
    """Look up the arm of that name.

    Raises:
        ValueError: there is none.
    """
    form = r"cdni-([1-9]\d*|dense|mlp)(?:-every-([1-9]\d*))?(-unconditioned)?(-true)?"
    found = re.fullmatch(form, name)
    if found:
        targets = "true" if found[4] else "bootstrapped"
        return Arm(name, "cdni", found[1], int(found[2] or 1), found[3] is None, targets)
    if name in KINDS and not name.startswith("cdni"):
        return Arm(name, name)
    raise ValueError(
        text.unknown("arm", name, KINDS) + " (R: a rank, dense or mlp; K: a whole number from 1 on)"
    )


#: For a look, in seconds.
QUICK: dict[str, Any] = {
    "hidden": 32,
    "epochs": 3,
    "lags": (1, 5),
    "rates": (3e-3,),
    "seeds": (1,),
}


@dataclass(frozen=True)
class Settings(OnImages):
    """What the table of delays is a function of.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    PRESETS: ClassVar = {"mnist": {}, "digits": {"batch_size": 32, "epochs": 10}}

    task: str = option(
        "classification",
        one_of(TASKS),
        "frozen-top: classification with a last stage that stays as it was drawn; reconstruction: "
        "of the image, through a narrow layer",
        group="training",
    )
    arms: tuple[str, ...] = option(
        DEFAULT_ARMS,
        known_to(arm, "ARM"),
        "of backprop, stale, stale-warm, nesterov, feedback, local, cdni-R, cdni-R-every-K, "
        "cdni-R-unconditioned, cdni-R-true (R: a rank, dense or mlp; default: "
        + ", ".join(DEFAULT_ARMS)
        + ")",
    )
    lags: tuple[int, ...] = option((1, 5, 20), whole(0), "steps that gradients are late by")
    each_cut: bool = option(
        False, help="gradients that pass several cuts (all but bootstrapped targets) are as many "
        "times as late"
    )  # fmt: skip
    stages: int = option(2, whole(2), "of as many hidden layers each (the first ones one more)")
    depth: int = option(4, whole(2), "hidden layers in all stages")
    code: int = option(16, whole(1), "units of the layer that a reconstruction goes through")
    epochs: int = option(6, whole(1), "of a run")
    rates: tuple[float, ...] = option(
        (1e-3, 3e-3, 1e-2),
        above_zero(),
        "at the start, cosine to zero; of several the best on the held-out part of the training "
        "set, by arm and lag",
    )
    share: float = option(0.5, above_zero(), "cdni: the synthesizers' part of the rate")
    #: In which the stages of cdni and stale-warm wait for their gradient.
    warmup: float = option(0.167, WARMUP, "cdni: share of the steps that wait")
    max_norm: float | None = option(
        None, above_zero(), "cdni: bound of a synthetic gradient's Frobenius norm"
    )
    seeds: tuple[int, ...] = option((1, 2, 3), SEED, "one run of every arm and lag each")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < self.stages:
            raise ValueError(
                f"depth must be at least {self.stages}, a hidden layer for each of the stages, got "
                f"{self.depth}"
            )

    @classmethod
    def of(cls, subject: str, quick: bool = False, **changes: Any) -> Settings:
        """See the base; ``quick`` is for a look, in seconds."""
        given = {name: value for name, value in changes.items() if value is not None}
        return super().of(subject, **{**(QUICK if quick else {}), **given})
