"""The registry: preference, reasons, no silent fallback, and what a look-up costs."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from fused_dni.backends.reference import ReferenceBackend
from fused_dni.ops import registry

X, W = torch.zeros(2, 3), torch.zeros(4, 3)


class Fake(ReferenceBackend):
    name = "fake"
    absent: str | None = None
    refuses: str | None = None
    asked = 0

    def available(self) -> str | None:
        return self.absent

    def why_not(self, x: torch.Tensor, weight: torch.Tensor) -> str | None:
        type(self).asked += 1
        return self.refuses


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing remembered, and nothing left behind."""
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(registry, "_resolved", {})


def register(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> type[Fake]:
    """Put a fake before the reference, and nothing else."""
    cls = type("Fake", (Fake,), {"asked": 0, **attributes})
    module = types.ModuleType("fused_dni_fake_backend")
    module.Fake = cls  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    known = {"fake": (module.__name__, "Fake"), "reference": registry._KNOWN["reference"]}
    monkeypatch.setattr(registry, "_KNOWN", known)
    return cls


def test_names_end_with_the_reference() -> None:
    assert registry.names()[-1] == "reference"
    assert [name for name, _ in registry.report()] == list(registry.names())
    assert dict(registry.report())["reference"] is None


def test_each_backend_is_registered_under_its_own_name() -> None:
    for name, reason in registry.report():
        if reason is None:
            assert registry.get(name).name == name
            assert registry.get(name) is registry.get(name)


def test_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    assert registry.resolve(None, X, W).name == "fake"
    assert registry.resolve("reference", X, W).name == "reference"


def test_the_next_serves_what_the_first_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, refuses="has had enough")
    assert registry.resolve(None, X, W).name == "reference"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'fake' cannot serve this call: it has had enough"):
            registry.resolve("fake", X, W)


def test_a_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, absent="needs an abacus")
    assert registry.report() == [("fake", "needs an abacus"), ("reference", None)]
    assert registry.resolve(None, X, W).name == "reference"
    for ask in (lambda: registry.get("fake"), lambda: registry.resolve("fake", X, W)):
        with pytest.raises(RuntimeError, match="'fake' is not available: it needs an abacus"):
            ask()


def test_a_backend_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    monkeypatch.setitem(sys.modules, "fused_dni_fake_backend", None)
    (_, reason), _ = registry.report()
    assert reason is not None and reason.startswith("cannot be imported: ")
    assert "fused_dni_fake_backend" in reason
    with pytest.raises(RuntimeError, match="cannot be imported"):
        registry.resolve("fake", X, W)


def test_an_error_that_is_no_import_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any) -> str | None:
        raise ZeroDivisionError

    register(monkeypatch, available=broken)
    with pytest.raises(ZeroDivisionError):
        registry.resolve(None, X, W)


@pytest.mark.parametrize("ask", [registry.get, lambda name: registry.resolve(name, X, W)])
def test_an_unknown_name(ask: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'cpuu'.*'reference'"):
        ask("cpuu")


def test_when_none_serves_all_reasons_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, refuses="is tired")
    with pytest.raises(RuntimeError, match="fake is tired; reference needs floating-point"):
        registry.resolve(None, X.int(), W)


def test_a_backend_is_asked_once_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = register(monkeypatch)
    for _ in range(3):
        registry.resolve(None, X, W)
        registry.resolve(None, torch.zeros(9, 9), W)
    assert cls.asked == 1
    registry.resolve(None, X.double(), W.double())
    registry.resolve("fake", X, W)
    assert cls.asked == 3


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (torch.float32, torch.float32, None),
        (torch.float64, torch.float64, None),
        (torch.bfloat16, torch.float32, None),
        (torch.float16, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, None),
        (torch.float32, torch.float64, "one dtype"),
        (torch.float64, torch.float32, "one dtype"),
        (torch.float16, torch.bfloat16, "one dtype"),
        (torch.int64, torch.float32, "floating-point"),
        (torch.float32, torch.complex64, "floating-point"),
    ],
)
def test_what_the_reference_serves(x: torch.dtype, weight: torch.dtype, reason: str | None) -> None:
    why = ReferenceBackend().why_not(X.to(x), W.to(weight))
    assert why is None if reason is None else why is not None and reason in why


def test_tensors_of_two_devices_are_refused() -> None:
    why = ReferenceBackend().why_not(X, W.to("meta"))
    assert why is not None and "one device" in why


def test_a_look_up_is_cheap() -> None:
    """What was found is remembered: nothing of ours is called in the second look-up, and no backend
    is asked."""

    def functions() -> list[str]:
        called: list[str] = []

        def count(frame: types.FrameType, event: str, argument: object) -> None:
            if event == "call" and "fused_dni" in frame.f_globals["__name__"]:
                called.append(frame.f_code.co_name)

        sys.setprofile(count)
        try:
            registry.resolve(None, X, W)
        finally:
            sys.setprofile(None)
        return called

    assert {"resolve", "_search", "why_not"} <= set(functions())
    assert functions() == ["resolve"]
