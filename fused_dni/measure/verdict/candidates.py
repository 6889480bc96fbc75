"""The steps that are compared: stock backprop, compiled, and ours, from the same weights."""

from __future__ import annotations

import copy
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_dni.context import condition_on
from fused_dni.measure import timing
from fused_dni.measure.baseline import stock_optimizer
from fused_dni.measure.verdict.errors import VerdictError
from fused_dni.modules.base import DecoupledModule
from fused_dni.modules.recurrent import Recurrent
from fused_dni.report import text
from fused_dni.rules import Rule

#: Rate at which candidates are timed: they must stay where they are, and speed does not depend on
#: it. Not zero, which a kernel could take as an excuse.
TIMING_RATE = 1e-6
#: What a user's modules and functions may raise when they are tried.
RAISED = (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError)


Loss = Callable[[Tensor], Tensor]


@dataclass
class Problem:
    """What all candidates are given."""

    sample: Tensor
    target: Tensor | None  # class indices, for conditioning
    loss: Loss | None  # None: a fixed gradient arrives, as inside a network
    arriving: Tensor | None
    context: Tensor | None
    rule: Rule


def at_rate(rule: Rule, lr: float) -> Rule:
    """Return the same rule at another rate."""
    return type(rule)(**{**rule.defaults(), "lr": lr})


def check_sample(sample: Any) -> None:
    """Refuse what is no tensor of floating-point numbers.

    Raises:
        VerdictError: it is none.
    """
    if not isinstance(sample, Tensor) or not sample.is_floating_point():
        got = sample.dtype if isinstance(sample, Tensor) else type(sample).__name__
        raise VerdictError(f"sample must be a floating-point tensor, got {got}")


def make_problem(
    module: nn.Module,
    sample: Tensor,
    target: Tensor | Loss | None,
    context_features: int,
    rule: Rule,
) -> tuple[Problem, Tensor, nn.Module]:
    """Check the arguments by a trial forward and make what all candidates are given."""
    if not isinstance(module, nn.Module):
        raise VerdictError(f"module must be an nn.Module, got {type(module).__name__}")
    check_sample(sample)
    if not any(p.requires_grad for p in module.parameters()):
        raise VerdictError("the module has no trainable parameters")
    module = copy.deepcopy(module).train()
    what = f"the module does not take a sample of shape {list(sample.shape)}"
    with trying(VerdictError, what), torch.no_grad():
        output = copy.deepcopy(module)(sample)
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
    return Problem(sample, labels, loss, arriving, context, rule), output, module


class Step:
    """A training step: called whole, or phase by phase.

    ``forward`` returns the output (or the loss), ``backward`` takes it, ``finish`` is the
    optimizer's turn and leaves no gradients behind.
    """

    x: Tensor
    arriving: Tensor | None
    run: Callable[[Tensor], Tensor]

    def forward(self, _: object = None) -> Tensor:
        """Run the module, and the loss if there is one."""
        return self.run(self.x)

    def backward(self, out: Tensor) -> None:
        """From the loss, or from the gradient that arrives."""
        if out.requires_grad:
            out.backward(self.arriving)

    def finish(self, _: object = None) -> None:
        """Run the optimizer."""
        raise NotImplementedError

    def __call__(self) -> None:
        self.backward(self.forward())
        self.finish()


