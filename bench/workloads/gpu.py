"""What is measured on a GPU, by the rules of :mod:`workloads`: written once, checked before timed.

Candidates run through the backends' protocol, below any module, because what is compared is the
kernels. A candidate owns its tensors and has a method ``step`` that can be captured in a CUDA
graph. Everything takes a device, so that the same code runs on a CPU (the kernels then in Triton's
interpreter, or in the host emulation of those in CUDA C++).

Input and weights are rounded to bfloat16 at the start, whatever the precision of the products: so
the operands of the first product are exact in all of them, and a check against float64 sees the
arithmetic and not the rounding of its input. Weights are float32, moments too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.measure import timing
from fused_dni.ops import registry
from fused_dni.ops.types import (
    STATISTICS_SIZE,
    LinearConfig,
    LinearTensors,
    LSTMLayer,
    SynthesizerTensors,
)
from fused_dni.rules import RuleState
from workloads import CLASSES, RANK, RATE, Disagreement, agree
from workloads.lstm import Shape, rounding

PRECISIONS = ("bf16", "fp16", "fp32", "tf32")
CONFIG = LinearConfig("batch", "relu")
#: What a step may be off by, in norm. Operands are rounded once more where delta and h are handed
#: on: by 2^-9 in bfloat16, 2^-11 in float16 and tf32 (which hardware may cut instead: 2^-10). In
#: float32 it is the few units whose ReLU flips.
BOUNDS = {"bf16": 2e-2, "fp16": 5e-3, "tf32": 5e-3, "fp32": 1e-3}


@contextlib.contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """torch's own switch between float32 and tf32 products, cuDNN's LSTM among them."""
    before = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn


def operand(precision: str) -> torch.dtype:
    """Return the dtype of activations."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


class Rounded(NamedTuple):
    """A seeded source of values that bfloat16 holds exactly."""

    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, device=self.device) * scale
        return values.bfloat16().to(self.dtype)


def source(device: torch.device, seed: int, dtype: torch.dtype) -> Rounded:
    """Return the same values for every dtype."""
    return Rounded(torch.Generator(device).manual_seed(seed), device, dtype)


def why_no_gpu() -> str | None:
    """Return None if the Triton backend can be timed on this machine, or why not."""
    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is false"
    return dict(registry.report())["triton"]


# ------------------------------------------------------------------------------------- one layer


class Case(NamedTuple):
    """A Linear-BatchNorm-ReLU, as many inputs as outputs, and the update it is given."""

    batch: int
    hidden: int
    precision: str = "bf16"
    rule: str = "sgd"
    dx: bool = False

    def __str__(self) -> str:
        text = f"{self.batch}/{self.hidden} {self.precision} {self.rule}"
        return f"{text} with dx" if self.dx else text

    def bytes(self) -> int:
        """Fewest that a step moves: each input read once, each result written once."""
        moments = 2 if self.rule == "adam" else 0
        size = operand(self.precision).itemsize
        activations = self.batch * self.hidden * size * (3 if self.dx else 2)
        return 2 * 4 * (1 + moments) * self.hidden * self.hidden + activations


class Layer:
    """The tensors of one layer: ``x`` and ``g`` [batch, hidden], labels [batch], parameters.

    Attributes:
        affine: whether scale and shift are trained.
    """

    affine = True

    def __init__(
        self,
        case: Case,
        device: torch.device,
        *,
        seed: int = 0,
        exact: bool = False,
        lr: float | None = None,
    ) -> None:
        batch, hidden = case.batch, case.hidden
        self.case = case
        dtype = torch.float64 if exact else torch.float32
        draw = source(device, seed, dtype)
        activations = torch.float64 if exact else operand(case.precision)
        self.x = draw(batch, hidden).to(activations)
        self.g = draw(batch, hidden, scale=1.0 / batch).to(activations)
        self.weight = nn.Parameter(draw(hidden, hidden, scale=hidden**-0.5))
        self.scale = nn.Parameter(1.0 + draw(hidden, scale=0.1), self.affine)
        self.shift = nn.Parameter(draw(hidden, scale=0.1), self.affine)
        self.running = (draw(hidden), draw(hidden).abs())
        self.labels = torch.randint(0, CLASSES, (batch,), generator=draw.generator, device=device)
        rank = min(RANK, hidden)
        self.synthesizer = SynthesizerTensors(
            "lowrank",
            nn.Parameter(draw(hidden, rank, scale=rank**-0.5)),
            nn.Parameter(draw(rank, hidden, scale=hidden**-0.5)),
            nn.Parameter(draw(hidden, CLASSES)),
            nn.Parameter(draw(hidden, scale=0.1)),
        )
        self.tensors = LinearTensors(self.weight, None, self.scale, self.shift, *self.running)
        self.slots = (self.weight, None, self.scale, self.shift)
        rate = RATE if lr is None else lr
        kind = fd.SGD if case.rule == "sgd" else fd.Adam
        self.rule = RuleState(kind(rate)).tensors(self.slots)

    def parameters(self) -> dict[str, Tensor]:
        vectors = {"scale": self.scale, "shift": self.shift} if self.affine else {}
        return {"weight": self.weight} | vectors


