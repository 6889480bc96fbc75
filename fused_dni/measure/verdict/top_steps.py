"""A network that learns and the top above it: checked, copied, trained, and taken apart.

``b``, the step of what learns: forward, local backward, optimizer. ``τ``, forward and backward of
everything above, the loss and the optimizer of its own parameters included. ``s``, the prediction
with all that delivers it: what a step without the top takes more than b. ``m``, the synthesizer's
lesson, with its optimizer. A step of backprop takes b + τ, one of DNI with the top run on every
k-th step b + s + (τ + m)/k.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_dni.measure.baseline import stock_optimizer
from fused_dni.measure.timing import Candidate, Staged
from fused_dni.measure.verdict import forms
from fused_dni.measure.verdict.candidates import spread, trying
from fused_dni.measure.verdict.errors import VerdictError
from fused_dni.modules.base import DecoupledModule, Predicted
from fused_dni.modules.decoupled import Decoupled
from fused_dni.modules.local import backward_local
from fused_dni.report import text
from fused_dni.rules import Rule
from fused_dni.schedule import Schedule
from fused_dni.synthesizers import DifferenceSynthesizer, SoftmaxSynthesizer

#: From h and what else a batch holds to a scalar loss.
Top = Callable[..., Tensor]
#: From a number to (x, *rest): a batch, the same for the same number.
Batch = Callable[[int], Sequence[Any]]

#: Synthesizers for tops whose gradient is known in part.
TOP_NAMES = ("softmax", "difference")


class Given(NamedTuple):
    """What a factory returns."""

    bottom: nn.Module
    top: Top
    batch: Batch
    synthesizer: nn.Module | None = None


def given(made: Any, where: str) -> Given:
    """Check what a factory has returned.

    Raises:
        VerdictError: it is not (bottom, top, batch) or (bottom, top, batch, synthesizer).
    """
    parts = made if isinstance(made, tuple) else (made,)
    types = ", ".join(type(part).__name__ for part in parts)
    if len(parts) in (3, 4) and not callable(parts[2]):
        raise VerdictError(
            f"the batch of {where}, the third that it returns, must be a function: batch(number) "
            "returns (x, *rest), the same for the same number, below 0 for held-out data; got "
            f"{type(parts[2]).__name__}"
        )
    if len(parts) not in (3, 4):
        raise VerdictError(
            f"{where} must return (bottom, top, batch) or (bottom, top, batch, synthesizer), got "
            f"{f'({types})' if isinstance(made, tuple) else types}"
        )
    found = Given(*parts)
    if not isinstance(found.synthesizer, (nn.Module, type(None))):
        raise VerdictError(
            f"the synthesizer of {where} must be an nn.Module, got {type(made[3]).__name__}"
        )
    return found


def drawn(batch: Batch, number: int) -> Sequence[Any]:
    """Draw a batch.

    Raises:
        VerdictError: the function fails.
    """
    try:
        return batch(number)
    except Exception as error:  # whatever a user's code may raise
        raise VerdictError(f"batch({number}) failed: {text.raised(error)}") from error


class Loop:
    """A bottom and a top in training, by backprop or behind an interface; both are trained.

    Args:
        bottom: what learns.
        top: the loss is ``top(bottom(x), *rest)``.
        rule: by which everything is updated, by ``torch.optim``.
        synthesizer: None for backprop.
        every: the top is run on every so-manieth step, None for never.
        warmup: steps of plain backprop before that.
    """

    def __init__(
        self,
        bottom: nn.Module,
        top: Top,
        rule: Rule,
        synthesizer: nn.Module | None = None,
        every: int | None = 1,
        warmup: int = 0,
    ) -> None:
        self.bottom, self.top = bottom, top
        self.schedule: Schedule | None = None
        self.conditioned = False
        if synthesizer is not None:
            self.bottom = Decoupled(bottom, synthesizer)
            # A step that has paid for the true gradient uses it.
            self.schedule = Schedule(self.bottom, warmup, every, mix=1.0)
            self.conditioned = getattr(synthesizer, "context_features", None) != 0
        self.optimizer = stock_optimizer(self.bottom, rule)
        own = {id(p) for p in self.bottom.parameters()}
        above = [p for p in trained(top) if id(p) not in own]
        self.above = stock_optimizer(nn.ParameterList(above), rule) if above else None

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """Compute the bottom's output; what comes first behind x is what predictions see, too."""
        if self.conditioned and rest:
            return self.bottom(x, context=rest[0])  # type: ignore[no-any-return]
        return self.bottom(x)  # type: ignore[no-any-return]

    def step(self, x: Tensor, *rest: Any) -> None:
        """Run a training step; without targets the top is not run."""
        self.zero_grad()
        h = self.forward(x, *rest)
        if self.schedule is None or self.schedule.target:
            self.top(h, *rest).backward()
        else:
            backward_local(h)
        self.optimizer.step()
        if self.above is not None:
            self.above.step()
        if self.schedule is not None:
            self.schedule.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.optimizer.zero_grad()
        if self.above is not None:
            self.above.zero_grad()


