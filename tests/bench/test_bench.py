"""The benchmarks' own correctness: gates that close, tables that are what was measured, scripts
that say what is missing. Nothing here takes a time."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_baselines
import gpu_kernels
import groups
import instructions
import measuring
import stored
from fused_dni.backends import _cpu
from fused_dni.experiments import recurrent
from fused_dni.ops import measured, registry
from fused_dni.report.schema import Result
from fused_dni.report.timings import Ratio, Timing
from pages import cells, cpu, documents, estimates
from workloads import Disagreement, accuracy, backends, gemm, linear, memory, synthesizer
from workloads import gpu as wg
from workloads import lstm as wl
from workloads import step as w

pytestmark = pytest.mark.slow(70)

ROOT = Path(__file__).resolve().parents[2]
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
    linear.check_layer(linear.Shape(16, 24, 32), kind, dx)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("kind", synthesizer.KINDS)
def test_synthesizers_pass_their_gate(kind, backend):
    synthesizer.check_synthesizer(kind, SMALL, backend)


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
    with pytest.raises(Disagreement, match=r"1\.weight|float64 has"):
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
        raise Disagreement("off by 1.0")

    candidates, failures = groups.gather({"good": lambda: lambda: None, "bad": broken})
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
    rows = accuracy.resampled(images, features)
    assert rows.shape == (5, features)
    assert torch.allclose(rows.mean(1), images.mean(1), atol=0.05)
    with pytest.raises(ValueError, match="power of two"):
        accuracy.resampled(images, 300)
    with pytest.raises(ValueError, match="not square"):
        accuracy.resampled(images[:, :-1], features)


def test_errors_are_those_of_a_trained_network():
    from fused_dni.experiments import data

    digits = data.load("digits")
    errors = list(accuracy.train_error(digits, w.Case(64, 64), "adam", w.STOCK, epochs=3, seed=0))
    assert len(errors) == 3
    assert errors[-1] < 15.0


# ----------------------------------------------------------------------------------------- tables


def results(**groups):
    facts = {"device": "A CPU", "torch": "2.13.0", "threads": 2}
    return Result("benchmarks", facts=facts, body=groups)


def row(median, per_floor):
    bounds = (median * 0.9, median * 1.1)
    timed = Timing("", median, *bounds, 0.0, bounds, 8, (median,) * 8, 1, 0.0)
    return {"timing": timed, "per_floor": ratio(per_floor)}


def ratio(median, low=0.0, high=math.inf):
    return Ratio(median, low, high)


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
        "ratios": {"ours / theirs": ratio(0.5, 0.4, 0.6)},
    }
}


def test_documents_are_what_the_results_say(monkeypatch):
    asked = []  # for the verdict's pages, whose figures take longest: test_answers.py
    monkeypatch.setattr(documents.verdict, "render", lambda check: asked.append(check) or 0)
    assert documents.render(check=True) == 0
    assert asked == [True]


def test_one_seed_is_not_seeds():
    for page in (ROOT / "docs").glob("*.md"):
        assert not re.search(r"(?<![\d.])1 seeds", page.read_text(encoding="utf-8")), page


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
    new = documents.render_document(text, lambda _: [found])
    assert new.startswith("before\n")
    assert new.endswith("<!-- end of table -->\nafter\n")
    assert "| ours | 1.5 (1.35–1.65) | 1.50 | 2.00 |" in new
    assert "| broken | – | – | not measured |" in new
    assert "broken: Disagreement: no" in new
    assert "| 64/256 sgd | 0.50 (0.40–0.60) |" in new
    assert "old" not in new
    assert documents.render_document(new, lambda _: [found]) == new


def gpu_group(**more):
    return {
        "date": "2026-01-01",
        "commit": "abc",
        "threads": 16,
        "floor": "floor",
        "order": ["floor", "DNI", "stock"],
        "rows": {
            "floor": row(8e-6, 1.0),
            "DNI": row(12e-6, 1.5),
            "DNI, one launch": row(11e-6, 1.4),
            "DNI, CUDA": row(9e-6, 1.1),
            "ours": row(50e-6, 2.0),
            "ours, CUDA": row(42e-6, 1.8),
            "stock": {"failed": "Disagreement: no"},
        },
        "ratios": {
            "stock, compiled / DNI": ratio(2.5, 2.4, 2.6),
            "nn.LSTM / ours": ratio(0.5),
            "DNI / DNI, CUDA": ratio(1.33),
            "nn.LSTM / ours, CUDA": ratio(1.2),
        },
        **more,
    }


def test_gpu_tables_say_what_was_measured():
    found = results(
        **{
            "gpu-layer": {"128/1024 bf16 sgd": gpu_group(bytes=3_000_000)},
            "gpu-lstm": {"16/256/128 bf16": gpu_group(steps=20)},
            "gpu-floors": {
                "barrier": gpu_group(
                    grids={
                        "132": {"launch": 3e-6, "barrier": 1e-6, "CUDA barrier": 0.9e-6},
                        "8": {"CUDA launch": 2.5e-6, "CUDA barrier": 0.5e-6},
                    }
                )
            },
        }
    )
    found.facts.update(gpu="A GPU", triton="3.7.1", bandwidth=3e12, multiprocessors=132)
    layer, lstm, details = (
        documents.RENDERERS[name][1]([found]) for name in ("gpu", "gpu-lstm", "gpu-details")
    )
    for text in (layer, lstm, details):
        assert text.startswith("A GPU, torch 2.13.0, Triton 3.7.1, 2026-01-01, commit abc.")
    # floor, bytes, as chosen, one launch, several, over the floor, stock, compiled, ..., CUDA
    cells = "8 | 1 | 12 | 11 | – | 1.50 | – | 2.50 (2.40–2.60) | – | – | – | 9 | – | – | – | 1.33 |"
    assert f"| 128/1024 bf16 sgd | {cells}" in layer
    cells = "8 | – | – | 50 | – | 42 | 2.1 | 0.50 | – | – | 1.20 | – | – | – |"
    assert f"| 16/256/128 bf16 | {cells}" in lstm and "which bare take 1.8 µs." in lstm
    assert "| DNI | 12 | 1.50 |" in details and "stock: Disagreement: no" in details
    assert "| 8 | – | – | 2.5 | 0.5 |\n| 132 | 3 | 1 | – | 0.9 |" in details


def test_what_is_promised_of_a_gpu_stands_beside_what_was_measured():
    found = gpu_kernels.promises({})
    assert all(line.endswith("not measured") for line in found)
    barrier = gpu_group(grids={"132": {"CUDA launch": 2e-6, "CUDA barrier": 0.5e-6}})
    results = {
        "facts": {"multiprocessors": 132},
        "gpu-layer": {"128/1024 bf16 sgd": gpu_group()},
        "gpu-lstm": {
            "16/1024/128 bf16": gpu_group(steps=128),
            "16/256/128 bf16": gpu_group(steps=128),
            "16/256/128 fp32": gpu_group(steps=128),
        },
    }
    lines = gpu_kernels.promises(results)
    assert "128/1024 bf16 sgd: DNI / DNI, CUDA (at least 1): 1.33" in lines
    assert "128/1024 bf16 sgd: stock / DNI, CUDA (at least 2): not measured" in lines
    assert lines[-2:] == [  # in the order of their weight
        "16/256/128 bf16: nn.LSTM / ours, CUDA (at least 1): 1.20; 0.328 us a step",
        "16/1024/128 bf16: nn.LSTM / ours, CUDA: 1.20; 0.328 us a step",
    ]
    lines = gpu_kernels.promises(results | {"gpu-floors": {"barrier": barrier}})
    assert "128/1024 bf16 sgd: DNI, CUDA: 9 us; a launch and 3 bare barriers: 3.5 us" in lines
    assert lines[-1].endswith("; 0.328 us a step, its 2 bare barriers 1")


def test_a_gpus_figures_become_the_table_that_auto_chooses_by(tmp_path, capsys):
    found = results(
        **{
            "gpu-layer": {
                "128/1024 bf16 sgd": gpu_group(),
                "64/256 tf32 sgd": gpu_group(),
                "512/1024 bf16 sgd, cold": gpu_group(),
                "128/1024 bf16 adam": gpu_group(),
                "128/1024 bf16 sgd with dx": gpu_group(),
                "64/256 bf16 sgd": gpu_group(rows={"DNI": row(12e-6, 1.5)}),
            },
            "gpu-lstm": {"16/256/128 bf16": gpu_group()},
        }
    )
    found["facts"]["capability"] = "9.0"
    path = tmp_path / "kernels.json"
    stored.write(path, found)
    assert gpu_kernels.main([str(path), "--backends"]) == 0
    (tmp_path / "backends.json").write_text(capsys.readouterr().out)
    dni, window = {"cuda": 9e-6, "triton": 12e-6}, {"cuda": 42e-6, "triton": 50e-6}
    assert measured._read(tmp_path / "backends.json") == {
        measured.Entry("linear", "sm_90", "bfloat16", (128, 1024, 1024)): dni,
        measured.Entry("linear", "sm_90", "float32-tf32", (64, 256, 256)): dni,
        measured.Entry("lstm", "sm_90", "bfloat16", (128, 16, 256, 256)): window,
    }


def test_windows_of_a_gpu_are_each_measured_once_and_the_promised_first():
    windows = gpu_kernels.WINDOWS
    assert len(set(windows)) == len(windows) == 30
    assert gpu_kernels.LONG_WINDOW in windows[:10]
    assert max(h for b, h, t in windows[:19] if (b, h, t) != gpu_kernels.LONG_WINDOW) == 640


def test_estimates_stand_beside_what_was_measured():
    """In an empty column until there is a device. The first sums were made by hand, by others."""
    by_name = {estimate.name: estimate for estimate in estimates.ESTIMATES}
    by_hand = {"decoupled step 128/1024": 23e-6, "decoupled step 64/256": 9.5e-6}
    by_hand["LSTM 16/768/1024, forward"] = 1.75e-6 * 1024
    for name, seconds in by_hand.items():
        assert by_name[name].seconds == pytest.approx(seconds, rel=0.15)
    assert all(estimate.seconds > estimate.bound for estimate in estimates.ESTIMATES)
    rows = {estimate.found[2] for estimate in estimates.ESTIMATES}
    ours = {gpu_kernels.DNI_CUDA, gpu_kernels.SYNTHESIZER_CUDA, gpu_kernels.OURS_CUDA}
    assert rows == ours | {f"{gpu_kernels.OURS_CUDA}, forward", *gpu_kernels.FLOORS["CUDA"]}
    assert {by_name[name].barriers for name in by_hand if "step" in name} == {
        gpu_kernels.STEP_BARRIERS
    }
    empty = estimates.render_estimates([])
    assert "| decoupled step 128/1024 | 8.91 | 0.545 | 1 | 3 | 1.86 | 21.5 |  |" in empty
    found = results(
        **{
            "gpu-layer": {"128/1024 bf16 sgd": gpu_group()},
            "gpu-lstm": {"16/256/128 bf16": gpu_group(steps=128)},
            "gpu-floors": {"barrier": gpu_group(grids={"132": {"CUDA barrier": 0.9e-6}})},
        }
    )
    found.facts.update(gpu="A GPU", commit="abc", multiprocessors=132)
    text = estimates.render_estimates([found])
    assert "| estimate, µs | measured, µs, A GPU, abc |" in text
    assert "| CUDA barrier | 0 | 0 | 0 | 1 | 0 | 1 | 0.9 |" in text
    assert "| 21.5 | 9 |" in text and "| 42 (0.328) |" in text


@pytest.mark.parametrize("name", ["gpu", "gpu-lstm", "gpu-details"])
def test_without_a_gpu_the_tables_say_so(name):
    assert documents.RENDERERS[name][1]([]) == "No GPU figure has been measured yet."
    none = "Not measured yet." if name == "gpu-details" else "No GPU figure has been measured yet."
    assert documents.RENDERERS[name][1]([results()]) == none


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: nonsense -->\n<!-- end of table -->", "unknown table"),
        ("<!-- table: step -->\n", "no end marker"),
    ],
)
def test_bad_markers_are_errors(text, message):
    with pytest.raises(ValueError, match=message):
        documents.render_document(text, lambda _: [])


def test_groups_are_ordered_by_number():
    assert cells.ordered({"128/1024 sgd": 0, "64/256 sgd": 0, "128/512 adam": 0}) == [
        "64/256 sgd",
        "128/512 adam",
        "128/1024 sgd",
    ]


def test_saving_keeps_the_old_file_when_interrupted(tmp_path):
    path = tmp_path / "results.json"
    stored.write(path, results(a=1.23456789))
    before = path.read_text()
    assert stored.benchmarks(path).body == {"a": 1.23457}
    with pytest.raises(TypeError):
        stored.write(path, results(a=object()))
    assert path.read_text() == before


def test_committed_results_name_machine_versions_and_commit():
    for path in stored.RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        if found.get("kind", "").startswith("train"):
            assert {"device", "torch", "threads", "date", "commit", "command"} <= set(
                found["facts"]
            )
            continue
        assert {"device", "torch", "threads", "date", "commit"} <= set(found["facts"])
        for suite in (*measuring.SUITES, "gpu-layer", "gpu-lstm", "gpu-floors"):
            for group in found.get(suite, {}).values():
                assert group["commit"]
                assert group["date"]


def test_measuring_writes_a_table(tmp_path, monkeypatch, capsys):
    """The whole path from candidates to JSON to Markdown, on sizes that take no time."""
    monkeypatch.setattr(w, "CASES", (SMALL,))
    monkeypatch.setattr(w, "RULES", ("sgd",))
    monkeypatch.setattr(w, "METHODS", (w.STOCK, w.DNI_4))
    monkeypatch.setattr(linear, "SHAPES", (linear.Shape(16, 24, 32),))
    monkeypatch.setattr(memory, "DEPTHS", (1, 2))
    monkeypatch.setattr(memory, "CASE", SMALL)
    monkeypatch.setattr(gemm, "ROWS", (3,))
    monkeypatch.setattr(gemm, "FEATURES", (16,))
    monkeypatch.setattr(wl, "SHAPES", (TINY._replace(layers=1), TINY))
    monkeypatch.setattr(wl, "BOUNDARY_STEPS", (2,))
    monkeypatch.setattr(wl, "UNROLLED", 1)
    monkeypatch.setattr(wl, "MEMORY_SEQUENCE", 16)
    monkeypatch.setattr(wl, "MEMORY_WINDOWS", (4,))
    monkeypatch.setattr(wl, "MEMORY_LENGTHS", (16, 32))
    real = linear.check_layer

    def check(shape, kind, dx, backend=None):  # compiling takes longer than the rest
        if kind == "compiled":
            raise NotImplementedError("not compiled in this test")
        real(shape, kind, dx, backend)

    monkeypatch.setattr(linear, "check_layer", check)
    path = tmp_path / "results.json"
    measuring.measure(list(measuring.SUITES), None, 0.05, path)
    found = stored.benchmarks(path)
    rows = found["step"]["16/32 sgd"]["rows"]
    assert rows[w.DNI_4.name]["per_floor"].median > 0
    assert found["step"]["16/32 sgd"]["ratios"]["DNI k=4 / stock eager"].median > 0
    assert found["linear"]["16x24x32 without dx"]["rows"]["stock compiled"]["failed"]
    lstm = found["lstm"]
    assert lstm["3/8/5 forward+backward"]["rows"]["unrolled steps, compiled"]["failed"]
    assert lstm["3/8/5, 2 layers training step"]["ratios"]["nn.LSTM / DNI"].median > 0
    assert lstm["3/8/2 boundary"]["ratios"]["DNI / ours"].median > 0
    for suite in (*measuring.SUITES, "lstm-details", "lstm-memory"):
        suite = suite.removeprefix("peak-")
        assert "| " in documents.RENDERERS[suite][1]([found])
    details = documents.RENDERERS["lstm-details"][1]([found])
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
    measuring.errors(None, "adam", 1, 1, path, keep=False)
    rows = json.loads(path.read_text())["errors"]["rows"]["64/64 adam"]
    assert set(rows) == {w.STOCK.name, w.DNI_4.name}
    assert all(0.0 <= entry["mean"] <= 100.0 for entry in rows.values())


# -------------------------------------------------------------------------------------------- GPU


def test_gpu_baselines_run_on_a_cpu(tmp_path):
    file = tmp_path / "baselines.json"
    assert gpu_baselines.main([str(file), "--device", "cpu", "--tiny", "--seconds", "120"]) == 0
    found = json.loads(file.read_text())["baselines"]
    assert found.keys() == {*gpu_baselines.PARTS, "part_seconds"}
    assert found["network"]["us"]["8/16 sgd"]["eager"] > 0
    text = file.with_suffix(".txt").read_text()
    assert text.index("gaps") < text.index("network")  # what decides most comes last
    assert "FAILED" not in text


def test_gpu_baselines_keep_what_they_have_when_time_is_up(tmp_path):
    file = tmp_path / "baselines.json"
    assert gpu_baselines.main([str(file), "--device", "cpu", "--tiny", "--seconds", "0"]) == 1
    found = json.loads(file.read_text())["baselines"]
    assert found["device"]["torch"] == torch.__version__
    assert found["gemm"]["failed"] == "NoTimeLeftError: no time left"
    assert "no time left" in gpu_baselines.summary(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_baselines_without_a_gpu(tmp_path, capsys):
    assert gpu_baselines.main([str(tmp_path / "b.json")]) == 3
    assert "no CUDA device" in capsys.readouterr().err


INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself there")


@pytest.mark.slow
@INTERPRETED
def test_gpu_kernels_are_measured_in_the_interpreter(tmp_path, one_thread):
    """The whole script on sizes that only show that it runs: gates, tiles, floors, text."""
    file = tmp_path / "kernels.json"
    assert gpu_kernels.main([str(file), "--device", "cpu", "--tiny"]) == 0
    found = stored.benchmarks(file)
    rows = found["gpu-layer"]["8/16 bf16 sgd"]["rows"]
    assert [name for name, row in rows.items() if "failed" in row] == []
    assert {gpu_kernels.DNI, gpu_kernels.BACKPROP, gpu_kernels.STOCK} < rows.keys()
    cuda = {gpu_kernels.DNI_CUDA, gpu_kernels.BACKPROP_CUDA, gpu_kernels.SYNTHESIZER_CUDA}
    assert cuda < rows.keys()
    assert found["gpu-layer"]["8/16 bf16 sgd"]["ratios"]["DNI / DNI, CUDA"].median > 0
    assert found["gpu-layer"]["8/16 bf16 sgd"]["tiles"]["linear_step"]["launches"] == "one"
    with_dx = found["gpu-layer"]["8/16 fp32 adam with dx, cold"]["rows"]
    assert [name for name, row in with_dx.items() if "failed" in row] == []
    assert found["gpu-layer"]["8/16 bf16 sgd"]["done"] == list(gpu_kernels.ROWS)
    assert found["gpu-smoke"].keys() == {
        f"{backend}: {what}"
        for backend in ("cuda", "triton")
        for what in ("barrier", "step bf16", "window bf16")
    }
    window = found["gpu-lstm"]["4/16/3 fp32"]
    assert [name for name, row in window["rows"].items() if "failed" in row] == []
    assert window["ratios"]["nn.LSTM / ours"].median > 0
    assert window["ratios"]["nn.LSTM / ours, CUDA"].median > 0
    grid = found["gpu-floors"]["barrier"]["grids"]["1"]
    assert grid.keys() == {"launch", "barrier", "CUDA launch", "CUDA barrier"}
    assert grid["launch"] > 0 and grid["CUDA launch"] > 0
    text = file.with_suffix(".txt").read_text()
    assert "4096/4096 bf16 sgd: DNI / its two products (at most 1.5): not measured" in text
    for suite in ("gpu", "gpu-lstm", "gpu-details"):
        assert "| " in documents.RENDERERS[suite][1]([found])


@INTERPRETED
def test_gpu_kernels_keep_what_they_have_when_time_is_up(tmp_path, one_thread):
    file = tmp_path / "kernels.json"
    given = [str(file), "--device", "cpu", "--tiny", "--seconds", "0", "--part", "layer"]
    assert gpu_kernels.main([*given, "--backend", "cpu"]) == 1
    found = json.loads(file.read_text())
    ((key, group),) = found["gpu-layer"].items()
    assert group["rows"][group["floor"]]["timing"]["median"] > 0 and len(group["rows"]) == 1
    assert found["failed"] == {"layer": f"no time left in {key} for stock"}
    assert "FAILED layer: no time left" in file.with_suffix(".txt").read_text()


def tiny_layers(file, *more):
    """Without Triton's rows, which the interpreter is slow at."""
    return gpu_kernels.main(
        [str(file), "--device", "cpu", "--tiny", "--part", "layer", "--rows", "cuda", *more]
    )


@INTERPRETED
def test_every_candidate_is_kept_before_the_next_is_built(tmp_path, monkeypatch, one_thread):
    """Cheap ones first; a kill between any two loses none that was timed."""
    file, built = tmp_path / "kernels.json", []
    real = gpu_kernels.gather

    def gather(makers):
        (name,) = makers
        if built:
            rows = json.loads(file.read_text())["gpu-layer"]["8/16 bf16 sgd"]["rows"]
            assert sorted(rows) == sorted(built) and all("timing" in row for row in rows.values())
        built.append(name)
        return real(makers)

    monkeypatch.setattr(gpu_kernels, "gather", gather)
    assert tiny_layers(file, "--only", "8/16 bf16 sgd") == 0
    assert built[:3] == ["floor: 2 products by torch", gpu_kernels.STOCK, gpu_kernels.DNI_CUDA]
    assert built[-1] == gpu_kernels.STOCK_EAGER
    assert not {gpu_kernels.DNI, gpu_kernels.BACKPROP} & {*built}


@INTERPRETED
def test_a_kernel_that_takes_the_device_with_it_is_gone_round(tmp_path, monkeypatch, one_thread):
    file, dead = tmp_path / "kernels.json", []

    def fatal(run, case, device, *given, **options):
        dead.append(True)
        raise RuntimeError("CUDA error: unspecified launch failure")

    with monkeypatch.context() as patched:
        patched.setattr(wg.Backprop, "__init__", fatal)
        patched.setattr(gpu_kernels, "lost", lambda run: bool(dead))
        assert tiny_layers(file) == gpu_kernels.LOST
    group = json.loads(file.read_text())["gpu-layer"]["8/16 bf16 sgd"]
    row = group["rows"][gpu_kernels.BACKPROP_CUDA]
    assert row == {"failed": "RuntimeError: CUDA error: unspecified launch failure", "fatal": True}
    assert group["rows"][gpu_kernels.STOCK]["timing"]["median"] > 0 and group["done"] == []
    assert tiny_layers(file, "--resume") == 0
    found = json.loads(file.read_text())["gpu-layer"]
    assert [name for name, row in found["8/16 bf16 sgd"]["rows"].items() if "failed" in row] == [
        gpu_kernels.BACKPROP_CUDA
    ]
    assert list(found) == ["8/16 bf16 sgd", "8/16 fp32 adam with dx, cold"]
    monkeypatch.setattr(gpu_kernels, "layer_group", None)  # nothing is left to be done
    assert tiny_layers(file, "--resume") == 0


