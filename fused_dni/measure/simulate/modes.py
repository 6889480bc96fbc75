"""The ways of training on N devices, and what each of them comes to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fused_dni.measure.simulate import replicas
from fused_dni.measure.simulate.engine import Chain, Outage, Ran, run
from fused_dni.measure.simulate_settings import Settings

#: Stages whose utilisation is kept one by one; of more, the least, the mean and the most.
SINGLE = 64


class Case(NamedTuple):
    """A point of a sweep: a number of stages, and settings with the latency in them."""

    stages: int
    settings: Settings


@dataclass(frozen=True)
class Mode:
    """A way of training.

    Attributes:
        name: as on the command line.
        what: it does, in a line.
        chain: its chain of stages; None for replicas of the whole model.
        together: after a failure all go back to the checkpoint; otherwise what failed alone does,
            and the others go on.
    """

    name: str
    what: str
    chain: Callable[[Case], Chain] | None
    together: bool


def _chain(case: Case, **options: Any) -> Chain:
    s, n = case.settings, case.stages
    times = s.times.at(n)
    given: dict[str, Any] = {
        "forward": times["forward"],
        "backward": times["backward"],
        "weight": times["weight"],
        "optimizer": times["optimizer"],
        "link": s.link,
        "forward_bytes": s.forward_bytes,
        "backward_bytes": s.backward_bytes,
        "stragglers": s.stragglers,
        "seed": s.seed,
    }
    return Chain(**{**given, **options})


def _synchronous(case: Case, **options: Any) -> Chain:
    """Updates of m microbatches, none of which begins before the last one is over."""
    s, m = case.settings, case.settings.update_of(case.stages)
    given = {
        "windows": [min(m, case.stages - i) for i in range(case.stages)],
        "total": m * math.ceil(s.steps / m),
        "skip": 0,
        "every": m,
        "flush": True,
        "late": s.late_receives,
    }
    return _chain(case, **{**given, **options})


def _gpipe(case: Case) -> Chain:
    m = case.settings.update_of(case.stages)
    return _synchronous(case, windows=[m] * case.stages, forwards_first=True)


def _zero_bubble(case: Case) -> Chain:
    times = case.settings.times.at(case.stages)
    inputs = [b - w for b, w in zip(times["backward"], times["weight"], strict=True)]
    return _synchronous(case, backward=inputs, split=True, hold=case.stages)


def _two_versions(case: Case) -> Chain:
    n, m = case.stages, case.settings.update_of(case.stages)
    m = max(m, n)  # fewer, and two versions of the parameters are not enough
    measured = m * math.ceil(case.settings.steps / m)
    windows = [n - i for i in range(n)]
    return _chain(case, windows=windows, every=m, skip=m, total=m + measured)


def _stale(case: Case) -> Chain:
    window = case.settings.window_of(case.stages)
    measured = window * math.ceil(case.settings.steps / window)
    return _chain(
        case, windows=[window] * case.stages, skip=2 * window, total=2 * window + measured
    )


def _one_way(case: Case, **options: Any) -> Chain:
    s = case.settings
    measured = s.buffer * math.ceil(s.steps / s.buffer)
    return _chain(
        case,
        one_way=True,
        buffer=s.buffer,
        skip=2 * s.buffer,
        total=2 * s.buffer + measured,
        **options,
    )


def _dni(case: Case) -> Chain:
    s, n = case.settings, case.stages
    times = s.times.at(n)
    # The topmost stage has the loss, and the gradient from it.
    exact = [times[name][-1] for name in ("forward", "backward", "optimizer")]
    extra = times["target"]
    return _one_way(
        case,
        forward=[*times["dni"][:-1], sum(exact)],
        backward=times["lesson"],
        targets=s.target_every,
        extra=[*extra[:-1], 0.0],
        max_age=s.max_age,
    )


def _local(case: Case) -> Chain:
    return _one_way(case, forward=case.settings.times.at(case.stages)["local"])


#: By name, in the order of tables.
MODES = {
    mode.name: mode
    for mode in (
        Mode("gpipe", "all forwards of an update, then all backwards", _gpipe, True),
        Mode("1f1b", "a forward and a backward in turns, N - i under way at stage i",
             _synchronous, True),
        Mode("zero-bubble", "1F1B with the weights' part of the backward put off into the gaps",
             _zero_bubble, True),
        Mode("2bw", "1F1B without a pause between updates; gradients are one update old "
             "(PipeDream-2BW)", _two_versions, True),
        Mode("stale", "an update whenever a gradient arrives, however old", _stale, False),
        Mode("dni", "an update at once from a predicted gradient; targets come back later",
             _dni, False),
        Mode("local", "an update at once from a loss of the stage's own; nothing comes back",
             _local, False),
        Mode("data-parallel", "N replicas of the whole model, gradients averaged at each update",
             None, True),
        Mode("diloco", "N replicas of the whole model, averaged every H steps", None, False),
    )
}  # fmt: skip


def simulate(
    name: str, cases: Sequence[Case], progress: Callable[[float], None] | None = None
) -> list[dict[str, Any]]:
    """Run one mode at every point.

    Args:
        name: of :data:`MODES`.
        cases: the points.
        progress: called with the fraction done.

    Returns:
        A row a point: ``mode``, ``stages``, ``latency``; ``seconds`` (the simulated time that is
        measured), ``rate`` (microbatches a second),
        ``rows`` (rows a second), ``updates`` (updates of a stage a second), ``rows_an_update``;
        ``utilisation`` (a stage's share of time at work, by stage, None beyond 64 stages),
        ``least``, ``mean`` and ``most`` of it; ``forward_bytes`` and ``backward_bytes`` (sent by
        a device a microbatch); ``age``, ``oldest`` (:func:`_ages`), ``dropped`` (share of
        targets); ``failure`` (seconds lost by one, None if there are none) and ``lost`` (seconds
        of work that must be done again, or that one device's parameters lose).

    Raises:
        ValueError: an unknown name, or a straggler that is no stage of a point.
    """
    if name not in MODES:
        raise ValueError(f"unknown mode {name!r}: allowed are {', '.join(MODES)}")
    for case in cases:
        stage = case.settings.stragglers.stage
        if stage is not None and stage >= case.stages:
            raise ValueError(
                f"the straggler must be one of {case.stages} stages, 0 to {case.stages - 1}, got "
                f"{stage}"
            )
    mode = MODES[name]
    if mode.chain is None:
        made = []
        for i, case in enumerate(cases):
            made.append(_replicas(name, case))
            if progress is not None:
                progress((i + 1) / len(cases))
        return made
    chains = [mode.chain(case) for case in cases]
    failing = [not mode.together and case.settings.failures.every is not None for case in cases]
    doubled = 1 + any(failing)

    def tell(share: float, done: int) -> None:
        if progress is not None:
            progress((done + share) / doubled)

    ran = run(chains, lambda share: tell(share, 0))
    rows = [_row(mode, *one) for one in zip(cases, chains, ran, strict=True)]
    if any(failing):
        struck = [_struck(*one) for one in zip(cases, chains, ran, strict=True)]
        again = run(struck, lambda share: tell(share, 1))
        for case, row, before, after in zip(cases, rows, ran, again, strict=True):
            out = _leaving(mode, case.stages)
            failures = case.settings.failures
            _fail(row, case, after.ends[out] - before.ends[out], failures.checkpoint / 2)
    return rows


def _struck(case: Case, chain: Chain, ran: Ran) -> Chain:
    """Return the same chain, whose middle stage fails in the middle of what is measured."""
    stage = case.stages // 2
    start = (ran.begins[stage] + ran.ends[stage]) / 2
    return replace(chain, outage=Outage(stage, start, case.settings.failures.restart))


def _leaving(mode: Mode, stages: int) -> int:
    """Return the stage at which a microbatch is over."""
    return stages - 1 if mode.name in ("dni", "local") else 0


def _row(mode: Mode, case: Case, chain: Chain, ran: Ran) -> dict[str, Any]:
    s = case.settings
    # An update is over when the lowest stage has made it. Where there is no such end, each stage
    # has a time of its own for the same microbatches, and the slowest one sets the pace: those
    # above or below it work off, or build up, what lies between.
    spans = [
        ran.ends[0] if chain.flush else end - start
        for start, end in zip(ran.begins, ran.ends, strict=True)
    ]
    rate = (chain.total - chain.skip) / max(spans)
    shares = [busy / span for busy, span in zip(ran.busy, spans, strict=True)]
    returned = 0.0
    if not chain.one_way:
        returned = s.backward_bytes
    elif chain.targets:
        returned = s.backward_bytes / chain.targets
    linked = case.stages > 1
    row = _common(mode.name, case, max(spans), rate, chain.every, shares)
    row |= {
        "forward_bytes": s.forward_bytes * linked,
        "backward_bytes": returned * linked,
        **_ages(mode, chain, ran),
    }
    if mode.together:
        _fail(row, case, *_all_back(case, ran.begins[0] if chain.skip else 0.0))
    return row


def _common(
    name: str, case: Case, seconds: float, rate: float, every: float, shares: Sequence[float]
) -> dict[str, Any]:
    rows = case.settings.rows
    return {
        "mode": name,
        "stages": case.stages,
        "latency": case.settings.link.latency,
        "seconds": seconds,
        "rate": rate,
        "rows": rate * rows,
        "updates": rate / every,
        "rows_an_update": rows * every,
        "utilisation": list(shares) if len(shares) <= SINGLE else None,
        "least": min(shares),
        "mean": statistics.fmean(shares),
        "most": max(shares),
        "age": None,
        "oldest": None,
        "dropped": None,
        "failure": None,
        "lost": None,
    }


def _ages(mode: Mode, chain: Chain, ran: Ran) -> dict[str, Any]:
    """Age of what updates (of DNI: lessons) are made from, in updates of the stage in between: the
    mean over the stages, and the largest anywhere."""
    if mode.name == "local":
        return {}
    if not chain.one_way and mode.name != "stale":
        old = 1 if mode.name == "2bw" else 0
        return {"age": float(old), "oldest": old}
    means = [age for age in ran.age if not math.isnan(age)]
    found: dict[str, Any] = {
        "age": statistics.fmean(means) if means else None,
        "oldest": max(ran.oldest) if means else None,
    }
    if mode.name == "dni":
        taught, dropped = sum(ran.lessons), sum(ran.dropped)
        found["dropped"] = dropped / max(taught + dropped, 1)
    return found


def _replicas(name: str, case: Case) -> dict[str, Any]:
    s, n = case.settings, case.stages
    times = s.times.at(n)
    pass_ = sum(times["forward"]) + sum(times["backward"])
    optimizer = sum(times["optimizer"])
    moved = s.parameter_bytes * n
    if name == "diloco":
        local = s.local_steps
        each, work = local, local * (pass_ + optimizer)
    else:
        local = 1
        each = max(1, round(s.update_of(n) / n))
        work = each * pass_ + optimizer
    random = s.stragglers.factor > 1.0 or s.link.jitter + s.link.jitter_share > 0.0
    rounds = math.ceil(s.steps / (each * n)) if random else 1
    rounds = max(rounds, 10 if random else 1)
    found = replicas.run(s, n, work, moved, rounds)
    rate = n * each / found.seconds
    update = n if name == "diloco" else n * each
    row = _common(name, case, rounds * found.seconds, rate, update, found.busy)
    sent = 2 * (n - 1) / n * moved / each
    row |= {"forward_bytes": sent, "backward_bytes": 0.0}
    # Steps of its own since a replica was last what the others are.
    row |= {"age": (local - 1) / 2, "oldest": local - 1}
    if name == "diloco":
        # Nobody waits: a replica that fails misses its restart and the part of a round it was in.
        if s.failures.every is not None:
            missed = s.failures.restart + found.seconds / 2
            _scaled(row, 1.0 / (1.0 + missed / s.failures.every))
            row |= {"failure": missed / n, "lost": found.seconds / 2}
    else:
        _fail(row, case, *_all_back(case, 0.0))
    return row


def _all_back(case: Case, fill: float) -> tuple[float, float]:
    """Seconds that a failure costs where all return to the last checkpoint, and of them what is
    done again; ``fill`` is how long the pipeline takes to be full."""
    failures = case.settings.failures
    again = failures.checkpoint / 2
    return failures.restart + again + fill, again


def _fail(row: dict[str, Any], case: Case, cost: float, lost: float) -> None:
    """Take up failures, each of which costs so many seconds: they come as often as there are
    devices, while the rest of the time is what was simulated."""
    every = case.settings.failures.every
    if every is not None:
        row |= {"failure": cost, "lost": lost}
        _scaled(row, 1.0 / (1.0 + case.stages * cost / every))


def _scaled(row: dict[str, Any], share: float) -> None:
    for key in ("rate", "rows", "updates", "least", "mean", "most"):
        row[key] *= share
    if row["utilisation"] is not None:
        row["utilisation"] = [value * share for value in row["utilisation"]]
