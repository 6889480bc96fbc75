"""What backprop costs, what DNI costs, and where the break-even is: for your layer, on your device.

:func:`verdict` takes a module and a sample, builds from the same weights

====================  ============================================================================
``backprop``          the module as it is, eager, with ``torch.optim``'s ``fused=True`` optimizer
``compiled``          the same under ``torch.compile`` (compile time reported, not counted)
``fused``             backprop on our kernels: exact gradient, updated where it is made
``dni k=...``         decoupled by synthetic gradients, synthesizers trained on every k-th step
``floor``             the matrix products that none of them can avoid, alone
====================  ============================================================================

and times a training step of each, interleaved in one process (:mod:`fused_dni.measure.timing`), for
every interface with every synthesizer asked for; then the parts of a step
(:mod:`fused_dni.measure.verdict.parts`). Against stock backprop two things are mixed, kernels and
method; so what the *synthetic gradient* buys is only ever its ratio to ``fused``, and the sentence
says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_dni.functional import check
from fused_dni.measure import timing
from fused_dni.measure.baseline import facts
from fused_dni.measure.options import KS, VERDICT_SECONDS
from fused_dni.measure.timing import Candidate
from fused_dni.measure.verdict import forms
from fused_dni.measure.verdict.candidates import (
    TIMING_RATE,
    Loss,
    Problem,
    at_rate,
    compiled_step,
    linear_shapes,
    make_problem,
    our_step,
    spread,
    stock_step,
)
from fused_dni.measure.verdict.ceilings import Ceilings, measure_ceilings
from fused_dni.measure.verdict.gate import check_gate
from fused_dni.measure.verdict.parts import Parts, measure_parts
from fused_dni.measure.verdict.result import Variant, Verdict, break_even
from fused_dni.modules.linear import DEFAULT_RANK
from fused_dni.report.progress import teller
from fused_dni.report.words import row
from fused_dni.rules import SGD, Rule, require_rule

#: Share of the time that the parts get.
PARTS = 0.4
#: How narrow the intervals of the ratios are to be: beyond it a busy machine gets more time.
PRECISION = 0.02


def verdict(
    module: nn.Module,
    sample: Tensor,
    *,
    target: Tensor | Loss | None = None,
    update: Rule | None = None,
    target_every: Sequence[int | None] = KS,
    interface: str | Sequence[str] = "output",
    synthesizer: nn.Module | str | Sequence[str] = "default",
    rank: int | None = None,
    context_features: int = 0,
    seconds: float = VERDICT_SECONDS,
    parts: bool = True,
    compile: bool = True,
    compile_limit: float = 120.0,
    backend: str | None = None,
    title: str | None = None,
    progress: Callable[[str, float], None] | bool = False,
) -> Verdict:
    """Measure what a training step of ``module`` costs by backprop and by DNI, on this machine.

    Args:
        module: linear layers with normalisations and activations, which are converted; or any
            other module, which is decoupled as one segment
            (:mod:`fused_dni.measure.verdict.forms`). Neither it nor its buffers are changed.
        sample: an input batch, on the module's device; it fixes shape and dtype.
        target: class indices [rows], for a cross-entropy loss: the module is a whole network and
            its last linear layer is trained exactly. Or a function from output to scalar loss,
            likewise. None: the module stands inside a network; a fixed gradient arrives at its
            output on steps with targets, its input's producer asks for one then, and all its layers
            are decoupled.
        update: rule, by default ``SGD``. Its rate is replaced while timing.
        target_every: the k to report; None is never.
        interface: where the gradient is predicted, ``output`` or ``preactivation``; several; or
            ``all`` that differ.
        synthesizer: a name (``default``, ``dense``, ``rank16`` or another rank, ``diagonal``,
            ``conv`` for maps), several, ``all`` that fit, or a module as in
            :class:`fused_dni.FusedDNILinear`. Each interface is measured with each.
        rank: of the default synthesizer; 0 for dense, None for its own default.
        context_features: number of classes to condition on; labels are ``target``, or random.
        seconds: budget of the timed rounds of all candidates together, parts included; exceeded,
            to three times as much at most, where the machine is too busy for narrow intervals.
        parts: whether to time the parts of a step too, and the device's ceilings.
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
        VerdictError: the module has nothing to train, sample and module do not fit, or an interface
            or synthesizer does not go with them.
        TypeError: an argument of another kind.
        ValueError: an argument out of range.
    """
    check.module("module", module)
    require_rule("update", update)
    check.whole("context_features", context_features, 0)
    timing.require_positive(seconds=seconds)
    ks = tuple(dict.fromkeys(target_every))
    if not ks or any(k is not None and k < 1 for k in ks):
        raise ValueError(f"target_every must hold numbers from 1 on, or None, got {ks!r}")
    say = teller(progress)
    update = update or SGD()
    rule = at_rate(update, TIMING_RATE)
    problem, output, module = make_problem(module, sample, target, context_features, rule)
    making = _Making(module, problem, output, context_features, backend)
    plans = _plans(making, interface, synthesizer, rank)

    gate: dict[str, Any] = {"checks": []}
    for i, plan in enumerate(plans):
        say("checking", i / len(plans))
        checked = making.check(plan)
        gate["tolerance"] = checked["tolerance"]
        gate["checks"] += [{"variant": plan.name, **check} for check in checked["checks"]]
    say("checking", 1.0)

    notes: list[str] = []
    # Backprop on our kernels first: it is what all others are held against.
    steps: dict[str, Candidate] = {}
    for plan in plans:
        if plan.base not in steps:
            steps[plan.base] = our_step(making.build(plan, None, rule), problem, 1)
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
    for plan in plans:
        for name, every in ((plan.with_targets, 1), (plan.without, None)):
            ours = making.build(plan, plan.synthesizer, rule)
            spread(ours)
            steps[name] = our_step(ours, problem, every)
    shapes = linear_shapes(module, problem.sample)
    if shapes:
        steps["floor"] = timing.gemm_floor(shapes, output.dtype, sample.device)

    measured = timing.compare(
        steps,
        seconds=seconds * (1.0 - PARTS if parts else 1.0),
        precision=PRECISION,
        device=sample.device,
        progress=lambda fraction: say("measuring", fraction),
    )
    memory = {
        name: timing.peak_memory(step, sample.device)
        for name, step in steps.items()
        if name != "floor"
    }
    variants = [
        Variant(
            plan.interface,
            plan.label,
            plan.form,
            plan.base,
            measured[plan.with_targets],
            measured[plan.without],
            (memory[plan.with_targets], memory[plan.without]),
        )
        for plan in plans
    ]
    wanted = ("backprop", "compiled", *dict.fromkeys(plan.base for plan in plans))
    bases = [name for name in wanted if name in measured]
    first = variants[0]
    rows = {name: measured[name] for name in bases} | {row(k): first.cycle(k) for k in ks}
    held = {name: memory[name] for name in bases} | {row(k): first.peak(k) for k in ks}
    if "floor" in measured:
        rows["floor"] = measured["floor"]
    found = Verdict(
        title=title or title_of(module, sample),
        timings=rows,
        memory=held,
        memory_is=timing.memory_is(sample.device),
        ks=ks,
        break_even={
            base: break_even(first.cycle, measured[base])
            for base in ("backprop", "compiled", "fused")
            if base in measured
        },
        gate=gate,
        facts=facts_of(sample, update, synthesizer, context_features, backend),
        notes=notes,
        compile_seconds=compile_seconds,
        variants=variants,
    )
    if parts:
        found.parts, found.ceilings = _parts(making, plans[0], rule, shapes, seconds * PARTS, say)
    return found


@dataclass(frozen=True)
class _Plan:
    """A variant to be measured.

    Attributes:
        interface: where.
        synthesizer: a name or a module.
        form: of the decoupled module.
        base: row of backprop in this form.
    """

    interface: str
    synthesizer: nn.Module | str
    form: str
    base: str

    @property
    def label(self) -> str:
        """The synthesizer, in tables."""
        if isinstance(self.synthesizer, str):
            return self.synthesizer.replace("rank", "rank ")
        return type(self.synthesizer).__name__

    @property
    def name(self) -> str:
        return f"{self.interface}, {self.label}"

    @property
    def with_targets(self) -> str:
        return f"{self.name}, with targets"

    @property
    def without(self) -> str:
        return f"{self.name}, without targets"


@dataclass(frozen=True)
class _Making:
    """What every variant is made from."""

    module: nn.Module
    problem: Problem
    output: Tensor
    context_features: int
    backend: str | None

    @property
    def exact_head(self) -> bool:
        return self.problem.loss is not None

    def build(self, plan: _Plan, synthesizer: nn.Module | str | None, by: Rule) -> nn.Module:
        """Build the module in a variant's form, with a synthesizer or by backprop."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return forms.decouple(
                self.module,
                self.problem.sample,
                self.output,
                synthesizer=synthesizer,
                interface=plan.interface,
                context_features=self.context_features if synthesizer is not None else 0,
                update=by,
                exact_head=self.exact_head,
                backend=self.backend,
            ).train()

    def check(self, plan: _Plan) -> dict[str, Any]:
        """Check one variant."""
        with torch.random.fork_rng(devices=[]):
            return check_gate(
                self.module,
                self.output,
                self.problem,
                lambda synthesizer, by: self.build(plan, synthesizer, by),
                plan.synthesizer,
            )


