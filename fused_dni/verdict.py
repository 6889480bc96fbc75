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
import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_dni import text, timing
from fused_dni.baseline import facts, stock_optimizer
from fused_dni.modules.base import NO_TARGET, DecoupledModule
from fused_dni.modules.recurrent import Recurrent
from fused_dni.rules import SGD, Rule
from fused_dni.timing import Ratio, Timing

#: Longest k looked at for the break-even.
HORIZON = 64
#: Rate at which candidates are timed: they must stay where they are, and speed does not depend on
#: it. Not zero, which a kernel could take as an excuse.
TIMING_RATE = 1e-6

CYCLE = (
    "A step with targets and a step without are timed as candidates of their own; a cycle of k "
    "steps is their weighted sum within each round, (t_targets + (k - 1) t_without) / k."
)

Loss = Callable[[Tensor], Tensor]


class VerdictError(ValueError):
    """The verdict cannot be given; the message says why."""


class GateError(VerdictError):
    """Candidates do not compute the same thing, so their times must not be compared."""


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
            lines.append(f"break-even against {_NAMES[base]}: {even}")
        if self.compile_seconds is not None:
            lines.append(f"compilation took {text.seconds(self.compile_seconds)}, not counted")
        lines += self.notes
        lines += [f"memory: {self.memory_is}", f"cycles: {CYCLE}"]
        return ("\n\n" if markdown else "\n").join(line for line in lines if line or not markdown)

    def sentence(self) -> str:
        """What won, in plain English."""
        timings, facts = self.timings, self.facts
        k = 4 if 4 in self.ks else next((k for k in self.ks if k), None)
        name = _row(k)
        stock, ours, dni = (timings[n].median for n in ("backprop", "fused", name))
        unit = "thread" if facts["threads"] == 1 else "threads"
        where = facts["gpu"] if facts["where"] == "cuda" else f"{facts['threads']} CPU {unit}"
        how = f"with targets {_often(k)}"
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
                f"With targets on every step it is {self._versus(_row(1), 'fused')} backprop on "
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
        rows = [self.timings[_row(k)] for k in self.ks]
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
                    label=_NAMES[name],
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


_NAMES = {
    "backprop": "stock backprop",
    "compiled": "compiled backprop",
    "fused": "backprop on our kernels",
    "floor": "floor (products alone)",
}


def _row(k: int | None) -> str:
    return f"dni k={k or 'never'}"


def _often(k: int | None) -> str:
    if k is None:
        return "never trained"
    if k == 1:
        return "on every step"
    teens = k % 100 in (11, 12, 13)
    ending = "th" if teens else {1: "st", 2: "nd", 3: "rd"}.get(k % 10, "th")
    return f"on every {k}{ending} step"


# -------------------------------------------------------------------------------------- candidates


@dataclass
class _Problem:
    """What all candidates are given."""

    sample: Tensor
    target: Tensor | None  # class indices, for conditioning
    loss: Loss | None  # None: a fixed gradient arrives, as inside a network
    arriving: Tensor | None
    context: Tensor | None
    rule: Rule


def _stock_step(
    module: nn.Module, problem: _Problem, run: Callable[[Tensor], Tensor] | None = None
) -> Callable[[], None]:
    """A step of stock backprop: eager, or with ``run`` (a compiled forward and loss)."""
    x, arriving = _input(problem), problem.arriving
    optimizer = stock_optimizer(module, problem.rule)
    forward = run or _forward(module, problem)

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        forward(x).backward(arriving)
        optimizer.step()

    return step


def _input(problem: _Problem) -> Tensor:
    """The sample; inside a network (no loss given) its producer asks for a gradient."""
    x = problem.sample.detach().clone()
    return x.requires_grad_() if problem.loss is None else x


def _forward(module: nn.Module, problem: _Problem) -> Callable[[Tensor], Tensor]:
    loss = problem.loss
    if loss is None:
        return module

    def forward(x: Tensor) -> Tensor:
        return loss(module(x))

    return forward


