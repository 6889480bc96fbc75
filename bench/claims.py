"""What people say of synthetic gradients: what is measured of each claim, and what it came to.

``measure`` runs commands on this machine and keeps what they write in ``bench/results/verdict``;
the answers read all of it, whatever machine it is from.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import races
import stored
from fused_dni.measure.baseline import facts
from fused_dni.ops.types import ACTIVATIONS
from fused_dni.report import Block, Figure, Heading, Table, Text, blocks_of, text
from fused_dni.report.kinds import advice as advice_report
from fused_dni.report.kinds import interfaces as interfaces_report
from fused_dni.report.kinds import planted
from fused_dni.report.kinds import race as race_report
from fused_dni.report.kinds import recurrent as recurrent_report
from fused_dni.report.kinds import rivals as rivals_report
from fused_dni.report.kinds import verdict as verdict_report

Report = dict[str, Any]
NORMS = ("none", "batch", "layer")
DEPTHS = (1, 2, 4, 8, 16)
MODELS = ("mlp", "convnet", "lstm_lm")


# ------------------------------------------------------------------------------------ measuring


def commands(data: str) -> Iterator[tuple[str, list[str]]]:
    """What is measured: the result's name, and the words behind ``fused-dni``, or a script and its
    own. ``OUT`` is the file that is written; a command that writes a folder has ``FOLDER``, one
    that has neither prints its JSON."""
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
    for interface, rank in (("output", "16"), ("preactivation", "16"), ("preactivation", "0")):
        words = ["train", "--data", data, "--methods", "fused", "cdni", "--rank", rank]
        words += ["--interface", interface, "--quiet", "--no-split", "--out", "FOLDER"]
        yield f"mnist-{interface}-{rank}", words
    for race in races.TITLES:
        words = ["race", f"bench.races:{race}", "--seconds", races.SECONDS[race], "--threads", "2"]
        arms = ["--arms", *races.ARMS[race]] if race in races.ARMS else []
        yield f"race-{race}", [*words, *arms, *out]
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
        if name.startswith("race-") and (why := races.lacks(name.removeprefix("race-"))):
            print(f"{name}: left out: {why}", flush=True)
            continue
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / ("report.json" if "FOLDER" in words else "out.json")
            places = {"FOLDER": folder, "OUT": str(made)}
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
            report = json.loads(made.read_text(encoding="utf-8"))
            hidden = {"FOLDER": "DIR", "OUT": "FILE", data: "DIR"}
            run = ["python" if program == [] else "fused-dni", *(hidden.get(w, w) for w in words)]
            report["facts"]["command"] = shlex.join(run)
            stored.write(stored.VERDICT / f"{machine}-{name}.json", report)
    return failed


# ------------------------------------------------------------------------------------- questions


class Answer(NamedTuple):
    """What was measured of a claim: a sentence, what it is read off, and a shorter sentence for the
    README if the first is long."""

    sentence: str
    blocks: list[Block]
    brief: str = ""


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
    answer: Callable[[dict[str, Report]], Answer] | None


def ratio(found: Report) -> str:
    """``0.83 (0.81 to 0.85)``, with a ~ where no difference was shown."""
    mark = "~" if found.get("verdict") == "inconclusive" else ""
    middle = f"{mark}{found['median']:.2f}"
    if found.get("interval") is None:
        return middle
    low, high = found["interval"]
    return f"{middle} ({low:.2f} to {high:.2f})"


def cycle(variant: Report, k: str) -> Report:
    """A variant's time at k over backprop on the same kernels."""
    found: Report = variant["cycles"][k]["ratios"][variant["base"]]
    return found


def dense(reports: dict[str, Report]) -> Answer:
    """Bare linear layers."""
    parts, blocks = [], []
    for report in reports.values():
        found = [v["break_even"][v["base"]] for v in report["variants"]]
        evens = [
            f"{v['synthesizer']}: {verdict_report.even(e)}"
            for v, e in zip(report["variants"], found, strict=True)
        ]
        parts.append(f"For {report['title']} the break-even is, {'; '.join(evens)}.")
        blocks.append(Text(f"**{report['title']}**"))
        blocks.append(verdict_report.variants(report))
    return Answer(" ".join(parts), blocks)