def trained(top: Top) -> list[nn.Parameter]:
    """Return the parameters of a top that are trained; a function has none."""
    parameters = top.parameters() if isinstance(top, nn.Module) else ()
    return [p for p in parameters if p.requires_grad]


def behind(top: Any) -> list[nn.Module]:
    """Return the modules that a top refers to: itself, or those of a function's closure and
    globals, of its object, and of the functions that it refers to."""
    found: list[nn.Module] = []
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                visit(part)
        elif inspect.ismethod(value):
            for part in (value.__func__, value.__self__, *vars(value.__self__).values()):
                visit(part)
        elif inspect.isfunction(value):
            names = inspect.getclosurevars(value)
            for part in (*names.nonlocals.values(), *names.globals.values()):
                visit(part)
        elif value is top and hasattr(value, "__dict__"):
            for part in vars(value).values():
                visit(part)

    visit(top)
    return found


@contextmanager
def unchanged(top: Top, device: torch.device) -> Iterator[None]:
    """Put back the random numbers, and the buffers of what a function refers to, which cannot be
    copied."""
    buffers = [] if isinstance(top, nn.Module) else [b for m in behind(top) for b in m.buffers()]
    kept = [b.clone() for b in buffers]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, was in zip(buffers, kept, strict=True):
                    buffer.copy_(was)


@dataclass
class Subject:
    """What a verdict is given on: copies of what the user gave.

    Attributes:
        bottom, top: modules are copied, functions are not.
        x, rest: a batch.
        h: the bottom's output.
        synthesizers: by name, from zero.
        rule: by which everything is updated.
        notes: what the reader should know.
    """

    bottom: nn.Module
    top: Top
    x: Tensor
    rest: tuple[Any, ...]
    h: Tensor
    synthesizers: dict[str, nn.Module]
    rule: Rule
    notes: list[str]

    def loop(self, synthesizer: str | None = None, every: int | None = 1, warmup: int = 0) -> Loop:
        """Return a training on its own copies, by backprop or behind one of the synthesizers. What
        is frozen is shared."""
        shared: dict[int, Any] = {}
        if isinstance(self.top, nn.Module) and not trained(self.top):
            shared = {id(module): module for module in self.top.modules()}
        teacher = None if synthesizer is None else self.synthesizers[synthesizer]
        bottom, top, teacher = copy.deepcopy((self.bottom, self.top, teacher), shared)
        return Loop(bottom, top, self.rule, teacher, every, warmup)

    def steps(self, synthesizer: str | None = None, every: int | None = 1) -> Candidate:
        """Return a cycle of training steps: as many as lie between two runs of the top."""
        loop, count = self._spread(synthesizer, every), every or 1

        def run() -> None:
            for _ in range(count):
                loop.step(self.x, *self.rest)

        return run

    def of_bottom(self) -> Candidate:
        """b: a gradient arrives at h."""
        loop, arriving = self.loop(), self._arriving()

        def run() -> None:
            loop.optimizer.zero_grad()
            loop.forward(self.x).backward(arriving)
            loop.optimizer.step()

        return run

    def of_top(self) -> Candidate:
        """τ: from h to the loss and back to h."""
        loop, h = self.loop(), self.h.detach().requires_grad_()

        def run() -> None:
            h.grad = None
            loop.zero_grad()
            loop.top(h, *self.rest).backward()
            if loop.above is not None:
                loop.above.step()

        return run

    def of_lesson(self, name: str) -> Candidate:
        """m, by the methods that a step is made of."""
        loop = self._spread(name, 1)
        decoupled: Any = loop.bottom
        h, arriving = self.h, self._arriving()
        rows = decoupled._rows((self.x,), self.rest[0] if loop.conditioned and self.rest else None)
        slots = decoupled.synthesizer_parameters()

        def learn(predicted: Predicted) -> None:
            loop.optimizer.zero_grad()
            regression = decoupled.regression(h, predicted, rows, arriving, None)
            for p, gradient in zip(slots, decoupled.regression_gradients(regression), strict=True):
                if p is not None:
                    p.grad = gradient
            loop.optimizer.step()

        return Staged(lambda: decoupled.predict(h, rows, True), learn)

    def _spread(self, synthesizer: str | None, every: int | None) -> Loop:
        loop = self.loop(synthesizer, every)
        spread(loop.bottom)
        return loop

    def _arriving(self) -> Tensor:
        noise = torch.randn(self.h.shape, generator=torch.Generator().manual_seed(0))
        return noise.to(self.h) / self.h.shape[0]


