"""What a user's stages take, measured one by one on this machine.

The parts of a stage are timed side by side (:mod:`fused_dni.measure.timing`): forward, backward,
backward for the input alone, optimizer; and of all but the last, which has the loss, a DNI step
with and without a target, and a lesson, as in :mod:`fused_dni.measure.verdict.top_steps`.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fused_dni.measure import timing
from fused_dni.measure.baseline import stock_optimizer
from fused_dni.measure.options import STAGE_SECONDS
from fused_dni.measure.simulate_settings import TIMES_MINIMUM, Times
from fused_dni.measure.timing import Candidate, Staged
from fused_dni.measure.verdict.candidates import TIMING_RATE, at_rate, spread
from fused_dni.measure.verdict.top_steps import Loop, make_subject
from fused_dni.report import text
from fused_dni.rules import Adam, Rule

#: What a user's modules and functions may raise when they are tried.
_RAISED = (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError)


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        times: of every stage.
        rows: of the batch that they were measured with.
        forward_bytes, backward_bytes: of the tensors between stages, on the average.
        parameter_bytes: of what learns of a stage, on the average.
        what: where the stages are from.
        frozen_top: whether the last stage has nothing to train.
        timings: by stage and part.
    """

    times: Times
    rows: int
    forward_bytes: float
    backward_bytes: float
    parameter_bytes: float
    what: str
    frozen_top: bool
    timings: list[dict[str, timing.Timing]]

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the times, which are among the settings."""
        return {p.name: getattr(self, p.name) for p in fields(self) if p.name != "times"}


def calibrate(
    made: Any,
    where: str,
    *,
    seconds: float = STAGE_SECONDS,
    update: Rule | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Calibration:
    """Measure stages.

    Args:
        made: ``(stages, batch, loss)``: modules of which each reads the one tensor that its
            predecessor returns, the last one the predecessor of the loss; ``batch()`` returns
            ``(x, target)``, ``loss(output, target)`` a scalar. Stages are copied.
        where: how to call it in errors and reports.
        seconds: budget of each stage.
        update: rule, by default ``Adam``, of ``torch.optim``.
        progress: called with the fraction done.

    Returns:
        A :class:`Calibration`. ``local`` is forward, backward for the stage's own parameters and
        optimizer: the loss of the stage's own is not in it. The step of DNI uses the synthesizer
        that ``fused-dni verdict top`` takes without a context.

    Raises:
        ValueError: ``made`` is not that, or a stage does not fit its predecessor.
    """
    stages, batch, loss = _parts(made, where)
    if not 0.0 < seconds < float("inf"):
        raise ValueError(f"seconds must be positive and finite, got {seconds!r}")
    try:
        x, target = batch()
    except _RAISED as error:
        raise ValueError(
            f"batch() of {where} fails, or is no pair: {text.raised(error)}"
        ) from error
    if not isinstance(x, Tensor) or not x.dim() or not x.numel():
        raise ValueError(f"batch() of {where} must return a tensor and a target")
    rule = at_rate(update or Adam(), TIMING_RATE)
    rows = x.shape[0]
    found: list[dict[str, timing.Timing]] = []
    messages: list[int] = []
    for i, given in enumerate(stages):
        last = i == len(stages) - 1
        stage = copy.deepcopy(given).train()

        def above(h: Tensor) -> Tensor:
            return loss(h, target)  # type: ignore[no-any-return]

        learns = any(p.requires_grad for p in stage.parameters())
        try:
            h = stage(x if learns else x.detach().requires_grad_())
            if last:
                above(h)
        except _RAISED as error:
            raise ValueError(f"stage {i} of {where} fails: {text.raised(error)}") from error
        if not isinstance(h, Tensor) or not h.requires_grad:
            raise ValueError(
                f"stage {i} of {where} must return one tensor that its parameters (of a frozen one "
                f"its input) have a part in, got {type(h).__name__}"
            )
        candidates = _backprop(stage, x, rule, i == 0, above if last else None)
        if not last:
            candidates |= _decoupled(stage, x, rule)
            messages.append(h.numel() * h.element_size())

        def tell(fraction: float, i: int = i) -> None:
            progress((i + fraction) / len(stages))

        found.append(timing.compare(candidates, seconds=seconds, device=x.device, progress=tell))
        x = h.detach()
    between = statistics.fmean(messages) if messages else 0.0
    return Calibration(
        times=_times(found),
        rows=rows,
        forward_bytes=between,
        backward_bytes=between,
        parameter_bytes=statistics.fmean(
            sum(p.numel() * p.element_size() for p in stage.parameters() if p.requires_grad)
            for stage in stages
        ),
        what=where,
        frozen_top=not learns,
        timings=found,
    )


def _parts(
    made: Any, where: str
) -> tuple[list[nn.Module], Callable[[], Any], Callable[[Any, Any], Any]]:
    if not isinstance(made, tuple) or len(made) != 3:
        got = type(made).__name__
        if isinstance(made, tuple):
            got = "(" + ", ".join(type(part).__name__ for part in made) + ")"
        raise ValueError(f"{where} must return (stages, batch, loss), got {got}")
    stages, batch, loss = made
    listed = isinstance(stages, (Sequence, nn.Sequential, nn.ModuleList))
    if not listed or not len(stages) or not all(isinstance(s, nn.Module) for s in stages):
        raise ValueError(f"stages of {where} must be a list of modules, got {stages!r:.100}")
    for i, stage in enumerate(stages):
        last = i and i == len(stages) - 1
        if not last and not any(p.requires_grad for p in stage.parameters()):
            raise ValueError(
                f"stage {i} of {where} has no trainable parameters, which the last of several "
                "alone may lack: make it a part of a neighbour, or, at the bottom, of batch()"
            )
    if not callable(batch) or not callable(loss):
        raise ValueError(f"batch and loss of {where} must be functions")
    return list(stages), batch, loss


def _backprop(
    stage: nn.Module,
    x: Tensor,
    rule: Rule,
    lowest: bool,
    loss: Callable[[Tensor], Tensor] | None,
) -> dict[str, Candidate]:
    """Return the parts of a step by backprop; ``loss`` of the topmost stage."""
    learns = any(p.requires_grad for p in stage.parameters())
    optimizer = stock_optimizer(stage, rule) if learns else None
    asking = x if lowest else x.detach().requires_grad_()
    finish = loss or (lambda h: h)
    arriving = None
    if loss is None:
        arriving = torch.randn_like(stage(x)) / x.shape[0]

    def forward(given: Tensor) -> Tensor:
        if optimizer is not None:
            optimizer.zero_grad()
        return finish(stage(given))

    def backward(h: Tensor) -> None:
        h.backward(arriving)
        asking.grad = None

    candidates: dict[str, Candidate] = {
        "forward": lambda: forward(asking),
        "backward": Staged(lambda: forward(asking), backward),
    }
    if optimizer is None:  # all of the backward is for the input
        return candidates
    candidates["own"] = Staged(lambda: forward(x), backward)
    candidates["optimizer"] = _stepping(optimizer, lambda: backward(forward(x)))
    if not lowest:
        candidates["input"] = Staged(
            lambda: forward(asking), lambda h: torch.autograd.grad(h, asking, arriving)
        )
    return candidates


def _stepping(optimizer: torch.optim.Optimizer, prepare: Callable[[], None]) -> Staged:
    return Staged(prepare, lambda _: optimizer.step())


def _decoupled(stage: nn.Module, x: Tensor, rule: Rule) -> dict[str, Candidate]:
    """Steps by a predicted gradient, with and without the input's gradient, and a lesson."""
    subject = make_subject(stage, lambda h: h.square().mean(), (x.detach(),), "auto", rule)
    (name,) = subject.synthesizers

    def step(given: Tensor) -> Candidate:
        bottom, teacher = copy.deepcopy((stage, subject.synthesizers[name]))
        loop = Loop(bottom, subject.top, rule, teacher, every=None)
        spread(loop.bottom)

        def run() -> None:
            loop.step(given)
            given.grad = None

        return run

    candidates = {"dni": step(x.detach()), "lesson": subject.of_lesson(name)}
    if x.is_floating_point():
        candidates["dni with target"] = step(x.detach().requires_grad_())
    return candidates


