"""Candidates must compute the same step before their times may be compared."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_dni.measure.verdict.candidates import Problem, learners, our_step, stock_step
from fused_dni.measure.verdict.errors import GateError
from fused_dni.rules import SGD, Rule


def check_gate(
    module: nn.Module,
    output: Tensor,
    problem: Problem,
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
    stock_step(stock, probe)()
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
        learning = {id(p) for _, s in learners(ours) for p in s.parameters()}
        found = [p.detach() for p in fd.revert(ours).parameters() if id(p) not in learning]
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
    our_step(ours, probe, 1)()
    check("backprop on our kernels", ours)

    ours = build(synthesizer, rule)
    torch.manual_seed(0)
    our_step(ours, probe, 1, warmup_steps=1)()
    check("a decoupled step on true gradients (warm-up)", ours)

    if isinstance(synthesizer, str):  # made here, so it starts at zero
        ours = build(synthesizer, rule)
        kept = {
            id(p): p.detach().clone()
            for m, _ in learners(ours)
            for p in m.local_parameters()
            if p is not None
        }
        pupils = [(p, p.detach().clone()) for _, s in learners(ours) for p in s.parameters()]
        torch.manual_seed(0)
        our_step(ours, probe, 1)()
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
