"""A small network under a critic that costs many times what it costs, run on every 8th step alone.

``fused-dni verdict top examples.expensive_top:factory --race 20`` measures this pair, or yours.
"""

import time

import torch
from torch import Tensor, nn

import fused_dni as fd


def factory() -> tuple:
    """Make what learns, what is above it, and a *function* that returns the n-th batch."""
    critic = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 64))
    critic.requires_grad_(False)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))

    def top(h: Tensor, x: Tensor) -> Tensor:
        return (critic(h) - critic(x)).square().sum(1).mean()

    def batch(number: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(number))
        return x, x  # x, and what stands behind h in the call of top

    return net, top, batch


def train(every: int, steps: int) -> float:
    """Train with the top run on every so manyth step; return the loss on other data."""
    torch.manual_seed(0)
    net, top, batch = factory()
    bottom = fd.Decoupled(net, fd.DifferenceSynthesizer(64))
    schedule = fd.Schedule(bottom, warmup_steps=20, target_every=every, mix=1.0)
    optimizer = torch.optim.Adam(bottom.parameters(), lr=1e-3)
    for x, target in map(batch, range(steps)):
        optimizer.zero_grad()
        h = bottom(x, context=target)
        if schedule.target:  # with mix=1.0 and every=1 this is backprop
            top(h, target).backward()
        else:
            fd.backward_local(h)  # neither the top nor the loss is run
        optimizer.step()
        schedule.step()
    return top(net(batch(-1)[0]), batch(-1)[1]).item()


def main(steps: int = 300) -> dict[int, float]:
    losses: dict[int, float] = {}
    for k, count in ((1, steps), (8, 2 * steps)):
        began = time.perf_counter()
        losses[k] = train(k, count)
        took = f"{count} steps, {time.perf_counter() - began:.2f} s"
        print(f"k = {k}: loss {losses[k]:.3f} after {took}")
    return losses


if __name__ == "__main__":
    main()
