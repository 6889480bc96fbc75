"""What a simulation is given: times of a stage, links, disturbances, and how the modes are run.
Nothing here imports PyTorch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fused_dni.report.files import finite

#: More stages than that are refused.
MOST_STAGES = 10_000
#: Stages while the latency varies, and seconds of latency while their number does.
STAGES, LATENCY = 4, 0.02
#: Longest time that may be given, in seconds: whole picoseconds have to fit 64 bits.
LONGEST = 1e5
#: Shortest time of work, in seconds.
TIMES_MINIMUM = 1e-9
#: How messages' delays beyond the latency are distributed.
JITTERS = ("exponential", "uniform", "lognormal")


def _number(name: str, value: float, low: float, high: float = math.inf, what: str = "") -> None:
    above = "" if math.isinf(high) else f" to {high:g}"
    if not (low <= value <= high and math.isfinite(value)):
        raise ValueError(f"{name} must be from {low:g}{above}{what}, got {value!r}")


def _whole(name: str, value: int, low: int, high: int | None = None) -> None:
    above = "on" if high is None else f"to {high}"
    if not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be a whole number from {low} {above}, got {value!r}")


@dataclass(frozen=True)
class Times:
    """Seconds that a stage works on one microbatch, each a number for all stages or one a stage.

    Attributes:
        forward: forward pass.
        backward: backward pass, for parameters and input.
        weight: the part of ``backward`` that makes the parameters' gradients and that a
            zero-bubble schedule puts off.
        optimizer: an update of the parameters.
        dni: a step by a synthetic gradient: forward, prediction, local backward without the
            input's gradient, update.
        target: what making the input's gradient, the target for the stage below, adds to that.
        lesson: a synthesizer's update from a target.
        local: a step by a local loss: forward, loss, local backward, update.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]
    optimizer: tuple[float, ...]
    dni: tuple[float, ...]
    target: tuple[float, ...]
    lesson: tuple[float, ...]
    local: tuple[float, ...]

    def __post_init__(self) -> None:
        longest = max(len(getattr(self, part.name)) for part in fields(self))
        for part in fields(self):
            values = getattr(self, part.name)
            if len(values) not in (1, longest):
                raise ValueError(
                    f"{part.name} has {len(values)} times: allowed are one for all stages or "
                    f"{longest}, one a stage"
                )
            free = part.name in ("optimizer", "target", "lesson")
            for value in values:
                _number(part.name, value, 0.0 if free else TIMES_MINIMUM, LONGEST, " seconds")
        for i in range(longest):
            weight, backward = (v[i % len(v)] for v in (self.weight, self.backward))
            if weight >= backward:
                raise ValueError(
                    f"weight is a part of backward and less than it ({backward!r}), got {weight!r}"
                )

    @classmethod
    def of(
        cls,
        forward: float | Sequence[float],
        backward: float | Sequence[float],
        *,
        weight: float | Sequence[float] | None = None,
        optimizer: float | Sequence[float] = 0.0,
        dni: float | Sequence[float] | None = None,
        target: float | Sequence[float] = 0.0,
        lesson: float | Sequence[float] | None = None,
        local: float | Sequence[float] | None = None,
    ) -> Times:
        """Fill in what was not measured.

        Args:
            weight: by default half of ``backward``.
            dni: by default a step of backprop, forward + backward + optimizer, and a tenth of the
                forward for the prediction.
            lesson: by default a twentieth of the forward.
            local: by default forward + backward + optimizer.

        Raises:
            ValueError: a time that is negative, zero where work must take time, not finite or
                longer than :data:`LONGEST`; ``weight`` not below ``backward``; tuples of
                different lengths.
        """

        def spread(value: float | Sequence[float]) -> tuple[float, ...]:
            if isinstance(value, (int, float)):
                return (float(value),)
            return tuple(float(v) for v in value)

        f, b, o = spread(forward), spread(backward), spread(optimizer)
        length = max(len(f), len(b), len(o))
        sizes = {len(f), len(b), len(o)}
        if not sizes <= {1, length} or 0 in sizes:
            raise ValueError(
                f"forward, backward and optimizer have {len(f)}, {len(b)} and {len(o)} times: "
                "allowed are one for all stages, or one a stage"
            )
        whole = tuple(f[i % len(f)] + b[i % len(b)] + o[i % len(o)] for i in range(length))
        step = tuple(w + 0.1 * f[i % len(f)] for i, w in enumerate(whole))
        return cls(
            forward=f,
            backward=b,
            weight=tuple(0.5 * v for v in b) if weight is None else spread(weight),
            optimizer=o,
            dni=step if dni is None else spread(dni),
            target=spread(target),
            lesson=tuple(0.05 * v for v in f) if lesson is None else spread(lesson),
            local=whole if local is None else spread(local),
        )

    def at(self, stages: int) -> dict[str, list[float]]:
        """Seconds by name, one a stage; where ``stages`` are not those given, their mean."""
        found = {}
        for part in fields(self):
            values = list(getattr(self, part.name))
            if len(values) != stages:
                values = [statistics.fmean(values)] * stages
            found[part.name] = values
        return found


