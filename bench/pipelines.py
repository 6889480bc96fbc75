"""Pipelines of real processes over a link with delay: training steps a second.

    python bench/pipelines.py measure [--stages 2 4] [--latency 0 20 100] [--pad 60 120]
    python bench/pipelines.py show FILE

Each stage is a process with one thread, in a network namespace of its own, and :mod:`relay` is the
link between them: the real gloo over the kernel's real TCP, on one machine, root only. What is
trained, and the ways to train it, are in :mod:`workloads.pipelines`; each way that claims exact
gradients is first compared, over three steps, with the whole model in one process, and has no
figure if it disagrees.

Then the ways take turns, in an order drawn anew for every round. In a turn a way makes steps that
do not count, two and those that it makes while a gradient comes back from the last stage, and then
so many as take ``--seconds``. A turn's time is that of the slowest process, from the end of its own
uncounted steps to the end of its last: in a pipeline that never stops to empty itself this is what
a step takes. The median of the rounds is the figure.

``--pad FORWARD BACKWARD`` stretches each stage's passes over a batch to so many milliseconds, by
sleeping, so that a machine with fewer cores than stages can stand for one with enough; the passes
are computed all the same. Figures with padding say so, and ``late`` is by how much the passes of
the slowest process were longer than that, all in all, in the worst turn: where it is not near zero,
the figures are of a machine that was too busy, not of the pipeline. Without padding, stages beyond
the cores wait for each other's cores.

"no link: a stage alone" has no one to wait for. "posted" are the same exact gradients as PyTorch's
schedules give, by plain sends whose receives are posted a step ahead; PyTorch's are posted when
they are needed, which on gloo costs a latency more each. A row that is not exact says so.

Results are merged into ``bench/results/MACHINE-pipelines.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import operator
import os
import random
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import relay
import stored
from fused_dni.measure import timing
from groups import device_facts
from workloads import pipelines as w

#: Fewest steps of a turn that are not counted.
UNCOUNTED = 2
#: Steps of a turn at most.
MOST = 500
#: Seconds after which a message that has not come is an error of its mode.
TIMEOUT = 30
#: Seconds after which a process that does not answer ends the run.
PATIENCE = 180


# ------------------------------------------------------------------------------------ the workers


def work(setting: w.Setting, clock: w.Clock) -> None:
    """Be one stage: do what standard input asks for, a line of JSON each, and answer in a line."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    place = w.Place(setting, dist.get_rank(), clock)
    trainers: dict[str, w.Trainer] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = _answer(asked, place, trainers)
        except Exception as error:  # to be told, whatever it is
            text = (str(error).strip().splitlines() or [""])[0]
            answer = {"failed": f"{type(error).__name__}: {text}"}
        print(json.dumps(answer), flush=True)
    dist.destroy_process_group()


def _answer(asked: dict[str, Any], place: w.Place, trainers: dict[str, w.Trainer]) -> Any:
    name, clock = asked["mode"], place.clock
    mode = w.MODES[name]
    if asked["what"] == "check":
        # Connections of its own: what a mode leaves under way is never another's.
        own = w.Place(place.setting, place.rank, clock, dist.new_group())
        trainer = mode.start(own, mode)
        found = w.check(trainer, own, mode)
        trainers[name] = trainer
        return {"distance": found}
    trainer = trainers[name]
    trainer.train(asked["uncounted"])
    clock.wanted = clock.over = 0.0
    start = time.monotonic()
    trainer.train(asked["steps"])
    taken = time.monotonic() - start
    return {"seconds": taken, "late": clock.over / clock.wanted if clock.wanted else 0.0}