def _times(found: Sequence[dict[str, timing.Timing]]) -> Times:
    def median(parts: dict[str, timing.Timing], name: str) -> float:
        return max(parts[name].median, TIMES_MINIMUM)

    def more(parts: dict[str, timing.Timing], whole: str, part: str) -> float:
        if whole not in parts or part not in parts:
            return 0.0
        pair = [(1.0, parts[whole]), (-1.0, parts[part])]
        return max(timing.combine("difference", pair).median, 0.0)

    def of_weights(parts: dict[str, timing.Timing], backward: float) -> float:
        if "own" not in parts:  # frozen: there is none
            return TIMES_MINIMUM
        if "input" not in parts:  # of the lowest stage nobody waits: half is as good as any
            return 0.5 * backward
        return min(max(more(parts, "backward", "input"), 0.05 * backward), 0.95 * backward)

    forward = [median(parts, "forward") for parts in found]
    backward = [median(parts, "backward") for parts in found]
    own = [median(parts, "own") if "own" in parts else 0.0 for parts in found]
    optimizer = [median(parts, "optimizer") if "optimizer" in parts else 0.0 for parts in found]
    local = [f + b + o for f, b, o in zip(forward, own, optimizer, strict=True)]
    return Times.of(
        forward,
        backward,
        weight=[of_weights(parts, b) for parts, b in zip(found, backward, strict=True)],
        optimizer=optimizer,
        # The topmost stage has the loss; its entry is not used.
        dni=[
            median(parts, "dni") if "dni" in parts else one
            for parts, one in zip(found, local, strict=True)
        ],
        target=[more(parts, "dni with target", "dni") for parts in found],
        lesson=[parts["lesson"].median if "lesson" in parts else 0.0 for parts in found],
        local=local,
    )
