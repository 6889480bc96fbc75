"""Tables beside published ones: what is joined, what is paired, and where runs are cut."""

from __future__ import annotations

from typing import Any

from fused_dni.experiments.literature_settings import Settings
from fused_dni.report.schema import Result
from pages import documents

FACTS = {
    "device": "A CPU",
    "isa": None,
    "threads": 1,
    "torch": "2",
    "date": "today",
    "commit": "abc",
}


def _tables(command: str, runs: dict[tuple[str, int, int], float], **changes: Any) -> Result:
    rows = [
        {
            "table": "depth",
            "name": name,
            "size": size,
            "seed": seed,
            "error": error,
            "diverged": False,
            "history": [],
            **({"every": 8, "exact": 0.2} if name.startswith("recipe") else {}),
        }
        for (name, size, seed), error in runs.items()
    ]
    settings = {**vars(Settings()), **changes}
    body = {"dataset": "mnist", "evaluated_on": "test set", "runs": rows, "finished": True}
    facts = {**FACTS, "command": command, "commit": command}
    return Result("literature", facts=facts, settings=settings, body=body)


def test_reports_of_different_arms_are_one_table():
    exact = _tables("one", {("backprop", 3, 1): 0.015, ("backprop", 3, 2): 0.017})
    few = _tables("two", {("recipe 0.25", 3, 1): 0.018, ("recipe 0.25", 3, 2): 0.018}, mix=0.5)
    long = _tables("three", {("backprop", 3, 1): 0.01}, epochs=20)
    trial = _tables("four", {("backprop", 3, 1): 0.9}, held_out=True)
    trial.body["evaluated_on"] = "held-out part"
    found = documents.RENDERERS["literature-depth"][1]([few, exact, long, trial])
    assert found.index("commit four") < found.index("commit three")
    assert found.index("commit one, two: `one`, `two`") < found.index("commit three")
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in found.splitlines()]
    assert ["backprop", "2", "1.60 (1.50-1.70)"] in cells
    assert ["- published", "", "2.0"] in cells
    name = "cDNI, cross-entropy form, k = 8, mix 0.5, 4 lessons: 20.0 % of the steps exact"
    assert [name, "2", "1.80 (1.80-1.80)"] in cells and [name, "+0.20", "+0.20"] in cells
    assert found.count("mean (range) over seeds.") == 3  # a column says of how many
    assert documents.RENDERERS["literature-clocks"][1]([exact]) == "Not measured yet."


def test_a_row_says_how_many_seeds_each_depth_has_at_least():
    runs = {("backprop", 3, 1): 0.015, ("backprop", 3, 2): 0.017, ("backprop", 4, 1): 0.02}
    found = documents.RENDERERS["literature-depth"][1]([_tables("one", runs, depths=(3, 4))])
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in found.splitlines()]
    assert ["backprop", "1 to 2", "1.60 (1.50-1.70)", "2.00"] in cells


def _copy(task: str, ends: dict[tuple[str, int], list[tuple[float, float, float]]]) -> Any:
    """By method and window, of a seed each: solved after half of the run, at its end, seconds."""
    runs = [
        {
            "method": method,
            "window": window,
            "seed": seed,
            "history": [
                {"solved": half, "seconds": seconds / 2},
                {"solved": end, "seconds": seconds},
            ],
        }
        for (method, window), seeds in ends.items()
        for seed, (half, end, seconds) in enumerate(seeds)
    ]
    settings = {
        "task": task,
        "windows": [2, 6],
        "hidden": 8,
        "batch_size": 4,
        "amount": 1000,
        "seeds": [0, 1],
    }
    return {"facts": {**FACTS, "command": task}, "settings": settings, "runs": runs}


def test_lengths_at_equal_steps_and_at_equal_wall_clock():
    ends = {
        ("fused", 2): [(3.0, 4.0, 10.0), (3.0, 6.0, 12.0)],
        ("dni", 2): [(6.0, 10.0, 20.0), (8.0, 10.0, 20.0)],
        ("fused", 6): [(0.0, 0.0, 10.0)],
        ("dni", 6): [(1.0, 2.0, 30.0)],
    }
    render = documents.RENDERERS["copy-lengths"][1]
    found = render([_copy("repeat-copy", ends), _copy("copy", ends)])
    assert found.index("Copy: A CPU") < found.index("Repeat-copy: A CPU")
    assert "| T=2 | 5 (4–6) | 7 | 10 (10–10) | 16 | 2.00 | 2.29 |" in found
    assert "| T=2 | 5 (4–6) | 7 | 10 (10–10) | 39 | 2.00 | 5.57 |" in found
    assert "| T=6 | 0 | - | 2 | - | - | - |" in found
    # After 10 seconds: the first at its end, the second and both of DNI half way.
    assert "| T=2 | 10 s | 3.5 (3–4) | 7 (6–8) | 2.00 |" in found
    assert "| T=6 | 10 s | 0 | 0 | - |" in found
    altered = _copy("copy", {**ends, ("dni/zero", 2): [(1, 2, 10)]})  # --ablate, not published
    assert render([altered]) == render([_copy("copy", ends)])
    alone = _copy("copy", ends)
    alone["settings"]["windows"] = [2]
    assert render([alone]) == "Not measured yet."
