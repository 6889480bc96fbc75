"""Late gradients: which arms there are, what rivals' optimizers do, and that runs repeat."""

import copy
from dataclasses import replace

import pytest
import torch
from clusters import clusters
from torch import nn

from fused_dni.cli import main
from fused_dni.distributed import Twin
from fused_dni.experiments import delay, delay_arms
from fused_dni.experiments.delay_arms import UpdateFeedback, build
from fused_dni.experiments.delay_settings import TASKS, Settings, arm
from fused_dni.report import blocks_of, load
from fused_dni.report.blocks import Figure, Table, as_text
from fused_dni.report.kinds import delay as delay_report
from fused_dni.report.schema import save

ARMS = ("backprop", "stale", "stale-warm", "nesterov", "feedback", "local", "cdni-2",
        "cdni-dense-every-3", "cdni-mlp", "cdni-2-unconditioned", "cdni-2-true")  # fmt: skip
TINY = Settings(
    dataset="digits",
    arms=ARMS,
    lags=(0, 2),
    hidden=8,
    depth=3,
    code=3,
    batch_size=16,
    epochs=2,
    rates=(3e-3,),
    warmup=0.25,
    seeds=(0, 1),
)
SOME = replace(TINY, arms=("backprop", "stale", "local", "cdni-2"), rates=(1e-4, 3e-3))
DATA = clusters()

# Networks this small have nothing to share out.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def report() -> dict:
    torch.set_num_threads(1)
    return delay.compare(SOME, DATA, command="here")


# -------------------------------------------------------------------------------- arms and stages


def test_names_of_arms_say_what_they_are():
    assert arm("stale").mode == arm("nesterov").mode == arm("feedback").mode == "stale"
    assert (arm("backprop").mode, arm("local").mode) == ("exact", "local")
    found = arm("cdni-dense-every-5-unconditioned")
    assert found[1:] == ("cdni", "dense", 5, False, "bootstrapped") and found.mode == "decoupled"
    assert arm("cdni-2-true")[2:] == ("2", 1, True, "true")
    assert [arm(name).relayed for name in ("stale", "cdni-2-true", "cdni-2", "local")] == [
        *(True, True),
        *(False, False),
    ]
    assert [arm(name).late for name in ("backprop", "local", "stale", "cdni-4")] == [
        *(False, False),
        *(True, True),
    ]
    for wrong in ("cdni", "cdni-0", "cdni-R", "cdni-4-every-0", "stale-2"):
        with pytest.raises(ValueError, match="unknown arm"):
            arm(wrong)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arms": ()}, "arms must hold one"),
        ({"lags": (-1,)}, "lags must be a whole number from 0 on, got -1"),
        ({"stages": 4}, "depth must be at least 4, a hidden layer for each of the stages, got 3"),
        ({"task": "sorting"}, "unknown task"),
        ({"warmup": 1.0}, "warmup must be"),
        ({"rates": (0.0,)}, "positive"),
    ],
)
def test_settings_out_of_range_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        replace(TINY, **change)


@pytest.mark.parametrize("task", TASKS)
def test_all_arms_start_from_the_same_weights(task):
    settings = replace(TINY, task=task)
    before = torch.random.get_rng_state()
    wanted = None
    for name in ARMS:
        stages = build(arm(name), settings, DATA, 3)
        layers = [m for stage in stages[:-1] for m in stage.submodule.modules()]
        layers += list(stages[-1].modules())
        mine = [m.weight for m in layers if isinstance(m, nn.Linear)]
        if arm(name).synthesizer == "mlp":
            mine = [mine[0], mine[1], mine[-2], mine[-1]]
        wanted = mine if wanted is None else wanted
        assert len(mine) == 4
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))
    assert torch.equal(before, torch.random.get_rng_state())


def test_layers_are_shared_out_from_the_first_stage_on():
    stages = build(arm("backprop"), replace(TINY, depth=5, stages=3), DATA, 0)
    counts = [sum(isinstance(m, nn.Linear) for m in stage.modules()) for stage in stages]
    assert counts == [2, 2, 2]  # the last with the head


# -------------------------------------------------------------------------------------- optimizers


def test_update_feedback_follows_its_formula():
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = UpdateFeedback(torch.optim.SGD([p], lr=0.5), c=2.0)
    x, before = p.detach().clone(), None
    for gradient in ([1.0, 2.0], [0.5, -1.0], [0.0, 4.0]):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        u = 0.5 * torch.tensor(gradient, dtype=torch.float64)
        x = x - u - 2.0 * (u - (u if before is None else before))
        before = u
        torch.testing.assert_close(p.detach(), x, rtol=1e-14, atol=1e-14)
    optimizer.zero_grad()
    assert p.grad is None


