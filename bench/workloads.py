"""What is measured, written once: pytest-benchmark suites and the interleaved tables share it.

Nothing here takes a time. A *candidate* is a callable without arguments together with what it was
checked against before anything is timed: :func:`check_step` and :func:`check_layer` raise
:class:`Disagreement` when a candidate does not compute what it claims to, and a benchmark of a
candidate that fails its check is a failed benchmark.

The networks have no bias in front of batch normalisation, on either side: its gradient is zero but
for rounding, and good stock code leaves it out.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd

CLASSES = 10
DEPTH = 4
RANK = 16
#: Steps in one call of a training candidate: a whole cycle of targets on every fourth step.
CYCLE = 4
#: Batches that candidates go round, so that a network cannot learn one by heart while timed.
POOL = 8


class Disagreement(AssertionError):
    """A candidate does not compute what it is compared with."""


class Case(NamedTuple):
    """Rows of a batch and width of the hidden layers."""

    batch: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.batch}/{self.hidden}"


CASES = (Case(64, 256), Case(128, 512), Case(128, 1024))
RULES = ("sgd", "adam")


@dataclass(frozen=True)
class Method:
    """A way to train the network.

    Attributes:
        name: as printed.
        ours: on fused_dni's layers, else stock PyTorch.
        compiled: stock network and loss under ``torch.compile``.
        target_every: k of the synthesizers' targets; None for never; 0 for no synthesizer.
        bf16: under ``torch.autocast`` to bfloat16.
    """

    name: str
    ours: bool = False
    compiled: bool = False
    target_every: int | None = 0
    bf16: bool = False


STOCK = Method("stock backprop, eager, fused optimizer")
COMPILED = Method("stock backprop, compiled, fused optimizer", compiled=True)
OURS = Method("backprop on our kernels", ours=True)
DNI_1 = Method("DNI, targets on every step", ours=True, target_every=1)
DNI_4 = Method("DNI, targets on every 4th step", ours=True, target_every=4)
DNI_NEVER = Method("DNI, never a target", ours=True, target_every=None)
METHODS = (
    STOCK,
    COMPILED,
    OURS,
    DNI_1,
    DNI_4,
    DNI_NEVER,
    Method("stock backprop, eager, bf16", bf16=True),
    Method("stock backprop, compiled, bf16", compiled=True, bf16=True),
    Method("backprop on our kernels, bf16", ours=True, bf16=True),
    Method("DNI, targets on every 4th step, bf16", ours=True, target_every=4, bf16=True),
)

#: Learning rates, of the layers and of their synthesizers. The regression's curvature is that of
#: the activations, far above the loss's, so plain SGD would need a rate of its own for each width;
#: synthesizers are trained by Adam under both rules.
LEARNING_RATES = {"sgd": 0.1, "adam": 1e-3}
SYNTHESIZER_RATE = 3e-3


def rule(name: str, lr: float | None = None) -> fd.SGD | fd.Adam:
    """The update rule of that name, as fused_dni's description."""
    lr = LEARNING_RATES[name] if lr is None else lr
    return fd.SGD(lr=lr) if name == "sgd" else fd.Adam(lr=lr)


def stock_optimizer(
    name: str, model: nn.Module, lr: float | None = None, fused: bool = True
) -> torch.optim.Optimizer:
    """The same rule as the stock optimizer with ``fused=True``: the honest bar."""
    lr = LEARNING_RATES[name] if lr is None else lr
    kind = torch.optim.SGD if name == "sgd" else torch.optim.Adam
    return kind(model.parameters(), lr=lr, fused=fused)


