"""A text as a stream of characters: any UTF-8 file, gzipped or not, or a folder of them.

The symbols are the characters of the training part, which is the text's beginning; the validation
part is its tail. A character that only the tail has cannot be predicted by name: it is read, and
predicted, as one more symbol, the *unknown*, and its cost counts in full (:attr:`Text.unknown_bits`
on top of what the unknown symbol itself costs). So bits per character are those of a code that
could really send the validation text, whatever is in it.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fused_dni.experiments.data import DataError, Dataset, Split
from fused_dni.report.loaded import printable

ENDINGS = (".txt", ".txt.gz")
#: Unicode scalar values: what an unknown character is one of.
UNICODE = 0x110000 - 0x800
#: Of :func:`windows`: characters that the next one is told from, and rows to train and to test on.
WINDOW = 8
ROWS = 60_000, 10_000
#: For whoever has no text at hand.
HOW_TO_GET = (
    "any UTF-8 text of some megabytes will do, for example the complete works of Shakespeare: "
    "https://www.gutenberg.org/ebooks/100.txt.utf-8"
)


@dataclass(frozen=True)
class Text:
    """A text in two parts, as indices of symbols.

    Attributes:
        name: for reports.
        symbols: the characters of the training part, in code-point order.
        train: [N] int64, below ``len(symbols)``.
        validation: [M] int64; ``len(symbols)`` stands for a character that is not in ``symbols``.
        unknown: how many of those there are.
    """

    name: str
    symbols: str
    train: Tensor
    validation: Tensor
    unknown: int

    @property
    def classes(self) -> int:
        """Number of symbols, the unknown one included."""
        return len(self.symbols) + 1

    @property
    def unknown_bits(self) -> float:
        """Bits that name an unknown character among all of Unicode that is not a symbol."""
        return math.log2(UNICODE - len(self.symbols))


def load(path: str | os.PathLike[str], validation: float = 0.05) -> Text:
    """Read a text and split it.

    Args:
        path: a file, or a folder whose ``.txt`` and ``.txt.gz`` files are joined in the order of
            their names.
        validation: share of the characters, at the end, that is kept from training.

    Raises:
        DataError: absent, unreadable, empty, not UTF-8, or too short to be split.
        ValueError: a share outside (0, 1).
    """
    if not 0.0 < validation < 1.0:
        raise ValueError(f"the validation share must lie between 0 and 1, got {validation!r}")
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; {HOW_TO_GET}")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith(ENDINGS) and p.is_file())
        if not files:
            raise DataError(f"{path} has no file that ends in .txt or .txt.gz; {HOW_TO_GET}")
    text = "".join(_decode(file) for file in files)
    name = printable(path.name.removesuffix(".gz").removesuffix(".txt") or str(path))
    return split(text, validation, name)


def split(text: str, validation: float, name: str = "text") -> Text:
    """Find the symbols of a text and cut it in two; see :func:`load`."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    kept = len(points) - max(1, round(validation * len(points)))
    if kept < 1:
        raise DataError(f"{name} has {len(points)} characters: too few to keep some for validation")
    symbols, train = np.unique(points[:kept], return_inverse=True)
    tail = points[kept:]
    # A place in the sorted symbols, if what stands there is the character itself.
    place = np.minimum(np.searchsorted(symbols, tail), len(symbols) - 1)
    known = symbols[place] == tail
    return Text(
        name,
        "".join(chr(point) for point in symbols),
        torch.from_numpy(train.astype(np.int64)),
        torch.from_numpy(np.where(known, place, len(symbols)).astype(np.int64)),
        int((~known).sum()),
    )


def _decode(path: Path) -> str:
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is truncated or damaged: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not content:
        raise DataError(f"{path} is empty")
    if b"\0" in content:
        raise DataError(f"{path} is binary (byte {content.index(0)} is zero): need UTF-8 text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start} "
            f"(0x{content[error.start]:02x})"
        ) from error


def streams(symbols: Tensor, count: int) -> Tensor:
    """Cut [N] symbols into ``count`` contiguous streams of equal length, side by side.

    Returns:
        [N // count, count], contiguous: row t holds symbol t of every stream. The remainder at the
        end, shorter than a row, is left out.
    """
    length = len(symbols) // count
    return symbols[: length * count].view(count, length).t().contiguous()


def windows(path: str | os.PathLike[str]) -> Dataset:
    """Make a text a task of classification: the next character after :data:`WINDOW` others.

    Rows are drawn from the first nine tenths of the text to train on, from the last to test on,
    always the same ones: each character one-hot, [N, WINDOW * symbols] together, normalised.

    Args:
        path: see :func:`load`.

    Raises:
        DataError: as :func:`load`, and a text that is too short.
    """
    text = load(path, 0.1)
    symbols, splits = text.classes, []
    generator = torch.Generator().manual_seed(0)
    mean = 1.0 / symbols
    high, low = (x / math.sqrt(mean * (1.0 - mean)) for x in (1.0 - mean, -mean))
    for part, count in zip((text.train, text.validation), ROWS, strict=True):
        if len(part) <= WINDOW:
            raise DataError(f"{path} is too short: {len(part)} characters in one of its parts")
        rows = part.unfold(0, WINDOW + 1, 1)
        rows = rows[torch.randperm(len(rows), generator=generator)[:count]]
        given = rows[:, :-1] + symbols * torch.arange(WINDOW)
        encoded = torch.full((len(rows), WINDOW * symbols), low).scatter_(1, given, high)
        splits.append(Split(encoded, rows[:, -1].contiguous()))
    return Dataset("characters", splits[0], splits[1], symbols)