@dataclass(frozen=True)
class Link:
    """What lies between two neighbours, the same everywhere.

    Attributes:
        latency: seconds from the end of sending to the arrival, forward.
        latency_back: the same backward; None for ``latency``.
        bandwidth: bytes a second, forward; infinity for no limit.
        bandwidth_back: the same backward; None for ``bandwidth``.
        jitter: mean of what a message takes longer at random, in seconds. Messages of one
            direction do not overtake each other.
        jitter_share: the same, in parts of the latency, added to it.
        shape: distribution of the jitter: ``exponential``, ``uniform`` from 0 to twice the mean, or
            ``lognormal`` (sigma 1: rare long delays).
    """

    latency: float = 0.0
    latency_back: float | None = None
    bandwidth: float = math.inf
    bandwidth_back: float | None = None
    jitter: float = 0.0
    jitter_share: float = 0.0
    shape: str = "exponential"

    def __post_init__(self) -> None:
        for name in ("latency", "latency_back", "jitter"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), 0.0, LONGEST, " seconds")
        _number("jitter_share", self.jitter_share, 0.0, 100.0)
        for name in ("bandwidth", "bandwidth_back"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ValueError(f"{name} must be positive, in bytes a second, got {value!r}")
        if self.shape not in JITTERS:
            raise ValueError(f"shape must be one of {', '.join(JITTERS)}, got {self.shape!r}")

    @property
    def back(self) -> float:
        """Latency of the way back."""
        return self.latency if self.latency_back is None else self.latency_back

    @property
    def wide_back(self) -> float:
        """Bandwidth of the way back."""
        return self.bandwidth if self.bandwidth_back is None else self.bandwidth_back

    def jitter_of(self, latency: float) -> float:
        """Mean jitter in seconds of a way of that latency."""
        return self.jitter + self.jitter_share * latency

    def around(self, forward_bytes: float, backward_bytes: float) -> float:
        """Mean seconds of a message there and one back."""
        ways = ((self.latency, self.bandwidth, forward_bytes),
                (self.back, self.wide_back, backward_bytes))  # fmt: skip
        return sum(at + self.jitter_of(at) + moved / wide for at, wide, moved in ways)


@dataclass(frozen=True)
class Stragglers:
    """Stages that are slow now and then.

    Attributes:
        factor: how many times as long their work takes; 1 for none.
        share: part of the time that a stage is slow; 1 for always.
        spell: mean length of being slow without interruption, in seconds.
        stage: the one stage that it happens to, counted from 0; None for all, each on its own.
    """

    factor: float = 1.0
    share: float = 0.05
    spell: float = 1.0
    stage: int | None = None

    def __post_init__(self) -> None:
        _number("factor", self.factor, 1.0, 1e6)
        _number("share", self.share, 0.0, 1.0)
        _number("spell", self.spell, 1e-9, LONGEST, " seconds")
        if self.stage is not None:
            _whole("stage", self.stage, 0)


@dataclass(frozen=True)
class Failures:
    """Stages that fail, independently of each other.

    Attributes:
        every: mean seconds between two failures of one stage; None for never.
        restart: seconds until what failed works again.
        checkpoint: seconds between two checkpoints; what was done since the last one is lost.
    """

    every: float | None = None
    restart: float = 60.0
    checkpoint: float = 600.0

    def __post_init__(self) -> None:
        if self.every is not None:
            _number("every", self.every, 1e-3, 1e12, " seconds")
        _number("restart", self.restart, 0.0, LONGEST, " seconds")
        _number("checkpoint", self.checkpoint, 0.0, LONGEST, " seconds")


#: A stage of eight times Linear, BatchNorm, ReLU of 512 at a batch of 256 with Adam, as
#: :func:`fused_dni.measure.simulate.calibrate.calibrate` found it on one core with AVX2.
TRIAL = Times.of(
    15e-3, 27e-3, weight=13.5e-3, optimizer=2e-3, dni=45e-3, target=2.5e-3, lesson=0.6e-3,
    local=43.5e-3,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """A chain of stages and how each mode is run on it.

    Attributes:
        times: of a stage and microbatch.
        link: between neighbours.
        stragglers, failures: disturbances.
        rows: of a microbatch.
        forward_bytes, backward_bytes: of a message each way.
        parameter_bytes: of a stage's parameters, for what exchanges them.
        microbatches: of an update, for GPipe, 1F1B, zero-bubble, PipeDream-2BW and, over all
            replicas together, data parallel; None for four a stage.
        window: microbatches that stale asynchronous stages have under way at most; None for what
            the way there and back takes, but no more than 64, or twice the stages if that is more.
        buffer: messages that DNI and local losses keep between two stages at most, under way or
            waiting.
        target_every: k: DNI makes targets for every k-th microbatch.
        max_age: steps after which a target is dropped; None for never.
        local_steps: H of DiLoCo.
        late_receives: GPipe, 1F1B and zero-bubble ask for a message only when they need it, and
            the sender waits for that: as torch.distributed.pipelining does on gloo.
        steps: microbatches that are measured at least.
        seed: of all random numbers.

    Raises:
        ValueError: a number out of range.
    """

    times: Times = TRIAL
    link: Link = field(default_factory=Link)
    stragglers: Stragglers = field(default_factory=Stragglers)
    failures: Failures = field(default_factory=Failures)
    rows: int = 256
    forward_bytes: float = 512 * 1024.0
    backward_bytes: float = 512 * 1024.0
    parameter_bytes: float = 8 * 4 * (512 * 512 + 3 * 512.0)
    microbatches: int | None = None
    window: int | None = None
    buffer: int = 64
    target_every: int = 1
    max_age: int | None = None
    local_steps: int = 100
    late_receives: bool = False
    steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "buffer", "target_every", "local_steps", "steps"):
            _whole(name, getattr(self, name), 1, 1_000_000)
        for name in ("microbatches", "window"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, 1_000_000)
        if self.max_age is not None:
            _whole("max_age", self.max_age, 0)
        _whole("seed", self.seed, 0, 2**63 - 1)
        for name in ("forward_bytes", "backward_bytes", "parameter_bytes"):
            _number(name, getattr(self, name), 0.0)

    def update_of(self, stages: int) -> int:
        """Microbatches of an update of the exact modes."""
        return 4 * stages if self.microbatches is None else self.microbatches

    def window_of(self, stages: int) -> int:
        """Microbatches that stale stages have under way: more would only make gradients older."""
        if self.window is not None:
            return self.window
        times = self.times.at(stages)
        pace = max(map(sum, zip(*(times[n] for n in ("forward", "backward")), strict=True)))
        around = (
            sum(times["forward"])
            + sum(times["backward"])
            + (stages - 1) * self.link.around(self.forward_bytes, self.backward_bytes)
        )
        return min(math.ceil(around / pace) + stages, max(64, 2 * stages))

    def to_json(self) -> dict[str, Any]:
        """Plain data; null for a bandwidth without limit."""
        found: dict[str, Any] = finite(asdict(self))
        return found
