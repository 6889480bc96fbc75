"""The verdict of an expensive top: parts, cycles, what is said, and that nothing is changed."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import flops
import pytest
import tops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni import cli
from fused_dni.cli.verdict_top import EXAMPLE
from fused_dni.measure.race import race
from fused_dni.measure.verdict import VerdictError
from fused_dni.measure.verdict.candidates import TIMING_RATE, at_rate
from fused_dni.measure.verdict.top_race import top_arms
from fused_dni.measure.verdict.top_steps import Subject, make_subject
from fused_dni.report import as_text, blocks_of, load
from fused_dni.report.kinds import race as races
from fused_dni.report.schema import Result, save
from fused_dni.report.times import results_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow(60)]

N, D = 16, 8
#: Operations of a product [N, D] @ [D, D].
UNIT = 2 * N * D * D
RULE = at_rate(fd.Adam(), TIMING_RATE)


class Head(nn.Linear):
    """A softmax with its loss."""

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(h).flatten(0, -2), y.flatten())


class Critic(nn.Module):
    """A frozen network: how far h looks from x to it."""

    def __init__(self, width: int = 32 * D, features: int = D) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, width), nn.ReLU(), nn.Linear(width, features)
        ).requires_grad_(False)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        loss: Tensor = (self.layers(h) - self.layers(x)).square().sum(-1).mean()
        return loss


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))


def square(h: Tensor, *_: Any) -> Tensor:
    return h.square().mean()


def images(*shape: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(*shape)
    return x, x


def labelled(classes: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(N, D), torch.randint(classes, (N,))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is the number of operations."""
    flops.install(monkeypatch)


# ------------------------------------------------------------------------------- parts and cycles


def test_parts_are_what_was_planted(counted: None) -> None:
    rank = 4
    teacher = fd.DifferenceSynthesizer(D, rank)
    found = fd.verdict_top(net(), Critic(32 * D), images(N, D), synthesizer=teacher)
    low = UNIT * rank // D
    # Two layers forward, two gradients of weights, one of the second layer's input.
    assert found.bottom.median == pytest.approx(5 * UNIT, abs=1)
    # The critic of h and of x, and back to h alone.
    assert found.top.median == pytest.approx(6 * 32 * UNIT, abs=1)
    assert found.backprop.median == pytest.approx((5 + 6 * 32) * UNIT, abs=1)
    (variant,) = found.variants
    assert found.prediction(variant).median == pytest.approx(2 * low, abs=1)
    assert variant.lesson.median == pytest.approx(3 * low, abs=1)


@pytest.mark.parametrize(
    ("top", "sample"),
    [(Critic(), images(N, D)), (Head(D, 500), labelled(500)), (square, images(N, D))],
    ids=["frozen", "trained", "cheap"],
)
def test_cycles_are_the_formula(counted: None, top: Any, sample: Any) -> None:
    found = fd.verdict_top(net(), top, sample, target_every=(1, 2, 3, 8))
    (variant,) = found.variants
    b, above = found.bottom.median, found.top.median
    s, m = found.prediction(variant).median, variant.lesson.median
    for k, cycle in variant.cycles.items():
        assert cycle.median == pytest.approx(b + s + (above + m) / k, abs=1)
        report = found.report()["variants"][0]["cycles"][str(k)]
        exact = (b + s + (above + m) / k) / (b + above)
        assert report["predicted ratio"].median == pytest.approx(exact)
        assert report["ratio"].median == pytest.approx(exact, rel=1e-3)
    most = found.report()["variants"][0]["most"].median
    assert most == pytest.approx((b + s) / (b + above))


def test_without_the_top_its_module_is_not_called() -> None:
    calls: list[bool] = []
    critic = Critic()

    def top(h: Tensor, x: Tensor) -> Tensor:
        calls.append(h.requires_grad)
        return critic(h, x)  # type: ignore[no-any-return]

    subject = make_subject(net(), top, images(N, D), "auto", RULE)
    for every, looks in ((1, 1), (4, 1), (None, 0)):
        calls.clear()
        subject.steps("difference", every)()
        assert len(calls) == looks


