"""Progress for people: bars on a terminal, plain lines elsewhere, always on stderr.

rich's own refresh thread is switched off: it would run beside what is being timed. Bars move only
when they are told to, between samples.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO

Tell = Callable[[str, float], None]  # what is done, and which part of it


def teller(progress: Tell | bool) -> Tell:
    """Return what is called with progress: what was given, bars for True, nothing for False."""
    if progress is True:
        return Progress().update
    return progress or (lambda what, fraction: None)


class Progress:
    """A set of named bars, or of lines.

    Args:
        enabled: False for silence.
        stream: stderr by default.
        every: seconds between two plain lines of one task.
    """

    def __init__(
        self, enabled: bool = True, stream: TextIO | None = None, every: float = 10.0
    ) -> None:
        self._stream = stream or sys.stderr
        self._enabled = enabled
        self._every = every
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._last: dict[str, float] = {}
        self._done: set[str] = set()
        if enabled and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(file=self._stream),
                auto_refresh=False,
            )

    def __enter__(self) -> Progress:  # noqa: PYI034 - Self is in typing from 3.11 on
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.refresh()
            self._bars.stop()

    def update(self, name: str, fraction: float, note: str = "") -> None:
        """Set the task ``name``, made at its first mention, to ``fraction`` (0 to 1)."""
        if not self._enabled:
            return
        if self._bars is not None:
            task = self._tasks.get(name)
            if task is None:
                task = self._tasks[name] = self._bars.add_task(name, total=1.0, note=note)
            self._bars.update(task, completed=fraction, **({"note": note} if note else {}))
            now = time.monotonic()
            if fraction >= 1.0 or now - self._last.get("", 0.0) > 0.2:
                self._last[""] = now
                self._bars.refresh()
            return
        now = time.monotonic()
        if fraction < 1.0 and now - self._last.setdefault(name, now) < self._every:
            return
        if name in self._done:  # a phase that comes again and again ends once in a log
            return
        if fraction >= 1.0:
            self._done.add(name)
        self._last[name] = now
        text = f"{name}: {100 * fraction:.0f} %"
        self._print(f"{text}  {note}" if note else text)

    def line(self, text: str) -> None:
        """Write a line that stays."""
        if not self._enabled:
            return
        if self._bars is not None:
            self._bars.console.print(text, highlight=False, markup=False)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        with suppress(OSError):  # nobody is there to read it: no reason to stop measuring
            print(text, file=self._stream, flush=True)
