"""Training runs: methods agree where they must, reports parse, and a killed run loses nothing."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clusters import clusters

import fused_dni as fd
from fused_dni.experiments import data, nets, run, train
from fused_dni.experiments.run import CHECKPOINT
from fused_dni.report import blocks_of
from fused_dni.report.blocks import as_text
from fused_dni.report.errors import WriteError
from fused_dni.report.folder import write_folder
from fused_dni.report.kinds import train as train_report
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Result

# Networks this small have nothing to share out.
pytestmark = [pytest.mark.slow(40), pytest.mark.usefixtures("one_thread")]


TINY = train.Settings(
    dataset="digits",
    target_every=(1, 3),
    hidden=16,
    depth=2,
    epochs=3,
    batch_size=16,
    warmup_steps=4,
    rank=4,
    lr=1e-2,
    seeds=(0,),
    sg_lr=1e-2,
)


def test_a_run_learns_and_every_method_is_reported(tmp_path):
    outcome = train.train(replace(TINY, epochs=12, seeds=(0, 1)), clusters(160, 50, 12))
    assert outcome.names() == ["backprop", "fused", "cdni k=1", "cdni k=3"]
    for row in outcome.summary(0.5):
        assert row["error_mean"] < 0.35, row["name"]
        assert len(row["errors"]) == 2 and row["seconds_per_epoch"] > 0
        assert row["seconds_to_threshold"] <= row["seconds_total"] * 1.5
    for each in outcome.runs:
        assert [row["epoch"] for row in each["history"]] == list(range(1, 13))
        assert each["history"][-1]["steps"] == 120
        ends = [row["seconds"] for row in each["history"]]
        assert ends == sorted(ends)


def test_backprop_on_our_kernels_is_stock_backprop():
    """The same weights and batches: in float32 the two runs differ by rounding alone, which SGD
    over 10 steps lets grow little."""
    settings = replace(TINY, methods=("backprop", "fused"), update="sgd", epochs=1)
    dataset = clusters(160, 50, 12)
    trainers = [train.build(name, 0, settings, dataset) for name in settings.runs()]
    for rows in data.batches(data.permutation(160, 0, 0), 16):
        for trainer in trainers:
            trainer.step(*data.pick(dataset.train, rows))
    stock, ours = (list(t.model.parameters()) for t in trainers)
    for a, b in zip(stock, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_all_methods_start_from_the_same_weights_and_cost_the_same_steps():
    dataset = clusters(160, 50, 12)
    settings = replace(TINY, methods=("backprop", "fused", "cdni", "dni"))
    starts = [
        next(train.build(name, 7, settings, dataset).model.parameters()).detach()
        for name in settings.runs()
    ]
    assert len(starts) == 6
    assert all(torch.equal(starts[0], start) for start in starts[1:])
    before = torch.random.get_rng_state()
    nets.plain(4, 4, 1, 2, seed=9)
    assert torch.equal(before, torch.random.get_rng_state())


def test_rates_follow_the_cosine_on_fused_rules_too():
    dataset = clusters(160, 50, 12)
    for name in ("backprop", "cdni k=1"):
        trainer = train.build(name, 0, replace(TINY, sg_lr=5e-3), dataset)
        rates = {group["lr"] for group in trainer.optimizer.param_groups}
        assert rates == ({1e-2} if name == "backprop" else {1e-2, 5e-3})
        for _ in range(30):
            trainer.step(dataset.train.images[:16], dataset.train.labels[:16])
        assert all(group["lr"] == pytest.approx(0.0) for group in trainer.optimizer.param_groups)


def test_form_and_lessons_of_synthesizers_reach_the_layers_and_the_report():
    dataset = clusters(160, 50, 12)
    changed = {"methods": ("cdni",), "synthesizer": "cross-entropy", "lessons": 3, "mix": 1.0}
    settings = replace(TINY, **changed, target_every=(2,), epochs=1)
    trainer = train.build("cdni k=2", 0, settings, dataset)
    hidden = list(trainer.model)[:-1]
    assert all(type(m.synthesizer) is fd.CrossEntropySynthesizer for m in hidden)
    for _ in range(10):
        trainer.step(dataset.train.images[:16], dataset.train.labels[:16])
    assert [m.synthesizer_update.steps for m in hidden] == [3 * (4 + 3)] * 2
    said = as_text(blocks_of(train.result(train.train(settings, dataset))))
    assert "synthesizers of the cross-entropy form at the output, 3 lessons a target" in said
    with pytest.raises(ValueError, match="leave the method 'dni' out"):
        replace(settings, methods=("cdni", "dni"))


def test_no_method_is_timed_in_its_first_steps_of_a_process(monkeypatch):
    """Other trainers make those, and change nothing of the run."""
    settings, dataset = replace(TINY, epochs=1), clusters(160, 50, 12)
    build, made = train.build, []

    def building(name, *given):
        made.append(build(name, *given))
        return made[-1]

    monkeypatch.setattr(train, "build", building)
    before = torch.get_rng_state()
    runs = train.train(settings, dataset).runs
    thrown_away, timed = made[: len(runs)], made[len(runs) :]
    for warmed, trainer, found in zip(thrown_away, timed, runs, strict=True):
        assert warmed.name == trainer.name == found["name"] and trainer.steps == 10
        assert warmed.seconds == 0.0 and warmed.scheduler.last_epoch == train._WARM_STEPS
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(train._Epochs, "warm_up", lambda self: None)
    cold = train.train(settings, dataset).runs
    assert [r["fingerprint"] for r in cold] == [r["fingerprint"] for r in runs]


def test_what_is_lost_in_a_difference_is_no_negative_time():
    outcome = train.train(replace(TINY, epochs=1, methods=("fused", "cdni")), clusters(160, 50, 12))
    pieces = dict.fromkeys(("forward", "sg", "update", "targets", "rest", "total"), 1e-3)
    outcome.split = {"how": "", "pieces": {"fused": pieces | {"update": -1e-5}}}
    table = train_report.split(outcome.split)
    assert table.rows == [["fused", "1.00 ms", "1.00 ms", "~0", "1.00 ms", "1.00 ms", "1.00 ms"]]
    assert table.caption.startswith("~0: ")
    assert not train_report.split({"pieces": {"fused": pieces}}).caption
    said = train_report.beside(outcome)
    error = outcome.runs[0]["history"][-1]["error"]
    assert said.startswith(f"Errors here, after 1 epoch each: fused {error:.2%}"
                           .replace("%", " %"))  # fmt: skip
    assert "cdni k=3" in said


PLOTS = ("accuracy-vs-wall-clock.png", "accuracy-vs-steps.png")


def test_the_report_folder(tmp_path):
    dataset = clusters(160, 50, 12)
    outcome = train.train(TINY, dataset)
    outcome.split = train.split_time(TINY, dataset, seconds=0.05)
    files = write_folder(train.result(outcome, "fused-dni train"), tmp_path / "deep" / "folder")
    assert {f.name for f in files} == {"report.json", "report.md", *PLOTS}
    assert all(f.stat().st_size > 200 for f in files)
    read = json.loads(files[0].read_text())
    assert read["kind"] == "train" and read["facts"]["torch"] == torch.__version__
    assert len(read["runs"]) == 4 and len(read["summary"]) == 4
    for name, parts in read["split"]["pieces"].items():
        whole = sum(v for k, v in parts.items() if k != "total")
        assert parts["total"] == pytest.approx(whole)
        assert parts["targets"] == 0 or name.startswith("cdni")
    written = files[1].read_text()
    for name in outcome.names():
        assert f"| {name}" in written
    for path in files[2:]:
        assert path.read_bytes()[:4] == b"\x89PNG" and path.name in written


def test_a_report_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    outcome = train.train(replace(TINY, epochs=1, methods=("backprop",)), clusters(160, 50, 12))
    with pytest.raises(WriteError, match="cannot write the report"):
        write_folder(train.result(outcome), tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("bakprop",)}, "did you mean 'backprop'"),
        ({"methods": ()}, "methods must hold one at least"),
        ({"update": "adamm"}, "did you mean 'adam'"),
        ({"lr": -1.0}, "lr must be"),
        ({"sg_lr": float("nan")}, "lr must be"),
        ({"batch_size": 1}, "batch_size must be a whole number from 2 on, got 1"),
        ({"epochs": 0}, "epochs must be a whole number from 1 on"),
        ({"target_every": (-2,)}, "target_every"),
        ({"rank": -1}, "rank must be a whole number from 0 on"),
        ({"interface": "outputs"}, "did you mean 'output'"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_the_interface_is_that_of_the_decoupled_layers():
    settings = replace(TINY, interface="preactivation")
    for name, expected in (("cdni k=1", ["preactivation"] * 2), ("fused", ["output"] * 2)):
        network = train.build(name, 0, settings, clusters(160, 50, 12)).model
        assert [layer.config.interface for layer in network] == [*expected, "output"]


def test_a_batch_larger_than_the_training_set():
    with pytest.raises(ValueError, match=r"batch_size 500 is larger than the training set \(160"):
        train.train(replace(TINY, batch_size=500), clusters(160, 50, 12))


def test_divergence_is_an_error_that_names_the_method():
    settings = replace(TINY, methods=("backprop",), update="sgd", lr=1e30)
    with pytest.raises(RuntimeError, match="backprop diverged in epoch 1"):
        train.train(settings, clusters(160, 50, 12))


# ---------------------------------------------------------------------------------- checkpoints


def _fingerprints(outcome: train.Outcome) -> dict[str, str]:
    return {f"{run['name']} {run['seed']}": run["fingerprint"] for run in outcome.runs}


class _Cut(Exception):
    pass


def test_a_run_cut_between_any_two_checkpoints_continues_bit_by_bit(tmp_path, monkeypatch):
    """Cut after every single checkpoint in turn: each continuation ends in the same bits."""
    settings = replace(TINY, seeds=(0, 1), epochs=2)
    dataset = clusters(160, 50, 12)
    whole = _fingerprints(train.train(settings, dataset))
    assert len(set(whole.values())) == len(whole)
    write, count = run.write_checkpoint, 0

    def cutting(folder, state):
        nonlocal count
        write(folder, state)
        count += 1
        if count % 3 == 0:
            raise _Cut

    monkeypatch.setattr(run, "write_checkpoint", cutting)
    for attempt in range(100):
        try:
            outcome = train.train(
                settings, dataset, checkpoint=tmp_path, resume=attempt > 0, checkpoint_every=4
            )
            break
        except _Cut:
            continue
    assert attempt > 5
    assert _fingerprints(outcome) == whole
    assert len(outcome.of("fused")[0]["history"]) == 2
    assert outcome.of("fused")[0]["history"][-1]["steps"] == 20


def _life(folder: str, resume: bool, answer: str) -> None:
    """One process's life: train, and if nobody kills it, write down the fingerprints."""
    torch.set_num_threads(1)
    outcome = train.train(
        replace(TINY, epochs=2, methods=("backprop", "fused", "cdni")),
        clusters(160, 50, 12),
        checkpoint=folder,
        resume=resume and (Path(folder) / CHECKPOINT).exists(),
        checkpoint_every=3,
    )
    Path(answer).write_text(json.dumps(_fingerprints(outcome)))


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.repeat)])
def test_a_run_killed_at_a_random_moment(tmp_path, times):
    """SIGKILL at a random moment (which may fall into the writing of a checkpoint), then resumed:
    bitwise the parameters of an uninterrupted run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fused_dni.experiments.train", "fused_dni.backends.reference"])

    def live(name: str, resume: bool, kill_after: float | None) -> float:
        process = context.Process(
            target=_life,
            args=(str(tmp_path / name), resume, str(tmp_path / f"{name}.json")),
        )
        start = time.monotonic()
        process.start()
        process.join(kill_after)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        elif kill_after is None:
            assert process.exitcode == 0
        return time.monotonic() - start

    live("first", False, None)  # the first starts the server, whose imports take their time
    duration = live("whole", False, None)
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert whole == json.loads((tmp_path / "first.json").read_text())
    generator = random.Random(0)
    cut, wanted = 0, times // 4 + (times < 4)
    for i in range(10 * times):  # on a busy machine one may be done before it is killed
        if i >= times and cut >= wanted:
            break
        name = f"run{i}"
        live(name, False, generator.uniform(0.1, 1.0) * duration)
        if not (tmp_path / f"{name}.json").exists():
            cut += 1
            live(name, True, None)
        assert json.loads((tmp_path / f"{name}.json").read_text()) == whole, i
    assert cut >= wanted


def test_ctrl_c_stops_at_a_step_and_says_what_was_kept(tmp_path, monkeypatch):
    dataset = clusters(160, 50, 12)
    whole = _fingerprints(train.train(TINY, dataset))
    steps = 0
    step = train.FusedTrainer.step

    def counting(self, x, y):
        nonlocal steps
        steps += 1
        if steps == 3 * train._WARM_STEPS + 7:  # behind those of three methods that are not timed
            os.kill(os.getpid(), signal.SIGINT)
        step(self, x, y)

    monkeypatch.setattr(train.FusedTrainer, "step", counting)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(run.Interrupted, match="add --resume to continue"):
        train.train(TINY, dataset, checkpoint=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert _fingerprints(train.train(TINY, dataset, checkpoint=tmp_path, resume=True)) == whole
    steps = 0
    with pytest.raises(run.Interrupted, match="nothing was kept"):
        train.train(TINY, dataset)


def test_checkpoints_that_cannot_be_used_are_refused(tmp_path):
    dataset = clusters(160, 50, 12)
    settings = replace(TINY, epochs=1)
    with pytest.raises(run.CheckpointError, match=r"no checkpoint at .*start without --resume"):
        train.train(settings, dataset, checkpoint=tmp_path, resume=True)
    with pytest.raises(run.CheckpointError, match="needs --checkpoint"):
        train.train(settings, dataset, resume=True)
    train.train(settings, dataset, checkpoint=tmp_path)
    with pytest.raises(run.CheckpointError, match="another run: hidden 16 there, 8 now"):
        train.train(replace(settings, hidden=8), dataset, checkpoint=tmp_path, resume=True)
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not a checkpoint", b"\x80\x04N."):
        path.write_bytes(broken)
        with pytest.raises(run.CheckpointError, match=r"damaged|not a checkpoint"):
            train.train(settings, dataset, checkpoint=tmp_path, resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(run.CheckpointError, match="cannot write"):
        train.train(settings, dataset, checkpoint=tmp_path / "file")


def test_a_finished_run_resumes_to_its_own_result(tmp_path):
    dataset = clusters(160, 50, 12)
    first = train.train(TINY, dataset, checkpoint=tmp_path)
    again = train.train(TINY, dataset, checkpoint=tmp_path, resume=True)
    assert _fingerprints(first) == _fingerprints(again)
    assert not [p for p in tmp_path.iterdir() if p.name != CHECKPOINT]


def test_true_gradients_alone_on_steps_with_targets():
    dataset = clusters(160, 50, 12)
    settings = replace(TINY, update="sgd", lr=0.1, sg_lr=0.1, warmup_steps=0)

    def heads(mix):
        at = replace(settings, mix=mix)
        made = [train.build(name, 0, at, dataset) for name in ("fused", "cdni k=1")]
        for x, y in zip(*(part.split(16) for part in dataset.train), strict=True):
            for trainer in made:
                trainer.step(x, y)
        return [dict(trainer.model[-1].named_parameters())["weight"] for trainer in made]

    torch.testing.assert_close(*heads(1.0), rtol=1e-3, atol=1e-4)
    exact, predicted = heads(0.0)
    assert (exact - predicted).abs().max() > 1e-2


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_checkpoint_of_0_1_0_is_gone_on_with(tmp_path, monkeypatch, epoch):
    """It kept where it was in numbers: seed, epoch, turn, step; between two seeds (epoch 0) beside
    the trainers of the one that was over."""
    settings = replace(TINY, seeds=(0, 1), epochs=2, methods=("backprop", "cdni"))
    dataset = clusters(160, 50, 12)
    whole = _fingerprints(train.train(settings, dataset))
    write, trainers = run.write_checkpoint, {}

    def as_before(folder, state):
        seed = state["seed"]
        trainers.update(state["trainers"])
        position = [seed, epoch, 0, 4] if epoch else [seed, 0, 0, 0]
        old = {name: state[name] for name in ("version", "settings", "finished")}
        old["settings"] = {k: v for k, v in old["settings"].items() if k != "mix"}
        write(folder, {**old, "position": position, "trainers": trainers})
        histories = [len(kept["history"]) for kept in state["trainers"].values()]
        if (seed == 1) if epoch == 0 else (histories == [1] * len(histories)):
            raise _Cut

    monkeypatch.setattr(run, "write_checkpoint", as_before)
    with pytest.raises(_Cut):
        train.train(settings, dataset, checkpoint=tmp_path, checkpoint_every=4)
    monkeypatch.setattr(run, "write_checkpoint", write)
    found = train.train(settings, dataset, checkpoint=tmp_path, resume=True)
    assert _fingerprints(found) == whole


def test_a_report_that_is_continued_names_all_commits(monkeypatch):
    report = Result("literature", facts={"commit": "a"}, body={"runs": [], "finished": False})
    one = run.Job("one", report["runs"], lambda say: {"error": 0.5})
    for commit, named in (("a", "a"), ("b", "a, b"), (None, "a, b"), ("b", "a, b")):
        monkeypatch.setattr(run, "facts", lambda commit=commit: {"commit": commit})
        run.do_jobs(report, [one], 8, None, Progress(enabled=False))
        assert report.facts["commit"] == named
    monkeypatch.setattr(run, "facts", lambda: {"commit": "c"})
    run.do_jobs(report, [], 8, None, Progress(enabled=False))  # nothing was left to run
    assert report.facts["commit"] == "a, b"


def test_a_resumed_run_names_all_commits(tmp_path, monkeypatch):
    settings, dataset = (
        replace(TINY, seeds=(0,), epochs=2, methods=("fused",)),
        clusters(64, 20, 12),
    )
    real = run.facts
    write, written = run.write_checkpoint, []

    def commits(commit):
        monkeypatch.setattr(run, "facts", lambda *_: {**real(), "commit": commit})

    def cut(folder, state):
        write(folder, state)
        written.append(state)
        raise _Cut

    def named():
        outcome = train.train(settings, dataset, checkpoint=tmp_path, resume=True)
        return train.result(outcome).facts["commit"]

    commits("a")
    monkeypatch.setattr(run, "write_checkpoint", cut)
    with pytest.raises(_Cut):
        train.train(settings, dataset, checkpoint=tmp_path)
    monkeypatch.setattr(run, "write_checkpoint", write)
    commits("b")
    assert named() == "a, b"
    commits("c")
    assert named() == "a, b"  # nothing was left to train
    write(tmp_path, {k: v for k, v in written[0].items() if k != "commit"})  # an older file
    assert named() == "c"
