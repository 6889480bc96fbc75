"""Segments with a name: what `fused-dni verdict NAME` measures.

Each function makes one; its arguments are the command's options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_dni.modules.linear import FusedDNILinear


@dataclass(frozen=True)
class Segment:
    """What is measured.

    Attributes:
        module: as PyTorch has it.
        sample: a batch of its input.
        target: class indices of a whole network; None for a segment inside one.
        title: in words.
        classes: that synthesizers are conditioned on, 0 for none.
    """

    module: nn.Module
    sample: Tensor
    target: Tensor | None
    title: str
    classes: int


class Whole(nn.Module):
    """Several layers behind one interface, at the output of the last."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Run them."""
        out: Tensor = self.layers(x)
        return out


def linear(
    inputs: int = 1024,
    outputs: int | None = None,
    batch: int = 128,
    normalization: str = "batch",
    activation: str = "relu",
    classes: int = 10,
) -> Segment:
    """One linear layer with what is behind it, inside a network."""
    outputs = outputs or inputs
    module = nn.Sequential(*_layer(inputs, outputs, normalization, activation))
    named = _named(normalization, activation)
    title = f"one layer {inputs} to {outputs} ({named}) at batch {batch}"
    return Segment(module, _sample(batch, inputs), None, title, classes)


def mlp(
    width: int = 256,
    depth: int = 4,
    inputs: int | None = None,
    batch: int = 64,
    normalization: str = "batch",
    activation: str = "relu",
    classes: int = 10,
) -> Segment:
    """Return a whole network, an interface behind every hidden layer."""
    inputs = inputs or width
    layers = _stack(inputs, width, depth, normalization, activation)
    module = nn.Sequential(*layers, nn.Linear(width, classes))
    labels = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(0))
    named = _named(normalization, activation)
    title = f"{depth} hidden layers of {width} ({named}) at batch {batch}"
    return Segment(module, _sample(batch, inputs), labels, title, classes)


def block(
    width: int = 256,
    depth: int = 4,
    inputs: int | None = None,
    batch: int = 64,
    normalization: str = "batch",
    activation: str = "relu",
    classes: int = 10,
) -> Segment:
    """Layers of a perceptron behind one interface, inside a network."""
    inputs = inputs or width
    module = Whole(*_stack(inputs, width, depth, normalization, activation))
    named = _named(normalization, activation)
    layers = "one layer" if depth == 1 else f"a block of {depth} layers"
    title = f"{layers} of {width} ({named}) behind one interface at batch {batch}"
    return Segment(module, _sample(batch, inputs), None, title, classes)


def conv(
    width: int = 32,
    depth: int = 1,
    inputs: int | None = None,
    size: int = 16,
    batch: int = 16,
    classes: int = 10,
) -> Segment:
    """Convolutions of 3 x 3 with batch normalisation and ReLU behind one interface."""
    inputs = inputs or width
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [
            nn.Conv2d(width if i else inputs, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    many = "a convolution" if depth == 1 else f"{depth} convolutions"
    title = (
        f"{many} of {width} channels (Conv, BatchNorm, relu) on {size} x {size} at batch {batch}"
    )
    return Segment(Whole(*layers), _sample(batch, inputs, size, size), None, title, classes)


def transformer(width: int = 128, heads: int = 4, tokens: int = 64, batch: int = 8) -> Segment:
    """Return a transformer block: attention and a perceptron of four times the width, normalised
    first.

    Raises:
        ValueError: ``heads`` does not divide ``width``.
    """
    if width % heads:
        raise ValueError(f"heads must divide width {width}, got {heads}")
    module = nn.TransformerEncoderLayer(
        width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
    )
    title = f"a transformer block of {width} ({heads} heads, {tokens} tokens) at batch {batch}"
    return Segment(module, _sample(batch, tokens, width), None, title, 0)


#: By the name on the command line.
SEGMENTS: dict[str, Callable[..., Segment]] = {
    "linear": linear,
    "mlp": mlp,
    "block": block,
    "conv": conv,
    "transformer": transformer,
}
#: Option by argument, where they differ.
OPTIONS = {"inputs": "in"}


def options() -> list[str]:
    """All arguments that some segment takes."""
    found = [name for make in SEGMENTS.values() for name in inspect.signature(make).parameters]
    return list(dict.fromkeys(found))


def make(name: str, given: Mapping[str, Any]) -> Segment:
    """Make a segment from what stands on the command line.

    Args:
        name: one of :data:`SEGMENTS`.
        given: by argument; None where nothing was given.

    Raises:
        ValueError: an argument that this segment does not take; the message names the option.
    """
    taken = inspect.signature(SEGMENTS[name]).parameters
    chosen = {key: value for key, value in given.items() if value is not None}
    for key in chosen:
        if key not in taken:
            raise ValueError(f"--{OPTIONS.get(key, key)} does not go with {name}")
    return SEGMENTS[name](**chosen)


def _sample(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _stack(
    inputs: int, width: int, depth: int, normalization: str, activation: str
) -> Iterator[nn.Module]:
    for i in range(depth):
        yield from _layer(width if i else inputs, width, normalization, activation)


def _layer(inputs: int, outputs: int, normalization: str, activation: str) -> list[nn.Module]:
    """PyTorch's own modules for what one fused layer does."""
    fused = FusedDNILinear(
        inputs,
        outputs,
        bias=normalization != "batch",
        normalization=None if normalization == "none" else normalization,
        activation=activation,
        synthesizer=None,
    )
    return fused.plain_parts()


def _named(normalization: str, activation: str) -> str:
    norms = {"batch": ["BatchNorm"], "layer": ["LayerNorm"], "none": []}[normalization]
    return ", ".join(["Linear", *norms, *([activation] if activation != "identity" else [])])
