"""The paper's tables beside ours, one or several results of ``fused-dni literature`` each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fused_dni.report.blocks import as_markdown
from fused_dni.report.kinds import literature
from fused_dni.report.schema import result_of
from pages.cells import where
from stored import RESULTS, named

#: Settings that runs of all arms depend on.
COMMON = ("epochs", "dataset", "hidden", "batch_size", "lr", "sg_lr", "rank", "warmup")


def renderer(table: str) -> Callable[[list[dict[str, Any]]], str]:
    """Return what renders a table from all results; those of a machine and of the same settings
    that have other arms of it are one table."""

    def render(results: list[dict[str, Any]]) -> str:
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for report in results:
            if any(run["table"] == table for run in report["runs"]):
                same = (report["settings"][name] for name in COMMON)
                key = (named(report["facts"]), *same, report["evaluated_on"])
                groups.setdefault(key, []).append(report)
        made = [_group(table, found) for _, found in sorted(groups.items())]
        return "\n\n".join(made) or "Not measured yet."

    return render


def _group(table: str, results: list[dict[str, Any]]) -> str:
    # The recipe's settings count: other arms have none of them.
    results = sorted(results, key=lambda report: any("exact" in run for run in report["runs"]))
    runs = [run for report in results for run in report["runs"]]
    last = result_of(results[-1])
    whole = replace(last, body={**last.body, "runs": runs})
    facts = results[-1]["facts"]
    commands = dict.fromkeys(f"`{report['facts']['command']}`" for report in results)
    said = f"{where(facts, [report['facts'] for report in results])}: {', '.join(commands)}."
    parts = [said, literature.protocol(whole, table == "depth")] if table != "clocks" else [said]
    return "\n\n".join([*parts, as_markdown(literature.tables(whole, table), RESULTS)])
