"""Synthesizers alone, below any module: prediction, and training by Adam on an arrived target."""

from __future__ import annotations

import pytest

import workloads as w

CASES = pytest.mark.parametrize("case", w.CASES, ids=str)
KINDS = pytest.mark.parametrize("kind", w.KINDS)
BACKENDS = pytest.mark.parametrize("backend", w.backends())


@CASES
@KINDS
@BACKENDS
def bench_predict(timed, case, kind, backend):
    timed(
        f"synthesizer predict {case}",
        lambda: w.SynthesizerStep(kind, case, backend).predict,
        lambda: w.check_synthesizer(kind, case, backend),
    )


@CASES
@KINDS
@BACKENDS
def bench_update(timed, case, kind, backend):
    step = w.SynthesizerStep(kind, case, backend)
    prediction = step.predict()
    timed(
        f"synthesizer update {case}",
        lambda: lambda: step.update(prediction),
        lambda: w.check_synthesizer(kind, case, backend),
    )
