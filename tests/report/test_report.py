"""``fused-dni report``: text, Markdown and HTML from a report's JSON, and what is refused."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path

import pytest

from fused_dni import cli
from fused_dni.report import (
    Figure,
    Heading,
    Table,
    Text,
    as_markdown,
    as_text,
    blocks_of,
    drawable,
    load,
)
from fused_dni.report.schema import KINDS

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
ROW = {"calls": 2, "total": 0.2, "own": 0.1, "device": 0.0, "memory": 64}
REPORT = {
    "kind": "profile",
    "version": 2,
    "title": "Profile: python train.py",
    "sentence": "500 ms recorded; 50 % of the time.",
    "settings": {},
    "timings": {},
    "memory": {},
    "memory_is": "",
    "notes": [],
    "tool": "torch",
    "profiled": ["python", "train.py"],
    "status": 0,
    "seconds": 0.5,
    "trace": "trace.json.gz",
    "ranges": [{"range": "a<b>: step", **ROW}, {"range": "(no range)", **ROW, "calls": 0}],
    "ops": [{"range": "a<b>: step", "op": "aten::mm", **ROW}],
    "facts": {"device": "a processor & more", "gpu": None, "torch": "2.11", "command": "x --y"},
}


@pytest.fixture
def written(tmp_path):
    def write(**changes) -> str:
        path = tmp_path / "report.json"
        path.write_text(json.dumps({**REPORT, **changes}))
        return str(path)

    return write


@pytest.fixture
def no_matplotlib(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)


def _figure(name: str = "line") -> Figure:
    def draw(figure):
        axes = figure.subplots()
        axes.plot([0, 1], [1, 2], label="a")
        axes.axhline(1, color="black")
        axes.set_xlabel("k")

    return Figure(name, draw, "A line.", (3, 2))


# ------------------------------------------------------------------------------------- command


def test_text_is_the_default(written, capsys):
    assert cli.main(["report", written()]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Profile: python train.py\n=====") and "a<b>: step › aten::mm" in said
    assert cli.main(["report", written(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"kind": "profile", "version": 2, "files": []}


def test_a_page_of_html(written, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.main(["report", written(), "-o", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    made = page.read_text()
    assert made.count("<svg") == 1 and made.count("<table>") == 2
    assert "a&lt;b&gt;: step" in made and "<b>" not in made
    assert "a processor &amp; more" in made and "gpu" not in made
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "report.json"]


def test_markdown_with_its_figures_beside_it(written, tmp_path, capsys):
    page = tmp_path / "page.md"
    assert cli.main(["report", written(), "-o", str(page), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert files == [str(page), str(tmp_path / "page-figures" / "ranges.svg")]
    assert "](page-figures/ranges.svg)" in page.read_text()
    assert (tmp_path / "page-figures" / "ranges.svg").read_text().count("</svg>") == 1


@pytest.mark.parametrize("suffix", [".html", ".md"])
def test_without_matplotlib_figures_are_left_out_and_that_is_said(
    written, tmp_path, capsys, no_matplotlib, suffix
):
    page = tmp_path / f"page{suffix}"
    assert cli.main(["report", written(), "-o", str(page), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    made = page.read_text()
    assert "1 figure is left out: No module named 'matplotlib' (pip install matplotlib)." in made
    assert "<svg" not in made and "By range and op" in made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "recipe"}, "is no report of fused_dni: its kind is 'recipe', known: verdict"),
        ({"version": 0}, "is a 'profile' report in format 0, this version of fused_dni reads"),
    ],
)
def test_what_is_no_report_of_ours(written, tmp_path, capsys, changes, message):
    page = tmp_path / "page.html"
    assert cli.main(["report", written(**changes), "-o", str(page)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1
    assert captured.out == "" and not page.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("kind: verdict", "is no JSON"),
        ("[1]", "it holds no JSON object"),
        ("{}", "it names no kind"),
    ],
)
def test_what_is_no_report_at_all(tmp_path, capsys, content, message):
    path = tmp_path / "given.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["report", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("page.pdf", "--output must end in .html or .md, got"),
        ("file/page.html", "Not a directory"),
        ("folder.html", "is a folder"),
    ],
)
def test_pages_that_cannot_be_written(written, tmp_path, capsys, output, message):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    assert cli.main(["report", written(), "-o", str(tmp_path / output)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


# -------------------------------------------------------------------------------------- blocks


def test_every_kind_has_a_name_that_can_be_imported_or_is_to_come():
    for kind in KINDS.values():
        assert re.fullmatch(r"\w+", kind.module) and kind.version >= 1


def test_blocks_as_text_and_as_markdown(tmp_path):
    blocks = [Heading("A", 1), Text("b"), Table(["c", "d"], [["e", "1"]], "f"), _figure()]
    assert as_text(blocks) == "A\n=\n\nb\n\nc  d\n-  -\ne  1\nf"
    made = as_markdown(blocks, tmp_path / "new", "new/", lower=1)
    assert made.startswith("## A\n\nb\n\n| c | d |") and made.endswith("![A line.](new/line.svg)")
    assert (tmp_path / "new" / "line.svg").exists()


def test_a_plot_is_the_same_in_every_run_and_follows_the_pages_colour_inline():
    assert _figure().svg() == _figure().svg()
    inline = _figure().svg(inline=True)
    assert "currentColor" in inline and "stroke: #000000" not in inline
    assert "currentColor" not in _figure().svg()


def test_nothing_is_left_out_where_it_can_be_drawn():
    blocks = [Text("a"), _figure()]
    assert drawable(blocks) == blocks


def test_a_loaded_report_says_its_blocks(written):
    found = blocks_of(load(written(), "profile"))
    assert found[0] == Heading("Profile: python train.py", 1)
    assert isinstance(found[1], Text) and found[1].text.startswith("500 ms recorded; 50 %")


# ------------------------------------------------------------------------- benchmarks and planted


@pytest.mark.parametrize(
    "path", sorted(RESULTS.rglob("*.json")), ids=lambda path: str(path.relative_to(RESULTS))
)
def test_every_committed_result_is_a_report(path):
    made = blocks_of(load(path))
    assert made[0].level == 1
    tables = [block for block in made if isinstance(block, Table)]
    text = as_text(made)
    assert tables and all(row[0] in text for table in tables for row in table.rows)


def test_benchmarks_by_pytest_are_a_report(tmp_path, capsys):
    """As it writes them: no kind, a version of its own, names with their file."""
    path = tmp_path / "results.json"
    benchmarks = [
        {"fullname": f"bench/b.py::{name}", "group": group, "stats": {"data": [time] * 9}}
        for name, group, time in (("b", "one", 2e-3), ("a", "one", 1e-3), ("c", None, 5e-3))
    ]
    machine = {"python_version": "3.11.1", "cpu": {"brand_raw": "A CPU"}}
    found = {"machine_info": machine, "benchmarks": benchmarks, "version": "5.2.3"}
    path.write_text(json.dumps(found))
    assert cli.main(["report", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "3 times in 2 groups." in lines
    assert [line.split() for line in lines if line.startswith(("a ", "b ", "c "))] == [
        ["a", "1.00", "ms", "1.00", "ms", "to", "1.00", "ms", "1.00"],
        ["b", "2.00", "ms", "2.00", "ms", "to", "2.00", "ms", "2.00"],
        ["c", "5.00", "ms", "5.00", "ms", "to", "5.00", "ms", "1.00"],
    ]
    page = tmp_path / "page.html"
    assert cli.main(["report", str(path), "-o", str(page)]) == 0
    assert page.read_text().count("<svg") == 1 and "A CPU" in page.read_text()
