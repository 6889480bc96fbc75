"""The benchmarks' own correctness: gates that close, tables that are what was measured, scripts
that say what is missing. Nothing here takes a time."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_gemm
import gpu_baselines
import tables
import workloads as w
import workloads_lstm as wl

ROOT = Path(__file__).resolve().parents[1]
SMALL = w.Case(16, 32)


@pytest.fixture(autouse=True)
def _one_thread():
    """Nothing here is large enough to share; waiting threads would cost the other tests."""
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------ gates


@pytest.mark.parametrize("rule", w.RULES)
@pytest.mark.parametrize("method", [m for m in w.METHODS if not m.compiled], ids=lambda m: m.name)
def test_every_eager_row_passes_its_gate(method, rule):
    w.check_step(SMALL, rule, method)


@pytest.mark.parametrize("kind", ["eager", "ours", "dni"])
@pytest.mark.parametrize("dx", [False, True])
def test_layers_pass_their_gate(kind, dx):
    w.check_layer(w.Shape(16, 24, 32), kind, dx)


@pytest.mark.parametrize("backend", w.backends())
@pytest.mark.parametrize("kind", w.KINDS)
def test_synthesizers_pass_their_gate(kind, backend):
    w.check_synthesizer(kind, SMALL, backend)


@pytest.mark.parametrize("method", [w.STOCK, w.OURS, w.DNI_4], ids=lambda m: m.name)
def test_gate_closes_on_a_wrong_step(method, monkeypatch):
    """A candidate that scales one layer's update by 1 % is not timed."""
    right = w.Training.step

    def wrong(self, x, y):
        weight = self.parameters()["1.weight"]
        before = weight.clone()
        loss = right(self, x, y)
        if weight.dtype == torch.float32:
            weight.add_(weight - before, alpha=0.01)
        return loss

    monkeypatch.setattr(w.Training, "step", wrong)
    with pytest.raises(w.Disagreement, match=r"1\.weight|float64 has"):
        w.check_step(SMALL, "sgd", method)


TINY = wl.Shape(3, 8, 5, 2)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "method", [m for m in wl.WINDOW_METHODS if not m.compiled], ids=lambda m: m.name
)
def test_lstm_windows_pass_their_gate(method, backward):
    wl.check_window(TINY, method, backward=backward)


@pytest.mark.parametrize("method", wl.STEP_METHODS, ids=lambda m: m.name)
def test_lstm_steps_pass_their_gate(method):
    wl.check_training(TINY, method)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_cells_pass_their_gate(ours, backward):
    wl.check_cell(wl.Shape(3, 8, 1), ours, backward=backward)


def test_unrolled_steps_are_the_lstm():
    """What is compiled, uncompiled."""
    window = wl.Window(TINY, wl.STOCK)
    output, (h, c) = wl.unrolled(window.x, *window.state, window.parameters)
    expected, (last_h, last_c) = window.forward()
    for got, want in ((output, expected), (h, last_h), (c, last_c)):
        torch.testing.assert_close(got, want)


def test_too_many_steps_are_not_compiled(monkeypatch):
    monkeypatch.setattr(wl, "UNROLLED", 9)  # two layers of five steps
    with pytest.raises(RuntimeError, match="compiled only up to 9 unrolled steps"):
        wl.check_window(TINY, wl.UNROLLED_LOOP, backward=True)


def test_gate_closes_on_a_wrong_window(monkeypatch):
    """A state's gradient that is off by a thousandth."""
    right = wl.make

    def wrong(shape, method, dtype=torch.float32, backend=None, lr=wl.RATE):
        made = right(shape, method, dtype, backend, lr)
        if dtype == torch.float32:
            with torch.no_grad():
                made.weight_hh_l1[0] *= 1.001
        return made

    monkeypatch.setattr(wl, "make", wrong)
    with pytest.raises(wl.Disagreement, match="allowed"):
        wl.check_window(TINY, wl.OURS, backward=True)


@pytest.mark.parametrize("method", [wl.DNI, wl.DNI_STEP], ids=lambda m: m.name)
def test_gate_closes_on_a_boundary_left_out(method, monkeypatch):
    """A synthesizer that is trained but not used costs nearly as much and is not the method."""
    right = wl.make

    def wrong(shape, method, dtype=torch.float32, backend=None, lr=wl.RATE):
        made = right(shape, method, dtype, backend, lr)
        if dtype == torch.float32:
            made.sg_scale = 0.0
        return made

    monkeypatch.setattr(wl, "make", wrong)
    with pytest.raises(wl.Disagreement, match="is off by"):
        if method.rule:
            wl.check_training(TINY, method)
        else:
            wl.check_window(TINY, method, backward=True)


