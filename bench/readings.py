"""What the results behind a claim come to: the answer in a few words, a figure, the tables.

Each function takes the results of one machine that belong to a claim, by name, and says nothing
that they do not hold: words such as "mostly" are counted, not chosen.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import races
from fused_dni.experiments.recipe_settings import BEST
from fused_dni.experiments.rival_arms import EXACT
from fused_dni.experiments.settings import Recurrent
from fused_dni.report import Block, Figure, Heading, Result, Table, Text, blocks_of, text
from fused_dni.report.kinds import delay as delay_report
from fused_dni.report.kinds import interfaces as interfaces_report
from fused_dni.report.kinds import recipes as recipes_report
from fused_dni.report.kinds import recurrent as recurrent_report
from fused_dni.report.kinds import rival_grid as grid_report
from fused_dni.report.kinds import rivals as rivals_report
from fused_dni.report.kinds import verdict as verdict_report
from fused_dni.report.timings import Ratio

Report = Result


class Bullet(NamedTuple):
    """What the README says of a claim.

    Attributes:
        text: without a full stop.
        about: which part of the claim, where results of several machines have one.
        seeds: that it rests on; of what several machines say about the same, the most are taken.
    """

    text: str
    about: str = ""
    seeds: int = 0


class Answer(NamedTuple):
    """What was measured of a claim.

    Attributes:
        answer: in a few words, for the summary.
        number: the figure that it rests on, for the summary.
        sentence: the same as a paragraph, of 600 characters at most.
        blocks: all tables and figures.
        shown: the table, of eight rows at most, or the figure that the short page has.
        bullets: for the README, where the claim has a line there.
    """

    answer: str
    number: str
    sentence: str
    blocks: list[Block]
    shown: Table | Figure | None = None
    bullets: tuple[Bullet, ...] = ()


#: What runs solved, by method.
Solved = dict[str, list[float]]


# ----------------------------------------------------------------------------------------- words


def cycle(variant: Mapping[str, Any], k: str) -> Ratio:
    """Find a variant's time at k over backprop on the same kernels."""
    found: Ratio = variant["cycles"][k]["ratios"][variant["base"]]
    return found


def often(count: int, of: int) -> str:
    """Say how often something was so, as one word."""
    if count in (0, of):
        return "no" if count == 0 else "yes"
    share = count / of
    return "seldom" if share < 0.25 else "in part" if share < 0.75 else "mostly"


def faster(found: Sequence[Ratio]) -> int:
    """Count the ratios that were shown to be below one."""
    return sum(one.verdict() == "faster" for one in found)


# --------------------------------------------------------------------------------------- answers


def tops(reports: dict[str, Report]) -> Answer:
    """Races under an expensive top."""
    rows: list[list[str]] = []
    shown: list[Block] = []
    ours: list[float] = []
    others: list[float] = []
    alone: list[float] = []
    ahead = 0
    for report in reports.values():
        name = races.title(report)
        shown += [Text(f"**{name}.** {report.sentence}")]
        shown += [b for b in blocks_of(report) if isinstance(b, (Table, Figure))]
        row, medians = [name], []
        for which, kept in ((races.by_dni, ours), (races.otherwise, others)):
            found = races.soonest(report, which)
            row += ["none", "-"] if found is None else [found[0], text.parts(found[1])]
            medians.append(float("inf") if found is None else statistics.median(found[1]))
            if found is not None:
                kept.append(medians[-1])
        ahead += medians[1] < medians[0]
        rows.append(row)
        if (found := races.soonest(report, races.by_dni_alone)) is not None:
            alone.append(statistics.median(found[1]))
    of = len(rows)
    number = f"{text.span(ours)} of backprop's time" if ours else "never there"
    rest = f"other means {text.span(others)}" if others else "no other means"
    sentence = (
        f"By synthetic gradients backprop's final loss was reached sooner in {len(ours)} of {of} "
        f"races, with every seed, in {number}; {rest}, and sooner than by synthetic gradients in "
        f"{ahead} of {of}."
    )
    bullet = (
        "Below an expensive top (a softmax over all words, a frozen encoder) that is run on every "
        f"k-th step alone, backprop's final loss was reached in **{number}** (medians of "
        f"{len(ours)} of {of} races). A cheap stand-in for the top (adaptive, sampled, by hand) "
        f"needed {text.span(others) if others else '-'} and was sooner in {ahead} of {of}: "
        "synthetic gradients are for tops for which nobody has one, and the soonest of theirs use "
        "one too (head sampled, surrogate). Without any they needed "
        f"{text.span(alone) if alone else '-'} in {len(alone)} of {of}"
    )
    if len(alone) < of:
        bullet += f", and in the other{'s' if of - len(alone) > 1 else ''} they were not sooner"
    header = ["race", "soonest by DNI", "part of the time", "soonest otherwise", "part of the time"]
    caption = (
        "The part of backprop's time in which others reach its final loss: median over seeds, "
        "range; the soonest of the ways that are sooner with every seed. Head sampled: the top's "
        "own steps are of a sampled softmax; surrogate: a synthesizer that starts from a "
        "stand-in's gradient; by hand: that stand-in, which somebody wrote for this task, as the "
        "loss."
    )
    return Answer(
        f"{often(len(ours), of)}; but other means are sooner in {ahead} of {of}",
        f"{number}; {rest}",
        sentence,
        shown,
        Table(header, rows, caption),
        (Bullet(bullet),),
    )


