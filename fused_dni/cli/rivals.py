"""Synthetic gradients beside what else there is, and beside what was published: ``rivals``,
``rivals grid``, ``interfaces``, ``delay``, ``recipes``, ``literature``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fused_dni.cli.arguments import device_named
from fused_dni.cli.command import UsageError
from fused_dni.cli.experiment import OnImages, OnTexts, Quick, Resumable
from fused_dni.experiments import delay_settings, literature_settings, recipe_settings, rival_arms
from fused_dni.experiments.settings import Interfaces as InterfacesSettings
from fused_dni.measure.options import FILE, SECONDS, option

if TYPE_CHECKING:
    from fused_dni.report.progress import Progress
    from fused_dni.report.schema import Experiment


@dataclass(kw_only=True)
class Rivals(OnTexts, Resumable):
    """Train one network by backprop in several ways (eager, compiled, with the optimizer in the
    backward, on our kernels), by label-conditioned DNI, and by its rivals: stale and delayed
    gradients, local losses, direct feedback alignment. Steps are timed together; then every run
    has as many steps as fit into the same wall-clock."""

    name = "rivals"
    summary = "backprop, DNI and their rivals on one network: time, memory, error at equal time"
    settings = rival_arms.Settings
    epilog = """examples:
  {program} rivals
  {program} rivals --data DIR --seconds-per-run 8 --tune
  {program} rivals --arms fused stale-2 cdni-4 --seeds 1 2 3 4 5

Ctrl-C keeps the finished runs in --out; --resume goes on from there."""

    seconds: float = option(
        10.0, SECONDS, "of timing, the steps of all arms together", group="budget"
    )
    tune: bool = option(
        False, help="first choose each arm's rate on the held-out part of the training set"
    )
    out: str | None = option("rivals.json", FILE, "the report", group="output")

    def begin(self, progress: Progress) -> Experiment:
        from fused_dni.experiments import rivals

        settings = self.chosen()
        device_named(settings.device)
        dataset = self.load(progress)
        return partial(rivals.compare, settings, dataset, seconds=self.seconds, tuned=self.tune)


@dataclass(kw_only=True)
class RivalGrid(OnTexts, Quick, Resumable):
    """Train backprop, label-conditioned DNI and rivals in networks of several widths and depths,
    for several numbers of steps, then time their steps: who is ahead at equal steps, who at equal
    wall-clock, and how long each takes to what backprop ends with."""

    name = "rivals grid"
    summary = "rivals by width, depth and budget: error at equal steps and at equal time"
    settings = rival_arms.Grid
    epilog = """examples:
  {program} rivals grid --quick
  {program} rivals grid --data DIR --widths 256 --depths 3 8 --budgets 1 2 4
  {program} rivals grid --dataset characters --data PATH

Ctrl-C keeps the finished runs in --out; --resume goes on from there. Steps are timed at the
end, so that only then the machine need be idle."""

    full: bool = option(False, help="the width 1024 too: hours")
    seconds: float = option(
        5.0, SECONDS, "of timing, for each network, the steps of all arms together", group="budget"
    )
    out: str | None = option("rivals-grid.json", FILE, "the report", group="output")

    def chosen(self, **more: Any) -> Any:
        return super().chosen(full=self.full, **more)

    def check(self) -> None:
        super().check()
        if self.quick and self.full:
            raise UsageError("--quick and --full ask for different grids: give one of them")

    def begin(self, progress: Progress) -> Experiment:
        from fused_dni.experiments import rival_grid

        settings = self.chosen()
        device_named(settings.device)
        return partial(rival_grid.compare, settings, self.load(progress), seconds=self.seconds)


@dataclass(kw_only=True)
class Interfaces(OnImages, Resumable):
    """Train networks of several depths by label-conditioned DNI and hold each layer's synthetic
    gradient against the true gradient of the whole network; likewise with fewer interfaces in the
    deepest, and the errors beside those of backprop. About three minutes on 2 cores."""

    name = "interfaces"
    summary = "how far synthetic gradients are from the true ones, by depth and layer"
    settings = InterfacesSettings
    epilog = "Ctrl-C keeps the finished runs in --out; --resume goes on from there."

    out: str | None = option("interfaces.json", FILE, "the report", group="output")

    def begin(self, progress: Progress) -> Experiment:
        from fused_dni.experiments import interfaces

        return partial(interfaces.measure, self.chosen(), self.load(progress))


@dataclass(kw_only=True)
class Delay(Quick, Resumable):
    """Train a network that is split into stages, each gradient so many steps late over each cut,
    by label-conditioned DNI and by what else does not wait: stale gradients, with a look-ahead or
    with corrected updates, and local losses. In one process, which computes what a pipeline of
    processes computes at that delay. Nothing is timed."""

    name = "delay"
    summary = "accuracy of a pipeline whose gradients are late: synthetic gradients and rivals"
    settings = delay_settings.Settings
    epilog = """examples:
  {program} delay --quick
  {program} delay --data DIR --lags 1 5 20 --stages 2 --seeds 1 2 3
  {program} delay --data DIR --lags 20 --arms stale cdni-16 cdni-16-every-5

Ctrl-C keeps the finished runs in --out; --resume goes on from there."""

    out: str | None = option("delay.json", FILE, "the report", group="output")

    def begin(self, progress: Progress) -> Experiment:
        from fused_dni.experiments import delay

        return partial(delay.compare, self.chosen(), self.load(progress))


@dataclass(kw_only=True)
class Recipes(Quick, Resumable):
    """Train a network by recipes of synthetic gradients, which differ in how synthesizers are
    taught and used, with a target on every k-th step; beside backprop and a gradient that is held
    for k steps, at equal steps. Nothing is timed."""

    name = "recipes"
    summary = "which recipe of synthetic gradients costs the least accuracy, by k"
    settings = recipe_settings.Settings
    epilog = """examples:
  {program} recipes --quick
  {program} recipes --data DIR --recipes cross-entropy+exact half+lessons --target-every 8 16
  {program} recipes --data DIR --held-out --recipes exact exact+faster exact+slower

Ctrl-C keeps the finished runs in --out; --resume goes on from there."""

    out: str | None = option("recipes.json", FILE, "the report", group="output")

    def begin(self, progress: Progress) -> Experiment:
        from fused_dni.experiments import recipes

        settings = self.chosen()
        dataset = self.load(progress, held_out=settings.held_out)
        return partial(recipes.compare, settings, dataset)


@dataclass(kw_only=True)
class Literature(Quick, Resumable):
    """Train the networks behind the tables of Jaderberg et al. 2016: backprop, DNI and cDNI by
    depth, and cDNI with few exact steps; layers that are updated at random; synthetic inputs too;
    two networks at two clocks. The report has the published figures beside ours. Nothing is
    timed."""

    name = "literature"
    summary = "the tables of the paper, reproduced beside the published figures"
    settings = literature_settings.Settings
    epilog = """examples:
  {program} literature --quick
  {program} literature --data DIR
  {program} literature --data DIR --tables depth --depths 3 6 --exact 0.25

Ctrl-C keeps the finished runs in --out; --resume goes on from there."""

    out: str | None = option("literature.json", FILE, "the report", group="output")

    def begin(self, progress: Progress) -> Experiment:
        from fused_dni.experiments import literature

        settings = self.chosen()
        dataset = self.load(progress, held_out=settings.held_out)
        return partial(literature.reproduce, settings, dataset)
