"""The result of a measurement, whatever was measured: what all have in common, and a body.

In a file it is one JSON object: ``kind``, the ``version`` of that kind's format, the common parts
by the names of :class:`Result`'s attributes, and beside them whatever the kind has of its own.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fused_dni.report.errors import ReportError
from fused_dni.report.files import as_json, write_text
from fused_dni.report.loaded import Part, parts_of, reading
from fused_dni.report.progress import Progress
from fused_dni.report.timings import Timing


class Kind(NamedTuple):
    """The module that says what a kind's results say, and the format that it reads."""

    module: str
    version: int = 2


#: By what stands under ``kind`` in the JSON.
KINDS: dict[str, Kind] = {
    "verdict": Kind("verdict"),
    "verdict lstm": Kind("verdict_lstm"),
    "verdict top": Kind("verdict_top"),
    "verdict link": Kind("verdict_link"),
    "train": Kind("train"),
    "train charlm": Kind("recurrent"),
    "train copy": Kind("recurrent"),
    "train repeat-copy": Kind("recurrent"),
    "train rows": Kind("recurrent"),
    "train pipeline": Kind("pipeline"),
    "advice": Kind("advice"),
    "map": Kind("map"),
    "rivals": Kind("rivals"),
    "rivals grid": Kind("rival_grid"),
    "delay": Kind("delay"),
    "recipes": Kind("recipes"),
    "race": Kind("race"),
    "interfaces": Kind("interfaces"),
    "literature": Kind("literature"),
    "simulation": Kind("simulation"),
    "profile": Kind("profile"),
    "comparison": Kind("comparison"),
    "benchmarks": Kind("benchmarks"),
    "pytest-benchmark": Kind("benchmarks", 1),
    "planted": Kind("planted"),
}


@dataclass(frozen=True)
class Result(Mapping[str, Any]):
    """A measurement's result; a mapping of its parts, the body's among them, by their names.

    Attributes:
        kind: one of ``KINDS``.
        title: what was measured.
        sentence: what it comes to.
        facts: device, versions, commit, date, command.
        settings: what was asked for.
        timings: seconds by candidate.
        memory: peak bytes by candidate.
        memory_is: what these bytes are; "" where there are none.
        notes: what the reader should know, a paragraph each.
        body: what this kind has of its own.
    """

    kind: str
    title: str = ""
    sentence: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    memory_is: str = ""
    notes: list[str] = field(default_factory=list)
    body: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name) if name in NAMES else self.body[name]

    def __contains__(self, name: object) -> bool:
        return name in NAMES or name in self.body

    def get(self, name: str, default: Any = None) -> Any:
        """Return a part, or a default where there is none."""
        return self[name] if name in self else default  # noqa: SIM401 - it would call itself

    def __iter__(self) -> Iterator[str]:
        return iter([*NAMES, *self.body])

    def __len__(self) -> int:
        return len(NAMES) + len(self.body)

    @property
    def version(self) -> int:
        """The format of its file."""
        return KINDS[self.kind].version

    def described(self) -> Result:
        """Return the same with the title and the sentence that its kind makes of the rest, where
        they are not given."""
        module, made = self.module(), {}
        for name in ("title", "sentence"):
            if not getattr(self, name) and (say := getattr(module, name, None)):
                made[name] = say(self)
        return replace(self, **made)

    def module(self) -> Any:
        """Import what says what results of this kind say."""
        return importlib.import_module(f"fused_dni.report.kinds.{KINDS[self.kind].module}")

    def to_json(self) -> dict[str, Any]:
        """Return the object that its file holds; timings and ratios in it have a ``to_json``."""
        return dict(self.described())


#: What every kind has, and that with what tells how to read it.
COMMON = tuple(f.name for f in fields(Result) if f.name not in ("kind", "body"))
NAMES = ("kind", "version", *COMMON)


Keep = Callable[[Result], None]


class Experiment(Protocol):
    """A function that makes a report run by run, and goes on with an unfinished one. What is to be
    run are arguments of its own, bound by ``functools.partial``; all have these.

    Args:
        previous: an unfinished report of the same settings, to be continued.
        keep: called with the report whenever a run is finished.
        progress: where to report; None for nowhere.
        command: by which it was asked for, for the report.

    Raises:
        ValueError: ``previous`` is of other settings.
        Interrupted: Ctrl-C; finished runs have been kept.
    """

    def __call__(
        self,
        *,
        previous: Result | None = None,
        keep: Keep | None = None,
        progress: Progress | None = None,
        command: str | None = None,
    ) -> Result: ...


