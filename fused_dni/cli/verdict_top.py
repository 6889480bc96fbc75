"""``verdict top``."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from functools import partial
from typing import TYPE_CHECKING

from fused_dni.cli.arguments import built, refuse_format, rule
from fused_dni.cli.command import Measuring, UsageError
from fused_dni.cli.output import OutFile, out_file, say_verdict
from fused_dni.measure.options import (
    FACTORY,
    FILE,
    RATE,
    SECONDS,
    SEED,
    TEXT,
    UPDATE,
    VERDICT_SECONDS,
    option,
    whole,
)

if TYPE_CHECKING:
    from fused_dni.measure.race import Arms
    from fused_dni.measure.verdict import TopVerdict
    from fused_dni.report import Result

EXAMPLE = """\
import torch
from torch import nn

def factory():
    critic = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 64))
    critic.requires_grad_(False)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    def top(h, x): return (critic(h) - critic(x)).square().sum(1).mean()
    def batch(number):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(number))
        return x, x
    return net, top, batch
"""


@dataclass(kw_only=True)
class VerdictTop(Measuring):
    """Time what learns, what is above it, prediction and the synthesizer's update, and whole cycles
    of k steps with the top run in one of them; say from which k it pays and what the most is that
    can be gained. With --race, train both ways for the same time, too."""

    name = "verdict top"
    summary = "what is gained by running an expensive top on every k-th step alone"
    epilog = """A factory is called without arguments and returns (bottom, top, batch), or
(bottom, top, batch, synthesizer). bottom learns: h = bottom(x). top is everything
above, loss = top(h, *rest): a module, or a function that trains nothing.
(x, *rest) = batch(number), the same for the same number: from 0 on for training, below
0 for looking at the loss (held-out data, where there are such). The first tensor of
the rest is the synthesizer's context. For a race the factory is called anew for each
arm and seed, behind torch.manual_seed(seed).

  {program} verdict top mine:factory --race 20     # with this in mine.py:

""" + "".join(f"    {line}\n" if line else "\n" for line in EXAMPLE.splitlines())

    what: str = option(MISSING, FACTORY, "package.module:factory", place=True)
    target_every: tuple[int, ...] | None = option(
        None, whole(1), "full steps, of every K (1 2 4 8 16; of a race 4 8)", several="+",
        group="method",
    )  # fmt: skip
    synthesizers: tuple[str, ...] | None = option(
        None,
        TEXT,
        "auto, softmax, difference, rank16 or another rank, dense, diagonal, conv, where the "
        "factory brings none (auto: the first that fits)",
        several="+",
    )
    update: str = option("adam", UPDATE, "update rule")
    lr: float = option(1e-3, RATE, "learning rate in a race")
    seconds: float = option(
        VERDICT_SECONDS, SECONDS, "of timing, all together; thrice that where times scatter"
    )
    race: float | None = option(None, SECONDS, "seconds of each arm and seed", group="race")
    seeds: tuple[int, ...] = option((1, 2, 3), SEED, "a race each")
    warmup_steps: int = option(50, whole(0), "of plain backprop, before the top is left out")
    plot: str | None = option(None, FILE, "draw it into an image file", group="output")

    def run(self, command: str) -> int:
        from fused_dni.measure.verdict.candidates import at_rate
        from fused_dni.measure.verdict.top import KS, verdict_top
        from fused_dni.measure.verdict.top_race import RACE_KS, top_arms
        from fused_dni.measure.verdict.top_steps import drawn, given
        from fused_dni.report.kinds import verdict_top as reports

        out, plot = out_file(self), OutFile("--plot", self.plot)
        refuse_format(plot.path)
        made = given(built(self.what), self.what)
        if made.synthesizer is not None and self.synthesizers is not None:
            raise UsageError(f"{self.what} brings its own synthesizer: leave --synthesizers out")
        names = self.synthesizers or ["auto"]
        update = at_rate(rule(self.update), self.lr)
        if self.race is not None:
            drawn(made.batch, -1)  # what fails is said before anything is measured
        with self.progress() as progress:
            found = verdict_top(
                made.bottom,
                made.top,
                drawn(made.batch, 0),
                synthesizer=made.synthesizer or names,
                target_every=self.target_every or KS,
                update=update,
                seconds=self.seconds,
                title=self.what,
                progress=progress.update,
            )
        found.facts["command"] = command
        if self.race is not None:
            out.write(found.to_json() + "\n")
            arms = top_arms(
                partial(built, self.what),
                synthesizer=names,
                target_every=self.target_every or RACE_KS,
                update=update,
                warmup=self.warmup_steps,
            )
            self._race(self.race, found, arms, out, command)
        say_verdict(found, self.json, out, plot, reports.figure(found.report()))
        return 0

    def _race(
        self, seconds: float, found: TopVerdict, arms: Arms, out: OutFile, command: str
    ) -> None:
        """Add a race; Ctrl-C keeps the seeds that were finished in the file."""
        from fused_dni.measure.errors import Interrupted
        from fused_dni.measure.race import race

        def keep(report: Result) -> None:
            found.race = report
            out.write(found.to_json() + "\n")

        try:
            race(
                arms,
                seconds=seconds,
                seeds=self.seeds,
                device=found.facts["where"],
                keep=keep,
                progress=self.progress(),
                command=command,
            )
        except Interrupted as stopped:
            if out.written is None:
                say_verdict(found, self.json, out)
                raise
            raise Interrupted(f"{stopped}; that and the times of steps are in {out.path}") from None
