"""A training step of the whole network: candidates, and the gate of each.

The networks have no bias in front of batch normalisation, on either side: its gradient is zero but
for rounding, and good stock code leaves it out.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from workloads import CLASSES, RANK, Disagreement

DEPTH = 4
#: Steps in one call of a training candidate: a whole cycle of targets on every fourth step.
CYCLE = 4
#: Batches that candidates go round, so that a network cannot learn one by heart while timed.
POOL = 8


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
        compiled: what of a stock step is under ``torch.compile``: its network and loss, or, as
            well as that can do it (``mode="max-autotune"``), all of it: backward and optimizer too.
        target_every: k of the synthesizers' targets; None for never; 0 for no synthesizer.
        bf16: under ``torch.autocast`` to bfloat16.
    """

    name: str
    ours: bool = False
    compiled: Literal["", "loss", "step"] = ""
    target_every: int | None = 0
    bf16: bool = False


STOCK = Method("stock backprop, eager, fused optimizer")
COMPILED = Method("stock backprop, compiled, fused optimizer", compiled="loss")
AUTOTUNED = Method("stock backprop and optimizer, one compiled step, autotuned", compiled="step")
OURS = Method("backprop on our kernels", ours=True)
DNI_1 = Method("DNI, targets on every step", ours=True, target_every=1)
DNI_4 = Method("DNI, targets on every 4th step", ours=True, target_every=4)
DNI_NEVER = Method("DNI, never a target", ours=True, target_every=None)
METHODS = (
    STOCK,
    COMPILED,
    AUTOTUNED,
    OURS,
    DNI_1,
    DNI_4,
    DNI_NEVER,
    Method("stock backprop, eager, bf16", bf16=True),
    Method("stock backprop, compiled, bf16", compiled="loss", bf16=True),
    Method("backprop on our kernels, bf16", ours=True, bf16=True),
    Method("DNI, targets on every 4th step, bf16", ours=True, target_every=4, bf16=True),
)

#: Learning rates, of the layers and of their synthesizers. The regression's curvature is that of
#: the activations, far above the loss's, so plain SGD would need a rate of its own for each width;
#: synthesizers are trained by Adam under both rules.
LEARNING_RATES = {"sgd": 0.1, "adam": 1e-3}
SYNTHESIZER_RATE = 3e-3


def rule(name: str, lr: float | None = None) -> fd.SGD | fd.Adam:
    """Return the update rule of that name, as fused_dni's description."""
    lr = LEARNING_RATES[name] if lr is None else lr
    return fd.SGD(lr=lr) if name == "sgd" else fd.Adam(lr=lr)


def stock_optimizer(
    name: str, model: nn.Module, lr: float | None = None, fused: bool = True
) -> torch.optim.Optimizer:
    """Return the same rule as the stock optimizer with ``fused=True``: the honest bar."""
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
    container: Callable[..., nn.Module] = fd.DecoupledSequential,
) -> nn.Module:
    """Return the network ``stock`` with its weights, on fused layers, which a DecoupledSequential
    runs in one call, the loss included; the head is always exact."""
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
    options = {"update": update, "backend": backend}
    if container is fd.DecoupledSequential:
        head: nn.Module = fd.FusedDNILinearCrossEntropyLoss.from_linear(modules[-1], **options)
    else:
        head = fd.FusedDNILinear.from_linear(modules[-1], synthesizer=None, **options)
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
        container: Callable[..., nn.Module] = fd.DecoupledSequential,
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
            # PyTorch's fused rules are kernels of their own, which a compiler cannot look into.
            fused = method.compiled != "step"
            self.optimizer = stock_optimizer(rule_name, stock, lr, fused=fused)
        # Whether the network makes the loss itself, and is told the labels in the call.
        self._whole = isinstance(self.model, fd.DecoupledSequential)
        self._forward: Callable[[Tensor, Tensor], Tensor] = self._loss
        self._stock_step: Callable[[Tensor, Tensor], Tensor] = self._stock
        if method.compiled == "loss":
            self._forward = torch.compile(self._loss, fullgraph=True, dynamic=False)
        elif method.compiled == "step":
            self._stock_step = torch.compile(self._stock, mode="max-autotune", dynamic=False)

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        if self._whole:
            context = None if self.method.target_every == 0 else y
            loss: Tensor = self.model(x, context=context, target=y)
            return loss
        return F.cross_entropy(self.model(x), y)

    def _stock(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        with self._autocast():
            loss = self._forward(x, y)
        loss.backward()
        self.optimizer.step()
        return loss

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
            return self._stock_step(x, y)
        if self._whole or self.method.target_every == 0:
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
    """Return a pool of batches: standard normal rows, labels by a fixed random linear rule."""
    generator = torch.Generator().manual_seed(7)
    direction = torch.randn(case.hidden, CLASSES, generator=generator)
    pool = []
    for _ in range(POOL):
        x = torch.randn(case.batch, case.hidden, generator=generator)
        pool.append((x.to(dtype), (x @ direction).argmax(1)))
    return tuple(pool)


def stepper(training: Training, steps: int = CYCLE) -> Callable[[], None]:
    """Return a candidate that makes ``steps`` training steps, going round the pool of batches."""
    pool = batches(training.case)
    position = 0

    def call() -> None:
        nonlocal position
        for _ in range(steps):
            training.step(*pool[position % POOL])
            position += 1

    return call


def prepared(case: Case, rule_name: str, method: Method, **options: Any) -> Training:
    """Return a checked network that has made a few steps and whose synthesizers predict something.

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
    """Hold a whole cycle of steps against the same in float64.

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
