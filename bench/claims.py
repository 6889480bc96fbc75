"""What people say of synthetic gradients: what is measured of each claim, and what it came to.

``measure`` runs commands on this machine and keeps what they write in ``bench/results/verdict``;
the answers read all of it, whatever machine it is from.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import races
import readings
import stored
from fused_dni.measure.baseline import facts
from fused_dni.ops.types import ACTIVATIONS
from readings import Answer, Report

NORMS = ("none", "batch", "layer")
DEPTHS = (1, 2, 4, 8, 16)
MODELS = ("mlp", "convnet", "lstm_lm")


# ------------------------------------------------------------------------------------ measuring


def commands(data: str) -> Iterator[tuple[str, list[str]]]:
    """Say what is measured: the result's name, and the words behind ``fused-dni``, or a script and
    its own. ``OUT`` is the file that is written; a command that writes a folder has ``FOLDER``, one
    that has neither prints its JSON. ``CORPUS`` is the text that the environment names."""
    bare = ["--normalization", "none", "--activation", "identity"]
    every = ["--synthesizers", "dense", "rank16", "diagonal"]
    both = ["--interface", "output", "preactivation"]
    out = ["--quiet", "--out", "OUT"]
    for width, batch in ((64, 32), (1024, 128)):
        shape = ["--in", str(width), "--batch", str(batch)]
        yield f"dense-{width}", ["verdict", "linear", *shape, *bare, *every, *out]
    for norm in NORMS:
        for activation in ACTIVATIONS:
            layer = ["--in", "512", "--batch", "128", "--normalization", norm]
            layer += ["--activation", activation, *both, "--no-compile", "--no-parts"]
            words = ["verdict", "linear", *layer, "--seconds", "2", *out]
            yield f"activation-{norm}-{activation}", words
    for depth in DEPTHS:
        shape = ["--width", "256", "--batch", "64", "--depth", str(depth)]
        yield f"depth-{depth}", ["verdict", "block", *shape, "--no-compile", *out]
    for segment in ("conv", "transformer"):
        yield f"segment-{segment}", ["verdict", segment, "--no-compile", *out]
    lstm = ["--hidden", "256", "--batch", "32", "--window", "8", "--long", "40"]
    yield "lstm-window", ["verdict", "lstm", *lstm, "--quiet", "--json"]
    yield "map", ["map", *out]
    for model in MODELS:
        yield f"advice-{model}", ["advise", f"bench.models:{model}", "--all", *out]
    yield "interfaces", ["interfaces", "--data", data, *out]
    yield "rivals", ["rivals", "--data", data, "--tune", *out]
    yield "rivals-grid-mnist", ["rivals", "grid", "--data", data, *out]
    grid = ["rivals", "grid", "--dataset", "characters", "--data", "CORPUS"]
    yield "rivals-grid-characters", [*grid, *out]
    for interface, rank in (("output", "16"), ("preactivation", "16"), ("preactivation", "0")):
        words = ["train", "--data", data, "--methods", "fused", "cdni", "--rank", rank]
        words += ["--interface", interface, "--quiet", "--no-split", "--out", "FOLDER"]
        yield f"mnist-{interface}-{rank}", words
    for race in races.TITLES:
        words = ["race", f"bench.races:{race}", "--seconds", races.SECONDS[race], "--threads", "2"]
        arms = ["--arms", *races.ARMS[race]] if race in races.ARMS else []
        seeds = ["--seeds", *races.SEEDS[race]] if race in races.SEEDS else []
        yield f"race-{race}", [*words, *arms, *seeds, *out]
    planted = ["bench/planted.py", "--out", "OUT"]
    yield "planted", [*planted, "--busy", "2", "--only", "differences", "segments", "sums"]
    yield "planted-tops", [*planted, "--threads", "2", "--seconds", "1", "--only", "tops"]


def measure(data: str, only: list[str] | None) -> int:
    """Run the commands whose name begins with one of ``only``; the number that failed. A race that
    lacks what it needs (CORPUS in the environment names a text) is left out, with a line."""
    machine = stored.machine(facts())
    failed = 0
    for name, words in commands(data):
        if only and not name.startswith(tuple(only)):
            continue
        race = "words" if "CORPUS" in words else name.removeprefix("race-")
        if race in races.TITLES and (why := races.lacks(race)):
            print(f"{name}: left out: {why}", flush=True)
            continue
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / ("report.json" if "FOLDER" in words else "out.json")
            places = {"FOLDER": folder, "OUT": str(made), "CORPUS": os.environ.get("CORPUS", "")}
            program = [] if words[0].endswith(".py") else ["-m", "fused_dni.cli"]
            run = [sys.executable, *program, *(places.get(word, word) for word in words)]
            done = subprocess.run(
                run, cwd=stored.ROOT, stdout=subprocess.PIPE, encoding="utf-8",
                env={**os.environ, "MNIST": os.path.abspath(data)},
            )  # fmt: skip
            if not {"OUT", "FOLDER"} & set(words):
                made.write_text(done.stdout, encoding="utf-8")
            if not made.exists() or not made.stat().st_size:
                print(f"{name}: failed with status {done.returncode}", flush=True)
                failed += 1
                continue
            report = stored.load(made)
            hidden = {"FOLDER": "DIR", "OUT": "FILE", "CORPUS": "FILE", data: "DIR"}
            run = ["python" if program == [] else "fused-dni", *(hidden.get(w, w) for w in words)]
            report.facts["command"] = shlex.join(run)
            stored.write(stored.VERDICT / f"{machine}-{name}.json", report)
    return failed


# ------------------------------------------------------------------------------------- questions


class Question(NamedTuple):
    """A claim, what is measured of it, and how results become an answer.

    Attributes:
        claim: as people say it.
        about: what is measured, and the caveat. Without figures: those are results.
        patterns: of the results' names, in bench/results.
        answer: from the results of one machine that fit; None for a claim left open.
    """

    claim: str
    about: str
    patterns: tuple[str, ...]
    answer: Callable[[dict[str, Report]], Answer | None] | None

    @property
    def key(self) -> str:
        """The answer's name: part of the names of its figures."""
        return self.answer.__name__.replace("_", "-") if self.answer else "open"


