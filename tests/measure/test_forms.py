"""Where an interface stands, and what predicts there."""

import pytest
import torch
from torch import nn

import fused_dni as fd
from fused_dni.measure.verdict import VerdictError
from fused_dni.measure.verdict.forms import (
    check_name,
    decouple,
    distinct_interfaces,
    form_of,
    make_synthesizer,
    synthesizer_names,
)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x)


def _layer() -> list[nn.Module]:
    return [nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()]


@pytest.mark.parametrize(
    ("module", "form", "interfaces"),
    [
        (nn.Linear(4, 4), "layers", ("output",)),
        (nn.Sequential(*_layer()), "layers", ("output", "preactivation")),
        (nn.Sequential(*_layer(), nn.Sequential(*_layer())), "layers", ("output", "preactivation")),
        (nn.Sequential(nn.Linear(4, 4), nn.PReLU()), "segment", ("output", "preactivation")),
        (nn.Sequential(nn.PReLU(), nn.Linear(4, 4)), "layers", ("output",)),
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU()), "segment", ("output",)),
        (Custom(), "segment", ("output",)),
    ],
)
def test_the_form_follows_from_what_the_module_ends_in(module, form, interfaces):
    assert form_of(module, "output", False) == form
    assert distinct_interfaces(module, False) == interfaces
    if "preactivation" in interfaces:
        assert form_of(module, "preactivation", False) == "layers"


def test_a_network_keeps_an_exact_head():
    network = nn.Sequential(*_layer(), nn.Linear(4, 2))
    assert form_of(network, "output", True) == "layers"
    assert form_of(nn.Sequential(nn.Tanh(), nn.Linear(4, 2)), "output", True) == "segment"
    with pytest.raises(VerdictError, match="there is none to decouple"):
        form_of(nn.Sequential(nn.Tanh(), nn.Linear(4, 2)), "preactivation", True)


@pytest.mark.parametrize("interface", ["output", "preactivation"])
@pytest.mark.parametrize("name", ["default", "dense", "rank2", "rank99", "diagonal"])
def test_every_layer_gets_the_synthesizer_that_was_named(name, interface):
    module, x = nn.Sequential(*_layer(), *_layer()), torch.randn(3, 4)
    ours = decouple(
        module,
        x,
        module(x),
        synthesizer=name,
        interface=interface,
        context_features=2,
        update=fd.SGD(),
        exact_head=False,
        backend="reference",
    )
    layers = [m for m in ours.modules() if isinstance(m, fd.FusedDNILinear)]
    assert len(layers) == 2
    for layer in layers:
        assert layer.config.interface == interface and layer.synthesizer.context_features == 2
        kind = fd.DiagonalSynthesizer if name == "diagonal" else fd.LinearSynthesizer
        assert isinstance(layer.synthesizer, kind)
        if name in ("dense", "rank2", "rank99"):
            assert layer.synthesizer.rank == {"dense": None, "rank2": 2, "rank99": 4}[name]
        assert layer.synthesizer_update is not None
    assert next(module.parameters()) is not next(ours.parameters())


def test_a_segment_is_decoupled_whole_and_its_backprop_is_the_same_code():
    module, x = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU()), torch.randn(2, 1, 4, 4)
    made = {
        name: decouple(module, x, module(x), synthesizer=name, update=fd.SGD(), exact_head=False)
        for name in ("default", None)
    }
    assert all(isinstance(ours[0], fd.Decoupled) for ours in made.values())
    assert isinstance(made["default"][0].synthesizer, fd.ConvSynthesizer)
    assert made[None][0].synthesizer is None


def test_names_and_what_they_fit():
    rows, maps = torch.zeros(2, 4), torch.zeros(2, 4, 3, 3)
    assert "diagonal" in synthesizer_names(rows) and synthesizer_names(maps) == ("conv",)
    assert isinstance(make_synthesizer("conv", maps, 0), fd.ConvSynthesizer)
    for name in ("default", "dense", "rank3", "diagonal"):
        check_name(name, rows)
    check_name("default", maps)
    with pytest.raises(VerdictError, match="unknown synthesizer 'rank0'"):
        check_name("rank0", rows)
    with pytest.raises(VerdictError, match="does not fit an output of shape"):
        check_name("rank3", maps)
    with pytest.raises(VerdictError, match="unknown interface 'inside'"):
        form_of(nn.Linear(4, 4), "inside", False)