class Decoupled(Layer):
    """The decoupled step: forward, rank-16 label-conditioned synthetic gradient, update."""

    config = CONFIG

    def __init__(self, case: Case, device: torch.device, backend: str, **options: Any) -> None:
        super().__init__(case, device, **options)
        self.bound = registry.get(backend).bind_step(
            self.tensors, self.config, self.synthesizer, 0.0, self.rule
        )

    def step(self) -> dict[str, Tensor]:
        """h [batch, hidden], and dx [batch, hidden] where it is asked for."""
        made = self.bound(self.x, self.labels, float(self.case.batch), self.case.dx, False)
        return {"h": made.h} if made.dx is None else {"h": made.h, "dx": made.dx}


class Inside(Decoupled):
    """The same with the synthetic gradient at z, that need not go back through ReLU and BatchNorm;
    no step but one with a target trains scale and shift."""

    affine = False
    config = replace(CONFIG, interface="preactivation")


class Backprop(Layer):
    """Backprop on our kernels: the exact gradient, the update where it is made."""

    def __init__(self, case: Case, device: torch.device, backend: str, **options: Any) -> None:
        super().__init__(case, device, **options)
        self.backend = registry.get(backend)

    def step(self) -> dict[str, Tensor]:
        ours, layer, dx = self.backend, self.tensors, self.case.dx
        h, saved = ours.linear_forward(self.x, layer, CONFIG, True, True)
        gradients = ours.linear_backward(
            self.g, self.x, h, saved, layer, CONFIG, True, dx, need_weight=False
        )
        ours.linear_update_(self.x, gradients, layer, self.rule)
        return {"h": h} if gradients.x is None else {"h": h, "dx": gradients.x}


class StockModule(nn.Module):
    """Linear-BatchNorm-ReLU of given parameters, in training."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.weight, self.scale, self.shift = layer.weight, layer.scale, layer.shift
        for name, buffer in zip(("mean", "var"), layer.running, strict=True):
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.weight)
        moving = (self.mean, self.var, self.scale, self.shift)
        return F.relu(F.batch_norm(z, *moving, True, CONFIG.momentum, CONFIG.eps))


class Stock(Layer):
    """PyTorch's own: autocast for bf16 and fp16, autograd, ``torch.optim`` with ``fused=True``.

    ``mode`` is that of ``torch.compile`` of the forward (and with it of its backward).
    """

    def __init__(
        self, case: Case, device: torch.device, mode: str | None = None, **options: Any
    ) -> None:
        super().__init__(case, device, **options)
        rate = self.rule.hyper[0].item()
        kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "sgd": torch.optim.SGD,
            "adam": lambda *given, **kept: torch.optim.Adam(
                *given, **kept, capturable=device.type == "cuda"
            ),
        }
        self.optimizer = kinds[case.rule](self.parameters().values(), lr=rate, fused=True)
        module = StockModule(self)
        self.forward: Callable[[Tensor], Tensor] = module
        if mode is not None:
            self.forward = torch.compile(module, fullgraph=True, dynamic=False, mode=mode)
        self.x.requires_grad_(case.dx)

    def step(self) -> dict[str, Tensor]:
        self.x.grad = None
        self.optimizer.zero_grad()
        low = torch.float16 if self.case.precision == "fp16" else torch.bfloat16
        with torch.autocast(self.x.device.type, low, self.case.precision in ("bf16", "fp16")):
            h = self.forward(self.x)
        h.backward(self.g)
        self.optimizer.step()
        return {"h": h} if self.x.grad is None else {"h": h, "dx": self.x.grad}


class SynthesizerUpdate(Layer):
    """The training of the synthesizer on an arrived target, by Adam."""

    def __init__(self, case: Case, device: torch.device, backend: str, **options: Any) -> None:
        super().__init__(case, device, **options)
        self.backend = registry.get(backend)
        self.h = self.x.relu()
        self.prediction = self.backend.synthesizer_predict(self.h, self.synthesizer, self.labels)
        self.statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64, device=device)
        rate = options.get("lr") or RATE
        self.own = RuleState(fd.Adam(rate)).tensors(self.synthesizer.parameters())

    def parameters(self) -> dict[str, Tensor]:
        names = ("weight", "down", "context", "bias")
        slots = zip(names, self.synthesizer.parameters(), strict=True)
        return {name: p for name, p in slots if p is not None}

    def step(self) -> dict[str, Tensor]:
        self.backend.synthesizer_update_(
            self.h,
            self.prediction,
            self.g,
            self.synthesizer,
            self.labels,
            float(self.case.batch),
            self.statistics,
            self.own,
        )
        return {}


def moved(layer: Layer) -> dict[str, Tensor]:
    """One step: how far each parameter went, and the step's results, in float64."""
    before = {name: p.detach().double().clone() for name, p in layer.parameters().items()}
    made = layer.step()
    found = {name: p.detach().double() - before[name] for name, p in layer.parameters().items()}
    return found | {name: t.detach().double() for name, t in made.items()}