def test_lstm_floor_is_the_products_of_a_window(monkeypatch):
    """2 M N K each: two forward (input and recurrent), two more for each of them backward."""
    done = []
    real = torch.mm

    def counted(a, b, *, out):
        done.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return real(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    batch, hidden, steps, layers = TINY
    product = 2 * batch * steps * hidden * 4 * hidden * layers
    wl.floor(TINY, backward=False)()
    assert sum(done) == 2 * product
    done.clear()
    wl.floor(TINY, backward=True)()
    assert sum(done) == 6 * product


def test_a_candidate_that_fails_has_a_reason_and_no_figure(capsys):
    def broken():
        raise w.Disagreement("off by 1.0")

    candidates, failures = tables.gather({"good": lambda: lambda: None, "bad": broken})
    assert list(candidates) == ["good"]
    assert failures == {"bad": "Disagreement: off by 1.0"}
    assert "bad" in capsys.readouterr().err


def test_never_means_that_no_synthesizer_moves():
    training = w.Training(SMALL, "adam", w.DNI_NEVER)
    training.scramble_synthesizers()
    before = copy.deepcopy(training.model.state_dict())
    w.stepper(training)()
    after = training.model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any(".synthesizer." in key for key in moved)
    assert any(key.endswith("0.weight") for key in moved)


def test_targets_on_every_fourth_step_train_once_a_cycle():
    training = w.Training(SMALL, "adam", w.DNI_4)
    w.stepper(training, w.CYCLE)()
    first = training.model[0]
    assert first.synthesizer_update.steps == 1
    assert first.update.steps == w.CYCLE


@pytest.mark.parametrize(("features", "side"), [(256, 28), (512, 28), (1024, 28), (256, 8)])
def test_images_are_resampled_to_the_width(features, side):
    images = torch.rand(5, side * side)
    rows = w.resampled(images, features)
    assert rows.shape == (5, features)
    assert torch.allclose(rows.mean(1), images.mean(1), atol=0.05)
    with pytest.raises(ValueError, match="power of two"):
        w.resampled(images, 300)
    with pytest.raises(ValueError, match="not square"):
        w.resampled(images[:, :-1], features)


def test_errors_are_those_of_a_trained_network():
    from fused_dni.experiments import data

    digits = data.load("digits")
    errors = list(w.train_error(digits, w.Case(64, 64), "adam", w.STOCK, epochs=3, seed=0))
    assert len(errors) == 3
    assert errors[-1] < 15.0


# ----------------------------------------------------------------------------------------- tables


def results(**groups):
    device = {"cpu": "A CPU", "torch": "2.13.0", "threads": 2}
    return {"device": device, **groups}


def row(median, per_floor):
    return {
        "median": median,
        "interval": [median * 0.9, median * 1.1],
        "per_floor": {"median": per_floor, "interval": None},
    }


STEP = {
    "64/256 sgd": {
        "date": "2026-01-01",
        "commit": "abc",
        "threads": 2,
        "floor": "floor",
        "order": ["floor", "ours", "broken"],
        "rows": {
            "floor": row(1e-3, 1.0),
            "ours": row(1.5e-3, 1.5),
            "broken": {"failed": "Disagreement: no"},
        },
        "ratios": {"ours / theirs": {"median": 0.5, "interval": [0.4, 0.6]}},
    }
}


def test_documents_are_what_the_results_say():
    assert tables.render(check=True) == 0


def test_rendering_replaces_what_stands_between_markers_and_nothing_else():
    text = "before\n<!-- table: step -->\nold\n<!-- end of table -->\nafter\n"
    found = results(
        step=STEP,
        errors={
            "data": "mnist",
            "epochs": 5,
            "rows": {"64/256 sgd": {"ours": {"errors": [2.0], "mean": 2.0}}},
        },
    )
    new = tables.render_document(text, lambda _: [found])
    assert new.startswith("before\n")
    assert new.endswith("<!-- end of table -->\nafter\n")
    assert "| ours | 1.5 (1.35–1.65) | 1.50 | 2.00 |" in new
    assert "| broken | – | – | not measured |" in new
    assert "broken: Disagreement: no" in new
    assert "| 64/256 sgd | 0.50 (0.40–0.60) |" in new
    assert "old" not in new
    assert tables.render_document(new, lambda _: [found]) == new


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: nonsense -->\n<!-- end of table -->", "unknown table"),
        ("<!-- table: step -->\n", "no end marker"),
    ],
)
def test_bad_markers_are_errors(text, message):
    with pytest.raises(ValueError, match=message):
        tables.render_document(text, lambda _: [])


