"""The documents, and what stands between the markers in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pages import cpu, delay, estimates, gpu, lstm, pipelines, races, training, verdict
from stored import ROOT, matching

#: All pages but those that are made as a whole.
DOCUMENTS = (
    ROOT / "README.md",
    *sorted({*(ROOT / "docs").glob("*.md")} - {verdict.PAGE, verdict.TABLES}),
)


def each(
    renderer: Callable[[dict[str, Any]], str],
) -> Callable[[list[dict[str, Any]]], str]:
    """Return a renderer of several results: one part a device."""
    return lambda results: "\n\n".join(map(renderer, results)) or "Not measured yet."


def on_gpus(
    renderer: Callable[[dict[str, Any]], str],
) -> Callable[[list[dict[str, Any]]], str]:
    """Do as :func:`each`, and say so where no GPU was measured."""
    return lambda results: (
        "\n\n".join(map(renderer, results)) or "No GPU figure has been measured yet."
    )


# By name of the table: which results it is made from, and how.
RENDERERS: dict[str, tuple[str, Callable[[list[dict[str, Any]]], str]]] = {
    # These read their own.
    "answers": ("", lambda _: verdict.short("docs/")),
    "answers-here": ("", lambda _: verdict.short("")),
    "summary": ("*-cpu", each(cpu.render_summary)),
    "step": ("*-cpu", each(cpu.render_step)),
    "instructions": ("*-cpu", each(cpu.render_instructions)),
    "linear": ("*-cpu", each(lambda results: cpu.render_groups(results, "linear"))),
    "synthesizer": ("*-cpu", each(lambda results: cpu.render_groups(results, "synthesizer"))),
    "memory": ("*-cpu", each(cpu.render_memory)),
    "gemm": ("*-cpu", each(cpu.render_gemm)),
    "lstm": ("*-lstm", each(lstm.render_lstm)),
    "lstm-details": ("*-lstm", each(lstm.render_lstm_details)),
    "lstm-memory": ("*-lstm", each(lstm.render_lstm_memory)),
    "gpu": ("*-gpu", on_gpus(gpu.render_gpu)),
    "gpu-lstm": ("*-gpu", on_gpus(gpu.render_gpu_lstm)),
    "gpu-details": ("*-gpu", on_gpus(gpu.render_gpu_details)),
    "estimates": ("*-gpu", estimates.render_estimates),
    "delay": ("*-delay-*", delay.render_delay),
    "pipelines": ("*-pipelines", each(pipelines.render_pipelines)),
    "stragglers": ("*-stragglers", each(pipelines.render_stragglers)),
    "simulated": ("*-simulated", each(pipelines.render_simulated)),
    "mnist": ("*-mnist", each(training.render_training)),
    "ranks": ("*-mnist-rank-*", training.render_ranks),
    "races": ("verdict/*-race-*", races.render_races),
    "race-hidden": ("verdict/*-race-hidden", each(races.render_race)),
    "rivals-grid": ("verdict/*-rivals-grid-*", each(races.render_grid)),
    "copy": ("*-copy", each(training.render_recurrent)),
    "copy-future": ("*-copy", each(training.render_future)),
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
