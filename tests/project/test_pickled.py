"""Checkpoints and whole modules that an earlier version pickled load, and training goes on."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from pickled import make

FILE = Path(make.__file__).with_name("0.1.0.pt.gz")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pickled() -> dict[str, Any]:
    with gzip.open(FILE) as file:
        written: dict[str, Any] = torch.load(io.BytesIO(file.read()), weights_only=False)
    return written


def _check(pickled: dict[str, Any], name: str, model: torch.nn.Module, optimizer: Any) -> None:
    make.train(model, optimizer, 100)
    # But for the units of synthesizers, which there were none of.
    after = {k: v for k, v in model.state_dict().items() if not k.endswith("_extra_state")}
    expected = pickled["models"][name]["after"]
    assert after.keys() == expected.keys()
    for key, value in expected.items():
        if not isinstance(value, torch.Tensor):
            assert after[key] == value, key
        else:  # kernels may round another way than that version's
            torch.testing.assert_close(after[key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", make.models())
def test_a_whole_module_goes_on(pickled: dict[str, Any], name: str) -> None:
    found = pickled["models"][name]
    optimizer = make.optimizer_of(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    _check(pickled, name, found["model"], optimizer)


@pytest.mark.parametrize("name", make.models())
def test_a_checkpoint_goes_on(pickled: dict[str, Any], name: str) -> None:
    """Its state dicts in a model made anew."""
    found = pickled["models"][name]
    model = make.models()[name]
    model.load_state_dict(found["state"])
    optimizer = make.optimizer_of(model)
    optimizer.load_state_dict(found["optimizer"])
    _check(pickled, name, model, optimizer)
