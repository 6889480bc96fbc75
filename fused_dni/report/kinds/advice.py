"""What an advice says."""

from __future__ import annotations

from typing import Any

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text
from fused_dni.report.schema import Result
from fused_dni.report.words import machine, often, versus

STOCK, OURS, PROPOSAL, EVERYWHERE = "stock backprop", "our kernels", "proposal", "everywhere"

_LONG = {
    STOCK: "stock backprop",
    OURS: "backprop on our kernels",
    PROPOSAL: "the proposal",
    EVERYWHERE: "interfaces everywhere",
}


def blocks(report: Result) -> list[Block]:
    """Show whole steps, predicted and measured; the model's blocks; what each interface costs;
    assumptions."""
    return [
        Heading("The step: predicted and measured"),
        _steps(report),
        Figure("steps", lambda canvas: _draw(report, canvas), "A training step by each plan."),
        Heading("The best plan for each k, as predicted"),
        _by_k(report),
        Heading("The model's blocks"),
        _blocks(report),
        *_interfaces(report),
        Heading("What is assumed"),
        *map(Text, report["assumptions"]),
    ]


def sentence(report: Result) -> str:
    """Return the advice in plain English: what pays, what was measured, how good the prediction
    was."""
    steps = report["steps"]
    took = {name: text.seconds(step["measured"].median) for name, step in steps.items()}
    parts = [
        f"On {machine(report.facts)} a training step of {report.title} takes {took[STOCK]} by "
        f"stock backprop and {took[OURS]} by backprop on our kernels, "
        f"{_versus(report, OURS, STOCK)}."
    ]
    keep = _keep(report)
    if PROPOSAL in steps:
        parts.append(_proposed(report))
    else:
        parts.append("No interface was predicted to pay.")
    forced = report["everywhere"]
    if EVERYWHERE in steps and forced is not None:
        parts.append(
            f"An interface behind every block that can have one, {_often(forced['k'])}, takes "
            f"{took[EVERYWHERE]}, {_versus(report, EVERYWHERE, OURS)}."
        )
    paying = [name for name in (PROPOSAL, EVERYWHERE) if name in steps and _pays(report, name)]
    if paying:
        best = min(paying, key=lambda name: float(steps[name]["measured"].median))
        parts.append(f"So, for time alone, take {_LONG[best]}.")
    else:
        parts.append(f"So no interface pays: keep {_LONG[keep]}.")
    parts += _top(report)
    worst = max(abs(step["error %"]) for step in steps.values())
    parts.append(f"Predicted steps were within {worst:.0f} % of the measured ones.")
    if report["proposal"] is not None or forced is not None:
        parts.append("What interfaces cost in accuracy is not predicted: `train` measures it.")
    return " ".join(parts)


#: How often the sentence has an expensive top run.
TOP_K = 8


def _top(report: Result) -> list[str]:
    """Return the interface in front of an expensive top, if the model has one."""
    found = report["expensive top"]
    if found is None:
        return []
    names = found["blocks"]
    times, factor, most = (
        text.significant(value)
        for value in (
            found["over below"].median,
            1.0 / found["by k"][str(TOP_K)].median,
            1.0 / found["most"].median,
        )
    )
    what = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    trained = " (what is trained there would learn on those alone)" if found["trained"] else ""
    return [
        f"There is an expensive top: {what} takes {times} times as long as what learns below. "
        f"With an interface in front of it, and the top run {often(TOP_K)} alone{trained}, a step "
        f"is predicted to be {factor}x faster than stock backprop, at most {most}x, prediction and "
        "lesson not counted: `fused-dni verdict top` measures it."
    ]


def _keep(report: Result) -> str:
    """Return the better of the two backprops, as measured."""
    slower = report["ratios"][STOCK][OURS]["measured"].verdict() == "slower"
    return STOCK if slower else OURS


def _pays(report: Result, name: str) -> bool:
    """Say whether a plan was measured faster than backprop on our kernels, and than what one would
    keep otherwise."""
    bases = {OURS, _keep(report)}
    return all(report["ratios"][b][name]["measured"].verdict() == "faster" for b in bases)


def _proposed(report: Result) -> str:
    plan = report["proposal"]
    named = [
        f"{one['block']} ({one['synthesizer']}"
        + ("" if one["place"] == "output" else f", at the {one['place']}")
        + ")"
        for one in plan["interfaces"]
    ]
    asked = " (asked for, whether or not it pays)" if report["asked for all"] else ""
    found = report["ratios"][OURS][PROPOSAL]
    took = text.seconds(report["steps"][PROPOSAL]["measured"].median)
    return (
        f"Proposal{asked}: an interface behind {', '.join(named)}, {_often(plan['k'])}. It was "
        f"predicted to be {versus(found['predicted'])} backprop on our kernels; measured, the step "
        f"takes {took}, {_versus(report, PROPOSAL, OURS)} and "
        f"{_versus(report, PROPOSAL, STOCK)}."
    )


