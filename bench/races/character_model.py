"""A network whose upper hidden layers cost more than its lower ones, all of them trained.

The next character of a text from those in front of it: a table has a vector for each of the last
one to ORDER characters (hashed), and their sum h is what the hidden layers above and the head go on
from. A row of the table learns only when its characters come by, so it needs many batches, of which
the layers above need fewer. With an interface at h they are run, and trained, on every k-th step
alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.experiments import characters, nets
from fused_dni.experiments.tops import Between, Racer
from fused_dni.rules import Adam

from .chosen import multiple
from .corpus import corpus_path

ORDER, BUCKETS, BATCH = 6, 1 << 16, 256
WIDTH, HIDDEN, DEPTH = 128, 1024, 3
#: Rate of the layers above, of synthesizer and local classifier, and of the table a multiple of the
#: second.
RATE, TABLE_RATE = 1e-3, 2e-3
MULTIPLES = (1, 3, 10, 30)
#: Places of the text at which the error is measured.
APART = 10_000


@lru_cache
def corpus(choosing: bool = False) -> tuple[Tensor, Tensor, int]:
    """Return the symbols of CORPUS to train on, those apart, and how many symbols there are.

    Apart is the last tenth; for choosing rates the tenth before that, and the last is not seen."""
    text = characters.load(corpus_path(), 0.1)
    train, apart = text.train, text.validation
    if choosing:
        train, apart = train[: -len(apart)], train[-len(apart) :]
    return train, apart, text.classes


def rows(symbols: Tensor, places: Tensor) -> Tensor:
    """Return the table's rows for the contexts that end in front of ``places``: [N, ORDER]."""
    found, key = [], torch.zeros_like(places)
    for n in range(ORDER):
        key = (key * 131 + symbols[places - 1 - n] + 1) % 2_147_483_647
        found.append(key * 2_654_435_761 % 4_294_967_291 % BUCKETS + n * BUCKETS)
    return torch.stack(found, 1)


class Characters(Racer):
    """The network in training.

    Args:
        rate: of the table.
        every, between: see :class:`Racer`; the surrogate is a linear classifier of h, trained with
            the table.
        form: of the synthesizer: linear, or that of a cross-entropy's gradient.
        above: the layers above as stock modules, by ``torch.compile``, or on our kernels.
        choosing: see :func:`corpus`.
    """

    def __init__(
        self,
        rate: float,
        seed: int,
        *,
        every: int | None = None,
        between: Between = "prediction",
        form: Literal["linear", "cross-entropy"] = "linear",
        above: Literal["ours", "stock", "compiled"] = "ours",
        choosing: bool = False,
    ) -> None:
        self.train, self.apart, classes = corpus(choosing)
        torch.manual_seed(seed)
        table = nn.EmbeddingBag(ORDER * BUCKETS, WIDTH, mode="sum", sparse=True)
        nn.init.normal_(table.weight, std=0.1)
        learner: nn.Module | None = None
        if every is not None and between in ("prediction", "dropped"):
            learner = (
                fd.LinearSynthesizer(WIDTH, None, classes)
                if form == "linear"
                else fd.CrossEntropySynthesizer(WIDTH, classes)
            )
        super().__init__(table, learner, every, between)
        if between == "surrogate":
            learner = self.local = nn.Linear(WIDTH, classes)
        self.lower = [torch.optim.SparseAdam(list(table.parameters()), rate)]
        if learner is not None:
            self.lower.append(torch.optim.Adam(learner.parameters(), RATE, fused=True))
        network = nets.plain(WIDTH, HIDDEN, DEPTH, classes, seed=seed)
        self.upper_layers: nn.Sequential = network.train()
        if above == "ours":
            self.upper_layers = nets.fused(network, synthetic=False, update=Adam(RATE)).train()
            self.upper = [fd.FusedOptimizer(self.upper_layers)]
        else:
            self.upper = [torch.optim.Adam(network.parameters(), RATE, fused=True)]
        self._loss: Callable[[Tensor, Tensor], Tensor] = self._eager
        if above == "compiled":
            self._compile(classes)
        self._generator = torch.Generator().manual_seed(seed)

    def _eager(self, h: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.upper_layers(h), labels)

    def _compile(self, classes: int) -> None:
        """Compile, here, off the clock; the trial leaves nothing behind."""
        torch.compiler.reset()  # else the ninth network of one process would run uncompiled
        self._loss = torch.compile(self._eager, dynamic=False)
        before = {key: value.clone() for key, value in self.upper_layers.state_dict().items()}
        labels = torch.zeros(BATCH, dtype=torch.int64)
        self._loss(torch.randn(BATCH, WIDTH, requires_grad=True), labels).backward()
        self.upper_layers.load_state_dict(before)
        self.upper_layers.zero_grad()

    def batch(self) -> tuple[Tensor, Tensor]:
        places = torch.randint(ORDER, len(self.train), (BATCH,), generator=self._generator)
        return rows(self.train, places), self.train[places]

    def below(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        context: dict[str, Any] = {} if self.schedule is None else {"context": batch[1]}
        h: Tensor = self.bottom(batch[0], **context)
        return h

    def above(self, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self._loss(h, batch[1])

    def surrogate(self, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.local(h), batch[1])

    def loss(self) -> float:
        """Share of wrong characters."""
        self.upper_layers.eval()
        wrong = 0
        places = torch.linspace(ORDER, len(self.apart) - 1, APART).long()
        with torch.no_grad():
            for some in places.split(2500):
                said = self.upper_layers(self.inner(rows(self.apart, some))).argmax(1)
                wrong += int((said != self.apart[some]).sum())
        self.upper_layers.train()
        return wrong / len(places)


ARMS: dict[str, dict[str, Any]] = {
    "backprop": {},
    "backprop, stock": {"above": "stock"},
    "backprop, compiled": {"above": "compiled"},
    "full steps only k=16": {"every": 16, "between": "dropped"},
    "local loss k=16": {"every": 16, "between": "surrogate"},
    "DNI k=8": {"every": 8},
    "DNI k=16": {"every": 16},
    "DNI k=16, cross-entropy": {"every": 16, "form": "cross-entropy"},
}


def grid() -> dict[str, dict[int, Callable[[int], Characters]]]:
    """By arm and multiple of TABLE_RATE, what makes a network from a seed, to choose among. Arms by
    backprop take the choice of the first: they compute the same step."""
    corpus(True)  # what is missing shows at once
    return {
        name: {m: partial(Characters, m * TABLE_RATE, choosing=True, **options) for m in MULTIPLES}
        for name, options in ARMS.items()
        if not name.startswith("backprop,")
    }


def hidden() -> dict[str, Callable[[int], Characters]]:
    """An arm by compilation is left out, with a line on stderr, where there is none that works."""
    corpus()
    chosen = {name: "backprop" if name.startswith("backprop,") else name for name in ARMS}
    made = {
        name: partial(Characters, multiple("hidden", chosen[name], 3) * TABLE_RATE, **options)
        for name, options in ARMS.items()
    }
    try:
        Characters(TABLE_RATE, 0, above="compiled")
    except Exception as error:  # whatever a compiler may raise
        del made["backprop, compiled"]
        said = str(error).strip().splitlines() or [type(error).__name__]
        print(f"hidden: no arm by torch.compile: {said[0]}", file=sys.stderr, flush=True)
    return made
