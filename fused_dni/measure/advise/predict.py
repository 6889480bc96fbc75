"""The time and memory of a whole training step, from those of its blocks alone.

A step takes the sum of its blocks' times. What a step pays once and every block alone pays too, the
start of a backward and of an optimizer, is measured apart and counted once. Not in the sum: what
the model computes outside of modules.

Memory is highest in the backward of some block: what the blocks below it still hold, its own peak,
and what blocks above it have left for the updates at its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fused_dni.measure import timing
from fused_dni.measure.advise.blocks import Block, tensors
from fused_dni.measure.advise.forms import Interface
from fused_dni.measure.timing import Timing

#: Names of what a step pays once.
BACKWARD, OPTIMIZER = "backward of nothing", "optimizer of nothing"

ASSUMPTIONS = (
    "A step is predicted as the sum of its blocks' times, each measured alone on the inputs that "
    "it had in the model, behind an untimed step of the whole model, in one interleaved run; equal "
    "blocks are measured once.",
    "The start of a backward and of an optimizer's step, in every block's time, is measured apart "
    "and counted once.",
    "Not predicted: what the model computes outside of its modules.",
    "A cycle of k steps is one with targets and k - 1 without.",
    "Memory is predicted as the highest, over the blocks, of what those below it hold for their "
    "backward, its own peak alone, and what those above it have left for the updates at the "
    "end (gradients of parameters; of our layers inputs and gradients at outputs).",
    "What an interface or a larger k costs in accuracy is not predicted: `fused-dni train` "
    "measures it.",
)


class Form(NamedTuple):
    """How a block runs in a step: what its time depends on.

    Attributes:
        ours: on our kernels, or behind an interface; else stock.
        interface: None for the exact gradient.
        target: whether its synthesizer is trained; False without one.
        asks: whether its input wants a gradient.
    """

    ours: bool
    interface: Interface | None = None
    target: bool = False
    asks: bool = False

    def __str__(self) -> str:
        how = str(self.interface) if self.interface else "exact" if self.ours else "stock"
        when = "" if not self.interface else ", targets" if self.target else ", no targets"
        return f"{how}{when}{', gradient of the input' if self.asks else ''}"


@dataclass(frozen=True)
class Plan:
    """A way to train the model.

    Attributes:
        ours: on our kernels, where a block has such a form; else stock backprop.
        interfaces: behind which blocks, by index.
        k: synthesizers are trained on every k-th step.
    """

    ours: bool = True
    interfaces: Mapping[int, Interface] = field(default_factory=dict)
    k: int = 1

    @property
    def cycle(self) -> int:
        """Steps of its cycle."""
        return self.k if self.interfaces else 1

    def steps(self) -> list[tuple[bool, float]]:
        """Return the kinds of steps of a cycle: whether with targets, and their share."""
        if self.cycle == 1:
            return [(True, 1.0)]
        return [(True, 1.0 / self.k), (False, 1.0 - 1.0 / self.k)]


class Run(NamedTuple):
    """A block in a step: its form, and whether a backward comes to it."""

    form: Form
    backward: bool


def runs(blocks: Sequence[Block], plan: Plan, target: bool) -> list[Run]:
    """Say how each block runs in a step of ``plan`` with or without targets.

    On a step without targets nothing above an interface makes a gradient for it: our layers that
    read its output see that; anything else computes one if something below the interface asks.
    """
    found: list[Run] = []
    asking: list[bool] = []  # whether each output asks for a gradient
    marked: list[bool] = []  # whether our layers know that none is wanted
    for i, block in enumerate(blocks):
        interface = plan.interfaces.get(i)
        ours = plan.ours and (block.ours or interface is not None)
        asks = block.asks
        if asks and block.producer is not None:
            asks = asking[block.producer]
            # The LSTM takes no notice of marks.
            if marked[block.producer] and ours and block.kind != "lstm":
                asks = False
        cut = interface is not None and block.kind != "lstm" and not target
        trained = bool(block.parameters) and not cut
        below = block.asks if block.producer is None else asking[block.producer]
        asking.append(trained or (block.asks and below))
        marked.append(cut)
        form = Form(ours, interface, target and interface is not None, asks)
        found.append(Run(form, asking[-1]))
    return found


class Blocks:
    """What was measured of blocks alone, and what follows for whole steps.

    Args:
        blocks: of the model.
        times: by ``(index, form)`` of one of the blocks that are alike, and by the names of what a
            step pays once.
        names: the name of each measured candidate by index and form.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        times: Mapping[str, Timing],
        names: Mapping[tuple[int, Form], str],
    ) -> None:
        self.blocks, self._times, self._names = blocks, times, names

    def time(self, index: int, form: Form) -> Timing:
        """Return a block alone in one of its forms, what a step pays once included."""
        return self._times[self._names[index, form]]

    def step(self, name: str, plan: Plan) -> Timing:
        """Combine the mean step of a plan's cycle, paired with all that was measured in the same
        run."""
        weights: Counter[str] = Counter()
        for target, share in plan.steps():
            found = runs(self.blocks, plan, target)
            backwards = sum(run.backward for run in found)
            optimizers = sum(
                bool(block.parameters) and not run.form.ours
                for block, run in zip(self.blocks, found, strict=True)
            )
            for i, (block, run) in enumerate(zip(self.blocks, found, strict=True)):
                weights[self._names[i, run.form]] += share * block.calls  # type: ignore[assignment]
            weights[BACKWARD] -= share * max(0, backwards - 1)  # type: ignore[assignment]
            weights[OPTIMIZER] -= share * max(0, optimizers - 1)  # type: ignore[assignment]
        return timing.combine(name, [(w, self._times[part]) for part, w in weights.items()])


def needed(blocks: Sequence[Block], plans: Sequence[Plan]) -> dict[tuple[int, Form], None]:
    """Return the forms that the steps of these plans are made of, in order."""
    return {
        (i, run.form): None
        for plan in plans
        for target, _ in plan.steps()
        for i, run in enumerate(runs(blocks, plan, target))
    }


def memory(
    blocks: Sequence[Block],
    plan: Plan,
    held: Mapping[tuple[int, Form], int],
    peak: Mapping[tuple[int, Form], int],
) -> int:
    """Peak bytes of a plan's steps.

    Args:
        held: what a block's forward leaves for its backward, in bytes, by index and form.
        peak: of its step alone.
    """
    highest = 0
    for target, _ in plan.steps():
        found = runs(blocks, plan, target)
        left = [_left(block, run) for block, run in zip(blocks, found, strict=True)]
        below, above = 0, sum(left)
        for i, run in enumerate(found):
            above -= left[i]
            alone, kept = peak[i, run.form], held[i, run.form]
            if run.form.interface is not None and blocks[i].kind != "lstm":
                # Updated in its forward, when nothing above has run.
                highest = max(highest, below + alone, below + kept + above)
            else:
                highest = max(highest, below + alone + above)
            below += kept
    return highest


def _left(block: Block, run: Run) -> int:
    """Bytes that a block's backward leaves until the end of the whole one.

    Stock modules: the gradients of their parameters. Ours, whose rule is applied at the end, what
    that update is made of: the input and the gradient at the preactivation, for the exact gradient;
    the output, its prediction and the gradient that arrived, for a synthesizer that learns.
    """
    size = block.output.numel() * block.output.element_size()
    if run.form.interface is not None:
        return 3 * size if run.form.target else 0
    if run.form.ours:
        return size + sum(t.numel() * t.element_size() for t in tensors(block.args))
    return sum(
        p.numel() * p.element_size()
        for module in block.modules
        for p in module.parameters()
        if p.requires_grad
    )
