"""The rivals of synthetic gradients as training steps; formulas and sources: docs/rivals.md.

Each class is one way to train the network of :mod:`fused_dni.experiments.nets` that has been
proposed, or is simply at hand, where one does not want to wait for backprop. Those that need
gradients of single layers take them from our kernels (layers without synthesizer), as backprop and
DNI do, so that what differs in time is the method.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.experiments import data, nets
from fused_dni.experiments.delay_arms import UpdateFeedback
from fused_dni.experiments.rival_arms import SYNTHETIC, Arm, Settings
from fused_dni.experiments.train import FusedTrainer, StockTrainer, Trainer, _cosine
from fused_dni.measure.baseline import stock_optimizer
from fused_dni.measure.verdict.candidates import first_line
from fused_dni.rules import Rule


class InBackwardTrainer(Trainer):
    """Stock backprop whose optimizer runs inside the backward.

    A hook on each parameter, called when its gradient is complete, steps a ``torch.optim``
    optimizer of that parameter alone and drops the gradient: never more than one is held.
    """

    def __init__(self, name: str, seed: int, network: nn.Module, rule: Rule, steps: int) -> None:
        super().__init__(name, seed)
        self.model = network.train()
        self._optimizers = []
        for parameter in network.parameters():
            optimizer = stock_optimizer(nn.ParameterList([parameter]), rule)
            self._optimizers.append(optimizer)
            parameter.register_post_accumulate_grad_hook(_stepper(optimizer))
        self.optimizer = self._optimizers[0]
        self.scheduler = _cosine(self.optimizer, steps)

    def step(self, x: Tensor, y: Tensor) -> None:
        F.cross_entropy(self.model(x), y).backward()
        self.scheduler.step()
        # One scheduler for all: one each would cost more than the hooks.
        rate = self.optimizer.param_groups[0]["lr"]
        for optimizer in self._optimizers[1:]:
            optimizer.param_groups[0]["lr"] = rate


def _stepper(optimizer: torch.optim.Optimizer) -> Any:
    def step(parameter: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


class CompiledStepTrainer(Trainer):
    """Stock backprop of which ``torch.compile`` gets the whole step: forward, loss, backward and
    optimizer. The rate is a tensor: a number that changes would be compiled in, anew each step."""

    def __init__(
        self, name: str, seed: int, network: nn.Module, rule: Rule, steps: int, sample: data.Split
    ) -> None:
        super().__init__(name, seed)
        self.model = network.train()
        options = rule.defaults()
        self._rate = torch.tensor(options.pop("lr"), device=sample.images.device)
        # Not fused: those are kernels of their own, which a compiler cannot look into.
        kinds: dict[str, Any] = {
            "sgd": torch.optim.SGD,
            "adam": torch.optim.Adam,
            "adamw": torch.optim.AdamW,
        }
        inner = kinds[rule.kind](network.parameters(), lr=self._rate, **options)
        self.optimizer = torch.optim.SGD([torch.zeros(())], lr=float(self._rate))
        self.scheduler = _cosine(self.optimizer, steps)

        def step(x: Tensor, y: Tensor) -> None:
            inner.zero_grad()
            F.cross_entropy(network(x), y).backward()
            inner.step()

        self._step = torch.compile(step, dynamic=False)
        # Compile now, outside of the clock; the trial leaves nothing behind.
        before = {key: value.clone() for key, value in network.state_dict().items()}
        start = time.perf_counter()
        for _ in range(2):
            self._step(*sample)
        self.compile_seconds = time.perf_counter() - start
        network.load_state_dict(before)
        for state in inner.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def step(self, x: Tensor, y: Tensor) -> None:
        self._rate.fill_(self.optimizer.param_groups[0]["lr"])
        self._step(x, y)
        self.optimizer.step()
        self.scheduler.step()


class GraphTrainer(Trainer):
    """Stock backprop as the replay of one CUDA graph: forward, loss, backward, optimizer.

    The graph has a batch of its own, into which each batch is copied, and a rate on the device,
    into which the scheduler's is written before a replay.
    """

    def __init__(
        self, name: str, seed: int, network: nn.Module, rule: Rule, steps: int, sample: data.Split
    ) -> None:
        super().__init__(name, seed)
        self.model = network.train()
        self._batch = data.Split(*(part.clone() for part in sample))
        self._captured = stock_optimizer(network, rule, captured=True)
        # A scheduler of a rate on a device would launch a kernel an operation.
        self.optimizer = torch.optim.SGD([torch.zeros(())], lr=rule.defaults()["lr"])
        self.scheduler = _cosine(self.optimizer, steps)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        self._replay = replay_of(self._step)
        # The capture's trial steps leave nothing behind. Zeros are what all states begin with.
        network.load_state_dict(before)
        for state in self._captured.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def _step(self) -> None:
        self._captured.zero_grad(set_to_none=True)  # gradients are the graph's own memory
        F.cross_entropy(self.model(self._batch.images), self._batch.labels).backward()
        self._captured.step()

    def step(self, x: Tensor, y: Tensor) -> None:
        self._batch.images.copy_(x)
        self._batch.labels.copy_(y)
        self._captured.param_groups[0]["lr"].fill_(self.optimizer.param_groups[0]["lr"])
        self._replay()
        self.optimizer.step()
        self.scheduler.step()


def replay_of(step: Callable[[], None]) -> Callable[[], None]:
    """Capture ``step`` in a CUDA graph, after a warm-up on a stream of its own as PyTorch's notes
    on CUDA graphs ask for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class OurGradients(Trainer):
    """Backprop on our kernels with the gradients left to ``torch.optim``, for methods that do
    something else with a gradient than to apply it at once."""

    def __init__(
        self, name: str, seed: int, network: nn.Sequential, rule: Rule, steps: int, **fused: Any
    ) -> None:
        super().__init__(name, seed)
        self.model = nets.fused(network, synthetic=False, update=None, **fused).train()
        self.optimizer = stock_optimizer(self.model, rule)
        self.scheduler = _cosine(self.optimizer, steps)