def _plans(
    making: _Making,
    interface: str | Sequence[str],
    synthesizer: nn.Module | str | Sequence[str],
    rank: int | None,
) -> list[_Plan]:
    """Return every interface with every synthesizer; checked."""
    if interface == "all":
        interface = forms.distinct_interfaces(making.module, making.exact_head)
    if isinstance(synthesizer, str) and synthesizer == "all":
        synthesizer = forms.synthesizer_names(making.output)
    interfaces = [interface] if isinstance(interface, str) else list(interface)
    synthesizers: list[nn.Module | str]
    if isinstance(synthesizer, (str, nn.Module)):
        synthesizers = [synthesizer]
    else:
        synthesizers = list(synthesizer)
    for name, given in (("interface", interfaces), ("synthesizer", synthesizers)):
        if not given:
            raise ValueError(f"{name} must name at least one, got none")
    plans: list[_Plan] = []
    for where in dict.fromkeys(interfaces):
        form = forms.form_of(making.module, where, making.exact_head)
        for what in synthesizers:
            if isinstance(what, str):
                forms.check_name(what, making.output)
                if what == "default" and making.output.dim() != 4:
                    what = "dense" if rank == 0 else f"rank{rank or DEFAULT_RANK}"
            base = "fused"
            if plans and form != plans[0].form:
                base = f"fused, {form}"
            plan = _Plan(where, what, form, base)
            if plan not in plans:
                plans.append(plan)
    return plans


