"""A fused layer's step as one call, and a stack's: the bits of the usual way, and the usual way
wherever anything is not as it was when the call was bound."""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import twins
from strategies import named, pairwise
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import fused_dni as fd
from fused_dni.modules import nodes
from fused_dni.modules.base import NO_TARGET

pytest.importorskip("fused_dni.backends._cpu")
pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, Any] = {
    "normalization": [None, "batch", "layer"],
    "activation": ["relu", "gelu", "identity"],
    "interface": ["output", "preactivation"],
    "rule": [fd.SGD(0.05), fd.SGD(0.05, momentum=0.9, nesterov=True), fd.Adam(0.01)],
    "context_features": [0, 5],
    "bias": [True, False],
    "max_norm": [None, 0.01],
    "dtype": [torch.float32, torch.float64],
}
TABLE = pairwise(OPTIONS)
ROW = {**TABLE[0], "normalization": "batch", "context_features": 5, "rule": fd.Adam(0.01)}


MOST = 8  # Python calls that a call in one takes, of which PyTorch makes most


class Usual(fd.FusedDNILinear):
    """Has no such call: it is bound for the layer itself alone."""


def pair(row: dict[str, Any]) -> tuple[fd.FusedDNILinear, fd.FusedDNILinear]:
    """A layer that knows no targets, and the same in the usual way."""
    torch.manual_seed(0)
    options = {k: v for k, v in row.items() if k != "rule"}
    layer = fd.FusedDNILinear(4, 6, backend="cpu", update=row["rule"], **options)
    assert layer.synthesizer is not None
    twins.disturb(layer.synthesizer)
    twin = copy.deepcopy(layer)
    twin.__class__ = Usual
    for each in (layer, twin):
        fd.Schedule(each, target_every=None)
    return layer, twin


def batch(row: dict[str, Any], seed: int, rows: int = 8) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(seed)
    x = torch.randn(rows, 4, dtype=row["dtype"])
    return x, torch.randint(0, 5, (rows,)) if row["context_features"] else None


