"""The script for a GPU, rehearsed without one: its two calls against stand-ins on a clock that only
they move."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu_baselines
import gpu_kernels
import gpu_run
from fused_dni.cli import parser as command_line

ROOT = Path(__file__).resolve().parents[2]
H200 = {
    "name": "NVIDIA H200",
    "capability": "9.0",
    "driver": "580.159.03",
    "driver_cuda": "13.0",
    "torch": "2.11.0",
    "extensions": ".cpython-312-x86_64-linux-gnu.so",
}
FIRST, SECOND = ([part.name for part in gpu_run.PARTS[call]] for call in gpu_run.CALLS)
TOOLS = ("nvcc", "ncu", "compute-sanitizer")
COMMIT = {"FUSED_DNI_COMMIT": "abc"}


class Killed(BaseException):
    """Nothing of this process runs after it."""


class Stage(gpu_run.Machine):
    """A machine whose parts take the seconds that they are given (5), then end with a status.

    Attributes:
        takes, ends: seconds and exit status, or statuses one after the other, by part.
        ran: the parts, with their limits and command lines.
    """

    def __init__(self, facts=H200, tools=TOOLS, takes=None, ends=None, probe=0, said=""):
        self.clock = 0.0
        self.facts, self.tools, self.probe, self.said = facts, tools, probe, said
        self.takes, self.ends = takes or {}, ends or {}
        self.ran = []

    def now(self):
        return self.clock

    def which(self, name):
        return f"/tools/{name}" if name in self.tools else None

    def run(self, command, environment, log, limit, interrupt=False):
        self.environment = environment
        if log.name == "probe.log":
            log.write_text(self.said + "\n")
            found = {"baselines": {"device": self.facts}}
            Path(command[2]).write_text(json.dumps(found))
            self.clock += 5
            return gpu_run.Ended(self.probe, 5.0)
        if log.name == "nvcc.log":
            log.write_text("Cuda compilation tools, release 13.0, V13.0.88\n")
            return gpu_run.Ended(0, 0.0)
        name = log.read_text().splitlines()[-1].split()[1].rstrip(":")
        self.ran.append((name, limit, command))
        slow = name == "ncu" or command[0] == "/tools/compute-sanitizer"
        assert environment.get("FUSED_DNI_SPIN_BOUND") == ("0" if slow else None)
        if command[0] == "/tools/compute-sanitizer":
            assert command[3:5] == ["--report-api-errors", "no"]
        takes = self.takes.get(name, self.takes.get("all", 5.0))
        if command[1].endswith(("gpu_kernels.py", "gpu_baselines.py")) and command[2][:2] != "--":
            self.measure(name, Path(command[2]), min(takes, limit))
        if name == "ncu":
            Path(command[-1]).touch()
        taken = min(takes, limit)
        self.clock += taken
        with open(log, "a") as output:
            output.write(f"said by {name}\n========= ERROR SUMMARY: 0 errors\n3 passed in 1.0s\n")
        statuses = self.ends.get(name, [0])
        status = statuses.pop(0) if statuses else 0
        return gpu_run.Ended(status if takes < limit else None, taken)

    def measure(self, name, file, seconds):
        """A figure a second, written as it is made."""
        for figure in range(int(min(seconds, 4))):
            found = json.loads(file.read_text()) if file.exists() else {}
            found[f"{name} {figure}"] = 1.0
            gpu_run.write(file, json.dumps(found))


@pytest.fixture
def rehearse(tmp_path, monkeypatch, capsys):
    """Run the script on a stage; its exit status and what it says on stderr."""
    root = tmp_path / "root"
    (root / "fused_dni" / "backends").mkdir(parents=True)
    (root / "fused_dni" / "backends" / "_cuda.so").touch()
    real = gpu_run.Run
    monkeypatch.setattr(gpu_run, "Run", lambda *given: real(*given, root=root))

    def rehearse(stage, *words, **environ):
        status = gpu_run.main(list(map(str, words)), stage, COMMIT | environ)
        return status, capsys.readouterr().err.splitlines()

    rehearse.root = root
    return rehearse


def left(out):
    """All files below OUT, none deeper than two folders, at most eight a run."""
    found = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert all(len(path.parts) <= 3 for path in found)
    assert max(map(len, ([p for p in found if p.parent == folder] for folder in {
        path.parent for path in found
    })), default=0) <= 8  # fmt: skip
    return {str(path) for path in found}


def record(out):
    return json.loads((out / "run.json").read_text())


def states(out):
    return {f"{part['call']} {part['name']}": part["status"] for part in record(out)["parts"]}


# ---------------------------------------------------------------------------------- the calls


@pytest.mark.parametrize("calls", [["first"], ["second"], []], ids=str)
def test_all_parts_in_their_order_each_with_its_share(calls, tmp_path, rehearse):
    stage, out = Stage(), tmp_path / "out"
    assert rehearse(stage, *calls, out) == (0, [])
    names = [name for call in calls or gpu_run.CALLS for name in (FIRST, SECOND)[call != "first"]]
    assert [name for name, _, _ in stage.ran] == names
    if calls:  # the first has its share of all, what it does not use is for those behind it
        parts, usual = gpu_run.PARTS[calls[0]], gpu_run.CALLS[calls[0]]
        whole = sum(part.share for part in parts)
        limit = parts[0].stretch * (usual - 5) * parts[0].share / whole
        assert stage.ran[0][1] == pytest.approx(limit)
        assert all(
            limit > parts[i].share * usual / whole for i, (_, limit, _) in enumerate(stage.ran) if i
        )
    found = left(out)
    assert found <= set(gpu_run.FILES) and len(found) < 8
    assert set(states(out).values()) == {"done"}
    assert record(out)["commit"] == "abc" and record(out)["environment"] == H200
    assert stage.environment["FUSED_DNI_COMMIT"] == "abc"
    assert stage.environment["FUSED_DNI_CUDA_ARCHS"] == "90a"
    text = (out / "summary.txt").read_text().splitlines()
    assert text[0] == "NVIDIA H200, driver 580.159.03, torch 2.11.0, commit abc"
    assert text[-1] == "no part has failed"
    sanitizers = [line for line in text if line.startswith("memcheck-cuda: =====")]
    assert sanitizers == ["memcheck-cuda: ========= ERROR SUMMARY: 0 errors"] * (
        calls != ["second"]
    )
    assert ("tests: 3 passed in 1.0s" in text) is (calls != ["first"])


def test_no_compiler_runs_before_a_figure_is_saved():
    for call in gpu_run.CALLS:
        names = [part.name for part in gpu_run.PARTS[call]]
        slow = [i for i, name in enumerate(names) if name in ("compiled", "autotuned", "network")]
        assert all(i > names.index("rows-triton") for i in slow)
    assert not {"compiled", "autotuned", "network", "rows-triton"} & {*FIRST}


@pytest.mark.parametrize("takes", [math.inf, 40.0, 0.5])
@pytest.mark.parametrize("seconds", [17, 240, 720])
def test_the_time_is_kept_whatever_parts_take(seconds, takes, tmp_path, rehearse):
    stage, out = Stage(takes={"all": takes}), tmp_path / "out"
    status, said = rehearse(stage, out, seconds)
    assert stage.clock <= seconds + 1e-6
    known = states(out)
    assert list(known) == [f"first {n}" for n in FIRST] + [f"second {n}" for n in SECOND]
    assert status == (0 if set(known.values()) == {"done"} else 1)
    if takes == math.inf:
        assert set(known.values()) <= {"stopped", "left out"}
    for line in said:  # what has no time is named, a line each
        assert line.startswith("bench/gpu.sh: ") and " is left out: " in line
    left_out = [name for name, state in known.items() if state == "left out"]
    assert len(left_out) == len(said)
    if seconds == 17:
        assert "first build" in left_out
        assert f"FAILED  {left_out[0]}: no time: " in (out / "summary.txt").read_text()


@pytest.mark.parametrize("name", ["build", "rows", "tests", "compiled", "racecheck-triton"])
@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_part_that_does_not_end_well_stops_no_other(name, how, tmp_path, rehearse):
    given = {"ends": {name: [7, 7]}} if how == "fails" else {"takes": {name: math.inf}}
    stage, out = Stage(**given), tmp_path / "out"
    assert rehearse(stage, out)[0] == 1
    bad = {part: state for part, state in states(out).items() if state != "done"}
    assert set(bad.values()) == {"failed" if how == "fails" else "stopped"}
    assert {part.split()[1] for part in bad} == {name}
    assert [part for part, _, _ in stage.ran] == FIRST + SECOND
    why = "exit status 7: 3 passed in 1.0s" if how == "fails" else "stopped after"
    assert f"FAILED  {next(iter(bad))}: {why}" in (out / "summary.txt").read_text()


def test_all_parts_fail_and_each_is_named(tmp_path, rehearse):
    stage, out = Stage(ends={name: [1, 1] for name in FIRST + SECOND}), tmp_path / "out"
    assert rehearse(stage, out) == (1, [])
    assert [name for name, _, _ in stage.ran] == FIRST + SECOND
    text = (out / "summary.txt").read_text()
    assert text.count("FAILED  ") == len(FIRST + SECOND) and "no part has failed" not in text


def test_a_kill_between_any_two_writes_loses_nothing(tmp_path, rehearse, monkeypatch):
    """Both halves of each write, of the script's and of its parts'. Whenever it comes, what was
    moved into place is there, whole; and the same call goes on in the same folder."""
    real, written = os.replace, []
    few = {"ONLY": "build smoke rows racecheck-cuda"}
    events = {"left": math.inf, "seen": 0}

    def tick():
        events["seen"] += 1
        if events["seen"] > events["left"]:
            raise Killed

    def replace(source, target):
        tick()  # the partial file is there, the old one too
        real(source, target)
        if Path(target).name == "kernels.json":
            written[:] = json.loads(Path(target).read_text())
        tick()

    monkeypatch.setattr(gpu_run.os, "replace", replace)
    rehearse(Stage(), "first", tmp_path / "whole", **few)
    count, complete = events["seen"], states(tmp_path / "whole")
    assert count > 40
    for index in range(count):
        out = tmp_path / str(index)
        events.update(left=index, seen=0)
        written.clear()
        with pytest.raises(Killed):
            rehearse(Stage(), "first", out, **few)
        events.update(left=math.inf)
        assert len(left(out)) <= 8
        if written:
            assert list(json.loads((out / "kernels.json").read_text())) == written
        if (out / "run.json").exists():
            assert list(complete)[: len(states(out))] == list(states(out))
        if index % 9 == 0:
            before = set(written)
            assert rehearse(Stage(), "first", out, **few) == (0, []) and states(out) == complete
            assert before <= json.loads((out / "kernels.json").read_text()).keys()
            assert left(out) <= {*gpu_run.FILES}


def test_rows_go_on_behind_a_kernel_that_took_the_device(tmp_path, rehearse):
    stage = Stage(ends={"rows": [gpu_kernels.LOST, gpu_kernels.LOST, 0]})
    assert rehearse(stage, "first", tmp_path / "out")[0] == 0
    again = [command for name, _, command in stage.ran if name == "rows"]
    assert ["--resume" in command for command in again] == [False, True, True]
    assert gpu_run.LOST == gpu_kernels.LOST
    stage = Stage(ends={"rows": [gpu_kernels.LOST] * 99}, takes={"rows": 20.0})
    assert rehearse(stage, "first", tmp_path / "other")[0] == 1 and stage.clock <= 240


def test_the_second_call_joins_the_first(tmp_path, rehearse):
    out = tmp_path / "out"
    rehearse(Stage(), "first", out)
    assert rehearse(Stage(), "second", out) == (0, [])
    assert record(out)["calls"] == ["first", "second"]
    assert len(states(out)) == len(FIRST) + len(SECOND)
    assert left(out) <= {*gpu_run.FILES}


def test_parts_that_are_asked_for(tmp_path, rehearse):
    stage = Stage()
    assert rehearse(stage, tmp_path / "out", ONLY="floors synccheck-cuda") == (0, [])
    assert [name for name, _, _ in stage.ran] == ["floors", "synccheck-cuda"]
    status, said = rehearse(stage, tmp_path / "out", ONLY="flaws")
    assert status == 2 and said[0].startswith("bench/gpu.sh: ONLY=flaws is no part: build smoke ")


def test_tuned_tiles_come_home(tmp_path, rehearse, monkeypatch):
    stage, out = Stage(), tmp_path / "out"
    real = stage.measure

    def run(command, environment, *given):
        if "tune" in command:
            tiles = Path(environment["FUSED_DNI_CACHE"])
            tiles.mkdir()
            (tiles / "tiles.json").write_text('{"a": 1}')
        return Stage.run(stage, command, environment, *given)

    monkeypatch.setattr(stage, "run", run)
    assert real is not None and rehearse(stage, "second", out)[0] == 0
    assert record(out)["tuned"] == {"tiles": {"a": 1}}


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["first"],
        ["--help"],
        ["out", "soon"],
        ["out", "0"],
        ["out", "9", "more"],
        ["1", "2", "3"],
    ],
    ids=str,
)
def test_use_is_explained(words, rehearse):
    assert rehearse(Stage(), *words) == (2, ["usage: bench/gpu.sh [first|second] OUT [SECONDS]"])


def test_out_that_cannot_be_written(tmp_path, rehearse):
    """What is in the way may also be a file system's permission."""
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    status, (said,) = rehearse(Stage(), "first", out)
    assert status == 0
    assert said.startswith(f"bench/gpu.sh: {out}: Not a directory: results are in ")
    elsewhere = Path(said.rpartition(" ")[2])
    assert set(states(elsewhere).values()) == {"done"} and said[14:] in record(elsewhere)["notes"]