class StaleTrainer(OurGradients):
    """A gradient on every ``every``-th step; in between the last one is applied again.

    In between there is neither a backward nor a forward: nothing there needs the loss, and the
    batch is not even read. Batch statistics move on the computed steps alone.
    """

    def __init__(self, *args: Any, every: int, **fused: Any) -> None:
        super().__init__(*args, **fused)
        self.every = every
        self._next = 0

    def repeats(self) -> bool:
        """Tell whether the next step takes the last gradient again."""
        return self._next > 0

    def step(self, x: Tensor, y: Tensor) -> None:
        """Go forward and back, and update."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.repeat()

    def repeat(self) -> None:
        """Update by the gradient that is there."""
        self.optimizer.step()
        self.scheduler.step()
        self._next = (self._next + 1) % self.every


class DelayedTrainer(OurGradients):
    """The update of step t uses the gradient of step t - ``delay``, taken at the weights of then.

    The first ``delay`` steps update nothing. With ``c`` updates are corrected for the delay, see
    :class:`UpdateFeedback`.
    """

    def __init__(self, *args: Any, delay: int = 1, c: float = 0.0, **fused: Any) -> None:
        super().__init__(*args, **fused)
        self.delay, self.c = delay, c
        self._apply = UpdateFeedback(self.optimizer, c).step if c else self.optimizer.step
        self._waiting: deque[list[Tensor | None]] = deque()
        self._parameters = list(self.model.parameters())

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self._waiting.append([p.grad for p in self._parameters])
        if len(self._waiting) > self.delay:
            for p, gradient in zip(self._parameters, self._waiting.popleft(), strict=True):
                p.grad = gradient
            self._apply()
            self.scheduler.step()


class _Layerwise(Trainer):
    """Hidden layers that no gradient goes between, updated by our kernels in a backward of their
    own; the head is trained exactly."""

    def __init__(
        self,
        name: str,
        seed: int,
        network: nn.Sequential,
        rule: Rule,
        steps: int,
        *,
        helpers: nn.Module,
        backend: str | None,
    ) -> None:
        super().__init__(name, seed)
        ours = nets.fused(network, synthetic=False, update=rule, backend=backend)
        self.model = ours.train()
        self.hidden = list(ours)[:-1]
        self.head = ours[-1]
        # What evaluation does not run but the rule trains.
        self.helpers = helpers
        self.optimizer = fd.FusedOptimizer(nn.ModuleList([ours, helpers]))
        self.scheduler = _cosine(self.optimizer, steps)


class LocalTrainer(_Layerwise):
    """Decoupled greedy learning: each hidden layer descends the loss of a linear classifier of its
    own; the topmost layer's is the network's head.

    Each layer's backward runs right behind its forward, so that one layer's activations are held.

    Attributes:
        helpers: the auxiliary classifiers, [classes, hidden] each, from the lowest layer up.
        BIAS: whether they have one.
    """

    BIAS = True

    def __init__(
        self,
        name: str,
        seed: int,
        network: nn.Sequential,
        rule: Rule,
        steps: int,
        backend: str | None = None,
    ) -> None:
        helpers = nn.ModuleList(
            fd.FusedDNILinear.from_linear(linear, synthesizer=None, update=rule, backend=backend)
            for linear in _like_head(network, len(network) // 3 - 1, seed, self.BIAS)
        )
        super().__init__(name, seed, network, rule, steps, helpers=helpers, backend=backend)
        self._classifiers = [*helpers, self.head]

    def step(self, x: Tensor, y: Tensor) -> None:
        h = x
        for layer, classifier in zip(self.hidden, self._classifiers, strict=True):
            h = layer(h)
            F.cross_entropy(classifier(h), y).backward()
            h = h.detach()
        self.optimizer.step()
        self.scheduler.step()


class MonoForwardTrainer(LocalTrainer):
    """Mono-Forward: local losses as above, of projections without a bias (an output is a layer's
    "goodness" for a class); what is predicted is the class of most goodness in all layers."""

    BIAS = False

    def __init__(self, *args: Any, **fused: Any) -> None:
        super().__init__(*args, **fused)
        self.model = _Summed(self.model, self.hidden, self._classifiers)


class _Summed(nn.Module):
    """A network whose answer is the sum of what classifiers say behind each layer."""

    def __init__(
        self, network: nn.Module, hidden: list[nn.Module], classifiers: list[nn.Module]
    ) -> None:
        super().__init__()
        self.network = network
        self._pairs = list(zip(hidden, classifiers, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        scores = []
        for layer, classifier in self._pairs:
            x = layer(x)
            scores.append(classifier(x))
        return torch.stack(scores).sum(0)


class FeedbackTrainer(_Layerwise):
    """Direct feedback alignment: each hidden layer takes the gradient of the loss at the logits,
    through a fixed random matrix of its own, for the gradient at its output.

    Attributes:
        feedback: the matrices, [classes, hidden] each, from the lowest layer up; drawn as the
            head's weight is.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        network: nn.Sequential,
        rule: Rule,
        steps: int,
        backend: str | None = None,
    ) -> None:
        nothing = nn.Identity()
        super().__init__(name, seed, network, rule, steps, helpers=nothing, backend=backend)
        self.feedback = [
            linear.weight.detach() for linear in _like_head(network, len(self.hidden), seed)
        ]

    def step(self, x: Tensor, y: Tensor) -> None:
        outputs: list[Tensor] = []
        h = x
        for layer in (*self.hidden, self.head):
            outputs.append(layer(h))
            h = outputs[-1].detach()
        with torch.no_grad():
            error = output_error(h, y)
            local = [error @ matrix for matrix in self.feedback]
        torch.autograd.backward(outputs, [*local, error])
        self.optimizer.step()
        self.scheduler.step()


