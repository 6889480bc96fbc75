"""A container's step as one call: the bits of the usual way for whatever sizes, rows, dtypes,
threads, normalisations, activations and synthesizers, while matrices stay transposed inside."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.ops.types import ACTIVATIONS

cpu = pytest.importorskip("fused_dni.backends._cpu")
pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, STEPS = 4, 11
#: By the true gradient, or by a prediction of these kinds.
KINDS = ("true gradient", "dense", "low rank", "diagonal", "cross-entropy")


class Usual(fd.FusedDNILinear):
    """Has no such call: it is bound for the layer itself alone."""


class UsualLoss(fd.FusedDNILinearCrossEntropyLoss):
    """The same of a head."""


def synthesizer(kind: str, features: int) -> nn.Module | None:
    if kind == "true gradient":
        return None
    if kind == "diagonal":
        return fd.DiagonalSynthesizer(features, context_features=CLASSES)
    if kind == "cross-entropy":
        return fd.CrossEntropySynthesizer(features, CLASSES)
    rank = min(2, features) if kind == "low rank" else None
    return fd.LinearSynthesizer(features, rank=rank, context_features=CLASSES)


def network(
    layer: type[fd.FusedDNILinear],
    sizes: list[int],
    kind: str,
    dtype: torch.dtype,
    ends: bool = False,
    **options: Any,
) -> fd.DecoupledSequential:
    """Layers, and behind them a head with its loss if it ``ends`` there."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        made = synthesizer(kind, outputs)
        if made is not None:
            for p in made.parameters():
                nn.init.normal_(p, std=0.1)  # new, one predicts zero
        layers.append(
            layer(
                inputs, outputs, backend="cpu", synthesizer=made, update=fd.Adam(0.01), **options
            ).to(dtype)
        )
    if ends:
        head = UsualLoss if layer is Usual else fd.FusedDNILinearCrossEntropyLoss
        smoothing = 0.1 if dtype == torch.float64 else 0.0
        layers.append(
            head(
                sizes[-1], CLASSES, label_smoothing=smoothing, backend="cpu", update=fd.Adam(0.01)
            ).to(dtype)
        )
    return fd.DecoupledSequential(*layers)


#: How steps with a target are taken: by the prediction or not, with so many lessons each.
PHASES: tuple[dict[str, Any], ...] = (
    {},
    {"lessons": 3},
    {"mix": 1.0, "lessons": 2},
    {"mix": 0.4, "lessons": 2},
)


def train(
    model: fd.DecoupledSequential,
    rows: int,
    sizes: list[int],
    dtype: torch.dtype,
    phases: dict[str, Any] = PHASES[0],
) -> Any:
    """What a few steps make of everything: with a target and without, of inputs that want a
    gradient and of others; and the last steps' way."""
    seen: list[Tensor] = []
    head = nn.Linear(sizes[-1], CLASSES).to(dtype)
    schedule = fd.Schedule(model, target_every=2, **phases)
    generator = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        x = torch.randn(rows, sizes[0], generator=generator, dtype=dtype)
        x.requires_grad_(schedule.target and step % 4 < 2)
        y = torch.randint(0, CLASSES, (rows,), generator=generator)
        ends = isinstance(model[-1], fd.FusedDNILinearCrossEntropyLoss)
        with fd.condition_on(y):
            h = model(x, target=y) if ends else model(x)
        loss = h / 3 if ends else F.cross_entropy(head(h), y)
        loss.backward()
        seen += [h.detach(), *[g for g in (x.grad,) if g is not None]]
        schedule.step()
    rules = [rule for layer in model for _, rule, _ in cast(Any, layer).rules()]
    moments = [t for rule in rules for held in rule.moments() for t in held if t is not None]
    return [*seen, *model.state_dict().values(), *[r.hyper for r in rules], *moments]


