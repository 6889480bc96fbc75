"""Two files of results against each other: when a difference is called one. Nothing is timed."""

from __future__ import annotations

import json
import random

import pytest

from fused_dni import cli
from fused_dni.measure.compare import ComparisonError, blocks, compare, read
from fused_dni.report import Figure, Table, Text, load
from fused_dni.report.blocks import as_text
from fused_dni.report.files import as_json
from fused_dni.report.intervals import median_interval
from fused_dni.report.schema import Result, save
from fused_dni.report.times import interval
from fused_dni.report.timings import Timing

FACTS = {"device": "A CPU", "gpu": None, "threads": 2, "python": "3.11.1", "torch": "2.13.0"}
FLOORS = ("bench_floor[a]", "bench_floor[b]", "bench_floor[c]")


def rounds(median, seed, n=64, spread=0.03):
    """Rounds of an idle machine: independent, a few per cent apart."""
    draw = random.Random(seed)
    return [median * (1.0 + spread * draw.gauss(0.0, 1.0)) for _ in range(n)]


def written(path, benchmarks, facts=FACTS, data=True):
    """A file as pytest-benchmark writes it, as far as anything is read from it."""
    found = {
        "machine_info": {"fused_dni": facts, "python_version": "3.11.1", "cpu": {}},
        "commit_info": {},
        "benchmarks": [
            {
                "fullname": name,
                "group": "a question",
                "stats": {"median": 1.0, **({"data": taken} if data else {})},
            }
            for name, taken in benchmarks.items()
        ],
        "version": "5.2.3",
    }
    path.write_text(json.dumps(found))
    return path


def pair(tmp_path, old, new, **facts):
    """Two files' results."""
    return (
        read(written(tmp_path / "old.json", old)),
        read(written(tmp_path / "new.json", new, {**FACTS, **facts})),
    )


def run(change, seed, floors=1.0, **options):
    """Some benchmarks and their floors, as one run would measure them."""
    made = {name: rounds(1e-4 * floors, (seed, name).__repr__()) for name in FLOORS}
    return made | {"ours": rounds(1e-3 * change, f"{seed} ours", **options)}


def words(report):
    return {row["name"]: row["verdict"] for row in report["rows"]}


# -------------------------------------------------------------------------------- what is decided


@pytest.mark.parametrize(
    ("change", "word"), [(1.25, "slower"), (0.75, "faster"), (1.0, "inconclusive")]
)
def test_changes_are_called(tmp_path, change, word):
    """Ten pairs of runs of each kind: all are called rightly."""
    for seed in range(10):
        found = compare(*pair(tmp_path, run(1.0, seed), run(change, seed + 100)))
        assert words(found)["ours"] == word
        assert all(words(found)[name] == "inconclusive" for name in FLOORS)


def test_what_the_floors_changed_by_is_no_change(tmp_path):
    """The whole machine was a fifth slower in the second run."""
    old, new = pair(tmp_path, run(1.0, 1), run(1.2, 2, floors=1.25))
    found = compare(old, new)
    assert found["noise"]["source"] == "floors"
    assert 0.2 < found["noise"]["fraction"] < 0.4
    assert words(found)["ours"] == "inconclusive"
    assert words(compare(old, new, noise=0.0))["ours"] == "slower"


def test_one_floor_of_many_is_enough_to_doubt(tmp_path):
    disturbed = run(0.8, 2)
    disturbed[FLOORS[1]] = rounds(1.3e-4, 3)
    found = compare(*pair(tmp_path, run(1.0, 1), disturbed))
    assert words(found)["ours"] == "inconclusive"


def test_without_floors_runs_are_taken_to_differ(tmp_path):
    old, new = {"ours": rounds(1.0, 1)}, {"ours": rounds(1.08, 2)}
    found = compare(*pair(tmp_path, old, new))
    assert found["noise"] == {"fraction": 0.1, "source": "assumed", "floors": {}}
    assert words(found)["ours"] == "inconclusive"
    assert words(compare(*pair(tmp_path, old, new), noise=0.01))["ours"] == "slower"