def stock_network(hidden: int, depth: int = DEPTH, seed: int = 0) -> nn.Sequential:
    """``depth`` times Linear-BatchNorm-ReLU of one width, and a linear head."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, CLASSES))


def our_network(
    stock: nn.Sequential,
    update: fd.SGD | fd.Adam,
    *,
    synthesizers: bool,
    backend: str | None = None,
    container: Callable[..., nn.Module] = nn.Sequential,
) -> nn.Module:
    """The network ``stock`` with its weights, on fused layers; the head is always exact."""
    stock = copy.deepcopy(stock)
    modules = list(stock)
    layers: list[nn.Module] = []
    for i in range(0, len(modules) - 1, 3):
        linear = modules[i]
        options: dict[str, Any] = {"synthesizer": None}
        if synthesizers:
            synthesizer = fd.LinearSynthesizer(
                linear.out_features, rank=min(RANK, linear.out_features), context_features=CLASSES
            )
            options = {
                "synthesizer": synthesizer.to(linear.weight.dtype),
                "synthesizer_update": fd.Adam(SYNTHESIZER_RATE),
            }
        layers.append(
            fd.FusedDNILinear.from_linear(
                linear, modules[i + 1], "relu", update=update, backend=backend, **options
            )
        )
    head = fd.FusedDNILinear.from_linear(
        modules[-1], synthesizer=None, update=update, backend=backend
    )
    return container(*layers, head)


class Training:
    """One network, its rule and its schedule, stepped by :meth:`step`."""

    def __init__(
        self,
        case: Case,
        rule_name: str,
        method: Method,
        *,
        lr: float | None = None,
        depth: int = DEPTH,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        container: Callable[..., nn.Module] = nn.Sequential,
    ) -> None:
        self.case, self.method = case, method
        stock = stock_network(case.hidden, depth, seed).to(dtype)
        self.optimizer: torch.optim.Optimizer
        self.schedule: Any = None
        if method.ours:
            self.model = our_network(
                stock,
                rule(rule_name, lr),
                synthesizers=method.target_every != 0,
                backend=backend,
                container=container,
            )
            self.optimizer = fd.FusedOptimizer(self.model)
            every = 1 if method.target_every == 0 else method.target_every
            self.schedule = fd.Schedule(self.model, target_every=every)
        else:
            self.model = stock
            self.optimizer = stock_optimizer(rule_name, stock, lr)
        loss: Callable[[Tensor, Tensor], Tensor] = self._loss
        if method.compiled:
            loss = torch.compile(loss, fullgraph=True, dynamic=False)
        self._forward = loss

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)

    def scramble_synthesizers(self, seed: int = 1, scale: float = 0.05) -> None:
        """Give the synthesizers random output layers. An untrained one predicts zero, and a step
        that updates nothing is no step to check or to time."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if ".synthesizer." in name and not name.endswith(".down"):
                    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                    p.copy_(noise * scale)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.method.bf16:
            return torch.autocast("cpu", torch.bfloat16)
        return contextlib.nullcontext()

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One training step, written as a user would write it."""
        if not self.method.ours:
            self.optimizer.zero_grad()
            with self._autocast():
                loss = self._forward(x, y)
            loss.backward()
            self.optimizer.step()
            return loss
        if self.method.target_every == 0:
            with self._autocast():
                loss = self._forward(x, y)
        else:
            with fd.condition_on(y), self._autocast():
                loss = self._forward(x, y)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss

    def parameters(self) -> dict[str, Tensor]:
        """Weights by layer, under names that stock and fused networks share."""
        found = {}
        for name, p in self.model.named_parameters():
            if ".synthesizer." in name:
                continue
            number, _, rest = name.partition(".")
            if self.method.ours:
                layer = int(number)
                key = {"norm.weight": "scale", "norm.bias": "shift"}.get(rest, rest)
            else:
                layer, part = divmod(int(number), 3)
                key = rest if part == 0 else {"weight": "scale", "bias": "shift"}[rest]
            found[f"{layer}.{key}"] = p.detach()
        return found


@lru_cache(maxsize=8)
def batches(case: Case, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, Tensor], ...]:
    """A pool of batches: standard normal rows, labels by a fixed random linear rule."""
    generator = torch.Generator().manual_seed(7)
    direction = torch.randn(case.hidden, CLASSES, generator=generator)
    pool = []
    for _ in range(POOL):
        x = torch.randn(case.batch, case.hidden, generator=generator)
        pool.append((x.to(dtype), (x @ direction).argmax(1)))
    return tuple(pool)


def stepper(training: Training, steps: int = CYCLE) -> Callable[[], None]:
    """A candidate that makes ``steps`` training steps, going round the pool of batches."""
    pool = batches(training.case)
    position = 0

    def call() -> None:
        nonlocal position
        for _ in range(steps):
            training.step(*pool[position % POOL])
            position += 1

    return call


def prepared(case: Case, rule_name: str, method: Method, **options: Any) -> Training:
    """A checked network that has made a few steps and whose synthesizers predict something.

    The rate is a hundredth of the training one: timed candidates make tens of thousands of steps.
    """
    check_step(case, rule_name, method, **options)
    training = Training(case, rule_name, method, lr=LEARNING_RATES[rule_name] / 100, **options)
    training.scramble_synthesizers()
    stepper(training, 2 * CYCLE)()
    return training


def _moved(training: Training, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[float]]:
    before = {name: p.double().clone() for name, p in training.parameters().items()}
    pool = batches(training.case, dtype)
    losses = [float(training.step(*pool[i]).detach()) for i in range(CYCLE)]
    return {name: p.double() - before[name] for name, p in training.parameters().items()}, losses


def _off(wrong: Tensor, movement: Tensor) -> float:
    """Norm of ``wrong`` relative to ``movement``'s, without the unit (row) that is worst off."""
    squares = wrong.square()
    units = squares.flatten(1).sum(1) if wrong.dim() > 1 else squares
    rest = units.sum() - units.max() if len(units) > CLASSES else units.sum()
    return float(rest.sqrt() / movement.norm())