def test_groups_are_ordered_by_number():
    assert tables.ordered({"128/1024 sgd": 0, "64/256 sgd": 0, "128/512 adam": 0}) == [
        "64/256 sgd",
        "128/512 adam",
        "128/1024 sgd",
    ]


def test_saving_keeps_the_old_file_when_interrupted(tmp_path):
    path = tmp_path / "results.json"
    tables.save(path, {"a": 1.23456789})
    assert json.loads(path.read_text()) == {"a": 1.23457}
    with pytest.raises(TypeError):
        tables.save(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1.23457}


def test_committed_results_name_machine_versions_and_commit():
    for path in tables.RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        if found.get("kind", "").startswith("train"):
            assert {"device", "torch", "threads", "date", "commit", "command"} <= set(
                found["facts"]
            )
            continue
        assert {"cpu", "torch", "threads", "date", "commit"} <= set(found["device"])
        for suite in tables.SUITES:
            for group in found.get(suite, {}).values():
                assert group["commit"]
                assert group["date"]


def test_measuring_writes_a_table(tmp_path, monkeypatch, capsys):
    """The whole path from candidates to JSON to Markdown, on sizes that take no time."""
    monkeypatch.setattr(w, "CASES", (SMALL,))
    monkeypatch.setattr(w, "RULES", ("sgd",))
    monkeypatch.setattr(w, "METHODS", (w.STOCK, w.DNI_4))
    monkeypatch.setattr(w, "SHAPES", (w.Shape(16, 24, 32),))
    monkeypatch.setattr(w, "MEMORY_DEPTHS", (1, 2))
    monkeypatch.setattr(w, "MEMORY_CASE", SMALL)
    monkeypatch.setattr(bench_gemm, "ROWS", (3,))
    monkeypatch.setattr(bench_gemm, "FEATURES", (16,))
    monkeypatch.setattr(wl, "SHAPES", (TINY._replace(layers=1), TINY))
    monkeypatch.setattr(wl, "BOUNDARY_STEPS", (2,))
    monkeypatch.setattr(wl, "UNROLLED", 1)
    monkeypatch.setattr(wl, "MEMORY_SEQUENCE", 16)
    monkeypatch.setattr(wl, "MEMORY_WINDOWS", (4,))
    monkeypatch.setattr(wl, "MEMORY_LENGTHS", (16, 32))
    real = w.check_layer

    def check(shape, kind, dx, backend=None):  # compiling takes longer than the rest
        if kind == "compiled":
            raise NotImplementedError("not compiled in this test")
        real(shape, kind, dx, backend)

    monkeypatch.setattr(w, "check_layer", check)
    path = tmp_path / "results.json"
    tables.measure(list(tables.SUITES), None, 0.05, path)
    found = json.loads(path.read_text())
    rows = found["step"]["16/32 sgd"]["rows"]
    assert rows[w.DNI_4.name]["per_floor"]["median"] > 0
    assert found["step"]["16/32 sgd"]["ratios"]["DNI k=4 / stock eager"]["median"] > 0
    assert found["linear"]["16x24x32 without dx"]["rows"]["stock compiled"]["failed"]
    lstm = found["lstm"]
    assert lstm["3/8/5 forward+backward"]["rows"]["unrolled steps, compiled"]["failed"]
    assert lstm["3/8/5, 2 layers training step"]["ratios"]["nn.LSTM / DNI"]["median"] > 0
    assert lstm["3/8/2 boundary"]["ratios"]["DNI / ours"]["median"] > 0
    for suite in (*tables.SUITES, "lstm-details", "lstm-memory"):
        assert "| " in tables.RENDERERS[suite][1]([found])
    details = tables.RENDERERS["lstm-details"][1]([found])
    assert "compiled at 3/8/5 forward+backward: RuntimeError: compiled only up to 1" in details
    assert "x the floor" in capsys.readouterr().out


