"""What commands print and write: on any terminal or pipe, and without losing what was measured."""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_dni.cli.command import PROGRAM, UsageError
from fused_dni.report.errors import WriteError
from fused_dni.report.files import try_file, unwritten, write_text

if TYPE_CHECKING:
    from fused_dni.report import Result

#: For a stream that has no such character.
_PLAIN = {
    ord(given): plain
    for given, plain in (
        *(("µ", "u"), ("τ", "t"), ("–", "-"), ("—", "-"), ("−", "-"), ("›", ">"), ("×", "x")),
        *(("±", "+-"), ("≈", "~"), ("≤", "<="), ("≥", ">=")),
    )
}
_HANDLER = "fused_dni.plain"


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replace what a stream cannot encode by what can be read, or by its number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    given = error.object[error.start : error.end].translate(_PLAIN)
    return given.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error(_HANDLER, _plain)


@contextmanager
def any_terminal() -> Iterator[None]:
    """Print inside what stdout and stderr cannot encode as far as they can."""
    changed = []
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            changed.append((stream, stream.errors))
            with suppress(OSError):
                stream.reconfigure(errors=_HANDLER)
    try:
        yield
    finally:
        flush()
        for stream, errors in changed:
            with suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)


def say(text: object = "", end: str = "\n") -> None:
    """Print; what a reader that has closed the pipe (``| head``) does not want is dropped.

    Raises:
        WriteError: stdout takes no more for another reason.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        _drop()
    except OSError as error:
        _drop()
        raise unwritten("to stdout", error) from error


def flush() -> None:
    """Bring out what was printed in other ways; what nobody reads any more is dropped."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:
            _drop()


def _drop() -> None:
    """Let everything that goes to stdout from now on vanish, or Python complains as it ends."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def warn(text: object) -> None:
    """Print a line on stderr, if somebody is there."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def refuse_foreign(option: str, path: Path, kind: str) -> None:
    """Refuse to write over a file that is neither empty nor a report of this kind, of any format.

    Raises:
        UsageError: it is something else.
    """
    if path.is_file() and path.stat().st_size:
        try:
            found = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("kind") != kind:
            raise UsageError(
                f"{option}: {path} exists and is no {kind!r} report, it is not written over: name "
                "another, or remove it"
            )


class OutFile:
    """A file beside what a command prints. It is tried before anything is measured: where it
    cannot be written, that is said at once, the command goes on, prints what it found, and fails
    at its end.

    Args:
        option: that names it.
        given: its path; None where nobody asked for it.
        needed: the command works with the file, and does not begin without it.
        kind: of the report that is written; None for what is none.

    Raises:
        UsageError: the path is a folder, holds something else than such a report, or cannot be
            written and is needed.
    """

    def __init__(
        self, option: str, given: str | None, *, needed: bool = False, kind: str | None = None
    ) -> None:
        self.path = None if given is None else Path(given)
        self._error: WriteError | None = None
        if self.path is not None:
            if self.path.is_dir():
                raise UsageError(f"{option} must be a file, {given} is a folder")
            if kind is not None:
                refuse_foreign(option, self.path, kind)
            try:
                try_file(self.path)
            except WriteError as error:
                if needed:
                    raise UsageError(str(error)) from error
                warn(f"{PROGRAM}: {error}; what is found will be printed all the same")

    def write(self, text: str) -> None:
        """Write the file, if it was asked for; that it failed is kept for :meth:`finish`."""
        self.save(lambda path: write_text(path, text))

    def save(self, write: Callable[[Path], object]) -> None:
        """Write the file by a function, likewise."""
        self._error = None
        if self.path is not None:
            try:
                write(self.path)
            except OSError as error:
                self._error = (
                    error if isinstance(error, WriteError) else unwritten(self.path, error)
                )

    @property
    def written(self) -> Path | None:
        """The file, if it was written."""
        return None if self._error else self.path

    def finish(self) -> None:
        """Raise WriteError if the file could not be written."""
        if self._error is not None:
            raise self._error


def out_file(asked: Any, *, needed: bool = False) -> OutFile:
    """Try the --out of a command that makes a report."""
    return OutFile("--out", asked.out, needed=needed, kind=asked.kind or asked.name)


def unfinished(path: str, kind: str) -> Result:
    """Read the report that a run goes on with.

    Raises:
        ReportError: it is none, or lacks something.
    """
    from fused_dni.report import blocks_of, load

    report = load(path, kind)
    blocks_of(report)  # what it lacks shows before anything runs
    return report


@contextmanager
def kept_in(out: OutFile, as_json: bool) -> Iterator[Callable[[Result], None]]:
    """Keep a run's unfinished reports in its file. Where the file could not be written, the last of
    them is printed if the run is stopped.

    Raises:
        WriteError: the run was stopped, and the file could not be written.
    """
    from fused_dni.measure.errors import Interrupted
    from fused_dni.report import files

    last: list[Result] = []

    def keep(report: Result) -> None:
        last[:] = [report]
        out.write(files.as_json(report))

    try:
        yield keep
    except Interrupted:
        if last and out.written is None:
            say_report(last[0], as_json)
        out.finish()
        raise


def say_verdict(
    found: Any, as_json: bool, out: OutFile, plot: OutFile | None = None, figure: Any = None
) -> None:
    """Print a verdict, for a reader or for a machine, and write its JSON and its figure."""
    out.write(found.to_json() + "\n")
    if plot is not None:
        plot.save(figure.save)
    files = [file for file in (plot, out) if file is not None]
    if as_json:
        say(found.to_json())
    else:
        say(f"{found.table()}\n\n{found.sentence()}")
        for file in files:
            if file.written is not None:
                say(f"\n{file.written}")
    for file in reversed(files):
        file.finish()


def say_report(report: Result, as_json: bool, out: OutFile | None = None) -> None:
    """Print a report, for a reader or for a machine, and write its JSON.

    Raises:
        WriteError: it was printed, and could not be written.
    """
    from fused_dni.report import as_text, blocks_of, files

    made = files.as_json(report)
    if out is not None:
        out.write(made)
    say(made.rstrip() if as_json else as_text(blocks_of(report)))
    if out is not None:
        out.finish()
