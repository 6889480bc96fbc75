"""A stage that is slow now and then: steps a second and test error, by way of getting a gradient.

    python bench/stragglers.py --data DIR

MNIST by two processes of :mod:`fused_dni.distributed` over loopback, without a delay: the network,
optimizers and rates of ``fused-dni delay``. Each stage's passes over a batch are stretched to 3 and
6 ms by sleeping, so that a busy or small machine stands for one with a core a stage; the passes
are computed all the same. The upper stage is so many times as slow for a quarter of the time, in
spells of half a second on the average, drawn from the run's seed. Windows are the pipeline's
default. All ways of one factor and seed meet the same spells, and run one after the other.

Steps a second are measured apart, by processes that only sleep, for passes of 20 and 40 ms, so that
what else a machine does is not in them; of ways that differ in the optimizer alone, once.

Results are written to ``bench/results/MACHINE-stragglers.json``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import fused_dni as fd
import stored
from fused_dni.distributed import Pipeline
from fused_dni.experiments import data, delay, delay_arms
from fused_dni.experiments.delay_arms import UpdateFeedback, build
from fused_dni.experiments.delay_settings import Settings, arm
from fused_dni.measure.baseline import facts
from fused_dni.measure.simulate import Case, Stragglers, Times, paced
from fused_dni.measure.simulate import Settings as Simulated
from fused_dni.report import Result

#: By arm of ``fused-dni delay``: the simulation's mode, the pipeline's, and the rate, which is what
#: that command chose at a lag of 5 where it was asked to.
WAYS = {
    "backprop": ("gpipe", "exact", 1e-3),
    "stale": ("stale", "stale", 1e-3),
    "nesterov": ("stale", "stale", 3e-3),
    "feedback": ("stale", "stale", 1e-3),
    "local": ("local", "local", 1e-2),
    "cdni-16": ("dni", "decoupled", 1e-2),
}
FORWARD, BACKWARD = 3e-3, 6e-3
SHARE, SPELL = 0.25, 0.5
STAGES = 2
#: Of the processes that only sleep.
SLEEP_FORWARD, SLEEP_BACKWARD = 20e-3, 40e-3


class Run(NamedTuple):
    """A run: an arm, how slow the upper stage is now and then, a seed, epochs, the data's folder,
    and where weights are put."""

    name: str
    factor: float
    seed: int
    epochs: int
    folder: str
    kept: str


def work(rank: int, run: Run) -> dict[str, Any]:
    """Train one stage of a run; what it took."""
    simulated, mode, rate = WAYS[run.name]
    dataset = data.load("mnist", folder=run.folder)
    settings = Settings.of("mnist", epochs=run.epochs, stages=STAGES)
    which = arm(run.name)
    stage = build(which, settings, dataset, run.seed)[rank]
    optimizer = delay_arms.optimizer_of(which, [stage], rate, settings.share)
    inner = optimizer.optimizer if isinstance(optimizer, UpdateFeedback) else optimizer
    each = len(dataset.train.labels) // settings.batch_size
    steps = each * run.epochs
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(inner, steps)
    warmup = round(settings.warmup * steps)
    plan = fd.Schedule(stage, warmup) if stage.decoupled is not None else None
    loss = delay_arms.loss_of(settings)
    whole = FORWARD + BACKWARD
    times = Times.of(FORWARD, BACKWARD, dni=whole, local=whole, lesson=0.0)
    slow = Stragglers(run.factor, SHARE, SPELL, STAGES - 1)
    case = Case(STAGES, Simulated(times=times, stragglers=slow, seed=run.seed))
    with Pipeline(stage, loss=loss, mode=mode) as pipeline:
        pace = paced.Pace(pipeline, simulated, case)
        dist.barrier()
        began, counted = time.monotonic(), 0
        for out in pipeline.run(_batches(dataset, settings.batch_size, run.seed, run.epochs)):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if plan is not None:
                plan.step()
            if out.step + 1 == warmup:  # on all ways: what waits in it is not what is asked for
                began, counted = time.monotonic(), steps - warmup
        taken = time.monotonic() - began
    age = pipeline.report()["age"]
    torch.save(stage.state_dict(), Path(run.kept) / f"{rank}.pt")
    late = pace.over / max(pace.wanted, 1e-9)
    return {"seconds": taken, "steps": counted, "late": late, "age": age}


def _batches(dataset: data.Dataset, size: int, seed: int, epochs: int) -> Any:
    count = len(dataset.train.labels)
    for epoch in range(epochs):
        for rows in data.batches(data.permutation(count, seed, epoch), size):
            yield data.pick(dataset.train, rows)


def _row(run: Run, answers: Sequence[dict[str, Any]], dataset: data.Dataset) -> dict[str, Any]:
    settings = Settings.of("mnist", epochs=run.epochs, stages=STAGES)
    stages = build(arm(run.name), settings, dataset, run.seed)
    for rank, stage in enumerate(stages):
        stage.load_state_dict(torch.load(Path(run.kept) / f"{rank}.pt", weights_only=True))
    return {
        "name": run.name,
        "factor": run.factor,
        "seed": run.seed,
        "steps_per_second": answers[0]["steps"] / max(a["seconds"] for a in answers),
        "error": delay.error(stages, settings, dataset.test),
        "age": answers[0]["age"]["mean"],
        "oldest": answers[0]["age"]["oldest"],
        "late": max(a["late"] for a in answers),
    }


def throughput(factors: Sequence[float], seconds: float) -> list[dict[str, Any]]:
    """Steps a second of processes that sleep, by factor and way."""
    whole = SLEEP_FORWARD + SLEEP_BACKWARD
    times = Times.of(SLEEP_FORWARD, SLEEP_BACKWARD, dni=whole, local=whole, lesson=0.0)
    runs, keys = [], []
    for factor in factors:
        slow = Stragglers(factor, SHARE, SPELL, STAGES - 1)
        case = Case(STAGES, Simulated(times=times, stragglers=slow, steps=2000))
        for mode in dict.fromkeys(mode for mode, _, _ in WAYS.values()):
            name = next(name for name, way in WAYS.items() if way[0] == mode)
            runs.append(paced.asked(mode, case, seconds)._replace(window=4, oldest=32))
            keys.append({"name": name, "factor": factor})
    return [key | row for key, row in zip(keys, paced.measure(runs), strict=True)]


def command(options: argparse.Namespace) -> str:
    """Write what makes the same again, but for the folders."""
    asked = ["--data DIR"]
    for name in ("factors", "seeds"):
        asked.append(f"--{name} {' '.join(f'{value:g}' for value in getattr(options, name))}")
    asked += [f"--epochs {options.epochs}", f"--seconds {options.seconds:g}"]
    return f"python bench/stragglers.py {' '.join(asked)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    import tempfile

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of the MNIST files")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="of sleeping, for each way")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = facts(command(options))
    path = options.out or stored.RESULTS / f"{stored.machine(found)}-stragglers.json"
    dataset = data.load("mnist", folder=options.data)
    rows: list[dict[str, Any]] = []
    results = Result(
        "benchmarks",
        title="A stage that is slow now and then",
        facts=found,
        settings={
            "forward_s": FORWARD,
            "backward_s": BACKWARD,
            "share": SHARE,
            "spell_s": SPELL,
            "epochs": options.epochs,
            "seconds": options.seconds,
        },
        body={"stragglers": rows, "throughput": throughput(options.factors, options.seconds)},
    )
    for seed in options.seeds:
        for factor in options.factors:
            with tempfile.TemporaryDirectory() as folder:
                runs = []
                for name in WAYS:
                    kept = Path(folder) / name
                    kept.mkdir()
                    runs.append(Run(name, factor, seed, options.epochs, options.data, str(kept)))
                answers = paced.processes(
                    STAGES, work, runs, [1200.0] * len(runs), lambda fraction: None
                )
                for run, answer in zip(runs, answers, strict=True):
                    rows.append(row := _row(run, answer, dataset))
                    print({k: v for k, v in row.items() if k != "age"}, flush=True)
            stored.write(path, results)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