@lru_cache(maxsize=2)
def _exact(kind: type[Layer], case: Case, device: torch.device, lr: float) -> dict[str, Tensor]:
    return moved(kind(case, device, "reference", exact=True, lr=lr))


def check_layer(make: Callable[..., Layer], case: Case, device: torch.device) -> None:
    """Check a step of ``make(case, device, lr=)`` against the reference backend in float64.

    Adam's first step is a sign: the share of entries that are as near to zero as rounding goes may
    take the other one, and is off by twice its movement.

    Raises:
        Disagreement: parameters' movement, h or dx are off by more than ``BOUNDS``.
    """
    adam = case.rule == "adam"
    lr = 1e-3 if adam else 1.0
    layer = make(case, device, lr=lr)
    kind = type(layer) if isinstance(layer, (Decoupled, SynthesizerUpdate)) else Backprop
    found, expected = moved(layer), _exact(kind, case, device, lr)
    bound, signs = BOUNDS[case.precision], adam or kind is SynthesizerUpdate

    def allowed(name: str) -> float:
        return 2.0 * bound**0.5 if signs and name not in ("h", "dx") else bound

    agree(str(case), found, expected, allowed)


def products(case: Case, device: torch.device, seed: int = 0) -> Callable[[], None]:
    """Return the floor: the products that a step cannot avoid (two, three with dx), by torch."""
    draw = source(device, seed, operand(case.precision))
    batch, hidden = case.batch, case.hidden
    x, delta = draw(batch, hidden), draw(batch, hidden)
    weight, dw = draw(hidden, hidden), draw(hidden, hidden)
    h, dx = torch.empty_like(x), torch.empty_like(x)

    def floor() -> None:
        torch.mm(x, weight.t(), out=h)
        torch.mm(delta.t(), x, out=dw)
        if case.dx:
            torch.mm(delta, weight, out=dx)

    return floor


# ------------------------------------------------------------------------------------------ LSTM


class WindowCase(NamedTuple):
    """A window of one layer, as many inputs as hidden units."""

    batch: int
    hidden: int
    steps: int
    precision: str = "bf16"

    def __str__(self) -> str:
        return f"{self.batch}/{self.hidden}/{self.steps} {self.precision}"


class Window:
    """The tensors of a window: x and g [T, B, H], a state [1, B, H], parameters of one layer."""

    def __init__(self, case: WindowCase, device: torch.device, dtype: torch.dtype) -> None:
        batch, hidden, steps, _ = case
        draw = source(device, 3, dtype)
        self.x = draw(steps, batch, hidden)
        self.state = (draw(1, batch, hidden).tanh(), draw(1, batch, hidden).tanh())
        self.g = draw(steps, batch, hidden, scale=1.0 / (steps * batch))
        scale = (3 * hidden) ** -0.5  # the standard deviation of nn.LSTM's weights
        self.layer = LSTMLayer(
            draw(4 * hidden, hidden, scale=scale),
            draw(4 * hidden, hidden, scale=scale),
            draw(4 * hidden, scale=scale),
            draw(4 * hidden, scale=scale),
        )

    def step(self) -> dict[str, Tensor]:
        """Forward and backward: gradients of the parameters and of the input, from nothing."""
        raise NotImplementedError