def test_a_step_whose_loss_is_never_computed_leaves_nothing_behind() -> None:
    subject = make_subject(net(), Head(D, 5), labelled(), "auto", at_rate(fd.Adam(), 0.1))
    loop = subject.loop("softmax", None)
    teacher = copy.deepcopy(loop.bottom.synthesizer.state_dict())
    above = copy.deepcopy(loop.top.state_dict())
    below = copy.deepcopy(loop.bottom.module.state_dict())
    for _ in range(3):
        loop.step(subject.x, *subject.rest)
    assert all(p.grad is None for p in loop.top.parameters())
    assert all(p.grad is None for p in loop.bottom.synthesizer.parameters())
    for module, before in ((loop.top, above), (loop.bottom.synthesizer, teacher)):
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    moved = [not torch.equal(v, below[k]) for k, v in loop.bottom.module.state_dict().items()]
    assert all(moved)


def test_what_is_trained_above_is_trained_on_steps_with_targets() -> None:
    subject = make_subject(net(), Head(D, 5), labelled(), "auto", at_rate(fd.Adam(), 0.1))
    for synthesizer, every in ((None, 1), ("softmax", 2)):
        loop = subject.loop(synthesizer, every)
        before = loop.top.weight.detach().clone()
        loop.step(subject.x, *subject.rest)
        assert not torch.equal(loop.top.weight, before)


def test_tied_weights_stay_tied_in_copies() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer = nn.Embedding(5, D), nn.Linear(D, D)

        def forward(self, words: Tensor) -> Tensor:
            return self.layer(self.embedding(words))  # type: ignore[no-any-return]

    bottom, head = Words(), Head(D, 5)
    head.weight = bottom.embedding.weight
    words = torch.randint(5, (3, 4))
    subject = make_subject(bottom, head, (words, words), "auto", RULE)
    assert list(subject.synthesizers) == ["softmax"]
    loop = subject.loop("softmax", 2)
    assert loop.top.weight is loop.bottom.module.embedding.weight
    assert loop.bottom.synthesizer.head.weight is loop.top.weight is not head.weight
    assert loop.above is not None and len(loop.above.param_groups[0]["params"]) == 1  # the bias


# --------------------------------------------------------------------------------- synthesizers


def chosen(bottom: nn.Module, top: Any, sample: Any, asked: Any = "auto") -> Subject:
    return make_subject(bottom, top, sample, asked, RULE)


def test_auto_takes_what_the_context_allows() -> None:
    def names(*given: Any) -> list[str]:
        return list(chosen(*given).synthesizers)

    assert names(net(), Head(D, 5), labelled()) == ["softmax"]
    assert names(net(), Critic(), images(N, D)) == ["difference"]
    assert names(net(), square, (torch.randn(N, D),)) == ["rank16"]
    convolution = nn.Conv2d(1, 2, 3, padding=1)
    assert names(convolution, square, (torch.randn(4, 1, 6, 6),)) == ["conv"]
    made = chosen(net(), Head(D, 5), labelled(), ["auto", "rank3", "dense", "diagonal"])
    assert list(made.synthesizers) == ["softmax", "rank3", "dense", "diagonal"]
    assert all(s.context_features == 5 for s in made.synthesizers.values())
    wide = chosen(net(), lambda h, c: square(h), (torch.randn(N, D), torch.randn(N, 3)), "dense")
    assert wide.synthesizers["dense"].context_features == 3 and not wide.notes


