"""The verdict: it refuses to compare what differs, finds what was planted, and says it honestly."""

import contextlib
import json
import math
import signal
import time
from dataclasses import replace

import pytest
import torch
from flops import flops, install
from torch import nn

import fused_dni as fd
from fused_dni.backends.reference import ReferenceBackend
from fused_dni.measure import timing
from fused_dni.measure.verdict import BreakEven, GateError, Verdict, VerdictError, verdict
from fused_dni.measure.verdict.candidates import Expired, deadline
from fused_dni.measure.verdict.result import break_even
from fused_dni.report import Figure, as_text, blocks_of, load
from fused_dni.report.words import PAIRED, often


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _mlp(norm=nn.BatchNorm1d, size: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(size, size, bias=False), norm(size), nn.ReLU(), nn.Linear(size, 10)
    )


QUICK = {"seconds": 0.02, "parts": False, "compile": False, "backend": "reference"}


@pytest.fixture(scope="module")
def found() -> Verdict:
    labels = torch.arange(32) % 10
    return verdict(
        _mlp(),
        torch.randn(32, 16),
        target=labels,
        context_features=10,
        target_every=(1, 2, 4, None),
        **QUICK,
    )


def test_every_candidate_is_in_table_and_json(found):
    names = ["backprop", "fused", "dni k=1", "dni k=2", "dni k=4", "dni k=never", "floor"]
    assert list(found.timings) == names
    report = json.loads(found.to_json())
    assert list(report["timings"]) == names
    assert set(report["memory"]) == set(names) - {"floor"}
    assert report["facts"]["dtype"] == "float32" and report["facts"]["threads"] == 1
    assert set(report["break_even"]) == {"backprop", "fused"}
    assert report["ratios"]["fused"]["dni k=4"]["median"] > 0
    assert report["sentence"] == found.sentence()
    for table in (found.table(), found.table(markdown=True)):
        for name in names:
            assert name in table


def test_the_table_says_how_to_read_it(found):
    even = {"backprop": BreakEven("from", 3, 1), "compiled": BreakEven("never")}
    even["fused"] = BreakEven("inconclusive")
    table = replace(found, break_even=even).table()
    assert (
        "The break-even against stock backprop is at k = 3 (in doubt from 2), that against "
        "compiled backprop is at no k, that against backprop on our kernels is inconclusive."
        in table
    )
    assert PAIRED in table


def test_cycles_are_the_weighted_sum_of_their_steps(found):
    t = {k: found.timings[f"dni k={k}"].rounds for k in (1, 2, 4, "never")}
    for first, second, fourth, never in zip(t[1], t[2], t[4], t["never"], strict=True):
        assert second == pytest.approx((first + never) / 2)
        assert fourth == pytest.approx((first + 3 * never) / 4)


def test_a_cycle_takes_what_its_steps_take():
    """The claim behind the table: four steps run as a cycle make the operations of one with targets
    and three without."""
    x, y = torch.randn(64, 64), torch.arange(64) % 10

    def candidate(every):
        model = fd.convert(
            _mlp(size=64), context_features=10, update=fd.SGD(1e-6), backend="reference"
        )
        schedule = fd.Schedule(model, target_every=every)

        def step():
            with fd.condition_on(y):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            schedule.step()

        return step

    four = candidate(4)
    cycle = flops(lambda: [four() for _ in range(4)])
    with_targets, without = flops(candidate(1)), flops(candidate(None))
    assert with_targets > without
    assert cycle == with_targets + 3 * without


def test_every_interface_with_every_synthesizer_is_a_row(monkeypatch):
    install(monkeypatch)
    torch.manual_seed(0)
    found = verdict(
        nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU()),
        torch.randn(32, 16),
        interface="all",
        synthesizer=("rank4", "diagonal"),
        target_every=(1, 4, None),
        **QUICK,
    )
    rows = ["output, rank 4", "output, diagonal", "preactivation, rank 4"]
    rows.append("preactivation, diagonal")
    assert [variant.name for variant in found.variants] == rows
    first = found.variants[0]
    assert found.timings["dni k=4"].rounds == first.cycle(4).rounds
    report = json.loads(found.to_json())
    for made in report["variants"]:
        assert set(made["cycles"]) == {"1", "4", "never"}
        for cycle in made["cycles"].values():
            assert set(cycle["ratios"]) == {"backprop", "fused"}
            assert cycle["ratios"]["fused"]["verdict"] in ("faster", "slower", "inconclusive")
    assert all(row in found.table() for row in rows)
    assert "Of 4 combinations of interface and synthesizer" in found.sentence()
    assert len({check["variant"] for check in found.gate["checks"]}) == 4


def test_an_interface_is_held_against_backprop_in_its_own_form(monkeypatch):
    """Whole behind the output, layer by layer at the preactivation: each against the same code."""
    install(monkeypatch)
    torch.manual_seed(0)
    found = verdict(
        nn.Sequential(nn.Linear(16, 16), nn.PReLU()),
        torch.randn(32, 16),
        interface=("output", "preactivation"),
        target_every=(1,),
        **QUICK,
    )
    assert [(v.form, v.base) for v in found.variants] == [
        ("segment", "fused"),
        ("layers", "fused, layers"),
    ]
    assert set(found.timings) >= {"fused", "fused, layers"}
    assert "fused, layers" in found.table()


