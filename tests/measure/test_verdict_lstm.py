"""The recurrent verdict: it refuses to compare what differs, finds what was planted, says it."""

import json
import math

import pytest
import torch
from torch import nn

import fused_dni as fd
from fused_dni import cli
from fused_dni.measure import timing
from fused_dni.measure.timing import Timing
from fused_dni.measure.verdict import GateError, LSTMVerdict, VerdictError, verdict_lstm

pytestmark = pytest.mark.slow(40)

QUICK = {"seconds": 0.02, "backend": "reference"}
ROWS = ["dni T=3", "fused T=3", "backprop T=3", "fused T=6", "backprop T=6", "floor T=3"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def found() -> LSTMVerdict:
    torch.manual_seed(0)
    return verdict_lstm(nn.LSTM(5, 8), torch.randn(3, 4, 5), long=6, **QUICK)


def test_every_candidate_is_in_table_and_json(found):
    assert list(found.timings) == ROWS
    report = json.loads(found.to_json())
    assert list(report["timings"]) == ROWS
    assert set(report["memory"]) == set(ROWS[:-1])
    assert report["window"] == 3 and report["long"] == 6
    assert report["facts"]["sample"] == [3, 4, 5] and report["facts"]["threads"] == 1
    assert report["sentence"] == found.sentence()
    assert set(report["cheaper"]) == set(ROWS[1:-1])
    assert [row["name"] for row in report["gate"]["checks"]] == [
        "fused T=3",
        "fused T=6",
        "dni T=3",
    ]
    for table in (found.table(), found.table(markdown=True)):
        for name in ROWS:
            assert name in table


def test_the_sentence_leaves_the_quality_to_the_user(found):
    sentence = found.sentence()
    assert sentence.startswith("On 1 CPU thread a time step of an LSTM 5 to 8 at batch 4 takes")
    assert sentence.endswith("fused-dni train charlm --windows 3 --long 6.")
    assert "on the same kernels" in sentence


def test_times_are_per_time_step(monkeypatch):
    """Windows that take equally long are cheaper the longer they are."""

    def compare(calls, **options):
        return {name: Timing.of(name, (1.0,) * 8, (1.0,) * 8, 1) for name in calls}

    monkeypatch.setattr(timing, "compare", compare)
    found = verdict_lstm(nn.LSTM(5, 8), torch.randn(3, 4, 5), long=6, **QUICK)
    for name in ROWS:
        assert found.timings[name].median == 1 / int(name.partition("=")[2])


def test_memory_grows_with_the_window(found):
    for kind in ("fused", "backprop"):
        assert found.memory[f"{kind} T=3"] < found.memory[f"{kind} T=6"]


def planted(dni: float, fused_long: float, memory: tuple[int, int]) -> LSTMVerdict:
    """A verdict with given times per step of DNI and of backprop at T2, the rest in between."""
    times = dict.fromkeys(ROWS, 1.0) | {"dni T=3": dni, "fused T=6": fused_long}
    held = dict.fromkeys(ROWS[:-1], 1000) | {"dni T=3": memory[0], "fused T=6": memory[1]}
    wobble = [0.97, 1.0, 1.03] * 4
    timings = {}
    for i, (name, value) in enumerate(times.items()):
        rounds = tuple(value * 1e-6 * w for w in wobble[i % 3 :] + wobble[: i % 3])
        timings[name] = Timing.of(name, rounds, rounds, 1)
    facts = {"threads": 2, "where": "cpu"}
    return LSTMVerdict("an LSTM", 3, 6, timings, held, "bytes", {}, facts)


@pytest.mark.parametrize(
    ("dni", "fused", "memory", "cheaper", "words"),
    [
        (1.0, 2.0, (100, 400), ("dni", "dni"), "DNI is cheaper in both."),
        (
            2.0,
            1.0,
            (100, 400),
            ("fused T=6", "dni"),
            "Backprop at T=6 is cheaper in time; DNI in memory.",
        ),
        (2.0, 1.0, (400, 100), ("fused T=6", "fused T=6"), "Backprop at T=6 is cheaper in both."),
        (1.0, 2.0, (100, 100), ("dni", "same"), "DNI is cheaper in time; memory is the same."),
        (
            1.0,
            1.0,
            (100, 400),
            ("inconclusive", "dni"),
            "Time is inconclusive, the intervals overlap; DNI is cheaper in memory.",
        ),
        (
            1.0,
            1.0,
            (100, 100),
            ("inconclusive", "same"),
            "Time is inconclusive, the intervals overlap; memory is the same.",
        ),
    ],
)
def test_what_is_cheaper_is_said(dni, fused, memory, cheaper, words):
    found = planted(dni, fused, memory)
    assert tuple(found.cheaper("fused T=6").values()) == cheaper
    assert words in found.sentence()
    assert json.loads(found.to_json())["cheaper"]["fused T=6"]["time"] == cheaper[0]


def test_overlapping_intervals_are_marked():
    line = next(row for row in planted(1.0, 1.0, (1, 1)).table().splitlines() if "dni T=3" in row)
    assert line.count("~") == 2
    assert "inconclusive" in planted(1.0, 1.0, (1, 1)).sentence()


def test_the_module_is_not_changed():
    lstm = fd.FusedDNILSTM(5, 8, update=fd.SGD(0.1))
    sample = torch.randn(3, 4, 5)
    before = {k: v.clone() for k, v in lstm.state_dict().items()}
    verdict_lstm(lstm, sample, **QUICK)
    after = lstm.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert not sample.requires_grad and lstm.weight_ih_l0.grad is None


def test_options_of_the_module_are_what_is_measured(monkeypatch):
    made = []
    real = fd.FusedDNILSTM.from_lstm.__func__

    def spy(cls, lstm, **options):
        made.append(options)
        return real(cls, lstm, **options)

    monkeypatch.setattr(fd.FusedDNILSTM, "from_lstm", classmethod(spy))
    synthesizer = fd.LinearSynthesizer(32, 4)
    lstm = fd.FusedDNILSTM(
        5, 8, 2, synthesizer=synthesizer, auxiliary=True, sg_scale=0.3, max_norm=2.0
    )
    found = verdict_lstm(lstm, torch.randn(3, 4, 5), **QUICK)
    assert found.long == 15  # five times the window
    dni = made[-3]  # then come the two of truncated backprop
    assert dni["auxiliary"] and dni["sg_scale"] == 0.3 and dni["max_norm"] == 2.0
    assert isinstance(dni["synthesizer"], fd.LinearSynthesizer)
    assert dni["synthesizer"].rank == 4 and dni["synthesizer"] is not synthesizer


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "dropout": 0.5},
        {"batch_first": True},
        {"bias": False},
        {"dtype": torch.float64},
    ],
)
def test_kinds_of_lstm(options):
    lstm = nn.LSTM(5, 8, **options)
    sample = torch.randn(4, 3, 5, dtype=options.get("dtype"))
    window = 3 if lstm.batch_first else 4
    found = verdict_lstm(lstm, sample, long=7, **QUICK)
    assert found.window == window and f"dni T={window}" in found.timings


