"""A word language model whose softmax costs more than its LSTM."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.experiments.tops import Between, Racer

from .chosen import multiple
from .corpus import text

STEPS, BATCH = 8, 32
SAMPLES = 200
RATE = 2e-3
#: The head's rate is one of these times RATE.
MULTIPLES = (1, 2, 4, 8)


class Setting(NamedTuple):
    """Sizes of a model, under the name of its race."""

    race: str
    classes: int
    width: int


@lru_cache
def corpus(classes: int) -> tuple[Tensor, Tensor]:
    """Return the words of CORPUS as numbers, the commonest first and the rarest as one: rows of
    BATCH streams, the last tenth apart."""
    words = text()
    known = {w: i for i, (w, _) in enumerate(Counter(words).most_common(classes - 1))}
    numbers = torch.tensor([known.get(word, classes - 1) for word in words])
    # The rarest together may be common.
    order = torch.bincount(numbers, minlength=classes).argsort(descending=True, stable=True)
    numbers = order.argsort()[numbers]
    cut = len(numbers) * 9 // 10
    parts = [part[: len(part) // BATCH * BATCH] for part in (numbers[:cut], numbers[cut:])]
    train, apart = (part.view(BATCH, -1).t() for part in parts)  # [T, B]
    return train, apart


class Below(nn.Module):
    """Embedding and LSTM: words [T, B] and a state to [T, B, H] and the next state."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width, sparse=True)
        self.lstm = nn.LSTM(width, width)

    def forward(self, words: Tensor, state: Any = None) -> Any:
        return self.lstm(self.embedding(words), state)


