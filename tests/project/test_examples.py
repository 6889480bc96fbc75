"""Every script of examples/ runs, with small settings, and does what it says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow(30),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # Lightning's own
]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name):
    """The script as a module, not run."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_layer(capsys):
    errors = example("layer").main(steps=120)
    assert len(errors) == 2 and max(errors.values()) < 0.25  # chance: 0.9
    assert capsys.readouterr().out.count("error") == 2


def test_whole_model(capsys):
    found = example("whole_model").main(steps=120)
    assert found["converted"] < 1e-5 and found["reverted"] < 1e-4
    assert found["last"] < 0.5 * found["first"]
    assert "it is the head" in capsys.readouterr().out


def test_stream(capsys):
    found = example("stream").main(windows=200)
    assert found["right"] > 0.9 and found["first"] > 0.9 and found["continued"] == 199
    assert "chance" in capsys.readouterr().out


def test_expensive_top(capsys):
    module = example("expensive_top")
    untrained = module.train(8, 0)
    losses = module.main(steps=60)
    assert losses[1] < 0.8 * untrained and losses[8] < 0.8 * untrained
    assert "k = 8" in capsys.readouterr().out


def test_lightning_module(capsys, tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    found = example("lightning_module").main(epochs=3)
    assert found["after"] < 0.4 < found["before"]


def test_advise(capsys):
    advice = example("advise").main(seconds=0.5)
    assert advice.report["kind"] == "advice"
    assert "my model" in capsys.readouterr().out


def test_a_factory_is_what_the_command_takes(capsys, monkeypatch):
    from fused_dni.cli import main

    monkeypatch.chdir(EXAMPLES.parent)
    words = ["verdict", "top", "examples.expensive_top:factory", "--seconds", "0.2", "--quiet"]
    assert main([*words, "--target-every", "2", "--threads", "1"]) == 0
    assert "examples.expensive_top:factory" in capsys.readouterr().out


def by_torchrun(*words):
    """What a script prints on two ranks."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pipeline(tmp_path):
    said = by_torchrun(EXAMPLES / "pipeline.py", "--steps", "200", "--checkpoint", tmp_path)
    loss = re.search(r"step 200: loss ([0-9.]+)", said)
    assert loss and float(loss[1]) < 1.0  # from 2.3
    assert "stage 0: at work" in said and "steps late" in said
    assert len(list(tmp_path.glob("step-00000200/stage-*"))) == 2


def test_split_learning():
    found = {}
    for k in ("0", "4"):
        said = by_torchrun(EXAMPLES / "split_learning.py", "--epochs", "10", "--target-every", k)
        error, down = re.search(r": ([0-9.]+)%", said), re.search(r"down ([0-9]+)", said)
        found[k] = (float(error[1]), int(down[1]))
    assert all(error < 30.0 for error, _ in found.values())  # chance: 90
    assert found["4"][1] < 0.5 * found["0"][1]  # with an epoch of warm-up of ten


def test_a_script_is_run_as_one():
    script = EXAMPLES / "whole_model.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "reverted to Linear" in done.stdout, done.stderr


def test_every_example_is_short_and_tested():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    for path in EXAMPLES.glob("*.py"):
        assert path.stem in tested
        assert len(path.read_text().splitlines()) <= 85, path
        assert "def main(" in path.read_text()