def check_step(case: Case, rule_name: str, method: Method, **options: Any) -> None:
    """The correctness gate: a whole cycle of steps against the same in float64.

    Stock methods and backprop on our kernels are held to stock eager in float64, DNI to the
    reference backend in float64 (the perfect-synthesizer tests tie that to backprop). What is
    compared is the movement of every parameter over a cycle, in norm: float32 leaves a relative
    error of eps * sqrt(reduction length) in a gradient; a ReLU whose input is that near to zero
    may flip, and Adam's first steps, being signs, turn the sign of entries that small. Both
    concern about one entry in 10^5, hence a bound on the norm of 1e-3 (SGD) and 2e-2 (Adam). A
    flip moves its own unit by more than that, and a cycle makes a million of such decisions: the
    worst unit of each parameter is left out (one kernel that is wrong is wrong in all of them).
    bfloat16 keeps 8 bits: there the losses are compared, within 4 units of the last place.

    Raises:
        Disagreement: they differ by more.
    """
    candidate = Training(case, rule_name, method, **options)
    exact = Method("float64", ours=method.ours and method.target_every != 0)
    if exact.ours:
        exact = Method("float64", ours=True, target_every=method.target_every)
    twin_options = {**options, "dtype": torch.float64}
    if exact.ours:
        twin_options["backend"] = "reference"
    else:
        twin_options.pop("backend", None)
        twin_options.pop("container", None)
    twin = Training(case, rule_name, exact, **twin_options)
    for training in (candidate, twin):
        training.scramble_synthesizers()
    if exact.ours:
        # Random in both, by one generator: nothing else may differ but the arithmetic.
        with torch.no_grad():
            state = {k: v.double() for k, v in candidate.model.state_dict().items()}
            own = twin.model.state_dict()
            for key, value in state.items():
                own[key].copy_(value)
    moved, losses = _moved(candidate, options.get("dtype", torch.float32))
    expected, exact_losses = _moved(twin, torch.float64)

    what = f"{method.name}, {rule_name}, {case}"
    allowed = 4 * 2.0**-8 if method.bf16 else 1e-3 * case.hidden**0.5 / 16
    for step, (loss, want) in enumerate(zip(losses, exact_losses, strict=True)):
        if not abs(loss - want) <= allowed * (1.0 + abs(want)):
            raise Disagreement(f"{what}: loss {loss} at step {step}, float64 has {want}")
    if method.bf16:
        return
    if moved.keys() != expected.keys():
        raise Disagreement(f"{what}: parameters {sorted(moved)} against {sorted(expected)}")
    bound = 1e-3 if rule_name == "sgd" else 2e-2
    for name, movement in moved.items():
        error = _off(movement - expected[name], expected[name])
        if not error <= bound:
            raise Disagreement(f"{what}: movement of {name} is off by {error:.2e} in norm")


