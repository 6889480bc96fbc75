"""Where the CUDA extension cannot serve: not built, not for this device, a driver too old; and what
an error of the runtime's says. What its bindings refuse: test_cuda_linear.py, test_cuda_lstm.py."""

from __future__ import annotations

import importlib
import types

import built
import pytest
import torch

from fused_dni.backends.cuda import backend as cuda
from fused_dni.backends.cuda import calls as cuda_calls


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    architectures: str = "80 90a",
    driver: str = "13.0",
    capability: tuple[int, int] = (9, 0),
) -> cuda.CudaBackend:
    """A backend on a machine that has one device of this capability."""
    made = types.SimpleNamespace(
        emulated=False, architectures=architectures, toolkit="13.0", driver=lambda: driver
    )
    for module in (cuda, cuda_calls):
        monkeypatch.setattr(module, "extension", lambda: made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    return cuda.CudaBackend()


@pytest.mark.parametrize(
    ("architectures", "capability", "served"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),  # later ones of a generation run its earlier code
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("80 90a", (9, 0), True),
        ("80 100", (10, 3), True),
        ("100a", (10, 3), False),
        ("80 90a 100 120", (7, 5), False),
    ],
)
def test_a_device_without_code_is_refused_beforehand(
    monkeypatch: pytest.MonkeyPatch, architectures: str, capability: tuple[int, int], served: bool
) -> None:
    backend = pretend(monkeypatch, architectures=architectures, capability=capability)
    x = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    reason = backend.why_not(x, x)  # type: ignore[arg-type]
    if served:
        assert reason is None
    else:
        assert reason is not None
        assert architectures.replace(" ", ", ") in reason
        assert f"Some GPU of {capability[0]}.{capability[1]}" in reason
        assert "FUSED_DNI_CUDA_ARCHS" in reason


def test_a_driver_older_than_the_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretend(monkeypatch, driver="13.1").available() is None
    reason = pretend(monkeypatch, driver="12.4").available()
    assert reason == "was built with CUDA 13.0, the driver is for 12.4"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_a_launch_without_a_driver_says_so() -> None:
    """The real extension, where nothing can be launched."""
    extension = built.cuda_extension()
    assert extension.driver() == "0.0"
    word = torch.zeros(1, dtype=torch.int32)
    call = (1, 1, 1, cuda_calls.described(word), 0)
    with pytest.raises(extension.CudaError, match=r"grid_barriers \(count \[1\]\): ") as caught:
        extension.grid_barriers(call)
    assert caught.value.name == "cudaErrorInsufficientDriver"
    assert caught.value.code == 35
    assert f"built with CUDA {extension.toolkit}, no driver was found" in str(caught.value)
    assert issubclass(extension.CudaError, RuntimeError)


def test_an_extension_that_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_DNI_CUDA_EMULATION")
    real = importlib.import_module

    def absent(name: str) -> types.ModuleType:
        if name == "fused_dni.backends._cuda":
            raise ModuleNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    # What the installation says (setup.py), which depends on the machine.
    monkeypatch.setattr(
        cuda_calls, "why_missing", lambda name, error: f"was not built: no nvcc for {name}"
    )
    with pytest.raises(ImportError, match=r"_cuda was not built: no nvcc for _cuda$"):
        cuda_calls.extension.__wrapped__()


def test_codes_of_types() -> None:
    """As csrc/cuda/matrix.hpp has them: a tensor of each is described and refused by its name."""
    extension = cuda_calls.extension()
    for dtype in cuda_calls.TYPES:
        if dtype is torch.int32:
            continue
        word = torch.zeros(1, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(TypeError, match=f"barrier: got {name}, takes int32"):
            extension.grid_barriers((1, 1, 1, cuda_calls.described(word), 0))
