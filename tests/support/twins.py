"""What the tests of modules share: independent plain twins, exact expectations, snapshots."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.modules.base import DecoupledModule
from fused_dni.ops import registry

# Those that have float64, in which modules are compared.
_DOUBLE = torch.zeros(1, 1, dtype=torch.float64)
BACKENDS = [
    name
    for name, reason in registry.report()
    if reason is None and registry.get(name).why_not(_DOUBLE, _DOUBLE) is None
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda t: t,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "mish": F.mish,
}
NORMALIZATIONS = (None, "batch", "layer")


class Plain(nn.Module):
    """Linear, normalisation, activation from ``torch.nn`` alone, with a layer's parameters."""

    def __init__(self, layer: fd.FusedDNILinear) -> None:
        super().__init__()
        self.linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        self.linear.weight = copy.deepcopy(layer.weight)
        if layer.bias is not None:
            self.linear.bias = copy.deepcopy(layer.bias)
        self.norm = copy.deepcopy(layer.norm)
        self.activation = ACTIVATIONS[layer.config.activation]

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        if isinstance(self.norm, nn.BatchNorm1d):
            z = self.norm(z.reshape(-1, z.shape[-1])).reshape(z.shape)
        elif self.norm is not None:
            z = self.norm(z)
        return self.activation(z)

    def slots(self) -> list[nn.Parameter]:
        """In the order of ``FusedDNILinear.local_parameters``, absent ones left out."""
        return [*self.linear.parameters(), *(() if self.norm is None else self.norm.parameters())]


def linear(*sizes: int, **options: Any) -> fd.FusedDNILinear:
    """A layer in float64 whose synthesizer already predicts something."""
    layer = fd.FusedDNILinear(*sizes, dtype=torch.float64, **options)
    if layer.synthesizer is not None:
        disturb(layer.synthesizer)
    return layer


def disturb(module: nn.Module, size: float = 0.3) -> None:
    """Draw all parameters (a fresh synthesizer predicts zero, which proves nothing)."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0.0, size)


def double(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def present(slots: Iterable[Tensor | None]) -> list[Tensor]:
    return [t for t in slots if t is not None]


def kept(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Copies of the values."""
    return [t.detach().clone() for t in present(tensors)]


def close(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def synthetic(layer: DecoupledModule, h: Tensor, context: Tensor | None = None) -> Tensor:
    """The synthetic gradient by the synthesizer's own (unfused) forward."""
    assert layer.synthesizer is not None
    with torch.no_grad():
        rows = h.reshape(-1, h.shape[-1])
        return (layer.synthesizer(rows, context) / layer.scale_of(rows)).reshape(h.shape)


def regression(
    layer: DecoupledModule, h: Tensor, arrived: Tensor, context: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Gradients of the synthesizer's loss at h, by autograd, in the slots' order."""
    assert layer.synthesizer is not None
    rows = h.detach().reshape(-1, h.shape[-1])
    target = layer.scale_of(rows) * arrived.reshape(rows.shape)
    out = layer.synthesizer(rows, context)
    loss = (out - target).square().sum() / rows.shape[0]
    return torch.autograd.grad(loss, present(layer.synthesizer_parameters()))


# ---------------------------------------------------------------------------------------------
# Snapshots


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _tensors(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tensors(v) for v in value]
    return value


def values(model: nn.Module) -> dict[str, Any]:
    """The state dict; of synthesizers' units the size, without the count of what arrived."""
    state = dict(model.state_dict())
    return {k: v[:1] if k.endswith("_extra_state") else v for k, v in state.items()}


def snapshot(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Any]:
    """Values of parameters, gradients, buffers, rules' and optimizers' state."""
    state: dict[str, Any] = {"state": _tensors(values(model))}
    state["grad"] = {n: _tensors(p.grad) for n, p in model.named_parameters()}
    for name, module in model.named_modules():
        if not isinstance(module, DecoupledModule):
            continue
        for role in ("update", "norm_update", "synthesizer_update", "auxiliary_update"):
            rule = getattr(module, role, None)
            if rule is not None:
                held = (rule.steps, rule.moments())
                state[f"{name}.{role}"] = _tensors([held[0], *held[1]])
        for sums in ("statistics", "auxiliary_statistics"):
            if hasattr(module, sums):
                state[f"{name}.{sums}"] = getattr(module, sums).clone()
    for i, optimizer in enumerate(optimizers):
        state[f"optimizer{i}"] = _tensors(optimizer.state_dict())
    return state


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of snapshots (a moment of zeros equals one not yet made)."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if a is None or b is None:
            there = b if a is None else a
            return not bool(there.any())
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        if not a or not b:
            return not any(t is not None and bool(t.any()) for t in [*a, *b])
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What changed between two snapshots, by name."""
    out = []
    for key in a:
        if isinstance(a[key], dict) and isinstance(b[key], dict):
            out += [f"{key}.{k}" for k in a[key] if not same(a[key][k], b[key].get(k))]
        elif not same(a[key], b[key]):
            out.append(key)
    return out


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    assert not differences(before, after)


# ---------------------------------------------------------------------------------------------
# A network whose synthesizers are perfect


def perfect(features: int) -> fd.LinearSynthesizer:
    """``M(h) = context``: A = 0, c = 0, C = identity; does not learn."""
    made = fd.LinearSynthesizer(features, context_features=features, dtype=torch.float64)
    with torch.no_grad():
        assert made.context_weight is not None
        made.context_weight.copy_(torch.eye(features, dtype=torch.float64))
    return made.requires_grad_(False)


def backprop(
    modules: Sequence[nn.Module], x: Tensor, loss: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Run plain modules and their backward; the gradient at the output of each."""
    outputs = []
    for module in modules:
        x = module(x)
        x.retain_grad()
        outputs.append(x)
    loss(x).backward()
    return [h.grad for h in outputs if h.grad is not None]
