"""Whether it pays not to run what lies above a network: measured, and held against the formula.

What learns may lie under a top (a frozen critic, a large softmax, a simulator, the loss included)
that costs many times what the bottom does. With an interface between them the top is run on every
k-th step alone. :func:`verdict_top` times, interleaved in one process
(:mod:`fused_dni.measure.timing`),

==============  ==================================================================================
``bottom``      b, the step of what learns: forward, local backward, optimizer
``top``         τ, forward and backward of everything above
``lesson``      m, the synthesizer's
``without``     a whole step without the top: b + s, where s is the prediction with all that
                delivers it
``backprop``    a whole step of backprop: b + τ
``k``           whole cycles of k steps, the top in the first: b + s + (τ + m)/k a step
==============  ==================================================================================

and prints the predicted factor (b + τ)/(b + s + (τ + m)/k) beside the measured one. What a step is
worth, a race says (:mod:`fused_dni.measure.verdict.top_race`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fused_dni.measure import timing
from fused_dni.measure.baseline import facts
from fused_dni.measure.options import VERDICT_SECONDS
from fused_dni.measure.timing import Candidate, Timing
from fused_dni.measure.verdict.candidates import TIMING_RATE, at_rate
from fused_dni.measure.verdict.result import Measured, break_even
from fused_dni.measure.verdict.top_steps import Subject, Top, make_subject, unchanged
from fused_dni.report.kinds import verdict_top as reports
from fused_dni.report.progress import teller
from fused_dni.report.schema import Result
from fused_dni.rules import Adam, Rule

#: How often the top is run, where nobody says.
KS = (1, 2, 4, 8, 16)
#: How narrow the intervals of the ratios are to be: beyond it a busy machine gets more time.
PRECISION = 0.02


@dataclass(frozen=True)
class TopVariant:
    """DNI with one synthesizer.

    Attributes:
        synthesizer: its name.
        without: seconds of a step without the top, b + s.
        lesson: m.
        cycles: a measured step on the average of a cycle, by k.
        memory: peak bytes of a step with the top and of one without.
    """

    synthesizer: str
    without: Timing
    lesson: Timing
    cycles: dict[int, Timing]
    memory: tuple[int, int]


@dataclass
class TopVerdict(Measured):
    """Result of :func:`verdict_top`.

    Attributes:
        title: what was measured.
        backprop, bottom, top: seconds of a step of backprop, b and τ.
        variants: one a synthesizer.
        memory: peak bytes of a step of backprop.
        memory_is: what these bytes are.
        facts: device, versions, settings.
        notes: what the reader should know.
        race: a report of :func:`fused_dni.measure.race.race` of the same bottom and top, or None;
            tables and sentence take it up.
    """

    title: str
    backprop: Timing
    bottom: Timing
    top: Timing
    variants: list[TopVariant]
    memory: int
    memory_is: str
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    race: Result | None = None

    def prediction(self, variant: TopVariant) -> Timing:
        """s: what a step without the top takes more than b."""
        return timing.combine("prediction", [(1.0, variant.without), (-1.0, self.bottom)])

    def predicted(self, variant: TopVariant, k: int | None) -> Timing:
        """b + s + (τ + m)/k, for k of None b + s."""
        parts = [(1.0, variant.without)]
        if k is not None:
            parts += [(1.0 / k, self.top), (1.0 / k, variant.lesson)]
        return timing.combine("predicted", parts)

    def report(self) -> Result:
        """Gather all of it."""
        timings = {"backprop": self.backprop, "bottom": self.bottom, "top": self.top}
        body = {
            "top over bottom": timing.ratio(self.top, self.bottom),
            "variants": [self._variant(variant) for variant in self.variants],
            "race": self.race,
        }
        memory = {"backprop": self.memory}
        return self._gathered("verdict top", body, timings=timings, memory=memory)

    def _variant(self, variant: TopVariant) -> dict[str, Any]:
        prediction = self.prediction(variant)
        low, high = prediction.interval
        whole = timing.combine("b + τ", [(1.0, self.bottom), (1.0, self.top)])
        cycles = {}
        for k, cycle in variant.cycles.items():
            predicted = self.predicted(variant, k)
            cycles[str(k)] = {
                "measured": cycle,
                "predicted": predicted,
                "measured over predicted": timing.ratio(cycle, predicted),
                "ratio": timing.ratio(cycle, self.backprop),
                "predicted ratio": timing.ratio(predicted, whole),
            }
        return {
            "synthesizer": variant.synthesizer,
            "without": variant.without,
            # A difference of times, perhaps below zero, and none that `compare` could take up.
            "prediction": {"median": prediction.median, "low": low, "high": high},
            "lesson": variant.lesson,
            "cycles": cycles,
            "most": timing.ratio(self.predicted(variant, None), whole),
            "break_even": break_even(lambda k: self.predicted(variant, k), whole),
            "memory": {"with the top": variant.memory[0], "without": variant.memory[1]},
        }

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the factors over k, and a race's losses over time, into an image file.

        Raises:
            WriteError: the file cannot be written.
            ReportError: an unknown format.
        """
        return reports.figure(self.report()).save(Path(path))