def activations(reports: dict[str, Report]) -> Answer:
    """One layer with every normalisation and activation, both interfaces."""
    rows, best = [], {"output": [], "preactivation": []}
    for name, report in reports.items():
        _, norm, activation = name.split("-")
        ours = report["timings"]["fused"]["median"]
        row = [f"{norm}, {activation}", text.seconds(ours)]
        for variant in report["variants"]:
            if variant["synthesizer"] != "rank 16":
                continue
            found = [cycle(variant, k) for k in ("1", "4", "never")]
            best[variant["interface"]].append(found)
            row += [ratio({**f, "interval": None}) for f in found]
        rows.append(row)
    header = ["normalisation, activation", "backprop"]
    header += [f"{place}, k={k}" for place in ("at h", "at z") for k in ("1", "4", "never")]
    said = []
    for place, name in (("output", "the output"), ("preactivation", "the preactivation")):
        for index, when in ((0, "with targets on every step"), (2, "without targets")):
            found = [f[index] for f in best[place]]
            cheaper = sum(f["verdict"] == "faster" for f in found)
            medians = [f["median"] for f in found]
            said.append(
                f"interface at {name}, {when}: cheaper for {cheaper} of {len(found)} layers "
                f"(ratios {min(medians):.2f} to {max(medians):.2f})"
            )
    caption = (
        "Ratios to backprop on the same kernels; ~: no difference was shown. At h: the interface "
        "at the output. At z: at the preactivation, where a step without targets does not go back "
        "through activation and normalisation."
    )
    sentence = "; ".join(said)
    return Answer(sentence[0].upper() + sentence[1:] + ".", [Table(header, rows, caption)])


def work(reports: dict[str, Report]) -> Answer:
    """Parts of a step, and what can be taken away at most."""
    report = reports["dense-1024"]
    found = report["parts"]
    most = found["amdahl"]
    return Answer(
        f"Of a step of {report['title']} by backprop on our kernels, synthetic gradients can take "
        f"away {100 * most['share']:.0f} % at most.",
        [
            Text(most["means"]),
            verdict_report.parts(report),
            verdict_report.sums(report),
        ],
    )


def iterations(reports: dict[str, Report]) -> Answer:
    """The map."""
    (report,) = reports.values()
    said = [b for b in blocks_of(report) if not isinstance(b, Heading)]
    sentences = [b.text for b in said if isinstance(b, Text) and "synthesizer" in b.text[:40]]
    shown = [b for b in said if not (isinstance(b, Text) and b.text in sentences)]
    points = [p for s in report["series"].values() for p in s["points"].values() if "ratios" in p]
    counts = []
    for k, when in (("1", "k=1"), ("4", "k=4"), ("never", "without targets")):
        words = [point["ratios"]["fused"][k]["verdict"] for point in points]
        counts.append(f"{when}: {words.count('faster')} (slower at {words.count('slower')})")
    brief = (
        f"Of {len(points)} points of batch, width and synthesizer, faster than backprop on the "
        f"same kernels at {', '.join(counts)}; the others inconclusive."
    )
    return Answer(" ".join(sentences), shown, brief)