class Workers:
    """The processes of a pipeline, and what they are asked."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def ask(self, **asked: Any) -> list[dict[str, Any]]:
        """Ask all at once, and wait for all.

        Raises:
            RuntimeError: one failed at what it was asked.
            OSError: one has ended, or has said nothing for :data:`PATIENCE` seconds.
        """
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
        until, answers = time.monotonic() + PATIENCE, []
        for rank, process in enumerate(self._processes):
            ready, _, _ = select.select([process.stdout], [], [], max(0, until - time.monotonic()))
            if not ready:
                raise TimeoutError(f"rank {rank} said nothing for {PATIENCE} s")
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise ChildProcessError(f"rank {rank} ended with status {process.wait()}")
            answers.append(json.loads(line))
        if failed := [answer["failed"] for answer in answers if "failed" in answer]:
            raise RuntimeError(failed[0])
        return answers


@contextlib.contextmanager
def workers(network: relay.Network, setting: w.Setting, pad: Sequence[float]) -> Iterator[Workers]:
    """Start a process in each node; ``pad`` is in milliseconds."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    given = json.dumps({"setting": setting._asdict(), "pad": list(pad)})
    command = [sys.executable, __file__, "work", given]
    yield Workers(
        [
            network.start(
                node,
                command,
                env={**os.environ, **one, **quiet},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for node in range(setting.stages)
        ]
    )


# -------------------------------------------------------------------------------------- measuring


def checked(
    asked: Workers, setting: w.Setting, only: Sequence[str] | None, failures: dict[str, str]
) -> list[str]:
    """The modes that can have so many stages and compute what they say; reasons of the others."""
    found = []
    for name, mode in w.MODES.items():
        if setting.stages > mode.most or (only and not any(part in name for part in only)):
            continue
        try:
            asked.ask(what="check", mode=name)
            found.append(name)
        except RuntimeError as error:
            failures[name] = str(error)
            print(f"  no figure for {name}: {error}", file=sys.stderr)
    return found


def measure(
    network: relay.Network,
    asked: Workers,
    modes: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    back: float,
    draw: random.Random,
) -> dict[str, Any]:
    """Measure the modes in turns, on the link as it is; per mode seconds a step, and bytes.

    ``back`` is how many seconds a gradient is on its way from the last stage to the first.
    """
    steps: dict[str, int] = {}
    uncounted: dict[str, int] = {}
    for name in modes:
        first = asked.ask(what="time", mode=name, steps=2, uncounted=UNCOUNTED)
        taken = max(answer["seconds"] for answer in first) / 2
        steps[name] = max(2, min(MOST, round(seconds / taken)))
        uncounted[name] = UNCOUNTED + min(MOST, math.ceil(2 * back / taken))
    samples: dict[str, list[float]] = {name: [] for name in modes}
    late = dict.fromkeys(modes, 0.0)
    carried: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(rounds):
        for name in draw.sample(list(modes), len(modes)):
            before = _bytes(network)
            answers = asked.ask(
                what="time", mode=name, steps=steps[name], uncounted=uncounted[name]
            )
            samples[name].append(max(answer["seconds"] for answer in answers) / steps[name])
            late[name] = max(late[name], *(answer["late"] for answer in answers))
            carried[name].append((_bytes(network) - before) / (steps[name] + uncounted[name]))
    rows = {}
    for name, taken_by_round in samples.items():
        rows[name] = {
            "timing": timing.Timing.of(name, taken_by_round, taken_by_round, steps[name]),
            "late": late[name],
            "bytes": statistics.median(carried[name]),
            "exact": w.MODES[name].exact,
        }
    return rows


def _bytes(network: relay.Network) -> int:
    return sum(map(sum, network.carried()))


def run(options: argparse.Namespace) -> int:
    """Measure, and write after each group."""
    if reason := relay.missing():
        print(f"pipelines: {reason}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    facts = device_facts()
    path = options.out or stored.RESULTS / f"{stored.machine(facts)}-pipelines.json"
    draw = random.Random(0)
    for stages in options.stages:
        setting = w.Setting(stages, options.blocks, options.features, options.batch)
        failures: dict[str, str] = {}
        with (
            relay.Network(stages) as network,
            workers(network, setting, options.pad) as asked,
        ):
            modes = checked(asked, setting, options.only, failures)
            for latency in options.latency:
                network.change(
                    latency_ms=latency,
                    bandwidth_mbit=options.bandwidth,
                    jitter_ms=options.jitter,
                )
                print(f"{stages} stages, {latency:g} ms one way", flush=True)
                rows = measure(
                    network,
                    asked,
                    modes,
                    rounds=options.rounds,
                    seconds=options.seconds,
                    back=(stages - 1) * latency / 1e3,
                    draw=draw,
                )
                rows |= {name: {"failed": reason} for name, reason in failures.items()}
                group = {
                    "setting": setting._asdict(),
                    "latency_ms": latency,
                    "bandwidth_mbit": options.bandwidth,
                    "jitter_ms": options.jitter,
                    "padded_ms": options.pad if any(options.pad) else None,
                    "rows": rows,
                    "order": list(rows),
                }
                results = stored.benchmarks(path, facts)
                stored.put(results, "pipelines", _key(group), group)
                stored.write(path, results)
    print(table(stored.load(path)["pipelines"]))
    print(f"wrote {path}")
    return 0


def _key(group: dict[str, Any]) -> str:
    pad = group["padded_ms"]
    padded = f", padded to {pad[0]:g} + {pad[1]:g} ms" if pad else ""
    bandwidth, jitter = group["bandwidth_mbit"], group["jitter_ms"]
    uneven = f" +- {jitter:g}" if jitter else ""
    narrow = f", {bandwidth:g} Mbit/s" if bandwidth else ""
    shape = "x".join(str(size) for size in group["setting"].values())
    return f"{shape}, {group['latency_ms']:g}{uneven} ms{narrow}{padded}"


def table(groups: dict[str, dict[str, Any]]) -> str:
    """Steps a second by group and mode, the median with the least and most of the rounds."""
    lines = []
    sizes = operator.itemgetter("stages", "blocks", "features", "batch")
    for key, group in sorted(
        groups.items(), key=lambda item: (*sizes(item[1]["setting"]), item[1]["latency_ms"])
    ):
        lines.append(f"{key} (stages x blocks x features x batch, one way); {group['date']}")
        for name in group["order"]:
            row = group["rows"][name]
            if "failed" in row:
                lines.append(f"  {name:24} {row['failed']}")
                continue
            rates = [1 / taken for taken in row["timing"].rounds]
            late = f", {row['late']:.1%} late" if row["late"] else ""
            lines.append(
                f"  {name:24} {1 / row['timing'].median:8.2f} steps/s "
                f"[{min(rates):.2f}, {max(rates):.2f}], {row['bytes'] / 1e6:.2f} MB a step"
                f"{'' if row['exact'] else ', not exact'}{late}"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    worker = commands.add_parser("work", help="be one stage; `measure` starts these")
    worker.add_argument("given", type=json.loads)
    shown = commands.add_parser("show", help="print a file's figures")
    shown.add_argument("file", type=Path)
    measured = commands.add_parser("measure", help="measure, as root")
    measured.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    measured.add_argument("--latency", type=float, nargs="+", default=[0, 20, 100], help="ms")
    measured.add_argument("--bandwidth", type=float, help="10^6 bits a second")
    measured.add_argument("--jitter", type=float, default=0.0, help="ms to either side")
    measured.add_argument("--pad", type=float, nargs=2, default=[0, 0], metavar="MS")
    measured.add_argument("--only", nargs="+", help="modes whose names hold one of these")
    measured.add_argument("--rounds", type=int, default=5)
    measured.add_argument("--seconds", type=float, default=2.0, help="a turn")
    measured.add_argument("--blocks", type=int, default=8, help="of a stage")
    measured.add_argument("--features", type=int, default=512)
    measured.add_argument("--batch", type=int, default=256)
    measured.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "work":
        forward, backward = options.given["pad"]
        setting = w.Setting(**options.given["setting"])
        work(setting, w.Clock(forward / 1e3, backward / 1e3))
        return 0
    if options.command == "show":
        print(table(stored.load(options.file)["pipelines"]))
        return 0
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
