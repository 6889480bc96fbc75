"""A whole model converted, trained with fused updates, and converted back.

``fd.convert`` replaces what can be replaced and says what it left alone and why; a converted model
computes what it did before, and ``fd.revert`` makes plain layers of it again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import fused_dni as fd


def main(steps: int = 200) -> dict[str, float]:
    torch.manual_seed(0)
    plain = nn.Sequential(
        *(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU()),
        *(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()),
        nn.Linear(64, 5),
    )
    x = torch.randn(512, 32)
    y = x[:, :5].argmax(1)
    before = plain.eval()(x)

    # The head keeps its exact gradient; all rules are applied where the gradient is made.
    model, report = fd.convert(plain, context_features=5, update=fd.Adam(2e-3), report=True)
    print(report)
    same = (model.eval()(x) - before).abs().max().item()
    print(f"largest difference of the outputs: {same:.1e}")

    model.train()
    schedule = fd.Schedule(model, warmup_steps=steps // 10, target_every=2)
    for step in range(steps):
        rows = torch.randint(0, 512, (128,))
        with fd.condition_on(y[rows]):
            loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()  # updates; there is no optimizer to step
        schedule.step()
        if step == 0:
            first = loss.item()
    print(f"loss {first:.2f} at first, {loss.item():.2f} after {steps} steps")

    trained = model.eval()(x)
    again = fd.revert(model)
    back = (again.eval()(x) - trained).abs().max().item()
    names = ", ".join(type(layer).__name__ for layer in again)
    print(f"reverted to {names}; difference {back:.1e}")
    return {"converted": same, "reverted": back, "first": first, "last": loss.item()}


if __name__ == "__main__":
    main()
