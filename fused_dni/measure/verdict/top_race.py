"""The user's own bottom and top in a race: backprop against DNI at equal wall-clock.

A factory makes them, ``(bottom, top, batch)`` or ``(bottom, top, batch, synthesizer)``; it is
called anew for each arm and seed, behind ``torch.manual_seed(seed)``. ``batch(number)`` returns
``(x, *rest)``, the same for the same number: from 0 on for training, below 0 for looking at the
loss, which is data held out where there are such.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fused_dni.measure.race import Arms
from fused_dni.measure.verdict.top_steps import drawn, given, make_subject
from fused_dni.rules import Rule

#: Steps of plain backprop before the top is left out, in which the synthesizer learns, too.
WARMUP = 50
#: How often the top is run, where nobody says.
RACE_KS = (4, 8)
#: Batches that a loss is the mean of.
LOOKS = 8
#: How far apart the batches of two seeds begin.
APART = 2**20


class Racer:
    """One arm: see :class:`fused_dni.measure.race.Racer`.

    Args:
        factory: makes bottom, top and batches.
        seed: of its weights and batches.
        synthesizer: as of :func:`fused_dni.verdict_top`; None for backprop. One that the factory
            brings goes before it.
        every: k.
        rule: by which all is updated.
        warmup: steps of plain backprop.

    Raises:
        VerdictError: the factory's parts do not fit.
    """

    def __init__(
        self,
        factory: Callable[[], Any],
        seed: int,
        synthesizer: nn.Module | str | None,
        every: int,
        rule: Rule,
        warmup: int,
    ) -> None:
        torch.manual_seed(seed)
        made = given(factory(), "the factory")
        self._batch = made.batch
        self._number = seed * APART
        name = "auto" if synthesizer is None else synthesizer
        subject = make_subject(
            made.bottom, made.top, drawn(made.batch, self._number), made.synthesizer or name, rule
        )
        chosen = None if synthesizer is None else next(iter(subject.synthesizers))
        self._device = subject.x.device
        self._loop = subject.loop(chosen, every, warmup)

    def step(self) -> None:
        """Draw a batch and train on it."""
        self._loop.step(*self._batch(self._number))
        self._number += 1

    def loss(self) -> float:
        """Return the mean loss of batches -1, -2, ..., modules in ``eval()``."""
        wholes = [
            part for part in (self._loop.bottom, self._loop.top) if isinstance(part, nn.Module)
        ]
        modes = [(m, m.training) for whole in wholes for m in whole.modules()]
        devices = [self._device] if self._device.type == "cuda" else []
        for whole in wholes:
            whole.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                torch.manual_seed(0)
                losses = []
                for i in range(LOOKS):
                    x, *rest = self._batch(-1 - i)
                    losses.append(float(self._loop.top(self._loop.bottom(x), *rest)))
        finally:
            for module, mode in modes:
                module.training = mode
        return sum(losses) / LOOKS


def top_arms(
    factory: Callable[[], Any],
    *,
    synthesizer: nn.Module | str | Sequence[str] = "auto",
    target_every: Sequence[int] = RACE_KS,
    update: Rule,
    warmup: int = WARMUP,
) -> Arms:
    """Return the arms of a race: backprop, and DNI with each synthesizer at each k.

    Args:
        factory: see :mod:`fused_dni.measure.verdict.top_race`.
        synthesizer: as of :func:`fused_dni.verdict_top`, where the factory brings none.
        target_every: the k.
        update: rule with its rate, for all arms.
        warmup: steps of plain backprop before the top is left out.

    Returns:
        For :func:`fused_dni.measure.race.race`.
    """
    names = [synthesizer] if isinstance(synthesizer, (str, nn.Module)) else list(synthesizer)

    def arm(name: nn.Module | str | None, k: int) -> Callable[[int], Racer]:
        return lambda seed: Racer(factory, seed, name, k, update, warmup)

    arms: dict[str, Callable[[int], Racer]] = {"backprop": arm(None, 1)}
    for name in names:
        behind = f", {name}" if len(names) > 1 else ""
        arms |= {f"DNI k={k}{behind}": arm(name, k) for k in target_every}
    return arms