# ------------------------------------------------------------------------------------ one layer


class Shape(NamedTuple):
    """Rows, inputs and outputs of one layer."""

    rows: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.inputs}x{self.outputs}"


SHAPES = (Shape(64, 256, 256), Shape(256, 784, 256), Shape(128, 512, 512), Shape(128, 1024, 1024))


def backends() -> list[str]:
    """The backends that can run here on a CPU. Triton's interpreter is not among them: its time
    says nothing."""
    from fused_dni.ops import registry

    found = [name for name, reason in registry.report() if reason is None]
    return [name for name in found if name != "triton"]


def _layer_parts(shape: Shape, dtype: torch.dtype) -> tuple[nn.Linear, nn.BatchNorm1d]:
    torch.manual_seed(0)
    linear = nn.Linear(shape.inputs, shape.outputs, bias=False).to(dtype)
    return linear, nn.BatchNorm1d(shape.outputs).to(dtype)


@lru_cache(maxsize=8)
def layer_data(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, the gradient that arrives at h, and labels."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape.rows, shape.inputs, generator=generator)
    g = torch.randn(shape.rows, shape.outputs, generator=generator) / shape.rows
    labels = torch.randint(0, CLASSES, (shape.rows,), generator=generator)
    return x.to(dtype), g.to(dtype), labels


class Layer:
    """One Linear-BatchNorm-ReLU with its SGD update, given the gradient g that arrives at h.

    Args:
        kind: ``eager``, ``compiled``, ``ours`` (backprop on our kernels) or ``dni``.
        dx: whether the gradient at x is made too; for DNI that is a target step, on which the
            synthesizer is trained as well.
    """

    def __init__(
        self,
        shape: Shape,
        kind: str,
        dx: bool,
        *,
        backend: str | None = None,
        dtype: torch.dtype = torch.float32,
        lr: float = 1e-4,
    ) -> None:
        self.kind, self.dx = kind, dx
        x, self.g, self.labels = layer_data(shape, dtype)
        self.x = x.clone().requires_grad_(dx)
        linear, norm = _layer_parts(shape, dtype)
        self.optimizer: torch.optim.Optimizer | None = None
        self.layer: nn.Module
        if kind in ("eager", "compiled"):
            self.layer = nn.Sequential(linear, norm, nn.ReLU())
            self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=lr, fused=True)
        else:
            options: dict[str, Any] = {"synthesizer": None}
            if kind == "dni":
                rank = min(RANK, shape.outputs)
                synthesizer = fd.LinearSynthesizer(shape.outputs, rank, CLASSES).to(dtype)
                with torch.no_grad():
                    torch.manual_seed(1)
                    for p in (synthesizer.weight, synthesizer.context_weight):
                        p.copy_(torch.randn(p.shape) * 0.1)
                options = {"synthesizer": synthesizer}
            self.layer = fd.FusedDNILinear.from_linear(
                linear, norm, "relu", update=fd.SGD(lr), backend=backend, **options
            )
            # The phase is set once: k = 1, or never a target.
            fd.Schedule(self.layer, target_every=1 if dx else None)
        self.forward: Callable[..., Tensor] = self.layer
        if kind == "compiled":
            self.forward = torch.compile(self.layer, fullgraph=True, dynamic=False)

    def step(self) -> None:
        """Forward, backward from g, update."""
        if self.dx:
            self.x.grad = None
        if self.kind == "dni":
            h = self.forward(self.x, self.labels)
            if h.requires_grad:
                h.backward(self.g)
            return
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        self.forward(self.x).backward(self.g)
        if self.optimizer is not None:
            self.optimizer.step()


