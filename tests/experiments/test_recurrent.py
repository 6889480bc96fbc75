"""Recurrent runs: arms see the same, true gradients are true, reports say what was measured."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_dni as fd
from fused_dni import cli
from fused_dni.experiments import characters, data, future, recurrent, run, windowed
from fused_dni.experiments.ablation import Altered
from fused_dni.experiments.settings import ABLATIONS, SYNTHESIZERS
from fused_dni.measure import memory, timing
from fused_dni.report.blocks import as_text
from fused_dni.report.errors import WriteError
from fused_dni.report.folder import write_folder
from fused_dni.report.kinds import recurrent as recurrent_report
from fused_dni.report.schema import NAMES

pytestmark = [pytest.mark.slow(60), pytest.mark.usefixtures("one_thread")]


def _verse(length: int = 6000) -> str:
    """Text with something to learn at a distance: whoever opened a bracket closes it."""
    generator = torch.Generator().manual_seed(0)
    words = []
    while sum(map(len, words)) < length:
        pick = int(torch.randint(6, (), generator=generator))
        words.append(("(ab)", "[ba]", "<abab>", "(ba)", "[abab] ", "x")[pick])
    return "".join(words)[:length]


SOURCE = characters.split(_verse(), 0.2, "verse")
CHARLM = recurrent.Settings.of(
    "charlm",
    windows=(4,),
    long=(9,),
    hidden=16,
    batch_size=4,
    amount=8_000,
    evaluations=2,
    embedding=6,
    lr=1e-2,
)
COPY = recurrent.Settings.of(
    "copy", windows=(3,), hidden=12, batch_size=4, amount=30, evaluations=3, seeds=(0, 1), width=2
)
ALL = ("backprop", "fused", "dni", "dni+aux")
EVERY = (*ALL, "dni+lambda", "local", "immediate", "immediate+local")


def _images(count: int, side: int = 6) -> data.Dataset:
    """Images of noise whose first row tells the class: only credit over all rows finds it."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(3, (count,), generator=generator)
    images = 0.3 * torch.randn(count, side, side, generator=generator)
    images[torch.arange(count), 0, labels] += 3.0
    split = data.Split(images.flatten(1), labels)
    return data.Dataset("stripes", split, split, 3)


IMAGES = _images(64)
ROWS = recurrent.Settings.of(
    "rows",
    methods=EVERY,
    windows=(2, 3),
    long=(6,),
    hidden=10,
    batch_size=16,
    amount=8,
    evaluations=2,
    seeds=(0, 1),
)
SOURCES = {"charlm": SOURCE, "rows": IMAGES}


@pytest.fixture(autouse=True)
def _small_costs(monkeypatch):
    """What a piece of training costs is measured again and again; how long its episodes are decides
    nothing here, and took half of this file's time."""
    for module in (recurrent, recurrent_report):
        monkeypatch.setattr(module, "COST_LEVEL", 2)


def _fingerprints(outcome: recurrent.Outcome) -> dict[str, str]:
    return {f"{r['name']} {r['seed']}": r["fingerprint"] for r in outcome.runs}


# -------------------------------------------------------------------------------------------- arms


def test_every_arm_of_charlm_learns_and_sees_the_same_amount():
    outcome = recurrent.train(replace(CHARLM, methods=ALL, amount=6_000), SOURCE)
    assert outcome.names() == [*(f"{m} T=4" for m in ALL), "backprop T=9", "fused T=9"]
    uniform = math.log2(SOURCE.classes)
    for r in outcome.runs:
        assert [row["characters"] for row in r["history"]][-1] == 6_000
        assert r["history"][-1]["bits"] < 0.8 * uniform, r["name"]
        assert r["history"][-1]["seconds"] > r["history"][0]["seconds"] > 0
        # windows, but for the shorter ones where a stream ends
        span = len(SOURCE.train) // 4 - 1
        passes, rest = divmod(1_500, span)
        t = r["window"]
        assert r["history"][-1]["updates"] == passes * -(-span // t) + -(-rest // t)
    assert all(row["peak_memory"] is None for row in outcome.summary())
    outcome.costs = recurrent.costs(replace(CHARLM, methods=ALL), SOURCE, seconds=0.05)
    for row in outcome.summary():
        assert row["peak_memory"] > 0 and 0 < row["seconds_per_character"] < 1


def test_truncated_backprop_on_our_kernels_is_that_of_nn_lstm():
    """The same weights and data: the runs differ by rounding alone."""
    settings = replace(CHARLM, methods=("backprop", "fused"), amount=800)
    outcome = recurrent.train(settings, SOURCE)
    stock, ours = (outcome.of(name)[0]["history"][-1]["bits"] for name in outcome.names()[:2])
    # 50 Adam steps: rounding of 1e-7 grows little at this rate
    assert ours == pytest.approx(stock, abs=1e-4)


def test_arms_start_from_the_same_weights_whatever_their_heads_draw():
    trainers = [
        recurrent.build(arm, 3, replace(CHARLM, methods=ALL), SOURCE)
        for arm in replace(CHARLM, methods=ALL).arms()
    ]
    first = [p.detach().clone() for p in trainers[0].trained]
    for trainer in trainers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(first, trainer.trained, strict=True))
    assert isinstance(trainers[0].model.lstm, nn.LSTM)
    synthetic = trainers[2].model.lstm
    assert isinstance(synthetic, fd.FusedDNILSTM) and synthetic.auxiliary_head is None
    assert trainers[3].model.lstm.auxiliary_head is not None