def _our_step(
    module: nn.Module, problem: _Problem, target_every: int | None, warmup_steps: int = 0
) -> Callable[[], None]:
    """A training step on decoupled layers, with what a user's loop has in it."""
    import fused_dni as fd

    x, arriving = _input(problem), problem.arriving
    if problem.loss is None and target_every is None:
        setattr(x, NO_TARGET, True)  # the decoupled layer below asks for nothing on such steps
    forward = _forward(module, problem)
    optimizer = fd.FusedOptimizer(module)
    others = list(fd.ordinary_parameters(module))
    ordinary = _ordinary(others, problem.rule)
    schedule = fd.Schedule(module, target_every=target_every, warmup_steps=warmup_steps)
    context = problem.context

    def step() -> None:
        if ordinary is not None:
            ordinary.zero_grad()
        x.grad = None
        if context is None:
            out = forward(x)
        else:
            with fd.condition_on(context):
                out = forward(x)
        if out.requires_grad:
            out.backward(arriving)
        optimizer.step()
        if ordinary is not None:
            ordinary.step()
        schedule.step()

    return step


def _ordinary(parameters: Sequence[nn.Parameter], rule: Rule) -> torch.optim.Optimizer | None:
    return stock_optimizer(nn.ParameterList(parameters), rule) if parameters else None


def decouple(
    module: nn.Module,
    sample: Tensor,
    output: Tensor,
    *,
    synthesizer: Any,
    rank: int | None,
    context_features: int,
    update: Rule,
    exact_head: bool,
    backend: str | None,
) -> nn.Module:
    """A copy of ``module`` on our layers.

    Linear layers, with the normalisation and activation behind them, become
    :class:`fused_dni.FusedDNILinear`. If that leaves nothing to decouple (no linear layer, or only
    the head), the module, or what lies in front of the head, becomes one
    :class:`fused_dni.Decoupled` segment.
    """
    import fused_dni as fd

    module = copy.deepcopy(module)
    wanted = context_features if synthesizer is not None else 0
    if any(isinstance(part, nn.Linear) for part in module.modules()):
        ours = fd.convert(
            copy.deepcopy(module),
            synthesizer=synthesizer,
            head="exact" if exact_head else "decoupled",
            update=update,
            backend=backend,
            **({"context_features": wanted} if isinstance(synthesizer, str) else {}),
        )
        layers = [m for m in ours.modules() if isinstance(m, fd.FusedDNILinear)]
        decoupled = [layer for layer in layers if layer.synthesizer is not None]
        if rank is not None and synthesizer == "default":
            for layer in decoupled:
                size = layer.out_features
                low = min(rank, size) or None
                made = fd.LinearSynthesizer(
                    size, low, wanted, device=layer.weight.device, dtype=layer.weight.dtype
                )
                layer.attach(made, update)
        if decoupled or synthesizer is None:
            return ours
    if exact_head and isinstance(module, nn.Sequential) and isinstance(module[-1], nn.Linear):
        body, head = (
            module[:-1],
            [
                fd.FusedDNILinear.from_linear(
                    module[-1], synthesizer=None, update=update, backend=backend
                )
            ],
        )
    else:
        body, head = module, []
    if synthesizer is None:
        return nn.Sequential(fd.Decoupled(body, None, update=update), *head)
    if synthesizer == "default":
        with torch.no_grad():
            h = copy.deepcopy(body).to(output.device)(sample)
        factory = {"device": h.device, "dtype": h.dtype}
        if h.dim() == 4:
            synthesizer = fd.ConvSynthesizer(h.shape[1], h.shape[1], wanted, **factory)
        else:
            size = h.shape[-1]
            synthesizer = fd.LinearSynthesizer(size, min(rank or 16, size), wanted, **factory)
    segment = fd.Decoupled(body, copy.deepcopy(synthesizer), update=update)
    return nn.Sequential(segment, *head)


# -------------------------------------------------------------------------------------------- gate


