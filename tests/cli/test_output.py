"""Where the command line prints and writes: any terminal, pipe, locale and file, nothing lost."""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_dni import cli
from fused_dni.cli import arguments, output
from fused_dni.report import files
from fused_dni.report.errors import WriteError
from fused_dni.report.progress import Progress

VERDICT = "verdict linear --in 8 --batch 4 --seconds 0.01 --no-compile --no-parts --quiet"
VERDICT += " --synthesizers rank2 --interface output --target-every 1 --threads 1"
TRAIN = "train --epochs 1 --hidden 4 --depth 1 --batch-size 512 --seeds 0 --methods fused cdni"
TRAIN += " --no-split --threads 1 --quiet --warmup-steps 1"
MAP = "map --batches 4 --widths 4 --synthesizers rank2 --target-every 1 --seconds 0.01 --threads 1"
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def results(tmp_path):
    """A report whose text has characters beyond ASCII: µs, and a name in Greek."""
    path = tmp_path / "results.json"
    rows = [
        {"group": "g", "name": n, "fullname": f"b.py::{n}", "stats": {"data": [5e-6] * 9}}
        for n in ("a – b", "αβ")
    ]
    machine = {"cpu": {"brand_raw": "a CPU"}, "python_version": "3.12.0"}
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": rows}), encoding="utf-8")
    return str(path)


def _lines(err: str) -> list[str]:
    return err.strip().splitlines()


# ------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", ["5.00 us", "a - b", "\\u03b1\\u03b2"]),
        ("latin-1", ["5.00 µs", "a - b", "\\u03b1\\u03b2"]),
        ("cp1252", ["5.00 µs", "a – b", "\\u03b1\\u03b2"]),
        ("utf-8", ["5.00 µs", "a – b", "αβ"]),
    ],
)
def test_what_a_terminal_cannot_show_is_shown_otherwise(results, monkeypatch, encoding, expected):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert cli.main(["report", results]) == 0
    printed = raw.getvalue().decode(encoding)
    assert all(word in printed for word in expected), printed
    assert sys.stdout.errors == "strict"  # as it was


