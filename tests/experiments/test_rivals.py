"""The rivals: each computes what its formula says, and runs are a function of their settings."""

import copy
import json
import signal
from dataclasses import replace

import pytest
import torch
from clusters import clusters

from fused_dni.cli import main
from fused_dni.experiments import data, rival_gate, rival_trainers, rivals
from fused_dni.experiments.rival_arms import KINDS, Settings, arm
from fused_dni.experiments.rival_trainers import (
    DelayedTrainer,
    FeedbackTrainer,
    GraphTrainer,
    LocalTrainer,
    StaleTrainer,
    advance,
    build,
    output_error,
)
from fused_dni.experiments.run import Interrupted
from fused_dni.measure import timing
from fused_dni.measure.verdict.errors import GateError
from fused_dni.report import blocks_of, load
from fused_dni.report.blocks import Figure, as_text
from fused_dni.report.files import as_json
from fused_dni.report.kinds import rivals as rivals_report
from fused_dni.report.progress import Progress
from fused_dni.report.schema import save
from fused_dni.rules import SGD, Adam

ARMS = (
    *("backprop", "in-backward", "fused", "stale-2", "delayed", "delayed-corrected"),
    *("local", "mono-forward", "feedback", "cdni-2"),
)
TINY = Settings(
    dataset="digits",
    arms=ARMS,
    seconds_per_run=0.02,
    hidden=12,
    depth=2,
    batch_size=16,
    rank=2,
    seeds=(0,),
    backend="reference",
)


#: A run of these has every kind of a row.
SOME = replace(TINY, arms=("backprop", "fused", "stale-2", "local", "cdni-2"), seeds=(0, 1))


# Networks this small have nothing to share out.
pytestmark = pytest.mark.usefixtures("one_thread")


DATA = clusters()
ROWS = data.permutation(96, 0, 0).view(-1, 16)


def _new(name: str, phase: str = "", seed: int = 0):
    return build(arm(name), seed, TINY, DATA, rivals.ENDLESS, SGD(1.0), phase=phase)


# ---------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        (name, "warm-up" if name.startswith("cdni") else "")
        for name in (*ARMS, "cdni-z-1", "cdni-ce-1")
    ],
)
def test_every_arm_follows_its_formula(name, phase):
    trainer = _new(name, phase)
    rows = ROWS[: rival_gate.steps_to_check(trainer)]
    deviation = rival_gate.check(
        trainer, rival_trainers.network_of(TINY, DATA, 0), DATA.train, rows
    )
    assert 0.0 < deviation < 1.0


@pytest.mark.parametrize("name", ARMS)
def test_the_gate_notices_a_wrong_step(name):
    """The labels of one batch, one row further on: a mistake of a batch's rows, no more."""
    trainer = _new(name, "warm-up" if name.startswith("cdni") else "")
    step = trainer.step
    trainer.step = lambda x, y: step(x, y.roll(1))
    with pytest.raises(GateError, match=f"{name} deviates from its formula by"):
        _check(trainer)


def test_the_gate_notices_a_gradient_that_is_not_stale_or_not_late(monkeypatch):
    late = _new("delayed")
    rows = ROWS[: rival_gate.steps_to_check(late)]
    late.delay = 0
    with pytest.raises(GateError, match="delayed deviates"):
        rival_gate.check(late, rival_trainers.network_of(TINY, DATA, 0), DATA.train, rows)
    monkeypatch.setattr(StaleTrainer, "repeats", lambda self: False)
    with pytest.raises(GateError, match="stale-2 deviates"):
        _check(_new("stale-2"))


def test_the_gate_notices_a_correction_that_is_not_made(monkeypatch):
    trainer = _new("delayed-corrected")
    trainer._apply = trainer.optimizer.step
    with pytest.raises(GateError, match="delayed-corrected deviates"):
        _check(trainer)


