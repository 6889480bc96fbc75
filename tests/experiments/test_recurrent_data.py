"""Texts are read strictly and split honestly; the copy tasks look as written down by hand."""

import gzip
import math

import pytest
import torch

from fused_dni.experiments import characters, sequences
from fused_dni.experiments.data import DataError

# ------------------------------------------------------------------------------------------- texts


def test_symbols_are_those_of_the_training_part():
    found = characters.split("banana" + "baXn", 0.4)
    assert found.symbols == "abn" and found.classes == 4
    assert found.train.tolist() == [1, 0, 2, 0, 2, 0]
    assert found.validation.tolist() == [1, 0, 3, 2]
    assert found.unknown == 1
    # derived: all of Unicode but surrogates and the three symbols
    assert found.unknown_bits == math.log2(1_114_112 - 2_048 - 3)


def test_characters_beyond_the_basic_plane_and_other_scripts():
    found = characters.split("čβ🙂" * 10, 0.1)
    assert found.symbols == "βč🙂" or found.symbols == "čβ🙂"
    assert len(found.train) == 27 and found.unknown == 0
    assert "".join(found.symbols[i] for i in found.validation) == "čβ🙂"


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_packed_or_not(tmp_path, packed):
    content = "\ufeffTo be, or not to be\r\n".encode()  # a byte-order mark is no character
    path = tmp_path / ("play.txt.gz" if packed else "play.txt")
    path.write_bytes(gzip.compress(content) if packed else content)
    found = characters.load(path, 0.1)
    assert found.name == "play"
    assert len(found.train) + len(found.validation) == len("To be, or not to be\r\n")
    assert "\r" not in found.symbols and found.unknown == 2


def test_a_folder_is_its_texts_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("bbbb")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"aaaa"))
    (tmp_path / "c.md").write_text("cccc")
    found = characters.load(tmp_path, 0.25)
    assert found.train.tolist() == [0, 0, 0, 0, 1, 1] and found.validation.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"abc\0def", r"is binary \(byte 3 is zero\)"),
        (b"caf\xe9 au lait", r"not UTF-8 text: .* at byte 3 \(0xe9\)"),
        (b"\x1f\x8b\x08 no gzip", "truncated or damaged"),
        (gzip.compress(b"a long enough text" * 50, mtime=0)[:-9], "truncated or damaged"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (b"\xef\xbb\xbf", "has 0 characters"),
        (b"a", "has 1 characters: too few"),
    ],
    ids=repr,
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        characters.load(path)


def test_what_is_absent_says_how_to_get_one(tmp_path):
    with pytest.raises(DataError, match=r"does not exist; any UTF-8 text .*gutenberg"):
        characters.load(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"has no file that ends in .txt or .txt.gz"):
        characters.load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_the_share_for_validation(tmp_path, share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        characters.load(tmp_path, share)


def test_streams_are_contiguous_and_side_by_side():
    found = characters.streams(torch.arange(11), 3)
    assert found.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert found.is_contiguous()


# -------------------------------------------------------------------------------------- copy tasks


def test_an_episode_of_copy():
    episodes = sequences.copy(2, 1, torch.Generator().manual_seed(0), width=2)
    a, b = episodes.inputs[:2, 0, :2].tolist()
    assert episodes.inputs[:, 0].tolist() == [
        [*a, 0.0],
        [*b, 0.0],
        [0.0, 0.0, 1.0],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
    ]
    assert episodes.counted == 3
    assert episodes.targets[3:, 0].tolist() == [a, b]


def test_an_episode_of_repeat_copy():
    episodes = sequences.repeat_copy(2, 3, 1, torch.Generator().manual_seed(1), width=1)
    (a,), (b,) = episodes.inputs[1:3, 0, :1].tolist()
    start, count, silence = [0.0, 1.0, 0.0], [0.0, 0.0, torch.tensor(0.3).item()], [0.0] * 3
    assert episodes.inputs[:, 0].tolist() == [
        start,
        [a, 0.0, 0.0],
        [b, 0.0, 0.0],
        count,
        *[silence] * 7,
    ]
    assert episodes.counted == 4
    body = [[a, 0.0], [b, 0.0]]
    assert episodes.targets[4:, 0].tolist() == [*body, *body, *body, [0.0, 1.0]]
    assert len(episodes.inputs) == sequences.steps("repeat-copy", 2, 3) == 2 + 2 * 3 + 3


def test_episodes_are_a_function_of_the_seed_and_rows_differ():
    for task in sequences.TASKS:
        a, b, c = (sequences.draw(task, 12, 2, 4, 8, seed) for seed in (3, 3, 4))
        assert torch.equal(a.inputs, b.inputs) and not torch.equal(a.inputs, c.inputs)
        assert not torch.equal(a.inputs[:, 0], a.inputs[:, 1])
        assert a.inputs.shape[2] == sequences.channels(task, 8)[0]
        assert a.targets.shape[2] == sequences.channels(task, 8)[1]


def test_levels_of_the_curriculum():
    shapes = []
    for level in range(6):
        c = sequences.Curriculum("repeat-copy", level=level)
        shapes.append((c.length, c.repeats, c.solved()))
    # the paper's table has episodes of 5, 7, 19, 23, 33, 39, 59 and 67 steps
    assert shapes == [(1, 1, 0), (2, 1, 5), (2, 2, 7), (3, 2, 9), (3, 3, 12), (4, 3, 15)]
    c = sequences.Curriculum("copy", level=7)
    assert (c.length, c.repeats, c.solved()) == (8, 1, 7)


def test_the_level_rises_when_the_running_error_falls_below_the_threshold():
    c = sequences.Curriculum("copy", threshold=0.3, smoothing=0.5)
    assert [c.update(0.0), c.error] == [False, 0.5]
    assert [c.update(0.2), c.error] == [False, 0.35]
    assert c.update(0.2) and c.level == 1 and c.error == 1.0
    assert not c.update(1.0) and c.level == 1
