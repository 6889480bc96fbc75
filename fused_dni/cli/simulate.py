"""``simulate``: ways of training on N devices, over latency and the number of stages."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from fused_dni.cli.arguments import built
from fused_dni.cli.command import Measuring, UsageError
from fused_dni.cli.output import out_file, say_report
from fused_dni.measure.options import (
    EVERY,
    FACTORY,
    FILE,
    SECONDS,
    SHARE,
    SIZE,
    SPAN,
    SPEED,
    STAGE_SECONDS,
    TEXT,
    TIME,
    TIME_OR_SHARE,
    number,
    one_of,
    option,
    whole,
)
from fused_dni.measure.simulate_settings import (
    JITTERS,
    LATENCY,
    STAGES,
    TRIAL,
    Failures,
    Link,
    Settings,
    Stragglers,
    Times,
)

#: Options that are times of a stage.
TIMES = ("forward", "backward", "weight", "optimizer", "dni", "target", "lesson", "local")
#: Of --run: numbers of processes, and seconds one way.
RUN_STAGES, RUN_LATENCIES = (2, 4), (0.0, 0.02, 0.1)
#: Options that say how modes are run.
MODE_OPTIONS = (
    *("microbatches", "window", "buffer", "target_every", "max_age"),
    *("local_steps", "late_receives", "steps", "seed"),
)


@dataclass(kw_only=True)
class Simulate(Measuring):
    """Simulate training on a chain of N stages by GPipe, 1F1B, zero-bubble, PipeDream-2BW, stale
    gradients, DNI and local losses, and on N replicas by data parallel and DiLoCo: throughput,
    utilisation, bytes and ages over the latency and over N, and from which latency on each is
    ahead. Times of a stage are given, measured by --measure, or those of eight times Linear,
    BatchNorm, ReLU of 512 at a batch of 256."""

    name = "simulate"
    kind = "simulation"
    summary = "training on N devices: who waits for whom, at which latency"
    epilog = """A factory for --measure is called without arguments and returns (stages, batch,
loss): a list of modules, a function that returns (x, target), and one of the last
output and the target.

