"""Where interfaces pay in a model of yours: predicted from its blocks, then measured.

Put your model into ``factory``; ``fused-dni advise examples.advise:factory`` does the same from the
command line. On an idle machine, and longer than here, for figures that are to be believed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd


def factory() -> tuple[nn.Module, Tensor, object]:
    """Make the model, a batch of its input, and its loss as a function of its output."""
    model = nn.Sequential(
        *(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU()),
        *(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU()),
        nn.Linear(256, 10),
    )
    y = torch.randint(0, 10, (128,))
    return model, torch.randn(128, 64), lambda output: F.cross_entropy(output, y)


def main(seconds: float = 4.0) -> fd.Advice:
    torch.manual_seed(0)
    model, sample, loss = factory()
    advice = fd.advise(model, sample, loss, classes=10, seconds=seconds, title="my model")
    print(advice.table())
    return advice


if __name__ == "__main__":
    main()