def test_truncated_backprop_may_have_a_rate_of_its_own():
    for exact, expected in ((0.0, 1e-2), (3e-3, 3e-3)):
        settings = replace(CHARLM, exact_lr=exact)
        rates = {
            method: recurrent.build(recurrent.Arm(method, 4), 0, settings, SOURCE).optimizer
            for method in ("backprop", "fused", "dni")
        }
        lrs = {name: optimizer.param_groups[0]["lr"] for name, optimizer in rates.items()}
        assert lrs == {"backprop": expected, "fused": expected, "dni": 1e-2}


def test_gradients_are_summed_until_an_update_is_due():
    """Two windows of 4 and one of 8 per update of 8: without a future they are the same step."""
    settings = replace(CHARLM, methods=("fused",), update_every=8, amount=8 * 4, clip=0.0)
    trainer = recurrent.build(recurrent.Arm("fused", 4), 0, settings, SOURCE)
    trainer.step()
    assert trainer.updates == 0 and trainer.trained[0].grad is not None
    trainer.step()
    assert trainer.updates == 1 and trainer.trained[0].grad is None
    whole = recurrent.build(recurrent.Arm("fused", 8), 0, settings, SOURCE)
    assert settings.divisor(trainer.arm) == settings.divisor(whole.arm) == 32


def test_synthesizers_learn_and_are_asked_for():
    """After some windows of a DNI arm M's parameters have moved, and those of its head."""
    settings = replace(CHARLM, amount=400)
    trainer = recurrent.build(recurrent.Arm("dni+aux", 4), 0, settings, SOURCE)
    for _ in range(20):
        trainer.step()
    synthesizer = trainer.synthesizer(4)
    assert synthesizer is not None and trainer.synthesizer(5) is None
    assert float(synthesizer.weight.detach().abs().sum()) > 0
    assert float(trainer.model.lstm.auxiliary_head.weight.detach().abs().sum()) > 0


def test_nothing_is_injected_during_the_warm_up():
    """With all of the run a warm-up, a DNI arm is truncated backprop, bit by bit, and M learns."""
    settings = replace(CHARLM, amount=400, warmup=1.0, backend="reference")
    trainers = [
        recurrent.build(recurrent.Arm(method, 4), 0, settings, SOURCE)
        for method in ("fused", "dni")
    ]
    for _ in range(20):
        for trainer in trainers:
            trainer.step()
    for a, b in zip(*(trainer.trained for trainer in trainers), strict=True):
        assert torch.equal(a, b)
    assert float(trainers[1].model.lstm.synthesizer.weight.detach().abs().sum()) > 0
    started = recurrent.build(recurrent.Arm("dni", 4), 0, replace(settings, warmup=0.4), SOURCE)
    assert started.schedule.warmup_steps == 10  # of 25 windows


def test_every_synthesizer_of_the_command_line_runs():
    for name in SYNTHESIZERS:
        settings = replace(CHARLM, synthesizer=name, sg_hidden=8, amount=160)
        trainer = recurrent.build(recurrent.Arm("dni", 4), 0, settings, SOURCE)
        for _ in range(5):
            trainer.step()
        run.refuse_divergence(trainer.model, name)


def test_copy_climbs_the_curriculum_and_closes_windows_without_a_loss():
    settings = replace(
        COPY,
        hidden=24,
        width=1,
        amount=500,
        seeds=(0,),
        methods=("fused",),
        windows=(8,),
        exact_lr=1e-2,
    )
    (found,) = recurrent.train(settings).runs
    assert found["history"][-1]["solved"] >= 1
    assert found["history"][-1]["length"] == found["history"][-1]["solved"] + 1
    trainer = recurrent.build(recurrent.Arm("dni", 3), 0, COPY, None)
    trainer.curriculum.level = 5  # 13 steps, 6 before the first that counts
    trainer.train_on(trainer.draw(0), 3)
    assert trainer.updates == 5
    exact = recurrent.build(recurrent.Arm("fused", 3), 0, COPY, None)
    exact.curriculum.level = 5
    exact.train_on(exact.draw(0), 3)
    assert exact.updates == 3


@pytest.mark.parametrize(("window", "said"), [(2, False), (3, True)])
def test_a_window_that_holds_whole_episodes_is_told_of(window, said):
    """Three steps at the first level; the long windows of truncated backprop are for that."""
    settings = replace(COPY, windows=(window,), long=(4,), methods=("fused", "dni"), amount=2)
    notes = recurrent.train(replace(settings, evaluations=1)).notes
    told = [f"{m} T=3: the longest episodes had 3 steps" for m in ("fused", "dni")] * said
    assert [note.partition(",")[0] for note in notes[1:]] == told


def test_repeat_copy_injects_less_of_the_prediction_than_copy():
    found = {}
    for task in ("copy", "repeat-copy"):
        settings = recurrent.Settings.of(task, hidden=8)
        found[task] = recurrent.build(recurrent.Arm("dni", 2), 0, settings, None).model.lstm
    assert found["copy"].sg_scale == 1.0 and found["repeat-copy"].sg_scale == 0.3
    assert {lstm.max_target_norm for lstm in found.values()} == {1.0}


def test_the_error_of_an_episode_is_in_bits_per_bit():
    trainer = recurrent.build(recurrent.Arm("fused", 3), 0, COPY, None)
    with torch.no_grad():
        trainer.model.head.weight.zero_()
        trainer.model.head.bias.zero_()
    trainer.settings = replace(COPY, lr=0.0)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    assert trainer.train_on(trainer.draw(0), 3) == pytest.approx(1.0, abs=1e-6)