def test_a_head_is_what_reads_h() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(D, D), Head(D, 5)

        def forward(self, h: Tensor, y: Tensor) -> Tensor:
            return self.head(self.first(h).relu(), y)  # type: ignore[no-any-return]

    found = chosen(net(), Deep(), labelled())
    # The first layer has outputs enough to be one, and reads h.
    assert list(found.synthesizers) == ["softmax"]
    narrow = Deep()
    narrow.first = nn.Linear(D, 4)
    narrow.head = Head(4, 5)
    x, y = labelled()
    y[0] = 4
    found = chosen(net(), narrow, (x, y))
    assert list(found.synthesizers) == ["rank16"]
    assert "does not see the context" in found.notes[0]


def test_a_frozen_head_behind_a_function_is_found() -> None:
    head = nn.Linear(D, 5).requires_grad_(False)
    found = chosen(net(), lambda h, y: F.cross_entropy(head(h), y), labelled())
    assert list(found.synthesizers) == ["softmax"]


def test_a_synthesizer_of_ones_own() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2 * D, D)

        def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
            assert context is not None
            return self.layer(torch.cat([h, context], 1))  # type: ignore[no-any-return]

    assert list(chosen(net(), Critic(), images(N, D), Mine()).synthesizers) == ["Mine"]
    own = fd.LinearSynthesizer(D, 4, context_features=5)
    assert list(chosen(net(), Head(D, 5), labelled(), own).synthesizers) == ["LinearSynthesizer"]


# --------------------------------------------------------------------------- planted tops come out


def test_a_cheap_top_is_a_plain_no(counted: None) -> None:
    found = fd.verdict_top(net(), square, images(N, D), synthesizer="difference")
    dense = fd.verdict_top(net(), square, images(N, D), synthesizer=fd.DifferenceSynthesizer(D, 4))
    for verdict in (found, dense):
        assert "It does not pay at any k that was measured." in verdict.sentence()
    assert dense.report()["variants"][0]["break_even"].kind == "never"
    assert "Were the top never run, a step would be 1.2" in dense.sentence()


TASK = torch.Generator().manual_seed(0)
POINTS = torch.randn(24, D, generator=TASK), torch.randint(4, (24,), generator=TASK)


def predictable(above: Any) -> Any:
    """A distance, as a frozen network sees it; the synthesizer knows what h is to be."""
    critic = Critic(32, D)

    def top(h: Tensor, x: Tensor) -> Tensor:
        above(h)
        return critic(h, x)  # type: ignore[no-any-return]

    def batch(number: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(N, D, generator=torch.Generator().manual_seed(number))
        return x, x

    return net(), top, batch


def unpredictable(above: Any) -> Any:
    """Random labels, to be known by heart; the synthesizer does not see them."""
    critic = nn.Sequential(nn.Linear(D, 32), nn.ReLU(), nn.Linear(32, 4)).requires_grad_(False)

    def top(h: Tensor, y: Tensor) -> Tensor:
        above(h)
        return F.cross_entropy(critic(h), y)

    def batch(number: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(24, (N,), generator=torch.Generator().manual_seed(number))
        return POINTS[0][rows], POINTS[1][rows]

    return net(), top, batch


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        (predictable, "So yes: DNI k=8."),
        (unpredictable, "So no: a step takes less time, and less is learned in the same time."),
    ],
)
def test_a_dear_top_pays_in_time_and_the_race_says_whether_it_is_worth_it(
    task: Any, answer: str, monkeypatch: pytest.MonkeyPatch, counted: None
) -> None:
    clock = tops.Charged(20.0)
    clock.install(monkeypatch)

    def above(h: Tensor) -> None:
        if h.requires_grad:  # the look at the loss is not on the clock
            clock.above()

    bottom, top, batch = task(above)
    wide = Critic(32 * D) if task is predictable else top
    found = fd.verdict_top(bottom, wide, batch(0))
    assert "It pays from k = " in found.sentence()
    assert found.sentence().endswith("--race SECONDS measures.")
    arms = top_arms(lambda: task(above), target_every=(8,), update=fd.Adam(1e-2), warmup=8)
    found.race = race(arms, seconds=80 * 21.0, seeds=(1, 2), marks=5)
    steps = {run["name"]: run["history"][-1]["steps"] for run in found.race["runs"]}
    assert steps["backprop"] == 80 and steps["DNI k=8"] > 400
    said = found.sentence()
    assert "It pays from k = " in said and said.endswith(answer)
    assert "In a race of" in said and races.sentence(found.race) in said
    text = as_text(blocks_of(found.report()))
    assert "At equal wall-clock" in text and "time to backprop's end" in found.table()


