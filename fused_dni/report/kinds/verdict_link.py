"""What a verdict on a link says: which way to train carries how much, and which to take."""

from __future__ import annotations

from typing import Any

from fused_dni.report import text
from fused_dni.report.blocks import Block, Heading, Table, Text
from fused_dni.report.schema import Result

#: Less is not worth another gradient than the exact one.
AHEAD = 0.20
#: Steps by which gradients may be late before that was seen to cost accuracy (docs/delay.md).
LATE = 5.0
#: A run whose work took longer than it was to take, by this share, is of a busy machine.
BUSY = 0.1
#: Ways that compute the gradient of what the update is made to.
EXACT = ("exact", "1f1b")
WHAT = {
    "exact": "each stage waits for its gradient: one batch under way",
    "1f1b": "the batches of an update follow each other; torch.distributed.pipelining",
    "stale": "an update whenever a gradient comes, however old",
    "decoupled": "synthetic gradients; targets come back and train the synthesizers",
    "local": "a loss of the stage's own, by labels that it is sent; nothing comes back",
    "data-parallel": "the whole model on each device, gradients averaged at each update",
    "diloco": "the whole model on each device, parameters averaged now and then",
}


def title(report: Result) -> str:
    """Name the stages and the link."""
    settings = report.settings
    return f"{text.count(settings['stages'], 'stage')} over a link of {_link(settings['link'])}"


def blocks(report: Result) -> list[Block]:
    """Say what :func:`fused_dni.measure.verdict.link.verdict_link` came to."""
    settings, measured = report.settings, report["measured"]
    return [
        table(report),
        Text(_runs(report)),
        Heading("The stages"),
        _stages(settings),
        Text(
            f"Measured one by one, from {measured['what']}; a batch of {settings['rows']} rows, a "
            f"message of {text.size(settings['forward_bytes'])}, "
            f"{text.size(settings['parameter_bytes'])} of parameters a stage."
        ),
        Heading("The ways"),
        Table(["way", "what it is"], [[name, WHAT.get(name, "")] for name in _modes(report)]),
    ]


def _modes(report: Result) -> list[str]:
    return [row["mode"] for row in report["rows"]]


def _link(link: dict[str, Any]) -> str:
    back = link["latency_back"]
    said = text.seconds(link["latency"]) if link["latency"] else "no latency"
    if back is not None and back != link["latency"]:
        said += f" ({text.seconds(back)} back)"
    if link["bandwidth"] is not None:
        said += f" and {text.significant(8e-6 * link['bandwidth'])} Mbit/s"
    return said


def _best(rows: dict[str, dict[str, Any]], names: tuple[str, ...]) -> tuple[str, float]:
    found = [(rows[name]["rows"], name) for name in names if name in rows]
    rate, name = max(found)
    return name, rate


def choices(report: Result) -> list[tuple[str, str]]:
    """List what to take, in order: the condition (empty for none), and the way."""
    rows = {row["mode"]: row for row in report["rows"]}
    exact, carried = _best(rows, EXACT)
    _, most = _best(rows, tuple(rows))
    chain, best = _best(rows, (*EXACT, "stale", "decoupled", "local"))
    if carried >= (1.0 - AHEAD) * most:
        return [("", exact)]
    found = []
    replicas = [
        name
        for name in ("data-parallel", "diloco")
        if name in rows and rows[name]["rows"] >= (1.0 - AHEAD) * best
    ]
    if replicas:
        found.append(("if each device can hold the whole model", replicas[0]))
    if carried >= (1.0 - AHEAD) * best:
        return [*found, ("otherwise" if found else "", exact)]
    condition = "if labels may go to every stage and say what the top needs"
    # Of a top that stays as it is no label says what it needs.
    if rows["local"]["rows"] >= (1.0 - AHEAD) * best and not _frozen_top(report):
        found.append((condition, "local"))
    late = rows["stale"]["age"]
    way = "stale" if late is not None and late <= LATE else "decoupled"
    if rows[way]["rows"] < (1.0 - AHEAD) * best:
        way = chain
    found.append(("otherwise" if found else "", way))
    return found


