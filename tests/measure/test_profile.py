"""``fused-dni profile``: command lines, tables from what the tools write, exit statuses."""

from __future__ import annotations

import gzip
import json
import os
import stat
import sys
from pathlib import Path

import pytest
import torch

import fused_dni as fd
from fused_dni import cli
from fused_dni.measure.profile import command, ncu, nsys, trace
from fused_dni.report import as_text, blocks_of, load
from fused_dni.report.kinds import profile

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = """
import sys
import torch
import fused_dni as fd

model = torch.nn.Sequential(
    fd.FusedDNILinear(4, 4, update=fd.SGD(lr=0.1), backend="reference"), torch.nn.Linear(4, 2)
)
for _ in range(3):
    model(torch.ones(2, 4)).sum().backward()
print("trained", sys.argv[1:], __name__)
sys.exit(3)
"""

# What ncu writes, in the order ID, kernel, block, grid, then metrics.
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = {
    "gpu__time_duration.sum": ("ns", "12,000", "14,000", "500"),
    ncu.METRICS["bandwidth"]: ("byte/s", "1e12", "2e12", "n/a"),
    ncu.METRICS["bandwidth_share"]: ("%", "40", "60", "n/a"),
    ncu.METRICS["tensor_share"]: ("%", "25", "35", "n/a"),
    ncu.METRICS["occupancy"]: ("%", "12.5", "12.5", ""),
    "launch__shared_mem_per_block": ("Kbyte/block", "64", "64", "0"),
    STALL.format("barrier"): ("inst", "3", "3", "0"),
    STALL.format("long_scoreboard"): ("inst", "1", "1", "0"),
    STALL.format("selected"): ("inst", "1", "1", "1"),
    STALL.format("barrier_not_issued"): ("inst", "9", "9", "0"),
}
ROWS = [
    ("ID", "Kernel Name", "Block Size", "Grid Size", *METRICS),
    *zip(
        ("", "0", "1", "2"),
        ("", "linear_kernel", "linear_kernel", "update_kernel"),
        ("", "(128, 1, 1)", "(128, 1, 1)", "(128, 1, 1)"),
        ("", "(132, 1, 1)", "(132, 1, 1)", "(8, 1, 1)"),
        *METRICS.values(),
        strict=True,
    ),
]
CSV = "\n".join(
    [
        "==PROF== Connected to process 7 (/usr/bin/python3)",
        *(",".join(f'"{cell}"' for cell in row) for row in ROWS),
        "==PROF== Disconnected from process 7",
    ]
)


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    return "train.py"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Makes a program on PATH that notes how it was called and ends with status 5."""

    def make(name: str, more: str = "") -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        path = folder / name
        said = f'printf "%s\\n" "$FUSED_DNI_ANNOTATE" "$OMP_NUM_THREADS" "$@" >{tmp_path}/called'
        path.write_text(f"#!/bin/sh\n{said}\n{more}\nexit 5\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return make


# --------------------------------------------------------------------------------------- torch


def test_torch_writes_a_trace_and_a_table_and_passes_the_status_on(script, capsys):
    assert cli.main(["profile", "torch", "--", "python", script, "--epochs", "1"]) == 3
    said = capsys.readouterr().out
    assert "trained ['--epochs', '1'] __main__" in said
    assert "0: step" in said and "ended with exit status 3" in said
    report = load("runs/profile/profile.json", "profile")
    assert report["tool"] == "torch" and report["profiled"] == ["python", script, "--epochs", "1"]
    calls = {row["range"]: row["calls"] for row in report["ranges"]}
    assert calls["0: forward"] == calls["0: step"] == calls["0: backward"] == 3
    inside = {row["op"] for row in report["ops"] if row["range"] == "0: step"}
    assert trace.NO_OP in inside and any(op.startswith("aten::") for op in inside)
    with gzip.open("runs/profile/trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert {"0: forward", "0: learn"} <= {event.get("name") for event in events}


def test_json_alone_on_stdout(script, capsys):
    assert cli.main(["profile", "torch", "--json", "--out", "here", "--", script]) == 3
    captured = capsys.readouterr()
    assert captured.out == Path("here/profile.json").read_text()
    assert "trained" in captured.err


def test_sums_add_up():
    model = torch.nn.Sequential(fd.FusedDNILinear(4, 4, update=fd.SGD(), backend="reference"))

    def run():
        model(torch.ones(2, 4)).sum().backward()
        return 0

    recorder = trace._Recorder(60.0)
    with fd.annotate(model), recorder:
        run()
    found = trace.sums(recorder.profiler.events())
    for name in {row["range"] for row in found["ranges"]}:
        whole = next(row for row in found["ranges"] if row["range"] == name)
        parts = [row for row in found["ops"] if row["range"] == name]
        assert whole["own"] == pytest.approx(sum(row["own"] for row in parts))
        assert whole["memory"] == sum(row["memory"] for row in parts)
    step, forward = (
        next(row for row in found["ranges"] if row["range"] == f"0: {phase}")
        for phase in ("step", "forward")
    )
    assert step["total"] <= forward["total"] and forward["own"] < forward["total"]


def test_recording_ends_and_the_command_runs_on(tmp_path):
    model, done = fd.FusedDNILinear(4, 4, update=fd.SGD(), backend="reference"), []

    def run():
        for i in range(3):
            model(torch.ones(2, 4))
            done.append(i)
        return 0

    status, found = trace.record(run, tmp_path / "trace.json", 1e-9)
    assert status == 0 and done == [0, 1, 2] and (tmp_path / "trace.json").exists()
    calls = {row["range"]: row["calls"] for row in found["ranges"]}
    assert calls["FusedDNILinear: step"] == 1


def test_a_command_that_calls_no_module(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "idle.py").write_text("print('done')")
    assert cli.main(["profile", "torch", "--", "idle.py"]) == 0
    assert "recorded; no decoupled layer ran in them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("raise SystemExit", 0, ""),
        ("raise SystemExit('no data')", 1, "no data"),
        ("raise KeyError('lost')", 1, "KeyError: 'lost'"),
        ("pass", 0, ""),
    ],
)
def test_how_a_command_may_end(tmp_path, capsys, body, status, said):
    script = tmp_path / "ends.py"
    script.write_text(body)
    before = list(sys.argv), list(sys.path)
    assert command.InProcess([str(script)]).run() == status
    assert said in capsys.readouterr().err
    assert (sys.argv, sys.path) == before


def test_a_module_and_our_own_program(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiled_module.py").write_text("import sys; print(__name__, sys.argv[1:])")
    assert command.InProcess(["python3.11", "-m", "profiled_module", "a"]).run() == 0
    assert command.InProcess(["fused-dni", "verdict", "linaer"]).run() == 2
    captured = capsys.readouterr()
    assert captured.out == "__main__ ['a']\n" and "unknown module 'linaer'" in captured.err


# -------------------------------------------------------------------------------------- Nsight


def test_nsys_gets_its_line(script, tool, tmp_path, capsys):
    tool("nsys")
    words = ["profile", "nsys", "--range", "0: step", "--threads", "1", "--", script, "--lr", "1"]
    assert cli.main(words) == 5
    called = (tmp_path / "called").read_text().splitlines()
    assert called[:3] == ["1", "1", "profile"]
    assert called[3:] == [
        "--trace=cuda,nvtx,osrt,cublas",
        "--force-overwrite=true",
        "--output=runs/profile/nsys",
        "--capture-range=nvtx",
        "--nvtx-capture=0: step",
        "--capture-range-end=stop",
        "--env-var=NSYS_NVTX_PROFILER_REGISTER_ONLY=0",
        *(sys.executable, script, "--lr", "1"),
    ]
    assert capsys.readouterr().err.startswith("FUSED_DNI_ANNOTATE=1 nsys profile --trace=cuda,")
    assert "nsys.nsys-rep" in as_text(blocks_of(load("runs/profile/profile.json")))


def test_ncu_gets_its_line_and_its_table_is_made(script, tool, tmp_path, capsys):
    (tmp_path / "said.csv").write_text(CSV)
    tool("ncu", "cp said.csv runs/profile/ncu.csv")
    assert cli.main(["profile", "ncu", "--count", "7", "--", "python", script]) == 5
    called = (tmp_path / "called").read_text().splitlines()[2:]
    assert called[-4:] == ["--log-file", "runs/profile/ncu.csv", "python", script]
    assert called[: len(ncu.OPTIONS)] == list(ncu.OPTIONS)
    assert called[called.index("--launch-count") + 1] == "7"
    assert called[called.index("--kernel-name") + 1] == ncu.OURS
    assert "--nvtx" in called and "--nvtx-include" not in called
    said = capsys.readouterr().out
    assert "3 launches of 2 kernels took 26.5 µs; linear_kernel took 98 % of it" in said
    assert "barrier 75 %, long scoreboard 25 %" in said


def test_ncus_options_say_what_is_looked_at(tmp_path):
    line = ncu.line(["a"], tmp_path, only="0: step", kernels="regex:.*", skip=3, count=1)
    assert line[line.index("--nvtx-include") + 1] == "0: step/"
    assert line[line.index("--kernel-name") + 1] == "regex:.*"
    assert line[line.index("--launch-skip") + 1] == "3"
    assert nsys.line(["a", "b"], tmp_path)[-3:] == [f"--output={tmp_path / 'nsys'}", "a", "b"]


def test_what_ncu_wrote_is_read():
    large, small = ncu.read(CSV)
    assert large["kernel"] == "linear_kernel" and large["launches"] == 2
    assert large["grid"] == "(132, 1, 1)" and large["block"] == "(128, 1, 1)"
    assert large["time"] == pytest.approx(13e-6) and large["bandwidth"] == 1.5e12
    assert large["bandwidth_share"] == 0.5 and large["tensor_share"] == pytest.approx(0.3)
    assert large["occupancy"] == 0.125 and large["shared_memory"] == 64e3
    assert large["registers"] is None and large["programs"] is None
    assert large["stalls"] == {"barrier": 0.75, "long_scoreboard": 0.25}
    assert small["bandwidth"] is small["occupancy"] is None and small["stalls"] == {}
    assert ncu.read("==ERROR== ERR_NVGPUCTRPERM\n") == []
    for row in profile.rows([large, small]):
        assert len(row) == len(profile.HEADER)


@pytest.mark.parametrize(
    ("cell", "unit", "value"),
    [
        ("2", "us", 2e-6),
        ("2", "usecond", 2e-6),
        ("2", "msecond", 2e-3),
        ("1,234.5", "nsecond", 1234.5e-9),
        ("2", "Mbyte", 2e6),
        ("2", "Tbyte/second", 2e12),
        ("2", "byte/block", 2.0),
        ("50", "%", 0.5),
        ("168", "register/thread", 168.0),
        ("(!) n/a", "%", None),
        (None, None, None),
    ],
)
def test_units(cell, unit, value):
    assert ncu._number(cell, unit) == (value if value is None else pytest.approx(value))


@pytest.mark.parametrize("name", ["nsys", "ncu"])
def test_where_the_tool_is_missing_the_line_is_printed_all_the_same(
    name, script, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["profile", name, "--quiet", "--", script]) == 1
    captured = capsys.readouterr()
    line, error = captured.err.splitlines()
    assert captured.out == "" and line.startswith(f"FUSED_DNI_ANNOTATE=1 {name} ")
    assert line.endswith(f"{sys.executable} {script}")
    assert error.startswith(f"fused-dni: error: {name} is not on PATH: install NVIDIA Nsight")


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nsyss", "--", "a"], "unknown tool 'nsyss', did you mean 'nsys'"),
        (["torch"], "what is to be profiled? fused-dni profile torch -- COMMAND"),
        (["torch", "--"], "what is to be profiled?"),
        (["torch", "train.py"], "unexpected argument 'train.py'"),
        (["torch", "--", "none.py"], "there is no script 'none.py' to profile"),
        (["torch", "--", "./a.out", "1"], "got './a.out 1' (nsys and ncu take any command)"),
        (["torch", "--", "python"], "profile torch runs a script.py, -m MODULE or fused-dni"),
        (["ncu", "--", "none.py"], "there is no script 'none.py' to profile"),
        (["nsys", "--", "no-such-program"], "there is no program 'no-such-program' to profile"),
        (["torch", "--range", "a", "--", "x.py"], "--range does not go with torch, but with nsys"),
        (["nsys", "--seconds", "1", "--", "x.py"], "--seconds does not go with nsys"),
        (["ncu", "--count", "0", "--", "x.py"], "count must be a whole number from 1 on, got '0'"),
        (["torch", "--seconds", "0", "--", "x.py"], "seconds must be a positive, finite number"),
        (["torch", "--out", "file/x", "--", "train.py"], "cannot write to file/x"),
        (["torch", "--secnds", "1", "--", "x.py"], "did you mean '--seconds'"),
    ],
)
def test_bad_input(words, message, script, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["profile", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert not (tmp_path / "runs").exists()