def verdict_top(
    bottom: nn.Module,
    top: Top,
    sample: Sequence[Any],
    *,
    synthesizer: nn.Module | str | Sequence[str] = "auto",
    target_every: Sequence[int] = KS,
    update: Rule | None = None,
    seconds: float = VERDICT_SECONDS,
    title: str | None = None,
    progress: Callable[[str, float], None] | bool = False,
) -> TopVerdict:
    """Measure what is gained by running the top on every k-th step alone, on this machine.

    Args:
        bottom: what learns: called with x, returns one tensor h [N, ..., O].
        top: everything above, the loss included: called with ``(h, *rest)``, returns a scalar. A
            module, whose parameters, if there are any to train, are trained on steps with targets;
            or a function that trains none.
        sample: a batch ``(x, *rest)`` on the modules' device. The first tensor of the rest is the
            synthesizer's context, too.
        synthesizer: ``auto``, a name, several, or a module. ``softmax``: the rest begins with
            labels, and a linear layer of the top reads h (:class:`fused_dni.SoftmaxSynthesizer`);
            ``difference``: with a tensor of h's own shape
            (:class:`fused_dni.DifferenceSynthesizer`); ``rank16`` or another rank, ``dense``,
            ``diagonal``, ``conv`` as in :func:`fused_dni.verdict`. ``auto`` is the first of these
            that fits.
        target_every: the k to measure, each at least 1.
        update: rule, by default ``Adam``, of ``torch.optim``. Its rate is replaced while timing.
        seconds: budget of the timed rounds of all candidates together; exceeded, to three times as
            much at most, where the machine is too busy for narrow intervals, and further where
            eight rounds take longer.
        title: name in table and sentence.
        progress: called with what is being done and the fraction done; True for bars.

    Returns:
        A :class:`TopVerdict`. Nothing that was given is changed: modules are copied, and the
        buffers of what a function refers to, and the random numbers, are put back.

    Raises:
        VerdictError: bottom, top, sample and synthesizer do not fit, or there is nothing to train.
        ValueError: an argument out of range.
    """
    timing.require_positive(seconds=seconds)
    ks = tuple(dict.fromkeys(target_every))
    if not ks or not all(isinstance(k, int) and k >= 1 for k in ks):
        raise ValueError(f"target_every must hold whole numbers from 1 on, got {ks!r}")
    say = teller(progress)
    update = update or Adam()
    say("checking", 0.0)
    subject = make_subject(bottom, top, sample, synthesizer, at_rate(update, TIMING_RATE))
    say("checking", 1.0)
    with unchanged(subject.top, subject.x.device):
        found = _measured(subject, ks, seconds, lambda fraction: say("measuring", fraction))
    above = type(top).__name__ if isinstance(top, nn.Module) else getattr(top, "__name__", "top")
    return TopVerdict(
        title=title or f"{type(bottom).__name__} under {above}",
        **found,
        facts={
            **facts(device=subject.x.device),
            "dtype": str(subject.h.dtype).removeprefix("torch."),
            "sample": list(subject.x.shape),
            "h": list(subject.h.shape),
            "update": repr(update),
        },
        notes=subject.notes,
    )


def _measured(
    subject: Subject, ks: Sequence[int], seconds: float, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Times and peaks of all candidates."""
    device = subject.x.device
    candidates: dict[str, Candidate] = {
        "backprop": subject.steps(),
        "bottom": subject.of_bottom(),
        "top": subject.of_top(),
    }
    for name in subject.synthesizers:
        candidates[f"{name}, without"] = subject.steps(name, None)
        candidates[f"{name}, lesson"] = subject.of_lesson(name)
        for k in ks:
            candidates[f"{name}, k={k}"] = subject.steps(name, k)
    times = timing.compare(
        candidates,
        seconds=seconds,
        precision=PRECISION,
        block=1,  # rounds are what is paired, and a top may be slow
        device=device,
        progress=progress,
    )
    variants = []
    for name in subject.synthesizers:
        cycles = {
            k: timing.combine(f"{name}, k={k}", [(1.0 / k, times[f"{name}, k={k}"])]) for k in ks
        }
        peaks = [timing.peak_memory(subject.steps(name, every), device) for every in (1, None)]
        variants.append(
            TopVariant(
                name,
                times[f"{name}, without"],
                times[f"{name}, lesson"],
                cycles,
                (peaks[0], peaks[1]),
            )
        )
    return {
        "backprop": times["backprop"],
        "bottom": times["bottom"],
        "top": times["top"],
        "variants": variants,
        "memory": timing.peak_memory(subject.steps(), device),
        "memory_is": timing.memory_is(device),
    }
