"""Recipes of synthetic gradients: which there are, what each changes, and that runs repeat."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from clusters import clusters
from torch import nn

import fused_dni as fd
from fused_dni import cli
from fused_dni.experiments import nets, recipes
from fused_dni.experiments.recipe_settings import BASES, PLAIN, RECIPES, Settings, recipe
from fused_dni.experiments.rival_trainers import StaleTrainer
from fused_dni.measure.errors import Interrupted
from fused_dni.report import as_text, blocks_of, load
from fused_dni.report.kinds import recipes as said
from fused_dni.report.schema import Result, save

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = clusters()
TINY = Settings(
    dataset="digits",
    recipes=("plain", "exact", "half+lessons", "cross-entropy+exact", "exact+automatic"),
    target_every=(2, 3),
    warmup=1.0,
    hidden=8,
    depth=2,
    batch_size=16,
    epochs=3,
    seeds=(0, 1),
)


@pytest.fixture(scope="module")
def report() -> Result:
    torch.set_num_threads(1)
    return recipes.compare(TINY, DATA, command="here")


# ------------------------------------------------------------------------------ names and settings


def test_recipes_change_what_they_say_and_may_be_joined() -> None:
    assert recipe("plain") == PLAIN
    assert recipe("cross-entropy+exact") == {**PLAIN, "synthesizer": "cross-entropy", "mix": 1.0}
    for name in RECIPES:
        changed = {part for part, value in recipe(name).items() if value != PLAIN[part]}
        assert changed == set(RECIPES[name].changes)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("exct", "unknown recipe 'exct'"),
        ("half+", "unknown recipe ''"),
        ("half+exact", "recipes half and exact do not go together: both change mix"),
        ("rank-4+mlp", "rank-4 and mlp do not go together"),
    ],
)
def test_unknown_recipes_and_combinations_are_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("+", r"\+")):
        replace(TINY, recipes=(name,))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_every": (4, 0)}, "target_every must be a whole number from 1 on, got 'never'"),
        ({"warmup": 3.0}, "warmup must be below epochs=3, got 3: all steps would be exact"),
        ({"warmup": -1.0}, "warmup must be a finite number from 0 on"),
        ({"recipes": ()}, "recipes must hold one"),
        ({"sg_lr": -1.0}, "sg_lr must be"),
        ({"update": "muno"}, "unknown update 'muno'"),
        ({"update": "muon"}, "update='muon' and lessons do not go together"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(TINY, **change)


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    out = str(tmp_path / "r.json")
    for words, message in (
        (["--recipes", "exct"], "unknown recipe"),
        (["--recipes", "half+exact"], "do not go together"),
        (["--target-every", "never"], "target_every must be"),
        (["--warmup", "9"], "warmup must be below"),
        (["--data", str(tmp_path / "nowhere")], "nowhere"),
    ):
        assert cli.main(["recipes", "--quick", "--out", out, *words]) in (1, 2)
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.strip().splitlines()
        assert line.startswith("fused-dni: error: ") and message in line
    assert not (tmp_path / "r.json").exists()


# ----------------------------------------------------------------------------------------- trainers


@pytest.mark.parametrize(
    ("name", "update"),
    [
        *[(name, "adam") for name in (*BASES, *RECIPES, "critic+exact+lessons")],
        *[(name, update) for name in (*BASES, "cross-entropy+exact") for update in ("sgd", "muon")],
        ("plain", "adamw"),
    ],
)
def test_every_recipe_trains(name: str, update: str) -> None:
    recipe_of = "plain" if name in BASES else name
    settings = replace(
        TINY, recipes=(recipe_of,), seeds=(0,), target_every=(2,), update=update, epochs=6, lr=0.02
    )
    run = recipes._run(name, 2, 0, settings, DATA, 6, lambda fraction: None)
    assert 0.0 <= run["error"] < 0.9
    again = recipes._run(name, 2, 0, settings, DATA, 6, lambda fraction: None)
    assert run == again


def test_a_recipe_reaches_the_layers() -> None:
    def made(name: str) -> Any:
        return recipes.build(name, 4, 0, TINY, DATA, 6)

    for name, expected in (("half+lessons", (0.5, 4)), ("plain", (0.0, 1)), ("exact", (1.0, 1))):
        schedule = made(name).schedule
        assert (schedule.mix, schedule.lessons, schedule.k) == (*expected, 4)
        assert schedule.warmup_steps == 6
    assert made("early").schedule.warmup_steps == 3
    assert made("automatic").schedule.target_every == "auto"
    for name, kind in (
        ("cross-entropy", fd.CrossEntropySynthesizer),
        ("critic", recipes.Critic),
        ("mlp", fd.MLPSynthesizer),
        ("averaged", recipes.Averaged),
        ("clipped", recipes.Clipped),
    ):
        assert all(type(m.synthesizer) is kind for m in list(made(name).model)[:-1])
    rates = [made(name).model[0].synthesizer_update.rule.lr for name in ("slower", "faster")]
    assert rates == [TINY.sg_lr / 3, 3 * TINY.sg_lr]
    assert made("rank-4").model[0].synthesizer.rank == 4
    assert made("dense").model[0].synthesizer.rank is None


def test_all_rows_start_from_the_same_weights() -> None:
    plain = nets.plain(DATA.features, 8, 2, DATA.classes, seed=5)
    wanted = [m.weight for m in plain if isinstance(m, nn.Linear)]
    for name in (*BASES, *RECIPES):
        model = recipes.build(name, 2, 5, TINY, DATA, 6).model
        mine = [m.weight for m in model if hasattr(m, "in_features")]
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


def test_a_critic_is_the_gradient_of_its_cross_entropy() -> None:
    m = recipes.Critic(5, 3).double()
    with torch.no_grad():
        m.gain.fill_(0.5)
    h = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randint(3, (6,))
    loss = 0.5 * nn.functional.cross_entropy(m.logits(h), y, reduction="sum")
    (expected,) = torch.autograd.grad(loss, h)
    torch.testing.assert_close(m(h.detach(), y), expected, rtol=1e-12, atol=1e-12)


def test_an_average_predicts_and_follows_what_learns() -> None:
    m = recipes.Averaged(fd.LinearSynthesizer(4, context_features=3), keep=0.75)
    h, y = torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)
    with torch.no_grad():
        m.live.bias.fill_(1.0)
        assert not m(h, y).any()
    assert torch.equal(m(h, y), m.live(h, y))  # with a graph: what learns
    with torch.no_grad():
        torch.testing.assert_close(m(h, y), torch.full((5, 4), 0.25))


def test_a_clipped_error_is_no_larger_than_the_mean_rows() -> None:
    error = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    clipped = recipes._clip_rows(error)
    torch.testing.assert_close(clipped, torch.tensor([[1.2, 1.6], [0.0, 1.0], [0.0, 0.0]]))


# --------------------------------------------------------------------------------------------- runs


def test_the_share_of_exact_steps_is_counted(report: Result) -> None:
    steps, warmup = 18, 6
    shares = {(run["name"], run["k"]): run["exact"] for run in report["runs"]}
    assert shares["backprop", None] == 1.0
    for k in (2, 3):
        assert shares["stale", k] == pytest.approx(-(-steps // k) / steps)
        assert shares["exact", k] == pytest.approx((warmup + -(-(steps - warmup) // k)) / steps)
        assert warmup / steps < shares["exact+automatic", k] < 1.0
    assert all(run["error"] < 0.9 for run in report["runs"])


@pytest.mark.parametrize("name", [*BASES, "cross-entropy+exact"])
def test_rules_and_rates(name: str) -> None:
    settings = replace(TINY, recipes=("plain",), update="muon", lr=0.02)
    trainer = recipes.build(name, 2, 0, settings, DATA, 6)
    muon, *adam = trainer.optimizer.param_groups
    hidden = [m.weight for m in list(trainer.model)[:-1]]
    assert [id(p) for p in muon["params"]] == [id(p) for p in hidden]
    rates = [group["lr"] for group in adam]
    assert rates == ([0.02, TINY.sg_lr] if name == "cross-entropy+exact" else [0.02])
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in trainer.model.parameters()}
    before = [p.clone() for p in hidden]
    for _ in range(18):
        trainer.step(*DATA.train)
    assert all(group["lr"] == pytest.approx(0.0) for group in trainer.optimizer.param_groups)
    assert all(not torch.equal(p, q) for p, q in zip(hidden, before, strict=True))
    if name != "stale":
        for update, kind in (("adamw", fd.AdamW), ("sgd", fd.SGD)):
            model = recipes.build(name, 2, 0, replace(settings, update=update), DATA, 6).model
            assert isinstance(model[0].update.rule, kind)


def test_stale_repeats() -> None:
    trainer = recipes.build("stale", 3, 0, TINY, DATA, 6)
    assert isinstance(trainer, StaleTrainer) and trainer.every == 3


def test_an_interrupted_report_is_gone_on_with_to_the_same(report: Result, tmp_path: Any) -> None:
    kept: list[Result] = []

    def until(found: Result) -> None:
        save(tmp_path / "r.json", found)
        kept.append(found)
        if len(kept) == 5:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        recipes.compare(TINY, DATA, keep=until, command="here")
    previous = load(tmp_path / "r.json")
    assert 0 < len(previous["runs"]) < len(report["runs"]) and not previous["finished"]
    again = recipes.compare(TINY, DATA, previous=previous, command="here")
    assert again["runs"] == report["runs"] and again["finished"]
    with pytest.raises(ValueError, match="settings"):
        recipes.compare(replace(TINY, epochs=2), DATA, previous=previous)


def test_what_the_report_says(report: Result) -> None:
    table = said.table(report)
    assert [line[0] for line in table.rows] == [*BASES, *TINY.recipes]
    assert table.header == ["row", "k=2", "k=3"]
    assert "row of least error" in said.sentence(report)
    runs = [
        {"name": "stale", "k": 2, "seed": 0, "error": 0.3, "exact": 0.5},
        {"name": "stale", "k": 2, "seed": 1, "error": 0.2, "exact": 0.5},
        {"name": "plain", "k": 2, "seed": 0, "error": 0.1, "exact": 0.5},
        {"name": "plain", "k": 2, "seed": 1, "error": 0.15, "exact": 0.7},
        {"name": "exact", "k": 2, "seed": 0, "error": 0.4, "exact": 0.5},
        {"name": "exact", "k": 2, "seed": 1, "error": 0.31, "exact": 0.5},
        {"name": "half", "k": 2, "seed": 0, "error": 0.1, "exact": 0.5},
    ]
    of = replace(report, body={**report.body, "runs": runs})
    assert said.against(of, "plain", "stale", 2) == "below"
    assert said.against(of, "exact", "stale", 2) == "above"
    assert said.against(of, "half", "stale", 2) == ""  # one seed has no range
    assert said.cell(of, "plain", 2) == "12.50 (10.00-15.00) *"
    assert said.cell(of, "exact", 2).endswith("!")
    assert said.cell(of, "half", 2) == "10.00" and said.cell(of, "half", 3) == "-"
    shares = {line[0]: line[1] for line in said.shares(of).rows}
    assert shares["plain"] == "60.0 %" and shares["backprop"] == "-"


def test_a_row_that_diverges_is_a_result() -> None:
    settings = replace(TINY, recipes=("plain",), target_every=(2,), seeds=(0,), lr=1e30)
    found = recipes.compare(settings, DATA, command="here")
    assert found["finished"] and all(run["diverged"] for run in found["runs"])
    assert all(line[1].endswith("1 diverged") for line in said.table(found).rows)
    assert "(1 diverged)" in said.sentence(found) and as_text(blocks_of(found))
    good = {"name": "exact", "k": 2, "seed": 0, "error": 0.99, "exact": 0.5}  # an older file's
    rows, runs = {**found["rows"], "exact": ""}, [*found["runs"], good]
    of = replace(found, body={**found.body, "rows": rows, "runs": runs})
    assert said.sentence(of).startswith("At k=2 the row of least error is exact, 99.00 %;")


def test_quick_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    out = tmp_path / "recipes.json"
    argv = ["recipes", "--quick", "--recipes", "exact", "--epochs", "2", "--hidden", "8",
            "--threads", "1", "--quiet", "--out", str(out)]  # fmt: skip
    assert cli.main(argv) == 0
    assert "Recipes on digits" in capsys.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["finished"] and len(found["runs"]) == 3