def _parts(
    making: _Making,
    plan: _Plan,
    rule: Rule,
    shapes: list[tuple[int, int, int]],
    seconds: float,
    say: Callable[[str, float], None],
) -> tuple[Parts, Ceilings]:
    """Return the parts of a step by backprop and by one variant, and the ceilings for their
    work."""
    ours = making.build(plan, plan.synthesizer, rule)
    spread(ours)
    found = measure_parts(
        copy.deepcopy(making.module),
        ours,
        making.problem,
        seconds=seconds,
        progress=lambda fraction: say("measuring parts", fraction),
    )
    ceilings = measure_ceilings(
        making.output.dtype,
        making.output.device,
        shapes,
        max(work.bytes for work in found.work.values()),
        progress=lambda fraction: say("measuring ceilings", fraction),
    )
    return found, ceilings


def title_of(module: nn.Module, sample: Tensor) -> str:
    return f"{type(module).__name__} on {'x'.join(str(n) for n in sample.shape)}"


def facts_of(
    sample: Tensor, update: Rule, synthesizer: Any, context_features: int, backend: str | None
) -> dict[str, Any]:
    return {
        **facts(device=sample.device),
        "dtype": str(sample.dtype).removeprefix("torch."),
        "sample": list(sample.shape),
        "update": repr(update),
        "synthesizer": synthesizer if isinstance(synthesizer, str) else repr(synthesizer),
        "context_features": context_features,
        "backend": backend,
    }