def make_subject(
    bottom: nn.Module,
    top: Top,
    sample: Sequence[Any],
    synthesizer: nn.Module | str | Sequence[str],
    rule: Rule,
) -> Subject:
    """Check the arguments by a trial step and make what all is measured on.

    Raises:
        VerdictError: they do not fit, see :func:`fused_dni.verdict_top`.
    """
    if not isinstance(bottom, nn.Module):
        raise VerdictError(f"bottom must be an nn.Module, got {type(bottom).__name__}")
    if any(isinstance(part, DecoupledModule) for part in bottom.modules()):
        raise VerdictError("bottom is decoupled already: give the plain one")
    if not any(p.requires_grad for p in bottom.parameters()):
        raise VerdictError("bottom has no trainable parameters")
    if not callable(top):
        raise VerdictError(f"top must be a module or a function, got {type(top).__name__}")
    if not isinstance(sample, (tuple, list)) or not sample or not isinstance(sample[0], Tensor):
        got = "an empty one" if isinstance(sample, (tuple, list)) else type(sample).__name__
        if isinstance(sample, (tuple, list)) and sample:
            got = "(" + ", ".join(type(part).__name__ for part in sample) + ")"
        raise VerdictError(
            "sample must be a batch (x, *rest): a tensor for the bottom, and what the top is "
            f"called with behind h, got {got}"
        )
    names = [synthesizer] if isinstance(synthesizer, str) else synthesizer
    if not isinstance(synthesizer, nn.Module) and (
        not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names)
    ):
        raise VerdictError(
            "synthesizer must be a module, a name or several names, got "
            f"{type(synthesizer).__name__}"
        )
    x, *rest = (part.detach() if isinstance(part, Tensor) else part for part in sample)
    if not x.dim() or not x.numel():
        raise VerdictError(f"x must be a batch, got shape {list(x.shape)}")
    with trying(VerdictError, "bottom and top cannot be copied"):
        bottom, top, teacher = copy.deepcopy((bottom, top, synthesizer))
        bottom.train()
        trial, above = copy.deepcopy((bottom, top))
    with unchanged(top, x.device):
        h = _output(trial, x)
        head, notes = _tried(above, h, rest)
        layer = None if head is None else _inside(top)[head]
        context = rest[0] if rest and isinstance(rest[0], Tensor) else None
        if isinstance(teacher, nn.Module):
            made = {type(teacher).__name__: _with_context(teacher, context)}
        else:
            made = _named(teacher, h, context, layer, notes)
        subject = Subject(bottom, top, x, tuple(rest), h, made, rule, notes)
        for name in made:
            with trying(VerdictError, f"a step with the synthesizer {name} fails"):
                subject.steps(name, 2)()
    return subject


def _output(bottom: nn.Module, x: Tensor) -> Tensor:
    """h, from the bottom alone."""
    with trying(VerdictError, f"bottom does not take a batch of shape {list(x.shape)}"):
        h = bottom(x)
    if not isinstance(h, Tensor) or not h.is_floating_point() or h.dim() < 2:
        got = f"{h.dtype} {list(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
        raise VerdictError(f"bottom must return one floating-point tensor [N, ..., O], got {got}")
    if not h.requires_grad:
        raise VerdictError("no trainable parameter of the bottom was used in its forward")
    return h.detach()