def dense(reports: dict[str, Report]) -> Answer:
    """Bare linear layers."""
    blocks: list[Block] = []
    rows = []
    found: dict[str, list[Ratio]] = {"1": [], "4": [], "never": []}
    for report in reports.values():
        blocks += [Text(f"**{report['title']}**"), verdict_report.variants(report)]
        for variant in report["variants"]:
            for k, kept in found.items():
                kept.append(cycle(variant, k))
            cells = [text.ratio(kept[-1]) for kept in found.values()]
            even = str(variant["break_even"][variant["base"]])
            name = f"{report['title'].removeprefix('one layer ')}, {variant['synthesizer']}"
            rows.append([name, *cells, even])
    of = len(rows)
    counts = {k: faster(kept) for k, kept in found.items()}
    medians = [one.median for one in found["4"]]
    number = f"{text.span(medians)} of backprop's time at k=4"
    sentence = (
        f"Of {of} pairs of layer and synthesizer, faster than backprop on the same kernels with "
        f"targets on every step: {counts['1']}; on every fourth: {counts['4']} ({number}); never: "
        f"{counts['never']}."
    )
    header = ["layer, synthesizer", "k=1", "k=4", "never", "pays from"]
    return Answer(
        f"faster at k=1: {often(counts['1'], of)}; at k=4: {often(counts['4'], of)}",
        number,
        sentence,
        blocks,
        Table(header, rows, RATIOS),
    )


RATIOS = "Ratios to backprop on the same kernels; ~: no difference was shown."


def activations(reports: dict[str, Report]) -> Answer:
    """One layer with every normalisation and activation, both interfaces."""
    rows = []
    places = {"output": "at h", "preactivation": "at z"}
    ks = ("1", "4", "never")
    by: dict[tuple[str, str], list[list[Ratio]]] = {}
    for name, report in reports.items():
        _, norm, activation = name.split("-")
        row = [f"{norm}, {activation}", text.seconds(report.timings["fused"].median)]
        for variant in report["variants"]:
            if variant["synthesizer"] != "rank 16":
                continue
            found = [cycle(variant, k) for k in ks]
            by.setdefault((norm, variant["interface"]), []).append(found)
            row += [text.ratio(f) for f in found]
        rows.append(row)
    header = ["normalisation, activation", "backprop"]
    header += [f"{place}, k={k}" for place in places.values() for k in ks]
    caption = (
        f"{RATIOS} At h: the interface at the output. At z: at the preactivation, where a step "
        "without targets does not go back through activation and normalisation."
    )
    lines = []
    for (norm, place), found in by.items():
        cells = [text.span(f[i].median for f in found) for i in range(len(ks))]
        lines.append([f"{norm}, interface {places[place]}", str(len(found)), *cells])
    every = [f for found in by.values() for f in found]
    counts = [faster([f[i] for f in every]) for i in range(len(ks))]
    fourth: dict[bool, list[float]] = {True: [], False: []}
    for (norm, _), found in by.items():
        fourth[norm == "none"] += [f[1].median for f in found]
    without, behind = (text.span(fourth[key]) if fourth[key] else "-" for key in (True, False))
    number = f"at k=4 {behind} of backprop's time with a normalisation, {without} without"
    sentence = (
        f"Faster than backprop on the same kernels with targets on every step: {counts[0]} of "
        f"{len(every)} ({len(rows)} layers, two places of the interface); on every fourth: "
        f"{counts[1]}; never: {counts[2]}. Ratios {number}."
    )
    return Answer(
        f"faster at k=1: {often(counts[0], len(every))}; at k=4: {often(counts[1], len(every))}",
        number,
        sentence,
        [Table(header, rows, caption)],
        Table(
            ["normalisation, interface", "activations", *(f"k={k}" for k in ks)],
            lines,
            "Ratios to backprop on the same kernels, from the lowest to the highest of the "
            "activations. At h: the interface at the output; at z: at the preactivation.",
        ),
    )


def work(reports: dict[str, Report]) -> Answer:
    """Parts of a step, and what can be taken away at most."""
    report = reports["dense-1024"]
    most = report["parts"]["amdahl"]
    share = f"{100 * most['share']:.0f} %"
    return Answer(
        f"in part: at most {share} of a step can be left out",
        f"{share} of a step",
        f"Of a step of {report['title']} by backprop on our kernels, synthetic gradients can take "
        f"away {share} at most.",
        [Text(most["means"]), verdict_report.parts(report), verdict_report.sums(report)],
    )


def iterations(reports: dict[str, Report]) -> Answer:
    """Return the map."""
    (report,) = reports.values()
    shown = [b for b in blocks_of(report, origin=False) if not isinstance(b, Heading)]
    points = [p for s in report["series"].values() for p in s["points"].values() if "ratios" in p]
    of = len(points)
    counts, slower = {}, {}
    for k in ("1", "4", "never"):
        words = [point["ratios"]["fused"][k].verdict() for point in points]
        counts[k], slower[k] = words.count("faster"), words.count("slower")
    sentence = (
        f"Of {of} points of batch, width and synthesizer, faster than backprop on the same kernels "
        f"with targets on every step: {counts['1']} (slower: {slower['1']}); on every fourth: "
        f"{counts['4']} (slower: {slower['4']}); never: {counts['never']} (slower: "
        f"{slower['never']}). The others are inconclusive."
    )
    bullet = (
        "One layer's step with targets on every step is faster than backprop on the same kernels "
        f"at **{counts['1']} of {of}** points of batch, width and synthesizer, slower at "
        f"{slower['1']}; with targets on every fourth step faster at **{counts['4']} of {of}**, "
        f"slower at {slower['4'] or 'none'}"
    )
    figure = next(b for b in shown if isinstance(b, Figure) and b.name.endswith("break-even"))
    return Answer(
        f"faster at k=1: {often(counts['1'], of)}; at k=4: {often(counts['4'], of)}",
        f"faster at {counts['1']} and {counts['4']} of {of} points",
        sentence,
        shown,
        figure,
        (Bullet(bullet),),
    )


def segments(reports: dict[str, Report]) -> Answer:
    """Blocks of many layers behind one interface."""
    rows, short = [], []
    fourth, none = [], []
    for report in reports.values():
        variant = report["variants"][0]
        found = {k: cycle(variant, k) for k in ("1", "4", "never")}
        fourth.append(found["4"])
        none.append(found["never"])
        at_most = f"{100 * report['parts']['amdahl']['share']:.0f} %"
        even = str(variant["break_even"][variant["base"]])
        times = [report.timings[name].median for name in ("backprop", variant["base"])]
        cells = [text.ratio(f, to=" to ") for f in found.values()]
        rows.append([report["title"], *map(text.seconds, times), *cells, at_most, even])
        name = report["title"].replace(" behind one interface", "")
        bare = [text.ratio(f) for f in found.values()]
        short.append([name, *bare, at_most, even])
    header = ["behind one interface", "stock", "ours", "k=1", "k=4", "never", "at most", "pays"]
    caption = (
        "Stock and ours: a step of backprop by PyTorch, and on our kernels. Ratios to the latter, "
        "with 99 % intervals. At most: what synthetic gradients can take away."
    )
    of = len(rows)
    number = f"at k=4 {text.span(f.median for f in fourth)} of backprop's time"
    sentence = (
        f"Faster than backprop on the same kernels with targets on every fourth step: "
        f"{faster(fourth)} of {of} segments; never: {faster(none)}. Ratios {number}."
    )
    return Answer(
        f"faster at k=4: {often(faster(fourth), of)}; without targets: {often(faster(none), of)}",
        number,
        sentence,
        [Table(header, rows, caption)],
        Table(
            [header[0], *header[3:]],
            short,
            f"{RATIOS} At most: what synthetic gradients can take away.",
        ),
    )


def window(reports: dict[str, Report]) -> Answer:
    """Return an LSTM at a short window with the future predicted, and at a long one."""
    (report,) = reports.values()
    short, long = report["window"], report["long"]
    ours, same, longer = f"dni T={short}", f"fused T={short}", f"fused T={long}"
    timed, held = report["ratios"], report["memory"]
    costs, replaces = timed[same][ours], timed[longer][ours]
    less = held[ours] / held[longer]
    number = f"{text.ratio(replaces)} of the time, {less:.2f} of the memory of backprop at T={long}"
    words = {"faster": "yes", "slower": "no", "inconclusive": "in doubt"}
    sentence = (
        f"A time step of {report['title']} by DNI at T={short}, on the same kernels: {number}; "
        f"{text.ratio(costs, to=' to ')} of the time and {held[ours] / held[same]:.2f} of "
        f"the memory of truncated backprop at T={short}."
    )
    shown = [b for b in blocks_of(report) if isinstance(b, (Table, Figure))]
    table = next(b for b in shown if isinstance(b, Table))
    return Answer(
        f"time: {words[replaces.verdict()]}; memory: {'yes' if less < 1 else 'no'}",
        number,
        sentence,
        shown,
        table,
    )


