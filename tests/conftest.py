"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels are interpreted, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "fused_dni",
    deadline=None,  # shared machines stall
    derandomize=True,  # the same examples in every run
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fused_dni")


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    """Same seed for every test; thread count, default dtype and determinism are put back."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: an element that is never written is seen."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            t = make(*args, **kwargs)
            return t.fill_(torch.nan) if t.is_floating_point() else t

        return made

    for where, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(where, name, poison(getattr(where, name)))


@pytest.fixture
def one_thread(_isolated: None) -> None:
    """Small tensors: two threads that wait for each other on a busy machine take far longer."""
    torch.set_num_threads(1)
