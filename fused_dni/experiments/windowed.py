"""An LSTM between an encoding and a linear head, trained in windows of T steps under one arm.

What the trainers of :mod:`fused_dni.experiments.recurrent` and
:mod:`fused_dni.experiments.rows` share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.experiments import run
from fused_dni.experiments.ablation import Altered
from fused_dni.experiments.settings import Arm
from fused_dni.experiments.settings import Recurrent as Settings
from fused_dni.modules.recurrent import DEFAULT_RANK

State = tuple[Tensor, Tensor]


class OneHot(nn.Module):
    """Indices [...] to rows [..., classes]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, index: Tensor) -> Tensor:
        return F.one_hot(index, self.classes).float()


class SequenceNet(nn.Module):
    """Encoding, LSTM, linear head: [T, B, ...] and a state to [T, B, outputs] and the next one.

    ``synthesizer`` is one that the LSTM knows nothing of, if there is one.
    """

    def __init__(
        self,
        encode: nn.Module,
        lstm: nn.Module,
        head: nn.Linear,
        synthesizer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encode = encode
        self.lstm = lstm
        self.head = head
        self.synthesizer = synthesizer

    def forward(
        self,
        window: Tensor,
        state: State | None,
        ended: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        given = {"end_of_sequence": ended, "context": context}
        options = {name: value for name, value in given.items() if value is not None}
        output, state = self.lstm(self.encode(window), state, **options)
        return self.head(output), state

    def twin(self) -> SequenceNet:
        """Make the same on ``nn.LSTM``, sharing the parameters."""
        lstm = self.lstm.to_lstm() if isinstance(self.lstm, fd.FusedDNILSTM) else self.lstm
        return SequenceNet(self.encode, lstm, self.head)


def build_net(
    arm: Arm,
    settings: Settings,
    seed: int,
    encode: Callable[[], nn.Module],
    inputs: int,
    outputs: int,
    context_features: int = 0,
) -> SequenceNet:
    """Make the network of an arm: the same weights for every arm of a seed.

    The global random generator is left alone.

    Args:
        encode: makes what stands before the LSTM.
        inputs: of the LSTM. outputs: of the head.
        context_features: K of the synthesizer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        before = encode()
        lstm = nn.LSTM(inputs, settings.hidden, settings.layers)
        net = SequenceNet(before, lstm, nn.Linear(settings.hidden, outputs))
        if arm.method == "backprop":
            return net
        options: dict[str, Any] = {"synthesizer": None, "backend": settings.backend}
        torch.manual_seed(seed + 1)
        if arm.method == "dni+lambda":
            net.synthesizer = _synthesizer(settings, context_features)
        elif arm.synthetic:
            change = arm.method.partition("/")[2]
            default = settings.synthesizer == "default" and not change
            synthesizer = None if default else _synthesizer(settings, context_features)
            if synthesizer is not None and change:
                synthesizer = Altered(synthesizer, change, seed)
            options |= {
                "synthesizer": synthesizer or "default",
                "context_features": context_features if default else 0,
                "sg_scale": settings.sg_scale,
                "max_target_norm": settings.target_clip or None,
                "auxiliary": arm.method == "dni+aux",
                "target_scale": settings.target_scale * settings.divisor(arm),
            }
        net.lstm = fd.FusedDNILSTM.from_lstm(lstm, **options)
        return net


def _synthesizer(settings: Settings, context_features: int) -> nn.Module:
    features = 2 * settings.layers * settings.hidden
    if settings.synthesizer == "mlp":
        return fd.MLPSynthesizer(features, settings.sg_hidden, context_features=context_features)
    rank = None if settings.synthesizer == "linear" else min(DEFAULT_RANK, features)
    return fd.LinearSynthesizer(features, rank, context_features)


class Trainer(run.Trainer):
    """One network under one arm. ``position`` counts what ``settings.amount`` limits, by rows."""

    KEPT = (
        *("model", "optimizer", "schedule", "seconds"),
        *("position", "updates", "history", "sums"),
    )
    model: SequenceNet

    def __init__(self, arm: Arm, seed: int, settings: Settings, net: SequenceNet) -> None:
        super().__init__(arm.name, seed)
        self.arm, self.settings = arm, settings
        self.model = net.train()
        own = {id(p) for p in net.twin().parameters()}
        self.trained = [p for p in net.parameters() if id(p) in own]
        heads = [p for p in net.parameters() if id(p) not in own]
        rate = settings.lr if arm.synthetic else settings.exact_lr or settings.lr
        groups: list[dict[str, Any]] = [{"params": self.trained, "lr": rate}]
        if heads:
            groups.append({"params": heads, "lr": settings.sg_lr})
        for group in groups:
            group["initial_lr"] = group["lr"]
        self.optimizer: torch.optim.Optimizer
        if arm.method.startswith("immediate"):
            self.optimizer = torch.optim.RMSprop(groups)
        else:
            self.optimizer = torch.optim.Adam(groups, fused=True)
        self.schedule: fd.Schedule | None = None
        if arm.synthetic and net.synthesizer is None:
            windows = -(-self.total // arm.window)
            self.schedule = fd.Schedule(net, warmup_steps=round(settings.warmup * windows))
        self.position = 0
        self.updates = 0
        #: Training loss in bits, and what it was summed over, since the last evaluation.
        self.sums = [0.0, 0.0]

    @property
    def total(self) -> int:
        """Where ``position`` ends."""
        raise NotImplementedError

    def step(self) -> None:
        """Train on the next piece: a window of a text, a batch of episodes."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Return what a point of the curve shows, besides time."""
        raise NotImplementedError

    def probe(self, window: int) -> dict[str, Any] | None:
        """Measure true gradients at boundaries of windows of ``window`` steps; None where there
        is no boundary. With the prediction beside it if that is the arm's own window."""
        raise NotImplementedError

    def backward(self, loss: Tensor | None, state: State, update: bool = True) -> None:
        """Go back through a window, from its loss and what is predicted at its end, and update."""
        if loss is not None:
            loss.backward()
        elif self.arm.synthetic:
            fd.backward_boundary(state)
        else:
            return  # nothing arrives: there is no gradient
        if self.schedule is not None:
            self.schedule.step()
        if update:
            self.update()

    def update(self) -> None:
        """Apply the gradients that have been summed."""
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.trained, self.settings.clip)
        if self.settings.cosine:
            factor = 0.5 * (1.0 + math.cos(math.pi * self.position / self.total))
            for group in self.optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1

    def note(self, nats: Tensor, count: int) -> None:
        """Keep a training loss for the curve."""
        self.sums[0] += float(nats.detach()) / math.log(2.0)
        self.sums[1] += count

    def train_bits(self) -> float:
        """Return the mean training loss since the last call, bits."""
        (bits, count), self.sums = self.sums, [0.0, 0.0]
        return bits / count if count else math.nan

    def synthesizer(self, window: int) -> nn.Module | None:
        """Return what predicts at the boundaries of these windows, if anything."""
        if not self.arm.synthetic or window != self.arm.window:
            return None
        assert isinstance(self.model.lstm, fd.FusedDNILSTM)
        return self.model.synthesizer or self.model.lstm.synthesizer

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({"model": state.get("net"), **state})  # in 0.1.0 "net"
