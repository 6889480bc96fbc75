"""Synthesizers alone: prediction and training, and the gate of both."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

import fused_dni as fd
from fused_dni.measure import timing
from fused_dni.ops import registry
from fused_dni.ops.types import STATISTICS_SIZE
from fused_dni.rules import RuleState
from workloads import CLASSES, RANK, Disagreement
from workloads.step import Case

KINDS = ("dense", "lowrank", "diagonal", "softmax")
WORDS = 10_000  # classes of the head in front of a softmax


def classes(kind: str) -> int:
    """Say how many labels a synthesizer of the kind is conditioned on."""
    return WORDS if kind == "softmax" else CLASSES


def synthesizer(kind: str, features: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a label-conditioned synthesizer of the kind, with random instead of zero outputs."""
    torch.manual_seed(2)
    if kind == "softmax":
        head = nn.Linear(features, WORDS, bias=False).to(dtype)
        made: nn.Module = fd.SoftmaxSynthesizer(head)
    elif kind == "diagonal":
        made = fd.DiagonalSynthesizer(features, CLASSES)
    else:
        made = fd.LinearSynthesizer(features, RANK if kind == "lowrank" else None, CLASSES)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape) / math.sqrt(features))
    return made.to(dtype)


class SynthesizerStep:
    """Prediction and training of one synthesizer on one backend, below any module."""

    def __init__(
        self, kind: str, case: Case, backend: str, dtype: torch.dtype = torch.float32
    ) -> None:
        self.backend = registry.get(backend)
        generator = torch.Generator().manual_seed(5)
        shape = (case.batch, case.hidden)
        self.h = torch.randn(shape, generator=generator).relu().to(dtype)
        self.g = (torch.randn(shape, generator=generator) / case.batch).to(dtype)
        self.labels = torch.randint(0, classes(kind), (case.batch,), generator=generator)
        self.scale = float(case.batch)
        with torch.no_grad():
            self.tensors = synthesizer(kind, case.hidden, dtype).fused()
        for p in self.tensors.parameters():
            if p is not None:
                p.requires_grad_(True)
        self.rule = RuleState(fd.Adam(1e-4)).tensors(self.tensors.parameters())
        self.statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64)

    def predict(self) -> Any:
        with torch.no_grad():
            return self.backend.synthesizer_predict(self.h, self.tensors, self.labels)

    def update(self, prediction: Any) -> None:
        with torch.no_grad():
            self.backend.synthesizer_update_(
                self.h,
                prediction,
                self.g,
                self.tensors,
                self.labels,
                self.scale,
                self.statistics,
                self.rule,
            )


class SoftmaxStep:
    """Prediction and training in front of a softmax, by autograd and ``torch.optim``."""

    def __init__(self, case: Case) -> None:
        twin = SynthesizerStep("softmax", case, "reference")
        self.h, self.g, self.labels, self.scale = twin.h, twin.g, twin.labels, twin.scale
        self.module = synthesizer("softmax", case.hidden)
        self.optimizer = torch.optim.Adam(self.module.parameters(), 1e-4, foreach=True)

    def predict(self) -> torch.Tensor:
        predicted: torch.Tensor = self.module(self.h, self.labels)
        return predicted

    def update(self, predicted: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        error = predicted.detach() - self.g * self.scale
        predicted.backward(error * (2.0 / len(error)), retain_graph=True)
        self.optimizer.step()


def check_softmax_by_autograd(case: Case) -> None:
    """Autograd's prediction and update against the reference in float64; raises as
    :func:`check_synthesizer`."""
    candidate = SoftmaxStep(case)
    twin = SynthesizerStep("softmax", case, "reference", torch.float64)
    predicted, prediction = candidate.predict(), twin.predict()
    away = predicted.detach().double() - prediction.scaled
    error = float(away.norm() / prediction.scaled.norm())
    candidate.update(predicted)
    twin.update(prediction)
    slots = zip(candidate.module.fused().parameters(), twin.tensors.parameters(), strict=True)
    for got, want in slots:
        if got is not None and want is not None:
            away = (got.double() - want).detach()
            error = max(error, float(away.norm() / want.detach().norm()))
    if not error <= 1e-5:
        raise Disagreement(f"softmax by autograd, {case}: off by {error:.2e}")


def floor(case: Case, predicts: bool) -> timing.Candidate:
    """Return the product that a dense synthesizer's prediction, or its training, cannot avoid."""
    rows, depth = case if predicts else (case.hidden, case.batch)
    return timing.products([(rows, depth, case.hidden, 1)])


def check_synthesizer(kind: str, case: Case, backend: str) -> None:
    """Prediction and one update against the reference in float64.

    Raises:
        Disagreement: they differ by more than float32 explains.
    """
    candidate = SynthesizerStep(kind, case, backend)
    twin = SynthesizerStep(kind, case, "reference", torch.float64)
    predictions = []
    for step in (candidate, twin):
        prediction = step.predict()
        predictions.append(prediction.scaled.double().clone())
        step.update(prediction)
    error = float((predictions[0] - predictions[1]).norm() / predictions[1].norm())
    if not error <= 1e-5:
        raise Disagreement(f"{kind} on {backend}, {case}: prediction is off by {error:.2e}")
    start = synthesizer(kind, case.hidden, torch.float64).fused().parameters()
    slots = zip(candidate.tensors.parameters(), twin.tensors.parameters(), start, strict=True)
    for slot, (got, want, old) in enumerate(slots):
        if got is None or want is None or old is None:
            continue
        moved = float((want - old).detach().norm())
        error = float((got.double() - want).detach().norm()) / moved
        if not error <= 2e-2:  # Adam's first step is a sign: see workloads.step.check_step
            raise Disagreement(f"{kind} on {backend}, {case}: slot {slot} is off by {error:.2e}")
