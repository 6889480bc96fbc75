"""The documents, and what stands between the markers in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pages import (
    cpu,
    delay,
    estimates,
    gpu,
    lengths,
    literature,
    lstm,
    pipelines,
    races,
    recipes,
    training,
    verdict,
)
from races import UNDER_TOPS
from stored import ROOT, matching

#: All pages but those that are made as a whole.
DOCUMENTS = (
    ROOT / "README.md",
    *sorted({*(ROOT / "docs").glob("*.md")} - {verdict.PAGE, verdict.TABLES}),
)


Renderer = Callable[[list[dict[str, Any]]], str]
UNMEASURED = "Not measured yet."
NO_GPU = "No GPU figure has been measured yet."


def each(renderer: Callable[[dict[str, Any]], str], none: str = UNMEASURED) -> Renderer:
    """Return a renderer of several results: one part a device, but where it has nothing to say;
    ``none`` where there are none."""
    return lambda results: "\n\n".join(filter(None, map(renderer, results))) or none


def suite(
    name: str, renderer: Callable[[dict[str, Any], dict[str, Any]], str], none: str = UNMEASURED
) -> Renderer:
    """Do as :func:`each` with a renderer of results and their groups of one suite; a device on
    which that was not measured has no part."""

    def made(results: list[dict[str, Any]]) -> str:
        parts = [renderer(found, found[name]) for found in results if found.get(name)]
        return "\n\n".join(parts) or none

    return made


# By name of the table: which results it is made from, and how.
RENDERERS: dict[str, tuple[str, Renderer]] = {
    # These read their own.
    "answers": ("", lambda _: verdict.short("docs/")),
    "answers-here": ("", lambda _: verdict.short("")),
    "step-extremes": ("*-cpu", cpu.render_extremes),
    "summary": ("*-cpu", suite("step", cpu.render_summary)),
    "step": ("*-cpu", suite("step", cpu.render_step)),
    "instructions": ("*-cpu", suite("instructions", cpu.render_instructions)),
    "linear": ("*-cpu", suite("linear", cpu.render_groups)),
    "synthesizer": ("*-cpu", suite("synthesizer", cpu.render_groups)),
    "memory": ("*-cpu", suite("peak-memory", cpu.render_memory)),
    "gemm": ("*-cpu", suite("gemm", cpu.render_gemm)),
    "lstm": ("*-lstm", suite("lstm", lstm.render_lstm)),
    "lstm-details": ("*-lstm", suite("lstm", lstm.render_lstm_details)),
    "lstm-memory": ("*-lstm", suite("lstm", lstm.render_lstm_memory)),
    "gpu": ("*-gpu", suite("gpu-layer", gpu.render_gpu, NO_GPU)),
    "gpu-lstm": ("*-gpu", suite("gpu-lstm", gpu.render_gpu_lstm, NO_GPU)),
    "gpu-details": ("*-gpu", each(gpu.render_gpu_details, NO_GPU)),
    "estimates": ("*-gpu", estimates.render_estimates),
    "delay": ("*-delay-*", delay.render_delay),
    "recipes": ("*-recipes*", recipes.render_recipes),
    "pipelines": ("*-pipelines", each(pipelines.render_pipelines)),
    "stragglers": ("*-stragglers", each(pipelines.render_stragglers)),
    "simulated": ("*-simulated", each(pipelines.render_simulated)),
    **{
        f"literature-{name}": ("*-literature*", literature.renderer(name))
        for name in ("depth", "sparse", "unlock", "clocks")
    },
    "mnist": ("*-mnist", each(training.render_training)),
    "ranks": ("*-mnist-rank-*", training.render_ranks),
    "races": (UNDER_TOPS, races.render_races),
    "race-hidden": ("verdict/*-race-hidden", each(races.render_race)),
    "rivals-grid": ("verdict/*-rivals-grid-*", each(races.render_grid)),
    "copy": ("*-copy", each(training.render_recurrent)),
    "copy-lengths": ("*-copy", lengths.render_lengths),
    "copy-future": ("*-copy", each(training.render_future)),
    "rows": ("*-rows", each(training.render_recurrent)),
    "ablation": ("*-copy-ablation", each(training.render_ablation)),
    "charlm": ("*-charlm", each(training.render_recurrent)),
    "charlm-future": ("*-charlm", each(training.render_future)),
}


def committed(pattern: str) -> list[dict[str, Any]]:
    """Return the results whose file name fits."""
    return list(matching(pattern).values())


def render_document(text: str, results: Callable[[str], list[dict[str, Any]]] = committed) -> str:
    """``text`` with everything between its markers made anew from ``results(pattern)``.

    Raises:
        ValueError: a marker without its end, or of a table that does not exist.
    """
    opening = re.compile(r"<!-- table: (\S+) -->\n")
    closing = "<!-- end of table -->"
    done, position = [], 0
    for match in opening.finditer(text):
        end = text.find(closing, match.end())
        if end < 0:
            raise ValueError(f"table {match[1]!r} has no end marker")
        if match[1] not in RENDERERS:
            raise ValueError(f"unknown table {match[1]!r}; there are {', '.join(RENDERERS)}")
        pattern, renderer = RENDERERS[match[1]]
        done += [text[position : match.end()], "\n", renderer(results(pattern)), "\n\n"]
        position = end
    return "".join([*done, text[position:]])


def render(check: bool) -> int:
    """Rewrite the documents, or with ``check`` say which of them differ."""
    stale = verdict.render(check)
    for path in DOCUMENTS:
        old = path.read_text(encoding="utf-8")
        new = render_document(old)
        if new == old:
            continue
        stale += 1
        name = path.relative_to(ROOT)
        if check:
            print(f"{name} differs from the results: run python bench/tables.py render")
        else:
            path.write_text(new, encoding="utf-8")
            print(f"rewrote {name}")
    return 1 if check and stale else 0
