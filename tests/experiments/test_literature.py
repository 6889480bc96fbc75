"""The paper's tables: what each arm is, what is counted, and what the report puts side by side."""

import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from clusters import clusters
from torch import nn

import fused_dni as fd
from fused_dni.cli import main
from fused_dni.experiments import literature, literature_clocks, train
from fused_dni.experiments.literature_settings import Run, Settings, every, exact_steps
from fused_dni.experiments.run import Interrupted
from fused_dni.report import blocks_of, load
from fused_dni.report.blocks import Figure, as_text
from fused_dni.report.kinds import literature as kind
from fused_dni.report.progress import Progress
from fused_dni.report.schema import save

TINY = Settings(
    dataset="digits",
    depths=(2, 3),
    depth=2,
    hidden=8,
    input_hidden=8,
    epochs=4,
    batch_size=16,
    rank=2,
    windows=(2,),
    digits=16,
    seeds=(0,),
    more_seeds=(1,),
)
DATA = clusters()
STEPS = 24

# Networks this small have nothing to share out.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def report():
    torch.set_num_threads(1)
    return literature.reproduce(TINY, DATA, command="here")


def test_every_run_is_there_once(report):
    runs = [Run(*(run[name] for name in Run._fields)) for run in report["runs"]]
    assert runs == TINY.runs() and len(set(runs)) == len(runs)
    arms = ["none", "backprop", "dni", "cdni", "cdni-cross-entropy", "recipe 0.25", "recipe 0.125"]
    assert [run.name for run in runs if (run.table, run.size, run.seed) == ("depth", 2, 0)] == arms
    more = [run for run in runs if run.seed == 1]
    assert {run.table for run in more} == {"depth"}
    assert [run.name for run in more] == ["backprop", "recipe 0.25", "recipe 0.125"] * 2
    assert report["finished"] and not any(run["diverged"] for run in report["runs"])
    assert all(run["history"][-1]["error"] == run["error"] for run in report["runs"])


@pytest.mark.filterwarnings("ignore:of 32 steps with targets none")  # the schedule runs alone
@pytest.mark.parametrize("share", [0.25, 0.125, 0.1, 1.0])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 24), (1, 24), (117, 2340), (90, 1000)])
def test_exact_steps_are_those_that_a_schedule_asks_for(share, warmup, steps):
    k = every(share, warmup, steps)
    layer = fd.FusedDNILinear(2, 2, synthesizer=fd.LinearSynthesizer(2))
    schedule = fd.Schedule(layer, warmup, k)
    asked = 0
    for _ in range(steps):
        asked += schedule.target
        schedule.step()
    assert asked == exact_steps(k, warmup, steps) <= share * steps
    assert k == 1 or exact_steps(k - 1, warmup, steps) > share * steps


def test_the_report_states_the_share(report):
    for run in report["runs"]:
        if run["name"].startswith("recipe"):
            limit = float(run["name"].split()[1])
            assert run["exact"] == exact_steps(run["every"], 1, STEPS) / STEPS <= limit
            assert f"{100 * run['exact']:.1f} % of the steps exact" in as_text(blocks_of(report))
        else:
            assert "exact" not in run


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_without_backprop_the_head_alone_moves(monkeypatch):
    seen = []

    def look(trainer, *_):
        before = weights(trainer.model)
        for _ in range(3):
            trainer.step(DATA.train.images[:16], DATA.train.labels[:16])
        moved = [
            not torch.equal(*pair) for pair in zip(before, weights(trainer.model), strict=True)
        ]
        seen.extend(moved)
        trainer.history.append({"error": 0.5})

    monkeypatch.setattr(literature, "epochs", look)
    literature._run(Run("depth", "none", 2, 0), TINY, DATA, lambda part: None)
    assert seen == [False] * 6 + [True] * 2


def _trainer(probability=None, epochs=4):
    training = replace(literature._training(TINY, 2), warmup_steps=2, epochs=epochs)
    made = train.build("cdni k=1", 0, training, DATA)
    return made if probability is None else literature._Sparse(made, probability)


def test_sparse_with_certainty_is_full():
    one, other = _trainer(), _trainer(1.0)
    for trainer in (one, other):
        for i in range(4):
            rows = slice(16 * i, 16 * i + 16)
            trainer.step(DATA.train.images[rows], DATA.train.labels[rows])
    for a, b in zip(weights(one.model), weights(other.model), strict=True):
        assert torch.equal(a, b)


