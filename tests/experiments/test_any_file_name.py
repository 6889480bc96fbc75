"""``train charlm`` on texts of any name and form: both report files, or a refusal beforehand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fused_dni import cli

TEXT = b"the quick brown fox\r\n" * 60 + b"x" * 2000
ARGV = "train charlm --methods fused --windows 2 --long --seeds 0 --hidden 8 --embedding 4"
ARGV += " --batch-size 2 --characters 60 --evaluations 1 --seconds 0.05 --threads 1 --quiet"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (b"two words.txt", b"\xef\xbb\xbf" + TEXT),
        (b"caf\xe9 livre.txt", TEXT),
        (b"a$b$\\frac{.txt", TEXT),
        ("µ漢字.txt".encode(), TEXT),
        (b"\xff", TEXT),
        (b"-out.txt", TEXT),
        (b"a\nb.txt", TEXT),
    ],
    ids=["spaces, mark", "latin-1", "dollars", "utf-8", "no utf-8", "dash", "newline"],
)
def test_a_text_of_any_name(tmp_path, capsys, name, content):
    before = torch.get_num_threads()
    path = os.path.join(os.fsencode(tmp_path), name)
    try:
        Path(os.fsdecode(path)).write_bytes(content)
    except OSError as error:
        pytest.skip(f"this file system takes no such name: {error}")
    out = tmp_path / "out"
    try:
        assert cli.main([*ARGV.split(), "--data", os.fsdecode(path), "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(before)
    assert capsys.readouterr().err == ""
    assert sorted(p.name for p in out.glob("report.*")) == ["report.json", "report.md"]
    report = json.loads((out / "report.json").read_bytes().decode("utf-8"))
    assert (out / "report.md").read_bytes().decode("utf-8").startswith("# ")
    assert not any("\ud800" <= c <= "\udfff" for c in report["data"]["name"])


@pytest.mark.parametrize("content", [b"", b"\0\0", b"caf\xe9", b"a", b"ab"])
def test_texts_that_are_no_texts_are_refused_first(tmp_path, capsys, content):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    Path(os.fsdecode(path)).write_bytes(content)
    out = tmp_path / "out"
    assert cli.main([*ARGV.split(), "--data", os.fsdecode(path), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == "" and not out.exists()
