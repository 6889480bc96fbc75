"""What a model is made of: the blocks that one forward runs, as they were met there.

Blocks are found from the top. An ``nn.Sequential`` is its children, in a row; so are the model
itself and a module list. Any other module is one block and is not looked into. In a row

* ``nn.Linear`` takes along the normalisation and activation that :func:`fused_dni.convert` would
  give it,
* any other module with parameters takes along normalisations and whatever has no parameters, as
  long as the number of dimensions stays (a pooling does, a flattening does not),
* what is left is a block of its own.

``nn.LSTM`` is a block too. The loss is the last one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fused_dni.convert import _agreed, _places, _stock_only, _tied, _why_not
from fused_dni.measure.advise.errors import AdviceError
from fused_dni.measure.verdict.candidates import trying

Loss = Callable[[Tensor], Tensor]

_CONVOLUTIONS = nn.modules.conv._ConvNd
_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass
class Block:
    """A part of a model that a forward runs once.

    Attributes:
        name: path of its first module in the model.
        kind: ``linear`` and ``lstm``, which have a form on our kernels; ``segment``, which can be
            decoupled as it is; ``plain``, which cannot; ``loss``.
        why: why it gets no interface; empty if it may.
        paths: of all its modules, in the order in which they run.
        modules: copies of them, stock; for ``loss`` a module that calls the loss.
        args, named: what it was called with, copied; tensors ask for gradients as they did there.
        asks: whether something below it is trained, so that its backward makes a gradient of its
            input.
        output: what it returned (the first tensor of a tuple), without its graph.
        producer: index of the block whose output it reads as it is; None if there is none.
        calls: how often a forward runs it; more than once only for ``plain``.
        flops: of its forward, as torch counts them.
    """

    name: str
    kind: str
    why: str
    paths: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    args: tuple[Any, ...]
    named: dict[str, Any]
    asks: bool
    output: Tensor
    producer: int | None = None
    calls: int = 1
    flops: int = 0

    @property
    def parameters(self) -> int:
        """How many numbers it trains."""
        return sum(p.numel() for m in self.modules for p in m.parameters() if p.requires_grad)

    @property
    def ours(self) -> bool:
        """Whether it has an exact form on our kernels."""
        return self.kind in ("linear", "lstm")

    @property
    def what(self) -> str:
        """Its modules' classes: ``Linear + BatchNorm1d + ReLU``."""
        if self.kind == "loss":
            return "loss"
        return " + ".join(type(m).__name__ for m in self.modules)

    @property
    def maps(self) -> int:
        """Number of spatial dimensions of its output if that is maps [N, C, *spatial], else 0."""
        dims = {
            len(m.kernel_size)
            for whole in self.modules
            for m in whole.modules()
            if isinstance(m, _CONVOLUTIONS)
        }
        return self.output.dim() - 2 if self.output.dim() - 2 in dims else 0

    def signature(self) -> tuple[Any, ...]:
        """Say what its cost depends on: blocks that share it are measured once."""
        shapes = [(tuple(t.shape), t.dtype) for t in tensors((self.args, self.named))]
        parts = [(repr(m), tuple(tuple(p.shape) for p in m.parameters())) for m in self.modules]
        return (self.kind, str(parts), str(shapes), self.name if self.kind == "plain" else "")


class _LossModule(nn.Module):
    """A loss where a module is wanted."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self._loss = loss

    def forward(self, output: Tensor) -> Tensor:
        return self._loss(output)


class _Leaf(NamedTuple):
    path: str
    module: nn.Module
    row: str | None  # path of the outermost nn.Sequential that it stands in


@dataclass
class _Call:
    """The calls of one leaf in one forward: the first one's arguments and outputs."""

    order: int
    args: tuple[Any, ...]
    named: dict[str, Any]
    read: Any  # the first argument itself
    made: Any = None  # the output itself
    count: int = 1
    flops: int = 0


