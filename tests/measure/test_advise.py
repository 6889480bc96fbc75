"""Advice on whole models: predicted beside measured, honest words, one line for what is wrong."""

import copy
import json

import flops
import pytest
import torch
from torch import nn

import fused_dni as fd
from fused_dni import cli
from fused_dni.measure import timing
from fused_dni.measure.advise import AdviceError
from fused_dni.measure.advise.predict import BACKWARD, OPTIMIZER
from fused_dni.measure.timing import Timing
from fused_dni.report import load
from fused_dni.report.blocks import Figure, as_text
from fused_dni.report.kinds.advice import sentence
from fused_dni.report.layout import blocks_of as blocks
from fused_dni.report.timings import Ratio
from models import convnet, lstm_lm, mlp

TINY = {
    "mlp": lambda: mlp(width=16, depth=2, batch=8),
    "convnet": lambda: convnet(channels=4, size=8, batch=4),
    "lstm_lm": lambda: lstm_lm(symbols=11, features=4, hidden=8, window=3, batch=2),
}
QUICK = {"seconds": 0.02, "backend": "reference"}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def _once(candidates, *, progress, **limits):
    """In place of ``timing.compare``: every candidate runs once, and takes a millisecond; what a
    step pays once takes a hundredth."""
    for call in candidates.values():
        call()
    progress(1.0)
    took = {name: 1e-5 if name in (BACKWARD, OPTIMIZER) else 1e-3 for name in candidates}
    return {name: Timing.of(name, (t,) * 8, (t,) * 8, 1) for name, t in took.items()}


@pytest.fixture
def untimed(monkeypatch):
    monkeypatch.setattr(timing, "compare", _once)


@pytest.mark.parametrize("model", TINY)
def test_what_is_predicted_stands_beside_what_is_measured(model, untimed):
    module, sample, loss = TINY[model]()
    before = copy.deepcopy(module.state_dict())
    drawn = torch.random.get_rng_state()
    module.eval()
    found = fd.advise(module, sample, loss, classes=3, **QUICK)
    assert not module.training and all(p.grad is None for p in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.random.get_rng_state(), drawn)

    report = found.report
    assert json.loads(found.to_json())["kind"] == "advice" and report.version == 2
    assert {"stock backprop", "our kernels"} < set(report["steps"])
    forced = "everywhere" if "everywhere" in report["steps"] else "proposal"
    assert report[forced]["interfaces"]
    for name, step in report["steps"].items():
        drifted, measured = step["predicted"].median, step["measured"].median
        assert step["error %"] == pytest.approx(100 * (drifted / measured - 1)), name
        held = step["memory"]
        assert held["predicted"] > 0 and held["measured"] > 0
    shown = as_text(blocks(report))
    assert found.table() == shown and found.sentence() == sentence(report) in shown
    for block in report["blocks"]:
        assert block["name"] in shown
    assert sum(block["parameters"] for block in report["blocks"]) == sum(
        p.numel() for p in module.parameters()
    )


def test_memory_is_predicted_well_where_nothing_else_runs(untimed):
    """Bytes do not depend on the machine's load."""
    found = fd.advise(*mlp(width=64, depth=3, batch=32), **QUICK)
    for name, step in found.report["steps"].items():
        assert abs(step["memory"]["error %"]) < 25, (name, step["memory"])


class _Dear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        burn = torch.ones(64, 64)
        for _ in range(40):
            burn = burn @ burn / 64
        return grad


class DearBackward(nn.Module):
    """Nothing in the forward, many times the rest of the step in the backward."""

    def forward(self, x):
        return _Dear.apply(x)


def _by_work(candidates, *, progress, **limits):
    """As :func:`_once`, and a nanosecond more an operation."""
    found = {}
    for name, timed in _once(candidates, progress=progress).items():
        taken = (timed.median + 1e-9 * flops.flops(candidates[name]),) * 8
        found[name] = Timing.of(name, taken, taken, 1)
    return found