def _like_head(network: nn.Sequential, count: int, seed: int, bias: bool = True) -> list[nn.Linear]:
    """Make linear layers of the head's shape, drawn from ``seed`` as PyTorch draws them."""
    head = network[-1]
    assert isinstance(head, nn.Linear)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)
        return [
            nn.Linear(head.in_features, head.out_features, bias).to(head.weight.device)
            for _ in range(count)
        ]


def output_error(logits: Tensor, y: Tensor) -> Tensor:
    """Compute the gradient of the mean cross-entropy at ``logits`` [B, classes], of no graph."""
    error = logits.softmax(1)
    error.scatter_add_(1, y[:, None], error.new_full((1, 1), -1.0).expand(len(y), 1))
    return error.div_(len(y))


def advance(trainer: Trainer, split: data.Split, rows: Tensor) -> None:
    """Train by one step on these rows of ``split``, with the picking of the batch if the step
    looks at it."""
    if isinstance(trainer, StaleTrainer) and trainer.repeats():
        trainer.repeat()
    else:
        trainer.step(*data.pick(split, rows))


def network_of(settings: Settings, dataset: data.Dataset, seed: int) -> nn.Sequential:
    """Make the stock network that every arm of a seed starts from, on the settings' device."""
    made = nets.plain(dataset.features, settings.hidden, settings.depth, dataset.classes, seed=seed)
    return made.to(settings.device)