def test_a_conditioned_synthesizer_is_given_labels():
    synthesizer = fd.LinearSynthesizer(16, 4, context_features=3)
    found = verdict_lstm(nn.LSTM(5, 8), torch.randn(3, 4, 5), synthesizer=synthesizer, **QUICK)
    assert found.timings["dni T=3"].median > 0


def test_gate_refuses_windows_that_differ(monkeypatch):
    """Kernels that scale a gradient by a thousandth are not timed."""
    from fused_dni.backends.reference import ReferenceBackend

    right = ReferenceBackend.lstm_backward

    def wrong(*args):
        made = right(*args)
        return made._replace(delta=tuple(d * 1.001 for d in made.delta))

    monkeypatch.setattr(ReferenceBackend, "lstm_backward", staticmethod(wrong))
    with pytest.raises(GateError, match=r"fused T=3 disagrees with nn\.LSTM by"):
        verdict_lstm(nn.LSTM(5, 8), torch.randn(3, 4, 5), **QUICK)


def test_gate_refuses_a_synthesizer_that_does_not_learn():
    dead = fd.LinearSynthesizer(16, 4)
    for p in dead.parameters():
        p.requires_grad_(False)
    with pytest.raises((GateError, VerdictError), match="the synthesizer did not learn"):
        verdict_lstm(nn.LSTM(5, 8), torch.randn(3, 4, 5), synthesizer=dead, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lstm": nn.Linear(5, 8)}, "must be an nn.LSTM or FusedDNILSTM, got Linear"),
        ({"lstm": nn.LSTMCell(5, 8)}, "got LSTMCell"),
        ({"lstm": nn.LSTM(5, 8, bidirectional=True)}, "a bidirectional LSTM has no decoupled form"),
        ({"lstm": nn.LSTM(5, 8, proj_size=2)}, "an LSTM with projections has no decoupled form"),
        ({"sample": torch.randn(3, 4)}, r"a window \[T, B, I\] with I = 5, got \[3, 4\]"),
        ({"sample": torch.randn(3, 4, 6)}, r"got \[3, 4, 6\]"),
        ({"sample": torch.randn(0, 4, 5)}, r"got \[0, 4, 5\]"),
        ({"sample": torch.ones(3, 4, 5, dtype=torch.int64)}, "floating-point tensor, got"),
        ({"sample": [1.0]}, "floating-point tensor, got list"),
        ({"sample": torch.randn(3, 4, 5).double()}, "cannot be measured"),
        ({"long": 3}, "long must be longer than the window of 3 steps, got 3"),
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"seconds": math.nan}, "seconds must be positive"),
        ({"backend": "cuad"}, "backend"),
        ({"synthesizer": fd.LinearSynthesizer(8)}, "synthesizer has features=8, the state 16"),
        ({"synthesizer": "linaer"}, "synthesizer must be 'default'"),
    ],
)
def test_bad_input(arguments, message):
    given = {"lstm": nn.LSTM(5, 8), "sample": torch.randn(3, 4, 5), **QUICK, **arguments}
    with pytest.raises(ValueError, match=message):
        verdict_lstm(**given)