def _frozen_top(report: Result) -> bool:
    found: bool = report["measured"].get("frozen_top", False)  # older files were of none
    return found


_TAKE = {
    "exact": "train exactly, waiting",
    "1f1b": "train exactly, by 1F1B",
    "stale": "use stale gradients",
    "decoupled": "use synthetic gradients",
    "local": "use a local loss",
    "data-parallel": "use data parallel",
    "diloco": "use DiLoCo",
}


def sentence(report: Result) -> str:
    """Say which way to take, and what it carries beside exact training and one device alone."""
    rows = {row["mode"]: row for row in report["rows"]}
    exact, carried = _best(rows, EXACT)
    said = []
    for condition, way in choices(report):
        take = f"{_TAKE[way]} ({text.rate(rows[way]['rows'])} rows/s)"
        said.append(f"{condition}, {take}" if condition else take)
    words = "; ".join(said)
    words = words[0].upper() + words[1:]
    late = rows["stale"]["age"]
    parts = [f"{words}."]
    if _frozen_top(report) and choices(report)[-1][1] not in EXACT:
        parts.append("The top is frozen: a local loss does not learn what it needs.")
    if choices(report)[-1][1] not in EXACT:
        lost = 1.0 - carried / rows[exact]["near"]
        parts.append(
            f"The link takes {100 * lost:.0f} % of what exact training by {exact} would carry, and "
            f"leaves {text.rate(carried)} rows/s"
            + (f"; gradients would be {late:.0f} steps late." if late is not None else ".")
        )
    if report["alone"] >= (1.0 - AHEAD) * max(row["rows"] for row in report["rows"]):
        parts.append(
            f"One device that holds the whole model carries {text.rate(report['alone'])} rows/s: "
            "splitting gains no speed here."
        )
    elif report["alone"] > carried:
        parts.append(
            f"One device that holds the whole model carries {text.rate(report['alone'])} rows/s, "
            "more than exact training over the link."
        )
    return " ".join(parts)


def table(report: Result) -> Table:
    """Show a row a way: rows a second over the link and without it, and what is sent."""
    lines = []
    for row in report["rows"]:
        run = row["run"]
        lines.append(
            [
                row["mode"],
                text.rate(row["rows"]),
                "-" if run is None else text.rate(run["rows"]),
                text.rate(row["near"]),
                f"{row['rows_an_update']:,.0f}",
                "-" if row["age"] is None else f"{row['age']:.1f}",
                "-" if run is None or run["age"] is None else f"{run['age']:.1f}",
                text.size(row["forward_bytes"]),
                text.size(row["backward_bytes"]),
            ]
        )
    header = ["way", "rows/s", "run", "no link", "rows an update", "age", "run's", "up", "down"]
    caption = (
        "Rows a second over the link, simulated; of those that were run, measured; over no link, "
        "simulated. Age, in updates: of stale, of the oldest gradient; of decoupled, of the "
        "targets that train synthesizers; of diloco, steps of a replica's own. Bytes a batch that "
        "a device sends; replicas send round a ring. Rows a second are not accuracy: "
        "docs/delay.md."
    )
    return Table(header, lines, caption)


def _runs(report: Result) -> str:
    ran = [row["run"] for row in report["rows"] if row["run"] is not None]
    if not ran:
        return "Nothing was run: the figures are the model's alone."
    late = max(run["late"] for run in ran)
    said = (
        "Run: processes over loopback that sleep for the times below, their links delayed by a "
        "clock; messages, threads and waiting are those of fused_dni.distributed."
    )
    if late > BUSY:
        said += (
            f" Work took up to {100 * late:.0f} % longer than it was to take: this machine was too "
            "busy, or the stages are too quick, for the runs to say much."
        )
    return said


def _stages(settings: dict[str, Any]) -> Table:
    names = ("forward", "backward", "optimizer", "dni", "target", "lesson", "local")
    times = settings["times"]
    lines = [
        [str(i), *(text.seconds(times[name][i % len(times[name])]) for name in names)]
        for i in range(settings["stages"])
    ]
    header = ["stage", "forward", "backward", "optimizer", "decoupled step", "target", "lesson",
              "local step"]  # fmt: skip
    return Table(header, lines)