def test_goodness_is_summed_over_layers():
    trainer = _new("mono-forward")
    for rows in ROWS:
        advance(trainer, DATA.train, rows)
    trainer.model.eval()
    h, wanted = DATA.test.images, 0.0
    with torch.no_grad():
        for layer, classifier in zip(trainer.hidden, trainer._classifiers, strict=True):
            h = layer(h)
            wanted = wanted + classifier(h)
        assert torch.equal(trainer.model(DATA.test.images), wanted)
        assert not torch.equal(classifier(h), wanted)
    assert all(classifier.bias is None for classifier in trainer.helpers)


def test_the_gate_notices_other_feedback_and_other_weights():
    class Wrong(FeedbackTrainer):
        def step(self, x, y):
            right = self.feedback
            self.feedback = [right[1], right[0]]
            super().step(x, y)
            self.feedback = right

    wrong = Wrong("feedback", 0, rival_trainers.network_of(TINY, DATA, 0), SGD(1.0), rivals.ENDLESS)
    with pytest.raises(GateError, match="feedback deviates"):
        _check(wrong)
    with pytest.raises(GateError, match="fused deviates"):
        rival_gate.check(
            _new("fused"), rival_trainers.network_of(TINY, DATA, 1), DATA.train, ROWS[:1]
        )


def test_no_delay_and_no_staleness_are_backprop():
    network = rival_trainers.network_of(TINY, DATA, 0)
    for trainer in (
        DelayedTrainer("delayed", 0, network, SGD(1.0), rivals.ENDLESS, delay=0),
        _new("stale-1"),
        _new("backprop"),
    ):
        assert rival_gate.steps_to_check(trainer) == 1
        assert _check(trainer) < 1.0


@pytest.mark.parametrize("rule", [SGD(0.1, momentum=0.9), Adam(0.01)], ids=["sgd", "adam"])
def test_a_replayed_step_is_the_eager_one(monkeypatch, rule):
    """All but the capture itself: the batch's own memory, the trial steps that leave nothing, and
    the rate on the device, over steps whose rate falls."""
    trials = []

    def replay_of(step):
        trials.extend(step() for _ in range(4))
        return step

    monkeypatch.setattr(rival_trainers, "replay_of", replay_of)
    sample = data.Split(*(part[:16] for part in DATA.train))
    replayed = GraphTrainer("graph", 0, rival_trainers.network_of(TINY, DATA, 0), rule, 6, sample)
    eager = build(arm("backprop"), 0, TINY, DATA, 6, rule)
    assert len(trials) == 4
    for rows in ROWS:
        for trainer in (replayed, eager):
            advance(trainer, DATA.train, rows)
    for (name, a), b in zip(
        replayed.model.state_dict().items(), eager.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("rule", [SGD(0.1, momentum=0.9), Adam(0.01)], ids=["sgd", "adam"])
def test_a_compiled_step_is_the_eager_one(monkeypatch, rule):
    """All but the compilation itself: trial steps that leave nothing, the rate as a tensor."""
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)
    compiled, eager = (
        build(arm(name), 0, TINY, DATA, 6, rule) for name in ("compiled-step", "backprop")
    )
    for rows in ROWS:
        for trainer in (compiled, eager):
            advance(trainer, DATA.train, rows)
    for (name, a), b in zip(
        compiled.model.state_dict().items(), eager.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.gpu
def test_a_captured_step_follows_its_formula():
    settings = replace(TINY, arms=("graph",), device="cuda")
    trainer = build(arm("graph"), 0, settings, DATA.to("cuda"), rivals.ENDLESS, SGD(1.0))
    network, rows = rival_trainers.network_of(settings, DATA, 0), ROWS[:1].cuda()
    assert rival_gate.check(trainer, network, DATA.to("cuda").train, rows) < 1.0


def test_the_graph_is_an_arm_of_gpus_alone():
    assert "graph" in Settings.of("digits", device="cuda").arms
    assert "graph" not in Settings.of("digits", device="cpu").arms
    with pytest.raises(ValueError, match="'graph' is a CUDA graph and needs device cuda"):
        Settings.of("digits", arms=("graph",))


def _check(trainer) -> float:
    rows = ROWS[: rival_gate.steps_to_check(trainer)]
    return rival_gate.check(trainer, rival_trainers.network_of(TINY, DATA, 0), DATA.train, rows)


def test_the_error_at_the_logits_is_the_gradient_of_the_cross_entropy():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 3, 3, 1, 2])
    (wanted,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y), logits)
    torch.testing.assert_close(output_error(logits.detach(), y), wanted)


# ---------------------------------------------------------------------------------------- trainers


def test_a_repeated_gradient_reads_no_batch():
    trainer = _new("stale-3")
    for step in range(6):
        rows = ROWS[0] if step % 3 == 0 else None
        advance(trainer, DATA.train, rows)  # None could not be picked
    assert trainer.repeats() is False


def test_the_optimizer_in_the_backward_holds_no_gradient_and_follows_the_cosine():
    trainer = build(arm("in-backward"), 0, TINY, DATA, 4, Adam(1e-2))
    for rows in ROWS[:4]:
        advance(trainer, DATA.train, rows)
        assert all(p.grad is None for p in trainer.model.parameters())
    rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer._optimizers]
    assert len(rates) == 8 and rates == pytest.approx([0.0] * 8, abs=1e-12)


def test_local_losses_leave_no_graph_between_layers():
    trainer = _new("local")
    inputs = []
    for layer in trainer.hidden:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].requires_grad))
    advance(trainer, DATA.train, ROWS[0])
    assert inputs == [False, False] and isinstance(trainer, LocalTrainer)


def test_all_arms_start_from_the_same_weights():
    starts = [next(_new(name, seed=3).model.parameters()).detach() for name in ARMS]
    assert all(torch.equal(starts[0], start) for start in starts[1:])
    assert not torch.equal(starts[0], next(_new("fused").model.parameters()))


# ---------------------------------------------------------------------------------- arms, settings


def test_the_shares_of_an_arms_steps():
    assert arm("cdni-4").phases(0.2) == pytest.approx(
        {"warm-up": 0.2, "target": 0.2, "no target": 0.6}
    )
    assert arm("cdni-1").phases(0.0) == {"target": 1.0}
    assert arm("stale-4").phases(0.1) == {"compute": 0.25, "repeat": 0.75}
    assert arm("fused").phases(0.1) == {"step": 1.0}


def test_names_of_arms_go_there_and_back():
    for name in Settings().arms:
        assert arm(name).name == name and arm(name).kind in KINDS
    assert arm("cdni-2").what.endswith("trained on every 2nd step")
    assert arm("cdni-1").what.endswith("trained on every step")
    assert arm("stale-11").what.startswith("a gradient on every 11th step")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("fusde",)}, "unknown arm 'fusde', did you mean 'fused'"),
        ({"arms": ("stale",)}, "unknown arm 'stale', did you mean 'stale-K'"),
        ({"arms": ("cdni-0",)}, "unknown arm 'cdni-0': K of cdni-K must be a number from 1"),
        ({"arms": ("cdni-K",)}, "unknown arm 'cdni-K': K of cdni-K must be a number from 1"),
        ({"arms": ()}, "arms must hold one at least"),
        ({"hidden": 0}, "hidden must be a whole number from 1 on, got 0"),
        ({"batch_size": 1}, "batch_size must be a whole number from 2 on, got 1"),
        ({"seconds_per_run": 0.0}, "seconds_per_run must be a positive, finite number, got 0.0"),
        ({"warmup": 1.0}, "warmup must be at least 0 and below 1, got 1.0"),
        ({"update": "adma"}, "did you mean 'adam'"),
        ({"lr": -1.0}, "lr must be"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_what_does_not_fit_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="batch_size 500 is larger than the training set"):
        rivals.compare(replace(TINY, batch_size=500), DATA)
    with pytest.raises(ValueError, match="no rates are known for sgd: give --lr, or --tune"):
        rivals.compare(replace(TINY, update="sgd"), DATA)


