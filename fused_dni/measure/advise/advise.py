"""Where to put interfaces into a whole model: predicted from its blocks, then measured.

:func:`advise` times every block of a model alone (stock, on our kernels with the exact gradient,
and behind each kind of interface), sums the times to predicted steps, and proposes the interfaces
and the k that make the predicted step faster than backprop on the same kernels; often there are
none. Then it converts copies of the model and measures what it predicted:

====================  ============================================================================
``stock backprop``    the model as it is, eager, with ``torch.optim``'s ``fused=True`` optimizer
``our kernels``       backprop on our kernels where a block has such a form, else stock
``proposal``          the proposed interfaces, over a cycle of k steps; only if there are any
``everywhere``        an interface behind every block that can have one, k = 4: so that the
                      prediction is tested too where the advice is to keep backprop
====================  ============================================================================

Both runs contain the stock step. The second one's time over the first one's is the machine's drift
between them, and predictions are multiplied by it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_dni.measure import timing
from fused_dni.measure.advise.blocks import Block, Loss, survey, tensors
from fused_dni.measure.advise.choose import best_by_k, choose, everywhere
from fused_dni.measure.advise.errors import AdviceError
from fused_dni.measure.advise.forms import Making, interfaces
from fused_dni.measure.advise.measure import (
    Subject,
    check,
    measure_blocks,
    measure_memory,
    measure_plans,
    possible,
)
from fused_dni.measure.advise.predict import ASSUMPTIONS, Blocks, Form, Plan
from fused_dni.measure.advise.top import expensive_top
from fused_dni.measure.baseline import facts
from fused_dni.measure.options import ADVICE_SECONDS
from fused_dni.measure.timing import Timing
from fused_dni.measure.verdict.candidates import TIMING_RATE, Problem, at_rate, trying
from fused_dni.modules.base import DecoupledModule
from fused_dni.report.blocks import as_text
from fused_dni.report.files import as_json
from fused_dni.report.kinds.advice import EVERYWHERE, OURS, PROPOSAL, STOCK, sentence
from fused_dni.report.layout import blocks_of
from fused_dni.report.progress import teller
from fused_dni.report.schema import Result
from fused_dni.rules import SGD, Rule

#: Share of the budget for blocks; the rest is for whole steps.
_BLOCKS_SHARE = 0.6


@dataclass(frozen=True)
class Advice:
    """Result of :func:`advise`.

    Attributes:
        report: all of it, of kind ``advice``; see ``docs/advise.md``.
    """

    report: Result

    def to_json(self) -> str:
        """Write the report as JSON."""
        return as_json(self.report).rstrip()

    def sentence(self) -> str:
        """Say the advice in plain English."""
        return sentence(self.report)

    def table(self) -> str:
        """Write the report as text."""
        return as_text(blocks_of(self.report))


def advise(
    model: nn.Module,
    sample: Tensor,
    loss: Loss | None = None,
    *,
    update: Rule | None = None,
    classes: int = 0,
    all_blocks: bool = False,
    seconds: float = ADVICE_SECONDS,
    backend: str | None = None,
    title: str | None = None,
    command: str | None = None,
    progress: Callable[[str, float], None] | bool = False,
) -> Advice:
    """Propose where to put interfaces into a model, and measure how true the prediction was.

    Args:
        model: any module; see :mod:`fused_dni.measure.advise.blocks` for what counts as a block. It
            is not changed.
        sample: what it is called with, on its device.
        loss: from its output to a scalar; it closes over its targets. None: a fixed gradient
            arrives at the output.
        update: rule, by default ``SGD``. Its rate is replaced while timing.
        classes: condition the synthesizers on labels of so many classes, one for each of the
            sample's first dimension; they are drawn, since no time depends on them.
        all_blocks: propose an interface behind every block that can have one, whether or not they
            pay.
        seconds: budget of all timed rounds together; at least eight are made.
        backend: force a backend of our kernels.
        title: name in the report.
        command: how the report was made, for its facts.
        progress: called with what is being done and the fraction done; True for bars.

    Returns:
        An :class:`Advice`.

    Raises:
        GateError: the converted model's step differs from stock backprop's; nothing is reported.
        AdviceError: the model does not take the sample, has nothing to train, is decoupled
            already, or nothing in it can be converted.
        ValueError: an argument out of range.
    """
    timing.require_positive(seconds=seconds)
    if classes < 0:
        raise ValueError(f"classes must be at least 0, got {classes}")
    say = teller(progress)
    update = update or SGD()
    say("finding blocks", 0.0)
    with torch.random.fork_rng(devices=[]):
        subject = make_subject(model, sample, loss, at_rate(update, TIMING_RATE), classes, backend)
        gate = check(subject)
        say("finding blocks", 1.0)
        measured, stock_before = measure_blocks(
            subject, _BLOCKS_SHARE * seconds, lambda done: say("measuring blocks", done)
        )
        stock = timing.ratio(measured.step(STOCK, Plan(ours=False)), stock_before)
        ladder = best_by_k(measured)
        forced = everywhere(measured)
        proposed = forced if all_blocks else choose(measured, ladder, abs(stock.median - 1.0))
        plans = {STOCK: Plan(ours=False), OURS: Plan()}
        if proposed is not None:
            plans[PROPOSAL] = proposed
        if forced is not None and forced != proposed:
            plans[EVERYWHERE] = forced
        whole = measure_plans(
            subject, plans, (1 - _BLOCKS_SHARE) * seconds, lambda done: say("measuring steps", done)
        )
        held = measure_memory(subject, plans, lambda done: say("measuring memory", done))
    drift = whole[STOCK].median / stock_before.median
    body = {
        "blocks": [_block(subject, measured, i, proposed) for i in range(len(subject.blocks))],
        "asked for all": all_blocks,
        "proposal": None if proposed is None else _plan(subject.blocks, proposed),
        "everywhere": None if forced is None else _plan(subject.blocks, forced),
        "by k": [_rung(measured, plan) for plan in ladder],
        "expensive top": expensive_top(measured),
        "doubt": abs(stock.median - 1.0),
        "drift": drift,
        "steps": {
            name: _step(measured.step(name, plan), whole[name], held[name], drift)
            for name, plan in plans.items()
        },
        "ratios": _ratios(measured, plans, whole),
        "gate": gate,
        "assumptions": list(ASSUMPTIONS),
    }
    return Advice(Result(
        "advice",
        title=title or f"{type(model).__name__} on {'x'.join(map(str, sample.shape))}",
        facts={
            **facts(command, sample.device),
            "update": repr(update),
            "classes": classes,
            "backend": backend,
        },
        memory_is=timing.memory_is(sample.device),
        body=body,
    ))  # fmt: skip


def make_subject(
    model: nn.Module,
    sample: Tensor,
    loss: Loss | None,
    rule: Rule,
    classes: int,
    backend: str | None,
) -> Subject:
    """Check the arguments by running every block in every form once, and make what is measured."""
    if not isinstance(model, nn.Module):
        raise AdviceError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(sample, Tensor):
        raise AdviceError(f"sample must be a tensor, got {type(sample).__name__}")
    if not sample.dim() or not sample.numel():
        raise AdviceError(f"sample must be a batch, got shape {list(sample.shape)}")
    if loss is not None and not callable(loss):
        raise AdviceError(f"loss must be callable or None, got {type(loss).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise AdviceError("the model has no trainable parameters")
    if any(isinstance(part, DecoupledModule) for part in model.modules()):
        raise AdviceError("the model is decoupled already: take advice on the plain one")
    whole = copy.deepcopy(model).train()
    if not any(True for _ in whole.children()):
        whole = nn.Sequential(whole)
    found = survey(whole, sample, loss)
    if not any(block.ours or interfaces(block) for block in found):
        raise AdviceError(
            "nothing in the model can be converted: "
            + "; ".join(f"{b.name}: {b.why}" for b in found if b.parameters)
        )
    generator = torch.Generator().manual_seed(0)
    context = None
    if classes:
        context = torch.randint(classes, sample.shape[:1], generator=generator).to(sample.device)
    arriving = None
    if loss is None:
        output = found[-1].output
        arriving = torch.randn(output.shape, generator=generator).to(output) / output.shape[0]
    problem = Problem(sample, None, loss or _as_it_is, arriving, context, rule)
    subject = Subject(whole, found, problem, Making(rule, classes, backend))
    for i, form in possible(found):
        what = f"block {found[i].name} ({found[i].what}) does not run alone, {form}"
        with trying(AdviceError, what):
            subject.alone(i, form).step()
    return subject


def _as_it_is(output: Tensor) -> Tensor:
    return output


# ------------------------------------------------------------------------------------------ report


def _block(subject: Subject, measured: Blocks, index: int, plan: Plan | None) -> dict[str, Any]:
    """Return a block: what it is, its time in each form, what was chosen for it."""
    block = subject.blocks[index]
    stock = measured.time(index, Form(False, asks=block.asks))
    exact = measured.time(index, Form(block.ours, asks=block.asks))
    found = []
    for kind in interfaces(block):
        forms = {
            "with targets": Form(True, kind, True, block.asks),
            "without targets": Form(True, kind, False, False),
        }
        times = {name: measured.time(index, form) for name, form in forms.items()}
        found.append({
            **kind._asdict(),
            **times,
            "ratios": {name: timing.ratio(t, exact) for name, t in times.items()},
        })  # fmt: skip
    interface = None if plan is None else plan.interfaces.get(index)
    return {
        "name": block.name,
        "kind": block.kind,
        "what": block.what,
        "why not": block.why,
        "input": [list(t.shape) for t in tensors((block.args, block.named))],
        "output": list(block.output.shape),
        "parameters": block.parameters,
        "forward flops": block.flops,
        "calls": block.calls,
        "stock": stock,
        "exact": exact,
        "exact / stock": timing.ratio(exact, stock),
        "interfaces": found,
        "chosen": None if interface is None else interface._asdict(),
    }


def _plan(parts: Sequence[Block], plan: Plan) -> dict[str, Any]:
    return {
        "k": plan.k,
        "interfaces": [
            {"block": parts[i].name, **interface._asdict()}
            for i, interface in sorted(plan.interfaces.items())
        ],
    }


def _rung(measured: Blocks, plan: Plan) -> dict[str, Any]:
    """Return the best plan for one k, as predicted."""
    step = measured.step("by k", plan)
    return {
        **_plan(measured.blocks, plan),
        "predicted": step,
        "over ours": timing.ratio(step, measured.step(OURS, Plan())),
    }


def _step(
    predicted: Timing, measured: Timing, memory: tuple[int, int], drift: float
) -> dict[str, Any]:
    """Gather a whole step: predicted, measured, and the errors of the prediction in per cent."""
    made = timing.combine(predicted.name, [(drift, predicted)])
    return {
        "predicted": made,
        "measured": measured,
        "error %": 100.0 * (made.median / measured.median - 1.0),
        "memory": {
            "predicted": memory[0],
            "measured": memory[1],
            "error %": 100.0 * (memory[0] / memory[1] - 1.0) if memory[1] else None,
        },
    }


def _ratios(
    measured: Blocks, plans: dict[str, Plan], whole: dict[str, Timing]
) -> dict[str, dict[str, Any]]:
    """Each plan's time over stock backprop's and over backprop's on our kernels."""
    predicted = {name: measured.step(name, plan) for name, plan in plans.items()}
    return {
        base: {
            name: {
                "predicted": timing.ratio(predicted[name], predicted[base]),
                "measured": timing.ratio(whole[name], whole[base]),
            }
            for name in plans
            if name != base
        }
        for base in (STOCK, OURS)
    }
