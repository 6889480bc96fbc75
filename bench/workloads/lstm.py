"""The LSTM's candidates, by the rules of :mod:`workloads`: written once, checked before timed.

Input size and hidden size are equal. What arrives at a window's outputs is a given gradient, as if
from a mean loss of a head above, and the input asks for its own, as with an embedding or a layer
below: so all candidates make the same products, and a loss is no part of what is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.measure import timing
from workloads import RATE, Disagreement, agree, within

#: Windows in the check of a training step.
CHECKED = 3
#: What is compiled: so many unrolled steps in all layers together, so wide. Beyond, compiling takes
#: longer than measuring everything else. And the seconds it is given.
UNROLLED, WIDEST = 32, 256
COMPILE_LIMIT = 60.0

State = tuple[Tensor, Tensor]


class Shape(NamedTuple):
    """Rows, hidden (and input) size, steps of a window, layers."""

    batch: int
    hidden: int
    steps: int
    layers: int = 1

    def __str__(self) -> str:
        text = f"{self.batch}/{self.hidden}/{self.steps}"
        return text if self.layers == 1 else f"{text}, {self.layers} layers"


SHAPES = (
    Shape(1, 128, 32),
    Shape(16, 128, 32),
    Shape(32, 256, 16),
    Shape(64, 256, 64),
    Shape(64, 512, 32),
    Shape(16, 128, 32, 2),
)
#: Windows at which the cost of the boundary is measured, for every batch and width above.
BOUNDARY_STEPS = (8, 16, 32, 64)


def boundary_shapes() -> list[Shape]:
    """Return the one-layer shapes at every window of the boundary's table."""
    sizes = dict.fromkeys((s.batch, s.hidden) for s in SHAPES if s.layers == 1)
    return [Shape(batch, hidden, steps) for batch, hidden in sizes for steps in BOUNDARY_STEPS]


def cell_shapes() -> list[Shape]:
    """Return a step of every batch and width."""
    return [Shape(*size, 1) for size in dict.fromkeys((s.batch, s.hidden) for s in SHAPES)]


class Data(NamedTuple):
    """What a window is given."""

    x: Tensor  # [T, B, H]
    h: Tensor  # [L, B, H]
    c: Tensor  # [L, B, H]
    grad: Tensor  # [T, B, H]: arrives at the outputs


@lru_cache(maxsize=4)
def data(shape: Shape, dtype: torch.dtype = torch.float32) -> Data:
    """Standard normal input, a state in [-1, 1], the gradient of a mean over steps and rows."""
    batch, hidden, steps, layers = shape
    generator = torch.Generator().manual_seed(3)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    x, h, c = (
        normal(steps, batch, hidden),
        normal(layers, batch, hidden).tanh(),
        normal(layers, batch, hidden),
    )
    grad = normal(steps, batch, hidden) / (steps * batch)
    return Data(*(t.to(dtype) for t in (x, h, c, grad)))


def stock_lstm(shape: Shape, dtype: torch.dtype = torch.float32) -> nn.LSTM:
    """``nn.LSTM`` with weights by a fixed seed."""
    torch.manual_seed(0)
    return nn.LSTM(shape.hidden, shape.hidden, shape.layers).to(dtype)


@dataclass(frozen=True)
class Method:
    """A way to run or train a window.

    Attributes:
        name: as printed.
        ours: on fused_dni's kernels, else ``nn.LSTM``.
        synthesizer: with the default boundary synthesizer (``ours`` alone).
        rule: training: the update is applied inside the backward (``ours`` alone); otherwise by
            ``torch.optim.Adam(fused=True)``.
        onednn: ``nn.LSTM`` through oneDNN, else through ATen's own loop.
        compiled: the unrolled steps under ``torch.compile``.
    """

    name: str
    ours: bool = False
    synthesizer: bool = False
    rule: bool = False
    onednn: bool = True
    compiled: bool = False


