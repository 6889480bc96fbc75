"""Two networks at two clocks (Jaderberg et al. 2016, section 3.2).

The lower one sees a digit a step and says after every T steps how many of them were odd. The upper
one ticks once in T steps, on what the lower one sends it, and says after T ticks how many of the
T * T digits were threes. So the loss of the upper network comes after T * T steps. The lower one
waits for it, or takes the gradient at what it sends from a synthesizer and is updated T times as
often; the true gradient then is a late target (:func:`fused_dni.learn_late`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.experiments import data
from fused_dni.experiments.literature_settings import Settings
from fused_dni.experiments.run import Say, diverged

#: Streams side by side, units of both LSTMs, size of a message, the rate of all (Adam).
STREAMS, UNITS, MESSAGE, RATE = 64, 64, 32, 1e-3
EVALUATIONS = 20
#: Sequences of the test set that are looked at.
TESTED = 1000
CONTEXTS = {"dni": False, "cdni": True}


class _Lower(nn.Module):
    """Reads T digits; ``message`` is decoupled where there is a synthesizer."""

    def __init__(self, features: int, hidden: int, window: int, synthesizer: nn.Module | None):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.ReLU())
        self.memory = nn.LSTM(hidden, UNITS)
        self.odd = nn.Linear(UNITS, window + 1)
        self.message = fd.FusedDNILinear(UNITS, MESSAGE, synthesizer=synthesizer)

    def forward(self, images: Tensor) -> Tensor:
        """Return the state after the digits: [T, N, I] -> [N, UNITS]."""
        state: Tensor = self.memory(self.encoder(images))[0][-1]
        return state


class _Upper(nn.Module):
    def __init__(self, window: int):
        super().__init__()
        self.memory = nn.LSTM(MESSAGE, UNITS)
        self.threes = nn.Linear(UNITS, window**2 + 1)

    def forward(self, messages: Tensor) -> Tensor:
        """Return scores of each count of threes: [T, N, MESSAGE] -> [N, T * T + 1]."""
        out: Tensor = self.threes(self.memory(messages)[0][-1])
        return out


class _Pair:
    """Both networks with their optimizers."""

    def __init__(self, name: str, window: int, seed: int, features: int, hidden: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            synthesizer = None
            if name in CONTEXTS:
                context = window + 1 if CONTEXTS[name] else 0
                synthesizer = fd.LinearSynthesizer(MESSAGE, None, context)
            self.lower, self.upper = _Lower(features, hidden, window, synthesizer), _Upper(window)
        self.name, self.window, self.synthesizer, self.updates = name, window, synthesizer, 0
        learned = [] if synthesizer is None else list(synthesizer.parameters())
        known = {id(p) for p in learned}
        own = [p for p in self.lower.parameters() if id(p) not in known]
        self.of_lower = torch.optim.Adam(own, RATE)
        self.of_upper = torch.optim.Adam(self.upper.parameters(), RATE)
        self.of_synthesizer = torch.optim.Adam(learned, RATE) if learned else None

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train on T * T digits a stream: [T, T, N, I] and [T, T, N]."""
        odd, threes = counts(labels)
        if self.name == "waits":
            states = [self.lower(part) for part in images]
            sent = torch.stack([self.lower.message(state) for state in states])
            losses = [self._odd_loss(*of) for of in zip(states, odd, strict=True)]
            self.of_lower.zero_grad()
            # Summed, as the others' T updates are: a loss weighs the same in every arm.
            self._upper_step(sent, threes, torch.stack(losses).sum())
            self._lower_step()
            return
        sent_parts, tickets = [], []
        for part, of_part, of_threes in zip(images, odd, threes, strict=True):
            state = self.lower(part)
            self.of_lower.zero_grad()
            loss = self._odd_loss(state, of_part)
            if self.synthesizer is None:
                loss.backward()
                message = self.lower.message(state.detach()).detach()
            else:
                context = of_threes if CONTEXTS[self.name] else None
                message, (gradient,), ticket = fd.step_local(
                    self.lower.message, state, context=context
                )
                tickets.append(ticket)
                torch.autograd.backward([loss, state], [None, gradient])
            self._lower_step()
            sent_parts.append(message)
        sent = torch.stack(sent_parts).requires_grad_()
        self._upper_step(sent, threes)
        if self.of_synthesizer is not None:
            assert sent.grad is not None
            self.of_synthesizer.zero_grad()
            for ticket, gradient in zip(tickets, sent.grad, strict=True):
                fd.learn_late(self.lower.message, ticket, gradient)
            self.of_synthesizer.step()

    def _odd_loss(self, state: Tensor, odd: Tensor) -> Tensor:
        return F.cross_entropy(self.lower.odd(state), odd)

    def _upper_step(self, sent: Tensor, threes: Tensor, more: Tensor | None = None) -> None:
        loss = F.cross_entropy(self.upper(sent), threes.sum(0))
        self.of_upper.zero_grad()
        (loss if more is None else loss + more).backward()
        self.of_upper.step()

    def _lower_step(self) -> None:
        self.of_lower.step()
        self.updates += 1

    @torch.no_grad()
    def errors(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Return shares of wrong counts, of odd digits and of threes."""
        odd, threes = counts(labels)
        states = [self.lower(part) for part in images]
        sent = torch.stack([self.lower.message(state) for state in states])
        said = torch.stack([self.lower.odd(state) for state in states]).argmax(-1)
        wrong = self.upper(sent).argmax(-1) != threes.sum(0)
        return float((said != odd).float().mean()), float(wrong.float().mean())


def counts(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Count odd digits and threes of each window: [T, T, N] -> two of [T, N]."""
    return (labels % 2).sum(1), (labels == 3).sum(1)


def draw(
    split: data.Split, window: int, streams: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw T * T digits a stream: [T, T, N, I] and [T, T, N]."""
    rows = torch.randint(len(split.labels), (window * window * streams,), generator=generator)
    images, labels = data.pick(split, rows)
    shape = (window, window, streams)
    return images.reshape(*shape, -1), labels.reshape(shape)


def train(
    name: str, window: int, seed: int, settings: Settings, dataset: data.Dataset, say: Say
) -> dict[str, Any]:
    """Train a pair of networks.

    Args:
        name: of :data:`CLOCKS`: the lower network ``waits`` for its gradient, takes a synthetic one
            (``dni``; ``cdni``: conditioned on the number of threes that it saw), or learns from its
            own loss ``alone``.
        window: T.
        seed: of weights and streams.
        settings, dataset: see :func:`fused_dni.experiments.literature.reproduce`.
        say: called with the part of the run that is done.

    Returns:
        ``error`` (of the upper network), ``diverged`` and ``history``: rows of ``digits`` of a
        stream, ``updates`` of the lower network, ``odd_error`` (of its counts) and ``error``.
    """
    pair = _Pair(name, window, seed, dataset.features, settings.hidden)
    generator = torch.Generator().manual_seed(seed)
    tested = draw(dataset.test, window, TESTED, torch.Generator().manual_seed(0))
    steps = settings.digits // window**2
    points = {steps - i * steps // EVALUATIONS for i in range(EVALUATIONS)}
    points.add(steps // window)  # where the others have been updated as often as `waits` is
    history = []
    for step in range(1, steps + 1):
        pair.step(*draw(dataset.train, window, STREAMS, generator))
        if step in points:
            odd, threes = pair.errors(*tested)
            row = {"digits": step * window**2, "updates": pair.updates}
            history.append({**row, "odd_error": odd, "error": threes})
        say(step / (steps + 1))
    gone = diverged(pair.lower) or diverged(pair.upper)
    return {"error": history[-1]["error"], "diverged": gone, "history": history}
