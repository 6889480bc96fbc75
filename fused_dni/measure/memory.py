"""Peak memory of training on a sequence, against the window and against the sequence's length.

Training in windows holds the activations of one window, whatever the sequence; backprop through the
whole sequence is the window as long as the sequence. What is measured, and how:
:func:`fused_dni.measure.timing.peak_memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.measure import timing
from fused_dni.report import text

METHODS = ("backprop", "fused", "dni", "dni+aux")
WINDOWS = (4, 8, 16, 32)
SEQUENCES = (64, 128, 256, 512)


def sequence_memory(
    method: str,
    window: int,
    sequence: int,
    *,
    batch: int = 32,
    inputs: int = 256,
    hidden: int = 256,
    layers: int = 1,
    backend: str | None = None,
) -> int:
    """Peak bytes of training once on a sequence of ``sequence`` steps in windows of ``window``.

    An LSTM alone, the mean square of its output as the loss of each window, plain SGD after each.
    The sequence itself lies there before and is not counted.

    Args:
        method: ``backprop`` (``nn.LSTM``), ``fused`` (ours, truncated backprop), ``dni``,
            ``dni+aux``.
        window: T. sequence: S; S = T is backprop through the whole sequence.
        batch, inputs, hidden, layers: B, I, H, L.
        backend: force a backend of our kernels.

    Raises:
        ValueError: an unknown method, or a size below 1.
    """
    if method not in METHODS:
        raise ValueError(text.unknown("method", method, METHODS))
    if window < 1 or sequence < 1 or batch < 1:
        raise ValueError(
            f"window, sequence and batch must be at least 1, got {window}, {sequence}, {batch}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lstm: nn.Module = nn.LSTM(inputs, hidden, layers)
        if method != "backprop":
            synthetic: dict[str, Any] = {"auxiliary": method == "dni+aux"}
            options = synthetic if method.startswith("dni") else {"synthesizer": None}
            assert isinstance(lstm, nn.LSTM)
            lstm = fd.FusedDNILSTM.from_lstm(lstm, backend=backend, **options)
        x = torch.randn(sequence, batch, inputs)
    optimizer = torch.optim.SGD(lstm.parameters(), lr=1e-3)

    def step() -> None:
        state: tuple[Tensor, Tensor] | None = None
        for start in range(0, sequence, window):
            output, state = lstm(x[start : start + window], state)
            output.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            del output
            state = (state[0].detach(), state[1].detach())

    return timing.peak_memory(step)


def memory_curve(
    methods: Sequence[str] = ("fused", "dni"),
    windows: Sequence[int] = WINDOWS,
    sequences: Sequence[int] = SEQUENCES,
    *,
    progress: Callable[[float], None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Measure every method at every window no longer than the sequence, and the first of them at
    the window that is the sequence; ``options`` as of :func:`sequence_memory`.

    Returns:
        Rows of ``method``, ``window``, ``sequence``, ``bytes``.
    """
    wanted = [
        (method, window, sequence)
        for method in methods
        for sequence in sequences
        for window in windows
        if window <= sequence
    ]
    wanted += [(methods[0], s, s) for s in sequences if (methods[0], s, s) not in wanted]
    rows = []
    for i, (method, window, sequence) in enumerate(wanted):
        held = sequence_memory(method, window, sequence, **options)
        rows.append({"method": method, "window": window, "sequence": sequence, "bytes": held})
        if progress is not None:
            progress((i + 1) / len(wanted))
    return rows
