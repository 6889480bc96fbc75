"""What backprop costs, what DNI costs, and where the break-even is: for your layer, on your device.

:func:`verdict` takes a module and a sample, builds from the same weights

====================  ============================================================================
``backprop``          the module as it is, eager, with ``torch.optim``'s ``fused=True`` optimizer
``compiled``          the same under ``torch.compile`` (compile time reported, not counted)
``fused``             backprop on our kernels: exact gradient, updated where it is made
``dni k=...``         decoupled by synthetic gradients, synthesizers trained on every k-th step
``floor``             the matrix products that none of them can avoid, alone
====================  ============================================================================

and times a training step of each, interleaved in one process (:mod:`fused_dni.timing`). Against
stock backprop two things are mixed, kernels and method; so what the *synthetic gradient* buys is
only ever its ratio to ``fused``, and the sentence says so.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_dni import text, timing
from fused_dni.baseline import facts
from fused_dni.rules import SGD, Rule
from fused_dni.timing import Ratio, Timing
from fused_dni.verdict.candidates import (
    TIMING_RATE,
    Loss,
    at_rate,
    compiled_step,
    decouple,
    linear_shapes,
    our_step,
    pose,
    spread,
    stock_step,
)
from fused_dni.verdict.errors import VerdictError
from fused_dni.verdict.gate import check_gate

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
        if self.kind == "from":
            doubt = self.slower_to + 1
            assert self.k is not None
            return f"k = {self.k}" if doubt >= self.k else f"k = {self.k} (in doubt from {doubt})"
        return self.kind

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"kind": self.kind, "k": self.k, "slower_to": self.slower_to}


@dataclass
class Verdict:
    """Result of :func:`verdict`.

    Attributes:
        title: what was measured.
        timings: seconds per step by candidate, in the order of the table.
        memory: peak bytes of a step by candidate.
        memory_is: what these bytes are.
        ks: the k of the ``dni`` rows; None is never.
        break_even: against ``backprop``, ``compiled`` (if measured) and ``fused``.
        gate: what was checked before anything was timed, with the deviations found.
        facts: device, versions, settings.
        notes: what the reader should know: skipped candidates with the reason, for instance.
        compile_seconds: how long ``torch.compile`` took; None if it was not tried or failed.
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

    def ratio(self, name: str, base: str) -> Ratio:
        """Time of one candidate over another's."""
        return timing.ratio(self.timings[name], self.timings[base])

    def to_json(self) -> str:
        """Everything, as a JSON text."""
        ratios = {
            base: {
                name: {**self.ratio(name, base).to_json(), "verdict": self._against(name, base)}
                for name in self.timings
                if name != base
            }
            for base in ("backprop", "compiled", "fused", "floor")
            if base in self.timings
        }
        report = {
            "kind": "verdict",
            "title": self.title,
            "sentence": self.sentence(),
            "facts": self.facts,
            "timings": {name: value.to_json() for name, value in self.timings.items()},
            "ratios": ratios,
            "memory": self.memory,
            "memory_is": self.memory_is,
            "break_even": {base: value.to_json() for base, value in self.break_even.items()},
            "gate": self.gate,
            "cycle": CYCLE,
            "compile_seconds": self.compile_seconds,
            "notes": self.notes,
        }
        return json.dumps(report, indent=1)

    def table(self, *, markdown: bool = False) -> str:
        """A row a candidate: time, spread, ratio to the floor, to stock and to our own backprop.

        A ``~`` marks a ratio whose interval reaches one: no difference could be shown.
        """
        header = ["step", "median", "p10", "p90", "x floor", "x backprop", "x fused", "memory"]
        rows = []
        for name, value in self.timings.items():
            rows.append(
                [
                    name,
                    text.seconds(value.median),
                    text.seconds(value.p10),
                    text.seconds(value.p90),
                    *(self._cell(name, base) for base in ("floor", "backprop", "fused")),
                    text.size(self.memory.get(name)),
                ]
            )
        lines = [text.table(header, rows, markdown=markdown), ""]
        for base, even in self.break_even.items():
            lines.append(f"break-even against {NAMES[base]}: {even}")
        if self.compile_seconds is not None:
            lines.append(f"compilation took {text.seconds(self.compile_seconds)}, not counted")
        lines += self.notes
        lines += [f"memory: {self.memory_is}", f"cycles: {CYCLE}"]
        return ("\n\n" if markdown else "\n").join(line for line in lines if line or not markdown)

    def sentence(self) -> str:
        """What won, in plain English."""
        timings, facts = self.timings, self.facts
        k = 4 if 4 in self.ks else next((k for k in self.ks if k), None)
        name = row(k)
        stock, ours, dni = (timings[n].median for n in ("backprop", "fused", name))
        unit = "thread" if facts["threads"] == 1 else "threads"
        where = facts["gpu"] if facts["where"] == "cuda" else f"{facts['threads']} CPU {unit}"
        how = f"with targets {often(k)}"
        parts = [
            f"On {where} a training step of {self.title} takes {text.seconds(stock)} by stock "
            f"backprop, {text.seconds(ours)} by backprop on our kernels and {text.seconds(dni)} by "
            f"DNI {how}."
        ]
        parts.append(
            f"DNI {how} is {self._versus(name, 'backprop')} stock backprop. That mixes two things: "
            f"backprop on our kernels is {self._versus('fused', 'backprop')} stock backprop, and "
            f"the synthetic gradient itself is {self._versus(name, 'fused')} backprop on the same "
            "kernels."
        )
        if 1 in self.ks and k != 1:
            parts.append(
                f"With targets on every step it is {self._versus(row(1), 'fused')} backprop on "
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
            parts.append(f"Against compiled backprop, DNI {how} is {self._against_word(name)}.")
        parts.append("This is time per step only; what it does to accuracy, `train` measures.")
        return " ".join(parts)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the cost of a step over k, with the baselines as lines, into an image file.

        Raises:
            VerdictError: the format is unknown or the file cannot be written.
        """
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        path = Path(path)
        figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=120)
        rows = [self.timings[row(k)] for k in self.ks]
        scale = 1e3 if self.timings["backprop"].median >= 1e-3 else 1e6
        at = range(len(rows))
        middle = [row.median * scale for row in rows]
        axes.errorbar(
            at,
            middle,
            yerr=[
                [m - row.p10 * scale for m, row in zip(middle, rows, strict=True)],
                [row.p90 * scale - m for m, row in zip(middle, rows, strict=True)],
            ],
            marker="o",
            capsize=3,
            color="#d1495b",
            label="DNI (bars: 10-90 %)",
        )
        for name, colour, style in (
            ("backprop", "#1b6ca8", "-"),
            ("compiled", "#6fa8dc", "--"),
            ("fused", "#2e9e5b", "-"),
            ("floor", "#777777", ":"),
        ):
            if name in self.timings:
                axes.axhline(
                    self.timings[name].median * scale,
                    color=colour,
                    linestyle=style,
                    label=NAMES[name],
                )
        axes.set_xticks(list(at), [str(k) if k else "never" for k in self.ks])
        axes.set_xlabel("k: targets on every k-th step")
        axes.set_ylabel(f"training step, {'ms' if scale == 1e3 else 'µs'}")
        axes.set_ylim(bottom=0)
        axes.grid(True, alpha=0.2)
        axes.set_title(self.title, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        figure.tight_layout()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise VerdictError(f"cannot write the plot {path}: {reason}") from error
        finally:
            plt.close(figure)
        return path

    def _against(self, name: str, base: str) -> str:
        return timing.differs(self.timings[name], self.timings[base])

    def _cell(self, name: str, base: str) -> str:
        if base not in self.timings:
            return "-"
        if name == base:
            return "1"
        return cell(self.ratio(name, base), marked=base != "floor")

    def _versus(self, name: str, base: str) -> str:
        return versus(self.ratio(name, base))

    def _against_word(self, name: str) -> str:
        found = self.ratio(name, "compiled")
        word = found.verdict()
        if word == "inconclusive":
            return "not measurably different"
        return f"{1 / found.median if word == 'faster' else found.median:.2f}x {word}"


def verdict(
    module: nn.Module,
    sample: Tensor,
    *,
    target: Tensor | Loss | None = None,
    update: Rule | None = None,
    target_every: Sequence[int | None] = (1, 2, 4, 8, 16, None),
    synthesizer: nn.Module | str = "default",
    rank: int | None = None,
    context_features: int = 0,
    seconds: float = 5.0,
    compile: bool = True,
    compile_limit: float = 120.0,
    backend: str | None = None,
    title: str | None = None,
    progress: Callable[[str, float], None] | bool = False,
) -> Verdict:
    """Measure what a training step of ``module`` costs by backprop and by DNI, on this machine.

    Args:
        module: linear layers with normalisations and activations, which are converted; or any
            other module, which is decoupled as one segment. Neither it nor its buffers are changed.
        sample: an input batch, on the module's device; it fixes shape and dtype.
        target: class indices [rows], for a cross-entropy loss: the module is a whole network and
            its last linear layer is trained exactly. Or a function from output to scalar loss,
            likewise. None: the module stands inside a network; a fixed gradient arrives at its
            output, its input's producer asks for one, and all its layers are decoupled.
        update: rule, by default ``SGD``. Its rate is replaced while timing.
        target_every: the k to report; None is never.
        synthesizer: as in :class:`fused_dni.FusedDNILinear`.
        rank: of the default synthesizer; 0 for dense, None for its own default.
        context_features: number of classes to condition on; labels are ``target``, or random.
        seconds: budget of the timed rounds of all candidates together.
        compile: whether to include ``torch.compile``'d backprop; skipped, with the reason among
            the notes, where it does not work.
        compile_limit: seconds after which compiling is given up (in the main thread).
        backend: force a backend of our kernels.
        title: name in table and sentence.
        progress: called with what is being done and the fraction done; True for bars.

    Returns:
        A :class:`Verdict`.

    Raises:
        GateError: a candidate's step does not agree with stock backprop's; nothing is reported.
        VerdictError: the module has nothing to train, or sample and module do not fit.
        ValueError: an argument out of range.
    """
    if not 0.0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive and finite, got {seconds!r}")
    ks = tuple(dict.fromkeys(target_every))
    if not ks or any(k is not None and k < 1 for k in ks):
        raise ValueError(f"target_every must hold numbers from 1 on, or None, got {ks!r}")
    if progress is True:
        from fused_dni.progress import Progress

        progress = Progress().update
    say: Callable[[str, float], None] = progress or (lambda what, fraction: None)
    update = update or SGD()
    rule = at_rate(update, TIMING_RATE)
    problem, output, module = pose(module, sample, target, context_features, rule)
    exact_head = problem.loss is not None
    conditioned = context_features

    def build(with_synthesizer: Any, by: Rule) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return decouple(
                module,
                sample,
                output,
                synthesizer=with_synthesizer,
                rank=rank,
                context_features=conditioned,
                update=by,
                exact_head=exact_head,
                backend=backend,
            ).train()

    say("checking", 0.0)
    with torch.random.fork_rng(devices=[]):
        gate = check_gate(module, output, problem, build, synthesizer)
    say("checking", 1.0)

    notes: list[str] = []
    steps: dict[str, Callable[[], None]] = {}
    steps["backprop"] = stock_step(copy.deepcopy(module), problem)
    compile_seconds = None
    if compile:
        say("compiling", 0.0)
        compiled, compile_seconds, reason = compiled_step(
            copy.deepcopy(module), problem, compile_limit
        )
        if compiled is None:
            notes.append(f"compiled backprop was skipped: {reason}")
        else:
            steps["compiled"] = compiled
        say("compiling", 1.0)
    steps["fused"] = our_step(build(None, rule), problem, 1)
    for name, every in (("with targets", 1), ("without targets", None)):
        ours = build(synthesizer, rule)
        spread(ours)
        steps[name] = our_step(ours, problem, every)
    shapes = linear_shapes(module, problem.sample)
    if shapes:
        floor = timing.gemm_floor(shapes, output.dtype, sample.device)
        steps["floor"] = floor  # type: ignore[assignment]

    measured = timing.compare(
        steps,
        seconds=seconds,
        device=sample.device,
        progress=lambda fraction: say("measuring", fraction),
    )
    memory = {
        name: timing.peak_memory(step, sample.device)
        for name, step in steps.items()
        if name != "floor"
    }

    def cycle(k: int | None) -> Timing:
        with_targets, without = measured["with targets"], measured["without targets"]
        if k is None:
            return timing.combine(row(k), [(1.0, without)])
        return timing.combine(row(k), [(1 / k, with_targets), (1 - 1 / k, without)])

    bases: list[str] = [name for name in ("backprop", "compiled", "fused") if name in measured]
    rows: dict[str, Timing] = {name: measured[name] for name in bases}
    for k in ks:
        rows[row(k)] = cycle(k)
        memory[row(k)] = (
            memory["without targets"]
            if k is None
            else max(memory["with targets"], memory["without targets"])
        )
    if "floor" in measured:
        rows["floor"] = measured["floor"]
    even = {base: break_even(cycle, measured[base]) for base in bases}
    for name in ("with targets", "without targets"):
        del memory[name]
    return Verdict(
        title=title or title_of(module, sample),
        timings=rows,
        memory=memory,
        memory_is=(
            timing.PEAK_MEMORY_CUDA if sample.device.type == "cuda" else timing.PEAK_MEMORY_CPU
        ),
        ks=ks,
        break_even=even,
        gate=gate,
        facts=facts_of(sample, update, synthesizer, conditioned, backend),
        notes=notes,
        compile_seconds=compile_seconds,
    )


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


def title_of(module: nn.Module, sample: Tensor) -> str:
    return f"{type(module).__name__} on {'x'.join(str(n) for n in sample.shape)}"


def facts_of(
    sample: Tensor, update: Rule, synthesizer: Any, context_features: int, backend: str | None
) -> dict[str, Any]:
    return {
        **facts(),
        "where": sample.device.type,
        "dtype": str(sample.dtype).removeprefix("torch."),
        "sample": list(sample.shape),
        "update": repr(update),
        "synthesizer": synthesizer if isinstance(synthesizer, str) else repr(synthesizer),
        "context_features": context_features,
        "backend": backend,
    }


def versus(found: Ratio) -> str:
    """What a ratio of times says, in the words of a sentence: ``1.20x faster than``."""
    word = found.verdict()
    if word == "faster":
        return f"{1 / found.median:.2f}x faster than"
    if word == "slower":
        return f"{found.median:.2f}x slower than"
    return "not measurably different from"


def cell(found: Ratio, *, marked: bool = True) -> str:
    """A ratio of times in a table; ``~`` marks one that could not be told from one."""
    mark = "~" if marked and found.verdict() == "inconclusive" else ""
    return f"{mark}{found.median:.2f}"


NAMES = {
    "backprop": "stock backprop",
    "compiled": "compiled backprop",
    "fused": "backprop on our kernels",
    "floor": "floor (products alone)",
}


def row(k: int | None) -> str:
    return f"dni k={k or 'never'}"


def often(k: int | None) -> str:
    if k is None:
        return "never trained"
    if k == 1:
        return "on every step"
    teens = k % 100 in (11, 12, 13)
    ending = "th" if teens else {1: "st", 2: "nd", 3: "rd"}.get(k % 10, "th")
    return f"on every {k}{ending} step"