STOCK = Method("nn.LSTM")
NATIVE = Method("nn.LSTM, oneDNN off", onednn=False)
UNROLLED_LOOP = Method("unrolled steps, compiled", compiled=True)
OURS = Method("ours", ours=True)
DNI = Method("ours with the boundary synthesizer", ours=True, synthesizer=True)
#: Of forward and forward+backward.
WINDOW_METHODS = (STOCK, NATIVE, UNROLLED_LOOP, OURS, DNI)
#: Of the training step.
STOCK_STEP = Method("nn.LSTM, Adam(fused=True)")
OURS_STEP = Method("ours, Adam in the backward", ours=True, rule=True)
DNI_STEP = Method("DNI, Adam in the backward", ours=True, synthesizer=True, rule=True)
STEP_METHODS = (
    STOCK_STEP,
    Method("ours, Adam(fused=True)", ours=True),
    OURS_STEP,
    Method("DNI, Adam(fused=True)", ours=True, synthesizer=True),
    DNI_STEP,
)


def make(
    shape: Shape,
    method: Method,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    lr: float = RATE,
) -> nn.Module:
    """Make the LSTM of a method: the same weights in all, synthesizers that predict something."""
    stock = stock_lstm(shape, dtype)
    if not method.ours:
        return stock
    options: dict[str, Any] = {"backend": backend}
    if not method.synthesizer:
        options["synthesizer"] = None
    if method.rule:
        options["update"] = fd.Adam(lr)
    lstm = fd.FusedDNILSTM.from_lstm(stock, **options)
    if method.synthesizer:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in lstm.synthesizer.parameters():
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.copy_(noise * 0.05)
    return lstm


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Do as ``torch.backends.mkldnn.flags(enabled=False)``, without what that sets beside it."""
    torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=True)


def _native(call: Callable[[], Any]) -> Callable[[], Any]:
    def without() -> Any:
        with _without_onednn():
            return call()

    return without


def unrolled(
    x: Tensor, first_h: Tensor, first_c: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, State]:
    """Return the window as good plain PyTorch: one product for the inputs, then step by step."""
    hs, cs = [], []
    for layer, (h, c) in enumerate(zip(first_h.unbind(), first_c.unbind(), strict=True)):
        w_ih, w_hh, b_ih, b_hh = parameters[4 * layer : 4 * layer + 4]
        gates = torch.addmm(b_ih + b_hh, x.flatten(0, 1), w_ih.t()).unflatten(0, x.shape[:2])
        outputs = []
        for projected in gates.unbind():
            i, f, g, o = torch.addmm(projected, h, w_hh.t()).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        x = torch.stack(outputs)
        hs.append(h)
        cs.append(c)
    return x, (torch.stack(hs), torch.stack(cs))


class _Placed:
    """An LSTM by a method, and what its first window is given."""

    def __init__(
        self,
        shape: Shape,
        method: Method,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        lr: float = RATE,
    ) -> None:
        x, h, c, self.grad = data(shape, dtype)
        self.x, self.state = x.clone().requires_grad_(), (h, c)
        self.lstm = make(shape, method, dtype, backend, lr)


class Window(_Placed):
    """One window from a given state: forward only, or also backward to weights and input."""

    def __init__(self, shape: Shape, method: Method, *given: Any, **options: Any) -> None:
        super().__init__(shape, method, *given, **options)
        if method.synthesizer:
            self.lstm.remember(self.state)  # so that each window teaches
        self.parameters = list(self.lstm.parameters())
        self.forward: Callable[[], tuple[Tensor, State]] = lambda: self.lstm(self.x, self.state)
        if method.compiled:
            compiled = torch.compile(unrolled, fullgraph=True, dynamic=False)
            self.forward = lambda: compiled(self.x, *self.state, self.parameters)
        if not method.onednn:
            self.forward, self.backward = _native(self.forward), _native(self.backward)

    def infer(self) -> tuple[Tensor, State]:
        """Forward without gradients."""
        with torch.no_grad():
            return self.forward()

    def backward(self) -> tuple[Tensor, State]:
        """Forward and backward: gradients of the parameters and of the input, from nothing."""
        self.x.grad = None
        for p in self.parameters:
            p.grad = None
        output, state = self.forward()
        output.backward(self.grad)
        return output, state


class Training(_Placed):
    """An LSTM trained window by window, its state going on from one to the next."""

    def __init__(
        self, shape: Shape, method: Method, *given: Any, lr: float = RATE, **options: Any
    ) -> None:
        super().__init__(shape, method, *given, lr=lr, **options)
        self.optimizer: torch.optim.Optimizer
        if method.rule:
            self.optimizer = fd.FusedOptimizer(self.lstm)
        else:
            self.optimizer = torch.optim.Adam(self.lstm.parameters(), lr=lr, fused=True)
        self.rule = method.rule

    def step(self) -> None:
        """Run a window, its backward and its update, as a user would write it."""
        if not self.rule:
            self.optimizer.zero_grad()
        self.x.grad = None
        output, (h, c) = self.lstm(self.x, self.state)
        output.backward(self.grad)
        self.optimizer.step()
        self.state = h.detach(), c.detach()


# ------------------------------------------------------------------------------------------ gates


def rounding(shape: Shape) -> float:
    """Say what float32 may differ by, in norm: sums are at most as long as the rows of the window
    or the inputs of a gate, and every step and layer adds its own error to the state it hands
    on."""
    batch, hidden, steps, layers = shape
    longest = max(steps * batch, 4 * hidden)
    return torch.finfo(torch.float32).eps * longest**0.5 * (steps * layers) ** 0.5


def _results(window: Window, backward: bool) -> dict[str, Tensor]:
    output, (h, c) = window.backward() if backward else window.infer()
    found = {"output": output, "h": h, "c": c}
    if backward:
        assert window.x.grad is not None
        found["dx"] = window.x.grad
        names = [name for name, _ in window.lstm.named_parameters()]
        for name, p in zip(names, window.parameters, strict=True):
            if p.grad is None:
                raise Disagreement(f"{name} got no gradient")
            found[name] = p.grad
    return found


@lru_cache(maxsize=8)
def _exact_results(shape: Shape, synthesizer: bool, backward: bool) -> dict[str, Tensor]:
    method = DNI if synthesizer else STOCK
    backend = "reference" if synthesizer else None
    return _results(Window(shape, method, torch.float64, backend), backward)


def not_compiled(shape: Shape) -> str | None:
    """Say why the unrolled steps of a window are not compiled; None if they are."""
    if shape.steps * shape.layers <= UNROLLED and shape.hidden <= WIDEST:
        return None
    return f"compiled only up to {UNROLLED} unrolled steps and H={WIDEST}, for the time it takes"


def check_window(
    shape: Shape, method: Method, *, backward: bool, backend: str | None = None
) -> Window:
    """Check a window that agrees with float64: ``nn.LSTM``, or with a synthesizer the reference
    backend.

    Raises:
        Disagreement: they differ by more than float32 explains.
        RuntimeError: not compiled, for the reason given.
    """
    what = f"{method.name} {shape}"
    reason = not_compiled(shape) if method.compiled else None
    if reason is not None:
        raise RuntimeError(reason)
    window = Window(shape, method, backend=backend)
    with within(COMPILE_LIMIT if method.compiled else None):
        found = _results(window, backward)
    agree(what, found, _exact_results(shape, method.synthesizer, backward), rounding(shape))
    return window


def _moved(training: Training) -> dict[str, Tensor]:
    before = {name: p.detach().double() for name, p in training.lstm.named_parameters()}
    before = {name: p.clone() for name, p in before.items()}
    for _ in range(CHECKED):
        training.step()
    return {
        name: p.detach().double() - before[name] for name, p in training.lstm.named_parameters()
    }


@lru_cache(maxsize=8)
def _exact_movement(shape: Shape, synthesizer: bool) -> dict[str, Tensor]:
    method = DNI_STEP if synthesizer else STOCK_STEP
    backend = "reference" if synthesizer else None
    return _moved(Training(shape, method, torch.float64, backend, lr=1e-3))


def check_training(shape: Shape, method: Method, backend: str | None = None) -> Training:
    """Check a training whose parameters' movement over a few windows agrees with float64's:
    ``nn.LSTM`` with ``torch.optim.Adam``, or with a synthesizer the reference backend. Adam's first
    steps are signs: the share of entries that are as near to zero as rounding goes, which is about
    that of the rounding itself, may go the other way, and is off by twice its movement.

    Raises:
        Disagreement: they differ by more.
    """
    found = _moved(Training(shape, method, backend=backend, lr=1e-3))
    what = f"{method.name} {shape}"
    bound = 2.0 * rounding(shape) ** 0.5
    agree(what, found, _exact_movement(shape, method.synthesizer), bound)
    return Training(shape, method, backend=backend)


# ------------------------------------------------------------------------------------------- cell


class Cell:
    """One step of one layer, from a given state and given gradients of the next."""

    def __init__(
        self,
        shape: Shape,
        ours: bool,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> None:
        x, h, c, grad = data(shape, dtype)
        torch.manual_seed(0)
        cell = nn.LSTMCell(shape.hidden, shape.hidden).to(dtype)
        self.cell: nn.Module = cell
        if ours:
            self.cell = fd.FusedDNILSTMCell.from_lstm_cell(cell, synthesizer=None, backend=backend)
        self.given = [t[0].clone().requires_grad_() for t in (x, h, c)]
        self.grads = (grad[0], grad[0].flip(0).contiguous())
        self.leaves = [*self.given, *self.cell.parameters()]

    def forward(self) -> State:
        """Compute the next state, without gradients."""
        x, h, c = self.given
        with torch.no_grad():
            made: State = self.cell(x, (h, c))
        return made

    def backward(self) -> State:
        """Compute the next state, and the gradients of the parameters, the input and the state."""
        for leaf in self.leaves:
            leaf.grad = None
        x, h, c = self.given
        state: State = self.cell(x, (h, c))
        torch.autograd.backward(state, self.grads)
        return state


def check_cell(shape: Shape, ours: bool, *, backward: bool, backend: str | None = None) -> Cell:
    """Check a cell that agrees with ``nn.LSTMCell`` in float64.

    Raises:
        Disagreement: they differ by more than float32 explains.
    """
    made = Cell(shape, ours, backend=backend)
    found = []
    for cell in (made, Cell(shape, False, torch.float64)):
        h, c = cell.backward() if backward else cell.forward()
        results = {"h": h, "c": c}
        if backward:
            results |= {
                str(i): leaf.grad for i, leaf in enumerate(cell.leaves) if leaf.grad is not None
            }
        found.append(results)
    agree(f"cell {shape}", *found, rounding(shape))
    return made


# ------------------------------------------------------------------------------------------ floors


def floor(shape: Shape, backward: bool) -> timing.Candidate:
    """Return the products that a window cannot avoid, alone."""
    batch, hidden, steps, layers = shape
    return timing.lstm_floor(steps, batch, hidden, hidden, layers, backward=backward)


# ------------------------------------------------------------------------------------------ memory

MEMORY_BATCH = 32
MEMORY_HIDDEN = 128
MEMORY_SEQUENCE = 256
MEMORY_WINDOW = 8
MEMORY_WINDOWS = (4, 8, 16, 32, 64, 128)
MEMORY_LENGTHS = (32, 64, 128, 256, 512)


def memory_curves() -> dict[str, Any]:
    """Peak bytes of training once on a sequence: against T, where the last window is the whole
    sequence, and against the sequence's length, beside backprop through all of it."""
    from fused_dni.measure.memory import sequence_memory

    def peak(method: str, window: int, sequence: int) -> int:
        size = {"inputs": MEMORY_HIDDEN, "hidden": MEMORY_HIDDEN}
        return sequence_memory(method, window, sequence, batch=MEMORY_BATCH, **size)

    methods = ("backprop", "fused", "dni")
    windows = (*MEMORY_WINDOWS, MEMORY_SEQUENCE)
    by_window: dict[str, Any] = {"sequence": MEMORY_SEQUENCE, "windows": list(MEMORY_WINDOWS)}
    by_length: dict[str, Any] = {"window": MEMORY_WINDOW, "lengths": list(MEMORY_LENGTHS)}
    for method in methods:
        by_window[method] = [peak(method, window, MEMORY_SEQUENCE) for window in windows]
        by_length[method] = [peak(method, MEMORY_WINDOW, s) for s in MEMORY_LENGTHS]
    by_length["through"] = {
        method: [peak(method, s, s) for s in MEMORY_LENGTHS] for method in ("backprop", "fused")
    }
    return {
        "what": timing.PEAK_MEMORY_CPU,
        "batch": MEMORY_BATCH,
        "hidden": MEMORY_HIDDEN,
        "by_window": by_window,
        "by_length": by_length,
    }
