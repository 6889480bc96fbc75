"""What a verdict holds: timings by candidate, variants, parts; as a result, a table, in words."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fused_dni.measure import timing
from fused_dni.measure.timing import Ratio, Timing
from fused_dni.measure.verdict.ceilings import Ceilings
from fused_dni.measure.verdict.errors import VerdictError
from fused_dni.measure.verdict.parts import Parts
from fused_dni.measure.verdict.views import amdahl, critical_path
from fused_dni.report.files import as_json
from fused_dni.report.kinds import verdict as reports
from fused_dni.report.layout import tables
from fused_dni.report.schema import Result
from fused_dni.report.timings import BreakEven as BreakEven
from fused_dni.report.words import row

#: Longest k looked at for the break-even.
HORIZON = 64


CYCLE = (
    "A step with targets and a step without are timed as candidates of their own; a cycle of k "
    "steps is their weighted sum within each round, (t_targets + (k - 1) t_without) / k."
)


class Measured:
    """What has a result: that as JSON, as a table and in words."""

    def report(self) -> Result:
        """Gather all of it; tables, sentences, plots and pages are made from that alone."""
        raise NotImplementedError

    def _gathered(self, kind: str, body: dict[str, Any], **other: Any) -> Result:
        """Put what all have, unless it is another, and what this kind has into a result."""
        names = ("title", "facts", "timings", "memory", "memory_is", "notes")
        common = {name: getattr(self, name) for name in names if name not in other}
        return Result(kind, body=body, **common, **other)

    def to_json(self) -> str:
        """Write the result as JSON."""
        return as_json(self.report()).rstrip()

    def table(self, *, markdown: bool = False) -> str:
        """Write the tables with what is to be read under them, as text or as Markdown.

        A ``~`` marks a ratio whose interval reaches one: no difference could be shown.
        """
        return tables(self.report(), markdown=markdown)

    def sentence(self) -> str:
        """Say in plain English what was found."""
        return self.report().described().sentence


def ratios(timings: Mapping[str, Timing], bases: Iterable[str]) -> dict[str, dict[str, Ratio]]:
    """Hold all timings against each base, but for itself."""
    return {
        base: {name: timing.ratio(t, timings[base]) for name, t in timings.items() if name != base}
        for base in bases
    }


@dataclass(frozen=True)
class Variant:
    """DNI with one interface and one synthesizer.

    Attributes:
        interface: ``output`` or ``preactivation``.
        synthesizer: its name.
        form: ``layers`` or ``segment`` (:mod:`fused_dni.measure.verdict.forms`).
        base: row of backprop on the same kernels in the same form.
        with_targets, without: a step of each kind.
        memory: peak bytes of a step of each kind.
    """

    interface: str
    synthesizer: str
    form: str
    base: str
    with_targets: Timing
    without: Timing
    memory: tuple[int, int]

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.interface}, {self.synthesizer}"

    def cycle(self, k: int | None) -> Timing:
        """Return a step on the average of k, of which one has targets; None for never."""
        if k is None:
            return timing.combine(row(k), [(1.0, self.without)])
        return timing.combine(row(k), [(1 / k, self.with_targets), (1 - 1 / k, self.without)])

    def peak(self, k: int | None) -> int:
        """Peak bytes of a cycle."""
        return self.memory[1] if k is None else max(self.memory)


@dataclass
class Verdict(Measured):
    """Result of :func:`verdict`.

    Attributes:
        title: what was measured.
        timings: seconds per step by candidate, in the order of the table. The ``dni`` rows are of
            the first variant.
        memory: peak bytes of a step by candidate.
        memory_is: what these bytes are.
        ks: the k of the ``dni`` rows; None is never.
        break_even: of the first variant, against ``backprop``, ``compiled`` (if measured) and
            ``fused``.
        gate: what was checked before anything was timed, with the deviations found.
        facts: device, versions, settings.
        notes: what the reader should know: skipped candidates with the reason, for instance.
        compile_seconds: how long ``torch.compile`` took; None if it was not tried or failed.
        variants: every interface with every synthesizer that was measured.
        parts: of a step by backprop and by the first variant; None if not asked for.
        ceilings: of this device; None without ``parts``.
    """

    title: str
    timings: dict[str, Timing]
    memory: dict[str, int]
    memory_is: str
    ks: tuple[int | None, ...]
    break_even: dict[str, BreakEven]
    gate: dict[str, Any]
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    compile_seconds: float | None = None
    variants: list[Variant] = field(default_factory=list)
    parts: Parts | None = None
    ceilings: Ceilings | None = None

    def ratio(self, name: str, base: str) -> Ratio:
        """Time of one candidate over another's."""
        return timing.ratio(self.timings[name], self.timings[base])

    def report(self) -> Result:
        """Gather all of it."""
        bases = [base for base in reports.BASES if base in self.timings]
        body = {
            "ratios": ratios(self.timings, bases),
            "break_even": self.break_even,
            "variants": [self._variant(variant) for variant in self.variants],
            "parts": None if self.parts is None else self._parts(self.parts),
            "gate": self.gate,
            "cycle": CYCLE,
            "compile_seconds": self.compile_seconds,
        }
        return self._gathered("verdict", body)

    def _variant(self, variant: Variant) -> dict[str, Any]:
        bases = [b for b in ("backprop", "compiled", variant.base) if b in self.timings]
        cycles = {}
        for k in self.ks:
            cycle = variant.cycle(k)
            ratios = {base: timing.ratio(cycle, self.timings[base]) for base in bases}
            cycles[str(k or "never")] = {"median": cycle.median, "ratios": ratios}
        return {
            "interface": variant.interface,
            "synthesizer": variant.synthesizer,
            "form": variant.form,
            "base": variant.base,
            "with targets": variant.with_targets,
            "without targets": variant.without,
            "cycles": cycles,
            "break_even": {base: break_even(variant.cycle, self.timings[base]) for base in bases},
            "memory": {"with targets": variant.memory[0], "without targets": variant.memory[1]},
        }

    def _parts(self, parts: Parts) -> dict[str, Any]:
        assert self.ceilings is not None
        first = self.variants[0]
        fused, without = self.timings[first.base].median, first.without.median
        path = ("forward", "predict", "local backward", "local backward, dx", "update")
        return {
            "of": first.name,
            **parts.to_json(),
            "ceilings": self.ceilings.to_json(),
            "floors": {name: self.ceilings.floor(work) for name, work in parts.work.items()},
            "amdahl": amdahl(fused, without, parts.seconds("predict")),
            "critical path": critical_path({name: parts.seconds(name) for name in path}),
        }

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the cost of a step over k, with the baselines as lines, into an image file.

        Raises:
            VerdictError: the format is unknown or the file cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return reports.over_k(self.report()).save(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise VerdictError(f"cannot write the plot {path}: {reason}") from error


def break_even(cycle: Callable[[int | None], Timing], base: Timing) -> BreakEven:
    """Say where the cost of a cycle falls below ``base``: looked at for every k up to the horizon
    and for never."""
    verdicts = {k: timing.differs(cycle(k), base) for k in range(1, HORIZON + 1)}
    slower_to = max((k for k, word in verdicts.items() if word == "slower"), default=0)
    faster = 0
    for k in range(HORIZON, 0, -1):
        if verdicts[k] != "faster":
            break
        faster = k
    if faster:
        return BreakEven("from", faster, slower_to)
    if timing.differs(cycle(None), base) == "slower":
        return BreakEven("never", None, slower_to)
    return BreakEven("inconclusive", None, slower_to)
