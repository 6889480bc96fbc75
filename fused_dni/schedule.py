"""``Schedule``: the one place where the phases of decoupled training live."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from statistics import median
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fused_dni.functional import check
from fused_dni.modules import target_unit
from fused_dni.modules.base import DecoupledModule, Phase
from fused_dni.modules.other_optimizers import OptimizerWatch
from fused_dni.modules.recurrent import Recurrent
from fused_dni.ops.types import G_DOT_G, S_DOT_G, SQUARED_ERROR
from fused_dni.pace import Pace, Seen

# So many steps with targets that bring none, one after another, are said.
LOOK = 32
BOUNDS = 1, 64  # of k, where it is chosen
PENDING = 1024  # steps whose late lessons are waited for, at most; of what comes, between two steps


class LossScaler(Protocol):
    """What is needed of a ``torch.amp.GradScaler``."""

    def get_scale(self) -> float: ...


@dataclass
class _Pending:
    """A step with a target of which lessons are to come (``step_local``, ``learn_late``).

    Attributes:
        distance: steps since the target before.
        seen: by layer, what is known of it so far.
        left: by layer, lessons that have not come.
    """

    distance: int
    seen: list[Seen]
    left: list[int] = field(default_factory=list)


def _whole(name: str, given: Any, others: tuple[str | None, ...] = ()) -> None:
    """Refuse what is no whole number of at least 1, and none of the others."""
    if isinstance(given, Integral) and given is not True and int(given) >= 1:
        return
    if not isinstance(given, (str, type(None))) or given not in others:
        allowed = ', "auto" or None' if others else ""
        raise ValueError(f"{name} must be a whole number of at least 1{allowed}, got {given!r}")


class Schedule:
    """Tells every decoupled layer of a model what to do in the next training step.

    Step it once per training step, after the backward, like a learning-rate scheduler. It sets
    flags on the layers; it never counts forward calls, so layers may be used twice, recomputed or
    accumulated over.

    Args:
        model: a model with decoupled layers in it.
        warmup_steps: steps of plain backprop in which synthesizers learn from true gradients.
        target_every: k: synthesizers are trained on every k-th step (the first of them right after
            the warm-up); on the others no gradients between decoupled layers are made at all.
            None for never. "auto" has k follow what steps with targets measure (below).
        mix: share of the true gradient in the gradient used, on steps with targets; in [0, 1].
        loss_scale: the factor on the loss, if there is one: a number or a ``GradScaler``, read at
            every :meth:`step` (which therefore comes after ``scaler.update()``).
        bounds: of "auto", the least and the largest k.
        cost_ratio: of "auto", what a target adds to a step (what is above, forward and backward,
            and the synthesizer's lesson), over what a step without one takes. None to time both
            between calls of :meth:`step` (medians, so that now and then a pause between two does
            not matter): then k depends on the clock, and a run repeated need not have the same
            bits; with a number it has.
        lessons: regression steps that a synthesizer takes on what arrives in a step with a target,
            warm-up included, each from its prediction as it is then: fewer targets, more lessons of
            each. Of layers whose synthesizer has a rule; recurrent ones take one.

    ``target_every="auto"``: on steps with targets the part of the gradient g that the prediction s
    explains is measured for nothing, r2(k) = 1 - sum((s - g)**2) / sum(g**2), with predictions as
    old as any of their cycle. When a step by the true gradient gains 1, one by a prediction gains
    q(k), and k follows the gain per time::

        q(k) = r2(k) - (k - 1) / 3 * (r2(1) - r2(k))
        rate(k) = (mix + (k - mix) * q(k)) / (k + cost_ratio)

    What r2 falls by with k is an error that the predicted steps of a cycle have in common: it adds
    up, as it grows with age by a third of what it is at the end for each; what no k explains does
    not. r2 elsewhere is extrapolated as ``a * r**k``,
    from this k and those tried before.

    k starts at 4 and moves by a factor of about 1.4, behind four or more targets (k or more, if it
    grows), where the best k of ``bounds`` has a rate that is better by a twentieth. Behind a move
    to a shorter one it does not grow for 16 targets, then 32, and so on. Where r2 falls from one
    target to the next, by a twentieth and more than its noise, k is divided by 4 at once and stays
    below what it was for four times as many. A sum of s*g that is not positive makes k the least
    at once; what is not finite is not looked at, nor is warm-up. Of several layers the one that is
    predicted worst counts; recurrent ones, which learn from the next window, and frozen
    synthesizers do not. Parameters above the layers, which learn on steps with targets alone, are
    not known of: bound k where their learning matters. Twice in a cycle the host waits for the
    device. Replicas of ``DistributedDataParallel`` choose one k, from the sums over all, and need
    ``cost_ratio``; under ``fully_shard`` give a number.

    Lessons that come late (:func:`fused_dni.learn_late`, pipelines) count for the step that they
    belong to, when all of its layers have had theirs: k follows them as late as they come. What a
    target costs elsewhere, above a link, is not in the times of this model's steps: give
    ``cost_ratio``. Of tickets that were saved and loaded nothing is counted.

    An optimizer of ``torch.optim`` that steps in the first training step and was given parameters
    which a layer's rule updates (it passes them by in silence) is warned of, once.

    Attributes:
        steps: steps so far.
        k: steps from one target to the next, as things are; None for never.

    Raises:
        ValueError: an argument out of range or that ``target_every`` has no use for; a model
            without decoupled layers or, with "auto", without a layer whose synthesizer can learn.
        RuntimeError: by :meth:`step`: replicas without ``cost_ratio``.
    """

    warmup_steps: int = check.checked(check.whole, low=0)
    target_every: int | Literal["auto"] | None = check.checked(_whole, others=("auto", None))
    mix: float = check.checked(high=1.0)
    lessons: int = check.checked(_whole)

    _others: OptimizerWatch | None = None

    def __init__(
        self,
        model: nn.Module,
        warmup_steps: int = 0,
        target_every: int | Literal["auto"] | None = 1,
        mix: float = 0.0,
        loss_scale: float | LossScaler | None = None,
        bounds: tuple[int, int] = BOUNDS,
        cost_ratio: float | None = None,
        lessons: int = 1,
    ) -> None:
        check.module("model", model)
        self.warmup_steps = warmup_steps
        self.target_every = target_every
        self.mix = mix
        self.lessons = lessons
        auto = target_every == "auto"
        if not auto and (bounds != BOUNDS or cost_ratio is not None):
            raise ValueError(
                'bounds and cost_ratio go with target_every="auto", got '
                f"bounds={bounds!r}, cost_ratio={cost_ratio!r} and target_every={target_every!r}"
            )
        if not _are_bounds(bounds):
            raise ValueError(f"bounds must be two integers, 1 <= least <= largest, got {bounds!r}")
        check.number("cost_ratio", cost_ratio, none=True)
        if not hasattr(loss_scale, "get_scale"):  # of a GradScaler
            check.number("loss_scale", loss_scale, above=True, none=True)
        self._layers = [m for m in model.modules() if isinstance(m, DecoupledModule)]
        if not self._layers:
            raise ValueError("model has no decoupled layers (see fused_dni.convert)")
        # An LSTM learns from the window that comes next, and says itself if there is none.
        self._learners = [
            m for m in self._layers if m.synthesizer is not None and not isinstance(m, Recurrent)
        ]
        if lessons > 1 and not any(m.synthesizer_update is not None for m in self._learners):
            raise ValueError(
                f"lessons={lessons} needs a layer whose synthesizer has a rule (update=...), and "
                "is no recurrent one: model has none, and an optimizer takes one step"
            )
        self.loss_scale = loss_scale
        self.steps = 0
        self._told: Phase | None = None
        self._heard = self._lessons()
        self._missed = 0  # steps with targets that brought none, one after another
        self._warned = False
        self._pace: Pace | None = None
        if auto:
            if not any(map(_is_taught, self._learners)):
                raise ValueError(
                    'target_every="auto" needs a layer whose synthesizer learns on steps with '
                    "targets: model has none (recurrent layers learn from the next window, frozen "
                    "synthesizers not at all); give a number"
                )
            self._pace = Pace(bounds, cost_ratio, mix)
        # Where k is chosen: the step with the next target, how long after the lesson before it,
        # the sums in front of it.
        self._due, self._distance = warmup_steps, 1
        self._measuring = [m for m in self._learners if auto and _is_taught(m)]
        for layer in self._layers:  # another schedule may have listened
            layer.due = layer.late_sums = None
        for layer in self._measuring:
            layer.late_sums = deque(maxlen=PENDING)
        self._pending: dict[int, _Pending] = {}
        self._tickets = [0] * len(self._measuring)
        self._before = self._sums()
        self._forget_times()
        self._others = OptimizerWatch(self, model, steps=1)
        self._tell()

    def step(self) -> None:
        """End a training step: set the layers' flags for the next."""
        if self._others is not None and self._others.step():
            self._others = None
        if self.target:
            self._listen()
        self.steps += 1
        if self._pace is not None:
            self._choose(self._pace)
        self._tell()

    @property
    def k(self) -> int | None:
        """Steps from one target to the next, as things are; None for never."""
        if self._pace is not None:
            return self._pace.k
        return None if self.target_every is None else int(self.target_every)

    def _forget_times(self) -> None:
        """Time anew, from the next step with a target."""
        self._left: float | None = None  # when the last step was over
        self._laps: list[float] = []  # seconds of steps behind the last with a target
        self._plain: float | None = None  # seconds of one of these, when the next target came
        self._began: float | None = None  # when that was

    def _choose(self, pace: Pace) -> None:
        """Behind a step with a target take in what it measured; in front of one, begin."""
        arrived = time.perf_counter()
        if self._left is not None:
            self._laps.append(arrived - self._left)
        late = self._late()
        if self.steps == self._due + 1:
            measured = self._measured(late)
            if pace.cost_ratio is None:
                target = None if self._began is None else time.perf_counter() - self._began
                pace.time(self._plain, target)
                self._laps = []
                self._left = arrived
            made = [m.tickets - n for m, n in zip(self._measuring, self._tickets, strict=True)]
            if any(made):
                self._pending[self._due] = _Pending(self._distance, measured, made)
            else:
                pace.observe(measured, self._distance)
            for of, i, seen in late:
                self._count_late(pace, of, i, seen)
            self._distance = pace.k
            self._due += pace.k
        else:
            for of, i, seen in late:
                self._count_late(pace, of, i, seen)
        if self.steps == self._due:
            self._before = self._sums()
            self._began = time.perf_counter()
            # The median: a pause between two steps (an evaluation, another model's turn) is none of
            # theirs. What the device has not done by now is all steps' together.
            self._plain = None
            if self._laps:
                self._plain = median(self._laps) + (self._began - arrived) / len(self._laps)
        if self._left is not None:
            self._left = time.perf_counter()

    def _late(self) -> list[tuple[int, int, Seen]]:
        """Return what late lessons have taught since the last call: the step of each, the
        layer, what was measured."""
        found = []
        for i, layer in enumerate(self._measuring):
            while layer.late_sums:
                one = layer.late_sums.popleft()
                sums = []
                for statistics, unit in (
                    (one.before, one.unit_before),
                    (one.after, one.unit_after),
                ):
                    sums.append([v * unit**2 for v in statistics.tolist()])
                added = [sums[1][j] - sums[0][j] for j in (S_DOT_G, G_DOT_G, SQUARED_ERROR)]
                found.append((one.due, i, Seen(*added)))
        return sorted(found, key=lambda one: one[0])

    def _count_late(self, pace: Pace, of: int, i: int, seen: Seen) -> None:
        """Count a late lesson for its step, and observe that if it was the last one."""
        pending = self._pending.get(of)
        if pending is None or pending.left[i] < 1:
            return
        pending.left[i] -= 1
        pending.seen[i] = Seen(*(a + b for a, b in zip(pending.seen[i], seen, strict=True)))
        if not any(pending.left):
            # What older steps still owe was dropped on its way, or comes too late to be the last.
            self._pending = {step: other for step, other in self._pending.items() if step > of}
            pace.observe(pending.seen, pending.distance)

    def _sums(self) -> list[list[float]]:
        """Return by layer what its synthesizer was trained on, in the unit 1 (this waits for the
        device). Units are powers of two: nothing is rounded where one has moved."""
        found = []
        for layer in self._measuring:
            sums, square = layer.statistics.tolist(), layer.unit**2
            found.append([sums[i] * square for i in (S_DOT_G, G_DOT_G, SQUARED_ERROR)])
        return found

    def _measured(self, late: Sequence[tuple[int, int, Seen]] = ()) -> list[Seen]:
        """Return by layer what was added in a step with a target, in all replicas together, without
        what late lessons added meanwhile."""
        seen = []
        for i, (layer, after, before) in enumerate(
            zip(self._measuring, self._sums(), self._before, strict=True)
        ):
            others = [one for _, of, one in late if of == i]
            added = [
                a - b - sum(other[j] for other in others)
                for j, (a, b) in enumerate(zip(after, before, strict=True))
            ]
            if others and not any(added[j] > 1e-9 * abs(after[j]) for j in (1, 2)):
                added = [0.0, 0.0, 0.0]  # rounding alone
            group = target_unit.replicas(layer)
            if group is not None:
                assert self._pace is not None
                if self._pace.cost_ratio is None:
                    raise RuntimeError(
                        'target_every="auto" in replicas of DistributedDataParallel needs '
                        "cost_ratio: by clocks of their own they would choose different k"
                    )
                total = torch.tensor(added, dtype=torch.float64, device=layer.statistics.device)
                torch.distributed.all_reduce(total, group=group)
                added = total.tolist()
            seen.append(Seen(*added))
        return seen

    def _lessons(self) -> list[tuple[Tensor, int]]:
        """Return what changes with each lesson of a layer, one that is to come (``step_local``)
        included, and is known without waiting for a device."""
        return [(m.statistics, m.statistics._version + m.tickets) for m in self._learners]

    def _listen(self) -> None:
        """Count, by layer, that a step with targets brought none; say so, once, if none does."""
        before, self._heard = self._heard, self._lessons()
        missed = taught = 0
        for m, (old, version), (sums, now) in zip(self._learners, before, self._heard, strict=True):
            if sums is not old or now != version:
                taught += 1
            elif _can_learn(m):
                missed += 1
                m.missed_targets += 1
        self._missed = self._missed + 1 if missed and not taught else 0
        if self._missed == LOOK and not self._warned:
            self._warned = True
            warnings.warn(
                f"of {LOOK} steps with targets none brought a gradient to a decoupled layer: "
                "where schedule.target is true run what is above the layers and the loss's "
                "backward, or their synthesizers learn nothing",
                UserWarning,
                stacklevel=3,
            )

    @property
    def target(self) -> bool:
        """Whether the coming step needs the true gradient. On other steps nothing above the
        decoupled layers need be run, not even the loss (see :func:`fused_dni.backward_local`)."""
        assert self._told is not None
        return self._told.target or self._told.warmup

    def phase(self) -> Phase:
        """Return what the layers are told for the coming step."""
        past = self.steps - self.warmup_steps
        scale = self.loss_scale
        if scale is not None and not isinstance(scale, (int, float)):
            scale = scale.get_scale()
        if self._pace is not None:
            target = self.steps == self._due
        else:
            target = self.target_every is not None and past % int(self.target_every) == 0
        return Phase(
            warmup=past < 0,
            target=target,
            mix=self.mix,
            lessons=int(self.lessons),
            loss_scale=scale,
        )

    def _tell(self) -> None:
        if self._pace is not None:
            due = self.steps if self.steps == self._due else None
            for layer in self._measuring:
                layer.due = due
            if due is not None:
                self._tickets = [layer.tickets for layer in self._measuring]
                while len(self._pending) > PENDING:
                    del self._pending[next(iter(self._pending))]
        phase = self.phase()
        if phase != self._told:
            self._told = phase
            for layer in self._layers:
                layer.__dict__["phase"] = phase  # nn.Module's __setattr__ takes as long as a kernel

    def state_dict(self) -> dict[str, Any]:
        """Return the step count and, with "auto", all that k is chosen from; the arguments are the
        constructor's."""
        if self._pace is None:
            return {"steps": self.steps}
        pace = {
            "due": self._due,
            "distance": self._distance,
            "before": self._before,
            # Sums that start anew would be rounded otherwise.
            "statistics": [layer.statistics.tolist() for layer in self._measuring],
            **self._pace.state_dict(),
        }
        return {"steps": self.steps, "pace": pace}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken. With "auto", the layers' running sums (see
        :func:`fused_dni.diagnostics`) go on too; from a state without it k starts anew, and the
        coming step, or the first behind warm-up, has a target.

        Raises:
            TypeError, ValueError: a state without a number of steps, or of a model with another
                number of layers that can learn. Nothing was changed.
        """
        if "steps" not in state:
            raise ValueError(f"state must hold 'steps', got {sorted(state)}")
        check.whole("steps in state", state["steps"], 0)
        pace, found = self._pace, state.get("pace")
        if pace is not None and found is not None:
            if len(found["statistics"]) != len(self._measuring):
                raise ValueError(
                    f"the state is of {len(found['statistics'])} layers whose synthesizers learn; "
                    f"this model has {len(self._measuring)}"
                )
            pace.load_state_dict(found)
            self._due, self._distance = int(found["due"]), int(found["distance"])
            self._before = [list(sums) for sums in found["before"]]
            for layer, sums in zip(self._measuring, found["statistics"], strict=True):
                layer.statistics.copy_(torch.tensor(sums, dtype=torch.float64, device="cpu"))
        elif pace is not None:
            self._pace = Pace(pace.bounds, pace.cost_ratio, pace.mix)
            # How old its prediction will be is not known: not as old as any cycle.
            self._due, self._distance = max(int(state["steps"]), self.warmup_steps), 0
            self._before = self._sums()
        self._forget_times()
        self._pending = {}
        for layer in self._measuring:
            layer.late_sums = deque(maxlen=PENDING)
        self._heard = self._lessons()
        self.steps = int(state["steps"])
        self._tell()


def _are_bounds(given: Any) -> bool:
    two = isinstance(given, (tuple, list)) and len(given) == 2
    return two and all(isinstance(k, int) for k in given) and 1 <= given[0] <= given[1]


def _is_taught(layer: DecoupledModule) -> bool:
    """Say whether the synthesizer has anything to train."""
    synthesizer = layer.synthesizer
    return synthesizer is not None and any(p.requires_grad for p in synthesizer.parameters())


def _can_learn(layer: DecoupledModule) -> bool:
    """Say whether anything learns from what arrives: the synthesizer, or parameters behind h."""
    slots = (*layer.parameters_behind(), *layer.synthesizer_parameters())
    return any([p is not None and p.requires_grad for p in slots])
