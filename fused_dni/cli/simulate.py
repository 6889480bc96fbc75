"""``simulate``: ways of training on N devices, over latency and the number of stages."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from fused_dni.cli import units
from fused_dni.cli.arguments import (
    PROGRAM,
    UsageError,
    built,
    common,
    every,
    positive,
    set_threads,
    whole,
)
from fused_dni.cli.output import OutFile, say_report

if TYPE_CHECKING:
    from fused_dni.measure.simulate import Settings, Times

#: Times of a stage, with what each of them is by default.
TIMES = (
    ("forward", "forward pass"),
    ("backward", "backward pass"),
    ("weight", "the weights' part of it (half of it)"),
    ("optimizer", "an update of the parameters (0)"),
    ("dni", "a DNI step without target (forward + backward + optimizer + forward / 10)"),
    ("target", "what a target adds to it (0)"),
    ("lesson", "a synthesizer's lesson (forward / 20)"),
    ("local", "a step by a local loss (forward + backward + optimizer)"),
)

#: Of --run: numbers of processes, and seconds one way.
RUN_STAGES, RUN_LATENCIES = (2, 4), (0.0, 0.02, 0.1)


def add_simulate(commands: Any) -> None:
    command = commands.add_parser(
        "simulate",
        help="training on N devices: who waits for whom, at which latency",
        description="Simulate training on a chain of N stages by GPipe, 1F1B, zero-bubble, "
        "PipeDream-2BW, stale gradients, DNI and local losses, and on N replicas by data parallel "
        "and DiLoCo: throughput, utilisation, bytes and ages over the latency and over N, and from "
        "which latency on each is ahead. Times of a stage are given, measured by --measure, or "
        "those of eight times Linear, BatchNorm, ReLU of 512 at a batch of 256.",
        epilog="A factory for --measure is called without arguments and returns (stages, batch, "
        "loss): a list of\nmodules, a function that returns (x, target), and one of the last "
        "output and the target.\n\n"
        "examples:\n"
        f"  {PROGRAM} simulate --forward 4ms --backward 8ms --stages 8\n"
        f"  {PROGRAM} simulate --measure package.module:factory --jitter 10% --out sim.json\n"
        f"  {PROGRAM} simulate --chains 10 100 1000 --latency 20ms --modes 1f1b dni\n"
        f"  {PROGRAM} simulate --check measured.json\n"
        f"  {PROGRAM} report sim.json -o sim.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = command.add_argument_group("sweep")
    what.add_argument("--stages", type=whole(1, "stages"), default=4, metavar="N",
                      help="while the latency varies (4)")  # fmt: skip
    what.add_argument("--latencies", nargs="+", type=units.time("a latency"), metavar="TIME",
                      help="one way (0 to 200ms)")  # fmt: skip
    what.add_argument("--chains", nargs="+", type=whole(1, "stages"), metavar="N",
                      help="numbers of stages (2 to 64)")  # fmt: skip
    what.add_argument("--latency", type=units.time("a latency"), default=0.02, metavar="TIME",
                      help="while the number of stages varies (20ms)")  # fmt: skip
    what.add_argument("--modes", nargs="+", metavar="MODE", help="of these (all)")
    stage = command.add_argument_group("a stage, for one microbatch")
    stage.add_argument("--measure", metavar="FACTORY", help="package.module:factory: measure it")
    stage.add_argument("--seconds", type=positive("seconds"), default=2.0,
                       help="of measuring, for each stage (2)")  # fmt: skip
    for name, meaning in TIMES:
        stage.add_argument(f"--{name}", type=units.time(name), metavar="TIME", help=meaning)
    stage.add_argument("--rows", type=whole(1, "rows"), help="of a microbatch (256)")
    for name, meaning in (
        ("forward-bytes", "of a message forward (512KiB)"),
        ("backward-bytes", "of a message back (512KiB)"),
        ("parameter-bytes", "of a stage's parameters, for replicas (8.4MB)"),
    ):
        stage.add_argument(f"--{name}", type=units.size(name), metavar="SIZE", help=meaning)
    link = command.add_argument_group("links and disturbances")
    link.add_argument("--latency-back", type=units.time("a latency"), metavar="TIME",
                      help="of the way back (as forward)")  # fmt: skip
    for name in ("bandwidth", "bandwidth-back"):
        link.add_argument(f"--{name}", type=units.rate(name), metavar="RATE",
                          help="like 10Gbit/s (no limit)" if name == "bandwidth"
                          else "(as forward)")  # fmt: skip
    link.add_argument("--jitter", type=units.time_or_share("jitter"), default=(0.0, 0.0),
                      metavar="TIME", help="mean of what a message takes longer at random, or "
                      "10%% for a share of the latency (0)")  # fmt: skip
    link.add_argument("--jitter-shape", default="exponential",
                      choices=("exponential", "uniform", "lognormal"),
                      help="(exponential)")  # fmt: skip
    link.add_argument("--straggler-factor", type=positive("factor"), default=1.0, metavar="X",
                      help="how many times as slow stages are now and then (1)")  # fmt: skip
    link.add_argument("--straggler-share", type=units.percent("share"), default=0.05,
                      metavar="SHARE", help="of the time (5%%)")  # fmt: skip
    link.add_argument("--straggler-spell", type=units.time("a spell", positive=True), default=1.0,
                      metavar="TIME", help="mean length (1s)")  # fmt: skip
    link.add_argument("--straggler-stage", type=whole(0, "a stage"), metavar="INDEX",
                      help="this one alone (all)")  # fmt: skip
    link.add_argument("--fail-every", type=units.time("fail-every", positive=True), metavar="TIME",
                      help="mean time between two failures of a device (never)")  # fmt: skip
    link.add_argument("--restart", type=units.time("restart"), default=60.0, metavar="TIME",
                      help="until it works again (1min)")  # fmt: skip
    link.add_argument("--checkpoint", type=units.time("checkpoint"), default=600.0, metavar="TIME",
                      help="between two checkpoints (10min)")  # fmt: skip
    how = command.add_argument_group("modes")
    how.add_argument("--microbatches", type=whole(1, "microbatches"), metavar="M",
                     help="of an update, of GPipe, 1F1B, zero-bubble, 2BW and data parallel "
                     "(four a stage)")  # fmt: skip
    how.add_argument("--window", type=whole(1, "a window"), metavar="W",
                     help="microbatches under way with stale gradients (what the way there "
                     "and back takes, to 64 or two a stage)")  # fmt: skip
    how.add_argument("--buffer", type=whole(1, "a buffer"), default=64, metavar="MESSAGES",
                     help="between two stages, of DNI and local losses (64)")  # fmt: skip
    how.add_argument("--target-every", type=every, default=1, metavar="K",
                     help="microbatches for one target, of DNI (1)")  # fmt: skip
    how.add_argument("--max-age", type=whole(0, "an age"), metavar="STEPS",
                     help="beyond which a target is dropped (never)")  # fmt: skip
    how.add_argument("--local-steps", type=whole(1, "steps"), default=100, metavar="H",
                     help="between two averages, of DiLoCo (100)")  # fmt: skip
    how.add_argument("--late-receives", action="store_true",
                     help="exact modes ask for a message when they need it, as torch's schedules "
                     "on gloo do")  # fmt: skip
    how.add_argument("--steps", type=whole(1, "steps"), default=200,
                     help="microbatches measured at least (200)")  # fmt: skip
    how.add_argument("--seed", type=whole(0, "a seed"), default=0, help="(0)")
    out = command.add_argument_group("output")
    out.add_argument("--check", metavar="FILE", dest="measured",
                     help="JSON of measured throughputs to hold the "
                     "model against (docs/simulate.md)")  # fmt: skip
    out.add_argument("--run", type=positive("seconds"), metavar="SECONDS", dest="paced",
                     help="run pipelines of 2 and 4 processes that sleep for the stages' times, "
                     "so long for each mode and latency of 0, 20 and 100 ms, and hold the model "
                     "against them")  # fmt: skip
    out.add_argument("--out", metavar="FILE", help="write the report as JSON")
    out.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    out.add_argument("--quiet", action="store_true", help="no progress")
    common(command)
    command.set_defaults(run=_simulate)


def _simulate(args: argparse.Namespace, command: str) -> int:
    from fused_dni.measure.simulate import MODES, check, sweep
    from fused_dni.measure.simulate.sweep import LATENCIES, STAGES
    from fused_dni.report.files import as_json
    from fused_dni.report.progress import Progress

    if args.target_every == 0:
        raise UsageError("--target-every never is --modes local: DNI learns from targets")
    out = OutFile("--out", args.out)
    measured_rows = None if args.measured is None else check.read(args.measured)
    set_threads(args)
    progress = Progress(enabled=not args.quiet)
    with progress:
        times, measured = _times(args, progress)
        settings = _settings(args, times, measured)
        checked = None if measured_rows is None else check.compare(measured_rows, settings)
        report = sweep(
            settings,
            stages=args.stages,
            latencies=LATENCIES if args.latencies is None else args.latencies,
            chains=STAGES if args.chains is None else args.chains,
            modes=args.modes or tuple(MODES),
            measured=measured,
            progress=progress.update,
            command=command,
        )
        if args.paced is not None:
            checked = [*(checked or []), *_run(args, settings, progress)]
    report.body["checked"] = checked
    out.write(as_json(report))
    say_report(report, args.json)
    out.finish()
    return 0


def _run(args: argparse.Namespace, settings: Settings, progress: Any) -> list[dict[str, Any]]:
    """Pipelines of processes that sleep, beside what was simulated of them."""
    from dataclasses import replace

    from fused_dni.measure.simulate import Case, paced

    found = []
    modes = [name for name in paced.RUNTIME if name in (args.modes or paced.RUNTIME)]
    for stages in RUN_STAGES if modes else ():
        cases = [
            Case(stages, replace(settings, link=replace(settings.link, latency=latency)))
            for latency in RUN_LATENCIES
        ]
        runs = [paced.asked(mode, case, args.paced) for case in cases for mode in modes]

        def tell(share: float, what: str = f"running {stages} processes") -> None:
            progress.update(what, share)

        found += paced.measure(runs, tell)
    return found


def _times(args: argparse.Namespace, progress: Any) -> tuple[Times, dict[str, Any] | None]:
    """The times of a stage, and what they were measured on."""
    from fused_dni.measure.simulate import Times
    from fused_dni.measure.simulate.settings import TRIAL

    given = {name: getattr(args, name) for name, _ in TIMES if getattr(args, name) is not None}
    if args.measure is not None:
        from fused_dni.measure.simulate.calibrate import calibrate

        if given:
            raise UsageError(f"--{next(iter(given))} does not go with --measure")
        if ":" not in args.measure:
            raise UsageError(f"--measure takes package.module:factory, got {args.measure!r}")
        found = calibrate(
            built(args.measure),
            args.measure,
            seconds=args.seconds,
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


def _settings(args: argparse.Namespace, times: Times, measured: dict[str, Any] | None) -> Settings:
    from fused_dni.measure.simulate import Failures, Link, Settings, Stragglers

    sizes: dict[str, Any] = {}
    for name in ("rows", "forward_bytes", "backward_bytes", "parameter_bytes"):
        if getattr(args, name) is not None:
            sizes[name] = getattr(args, name)
        elif measured is not None:
            sizes[name] = measured[name]
    if args.straggler_factor < 1.0:
        raise UsageError(f"--straggler-factor must be from 1 on, got {args.straggler_factor:g}")
    jitter, share = args.jitter
    return Settings(
        times=times,
        link=Link(
            latency=args.latency,
            latency_back=args.latency_back,
            bandwidth=math.inf if args.bandwidth is None else args.bandwidth,
            bandwidth_back=args.bandwidth_back,
            jitter=jitter,
            jitter_share=share,
            shape=args.jitter_shape,
        ),
        stragglers=Stragglers(
            args.straggler_factor, args.straggler_share, args.straggler_spell, args.straggler_stage
        ),
        failures=Failures(args.fail_every, args.restart, args.checkpoint),
        microbatches=args.microbatches,
        window=args.window,
        buffer=args.buffer,
        target_every=args.target_every,
        max_age=args.max_age,
        local_steps=args.local_steps,
        late_receives=args.late_receives,
        steps=args.steps,
        seed=args.seed,
        **sizes,
    )
