"""Decoupled layers in a Lightning module: ``pip install fused-dni[frameworks]``.

Without a rule any optimizer trains them. With one, as here, the layers update themselves and
``fd.FusedOptimizer`` stands in for the optimizer: for schedulers, checkpoints and the trainer.
"""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fused_dni as fd


class Classifier(lightning.LightningModule):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        rule = fd.Adam(3e-3)
        options = {"normalization": "batch", "activation": "relu", "context_features": classes}
        self.net = nn.Sequential(
            fd.FusedDNILinear(32, 64, update=rule, **options),
            fd.FusedDNILinear(64, classes, update=rule, synthesizer=None),
        )
        self.schedule = fd.Schedule(self.net, warmup_steps=10, target_every=2)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        with fd.condition_on(y):
            return F.cross_entropy(self.net(x), y)

    def on_train_batch_end(self, *_: object) -> None:
        self.schedule.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return fd.FusedOptimizer(self.net)


def main(epochs: int = 5) -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.randn(1024, 32)
    y = x[:, :5].argmax(1)
    module = Classifier()
    before = (module.net.eval()(x).argmax(1) != y).float().mean().item()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, **quiet
    )
    trainer.fit(module.train(), DataLoader(TensorDataset(x, y), 64, shuffle=True))
    after = (module.net.eval()(x).argmax(1) != y).float().mean().item()
    print(f"error {before:.1%} before, {after:.1%} after {epochs} epochs")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
