"""Segments by name: what they are, and that they are measured."""

import pytest
import torch
from flops import install
from torch import nn

from fused_dni.cli import arguments
from fused_dni.measure.verdict import segments, verdict

SMALL = {
    "linear": {"inputs": 6, "batch": 4, "normalization": "none", "activation": "gelu"},
    "mlp": {"width": 6, "depth": 2, "batch": 4, "classes": 3},
    "block": {"width": 6, "depth": 3, "batch": 4},
    "conv": {"width": 3, "size": 4, "batch": 2, "inputs": 2, "depth": 2, "classes": 2},
    "transformer": {"width": 4, "heads": 2, "tokens": 3, "batch": 2},
}


@pytest.mark.parametrize("name", segments.SEGMENTS)
def test_every_segment_is_measured(name, monkeypatch):
    install(monkeypatch)
    torch.manual_seed(0)
    segment = segments.make(name, SMALL[name])
    assert f"at batch {SMALL[name]['batch']}" in segment.title
    found = verdict(
        segment.module,
        segment.sample,
        target=segment.target,
        context_features=segment.classes,
        target_every=(1,),
        seconds=0.02,
        parts=False,
        compile=False,
        backend="reference",
    )
    expected = "layers" if name in ("linear", "mlp") else "segment"
    assert [variant.form for variant in found.variants] == [expected]


@pytest.mark.parametrize("depth", [1, 16])
def test_a_block_is_one_segment_however_deep(depth):
    segment = segments.block(4, depth, batch=2)
    assert sum(isinstance(m, nn.Linear) for m in segment.module.modules()) == depth
    assert isinstance(segment.module, segments.Whole)


def test_what_stands_behind_a_linear_layer():
    made = segments.linear(4, 6, 2, "layer", "gelu_tanh").module
    assert [type(part) for part in made] == [nn.Linear, nn.LayerNorm, nn.GELU]
    assert made[2].approximate == "tanh"
    assert segments.linear(4, normalization="batch").module[0].bias is None


def test_foreign_options_are_named():
    with pytest.raises(ValueError, match="--heads does not go with conv"):
        segments.make("conv", {"heads": 2})
    with pytest.raises(ValueError, match="--in does not go with transformer"):
        segments.make("transformer", {"inputs": 2})
    with pytest.raises(ValueError, match="heads must divide width 6, got 4"):
        segments.transformer(6, 4)


def test_the_command_line_knows_the_same_names():
    assert set(arguments.SEGMENTS) == {*segments.SEGMENTS, "lstm", "top"}