def _difference(then: Any, now: Any) -> tuple[str, Any, Any] | None:
    """Name the first setting that differs, with both values (None where there is none)."""
    for name in {**now, **then}:
        if then.get(name) != now.get(name) or (name in then) != (name in now):
            return name, then.get(name), now.get(name)
    return None


def resumed(previous: Result | None, empty: Result) -> Result:
    """Choose the result that a run goes on with: a previous one, or the empty one.

    Raises:
        ValueError: the previous one is of other settings, or of other data by their ``digest``.
    """
    if previous is None:
        return empty
    found = _difference(previous.settings, empty.settings)
    if found is not None:
        name, then, now = found
        raise ValueError(
            f"the report that is to be continued is of other settings: {name} was {then!r}, and is "
            f"{now!r} now"
        )
    digest = empty.get("digest")
    if previous.get("digest", digest) != digest:  # older files have none
        raise ValueError("the report that is to be continued is of other data")
    return replace(previous, title="", sentence="")


def save(path: str | os.PathLike[str], result: Result) -> Path:
    """Write a result in one piece: whoever reads or interrupts sees the old file or the new one.

    Raises:
        WriteError: it cannot be written.
    """
    return write_text(path, as_json(result))


def load(path: str | os.PathLike[str], kind: str | None = None) -> Result:
    """Read a result.

    Args:
        path: a JSON file; one by ``pytest --benchmark-json``, which says nothing of its kind, is
            read as of kind ``pytest-benchmark``.
        kind: what it must be; None for any kind.

    Returns:
        The result; to ask it for what the file has not is a ReportError that names both.

    Raises:
        ReportError: no such file, no JSON, another kind, a format of another version, or a part
            that all results have is missing.
    """
    try:
        found: Any = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if isinstance(found, dict) and {"benchmarks", "machine_info"} <= found.keys():
            found = _by_pytest(found)
        return _result(found, path, kind)
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror or error}") from error
    except RecursionError as error:
        raise ReportError(f"{path} is no report: it is nested too deeply") from error
    except ReportError:
        raise
    except ValueError as error:  # of the decoder, of the parser, of a number of too many digits
        raise ReportError(f"{path} is no JSON: {error}") from error


def _result(found: Any, path: str | os.PathLike[str], kind: str | None) -> Result:
    if not isinstance(found, dict):
        raise ReportError(f"{path} is no report of fused_dni: it holds no JSON object")
    if "kind" not in found:
        raise ReportError(f"{path} is no report of fused_dni: it names no kind")
    name = found["kind"]
    if name not in list(KINDS):
        raise ReportError(
            f"{path} is no report of fused_dni: its kind is {repr(name)[:100]}, known: "
            f"{', '.join(KINDS)}"
        )
    if kind is not None and name != kind:
        raise ReportError(f"{path} holds a report of kind {name!r}, wanted is {kind!r}")
    version = found.get("version", 1)  # formats have numbers since their second
    if version != KINDS[name].version:
        facts = found.get("facts")
        writer = facts.get("fused_dni") if isinstance(facts, dict) else None
        raise ReportError(
            f"{path} is a {name!r} report in format {version!r}, this version of fused_dni reads "
            f"format {KINDS[name].version}: measure it again, or read it with the version that "
            f"wrote it ({writer or 'unknown'})"
        )
    return result_of(parts_of(found, path))


def result_of(found: Mapping[str, Any]) -> Result:
    """Make a result of the object that a file holds; one that is made is returned.

    Raises:
        ReportError: a part that all results have is missing, or is no such part.
    """
    if isinstance(found, Result):
        return found
    with reading(found):
        common, empty = {}, Result("")
        for name in COMMON:
            common[name] = value = found[name]
            if not isinstance(value, type(getattr(empty, name))):
                raise TypeError(f"not {str(value)[:100]!r}")
        made = Part.like(found) if isinstance(found, Part) else {}
        made.update((key, value) for key, value in found.items() if key not in NAMES)
        of: tuple[tuple[Iterable[Any], type], ...] = (
            (common["timings"].values(), Timing), (common["notes"], str)
        )  # fmt: skip
        for values, wanted in of:
            if not all(isinstance(value, wanted) for value in values):
                raise TypeError(f"something is no {wanted.__name__}")
        return Result(found["kind"], **common, body=made)


def _by_pytest(found: dict[str, Any]) -> dict[str, Any]:
    machine = found["machine_info"] if isinstance(found["machine_info"], dict) else {}
    cpu = machine.get("cpu")
    facts = machine.get("fused_dni") or {
        "device": cpu.get("brand_raw") if isinstance(cpu, dict) else None,
        "python": machine.get("python_version"),
    }
    kind = "pytest-benchmark"
    return dict(Result(kind, facts=facts, body={"benchmarks": found["benchmarks"]}))