class _Twice(nn.Module):
    def forward(self, rows, context=None):
        return 2 * rows


def test_what_is_injected_is_altered_and_what_is_learned_is_not():
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = {}
    for change in ABLATIONS:
        altered = Altered(_Twice(), change, 0)
        altered.truth = rows.detach().flip(1)
        assert torch.equal(altered(rows), 2 * rows)
        with torch.no_grad():
            found[change] = altered(rows)
    made = 2 * rows.detach()
    assert not found["zero"].any() and torch.equal(found["negated"], -made)
    assert torch.equal(found["mean"], made.mean(0).expand(8, 4))
    order = (found["shuffled"][:, None] == made).all(2).int().argmax(1)
    assert sorted(order.tolist()) == list(range(8)) != order.tolist()
    torch.testing.assert_close(found["true"], made.flip(1))
    torch.testing.assert_close(found["noise"].norm(dim=1), made.norm(dim=1))
    again = Altered(_Twice(), "noise", 0)
    with torch.no_grad():
        assert torch.equal(again(rows), found["noise"])
        assert not torch.equal(again(rows), found["noise"])  # drawn anew


def _taught(change):
    """The gradient of the lesson of the third window, which the second's end has its part in."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = fd.LinearSynthesizer(8, None)
        nn.init.normal_(inner.weight)
        synthesizer = Altered(inner, change, 0) if change else inner
        lstm = fd.FusedDNILSTM(3, 4, synthesizer=synthesizer, target_scale=1.0)
        windows = torch.randn(3, 2, 5, 3)
    state = None
    for window in windows:
        output, state = lstm(window, state)
        lstm.zero_grad()
        output.square().sum().backward()
    return inner.weight.grad


def test_what_is_injected_has_its_part_in_the_next_target():
    plain, without, other = (_taught(change) for change in ("", "zero", "negated"))
    # A lesson's gradient is linear in its target, and that in what was injected.
    assert not torch.equal(plain, without)
    torch.testing.assert_close(plain - without, without - other)


def test_the_true_gradient_is_injected_at_each_boundary(monkeypatch):
    trainer = recurrent.build(recurrent.Arm("dni/true", 3), 0, COPY, None)
    trainer.curriculum.level = 3  # 9 steps, the last 4 of them written
    monkeypatch.setattr(type(trainer), "update", lambda self: None)
    told, episodes = trainer.synthesizer(3), trainer.draw(0)
    heard = []
    monkeypatch.setattr(Altered, "altered", lambda self, made: heard.append(self.truth) or made)
    trainer.train_on(episodes, 2)
    assert isinstance(told, Altered) and len(heard) == 4 and heard[-1] is None
    twin = trainer.model.twin()
    with torch.no_grad():
        _, state = twin(episodes.inputs[:5], None)
    h, c = (t.requires_grad_() for t in state)
    logits, _ = twin(episodes.inputs[5:], (h, c))
    nats = F.binary_cross_entropy_with_logits(logits, episodes.targets[5:], reduction="sum") / 2
    wanted = torch.cat(torch.autograd.grad(nats, (h, c)), 2)[0]
    torch.testing.assert_close(heard[1], wanted, rtol=1e-4, atol=1e-6)


def test_validation_bits_charge_for_what_cannot_be_predicted():
    source = characters.split("abab" * 50 + "aXba" * 12, 0.19)
    assert source.unknown > 0
    settings = replace(CHARLM, batch_size=2)
    trainer = recurrent.build(recurrent.Arm("fused", 4), 0, settings, source)
    with torch.no_grad():
        trainer.model.head.weight.zero_()
        trainer.model.head.bias.zero_()
    targets = trainer.validation[1:]
    unknown = int((targets == len(source.symbols)).sum())
    expected = math.log2(3) + unknown * source.unknown_bits / targets.numel()
    assert trainer.validate() == pytest.approx(expected, rel=1e-6)


def test_the_state_is_carried_through_the_validation_part(monkeypatch):
    trainer = recurrent.build(recurrent.Arm("fused", 4), 0, CHARLM, SOURCE)
    whole = trainer.validate()
    monkeypatch.setattr(recurrent, "VALIDATION_WINDOW", 7)
    assert trainer.validate() == pytest.approx(whole, rel=1e-5)


# --------------------------------------------------------------------------------- rows of images


def _rows(method: str, window: int, **changes) -> recurrent.Trainer:
    settings = replace(ROWS, **changes)
    return recurrent.build(recurrent.Arm(method, window), 0, settings, IMAGES)


def _gradients(trainer, monkeypatch) -> list[torch.Tensor]:
    """What a step finds for every parameter, in place of its update."""
    monkeypatch.setattr(type(trainer), "update", lambda self: None)
    trainer.step()
    return [p.grad.clone() for p in trainer.trained]


def _loss(trainer, first: int) -> torch.Tensor:
    """The loss at the last row, in plain PyTorch, the state before row ``first`` held constant."""
    inputs, labels = trainer.batch()
    twin = trainer.model.twin()
    with torch.no_grad():
        state = twin(inputs[:first], None)[1] if first else None
    return F.cross_entropy(twin(inputs[first:], state)[0][-1], labels)


@pytest.mark.parametrize(
    ("method", "window", "first"), [("fused", 6, 0), ("fused", 4, 4), ("immediate", 1, 5)]
)
def test_truncation_leaves_the_last_window_of_an_image(monkeypatch, method, window, first):
    trainer = _rows(method, window)
    expected = torch.autograd.grad(_loss(trainer, first), trainer.trained)
    for found, wanted in zip(_gradients(trainer, monkeypatch), expected, strict=True):
        # derived: float32, sums of some hundred products of numbers below 3
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_loss_at_every_window_is_the_sum_of_them(monkeypatch):
    trainer = _rows("local", 3)
    inputs, labels = trainer.batch()
    twin = trainer.model.twin()
    first, state = twin(inputs[:3], None)
    second, _ = twin(inputs[3:], (state[0].detach(), state[1].detach()))
    both = F.cross_entropy(first[-1], labels) + F.cross_entropy(second[-1], labels)
    expected = torch.autograd.grad(both, trainer.trained)
    for found, wanted in zip(_gradients(trainer, monkeypatch), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert isinstance(_rows("immediate+local", 1).optimizer, torch.optim.RMSprop)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_lambda_zero_is_what_dni_learns(monkeypatch, clip):
    """At lambda = 0 targets are bootstrapped, and the LSTM hears of M as in ``dni``."""
    pair = [
        _rows(method, 2, sg_lambda=0.0, target_clip=clip, sg_scale=0.7, target_scale=3.0)
        for method in ("dni", "dni+lambda")
    ]
    learned = []
    for trainer in pair:
        synthesizer = trainer.synthesizer(2)
        generator = torch.Generator().manual_seed(5)
        for p in synthesizer.parameters():
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
        found = _gradients(trainer, monkeypatch)
        by_boundary = synthesizer.context_weight.grad.split(3, dim=1)
        learned.append([*found, *by_boundary[:2]])
    # The last window of dni teaches that nothing comes, too, and takes the mean of both lessons.
    learned[0][-1] *= 2
    for a, b in zip(*learned, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("condition", ["none", "label", "step", "both"])
def test_conditions_tell_what_they_say(condition):
    trainer = _rows("dni", 2, condition=condition)
    labels = torch.tensor([0, 2, 1])
    expected = {"label": [0, 2, 1], "step": [1, 1, 1], "both": [3, 5, 4]}.get(condition)
    context = trainer.context(labels, 1)
    assert expected == (None if context is None else context.tolist())
    assert trainer.synthesizer(2).context_features == {"label": 3, "step": 3, "both": 9}.get(
        condition, 0
    )
    trainer.step()


def test_lambda_one_learns_the_true_gradient():
    trainer = _rows("dni+lambda", 2, sg_lambda=1.0, condition="none")
    inputs, labels = trainer.batch()
    twin, exits, state = trainer.model.twin(), [], None
    for start in (0, 2, 4):
        logits, (h, c) = twin(inputs[start : start + 2], state)
        state = (h.clone(), c.clone())
        exits.append(state)
    loss = F.cross_entropy(logits[-1], labels)
    found = torch.autograd.grad(loss, [t for pair in exits[:2] for t in pair])
    exits = [(h.detach(), c.detach()) for h, c in exits]
    trainer.teach(inputs, labels, exits)
    # M is zero: the bias's gradient is minus twice the sum of targets, kappa = B times each, over B
    wanted = -2 * sum(torch.cat((h[0], c[0]), 1).sum(0) for h, c in (found[:2], found[2:]))
    torch.testing.assert_close(trainer.model.synthesizer.bias.grad, wanted, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None and p.requires_grad for p in trainer.trained)


def test_credit_reaches_the_first_row_by_prediction_alone():
    """The class stands in the first row: truncated backprop at T = 2 never hears of it, but for
    what a random LSTM keeps; told of the label the synthesizer brings it there."""
    settings = replace(
        ROWS,
        methods=("fused", "dni", "dni+lambda"),
        windows=(2,),
        amount=150,
        lr=1e-2,
        sg_lr=1e-2,
        cosine=False,
    )
    outcome = recurrent.train(settings, IMAGES)
    summed = {row["name"]: row for row in outcome.summary()}
    assert summed["fused T=6"]["error_max"] == 0.0
    assert summed["fused T=2"]["error_min"] > 0.0
    for name in ("dni T=2", "dni+lambda T=2"):
        assert summed[name]["error_mean"] < 0.5 * summed["fused T=2"]["error_mean"], name


def test_pixels_come_one_by_one_in_an_order_of_their_own():
    trainer = _rows("fused", 9, full=True)
    sequences = trainer.read(IMAGES.test.images[:4])
    assert sequences.shape == (36, 4, 1) and trainer.steps == 36
    assert torch.equal(sequences[:, :, 0].t(), IMAGES.test.images[:4][:, trainer.pixels])
    assert sorted(trainer.pixels.tolist()) == list(range(36)) != trainer.pixels.tolist()


def test_images_that_do_not_fit_the_settings():
    with pytest.raises(ValueError, match="windows must be at most 6, got 7"):
        _rows("fused", 7)
    with pytest.raises(ValueError, match="batch_size must be at most 64"):
        _rows("fused", 2, batch_size=65)
    odd = data.Dataset("odd", *[data.Split(torch.zeros(20, 7), torch.zeros(20, dtype=int))] * 2)
    with pytest.raises(ValueError, match="images of odd are not square: 7 pixels"):
        recurrent.build(recurrent.Arm("fused", 2), 0, ROWS, odd)
    with pytest.raises(ValueError, match="rows needs images"):
        recurrent.train(ROWS)


# --------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chralm"}, "did you mean 'charlm'"),
        ({"methods": ("dnii",)}, "did you mean 'dni'"),
        ({"methods": ()}, "methods must hold one at least"),
        ({"windows": ()}, "windows must hold one at least"),
        ({"windows": (0,)}, "windows must be a whole number from 1 on"),
        ({"hidden": 0}, "hidden must be a whole number from 1 on"),
        ({"lr": -1.0}, "lr must be a finite number from 0 on"),
        ({"sg_scale": math.inf}, "sg_scale must be a finite number from 0 on"),
        ({"target_scale": 0.0}, "target_scale must be a positive, finite number"),
        ({"threshold": 2.0}, "threshold must be above 0 and at most 1"),
        ({"warmup": 1.5}, "warmup must be a finite number from 0 to 1"),
        ({"task": "copy", "warmup": 0.1}, "must be 0 for copy"),
        ({"task": "rows", "warmup": 0.1}, "must be 0 for rows"),
        ({"methods": ("fused", "local")}, "methods: 'local' is for rows, not for charlm"),
        ({"ablate": ("zero",)}, "ablate is for the copy tasks, not for charlm"),
        ({"task": "copy", "ablate": ("zeros",)}, "did you mean 'zero'"),
        ({"condition": "lable"}, "did you mean 'label'"),
        ({"sg_lambda": 1.1}, "sg_lambda must be a finite number from 0 to 1"),
        ({"synthesizer": "mpl"}, "did you mean 'mlp'"),
        ({"embedding": -1}, "embedding must be a whole number from 0 on"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CHARLM, **changes)


def test_a_text_that_is_too_short():
    short = characters.split("a short text, too short", 0.1, "short")
    with pytest.raises(ValueError, match=r"short has 21 characters .* too short for 4 streams"):
        recurrent.train(CHARLM, short)
    with pytest.raises(ValueError, match="needs a text"):
        recurrent.train(CHARLM)


def test_divergence_is_an_error_that_names_the_arm():
    settings = replace(CHARLM, methods=("fused",), long=(), lr=1e38, cosine=False)
    with pytest.raises(RuntimeError, match="fused T=4 diverged"):
        recurrent.train(settings, SOURCE)


# ----------------------------------------------------------------------------------- checkpoints


class _Cut(Exception):
    pass


@pytest.mark.parametrize("task", ["charlm", "copy", "rows"])
def test_a_run_cut_between_checkpoints_continues_bit_by_bit(tmp_path, monkeypatch, task):
    rows = replace(ROWS, methods=("fused", "dni+lambda"))
    copy = replace(COPY, methods=("fused", "dni", "dni+aux"), ablate=("noise", "true"))
    settings = {"charlm": replace(CHARLM, amount=1600), "copy": copy, "rows": rows}[task]
    source = SOURCES.get(task)
    monkeypatch.setattr(run, "CHUNK", 7)
    whole = _fingerprints(recurrent.train(settings, source))
    assert len(set(whole.values())) == len(whole)
    write, count = run.write_checkpoint, 0

    def cutting(folder, state):
        nonlocal count
        write(folder, state)
        count += 1
        if count % 9 == 0:
            raise _Cut

    monkeypatch.setattr(run, "write_checkpoint", cutting)
    for attempt in range(100):
        try:
            outcome = recurrent.train(
                settings, source, checkpoint=tmp_path, resume=attempt > 0, checkpoint_every=1
            )
            break
        except _Cut:
            continue
    assert attempt > 3
    assert _fingerprints(outcome) == whole
    for r in outcome.runs:
        assert len(r["history"]) == settings.evaluations


def test_checkpoints_of_another_run_or_text_are_refused(tmp_path):
    settings = replace(CHARLM, amount=160, evaluations=1, methods=("fused",), long=())
    recurrent.train(settings, SOURCE, checkpoint=tmp_path)
    with pytest.raises(run.CheckpointError, match="another run: hidden 16 there, 8 now"):
        recurrent.train(replace(settings, hidden=8), SOURCE, checkpoint=tmp_path, resume=True)
    other = characters.split(_verse(5000), 0.2, "verse")
    with pytest.raises(run.CheckpointError, match="of other data"):
        recurrent.train(settings, other, checkpoint=tmp_path, resume=True)
    with pytest.raises(run.CheckpointError, match="needs --checkpoint"):
        recurrent.train(settings, SOURCE, resume=True)


def test_ctrl_c_stops_at_a_step_and_says_what_was_kept(tmp_path, monkeypatch):
    whole = _fingerprints(recurrent.train(COPY))
    steps = 0
    step = recurrent.CopyTrainer.step

    def counting(self):
        nonlocal steps
        steps += 1
        if steps == 5:
            os.kill(os.getpid(), signal.SIGINT)
        step(self)

    monkeypatch.setattr(recurrent.CopyTrainer, "step", counting)
    with pytest.raises(run.Interrupted, match="add --resume to continue"):
        recurrent.train(COPY, checkpoint=tmp_path)
    assert _fingerprints(recurrent.train(COPY, checkpoint=tmp_path, resume=True)) == whole


# ---------------------------------------------------------------------------- true future gradient


class _Exact(nn.Module):
    """A synthesizer that knows the truth, row by row of the state that it is shown."""

    def __init__(self, table: list[tuple[torch.Tensor, torch.Tensor]], factor: float) -> None:
        super().__init__()
        self.table, self.factor = table, factor

    def forward(self, rows, context=None):
        for state, gradient in self.table:
            if torch.equal(state, rows):
                return self.factor * gradient
        raise AssertionError("asked at a state that is no boundary")


def _small(layers: int = 2):
    net = windowed.SequenceNet(nn.Identity(), nn.LSTM(3, 5, layers), nn.Linear(5, 4)).double()
    inputs = torch.randn(12, 2, 3, dtype=torch.float64)
    targets = torch.randint(4, (12, 2))

    def losses(logits, start):
        target = targets[start : start + len(logits)].flatten()
        return F.cross_entropy(logits.flatten(0, 1), target, reduction="sum")

    return net, inputs, losses


def _norm(tensors) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def test_the_future_is_what_full_backprop_has_and_truncated_backprop_lacks():
    """Written out again for one boundary, in the middle of 12 steps."""
    net, inputs, losses = _small()
    found = future.future_gradient(net, inputs, losses, 6)
    assert found["boundaries"] == 1 and found["horizon"] == 6
    parameters = list(net.lstm.parameters())
    output, (h, c) = net.lstm(inputs[:6])
    own_loss = losses(net.head(output), 0)
    own = torch.autograd.grad(own_loss, parameters, retain_graph=True)
    own_h = torch.autograd.grad(own_loss, output, retain_graph=True)[0][-1]
    later = losses(net.head(net.lstm(inputs[6:], (h, c))[0]), 6)
    gh, gc = torch.autograd.grad(later, (h, c), retain_graph=True)
    through = torch.autograd.grad((h, c), parameters, (gh, gc))
    # derived: float64, a few hundred terms
    assert found["state_future"] == pytest.approx(_norm((gh, gc)), rel=1e-12)
    assert found["state_own"] == pytest.approx(_norm([own_h]), rel=1e-12)
    assert found["parameter_own"] == pytest.approx(_norm(own), rel=1e-12)
    assert found["parameter_future"] == pytest.approx(_norm(through), rel=1e-12)
    assert found["parameter_ratio"] == pytest.approx(_norm(through) / _norm(own), rel=1e-12)
    both = [a + b for a, b in zip(own, through, strict=True)]
    inner = sum(float((a * b).sum()) for a, b in zip(own, both, strict=True))
    assert found["parameter_cosine"] == pytest.approx(inner / _norm(own) / _norm(both), rel=1e-12)


def test_a_synthesizer_that_knows_the_future_gets_full_marks():
    net, inputs, losses = _small()
    table, state = [], None
    for start in (0, 4):
        _, state = net.lstm(inputs[start : start + 4], state)
        h, c = (t.detach().requires_grad_() for t in state)
        # loss from here to the end as a function of the state alone
        loss = losses(net.head(net.lstm(inputs[start + 4 :], (h, c))[0]), start + 4)
        gh, gc = torch.autograd.grad(loss, (h, c))
        rows = [torch.cat((a[0], b[0], a[1], b[1]), 1).detach() for a, b in ((h, c), (gh, gc))]
        table.append((rows[0], rows[1]))
        state = (h.detach(), c.detach())
    found = future.future_gradient(
        net, inputs, losses, 4, synthesizer=_Exact(table, 3.0), target_scale=3.0
    )
    assert found["boundaries"] == 2
    assert found["prediction_cosine"] == pytest.approx(1.0, abs=1e-12)
    assert found["prediction_norm_ratio"] == pytest.approx(1.0, abs=1e-12)
    wrong = future.future_gradient(
        net, inputs, losses, 4, synthesizer=_Exact(table, -6.0), target_scale=3.0
    )
    assert wrong["prediction_cosine"] == pytest.approx(-1.0, abs=1e-12)
    assert wrong["prediction_norm_ratio"] == pytest.approx(2.0, abs=1e-12)


def test_a_linear_fit_is_judged_by_rows_that_it_has_not_seen():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 3, generator=generator)
    # The ridge shrinks what it fits by a hundredth, and that of every feature about equally.
    linear = rows @ torch.randn(3, 3, generator=generator) + 1.0
    assert future.fitted_row_cosine(rows, linear) > 0.999
    turned = torch.cat((linear[:200], -linear[200:]))
    assert future.fitted_row_cosine(rows, turned) < -0.999
    turned[250:] = 0.0  # rows without a gradient have no cosine
    assert future.fitted_row_cosine(rows, turned) < -0.999
    noise = torch.randn(400, 3, generator=generator)
    # Six standard deviations of the mean of 200 cosines of random directions in 3 dimensions.
    assert abs(future.fitted_row_cosine(rows, noise)) < 6 / math.sqrt(3 * 200)


def test_the_probe_of_a_copy_task_says_what_a_linear_fit_could_do(monkeypatch):
    monkeypatch.setattr(future, "FITTED", 8)
    settings = replace(COPY, probe=True, amount=3, methods=("fused", "dni"), seeds=(0,))
    exact, dni = recurrent.train(settings).runs
    assert "fitted_row_cosine" not in exact and -1.0 <= dni["fitted_row_cosine"] <= 1.0


def test_windows_without_a_loss_have_nothing_of_their_own():
    net, inputs, losses = _small(1)

    def late(logits, start):
        return losses(logits, start) if start >= 8 else logits[:0].sum()

    found = future.future_gradient(net, inputs, late, 4)
    assert found["parameter_own"] == 0.0 and found["parameter_ratio"] == math.inf
    assert found["state_future"] > 0 and math.isnan(found["parameter_cosine"])


def test_boundaries_whose_future_is_cut_off_are_left_out():
    net, inputs, losses = _small(1)
    assert future.future_gradient(net, inputs, losses, 2, horizon=6)["boundaries"] == 3
    with pytest.raises(ValueError, match=r"no boundary of windows of 8 in 12 steps has 6 behind"):
        future.future_gradient(net, inputs, losses, 8, horizon=6)


# ----------------------------------------------------------------------------------------- memory


def test_memory_grows_with_the_window_and_not_with_the_sequence():
    # Long enough for each to have a window in which the unit of targets is looked at.
    rows = memory.memory_curve(("fused", "dni"), (4, 16), (192, 256), batch=8, inputs=32, hidden=32)
    held = {(row["method"], row["window"], row["sequence"]): row["bytes"] for row in rows}
    for method in ("fused", "dni"):
        for window in (4, 16):
            assert held[method, window, 192] == held[method, window, 256]
        assert held[method, 16, 256] > held[method, 4, 256]
    # What a window keeps at the least, h, c and four gates a step, for 64 steps more.
    assert held["fused", 256, 256] - held["fused", 192, 192] >= 64 * 8 * 32 * 6 * 4
    table = as_text([recurrent_report.memory_table(rows)])
    assert "dni T=16" in table and "fused whole sequence" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("fsued", 4, 8), "did you mean 'fused'"), (("dni", 0, 8), "must be at least 1, got 0")],
)
def test_bad_input_of_the_memory_curve(arguments, message):
    with pytest.raises(ValueError, match=message):
        memory.sequence_memory(*arguments)


# ---------------------------------------------------------------------------------------- reports

KEYS = {*NAMES, "data", "summary", "runs", "costs", "memory_curve"}


@pytest.mark.parametrize("task", ["charlm", "copy", "repeat-copy", "rows"])
def test_the_report_folder(tmp_path, monkeypatch, task):
    for name, value in (("CARRIED", 4), ("REGION", 16), ("HORIZON", 8), ("WINDOWS", (1, 2))):
        monkeypatch.setattr(future, name, value)
    settings = {
        "charlm": replace(CHARLM, amount=800),
        "copy": COPY,
        "repeat-copy": replace(COPY, amount=24, seeds=(0,)),  # its episodes are far longer
        "rows": ROWS,
    }[task]
    source = SOURCES.get(task)
    # Every length counts as solved, so that episodes soon have boundaries behind a loss.
    settings = replace(settings, task=task, probe=True, windows=(2,), threshold=1.0)
    outcome = recurrent.train(settings, source)
    outcome.costs = recurrent.costs(settings, source, seconds=0.05)
    outcome.memory_curve = memory.memory_curve(("dni",), (2,), (4, 8), batch=2, inputs=4, hidden=4)
    files = write_folder(recurrent.result(outcome, "fused-dni train"), tmp_path / "deep" / "er")
    names = {*recurrent_report.CURVES[task], *recurrent_report.PROBE_PLOTS}
    if task == "rows":  # no window but the last has a loss of its own: no ratio to draw
        names.remove("future-vs-window")
    plots = {f"{name}.png" for name in names}
    assert {f.name for f in files} == {"report.json", "report.md", *plots}
    for path in files[2:]:
        assert path.read_bytes()[:4] == b"\x89PNG"
    read = json.loads(files[0].read_text())
    assert set(read) == KEYS and read["kind"] == f"train {task}"
    assert len(read["runs"]) == len(settings.arms()) * len(settings.seeds)
    for r in read["runs"]:
        assert [row["window"] for row in r["future"]] == [1, 2]
        # null where no window has a loss of its own
        assert all(
            row["parameter_ratio"] is None or row["parameter_ratio"] > 0 for row in r["future"]
        )
        for row in r["history"]:
            assert ("prediction" in row) == r["method"].startswith("dni")
    written = files[1].read_text()
    assert recurrent.result(outcome).described().sentence in written
    for name in (*outcome.names(), *plots, "S=8"):
        assert name in written


def test_a_report_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    outcome = recurrent.train(replace(COPY, amount=3, seeds=(0,)))
    with pytest.raises(WriteError, match="cannot write the report"):
        write_folder(recurrent.result(outcome), tmp_path / "file" / "below")


def _told(task: str, seeds: tuple[int, ...], **finals: list[float]) -> str:
    """The sentence for arms that ended so; names like ``dni8``."""
    key, axis = ("bits", "characters") if task == "charlm" else ("solved", "steps")
    runs = []
    for name, values in finals.items():
        method, window = name.rstrip("0123456789"), int(name.lstrip("abcdefghijklmnopqrstuvwxyz"))
        for seed, value in zip(seeds, values, strict=True):
            row = {key: value, axis: 1000.0, "seconds": 3.0}
            label = f"{method} T={window}"
            runs.append({"name": label, "method": method, "window": window, "seed": seed})
            runs[-1]["history"] = [row]
    settings = recurrent.Settings.of(task, seeds=seeds, amount=1000)
    costs = {
        r["name"]: {
            "peak_memory": 1_000_000 * r["window"],
            "timing": timing.Timing.of("piece", (0.002,), (0.002,), 1),
            "units": 1,
        }
        for r in runs
    }
    outcome = recurrent.Outcome(settings, {}, runs, costs=costs)
    return recurrent_report.sentence(recurrent.result(outcome))


def test_the_sentence_claims_what_was_measured():
    said = _told("charlm", (0,), fused8=[2.0], dni8=[1.9], fused40=[1.8])
    assert "1.900 against 2.000" in said and "better by 0.100" in said
    assert "closes 50 %" in said and "8.00 MB" in said and "40.0 MB" in said
    assert "2.00 ms" in said and "One seed, so no spread is known" in said
    said = _told("charlm", (0, 1), fused8=[2.0, 2.1], dni8=[2.05, 2.2], fused40=[1.8, 1.8])
    assert "worse by 0.075, and the seeds' ranges overlap" in said and "closes -30 %" in said
    said = _told("charlm", (0,), fused8=[2.0], dni8=[2.0001], fused40=[2.2])
    assert "no difference at the third decimal" in said
    assert "there is no gap to close" in said and "closes" not in said
    said = _told("copy", (0, 1), fused4=[4.0, 6.0], dni4=[9.0, 11.0])
    assert "10 (9 to 11) against 5 (4 to 6)" in said and "2.00 times" in said
    assert "ranges are apart" in said and "longest length solved" in said
    assert "times" not in _told("copy", (0,), fused4=[0.0], dni4=[2.0])
    assert _told("charlm", (0,), fused8=[2.0]).startswith("No arm with synthetic gradients")


# ------------------------------------------------------------------------------------ command line

SMALL = ["--hidden", "8", "--batch-size", "4", "--evaluations", "2", "--quiet", "--threads", "1"]
SMALL += ["--seconds", "0.05"]


@pytest.fixture
def verse(tmp_path):
    path = tmp_path / "verse.txt"
    path.write_text(_verse())
    return str(path)


def test_train_charlm_prints_table_sentence_and_paths(capsys, tmp_path, verse):
    out = tmp_path / "report"
    argv = ["train", "charlm", "--data", verse, *SMALL, "--characters", "800", "--out", str(out)]
    assert cli.main([*argv, "--windows", "4", "--long", "8"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for word in ("dni+aux T=4", "fused T=8", "gap closed", "truncated backprop at T=4"):
        assert word in captured.out
    assert str(out / "bits-vs-characters.png") in captured.out
    command = json.loads((out / "report.json").read_text())["facts"]["command"]
    assert command.startswith("fused-dni train charlm --data DIR") and verse not in command


@pytest.mark.parametrize("task", ["copy", "repeat-copy"])
def test_train_copy_as_json_with_everything(capsys, tmp_path, monkeypatch, task):
    monkeypatch.chdir(tmp_path)
    argv = ["train", task, *SMALL, "--steps", "4", "--seeds", "0", "--probe", "--json"]
    assert cli.main(argv) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["kind"] == f"train {task}" and read["runs"][0]["future"]
    assert (tmp_path / "runs" / task / "solved-vs-steps.png").exists()


def test_the_memory_curve_on_the_command_line(capsys, tmp_path):
    argv = ["train", "copy", *SMALL, "--steps", "2", "--seeds", "0", "--methods", "fused", "dni"]
    assert cli.main([*argv, "--memory", "--out", str(tmp_path)]) == 0
    assert "dni T=32" in capsys.readouterr().out
    rows = json.loads((tmp_path / "report.json").read_text())["memory_curve"]
    assert {row["sequence"] for row in rows} == set(memory.SEQUENCES)


def test_train_rows_prints_what_the_prediction_recovers(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_, **__: IMAGES)
    argv = ["train", "rows", *SMALL, "--steps", "4", "--seeds", "0", "--windows", "2", "--long"]
    assert cli.main([*argv, "6", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "gap closed" in said and "dni at T=2" in said and "truncated backprop at T=6" in said
    (own,) = [line for line in said.splitlines() if line.startswith("fused T=2")]
    assert own.split()[-1] == "-"  # the gap's own end closes none of it
    assert json.loads((tmp_path / "report.json").read_text())["kind"] == "train rows"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rows", "--data", "nowhere"], "nowhere"),
        (["rows", "--full", "--sg-lambda", "2"], "sg-lambda must be a finite number from 0 to 1"),
        (["copy", "--condition", "label"], "unknown option '--condition'"),
        (["charlm"], "charlm needs a text, --data PATH: any UTF-8 text"),
        (["charlm", "--data", "none.txt"], "none.txt does not exist"),
        (["charlm", "--data", "empty.txt"], "empty.txt is empty"),
        (["charlm", "--data", "binary"], "is binary"),
        (["charlm", "--data", "latin"], "is not UTF-8 text"),
        (["charlm", "--data", "short.txt"], "too short for 32 streams"),
        (["charlm", "--data", "verse.txt", "--validation", "2"], "between 0 and 1"),
        (["charlm", "--data", "verse.txt", "--methods", "bptt"], "unknown method 'bptt'"),
        (["charlm", "--steps", "3"], "unknown option '--steps'"),
        (["copy", "--data", "verse.txt"], "unknown option '--data'"),
        (["copy", "--windows", "0"], "windows must be a whole number from 1 on, got '0'"),
        (["copy", "--window", "3"], "did you mean '--windows'"),
        (["copy", "--resume"], "--resume needs --checkpoint DIR"),
        (["repeat-copy", "--threshold", "3"], "threshold must be above 0 and at most 1"),
        (["copy", "--out", "verse.txt/below"], "cannot write to"),
        (["copy", "--backend", "cpuu"], "backend"),
        (["copyy"], "unexpected argument 'copyy'"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, verse, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary").write_bytes(bytes(range(64)))
    (tmp_path / "latin").write_bytes("naïveté".encode("latin-1"))
    (tmp_path / "short.txt").write_text("A word.")
    assert cli.main(["train", *argv, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err
