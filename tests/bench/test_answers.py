"""docs/verdict.md is what the committed results say, and every command behind it exists."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

import claims
import races
import readings
import stored
from fused_dni.cli.program import _parse
from fused_dni.report import Figure, Result, Table
from fused_dni.report.kinds import recipes as recipes_report
from pages import documents, verdict

PAGES = (verdict.PAGE, verdict.TABLES)


def paragraphs(page: str) -> list[str]:
    """What is neither a table, a picture nor a heading."""
    return [part for part in re.split(r"\n\s*\n", page) if part[0] not in "|!#<"]


def test_the_pages_are_what_the_results_say():
    assert verdict.render(check=True) == 0


def test_a_changed_result_changes_the_pages(monkeypatch, tmp_path):
    monkeypatch.setattr(Figure, "save", lambda figure, path: path)  # the text is what is compared
    before = verdict.page(tmp_path), verdict.tables(tmp_path), verdict.bullets("docs/")
    real = claims.committed

    def changed(patterns):
        found = real(patterns)
        for reports in found.values():
            for report in reports.values():
                for run in report.get("runs", ()) if isinstance(report.get("runs"), list) else ():
                    for row in run.get("history", ()):
                        row["solved" if "solved" in row else "error"] = 1234.0
        return found

    monkeypatch.setattr(claims, "committed", changed)
    after = verdict.page(tmp_path), verdict.tables(tmp_path), verdict.bullets("docs/")
    assert all(a != b for a, b in zip(after, before, strict=True))


def test_every_figure_of_the_pages_is_there_and_no_other():
    linked = set()
    for page in PAGES:
        linked |= set(re.findall(r"\(verdict/([^)]+\.svg)\)", page.read_text()))
    assert linked == {path.name for path in verdict.FIGURES.iterdir()}


def test_a_machine_may_have_measured_accuracy_both_ways():
    (recipes,) = stored.matching("amd-epyc-avx512-recipes").values()
    others = {path.stem: r for path, r in stored.matching("verdict/*-mnist-*").items()}
    found, alone = readings.accuracy({**others, "recipes": recipes}), readings.published(others)
    assert found.answer == readings.recipe({"recipes": recipes}).answer
    assert found.blocks[-len(alone.blocks) :] == alone.blocks


def test_sentences_are_of_the_numbers_and_not_of_the_file():
    (recipes,) = stored.matching("amd-epyc-avx512-recipes").values()
    old = replace(recipes, sentence="At k=16 the best recipe is another.")
    assert stored.said_anew(old).sentence == recipes_report.sentence(recipes)
    (race,) = stored.matching("verdict/amd-epyc-avx2-race-sentence").values()
    assert stored.said_anew(race).sentence == race.sentence != ""


def test_a_run_that_was_not_probed_has_no_table_of_it():
    probed = [r for r in documents.committed("*-copy") if r.settings["probe"]]
    assert probed and len(probed) < len(documents.committed("*-copy"))
    made = [documents.RENDERERS["copy-future"][1](of) for of in (probed, [])]
    assert (
        documents.RENDERERS["copy-future"][1](documents.committed("*-copy")) == made[0] != made[1]
    )


def test_figures_of_a_claim_have_a_label_each():
    for _, found in verdict.each():
        for _, answer in found:
            labels = [part.partition(": ")[0] for part in answer.number.split("; ") if ": " in part]
            assert len(set(labels)) == len(labels)


def test_every_claim_has_an_answer_or_is_left_open():
    for question in claims.QUESTIONS:
        assert (question.answer is None) == (question.patterns == ())
        for _, answer in claims.answered(question):
            assert answer.sentence.endswith(".") and answer.blocks
            assert 0 < len(answer.answer) < 80 and 0 < len(answer.number) < 120


def test_the_page_can_be_read_in_a_minute():
    """Ten claims, a table of eight rows at most or a figure each, no long paragraph."""
    page = verdict.PAGE.read_text()
    sections = page.split("\n## ")[2:]
    assert len(page.splitlines()) <= 220 and len(sections) == 10
    for section in sections:
        rows = [line for line in section.splitlines() if line.startswith("|")]
        assert bool(rows) != ("![" in section)
        assert len(rows) <= 2 + verdict.ROWS
    for question in claims.QUESTIONS:
        assert f"[{question.claim}](" in page
        for _, answer in claims.answered(question):
            if isinstance(answer.shown, Table):
                assert len(answer.shown.rows) <= verdict.ROWS


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_paragraph_is_longer_than_its_reader(path):
    for paragraph in paragraphs(path.read_text()):
        assert len(paragraph) <= 600, paragraph


def test_each_line_of_the_readme_has_a_figure_a_device_and_a_link():
    lines = [line for line in verdict.bullets("docs/").splitlines() if line.startswith("- ")]
    assert len(lines) == len(verdict.BULLETS) == 5
    for line in lines:
        assert re.search(r"\d", line) and " thread" in line and "](docs/verdict.md#" in line


def test_of_machines_that_say_the_same_the_one_of_the_most_seeds_is_quoted(monkeypatch):
    (question,) = (q for q in claims.QUESTIONS if q.key == "reach")
    few, many = (
        {"x": {"facts": {"device": name, "threads": 1, "gpu": None}}} for name in ("few", "many")
    )

    def answer(*bullets):
        return readings.Answer("", "", "", [], bullets=bullets)

    said = readings.Bullet("Copied 3", "copy", 3), readings.Bullet("Read 2", "text", 2)
    found = [(few, answer(*said)), (many, answer(readings.Bullet("Copied 5", "copy", 5)))]
    monkeypatch.setattr(verdict, "BULLETS", ("reach",))
    for rows in (found, found[::-1]):
        monkeypatch.setattr(verdict, "each", lambda rows=rows: iter([(question, rows)]))
        (line,) = verdict.bullets("").splitlines()
        assert "Copied 5 (many, 1 thread" in line and "Read 2 (few, 1 thread" in line
        assert "Copied 3" not in line and line.count("[table]") == 1


def test_how_far_copying_goes_is_counted():
    """At the command's own window, and between all: as many steps, as much time."""

    def run(method, window, *rows):
        history = [{"solved": solved, "seconds": seconds} for solved, seconds in rows]
        return {"method": method, "window": window, "history": history}

    runs = []
    for window, (ours, theirs) in {2: (6, 3), 4: (8, 4)}.items():
        runs += [run("fused", window, (theirs, 10.0))] * 2
        runs += [run("dni", window, (1, 5.0), (ours, 30.0)), run("dni", window, (ours, 30.0))]
    report = Result("train copy", settings={"windows": [2, 4]}, body={"runs": runs})
    said = readings._copied(report, 2)
    assert (said.about, said.seeds) == ("copy", 2)
    assert "**8 (8 to 8)** symbols at T=4, truncated backprop 4 (4 to 4)" in said.text
    assert (
        "which take 3.0 times as long; in as much time 0.5 (0 to 1) against 4 (4 to 4)" in said.text
    )
    assert "At T=2, 4 that is 2.0 to 2.0 times as far after as many steps, 0.1 to 0.2" in said.text


