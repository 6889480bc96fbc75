"""The arms of bench/races train, on small data, as they say they do."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clusters import clusters
from torch import Tensor

import claims
import fused_dni as fd
import races
import rates
import readings
from fused_dni.experiments import perceptual, rival_grid, tops
from fused_dni.experiments.data import Dataset, Split
from fused_dni.experiments.rival_arms import Grid
from fused_dni.experiments.tops import Racer
from fused_dni.report.schema import Result
from pages import documents
from races import autoencoder, character_model, chosen, compression, corpus, encoder, word_model
from races.word_model import RATE, Setting, Words

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = Setting("tiny", 24, 16)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    lines = ["the cat sat on the mat , and the dog did not .", "a dog is no cat ; a mat is a mat ."]
    file = tmp_path / "text.txt"
    file.write_text("\n".join(lines[i % 2 if i % 3 else 0] for i in range(1200)))
    monkeypatch.setenv("CORPUS", str(file))
    monkeypatch.setattr(word_model, "compiled_loss", lambda: word_model.dense_loss)
    caches = (corpus.text, word_model.corpus, character_model.corpus, compression.prepared)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Split(torch.rand(200, 784).square(), torch.zeros(200, dtype=torch.int64))
    found = perceptual.Images(Dataset("drawn", drawn, Split(*(part[:20] for part in drawn))))
    monkeypatch.setattr(autoencoder, "images", lambda: found)
    monkeypatch.setattr(perceptual, "BATCH", 4)


@pytest.fixture
def toy(text: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that knows the text's words."""
    known = {w: i + 2 for i, w in enumerate(sorted(set(corpus.text())))}

    def made() -> tuple[encoder.Encoder, dict[str, int]]:
        torch.manual_seed(0)
        small = encoder.Encoder(30, width=16, heads=2, inner=32, layers=1, longest=12, ends=(0, 1))
        return small.requires_grad_(False), known

    monkeypatch.setattr(compression, "pretrained", made)


def state(racer: Racer) -> list[Tensor]:
    """All that is trained, the synthesizer apart."""
    found = list(racer.inner.parameters())
    if isinstance(racer, Words):
        found += list(racer.head.parameters())
    return [p.detach().clone() for p in found]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def word(**options: Any) -> Words:
    return Words(TINY, RATE, 1, **options)


# By race, what makes a racer, and its options for a synthesizer.
MADE: dict[str, tuple[Callable[..., Racer], dict[str, Any], str]] = {
    "words": (word, {}, "text"),
    "perceptual": (
        lambda **options: perceptual.Autoencoder(autoencoder.images(), 1, **options),
        {"synthesizer": autoencoder.difference},
        "images",
    ),
    "sentence": (
        lambda **options: compression.Compression(1, **options),
        {"synthesizer": compression.difference},
        "toy",
    ),
}


@pytest.fixture(params=MADE)
def made(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[..., Racer], dict[str, Any]]:
    make, decoupled, needs = MADE[request.param]
    request.getfixturevalue(needs)
    monkeypatch.setattr(tops, "WARMUP", 3)
    return make, decoupled


Made = tuple[Callable[..., Racer], dict[str, Any]]


def test_full_steps_are_backprop_to_the_bit(made: Made) -> None:
    make, decoupled = made
    plain, ours = make(), make(every=1, **decoupled)
    for racer in (plain, ours):
        torch.manual_seed(2)
        for _ in range(6):
            assert racer.full
            racer.step()
    assert same(state(plain), state(ours))


def test_steps_that_are_dropped_change_nothing(made: Made) -> None:
    """Full steps alone are backprop on their batches."""
    make, decoupled = made
    plain, ours = make(), make(every=4, between="dropped", **decoupled)
    for racer in (plain, ours):
        torch.manual_seed(2)
        for step in range(12):
            if step < 3 or (step - 3) % 4 == 0:
                assert racer.full
                racer.step()
            elif racer is ours:
                assert not racer.full
                before = state(racer)
                racer.step()
                assert same(before, state(racer))
            else:
                racer.below(racer.batch())
    assert same(state(plain), state(ours))