def test_the_report_is_made_from_the_json_alone(monkeypatch, tmp_path):
    install(monkeypatch)
    torch.manual_seed(0)
    found = verdict(
        _mlp(),
        torch.randn(32, 16),
        target=torch.arange(32) % 10,
        interface="all",
        context_features=10,
        **{**QUICK, "parts": True},
    )
    path = tmp_path / "verdict.json"
    path.write_text(found.to_json())
    loaded = load(path, "verdict")
    blocks = blocks_of(loaded)
    said = as_text(blocks)
    assert found.sentence() in said
    for heading in ("Interfaces and synthesizers", "Where a step's time goes", "gained at most"):
        assert heading in said
    figures = [block for block in blocks if isinstance(block, Figure)]
    assert [figure.name for figure in figures] == ["verdict", "update-lock"]
    assert all("<svg" in figure.svg() for figure in figures)
    made = loaded["parts"]
    assert made["of"] == "output, rank 16" and 0.0 <= made["amdahl"]["share"] < 1.0
    assert set(made["floors"]) == set(made["work"])
    assert {row["step"] for row in made["sums"]} >= {"stock step", "step with targets"}
    assert "sum / step" in found.table() and "sum / step" in found.table(markdown=True)


def test_the_module_is_left_as_it_was():
    module = _mlp()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    rng = torch.random.get_rng_state()
    module.eval()
    verdict(module, torch.randn(32, 16), **QUICK)
    assert not module.training and all(p.grad is None for p in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    sample_drawn = torch.randn(32, 16)  # the sample above moved the generator; nothing else did
    torch.random.set_rng_state(rng)
    torch.randn(32, 16)
    assert torch.equal(sample_drawn, torch.randn(32, 16))


def test_a_wrong_kernel_gets_no_verdict(monkeypatch):
    true = ReferenceBackend.linear_backward

    def wrong(*args, **kwargs):
        made = true(*args, **kwargs)
        return made._replace(delta=made.delta * 1.001)

    monkeypatch.setattr(ReferenceBackend, "linear_backward", staticmethod(wrong))
    with pytest.raises(GateError, match="no verdict: backprop on our kernels disagrees"):
        verdict(_mlp(), torch.randn(32, 16), target=torch.arange(32) % 10, **QUICK)


def test_a_synthesizer_that_never_learns_gets_no_verdict(monkeypatch):
    monkeypatch.setattr(ReferenceBackend, "synthesizer_update_", staticmethod(lambda *args: None))
    with pytest.raises(GateError, match="no synthesizer learned"):
        verdict(_mlp(), torch.randn(32, 16), target=torch.arange(32) % 10, **QUICK)


def test_a_planted_slow_kernel_is_found_and_said(monkeypatch):
    true = ReferenceBackend.linear_forward

    def slow(*args, **kwargs):
        time.sleep(2e-3)
        return true(*args, **kwargs)

    monkeypatch.setattr(ReferenceBackend, "linear_forward", staticmethod(slow))
    found = verdict(_mlp(), torch.randn(32, 16), target=torch.arange(32) % 10, **QUICK)
    assert found.ratio("fused", "backprop").verdict() == "slower"
    assert "backprop on our kernels is" in found.sentence()
    assert "x slower than stock backprop" in found.sentence()


def _timing(name: str, value: float, n: int = 20) -> timing.Timing:
    return timing.Timing.of(name, (value,) * n, (value,) * n, 1)


def _made(backprop: float, fused: float, with_targets: float, without: float) -> Verdict:
    def cycle(k):
        if k is None:
            return _timing("dni k=never", without)
        return _timing(f"dni k={k}", (with_targets + (k - 1) * without) / k)

    rows = {"backprop": _timing("backprop", backprop), "fused": _timing("fused", fused)}
    even = {base: break_even(cycle, rows[base]) for base in ("backprop", "fused")}
    rows |= {f"dni k={k}": cycle(k) for k in (1, 4)}
    facts = {"threads": 2, "where": "cpu", "gpu": None}
    return Verdict("a layer", rows, {}, "bytes", (1, 4), even, {}, facts)


def test_fusion_is_never_credited_to_the_synthetic_gradient():
    made = _made(backprop=4e-3, fused=1e-3, with_targets=1.6e-3, without=1.2e-3)
    said = made.sentence()
    assert "DNI with targets on every 4th step is 3.08x faster than stock backprop" in said
    assert "backprop on our kernels is 4.00x faster than stock backprop" in said
    assert "the synthetic gradient itself is 1.30x slower than backprop on the same" in said
    assert "does not pay here at any k" in said
    assert made.break_even["backprop"] == BreakEven("from", 1, 0)
    assert made.break_even["fused"].kind == "never"


def test_the_break_even():
    made = _made(backprop=2e-3, fused=1e-3, with_targets=2e-3, without=0.8e-3)
    # (2 + 0.8 (k - 1)) / k < 1 from k = 6 on, where it is equal; a per cent below from 7 on
    assert made.break_even["fused"] == BreakEven("from", 7, 5)
    assert str(made.break_even["fused"]) == "k = 7 (in doubt from 6)"
    assert "pays from k = 7 on" in made.sentence()
    equal = _made(backprop=1e-3, fused=1e-3, with_targets=1e-3, without=1e-3)
    assert equal.break_even["fused"].kind == "inconclusive"
    assert "could not be decided" in equal.sentence()
    assert "not measurably different from backprop on the same kernels" in equal.sentence()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
@pytest.mark.parametrize("rule", [fd.SGD(0.1, momentum=0.9), fd.Adam(), fd.AdamW()])
def test_inside_a_network_with_every_rule(monkeypatch, norm, rule):
    install(monkeypatch)
    found = verdict(
        _mlp(norm),
        torch.randn(32, 16),
        update=rule,
        context_features=10,
        rank=4,
        target_every=(1,),
        **QUICK,
    )
    assert type(rule).__name__ in found.facts["update"]
    assert all(value.median > 0 for value in found.timings.values())
    # with targets a step makes dx and trains synthesizers: it cannot be the cheaper one by much
    assert "dni k=1" in found.timings and len(found.gate["checks"]) == 3


def test_segments_that_cannot_be_converted_are_decoupled_whole():
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    images = torch.randn(8, 3, 6, 6)
    found = verdict(convolutions, images, context_features=10, target_every=(1, None), **QUICK)
    assert "floor" not in found.timings and "-" in found.table()
    network = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(4 * 36, 10))
    found = verdict(
        network, images, target=torch.arange(8), context_features=10, target_every=(1,), **QUICK
    )
    assert "dni k=1" in found.timings


