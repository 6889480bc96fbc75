"""A block's share of a training step, run alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fused_dni.context import condition_on
from fused_dni.measure import timing
from fused_dni.measure.advise.blocks import Block, detached, tensors
from fused_dni.measure.baseline import stock_optimizer
from fused_dni.modules.base import DecoupledModule, Phase
from fused_dni.optim import ordinary_parameters
from fused_dni.rules import Rule


class Alone:
    """Forward, backward and update of one block, from the inputs that it had in the model.

    A fixed gradient arrives at its output. An LSTM that was given a state goes on from its own.

    Args:
        block: what was recorded.
        module: one of its forms (:mod:`fused_dni.measure.advise.forms`).
        asks: whether its input asks for a gradient.
        target: whether synthesizers are trained in this step.
        rule: by which what no rule of ours updates is updated, by ``torch.optim``.
        context: labels that synthesizers are conditioned on, or None.
    """

    def __init__(
        self,
        block: Block,
        module: nn.Module,
        asks: bool,
        target: bool,
        rule: Rule,
        context: Tensor | None,
    ) -> None:
        self._module = module
        self._args, self._named = detached(block.args), detached(block.named)
        self._asked = [t for t in tensors((self._args, self._named)) if t.requires_grad]
        for t in self._asked:
            t.requires_grad_(asks)
        self._streams = block.kind == "lstm" and next(tensors(block.args[1:]), None) is not None
        self._context = context
        self._arriving: Tensor | None = None
        if block.kind != "loss":
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(block.output.shape, generator=generator) / block.output.shape[0]
            self._arriving = noise.to(block.output)
        for part in module.modules():
            if isinstance(part, DecoupledModule):
                part.phase = Phase(target=target)
        ordinary = [p for p in ordinary_parameters(module) if p.requires_grad]
        self._optimizer = stock_optimizer(nn.ParameterList(ordinary), rule) if ordinary else None

    def forward(self) -> Tensor:
        """Run the block; its output (an LSTM's without the state)."""
        with nullcontext() if self._context is None else condition_on(self._context):
            made = self._module(*self._args, **self._named)
        if self._streams:
            h, c = made[1]
            self._args = (self._args[0], (h.detach(), c.detach()), *self._args[2:])
        return next(tensors(made))

    def step(self, _: object = None) -> None:
        """Run the block's share of a training step."""
        for t in self._asked:
            t.grad = None
        if self._optimizer is not None:
            self._optimizer.zero_grad()
        h = self.forward()
        if h.requires_grad:
            h.backward(self._arriving)
        if self._optimizer is not None:
            self._optimizer.step()


def backward_of_nothing() -> Callable[[object], None]:
    """Say what every backward costs, whatever is in it."""
    x = torch.zeros(1, requires_grad=True)
    gradient = torch.ones(1)

    def step(_: object = None) -> None:
        x.grad = None
        x.view_as(x).backward(gradient)

    return step


def optimizer_of_nothing(rule: Rule, like: Tensor) -> Callable[[object], None]:
    """Say what every step of an optimizer costs, whatever it updates."""
    p = nn.Parameter(like.new_zeros(1))
    gradient = torch.ones_like(p)
    optimizer = stock_optimizer(nn.ParameterList([p]), rule)

    def step(_: object = None) -> None:
        optimizer.zero_grad()
        p.grad = gradient
        optimizer.step()

    return step


def held(forward: Callable[[], object], device: torch.device) -> int:
    """Bytes that a forward leaves behind for its backward, its output among them.

    As :func:`fused_dni.measure.timing.peak_memory` counts them, of a second forward, while the
    first one's are still held.
    """
    kept: list[Any] = [forward()]
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        kept.append(forward())
        torch.cuda.synchronize()
        return int(torch.cuda.memory_allocated() - before)

    return sum(size for _, size in timing.allocations(lambda: kept.append(forward())))
