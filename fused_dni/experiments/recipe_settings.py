"""Which recipes of synthetic gradients there are, and the settings of their table. Nothing here
imports PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from fused_dni.experiments.settings import OnImages
from fused_dni.measure.options import (
    EVERY,
    RATE,
    SEED,
    UPDATES,
    known_to,
    number,
    one_of,
    option,
    whole,
)
from fused_dni.report import text


class Recipe(NamedTuple):
    """What differs from ``plain``.

    Attributes:
        what: in a line.
        changes: the parts by their names in :data:`PLAIN`.
    """

    what: str
    changes: dict[str, Any]


#: Of ``plain``; ``sg_share`` is the part of the settings' ``sg_lr``, ``warmup`` of ``warmup``.
PLAIN: dict[str, Any] = {
    "mix": 0.0,
    "lessons": 1,
    "sg_share": 1.0,
    "synthesizer": "linear",
    "rank": 16,
    "warmup": 1.0,
    "automatic": False,
}
RECIPES: dict[str, Recipe] = {
    "plain": Recipe(
        "steps with targets use the prediction too, so that targets are bootstrapped", {}
    ),
    "half": Recipe("half of the true gradient on steps with targets", {"mix": 0.5}),
    "exact": Recipe(
        "the true gradient on steps with targets: synthesizers are taught by it alone", {"mix": 1.0}
    ),
    "lessons": Recipe("four regression steps on each target", {"lessons": 4}),
    "slower": Recipe("synthesizers at a third of the rate", {"sg_share": 1 / 3}),
    "faster": Recipe("synthesizers at three times the rate", {"sg_share": 3.0}),
    "cross-entropy": Recipe(
        "synthesizers of the form that a classifier's gradient has",
        {"synthesizer": "cross-entropy"},
    ),
    "critic": Recipe(
        "the gradient of a learned cross-entropy, taught by gradients alone (first-order Sobolev)",
        {"synthesizer": "critic"},
    ),
    "mlp": Recipe(
        "synthesizers with a hidden layer of 64 (MLPSynthesizer)", {"synthesizer": "mlp"}
    ),
    "averaged": Recipe(
        "predictions by a running average of the synthesizer (0.9)", {"synthesizer": "averaged"}
    ),
    "clipped": Recipe(
        "a row's error teaches as if it were no larger than the mean row's",
        {"synthesizer": "clipped"},
    ),
    "rank-4": Recipe("synthesizers of rank 4", {"rank": 4}),
    "rank-64": Recipe("synthesizers of rank 64", {"rank": 64}),
    "dense": Recipe("dense synthesizers", {"rank": None}),
    "early": Recipe("half of the warm-up", {"warmup": 0.5}),
    "automatic": Recipe(
        'target_every="auto" between half and twice the k of the column', {"automatic": True}
    ),
}
#: What they are held against.
BASES = {
    "backprop": "the true gradient on every step, on the same kernels",
    "stale": "the true gradient on every k-th step, held in between",
}
BEST = "cross-entropy+exact+lessons"
DEFAULT_RECIPES = ("plain", "half", "exact", "half+lessons", BEST)


def recipe(name: str) -> dict[str, Any]:
    """Return all parts of a recipe, or of several joined by "+".

    Raises:
        ValueError: an unknown name, or two that change the same part.
    """
    made, by = dict(PLAIN), dict[str, str]()
    for each in name.split("+"):
        if each not in RECIPES:
            raise ValueError(text.unknown("recipe", each, RECIPES) + ", and several joined by +")
        for part, value in RECIPES[each].changes.items():
            if part in by:
                raise ValueError(
                    f"recipes {by[part]} and {each} do not go together: both change {part}"
                )
            made[part], by[part] = value, each
    if made["synthesizer"] != "linear" and made["rank"] != PLAIN["rank"]:
        raise ValueError(f"recipes {by['rank']} and {by['synthesizer']} do not go together")
    return made


def what(name: str) -> str:
    """Say what a row of the table is."""
    return BASES.get(name) or "; ".join(RECIPES[each].what for each in name.split("+"))


#: For a look, in seconds.
QUICK: dict[str, Any] = {
    "hidden": 32,
    "epochs": 3,
    "target_every": (4,),
    "seeds": (1,),
}


@dataclass(frozen=True)
class Settings(OnImages):
    """What the table of recipes is a function of.

    Raises:
        ValueError: an unknown recipe, recipes that do not go together, or a number out of range.
    """

    PRESETS: ClassVar = {"mnist": {}, "digits": {"epochs": 10, "batch_size": 64, "warmup": 1.0}}

    recipes: tuple[str, ...] = option(
        DEFAULT_RECIPES,
        known_to(recipe, "RECIPE"),
        f"of {', '.join(RECIPES)}; several joined by + (default: {' '.join(DEFAULT_RECIPES)})",
        group="training",
    )
    target_every: tuple[int, ...] = option(
        (4, 8, 16), EVERY, "k: of every so many steps one is exact, behind the warm-up"
    )
    depth: int = option(3, whole(1), "hidden layers")
    epochs: int = option(8, whole(1), "passes over the training set")
    update: str = option(
        "adam",
        one_of((*UPDATES, "muon")),
        "rule of the network in all rows (synthesizers have Adam); adamw decays by 0.01; muon: of "
        "the hidden weights, by torch.optim, with Adam for all else",
    )
    lr: float = option(3e-3, RATE, "its rate at the start, cosine to zero")
    sg_lr: float = option(1e-3, RATE, "the synthesizers', likewise")
    warmup: float = option(
        0.5, number(0.0), "epochs on true gradients while synthesizers learn; they count as exact"
    )
    seeds: tuple[int, ...] = option((0, 1, 2), SEED, "one run of every row and k each")
    held_out: bool = option(
        False, help="evaluate on the last sixth of the training set, kept out of training"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 in self.target_every:
            raise ValueError(
                "target_every must be a whole number from 1 on, got 'never': no synthesizer would "
                "learn behind the warm-up, and a held gradient would never be made"
            )
        if self.update == "muon" and any(recipe(name)["lessons"] > 1 for name in self.recipes):
            raise ValueError("update='muon' and lessons do not go together: lessons need a rule")
        if self.warmup >= self.epochs:
            raise ValueError(
                f"warmup must be below epochs={self.epochs}, got {self.warmup:g}: all steps would "
                "be exact"
            )

    @classmethod
    def of(cls, subject: str, quick: bool = False, **changes: Any) -> Settings:
        """See the base; ``quick`` is for a look, in seconds."""
        given = {name: value for name, value in changes.items() if value is not None}
        return super().of(subject, **{**(QUICK if quick else {}), **given})
