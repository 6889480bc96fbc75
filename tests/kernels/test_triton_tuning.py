"""Choices of tiles: whose word counts, what is kept on disk, what measuring leaves alone."""

from __future__ import annotations

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from fused_dni.kernels import tuning
from fused_dni.kernels.tuning import Choice

from fused_dni.measure import tiles

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16


class Tiles(NamedTuple):
    block: int
    path: str = "one"
    split: bool = False


def usual():
    return Tiles(16)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and no memory of what was chosen before."""
    monkeypatch.setenv("FUSED_DNI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_SHIPPED", tmp_path / "shipped.json")
    forget(monkeypatch)
    return tmp_path / "cache" / "tiles.json"


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(tuning, "_tables", None)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_forced", {})


def write(path, choices, format=tuning.FORMAT):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"format": format, "choices": choices}))


# ------------------------------------------------------------------------------------- choosing


def test_without_a_table_the_rule_of_thumb_is_asked_once():
    asked = []

    def default():
        asked.append(1)
        return Tiles(32)

    for _ in range(3):
        assert tuning.choose("op", (8, 8), F32, CPU, default) == Tiles(32)
    assert len(asked) == 1


def test_what_was_measured_counts_in_later_processes(cache, monkeypatch):
    path = tuning.remember(Choice("op", (8, 8), F32, CPU), Tiles(64, "several", True))
    assert path == cache
    forget(monkeypatch)
    found = tuning.choose("op", (8, 8), F32, CPU, usual)
    assert found == Tiles(64, "several", True)
    assert isinstance(found, Tiles)


def test_what_was_measured_replaces_what_was_chosen_before():
    assert tuning.choose("op", (8, 8), F32, CPU, usual) == usual()
    tuning.remember(Choice("op", (8, 8), F32, CPU), Tiles(64))
    assert tuning.choose("op", (8, 8), F32, CPU, usual) == Tiles(64)


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "device"),
    [
        ("other", (128, 1024), F32, CPU),
        ("op", (128, 1025), F32, CPU),
        ("op", (64, 1024), F32, CPU),
        ("op", (128, 1024, 1), F32, CPU),
        ("op", (128, 1024), BF16, CPU),
        ("op", (128, 1024), F32, torch.device("meta")),
    ],
)
def test_a_choice_is_for_its_op_shape_dtype_and_architecture(op, shape, dtype, device):
    tuning.remember(Choice("op", (128, 1024), F32, CPU), Tiles(64))
    assert tuning.choose(op, shape, dtype, device, usual) == usual()


def test_a_choice_is_for_its_variant(cache):
    def choice(variant):
        return tuning.choose("op", (8, 8), F32, CPU, usual, variant)

    tuning.remember(Choice("op", (8, 8), F32, CPU, "adam"), Tiles(64))
    assert [choice(variant) for variant in ("adam", "sgd", "")] == [Tiles(64), usual(), usual()]
    assert "op:adam/interpreter/float32/8x8" in cache.read_text()


def test_a_shape_that_was_not_measured_takes_the_next_powers_of_two():
    tuning.remember(Choice("op", (128, 1024, 1), F32, CPU), Tiles(64))
    tuning.remember(Choice("op", (100, 1000, 1), F32, CPU), Tiles(32))
    assert tuning.choose("op", (65, 513, 1), F32, CPU, usual) == Tiles(64)
    assert tuning.choose("op", (100, 1000, 1), F32, CPU, usual) == Tiles(32)  # itself first
    assert tuning.choose("op", (64, 1024, 1), F32, CPU, usual) == usual()


def test_own_measurements_count_more_than_the_shipped_ones(cache, monkeypatch):
    shipped = {"block": 8, "path": "shipped", "split": False}
    write(tuning._SHIPPED, {f"op/interpreter/float32/{s}": shipped for s in ("8x8", "16x16")})
    tuning.remember(Choice("op", (8, 8), F32, CPU), Tiles(64))
    for _ in range(2):  # in this process, and in the next one
        assert tuning.choose("op", (8, 8), F32, CPU, usual) == Tiles(64)
        assert tuning.choose("op", (16, 16), F32, CPU, usual) == Tiles(8, "shipped")
        forget(monkeypatch)
    assert "16x16" not in cache.read_text()


def test_forced_tiles_count_most_and_only_inside():
    tuning.remember(Choice("op", (8, 8), F32, CPU), Tiles(64))

    def choice(op="op"):
        return tuning.choose(op, (8, 8), F32, CPU, usual)

    with tuning.using("op", Tiles(1)):
        with tuning.using("op", Tiles(2)):
            assert choice() == Tiles(2)
        assert choice() == Tiles(1)
        assert choice("other") == usual()
    assert choice() == Tiles(64)
    with pytest.raises(ZeroDivisionError), tuning.using("op", Tiles(1)):
        raise ZeroDivisionError
    assert choice() == Tiles(64)


def test_asking_again_is_a_look_up(monkeypatch):
    tuning.remember(Choice("op", (8, 8), F32, CPU), Tiles(64))
    assert tuning.choose("op", (8, 8), F32, CPU, usual) == Tiles(64)

    def refuse(*given):
        raise AssertionError("asked again")

    for name in ("_measured", "architecture", "folder"):
        monkeypatch.setattr(tuning, name, refuse)
    assert tuning.choose("op", (8, 8), F32, CPU, refuse) == Tiles(64)


def test_choices_can_be_looked_at():
    def choose(op):
        return tuning.choose(op, (8, 8), F32, CPU, usual)

    choose("before")
    with tuning.recording() as found, tuning.using("forced", Tiles(1)):
        for op in ("op", "before", "forced"):
            choose(op)
    choose("after")
    assert found == {Choice(op, (8, 8), F32, CPU): usual() for op in ("op", "before")}


# --------------------------------------------------------------------------------------- tables

RIGHT = {"block": 64, "path": "one", "split": True}


@pytest.mark.parametrize(
    "fields",
    [
        {"block": 64, "path": "one"},
        {**RIGHT, "more": 1},
        {**RIGHT, "block": "64"},
        {**RIGHT, "block": True},
        {**RIGHT, "split": 1},
        [64, "one", True],
        None,
    ],
    ids=repr,
)
def test_entries_that_are_no_tiles_of_today_are_ignored(cache, fields):
    write(cache, {"op/interpreter/float32/8x8": fields, "op/interpreter/float32/9x9": RIGHT})
    assert tuning.choose("op", (8, 8), F32, CPU, usual) == usual()
    assert tuning.choose("op", (9, 9), F32, CPU, usual) == Tiles(**RIGHT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": 1, "choices": []}',
        json.dumps({"format": tuning.FORMAT + 1, "choices": {"op/interpreter/float32/8x8": RIGHT}}),
        "\x00\xff",
    ],
    ids=range(8),
)
def test_tables_that_cannot_be_read_are_ignored_and_replaced(cache, text, monkeypatch):
    cache.parent.mkdir()
    cache.write_text(text)
    assert tuning.choose("op", (8, 8), F32, CPU, usual) == usual()
    tuning.remember(Choice("op", (8, 8), F32, CPU), Tiles(64))
    forget(monkeypatch)
    assert tuning.choose("op", (8, 8), F32, CPU, usual) == Tiles(64)


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSED_DNI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.folder() == tmp_path / "xdg" / "fused_dni"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.folder() == tmp_path / ".cache" / "fused_dni"


def test_a_table_that_cannot_be_written_is_an_error_and_the_choice_holds(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSED_DNI_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError):
        tuning.remember(Choice("op", (8, 8), F32, CPU), Tiles(64))
    assert tuning.choose("op", (8, 8), F32, CPU, usual) == Tiles(64)


def test_writers_at_the_same_time_lose_nothing(cache):
    """Threads: what excludes them is a lock on an open file, as it is between processes."""

    def writer(who):
        for i in range(20):
            tuning.remember(Choice("op", (who, i), F32, CPU), Tiles(who))

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(writer, who) for who in range(4)]
        while not all(w.done() for w in writers):
            if cache.exists():
                json.loads(cache.read_text())  # whole at every moment
        for w in writers:
            w.result()
    choices = json.loads(cache.read_text())["choices"]
    assert len(choices) == 80
    assert not list(cache.parent.glob("*.partial"))


# ------------------------------------------------------------------------------------- measuring


def sleeper(tiles):
    """Tiles that take as many milliseconds as their block; 13 does not compile."""
    if tiles.block == 13:
        raise RuntimeError("out of resource: shared memory, required 300000\nhint")
    return lambda: time.sleep(tiles.block * 1e-3)


def test_the_fastest_is_remembered_and_the_others_are_reported(cache, monkeypatch):
    trials = []
    candidates = [Tiles(8), Tiles(13), Tiles(1), Tiles(8)]
    best = tiles.tune(
        Choice("op", (8, 8), F32, CPU), candidates, sleeper, seconds=0.1, report=trials.append
    )
    assert best == Tiles(1)
    assert [t.tiles.block for t in trials] == [1, 8, 13]
    assert trials[0].timing.median < trials[1].timing.median
    assert trials[2].timing is None
    assert trials[2].skipped == "RuntimeError: out of resource: shared memory, required 300000"
    forget(monkeypatch)
    assert tuning.choose("op", (8, 8), F32, CPU, usual) == Tiles(1)


def test_skipped_candidates_are_logged(monkeypatch):
    records: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger(tiles.__name__), "handle", records.append)
    tiles.tune(Choice("op", (8, 8), F32, CPU), [Tiles(1), Tiles(13)], sleeper, seconds=0.01)
    (record,) = records
    assert record.levelname == "WARNING" and "Tiles(block=13" in record.getMessage()


@pytest.mark.parametrize(
    ("candidates", "message"), [([Tiles(13)], "required 300000"), ([], "none was given")]
)
def test_no_candidate_is_an_error_and_nothing_is_kept(cache, candidates, message):
    with pytest.raises(RuntimeError, match=f"no candidate for op runs on cpu: .*{message}"):
        tiles.tune(Choice("op", (8, 8), F32, CPU), candidates, sleeper)
    assert not cache.exists()
    assert tuning.choose("op", (8, 8), F32, CPU, usual) == usual()


def test_random_numbers_go_on_as_if_nothing_was_measured():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)

    def prepare(tiles):
        scratch = torch.randn(64)
        return lambda: scratch.normal_()

    tiles.tune(Choice("op", (8, 8), F32, CPU), [Tiles(1)], prepare, seconds=0.01)
    assert torch.equal(torch.rand(4), expected)


def test_nothing_is_measured_inside_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    def prepare(tiles):
        raise AssertionError("prepared")

    with pytest.raises(RuntimeError, match="while a CUDA graph is being captured"):
        tiles.tune(Choice("op", (8, 8), F32, torch.device("cuda", 0)), [Tiles(1)], prepare)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_timed_by_replays():
    device = torch.device("cuda", torch.cuda.current_device())
    trials = []

    def prepare(tiles):
        scratch = torch.randn(tiles.block, 2**20, device=device)
        return lambda: scratch.mul_(1.0)

    before = torch.cuda.get_rng_state(device)
    best = tiles.tune(
        Choice("op", (8,), F32, device),
        [Tiles(64), Tiles(1)],
        prepare,
        report=trials.append,
        seconds=0.2,
    )
    assert best == Tiles(1)
    assert torch.equal(torch.cuda.get_rng_state(device), before)
    # 2 * 256 MiB at any bandwidth of today take longer than launching does.
    assert trials[1].timing.median > 4 * trials[0].timing.median
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="being captured"):
        tiles.tune(Choice("op", (8,), F32, device), [Tiles(1)], prepare)
