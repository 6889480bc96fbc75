"""What a slow link between two stages leaves of each way of training, for a user's split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fused_dni.measure.baseline import facts
from fused_dni.measure.options import STAGE_SECONDS
from fused_dni.measure.simulate import paced
from fused_dni.measure.simulate.calibrate import calibrate
from fused_dni.measure.simulate.modes import Case, simulate
from fused_dni.measure.simulate_settings import Link, Settings
from fused_dni.report.schema import Result

#: By the report's name: the simulation's.
MODES = {
    "exact": "gpipe",
    "1f1b": "1f1b",
    "stale": "stale",
    "decoupled": "dni",
    "local": "local",
    "data-parallel": "data-parallel",
    "diloco": "diloco",
}


def verdict_link(
    made: Any,
    where: str,
    link: Link,
    *,
    seconds: float = STAGE_SECONDS,
    run: float | None = 2.0,
    options: dict[str, Any] | None = None,
    progress: Callable[[str, float], None] = lambda what, fraction: None,
    command: str | None = None,
) -> Result:
    """Measure the stages, simulate each way to train them over the link, and run those of ours.

    Args:
        made, where: as of :func:`fused_dni.measure.simulate.calibrate.calibrate`; two stages at
            least.
        link: between neighbours. With a jitter, runs have its latency alone.
        seconds: of measuring, for each stage.
        run: seconds for which each mode of :mod:`fused_dni.distributed` is run, by processes that
            sleep for the stages' times over loopback, delayed as the link; None for no run.
        options: of :class:`fused_dni.measure.simulate_settings.Settings`, beside what is measured.
        progress: called with what is done and the fraction done.
        command: for the report.

    Returns:
        The report, of kind ``verdict link``: ``settings``; ``measured``; ``alone``, rows a second
        of one device that holds the whole model; ``rows``, one a mode: rows a second over the
        link (``rows``) and over none (``near``), ``rows_an_update``, ``age`` in updates (of stale
        the oldest gradient's, else the mean; of decoupled: of its targets), bytes a batch and
        stage up and down, and
        ``run``: what was measured (None where there is no runtime).

    Raises:
        ValueError: ``made`` is not that, has one stage, or a number is out of range.
        RuntimeError: a process of a run failed.
    """
    found = calibrate(
        made, where, seconds=seconds, progress=lambda share: progress("measuring", share)
    )
    stages = len(found.timings)
    if stages < 2:
        raise ValueError(f"{where} returns one stage: a link is between two")
    settings = Settings(
        times=found.times,
        link=link,
        rows=found.rows,
        forward_bytes=found.forward_bytes,
        backward_bytes=found.backward_bytes,
        parameter_bytes=found.parameter_bytes,
        **(options or {}),
    )
    rows = []
    for i, (name, simulated) in enumerate(MODES.items()):
        given = replace(settings, microbatches=1) if name == "exact" else settings
        near = replace(given, link=Link())
        here, there = simulate(simulated, [Case(stages, given), Case(stages, near)])
        rows.append(
            {
                "mode": name,
                "rows": here["rows"],
                "near": there["rows"],
                "rows_an_update": here["rows_an_update"],
                "age": here["oldest" if name == "stale" else "age"],
                "forward_bytes": here["forward_bytes"],
                "backward_bytes": here["backward_bytes"],
                "run": None,
            }
        )
        progress("simulating", (i + 1) / len(MODES))
    if run is not None and stages <= paced.MOST:
        _add_runs(rows, Case(stages, settings), run, progress)
    times = settings.times.at(stages)
    step = sum(map(sum, (times["forward"], times["backward"], times["optimizer"])))
    return Result(
        "verdict link",
        facts=facts(command),
        settings={**settings.to_json(), "stages": stages, "run": run},
        body={"measured": found.to_json(), "alone": found.rows / step, "rows": rows},
    )


def _add_runs(
    rows: list[dict[str, Any]], case: Case, seconds: float, progress: Callable[[str, float], None]
) -> None:
    """Put into rows what processes measured (mutated)."""
    plain = replace(case.settings.link, jitter=0.0, jitter_share=0.0)
    case = case._replace(settings=replace(case.settings, link=plain))
    ours = [row for row in rows if MODES[row["mode"]] in paced.RUNTIME]
    runs = [paced.asked(MODES[row["mode"]], case, seconds) for row in ours]
    made = paced.measure(runs, lambda share: progress("running", share))
    for row, one in zip(ours, made, strict=True):
        row["run"] = {
            "rows": one["measured"] * case.settings.rows,
            "age": one["age"],
            "late": one["late"],
            "steps": one["steps"],
        }