# --------------------------------------------------------------------------------------------- run


@pytest.fixture(scope="module")
def report() -> dict:
    """Some arms, two seeds."""
    torch.set_num_threads(1)
    return rivals.compare(SOME, DATA, seconds=0.02, command="here")


def test_a_comparison_reports_every_arm(report):
    assert report["finished"] and report["kind"] == "rivals" and report["version"] == 2
    assert [row["name"] for row in report["arms"]] == list(SOME.arms) == list(report["gate"])
    assert len(report["runs"]) == 2 * 5
    for row in report["arms"]:
        assert row["steps"] == max(1, int(0.02 / row["time"].median))
        assert row["memory"] > 0 and row["rate"] == SOME.rate(arm(row["name"]))
        assert set(row["against"]) == {"backprop", "fused"} - {row["name"]}
    for run in report["runs"]:
        steps = [point["steps"] for point in run["history"]]
        assert steps == sorted(set(steps)) and steps[-1] == run["steps"]
        assert not run["diverged"] and run["seconds"] > 0


def test_a_report_is_read_and_shown(report, tmp_path):
    save(tmp_path / "r.json", report)
    blocks = blocks_of(load(tmp_path / "r.json", "rivals"))
    shown = as_text(blocks)
    for name in SOME.arms:
        assert f"\n{name} " in shown
    assert "Unfinished" not in shown and "better" in shown
    (figure,) = [block for block in blocks if isinstance(block, Figure)]
    drawn = figure.svg()
    assert drawn == figure.svg() and all(f">{name}<" in drawn for name in SOME.arms)


def test_the_sentence_names_arms_beyond_the_spread(report):
    changed = copy.deepcopy(report)
    errors = {"fused": (0.02, 0.03), "local": (0.04, 0.05), "stale-2": (0.01, 0.015)}
    for run in changed["runs"]:
        run["history"][-1]["error"] = errors.get(run["name"], (0.01, 0.05))[run["seed"]]
    shown = rivals_report.sentence(changed)
    assert "better stale-2; worse local; the ranges" in shown


def test_a_stopped_comparison_goes_on_where_it_was(report):
    """Kept after four runs; the rest is run and nothing else, and comes out the same."""
    part = copy.deepcopy(report)
    part.body.update(runs=part["runs"][:4], finished=False)
    assert "4 of 10 runs" in as_text(rivals_report.blocks(part))
    kept = []
    whole = rivals.compare(SOME, DATA, previous=part, keep=lambda r: kept.append(len(r["runs"])))
    assert kept == list(range(4, 11)) and whole["finished"]

    def results(report):
        return [(run["name"], run["seed"], run["history"]) for run in report["runs"]]

    assert results(whole) == results(report)
    with pytest.raises(ValueError, match="is of other settings: hidden was .*, and is 13"):
        rivals.compare(replace(TINY, hidden=13), DATA, previous=report)
    with pytest.raises(ValueError, match="is of other data"):
        rivals.compare(SOME, rivals.held_out(DATA), previous=report)


def test_ctrl_c_keeps_what_is_finished(report):
    part = copy.deepcopy(report)
    part.body.update(runs=part["runs"][:2], finished=False)

    class Impatient(Progress):
        def update(self, name: str, fraction: float, note: str = "") -> None:
            if name.startswith("stale-2"):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="2 of 10 runs were finished"):
        rivals.compare(SOME, DATA, previous=part, progress=Impatient(enabled=False))
    assert [run["name"] for run in part["runs"]] == list(SOME.arms[:2])


