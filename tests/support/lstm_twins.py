"""What the tests of the recurrent modules share: modules in float64, streams, plain twins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from twins import BACKENDS, close, disturb, double, perfect, present

import fused_dni as fd
from fused_dni.modules.recurrent import Recurrent

State = tuple[Tensor, Tensor]


def _ready(module: Recurrent) -> Recurrent:
    """Heads that already predict something."""
    for head in (module.synthesizer, module.auxiliary_head):
        if head is not None:
            disturb(head, 0.1)
    return module


def lstm(*sizes: int, **options: Any) -> fd.FusedDNILSTM:
    module = fd.FusedDNILSTM(*sizes, dtype=torch.float64, **{"sg_scale": 1.0, **options})
    _ready(module)
    return module


def cell(*sizes: int, **options: Any) -> fd.FusedDNILSTMCell:
    module = fd.FusedDNILSTMCell(*sizes, dtype=torch.float64, **{"sg_scale": 1.0, **options})
    _ready(module)
    return module


def oracle(module: nn.Module, **options: Any) -> Any:
    """The same module with a perfect synthesizer: ``M(state) = context``, all scales 1."""
    make = (
        fd.FusedDNILSTMCell.from_lstm_cell
        if isinstance(module, nn.LSTMCell)
        else fd.FusedDNILSTM.from_lstm
    )
    layers = getattr(module, "num_layers", 1)
    return make(
        module,
        synthesizer=perfect(2 * layers * module.hidden_size),
        target_scale=1.0,
        sg_scale=1.0,
        **options,
    )


def plain_of(module: Any) -> Any:
    """An independent ``nn.LSTM`` or ``nn.LSTMCell`` with copies of the parameters."""
    is_cell = isinstance(module, fd.FusedDNILSTMCell)
    if is_cell:
        made: Any = nn.LSTMCell(module.input_size, module.hidden_size, module.bias)
    else:
        made = nn.LSTM(
            module.input_size,
            module.hidden_size,
            module.num_layers,
            module.bias,
            module.batch_first,
            module.dropout,
            module.bidirectional,
            module.proj_size,
        )
    made = made.to(next(module.parameters()).dtype)
    own = module.state_dict()
    made.load_state_dict({name: own[name] for name in made.state_dict()})
    return made.train(module.training)


def local_gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """``.grad`` of what ``nn.LSTM`` has too."""
    heads = ("synthesizer.", "auxiliary_head.")
    return {n: p.grad for n, p in module.named_parameters() if not n.startswith(heads)}


def zeros(layers: int, batch: int, hidden: int) -> State:
    return tuple(torch.zeros(layers, batch, hidden, dtype=torch.float64) for _ in "hc")  # type: ignore[return-value]


def random_state(layers: int, batch: int, hidden: int, grad: bool = False) -> State:
    return double(layers, batch, hidden, grad=grad), double(layers, batch, hidden, grad=grad)


def as_rows(state: Sequence[Tensor]) -> Tensor:
    """A state's rows as the synthesizer sees them: h_0, c_0, h_1, c_1, ... side by side."""
    return torch.cat([t for layer in zip(*state, strict=True) for t in layer], 1)


def state_grad(state: Sequence[Tensor]) -> Tensor:
    """The recorded gradients of a state as rows, zero where there are none."""
    return as_rows([torch.zeros_like(t) if t.grad is None else t.grad for t in state])


def recorded(state: State) -> State:
    """A copy of a state, in its graph, that records its gradient."""
    h, c = (t.clone() for t in state)
    for t in (h, c):
        if t.requires_grad:
            t.retain_grad()
    return h, c


def prediction(module: Recurrent, state: Sequence[Tensor], context: Tensor | None = None) -> Tensor:
    """``M`` at a state by the synthesizer's own (unfused) forward: kappa times the gradient."""
    assert module.synthesizer is not None
    with torch.no_grad():
        made: Tensor = module.synthesizer(as_rows(state), context)
    return made


def lesson(
    head: nn.Module, rows: Tensor, target: Tensor, context: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Gradients of the mean over rows of the squared error against ``target``, by autograd."""
    out = head(rows.detach(), context)
    loss = (out - target.detach()).square().sum() / rows.shape[0]
    return torch.autograd.grad(loss, list(head.parameters()))


def grads(module: nn.Module | None) -> list[Tensor | None]:
    assert module is not None
    return [p.grad for p in module.parameters()]


__all__ = [
    "BACKENDS", "as_rows", "cell", "close", "double", "grads", "lesson", "local_gradients",
    "lstm", "oracle", "plain_of", "prediction", "present", "random_state", "recorded",
    "state_grad", "zeros",
]  # fmt: skip
