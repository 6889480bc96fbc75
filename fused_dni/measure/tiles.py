"""Measuring candidates for the tiles of a kernel, and keeping the fastest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch

from fused_dni.kernels import tuning
from fused_dni.kernels.tuning import Choice
from fused_dni.measure import timing

T = TypeVar("T", bound=NamedTuple)

#: Launches in one sample on a GPU: replayed as one CUDA graph, so that the time of a kernel of a
#: few microseconds is its own and not that of launching it.
_LAUNCHES = 20


@dataclass(frozen=True)
class Trial(Generic[T]):
    """A candidate and what came of it.

    Attributes:
        tiles: the candidate.
        timing: of one call; None if it was skipped.
        skipped: why it was: it did not compile, or asked for more than the device has.
    """

    tiles: T
    timing: timing.Timing | None
    skipped: str | None = None


def tune(
    choice: Choice,
    candidates: Iterable[T],
    prepare: Callable[[T], Callable[[], object]],
    *,
    seconds: float = 1.0,
    report: Callable[[Trial[T]], object] | None = None,
) -> T:
    """Measure candidates against each other, and choose the fastest from now on
    (:func:`fused_dni.kernels.tuning.remember`).

    Args:
        choice: what they are candidates for.
        candidates: the tiles to try.
        prepare: gives a callable that runs the op with these tiles. It is called many times, so it
            has to work on copies that nobody needs; nothing else is touched, and the state of
            torch's random number generators is put back.
        seconds: budget of the timed calls, of all candidates together; compiling comes on top.
        report: called with every trial, the fastest first and the skipped ones last. Without it,
            those that were skipped are logged as warnings.

    Raises:
        RuntimeError: the current stream is capturing a CUDA graph, or no candidate runs.
        OSError: the result cannot be written.
    """
    op, device = choice.op, choice.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "tiles cannot be tuned while a CUDA graph is being captured: tune before the capture"
        )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        trials = measure(candidates, prepare, device, seconds)
    for trial in trials:
        if report is not None:
            report(trial)
        elif trial.skipped is not None:
            logging.getLogger(__name__).warning("%s: %s: %s", op, trial.tiles, trial.skipped)
    if not trials or trials[0].timing is None:
        reasons = "; ".join(f"{trial.tiles}: {trial.skipped}" for trial in trials)
        raise RuntimeError(f"no candidate for {op} runs on {device}: {reasons or 'none was given'}")
    tuning.remember(choice, trials[0].tiles)
    return trials[0].tiles


def measure(
    candidates: Iterable[T],
    prepare: Callable[[T], Callable[[], object]],
    device: torch.device,
    seconds: float,
) -> list[Trial[T]]:
    """Time candidates against each other, each compiled first.

    Args:
        candidates: what to try: tiles, or whatever ``prepare`` takes and ``str`` tells apart.
        prepare: gives a callable that runs with one of them.
        device: where; on a GPU what is timed is the replay of a CUDA graph.
        seconds: budget of the timed calls, of all candidates together.

    Returns:
        A trial each, the fastest first, the skipped ones last.
    """
    calls: dict[str, Callable[[], object]] = {}
    tried: dict[str, T] = {}
    skipped: list[Trial[T]] = []
    launches = _LAUNCHES if device.type == "cuda" else 1
    for tiles in dict.fromkeys(candidates):
        try:
            call = prepare(tiles)
            call()  # compiles
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                call = _graph(call, launches)
        except Exception as error:  # compilers raise what they like
            lines = str(error).splitlines() or [""]
            skipped.append(Trial(tiles, None, f"{type(error).__name__}: {lines[0]}"))
            continue
        calls[str(tiles)], tried[str(tiles)] = call, tiles
    if not calls:
        return skipped
    taken = timing.compare(calls, seconds=seconds, device=device)
    trials = [
        Trial(tried[name], timing.combine(name, [(1 / launches, each)]))
        for name, each in taken.items()
    ]
    return sorted(trials, key=lambda trial: trial.timing.median) + skipped  # type: ignore[union-attr]


def _graph(call: Callable[[], object], launches: int) -> Callable[[], object]:
    """``launches`` calls as the replay of one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()

    def replay(held: Callable[[], object] = call) -> None:  # a graph does not hold its tensors
        graph.replay()

    return replay