def segments(reports: dict[str, Report]) -> Answer:
    """Blocks of many layers behind one interface."""
    rows, said = [], []
    for report in reports.values():
        variant = report["variants"][0]
        found = {k: cycle(variant, k) for k in ("1", "4", "never")}
        at_most = report["parts"]["amdahl"]["share"]
        even = verdict_report.even(variant["break_even"][variant["base"]])
        rows.append(
            [
                report["title"],
                text.seconds(report["timings"]["backprop"]["median"]),
                text.seconds(report["timings"][variant["base"]]["median"]),
                *(ratio(f) for f in found.values()),
                f"{100 * at_most:.0f} %",
                even,
            ]
        )
        said.append(f"{report['title']}: {even}")
    header = ["behind one interface", "stock", "ours", "k=1", "k=4", "never", "at most", "pays"]
    caption = (
        "Stock and ours: a step of backprop by PyTorch, and on our kernels. Ratios to the latter, "
        "with 99 % intervals. At most: what synthetic gradients can take away (see above)."
    )
    sentence = "From which k it pays, " + "; ".join(said) + "."
    evens = [
        f"{name.partition('-')[2]}: {row[-1]}" for name, row in zip(reports, rows, strict=True)
    ]
    deep = sum(name.startswith("depth") for name in reports)
    brief = f"From which k it pays, by the number of layers of 256, {', '.join(evens[:deep])}"
    brief = "; ".join([brief, *evens[deep:]]) + "."
    return Answer(sentence, [Table(header, rows, caption)], brief)


def window(reports: dict[str, Report]) -> Answer:
    """An LSTM at a short window with the future predicted, and at a long one."""
    (report,) = reports.values()
    said = [b for b in blocks_of(report) if not isinstance(b, Heading)]
    short, long = report["window"], report["long"]
    names = {
        f"dni T={short}": f"DNI at T={short}",
        f"fused T={short}": f"truncated backprop at T={short}",
        f"fused T={long}": f"backprop at T={long}",
    }
    each = [
        f"{words} {text.seconds(report['timings'][name]['median'])} "
        f"({text.size(report['memory'][name])})"
        for name, words in names.items()
    ]
    brief = f"A time step of {report['title']} and its peak memory, on our kernels: "
    shown = [b for b in said if isinstance(b, (Table, Figure))]
    return Answer(report["sentence"], shown, brief + ", ".join(each) + ".")


def side_by_side(reports: dict[str, Report]) -> Answer:
    """The critical path, computed from measured parts."""
    report = reports["depth-1"]
    path = report["parts"]["critical path"]
    n, unlocked = path["n"][-1], path["unlocked"][-1]
    return Answer(
        f"In a chain of {n} segments like {report['title']}, each on a device of its own, the "
        f"lowest would update {unlocked:.1f} times as early. This is computed from measured parts, "
        "not measured.",
        [verdict_report.critical_path(report), verdict_report.lock(report)],
    )


def future(reports: dict[str, Report]) -> Answer:
    """The true gradient of the future, by window."""
    said, blocks = [], []
    for report in reports.values():
        outcome = recurrent_report.outcome_of(report)
        table = recurrent_report.future_table(outcome)
        row = table.rows[0]
        last = max(i for i, value in enumerate(row) if value != "-")
        low, high = table.header[1], table.header[last]
        name = f"{report['kind'].split()[-1]}, {outcome.settings.amount:,} {outcome.axis}"
        said.append(f"{name} ({row[0]}): {row[1]} at {low}, {row[last]} at {high}")
        blocks += [Text(f"**{name}**"), table]
        blocks += [f for f in recurrent_report.curves(outcome) if f.name in ("future-vs-window",)]
    return Answer(
        "Norm of the future's part of a window's parameter gradient over the window's own: "
        + "; ".join(said)
        + ".",
        blocks,
    )


def noise(reports: dict[str, Report]) -> Answer:
    """Cosine by depth."""
    (report,) = reports.values()
    said = []
    for row in report["networks"]:
        if row["every"] == 1:
            found = interfaces_report.mean_of(row, 1, "true_cosine")
            errors = statistics.fmean(run["error"] for run in row["runs"])
            if found is not None:
                said.append(f"{found:.2f} with {row['depth']} (error {100 * errors:.2f} %)")
    shown = [b for b in blocks_of(report) if not isinstance(b, Heading)]
    return Answer(
        "Cosine of the lowest layer's synthetic gradient with the true one, by the number of "
        f"layers, each with an interface: {', '.join(said)}.",
        shown,
    )