def reach(reports: dict[str, Report]) -> Answer:
    """Say whether the credit goes beyond the window: copying, and characters."""
    rows, blocks, said, numbers = [], [], [], []
    won: dict[str, bool] = {}
    tasks = [report.settings["task"] for report in reports.values()]
    for report in reports.values():
        outcome = recurrent_report.outcome_of(report)
        task, key = outcome.settings.task, outcome.key
        name = f"{task}, {outcome.settings.amount:,} {outcome.axis}"
        label = task if tasks.count(task) == 1 else f"{task}, {outcome.settings.amount:,}"
        # A paragraph a pair of arms: of several windows there are as many.
        pairs = re.split(r"(?<=\.) (?=dni)", report.sentence)
        blocks += [Text(f"**{name}**"), recurrent_report.summary(outcome), *map(Text, pairs)]
        summed = {row["name"]: row for row in outcome.summary()}
        form = ".3f" if task == "charlm" else ".3g"
        unit = "bits a character" if task == "charlm" else "symbols"
        windows = outcome.settings.windows
        cells: dict[str, list[str]] = {"dni": [], "fused": []}
        means: dict[str, list[str]] = {"dni": [], "fused": []}
        times, apart = [], 0
        for window in windows:
            pair = {method: summed[f"{method} T={window}"] for method in cells}
            for method, row in pair.items():
                between = text.span((row[f"{key}_min"], row[f"{key}_max"]), form)
                several = f" ({between})" if len(row[key]) > 1 else ""
                means[method].append(f"{row[f'{key}_mean']:{form}}")
                cells[method].append(f"{means[method][-1]}{several}")
            dni, fused = pair.values()
            # Fewer bits are better, more symbols are: apart with every seed, or not told apart.
            if task == "charlm":
                better = dni[f"{key}_max"] < fused[f"{key}_min"]
            else:
                better = dni[f"{key}_min"] > fused[f"{key}_max"]
            apart += better and len(dni[key]) > 1
            times.append(" / ".join(text.seconds(row["seconds_total"]) for row in pair.values()))
        won[task] = won.get(task, False) or apart > 0
        listed, shown = ", ".join(map(str, windows)), cells if len(windows) == 1 else means
        ends = ["–".join(dict.fromkeys((row[0], row[-1]))) for row in means.values()]
        ours, theirs = (", ".join(found) for found in shown.values())
        rows.append([name, listed, unit, ours, theirs, ", ".join(times)])
        numbers.append(f"{label}: {' against '.join(ends)}")
        seeds = {len(windows): "every seed better", 0: "not told apart"}
        said.append(
            f"{name}, T={listed}: {ours} {unit} by DNI against {theirs} by truncated backprop, "
            f"{seeds.get(apart, f'every seed better at {apart} of {len(windows)} T')}"
        )
    words = {
        "copy": "when copying",
        "repeat-copy": "when copying repeatedly",
        "charlm": "on a text",
    }
    answer = ", ".join(
        f"{said} {'yes' if won[task] else 'no'}" for task, said in words.items() if task in won
    )
    told = [(r.settings["task"], len(r.settings["seeds"]), r) for r in reports.values()]
    bullets = [_copied(r, seeds) for task, seeds, r in told if task == "copy"]
    if texts := [
        (seeds, row) for (task, seeds, _), row in zip(told, rows, strict=True) if task == "charlm"
    ]:
        seeds, (_, listed, unit, ours, theirs, _) = max(texts, key=lambda text: text[0])
        said_of = f"On a text, at T={listed}: {ours} against {theirs} {unit}"
        bullets.append(Bullet(f"{said_of}, {text.count(seeds, 'seed')}", "text", seeds))
    header = ["task", "T", "in", "DNI", "truncated backprop", "training, DNI / truncated"]
    caption = "Mean over seeds, range. At the same window, on the same kernels."
    return Answer(
        answer,
        "; ".join(numbers),
        "; ".join(said) + ".",
        blocks,
        Table(header, rows, caption),
        tuple(bullets),
    )