@pytest.mark.parametrize("as_module", [True, False])
def test_a_top_that_is_not_deterministic_is_said(counted: None, as_module: bool) -> None:
    class Noisy(Critic):
        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return super().forward(F.dropout(h, 0.5, self.training), x)

    noisy = Noisy()
    top = noisy if as_module else (lambda h, x: noisy(h, x))
    found = fd.verdict_top(net(), top, images(N, D), target_every=(2,))
    assert "The top is not deterministic" in found.notes[0] and found.notes[0] in found.table()
    noisy.eval()
    assert fd.verdict_top(net(), top, images(N, D), target_every=(2,)).notes == []


# ---------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ((1.0, 12.0), ["12 times as much", "It pays from k = 2 on", "more than 11.8x as fast"]),
        ((1.0, 10.0, 0.1, 40.0), ["It pays from k = 8 on"]),
        (
            (1.0, 0.1, 0.5),
            ["does not pay at any k", "never run, a step would be 1.36x slower than"],
        ),
        ((1.0, 0.1, 0.1), ["does not pay at any k", "be not measurably different from backprop"]),
    ],
)
def test_the_sentence(times: Any, words: list[str]) -> None:
    found = tops.planted(*times)
    assert found.sentence().startswith("On 2 CPU threads a step of a net takes ")
    for said in words:
        assert said in found.sentence()
    report = json.loads(found.to_json())
    assert report["kind"] == "verdict top" and report["sentence"] == found.sentence()
    assert found.sentence() in as_text(blocks_of(found.report()))


def _race(shares: list[tuple[float | None, ...]]) -> Result:
    """A race in which arms come to backprop's end in these parts of its time, by seed."""
    runs = []
    arms = ["backprop", *(f"DNI k={i}" for i in range(len(shares)))]
    for seed in (0, 1):
        for name, parts in zip(arms, [(1.0, 1.0), *shares], strict=True):
            part = parts[seed]
            ends = 0.9 if part is None else 0.5
            history = [{"seconds": 0.0, "steps": 0, "loss": 1.0}]
            history += [{"seconds": part or 1.0, "steps": 9, "loss": ends}]
            if part is not None and part < 1.0:
                history.append({"seconds": 1.0, "steps": 10, "loss": ends})
            runs.append({"name": name, "seed": seed, "history": history, "diverged": False})
    settings = {"arms": arms, "seconds": 1.0, "seeds": [0, 1], "marks": 1, "device": "cpu"}
    facts = {"device": "a CPU", "threads": 1, "torch": "2", "commit": None}
    return Result("race", facts=facts, settings=settings, body={"runs": runs, "finished": True})


@pytest.mark.parametrize(
    ("top", "shares", "answer"),
    [
        (10.0, [(0.5, 0.6), (0.3, 0.4)], "So yes: DNI k=1."),
        (10.0, [(None, None)], "So no: a step takes less time, and less is learned in the same"),
        (10.0, [(0.5, None)], "So no: a step takes less time"),
        (0.01, [(None, None)], "DNI k=0. So no."),
    ],
)
def test_the_race_has_the_last_word(top: float, shares: Any, answer: str) -> None:
    assert answer in tops.planted(1.0, top, race=_race(shares)).sentence()
    unfinished = replace(_race(shares), body={"runs": [], "finished": False})
    found = tops.planted(1.0, top, race=unfinished)
    assert found.sentence().endswith("No seed of the race was finished.")
    assert "no seed was finished" in as_text(blocks_of(found.report()))