QUESTIONS = (
    Question(
        "“If what lies above is expensive, the prediction may be a lot cheaper, once trained”",
        "A network below a top that costs many times what it does itself and is run, the loss "
        "included, on every k-th step alone: word language models under their softmax, an "
        "autoencoder under a loss of frozen convolutional features, compressed embeddings under a "
        "pretrained sentence encoder. Each arm on its own clock for the same time, beside what "
        "people do by hand instead, and beside the same number of full steps alone.",
        (races.UNDER_TOPS,),
        readings.tops,
    ),
    Question(
        "“A simple dense layer probably will not gain”",
        "A linear layer alone, without normalisation or activation, inside a network: on steps "
        "with targets its input's producer gets a gradient. Three synthesizers. Time only.",
        ("verdict/*-dense-*",),
        readings.dense,
    ),
    Question(
        "“Layers with expensive backprop (batch norm, fancy activations) might gain”",
        "One layer of 512 units at batch 128 with each normalisation and activation, and the "
        "interface in both places, synthesizers of the default rank. With the interface at the "
        "output the update still goes back through activation and normalisation of the layer "
        "itself; with the interface at the preactivation it does not. Fused kernels make both "
        "cheap to begin with. Time only: accuracy is a question of its own, below.",
        ("verdict/*-activation-*",),
        readings.activations,
    ),
    Question(
        "“The work is only slid in time”",
        "What a step consists of, each part timed alone, with its floating-point operations and "
        "bytes and the floor that they set on this device. On one device a synthetic gradient can "
        "only leave out what nobody asks for on steps without targets.",
        ("verdict/*-dense-1024",),
        readings.work,
    ),
    Question(
        "“Or every iteration is faster”",
        "The map over batch, width, k and synthesizer. An iteration with targets and one without "
        "are different things; their mix is k.",
        ("verdict/*-map",),
        readings.iterations,
    ),
    Question(
        "“Put one interface behind a whole block, then”",
        "MLP blocks of growing depth, a block of convolutions and a transformer's block, each with "
        "one interface at its end. Inside the block gradients are exact, so the deeper the block, "
        "the smaller the share that a prediction can replace.",
        ("verdict/*-depth-*", "verdict/*-segment-*"),
        readings.segments,
    ),
    Question(
        "“The gain is longer sequences”",
        "An LSTM by DNI at a short window, beside truncated backprop at the same window and "
        "backprop at a window five times as long: time and peak memory. Whether the short window "
        "then learns what the long one does: docs/recurrent.md.",
        ("verdict/*-lstm-window",),
        readings.window,
    ),
    Question(
        "“It gives credit beyond the truncation window”",
        "Truncated backprop and DNI at the same window, for the same number of steps or "
        "characters: a copy task whose length grows with success, and characters of a text. "
        "Settings and controls: docs/recurrent.md.",
        ("*-copy", "*-charlm"),
        readings.reach,
    ),
    Question(
        "“When layers run side by side, nobody waits”",
        "The update lock of the lowest of n segments, each on a device of its own. Not measured: "
        "no such machine was at hand. Communication would lengthen both sides.",
        ("verdict/*-depth-*",),
        readings.side_by_side,
    ),
    Question(
        "“The predicted gradients are negligible anyway”",
        "For recurrent windows: the norm of what the future contributes to the gradient of a "
        "window's parameters, over the norm of the window's own contribution, by full backprop "
        "through trained nets. How well it is predicted is another matter: docs/recurrent.md.",
        ("*-copy", "*-charlm"),
        readings.future,
    ),
    Question(
        "“The more interfaces, the noisier”",
        "Networks of growing depth with an interface behind every layer, trained alike; then each "
        "synthetic gradient against the true gradient of the whole network. The deepest network "
        "stands there with fewer interfaces too.",
        ("verdict/*-interfaces",),
        readings.noise,
    ),
    Question(
        "“It costs accuracy”",
        "The paper's network on MNIST, the same number of steps for all: as published, with the "
        "interface in both places; and by the recipes that came out best (docs/recipes.md).",
        ("verdict/*-mnist-*", "*-recipes"),
        readings.accuracy,
    ),
    Question(
        "“Anything that does not wait would do as well”",
        "The rivals (docs/rivals.md): the same network and data, every run the same wall-clock, on "
        "the same kernels where they serve.",
        ("verdict/*-rivals",),
        readings.rivals,
    ),
    Question(
        "“Inside a network it does not pay”",
        "Hidden layers that cost most of a step, above a table of n-grams that needs many steps; "
        "all of it learns, the layers above the interface on every k-th step alone "
        "(docs/rivals.md).",
        ("verdict/*-race-hidden",),
        readings.inside,
    ),
    Question(
        "“In other networks it does not pay either”",
        "The rivals by width, depth and budget (docs/rivals.md), on MNIST and on the characters of "
        "a text: after as many batches, in as much time, and the time to backprop's error.",
        ("verdict/*-rivals-grid-*",),
        readings.grid,
    ),
    Question(
        "“And for my model?”",
        "`fused-dni advise` for three models: it predicts what converting would do from blocks "
        "measured alone, converts a copy, and measures that.",
        ("verdict/*-advice-*",),
        readings.advice,
    ),
    Question(
        "“Separate machines are just minibatches”",
        "Stages of a network whose gradients come so many steps late over each cut, in one "
        "process, to the bit what processes with that lag compute: what lateness costs in "
        "accuracy, by the ways not to wait. Local losses need the labels at every stage. Whether "
        "it gains over data parallelism on the same machines is simulated (`fused-dni simulate`), "
        "not measured.",
        ("*-delay-2-stages", "*-delay-4-stages"),
        readings.distance,
    ),
    Question(
        "“Can such figures be trusted?”",
        "Differences planted by a calibrated extra delay, and planted equality, on a busy machine; "
        "segments whose answer is known; steps under tops of a known cost, on an idle one. `python "
        "bench/planted.py`.",
        ("verdict/*-planted*",),
        readings.trust,
    ),
)


def committed(patterns: tuple[str, ...]) -> dict[str, dict[str, Report]]:
    """Results by machine and by name, in the order in which they are measured."""
    order = {name: place for place, (name, _) in enumerate(commands("DIR"))}
    found: dict[str, dict[str, Report]] = {}
    for path, report in stored.matching(*patterns).items():
        machine = stored.machine(report["facts"])
        found.setdefault(machine, {})[path.stem.removeprefix(f"{machine}-")] = report
    return {
        machine: {name: named[name] for name in sorted(named, key=lambda n: order.get(n, 0))}
        for machine, named in found.items()
    }


def answered(question: Question) -> Iterator[tuple[dict[str, Report], Answer]]:
    """Yield an answer for every machine whose results give one."""
    if question.answer is not None:
        for reports in committed(question.patterns).values():
            found = question.answer(reports)
            if found is not None:
                yield reports, found