def test_a_loss_function_and_a_custom_synthesizer():
    found = verdict(
        nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)),
        torch.randn(32, 16),
        target=lambda out: out.square().mean(0).sum(),
        synthesizer=fd.DiagonalSynthesizer(16),
        target_every=(1,),
        **QUICK,
    )
    assert "Diagonal" in found.facts["synthesizer"]


def test_float64_and_the_plot(tmp_path):
    found = verdict(_mlp().double(), torch.randn(32, 16).double(), **QUICK)
    assert found.facts["dtype"] == "float64"
    path = found.plot(tmp_path / "new" / "verdict.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(VerdictError, match="cannot write the plot"):
        found.plot(tmp_path / "verdict.nonsense")


def test_a_failing_compiler_is_a_note(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here\nwith a long story")

    monkeypatch.setattr(torch, "compile", broken)
    found = verdict(_mlp(), torch.randn(32, 16), **{**QUICK, "compile": True})
    assert "compiled" not in found.timings
    assert found.notes == ["compiled backprop was skipped: no compiler here"]


def _stubborn(until: float) -> None:
    while time.monotonic() < until:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


def test_the_deadline_is_not_swallowed():
    start = time.monotonic()
    with pytest.raises(Expired), deadline(0.05):
        _stubborn(start + 60)
    assert time.monotonic() - start < 50


def test_a_deadline_that_was_met_is_none_any_more():
    before = signal.getsignal(signal.SIGALRM)
    with deadline(100.0):
        assert 0.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100.0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample": torch.randn(32, 17)}, "does not take a sample of shape"),
        ({"sample": torch.arange(32)}, "floating-point tensor, got torch.int64"),
        ({"module": nn.ReLU()}, "no trainable parameters"),
        ({"module": 3}, "must be an nn.Module"),
        ({"target": torch.arange(31)}, r"int64 of shape \[32\]"),
        ({"target": torch.full((32,), 10)}, "class 10, the module has 10 outputs"),
        ({"target": "labels"}, "class indices, a loss function or None"),
        ({"target": torch.arange(32) % 10, "context_features": 4}, "context_features is 4"),
        ({"seconds": -1.0}, "seconds must be positive"),
        ({"seconds": math.inf}, "seconds must be positive"),
        ({"target_every": (0,)}, "numbers from 1 on"),
        ({"target_every": ()}, "numbers from 1 on"),
        ({"backend": "cuad"}, "backend"),
        ({"interface": "inside"}, "unknown interface 'inside'"),
        ({"interface": ()}, "interface must name at least one"),
        ({"synthesizer": "desne"}, "did you mean 'dense'"),
        ({"synthesizer": ["conv"]}, "does not fit an output of shape"),
        ({"module": nn.PReLU(), "interface": "preactivation"}, "stands behind a linear layer"),
    ],
)
def test_bad_input(arguments, message):
    given = {"module": _mlp(), "sample": torch.randn(32, 16), **QUICK, **arguments}
    module, sample = given.pop("module"), given.pop("sample")
    with pytest.raises(ValueError if isinstance(module, nn.Module) else TypeError, match=message):
        verdict(module, sample, **given)


def test_words():
    assert [often(k) for k in (1, 2, 3, 4, 11, 21)] == [
        "on every step",
        "on every 2nd step",
        "on every 3rd step",
        "on every 4th step",
        "on every 11th step",
        "on every 21st step",
    ]