examples:
  {program} simulate --forward 4ms --backward 8ms --stages 8
  {program} simulate --measure package.module:factory --jitter 10% --out sim.json
  {program} simulate --chains 10 100 1000 --latency 20ms --modes 1f1b dni
  {program} simulate --check measured.json
  {program} report sim.json -o sim.html"""

    stages: int = option(STAGES, whole(1), "while the latency varies", group="sweep")
    latencies: tuple[float, ...] | None = option(None, TIME, "one way (0 to 200ms)", several="+")
    chains: tuple[int, ...] | None = option(
        None, whole(1), "numbers of stages (2 to 64)", several="+"
    )
    latency: float = option(LATENCY, TIME, "while the number of stages varies")
    modes: tuple[str, ...] | None = option(None, TEXT, "of these (all)", several="+")

    measure: str | None = option(
        None, FACTORY, "package.module:factory: measure it", group="a stage, for one microbatch"
    )
    seconds: float = option(STAGE_SECONDS, SECONDS, "of measuring, for each stage")
    forward: float | None = option(None, TIME, "forward pass")
    backward: float | None = option(None, TIME, "backward pass")
    weight: float | None = option(None, TIME, "the weights' part of it (half of it)")
    optimizer: float | None = option(None, TIME, "an update of the parameters (0)")
    dni: float | None = option(
        None, TIME, "a DNI step without target (forward + backward + optimizer + forward / 10)"
    )
    target: float | None = option(None, TIME, "what a target adds to it (0)")
    lesson: float | None = option(None, TIME, "a synthesizer's update (forward / 20)")
    local: float | None = option(
        None, TIME, "a step by a local loss (forward + backward + optimizer)"
    )
    rows: int | None = option(None, whole(1), "of a microbatch (256)")
    forward_bytes: float | None = option(None, SIZE, "of a message forward (512KiB)")
    backward_bytes: float | None = option(None, SIZE, "of a message back (512KiB)")
    parameter_bytes: float | None = option(
        None, SIZE, "of a stage's parameters, for replicas (8.4MB)"
    )

    latency_back: float | None = option(
        None, TIME, "of the way back (as forward)", group="links and disturbances"
    )
    bandwidth: float | None = option(None, SPEED, "like 10Gbit/s (no limit)")
    bandwidth_back: float | None = option(None, SPEED, "(as forward)")
    jitter: tuple[float, float] = option(
        (Link.jitter, Link.jitter_share),
        TIME_OR_SHARE,
        "mean of what a message takes longer at random, or 10% for a share of the latency",
    )
    jitter_shape: str = option(Link.shape, one_of(JITTERS), "distribution")
    straggler_factor: float = option(
        Stragglers.factor, number(1.0), "how many times as slow stages are now and then"
    )
    straggler_share: float = option(Stragglers.share, SHARE, "of the time")
    straggler_spell: float = option(Stragglers.spell, SPAN, "mean length")
    straggler_stage: int | None = option(None, whole(0), "index of this one alone (all)")
    fail_every: float | None = option(
        None, SPAN, "mean time between two failures of a device (never)"
    )
    restart: float = option(Failures.restart, TIME, "until it works again")
    checkpoint: float = option(Failures.checkpoint, TIME, "between two checkpoints")

    microbatches: int | None = option(
        None,
        whole(1),
        "of an update, of GPipe, 1F1B, zero-bubble, 2BW and data parallel (four a stage)",
        group="modes",
    )
    window: int | None = option(
        None,
        whole(1),
        "microbatches under way with stale gradients (what the way there and back takes, to 64 or "
        "two a stage)",
    )
    buffer: int = option(
        Settings.buffer, whole(1), "messages between two stages, of DNI and local losses"
    )
    target_every: int = option(Settings.target_every, EVERY, "microbatches for one target, of DNI")
    max_age: int | None = option(None, whole(0), "steps beyond which a target is dropped (never)")
    local_steps: int = option(Settings.local_steps, whole(1), "between two averages, H of DiLoCo")
    late_receives: bool = option(
        Settings.late_receives,
        help="exact modes ask for a message when they need it, as torch's schedules on gloo do",
    )
    steps: int = option(Settings.steps, whole(1), "microbatches measured at least")
    seed: int = option(Settings.seed, whole(0), "of all random numbers")

    paced: float | None = option(
        None,
        SECONDS,
        "run pipelines of 2 and 4 processes that sleep for the stages' times, so long for each "
        "mode and latency of 0, 20 and 100 ms, and hold the model against them",
        flag="run",
        group="output",
    )
    check_against: str | None = option(
        None,
        FILE,
        "JSON of measured throughputs to hold the model against (docs/simulate.md)",
        flag="check",
        group="output",
    )

    def run(self, command: str) -> int:
        from fused_dni.measure.simulate import MODES, check, sweep
        from fused_dni.measure.simulate.sweep import CHAINS, LATENCIES

        if self.target_every == 0:
            raise UsageError("--target-every never is --modes local: DNI learns from targets")
        out = out_file(self)
        measured_rows = None if self.check_against is None else check.read(self.check_against)
        with self.progress() as progress:
            times, measured = self._times(progress)
            settings = self._settings(times, measured)
            checked = None if measured_rows is None else check.compare(measured_rows, settings)
            report = sweep(
                settings,
                stages=self.stages,
                latencies=LATENCIES if self.latencies is None else self.latencies,
                chains=CHAINS if self.chains is None else self.chains,
                modes=self.modes or tuple(MODES),
                measured=measured,
                progress=progress.update,
                command=command,
            )
            if self.paced is not None:
                checked = [*(checked or []), *self._run(self.paced, settings, progress)]
        report.body["checked"] = checked
        say_report(report, self.json, out)
        return 0

    def _run(self, seconds: float, settings: Settings, progress: Any) -> list[dict[str, Any]]:
        """Run pipelines of processes that sleep, beside what was simulated of them."""
        from fused_dni.measure.simulate import Case, paced

        found = []
        modes = [name for name in paced.RUNTIME if name in (self.modes or paced.RUNTIME)]
        for stages in RUN_STAGES if modes else ():
            cases = [
                Case(stages, replace(settings, link=replace(settings.link, latency=latency)))
                for latency in RUN_LATENCIES
            ]
            runs = [paced.asked(mode, case, seconds) for case in cases for mode in modes]

            def tell(share: float, what: str = f"running {stages} processes") -> None:
                progress.update(what, share)

            found += paced.measure(runs, tell)
        return found

    def _times(self, progress: Any) -> tuple[Times, dict[str, Any] | None]:
        """Get the times of a stage, and what they were measured on."""
        given = {name: getattr(self, name) for name in TIMES if getattr(self, name) is not None}
        if self.measure is not None:
            from fused_dni.measure.simulate.calibrate import calibrate

            if given:
                raise UsageError(f"--{next(iter(given))} does not go with --measure")
            found = calibrate(
                built(self.measure),
                self.measure,
                seconds=self.seconds,
                progress=lambda share: progress.update("measuring", share),
            )
            return found.times, found.to_json()
        if not given:
            return TRIAL, None
        for name in ("forward", "backward"):
            if name not in given:
                raise UsageError(f"--{name} is missing: forward and backward are given together")
        try:
            return Times.of(**given), None
        except ValueError as error:
            raise UsageError(f"--{error}") from None

    def _settings(self, times: Times, measured: dict[str, Any] | None) -> Settings:
        sizes: dict[str, Any] = {}
        for name in ("rows", "forward_bytes", "backward_bytes", "parameter_bytes"):
            if getattr(self, name) is not None:
                sizes[name] = getattr(self, name)
            elif measured is not None:
                sizes[name] = measured[name]
        jitter, share = self.jitter
        return Settings(
            times=times,
            link=Link(
                latency=self.latency,
                latency_back=self.latency_back,
                bandwidth=math.inf if self.bandwidth is None else self.bandwidth,
                bandwidth_back=self.bandwidth_back,
                jitter=jitter,
                jitter_share=share,
                shape=self.jitter_shape,
            ),
            stragglers=Stragglers(
                self.straggler_factor,
                self.straggler_share,
                self.straggler_spell,
                self.straggler_stage,
            ),
            failures=Failures(self.fail_every, self.restart, self.checkpoint),
            **{name: getattr(self, name) for name in MODE_OPTIONS},
            **sizes,
        )