@dataclass
class _Recorder:
    """Hooks on leaves, for one forward."""

    calls: dict[str, _Call] = field(default_factory=dict)
    counter: FlopCounterMode = field(default_factory=lambda: FlopCounterMode(display=False))

    def watch(self, leaf: _Leaf) -> list[Any]:
        before = 0

        def enter(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal before
            before = self.counter.get_total_flops()
            if leaf.path in self.calls:
                self.calls[leaf.path].count += 1
                return
            read = next(iter(args), None)
            self.calls[leaf.path] = _Call(len(self.calls), detached(args), detached(named), read)

        def leave(module: nn.Module, args: Any, named: Any, made: Any) -> None:
            call = self.calls[leaf.path]
            if call.count == 1:
                call.made = made
                call.flops = self.counter.get_total_flops() - before

        return [
            leaf.module.register_forward_pre_hook(enter, with_kwargs=True),
            leaf.module.register_forward_hook(leave, with_kwargs=True),
        ]


def survey(model: nn.Module, sample: Tensor, loss: Loss | None) -> list[Block]:
    """Return the blocks of a model in the order in which they run; a loss comes last.

    Args:
        model: in training mode; a module with children. It is run twice, so that a model that
            keeps a state has one.
        sample: what it is called with.
        loss: from its output to a scalar; None if a gradient arrives from elsewhere.

    Raises:
        AdviceError: the model does not take the sample or does not return one tensor, the loss
            does not take that or is no scalar, or nothing was trained by it.
    """
    leaves = list(_leaves(model))
    recorder = _Recorder()
    what = f"the model does not take a sample of shape {list(sample.shape)}"
    with trying(AdviceError, what):
        model(sample)
        handles = [handle for leaf in leaves for handle in recorder.watch(leaf)]
        try:
            with recorder.counter:
                output = model(sample)
        finally:
            for handle in handles:
                handle.remove()
    if not isinstance(output, Tensor):
        raise AdviceError(f"the model must return one tensor, got {type(output).__name__}")
    if not output.requires_grad:
        raise AdviceError("no trainable parameter of the model was used in its forward")
    blocks = _grouped(model, leaves, recorder.calls, output)
    if loss is not None:
        made = [recorder.calls[block.paths[-1]].made for block in blocks]
        last = next((i for i, m in enumerate(made) if any(t is output for t in tensors(m))), None)
        blocks.append(_loss_block(loss, output, last))
    return blocks


def _loss_block(loss: Loss, output: Tensor, producer: int | None) -> Block:
    what = f"the loss does not take an output of shape {list(output.shape)}"
    with trying(AdviceError, what):
        value = loss(output)
    if not isinstance(value, Tensor) or value.dim():
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise AdviceError(f"the loss must be a scalar tensor, got {got}")
    return Block(
        name="loss",
        kind="loss",
        why="it is the loss",
        paths=(),
        modules=(_LossModule(loss),),
        args=detached((output,)),
        named={},
        asks=True,
        output=value.detach(),
        producer=producer,
    )


_HEAD = "its output is the model's, which gets the true gradient as it is"


def _leaves(module: nn.Module, path: str = "", row: str | None = None) -> Iterator[_Leaf]:
    sequence = type(module).forward is nn.Sequential.forward
    if path and not sequence and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        yield _Leaf(path, module, row)
        return
    for name, child in module.named_children():
        inside = (row if row is not None else path) if sequence else None
        yield from _leaves(child, f"{path}.{name}" if path else name, inside)


def _grouped(
    model: nn.Module, leaves: list[_Leaf], calls: dict[str, _Call], output: Tensor
) -> list[Block]:
    """Leaves that ran, as blocks."""
    places = _agreed([place for place in _places(model) if _why_not(place.module) is None])
    companions: dict[int, list[nn.Module]] = {
        id(place.module): [m for m in (place.norm, place.activation) if m is not None]
        for place in places
        if isinstance(place.module, nn.Linear)
    }
    recurrent = {id(p.module) for p in places if isinstance(p.module, nn.LSTM)}
    recurrent -= {id(m) for m in model.modules() if _stock_only(m)}
    tied = _tied(model)
    ran = [leaf for leaf in leaves if leaf.path in calls]
    blocks: list[Block] = []
    made_by: dict[int, int] = {}
    at = 0
    while at < len(ran):
        first, members = ran[at], [ran[at]]
        call = calls[first.path]
        why = _why_plain(first.module, call, tied)
        kind = "plain" if why else "segment"
        if not why and id(first.module) in companions:
            kind = "linear"
            taken = companions[id(first.module)]
            members += [leaf for leaf in ran[at + 1 :] if any(leaf.module is m for m in taken)]
        elif not why and id(first.module) in recurrent:
            kind = "lstm"
        elif not why:
            members += _followers(first, ran[at + 1 :], calls)
        at += len(members)
        end = calls[members[-1].path]
        if kind != "plain" and any(t is output for t in tensors(end.made)):
            why = _HEAD
        blocks.append(
            Block(
                name=first.path,
                kind=kind,
                why=why,
                paths=tuple(leaf.path for leaf in members),
                modules=tuple(_fresh(leaf.module) for leaf in members),
                args=call.args,
                named=call.named,
                asks=any(t.requires_grad for t in tensors((call.args, call.named))),
                output=next(t.detach() for t in tensors(end.made)),
                calls=call.count,
                flops=sum(calls[leaf.path].flops for leaf in members),
            )
        )
    blocks.sort(key=lambda block: calls[block.paths[0]].order)
    for i, block in enumerate(blocks):
        block.producer = made_by.get(id(calls[block.paths[0]].read))
        made_by.update((id(t), i) for t in tensors(calls[block.paths[-1]].made))
    return blocks


def _why_plain(module: nn.Module, call: _Call, tied: set[int]) -> str:
    """Say why a module cannot stand in front of an interface; empty if it can."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        return "nothing in it is trained"
    if call.count > 1:
        return f"it runs {call.count} times in a forward"
    if any(id(p) in tied for p in trained):
        return "it shares parameters with another module"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "a table look-up has no gradient to save below it"
    if type(module) is nn.LSTM:
        return "" if not _stock_only(module) else "bidirectional or with projections"
    if not isinstance(call.made, Tensor) or not call.made.is_floating_point():
        return "it does not return one tensor"
    if call.made.dim() < 2:
        return "its output has no batch and features"
    return ""


def _followers(first: _Leaf, behind: list[_Leaf], calls: dict[str, _Call]) -> list[_Leaf]:
    """Say what a segment takes along."""
    taken: list[_Leaf] = []
    dims = calls[first.path].made.dim()
    for leaf in behind:
        call = calls[leaf.path]
        light = isinstance(leaf.module, _NORMALISATIONS) or not list(leaf.module.parameters())
        alone = call.count == 1 and isinstance(call.made, Tensor)
        if first.row is None or leaf.row != first.row or not light or not alone:
            break
        if call.made.dim() != dims:
            break
        taken.append(leaf)
    return taken


def _fresh(module: nn.Module) -> nn.Module:
    """Return a copy that may be run alone: in place it would write into its own input."""
    made = copy.deepcopy(module)
    for part in made.modules():
        if getattr(part, "inplace", False) is True:
            setattr(part, "inplace", False)  # noqa: B010
    return made


def detached(value: Any) -> Any:
    """Return a copy of tensors in tuples, lists and dictionaries; they ask for gradients as
    before."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        return type(value)(detached(v) for v in value)
    if isinstance(value, dict):
        return {k: detached(v) for k, v in value.items()}
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from tensors(v)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