def test_tables_and_plots(tmp_path: Path) -> None:
    found = tops.planted(1.0, 10.0, race=_race([(0.5, 0.6)]))
    for table in (found.table(), found.table(markdown=True)):
        for name in (
            "b: what learns",
            "τ: what is above",
            "dense, k = 8",
            "dense, never",
            "DNI k=0",
        ):
            assert name in table
    assert found.plot(tmp_path / "both.png").stat().st_size > 1000
    found.race = None
    assert found.plot(tmp_path / "one.svg").stat().st_size > 1000


# ----------------------------------------------------------------------------- nothing is changed


class Watched(nn.Module):
    """A top with everything that could be changed: a normalisation's buffers, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(D), nn.Linear(D, 5)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(F.dropout(self.norm(h))), y)


def state(*modules: nn.Module) -> list[Any]:
    made: list[Any] = [torch.get_rng_state()]
    for whole in modules:
        for part in whole.modules():
            made += [part.training, *(b.clone() for b in part.buffers(recurse=False))]
            for p in part.parameters(recurse=False):
                made += [p.detach().clone(), p.grad, p.requires_grad]
    return made


def same(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("as_module", [True, False])
def test_nothing_that_was_given_is_changed(as_module: bool) -> None:
    bottom = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Dropout(), nn.Linear(D, D)).eval()
    watched = Watched()
    teacher = fd.LinearSynthesizer(D, 2, context_features=5)
    if not as_module:
        watched.requires_grad_(False)
    x, y = labelled()
    x.requires_grad_()
    before = state(bottom, watched, teacher)
    top = watched if as_module else (lambda h, y: watched(h, y))
    fd.verdict_top(bottom, top, (x, y), synthesizer=teacher, target_every=(2,), seconds=0.01)
    assert same(before, state(bottom, watched, teacher)) and x.grad is None
    with pytest.raises(VerdictError):
        fd.verdict_top(bottom, top, (x, y[:3]), synthesizer=teacher)
    assert same(before, state(bottom, watched, teacher))


def test_what_state_looks_at_can_change() -> None:
    watched, (x, y) = Watched(), labelled()
    before = state(watched)
    watched(x, y)
    assert not same(before, state(watched))


# -------------------------------------------------------------------------------------- bad input

LOOSE = nn.Linear(D, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bottom": square}, "bottom must be an nn.Module, got function"),
        ({"bottom": nn.Tanh()}, "bottom has no trainable parameters"),
        ({"bottom": fd.FusedDNILinear(D, D)}, "bottom is decoupled already"),
        ({"bottom": nn.Linear(D + 1, D)}, r"bottom does not take a batch of shape \[16, 8\]"),
        ({"bottom": nn.LSTM(D, D)}, "bottom must return one floating-point tensor .* got tuple"),
        ({"top": 3}, "top must be a module or a function, got int"),
        ({"top": nn.Linear(D, 5)}, r"top does not take \(h, Tensor\)"),
        ({"top": lambda h, x: h.square()}, r"top must return a scalar loss, got \[16, 8\]"),
        ({"top": lambda h, x: 3.0}, "top must return a scalar loss, got float"),
        ({"top": lambda h, x: x.square().mean()}, "does not depend on h"),
        ({"top": lambda h, x: h.detach().mean()}, "does not depend on h"),
        (
            {"top": lambda h, x: LOOSE(h).square().mean()},
            r"trains parameters that are not its own, of shapes \[5, 8\], \[5\]|\[5\], \[5, 8\]",
        ),
        ({"sample": torch.randn(N, D)}, r"sample must be a batch \(x, \*rest\).* got Tensor"),
        ({"sample": ()}, "got an empty one"),
        ({"sample": ("a", "b")}, r"got \(str, str\)"),
        ({"sample": (torch.randn(0, D), None)}, r"x must be a batch, got shape \[0, 8\]"),
        ({"synthesizer": "desne"}, "unknown synthesizer 'desne', did you mean 'dense'"),
        ({"synthesizer": "softmax"}, "'softmax' does not fit h of shape .* there are difference"),
        ({"synthesizer": "conv"}, "'conv' does not fit h of shape"),
        ({"synthesizer": None}, "a module, a name or several names, got NoneType"),
        ({"synthesizer": [nn.Linear(D, D)]}, "a module, a name or several names, got list"),
        ({"synthesizer": []}, "synthesizer must name at least one"),
        (
            {
                "synthesizer": fd.LinearSynthesizer(D, context_features=5),
                "sample": (torch.randn(N, D),),
                "top": square,
            },
            "context_features=5, and the sample holds no tensor behind x",
        ),
        ({"synthesizer": fd.LinearSynthesizer(D + 1)}, "with the synthesizer LinearSynthesizer"),
        ({"target_every": ()}, r"target_every must hold whole numbers from 1 on, got \(\)"),
        ({"target_every": (2, None)}, "target_every must hold whole numbers"),
        ({"seconds": 0.0}, "seconds must be positive and finite"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    given = {"bottom": net(), "top": Critic(), "sample": images(N, D), **arguments}
    modules = [m for m in given.values() if isinstance(m, nn.Module)]
    before = state(*modules)
    with pytest.raises(ValueError, match=message) as error:
        fd.verdict_top(**given)
    assert str(error.value).count("\n") == 0 and same(before, state(*modules))


# ------------------------------------------------------------------------------------ command line

FACTORIES = """
import torch, fused_dni as fd
from torch import nn
from top_mine import factory

