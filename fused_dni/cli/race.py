"""``race``: ways of training at equal wall-clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from functools import partial
from typing import TYPE_CHECKING

from fused_dni.cli.arguments import built, device_named
from fused_dni.cli.command import UsageError
from fused_dni.cli.experiment import Resumable
from fused_dni.measure.options import (
    DEVICE,
    FACTORY,
    FILE,
    SECONDS,
    SEED,
    TEXT,
    option,
    whole,
)

if TYPE_CHECKING:
    from fused_dni.report.progress import Progress
    from fused_dni.report.schema import Experiment


@dataclass(kw_only=True)
class Race(Resumable):
    """Train several ways for the same time, in turns, and say which came to what the first one
    ends with, and in what part of its time."""

    name = "race"
    summary = "your own ways of training, each on its own clock, at equal wall-clock"
    epilog = """A factory is called without arguments and returns the arms by name, the one to
beat first: each a function of a seed that returns an object with step(), which trains by
one step, and loss(), on data held out.

  {program} race package.module:factory --seconds 30 --seeds 1 2 3

Ctrl-C keeps the finished seeds in --out; --resume goes on from there."""

    what: str = option(MISSING, FACTORY, "package.module:factory", place=True)
    arms: tuple[str, ...] | None = option(None, TEXT, "of these (all)", several="+")
    seconds: float = option(20.0, SECONDS, "of each arm and seed")
    seeds: tuple[int, ...] = option((1, 2, 3), SEED, "a race each")
    marks: int = option(20, whole(1), "looks at the loss")
    device: str = option("cpu", DEVICE, "cpu or cuda")
    out: str = option("race.json", FILE, "the report", group="output")

    def begin(self, progress: Progress) -> Experiment:
        from fused_dni.measure.race import race

        device_named(self.device)
        arms = built(self.what)
        if not isinstance(arms, Mapping) or not all(callable(make) for make in arms.values()):
            raise UsageError(
                f"{self.what} must return a dictionary of functions of a seed, got "
                f"{type(arms).__name__}"
            )
        if self.arms is not None:
            if unknown := [name for name in self.arms if name not in arms]:
                raise UsageError(f"--arms: {self.what} has {', '.join(arms)}; not {unknown[0]!r}")
            arms = {name: arms[name] for name in self.arms}
        return partial(
            race,
            arms,
            seconds=self.seconds,
            seeds=self.seeds,
            marks=self.marks,
            device=self.device,
        )
