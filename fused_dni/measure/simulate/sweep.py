"""All modes over latency and over the number of stages, and where each begins to win."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fused_dni.measure.baseline import facts
from fused_dni.measure.errors import Interrupted
from fused_dni.measure.simulate.modes import MODES, Case, simulate
from fused_dni.measure.simulate_settings import LONGEST, MOST_STAGES, STAGES, Settings
from fused_dni.report import text
from fused_dni.report.schema import Result

#: Format of the report.
LATENCIES = (0.0, 1e-4, 3e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2)
CHAINS = (2, 4, 8, 16, 32, 64)


def sweep(
    settings: Settings,
    *,
    stages: int = STAGES,
    latencies: Sequence[float] = LATENCIES,
    chains: Sequence[int] = CHAINS,
    modes: Sequence[str] = tuple(MODES),
    measured: Mapping[str, Any] | None = None,
    progress: Callable[[str, float], None] = lambda what, fraction: None,
    command: str | None = None,
) -> Result:
    """Simulate each mode at every latency and at every number of stages.

    Args:
        settings: all else; their latency is the one at which the number of stages varies.
        stages: how many while the latency varies.
        latencies: seconds one way, in any order. The way back takes as long, unless the settings
            say otherwise.
        chains: numbers of stages.
        modes: of :data:`fused_dni.measure.simulate.modes.MODES`.
        measured: what the times were measured on, for the report.
        progress: called with a mode's name and the fraction done.
        command: for the report.

    Returns:
        The report, of kind ``simulation``: ``settings``; ``latency`` and ``chains``, the rows of
        :func:`fused_dni.measure.simulate.modes.simulate` of either sweep.

    Raises:
        ValueError: no point, an unknown mode, a number out of range.
        Interrupted: Ctrl-C.
    """
    chosen = list(dict.fromkeys(modes))
    for name in chosen:
        if name not in MODES:
            raise ValueError(text.unknown("mode", name, MODES))
    delays, numbers = sorted(set(latencies)), sorted(set(chains))
    if not (chosen and delays and numbers):
        raise ValueError("a simulation takes at least one mode, one latency and one chain")
    for number in (stages, *numbers):
        if not 1 <= number <= MOST_STAGES:
            raise ValueError(f"stages must be from 1 to {MOST_STAGES}, got {number!r}")
    for delay in delays:
        if not 0.0 <= delay <= LONGEST:
            raise ValueError(f"latencies must be from 0 to {LONGEST:g} seconds, got {delay!r}")
    cases = [
        Case(stages, replace(settings, link=replace(settings.link, latency=delay)))
        for delay in delays
    ]
    cases += [Case(number, settings) for number in numbers]
    rows: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    try:
        for name in chosen:
            progress(name, 0.0)

            def tell(fraction: float, name: str = name) -> None:
                progress(name, min(fraction, 0.99))

            found = simulate(name, cases, tell)
            progress(name, 1.0)
            rows += found[: len(delays)]
            others += found[len(delays) :]
    except KeyboardInterrupt:
        raise Interrupted("nothing was kept") from None
    return Result(
        "simulation",
        facts=facts(command),
        settings={
            **settings.to_json(),
            "stages": stages,
            "latencies": delays,
            "chains": numbers,
            "modes": [[name, MODES[name].what] for name in chosen],
        },
        body={
            "measured": None if measured is None else dict(measured),
            "latency": rows,
            "chains": others,
            "checked": None,
        },
    )