def test_sparse_layers_move_each_for_itself_behind_the_warm_up():
    trainer = _trainer(0.5, epochs=20)  # the rate falls to zero at their end
    x, y = DATA.train.images[:16], DATA.train.labels[:16]
    patterns = []
    for _ in range(100):
        before = [layer.weight.detach().clone() for layer in trainer.model]
        trainer.step(x, y)
        now = [layer.weight for layer in trainer.model]
        patterns.append(tuple(not torch.equal(*p) for p in zip(before, now, strict=True)))
    assert patterns[:2] == [(True, True, True)] * 2
    assert len(set(patterns[2:])) == 8  # every combination of three layers
    shares = [sum(column) / 98 for column in zip(*patterns[2:], strict=True)]
    assert all(0.2 < share < 0.8 for share in shares)  # of 98 draws by one half: six deviations


def test_unlocked_layers_see_predictions_of_their_inputs():
    trainer = literature._Unlocked(_trainer(), DATA.features, TINY, STEPS)
    x, y = DATA.train.images[:16], DATA.train.labels[:16]
    assert [type(layer) for layer in trainer.model.rest] == [fd.SyntheticInput] * 2
    before = [weights(layer.model) for layer in trainer.model.rest]
    for _ in range(3):  # two of them warm-up
        trainer.step(x, y)
    for layer, was in zip(trainer.model.rest, before, strict=True):
        assert all(not torch.equal(a, b) for a, b in zip(weights(layer.model), was, strict=True))
    seen = []
    trainer.model.rest[0].module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        predicted = trainer.model.rest[0].model(x)
    trainer.step(x, y)
    torch.testing.assert_close(seen[0], predicted)


def test_counts_of_a_window():
    labels = torch.tensor([[[3], [4]], [[7], [3]]])  # [T, T, N]
    odd, threes = literature_clocks.counts(labels)
    assert odd.tolist() == [[1], [2]] and threes.tolist() == [[1], [1]]


@pytest.mark.parametrize("name", ["waits", "dni", "cdni", "alone"])
def test_who_learns_at_two_clocks(name):
    pair = literature_clocks._Pair(name, 2, 0, DATA.features, 8)
    generator = torch.Generator().manual_seed(0)
    batch = literature_clocks.draw(DATA.train, 2, 8, generator)
    parts = {"encoder": pair.lower.encoder, "odd": pair.lower.odd, "upper": pair.upper}
    before = {part: weights(module) for part, module in parts.items()}
    message = pair.lower.message.weight.detach().clone()
    for _ in range(2):  # synthesizers predict zero before their first lesson
        pair.step(*batch)
    assert pair.updates == (2 if name == "waits" else 4)
    for part, module in parts.items():
        moved = [not torch.equal(*p) for p in zip(before[part], weights(module), strict=True)]
        assert all(moved), part
    assert torch.equal(message, pair.lower.message.weight) == (name == "alone")


def test_what_waits_descends_the_sum_of_both_losses():
    pair = literature_clocks._Pair("waits", 2, 0, 10, 8)
    pair.lower.double(), pair.upper.double()
    images, labels = literature_clocks.draw(DATA.train, 2, 8, torch.Generator().manual_seed(0))
    images = images.double()
    pair.step(images, labels)
    got = [p.grad.clone() for p in pair.lower.parameters()]

    fresh = literature_clocks._Pair("waits", 2, 0, 10, 8)
    fresh.lower.double(), fresh.upper.double()
    odd, threes = literature_clocks.counts(labels)
    states = [fresh.lower(part) for part in images]
    losses = [fresh._odd_loss(*of) for of in zip(states, odd, strict=True)]
    loss = torch.stack(losses).sum()  # as of the T updates of the other arms together
    sent = torch.stack([fresh.lower.message(state) for state in states])
    loss = loss + nn.functional.cross_entropy(fresh.upper(sent), threes.sum(0))
    exact = torch.autograd.grad(loss, list(fresh.lower.parameters()))
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_one_evaluation_is_after_as_many_updates_as_what_waits_has():
    settings = replace(TINY, windows=(4,), digits=16 * 375)
    ends = {}
    for name in ("waits", "alone"):
        with pytest.MonkeyPatch.context() as patch:
            # What is counted, without the training.
            patch.setattr(literature_clocks._Pair, "step", _count)
            patch.setattr(literature_clocks._Pair, "errors", lambda self, *_: (0.0, 0.0))
            patch.setattr(literature_clocks, "draw", lambda *_: (None, None))
            made = literature_clocks.train(name, 4, 0, settings, DATA, lambda _: None)
            ends[name] = [row["updates"] for row in made["history"]]
    most = ends["waits"][-1]
    assert most == 375 and most - 4 < max(n for n in ends["alone"] if n <= most)