@INTERPRETED
def test_figures_are_printed_where_there_is_no_room_for_them(
    tmp_path, monkeypatch, capsys, one_thread
):
    def full(path, results):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "write", full)
    assert tiny_layers(tmp_path / "kernels.json", "--only", "8/16 bf16 sgd") == 1
    said = capsys.readouterr()
    assert f"layer 8/16 bf16 sgd: {gpu_kernels.DNI_CUDA}: " in said.out
    assert "kernels.json cannot be written: No space left on device" in said.err


def test_results_of_two_calls_are_joined(tmp_path, capsys):
    """A figure is not lost to a later reason; other devices are refused."""
    first, second, whole = (tmp_path / f"{name}.json" for name in ("first", "second", "whole"))
    cuda = {"rows": {"stock": row(20e-6, 2.5), "DNI, CUDA": row(9e-6, 1.1)}, "done": ["cuda"]}
    late = {"rows": {"DNI": row(12e-6, 1.5), "DNI, CUDA": {"failed": "no"}}, "done": ["triton"]}
    base = {"floor": "floor", "ratios": {}, "bytes": 1}
    for path, group in ((first, cuda), (second, late)):
        found = results(**{"gpu-layer": {"128/1024 bf16 sgd": base | group}})
        found.facts.update(gpu="A GPU", driver="580")
        stored.write(path, found)
    command = [str(whole), "--join", str(first), str(second)]
    assert gpu_kernels.main(command) == 0
    group = json.loads(whole.read_text())["gpu-layer"]["128/1024 bf16 sgd"]
    assert {name: row["timing"]["median"] for name, row in group["rows"].items()} == {
        "stock": 20e-6, "DNI, CUDA": 9e-6, "DNI": 12e-6
    }  # fmt: skip
    assert group["done"] == ["cuda", "triton"]
    found["facts"]["gpu"] = "Another"
    stored.write(second, found)
    assert gpu_kernels.main(command) == 1
    assert "second.json is of gpu Another" in capsys.readouterr().err


