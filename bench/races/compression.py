"""Compressed embeddings of words, for a sentence encoder that is not trained.

The table of embeddings is half of the encoder. The bottom squeezes a word's embedding [N, T, D]
through few numbers and makes it anew; the encoder's vector of the sentence is to stay what it is
with its own embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.experiments.tops import Between, Racer, squared_error

from .corpus import text
from .encoder import Encoder, pretrained

# Words a sentence, sentences a batch, numbers that a word's embedding is squeezed through.
LENGTH, BATCH, SQUEEZED = 8, 8, 64
# Sentences for training, and held out.
TRAINED, APART = 2048, 32


class Sentences(NamedTuple):
    """Sentences of LENGTH words.

    Attributes:
        embedded: the encoder's embeddings of their words, [N, T, D].
        vectors: what the encoder makes of these, [N, D]. Every arm has them for nothing.
    """

    embedded: Tensor
    vectors: Tensor


def sentences(encoder: Encoder, known: dict[str, int], words: list[str], n: int) -> Sentences:
    """Return the first n of a text, of those words that the encoder's vocabulary has whole."""
    numbers = [known[word] for word in words if word in known][: n * LENGTH]
    with torch.no_grad():
        embedded = encoder.words(torch.tensor(numbers).view(-1, LENGTH))
        vectors = torch.cat([encoder(some) for some in embedded.split(64)])
    return Sentences(embedded, vectors)


@lru_cache
def prepared() -> tuple[Encoder, Sentences, Sentences]:
    """Return the encoder, sentences for training, and from the text's last tenth those held out."""
    words = text()
    encoder, known = pretrained()
    cut = len(words) * 9 // 10
    return (
        encoder,
        sentences(encoder, known, words[:cut], TRAINED),
        sentences(encoder, known, words[cut:], APART),
    )


class Compression(Racer):
    """The compression in training.

    Args:
        synthesizer: makes one, for so many features.
        every, between: see :class:`Racer`; the surrogate is the distance of embeddings.
    """

    def __init__(
        self,
        seed: int,
        synthesizer: Callable[[int], nn.Module] | None = None,
        every: int | None = None,
        between: Between = "prediction",
    ) -> None:
        self.encoder, self.train, self.apart = prepared()  # which draws, the first time
        torch.manual_seed(seed)
        width = self.train.vectors.shape[1]
        inner = nn.Sequential(nn.Linear(width, SQUEEZED), nn.Linear(SQUEEZED, width))
        super().__init__(inner, synthesizer(width) if synthesizer else None, every, between)
        self.lower = [torch.optim.Adam(self.bottom.parameters(), 1e-3)]

    def batch(self) -> Sentences:
        chosen = torch.randint(len(self.train.vectors), (BATCH,))
        return Sentences(*(part[chosen] for part in self.train))

    def below(self, batch: Sentences) -> Tensor:
        context = {} if self.schedule is None else {"context": batch.embedded}
        made: Tensor = self.bottom(batch.embedded, **context)
        return made

    def above(self, h: Tensor, batch: Sentences) -> Tensor:
        return (self.encoder(h) - batch.vectors).square().sum(1).mean()

    def surrogate(self, h: Tensor, batch: Sentences) -> Tensor:
        return squared_error(h.flatten(0, 1), batch.embedded.flatten(0, 1)).mean()

    def loss(self) -> float:
        """Squared distance of a sentence's vector from its own: 2 less twice their cosine."""
        with torch.no_grad():
            return float(self.above(self.inner(self.apart.embedded), self.apart))


def difference(width: int) -> nn.Module:
    return fd.DifferenceSynthesizer(width)


def gain(width: int) -> nn.Module:
    return fd.SurrogateSynthesizer(width, squared_error)


def sentence() -> dict[str, Callable[[int], Compression]]:
    """Backprop through the encoder, the distance of embeddings by hand, synthetic gradients."""
    prepared()
    arm = partial(partial, Compression)
    return {
        "backprop": Compression,
        "full steps only k=8": arm(synthesizer=difference, every=8, between="dropped"),
        "held gradient k=8": arm(every=8, between="held"),
        "by hand k=8": arm(every=8, between="surrogate"),
        "DNI k=8, difference": arm(synthesizer=difference, every=8),
        "DNI k=4, surrogate": arm(synthesizer=gain, every=4),
        "DNI k=8, surrogate": arm(synthesizer=gain, every=8),
    }