def build(
    which: Arm,
    seed: int,
    settings: Settings,
    dataset: data.Dataset,
    steps: int,
    rule: Rule,
    synthesizer_rule: Rule | None = None,
    phase: str = "",
) -> Trainer:
    """Make the trainer of an arm.

    Args:
        which: the arm.
        seed: of the weights, auxiliary classifiers and feedback matrices.
        settings: the rest.
        dataset: on the settings' device.
        steps: over which the rate falls to zero.
        rule: of the network.
        synthesizer_rule: of synthesizers; as ``rule`` if None.
        phase: one of :meth:`Arm.phases` in which every step is to be; the arm's own sequence if
            empty.
    """
    network = network_of(settings, dataset, seed)
    name = which.name
    first = data.Split(*(part[: settings.batch_size] for part in dataset.train))
    if which.kind in ("backprop", "compiled", "compiled-step"):
        if which.kind != "backprop":
            torch.compiler.reset()  # else the ninth network of one process would run uncompiled
        kind = CompiledStepTrainer if which.kind == "compiled-step" else StockTrainer
        try:
            return kind(name, seed, network, rule, steps, first)
        except Exception as error:  # whatever a compiler may raise
            if which.kind == "backprop":
                raise
            raise ValueError(
                f"torch.compile does not work here ({first_line(error)}): leave the arm "
                f"{name!r} out"
            ) from error
    if which.kind == "graph":
        return GraphTrainer(name, seed, network, rule, steps, first)
    if which.kind == "in-backward":
        return InBackwardTrainer(name, seed, network, rule, steps)
    backend = settings.backend
    if which.kind == "stale-K":
        every = {"compute": 1, "repeat": 1_000_000_000}.get(phase, which.every)
        return StaleTrainer(name, seed, network, rule, steps, every=every, backend=backend)
    if which.kind.startswith("delayed"):
        c = 1.0 if which.kind == "delayed-corrected" else 0.0
        return DelayedTrainer(name, seed, network, rule, steps, c=c, backend=backend)
    if which.kind in ("local", "mono-forward"):
        local = LocalTrainer if which.kind == "local" else MonoForwardTrainer
        return local(name, seed, network, rule, steps, backend=backend)
    if which.kind == "feedback":
        return FeedbackTrainer(name, seed, network, rule, steps, backend)
    synthetic = which.kind in SYNTHETIC
    ours = nets.fused(
        network,
        synthetic=synthetic,
        update=rule,
        synthesizer_update=synthesizer_rule,
        rank=settings.rank or None,
        context_features=dataset.classes if synthetic else 0,
        interface="preactivation" if which.kind == "cdni-z-K" else "output",
        synthesizer=(
            partial(fd.CrossEntropySynthesizer, context_features=dataset.classes)
            if which.kind == "cdni-ce-K"
            else None
        ),
        backend=backend,
        seed=seed,
    ).to(settings.device)
    warmup_steps = min(round(settings.warmup * steps), steps - 1) if synthetic else 0
    every_or_never: int | None = max(1, which.every)
    if phase in ("warm-up", "target", "no target"):
        warmup_steps = steps if phase == "warm-up" else 0
        every_or_never = None if phase == "no target" else 1
    more = (warmup_steps, every_or_never, settings.mix, settings.lessons if synthetic else 1)
    return FusedTrainer(name, seed, ours, steps, *more)