def ran(layer: nn.Module, *arguments: Any) -> tuple[Tensor | None, int, str]:
    """What a call returns or raises, and how many Python functions it calls."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    gc.disable()  # whoever listens to the collector (Hypothesis does) would be counted
    sys.setprofile(count)
    try:
        made, said = layer(*arguments), ""
    except Exception as error:
        made, said = None, f"{type(error).__name__}: {error}"
    finally:
        sys.setprofile(None)
        gc.enable()
    return made, calls, said


def agree(
    layer: fd.FusedDNILinear, twin: fd.FusedDNILinear, *arguments: Any, quick: bool | None
) -> None:
    """The same result or error, the same parameters, moments and counts; by the one call or not
    (None: either)."""
    (mine, calls, said), (theirs, _, saying) = ran(layer, *arguments), ran(twin, *arguments)
    assert said == saying
    assert quick is None or (calls <= MOST) == quick, (calls, said)
    if theirs is not None:
        assert mine is not None
        assert torch.equal(mine, theirs) and mine.requires_grad == theirs.requires_grad
        assert getattr(mine, NO_TARGET, None) == getattr(theirs, NO_TARGET, None)
    states = layer.state_dict(), twin.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    for (_, rule, _), (_, other, _) in zip(layer.rules(), twin.rules(), strict=True):
        assert torch.equal(rule.hyper, other.hyper)
        for moments in zip(rule.moments(), other.moments(), strict=True):
            for a, b in zip(*moments, strict=True):
                assert (a is None) == (b is None)
                assert a is None or (b is not None and torch.equal(a, b))


@pytest.mark.parametrize("row", TABLE, ids=named)
def test_the_bits_are_those_of_the_usual_way(row: dict[str, Any]) -> None:
    layer, twin = pair(row)
    for step in range(6):
        agree(layer, twin, *batch(row, step, 8 + step % 2), quick=step > 0)
    versions = [p._version for p in layer.parameters()]
    layer(*batch(row, 9))
    moved = [
        p for p, before in zip(layer.parameters(), versions, strict=True) if p._version > before
    ]
    assert layer.weight in set(moved)


@pytest.mark.parametrize("loss_scale", [None, 8.0])
@pytest.mark.parametrize("container", [nn.Sequential, fd.DecoupledSequential])
@pytest.mark.parametrize("row", TABLE[::3], ids=named)
def test_in_a_cycle_and_a_network(
    row: dict[str, Any], container: type[nn.Sequential], loss_scale: float | None
) -> None:
    """Warm-up, then targets on every third step, what comes down from the next layer, a head with
    the true gradient in every step; a rate that falls."""
    models = []
    for kind in (fd.FusedDNILinear, Usual):
        torch.manual_seed(0)
        options = {k: v for k, v in row.items() if k not in ("rule", "context_features")}
        told = {**options, "context_features": row["context_features"]}
        exact = {**options, "synthesizer": None, "interface": "output", "activation": "identity"}
        rule = row["rule"]
        body = [kind(i, o, backend="cpu", update=rule, **told) for i, o in ((4, 6), (6, 7), (7, 5))]
        heads = [kind(i, o, backend="cpu", update=rule, **exact) for i, o in ((5, 6), (6, 3))]
        model = nn.Sequential(container(*body), *heads)
        schedule = fd.Schedule(model, warmup_steps=2, target_every=3, loss_scale=loss_scale)
        optimizer = fd.FusedOptimizer(model)
        rate = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        for step in range(30):
            x, y = batch(row, step)
            optimizer.zero_grad()
            with fd.condition_on(torch.zeros(8, dtype=torch.int64) if y is None else y):
                (model(x).square().mean() * (loss_scale or 1.0)).backward()
            optimizer.step()
            rate.step()
            schedule.step()
        if kind is fd.FusedDNILinear:
            assert all(layer._binding.quick is not None for layer in body)
            assert all(layer._binding.exact is not None for layer in heads)
            assert (getattr(model[0], "_stack", None) is None) == (container is nn.Sequential)
        models.append(model)
    for (name, mine), theirs in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    for mine, theirs in zip(*(list(model.modules()) for model in models), strict=True):
        if isinstance(mine, fd.FusedDNILinear):
            assert isinstance(theirs, fd.FusedDNILinear)
            assert torch.equal(mine.statistics, theirs.statistics)
            for (_, rule, _), (_, other, _) in zip(mine.rules(), theirs.rules(), strict=True):
                assert torch.equal(rule.hyper, other.hyper)


# ---------------------------------------------------------------------------------------------
# What is not as it was


def _replace_weight(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def _replace_data(layer: Any) -> None:
    layer.weight.data = layer.weight.data * 2


def _transpose_data(layer: Any) -> None:
    layer.weight.data = torch.zeros_like(layer.weight).t().contiguous().t()


def _group(layer: Any) -> None:
    layer.update.group["weight_decay"] = 0.1


def _rate(layer: Any) -> None:
    layer.update.group["lr"] = 0.5


def _wrong_rate(layer: Any) -> None:
    layer.update.group["lr"] = -1.0


def _freeze(layer: Any) -> None:
    layer.weight.requires_grad_(False)


def _grad(layer: Any) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)


def _synthesizers_grad(layer: Any) -> None:
    layer.synthesizer.bias.grad = torch.ones_like(layer.synthesizer.bias)


def _momentum(layer: Any) -> None:
    layer.norm.momentum = 0.5


def _norm_evaluates(layer: Any) -> None:
    layer.norm.eval()


def _evaluate(layer: Any) -> None:
    layer.eval()


def _bound_norm(layer: Any) -> None:
    layer.max_norm = 0.001


def _kappa(layer: Any) -> None:
    layer.target_scale = 3.0


def _unit(layer: Any) -> None:
    layer.synthesizer.unit.size = 4.0


def _synthesizer(layer: Any) -> None:
    torch.manual_seed(5)
    layer.synthesizer = fd.LinearSynthesizer(6, 2, 5, dtype=layer.weight.dtype)


def _parametrize(layer: Any) -> None:
    parametrizations.weight_norm(layer)


def _parametrize_synthesizer(layer: Any) -> None:
    parametrizations.weight_norm(layer.synthesizer)


def _statistics(layer: Any) -> None:
    layer.norm.running_mean = torch.ones_like(layer.norm.running_mean)


def _target(layer: Any) -> None:
    fd.Schedule(layer, target_every=1)


def _load(layer: Any) -> None:
    layer.load_state_dict(layer.state_dict())


def _reset(layer: Any) -> None:
    torch.manual_seed(3)
    layer.reset_parameters()


#: And whether the next call is the quick one all the same.
CHANGES: dict[str, tuple[Callable[[Any], None], bool]] = {
    f.__name__.removeprefix("_"): (f, quick)
    for f, quick in {
        _replace_weight: False, _replace_data: False, _transpose_data: False, _group: False,
        _rate: True, _wrong_rate: False, _freeze: False, _grad: False, _synthesizers_grad: True,
        _momentum: False, _norm_evaluates: False, _evaluate: False, _bound_norm: False,
        _kappa: False, _unit: True, _synthesizer: False, _parametrize: False,
        _parametrize_synthesizer: False, _statistics: False, _load: False,
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    change, quick = CHANGES[name]
    layer, twin = pair(ROW)
    for step in range(3):
        agree(layer, twin, *batch(ROW, step), quick=step > 0)
    for each in (layer, twin):
        change(each)
    if name == "evaluate":
        x, y = batch(ROW, 3)
        assert torch.equal(layer(x, y), twin(x, y))
        return
    agree(layer, twin, *batch(ROW, 3), quick=quick)
    for step in range(4, 7):  # bound anew, or not
        agree(layer, twin, *batch(ROW, step), quick=None)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no gradients": torch.no_grad,
    "hooks on saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t
    ),
    "a dispatch mode": lambda: FlopCounterMode(display=False),
    "somebody who watches": lambda: nodes.watching(lambda call: None),
    "annotated": fd.annotate,
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_are_seen(name: str) -> None:
    layer, twin = pair({**ROW, "dtype": torch.float32})
    row = {**ROW, "dtype": torch.float32}
    for step in range(3):
        agree(layer, twin, *batch(row, step), quick=step > 0)
    x, y = batch(row, 3)
    made = []
    for each in (layer, twin):
        with SURROUNDINGS[name]():
            made.append(each(x, y))
    assert torch.equal(*made) and made[0].dtype == made[1].dtype
    agree(layer, twin, *batch(row, 4), quick=None)


def _inputs(row: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    x, y = batch(row, 7)
    assert y is not None
    wrong = y.clone()
    wrong[3] = 5
    return {
        "more dimensions": (x.view(2, 4, 4), y.view(2, 4)),
        "not contiguous": (x.t().contiguous().t(), y),
        "every second label": (x, y.repeat_interleave(2)[::2]),
        "asks for a gradient": (x.clone().requires_grad_(), y),
        "of another type": (x.to(torch.bfloat16), y),
        "of another size": (x[:, :3], y),
        "one row": (x[:1], y[:1]),
        "no rows": (x[:0], y[:0]),
        "fewer labels": (x, y[:7]),
        "a label that there is not": (x, wrong),
        "int32 labels": (x, y.int()),
        "vectors": (x, torch.randn(8, 5, dtype=row["dtype"])),
        "no labels": (x,),
        "no tensor": (None, y),
        "a list of labels": (x, [0] * 8),
        "on no device": (x.to("meta"), y),
        "negated": (torch.complex(x, -x).conj().imag, y),
        "a parameter": (nn.Parameter(x, requires_grad=False), y),
    }


@pytest.mark.parametrize("name", _inputs(ROW))
def test_another_input_goes_the_usual_way(name: str) -> None:
    layer, twin = pair(ROW)
    for step in range(3):
        agree(layer, twin, *batch(ROW, step), quick=step > 0)
    arguments = _inputs(ROW)[name]
    results = [ran(each, *arguments) for each in (layer, twin)]
    (mine, calls, said), (theirs, _, saying) = results
    assert said == saying and calls > MOST
    assert theirs is None or (mine is not None and torch.equal(mine, theirs))
    agree(layer, twin, *batch(ROW, 4), quick=None)


def test_labels_of_the_context_are_those_given() -> None:
    layer, twin = pair(ROW)
    for step in range(4):
        x, y = batch(ROW, step)
        assert y is not None
        with fd.condition_on(y):
            agree(layer, twin, x, quick=step > 0)
        with fd.condition_on((y + 1) % 5):
            agree(layer, twin, x, y, quick=True)


def test_whoever_is_told_nothing_takes_no_labels() -> None:
    row = {**ROW, "context_features": 0}
    layer, twin = pair(row)
    for step in range(3):
        x, _ = batch(row, step)
        with fd.condition_on(torch.zeros(3)):
            agree(layer, twin, x, quick=step > 0)
    agree(layer, twin, x, torch.zeros(8, dtype=torch.int64), quick=False)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, "pickled"])
def test_a_copy_takes_its_own_steps(how: Any) -> None:
    layer, _ = pair(ROW)
    for step in range(3):
        layer(*batch(ROW, step))
    if how == "pickled":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = how(layer)
    other.train(False)
    x, y = batch(ROW, 3)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    evaluated = other(x, y)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    layer.eval()
    assert torch.equal(layer(x, y), evaluated)


def test_hooks_see_it() -> None:
    layer, _ = pair(ROW)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, arguments, out: seen.append(out))
    made = [layer(*batch(ROW, step)) for step in range(3)]
    assert layer._binding.quick is not None
    assert all(a is b for a, b in zip(seen, made, strict=True))


def test_a_layer_goes_when_nobody_holds_it() -> None:
    """Though what it is bound by leads back to it."""
    layer, _ = pair(ROW)
    for step in range(3):
        layer(*batch(ROW, step))
    assert layer._binding.quick is not None
    gone = weakref.ref(layer), weakref.ref(layer.weight)
    del layer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_other_backends_and_kinds_have_none() -> None:
    for options in (
        {"backend": "reference"},
        {"synthesizer": fd.MLPSynthesizer(6, 8)},
    ):
        layer = fd.FusedDNILinear(4, 6, update=fd.SGD(0.1), **options)
        fd.Schedule(layer, target_every=None)
        for _ in range(3):
            layer(torch.randn(8, 4))
        assert layer._binding.quick is None