def test_a_held_gradient_is_the_last_full_steps(made: Made) -> None:
    make, _ = made
    racer = make(every=4, between="held")
    for _ in range(4):
        racer.step()
    drawn = torch.get_rng_state()
    bottom = [p for p in racer.inner.parameters() if p.grad is not None]
    held = [p.grad.clone().coalesce() if p.grad.is_sparse else p.grad.clone() for p in bottom]
    before, above = [p.detach().clone() for p in bottom], state(racer)[len(bottom) :]
    racer.step()
    assert torch.equal(drawn, torch.get_rng_state())  # no batch
    for p, gradient, old in zip(bottom, held, before, strict=True):
        now = p.grad.coalesce() if p.grad.is_sparse else p.grad
        assert torch.equal(now.to_dense(), gradient.to_dense())
        assert not torch.equal(p, old)
    assert same(above, state(racer)[len(bottom) :])


def test_looking_at_the_loss_does_not_train(made: Made) -> None:
    make, decoupled = made
    found = []
    for looks in (0, 2):
        racer = make(every=4, **decoupled)
        torch.manual_seed(2)
        for _ in range(8):
            assert len({racer.loss() for _ in range(looks)}) <= 1
            racer.step()
        found.append(state(racer))
    assert same(*found)


@pytest.mark.parametrize(
    ("every", "between", "synthesizer"),
    [(None, "prediction", True), (4, "prediction", False), (4, "held", True)],
)
def test_what_an_arm_needs(every: int | None, between: Any, synthesizer: bool) -> None:
    inner = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match=f"between='{between}'"):
        Racer(inner, fd.LinearSynthesizer(3) if synthesizer else None, every, between)


# ------------------------------------------------------------------------------------ word models


@pytest.mark.parametrize("name", word_model.ARMS)
def test_word_models_learn(text: None, name: str) -> None:
    racer = word_model.grid(TINY)[name][1](1)
    before = racer.loss()
    for _ in range(tops.WARMUP + 40):
        racer.step()
    assert racer.loss() < before * (0.85 if "full steps" in name else 0.7)
    if racer.schedule is not None:
        found = fd.diagnostics(racer.bottom)[""]
        assert found["cosine"] > 0.7, found