def test_a_path_that_is_not_utf_8_is_printed_all_the_same(results, tmp_path, monkeypatch):
    page = os.path.join(os.fsencode(tmp_path), b"caf\xe9.html")
    for encoding in ("utf-8", "ascii"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        assert cli.main(["report", results, "-o", os.fsdecode(page)]) == 0
        assert raw.getvalue() == page.replace(b"\xe9", rb"\udce9") + b"\n" and os.path.exists(page)


def test_errors_on_a_terminal_that_is_ascii_are_a_line(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.main(["report", "µ.json"]) == 2
    sys.stderr.flush()
    assert raw.getvalue().startswith(b"fused-dni: error: cannot read u.json: ")


class _Broken(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def test_a_closed_pipe_keeps_files_and_status(results, tmp_path, monkeypatch):
    slower = json.loads(Path(results).read_text(encoding="utf-8"))
    for row in slower["benchmarks"]:
        row["stats"]["data"] = [5e-3] * 9
    new = tmp_path / "new.json"
    new.write_text(json.dumps(slower), encoding="utf-8")
    out = tmp_path / "out.json"
    argv = ["compare", results, str(new), "--out", str(out), "--fail-on-slower"]
    monkeypatch.setattr(sys, "stdout", _Broken(errno.EPIPE))
    assert cli.main(argv) == 1
    assert json.loads(out.read_text(encoding="utf-8"))["kind"] == "comparison"
    for command in (["report", results], ["env", "--left-out"], ["--help"], ["verdict", "--help"]):
        assert cli.main(command) == 0


def test_a_full_stdout_is_one_line(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", _Broken(errno.ENOSPC))
    assert cli.main(["report", results]) == 1
    assert _lines(capsys.readouterr().err) == [
        "fused-dni: error: cannot write to stdout: No space left on device"
    ]


def test_without_stdout_or_stderr(results, tmp_path, monkeypatch):
    """As under ``>&-``, and where there never was a terminal."""
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["report", results, "-o", str(page)]) == 0 and page.exists()
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["report", str(tmp_path / "none.json")]) == 2


def test_the_process_itself_ends_in_silence_when_its_reader_goes(results):
    """In another process: Python complains at its end of what it could not flush."""
    code = "import sys; from fused_dni import cli; sys.exit(cli.main(sys.argv[1:]))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code, "report", results],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environment,
        timeout=120,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


# ---------------------------------------------------------------------------------------- --out


@pytest.fixture
def below(tmp_path):
    """A path that nothing can be written to, whoever asks: below a file."""
    (tmp_path / "file").touch()
    return str(tmp_path / "file" / "x.json")


def test_a_verdict_that_cannot_be_saved_is_said_first_and_printed(capsys, below):
    assert cli.main([*VERDICT.split(), "--out", below]) == 1
    captured = capsys.readouterr()
    assert "The break-even against stock backprop is" in captured.out and below not in captured.out
    first, last = _lines(captured.err)
    assert (
        first.startswith(f"fused-dni: cannot write {below}: ") and "printed all the same" in first
    )
    assert last == f"fused-dni: error: cannot write {below}: Not a directory"


@FULL
def test_a_verdict_on_a_full_disk_is_printed(capsys):
    assert cli.main([*VERDICT.split(), "--out", "/dev/full"]) == 1
    captured = capsys.readouterr()
    assert "The break-even against stock backprop is" in captured.out
    assert _lines(captured.err) == [
        "fused-dni: error: cannot write /dev/full: No space left on device"
    ]
    assert not Path("/dev/full").is_file()


def test_a_plot_that_cannot_be_saved_does_not_lose_the_verdict(capsys, tmp_path, monkeypatch):
    out = tmp_path / "v.json"
    plot = tmp_path / "gone" / "v.png"
    kept = output.OutFile.write

    def and_take_the_folder_away(self, text):
        plot.parent.rmdir()
        kept(self, text)

    monkeypatch.setattr(output.OutFile, "write", and_take_the_folder_away)
    assert cli.main([*VERDICT.split(), "--plot", str(plot), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert "The break-even against stock backprop is" in captured.out
    assert str(out) in captured.out and out.exists()
    assert f"cannot write {plot}" in captured.err and len(_lines(captured.err)) == 1


def test_a_plot_of_an_unknown_format_is_refused_first(capsys, tmp_path):
    assert cli.main([*VERDICT.split(), "--plot", str(tmp_path / "v.xyz")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "--plot must end in one of" in captured.err


@pytest.mark.parametrize(
    "command", [VERDICT, MAP, "compare A A", "interfaces", "rivals", "delay", "recipes"]
)
def test_a_folder_is_no_file(capsys, tmp_path, results, command):
    argv = [results if word == "A" else word for word in command.split()]
    assert cli.main([*argv, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert _lines(captured.err) == [
        f"fused-dni: error: --out must be a file, {tmp_path} is a folder"
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["report", ""], "FILE must be a path, got ''"),
        (["compare", "", "a.json"], "FILE must be a path, got ''"),
        (["report", "a.json", "-o", ""], "output must be a path, got ''"),
        ([*VERDICT.split(), "--out", ""], "out must be a path, got ''"),
        ([*TRAIN.split(), "--checkpoint", ""], "checkpoint must be a path, got ''"),
    ],
)
def test_nothing_is_no_path(capsys, argv, message):
    assert cli.main(argv) == 2
    (line,) = _lines(capsys.readouterr().err)
    assert message in line


@pytest.mark.parametrize(
    "command",
    [
        *(VERDICT, MAP, "compare A A", "tune linear", "simulate", "advise a:b", "race a:b"),
        *("verdict lstm", "verdict top a:b", "verdict link a:b --latency 1ms", "train pipeline"),
        *("interfaces", "rivals", "rivals grid", "delay", "recipes", "literature"),
    ],
)
@pytest.mark.parametrize("content", ["notes", '{"kind": "race top"}', "[1]"])
def test_what_is_no_report_of_the_kind_is_not_written_over(
    capsys, tmp_path, results, command, content
):
    out = tmp_path / "mine"
    out.write_text(content)
    argv = [results if word == "A" else word for word in command.split()]
    assert cli.main([*argv, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    (line,) = _lines(captured.err)
    assert captured.out == "" and line.startswith(
        f"fused-dni: error: --out: {out} exists and is no"
    )
    assert out.read_text() == content


@pytest.mark.parametrize(
    ("command", "name"),
    [(TRAIN, "report"), ("train copy", "report"), ("profile torch -- a", "profile")],
)
def test_nor_in_a_folder(capsys, tmp_path, command, name):
    (tmp_path / f"{name}.json").write_text('{"kind": "bill"}')
    words = command.split()
    cut = words.index("--") if "--" in words else len(words)
    assert cli.main([*words[:cut], "--out", str(tmp_path), *words[cut:]]) == 2
    assert f"{name}.json exists and is no '" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", '{"kind": "comparison", "version": 1}'])
def test_a_report_of_the_kind_is_replaced_and_folders_are_made(tmp_path, results, content):
    out = tmp_path / "out.json"
    out.write_text(content)
    assert cli.main(["compare", results, results, "--out", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["version"] == 2
    assert cli.main(["report", str(out), "-o", str(tmp_path / "new" / "page.html")]) == 0


@pytest.mark.parametrize(
    "command",
    [MAP, "rivals", "delay", "recipes", TRAIN, "demo", "train copy", "profile torch -- a.py"],
)
def test_what_goes_on_from_a_file_does_not_begin_without_it(capsys, below, command):
    words = command.split()
    cut = words.index("--") if "--" in words else len(words)
    assert cli.main([*words[:cut], "--out", below, *words[cut:]]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(_lines(captured.err)) == 1
    if command != "profile torch -- a.py":  # there is no such command, which is said first
        assert f"cannot write {'to ' if 'train' in command or command == 'demo' else ''}" in (
            captured.err
        )


def test_a_checkpoint_that_cannot_be_kept_is_refused_first(capsys, tmp_path, below):
    argv = [*TRAIN.split(), "--out", str(tmp_path / "out"), "--checkpoint", below]
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and f"cannot write to {below}" in captured.err


@pytest.mark.parametrize("as_json", [False, True])
def test_a_training_that_cannot_be_written_is_printed(capsys, tmp_path, monkeypatch, as_json):
    def full(path, text):
        raise WriteError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("fused_dni.report.schema.write_text", full)
    argv = [*TRAIN.split(), "--out", str(tmp_path), *["--json"] * as_json]
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    if as_json:
        assert json.loads(captured.out)["kind"] == "train"
    else:
        assert "cdni k=4" in captured.out and "report.md" not in captured.out
    (line,) = _lines(captured.err)
    assert "cannot write the report" in line and "report.json: No space left on device" in line


def test_a_map_whose_disk_fills_up_is_printed(capsys, tmp_path, monkeypatch):
    def full(path, text):
        raise WriteError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("fused_dni.cli.output.write_text", full)
    out = tmp_path / "map.json"
    assert cli.main([*MAP.split(), "--quiet", "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert "4 x 4" in captured.out and f"cannot write {out}: No space left" in captured.err


ARMS = """
class Racer:
    def step(self): pass
    def loss(self): return 1.0
made = []
def arm(seed):
    if seed == 2: raise KeyboardInterrupt
    return Racer()
def arms(): return {"first": arm, "other": arm}
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_what_was_finished_before_ctrl_c_is_printed_where_it_cannot_be_kept(
    capsys, tmp_path, monkeypatch, as_json
):
    def full(path, text):
        raise WriteError(f"cannot write {path}: No space left on device")

    (tmp_path / "arms_of_output.py").write_text(ARMS)
    monkeypatch.chdir(tmp_path)
    argv = ["race", "arms_of_output:arms", "--seconds", "0.01", "--seeds", "1", "2", "--quiet"]
    argv += ["--json"] * as_json
    assert cli.main(argv) == 130
    captured = capsys.readouterr()
    assert captured.out == "" and "1 of 2 seeds were finished and are kept in" in captured.err
    os.remove("race.json")
    monkeypatch.setattr("fused_dni.cli.output.write_text", full)
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    if as_json:
        assert len(json.loads(captured.out)["runs"]) == 2
    else:
        assert "Unfinished: 1 of 2 seeds." in captured.out
    assert _lines(captured.err) == [
        "fused-dni: error: cannot write race.json: No space left on device"
    ]


def test_a_map_that_is_stopped_on_a_full_disk_is_printed(capsys, tmp_path, monkeypatch):
    def full(path, text):
        raise WriteError(f"cannot write {path}: No space left on device")

    from fused_dni.measure.map import sweep

    measure, asked = sweep.measure, []

    def stopping(point, *more):
        asked.append(point)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return measure(point, *more)

    monkeypatch.setattr(sweep, "measure", stopping)
    monkeypatch.setattr("fused_dni.cli.output.write_text", full)
    out = tmp_path / "map.json"
    argv = [*MAP.replace("--batches 4", "--batches 4 8").split(), "--quiet", "--out", str(out)]
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    assert "4 x 4" in captured.out and "8 x 4" not in captured.out
    (line,) = _lines(captured.err)
    assert line == f"fused-dni: error: cannot write {out}: No space left on device"


@FULL
def test_a_page_on_a_full_disk_is_printed(capsys, tmp_path, results, monkeypatch):
    page = tmp_path / "page.html"
    os.symlink("/dev/full", page)
    assert cli.main(["report", results, "-o", str(page)]) == 1
    captured = capsys.readouterr()
    assert "2 times in 1 group" in captured.out
    assert f"cannot write {page}: No space left on device" in captured.err


def test_trying_a_file_leaves_nothing_and_changes_nothing(tmp_path):
    files.try_file(tmp_path / "new" / "a.json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "a").write_text("before", encoding="utf-8")
    files.try_file(tmp_path / "a")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "before"
    os.mkfifo(tmp_path / "pipe")
    files.try_file(tmp_path / "pipe")  # does not wait for a reader
    with pytest.raises(WriteError, match="cannot write .*a/b: Not a directory"):
        files.try_file(tmp_path / "a" / "b")


def test_files_are_replaced_whole_and_links_stay_links(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("before", encoding="utf-8")
    real.chmod(0o640)
    link.symlink_to(real)
    assert files.write_text(link, "µ\udce9") == link
    assert real.read_text(encoding="utf-8") == "µ\\udce9" and link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "real.json"]


def test_json_has_no_number_for_infinity():
    made = files.as_json({"a": [float("inf"), (float("nan"), 1.5)], "b": -0.0})
    assert json.loads(made) == {"a": [None, [None, 1.5]], "b": 0.0} and made.endswith("}\n")


# ------------------------------------------------------------------------------------- progress


def test_a_log_has_one_line_a_phase():
    stream = io.StringIO()
    progress = Progress(stream=stream)
    with progress:
        for name in ("measuring", "parts"):
            for fraction in (0.0, 0.5, 1.0, 1.0, 0.2, 1.0):
                progress.update(name, fraction)
        progress.update("training", 1.0, "error 3 %")
    assert stream.getvalue().splitlines() == [
        "measuring: 100 %", "parts: 100 %", "training: 100 %  error 3 %"
    ]  # fmt: skip


def test_a_log_has_a_line_now_and_then(monkeypatch):
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(stream=stream, every=10.0)
    for second in range(31):
        now[0] = float(second)
        progress.update("measuring", second / 40)
    assert stream.getvalue().splitlines() == [f"measuring: {p} %" for p in (25, 50, 75)]


def test_a_log_that_nobody_reads_stops_nothing():
    progress = Progress(stream=_Broken(errno.EPIPE))
    progress.update("measuring", 1.0)
    progress.line("a line")


@pytest.mark.parametrize("argv", [VERDICT.replace(" --quiet", ""), MAP])
def test_measuring_says_each_thing_once(capsys, tmp_path, argv):
    words = argv.split()
    assert cli.main([*words, "--out", str(tmp_path / "o.json")]) == 0
    said = _lines(capsys.readouterr().err)
    assert said and len(set(said)) == len(said)


# ---------------------------------------------------------------------------- names and folders


def test_a_factory_is_looked_for_where_the_command_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["advise", "bench_that_is_elsewhere.models:mlp"]) == 2
    said = capsys.readouterr().err
    assert f"modules are looked for in {tmp_path}, too" in said and len(_lines(said)) == 1


def test_commands_of_reports_can_be_shown(monkeypatch):
    from fused_dni.cli.program import _command

    assert "\udce9" not in _command(["advise", "caf\udce9:f", "--out", "caf\udce9"])


def test_unwritable_folders_are_found_by_writing(tmp_path, below):
    arguments.refuse_unwritable(str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(arguments.UsageError, match="cannot write to .*: Not a directory"):
        arguments.refuse_unwritable(below)


#: Of rooms that read and write ASCII alone (JSON) in the cache and beside the extensions.
ASCII = ("ops/measured.py", "backends/common/built.py")


def _without_encoding(tree: ast.AST) -> list[int]:
    """Lines of calls that open a text in the locale's encoding."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        said = {word.arg: word.value for word in call.keywords}
        texts = {"read_text": 0, "write_text": 1}
        if name == "write_text" and isinstance(call.func, ast.Name):  # ours
            continue
        if name in texts and "encoding" not in said and len(call.args) <= texts[name]:
            found.append(call.lineno)
        if name in ("run", "Popen") and "text" in said and "encoding" not in said:
            found.append(call.lineno)
        if name == "open" and isinstance(call.func, ast.Name) and "encoding" not in said:
            mode = call.args[1] if len(call.args) > 1 else None
            if not (isinstance(mode, ast.Constant) and "b" in str(mode.value)):
                found.append(call.lineno)
    return found


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("p.read_text()", True),
        ("p.read_text('utf-8')", False),
        ("p.write_text(a)", True),
        ("p.write_text(a, encoding='utf-8')", False),
        ("open(p)", True),
        ("open(p, 'rb')", False),
        ("run(a, text=True)", True),
        ("run(a, encoding='utf-8')", False),
    ],
)
def test_texts_in_the_locales_encoding_are_found(code, wrong):
    assert bool(_without_encoding(ast.parse(code))) is wrong


def test_every_text_file_is_opened_as_utf_8():
    root = Path(__file__).resolve().parents[2]
    found = [
        f"{path}:{line}"
        for room in ("fused_dni", "bench")
        for path in sorted((root / room).rglob("*.py"))
        if not str(path).endswith(ASCII)
        for line in _without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []
