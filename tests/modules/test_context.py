"""``condition_on``: what synthesizers are conditioned on."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
import twins
from torch import nn
from twins import BACKENDS, close, double, linear

import fused_dni as fd
from fused_dni.context import current_context, fold_context

pytestmark = pytest.mark.usefixtures("one_thread")


def test_nested_and_restored():
    a, b = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    assert current_context() is None
    with fd.condition_on(a):
        with fd.condition_on(b):
            assert current_context() is b
        assert current_context() is a
        with pytest.raises(KeyError), fd.condition_on(b):
            raise KeyError
        assert current_context() is a
    assert current_context() is None


def test_local_to_thread_and_task():
    a, seen = torch.zeros(2, dtype=torch.int64), []
    with fd.condition_on(a):
        thread = threading.Thread(target=lambda: seen.append(current_context()))
        thread.start()
        thread.join()
    assert seen == [None]

    async def worker(value):
        with fd.condition_on(torch.tensor([value])):
            await asyncio.sleep(0)
            return int(current_context())

    async def main():
        return await asyncio.gather(*(worker(i) for i in range(5)))

    assert asyncio.run(main()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)], ids=["returned", "fused"])
def test_captured_in_the_forward(backend, rule):
    """The backward runs outside, or inside of another."""
    layers = [linear(4, 5, context_features=3, update=rule, backend=backend) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x, g, labels = double(6, 4), double(6, 5), torch.randint(3, (6,))
    with fd.condition_on(labels):
        h = layers[0](x)
    with fd.condition_on(2 - labels):
        h.backward(g)
    layers[1](x, context=labels).backward(g)
    for p, q in zip(*(layer.parameters() for layer in layers), strict=True):
        close(p, q, 0)
        if rule is None:
            close(p.grad, q.grad, 0)


def test_the_argument_wins_and_layers_without_context_ignore_it():
    model = nn.Sequential(linear(4, 5, context_features=3), linear(5, 5))
    labels = torch.randint(3, (6,))
    with fd.condition_on(labels):
        model(double(6, 4)).sum().backward()
    bad = torch.full((6,), 99)
    with fd.condition_on(bad):
        model[0](double(6, 4), context=labels).sum().backward()


@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)], ids=["returned", "fused"])
def test_labels_equal_their_one_hot_vectors(rule):
    layers = [linear(4, 5, context_features=3, update=rule) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x, labels = double(6, 4), torch.randint(3, (6,))
    layers[0](x, context=labels).sum().backward()
    layers[1](x, context=nn.functional.one_hot(labels, 3).float()).sum().backward()
    for p, q in zip(*(layer.parameters() for layer in layers), strict=True):
        close(p, q)


@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)], ids=["returned", "fused"])
def test_a_dense_context_gets_no_gradient(rule):
    layer = linear(4, 5, context_features=3, update=rule)
    context = double(6, 3, grad=True)
    layer(double(6, 4), context=context).sum().backward()
    assert context.grad is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_folding(dtype):
    like = double(1)
    tail = () if dtype == torch.int64 else (4,)

    def fold(rows, leading):
        context = torch.arange(rows.numel()).reshape(rows).to(dtype)[(...,) + (None,) * len(tail)]
        context = context.expand(*rows, *tail)
        made = fold_context(context, torch.Size(leading), 4, like)
        assert made.is_contiguous() and made.dtype == dtype
        return (made if dtype == torch.int64 else made[:, 0]).tolist()

    assert fold(torch.Size((3,)), (3,)) == [0, 1, 2]
    assert fold(torch.Size((2,)), (2, 3)) == [0, 0, 0, 1, 1, 1]
    assert fold(torch.Size((2, 2)), (2, 2)) == [0, 1, 2, 3]
    assert fold(torch.Size((2, 2)), (2, 2, 2)) == [0, 0, 1, 1, 2, 2, 3, 3]
    for rows, leading in (((3,), (2, 3)), ((2, 3), (2,)), ((1,), (3,)), ((4,), (3,))):
        with pytest.raises(RuntimeError, match="not the leading dimensions"):
            fold(torch.Size(rows), leading)


BAD = {
    "missing": (None, ValueError, "context is missing: the synthesizer has context_features=3"),
    "rows": (torch.zeros(5, dtype=torch.int64), RuntimeError, r"context covers rows \[5\]"),
    "width": (torch.zeros(6, 4), RuntimeError, r"must have shape \[..., 3\]"),
    "scalar": (torch.tensor(0.5), RuntimeError, r"must have shape \[..., 3\]"),
    "dtype": (torch.zeros(6, dtype=torch.int32), RuntimeError, "class indices .* got torch.int32"),
    "bool": (torch.zeros(6, dtype=torch.bool), RuntimeError, "class indices .* got torch.bool"),
    "device": (
        torch.zeros(6, dtype=torch.int64, device="meta"),
        RuntimeError,
        "context is on meta",
    ),
    "high": (
        torch.tensor([0, 1, 2, 3, 0, 0]),
        IndexError,
        "(label|class index) 3 .*(out of range|outside)",
    ),
    "low": (
        torch.tensor([0, 1, 2, -1, 0, 0]),
        IndexError,
        "(label|class index) -1 .*(out of range|outside)",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["returned", "fused", "warmup", "mlp", "mlp fused", "decoupled"])
@pytest.mark.parametrize("case", BAD)
def test_bad_context_changes_nothing(backend, kind, case):
    context, error, message = BAD[case]
    rule = None if kind in ("returned", "mlp") else fd.Adam(0.1)
    mlp = fd.MLPSynthesizer(5, 4, context_features=3, dtype=torch.float64)
    if kind == "decoupled":
        layer = fd.Decoupled(nn.Linear(4, 5).double(), mlp, update=rule)
    elif "mlp" in kind:
        layer = linear(4, 5, normalization="batch", synthesizer=mlp, update=rule, backend=backend)
    else:
        layer = linear(
            4, 5, normalization="batch", context_features=3, update=rule, backend=backend
        )
    if kind == "warmup":
        fd.Schedule(layer, warmup_steps=5)
    before = twins.snapshot(layer)
    with pytest.raises(error, match=message):
        layer(double(6, 4), context=context)
    twins.unchanged(before, twins.snapshot(layer))


def test_unexpected_context():
    with pytest.raises(ValueError, match="context is unexpected"):
        linear(4, 5)(double(6, 4), context=torch.zeros(6, dtype=torch.int64))


def test_not_a_tensor():
    with pytest.raises(TypeError, match="context must be a torch.Tensor, got list"):
        with fd.condition_on([1, 2]):
            pass
