"""Pipelines of real processes: gates that close, figures of what was measured, nothing timed that
decides a test."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time

import pytest
import torch

import pipelines
import relay
from workloads import Disagreement
from workloads import pipelines as w

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = w.Setting(stages=1, blocks=4, features=16, batch=12)
needs_network = pytest.mark.skipif(relay.missing() is not None, reason=str(relay.missing()))


def place(setting=SMALL):
    return w.Place(setting, 0, w.Clock())


@pytest.mark.parametrize("name", [name for name in w.MODES if name.startswith("posted")])
def test_one_stage_is_the_single_process(name):
    trainer = w.MODES[name].start(place(), w.MODES[name])
    distances = w.check(trainer, place(), w.MODES[name])
    assert set(distances) == {"gradient", "change", "buffer", "loss"}
    assert len(trainer.losses) == w.CHECKED


class Scaled(w.Posted):
    """Forgets in the third step to divide by the number of microbatches."""

    def step(self, number, *, last):
        super().step(number, last=last)
        if number == w.CHECKED - 1:
            for part in self.parts:
                for parameter in part.parameters():
                    parameter.grad *= self._count


class Unmoved(w.Posted):
    def train(self, steps):
        super().train(steps)
        with torch.no_grad():
            for mine, first in zip(
                self.parts[0].parameters(), w.whole(SMALL).parameters(), strict=True
            ):
                mine.copy_(first)


class Shifted(w.Posted):
    """Runs a batch more through batch normalisation, as inference of shapes would."""

    def train(self, steps):
        self.parts[0](torch.ones(4, SMALL.features))
        super().train(steps)


class Other(w.Posted):
    """Reports the losses of another batch."""

    def step(self, number, *, last):
        super().step(number, last=last)
        self.losses[-1] *= 1.001


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [(Scaled, "gradient"), (Unmoved, "change"), (Shifted, "buffer"), (Other, "loss")],
)
def test_the_gate_closes(wrong, kind):
    mode = w.Mode(lambda place, mode: wrong(place, mode, in_flight=False), microbatches=3)
    with pytest.raises(Disagreement, match=f"{kind}s of rank 0 are .* is allowed"):
        w.check(mode.start(place(), mode), place(), mode)


def test_pieces_are_the_whole():
    setting = w.Setting(stages=2, blocks=3, features=8, batch=4)
    x = torch.randn(4, 8)
    for pieces in (1, 2, 3, 6):
        parts = w.cut(setting, pieces)
        assert len(parts) == pieces
        assert torch.equal(torch.nn.Sequential(*parts)(x), w.whole(setting)(x))
        names = [name for part in parts for name in part.state_dict()]
        assert names == list(w.whole(setting).state_dict())
    with pytest.raises(ValueError, match="2 x 3 blocks do not make 4 pieces"):
        w.cut(setting, 4)


def test_the_clock_stretches_and_counts_what_it_could_not(monkeypatch):
    now, slept = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", slept.append)
    clock = w.Clock()
    for taken, wanted in ((1.0, 3.0), (4.0, 3.0), (4.0, 0.0)):
        with clock.stretched(wanted):
            now[0] += taken
    assert slept == [2.0]
    assert (clock.wanted, clock.over) == (6.0, 1.0)


@needs_network
@pytest.mark.slow(20)
def test_every_exact_mode_agrees_over_the_link_and_has_its_figures(tmp_path, capsys):
    out = tmp_path / "pipelines.json"
    tiny = "--blocks 2 --features 16 --batch 16 --rounds 2 --seconds 0.02 --latency 1 --pad 1 2"
    assert pipelines.main(["measure", "--stages", "2", *tiny.split(), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    ((key, group),) = json.loads(out.read_text())["pipelines"].items()
    assert key == "2x2x16x16, 1 ms, padded to 1 + 2 ms"
    assert group["order"] == [name for name, mode in w.MODES.items() if mode.most >= 2]
    for name, row in group["rows"].items():
        assert "failed" not in row, row
        rounds = row["timing"]["rounds"]
        assert len(rounds) == 2
        assert min(rounds) >= 3e-3  # the clock's forward and backward
        if row["exact"]:
            assert min(rounds) >= 2 * 1e-3 + 3e-3  # there and back
            # Activations down, gradients up, and little around them.
            assert 1 <= row["bytes"] / (2 * 4 * 16 * 16) < 6
        assert name in printed
    assert pipelines.main(["show", str(out)]) == 0
    assert capsys.readouterr().out.strip() in printed


def pretended(answers):
    """Workers without a pipeline: each gives its answers one after another, then ends."""
    code = "import sys\nfor a in sys.argv[1:]:\n    input()\n    print(a, flush=True)\nsys.exit(3)"
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(json.dumps, own)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for own in answers
    ]


@contextlib.contextmanager
def asked_of(*answers):
    processes = pretended(answers)
    yield pipelines.Workers(processes)
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # a question that it did not read
            process.stdin.close()


def test_a_mode_that_fails_has_its_reason_and_the_others_stay(monkeypatch, capsys):
    monkeypatch.setattr(w, "MODES", dict(list(w.MODES.items())[:3]))
    fine, wrong = {"distance": {}}, {"failed": "Disagreement: gradients are wrong"}
    failures = {}
    with asked_of([fine, fine, fine], [fine, wrong, fine]) as asked:
        found = pipelines.checked(asked, w.Setting(2), None, failures)
    first, second, third = w.MODES
    assert found == [first, third]
    assert failures == {second: "Disagreement: gradients are wrong"}
    assert f"no figure for {second}" in capsys.readouterr().err


def test_a_process_that_ends_or_falls_silent_ends_the_run(monkeypatch):
    with asked_of([{}, {}], [{}]) as asked:
        assert asked.ask(what="check") == [{}, {}]
        with pytest.raises(OSError, match="rank 1 ended with status 3|Broken pipe"):
            asked.ask(what="check")
    monkeypatch.setattr(pipelines, "PATIENCE", 0.0)
    with asked_of([{}]) as asked:
        with pytest.raises(TimeoutError, match="rank 0 said nothing"):
            asked.ask(what="check")


def test_without_a_network_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(relay, "missing", lambda: "no namespaces here")
    assert pipelines.main(["measure"]) == 2
    assert capsys.readouterr().err == "pipelines: no namespaces here\n"