def _often(k: int) -> str:
    return "with targets on every step" if k == 1 else f"with targets on one step in {k}"


def _versus(report: Result, name: str, base: str) -> str:
    return f"{versus(report['ratios'][base][name]['measured'])} {_LONG[base]}"


def _steps(report: Result) -> Table:
    rows = []
    for name, step in report["steps"].items():
        memory = step["memory"]
        rows.append([
            name,
            text.seconds(step["predicted"].median),
            text.seconds(step["measured"].median),
            _per_cent(step["error %"]),
            *(_ratio(report, name, base) for base in (STOCK, OURS)),
            text.size(memory["predicted"]),
            text.size(memory["measured"]),
            _per_cent(memory["error %"]),
        ])  # fmt: skip
    header = ["step", "predicted", "measured", "error", "x stock", "x ours"]
    header += ["memory predicted", "measured", "error"]
    drift = text.percent(report["drift"] - 1.0, "+.0f")
    caption = (
        "x: measured time over that of stock backprop and of backprop on our kernels; a ~ marks a "
        "ratio whose interval reaches one. Predictions are multiplied by the machine's drift "
        f"between the two runs ({drift}), which the stock step in both of them shows."
    )
    return Table(header, rows, caption)


def _ratio(report: Result, name: str, base: str) -> str:
    return "1" if name == base else text.ratio(report["ratios"][base][name]["measured"])


def _per_cent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.0f} %"


def _by_k(report: Result) -> Table:
    rows = []
    for rung in report["by k"]:
        behind = ", ".join(one["block"] for one in rung["interfaces"]) or "none"
        predicted = text.seconds(rung["predicted"].median)
        rows.append([f"{rung['k']}", predicted, text.ratio(rung["over ours"]), behind])
    caption = (
        "Times as in the first run, without the drift; x ours: over backprop on our kernels, as "
        "predicted. The smallest k that is faster by more "
        f"than the sum of blocks misses the stock step ({text.percent(report['doubt'])}) is "
        "proposed."
    )
    return Table(["k", "step", "x ours", "interfaces behind"], rows, caption)


def _blocks(report: Result) -> Table:
    rows = []
    for block in report["blocks"]:
        chosen = block["chosen"]
        rows.append([
            block["name"],
            block["what"],
            "x".join(map(str, block["output"])) or "scalar",
            f"{block['parameters']:,}",
            f"{block['forward flops'] / 1e6:.3g}",
            text.seconds(block["stock"].median),
            text.seconds(block["exact"].median),
            "-" if chosen is None else f"{chosen['synthesizer']}, {chosen['place']}",
        ])  # fmt: skip
    header = ["block", "modules", "output", "parameters", "MFLOP", "stock", "ours", "proposed"]
    reasons: dict[str, list[str]] = {}
    for block in report["blocks"]:
        if block["why not"] and block["kind"] != "loss":
            reasons.setdefault(block["why not"], []).append(block["name"])
    why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    return Table(
        header,
        rows,
        "MFLOP: of the forward. Times: forward, backward and update alone, by stock modules and "
        "with the exact gradient on our kernels (where a block has no form there, stock)."
        + (f" Without an interface: {why}." if why else ""),
    )


def _interfaces(report: Result) -> list[Block]:
    rows = [
        [
            block["name"],
            one["synthesizer"],
            one["place"],
            *(
                f"{text.seconds(one[when].median)} ({text.ratio(one['ratios'][when])})"
                for when in ("with targets", "without targets")
            ),
        ]
        for block in report["blocks"]
        for one in block["interfaces"]
    ]
    if not rows:
        return []
    header = ["block", "synthesizer", "place", "step with targets", "without"]
    caption = (
        "In brackets: over the block's time with the exact gradient. Without targets the block "
        "stands above another interface, so that nothing asks for a gradient of its input; what "
        "the block above an interface saves is not in its row."
    )
    return [Heading("What each interface costs its block"), Table(header, rows, caption)]


def _draw(report: Result, canvas: Any) -> None:
    axes = canvas.add_subplot()
    names = list(report["steps"])
    longest = max(report["steps"][name]["measured"].median for name in names)
    scale, unit = plots.unit_of(longest)
    for kind, shift, colour in (("predicted", 0.2, plots.LIGHT), ("measured", -0.2, plots.BLUE)):
        values = [scale * report["steps"][name][kind].median for name in names]
        at = [shift - i for i in range(len(names))]
        axes.barh(at, values, height=0.38, color=colour, label=kind)
    axes.set_yticks([-i for i in range(len(names))], names)
    plots.finish(axes, f"training step, {unit}", "")