def test_a_planted_backward_above_an_interface_is_found(monkeypatch):
    monkeypatch.setattr(timing, "compare", _by_work)

    def advised(between):
        module = nn.Sequential(nn.Linear(8, 8), between, nn.Linear(8, 2))
        return fd.advise(module, torch.randn(4, 8), seconds=0.02).report

    assert advised(nn.Identity())["proposal"] is None
    report = advised(DearBackward())
    assert [one["block"] for one in report["proposal"]["interfaces"]] == ["0"]
    assert report["proposal"]["k"] > 1, "with targets on every step nothing is saved"
    assert "Proposal: an interface behind 0 (" in sentence(report)


def test_an_expensive_top_is_proposed_in_words(untimed):
    critic = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).requires_grad_(False)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), critic)
    found = fd.advise(model, torch.randn(4, 8), lambda h: h.square().mean(), **QUICK)
    assert found.report["expensive top"]["blocks"] == ["2.0", "2.1", "2.2", "2.3", "loss"]
    words = "There is an expensive top: 2.0 to loss takes 5.00 times as long as what learns below."
    assert words in found.sentence()
    assert "3.69x faster than stock backprop, at most 6.00x" in found.sentence()  # 6 / (1 + 5/8)
    module, sample, loss = TINY["mlp"]()
    cheap = fd.advise(module, sample, loss, **QUICK)
    assert cheap.report["expensive top"] is None and "expensive" not in cheap.sentence()


def test_all_proposes_every_block_whether_or_not_it_pays(untimed):
    report = fd.advise(*TINY["convnet"](), all_blocks=True, **QUICK).report
    named = [one["block"] for one in report["proposal"]["interfaces"]]
    assert named == ["0", "4", "8", "13"]
    assert set(report["steps"]) == {"stock backprop", "our kernels", "proposal"}
    assert "asked for, whether or not it pays" in sentence(report)


# ------------------------------------------------------------------------------------------- words


def _ratio(median: float) -> Ratio:
    return Ratio(median, median, median)


@pytest.fixture(scope="module")
def report() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "compare", _once)
        return fd.advise(*TINY["mlp"](), all_blocks=True, **QUICK).report


@pytest.mark.parametrize(
    ("ours", "proposal", "words"),
    [
        (
            0.8,
            0.5,
            ["1.25x faster than stock", "2.00x faster than"],
        ),
        (1.5, 1.2, ["So no interface pays: keep stock backprop."]),
        (1.0, 1.0, ["keep backprop on our kernels"]),
    ],
)
def test_the_sentence_says_what_was_measured(report, ours, proposal, words):
    report = copy.deepcopy(report)
    report["ratios"]["stock backprop"]["our kernels"]["measured"] = _ratio(ours)
    report["ratios"]["our kernels"]["proposal"]["measured"] = _ratio(proposal)
    for word in words:
        assert word in sentence(report)


def test_where_nothing_pays_the_advice_is_to_keep_backprop(report):
    report = copy.deepcopy(report)
    report["steps"]["everywhere"] = report["steps"].pop("proposal")
    report.body["proposal"] = None
    for ratios in report["ratios"].values():
        ratios["everywhere"] = ratios.pop("proposal")
    report["ratios"]["stock backprop"]["our kernels"]["measured"] = _ratio(0.9)
    report["ratios"]["our kernels"]["everywhere"]["measured"] = _ratio(1.3)
    said = sentence(report)
    assert "So no interface pays: keep backprop on our kernels." in said
    assert "1.30x slower than backprop on our kernels" in said


def test_figures_draw(report):
    (figure,) = (block for block in blocks(report) if isinstance(block, Figure))
    assert "<svg" in figure.svg()


# --------------------------------------------------------------------------------------- bad input


class _Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x):
        return self.layer(x), x