def rivals(reports: dict[str, Report]) -> Answer:
    """Everything that does not wait."""
    (report,) = reports.values()
    shown = [b for b in blocks_of(report) if not isinstance(b, Heading)]
    errors = {row["name"]: rivals_report.errors(report, row["name"]) for row in report["arms"]}
    means = {name: statistics.fmean(found) for name, found in errors.items() if found}
    order = sorted(means, key=lambda name: means[name])
    listed = ", ".join(f"{name} {100 * means[name]:.2f} %" for name in order)
    return Answer(f"Error at equal wall-clock, from the best: {listed}.", shown)


def tops(reports: dict[str, Report]) -> Answer:
    """Races under an expensive top."""
    said: list[str] = []
    brief: list[str] = []
    shown: list[Block] = []
    for report in reports.values():
        name = races.title(report)
        said.append(f"{name}: {race_report.sentence(report)}")
        brief.append(f"{name}: {said_of(report, True)}; {said_of(report, False)}")
        shown += [Text(f"{name}.")]
        shown += [b for b in blocks_of(report) if isinstance(b, (Table, Figure))]
    start = "In what part of its time others come to what backprop ends with, the soonest by "
    start += "synthetic gradients and the soonest otherwise. "
    return Answer(" ".join(said), shown, start + ". ".join(brief) + ".")


def said_of(report: Report, ours: bool) -> str:
    """The soonest arm, of those by DNI or of the others."""
    found = races.soonest(report, ours)
    return "none" if found is None else f"{found[0]} {statistics.median(found[1]):.2f}"


def accuracy(reports: dict[str, Report]) -> Answer:
    """MNIST with the interface at either place, by the rank of the synthesizers."""
    rows = []
    for place, report in enumerate(reports.values()):
        settings = report["settings"]
        rank = f"rank {settings['rank']}" if settings["rank"] else "dense"
        for row in report["summary"]:
            ours = row["name"].startswith("cdni")
            if ours or place == 0:
                low, high = row["error_min"], row["error_max"]
                spread = f"{row['error_mean']:.2%} ({low:.2%} to {high:.2%})"
                how = [settings["interface"], rank] if ours else ["-", "-"]
                rows.append([row["name"], *how, spread, text.seconds(row["seconds_per_step"])])
    said = [f"{' '.join(c for c in row[:3] if c != '-')} {row[3].split()[0]}" for row in rows]
    header = ["method", "interface", "synthesizer", "error, mean and range", "step"]
    return Answer(f"Error on the test set: {', '.join(said)}.", [Table(header, rows)])


def advice(reports: dict[str, Report]) -> Answer:
    """Predicted and measured steps of whole models."""
    sentences, shown, brief = [], [], []
    for name, report in reports.items():
        said = blocks_of(report)
        sentences.append(advice_report.sentence(report))
        shown += [b for b in said if isinstance(b, Table)][:2]
        found = ratio(report["ratios"]["our kernels"]["proposal"]["measured"])
        worst = max(abs(step["error %"]) for step in report["steps"].values())
        brief.append(f"{name.removeprefix('advice-')} {found}, predicted within {worst:.0f} %")
    start = "The proposal's time over backprop on the same kernels: "
    return Answer(" ".join(sentences), shown, start + "; ".join(brief) + ".")


def trust(reports: dict[str, Report]) -> Answer:
    """Planted differences, segments and tops, and sums of parts."""
    tables = [b for report in reports.values() for b in blocks_of(report) if isinstance(b, Table)]
    return Answer(" ".join(map(planted.sentence, reports.values())), [*tables])


