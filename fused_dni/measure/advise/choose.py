"""Where interfaces pay, judged by the predicted step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fused_dni.measure import timing
from fused_dni.measure.advise.blocks import Block
from fused_dni.measure.advise.forms import Interface, interfaces
from fused_dni.measure.advise.predict import Blocks, Plan

#: The k that are tried, in this order.
LADDER = (1, 2, 4, 8, 16)
#: k of the plan with interfaces everywhere.
EVERYWHERE_K = 4


def best_by_k(measured: Blocks, ks: Sequence[int] = LADDER) -> list[Plan]:
    """Return the best plan for each k, perhaps one without interfaces.

    Blocks are gone through from the first one up, since a block above an interface has no gradient
    of its input to make. A block gets the interface that makes the predicted step shortest, if with
    it the step is measurably shorter than without.
    """
    found = []
    for k in ks:
        plan = Plan(k=k)
        for i, block in enumerate(measured.blocks):
            tried = [with_interface(plan, i, one) for one in interfaces(block)]
            if not tried:
                continue
            best = min(tried, key=lambda p: measured.step("tried", p).median)
            gain = timing.ratio(measured.step("with", best), measured.step("without", plan))
            if gain.verdict(margin=0.0) == "faster":
                plan = best
        found.append(plan)
    return found


def choose(measured: Blocks, plans: Sequence[Plan], doubt: float = 0.0) -> Plan | None:
    """Return the first plan whose predicted step is faster than backprop on our kernels; None if
    there is none.

    Args:
        doubt: share by which predictions were seen to miss; a gain below it counts as none.
    """
    exact = measured.step("exact", Plan())
    margin = max(timing.MARGIN, doubt)
    for plan in plans:
        gain = timing.ratio(measured.step("chosen", plan), exact)
        if plan.interfaces and gain.verdict(margin) == "faster":
            return plan
    return None


def everywhere(measured: Blocks, k: int = EVERYWHERE_K) -> Plan | None:
    """Return the plan with an interface behind every block that can have one, each with the
    synthesizer and at the place that make the predicted step shortest; None if no block can."""
    plan = everywhere_first(measured.blocks, k)
    for i in plan.interfaces:
        tried = [with_interface(plan, i, one) for one in interfaces(measured.blocks[i])]
        plan = min(tried, key=lambda p: measured.step("tried", p).median)
    return plan if plan.interfaces else None


def everywhere_first(blocks: Sequence[Block], k: int) -> Plan:
    """Return an interface behind every block that can have one, each of the first kind there is for
    it."""
    kinds = {i: interfaces(block) for i, block in enumerate(blocks)}
    return Plan(interfaces={i: found[0] for i, found in kinds.items() if found}, k=k)


def with_interface(plan: Plan, index: int, interface: Interface) -> Plan:
    """Return the same plan with an interface behind one more block, or another one there."""
    return replace(plan, interfaces={**plan.interfaces, index: interface})