def test_samples_that_are_all_classes_are_the_full_softmax() -> None:
    """So many draws that every class is sure to be among them: loss and gradients, in float64."""
    n, classes, width = 7, 11, 5
    share = torch.rand(classes, dtype=torch.float64) + 0.2
    share /= share.sum()
    drawn = torch.arange(classes).repeat(2000)
    rows = torch.randn(n, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(classes, width, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(classes, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(classes, (n,))
    found = []
    for loss in (
        word_model.sampled_loss(rows, weight, bias, labels, drawn, share),
        word_model.dense_loss(rows, weight, bias, labels),
    ):
        gradients = torch.autograd.grad(loss, (rows, weight, bias))
        found.append([loss, *(g.to_dense() for g in gradients)])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)


def test_samples_stand_for_all_classes() -> None:
    """In the mean over all draws that there are, with their probabilities, what stands beside the
    label's exponential is the sum of all other classes'."""
    classes, draws, label = 4, 3, 2
    share = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    rows, weight = torch.ones(1, 1, dtype=torch.float64), torch.randn(classes, 1).double()
    bias, labels = torch.randn(classes, dtype=torch.float64), torch.tensor([label])
    logits = F.linear(rows, weight, bias)[0]
    own = logits[label].exp() / (1.0 - (1.0 - share[label]) ** draws)
    mean = torch.zeros((), dtype=torch.float64)
    for some in itertools.product(range(classes), repeat=draws):
        drawn = torch.tensor(some)
        loss = word_model.sampled_loss(rows, weight, bias, labels, drawn, share)
        mean += share[drawn].prod() * (loss.exp() - 1.0) * own
    torch.testing.assert_close(mean, logits.exp().sum() - logits[label].exp(), rtol=1e-12, atol=0)


def test_the_heads_rows_that_are_not_drawn_stay(text: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(word_model, "SAMPLES", 2)
    racer = word(head="sampled")
    before = racer.head.weight.detach().clone()
    _, y = racer.batch()
    racer.position = 0
    racer.step()
    moved = (racer.head.weight != before).any(1)
    assert bool(moved[y.unique()].all()) and int(moved.sum()) <= len(y.unique()) + 2


def test_between_full_steps_the_head_learns_from_samples(
    text: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the bottom as without that, from the same prediction."""
    monkeypatch.setattr(tops, "WARMUP", 3)
    one, two = word(every=4), word(every=4, sampled_between=True)
    for racer in (one, two):
        for _ in range(4):
            racer.step()
    assert same(state(one), state(two))
    for racer in (one, two):
        racer.step()
    below = len(list(one.inner.parameters()))
    assert same(state(one)[:below], state(two)[:below])
    assert not same(state(one), state(two))


def test_without_a_compiler_its_arm_is_left_out(
    text: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> Any:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(word_model, "compiled_loss", none)
    assert "backprop, compiled" not in word_model.grid(TINY)
    assert capsys.readouterr().err == "tiny: no arm by torch.compile: no compiler\n"


def test_rates_are_those_that_were_best(
    text: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(chosen, "RATES", tmp_path / "rates.json")
    monkeypatch.setattr(rates, "GRIDS", {"tiny": lambda: word_model.grid(TINY)})
    assert chosen.multiple("tiny", "backprop", 8) == 8
    asked = ["tiny", "--seconds", "0.02", "--arms", "backprop", "DNI k=4"]
    assert rates.main(asked) == 0 and rates.main([*asked[:-1], "--arms", "backprop"]) == 0
    found = json.loads(chosen.RATES.read_text())["tiny"]
    assert set(found) == {"backprop", "DNI k=4"}
    assert set(found["backprop"]) == {"1", "2", "4", "8"}
    best = min(found["backprop"], key=found["backprop"].get)
    assert chosen.multiple("tiny", "backprop", 0) == int(best)


# ---------------------------------------------------------------------------------- other races


def test_autoencoders_look_at_the_critic_when_they_must(
    images: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tops, "WARMUP", 8)
    for name, make in races.perceptual().items():
        racer, looks = make(1), 0

        def count(*_: object) -> None:
            nonlocal looks
            looks += 1

        racer.critic.register_forward_hook(count)
        full = []
        for step in range(26):
            if racer.full:
                full.append(step)
            racer.step()
        assert looks == 2 * len(full), name  # at the image, and at what it is to be
        if racer.every != "auto":
            assert full == [n for n in range(26) if n < 8 or (n - 8) % (racer.every or 1) == 0]
        assert math.isfinite(racer.loss())


def test_compressions_learn(toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tops, "WARMUP", 8)
    for name, make in races.sentence().items():
        racer = make(1)
        before = racer.loss()
        for _ in range(30):
            racer.step()
        assert racer.loss() < 0.9 * before, name


def test_an_arm_has_its_own_rate_and_those_by_backprop_one(
    text: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(character_model, "multiple", lambda race, arm, _: asked.append(arm) or 3)
    monkeypatch.setattr(character_model, "Characters", lambda *given, **options: None)
    arms = set(races.hidden())
    assert arms == set(character_model.ARMS) and set(asked) == set(character_model.grid())


def test_hidden_layers_are_run_and_trained_on_full_steps_alone(
    text: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tops, "WARMUP", 4)
    small = {"ORDER": 2, "BUCKETS": 64, "BATCH": 8, "WIDTH": 6, "HIDDEN": 10, "APART": 50}
    for name, value in small.items():
        monkeypatch.setattr(character_model, name, value)
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    assert set(races.hidden()) == set(character_model.ARMS)
    for name, make in races.hidden().items():
        racer = make(1)
        looks: list[int] = []

        def look(*_: object, racer: Racer = racer, looks: list[int] = looks) -> None:
            looks.append(racer.steps)

        racer.upper_layers.register_forward_hook(look)
        weight = next(racer.upper_layers.parameters())
        before, moved = racer.inner.weight.detach().clone(), []
        for _ in range(21):
            upper, table = weight.detach().clone(), racer.inner.weight.detach().clone()
            racer.step()
            assert torch.equal(weight, upper) == (racer.steps - 1 not in looks), name
            moved.append(not torch.equal(racer.inner.weight, table))
        every = racer.every or 1
        assert looks == [n for n in range(21) if n < 4 or (n - 4) % every == 0]
        waits = name.startswith("full steps only")
        assert moved == [n in looks or not waits for n in range(21)], name
        touched = (racer.inner.weight != before).any(1).sum()
        assert 0 < int(touched) < len(before) and 0.0 < racer.loss() <= 1.0


def test_rows_of_the_table_are_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = torch.tensor([3, 1, 2, 9, 1, 2, 5])
    monkeypatch.setattr(character_model, "ORDER", 3)
    one, other = character_model.rows(symbols, torch.tensor([3, 6])).tolist()
    # "1 2" is in front of both places, and what is before that differs.
    assert one[:2] == other[:2] and one[2] != other[2]
    assert [row // character_model.BUCKETS for row in one] == [0, 1, 2]


def test_the_encoder_is_the_published_one() -> None:
    """The similarities of three sentences as its makers print them."""
    try:
        made, known = encoder.pretrained()
    except ValueError as error:
        pytest.skip(str(error))
    lines = ("the weather is lovely today .", "it ' s so sunny outside !")
    lines += ("he drove to the stadium .",)
    with torch.no_grad():
        vectors = torch.cat(
            [made(made.words(torch.tensor([[known[w] for w in line.split()]]))) for line in lines]
        )
    wanted = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    torch.testing.assert_close(vectors @ vectors.t(), wanted, rtol=0, atol=1e-4)  # four digits


# ------------------------------------------------------------------------------- what is missing


def test_what_a_race_lacks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CORPUS", raising=False)
    corpus.text.cache_clear()
    word_model.corpus.cache_clear()
    with pytest.raises(ValueError, match="CORPUS is not set"):
        races.words()
    monkeypatch.setattr(claims, "commands", lambda data: iter([("race-words", ["race"])]))
    assert claims.measure("DIR", None) == 0
    assert capsys.readouterr().out.startswith("race-words: left out: CORPUS is not set")
    monkeypatch.setenv("CORPUS", str(tmp_path / "none"))
    assert str(races.lacks("words")).startswith("CORPUS is no file")
    monkeypatch.setattr(encoder, "PACKAGE", "no_such_package")
    monkeypatch.setenv("CORPUS", __file__)
    assert races.lacks("words") is None
    assert "pip install --no-deps" in str(races.lacks("sentence"))


def test_every_race_is_a_factory_with_a_title() -> None:
    assert all(callable(getattr(races, name)) for name in races.TITLES)
    made = {name for name, _ in claims.commands("DIR") if name.startswith("race-")}
    assert made == {f"race-{name}" for name in races.TITLES}
    report = {"facts": {"command": "fused-dni race bench.races:words_16k --seconds 40"}}
    assert races.title(report) == races.TITLES["words_16k"]


# -------------------------------------------------------------------------------------- tables


def test_a_race_becomes_a_table() -> None:
    def history(*losses: float) -> list[dict[str, float]]:
        return [{"seconds": float(i), "steps": i, "loss": loss} for i, loss in enumerate(losses)]

    runs = [
        {"name": name, "seed": 1, "history": history(*losses), "diverged": False}
        for name, losses in {"backprop": (0.9, 0.8, 0.6), "DNI k=8": (0.9, 0.6, 0.5)}.items()
    ]
    facts = {
        "device": "CPU", "threads": 2, "torch": "2", "date": "d", "commit": "c", "command": "run",
    }  # fmt: skip
    settings = {"arms": ["backprop", "DNI k=8"], "seconds": 2.0, "seeds": [1]}
    report = Result("race", facts=facts, settings=settings, body={"runs": runs, "finished": True})
    shown = documents.RENDERERS["race-hidden"][1]([report.described()])
    assert "0.50 (0.50 to 0.50)" in shown and "CPU, 2 threads" in shown
    assert documents.RENDERERS["race-hidden"][1]([]) == "Not measured yet."


def test_a_grid_becomes_tables_and_an_answer() -> None:
    settings = Grid(
        dataset="digits", arms=("fused", "cdni-2"), widths=(6,), depths=(1,), budgets=(1, 2),
        steps=2, rates=(1e-2,), batch_size=16, rank=2, seeds=(1, 2), backend="reference",
    )  # fmt: skip
    report = rival_grid.compare(settings, clusters(), seconds=0.02, command="run").described()
    shown = documents.RENDERERS["rivals-grid"][1]([report])
    assert shown.count("| 6 x 1, 2x ") == 3 and report.sentence in shown
    answer = readings.grid({"rivals-grid-mnist": report})
    assert "cdni-2" in answer.sentence and len(answer.sentence) < 600
    # Up to both budgets: the clock says for how many backprop has runs of as much time.
    assert re.search(r"in [0-2] of [0-2] \(digits\)", answer.number)
    assert answer.answer in ("yes", "in part", "no")
