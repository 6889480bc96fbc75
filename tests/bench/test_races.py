"""The arms of bench/races.py train, on small data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fused_dni as fd
import races

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    lines = ["the cat sat on the mat , and the dog did not .", "a dog is no cat ; a mat is a mat ."]
    file = tmp_path / "text.txt"
    file.write_text("\n".join(lines[i % 2 if i % 3 else 0] for i in range(1200)))
    monkeypatch.setenv("CORPUS", str(file))
    monkeypatch.setattr(races, "CLASSES", 24)
    monkeypatch.setattr(races, "HEAD_RATE", races.RATE)  # chosen for words by the thousand
    monkeypatch.setattr(races, "SAMPLED_HEAD_RATE", races.RATE)
    races.corpus.cache_clear()
    yield
    races.corpus.cache_clear()


def test_word_models_learn(text: None) -> None:
    for name, make in races.words().items():
        racer = make(1)
        before = racer.loss()
        for _ in range(races.WARMUP + 40):
            racer.step()
        assert racer.loss() < 0.7 * before, name
        if racer.schedule is not None:
            found = fd.diagnostics(racer.bottom)[""]
            assert found["cosine"] > 0.7, (name, found)


def test_autoencoders_look_at_the_critic_when_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(200, 784).square()
    monkeypatch.setattr(races, "digits", lambda: (images, images[:20]))
    monkeypatch.setattr(races, "WARMUP", 8)
    for name, make in races.perceptual().items():
        racer, looks, wanted = make(1), 0, 0

        def count(*_: object) -> None:
            nonlocal looks
            looks += 1

        racer.critic.register_forward_hook(count)
        for step in range(24):
            if racer.schedule is not None:
                wanted += racer.schedule.target
            else:
                wanted += name == "backprop" or step < 8 or step % 8 == 0
            racer.step()
        # The image and what it is to be, on each step with targets.
        assert looks == 2 * wanted, name
        if name.startswith("DNI k="):
            every = racer.schedule.target_every
            assert wanted == sum(step < 8 or step % every == 0 for step in range(24)), name
        assert math.isfinite(racer.loss())


def test_a_text_that_is_not_named_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CORPUS", raising=False)
    races.corpus.cache_clear()
    with pytest.raises(ValueError, match="CORPUS is not set"):
        races.words()
