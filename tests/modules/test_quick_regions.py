"""A stack's step is one parallel region a call, in which layers overlap: bits are those of one
layer after the other, by however many threads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_dni as fd
from fused_dni.modules.base import DecoupledModule

_cpu = pytest.importorskip("fused_dni.backends._cpu")

CLASSES = 10
#: Widths that threads share unevenly and each another way, of enough work for all of them.
WIDTHS = (72, 136, 88, 160)


class Usual(fd.FusedDNILinear):
    """Has no call of its own, and none with others."""


class UsualLoss(fd.FusedDNILinearCrossEntropyLoss):
    """The same of a head."""


SYNTHESIZERS: dict[str, Callable[[int], fd.Synthesizer | None]] = {
    "low rank": lambda size: fd.LinearSynthesizer(size, rank=5, context_features=CLASSES),
    "dense": lambda size: fd.LinearSynthesizer(size, context_features=CLASSES),
    "diagonal": lambda size: fd.DiagonalSynthesizer(size, context_features=CLASSES),
    "cross-entropy": lambda size: fd.CrossEntropySynthesizer(size, CLASSES),
    "exact": lambda size: None,
}


def network(
    usual: bool, by: str, widths: tuple[int, ...], **options: Any
) -> fd.DecoupledSequential:
    torch.manual_seed(0)
    kind, head = (
        (Usual, UsualLoss) if usual else (fd.FusedDNILinear, fd.FusedDNILinearCrossEntropyLoss)
    )
    layers: list[nn.Module] = []
    for i, size in enumerate(widths):
        synthesizer = SYNTHESIZERS[by](size)
        if synthesizer is not None:
            for p in synthesizer.parameters():
                torch.nn.init.normal_(p, std=0.05)
        layers.append(
            kind(
                widths[max(0, i - 1)],
                size,
                synthesizer=synthesizer,
                update=fd.Adam(0.01),
                backend="cpu",
                **{"normalization": "batch", "activation": "gelu", **options},
            )
        )
    layers.append(head(widths[-1], CLASSES, update=fd.Adam(0.01), backend="cpu"))
    return fd.DecoupledSequential(*layers)


def trained(
    model: fd.DecoupledSequential,
    rows: int,
    steps: int,
    narrow: bool = False,
    given: torch.dtype = torch.float32,
    **phases: Any,
) -> tuple[list[Tensor], list[int]]:
    """All that steps leave, dx too if the input is not of float32, and how many regions each of
    them was; under autocast if `narrow`."""
    schedule, regions = fd.Schedule(model, target_every=2, **phases), []
    found: list[Tensor] = []
    for step in range(steps):
        torch.manual_seed(step)
        x, y = torch.randn(rows, model[0].weight.shape[1]), torch.randint(0, CLASSES, (rows,))
        x = x.to(given).requires_grad_(given is not torch.float32)
        before = _cpu.met()[0]
        context = y if model[0].synthesizer is not None else None
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = model(x, context=context, target=y)
        loss.backward()
        regions.append(_cpu.met()[0] - before)
        schedule.step()
        found += [t for t in (loss.detach(), x.grad) if t is not None]
    layers = [m for m in model.modules() if isinstance(m, DecoupledModule)]
    rules = [rule for layer in layers for _, rule, _ in layer.rules()]
    found += model.state_dict().values()
    found += [t for rule in rules for moments in rule.moments() for t in moments if t is not None]
    return [
        *found,
        *[rule.hyper for rule in rules],
        *[layer.statistics for layer in layers],
    ], regions


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("by", "rows", "options"),
    [
        *[(by, 40, {}) for by in SYNTHESIZERS],
        ("low rank", 40, {"normalization": "layer", "activation": "silu"}),
        ("low rank", 40, {"normalization": None, "max_norm": 0.1}),
        ("dense", 3, {"normalization": "layer"}),
        ("low rank", 3, {}),
        ("exact", 40, {"normalization": "layer", "activation": "silu"}),
        ("exact", 3, {}),
    ],
)
def test_bits_are_those_of_one_layer_after_the_other(
    by: str, rows: int, options: dict[str, Any], threads: int
) -> None:
    torch.set_num_threads(threads)
    mine, regions = trained(network(False, by, WIDTHS, **options), rows, 12)
    theirs, apart = trained(network(True, by, WIDTHS, **options), rows, 12)
    # Two of a prediction's steps, of which the second is the head's; forward, backward, update.
    assert regions[-2:] == [3, 3] if by == "exact" else regions[-2:] == [2, 2]
    assert min(apart) > 3
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("by", [by for by in SYNTHESIZERS if by != "exact"])
@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
def test_lessons_one_behind_the_other(mix: float, by: str, rows: int, threads: int) -> None:
    """In the region of what teaches them, each from a prediction that the one before has moved."""
    torch.set_num_threads(threads)
    phases = {"mix": mix, "lessons": 3}
    mine, regions = trained(network(False, by, WIDTHS), rows, 13, **phases)
    theirs, apart = trained(network(True, by, WIDTHS), rows, 13, **phases)
    assert regions[-2:] == [2, 3 if mix else 2]
    assert min(apart) > 3
    assert all(map(torch.equal, mine, theirs))


def test_layers_that_are_too_large_to_overlap() -> None:
    torch.set_num_threads(2)
    widths = (256, 1024, 1024)
    mine, regions = trained(network(False, "low rank", widths), 128, 9)
    theirs, _ = trained(network(True, "low rank", widths), 128, 9)
    assert regions[-1] == 2
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.skipif(not _cpu.bf16(), reason="the instruction set in use has no bfloat16 products")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("by", "options"),
    [
        *[(by, {}) for by in SYNTHESIZERS],
        ("low rank", {"normalization": "layer", "activation": "silu"}),
        ("low rank", {"normalization": None, "max_norm": 0.1}),
        ("exact", {"normalization": "layer", "activation": "silu"}),
        ("exact", {"normalization": None, "activation": "tanh"}),
    ],
)
def test_autocast(by: str, options: dict[str, Any], given: torch.dtype, threads: int) -> None:
    """bfloat16 from layer to layer, rounded where one after the other rounds."""
    torch.set_num_threads(threads)
    mine, regions = trained(network(False, by, WIDTHS, **options), 40, 12, True, given)
    theirs, _ = trained(network(True, by, WIDTHS, **options), 40, 12, True, given)
    # A step without a target is left to the layers if there is to be a dx.
    by_layers = by != "exact" and given is not torch.float32
    assert min(regions[-2:]) == (3 if by == "exact" else 2)
    assert by_layers or regions[-1] == regions[-2]
    assert len(mine) == len(theirs)
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.skipif(not _cpu.bf16(), reason="the instruction set in use has no bfloat16 products")
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_whose_backward_goes_the_usual_way(given: torch.dtype) -> None:
    """What a forward in one call left serves a backward that somebody looks at."""

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            return func(*args, **(kwargs or {}))

    found = []
    for looked_at in (False, True):
        model = network(False, "exact", WIDTHS)
        trained(model, 40, 3, True)  # bound
        torch.manual_seed(1)
        x, y = torch.randn(40, WIDTHS[0]).to(given), torch.randint(0, CLASSES, (40,))
        before = _cpu.met()[0]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, target=y)
        assert _cpu.met()[0] == before + 1
        with Look() if looked_at else nullcontext():
            loss.backward()
        found.append([loss.detach(), *model.state_dict().values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
