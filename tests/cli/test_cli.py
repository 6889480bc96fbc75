"""The command line: results where asked for, and one clear line for whatever is wrong."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from fused_dni.kernels import linear, tuning

import fused_dni
from fused_dni import cli
from fused_dni.cli import arguments
from fused_dni.distributed import MODES
from fused_dni.experiments import settings
from fused_dni.measure import options, tiles, timing, tune
from fused_dni.ops import measured, registry
from fused_dni.ops import types as base

TINY = ["--epochs", "2", "--hidden", "8", "--depth", "2", "--batch-size", "128", "--seeds", "0"]
TINY += ["--threads", "1", "--quiet"]


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _fails(capsys, *argv: str) -> tuple[int, str]:
    """Exit code and the one line on stderr; nothing on stdout."""
    code = cli.main(list(argv))
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and len(lines) == 1, captured
    assert lines[0].startswith("fused-dni: error: ")
    assert "Traceback" not in captured.err
    return code, lines[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian', did you mean 'train'"),
        (["train", "--epoch", "3"], "unknown option '--epoch', did you mean '--epochs'"),
        (["train", "--nonsuch"], "unknown option '--nonsuch'. Allowed"),
        (["simulate", "--devices", "3"], "unknown option '--devices'. Allowed"),
        (["train", "--epochs", "none"], "epochs must be a whole number from 1 on, got 'none'"),
        (["train", "--epochs", "0"], "from 1 on, got '0'"),
        (["train", "--seeds", str(10**19)], "from 0 to 9223372036854775807, got '1000"),
        (["train", "--lr", "-1"], "lr must be a finite number from 0 on, got '-1'"),
        (["train", "--lr", "nan"], "got 'nan'"),
        (["train", "--lr", "-inf"], "got '-inf'"),
        (["verdict", "link", "a:b", "--latency", "-5ms"], "like 4ms; units are ns, us, µs, ms, s"),
        (["train", "--methods", "cndi"], "unknown method 'cndi', did you mean 'cdni'"),
        (["train", "--update", "adma"], "unknown update 'adma', did you mean 'adam'"),
        (
            ["train", "--target-every", "0"],
            "target-every must be a whole number from 1 on, or 'never'",
        ),
        (["train", "--dataset", "mnits"], "did you mean 'mnist'"),
        (["train", "--data", "/no/such/folder"], "data folder /no/such/folder does not exist"),
        (["train", "--data", "x", "--dataset", "digits"], "leave --dataset digits out"),
        (["train", "--resume"], "--resume needs --checkpoint DIR"),
        (["train", "--backend", "cpuu", *TINY], "backend"),
        (["train", "--batch-size", "5000"], "batch_size 5000 is larger than the training set"),
        (["train", "stray"], "unexpected argument 'stray'"),
        (["demo", "--second", "3"], "did you mean '--seconds'"),
        (["verdict"], "required: SEGMENT"),
        (["verdict", "linaer"], "unknown module 'linaer', did you mean 'linear'"),
        (["verdict", "linear", "--width", "3"], "--width does not go with linear"),
        (["verdict", "mlp", "--outputs", "3"], "--outputs does not go with mlp"),
        (["verdict", "linear", "--out", "1024"], "for output features there is --outputs"),
        (["verdict", "conv", "--heads", "3"], "--heads does not go with conv"),
        (["verdict", "transformer", "--heads", "3"], "heads must divide width 128, got 3"),
        (["verdict", "linear", "--sample", "2x2"], "--sample does not go with linear"),
        (["verdict", "linear", "--synthesizers", "desne"], "did you mean 'dense'"),
        (["verdict", "linear", "--synthesizers", "conv"], "'conv' does not fit an output of shape"),
        (["verdict", "linear", "--interface", "inside"], "unknown interface 'inside'"),
        (["verdict", "block", "--interface", "preactivation"], "stands behind a linear layer"),
        (["verdict", "linear", "--rank", "2", "--synthesizers", "dense"], "not both"),
        (["verdict", "linear", "--activation", "rleu"], "did you mean 'relu'"),
        (["verdict", "linear", "--normalization", "bacth"], "did you mean 'batch'"),
        (["verdict", "linear", "--dtype", "float23"], "unknown dtype 'float23'"),
        (["verdict", "linear", "--batch", "1"], "verdict"),
        (["verdict", "linear", "--device", "gpu"], "unknown device 'gpu'"),
        (["verdict", "linear", "--threads", "0"], "threads must be a whole number from 1 to"),
        (["train", "--threads", "100000"], "four for each of this machine's processors, got"),
        (["verdict", "linear", "--seconds", "-2"], "seconds must be a positive, finite number"),
        (["verdict", "no.such.module:f"], "cannot import 'no.such.module'"),
        (["verdict", "torch.nn:Lineer", "--sample", "2x2"], "did you mean 'Linear'"),
        (["verdict", "torch.nn:Linear", "--sample", "2x2"], "callable without arguments"),
        (["verdict", "torch:get_num_threads", "--sample", "2x2"], "must return a module"),
        (["verdict", "torch.nn:ReLU", "--sample", "2"], "a shape like 64x784, batch first"),
        (["verdict", "torch.nn:ReLU"], "give --sample, like 64x784"),
        (["verdict", "torch.nn:ReLU", "--sample", "2x3"], "no trainable parameters"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    if argv[0] in ("train", "verdict") and "--quiet" not in argv:
        argv = [*argv, "--quiet"]
    code, line = _fails(capsys, *argv)
    assert code == 2
    if argv[:2] != ["verdict", "linear"] or "--batch" not in argv:
        assert message in line


def test_memory_that_there_is_not_is_said_in_its_unit(capsys):
    code, line = _fails(capsys, "verdict", "linear", "--in", "100000000", "--quiet")
    assert code == 1 and "not enough memory for a tensor of 40000000 GB: ask for smaller" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_device_is_said(capsys):
    code, line = _fails(capsys, "verdict", "linear", "--device", "cuda")
    assert code == 2 and "finds no CUDA device" in line


def test_an_output_folder_that_cannot_be_is_refused_before_any_work(capsys, tmp_path):
    (tmp_path / "file").touch()
    code, line = _fails(capsys, "train", "--out", str(tmp_path / "file" / "x"), *TINY)
    assert code == 2 and "cannot write to" in line


def test_help_and_version_import_no_experiment():
    script = (
        "import sys; from fused_dni import cli\n"
        "code = cli.main(['--version'])\n"
        "code += cli.main(['verdict', '--help'])\n"
        "assert not {'sklearn', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "print(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300
    )
    assert "fused-dni " in done.stdout and "package.module:factory" in done.stdout
    assert done.stdout.rstrip().endswith("0")


def test_no_command_prints_the_commands(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("demo", "verdict", "train", "env"))


def test_env(capsys):
    assert cli.main(["env"]) == 0
    assert "torch" in capsys.readouterr().out
    assert cli.main(["env", "--json"]) == 0
    assert "backends" in json.loads(capsys.readouterr().out)


def test_train_prints_tables_and_paths(capsys, tmp_path):
    out = tmp_path / "run"
    code = cli.main(["train", *TINY, "--out", str(out), "--split-seconds", "0.05"])
    captured = capsys.readouterr()
    assert code == 0 and captured.err == ""
    assert "cdni k=4" in captured.out and "targets" in captured.out
    for name in ("report.json", "report.md", "accuracy-vs-wall-clock.png"):
        assert str(out / name) in captured.out and (out / name).exists()
    command = json.loads((out / "report.json").read_text())["facts"]["command"]
    assert command.startswith("fused-dni train --epochs 2") and str(tmp_path) not in command


def test_json_is_all_of_stdout(capsys, tmp_path):
    argv = ["train", *TINY, "--methods", "fused", "--no-split", "--json", "--out", str(tmp_path)]
    argv += ["--interface", "preactivation"]
    assert cli.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["interface"] == "preactivation"
    assert [run["name"] for run in report["runs"]] == ["fused"]
    argv = ["verdict", "linear", "--in", "16", "--batch", "8", "--seconds", "0.02", "--no-compile"]
    argv += ["--no-parts", "--rank", "4", "--out", str(tmp_path / "verdict.json")]
    assert cli.main([*argv, "--json", "--quiet", "--threads", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "verdict" and "dni k=16" in report["timings"]
    assert report == json.loads((tmp_path / "verdict.json").read_text())
    assert "--out DIR" in report["facts"]["command"]


def test_verdict_of_a_factory_with_a_plot(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn
            def pair(): return nn.Linear(8, 8), torch.randn(4, 8)
            def alone(): return nn.Sequential(nn.Linear(8, 8), nn.GELU())
            def broken(): raise ZeroDivisionError("planted")
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    quick = ["--no-compile", "--no-parts", "--synthesizers", "rank2", "--seconds", "0.02"]
    quick += ["--threads", "1", "--target-every", "1", "never"]
    assert cli.main(["verdict", "mine:pair", *quick, "--plot", "deep/v.png", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "dni k=never" in printed and "deep/v.png" in printed
    assert (tmp_path / "deep" / "v.png").stat().st_size > 1000
    assert cli.main(["verdict", "mine:alone", "--sample", "4x8", *quick]) == 0
    captured = capsys.readouterr()
    assert "measuring: 100 %" in captured.err and "On 1 CPU thread" in captured.out
    code, line = _fails(capsys, "verdict", "mine:pair", "--sample", "4x8")
    assert code == 2 and "brings its own sample" in line
    code, line = _fails(capsys, "verdict", "mine:alone", "--sample", "4x9", *quick, "--quiet")
    assert code == 2 and "does not take a sample of shape [4, 9]" in line
    code, line = _fails(capsys, "verdict", "mine:broken")
    assert code == 2 and "mine:broken failed: ZeroDivisionError: planted" in line
    with pytest.raises(arguments.UsageError, match="planted"):
        cli.main(["--traceback", "verdict", "mine:broken"])
    monkeypatch.setenv("FUSED_DNI_DEBUG", "1")
    with pytest.raises(arguments.UsageError, match="planted"):
        cli.main(["verdict", "mine:broken"])


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_verdict_of_the_named_shapes(capsys, kind, norm):
    argv = ["verdict", kind, "--in", "12", "--batch", "8", "--normalization", norm, "--quiet"]
    argv += ["--no-compile", "--no-parts", "--seconds", "0.02", "--update", "adam", "--rank", "0"]
    argv += ["--threads", "1", "--target-every", "1"]
    argv += ["--outputs", "6"] if kind == "linear" else ["--width", "6", "--depth", "2"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "floor" in printed and "at batch 8" in printed


def test_demo_ends_with_the_verdict_a_race_and_the_paths(capsys, tmp_path):
    argv = ["demo", *TINY, "--out", str(tmp_path), "--no-compile", "--seconds", "0.05"]
    assert cli.main([*argv, "--race", "0.2"]) == 0
    printed = capsys.readouterr().out
    sentence, errors, heading, arms, raced, paths = printed.rstrip().split("\n\n")[-6:]
    assert sentence.startswith("On 1 CPU thread") and "synthetic gradient" in sentence
    assert errors.startswith("Errors here, after ") and "cdni k=4 " in errors
    assert heading.startswith("Under an expensive top\n") and "backprop" in arms and raced
    for name in ("report.md", "verdict.png", "loss-vs-time.png"):
        assert str(tmp_path / name) in paths and (tmp_path / name).exists()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"]["break_even"] and report["split"]["pieces"]
    assert report["race"]["kind"] == "race" and report["race"]["finished"]
    said = (tmp_path / "report.md").read_text()
    assert "## Verdict for these layers" in said and "## Under an expensive top" in said


def test_ctrl_c_keeps_the_checkpoint_and_resume_finishes(capsys, tmp_path):
    argv = ["train", *TINY, "--epochs", "3000", "--methods", "fused", "--no-split"]
    argv += ["--out", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "kept")]
    process = subprocess.Popen(
        [sys.executable, "-m", "fused_dni.cli", *argv],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    until = time.monotonic() + 300
    checkpoint = tmp_path / "kept" / "train.pt"
    while process.poll() is None and not checkpoint.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert out == "" and err.strip().count("\n") == 0
    assert "stopped" in err and "add --resume to continue" in err


INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU"
)
TUNE = ["--batch", "8", "--in", "16", "--device", "cpu", "--dtype", "float32", "--seconds", "0.01"]


@INTERPRETED
@pytest.mark.parametrize("what", ["linear", "lstm"])
def test_tune_without_a_gpu(capsys, what):
    code, line = _fails(capsys, "tune", what)
    assert code == 2 and "torch finds no CUDA device here" in line


@INTERPRETED
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tune"], "required: {linear,lstm}"),
        (["tune", "linera"], "'linera', did you mean 'linear'"),
        (["tune", "linear", "--batch", "1"], "batch must be a whole number from 2 on"),
        (["tune", "linear", "--dtype", "bf16"], "'bf16', did you mean"),
        (["tune", "linear", "--window", "8"], "--window does not go with linear"),
        (["tune", "lstm", "--rank", "8"], "--rank does not go with lstm"),
        (["tune", "lstm", "--activation", "relu"], "--activation does not go with lstm"),
        (["tune", "linear", "--dtype", "float64", "--device", "cpu"], "float64"),
        (["tune", "lstm", "--device", "cpu", "--ops", "lstm_step"], "unknown op 'lstm_step'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_tune_of_bad_input(capsys, argv, message):
    code, line = _fails(capsys, *argv)
    assert code in (1, 2) and message in line


@INTERPRETED
def test_tune_measures_every_op_and_keeps_the_fastest(capsys, tmp_path, monkeypatch):
    """In the interpreter: what is chosen means nothing, that it is chosen and kept does."""
    monkeypatch.setenv("FUSED_DNI_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_tables", None)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(measured, "_tables", None)
    monkeypatch.setattr(tune, "candidates", lambda choice, usual: iter([usual]))

    def once(calls, seconds, device):  # interpreting takes long enough
        for call in calls.values():
            call()
        took = {name: 1e-3 if name == "triton" else 2e-3 for name in calls}
        return {name: timing.Timing.of(name, (t,), (t,), 1) for name, t in took.items()}

    monkeypatch.setattr(timing, "compare", once)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert cli.main(["tune", "linear", *TUNE, "--json", "--quiet"]) == 0
    assert torch.equal(torch.rand(3), expected)
    found = json.loads(capsys.readouterr().out)
    ops = {op["op"]: op for op in found["ops"]}
    assert ops.keys() == {
        "linear_step", "linear_forward", "linear_backward", "linear_update",
        "synthesizer_predict", "synthesizer_train",
    }  # fmt: skip
    assert ops["linear_step"]["shape"] == [8, 16, 16]
    assert ops["linear_step"]["trials"][0]["timing"]["median"] > 0
    kept = json.loads((tmp_path / "tiles.json").read_text())["choices"]
    assert kept["linear_step:sgd-ieee/interpreter/float32/8x16x16"] == ops["linear_step"]["tiles"]
    assert len(kept) == 6
    assert list(found["backends"]["timings"]) == ["triton", "cuda"] and found["backends"]["kept"]
    table = json.loads((tmp_path / "backends.json").read_text())["seconds"]
    assert table == {"linear/interpreter/float32-ieee/8x16x16": {"triton": 1e-3, "cuda": 2e-3}}

    argv = ["tune", "lstm", *TUNE, "--window", "2", "--ops", "lstm_update", "lstm_backward"]
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    assert "lstm_forward" not in captured.out
    assert "lstm_backward" in captured.out and "as before; chosen" in captured.out
    assert captured.out.rstrip().endswith(str(tmp_path))
    assert "lstm_update: 100 %" in captured.err
    assert "backends" not in captured.out  # not where only a part of a window is tuned
    argv = [*argv[:-2], "lstm_forward", "lstm_backward"]
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith("lstm 2x8x16x16 float32"))
    assert lines[start + 1].split(maxsplit=2)[2] == "triton; first from now on"
    assert lines[start + 2].split(maxsplit=2)[2] == "cuda; 2.00 times as long, within the spread"
    table = json.loads((tmp_path / "backends.json").read_text())["seconds"]
    assert table.keys() == {
        "linear/interpreter/float32-ieee/8x16x16", "lstm/interpreter/float32-ieee/2x8x16x16"
    }  # fmt: skip


def test_candidates_are_the_kernels_own_and_begin_with_those_in_use():
    """All that a kernel file lists, and the other number of launches beside it."""
    device = torch.device("cpu")
    choice = tuning.Choice("linear_step", (128, 1024, 1024), torch.bfloat16, device)
    usual = linear.Tiles("several", 128, 256, 32, 128, 128, 128, 128, 128, 64, 8, 3, True)
    tried = list(tune.candidates(choice, usual))
    assert tried[0] == usual
    assert set(linear.tile_candidates(usual)) < set(tried)
    assert {tiles.launches for tiles in tried} == {"one", "several"}
    assert not any(tiles.descriptors for tiles in tried if tiles.launches == "one")


def test_what_was_tuned_is_a_line_a_candidate():
    usual = linear.Tiles("one", 128, 16, 128, 16, 64, 32, 32, 64, 128, 4, 3)
    best, large = usual._replace(warps=8), usual._replace(depth=512)
    choice = tuning.Choice("linear_step", (128, 1024, 1024), torch.bfloat16, torch.device("cpu"))
    rounds = (10e-6, 11e-6, 12e-6)
    trials = [
        tiles.Trial(best, timing.Timing.of("", rounds, rounds, 1)),
        tiles.Trial(large, None, "OutOfResources: shared memory"),
    ]
    head, first, second = tune.Tuned(choice, best, usual, trials).table().splitlines()
    assert head.endswith("linear_step 128x1024x1024 bfloat16")
    assert first.split() == ["11.00", "10.20-11.80", "warps=8;", "chosen"]
    assert second.split(maxsplit=1) == ["-", "depth=512; OutOfResources: shared memory"]


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Makes tensors of backends that are other ones in truth: no kernel is interpreted."""
    monkeypatch.setenv("FUSED_DNI_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "_tables", None)
    monkeypatch.setattr(registry, "_resolved", {})
    serves = registry.get("reference")
    monkeypatch.setattr(registry, "_loaded", {"cuda": serves, "triton": serves})

    def make(backend):
        cpu = torch.device("cpu")
        return tune.LSTMScratch(backend, (3, 4, 5, 6), torch.float32, cpu, fused_dni.SGD)

    return make


def test_backends_are_timed_for_real(scratch, tmp_path, monkeypatch):
    """A window of each; what was found counts at once, and random numbers go on as before."""
    device, entry = torch.device("cpu"), "lstm/interpreter/float32-ieee/3x4x5x6"
    monkeypatch.setitem(registry._resolved, "a look-up", registry.get("cuda"))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    found = tune.rank(scratch, device, seconds=0.01)
    assert torch.equal(torch.rand(4), expected)
    assert found.timings.keys() == {"cuda", "triton"} and found.skipped == {} and found.kept
    assert all(1e-6 < taken.median < 1.0 for taken in found.timings.values())
    assert measured.order("lstm", (3, 4, 5, 6), torch.float32, device) == tuple(found.timings)
    assert json.loads((tmp_path / "backends.json").read_text())["seconds"].keys() == {entry}
    assert registry._resolved == {}


def test_a_backend_that_runs_alone_has_not_won(scratch, tmp_path, monkeypatch):
    monkeypatch.setitem(registry._loaded, "cuda", "was not built")
    found = tune.rank(scratch, torch.device("cpu"), seconds=0.01)
    assert list(found.timings) == ["triton"] and not found.kept
    head, first, second = found.table().splitlines()
    assert head.endswith("backends: lstm 3x4x5x6 float32")
    assert first.endswith("triton; the only one that runs")
    assert second.split(maxsplit=1)[1].startswith("cuda; RuntimeError: backend 'cuda' is not avail")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(registry._loaded, "triton", "neither")
    with pytest.raises(RuntimeError, match="no backend can be timed: .*was not built.*neither"):
        tune.rank(scratch, torch.device("cpu"), seconds=0.01)


def test_backends_are_not_timed_inside_a_capture(scratch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is being captured"):
        tune.rank(scratch, torch.device("cuda", 0))


def test_activations_are_those_of_the_layers():
    """The command line repeats them so that --help does not wait for torch."""
    assert options.ACTIVATIONS == base.ACTIVATIONS
    assert options.INTERFACES == base.INTERFACES
    assert set(settings.MODES) == set(MODES)
