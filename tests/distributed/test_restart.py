"""A rank that is killed: all start anew, from the last step that all stages have saved."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

#: Trains by torchrun's launcher, and writes down every step that a stage applies.
PROGRAM = """
import os, sys
from pathlib import Path
from fused_dni.experiments import staged
from fused_dni.report.files import as_json

folder = Path(sys.argv[1])

class Noted(staged.Checkpoints):
    def step(self):
        with (folder / f"steps-{self.pipeline.rank}").open("a") as file:
            file.write(f"{os.getpid()} {self.pipeline.steps}\\n")
        super().step()

def work(*arguments):
    staged.Checkpoints = Noted
    return staged_work(*arguments)

staged_work, staged.work = staged.work, work
if __name__ == "__main__":
    settings = staged.Settings(stages=2, modes=("decoupled",), hidden=32, depth=2,
                               epochs=int(sys.argv[2]), checkpoint_every=20, target_every=2)
    report = staged.train(settings, str(folder), restarts=5)
    (folder / "report").write_text(as_json(report))
"""


def children(of: int) -> list[int]:
    """Ranks: the launcher's children that have begun to train."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == of and b"spawn_main" in command:
            found.append(int(path.parent.name))
    return found


def run_and_kill(folder: Path, seed: int, epochs: int = 40, kill: bool = True) -> dict:
    """Train, with one rank killed at a random moment of its training; the report."""
    dice = random.Random(seed)
    script = folder / "program.py"
    script.write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(script), str(folder), str(epochs)]
    program = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 300.0
        log, after = folder / "steps-0", dice.randrange(30, 400)
        while kill:
            assert time.monotonic() < deadline and program.poll() is None
            if log.exists() and len(log.read_text().splitlines()) >= after:
                os.kill(dice.choice(children(program.pid)), signal.SIGKILL)
                break
            time.sleep(0.02)
        said, _ = program.communicate(timeout=max(1.0, deadline - time.monotonic()))
        assert program.returncode == 0, said.decode()[-3000:]
    finally:
        program.kill()
    return json.loads((folder / "report").read_text())


def check(folder: Path, report: dict, killed: bool) -> None:
    steps = report["steps"]
    (run,) = report["runs"]
    for rank in range(2):
        lives: dict[int, list[int]] = {}
        for line in (folder / f"steps-{rank}").read_text().splitlines():
            pid, step = map(int, line.split())
            lives.setdefault(pid, []).append(step)
        histories = list(lives.values())
        assert len(histories) > 1 if killed else len(histories) == 1
        for before, history in zip([[0], *histories], histories, strict=False):
            # From a checkpoint that the life before had come to, every step once, in order.
            first = history[0] - 1
            assert first % 20 == 0 and first <= before[-1]
            assert history == list(range(first + 1, first + 1 + len(history)))
        assert histories[-1][-1] == steps
    if killed:
        assert run["resumed_at"] > 0 and run["resumed_at"] % 20 == 0
        assert run["error"] < 0.06
    assert not list(folder.rglob("*.part"))


@pytest.mark.slow(30)
def test_killed_and_restarted(tmp_path):
    check(tmp_path, run_and_kill(tmp_path, 1), killed=True)


@pytest.mark.repeat  # other ranks, other moments
@pytest.mark.parametrize("seed", range(2, 21))
def test_killed_and_restarted_often(seed, tmp_path):
    check(tmp_path, run_and_kill(tmp_path, seed), killed=True)


@pytest.mark.repeat  # the control of the one above
@pytest.mark.slow(20)
def test_not_killed(tmp_path):
    """What is looked for above is not there otherwise."""
    check(tmp_path, run_and_kill(tmp_path, 0, epochs=5, kill=False), killed=False)
