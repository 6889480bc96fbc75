"""Interfaces by depth: which layers are decoupled, and what is said about their gradients."""

import copy
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from clusters import clusters

import fused_dni as fd
from fused_dni.cli import main
from fused_dni.experiments import interfaces, nets
from fused_dni.experiments.interfaces import Settings
from fused_dni.experiments.run import Interrupted
from fused_dni.report import blocks_of, load
from fused_dni.report.blocks import Figure, Table, as_text
from fused_dni.report.files import as_json
from fused_dni.report.kinds import interfaces as interfaces_report
from fused_dni.report.progress import Progress
from fused_dni.report.schema import save
from fused_dni.rules import SGD

TINY = Settings(
    dataset="digits",
    depths=(1, 4),
    every=(1, 2, 4),
    steps=30,
    batches=2,
    hidden=12,
    batch_size=16,
    rank=2,
    seeds=(0, 1),
    backend="reference",
)


# Networks this small have nothing to share out.
pytestmark = pytest.mark.usefixtures("one_thread")


DATA = clusters()


@pytest.fixture(scope="module")
def report() -> dict:
    torch.set_num_threads(1)
    return interfaces.measure(TINY, DATA, command="here")


def test_every_network_is_there_once():
    assert TINY.networks() == [(1, 0), (4, 0), (1, 1), (4, 1), (4, 2), (4, 4)]
    assert replace(TINY, every=(2,)).networks()[2:] == [(1, 1), (4, 1), (4, 2)]


def test_chosen_layers_alone_are_decoupled():
    plain = nets.plain(10, 8, 4, 3)
    made = nets.fused(plain, synthetic=range(1, 4, 2), update=SGD(), context_features=3)
    assert [layer.synthesizer is not None for layer in made] == [False, True, False, True, False]


def test_exact_layers_below_an_interface_are_trained_by_it():
    """A layer without synthesizer moves by what the one above it sends down, and by nothing while
    that one predicts zero."""
    made = nets.fused(nets.plain(10, 8, 2, 3), synthetic=[1], update=SGD(0.1), context_features=3)
    lower = made[0].weight
    x, y = DATA.train.images[:16], DATA.train.labels[:16] % 3
    seen = [lower.detach().clone()]
    for _ in range(2):
        with fd.condition_on(y):
            torch.nn.functional.cross_entropy(made(x), y).backward()
        seen.append(lower.detach().clone())
    assert torch.equal(seen[0], seen[1])  # the synthesizer starts at zero
    assert not torch.equal(seen[1], seen[2])


def test_the_report_has_a_row_an_interface(report):
    assert report["kind"] == "interfaces" and report["version"] == 2
    layers = {
        (row["depth"], row["every"]): [at["layer"] for at in row["runs"][0]["layers"]]
        for row in report["networks"]
    }
    assert layers == {
        (1, 0): [],
        (4, 0): [],
        (1, 1): [1],
        (4, 1): [1, 2, 3, 4],
        (4, 2): [2, 4],
        (4, 4): [4],
    }
    for row in report["networks"]:
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        for run in row["runs"]:
            assert 0.0 <= run["error"] <= 1.0
            assert [at["above"] for at in run["layers"]] == [*range(len(run["layers"]))][::-1]
            for at in run["layers"]:
                assert -1.0 <= at["true_cosine"] <= 1.0 and at["true_norm_ratio"] > 0
                assert -1.0 <= at["arrived_cosine"] <= 1.0


def test_the_top_interface_alone_sees_the_true_gradient():
    """With one interface what arrives is the true gradient, so that both cosines speak of the same
    thing; a perfect start, zero, has no cosine at all."""
    settings = replace(TINY, depths=(1,), every=(1,), steps=200, lr=0.0, sg_lr=1e-2, seeds=(0,))
    (_, row) = interfaces.measure(settings, DATA)["networks"]
    (at,) = row["runs"][0]["layers"]
    assert at["true_cosine"] == pytest.approx(at["arrived_cosine"], abs=0.1)
    untrained = interfaces.measure(replace(settings, sg_lr=0.0), DATA)["networks"][1]
    (at,) = untrained["runs"][0]["layers"]
    assert at["true_cosine"] is None and at["true_norm_ratio"] == 0.0


def test_the_same_settings_give_the_same_numbers(report):
    again = interfaces.measure(replace(TINY, seeds=(1,)), DATA)
    for row, other in zip(report["networks"], again["networks"], strict=True):
        assert row["runs"][1] == other["runs"][0]


