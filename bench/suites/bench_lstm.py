"""The LSTM: the cell, a window's forward, its forward and backward, a training step, the boundary.

One group a shape B/H/T; input size H. Beside each group its floor: the products that cannot be
avoided, alone. The committed table of the same candidates is measured interleaved
(``bench/tables.py measure --suite lstm``).
"""

from __future__ import annotations

import pytest
import torch

from workloads import gpu as wg
from workloads import lstm as w

SHAPES = pytest.mark.parametrize("shape", w.SHAPES, ids=str)
CELLS = pytest.mark.parametrize("shape", w.cell_shapes(), ids=lambda s: f"{s.batch}/{s.hidden}")
BOUNDARIES = pytest.mark.parametrize("shape", w.boundary_shapes(), ids=str)
BACKWARD = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def group(what: str, shape: w.Shape, backward: bool) -> str:
    return f"What does {what} cost? {shape} {'forward+backward' if backward else 'forward'}"


@CELLS
@BACKWARD
def bench_cell_floor(timed, shape, backward):
    timed(group("an LSTM cell", shape, backward), lambda: w.floor(shape, backward))


@CELLS
@BACKWARD
@pytest.mark.parametrize("ours", [False, True], ids=["nn.LSTMCell", "ours"])
def bench_cell(timed, shape, backward, ours):
    cell = w.check_cell(shape, ours, backward=backward)
    timed(
        group("an LSTM cell", shape, backward), lambda: cell.backward if backward else cell.forward
    )


@SHAPES
@BACKWARD
def bench_window_floor(timed, shape, backward):
    timed(group("an LSTM's window", shape, backward), lambda: w.floor(shape, backward))


@SHAPES
@BACKWARD
@pytest.mark.parametrize("method", w.WINDOW_METHODS, ids=lambda m: m.name)
def bench_window(timed, shape, backward, method):
    """``forward`` without gradients."""
    reason = w.not_compiled(shape) if method.compiled else None
    if reason is not None:
        pytest.skip(reason)
    window = w.check_window(shape, method, backward=backward)
    timed(
        group("an LSTM's window", shape, backward),
        lambda: window.backward if backward else window.infer,
    )


@SHAPES
@pytest.mark.parametrize("method", w.STEP_METHODS, ids=lambda m: m.name)
def bench_step(timed, shape, method):
    training = w.check_training(shape, method)
    timed(f"What does an LSTM's training step cost? {shape}", lambda: training.step)


@BOUNDARIES
@pytest.mark.parametrize("method", [w.OURS_STEP, w.DNI_STEP], ids=lambda m: m.name)
def bench_boundary(timed, shape, method):
    """With and without the boundary synthesizer: the difference is what it costs."""
    training = w.check_training(shape, method)
    timed(f"What does the boundary synthesizer cost? {shape}", lambda: training.step)


@pytest.mark.skipif(wg.why_no_gpu() is not None, reason=str(wg.why_no_gpu()))
@pytest.mark.parametrize("ours", [False, True], ids=["nn.LSTM", "ours"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@SHAPES
def bench_window_on_a_gpu(timed, shape, precision, ours):
    """Forward and backward, eager: graphs are compared by bench/gpu.sh."""
    if shape.layers > 1:
        pytest.skip("windows of one layer")
    case, device = wg.WindowCase(*shape[:3], precision), torch.device("cuda", 0)
    kind, given = (wg.OurWindow, ("triton",)) if ours else (wg.StockWindow, ())

    def make(case, device):
        return kind(case, device, wg.operand(precision), *given)

    with wg.arithmetic(precision):
        timed(
            f"What does an LSTM's window cost? {case} on a GPU",
            lambda: make(case, device).step,
            lambda: wg.check_window(make, case, device),
            device="cuda",
        )