def _gate(
    module: nn.Module,
    output: Tensor,
    problem: _Problem,
    build: Callable[[Any, Rule], nn.Module],
    synthesizer: Any,
) -> dict[str, Any]:
    """Check that the candidates compute the same step before timing them.

    One step of SGD at rate 1 moves every parameter by its gradient. Compared with stock backprop:
    our backprop, and our decoupled layers during warm-up (true gradients); and with synthesizers
    at zero, decoupled layers must stay where they are.
    """
    import fused_dni as fd

    rule = SGD(1.0)
    probe = replace(problem, rule=rule)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    stock = copy.deepcopy(module)
    torch.manual_seed(0)
    _stock_step(stock, probe)()
    wanted = {name: p.detach() - before[name] for name, p in stock.named_parameters()}
    eps = torch.finfo(output.dtype).eps
    length = max(
        [problem.sample.numel() // max(1, problem.sample.shape[-1]), 1]
        + [p.shape[1:].numel() for p in before.values() if p.dim() > 1]
    )
    layers = 1 + sum(p.dim() > 1 for p in before.values())
    # Rounding of a sum grows with the root of its length, and every layer adds its own, forward
    # and backward. The subtraction rounds at the weight's size.
    share = 8.0 * layers * eps * math.sqrt(length)
    report: dict[str, Any] = {"tolerance": share, "checks": []}

    def check(name: str, ours: nn.Module) -> None:
        learners = {
            id(p)
            for part in ours.modules()
            if isinstance(part, DecoupledModule) and part.synthesizer is not None
            for p in part.synthesizer.parameters()
        }
        found = [p.detach() for p in fd.revert(ours).parameters() if id(p) not in learners]
        if [p.shape for p in found] != [p.shape for p in before.values()]:
            raise GateError(f"no verdict: {name} has other parameters than the module")
        worst = 0.0
        for (parameter, move), after in zip(wanted.items(), found, strict=True):
            base = before[parameter]
            wrong = (after - base - move).abs().max().item()
            allowed = share * move.abs().max().item() + 4 * eps * base.abs().max().item()
            if not _bias_in_front_of_batch_norm(module, parameter):
                worst = max(worst, wrong / allowed if allowed else (math.inf if wrong else 0.0))
        report["checks"].append({"name": name, "deviation_of_tolerance": worst})
        if not worst <= 1.0:
            raise GateError(
                f"no verdict: {name} disagrees with stock backprop by {worst:.3g} times the "
                "tolerance after one step, so their times must not be compared"
            )

    ours = build(None, rule)
    torch.manual_seed(0)
    _our_step(ours, probe, 1)()
    check("backprop on our kernels", ours)

    ours = build(synthesizer, rule)
    torch.manual_seed(0)
    _our_step(ours, probe, 1, warmup_steps=1)()
    check("a decoupled step on true gradients (warm-up)", ours)

    if synthesizer == "default":
        ours = build(synthesizer, rule)
        kept = {
            id(p): p.detach().clone()
            for m in ours.modules()
            if isinstance(m, DecoupledModule) and m.synthesizer is not None
            for p in m.local_parameters()
            if p is not None
        }
        pupils = [
            (p, p.detach().clone())
            for m in ours.modules()
            if isinstance(m, DecoupledModule) and m.synthesizer is not None
            for p in m.synthesizer.parameters()
        ]
        torch.manual_seed(0)
        _our_step(ours, probe, 1)()
        for p in ours.parameters():
            if id(p) in kept and not torch.equal(p.detach(), kept[id(p)]):
                raise GateError("no verdict: a synthesizer at zero moved its layer's parameters")
        # The topmost does; below it the first target is made of a prediction that was zero.
        if all(torch.equal(p.detach(), was) for p, was in pupils):
            raise GateError("no verdict: no synthesizer learned on a step with targets")
        report["checks"].append(
            {"name": "synthesizers at zero: layers stay, synthesizers learn", "exact": True}
        )
    return report


def _bias_in_front_of_batch_norm(module: nn.Module, parameter: str) -> bool:
    """Its gradient is zero but for rounding in stock backprop and exactly zero in ours."""
    if not parameter.endswith("bias"):
        return False
    children = list(module.named_modules())
    for (name, child), (_, after) in itertools.pairwise(children):
        if isinstance(child, nn.Linear) and isinstance(after, nn.BatchNorm1d):
            prefix = f"{name}." if name else ""
            if parameter == f"{prefix}bias":
                return True
    return False


# ----------------------------------------------------------------------------------------- verdict


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
    problem, output, module = _pose(module, sample, target, context_features, rule)
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
        gate = _gate(module, output, problem, build, synthesizer)
    say("checking", 1.0)

    notes: list[str] = []
    steps: dict[str, Callable[[], None]] = {}
    steps["backprop"] = _stock_step(copy.deepcopy(module), problem)
    compile_seconds = None
    if compile:
        say("compiling", 0.0)
        compiled, compile_seconds, reason = _compiled(copy.deepcopy(module), problem, compile_limit)
        if compiled is None:
            notes.append(f"compiled backprop was skipped: {reason}")
        else:
            steps["compiled"] = compiled
        say("compiling", 1.0)
    steps["fused"] = _our_step(build(None, rule), problem, 1)
    for name, every in (("with targets", 1), ("without targets", None)):
        ours = build(synthesizer, rule)
        _spread(ours)
        steps[name] = _our_step(ours, problem, every)
    shapes = _shapes(module, problem.sample)
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
            return timing.combine(_row(k), [(1.0, without)])
        return timing.combine(_row(k), [(1 / k, with_targets), (1 - 1 / k, without)])

    bases: list[str] = [name for name in ("backprop", "compiled", "fused") if name in measured]
    rows: dict[str, Timing] = {name: measured[name] for name in bases}
    for k in ks:
        rows[_row(k)] = cycle(k)
        memory[_row(k)] = (
            memory["without targets"]
            if k is None
            else max(memory["with targets"], memory["without targets"])
        )
    if "floor" in measured:
        rows["floor"] = measured["floor"]
    even = {base: _break_even(cycle, measured[base]) for base in bases}
    for name in ("with targets", "without targets"):
        del memory[name]
    return Verdict(
        title=title or _title(module, sample),
        timings=rows,
        memory=memory,
        memory_is=(
            timing.PEAK_MEMORY_CUDA if sample.device.type == "cuda" else timing.PEAK_MEMORY_CPU
        ),
        ks=ks,
        break_even=even,
        gate=gate,
        facts=_facts(sample, update, synthesizer, conditioned, backend),
        notes=notes,
        compile_seconds=compile_seconds,
    )


def at_rate(rule: Rule, lr: float) -> Rule:
    """The same rule at another rate."""
    return type(rule)(**{**rule.defaults(), "lr": lr})


def _pose(
    module: nn.Module,
    sample: Tensor,
    target: Tensor | Loss | None,
    context_features: int,
    rule: Rule,
) -> tuple[_Problem, Tensor, nn.Module]:
    """Check the arguments by a trial forward and make what all candidates are given."""
    if not isinstance(module, nn.Module):
        raise VerdictError(f"module must be an nn.Module, got {type(module).__name__}")
    if not isinstance(sample, Tensor) or not sample.is_floating_point():
        got = sample.dtype if isinstance(sample, Tensor) else type(sample).__name__
        raise VerdictError(f"sample must be a floating-point tensor, got {got}")
    if not any(p.requires_grad for p in module.parameters()):
        raise VerdictError("the module has no trainable parameters")
    module = copy.deepcopy(module).train()
    try:
        with torch.no_grad():
            output = copy.deepcopy(module)(sample)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise VerdictError(
            f"the module does not take a sample of shape {list(sample.shape)}: {_first(error)}"
        ) from error
    if not isinstance(output, Tensor):
        hint = ""
        if isinstance(module, (nn.LSTM, Recurrent)):
            hint = ": for an LSTM there is verdict_lstm"
        raise VerdictError(f"the module must return one tensor, got {type(output).__name__}{hint}")
    generator = torch.Generator().manual_seed(0)
    rows = tuple(output.shape[:-1]) if output.dim() != 4 else (output.shape[0],)
    context = None
    labels = target if isinstance(target, Tensor) else None
    loss: Loss | None = None
    arriving = None
    if labels is not None:
        if labels.dtype != torch.int64 or tuple(labels.shape) != rows:
            raise VerdictError(
                f"target must hold class indices, int64 of shape {list(rows)}, got "
                f"{labels.dtype} {list(labels.shape)}"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= output.shape[-1]:
            raise VerdictError(
                f"target holds class {int(labels.max())}, the module has {output.shape[-1]} outputs"
            )
        classes = labels

        def cross_entropy(out: Tensor) -> Tensor:
            return F.cross_entropy(out.flatten(0, -2), classes.flatten())

        loss = cross_entropy
    elif callable(target):
        loss = target
    elif target is not None:
        raise VerdictError(
            f"target must be class indices, a loss function or None, got {type(target).__name__}"
        )
    else:
        arriving = torch.randn(output.shape, generator=generator) / output.shape[0]
        arriving = arriving.to(device=output.device, dtype=output.dtype)
    if context_features:
        context = labels
        if context is None:
            context = torch.randint(context_features, rows, generator=generator).to(sample.device)
        elif int(context.max()) >= context_features:
            raise VerdictError(
                f"target holds class {int(context.max())}, context_features is {context_features}"
            )
    return _Problem(sample, labels, loss, arriving, context, rule), output, module


def _compiled(
    module: nn.Module, problem: _Problem, limit: float
) -> tuple[Callable[[], None] | None, float | None, str]:
    """The compiled candidate, how long compiling took, and if it failed, why."""
    start = time.perf_counter()
    try:
        with timing._quiet_stderr(), _deadline(limit):
            step = _stock_step(module, problem, torch.compile(_forward(module, problem)))
            step()
            step()
    except _Expired:
        return None, None, f"compiling took more than {limit:g} s"
    except Exception as error:  # whatever a compiler may raise, the verdict goes on without it
        return None, None, _first(error)
    return step, time.perf_counter() - start, ""


class _Expired(BaseException):
    """Time is up. Not an ``Exception``: compilers catch those and go on."""


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise :class:`_Expired` inside the block after so many seconds; in the main thread of a
    system with interval timers, elsewhere never."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise _Expired

    before = signal.signal(signal.SIGALRM, ring)
    # Again and again, should one be lost in a callback that cannot raise.
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _spread(module: nn.Module) -> None:
    """Give synthesizers, which start at zero, small numbers, so that what is timed is ordinary."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, DecoupledModule) and part.synthesizer is not None:
                for p in part.synthesizer.parameters():
                    noise = torch.randn(p.shape, generator=generator) * 0.01
                    p.add_(noise.to(device=p.device, dtype=p.dtype))


def _shapes(module: nn.Module, sample: Tensor) -> list[tuple[int, int, int]]:
    """(rows, in, out) of every linear layer that the sample passes; empty if there are products of
    other kinds, whose floor is not known."""
    found: list[tuple[int, int, int]] = []
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(
                lambda m, args, out: found.append(
                    (args[0].numel() // m.in_features, m.in_features, m.out_features)
                )
            )
        elif isinstance(part, (nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)):
            return []
    with torch.no_grad():
        module(sample)
    return found


def _break_even(cycle: Callable[[int | None], Timing], base: Timing) -> BreakEven:
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


def _title(module: nn.Module, sample: Tensor) -> str:
    return f"{type(module).__name__} on {'x'.join(str(n) for n in sample.shape)}"


def _facts(
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


def _first(error: BaseException) -> str:
    """First line of a message, which is never empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