sizes = st.lists(st.sampled_from([1, 2, 3, 7, 8, 13, 16, 33, 70]), min_size=3, max_size=5)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example([70, 130, 33], 65, torch.float32, "batch", "relu", "output", 2, "avx2", False, PHASES[0])
@example([70, 130, 33], 65, torch.float32, "batch", "relu", "output", 2, "avx2", True, PHASES[0])
@example([70, 130, 33], 65, torch.float32, "batch", "relu", "output", 2, "avx2", False, PHASES[2])
@example([70, 130, 33], 65, torch.float32, "batch", "relu", "output", 2, "avx2", True, PHASES[2])
@example([64, 300, 260], 300, torch.float32, "batch", "relu", "output", 2, "avx2", True, PHASES[3])
@example([400, 24, 410], 30, torch.float32, None, "gelu", "output", 1, "portable", True, PHASES[1])
@given(
    sizes,
    st.sampled_from([2, 3, 4, 5, 8, 9, 16, 17, 31]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([None, "batch", "layer"]),
    st.sampled_from(ACTIVATIONS),
    st.sampled_from(["output", "preactivation"]),
    st.integers(1, 3),
    st.sampled_from(cpu.isas()),
    st.booleans(),
    st.sampled_from(PHASES),
)
def test_the_bits_of_the_usual_way(
    kind: str,
    sizes: list[int],
    rows: int,
    dtype: torch.dtype,
    normalization: str | None,
    activation: str,
    interface: str,
    threads: int,
    isa: str,
    ends: bool,
    phases: dict[str, Any],
) -> None:
    assume(isa in cpu.isas())
    options = {"normalization": normalization, "activation": activation, "interface": interface}
    if kind == "true gradient":
        del options["interface"]
        phases = PHASES[0]  # with no synthesizer to be taught
    torch.set_num_threads(threads)
    made = []
    try:
        cpu.set_isa(isa)
        for layer in (fd.FusedDNILinear, Usual):
            model = network(layer, sizes, kind, dtype, ends, **options)
            made.append(train(model, rows, sizes, dtype, phases))
            one_call = model._stack is not None and model._stack.way().startswith("one call")
            quick = layer is fd.FusedDNILinear
            # At the preactivation a step by the true gradient binds the layers anew.
            true = "mix" in phases
            assert one_call == (quick and not (true and interface == "preactivation"))
            assert not one_call or model._stack.members == tuple(model)
            assert (model._true is not None) == (true and one_call)
    finally:
        cpu.set_isa(cpu.isas()[-1])
    for mine, theirs in zip(*made, strict=True):
        assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize(
    "phases", [PHASES[0], *PHASES[2:]], ids=["predictions", "true gradients", "mixed"]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("rows", [2, 9])
def test_what_was_not_written_is_not_read(
    rows: int, ends: bool, kind: str, phases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the memory that these calls ask for changes no bit."""
    made, new_empty = [], Tensor.new_empty
    if kind == "true gradient":
        phases = PHASES[0]

    def poisoned(*given: Any, **named: Any) -> Tensor:
        return new_empty(*given, **named).fill_(torch.nan)

    for poison in (False, True):
        if poison:
            monkeypatch.setattr(Tensor, "new_empty", poisoned)
        model = network(fd.FusedDNILinear, [7, 13, 6], kind, torch.float32, ends)
        made.append(train(model, rows, [7, 6], torch.float32, phases))
        assert model._stack is not None
    for clean, other in zip(*made, strict=True):
        assert torch.equal(clean, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("ends", [False, True])
def test_a_step_that_is_not_finite_moves_nothing(ends: bool, kind: str, bad: float) -> None:
    """In whatever layer it is noticed."""
    results = []
    for layer in (fd.FusedDNILinear, Usual):
        model = network(layer, [8, 8, 8, 8], kind, torch.float32, ends, activation="identity")
        train(model, 8, [8, 8], torch.float32)
        before = [p.clone() for p in model.parameters()]
        x = torch.randn(8, 8)
        x[3, 5] = bad
        y = torch.zeros(8, dtype=torch.int64)
        with fd.condition_on(y):
            loss = model(x, target=y) if ends else model(x).square().mean()
        if loss.requires_grad:
            loss.backward()
        skipped = [m.skipped_updates for m in model]
        # The gradient of a softmax is bounded: there a large input overflows nothing. So is what a
        # prediction of that form says, which has no update skipped (but the last one's lesson may).
        bounded = bad == 1e38 and (kind == "cross-entropy" or (ends and kind == "true gradient"))
        assert (sum(skipped) == 0) == bounded
        results.append(
            (skipped, [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)])
        )
    assert results[0] == results[1]
