"""A head with its loss: candidates, and the gate of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from workloads import CLASSES, agree


class Case(NamedTuple):
    """Rows of a batch, width of what is below, classes."""

    batch: int
    features: int
    classes: int = CLASSES

    def __str__(self) -> str:
        return f"{self.batch}/{self.features}/{self.classes}"


CASES = (Case(64, 256), Case(128, 1024), Case(128, 256, 10_000))
#: Small, so that nothing drifts while it is timed.
RATE = 1e-6

Loss = Callable[[nn.Linear, Tensor, Tensor], Tensor]


def _eager(head: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(head(x), y)


def _joint(head: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    joint: Any = vars(F)["linear_cross_entropy"]
    loss: Tensor = joint(x, head.weight, y, linear_bias=head.bias)
    return loss


EAGER, COMPILED = "stock, eager, fused optimizer", "stock, compiled, fused optimizer"
JOINT, OURS = "F.linear_cross_entropy, fused optimizer", "ours"
STOCK: dict[str, Loss] = {EAGER: _eager, COMPILED: _eager}
if hasattr(F, "linear_cross_entropy"):  # PyTorch 2.13 has it
    STOCK[JOINT] = _joint
CANDIDATES = (*STOCK, OURS)


def _step(
    case: Case, name: str, rate: float, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[], Tensor], nn.Module, Tensor]:
    """Make a step that returns the loss; the head; and what is below, whose gradient it makes."""
    torch.manual_seed(0)
    stock = nn.Linear(case.features, case.classes).to(dtype)
    x = torch.randn(case.batch, case.features).to(dtype).requires_grad_()
    y = torch.randint(0, case.classes, (case.batch,))
    if name == OURS:
        head = fd.FusedDNILinearCrossEntropyLoss.from_linear(stock, update=fd.SGD(rate))

        def ours() -> Tensor:
            x.grad = None
            loss: Tensor = head(x, y)
            loss.backward()
            return loss

        return ours, head, x
    optimizer = torch.optim.SGD(stock.parameters(), rate, fused=True)
    run = STOCK[name]
    if name == COMPILED:
        run = torch.compile(run, fullgraph=True, dynamic=False)

    def theirs() -> Tensor:
        x.grad = None
        optimizer.zero_grad()
        loss = run(stock, x, y)
        loss.backward()
        optimizer.step()
        return loss

    return theirs, stock, x


def stepper(case: Case, name: str) -> Callable[[], object]:
    """Return a candidate: one step."""
    return _step(case, name, RATE)[0]


def check(case: Case, name: str) -> None:
    """Hold loss, gradient below and moved parameters of a step against stock PyTorch in float64.

    In norm: float32 leaves an error of eps times the root of a sum's
    length.

    Raises:
        Disagreement: they differ by more than 8 of these.
    """
    found = []
    for candidate, dtype in ((name, torch.float32), (EAGER, torch.float64)):
        # A large rate: what is compared is a movement, not the roundings of small ones.
        step, head, x = _step(case, candidate, 1e3, dtype)
        before = [p.detach().double().clone() for p in head.parameters()]
        loss = step()
        moved = [p.detach().double() - b for p, b in zip(head.parameters(), before, strict=True)]
        assert x.grad is not None
        names = ("loss", "dx", "weight", "bias")
        found.append(dict(zip(names, (loss, x.grad, *moved), strict=True)))
    agree(f"{name}, {case}", *found, 8 * torch.finfo(torch.float32).eps * max(case) ** 0.5)
