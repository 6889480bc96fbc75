"""An LSTM on a stream of sequences of any length, cut into windows, with masks for rows that end.

A row of the batch is a sequence: each step brings a bit, and the answer is whether it differs from
the one before (of the first: from 0). Where sequences end with a window, ``end_of_sequence`` says
so, row by row: no future is predicted there, and these rows start from zero in the next window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd

WINDOW, ROWS, HIDDEN = 4, 64, 64


def window_of(before: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Bits [steps, rows], answers, and the last bit of each row, given those before the window."""
    bits = torch.randint(0, 2, (WINDOW, ROWS), generator=draw)
    earlier = torch.cat([before[None], bits[:-1]])
    return bits, bits ^ earlier, bits[-1]


def main(windows: int = 400) -> dict[str, float]:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    lstm, head = fd.FusedDNILSTM(1, HIDDEN), nn.Linear(HIDDEN, 2)
    optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=3e-3)
    state, before = None, torch.zeros(ROWS, dtype=torch.long)
    right, first = 0.0, 0.0
    for number in range(windows):
        bits, answers, last = window_of(before, draw)
        ends = torch.rand(ROWS, generator=draw) < 0.25  # which rows' sequences end here
        x = 2.0 * bits[..., None].float() - 1.0  # [steps, rows, 1]
        output, state = lstm(x, state, end_of_sequence=ends)
        said = head(output)  # [steps, rows, 2]
        loss = F.cross_entropy(said.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()  # the window's own loss, and what its future is predicted to send
        optimizer.step()
        before = last.masked_fill(ends, 0)
        if number >= windows - 20:
            right += (said.argmax(2) == answers).float().mean().item() / 20
            first += (said[0].argmax(1) == answers[0]).float().mean().item() / 20
    told = fd.diagnostics(lstm)[""]
    print(f"{windows} windows, {told['windows_continued']:.0f} of them continued")
    print(f"answers right: {right:.0%}, at the first step of a window {first:.0%} (chance 50%)")
    return {"right": right, "first": first, "continued": told["windows_continued"]}


if __name__ == "__main__":
    main()
