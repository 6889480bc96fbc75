"""Synthesizers alone, below any module: prediction, and training by Adam on an arrived target.

In front of a softmax autograd and ``torch.optim`` stand beside the ops. Beside each group its
floor: the product of a dense synthesizer.
"""

from __future__ import annotations

import pytest
import torch

from workloads import backends, step
from workloads import gpu as wg
from workloads import synthesizer as w

CASES = pytest.mark.parametrize("case", step.CASES, ids=str)
KINDS = pytest.mark.parametrize("kind", w.KINDS)
BACKENDS = pytest.mark.parametrize("backend", backends())


@CASES
@KINDS
@BACKENDS
def bench_predict(timed, case, kind, backend):
    timed(
        f"What does a prediction cost? {case}",
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
        f"What does training a synthesizer cost? {case}",
        lambda: lambda: step.update(prediction),
        lambda: w.check_synthesizer(kind, case, backend),
    )


@CASES
def bench_predict_by_autograd(timed, case):
    timed(
        f"What does a prediction cost? {case}",
        lambda: w.SoftmaxStep(case).predict,
        lambda: w.check_softmax_by_autograd(case),
    )


@CASES
def bench_update_by_autograd(timed, case):
    step = w.SoftmaxStep(case)
    predicted = step.predict()
    timed(
        f"What does training a synthesizer cost? {case}",
        lambda: lambda: step.update(predicted),
        lambda: w.check_softmax_by_autograd(case),
    )


@CASES
@pytest.mark.parametrize("what", ["a prediction", "training a synthesizer"])
def bench_floor(timed, case, what):
    timed(f"What does {what} cost? {case}", lambda: w.floor(case, what == "a prediction"))


@pytest.mark.skipif(wg.why_no_gpu() is not None, reason=str(wg.why_no_gpu()))
@CASES
def bench_update_on_a_gpu(timed, case):
    """Rank 16, eager."""
    layer, device = wg.Case(*case), torch.device("cuda", 0)

    def make(layer, device, **options):
        return wg.SynthesizerUpdate(layer, device, "triton", **options)

    timed(
        f"What does training a synthesizer cost? {case} on a GPU",
        lambda: make(layer, device).step,
        lambda: wg.check_layer(make, layer, device),
        device="cuda",
    )