def test_ranges_that_overlap_are_told(monkeypatch):
    (report,) = stored.matching("verdict/*-rivals").values()
    errors = {row["name"]: [0.05, 0.06] for row in report["arms"]}
    errors |= {"fused": [0.02, 0.03], "cdni-4": [0.03, 0.04], "local": [0.01, 0.015]}
    errors["stale-4"] = [0.01, 0.025]
    monkeypatch.setattr(readings.rivals_report, "errors", lambda report, name: errors[name])
    (bullet,) = readings.rivals({"rivals": report}).bullets
    assert (
        "with **3.50 %** (3.00 to 4.00) error, backprop with 2.50 % (2.00 to 3.00): " in bullet.text
    )
    assert "means of 2 seeds, whose ranges overlap" in bullet.text
    assert "2 end with less error than DNI, 2 of them with ranges apart, and 2" in bullet.text
    assert bullet.text.endswith("with less than backprop, 1 with ranges apart")
    errors["cdni-4"] = [0.035, 0.04]
    assert "whose ranges are apart" in readings.rivals({"rivals": report}).bullets[0].text


def test_what_needs_no_stand_in_is_told_apart():
    found = [n for n in ("DNI k=8", "DNI k=8, head sampled", "DNI k=16, surrogate", "by hand k=8",
                         "DNI k=8, dense") if races.by_dni_alone(n)]  # fmt: skip
    assert found == ["DNI k=8", "DNI k=8, dense"]
    reports = stored.matching(races.UNDER_TOPS)
    (bullet,) = readings.tops({str(path): report for path, report in reports.items()}).bullets
    plain = [races.soonest(report, races.by_dni_alone) for report in reports.values()]
    assert f"in {len(plain) - plain.count(None)} of {len(plain)}, and in the other" in bullet.text


@pytest.mark.parametrize(
    ("count", "of", "word"),
    [(0, 9, "no"), (9, 9, "yes"), (1, 9, "seldom"), (4, 9, "in part"), (8, 9, "mostly")],
)
def test_words_are_counted(count, of, word):
    assert readings.often(count, of) == word


def test_a_gpu_that_was_measured_is_named(monkeypatch):
    assert verdict.gpu() == "No GPU figure has been measured yet."
    found = {"x": {"facts": {"device": "CPU", "gpu": "NVIDIA T1"}}}
    monkeypatch.setattr(verdict, "matching", lambda pattern: found)
    assert "NVIDIA T1" in verdict.gpu()


@pytest.mark.parametrize("name", [name for name, _ in claims.commands("DIR")])
def test_a_command_behind_the_page_is_one(name):
    words = dict(claims.commands("DIR"))[name]
    if words[0].endswith(".py"):
        assert (stored.ROOT / words[0]).exists()
    else:
        asked = _parse(words)[0].command.split()
        assert asked == words[: len(asked)]


def test_measuring_writes_one_file_a_name(monkeypatch, tmp_path):
    tiny = ["verdict", "linear", "--in", "8", "--batch", "8", "--seconds", "0.02", "--threads", "1"]
    tiny += ["--no-compile", "--no-parts", "--quiet", "--out", "OUT"]
    made = [("tiny", tiny), ("wrong", ["verdict", "nothing", "--out", "OUT"]), ("other", tiny)]
    monkeypatch.setattr(claims, "commands", lambda data: iter(made))
    monkeypatch.setattr(stored, "VERDICT", tmp_path)
    assert claims.measure("DIR", ["tiny", "wrong"]) == 1
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-tiny.json")
    assert json.loads(path.read_text())["kind"] == "verdict"