def test_a_disturbance_of_some_rounds_is_seen_in_the_interval(tmp_path):
    """Half of the second run was slow, by whatever else ran then: no change of the code, and rounds
    taken as independent would swear to one."""
    calm, disturbed = rounds(1.0, 1), rounds(1.0, 2)[:24] + rounds(1.3, 3)[:40]
    naive = median_interval(disturbed, 0.99)
    assert naive[0] > 1.02
    old, new = run(1.0, 1), run(1.0, 2)
    found = compare(*pair(tmp_path, old | {"ours": calm}, new | {"ours": disturbed}))
    assert words(found)["ours"] == "inconclusive"


def test_interval_covers_the_median():
    """99 of 100 by construction; of 200 at most a few are missed."""
    hits = 0
    for seed in range(200):
        low, high = interval(rounds(1.0, seed, n=40))
        hits += low <= 1.0 <= high
    assert 194 <= hits < 200 or hits == 200


def test_few_rounds_decide_nothing(tmp_path):
    found = compare(*pair(tmp_path, run(1.0, 1, n=7), run(9.0, 2, n=7)))
    (row,) = [row for row in found["rows"] if row["name"] == "ours"]
    assert row["verdict"] == "inconclusive" and row["ratio"].bounds is None
    assert "too few rounds" in as_text(blocks(found))


# ------------------------------------------------------------------------------ what is compared


def test_benchmarks_are_matched_by_their_full_names(tmp_path):
    old = {"a": rounds(1.0, 1), "b": rounds(2.0, 2), "gone": rounds(1.0, 3)}
    new = {"added": rounds(1.0, 4), "b": rounds(1.0, 5), "a": rounds(1.0, 6)}
    found = compare(*pair(tmp_path, old, new))
    assert words(found) == {"a": "inconclusive", "b": "faster"}
    assert (found["only_old"], found["only_new"]) == (["gone"], ["added"])
    text = as_text(blocks(found))
    assert "Only in the first file: gone." in text and "Only in the second file: added." in text


@pytest.mark.parametrize("what", ["device", "threads", "torch", "python", "gpu"])
def test_other_machines_and_versions_are_refused(tmp_path, what):
    old, new = pair(tmp_path, run(1.0, 1), run(1.0, 2), **{what: "another"})
    with pytest.raises(ComparisonError, match=rf"differs \({what}: .* against another\): --force"):
        compare(old, new)
    found = compare(old, new, force=True)
    assert [difference["what"] for difference in found["differences"]] == [what]
    assert "compared by force" in as_text(blocks(found))


def test_another_commit_is_what_one_compares(tmp_path):
    old, new = pair(tmp_path, run(1.0, 1), run(1.0, 2), commit="new", fused_dni="9", date="later")
    assert compare(old, new)["differences"] == []


def timed(median):
    return Timing.of("t", rounds(median, 1), rounds(median, 1), 1)


def test_reports_of_one_kind_are_compared(tmp_path):
    for name, change in (("old", 1.0), ("new", 1.5)):
        save(
            tmp_path / f"{name}.json",
            Result(
                "verdict",
                "a layer",
                "It was measured.",
                facts={**FACTS, "commit": name},
                timings={"fused": timed(change), "floor": timed(1.0)},
                body={"parts": [{"forward": timed(1.0)}]},
            ),
        )
    found = compare(read(tmp_path / "old.json"), read(tmp_path / "new.json"))
    assert words(found) == {
        "timings/fused": "slower",
        "timings/floor": "inconclusive",
        "parts/0/forward": "inconclusive",
    }
    assert found["compared"] == "verdict" and list(found["noise"]["floors"]) == ["timings/floor"]


def test_maps_of_two_versions_are_compared(tmp_path):
    for name, change in (("old", 1.0), ("new", 0.5)):
        points = {"8x16 dense output": {"timings": {"fused": timed(change)}}}
        series = {"facts": {**FACTS, "commit": name}, "settings": {"where": "cpu"}}
        body = {"series": {f"hash of {name}": {**series, "points": points}}}
        report = Result("map", "a map", "It was measured.", facts=FACTS, body=body)
        save(tmp_path / f"{name}.json", report)
    found = compare(read(tmp_path / "old.json"), read(tmp_path / "new.json"))
    assert words(found) == {"8x16 dense output/timings/fused": "faster"}
    report["series"]["another"] = series
    save(tmp_path / "two.json", report)
    with pytest.raises(ComparisonError, match="holds 2 series"):
        read(tmp_path / "two.json")


