"""Tickets of steps whose targets are on their way, and what became of the targets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_dni.modules.base import DecoupledModule
from fused_dni.modules.late import Ticket, learn_late
from fused_dni.ops.types import G_DOT_G, S_DOT_G, S_DOT_S


@dataclass
class Ages:
    """How old targets were when they were learned, and how well they had been predicted.

    Attributes:
        count, total, oldest: targets; sum and maximum of their ages in steps.
        sums: by power of two from the age down (0 for 0): targets, s·g, s·s and g·g.
    """

    count: int = 0
    total: int = 0
    oldest: int = 0
    sums: dict[int, list[float]] = field(default_factory=dict)

    def add(self, age: int, products: tuple[float, ...] = (0.0, 0.0, 0.0)) -> None:
        """Count a target of that age; ``products`` are s·g, s·s and g·g, if it was predicted."""
        self.count += 1
        self.total += age
        self.oldest = max(self.oldest, age)
        lower = 0 if age == 0 else 1 << (age.bit_length() - 1)
        known = self.sums.setdefault(lower, [0.0] * 4)
        for i, value in enumerate((1.0, *products)):
            known[i] += value

    def report(self) -> dict[str, Any]:
        """Return the mean and the largest age, and by powers of two of the age how many targets
        there were and their cosine with what had been predicted (None where nothing was)."""
        mean = self.total / self.count if self.count else None
        by_age = []
        for lower, (count, dot, s, g) in sorted(self.sums.items()):
            size = math.sqrt(s * g)
            row = {"from": lower, "targets": int(count), "cosine": dot / size if size else None}
            by_age.append(row)
        return {"mean": mean, "oldest": self.oldest, "by_age": by_age}


class Mailbox:
    """The tickets of a stage, by step, and its synthesizer's late lessons.

    Args:
        module: which made the tickets.
        max_age: in steps: an older target is dropped, and an older ticket let go.

    Attributes:
        ages: of the targets that were learned.
        too_old, not_finite: targets that came and were dropped.
        expired: tickets that were let go.
    """

    def __init__(self, module: DecoupledModule, max_age: int) -> None:
        self.module, self.max_age = module, max_age
        self._tickets: dict[int, Ticket] = {}
        self.ages = Ages()
        self.too_old = self.not_finite = self.expired = 0

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def nbytes(self) -> int:
        """The memory that tickets keep alive, in bytes."""
        return sum(ticket.nbytes for ticket in self._tickets.values())

    def put(self, step: int, ticket: Ticket) -> None:
        """Keep the ticket of a step, and let go those that are too old by now."""
        self._tickets[step] = ticket
        while (oldest := next(iter(self._tickets))) < step - self.max_age:
            del self._tickets[oldest]
            self.expired += 1

    def learn(self, step: int, now: int, gradient: Tensor) -> bool:
        """Teach the synthesizer the target of a step; whether it was learned, and not dropped."""
        ticket = self._tickets.pop(step, None)
        if ticket is None or now - step > self.max_age:
            self.too_old += 1
            return False
        if not bool(torch.isfinite(gradient).all()):
            self.not_finite += 1
            return False
        before = self._products()
        learn_late(self.module, ticket, gradient)
        learned = (b - a for a, b in zip(before, self._products(), strict=True))
        self.ages.add(now - step, tuple(learned))
        return True

    def _products(self) -> list[float]:
        """Return what the synthesizer was trained on so far, in the unit 1."""
        sums, square = self.module.statistics.tolist(), self.module.unit**2
        return [sums[i] * square for i in (S_DOT_G, S_DOT_S, G_DOT_G)]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the tickets by step, to be saved."""
        return {str(step): ticket.state_dict() for step, ticket in self._tickets.items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take over the tickets that :meth:`state_dict` gave."""
        self._tickets = {int(k): Ticket.from_state_dict(v) for k, v in state.items()}