class _StockStep(Step):
    def __init__(
        self, module: nn.Module, problem: Problem, run: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.x, self.arriving = input_of(problem), problem.arriving
        self.run = run or forward_of(module, problem)
        self.optimizer = stock_optimizer(module, problem.rule)

    def finish(self, _: object = None) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.x.grad = None


def input_of(problem: Problem) -> Tensor:
    """Return the sample; inside a network (no loss given) its producer asks for a gradient."""
    x = problem.sample.detach().clone()
    return x.requires_grad_() if problem.loss is None else x


def forward_of(module: nn.Module, problem: Problem) -> Callable[[Tensor], Tensor]:
    loss = problem.loss
    if loss is None:
        return module

    def forward(x: Tensor) -> Tensor:
        return loss(module(x))

    return forward


class _OurStep(Step):
    def __init__(
        self, module: nn.Module, problem: Problem, target_every: int | None, warmup_steps: int
    ) -> None:
        import fused_dni as fd

        self.x, self.arriving = input_of(problem), problem.arriving
        if target_every is None:
            self.x = self.x.detach()
        self.run = forward_of(module, problem)
        self.context = problem.context
        self.optimizer = fd.FusedOptimizer(module)
        self.others = _ordinary(list(fd.ordinary_parameters(module)), problem.rule)
        self.schedule = fd.Schedule(module, target_every=target_every, warmup_steps=warmup_steps)

    def forward(self, _: object = None) -> Tensor:
        if self.context is None:
            return self.run(self.x)
        with condition_on(self.context):
            return self.run(self.x)

    def finish(self, _: object = None) -> None:
        self.optimizer.step()
        if self.others is not None:
            self.others.step()
            self.others.zero_grad()
        self.x.grad = None
        self.schedule.step()


def stock_step(
    module: nn.Module, problem: Problem, run: Callable[[Tensor], Tensor] | None = None
) -> Step:
    """Return a step of stock backprop: eager, or with ``run`` (a compiled forward and loss)."""
    return _StockStep(module, problem, run)


def our_step(
    module: nn.Module, problem: Problem, target_every: int | None, warmup_steps: int = 0
) -> Step:
    """Return a training step on decoupled layers, with what a user's loop has in it.

    On a model's steps without any targets (``target_every=None``) nothing below it asks for a
    gradient.
    """
    return _OurStep(module, problem, target_every, warmup_steps)


def _ordinary(parameters: Sequence[nn.Parameter], rule: Rule) -> torch.optim.Optimizer | None:
    return stock_optimizer(nn.ParameterList(parameters), rule) if parameters else None


def compiled_step(
    module: nn.Module, problem: Problem, limit: float
) -> tuple[Callable[[], None] | None, float | None, str]:
    """Return the compiled candidate, how long compiling took, and if it failed, why."""
    start = time.perf_counter()
    try:
        with timing._quiet_stderr(), deadline(limit):
            step = stock_step(module, problem, torch.compile(forward_of(module, problem)))
            step()
            step()
    except Expired:
        return None, None, f"compiling took more than {limit:g} s"
    except Exception as error:  # whatever a compiler may raise, the verdict goes on without it
        return None, None, first_line(error)
    return step, time.perf_counter() - start, ""


class Expired(BaseException):
    """Time is up. Not an ``Exception``: compilers catch those and go on."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise :class:`Expired` inside the block after so many seconds; in the main thread of a
    system with interval timers, elsewhere never."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise Expired

    before = signal.signal(signal.SIGALRM, ring)
    # Again and again, should one be lost in a callback that cannot raise.
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def learners(model: nn.Module) -> list[tuple[DecoupledModule, nn.Module]]:
    """Return the decoupled modules that have a synthesizer, with it."""
    modules = [m for m in model.modules() if isinstance(m, DecoupledModule)]
    return [(m, m.synthesizer) for m in modules if m.synthesizer is not None]


def spread(module: nn.Module) -> None:
    """Give synthesizers, which start at zero, small numbers, so that what is timed is ordinary."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, synthesizer in learners(module):
            for p in synthesizer.parameters():
                noise = torch.randn(p.shape, generator=generator) * 0.01
                p.add_(noise.to(device=p.device, dtype=p.dtype))


def linear_shapes(module: nn.Module, sample: Tensor) -> list[tuple[int, int, int]]:
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


@contextmanager
def trying(kind: type[Exception], what: str) -> Iterator[None]:
    """Say ``what`` of a user's module or function does not run, and why, by an error of a kind."""
    try:
        yield
    except RAISED as error:
        raise kind(f"{what}: {text.raised(error)}") from error


def first_line(error: BaseException) -> str:
    """First line of a message, which is never empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