def test_rates_are_chosen_on_the_held_out_part(monkeypatch):
    apart = rivals.held_out(DATA)
    assert len(apart.train.labels) == 80 and len(apart.test.labels) == 16
    assert torch.equal(apart.test.images, DATA.train.images[80:])
    seen = []

    def run(which, seed, settings, dataset, steps):
        seen.append((which.name, steps, dataset.held_out))
        error = {3e-4: 0.5, 1e-3: 0.2, 3e-3: 0.3}.get(settings.lr, 0.1)
        # The largest rates look best and are not: the parameters are no numbers any more.
        return {"history": [{"error": error}], "diverged": settings.lr > 3e-3}

    monkeypatch.setattr(rivals, "train", run)
    arms = [arm(name) for name in ("backprop", "fused", "local")]
    rows = [{"name": which.name, "steps": 7} for which in arms]
    tried = rivals.tune(TINY, arms, DATA, rows, Progress(enabled=False))
    assert set(seen) == {("fused", 3, True), ("local", 3, True)}
    assert len(tried) == 2 * len(rivals.GRID)
    assert [rivals._best(which, tried) for which in arms] == [1e-3] * 3


def test_a_tuned_report_shows_the_rates(report):
    changed = copy.deepcopy(report)
    changed.body["tuning"] = [
        {"name": "fused", "family": "exact", "rate": 1e-3, "error": 0.1, "diverged": False},
        {"name": "fused", "family": "exact", "rate": 1e-2, "error": 0.9, "diverged": True},
    ]
    shown = as_text(rivals_report.blocks(changed))
    assert "10.00 %" in shown and "diverged" in shown


# ------------------------------------------------------------------------------------ command line


COMMAND = ["rivals", "--arms", "fused", "stale-2", "--hidden", "8", "--depth", "1", "--seeds", "0"]
COMMAND += ["--batch-size", "256", "--seconds", "0.02", "--seconds-per-run", "0.01"]
COMMAND += ["--backend", "reference", "--threads", "1", "--quiet"]


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "peak_memory", lambda step, device: 1)
    out = tmp_path / "deep" / "r.json"
    assert main([*COMMAND, "--out", str(out), "--json"]) == 0
    assert (
        capsys.readouterr().out == as_json(load(out, "rivals")) == out.read_text(encoding="utf-8")
    )
    assert main([*COMMAND, "--out", str(out), "--resume"]) == 0
    assert "stale-2" in capsys.readouterr().out
    kept = out.read_text(encoding="utf-8")
    assert main([*COMMAND, "--out", str(out), "--resume", "--tune"]) != 0
    assert "is not tuned: go on without --tune" in capsys.readouterr().err
    tuned = json.loads(kept)
    tuned["tuning"] = [{"name": "fused", "rate": 1e-3, "error": 0.5, "diverged": False}]
    out.write_text(json.dumps(tuned), encoding="utf-8")
    assert main([*COMMAND, "--out", str(out), "--resume"]) != 0
    assert "is tuned: go on with --tune" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arms", "stael-2"], "unknown arm 'stael-2', did you mean"),
        (["--seconds-per-run", "0"], "seconds-per-run must be a positive, finite number"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--warmup", "1.5"], "warmup must be at least 0 and below 1, got '1.5'"),
        (["--update", "sgd"], "give --lr, or --tune"),
        (["--out", "."], "--out must be a file, . is a folder"),
        (["--resume", "--out", "absent.json"], "cannot read absent.json"),
        (["--data", "x", "--dataset", "digits"], "leave --dataset digits out"),
        (["--arm", "fused"], "unknown option '--arm', did you mean '--arms'"),
    ],
)
def test_the_command_refuses_in_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["rivals", *argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and len(lines) == 1 and message in lines[0]


def test_defaults_of_a_dataset():
    assert Settings.of("digits").batch_size == 64 and Settings.of("mnist").batch_size == 256
    assert Settings.of("digits", batch_size=8, hidden=None) == replace(
        Settings.of("digits"), batch_size=8
    )
    with pytest.raises(ValueError, match="did you mean 'mnist'"):
        Settings.of("mnits")