def test_a_parameter_without_gradient_is_left_alone():
    p = nn.Parameter(torch.ones(2))
    optimizer = UpdateFeedback(torch.optim.Adam([p], 0.1))
    optimizer.step()
    assert torch.equal(p, torch.ones(2))


def test_synthesizers_have_a_rate_of_their_own():
    stages = build(arm("cdni-2"), TINY, DATA, 0)
    layers, synthesizers = delay_arms.optimizer_of(arm("cdni-2"), stages, 0.1, 0.5).param_groups
    assert (layers["lr"], synthesizers["lr"]) == (0.1, 0.05)
    every = {id(p) for stage in stages for p in stage.parameters()}
    assert {id(p) for p in layers["params"] + synthesizers["params"]} == every
    assert {id(p) for p in synthesizers["params"]} == {
        id(p) for p in stages[0].decoupled.synthesizer.parameters()
    }


# -------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains_and_repeats(name, task):
    settings = replace(TINY, task=task)
    lag = 2 if arm(name).late else None
    first, again = (delay.train(arm(name), lag, 0, settings, DATA, 3e-3) for _ in range(2))
    assert first == again and not first["diverged"]
    untrained = delay.error(build(arm(name), settings, DATA, 0), settings, DATA.test)
    assert first["error"] != untrained
    assert len(first["cosines"]) == (1 if arm(name).mode == "decoupled" else 0)


@pytest.mark.parametrize("name", ["stale", "cdni-2", "cdni-2-true"])
def test_what_passes_several_cuts_is_as_many_times_as_late(name, monkeypatch):
    made = []
    monkeypatch.setattr(delay, "Twin", lambda *a, **k: made.append(Twin(*a, **k)) or made[-1])
    settings = replace(TINY, stages=3, warmup=0.0)
    for each in (False, True):
        delay.train(arm(name), 2, 0, replace(settings, each_cut=each), DATA, 3e-3)
    ages = [[worker.ages.oldest for worker in twin.workers[:-1]] for twin in made]
    assert ages == [[2, 2], [2, 2] if name == "cdni-2" else [4, 2]]
    lowest = [dict(twin.workers[0].stage.named_parameters()) for twin in made]
    same = [torch.equal(p, lowest[1][key]) for key, p in lowest[0].items()]
    assert all(same) if name == "cdni-2" else not any(same)


def test_a_warm_up_alone_is_backprop():
    """Stages that wait all along, with late gradients or synthesizers, are trained as by backprop.

    To 1e-4 of an error: what a gradient that waits goes through is rounded differently.
    """
    settings = replace(TINY, task="reconstruction", warmup=0.999)
    wanted = delay.train(arm("backprop"), None, 0, settings, DATA, 1e-2)["error"]
    for name in ("stale-warm", "cdni-2"):
        waited = delay.train(arm(name), 2, 0, settings, DATA, 1e-2)["error"]
        assert waited == pytest.approx(wanted, rel=1e-4)
    stale = delay.train(arm("stale"), 2, 0, settings, DATA, 1e-2)["error"]
    assert stale != pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("name", ["backprop", "local", "stale", "cdni-2"])
def test_behind_a_frozen_top_the_last_stage_alone_stays_as_it_was(name, monkeypatch):
    settings, made = replace(TINY, task="frozen-top"), []
    monkeypatch.setattr(delay, "build", lambda *given: made.append(build(*given)) or made[-1])
    lag = 2 if arm(name).late else None
    delay.train(arm(name), lag, 0, settings, DATA, 1e-2)
    before = build(arm(name), settings, DATA, 0)
    for stage, old in zip(made[0], before, strict=True):
        same = [torch.equal(a, b) for a, b in
                zip(stage.parameters(), old.parameters(), strict=True)]  # fmt: skip
        assert all(same) if stage.is_last else not any(same)


def test_a_local_loss_does_not_see_a_frozen_top():
    settings, many = replace(TINY, task="frozen-top", hidden=64, epochs=4), clusters(1600, 200)
    found = {
        name: delay.train(arm(name), None, 0, settings, many, 1e-2)["error"]
        for name in ("backprop", "local")
    }
    assert found["backprop"] < 0.1 < 0.4 < found["local"], found


