"""Images read row by row by an LSTM, with a loss at the last row alone: credit over a whole image.

The sequential MNIST of Le et al. 2015 (arXiv 1504.00941), by rows, or pixel by pixel in one random
order. Every arm updates once a batch of images, whatever its window, so that arms differ in their
gradients alone. Beside ``backprop``, ``fused``, ``dni`` and ``dni+aux`` of the other tasks:

``dni+lambda``
    The synthesizer learns from lambda-returns (the targets of Pemberton and Costa 2024, arXiv
    2401.07044, BP(lambda), here computed backwards once an episode has ended and not forwards by
    traces). At the end of window n the target is G(n) = J (lambda G(n + 1) + (1 - lambda) M(n + 1))
    with the transposed Jacobian J of window n + 1, and behind the last window it is its loss's own
    gradient: 0 is what ``dni`` learns there, 1 the true gradient. The LSTM itself hears of M alone;
    nothing is taught at the end of an image, where M is not asked. Each window but the first is run
    twice, and entrances are kept.
``immediate``
    Every step's immediate derivative alone, with RMSprop (arXiv 2603.28750): dL(t)/dh(t) times the
    derivative of step t with h(t - 1) held constant. Where only the last step has a loss, all other
    steps get nothing: truncated backprop at T = 1.
``local``, ``immediate+local``
    ``fused`` and ``immediate`` with another loss: the same head is to classify at the end of every
    window. No credit has to reach back, and none does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_dni.backends.common.windows import rows_state, state_rows
from fused_dni.experiments import data, future
from fused_dni.experiments.settings import Arm
from fused_dni.experiments.settings import Recurrent as Settings
from fused_dni.experiments.windowed import State, Trainer, build_net

#: Images that are evaluated in one call, and that true gradients are measured on.
EVALUATED, PROBED = 1000, 256
#: Seed of the order of pixels.
PIXEL_ORDER = 0


class RowsTrainer(Trainer):
    """Classification at the end of a sequence: every step is one batch of images, cut into windows.

    ``position`` counts batches.
    """

    def __init__(self, arm: Arm, seed: int, settings: Settings, source: data.Dataset) -> None:
        side = math.isqrt(source.features)
        if side * side != source.features:
            raise ValueError(f"images of {source.name} are not square: {source.features} pixels")
        #: Steps of a sequence, and what each of them reads.
        self.steps, self.inputs = (source.features, 1) if settings.full else (side, side)
        if arm.window > self.steps:
            raise ValueError(f"windows must be at most {self.steps}, got {arm.window}")
        if settings.batch_size > len(source.train.labels):
            raise ValueError(
                f"batch_size must be at most {len(source.train.labels)}, the images of "
                f"{source.name} to train on, got {settings.batch_size}"
            )
        self.starts = range(0, self.steps, arm.window)
        self.by_label, self.by_step = (
            settings.condition in (name, "both") for name in ("label", "step")
        )
        contexts = (source.classes if self.by_label else 1) * (
            len(self.starts) if self.by_step else 1
        )
        net = build_net(
            arm,
            settings,
            seed,
            nn.Identity,
            self.inputs,
            source.classes,
            contexts if settings.condition != "none" else 0,
        )
        super().__init__(arm, seed, settings, net)
        self.source = source
        self.pixels = torch.randperm(
            source.features, generator=torch.Generator().manual_seed(PIXEL_ORDER)
        )
        self._epoch, self._order = -1, torch.empty(0)

    @property
    def total(self) -> int:
        return self.settings.amount

    def read(self, images: Tensor) -> Tensor:
        """Make images [B, features] sequences [S, B, I]."""
        if self.settings.full:
            images = images[:, self.pixels]
        return images.view(len(images), self.steps, self.inputs).transpose(0, 1).contiguous()

    def batch(self) -> tuple[Tensor, Tensor]:
        """Pick the next images, as sequences, and their labels."""
        count, size = len(self.source.train.labels), self.settings.batch_size
        epoch, place = divmod(self.position, count // size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, data.permutation(count, self.seed, epoch)
        rows = self._order[place * size : (place + 1) * size]
        images, labels = data.pick(self.source.train, rows)
        return self.read(images), labels

    def context(self, labels: Tensor, window: int) -> Tensor | None:
        """Return what the synthesizer is conditioned on at the end of a window, [B] or None."""
        if self.settings.condition == "none" or not self.arm.synthetic:
            return None
        place = window if self.by_step else 0
        return place * self.source.classes + labels if self.by_label else labels * 0 + place

    def step(self) -> None:
        inputs, labels = self.batch()
        size, last = len(labels), len(self.starts) - 1
        everywhere = self.arm.method.endswith("local")
        aside = self.model.synthesizer is not None
        entrances: list[State] = []
        state: State | None = None
        for k, start in enumerate(self.starts):
            ended = context = None
            if self.arm.synthetic and not aside:
                context = self.context(labels, k)
                ended = torch.ones(size, dtype=torch.bool) if k == last else None
            window = inputs[start : start + self.arm.window]
            logits, state = self.model(window, state, ended, context)
            loss = None
            if k == last or everywhere:
                loss = F.cross_entropy(logits[-1], labels)
            if aside and k < last:
                layers = self.settings.layers
                torch.autograd.backward(state, rows_state(self.predict(state, labels, k), layers))
            else:
                self.backward(loss, state, update=False)
            if k == last:
                assert loss is not None
                self.note(loss * size, size)
            state = (state[0].detach(), state[1].detach())
            entrances.append(state)
        if aside:
            self.teach(inputs, labels, entrances)
        self.update()
        self.position += 1

    @torch.no_grad()
    def predict(self, state: State, labels: Tensor, window: int) -> Tensor:
        """Return the synthetic gradient of a synthesizer that stands aside, [B, 2 L H]."""
        assert self.model.synthesizer is not None
        made: Tensor = self.model.synthesizer(state_rows(*state), self.context(labels, window))
        return made * (self.settings.sg_scale / self.kappa)

    @property
    def kappa(self) -> float:
        """What the synthesizer's target is, of the gradient of the mean loss."""
        return self.settings.target_scale * self.settings.divisor(self.arm)

    def teach(self, inputs: Tensor, labels: Tensor, exits: list[State]) -> None:
        """Add the gradients of the squared error to lambda-returns, at every boundary."""
        synthesizer, share = self.model.synthesizer, self.settings.sg_lambda
        assert synthesizer is not None
        arrived: Tensor | None = None
        for p in self.trained:
            p.requires_grad_(False)
        for k in range(len(self.starts) - 1, 0, -1):
            start = self.starts[k]
            entrance = tuple(t.requires_grad_() for t in exits[k - 1])
            window = inputs[start : start + self.arm.window]
            logits, state = self.model(window, (entrance[0], entrance[1]))
            if arrived is None:
                found = torch.autograd.grad(F.cross_entropy(logits[-1], labels), entrance)
            else:
                mixed = share * arrived + (1.0 - share) * self.predict(state, labels, k)
                layers = self.settings.layers
                found = torch.autograd.grad(state, entrance, rows_state(mixed, layers))
            arrived = state_rows(*found)
            target = arrived * self.kappa
            bound = self.settings.target_clip
            if bound:
                target = target * (bound / target.norm(dim=1, keepdim=True).clamp_min(bound))
            made = synthesizer(state_rows(*exits[k - 1]).detach(), self.context(labels, k - 1))
            ((made - target).square().sum() / len(labels)).backward()
        for p in self.trained:
            p.requires_grad_(True)

    def evaluate(self) -> dict[str, float]:
        self.model.eval()
        wrong, (images, labels) = 0, self.source.test
        with torch.no_grad():
            for start in range(0, len(labels), EVALUATED):
                piece = slice(start, start + EVALUATED)
                logits, _ = self.model(self.read(images[piece]), None)
                wrong += int((logits[-1].argmax(1) != labels[piece]).sum())
        self.model.train()
        return {
            "steps": float(self.position),
            "error": wrong / len(labels),
            "train_bits": self.train_bits(),
        }

    def probe(self, window: int) -> dict[str, Any] | None:
        if window >= self.steps:
            return None
        labels = self.source.test.labels[:PROBED]

        def losses(logits: Tensor, start: int) -> Tensor:
            if start + len(logits) < self.steps:
                return logits[:0].sum()
            return F.cross_entropy(logits[-1], labels, reduction="sum")

        return future.future_gradient(
            self.model.twin(),
            self.read(self.source.test.images[:PROBED]),
            losses,
            window,
            synthesizer=self.synthesizer(window),
            target_scale=self.settings.target_scale,
            context=lambda boundary: self.context(labels, boundary),
        )