def test_verdict_of_a_layer_points_here():
    with pytest.raises(VerdictError, match="got tuple: for an LSTM there is verdict_lstm"):
        fd.verdict(nn.LSTM(5, 8), torch.randn(3, 4, 5))


# ------------------------------------------------------------------------------------ command line

TINY = ["--hidden", "8", "--batch", "2", "--seconds", "0.02", "--threads", "1"]


def test_command_prints_table_and_sentence(capsys):
    assert cli.main(["verdict", "lstm", *TINY, "--window", "2", "--long", "5", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "backprop T=5" in captured.out and "floor T=2" in captured.out
    assert captured.out.rstrip().endswith("--windows 2 --long 5.")


def test_command_prints_json_alone(capsys):
    argv = ["--traceback", "verdict", "lstm", *TINY, "--json", "--quiet", "--rank", "0"]
    argv += ["--input", "3", "--layers", "2", "--auxiliary", "--update", "sgd"]
    assert cli.main([*argv, "--dtype", "float64"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "verdict lstm" and report["long"] == 40
    assert report["facts"]["sample"] == [8, 2, 3] and report["facts"]["dtype"] == "float64"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--window", "0"], "window must be a whole number from 1 on, got '0'"),
        (["--window", "8", "--long", "8"], "long must be longer than the window of 8 steps, got 8"),
        (["--hiden", "8"], "unknown option '--hiden', did you mean '--hidden'"),
        (["--backend", "cuad"], "backend must be None or one of"),
        (["--width", "8"], "unknown option '--width'"),
        (["--dtype", "bfloat16"], "unknown dtype 'bfloat16'"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, message):
    assert cli.main(["verdict", "lstm", *argv, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("fused-dni: error: ") and message in captured.err