def in_equal_time(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[float, Solved]:
    """Return the seconds after which the fastest of all runs had ended, and what each of a
    method's runs had solved by then."""
    end = min(run["history"][-1]["seconds"] for of in runs.values() for run in of)

    def solved(run: Mapping[str, Any]) -> float:
        then = (row["solved"] for row in run["history"] if row["seconds"] <= end)
        return float(max(then, default=0.0))

    return float(end), {method: [solved(run) for run in of] for method, of in runs.items()}


def _copied(report: Report, seeds: int) -> Bullet:
    """Say how far copying goes by both, at equal steps and at equal time: at the window that the
    command has of itself, and between what all windows come to."""
    windows = report.settings["windows"]
    chosen = next((t for t in Recurrent.preset("copy", "windows") if t in windows), windows[0])
    steps: dict[int, Solved] = {}
    time: dict[int, Solved] = {}
    slower = {}
    for window in windows:
        runs: dict[str, list[Any]] = {"dni": [], "fused": []}
        for run in report["runs"]:
            if run["window"] == window and run["method"] in runs:
                runs[run["method"]].append(run)
        ends = {method: [run["history"][-1] for run in of] for method, of in runs.items()}
        steps[window] = {method: [row["solved"] for row in of] for method, of in ends.items()}
        time[window] = in_equal_time(runs)[1]
        took = {
            method: statistics.median(row["seconds"] for row in of) for method, of in ends.items()
        }
        slower[window] = took["dni"] / took["fused"]

    def shown(found: Sequence[float]) -> str:
        several = f" ({text.span(found, '.3g')})" if len(found) > 1 else ""
        return f"{statistics.fmean(found):.3g}{several}"

    def as_far(found: Mapping[int, Solved]) -> str:
        means = [(statistics.fmean(f["dni"]), statistics.fmean(f["fused"])) for f in found.values()]
        return text.span((a / b for a, b in means), ".1f")

    here, then = ({m: shown(f) for m, f in found[chosen].items()} for found in (steps, time))
    said = (
        "An LSTM whose truncated windows get a predicted gradient from beyond copies "
        f"**{here['dni']}** symbols at T={chosen}, truncated backprop {here['fused']}, after as "
        f"many steps, which take {slower[chosen]:.1f} times as long; in as much time "
        f"{then['dni']} against {then['fused']}"
    )
    if len(windows) > 1:
        said += (
            f". At T={', '.join(map(str, windows))} that is {as_far(steps)} times as far after as "
            f"many steps, {as_far(time)} times in as much time"
        )
    return Bullet(f"{said}; {text.count(seeds, 'seed')}", "copy", seeds)


def side_by_side(reports: dict[str, Report]) -> Answer:
    """Return the critical path, computed from measured parts."""
    report = reports["depth-1"]
    path = report["parts"]["critical path"]
    n, unlocked = path["n"][-1], path["unlocked"][-1]
    return Answer(
        "computed, not measured",
        f"{unlocked:.1f} times as early in a chain of {n}",
        f"In a chain of {n} segments like {report['title']}, each on a device of its own, the "
        f"lowest would update {unlocked:.1f} times as early. This is computed from measured parts, "
        "not measured.",
        [verdict_report.critical_path(report), verdict_report.lock(report)],
    )


def future(reports: dict[str, Report]) -> Answer | None:
    """Return the true gradient of the future, by window; None where no run probed it."""
    said, blocks, least = [], [], []
    for report in reports.values():
        outcome = recurrent_report.outcome_of(report)
        table = recurrent_report.future_table(outcome)
        if len(table.header) == 1:
            continue
        row = table.rows[0]
        last = max(i for i, value in enumerate(row) if value != "-")
        low, high = table.header[1], table.header[last]
        name = f"{report['kind'].split()[-1]}, {outcome.settings.amount:,} {outcome.axis}"
        said.append(f"{name} ({row[0]}): {row[1]} at {low}, {row[last]} at {high}")
        least += [float(value) for value in row[1:] if value != "-"]
        blocks += [Text(f"**{name}**"), table]
        blocks += [f for f in recurrent_report.curves(outcome) if f.name in ("future-vs-window",)]
    if not said:
        return None
    low, high = (text.significant(value, 2) for value in (min(least), max(least)))
    return Answer(
        "no" if min(least) >= 0.1 else "in part",
        f"{low} to {high} of the window's own",
        "Norm of the future's part of a window's parameter gradient over the window's own: "
        + "; ".join(said)
        + ".",
        blocks,
    )


def noise(reports: dict[str, Report]) -> Answer:
    """Cosine by depth."""
    (report,) = reports.values()
    cosines, said = [], []
    for row in report["networks"]:
        if row["every"] == 1:
            found = interfaces_report.mean_of(row, 1, "true_cosine")
            errors = statistics.fmean(run["error"] for run in row["runs"])
            if found is not None:
                cosines.append((row["depth"], found))
                said.append(f"{found:.2f} with {row['depth']} (error {100 * errors:.2f} %)")
    falling = all(b[1] < a[1] for a, b in itertools.pairwise(cosines))
    (first, high), (last, low) = cosines[0], cosines[-1]
    return Answer(
        "yes" if falling else "in part",
        f"cosine {high:.2f} with {first} layer, {low:.2f} with {last}",
        "Cosine of the lowest layer's synthetic gradient with the true one, by the number of "
        f"layers, each with an interface: {', '.join(said)}.",
        [b for b in blocks_of(report, origin=False) if not isinstance(b, Heading)],
    )


def accuracy(reports: dict[str, Report]) -> Answer:
    """What synthetic gradients cost on MNIST: as published, by recipe, or both."""
    kinds: dict[bool, dict[str, Report]] = {True: {}, False: {}}
    for name, report in reports.items():
        kinds[report.kind == "recipes"][name] = report
    if not kinds[True]:
        return published(reports)
    found = recipe(kinds[True])
    if not kinds[False]:
        return found
    before = published(kinds[False])
    return found._replace(blocks=[*found.blocks, Text(before.sentence), *before.blocks])


#: Parts of recipes in the README's words.
PARTS = {
    "cross-entropy": "synthesizers of the form of a cross-entropy's gradient",
    "exact": "only true gradients as targets",
    "lessons": "each taught four times",
}


def recipe(reports: dict[str, Report]) -> Answer:
    """The recipe that was chosen on held-out data, beside backprop and a gradient held as long."""
    (report,) = reports.values()
    s, ks = report["settings"], sorted(report["settings"]["target_every"])

    def mean(name: str, k: int) -> float:
        return statistics.fmean(recipes_report.errors(report, name, k))

    apart = sum(recipes_report.against(report, BEST, "stale", k) == "below" for k in ks)
    exact = mean("backprop", ks[-1])
    shares = {
        k: statistics.fmean(run["exact"] for run in recipes_report.runs_of(report, BEST, k))
        for k in ks
    }
    listed = ", ".join(f"{mean(BEST, k):.2f} % (k={k})" for k in ks)
    held = ", ".join(f"{mean('stale', k):.2f} %" for k in ks)
    k, parts = ks[-1], ", ".join(PARTS.get(part, part) for part in BEST.split("+"))
    bullet = (
        f"Accuracy: the paper's network ends on MNIST with **{exact:.2f} %** error by backprop; by "
        f"synthetic gradients of the best recipe ({parts}), with the true ones on "
        f"{text.percent(shares[k])} of the steps, with {mean(BEST, k):.2f} % (k={k}), after the "
        f"same {s['epochs']} epochs. A gradient that is held for {k} steps ends with "
        f"{mean('stale', k):.2f} %; means of {text.count(len(s['seeds']), 'seed')}"
    )
    return Answer(
        f"little, by the best recipe; less than a held gradient: {often(apart, len(ks))}",
        f"backprop {exact:.2f} %; DNI {listed}",
        f"The recipe that did best on data kept out ({BEST}; docs/recipes.md), after "
        f"the same number of steps: {listed}, with true gradients on "
        f"{', '.join(text.percent(shares[k]) for k in ks)} of the steps; backprop {exact:.2f} %; a "
        f"gradient held for k steps {held}. Ranges of {len(s['seeds'])} seeds are apart from the "
        f"held gradient's at {apart} of {len(ks)} k.",
        [b for b in blocks_of(report, origin=False) if not isinstance(b, Heading)],
        bullets=(Bullet(bullet),),
    )


def published(reports: dict[str, Report]) -> Answer:
    """MNIST with the interface at either place, by the rank of the synthesizers."""
    rows: list[list[str]] = []
    exact, best, worst = 0.0, {}, {}
    for place, report in enumerate(reports.values()):
        settings = report["settings"]
        rank = f"rank {settings['rank']}" if settings["rank"] else "dense"
        for row in report["summary"]:
            ours = row["name"].startswith("cdni")
            mean = row["error_mean"]
            if ours:
                k = row["name"].split()[-1]
                best[k] = min(mean, best.get(k, mean))
                worst[k] = max(mean, worst.get(k, mean))
            elif place == 0:
                exact = mean
            if ours or place == 0:
                between = f"{mean:.2%} ({row['error_min']:.2%} to {row['error_max']:.2%})"
                how = [settings["interface"], rank] if ours else ["-", "-"]
                rows.append([row["name"], *how, between, text.seconds(row["seconds_per_step"])])
    dearer = sum(mean > exact for mean in (*best.values(), *worst.values()))
    listed = ", ".join(f"{k} {best[k]:.2%} to {worst[k]:.2%}" for k in best)
    header = ["method", "interface", "synthesizer", "error, mean and range", "step"]
    return Answer(
        often(dearer, 2 * len(best)),
        f"error {exact:.2%}; DNI {listed}",
        f"As published, error on the test set after the same number of steps: backprop on our "
        f"kernels {exact:.2%}; label-conditioned DNI {listed}, by the interface's place and the "
        "synthesizer.",
        (found := [Table(header, rows)]),
        found[0],
    )


#: Arms of the rivals that compute backprop's own step.
WAITING = EXACT
#: The others in the README's words, by how their names begin.
SIMPLER = {
    "stale": "gradients held for some steps",
    "delayed": "gradients a step late",
    "local": "local losses",
    "mono-forward": "local losses",
    "feedback": "random feedback",
}


def rivals(reports: dict[str, Report]) -> Answer:
    """Everything that does not wait."""
    (report,) = reports.values()
    shown = [b for b in blocks_of(report, origin=False) if not isinstance(b, Heading)]
    errors = {row["name"]: rivals_report.errors(report, row["name"]) for row in report["arms"]}
    steps = {row["name"]: row["steps"] for row in report["arms"]}
    means = {name: statistics.fmean(found) for name, found in errors.items() if found}
    order = sorted(means, key=lambda name: means[name])
    listed = ", ".join(f"{name} {100 * means[name]:.2f} %" for name in order)
    ours = [name for name in order if name.startswith("cdni")]
    theirs = [name for name in order if name not in (*ours, *WAITING)]
    best, first, of = ours[0], theirs[0], len(theirs)
    ahead = sum(means[name] < means[best] for name in theirs)
    beyond = sum(means[name] < means["fused"] for name in theirs)
    apart = {of: sum(max(errors[n]) < min(errors[of]) for n in theirs) for of in (best, "fused")}
    told = max(errors["fused"]) < min(errors[best]) or max(errors[best]) < min(errors["fused"])
    ends = {n: f"({text.span(100 * error for error in errors[n])})" for n in (best, "fused")}
    seeds = text.count(len(errors[best]), "seed")
    words = [next((SIMPLER[w] for w in SIMPLER if name.startswith(w)), name) for name in theirs]
    figures = [b for b in shown if isinstance(b, Figure)]
    number = (
        f"DNI {100 * means[best]:.2f} %, backprop {100 * means['fused']:.2f} %, {first} "
        f"{100 * means[first]:.2f} %"
    )
    bullet = (
        f"At equal and short wall-clock on MNIST ({report.settings['seconds_per_run']:g} s a run, "
        f"in which backprop makes {steps['fused']:,} steps) the best DNI ends with "
        f"**{100 * means[best]:.2f} %** {ends[best]} error, backprop with "
        f"{100 * means['fused']:.2f} % {ends['fused']}: means of {seeds}, whose ranges "
        f"{'are apart' if told else 'overlap'}. Of the {of} simpler ways not to wait "
        f"({', '.join(dict.fromkeys(words))}) {ahead} end with less error than DNI, "
        f"{apart[best] or 'none'} of them with ranges apart, and {beyond} with less than backprop, "
        f"{apart['fused'] or 'none'} with ranges apart"
    )
    return Answer(
        f"{often(ahead, of)}: {ahead} of {of} end below DNI, {beyond} below backprop",
        f"error: {number}",
        f"Error at equal wall-clock, means of {seeds}, from the best: {listed}.",
        shown,
        figures[0] if figures else None,
        (Bullet(bullet),),
    )


def inside(reports: dict[str, Report]) -> Answer:
    """A race in a network whose layers all learn."""
    (report,) = reports.values()
    ours, others = (races.soonest(report, which) for which in (races.by_dni, races.otherwise))
    said = [
        f"{found[0]} in {text.parts(found[1])} of backprop's time"
        for found in (ours, others)
        if found is not None
    ]
    ahead = ours and others and statistics.median(others[1]) < statistics.median(ours[1])
    return Answer(
        "no" if ours is None else f"it did here{'; so did, sooner, a local loss' * bool(ahead)}",
        "; ".join(said) or "never there",
        f"{races.title(report)}, error on a text held out. {report.sentence}",
        [b for b in blocks_of(report) if isinstance(b, (Table, Figure))],
    )


def grid(reports: dict[str, Report]) -> Answer:
    """Tell of the rivals in other networks, for longer, and on another task."""
    sentences, blocks, numbers, won, places = [], [], [], 0, 0
    for report in reports.values():
        ours = [name for name in grid_report.others(report) if name.startswith("cdni")]
        counts = {name: grid_report.ahead(report, name, grid_report.by_time) for name in ours}
        less, of = (max(found[i] for found in counts.values()) for i in (0, 2))
        won, places = won + less, places + of
        said = ", ".join(
            f"{name} {n} and more in {m} of {all_}" for name, (n, m, all_) in counts.items()
        )
        sentences.append(f"On {report['dataset']} in as much time less error in: {said}")
        numbers.append(f"less error in as much time in {less} of {of} ({report['dataset']})")
        blocks += [b for b in blocks_of(report, origin=False) if not isinstance(b, Heading)]
    return Answer(
        often(places - won, places),
        "; ".join(numbers),
        "Networks and budgets in which synthetic gradients are apart from the fastest backprop, by "
        "the 95 % interval of paired seeds. " + ". ".join(sentences) + ".",
        blocks,
    )


def advice(reports: dict[str, Report]) -> Answer:
    """Predicted and measured steps of whole models."""
    shown: list[Block] = []
    rows, paid, numbers, worst = [], 0, [], 0.0
    for name, report in reports.items():
        said = blocks_of(report)
        shown += [Text(part) for part in _sentences(report.sentence)]
        shown += [b for b in said if isinstance(b, Table)][:2]
        found = report["ratios"]["our kernels"]["proposal"]
        model = name.removeprefix("advice-")
        off = max(abs(step["error %"]) for step in report["steps"].values())
        worst = max(worst, off)
        paid += found["measured"].verdict() == "faster"
        numbers.append(f"{model} {text.ratio(found['measured'])}")
        behind = ", ".join(one["block"] for one in report["proposal"]["interfaces"])
        cells = [
            text.ratio(found["predicted"], to=" to "),
            text.ratio(found["measured"], to=" to "),
        ]
        rows.append([model, behind, f"{report['proposal']['k']}", *cells, f"{off:.0f} %"])
    number = f"{', '.join(numbers)} of backprop's time"
    return Answer(
        f"for {paid} of {len(rows)} models",
        number,
        f"The proposed interfaces make a step faster than backprop on the same kernels for {paid} "
        f"of {len(rows)} models: {number}. Predicted steps were within {worst:.0f} % of the "
        "measured ones.",
        shown,
        Table(
            ["model", "interfaces behind", "k", "predicted", "measured", "steps off by"],
            rows,
            f"{RATIOS} The proposal was asked for, whether or not it pays.",
        ),
    )


def _sentences(said: str) -> list[str]:
    """Return a long paragraph as several, cut in front of the proposal and of what follows from
    it."""
    parts = [said]
    for mark in ("Proposal (", "So, for time alone", "So no interface pays"):
        parts = [
            piece.strip() for part in parts for piece in part.replace(mark, f"\n{mark}").split("\n")
        ]
    return [part for part in parts if part]


def distance(reports: dict[str, Report]) -> Answer:
    """Say what a gradient costs that comes over a slow link, by the ways not to wait for it."""
    sentences, blocks, ahead = [], [], []
    for report in reports.values():
        settings, lag = report["settings"], max(report["settings"]["lags"])
        errors = {name: delay_report.errors(report, name, lag) for name in report["arms"]}
        (ours,) = (name for name in errors if name.startswith("cdni"))
        late = [name for name in errors if name in ("stale", "nesterov", "feedback")]
        beaten = [name for name in late if max(errors[ours]) < min(errors[name])]
        ahead.append(len(beaten) == len(late))
        means = {name: statistics.fmean(found) for name, found in errors.items()}
        others = ", ".join(f"{name} {means[name]:.2f}" for name in errors if name != ours)
        sentences.append(
            f"{settings['stages']} stages, {lag} steps late: {ours} {means[ours]:.2f} "
            f"({text.span(errors[ours])}), {others}; every seed below every seed of "
            f"{', '.join(beaten) or 'none'}"
        )
        blocks += [Text(f"**{settings['stages']} stages**"), delay_report.table(report)]
    first = next(iter(reports.values()))
    lag = max(first["settings"]["lags"])
    (ours,) = (name for name in first["arms"] if name.startswith("cdni"))
    found = {name: delay_report.errors(first, name, lag) for name in (ours, "stale", "local")}
    return Answer(
        often(ahead.count(False), len(ahead)),
        ", ".join(f"{statistics.fmean(v):.2f} % {name}" for name, v in found.items()),
        "Error on MNIST when gradients between stages come late, in per cent. "
        + ". ".join(sentences)
        + ".",
        blocks,
    )


def trust(reports: dict[str, Report]) -> Answer:
    """Planted differences, segments and tops, and sums of parts."""
    right = of = 0
    off = []
    for report in reports.values():
        for word, counts in report.get("differences", {}).items():
            right, of = right + counts.get(word, 0), of + report["runs"]
        for row in report.get("segments", {}).values():
            right, of = right + (row["said"] in row["allowed"]), of + 1
        for row in report.get("tops", {}).values():
            off += [abs(r.median - 1.0) for r in row["measured over predicted"].values()]
    number = f"{right} of {of} planted cases called rightly"
    if off:
        number += f"; steps under planted tops within {100 * max(off):.0f} % of the formula"
    return Answer(
        often(right, of) if of else "in doubt",
        number,
        " ".join(report.sentence for report in reports.values()),
        [b for report in reports.values() for b in blocks_of(report) if isinstance(b, Table)],
    )