def test_memory_of_dni_grows_with_the_window_and_not_with_the_sequence(monkeypatch):
    """The committed curve's claim, at a small size: a window's worth, whatever the sequence;
    backprop through the whole sequence holds all of it."""
    monkeypatch.setattr(wl, "MEMORY_HIDDEN", 16)
    monkeypatch.setattr(wl, "MEMORY_SEQUENCE", 64)
    monkeypatch.setattr(wl, "MEMORY_WINDOWS", (8, 16, 32))
    monkeypatch.setattr(wl, "MEMORY_LENGTHS", (32, 64, 128))
    curves = wl.memory_curves()
    lengths, windows = curves["by_length"], curves["by_window"]
    assert lengths["dni"][0] == lengths["dni"][1] == lengths["dni"][2]
    through = lengths["through"]["fused"]
    assert through[2] - through[1] == 2 * (through[1] - through[0]) > 0
    w8, w16, w32, whole = windows["dni"]
    assert w8 < w16 < w32 < whole
    # What a step of the window keeps is the same for every window: gates, states, their gradients.
    assert w32 - w16 == pytest.approx(2 * (w16 - w8), rel=0.1)


def test_errors_are_merged_into_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(w, "CASES", (w.Case(64, 64),))
    monkeypatch.setattr(w, "METHODS", (w.STOCK, w.DNI_4))
    path = tmp_path / "results.json"
    tables.errors(None, "adam", 1, 1, path, keep=False)
    rows = json.loads(path.read_text())["errors"]["rows"]["64/64 adam"]
    assert set(rows) == {w.STOCK.name, w.DNI_4.name}
    assert all(0.0 <= entry["mean"] <= 100.0 for entry in rows.values())


# -------------------------------------------------------------------------------------------- GPU


def run(*command, **environment):
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_script_says_in_one_line_that_there_is_no_gpu(tmp_path):
    done = run("bash", ROOT / "bench" / "gpu.sh", tmp_path / "out", PYTHON=sys.executable)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_gpu_script_explains_its_use():
    done = run("bash", ROOT / "bench" / "gpu.sh")
    assert done.returncode == 2
    assert done.stderr == "usage: bench/gpu.sh OUT\n"


def test_gpu_script_without_torch(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = run("bash", ROOT / "bench" / "gpu.sh", tmp_path / "out", PYTHON=str(python))
    assert done.returncode == 2
    assert "cannot import torch" in done.stderr


def test_gpu_script_goes_on_when_parts_fail(tmp_path):
    """With an interpreter that pretends to a GPU: every part fails, each is named, the last line
    says so, and the script ends by itself."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "no such part" >&2\nexit 7\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    done = run("bash", ROOT / "bench" / "gpu.sh", out, PYTHON=str(python))
    assert done.returncode == 1
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    names = ("environment", "build", "report", "baselines", "tests")
    assert [line.split()[1] for line in failures] == [f"{name}:" for name in names]
    assert all("exit status 7" in line for line in failures)
    assert "no such part" in (out / "build.log").read_text()


def test_gpu_baselines_run_on_a_cpu(tmp_path):
    file = tmp_path / "baselines.json"
    assert gpu_baselines.main([str(file), "--device", "cpu", "--tiny", "--seconds", "120"]) == 0
    found = json.loads(file.read_text())
    assert set(found) == {part.__name__ for part in gpu_baselines.PARTS} | {"part_seconds"}
    assert found["layer"]["us"]["8/16"]["eager"] > 0
    text = gpu_baselines.summary(found)
    assert text.index("gaps") < text.index("layer")  # what decides most comes last
    assert "FAILED" not in text


def test_gpu_baselines_keep_what_they_have_when_time_is_up(tmp_path):
    file = tmp_path / "baselines.json"
    assert gpu_baselines.main([str(file), "--device", "cpu", "--tiny", "--seconds", "0"]) == 1
    found = json.loads(file.read_text())
    assert found["device"]["torch"] == torch.__version__
    assert found["gemm"] == {"failed": "NoTimeLeftError: no time left"}
    assert "no time left" in gpu_baselines.summary(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_baselines_without_a_gpu(tmp_path, capsys):
    assert gpu_baselines.main([str(tmp_path / "b.json")]) == 3
    assert "no CUDA device" in capsys.readouterr().err
