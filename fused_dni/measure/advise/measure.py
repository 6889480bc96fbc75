"""What is timed: blocks alone in all forms that a plan may need, and whole steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fused_dni.measure import timing
from fused_dni.measure.advise import forms
from fused_dni.measure.advise.alone import Alone, backward_of_nothing, held, optimizer_of_nothing
from fused_dni.measure.advise.blocks import Block
from fused_dni.measure.advise.choose import everywhere_first
from fused_dni.measure.advise.forms import Making, interfaces
from fused_dni.measure.advise.predict import BACKWARD, OPTIMIZER, Blocks, Form, Plan, memory, needed
from fused_dni.measure.timing import Timing
from fused_dni.measure.verdict.candidates import Problem, our_step, spread, stock_step
from fused_dni.measure.verdict.gate import check_gate
from fused_dni.report.kinds.advice import STOCK
from fused_dni.rules import Rule


@dataclass(frozen=True)
class Subject:
    """What advice is given on.

    Attributes:
        model: a copy in training mode.
        blocks: of it.
        problem: sample, loss, labels and rule, as the verdict's candidates take them.
        how: how blocks are made.
    """

    model: nn.Module
    blocks: list[Block]
    problem: Problem
    how: Making

    def alone(self, index: int, form: Form) -> Alone:
        """Return a block alone in one form."""
        block = self.blocks[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            module = forms.alone(block, form.interface, self.how if form.ours else None).train()
        spread(module)
        context = self.problem.context if form.interface is not None else None
        return Alone(block, module, form.asks, form.target, self.how.rule, context)

    def whole(self, plan: Plan, target_every: int | None) -> Callable[[], None]:
        """Return a training step of the whole model by a plan, targets on every so manieth."""
        kept = not any(block.ours for block in self.blocks) and not plan.interfaces
        if not plan.ours or kept:
            return stock_step(copy.deepcopy(self.model), self.problem)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = forms.converted(self.model, self.blocks, plan.interfaces, self.how)
        spread(model)
        return our_step(model, self.problem, target_every)


def check(subject: Subject) -> dict[str, Any] | None:
    """Check that the converted model makes the step of stock backprop, before anything is timed:
    with exact gradients, and with interfaces everywhere while they warm up.

    Returns:
        What was checked, with the deviations found; None for a model in which nothing runs on our
        kernels, whose blocks are the stock ones.

    Raises:
        GateError: a step differs.
    """
    if not any(block.ours for block in subject.blocks):
        return None

    def build(interfaces: Any, rule: Rule) -> nn.Module:
        how = replace(subject.how, rule=rule)
        return forms.converted(subject.model, subject.blocks, interfaces or {}, how)

    cut = everywhere_first(subject.blocks, 1).interfaces
    return check_gate(subject.model, subject.blocks[-1].output, subject.problem, build, cut)


def possible(blocks: Sequence[Block]) -> dict[tuple[int, Form], None]:
    """Return every form that a block may take in some plan, in order."""
    found = needed(blocks, [Plan(ours=False), Plan()])
    for i, block in enumerate(blocks):
        kinds = interfaces(block)
        # Below an interface, and above one, on steps without targets.
        for asks in dict.fromkeys((block.asks, False)):
            ours = block.ours
            found[i, Form(ours, None, False, asks)] = None
            for kind in kinds:
                found[i, Form(True, kind, False, asks)] = None
        for kind in kinds:
            found[i, Form(True, kind, True, block.asks)] = None
    return found


def measure_blocks(
    subject: Subject, seconds: float, progress: Callable[[float], None]
) -> tuple[Blocks, Timing]:
    """Time all blocks alone in every form, and the whole stock step, interleaved.

    Before each run of a block, untimed, the whole stock step runs: a block is to find caches and
    allocator as the rest of a model leaves them. Run again and again alone it is too fast, by up to
    a fifth for a convolutional net.

    Returns:
        What was measured of blocks, and the stock step's time in the same run.
    """
    blocks = subject.blocks
    names: dict[tuple[int, Form], str] = {}
    between = subject.whole(Plan(ours=False), None)
    alone: dict[str, Callable[[object], object]] = {}
    first: dict[object, int] = {}
    for i, form in possible(blocks):
        alike = first.setdefault(blocks[i].signature(), i)
        name = names[i, form] = f"{blocks[alike].name}: {form}"
        if name not in alone:
            alone[name] = subject.alone(i, form).step
    parameter = next(p for p in subject.model.parameters() if p.requires_grad)
    alone[BACKWARD] = backward_of_nothing()
    alone[OPTIMIZER] = optimizer_of_nothing(subject.how.rule, parameter)
    steps: dict[str, timing.Candidate] = {
        name: timing.Staged(between, step) for name, step in alone.items()
    }
    steps[STOCK] = subject.whole(Plan(ours=False), None)
    times = timing.compare(
        steps,
        seconds=seconds,
        block=1,  # rounds are what is paired, and each sample costs a whole step beside its own
        device=subject.problem.sample.device,
        progress=progress,
    )
    return Blocks(blocks, times, names), times[STOCK]


def measure_plans(
    subject: Subject,
    plans: Mapping[str, Plan],
    seconds: float,
    progress: Callable[[float], None],
) -> dict[str, Timing]:
    """Time whole steps, interleaved: the mean step of each plan's cycle."""
    steps: dict[str, Callable[[], object]] = {}
    for name, plan in plans.items():
        steps[name] = _repeated(subject.whole(plan, plan.k), plan.cycle)
    times = timing.compare(
        steps, seconds=seconds, device=subject.problem.sample.device, progress=progress
    )
    return {
        name: timing.combine(name, [(1.0 / plan.cycle, times[name])])
        for name, plan in plans.items()
    }


def _repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    def cycle() -> None:
        for _ in range(times):
            step()

    return cycle


def measure_memory(
    subject: Subject, plans: Mapping[str, Plan], progress: Callable[[float], None]
) -> dict[str, tuple[int, int]]:
    """Peak bytes of a step of each plan: predicted from the blocks', and measured."""
    device = subject.problem.sample.device
    wanted = needed(subject.blocks, list(plans.values()))
    kept: dict[object, tuple[int, int]] = {}
    holds: dict[tuple[int, Form], int] = {}
    peaks: dict[tuple[int, Form], int] = {}
    for done, (i, form) in enumerate(wanted):
        key = (subject.blocks[i].signature(), form)
        if key not in kept:
            block = subject.alone(i, form)
            block.step()
            kept[key] = held(block.forward, device), timing.peak_memory(block.step, device)
        holds[i, form], peaks[i, form] = kept[key]
        progress((done + 1) / (len(wanted) + 1))
    found = {}
    for name, plan in plans.items():
        kinds = [1 if target else None for target, _ in plan.steps()]
        measured = [timing.peak_memory(subject.whole(plan, k), device) for k in kinds]
        found[name] = memory(subject.blocks, plan, holds, peaks), max(measured)
    progress(1.0)
    return found