calls = []
def made(batch, top=lambda h: h.mean(), *more): return nn.Linear(4, 4), top, batch, *more
def pairs(number): return (torch.randn(2, 4),)
def none_held(number):
    if number < 0: raise ValueError("no such batch")
    return pairs(number)
def alone(): return nn.Linear(4, 4)
def pair(): return nn.Linear(4, 4), torch.randn(2, 4)
def no_batch(): return made(torch.randn(2, 4))
def sampleless(): return made(lambda number: None)
def broken(): return made(lambda number: [][number])
def unheld(): return made(none_held)
def matrix(): return made(pairs, lambda h: h)
def told(): return *made(pairs), fd.DiagonalSynthesizer(4, context_features=3)
def odd(): return *made(pairs), "dense"
def stopped():
    calls.append(1)
    if len(calls) == 4: raise KeyboardInterrupt  # timing, two arms of a seed, the next seed
    return made(pairs)
"""
QUICK = ["--seconds", "0.02", "--threads", "1", "--quiet"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example of the help, as a user has it; its critic is smaller."""
    (tmp_path / "top_mine.py").write_text(EXAMPLE.replace("2048", "256"))
    (tmp_path / "top_others.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_of_the_help_works(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verdict", "top", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(line in shown for line in EXAMPLE.splitlines())
    argv = ["verdict", "top", "top_mine:factory", *QUICK, "--target-every", "2", "4"]
    assert cli.main([*argv, "--out", "v.json", "--plot", "v.png"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "difference, k = 4" in printed.out
    assert "On 1 CPU thread a step of top_mine:factory takes" in printed.out
    assert (folder / "v.png").stat().st_size > 1000
    report = load(folder / "v.json", "verdict top")
    assert report["race"] is None and report["facts"]["command"].startswith("fused-dni verdict top")
    assert cli.main(["report", "v.json", "-o", "v.html"]) == 0
    assert "<svg" in (folder / "v.html").read_text()


def test_the_example_of_the_docs_works() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "measuring.md").read_text("utf-8")
    code = page.split("## An expensive top")[1].split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    exec(compile(code, "docs/measuring.md", "exec"), found)
    bottom, top, batch = found["factory"]()
    assert list(make_subject(bottom, top, batch(0), "auto", RULE).synthesizers) == ["difference"]
    assert torch.equal(batch(3)[0], batch(3)[0]) and not torch.equal(batch(3)[0], batch(-1)[0])


def test_times_that_are_differences_are_no_times(tmp_path: Path) -> None:
    """A prediction that costs less than can be measured may come out below zero."""
    made = tops.planted(1.0, 10.0, prediction=-0.01).report()
    report = load(save(tmp_path / "top.json", made))
    assert all("prediction" not in name for name in results_of(report).rows)
    assert "-10.0 µs" in as_text(blocks_of(report))


def test_a_race_beside_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["verdict", "top", "top_mine:factory", *QUICK, "--race", "0.05", "--seeds", "4", "5"]
    argv += ["--warmup-steps", "2", "--synthesizers", "difference", "rank4", "--lr", "0.01"]
    assert cli.main([*argv, "--json", "--out", "v.json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((folder / "v.json").read_text())
    found = report["race"]
    assert found["finished"] and found["settings"]["seeds"] == [4, 5]
    assert found["settings"]["arms"] == [
        "backprop", "DNI k=4, difference", "DNI k=8, difference", "DNI k=4, rank4",
        "DNI k=8, rank4",
    ]  # fmt: skip
    # All arms of a seed begin at the same place, others elsewhere.
    starts = {run["seed"]: set() for run in found["runs"]}
    for run in found["runs"]:
        starts[run["seed"]].add(run["history"][0]["loss"])
    assert [len(losses) for losses in starts.values()] == [1, 1] and starts[4] != starts[5]
    assert cli.main(["report", "v.json", "-o", "v.html"]) == 0
    assert (folder / "v.html").read_text().count("<svg") == 2


def test_ctrl_c_in_a_race_keeps_what_was_found(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["verdict", "top", "top_others:stopped", *QUICK, "--race", "0.02", "--out", "v.json"]
    assert cli.main([*argv, "--target-every", "2"]) == 130
    line = capsys.readouterr().err
    assert "1 of 3 seeds were finished; that and the times of steps are in v.json" in line
    report = load(folder / "v.json", "verdict top")
    assert not report["race"]["finished"] and "Unfinished: 1 of 3" in as_text(blocks_of(report))
    sys.modules["top_others"].calls.clear()
    assert cli.main([*argv[:-2], "--target-every", "2"]) == 130  # with no file it is printed
    printed = capsys.readouterr()
    assert "a step of top_others:stopped takes" in printed.out
    assert printed.err == "\nfused-dni: stopped; 1 of 3 seeds were finished\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["top_mine"], "FACTORY must be package.module:factory, got 'top_mine'"),
        (["top_mine:factroy"], "unknown factory in top_mine 'factroy', did you mean 'factory'"),
        (["top_others:alone"], "must return (bottom, top, batch) or (bottom, top, batch, synth"),
        (["top_others:pair"], "got (Linear, Tensor)"),
        (["top_others:no_batch"], "must be a function: batch(number) returns (x, *rest)"),
        (["top_others:sampleless"], "sample must be a batch (x, *rest)"),
        (["top_others:broken"], "batch(0) failed: IndexError: list index out of range"),
        (["top_others:unheld", "--race", "1"], "batch(-1) failed: ValueError: no such batch"),
        (["top_others:matrix"], "top must return a scalar loss, got [2, 4]"),
        (["top_others:told"], "context_features=3, and the sample holds no tensor behind x"),
        (["top_others:told", "--synthesizers", "dense"], "brings its own synthesizer"),
        (["top_others:odd"], "the synthesizer of top_others:odd must be an nn.Module, got str"),
        (
            ["top_mine:factory", "--target-every", "0"],
            "every must be a whole number from 1 on",
        ),
        (["top_mine:factory", "--race", "0"], "race must be a positive, finite number"),
        (["top_mine:factory", "--plot", "v.txt"], "--plot must end in one of"),
        (["top_mine:factory", "--rac", "3"], "unknown option '--rac', did you mean '--race'"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(["verdict", "top", *words, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("fused-dni: error: ") and message in captured.err
