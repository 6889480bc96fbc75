"""How many instructions is a training step, whatever the clock? Counted by Callgrind.

    .venv/bin/python bench/instructions.py [--steps 48] [--out FILE] [--json]

Four layers of 8 features (Linear, batch norm, ReLU), a head, cross-entropy, SGD, batch 8, one
thread: what is left of a step where kernels have next to nothing to do. Valgrind has AVX2 and no
more, so that our AVX2 kernels run wherever there are any. Stock PyTorch is counted in the same
process. The counts are merged into ``bench/results/<device>-cpu.json``, which
``bench/tables.py render`` reads.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import stored
from groups import device_facts
from workloads import step

CASE = step.Case(8, 8)
METHODS = (step.STOCK, step.OURS, step.DNI_4, step.DNI_NEVER)
#: Steps in front of those that are counted: past the 64th lesson at k = 4, in which a unit is
#: looked at, and well in front of the 128th, which is the next one.
WARM = 264


def inside(steps: int) -> None:
    """Be counted: two parts of Callgrind's output for each method, in their order, one of twice as
    many steps as the other. (To ask for a part is counted too.)"""
    torch.set_num_threads(1)
    trainings = [step.Training(CASE, "sgd", method, lr=1e-4) for method in METHODS]
    runs = [step.stepper(training, 1) for training in trainings]
    for run in runs:
        for _ in range(WARM):
            run()
    for run in runs:
        _control("--instr=on")
        for times in (1, 2):
            _control("--zero")
            for _ in range(times * steps):
                run()
            _control("--dump")
        _control("--instr=off")


def _control(what: str) -> None:
    subprocess.run(
        ["callgrind_control", what, str(os.getpid())], check=True, stdout=subprocess.DEVNULL
    )


def counted(text: str) -> int:
    """Return the instructions in a part of Callgrind's output.

    Raises:
        ValueError: it has no totals.
    """
    found = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
    if found is None:
        raise ValueError("a part of Callgrind's output without totals")
    return int(found[1])


def count(steps: int) -> dict[str, int]:
    """Instructions a step, by method.

    Raises:
        RuntimeError: Valgrind failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts"
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--separate-threads=no"]
        command += [f"--callgrind-out-file={out}", sys.executable, __file__]
        command += ["--inside", "--steps", str(steps)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode:
            raise RuntimeError(f"Valgrind failed: {done.stderr.strip()[-400:]}")
        parts = [
            counted(Path(f"{out}.{i}").read_text(encoding="utf-8"))
            for i in range(1, 2 * len(METHODS) + 1)
        ]
        return {
            method.name: round((twice - once) / steps)
            for method, once, twice in zip(METHODS, parts[::2], parts[1::2], strict=True)
        }


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=48, help="steps that are counted")
    parser.add_argument("--out", type=Path, help="results to merge into")
    parser.add_argument("--json", action="store_true", help="print the counts for machines")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.steps < 1 or given.steps % step.CYCLE:
        parser.error(f"--steps must be a multiple of {step.CYCLE}, got {given.steps}")
    if given.inside:
        inside(given.steps)
        return 0
    if shutil.which("valgrind") is None or shutil.which("callgrind_control") is None:
        print("needs Valgrind (Debian, Ubuntu: apt install valgrind)", file=sys.stderr)
        return 2
    print("Counting under Valgrind: some minutes ...", file=sys.stderr)
    try:
        counts = count(given.steps)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    stock = counts[step.STOCK.name]
    group: dict[str, Any] = {"rows": counts, "order": list(counts)}
    facts = device_facts()
    path = given.out or stored.result_path(facts, "step")
    results = stored.benchmarks(path, facts)
    stored.put(results, "instructions", "4 layers 8/8 sgd", group)
    stored.write(path, results)
    if given.json:
        print(json.dumps(counts, indent=2))
    else:
        for name, number in counts.items():
            print(f"{number:>12,}  {number / stock:6.1%} of stock  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