# ---------------------------------------------------------------------------------- command line


def files(tmp_path, change=1.0, **facts):
    return [
        str(written(tmp_path / "old.json", run(1.0, 1))),
        str(written(tmp_path / "new.json", run(change, 2), {**FACTS, **facts})),
    ]


def test_command_writes_what_it_says(tmp_path, capsys):
    given = files(tmp_path, 2.0)
    out = tmp_path / "comparison.json"
    assert cli.main(["compare", *given, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Of 4 benchmarks in both files" in printed and "1 slower, 0 faster" in printed
    report = load(out, "comparison")
    assert str(tmp_path) not in out.read_text()
    assert as_text(blocks(report)) + "\n" == printed
    assert cli.main(["compare", *given, "--json"]) == 0
    assert capsys.readouterr().out == out.read_text()


@pytest.mark.parametrize(("change", "status"), [(2.0, 1), (1.0, 0), (0.5, 0)])
def test_command_fails_on_slower_if_asked_to(tmp_path, change, status):
    assert cli.main(["compare", *files(tmp_path, change), "--fail-on-slower"]) == status


def test_changes_stand_first_and_are_drawn(tmp_path):
    report = compare(*pair(tmp_path, run(1.0, 1), run(2.0, 2)))
    made = blocks(report)
    (table,) = [block for block in made if isinstance(block, Table)]
    assert table.rows[0][0] == "ours" and table.rows[0][-1] == "slower"
    (figure,) = [block for block in made if isinstance(block, Figure)]
    svg = figure.svg()
    assert ">ours<" in svg and svg == figure.svg()
    said = [block.text for block in made if isinstance(block, Text)]
    assert "one of 3 floors may have changed by" in said[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "is no JSON"),
        ("[]", "it holds no JSON object"),
        ('{"kind": "verdict", "version": 99, "facts": {}}', "in format 99"),
        ('{"kind": "verdict", "version": 1, "facts": {}}', "in format 1"),
        ('{"kind": "verdict", "version": 2, "facts": {}}', "it lacks 'title'"),
        (as_json(Result("verdict", "t", "s")), "holds no times"),
        ('{"machine_info": {}, "benchmarks": []}', "holds no times"),
    ],
)
def test_command_refuses_in_one_line(tmp_path, capsys, content, message):
    given = files(tmp_path)
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["compare", given[0], str(path)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_command_refuses_what_cannot_be_compared(tmp_path, capsys):
    given = files(tmp_path, torch="2.99")
    assert cli.main(["compare", *given]) == 2
    assert "torch: 2.13.0 against 2.99" in capsys.readouterr().err
    without = str(written(tmp_path / "w.json", run(1.0, 1), data=False))
    assert cli.main(["compare", given[0], without]) == 2
    assert "has no rounds" in capsys.readouterr().err
    foreign = str(written(tmp_path / "f.json", {"else": rounds(1.0, 1)}))
    assert cli.main(["compare", given[0], foreign]) == 2
    assert "no benchmark stands in both" in capsys.readouterr().err
    report = tmp_path / "verdict.json"
    save(report, Result("verdict", "t", "s", facts=FACTS, timings={"a": timed(1.0)}))
    assert cli.main(["compare", given[0], str(report)]) == 2
    assert "of kind pytest-benchmark, the second of verdict" in capsys.readouterr().err
    assert cli.main(["compare", *given, "--noise", "much"]) == 2
    assert "noise must be a finite number" in capsys.readouterr().err


def test_files_from_before_the_suites_had_a_folder_are_compared(tmp_path):
    old = {f"bench/bench_{name}.py::bench": rounds(1e-3, name) for name in FLOORS}
    new = {name.replace("bench/", "bench/suites/", 1): data for name, data in old.items()}
    assert words(compare(*pair(tmp_path, old, new))).keys() == old.keys()