QUESTIONS = (
    Question(
        "“If what lies above is expensive, the prediction may be a lot cheaper, once trained”",
        "A network below a top that costs many times what it does itself and is run, the loss "
        "included, on every k-th step alone: word language models under their softmax, an "
        "autoencoder under a loss of frozen convolutional features, compressed embeddings under a "
        "pretrained sentence encoder. Each arm on its own clock for the same time, beside what "
        "people do by hand instead, and beside the same number of full steps alone.",
        ("verdict/*-race-*",),
        tops,
    ),
    Question(
        "“A simple dense layer probably will not gain”",
        "A linear layer alone, without normalisation or activation, inside a network: on steps "
        "with targets its input's producer gets a gradient. Three synthesizers. Time only.",
        ("verdict/*-dense-*",),
        dense,
    ),
    Question(
        "“Layers with expensive backprop (batch norm, fancy activations) might gain”",
        "One layer of 512 units at batch 128 with each normalisation and activation, and the "
        "interface in both places, synthesizers of the default rank. With the interface at the "
        "output the update still goes back through activation and normalisation of the layer "
        "itself; with the interface at the preactivation it does not. Fused kernels make both "
        "cheap to begin with. Time only: accuracy is a question of its own, below.",
        ("verdict/*-activation-*",),
        activations,
    ),
    Question(
        "“The work is only slid in time”",
        "What a step consists of, each part timed alone, with its floating-point operations and "
        "bytes and the floor that they set on this device. On one device a synthetic gradient can "
        "only leave out what nobody asks for on steps without targets.",
        ("verdict/*-dense-1024",),
        work,
    ),
    Question(
        "“Or every iteration is faster”",
        "The map over batch, width, k and synthesizer. An iteration with targets and one without "
        "are different things; their mix is k.",
        ("verdict/*-map",),
        iterations,
    ),
    Question(
        "“Put one interface behind a whole block, then”",
        "MLP blocks of growing depth, a block of convolutions and a transformer's block, each with "
        "one interface at its end. Inside the block gradients are exact, so the deeper the block, "
        "the smaller the share that a prediction can replace.",
        ("verdict/*-depth-*", "verdict/*-segment-*"),
        segments,
    ),
    Question(
        "“The gain is longer sequences”",
        "An LSTM by DNI at a short window, beside truncated backprop at the same window and "
        "backprop at a window five times as long: time and peak memory. Whether the short window "
        "then learns what the long one does: docs/recurrent.md.",
        ("verdict/*-lstm-window",),
        window,
    ),
    Question(
        "“When layers run side by side, nobody waits”",
        "The update lock of the lowest of n segments, each on a device of its own. Not measured: "
        "no such machine was at hand. Communication would lengthen both sides.",
        ("verdict/*-depth-*",),
        side_by_side,
    ),
    Question(
        "“The predicted gradients are negligible anyway”",
        "For recurrent windows: the norm of what the future contributes to the gradient of a "
        "window's parameters, over the norm of the window's own contribution, by full backprop "
        "through trained nets. How well it is predicted is another matter: docs/recurrent.md.",
        ("*-copy", "*-charlm"),
        future,
    ),
    Question(
        "“The more interfaces, the noisier”",
        "Networks of growing depth with an interface behind every layer, trained alike; then each "
        "synthetic gradient against the true gradient of the whole network. The deepest network "
        "stands there with fewer interfaces too.",
        ("verdict/*-interfaces",),
        noise,
    ),
    Question(
        "“It costs accuracy”",
        "The paper's network on MNIST, the interface in both places, the same number of steps for "
        "all.",
        ("verdict/*-mnist-*",),
        accuracy,
    ),
    Question(
        "“Anything that does not wait would do as well”",
        "The rivals (docs/rivals.md): the same network and data, every run the same wall-clock, on "
        "the same kernels where they serve.",
        ("verdict/*-rivals",),
        rivals,
    ),
    Question(
        "“And for my model?”",
        "`fused-dni advise` for three models: it predicts what converting would do from blocks "
        "measured alone, converts a copy, and measures that.",
        ("verdict/*-advice-*",),
        advice,
    ),
    Question(
        "“Separate machines are just minibatches”",
        "Left open: whether layers on separate machines gain over data parallelism on the same "
        "machines is not answered by any figure here.",
        (),
        None,
    ),
    Question(
        "“Can such figures be trusted?”",
        "Differences planted by a calibrated extra delay, and planted equality, on a busy machine; "
        "segments whose answer is known; steps under tops of a known cost, on an idle one. `python "
        "bench/planted.py`.",
        ("verdict/*-planted*",),
        trust,
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
    """An answer for every machine that has results."""
    if question.answer is not None:
        for reports in committed(question.patterns).values():
            yield reports, question.answer(reports)