def _tried(top: Top, h: Tensor, rest: Sequence[Any]) -> tuple[int | None, list[str]]:
    """Run a top twice from the same h: which of the modules behind it is the layer in front of a
    softmax, and what the reader should know."""
    h = h.clone().requires_grad_()
    labels = rest[0] if rest and isinstance(rest[0], Tensor) else None
    modules = _inside(top)
    reads: list[nn.Module] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        read = args[0] if args else None
        if isinstance(read, Tensor) and (read.data_ptr(), read.numel()) == (
            h.data_ptr(),
            h.numel(),
        ):
            reads.append(module)

    handles = [m.register_forward_pre_hook(note) for m in modules if _a_head(m, h, labels)]
    losses = []
    what = ", ".join(["h", *(type(part).__name__ for part in rest)])
    try:
        with trying(VerdictError, f"top does not take ({what}), h of shape {list(h.shape)}"):
            for seed in (0, 1):
                torch.manual_seed(seed)
                losses.append(top(h, *rest))
    finally:
        for handle in handles:
            handle.remove()
    loss = losses[0]
    if not isinstance(loss, Tensor) or loss.dim():
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise VerdictError(f"top must return a scalar loss, got {got}")
    known = {id(h), *(id(p) for p in trained(top))}
    leaves = _leaves(loss)
    if not any(leaf is h for leaf in leaves):
        raise VerdictError("the loss of the top does not depend on h, or cannot be differentiated")
    strangers = [str(list(leaf.shape)) for leaf in leaves if id(leaf) not in known]
    if strangers:
        raise VerdictError(
            f"top trains parameters that are not its own, of shapes {', '.join(strangers)}: give "
            "an nn.Module that holds them, so that they can be copied and trained, or freeze them"
        )
    first, second = (float(value.detach()) for value in losses)
    notes = []
    if abs(first - second) > torch.finfo(loss.dtype).eps ** 0.5 * abs(first):
        notes.append(
            f"The top is not deterministic: the same h gave the losses {first:.4g} and "
            f"{second:.4g} (dropout in training mode?). A synthesizer predicts the mean of its "
            "gradients."
        )
    head = reads[-1] if reads else None
    return next((i for i, m in enumerate(modules) if m is head), None), notes


def _a_head(module: nn.Module, h: Tensor, labels: Tensor | None) -> bool:
    """Say whether this may be the layer in front of a softmax over such labels."""
    return (
        isinstance(module, nn.Linear)
        and module.in_features == h.shape[-1]
        and labels is not None
        and labels.dtype == torch.int64
        and labels.shape == h.shape[:-1]
        and int(labels.max()) < module.out_features
    )


def _leaves(loss: Tensor) -> list[Tensor]:
    """Return the tensors that a backward from the loss would give gradients to."""
    found: list[Tensor] = []
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [further for further, _ in node.next_functions]
    return found


def _inside(top: Top) -> list[nn.Module]:
    """All modules of those that a top refers to."""
    return [m for whole in behind(top) for m in whole.modules()]


def _with_context(synthesizer: nn.Module, context: Tensor | None) -> nn.Module:
    features = getattr(synthesizer, "context_features", 0)
    if features and context is None:
        raise VerdictError(
            f"the synthesizer has context_features={features}, and the sample holds no tensor "
            "behind x to be its context"
        )
    return synthesizer


def _named(
    asked: str | Sequence[str],
    h: Tensor,
    context: Tensor | None,
    head: Any,
    notes: list[str],
) -> dict[str, nn.Module]:
    """Return the synthesizers of these names."""
    dense = context if context is not None and context.is_floating_point() else None
    fits = ["softmax"] if head is not None else []
    fits += ["difference"] if dense is not None and dense.shape == h.shape else []
    fits += forms.synthesizer_names(h)
    classes = 0 if head is None else head.out_features
    if dense is not None and dense.shape[:-1] == h.shape[: dense.dim() - 1]:
        classes = dense.shape[-1]
    known = (*TOP_NAMES, *forms.LINEAR_NAMES, *forms.MAP_NAMES)
    made: dict[str, nn.Module] = {}
    for name in [asked] if isinstance(asked, str) else asked:
        if name == "auto":
            name = fits[0]
        ranked = re.fullmatch(r"rank[1-9]\d*", name) is not None
        if name not in known and not ranked:
            raise VerdictError(text.unknown("synthesizer", name, ("auto", *known)))
        if name not in fits and not (ranked and h.dim() != 4):
            raise VerdictError(
                f"synthesizer {name!r} does not fit h of shape {list(h.shape)} with this context: "
                f"there are {', '.join(fits)}"
            )
        if name == "softmax":
            made[name] = SoftmaxSynthesizer(head)
        elif name == "difference":
            made[name] = DifferenceSynthesizer(h.shape[-1], device=h.device, dtype=h.dtype)
        else:
            told = 0 if name == "conv" else classes
            made[name] = forms.make_synthesizer(name, h, told)
            if context is not None and not told:
                notes.append(
                    f"The synthesizer {name} does not see the context. One of your own may: with "
                    "context_features=classes, where it is labels."
                )
    if not made:
        raise VerdictError("synthesizer must name at least one, got none")
    return made