def _count(pair, *_):
    pair.updates += 1 if pair.name == "waits" else pair.window


def test_the_same_settings_give_the_same_numbers(report):
    again = literature.reproduce(replace(TINY, tables=("clocks", "sparse"), more_seeds=()), DATA)
    for run in again["runs"]:
        assert run in report["runs"]


def test_a_report_is_read_and_shown(report, tmp_path):
    save(tmp_path / "r.json", report)
    found = load(tmp_path / "r.json", "literature")
    said = as_text(blocks_of(found))
    for part in ("- published", "Sparse updates", "Full unlock", "T=2, cdni", "about 2"):
        assert part in said
    figures = [block for block in blocks_of(found) if isinstance(block, Figure)]
    assert [figure.name for figure in figures] == [
        "depth-error-vs-steps",
        "sparse-error-vs-steps",
        "unlock-error-vs-steps",
        "clocks-2",
    ]
    assert all(figure.svg() for figure in figures)


def test_differences_are_paired_by_seed(report):
    recipe = kind.errors(report, "depth", "recipe 0.25", 3)
    exact = kind.errors(report, "depth", "backprop", 3)
    assert list(recipe) == list(exact) == [0, 1]
    found = kind.differences(report, "depth", "recipe 0.25", "backprop", 3)
    assert found == [recipe[0] - exact[0], recipe[1] - exact[1]]
    assert len(kind.differences(report, "depth", "cdni", "backprop", 3)) == 1


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    settings = replace(TINY, tables=("sparse", "clocks"), epochs=2)
    path = tmp_path / "r.json"

    class Impatient(Progress):
        def update(self, name: str, fraction: float, note: str = "") -> None:
            if name.startswith("clocks 2 cdni"):
                signal.raise_signal(signal.SIGINT)

    whole = literature.reproduce(settings, DATA)
    with pytest.raises(Interrupted, match="4 of 6 runs were finished"):
        literature.reproduce(
            settings, DATA, keep=partial(save, path), progress=Impatient(enabled=False)
        )
    part = load(path, "literature")
    assert "Unfinished: 4 runs so far." in as_text(blocks_of(part))
    assert literature.reproduce(settings, DATA, previous=part)["runs"] == whole["runs"]
    with pytest.raises(ValueError, match="is of other settings"):
        literature.reproduce(replace(settings, epochs=3), DATA, previous=part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": ("dpeth",)}, "did you mean 'depth'"),
        ({"tables": ()}, "tables must hold one at least"),
        ({"exact": (0.05,)}, r"exact must be above warmup=0.05, whose steps are exact, got 0.05"),
        ({"digits": 3}, "digits must be at least 4 for a window of 2, got 3"),
        ({"probability": 0.0}, "probability must be above 0 and at most 1"),
        ({"mix": 1.5}, "mix must be a finite number from 0 to 1"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_a_batch_larger_than_the_training_set():
    with pytest.raises(ValueError, match="batch_size 97 is larger than the training set"):
        literature.reproduce(replace(TINY, batch_size=97), DATA)


@pytest.mark.slow
def test_the_command_of_a_few_seconds(tmp_path, capsys):
    out = tmp_path / "literature.json"
    argv = ["literature", "--quick", "--quiet", "--out", str(out), "--threads", "1"]
    assert main(argv) == 0
    assert "points against backprop" in capsys.readouterr().out
    before = out.read_bytes()
    assert main([*argv, "--resume", "--epochs", "3"]) == 2
    assert "is of other settings" in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tables", "dpeth"], "unknown table 'dpeth', did you mean 'depth'"),
        (["--exact", "0.01"], "exact must be above warmup=0.05"),
        (["--data", "nowhere"], "data folder nowhere does not exist"),
        (["--data", "."], "train-images-idx3-ubyte.gz (or train-images-idx3-ubyte) is not in ."),
        (["--resume"], "cannot read"),
    ],
)
def test_the_command_refuses_in_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["literature", "--quiet", *argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and len(lines) == 1 and message in lines[0]
