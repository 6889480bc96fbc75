"""What is measured, written once: pytest-benchmark suites and the interleaved tables share it.

Nothing here takes a time. A *candidate* is a callable without arguments together with what it was
checked against before anything is timed: the functions ``check...`` raise :class:`Disagreement`
when a candidate does not compute what it claims to, and a benchmark of a candidate that fails its
check is a failed benchmark.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from fused_dni.measure.verdict.candidates import Expired, deadline
from fused_dni.ops import registry

CLASSES = 10
RANK = 16
#: Rate at which layers and windows are timed: they are to stay where they are.
RATE = 1e-6


class Disagreement(AssertionError):
    """A candidate does not compute what it is compared with."""


def agree(
    what: str,
    found: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    allowed: float | Callable[[str], float],
) -> None:
    """Hold a candidate's tensors against float64's, in norm; ``allowed`` is for all, or by name.

    Raises:
        Disagreement: others are there, or one is off by more.
    """
    if found.keys() != exact.keys():
        raise Disagreement(f"{what}: has {sorted(found)}, float64 has {sorted(exact)}")
    for name, want in exact.items():
        error = float((found[name].detach().double() - want.detach()).norm() / want.detach().norm())
        bound = allowed if isinstance(allowed, float) else allowed(name)
        if not error <= bound:
            raise Disagreement(f"{what}: {name} is off by {error:.2e}, allowed {bound:.1e}")


def backends() -> list[str]:
    """Return the backends that can run here on a CPU. Triton's interpreter is not among them: its
    time says nothing."""
    found = [name for name, reason in registry.report() if reason is None]
    return [name for name in found if name != "triton"]


@contextlib.contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """Yield a deadline for a compiler; None for none.

    Raises:
        RuntimeError: it has passed.
    """
    if seconds is None:
        yield
        return
    try:
        with deadline(seconds):
            yield
    except Expired:
        raise RuntimeError(f"compiling took more than {seconds:g} s") from None