class StockWindow(Window):
    """``nn.LSTM``: cuDNN on a GPU."""

    def __init__(self, case: WindowCase, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(case, device, dtype)
        self.lstm = nn.LSTM(case.hidden, case.hidden, device=device, dtype=dtype)
        with torch.no_grad():
            for p, given in zip(self.lstm.parameters(), self.layer, strict=True):
                assert given is not None
                p.copy_(given)
        self.lstm.flatten_parameters()
        self.x.requires_grad_()

    def forward(self) -> None:
        """Without gradients."""
        with torch.no_grad():
            self.lstm(self.x, self.state)

    def step(self) -> dict[str, Tensor]:
        self.x.grad = None
        self.lstm.zero_grad()
        output, (h, c) = self.lstm(self.x, self.state)
        output.backward(self.g)
        assert self.x.grad is not None
        return named(output, h, c, self.x.grad, [p.grad for p in self.lstm.parameters()])


class OurWindow(Window):
    """The backend's forward and backward. Parameters are of x's dtype, as those of ``nn.LSTM``, but
    for the CUDA backend, which has them in float32 alone."""

    def __init__(
        self, case: WindowCase, device: torch.device, dtype: torch.dtype, backend: str
    ) -> None:
        super().__init__(case, device, dtype)
        if backend == "cuda":
            self.layer = LSTMLayer(*(None if p is None else p.float() for p in self.layer))
        self.backend = registry.get(backend)
        reason = self.backend.why_not(self.x, self.layer.weight_ih)
        if reason is not None:
            raise RuntimeError(f"{backend} {reason}")

    def forward(self) -> None:
        """Without anything kept for a backward."""
        self.backend.lstm_forward(self.x, *self.state, (self.layer,), None, (), False)

    def step(self) -> dict[str, Tensor]:
        layers = (self.layer,)
        trace = self.backend.lstm_forward(self.x, *self.state, layers, None, (), True)
        made = self.backend.lstm_backward(
            self.g, None, None, self.x, layers, None, (), trace, True, True
        )
        assert made.x is not None
        return named(trace.hidden[0, 1:], trace.h, trace.c, made.x, list(made.layers[0]))


def named(
    output: Tensor, h: Tensor, c: Tensor, dx: Tensor, gradients: list[Tensor | None]
) -> dict[str, Tensor]:
    """Results of a window by name."""
    found = {"output": output, "h": h, "c": c, "dx": dx}
    for name, grad in zip(LSTMLayer._fields, gradients, strict=True):
        if grad is None:
            raise Disagreement(f"{name} got no gradient")
        found[name] = grad
    return found


def _doubles(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().double() for name, t in found.items()}


@lru_cache(maxsize=2)
def _exact_window(case: WindowCase, device: torch.device) -> dict[str, Tensor]:
    return _doubles(StockWindow(case, device, torch.float64).step())


@lru_cache(maxsize=2)
def _stock_errors(case: WindowCase, device: torch.device) -> dict[str, float]:
    found = _doubles(StockWindow(case, device, operand(case.precision)).step())
    expected = _exact_window(case, device)
    return {name: float((found[name] - t).norm() / t.norm()) for name, t in expected.items()}


def check_window(make: Callable[..., Window], case: WindowCase, device: torch.device) -> None:
    """Check a window of ``make(case, device)`` against ``nn.LSTM`` in float64.

    In float32 it is held to what rounding explains (:func:`workloads.lstm.rounding`). With rounded
    operands errors add up over the steps: there it may be twice as far off as ``nn.LSTM`` of the
    same precision is, and half of the bound of a layer besides.

    Raises:
        Disagreement: it is off by more.
    """
    found, expected = _doubles(make(case, device).step()), _exact_window(case, device)
    if case.precision == "fp32":
        agree(str(case), found, expected, rounding(Shape(*case[:3])))
        return
    stock, rest = _stock_errors(case, device), BOUNDS[case.precision] / 2
    agree(str(case), found, expected, lambda name: 2 * stock[name] + rest)


def window_floor(case: WindowCase, device: torch.device) -> timing.Candidate:
    """Return the products that a window cannot avoid, forward and backward, by torch."""
    batch, hidden, steps, precision = case
    return timing.lstm_floor(steps, batch, hidden, hidden, dtype=operand(precision), device=device)