def check_layer(shape: Shape, kind: str, dx: bool, backend: str | None = None) -> None:
    """One step against float64: weight movement, batch-norm movement, dx. See :func:`check_step`.

    Raises:
        Disagreement: they differ by more than float32 explains.
    """
    candidate = Layer(shape, kind, dx, backend=backend, lr=1.0)
    exact_kind, exact_backend = ("dni", "reference") if kind == "dni" else ("eager", None)
    twin = Layer(shape, exact_kind, dx, backend=exact_backend, dtype=torch.float64, lr=1.0)
    movements = []
    for layer in (candidate, twin):
        before = {name: _of(p) for name, p in _plain(layer.layer).items()}
        layer.step()
        movements.append({n: _of(p) - before[n] for n, p in _plain(layer.layer).items()})
    for name, got in movements[0].items():
        want = movements[1][name]
        error = float((got - want).norm() / want.norm().clamp(min=1e-30))
        if not error <= 1e-3:
            raise Disagreement(f"{kind} {backend or ''} {shape}: {name} is off by {error:.2e}")
    if dx:
        error = float((candidate.x.grad.double() - twin.x.grad).norm() / twin.x.grad.norm())
        if not error <= 1e-3:
            raise Disagreement(f"{kind} {backend or ''} {shape}: dx is off by {error:.2e}")


def _of(p: Tensor) -> Tensor:
    return p.detach().double().clone()


def _plain(layer: nn.Module) -> dict[str, Tensor]:
    if isinstance(layer, nn.Sequential):
        return {"weight": layer[0].weight, "scale": layer[1].weight, "shift": layer[1].bias}
    return {"weight": layer.weight, "scale": layer.norm.weight, "shift": layer.norm.bias}


# ---------------------------------------------------------------------------------- synthesizers

KINDS = ("dense", "lowrank", "diagonal")


