"""``Schedule``: the one place where the phases of decoupled training live."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

from torch import Tensor, nn

from fused_dni.modules.base import DecoupledModule, Phase
from fused_dni.modules.recurrent import Recurrent

# So many steps with targets that bring none, one after another, are said.
LOOK = 32


class LossScaler(Protocol):
    """What is needed of a ``torch.amp.GradScaler``."""

    def get_scale(self) -> float: ...


def _can_learn(layer: DecoupledModule) -> bool:
    slots = (*layer.parameters_behind(), *layer.synthesizer_parameters())
    return any([p is not None and p.requires_grad for p in slots])


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
            None for never.
        mix: share of the true gradient in the gradient used, on steps with targets; in [0, 1].
        loss_scale: the factor on the loss, if there is one: a number or a ``GradScaler``, read at
            every :meth:`step` (which therefore comes after ``scaler.update()``).

    Raises:
        ValueError: an argument out of range, or a model without decoupled layers.
    """

    def __init__(
        self,
        model: nn.Module,
        warmup_steps: int = 0,
        target_every: int | None = 1,
        mix: float = 0.0,
        loss_scale: float | LossScaler | None = None,
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        if target_every is not None and target_every < 1:
            raise ValueError(f"target_every must be at least 1 or None, got {target_every}")
        if not 0.0 <= mix <= 1.0:
            raise ValueError(f"mix must be in [0, 1], got {mix}")
        if isinstance(loss_scale, (int, float)) and not 0.0 < loss_scale < float("inf"):
            raise ValueError(f"loss_scale must be positive and finite, got {loss_scale}")
        self._layers = [m for m in model.modules() if isinstance(m, DecoupledModule)]
        if not self._layers:
            raise ValueError("model has no decoupled layers (see fused_dni.convert)")
        self.warmup_steps = warmup_steps
        self.target_every = target_every
        self.mix = mix
        self.loss_scale = loss_scale
        self.steps = 0
        self._told: Phase | None = None
        # An LSTM learns from the window that comes next, and says itself if there is none.
        self._learners = [
            m for m in self._layers if m.synthesizer is not None and not isinstance(m, Recurrent)
        ]
        self._heard = self._lessons()
        self._missed = 0  # steps with targets that brought none, one after another
        self._warned = False
        self._tell()

    def step(self) -> None:
        """One training step is over: set the layers' flags for the next."""
        if self.target:
            self._listen()
        self.steps += 1
        self._tell()

    def _lessons(self) -> list[tuple[Tensor, int]]:
        """What changes with each lesson of a layer, and is known without waiting for a device."""
        return [(m.statistics, m.statistics._version) for m in self._learners]

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
        """Whether the coming step needs the true gradient: on other steps nothing above the
        decoupled layers need be run, not even the loss (see :func:`fused_dni.backward_local`)."""
        assert self._told is not None
        return self._told.target or self._told.warmup

    def phase(self) -> Phase:
        """What the layers are told for the coming step."""
        past = self.steps - self.warmup_steps
        scale = self.loss_scale
        if scale is not None and not isinstance(scale, (int, float)):
            scale = scale.get_scale()
        return Phase(
            warmup=past < 0,
            target=self.target_every is not None and past % self.target_every == 0,
            mix=self.mix,
            loss_scale=scale,
        )

    def _tell(self) -> None:
        phase = self.phase()
        if phase != self._told:
            self._told = phase
            for layer in self._layers:
                layer.phase = phase

    def state_dict(self) -> dict[str, Any]:
        """The step count; the arguments are the constructor's."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.steps = int(state["steps"])
        self._tell()
