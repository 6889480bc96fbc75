"""The training loops of PyTorch's frameworks, around models with decoupled layers: without a rule
their optimizers train, with one ``FusedOptimizer`` stands in for them.

``pip install fused-dni[frameworks]`` brings what is tested with here.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fused_dni as fd

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # the frameworks' own
]
rules = pytest.mark.parametrize("rule", [None, fd.Adam(0.02)], ids=["returned", "fused"])


def model(rule):
    torch.manual_seed(0)
    return nn.Sequential(
        fd.FusedDNILinear(6, 16, normalization="batch", activation="relu", update=rule),
        fd.FusedDNILinear(16, 16, activation="relu", update=rule),
        fd.FusedDNILinear(16, 3, synthesizer=None, update=rule),
    )


def optimizer_of(net, rule):
    if rule is not None:
        return fd.FusedOptimizer(net)
    return torch.optim.Adam(net.parameters(), 0.02)


def data():
    torch.manual_seed(1)
    x = torch.randn(256, 6)
    return TensorDataset(x, (x @ torch.randn(6, 3)).argmax(1))


def by_hand(rule, epochs):
    """What the loop of PyTorch's tutorial makes of the same model and data."""
    net = model(rule)
    optimizer = optimizer_of(net, rule)
    for _ in range(epochs):
        for x, y in DataLoader(data(), 64):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net


def same(net, other):
    for (name, a), b in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@rules
def test_lightning(rule, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model(rule)

        def training_step(self, batch, _):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return optimizer_of(self.net, rule)

    def fit(module, epochs, resume=None):
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data(), 64), ckpt_path=resume)
        return trainer

    module = Module()
    fit(module, 2).save_checkpoint(tmp_path / "two.ckpt")
    same(module.net, by_hand(rule, 2))
    again = Module()
    fit(again, 4, tmp_path / "two.ckpt")
    same(again.net, by_hand(rule, 4))


@rules
def test_accelerate(rule):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net = model(rule)
    net, optimizer, loader = accelerator.prepare(
        net, optimizer_of(net, rule), DataLoader(data(), 64)
    )
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(net(x), y))
            optimizer.step()
    same(accelerator.unwrap_model(net), by_hand(rule, 2))


@rules
def test_ignite(rule):
    pytest.importorskip("ignite")
    from ignite.engine import create_supervised_trainer

    net = model(rule)
    trainer = create_supervised_trainer(net, optimizer_of(net, rule), F.cross_entropy)
    trainer.run(DataLoader(data(), 64), max_epochs=2)
    same(net, by_hand(rule, 2))


@rules
def test_skorch(rule):
    skorch = pytest.importorskip("skorch")

    class Classifier(skorch.NeuralNetClassifier):
        def initialize_optimizer(self, *args, **kwargs):
            self.optimizer_ = optimizer_of(self.module_, rule)
            return self

    net = model(rule)
    classifier = Classifier(
        net, criterion=nn.CrossEntropyLoss, max_epochs=2, batch_size=64, train_split=None,
        verbose=0,
    )  # fmt: skip
    given = data()
    classifier.fit(*(t.numpy() for t in given.tensors))
    same(classifier.module_, by_hand(rule, 2))
    copied = copy.deepcopy(classifier.module_).eval()
    want = copied(given.tensors[0]).argmax(1)
    assert torch.equal(torch.from_numpy(classifier.predict(given.tensors[0].numpy())), want)