def test_a_report_is_read_and_shown(report, tmp_path):
    save(tmp_path / "r.json", report)
    blocks = blocks_of(load(tmp_path / "r.json", "interfaces"))
    tables = [block for block in blocks if isinstance(block, Table)]
    errors, cosines = tables[0], tables[1]
    assert [line[0] for line in errors.rows] == [
        "1 layer, an interface each",
        "4 layers, an interface each",
        "4 layers, an interface every 2",
        "4 layers, an interface every 4",
    ]
    assert [bool(cell) for cell in cosines.rows[2][1:]] == [False, True, False, True]
    first = report["networks"][3]
    mean = sum(run["layers"][0]["true_cosine"] for run in first["runs"]) / 2
    assert interfaces_report.mean_of(first, 1, "true_cosine") == pytest.approx(mean)
    figures = [block for block in blocks if isinstance(block, Figure)]
    assert [figure.name for figure in figures] == ["cosine-by-depth", "cosine-by-spacing"]
    assert all(figure.svg() == figure.svg() for figure in figures)


def test_a_gradient_that_was_zero_is_left_out(report):
    changed = copy.deepcopy(report)
    for row in changed["networks"]:
        for at in row["runs"][0]["layers"]:
            at["true_cosine"] = None
    row, was = changed["networks"][3], report["networks"][3]
    kept = was["runs"][1]["layers"][0]["true_cosine"]
    assert interfaces_report.mean_of(row, 1, "true_cosine") == kept
    shown = interfaces_report.blocks(changed)
    assert "4 layers" in as_text(shown)
    assert all(block.svg() for block in shown if isinstance(block, Figure))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": ()}, "depths must hold one at least"),
        ({"depths": (0,)}, "depths must be a whole number from 1 on"),
        ({"every": (3,)}, "every must divide the largest depth, 4"),
        ({"steps": 0}, "steps must be a whole number from 1 on, got 0"),
        ({"warmup": 1.0}, "warmup must be at least 0 and below 1"),
        ({"lr": float("nan")}, "lr must be"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_a_batch_larger_than_the_training_set():
    with pytest.raises(ValueError, match="batch_size 97 is larger than the training set"):
        interfaces.measure(replace(TINY, batch_size=97), DATA)


def test_defaults_of_a_dataset():
    assert (
        Settings.of("digits").steps == 500
        and Settings.of("mnist", depths=(2,), every=(1,)).steps == 1000
    )
    with pytest.raises(ValueError, match="did you mean 'mnist'"):
        Settings.of("mnits")


def test_the_command(tmp_path, capsys):
    out = tmp_path / "deep" / "r.json"
    command = ["interfaces", "--depths", "1", "2", "--every", "1", "--steps", "3", "--hidden", "8"]
    command += ["--batches", "1", "--seeds", "0", "--threads", "1", "--backend", "reference"]
    assert main([*command, "--quiet", "--out", str(out), "--json"]) == 0
    assert capsys.readouterr().out == as_json(load(out, "interfaces"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--every", "3"], "every must divide the largest depth, 8"),
        (["--depths", "0"], "depths must be a whole number from 1 on, got '0'"),
        (["--out", "."], "--out must be a file, . is a folder"),
        (["--depth", "3"], "unknown option '--depth', did you mean '--depths'"),
    ],
)
def test_the_command_refuses_in_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["interfaces", *argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and len(lines) == 1 and message in lines[0]


def test_a_stopped_comparison_goes_on_where_it_was(tmp_path):
    """Stopped in its fourth run; the rest is run and nothing else, and comes out the same."""
    settings = replace(TINY, depths=(1, 2), every=(1,), steps=6, batches=1)
    path = tmp_path / "r.json"

    class Impatient(Progress):
        def update(self, name: str, fraction: float, note: str = "") -> None:
            if name == "2 layers, an interface each, seed 0":
                signal.raise_signal(signal.SIGINT)

    whole = interfaces.measure(settings, DATA)
    with pytest.raises(Interrupted, match="3 of 8 runs were finished"):
        interfaces.measure(
            settings, DATA, keep=partial(save, path), progress=Impatient(enabled=False)
        )
    part = load(path, "interfaces")
    assert [len(row["runs"]) for row in part["networks"]] == [1, 1, 1, 0]
    assert "Unfinished: 3 runs so far." in as_text(blocks_of(part))
    kept = []
    found = interfaces.measure(
        settings, DATA, previous=part, keep=lambda r: kept.append(r["finished"])
    )
    assert kept == [False] * 5 + [True] and found["networks"] == whole["networks"]
    with pytest.raises(ValueError, match="is of other settings"):
        interfaces.measure(replace(settings, steps=7), DATA, previous=part)