def dense_loss(rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy over all classes."""
    return F.cross_entropy(F.linear(rows, weight, bias), labels)


@lru_cache
def compiled_loss() -> Callable[..., Tensor]:
    """Return the same by torch.compile."""
    made: Callable[..., Tensor] = torch.compile(dense_loss)
    return made


def sampled_loss(
    rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, drawn: Tensor, share: Tensor
) -> Tensor:
    """Cross entropy over the label's class and those that were drawn, each once.

    Logits are less the logarithm of how likely a class is to be among those drawn (Jean et al.
    2015); a class that was drawn and is the label is left out. The gradient of the weight is
    sparse.

    Args:
        rows: [N, H]; weight: [C, H]; bias: [C]; labels: int64 [N].
        drawn: int64 [S], with replacement.
        share: float64 [C], with which probability each draw is which class.
    """
    among = -torch.expm1(len(drawn) * torch.log1p(-share))  # 1 - (1 - share)^S
    drawn = drawn.unique()
    those = torch.cat([labels, drawn])
    table = F.embedding(those, weight, sparse=True)  # [N + S, H]
    shift = bias[those] - among[those].log().to(bias.dtype)
    n = len(labels)
    own = (rows * table[:n]).sum(1) + shift[:n]
    others = F.linear(rows, table[n:], shift[n:])
    others = others.masked_fill(labels.unsqueeze(1) == drawn, float("-inf"))
    logits = torch.cat([own.unsqueeze(1), others], 1)
    return F.cross_entropy(logits, torch.zeros_like(labels))


class Words(Racer):
    """A word model in training.

    Args:
        setting: its sizes.
        rate: of the head.
        every, between: see :class:`Racer`.
        head: the softmax over all classes, the same compiled, one over SAMPLES classes that are
            drawn by frequency and the label's, or ``nn.AdaptiveLogSoftmaxWithLoss``.
        sampled_between: between full steps the head learns all the same, from samples.
    """

    def __init__(
        self,
        setting: Setting,
        rate: float,
        seed: int,
        *,
        every: int | None = None,
        between: Between = "prediction",
        head: Literal["full", "compiled", "sampled", "adaptive"] = "full",
        sampled_between: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        _, classes, width = setting
        self.train, self.apart = corpus(classes)
        inner = Below(classes, width)
        self.head_kind = head
        self.head: Any
        if head == "adaptive":
            self.head = nn.AdaptiveLogSoftmaxWithLoss(
                width, classes, [classes // 10, classes * 4 // 10]
            )
        else:
            self.head = nn.Linear(width, classes)
        decoupled = every is not None and between in ("prediction", "dropped")
        synthesizer = fd.SoftmaxSynthesizer(self.head) if decoupled else None
        super().__init__(inner, synthesizer, every, between)
        self.model: Below = inner
        self.position = 0
        self.state: Any = None
        own = [] if synthesizer is None else list(synthesizer.parameters())
        self.lower = [
            torch.optim.Adam([*inner.lstm.parameters(), *own], RATE),
            torch.optim.SparseAdam(list(inner.embedding.parameters()), RATE),
        ]
        self.sampled: list[torch.optim.Optimizer] = []
        if head == "sampled" or sampled_between:
            counts = torch.bincount(self.train.flatten(), minlength=classes).double() + 1.0
            self.share = counts / counts.sum()
            self.sampled = [
                torch.optim.SparseAdam([self.head.weight], rate),
                torch.optim.Adam([self.head.bias], rate),
            ]
        self.upper = (
            self.sampled if head == "sampled" else [torch.optim.Adam(self.head.parameters(), rate)]
        )
        if head == "compiled":  # here, off the clock
            h = torch.zeros(STEPS, BATCH, width, requires_grad=True)
            self.above(h, (None, torch.zeros(STEPS, BATCH, dtype=torch.int64))).backward()
            self.head.zero_grad()

    def batch(self) -> tuple[Tensor, Tensor]:
        if self.position + STEPS + 1 > len(self.train):
            self.position, self.state = 0, None
        window = self.train[self.position : self.position + STEPS + 1]
        self.position += STEPS
        return window[:-1], window[1:].contiguous()

    def below(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        context = {} if self.schedule is None else {"context": y}
        h, state = self.bottom(x, self.state, **context)
        self.state = tuple(t.detach() for t in state)
        made: Tensor = h
        return made

    def above(self, h: Tensor, batch: tuple[Any, Tensor]) -> Tensor:
        rows, labels = h.flatten(0, 1), batch[1].flatten()
        if self.head_kind == "adaptive":
            loss: Tensor = self.head(rows, labels).loss
            return loss
        if self.head_kind == "sampled":
            return self._sampled(rows, labels)
        run = compiled_loss() if self.head_kind == "compiled" else dense_loss
        return run(rows, self.head.weight, self.head.bias, labels)

    def _sampled(self, rows: Tensor, labels: Tensor) -> Tensor:
        drawn = torch.multinomial(self.share, SAMPLES, replacement=True)
        return sampled_loss(rows, self.head.weight, self.head.bias, labels, drawn, self.share)

    def meanwhile(self, h: Tensor, batch: tuple[Tensor, Tensor]) -> None:
        if self.sampled:
            self._sampled(h.flatten(0, 1), batch[1].flatten()).backward()
            for optimizer in self.sampled:
                optimizer.step()

    def loss(self) -> float:
        """Mean over words, by the whole softmax whatever the head was trained by."""
        total, windows, state = 0.0, 0, None
        with torch.no_grad():
            for at in range(0, min(len(self.apart) - 1, 320) - 40, 40):
                out, state = self.model(self.apart[at : at + 40], state)
                h = out.flatten(0, 1)
                y = self.apart[at + 1 : at + 41].flatten()
                if self.head_kind == "adaptive":
                    total += float(self.head(h, y).loss)
                else:
                    total += float(dense_loss(h, self.head.weight, self.head.bias, y))
                windows += 1
        return total / windows


# By arm, the options of Words, and the multiple of RATE for the head where none was chosen.
ARMS: dict[str, tuple[dict[str, Any], int]] = {
    "backprop": ({}, 8),
    "backprop, compiled": ({"head": "compiled"}, 8),
    "full steps only k=8": ({"every": 8, "between": "dropped"}, 8),
    "held gradient k=8": ({"every": 8, "between": "held"}, 8),
    "sampled softmax": ({"head": "sampled"}, 4),
    "adaptive softmax": ({"head": "adaptive"}, 4),
    "DNI k=4": ({"every": 4}, 8),
    "DNI k=8": ({"every": 8}, 8),
    "DNI k=8, head sampled": ({"every": 8, "sampled_between": True}, 4),
}


def grid(setting: Setting) -> dict[str, dict[int, Callable[[int], Words]]]:
    """By arm and multiple of RATE, what makes a model from a seed. An arm that needs a compiler is
    left out, with a line on stderr, where there is none that works."""
    corpus(setting.classes)  # what is missing shows at once
    left_out = set()
    try:
        Words(setting, RATE, 0, head="compiled")
    except Exception as error:  # whatever a compiler may raise
        left_out.add("backprop, compiled")
        said = str(error).strip().splitlines() or [type(error).__name__]
        print(f"{setting.race}: no arm by torch.compile: {said[0]}", file=sys.stderr, flush=True)
    return {
        name: {m: partial(Words, setting, m * RATE, **options) for m in MULTIPLES}
        for name, (options, _) in ARMS.items()
        if name not in left_out
    }


def _arms(setting: Setting) -> dict[str, Callable[[int], Words]]:
    return {
        name: made[multiple(setting.race, name, ARMS[name][1])]
        for name, made in grid(setting).items()
    }


WORDS = Setting("words", 10_000, 128)
WORDS_16K = Setting("words_16k", 16_000, 128)
WORDS_256 = Setting("words_256", 10_000, 256)
SETTINGS = {setting.race: setting for setting in (WORDS, WORDS_16K, WORDS_256)}


def words() -> dict[str, Callable[[int], Words]]:
    """10,000 classes, width 128."""
    return _arms(WORDS)


def words_16k() -> dict[str, Callable[[int], Words]]:
    """16,000 classes: as many words as occur twice in the text of the committed results."""
    return _arms(WORDS_16K)


def words_256() -> dict[str, Callable[[int], Words]]:
    """10,000 classes, width 256."""
    return _arms(WORDS_256)
