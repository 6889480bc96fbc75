"""Which of the literature's tables are reproduced, and with what. Nothing here imports PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from fused_dni.experiments.settings import FORMS, WARMUP, OnImages
from fused_dni.measure.options import RATE, SEED, above_zero, number, one_of, option, whole

TABLES = ("depth", "sparse", "unlock", "clocks")
#: Of ``depth``; none: nothing but the head learns.
ARMS = ("none", "backprop", "dni", "cdni", "cdni-cross-entropy", "recipe")
#: Of ``clocks``: how the lower network gets the gradient of what it sends.
CLOCKS = ("waits", "dni", "cdni", "alone")

#: For a look, in seconds.
QUICK: dict[str, Any] = {
    "hidden": 32,
    "depths": (3, 4),
    "epochs": 2,
    "windows": (2,),
    "digits": 320,
    "seeds": (1,),
    "more_seeds": (2,),
}


class Run(NamedTuple):
    """A run of a table.

    Attributes:
        table: one of :data:`TABLES`.
        name: of the arm.
        size: hidden layers, of ``clocks`` the window T.
        seed: of weights, batches and draws.
    """

    table: str
    name: str
    size: int
    seed: int


@dataclass(frozen=True)
class Settings(OnImages):
    """What the reproduced tables are a function of.

    Raises:
        ValueError: an unknown table, a number out of range, a warm-up that leaves no exact step.
    """

    PRESETS: ClassVar = {"mnist": {}, "digits": {"batch_size": 64, "epochs": 25}}

    tables: tuple[str, ...] = option(
        TABLES,
        one_of(TABLES),
        "of depth (error by the number of hidden layers), sparse (layers that are updated at "
        "random), unlock (synthetic inputs too), clocks (two networks, one slower) (all)",
        group="training",
    )
    depths: tuple[int, ...] = option((3, 4, 5, 6), whole(1), "depth: hidden layers")
    arms: tuple[str, ...] = option(
        ARMS,
        one_of(ARMS),
        "depth: of none (the head alone learns), backprop, dni (unconditional), cdni (linear), "
        "cdni-cross-entropy (the form of a classifier's gradient), recipe (with few exact steps) "
        "(all)",
    )
    depth: int = option(3, whole(2), "hidden layers, of sparse and unlock")
    epochs: int = option(10, whole(1), "passes over the training set")
    lr: float = option(3e-3, RATE, "Adam's rate at the start, cosine to zero")
    sg_lr: float = option(1e-3, RATE, "that of synthesizers, likewise")
    rank: int = option(16, whole(0), "of the synthesizers; 0: dense")
    warmup: float = option(
        0.05, WARMUP, "share of the steps on true gradients while synthesizers learn"
    )
    exact: tuple[float, ...] = option(
        (0.25, 0.125),
        above_zero(1.0),
        "depth: the recipe's share of exact steps at most, warm-up among them",
    )
    synthesizer: str = option("cross-entropy", one_of(FORMS), "the recipe's synthesizers")
    lessons: int = option(4, whole(1), "the recipe's regression steps on an exact step")
    mix: float = option(
        1.0, number(0.0, 1.0), "the recipe's weight of the true gradient on its exact steps"
    )
    probability: float = option(
        0.2, above_zero(1.0), "sparse: with which a layer is updated in a step, and sends a target"
    )
    input_hidden: int = option(256, whole(1), "unlock: hidden units of the models of inputs")
    windows: tuple[int, ...] = option(
        (2, 3, 4), whole(2), "clocks: steps of the lower network, T, to one of the upper"
    )
    digits: int = option(6000, whole(1), "clocks: that a stream is long")
    seeds: tuple[int, ...] = option((1, 2, 3), SEED, "one run of everything each")
    more_seeds: tuple[int, ...] = option(
        (4, 5), SEED, "depth: more of them, for backprop and the recipe alone", several="*"
    )
    held_out: bool = option(
        False, help="evaluate on the last sixth of the training set, kept out of training"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for share in self.exact:
            if share <= self.warmup:
                raise ValueError(
                    f"exact must be above warmup={self.warmup:g}, whose steps are exact, got "
                    f"{share:g}"
                )
        for window in self.windows:
            if self.digits < window**2:
                raise ValueError(
                    f"digits must be at least {window**2} for a window of {window}, got "
                    f"{self.digits}"
                )

    @classmethod
    def of(cls, subject: str, quick: bool = False, **changes: Any) -> Settings:
        """See the base; ``quick`` is for a look, in seconds."""
        given = {name: value for name, value in changes.items() if value is not None}
        return super().of(subject, **{**(QUICK if quick else {}), **given})

    def runs(self) -> list[Run]:
        """List all runs, seed by seed."""
        recipes = tuple(f"recipe {share:g}" for share in self.exact)
        by_depth = [name for arm in self.arms for name in (recipes if arm == "recipe" else (arm,))]
        arms = {
            "depth": by_depth,
            "sparse": ("full", "sparse"),
            "unlock": ("unlocked",),
            "clocks": CLOCKS,
        }
        sizes = {"depth": self.depths, "clocks": self.windows}
        every_seed = ("backprop", *recipes)
        return [
            Run(table, name, size, seed)
            for seed in dict.fromkeys((*self.seeds, *self.more_seeds))
            for table in self.tables
            for size in sizes.get(table, (self.depth,))
            for name in arms[table]
            if seed in self.seeds or (table == "depth" and name in every_seed)
        ]


def every(exact: float, warmup: int, steps: int) -> int:
    """Choose the least k for which warm-up and every k-th step behind it are together at most a
    share ``exact`` of so many steps."""
    k = 1
    while k < steps and exact_steps(k, warmup, steps) > exact * steps:
        k += 1
    return k


def exact_steps(k: int, warmup: int, steps: int) -> int:
    """Count the steps of warm-up and those with targets, the first of which follows it."""
    return warmup + -(-(steps - warmup) // k)