@INTERPRETED
def test_gpu_kernels_go_on_when_a_group_fails(tmp_path, monkeypatch, one_thread):
    real = gpu_kernels.layer_group

    def group(run, key, case, cold):
        if not cold:
            raise RuntimeError("planted")
        real(run, key, case, cold)

    monkeypatch.setattr(gpu_kernels, "layer_group", group)
    file = tmp_path / "kernels.json"
    given = [str(file), "--device", "cpu", "--tiny", "--part", "layer", "--backend", "cpu"]
    assert gpu_kernels.main(given) == 1
    found = json.loads(file.read_text())
    assert list(found["gpu-layer"]) == ["8/16 fp32 adam with dx, cold"]
    assert found["failed"] == {"layer 8/16 bf16 sgd": "RuntimeError: planted"}


@INTERPRETED
def test_gpu_kernels_that_are_profiled_all_run(capsys, one_thread):
    assert gpu_kernels.main(["--profile", "--device", "cpu", "--tiny"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["triton: Decoupled 16/32", "triton: Backprop 16/32"]
    assert len(printed) == 8 and printed[4] == "cuda: Decoupled 16/32"


@INTERPRETED
def test_gpu_kernels_without_the_cuda_backend(tmp_path, monkeypatch, capsys, one_thread):
    """It was not built: its rows hold the reason, all else is measured."""
    monkeypatch.setitem(registry._loaded, "cuda", "was not built")
    file, tiny = tmp_path / "kernels.json", ["--device", "cpu", "--tiny"]
    parts = [word for part in ("floors", "lstm") for word in ("--part", part)]
    assert gpu_kernels.main([str(file), *tiny, *parts, "--backend", "cpu"]) == 0
    found = json.loads(file.read_text())
    rows = found["gpu-lstm"]["4/16/3 fp32"]["rows"]
    assert "was not built" in rows[gpu_kernels.OURS_CUDA]["failed"]
    assert rows[gpu_kernels.OURS]["timing"]["median"] > 0
    assert found["gpu-floors"]["barrier"]["grids"]["1"].keys() == {"launch", "barrier"}
    capsys.readouterr()
    assert gpu_kernels.main(["--profile", *tiny]) == 1
    printed = capsys.readouterr()
    assert "was not built" in printed.err and len(printed.out.splitlines()) == 4


@INTERPRETED
def test_gpu_kernels_without_a_gpu(tmp_path, capsys):
    assert gpu_kernels.main([str(tmp_path / "k.json")]) == 3
    assert "no CUDA device" in capsys.readouterr().err
    assert gpu_kernels.main([str(tmp_path / "k.json"), "--device", "cpu", "--backend", "cuba"]) == 1
    assert "unknown backend 'cuba'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [wg.Decoupled, wg.Backprop, wg.SynthesizerUpdate])
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_gate_of_a_layer_opens_and_closes(kind, rule):
    """Open for the C++ kernels, closed where a hundredth of the gradient is lost."""
    case = wg.Case(16, 24, "fp32", rule, kind is not wg.SynthesizerUpdate)
    device = torch.device("cpu")

    def right(case, device, **options):
        return kind(case, device, "cpu", **options)

    def wrong(case, device, **options):
        layer = right(case, device, **options)
        rule = layer.own if kind is wg.SynthesizerUpdate else layer.rule
        rule.hyper[0] *= 1.5 if rule.kind == "adam" else 1.01
        return layer

    wg.check_layer(right, case, device)
    with pytest.raises(Disagreement, match="is off by"):
        wg.check_layer(wrong, case, device)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gate_of_stock_layers_opens(precision):
    """As they are compared with in the tables: autocast, autograd, a fused optimizer."""
    for rule in ("sgd", "adam"):
        case = wg.Case(16, 24, precision, rule, True)
        wg.check_layer(wg.Stock, case, torch.device("cpu"))


@pytest.mark.parametrize(("precision", "factor"), [("fp32", 1.001), ("bf16", 1.3)])
def test_gate_of_a_window_opens_and_closes(precision, factor):
    case, device = wg.WindowCase(3, 16, 5, precision), torch.device("cpu")

    def right(case, device):
        return wg.OurWindow(case, device, wg.operand(precision), "reference")

    def wrong(case, device):
        window = right(case, device)
        window.layer.weight_hh.mul_(factor)
        return window

    wg.check_window(right, case, device)
    with pytest.raises(Disagreement, match="is off by"):
        wg.check_window(wrong, case, device)


def test_what_ncu_saw_becomes_a_table():
    metric = "gpu__time_duration.sum"
    text = (
        "==PROF== Connected\n"
        f'"ID","Kernel Name","{metric}","launch__grid_size"\n'
        '"","","us",""\n'
        '"0","linear_kernel","12.5","132"\n'
    )
    row = gpu_kernels.ncu_table(text).splitlines()[-1]
    assert row.split()[:4] == ["linear_kernel", "1", "12.5", "µs"] and row.split()[-1] == "132"
    assert gpu_kernels.ncu_table("==ERROR== no permission\n") == "ncu reported no kernel"


# ----------------------------------------------------------------------------------- instructions


def test_instructions_are_counted_between_two_lengths(monkeypatch, tmp_path, capsys):
    """What asking costs is in both parts of a method, and goes with their difference."""

    started = subprocess.run

    def run(command, **options):
        if command[0] != "valgrind":
            return started(command, **options)
        out = next(o for o in command if o.startswith("--callgrind-out-file=")).partition("=")[2]
        for i in range(len(instructions.METHODS)):
            for j, steps in enumerate((8, 16)):
                total = 500 + steps * 100 * (i + 1)
                Path(f"{out}.{2 * i + j + 1}").write_text(f"events: Ir\ntotals: {total}\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(instructions.subprocess, "run", run)
    monkeypatch.setattr(instructions.shutil, "which", lambda name: name)
    out = tmp_path / "counts.json"
    assert instructions.main(["--steps", "8", "--out", str(out), "--json"]) == 0
    expected = {m.name: 100 * (i + 1) for i, m in enumerate(instructions.METHODS)}
    assert json.loads(capsys.readouterr().out) == expected
    stored_group = json.loads(out.read_text())["instructions"]["4 layers 8/8 sgd"]
    assert stored_group["rows"] == expected
    found = json.loads(out.read_text())
    assert "| 2.00 |" in cpu.render_instructions(found, found["instructions"])


def test_instructions_that_cannot_be_counted(monkeypatch, capsys):
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    assert instructions.main([]) == 2
    assert "apt install valgrind" in capsys.readouterr().err
    with pytest.raises(ValueError, match="without totals"):
        instructions.counted("events: Ir")
    monkeypatch.setattr(instructions.shutil, "which", lambda name: name)
    failed = subprocess.CompletedProcess([], 1, "", "no such tool")
    monkeypatch.setattr(instructions.subprocess, "run", lambda *_, **__: failed)
    assert instructions.main([]) == 1
    assert "no such tool" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        instructions.main(["--steps", "3"])


def _late(runs: dict[tuple[str, int | None], list[float]], **changes):
    settings = {
        "task": "classification",
        "stages": 2,
        "depth": 4,
        "hidden": 8,
        "batch_size": 16,
        "epochs": 6,
        "lags": [20, 1],
        "seeds": [1, 2],
        "share": 0.5,
        "warmup": 0.167,
        "max_norm": None,
        **changes,
    }
    return {
        "facts": {"device": "A CPU", "isa": None, "threads": 1, "torch": "2", "date": "today",
                  "commit": "abc", "command": f"delay {settings['stages']}"},
        "settings": settings,
        "arms": dict.fromkeys(name for name, _ in runs),
        "runs": [{"name": name, "lag": lag, "error": error}
                 for (name, lag), errors in runs.items() for error in errors],
    }  # fmt: skip


def test_the_table_of_delays_joins_reports_and_says_what_is_missing():
    two = _late({("cdni-4", 20): [0.02], ("backprop", None): [0.01, 0.03]})
    slow = _late({("cdni-4", 20): [0.04, 0.05]}, share=0.1)
    deep = _late({("stale", 1): [0.07, 0.09]}, depth=8, stages=8, lags=[1])
    found = documents.RENDERERS["delay"][1]([deep, two, slow])
    assert found.index("4 hidden layers of 8") < found.index("8 hidden layers of 8")
    assert "| arm | 2 stages, lag 1 | 2 stages, lag 20 |" in found
    assert "| backprop | 2.00 (1.00–3.00) | 2.00 (1.00–3.00) |" in found
    assert "| cdni-4 |  | 2.00, 1 seed |" in found
    assert "| cdni-4, share 0.1 |  | 4.50 (4.00–5.00) |" in found
    assert "| stale | 8.00 (7.00–9.00) |" in found
    assert "By `delay 2`, `delay 2`." in found and "By `delay 8`." in found
    assert documents.RENDERERS["delay"][1]([]) == "Not measured yet."


def test_what_passes_one_cut_alone_has_the_same_error_by_the_cut():
    plain = {("stale", 20): [0.02, 0.04], ("cdni-4", 20): [0.01, 0.03], ("local", None): [0.05]}
    late = {("stale", 20): [0.07, 0.09], ("cdni-4-true", 20): [0.06, 0.06]}
    reports = [_late(plain, lags=[20]), _late(late, lags=[20], each_cut=True)]
    found = documents.RENDERERS["delay"][1](reports)
    for row in (
        "| arm | 2 stages, lag 20 | 2 stages, lag 20 a cut |",
        "| stale | 3.00 (2.00–4.00) | 8.00 (7.00–9.00) |",
        "| cdni-4 | 2.00 (1.00–3.00) | 2.00 (1.00–3.00) |",
        "| cdni-4-true |  | 6.00 (6.00–6.00) |",
        "| local | 5.00, 1 seed | 5.00, 1 seed |",
    ):
        assert row in found


def test_kept_to_avx2_by_the_environment_and_by_name(monkeypatch):
    """PyTorch reads its environment when it loads, so the command is started anew for that; what
    is measured lies apart from the native figures."""
    widest = _cpu.isas()[-1]
    if "avx2" not in _cpu.isas():
        pytest.skip("no kernels for AVX2")
    started = []
    for name in groups.AVX2:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "execve", lambda *command: started.append(command))
    monkeypatch.setattr(_cpu, "set_isa", lambda name: None)
    groups.keep_to_avx2()
    ((program, arguments, environment),) = started
    assert (program, arguments) == (sys.executable, [sys.executable, *sys.argv])
    assert environment == os.environ | groups.AVX2
    for name, value in groups.AVX2.items():
        monkeypatch.setenv(name, value)
    groups.keep_to_avx2()
    assert len(started) == 1
    monkeypatch.undo()
    try:
        _cpu.set_isa("portable")
        facts = groups.device_facts()
        assert facts["isa"] == f"{widest}, kept to portable"
        for threads, told in ((1, "-1-thread"), (2, "")):
            name = stored.result_path(facts | {"threads": threads}, "step").name
            assert name.endswith(f"{widest}-kept-to-portable{told}-cpu.json")
    finally:
        _cpu.set_isa(widest)
    assert groups.device_facts()["isa"] == widest


def test_figures_of_a_gpu_need_no_kernels_of_the_cpu():
    """The first call of ``bench/gpu.sh`` builds the CUDA part alone."""
    without = (
        "import sys; sys.modules['fused_dni.backends._cpu'] = None; "
        "import gpu_kernels, groups; print(groups.device_facts()['isa'])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "bench")))}
    done = subprocess.run(
        [sys.executable, "-c", without], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "None", done.stderr


def test_the_table_of_recipes_marks_ranges_and_says_shares():
    runs = [
        {"name": name, "k": k, "seed": seed, "error": error, "exact": exact}
        for name, k, exact, errors in (
            ("backprop", None, 1.0, (0.01, 0.02)),
            ("stale", 8, 0.125, (0.04, 0.05)),
            ("exact", 8, 0.2, (0.02, 0.03)),
        )
        for seed, error in enumerate(errors)
    ]
    report = Result(
        "recipes",
        facts=_late({})["facts"],
        settings={
            "depth": 3, "hidden": 8, "batch_size": 16, "epochs": 6, "lr": 0.003, "sg_lr": 0.001,
            "warmup": 0.5, "target_every": [8], "seeds": [0, 1],
        },
        body={
            "rows": {"backprop": "b", "stale": "s", "exact": "e"}, "runs": runs,
            "evaluated_on": "test set", "dataset": "mnist", "finished": True,
        },
    )  # fmt: skip
    found = documents.RENDERERS["recipes"][1]([report])
    assert "| row | k=8 | exact, k=8 |" in found
    assert "| backprop | 1.50 (1.00-2.00) | 100.0 % |" in found
    assert "| stale | 4.50 (4.00-5.00) | 12.5 % |" in found
    assert "| exact | 2.50 (2.00-3.00) \\* | 20.0 % |" in found
    assert "At k=8 the row of least error is exact, 2.50 %; stale 4.50 %, ranges apart" in found
    assert documents.RENDERERS["recipes"][1]([]) == "Not measured yet."


def test_the_extremes_of_a_step_are_over_all_processors_threads_and_rules():
    def result(threads: int, **medians: float) -> dict:
        label = "our backprop / stock eager"
        step = {
            f"64/256 {rule}": {"ratios": {label: Ratio(median, 0.1, 2.0)}, "threads": threads}
            for rule, median in medians.items()
        }
        others = {other: Ratio(0.9, 0.1, 2.0) for other in cpu.JUDGED if other != label}
        for group in step.values():
            group["ratios"].update(others)
        return {"facts": {"device": "A CPU", "isa": "avx2"}, "step": step}

    found = cpu.render_extremes([result(1, sgd=0.7, adam=0.5), result(2, sgd=0.6, adam=0.83)])
    assert "| 64/256 | 0.50 to 0.83 | 0.90 to 0.90 | 0.90 to 0.90 |" in found
    assert "1 thread;" in found and "2 threads." in found
    assert cpu.render_extremes([{"facts": {}, "lstm": {}}]) == "Not measured yet."


def test_the_best_linear_fit_stands_below_the_cosine_that_it_bounds():
    settings = recurrent.Settings.of("copy", methods=("dni",), seeds=(0, 1, 2), probe=True)
    said = {"prediction_cosine": 0.1, "prediction_norm_ratio": 2.0, "prediction_row_cosine": 0.2}
    history = [{"solved": 1.0, "seconds": 1.0, "steps": 1.0, "prediction": said}]
    rows = []
    for fitted in ({}, {"fitted_row_cosine": 0.5}, {"fitted_row_cosine": None}):
        run = {"name": "dni T=4", "method": "dni", "window": 4, "history": history, **fitted}
        runs = [run | {"seed": seed} for seed in settings.seeds]
        report = recurrent.result(recurrent.Outcome(settings, {}, runs), "fused-dni train copy")
        found = documents.RENDERERS["copy-future"][1]([report])
        rows.append([line for line in found.splitlines() if "row cosine" in line])
    assert rows[0] == rows[2] == []
    assert [line.split("|")[1].strip() for line in rows[1]] == [
        "dni T=4, row cosine",
        "dni T=4, row cosine of the best linear fit",
    ]
    assert rows[1][0].count("0.200") == 5 and rows[1][1].count("0.500") == 1


def test_the_table_of_an_ablation_takes_cosines_over_all_of_the_training():
    settings = recurrent.Settings.of(
        "copy", ablate=("zero",), methods=("fused", "dni"), seeds=(0, 1)
    )
    cosines = {"dni T=4": (0.3, -0.1, None, 0.0), "dni/zero T=4": (0.2, 0.2, 0.2, 0.2)}
    runs = []
    for arm in settings.arms():
        for seed in settings.seeds:
            history = [
                {"solved": float(k + seed), "seconds": 1.0, "steps": 1.0}
                | ({"prediction": {"prediction_row_cosine": found}} if found != 9 else {})
                for k, found in enumerate(cosines.get(arm.name, (9, 9, 9, 9)))
            ]
            run = {"name": arm.name, "seed": seed, "history": history}
            runs.append(run | {"method": arm.method, "window": arm.window})
    report = recurrent.result(recurrent.Outcome(settings, {}, runs), "fused-dni train copy")
    found = documents.RENDERERS["ablation"][1]([report])
    assert "| fused T=4 | 1.5 (1–2) | 3.5 (3–4) | – |" in found
    assert "| dni T=4 | 1.5 (1–2) | 3.5 (3–4) | +0.067 (2 of 6 above 0) |" in found
    assert "| dni/zero T=4 | 1.5 (1–2) | 3.5 (3–4) | +0.200 (8 of 8 above 0) |" in found