def synthesizer(kind: str, features: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A label-conditioned synthesizer of the kind, with random instead of zero outputs."""
    torch.manual_seed(2)
    if kind == "diagonal":
        made: nn.Module = fd.DiagonalSynthesizer(features, CLASSES)
    else:
        made = fd.LinearSynthesizer(features, RANK if kind == "lowrank" else None, CLASSES)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape) / math.sqrt(features))
    return made.to(dtype)


class SynthesizerStep:
    """Prediction and training of one synthesizer on one backend, below any module."""

    def __init__(
        self, kind: str, case: Case, backend: str, dtype: torch.dtype = torch.float32
    ) -> None:
        from fused_dni.ops import registry
        from fused_dni.ops.types import STATISTICS_SIZE
        from fused_dni.rules import RuleState

        self.backend = registry.get(backend)
        generator = torch.Generator().manual_seed(5)
        shape = (case.batch, case.hidden)
        self.h = torch.randn(shape, generator=generator).relu().to(dtype)
        self.g = (torch.randn(shape, generator=generator) / case.batch).to(dtype)
        self.labels = torch.randint(0, CLASSES, (case.batch,), generator=generator)
        self.scale = float(case.batch)
        with torch.no_grad():
            self.tensors = synthesizer(kind, case.hidden, dtype).fused()
        for p in self.tensors.parameters():
            if p is not None:
                p.requires_grad_(True)
        self.rule = RuleState(fd.Adam(1e-4)).tensors(self.tensors.parameters())
        self.statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64)

    def predict(self) -> Any:
        with torch.no_grad():
            return self.backend.synthesizer_predict(self.h, self.tensors, self.labels)

    def update(self, prediction: Any) -> None:
        with torch.no_grad():
            self.backend.synthesizer_update_(
                self.h,
                prediction,
                self.g,
                self.tensors,
                self.labels,
                self.scale,
                self.statistics,
                self.rule,
            )


def check_synthesizer(kind: str, case: Case, backend: str) -> None:
    """Prediction and one update against the reference in float64.

    Raises:
        Disagreement: they differ by more than float32 explains.
    """
    candidate = SynthesizerStep(kind, case, backend)
    twin = SynthesizerStep(kind, case, "reference", torch.float64)
    predictions = []
    for step in (candidate, twin):
        prediction = step.predict()
        predictions.append(prediction.scaled.double().clone())
        step.update(prediction)
    error = float((predictions[0] - predictions[1]).norm() / predictions[1].norm())
    if not error <= 1e-5:
        raise Disagreement(f"{kind} on {backend}, {case}: prediction is off by {error:.2e}")
    start = synthesizer(kind, case.hidden, torch.float64).fused().parameters()
    slots = zip(candidate.tensors.parameters(), twin.tensors.parameters(), start, strict=True)
    for slot, (got, want, old) in enumerate(slots):
        if got is None or want is None or old is None:
            continue
        moved = float((want - old).detach().norm())
        error = float((got.double() - want).detach().norm()) / moved
        if not error <= 2e-2:  # Adam's first step is a sign: see check_step
            raise Disagreement(f"{kind} on {backend}, {case}: slot {slot} is off by {error:.2e}")


# ---------------------------------------------------------------------------------------- memory

MEMORY_DEPTHS = (1, 2, 4, 8, 16, 32, 64)
MEMORY_CASE = Case(1024, 128)


def memory_step(method: str, depth: int) -> Callable[[], None]:
    """One training step of a deep network: ``stock``, ``deferred`` or ``immediate`` DNI."""
    container = {"immediate": fd.DecoupledSequential}.get(method, nn.Sequential)
    training = Training(
        MEMORY_CASE,
        "sgd",
        STOCK if method == "stock" else DNI_1,
        depth=depth,
        container=container,
        lr=1e-4,
    )
    training.scramble_synthesizers(scale=1e-3)
    x, y = batches(MEMORY_CASE)[0]

    def step() -> None:
        training.step(x, y)

    return step


# ----------------------------------------------------------------------------- accuracy of a row


def resampled(images: Tensor, features: int) -> Tensor:
    """Square images as rows of exactly ``features`` numbers, so that the network that is trained
    is the network that is timed: bilinear with antialiasing to the nearest rectangle."""
    side = math.isqrt(images.shape[1])
    if side * side != images.shape[1]:
        raise ValueError(f"images of {images.shape[1]} numbers are not square")
    if features < 1 or features & (features - 1):
        raise ValueError(f"features must be a power of two, got {features}")
    height = 2 ** (features.bit_length() // 2)
    size = (height, features // height)
    square = images.reshape(-1, 1, side, side)
    return F.interpolate(square, size, mode="bilinear", antialias=True).flatten(1).contiguous()


def train_error(
    data: Any, case: Case, rule_name: str, method: Method, *, epochs: int, seed: int
) -> Iterator[float]:
    """Train the configuration of a row on real images; yield the test error in % of each epoch.

    The rate of both the layers and the synthesizers falls to zero along a cosine, for all methods.
    """
    from fused_dni.experiments import data as loading

    train = loading.Split(resampled(data.train.images, case.hidden), data.train.labels)
    test = loading.Split(resampled(data.test.images, case.hidden), data.test.labels)
    training = Training(case, rule_name, method, seed=seed)
    steps = epochs * (len(train.labels) // case.batch)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(training.optimizer, steps)
    for epoch in range(epochs):
        training.model.train()
        order = loading.permutation(len(train.labels), seed, epoch)
        for rows in loading.batches(order, case.batch):
            x, y = loading.pick(train, rows)
            training.step(x, y)
            scheduler.step()
        training.model.eval()
        with torch.no_grad():
            wrong = sum(
                int((training.model(x).argmax(1) != y).sum())
                for x, y in zip(test.images.split(1000), test.labels.split(1000), strict=True)
            )
        yield 100.0 * wrong / len(test.labels)