def test_a_reconstruction_by_nothing_leaves_all_variance():
    settings = replace(TINY, task="reconstruction")
    stages = build(arm("backprop"), settings, DATA, 0)
    with torch.no_grad():
        stages[-1].submodule[-1].weight.zero_()
        stages[-1].submodule[-1].bias.copy_(DATA.test.images.mean(0))
    assert delay.error(stages, settings, DATA.test) == pytest.approx(1.0, rel=1e-5)


def test_what_no_lag_changes_runs_once(report):
    jobs = [(run["name"], run["lag"], run["seed"]) for run in report["runs"]]
    assert len(jobs) == len(set(jobs)) == 2 * (2 + 2 * 2)
    assert {lag for name, lag, _ in jobs if name in ("backprop", "local")} == {None}
    assert {lag for name, lag, _ in jobs if name in ("stale", "cdni-2")} == {0, 2}


def test_without_lag_late_gradients_are_backprop(report):
    stale = [run["error"] for run in report["runs"] if (run["name"], run["lag"]) == ("stale", 0)]
    exact = [run["error"] for run in report["runs"] if run["name"] == "backprop"]
    assert stale == exact


def test_rates_are_chosen_by_family_and_lag(report):
    tried = {(row["family"], row["lag"], row["rate"]) for row in report["tuning"]}
    families = [("backprop", None), ("local", None)]
    families += [(name, lag) for name in ("stale", "cdni") for lag in (0, 2)]
    assert tried == {(*family, rate) for family in families for rate in SOME.rates}
    for run in report["runs"]:
        family = arm(run["name"]).family
        rows = [r for r in report["tuning"] if (r["family"], r["lag"]) == (family, run["lag"])]
        assert run["rate"] == min(rows, key=lambda r: r["error"])["rate"]


def test_an_interrupted_report_goes_on(report):
    kept = []
    whole, part = report, copy.deepcopy(report)
    part.body.update(runs=whole["runs"][:5], tuning=whole["tuning"][:7], finished=False)
    found = delay.compare(SOME, DATA, previous=part, keep=lambda r: kept.append(len(r["runs"])))
    assert found["finished"] and kept[0] == 5 and kept[-1] == 12
    assert found["runs"] == whole["runs"]
    with pytest.raises(ValueError, match="of other settings: epochs was .*, and is 3 now"):
        delay.compare(replace(SOME, epochs=3), DATA, previous=part)


def test_a_batch_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="batch_size 81 is larger"):
        delay.compare(replace(SOME, batch_size=81), DATA)


# ------------------------------------------------------------------------------------------ report


def test_the_report_says_who_is_better(report):
    made = copy.deepcopy(report)
    for run in made["runs"]:
        run["error"] = {"backprop": 0.01, "stale": 0.04, "local": 0.02, "cdni-2": 0.02}[run["name"]]
        run["error"] += 0.001 * run["seed"]
    said = delay_report.sentence(made)
    assert said == (
        "At a lag of 2, cdni-2 by the ranges of 2 seeds: better than stale; worse than backprop; "
        "overlapping local."
    )
    rows = delay_report.table(made).rows
    assert rows[1] == ["stale", "4.05 (4.00-4.10)", "4.05 (4.00-4.10)"]


def test_a_report_is_read_finished_or_not(report, tmp_path):
    for runs in (report["runs"], report["runs"][:1], []):
        path = tmp_path / "delay.json"
        save(path, replace(report, body={**report.body, "runs": runs, "finished": False}))
        said = blocks_of(load(path, "delay"))
        assert "Unfinished" in as_text(said)
        assert any(isinstance(block, Table) for block in said)
        assert any(isinstance(block, Figure) for block in said) == bool(runs)
        for block in said:
            if isinstance(block, Figure):
                assert "<svg" in block.svg()


def test_the_command_of_a_few_seconds(tmp_path, capsys):
    out = tmp_path / "delay.json"
    argv = ["delay", "--quick", "--quiet", "--out", str(out)]
    argv += ["--arms", "stale", "cdni-4", "--epochs", "1", "--lags", "3"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    found = load(out, "delay")
    assert found["finished"] and [run["name"] for run in found["runs"]] == ["stale", "cdni-4"]
    assert "At a lag of 3, cdni-4 by the ranges of 1 seed" in printed
    assert main([*argv, "--resume"]) == 0
    assert load(out, "delay")["runs"] == found["runs"]
    assert main(["delay", "--quick", "--arms", "stael", "--out", str(out)]) == 2
    assert "did you mean 'stale'" in capsys.readouterr().err
