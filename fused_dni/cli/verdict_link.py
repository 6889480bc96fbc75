"""``verdict link``: a user's split over a slow link."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass

from fused_dni.cli.arguments import built
from fused_dni.cli.command import Measuring, UsageError
from fused_dni.cli.output import out_file, say_report
from fused_dni.measure.options import (
    EVERY,
    FACTORY,
    SECONDS,
    SPEED,
    STAGE_SECONDS,
    TIME,
    option,
    whole,
)
from fused_dni.measure.simulate_settings import Link, Settings

EXAMPLE = """\
import torch
from torch import nn

def block(inputs): return nn.Sequential(nn.Linear(inputs, 512), nn.BatchNorm1d(512), nn.ReLU())

def factory():
    stages = [block(64), nn.Sequential(block(512), nn.Linear(512, 10))]
    def batch(): return torch.randn(256, 64), torch.randint(10, (256,))
    return stages, batch, nn.functional.cross_entropy
"""


@dataclass(kw_only=True)
class VerdictLink(Measuring):
    """Time each stage of a split and the bytes between them, say how many rows a second exact
    training, stale gradients, synthetic gradients, local losses, data parallel and DiLoCo carry
    over such a link, and which to take. The ways of fused_dni.distributed are run, too: processes
    over loopback that sleep for the stages' times, their links delayed."""

    name = "verdict link"
    summary = "what a slow link between stages leaves of each way to train them"
    epilog = """A factory is called without arguments and returns (stages, batch, loss): a list of
modules, a function that returns (x, target), and one of the last output and the target.

  {program} verdict link mine:factory --latency 100ms --bandwidth 100Mbit/s

with this in mine.py:

""" + "".join(f"    {line}\n" if line else "\n" for line in EXAMPLE.splitlines())

    what: str = option(MISSING, FACTORY, "package.module:factory", place=True)
    latency: float = option(MISSING, TIME, "one way, like 100ms", group="link")
    latency_back: float | None = option(None, TIME, "of the way back (as forward)")
    bandwidth: float | None = option(None, SPEED, "like 100Mbit/s, or 100Mbit (no limit)")
    target_every: int = option(
        Settings.target_every, EVERY, "batches for one target, of synthetic gradients", group="ways"
    )
    microbatches: int | None = option(
        None, whole(1), "batches of an update, of 1F1B and data parallel (four a stage)"
    )
    local_steps: int = option(Settings.local_steps, whole(1), "between two averages, H of DiLoCo")
    seconds: float = option(STAGE_SECONDS, SECONDS, "of measuring, for each stage", group="method")
    paced: float = option(2.0, SECONDS, "of running, for each way", flag="run")
    no_run: bool = option(False, help="simulate alone")

    def check(self) -> None:
        if self.target_every == 0:
            raise UsageError(
                "--target-every never is a local loss: synthesizers learn from targets"
            )

    def run(self, command: str) -> int:
        from fused_dni.measure.verdict.link import verdict_link

        out = out_file(self)
        wide = math.inf if self.bandwidth is None else self.bandwidth
        with self.progress() as progress:
            report = verdict_link(
                built(self.what),
                self.what,
                Link(self.latency, self.latency_back, wide),
                seconds=self.seconds,
                run=None if self.no_run else self.paced,
                options={
                    "target_every": self.target_every,
                    "microbatches": self.microbatches,
                    "local_steps": self.local_steps,
                },
                progress=progress.update,
                command=command,
            )
        say_report(report, self.json, out)
        return 0
