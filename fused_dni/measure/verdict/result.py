"""What a verdict holds: timings by candidate, variants, parts; as data, as a table, in words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fused_dni.measure import timing
from fused_dni.measure.timing import Ratio, Timing
from fused_dni.measure.verdict.ceilings import Ceilings
from fused_dni.measure.verdict.errors import VerdictError
from fused_dni.measure.verdict.parts import Parts
from fused_dni.measure.verdict.views import amdahl, critical_path
from fused_dni.report import text
from fused_dni.report.kinds import verdict as reports
from fused_dni.report.words import middle_k, often, row, versus

#: Format of the JSON.
VERSION = 1

#: Longest k looked at for the break-even.
HORIZON = 64


CYCLE = (
    "A step with targets and a step without are timed as candidates of their own; a cycle of k "
    "steps is their weighted sum within each round, (t_targets + (k - 1) t_without) / k."
)


@dataclass(frozen=True)
class BreakEven:
    """From which k on DNI is faster than a baseline.

    Attributes:
        kind: ``from`` (faster for every k from ``k`` on), ``never`` (even without any targets it is
            not faster), or ``inconclusive`` (the intervals overlap).
        k: the smallest such k, for ``from``.
        slower_to: the largest k at which it was measurably slower, 0 if none.
    """

    kind: str
    k: int | None = None
    slower_to: int = 0

    def __str__(self) -> str:
        return reports.even(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"kind": self.kind, "k": self.k, "slower_to": self.slower_to}


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
        """A step on the average of k, of which one has targets; None for never."""
        if k is None:
            return timing.combine(row(k), [(1.0, self.without)])
        return timing.combine(row(k), [(1 / k, self.with_targets), (1 - 1 / k, self.without)])

    def peak(self, k: int | None) -> int:
        """Peak bytes of a cycle."""
        return self.memory[1] if k is None else max(self.memory)


@dataclass
class Verdict:
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

    def report(self) -> dict[str, Any]:
        """Everything as plain data; tables, plots and pages are made from it alone."""
        bases = [b for b in ("backprop", "compiled", "fused", "floor") if b in self.timings]
        return {
            "kind": "verdict",
            "version": VERSION,
            "title": self.title,
            "sentence": self.sentence(),
            "facts": self.facts,
            "timings": {name: value.to_json() for name, value in self.timings.items()},
            "ratios": {
                base: {
                    name: _compared(self.timings[name], self.timings[base])
                    for name in self.timings
                    if name != base
                }
                for base in bases
            },
            "memory": self.memory,
            "memory_is": self.memory_is,
            "break_even": {base: value.to_json() for base, value in self.break_even.items()},
            "variants": [self._variant(variant) for variant in self.variants],
            "parts": None if self.parts is None else self._parts(self.parts),
            "gate": self.gate,
            "cycle": CYCLE,
            "compile_seconds": self.compile_seconds,
            "notes": self.notes,
        }

    def _variant(self, variant: Variant) -> dict[str, Any]:
        bases = [b for b in ("backprop", "compiled", variant.base) if b in self.timings]
        cycles = {str(k or "never"): variant.cycle(k) for k in self.ks}
        return {
            "interface": variant.interface,
            "synthesizer": variant.synthesizer,
            "form": variant.form,
            "base": variant.base,
            "with targets": variant.with_targets.to_json(),
            "without targets": variant.without.to_json(),
            "cycles": {
                k: {
                    "median": cycle.median,
                    "ratios": {base: _compared(cycle, self.timings[base]) for base in bases},
                }
                for k, cycle in cycles.items()
            },
            "break_even": {
                base: break_even(variant.cycle, self.timings[base]).to_json() for base in bases
            },
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

    def to_json(self) -> str:
        """Everything, as a JSON text."""
        return json.dumps(self.report(), indent=1)

    def table(self, *, markdown: bool = False) -> str:
        """A row a candidate: time, spread, ratio to the floor, to stock and to our own backprop;
        a row a variant, and a row a part, where there are several.

        A ``~`` marks a ratio whose interval reaches one: no difference could be shown.
        """
        return reports.tables(self.report(), markdown=markdown)

    def sentence(self) -> str:
        """What won, in plain English."""
        timings, facts = self.timings, self.facts
        k = middle_k(self.ks)
        name = row(k)
        stock, ours, dni = (timings[n].median for n in ("backprop", "fused", name))
        unit = "thread" if facts["threads"] == 1 else "threads"
        where = facts["gpu"] if facts["where"] == "cuda" else f"{facts['threads']} CPU {unit}"
        how = f"with targets {often(k)}"
        first = ""
        if len(self.variants) > 1:
            variant = self.variants[0]
            first = f" (interface at the {variant.interface}, synthesizer {variant.synthesizer})"

        def against(what: str, base: str) -> str:
            return versus(self.ratio(what, base))

        parts = [
            f"On {where} a training step of {self.title} takes {text.seconds(stock)} by stock "
            f"backprop, {text.seconds(ours)} by backprop on our kernels and {text.seconds(dni)} by "
            f"DNI{first} {how}."
        ]
        parts.append(
            f"DNI {how} is {against(name, 'backprop')} stock backprop. That mixes two things: "
            f"backprop on our kernels is {against('fused', 'backprop')} stock backprop, and "
            f"the synthetic gradient itself is {against(name, 'fused')} backprop on the same "
            "kernels."
        )
        if 1 in self.ks and k != 1:
            parts.append(
                f"With targets on every step it is {against(row(1), 'fused')} backprop on "
                "the same kernels."
            )
        even = self.break_even["fused"]
        parts.append(
            {
                "from": f"The synthetic gradient pays from k = {even.k} on.",
                "never": "The synthetic gradient does not pay here at any k.",
                "inconclusive": "Whether the synthetic gradient pays here could not be decided: "
                "the intervals overlap.",
            }[even.kind]
        )
        if "compiled" in timings:
            parts.append(f"DNI {how} is {against(name, 'compiled')} compiled backprop.")
        parts += self._best()
        parts.append("This is time per step only; what it does to accuracy, `train` measures.")
        return " ".join(parts)

    def _best(self) -> list[str]:
        """The fastest of several variants at the k that the sentence is about."""
        if len(self.variants) < 2:
            return []
        k = middle_k(self.ks)
        best = min(self.variants, key=lambda v: v.cycle(k).median)
        found = timing.ratio(best.cycle(k), self.timings[best.base])
        return [
            f"Of {len(self.variants)} combinations of interface and synthesizer the fastest with "
            f"targets {often(k)} has the interface at the {best.interface} and a synthesizer "
            f"{best.synthesizer}: it is {versus(found)} backprop on the same kernels."
        ]

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


def _compared(a: Timing, b: Timing) -> dict[str, Any]:
    found = timing.ratio(a, b)
    return {**found.to_json(), "verdict": found.verdict()}


def break_even(cycle: Callable[[int | None], Timing], base: Timing) -> BreakEven:
    """Where the cost of a cycle falls below ``base``: looked at for every k up to the horizon and
    for never."""
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
