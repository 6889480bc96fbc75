"""Room for results is what every backend returns: its shapes and dtypes, and what is absent."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_dni.ops import registry, results
from fused_dni.ops.types import (
    STATISTICS_SIZE,
    Backend,
    LinearConfig,
    LinearTensors,
    LSTMLayer,
    Prediction,
    SynthesizerTensors,
)
from fused_dni.rules import SGD, RuleState

pytestmark = pytest.mark.usefixtures("one_thread")

N, I, O, R, T, H = 6, 4, 5, 2, 3, 7  # noqa: E741
SINGLE, DOUBLE = (torch.float32,) * 2, (torch.float64,) * 2
MIXED = (torch.bfloat16, torch.float32)
LOW = (torch.bfloat16,) * 2
pairs = pytest.mark.parametrize("dtypes", [SINGLE, DOUBLE, MIXED, LOW], ids=str)
every = pytest.mark.parametrize("name", registry.names())


def serving(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> Backend:
    """Skips where the backend does not serve an x and parameters of these dtypes."""
    x, weight = torch.zeros(1, 1, dtype=dtypes[0]), torch.zeros(1, 1, dtype=dtypes[1])
    reason = dict(registry.report())[name] or registry.get(name).why_not(x, weight)
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    return registry.get(name)


def described(made: Any) -> Any:
    """Tensors as shape and dtype, tuples as lists, what is absent as None."""
    if isinstance(made, Tensor):
        return tuple(made.shape), made.dtype
    return None if made is None else [described(part) for part in made]


def same_as_room(backend: Backend, op: str, *given: Any) -> Any:
    """Run an op and compare what it returns with the room that is made for it."""
    names = list(inspect.signature(getattr(Backend, op)).parameters)[1:]
    named = dict(zip(names, given, strict=True))
    room = getattr(results, op)
    expected = room(**{n: named[n] for n in inspect.signature(room).parameters})
    made = getattr(backend, op)(*given)
    assert described(made) == described(expected), op
    return made


@pytest.mark.parametrize("interface", ["output", "preactivation"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("normalization", ["batch", "layer", None])
@pairs
@every
def test_linear(name, dtypes, normalization, full, interface):
    backend, (low, high) = serving(name, dtypes), dtypes
    x, vector = torch.randn(N, I, dtype=low), torch.rand(O, dtype=high)
    affine = [vector.clone() if normalization and full else None for _ in range(2)]
    running = [vector.clone() if normalization == "batch" else None for _ in range(2)]
    weight = torch.randn(O, I, dtype=high)
    layer = LinearTensors(weight, vector.clone() if full else None, *affine, *running)
    config = LinearConfig(normalization, "identity" if full else "gelu", interface=interface)
    h, saved = same_as_room(backend, "linear_forward", x, layer, config, True, True)
    same_as_room(backend, "linear_forward", x, layer, config, False, False)
    same_as_room(backend, "linear_backward", h, x, h, saved, layer, config, True, full, full)
    target = torch.zeros(N, dtype=torch.int64)
    same_as_room(backend, "linear_cross_entropy", x, weight, None, target, 0.0, -100, full)
    down, up = torch.randn(R, O, dtype=high), torch.randn(O, R, dtype=high)
    synthesizer = (
        SynthesizerTensors("lowrank", up, down, None, vector.clone())
        if full
        else SynthesizerTensors("diagonal", vector.clone())
    )
    made = same_as_room(backend, "synthesizer_predict", h, synthesizer, None)
    statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64)
    same_as_room(
        backend, "synthesizer_gradients", h, Prediction(*made), h, synthesizer, None, 6.0,
        statistics,
    )  # fmt: skip
    if high == torch.bfloat16:
        return  # an update needs masters
    slots = layer[:4] if interface == "output" else (*layer[:2], None, None)
    rule = RuleState(SGD(0.1)).tensors(
        [None if t is None else torch.nn.Parameter(t) for t in slots]
    )
    same_as_room(
        backend, "linear_step_", x, layer, config, synthesizer, None, 6.0, 0.0, rule, full, full
    )


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtypes", [SINGLE, DOUBLE], ids=str)
@every
def test_lstm(name, dtypes, full):
    backend, dtype = serving(name, dtypes), dtypes[0]

    def layer(inputs: int) -> LSTMLayer:
        biases = [torch.randn(4 * H, dtype=dtype) if full else None for _ in range(2)]
        weights = [torch.randn(4 * H, width, dtype=dtype) for width in (inputs, H)]
        return LSTMLayer(*weights, *biases)

    x, layers = torch.randn(T, N, I, dtype=dtype), (layer(I), layer(H))
    h, c = torch.randn(2, N, H, dtype=dtype), torch.randn(2, N, H, dtype=dtype)
    trace = same_as_room(backend, "lstm_forward", x, h, c, layers, None, (), True)
    same_as_room(backend, "lstm_forward", x, h, c, layers, None, (), False)
    same_as_room(backend, "lstm_backward", None, h, None, x, layers, None, (), trace, full, full)
    step = same_as_room(backend, "lstm_cell_forward", x[0], h[0], c[0], layers[0], True)
    same_as_room(backend, "lstm_cell_forward", x[0], h[0], c[0], layers[0], False)
    same_as_room(
        backend, "lstm_cell_backward", h[0], None, x[0], h[0], c[0], layers[0], step, full, full
    )