@pytest.mark.parametrize(
    ("module", "sample", "loss", "message"),
    [
        (
            nn.Sequential(nn.Linear(8, 2)),
            torch.randn(4, 7),
            None,
            "does not take a sample of shape",
        ),
        (nn.Sequential(nn.Linear(8, 2)), torch.empty(0, 8), None, "sample must be a batch"),
        (nn.Sequential(nn.Linear(8, 2)), "x", None, "sample must be a tensor, got str"),
        (nn.Sequential(nn.Linear(8, 2)), torch.randn(4, 8), 3, "loss must be callable or None"),
        (nn.Sequential(nn.Linear(8, 2)), torch.randn(4, 8), lambda h: h, "loss must be a scalar"),
        (nn.Sequential(nn.ReLU()), torch.randn(4, 8), None, "no trainable parameters"),
        (nn.Embedding(9, 8), torch.arange(4), None, "nothing in the model can be converted"),
        (_Pair(), torch.randn(4, 8), None, "must return one tensor, got tuple"),
        (fd.FusedDNILinear(8, 2), torch.randn(4, 8), None, "decoupled already"),
        ("mlp", torch.randn(4, 8), None, "model must be an nn.Module, got str"),
    ],
    ids=range(10),
)
def test_what_cannot_be_advised_on_says_why(module, sample, loss, message):
    with pytest.raises(AdviceError, match=message):
        fd.advise(module, sample, loss, **QUICK)


def test_budgets_and_classes_are_checked():
    module, sample, loss = TINY["mlp"]()
    with pytest.raises(ValueError, match="seconds must be positive and finite, got 0"):
        fd.advise(module, sample, loss, seconds=0)
    with pytest.raises(ValueError, match="classes must be at least 0, got -1"):
        fd.advise(module, sample, loss, classes=-1)


# ------------------------------------------------------------------------------------ command line

FACTORIES = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

def whole():
    return model(), torch.randn(4, 8), lambda h: h.square().mean()

def broken():
    raise RuntimeError("the data set is not there")

def number():
    return 3

def pair_of_numbers():
    return 3, 4

def no_sample():
    return model(), "x"

def no_loss():
    return model(), torch.randn(4, 8), 3
"""


@pytest.fixture
def _factories(tmp_path, monkeypatch):
    (tmp_path / "advised.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_factories")
def test_the_command_writes_what_it_prints(capsys, tmp_path, untimed):
    out = tmp_path / "new" / "advice.json"
    options = ["--seconds", "0.02", "--backend", "reference", "--threads", "1", "--quiet"]
    argv = ["advise", "advised:whole", *options, "--classes", "3", "--update", "adam"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    report = load(out, "advice")
    assert captured.err == "" and captured.out.strip() == as_text(blocks(report)).strip()
    assert report["title"] == "advised:whole" and report["facts"]["classes"] == 3
    assert "--out DIR" in report["facts"]["command"] and str(tmp_path) not in str(report)


@pytest.mark.usefixtures("_factories")
def test_a_shape_stands_in_for_a_sample(capsys, untimed):
    argv = ["advise", "advised:model", "--sample", "4x8", "--seconds", "0.02", "--threads", "1"]
    assert cli.main([*argv, "--backend", "reference", "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["blocks"][0]["input"] == [[4, 8]]


@pytest.mark.usefixtures("_factories")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["mlp"], "FACTORY must be package.module:factory, got 'mlp'"),
        (["advised:hole"], "unknown factory in advised 'hole', did you mean 'whole'"),
        (["no_such_module:mlp"], "cannot import 'no_such_module'"),
        (["advised:broken"], "advised:broken failed: RuntimeError: the data set is not there"),
        (
            ["advised:number"],
            "must return a module, (module, sample) or (module, sample, loss), got int",
        ),
        (["advised:pair_of_numbers"], "got (int, int)"),
        (["advised:no_sample"], "the sample of advised:no_sample must be a tensor, got str"),
        (["advised:no_loss"], "the loss of advised:no_loss must be callable, got int"),
        (["advised:model"], "advised:model brings no sample: give --sample, like 64x784"),
        (["advised:model", "--sample", "4x7"], "the model does not take a sample of shape [4, 7]"),
        (["advised:whole", "--sample", "4x8"], "brings its own sample: leave --sample out"),
        (["advised:whole", "--classes", "0"], "classes must be a whole number from 1 on"),
        (["advised:whole", "--backend", "cpuu"], "backend"),
        (["advised:whole", "--seconds", "0"], "seconds must be a positive, finite number"),
        (["advised:whole", "--out", "."], "--out must be a file, . is a folder"),
    ],
    ids=range(15),
)
def test_bad_input_is_one_line(capsys, argv, message):
    assert cli.main(["advise", *argv, "--quiet"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("fused-dni: error: ") and message in line and captured.out == ""
