"""The forms that a block can take: stock, on our kernels, behind an interface."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import nn

from fused_dni.convert import Absorbed
from fused_dni.measure.advise.blocks import Block
from fused_dni.modules.decoupled import Decoupled
from fused_dni.modules.linear import FusedDNILinear
from fused_dni.modules.lstm import FusedDNILSTM
from fused_dni.rules import Rule
from fused_dni.synthesizers import ConvSynthesizer, DiagonalSynthesizer, LinearSynthesizer

RANK = 16


class Interface(NamedTuple):
    """An interface behind a block.

    Attributes:
        synthesizer: ``rank 16``, ``diagonal``, ``conv`` (two convolutions 5x5, as many channels in
            between as there are) or ``conv 1x1`` (two 1x1, 16 channels in between).
        place: ``output`` or ``preactivation``.
    """

    synthesizer: str
    place: str = "output"

    def __str__(self) -> str:
        at = "" if self.place == "output" else f" at the {self.place}"
        return f"{self.synthesizer}{at}"


@dataclass(frozen=True)
class Making:
    """How blocks are made.

    Attributes:
        rule: by which everything of ours is updated.
        classes: what synthesizers are conditioned on; 0 for nothing.
        backend: of our kernels, None for the default.
    """

    rule: Rule
    classes: int = 0
    backend: str | None = None


def interfaces(block: Block) -> tuple[Interface, ...]:
    """Return the interfaces that a block can have; none if it is to have none."""
    if block.why:
        return ()
    if block.kind == "lstm":
        return (Interface("rank 16"),)
    if block.maps:
        return Interface("conv 1x1"), Interface("conv")
    places = ["output"]
    if block.kind == "linear" and len(block.modules) > 1:
        places.append("preactivation")
    return tuple(Interface(name, place) for place in places for name in ("rank 16", "diagonal"))


def take_over(
    block: Block, modules: Sequence[nn.Module], interface: Interface | None, how: Making
) -> nn.Module:
    """One module for all of a block's, holding their parameters: on our kernels, where it has such
    a form, with an interface behind it if one is given.

    Args:
        block: what was recorded of it.
        modules: its modules, in a copy of the model or on their own.
        interface: None for the exact gradient.
        how: rule, conditioning and backend.
    """
    synthesizer = None if interface is None else _synthesizer(block, interface, how)
    if block.kind == "linear":
        linear, *behind = modules
        norm = next((m for m in behind if isinstance(m, (nn.BatchNorm1d, nn.LayerNorm))), None)
        rest = [m for m in behind if m is not norm]
        options: dict[str, Any] = {}
        if interface is not None and interface.place != "output":
            options["interface"] = interface.place
        return FusedDNILinear.from_linear(
            cast(nn.Linear, linear),
            norm,
            rest[0] if rest else None,
            synthesizer=synthesizer,
            update=how.rule,
            backend=how.backend,
            **options,
        )
    if block.kind == "lstm":
        return FusedDNILSTM.from_lstm(
            cast(nn.LSTM, modules[0]),
            synthesizer=synthesizer,
            update=how.rule,
            backend=how.backend,
        )
    whole = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
    return whole if synthesizer is None else Decoupled(whole, synthesizer, update=how.rule)


def alone(block: Block, interface: Interface | None, how: Making | None) -> nn.Module:
    """Return a copy of a block to be run alone; ``how=None`` for the stock modules."""
    modules = [copy.deepcopy(m) for m in block.modules]
    if how is None:
        return modules[0] if len(modules) == 1 else nn.Sequential(*modules)
    return take_over(block, modules, interface, how)


def converted(
    model: nn.Module, blocks: Sequence[Block], chosen: Mapping[int, Interface], how: Making
) -> nn.Module:
    """Return a copy of a model with every block in our form, those in ``chosen`` (by index) behind
    their interfaces."""
    model = copy.deepcopy(model)
    for i, block in enumerate(blocks):
        if not block.ours and i not in chosen:
            continue
        modules = [model.get_submodule(path) for path in block.paths]
        made = take_over(block, modules, chosen.get(i), how)
        for path, module in zip(block.paths, (made, *(Absorbed() for _ in modules)), strict=False):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module)
    return model


def _synthesizer(block: Block, interface: Interface, how: Making) -> nn.Module:
    output = block.output
    like: dict[str, Any] = {"device": output.device, "dtype": output.dtype}
    if block.kind == "lstm":  # at the state, which has no labels of its own
        lstm = cast(nn.LSTM, block.modules[0])
        features = 2 * lstm.num_layers * lstm.hidden_size
        return LinearSynthesizer(features, min(RANK, features), **like)
    if block.maps:
        channels = output.shape[1]
        hidden, size = (channels, 5) if interface.synthesizer == "conv" else (RANK, 1)
        return ConvSynthesizer(
            channels,
            hidden,
            kernel_size=size,
            context_features=how.classes,
            dims=block.maps,
            **like,
        )
    features = output.shape[-1]
    if interface.synthesizer == "diagonal":
        return DiagonalSynthesizer(features, how.classes, **like)
    return LinearSynthesizer(features, min(RANK, features), how.classes, **like)