def test_out_that_becomes_full(tmp_path, rehearse, monkeypatch):
    """In the middle of the call: what was found is taken along, the rest is done elsewhere."""
    out, stage, real = tmp_path / "out", Stage(), Path.write_bytes

    def write_bytes(path, data):
        if path.parent == out and len(stage.ran) == 3:
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    status, (said,) = rehearse(stage, "first", out)
    assert status == 0
    assert said.startswith(f"bench/gpu.sh: {out}: No space left on device: results are in ")
    elsewhere = Path(said.rpartition(" ")[2])
    assert [name for name, _, _ in stage.ran] == FIRST
    figures = json.loads((elsewhere / "kernels.json").read_text())
    assert {"smoke 0", "floors 0", "rows 0"} <= figures.keys()


def test_out_with_files_of_another_run(tmp_path, rehearse):
    out = tmp_path / "out"
    rehearse(Stage(), "first", out)
    before = (out / "kernels.json").read_bytes()
    status, (said,) = rehearse(Stage(), "first", out, FUSED_DNI_COMMIT="def")
    assert status == 0
    assert said == (
        f"bench/gpu.sh: {out} holds files of another run (commit abc, NVIDIA H200): this one "
        f"writes into {out}/run-2"
    )
    assert (out / "kernels.json").read_bytes() == before and record(out)["commit"] == "abc"
    assert record(out / "run-2")["commit"] == "def"
    assert left(out) <= {f"{at}{name}" for at in ("", "run-2/") for name in gpu_run.FILES}
    other = H200 | {"name": "NVIDIA H100"}
    assert "run-3" in rehearse(Stage(other), "second", out)[1][0]
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.json").write_text("{")
    assert "run-2" in rehearse(Stage(), "first", tmp_path / "odd")[1][0]


def test_without_nvcc(tmp_path, rehearse):
    """The rest is done, with Triton's rows in place of those in CUDA C++."""
    for path in (rehearse.root / "fused_dni" / "backends").iterdir():
        path.unlink()
    stage, out = Stage(tools=()), tmp_path / "out"
    status, said = rehearse(stage, "first", out)
    assert status == 1
    where = "on PATH, in CUDA_HOME or in /usr/local/cuda"
    assert said == [
        f"bench/gpu.sh: build is left out: no nvcc {where}",
        f"bench/gpu.sh: memcheck-cuda is left out: no compute-sanitizer {where}",
        f"bench/gpu.sh: racecheck-cuda is left out: no compute-sanitizer {where}",
    ]
    ran = {name: command for name, _, command in stage.ran}
    assert list(ran) == ["smoke", "floors", "barriers", "rows"]
    assert all("triton" in ran[name] and "FAST" not in ran[name] for name in ("smoke", "rows"))


@pytest.mark.parametrize(
    ("facts", "environ", "said"),
    [
        (
            {"driver_cuda": "12.2", "driver": "535.54"},
            {},
            "the driver 535.54 is for CUDA 12.2, nvcc is of 13.0: what it builds does not start; "
            "the rest is done",
        ),
        (
            {"capability": "8.0"},
            {"FUSED_DNI_CUDA_ARCHS": "90a;100"},
            "FUSED_DNI_CUDA_ARCHS=90a;100 has no code for this GPU, 8.0: its rows will hold that "
            "reason; the rest is done",
        ),
        (
            {"capability": "7.5"},
            {},
            "compute capability 7.5: our kernels need 8.0; the rest is done",
        ),
        (
            {},
            {"FUSED_DNI_COMMIT": ""},
            "no .git: the results name no commit (FUSED_DNI_COMMIT=..., or a file COMMIT)",
        ),
    ],
)
def test_what_will_be_missing_is_said_in_a_line(facts, environ, said, tmp_path, rehearse):
    stage = Stage(H200 | facts)
    status, (line, *more) = rehearse(stage, "first", tmp_path / "out", **environ)
    assert line == f"bench/gpu.sh: {said}"
    assert "rows" in [name for name, _, _ in stage.ran]
    if facts.get("capability") == "7.5":
        assert status == 1 and more == [
            "bench/gpu.sh: build is left out: this GPU is older than compute capability 8.0"
        ]
    else:
        assert (status, more) == (0, [])
    assert said in (tmp_path / "out" / "summary.txt").read_text()


@pytest.mark.parametrize(
    ("names", "capability", "expected"),
    [("90a", (9, 0), True), ("80", (8, 6), True), ("90a", (10, 0), False), ("86", (8, 0), False)],
)
def test_architectures_serve(names, capability, expected):
    assert gpu_run.serves(names, *capability) is expected


def test_extensions_that_were_built_elsewhere(tmp_path, rehearse):
    built, stage = tmp_path / "built", Stage()
    built.mkdir()
    (built / "_cuda.cpython-310-x86_64-linux-gnu.so").touch()
    status, (said,) = rehearse(stage, "first", tmp_path / "a", PREBUILT=str(built))
    assert status == 0
    assert said == (
        f"bench/gpu.sh: PREBUILT={built} has no _cuda*.cpython-312-x86_64-linux-gnu.so: built here"
    )
    assert stage.ran[0][2][1] == "setup.py"
    name = "_cuda.cpython-312-x86_64-linux-gnu.so"
    (built / name).write_text("code")
    stage = Stage()
    assert rehearse(stage, "first", tmp_path / "b", PREBUILT=str(built)) == (0, [])
    assert stage.ran[0][2][1] == "-c"
    assert (rehearse.root / "fused_dni" / "backends" / name).read_text() == "code"


@pytest.mark.parametrize(
    ("probe", "said", "status", "line"),
    [
        (
            3,
            "no CUDA device: The NVIDIA driver on your system is too old (found version 12020)",
            3,
            "no CUDA device: The NVIDIA driver on your system is too old (found version 12020), "
            "nothing to measure",
        ),
        (
            1,
            "ModuleNotFoundError: No module named 'torch'",
            2,
            f"{sys.executable} cannot import torch (set PYTHON to an interpreter that can)",
        ),
        (-11, "", 2, "the GPU was asked for in vain: it says nothing"),
    ],
)
def test_nothing_to_measure(probe, said, status, line, tmp_path, rehearse):
    out = tmp_path / "out"
    assert rehearse(Stage(probe=probe, said=said), out) == (status, [f"bench/gpu.sh: {line}"])
    assert not out.exists()


def test_a_driver_that_is_too_old_is_the_reason(monkeypatch):
    def is_available():
        import warnings

        warnings.warn("CUDA initialization: The NVIDIA driver is too old\nmore", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    found = gpu_baselines.why_no_gpu()
    assert found == "no CUDA device: CUDA initialization: The NVIDIA driver is too old"


def test_the_commit_comes_from_git_a_variable_or_a_file(tmp_path):
    assert gpu_run.commit(tmp_path, {}) is None
    (tmp_path / "COMMIT").write_text("def\n")
    assert gpu_run.commit(tmp_path, {}) == "def"
    assert gpu_run.commit(tmp_path, COMMIT) == "abc"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    assert len(gpu_run.commit(tmp_path, COMMIT)) == 12


# ------------------------------------------------------------------------------ real processes


def test_every_command_line_is_one(tmp_path, rehearse):
    """As the programs that they start read them."""
    stage = Stage()
    rehearse(stage, tmp_path / "out")
    parsers = {"gpu_kernels.py": gpu_kernels.parser(), "gpu_baselines.py": gpu_baselines.parser()}
    for name, _, command in stage.ran:
        words = command[command.index(sys.executable) + 1 :]
        if words[:2] == ["-m", "fused_dni"]:
            command_line().parse_args(words[2:])
        elif words[:2] == ["-m", "pytest"]:
            assert name.startswith("tests")
        elif words[0] == "setup.py":
            assert name.startswith("build")
        else:
            parsers[Path(words[0]).name].parse_args(words[1:])
    keys = {key for _, _, command in stage.ran for key in command if key in gpu_run.KEYS}
    run = gpu_kernels.Run(None, "cpu", "triton", 1.0, False)
    made = {str(case) for case, _ in gpu_kernels.layer_cases(run)}
    assert keys == {*gpu_run.KEYS} <= made | {str(case) for case in gpu_kernels.window_cases(run)}


SLOW = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("a report", flush=True)
"""


@pytest.mark.parametrize("interrupt", [True, False])
def test_a_process_is_stopped_with_all_that_it_started(interrupt, tmp_path):
    log = tmp_path / "log"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of what a shell runs behind
    try:
        ended = gpu_run.Machine().run([sys.executable, "-c", SLOW], os.environ, log, 4.0, interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.status is None
    pid, *report = log.read_text().split("\n", 1)
    assert report == ["a report\n" if interrupt else ""]
    for _ in range(100):  # until init has taken it
        with open(f"/proc/{pid}/stat") if Path(f"/proc/{pid}").exists() else open(os.devnull) as f:
            if f.read().split(")")[-1].split()[:1] in ([], ["Z"]):
                return
        time.sleep(0.05)
    pytest.fail("the child lives")


def test_status_and_output_of_a_process(tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    command = [sys.executable, "-c", "print('out', flush=True); raise SystemExit(4)"]
    assert gpu_run.Machine().run(command, os.environ, log, 30.0).status == 4
    assert log.read_text() == "before\nout\n"


def test_a_terminated_run_writes_what_it_knows(tmp_path, rehearse, monkeypatch):
    stage, out = Stage(), tmp_path / "out"

    def run(command, environment, log, *given):
        if log.name == "log.txt" and len(stage.ran) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return Stage.run(stage, command, environment, log, *given)

    monkeypatch.setattr(stage, "run", run)
    with pytest.raises(SystemExit) as ended:
        rehearse(stage, "first", out)
    assert ended.value.code == 143
    assert list(states(out).values()) == ["done", "done", "running"]
    assert "first floors: was running" in (out / "summary.txt").read_text()


def test_kernels_are_found_without_an_installation(tmp_path):
    """By what every part finds on its path."""
    (tmp_path / "sitecustomize.py").write_text(gpu_run.FINDER.format(root=str(ROOT)))
    spec = importlib.util.spec_from_file_location("finder", tmp_path / "sitecustomize.py")
    before = list(sys.meta_path)
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        found = sys.meta_path[0].find_spec("fused_dni.kernels")
        assert sys.meta_path[0].find_spec("fused_dni.ops") is None
    finally:
        sys.meta_path[:] = before
    assert found.origin == str(ROOT / "kernels" / "__init__.py")
    assert found.submodule_search_locations == [str(ROOT / "kernels")]


def script(*words, **environ):
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHON": sys.executable, **environ},
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_script_says_in_one_line_that_there_is_no_gpu(tmp_path):
    done = script(tmp_path / "out")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("bench/gpu.sh: no CUDA device: ")
    assert not (tmp_path / "out").exists()


def test_the_script_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    done = script(tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot import torch" in done.stderr
