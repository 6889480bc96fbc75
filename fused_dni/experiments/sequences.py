"""The copy tasks: what an episode looks like, and the curriculum over their length.

As in Graves et al. 2014 (arXiv 1410.5401, sections 4.1 and 4.2) and Jaderberg et al. 2016
(arXiv 1608.05343, section 3.2): random symbols of ``width`` bits are read, then a marker, and then
they are to be written while nothing is read. In repeat-copy they are to be written R times, R being
read with the marker, and an end marker after them; between two episodes nothing is carried over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TASKS = ("copy", "repeat-copy")
#: What the number of repeats is divided by before it is read.
REPEATS_SCALE = 10.0


class Episodes(NamedTuple):
    """B episodes side by side.

    Attributes:
        inputs: [S, B, channels].
        targets: [S, B, outputs], 0 or 1.
        counted: the first step whose output counts; all from there on do.
    """

    inputs: Tensor
    targets: Tensor
    counted: int


def channels(task: str, width: int) -> tuple[int, int]:
    """Count input channels and outputs."""
    return (width + 1, width) if task == "copy" else (width + 2, width + 1)


def steps(task: str, length: int, repeats: int = 1) -> int:
    """Count the steps of an episode: 2N + 1 of copy, N + NR + 3 of repeat-copy."""
    return 2 * length + 1 if task == "copy" else length + length * repeats + 3


def copy(length: int, batch: int, generator: torch.Generator, width: int = 8) -> Episodes:
    """Draw N symbols, a step with the marker (the last channel), N steps to write them."""
    bits = _bits(length, batch, width, generator)
    inputs = torch.zeros(steps("copy", length), batch, width + 1)
    inputs[:length, :, :width] = bits
    inputs[length, :, width] = 1.0
    targets = torch.zeros(len(inputs), batch, width)
    targets[length + 1 :] = bits
    return Episodes(inputs, targets, length + 1)


def repeat_copy(
    length: int, repeats: int, batch: int, generator: torch.Generator, width: int = 8
) -> Episodes:
    """Draw a start marker (the last channel but one), N symbols, a step that says how often (the
    last channel, over ten), R times N steps to write them, a step to write the end marker (the last
    output)."""
    bits = _bits(length, batch, width, generator)
    inputs = torch.zeros(steps("repeat-copy", length, repeats), batch, width + 2)
    inputs[0, :, width] = 1.0
    inputs[1 : length + 1, :, :width] = bits
    inputs[length + 1, :, width + 1] = repeats / REPEATS_SCALE
    targets = torch.zeros(len(inputs), batch, width + 1)
    targets[length + 2 : -1, :, :width] = bits.repeat(repeats, 1, 1)
    targets[-1, :, width] = 1.0
    return Episodes(inputs, targets, length + 2)


def _bits(length: int, batch: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (length, batch, width), generator=generator).float()


def draw(task: str, length: int, repeats: int, batch: int, width: int, seed: int) -> Episodes:
    """Draw episodes that are a function of the arguments alone."""
    generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)
    if task == "copy":
        return copy(length, batch, generator, width)
    return repeat_copy(length, repeats, batch, generator, width)


@dataclass
class Curriculum:
    """The length of the episodes: raised whenever the running error falls below a threshold.

    Level 0 is one symbol (written once); each level of copy adds a symbol, those of repeat-copy add
    a symbol and a repeat in turn (Jaderberg et al. 2016, appendix).

    Attributes:
        task: of :data:`TASKS`.
        threshold: bits, per bit that is to be written; guessing costs one.
        smoothing: weight of the newest batch in the running error.
        level: of the episodes to train on; all below are solved.
        error: running error at this level, one bit to begin with.
    """

    task: str
    threshold: float = 0.15
    smoothing: float = 0.1
    level: int = 0
    error: float = 1.0

    @property
    def length(self) -> int:
        """N at this level."""
        return self._shape(self.level)[0]

    @property
    def repeats(self) -> int:
        """R at this level; 1 for copy."""
        return self._shape(self.level)[1]

    def _shape(self, level: int) -> tuple[int, int]:
        if self.task == "copy":
            return level + 1, 1
        return 1 + (level + 1) // 2, 1 + level // 2

    def solved(self) -> int:
        """Return the longest solved: symbols for copy, steps of the whole episode for repeat-copy
        (as in the paper's table, by its numbers); 0 for none."""
        if self.level == 0:
            return 0
        length, repeats = self._shape(self.level - 1)
        return length if self.task == "copy" else steps(self.task, length, repeats)

    def update(self, error: float) -> bool:
        """Take in a batch's error, in bits; True if that raised the level."""
        self.error += self.smoothing * (error - self.error)
        if self.error >= self.threshold:
            return False
        self.level += 1
        self.error = 1.0
        return True
