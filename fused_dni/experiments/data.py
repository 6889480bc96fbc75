"""Real images, whole in memory: the embedded digits, or MNIST from a folder or fetched.

The embedded default is the digits set that scikit-learn ships (1,797 images of 8 x 8 from the UCI
test set of handwritten digits): real data in a package that most machines of this trade already
have, no network, and nothing copied into this repository. scikit-learn comes with the extra
``test``, which ``make demo`` installs, and is no dependency: for a data file it would bring SciPy
and joblib to everybody who wants layers. Without it the error says what to install, and
``--data DIR`` works all the same.

Batches are rows picked from one resident tensor (``index_select`` by a permutation). No
``DataLoader``: collating 256 images one by one takes longer than a training step of these networks,
and worker processes compete with the step for its cores, so a loader would measure itself.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

DATASETS = ("digits", "mnist")


class DataError(ValueError):
    """A data file is absent, broken or not what it should be; the message names it."""


class Split(NamedTuple):
    """Images as float rows, normalised, and their class indices (int64)."""

    images: Tensor  # [N, features]
    labels: Tensor  # [N]


@dataclass(frozen=True)
class Dataset:
    """A training and an evaluation part.

    Attributes:
        name: what it is, for reports.
        train: what is trained on.
        test: what is evaluated on: the test set, or the held-out part of the training set.
        classes: number of classes.
        held_out: whether ``test`` is the held-out part.
    """

    name: str
    train: Split
    test: Split
    classes: int = 10
    held_out: bool = False

    @property
    def features(self) -> int:
        """Length of a row."""
        return int(self.train.images.shape[1])

    def digest(self) -> str:
        """Hash the labels of both parts: 16 digits that tell one text from another."""
        found = hashlib.sha256()
        for labels in (self.train.labels, self.test.labels):
            found.update(labels.cpu().numpy().tobytes())
        return found.hexdigest()[:16]

    def to(self, device: str | torch.device) -> Dataset:
        """Return the same on another device."""
        train, test = (
            Split(s.images.to(device), s.labels.to(device)) for s in (self.train, self.test)
        )
        return Dataset(self.name, train, test, self.classes, self.held_out)


def load(
    dataset: str = "digits",
    *,
    folder: str | os.PathLike[str] | None = None,
    held_out: bool = False,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Dataset:
    """Load a dataset, normalised by the mean and deviation of its training part.

    Args:
        dataset: ``digits`` (embedded) or ``mnist`` (fetched once, checked by checksum, cached).
        folder: folder of the four MNIST files; given, nothing is fetched.
        held_out: keep the last sixth of the training set (MNIST: the last 10,000 images) for
            evaluation and leave the test set alone: for choosing hyper-parameters.
        cache: where fetched files are kept; ``fused_dni`` under the user's cache otherwise.
        progress: called while fetching with file name, bytes so far and bytes in all (or -1).

    Raises:
        DataError: a file is absent, truncated, of the wrong kind, or cannot be fetched, or there
            are too few images for ``held_out``.
    """
    if folder is not None:
        train, test, name = *_read_mnist(Path(folder)), "mnist"
    elif dataset == "mnist":
        train, test, name = *_read_mnist(fetch_mnist(cache, progress)), "mnist"
    elif dataset == "digits":
        train, test, name = *_digits(), "digits"
    else:
        raise DataError(f"unknown dataset {dataset!r}: choose one of {', '.join(DATASETS)}")
    if held_out:
        train, test = hold_out(train, name)
    # Two scalars, not one per pixel: pixels that never vary would be divided by zero.
    mean, deviation = train.images.mean(), train.images.std()
    if not float(deviation) > 0:
        raise DataError(f"the images of {name} are all of one colour: nothing to learn from")
    train, test = (
        Split(((s.images - mean) / deviation).contiguous(), s.labels) for s in (train, test)
    )
    return Dataset(name, train, test, 10, held_out)


def hold_out(train: Split, name: str) -> tuple[Split, Split]:
    """Cut a training set: what is left of it, and its last sixth for evaluation.

    Raises:
        DataError: a sixth of it is not one image.
    """
    count = len(train.labels) // 6
    if not count:
        raise DataError(
            f"{name} has {len(train.labels)} images to train on: too few to hold a sixth out"
        )
    return (
        Split(train.images[:-count], train.labels[:-count]),
        Split(train.images[-count:], train.labels[-count:]),
    )


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """Draw the order of epoch ``epoch``: a function of its arguments alone.

    So a run that is resumed in the middle of an epoch needs no generator state to continue with
    the very same batches, and all methods of a comparison see the same ones.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) & 0x7FFF_FFFF)
    return torch.randperm(n, generator=generator)


def batches(order: Tensor, batch_size: int, start: int = 0) -> Iterator[Tensor]:
    """Yield row indices batch by batch, from batch number ``start`` on.

    Whole batches only: the remainder (another set of rows in each epoch) is left out, since batch
    statistics of a few rows are noise and a second shape is a second compilation.
    """
    for i in range(start, len(order) // batch_size):
        yield order[i * batch_size : (i + 1) * batch_size]


def pick(split: Split, rows: Tensor) -> Split:
    """Copy the given rows into contiguous tensors."""
    return Split(split.images.index_select(0, rows), split.labels.index_select(0, rows))


# ---------------------------------------------------------------------------------------- digits


def _digits() -> tuple[Split, Split]:
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise DataError(
            "the embedded digits come with scikit-learn, which is not installed: "
            "pip install scikit-learn, or give the folder of the MNIST files with --data DIR"
        ) from error
    found = load_digits()
    images = torch.from_numpy(found.data).float() / 16.0
    labels = torch.from_numpy(found.target).long()
    # Neighbours in the file are by the same writer; a fixed shuffle gives every writer to both.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    kept = len(labels) - len(labels) // 5
    return (
        Split(images[order[:kept]], labels[order[:kept]]),
        Split(images[order[kept:]], labels[order[kept:]]),
    )


# ----------------------------------------------------------------------------------------- MNIST


class _File(NamedTuple):
    name: str
    rows: int
    sha256: str  # of the uncompressed file: mirrors compress it differently


MNIST_FILES = {
    "train images": _File(
        "train-images-idx3-ubyte",
        60_000,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train labels": _File(
        "train-labels-idx1-ubyte",
        60_000,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "test images": _File(
        "t10k-images-idx3-ubyte",
        10_000,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "test labels": _File(
        "t10k-labels-idx1-ubyte",
        10_000,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


def _read_mnist(folder: Path) -> tuple[Split, Split]:
    if not folder.exists():
        raise DataError(f"data folder {folder} does not exist")
    if not folder.is_dir():
        raise DataError(f"data folder {folder} is a file; give the folder that holds it")
    splits = []
    for part in ("train", "test"):
        image_file = _find(folder, MNIST_FILES[f"{part} images"].name)
        label_file = _find(folder, MNIST_FILES[f"{part} labels"].name)
        images = read_idx(image_file, dimensions=3)
        labels = read_idx(label_file, dimensions=1)
        if len(images) != len(labels):
            raise DataError(
                f"{image_file} holds {len(images)} images but {label_file} {len(labels)} labels"
            )
        if int(labels.max()) > 9:
            raise DataError(f"{label_file} holds a label {int(labels.max())}, allowed are 0 to 9")
        splits.append(Split(images.reshape(len(images), -1).float() / 255.0, labels.long()))
    train, test = splits
    if train.images.shape[1] != test.images.shape[1]:
        raise DataError(
            f"the training images in {folder} have {train.images.shape[1]} pixels "
            f"but the test images {test.images.shape[1]}"
        )
    return train, test


def _find(folder: Path, name: str) -> Path:
    """Find a file under one of its usual spellings: compressed or not, in torchvision's folder."""
    dotted = name.replace("-idx", ".idx")
    for place in (folder, folder / "MNIST" / "raw"):
        for spelling in (f"{name}.gz", name, f"{dotted}.gz", dotted):
            if (place / spelling).is_file():
                return place / spelling
    raise DataError(f"{name}.gz (or {name}) is not in {folder}")


def read_idx(path: str | os.PathLike[str], dimensions: int) -> Tensor:
    """Read an IDX file of bytes, gzipped or not, strictly.

    Args:
        path: the file; whether it is compressed is told by its first two bytes.
        dimensions: how many it must have (3: images, 1: labels).

    Returns:
        A uint8 tensor of the shape that the header states.

    Raises:
        DataError: unreadable, not an IDX file of unsigned bytes, of other dimensions, empty,
            shorter or longer than its header says.
    """
    path = Path(path)
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if compressed:
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    return _parse_idx(unpacked, path, dimensions)
            return _parse_idx(raw, path, dimensions)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is truncated or damaged: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _parse_idx(stream: IO[bytes] | gzip.GzipFile, path: Path, dimensions: int) -> Tensor:
    length = 4 + 4 * dimensions
    header = stream.read(length)
    if len(header) >= 4 and header[:2] != b"\0\0":
        raise DataError(f"{path} is not an IDX file: it starts with {header[:4].hex()}")
    if len(header) < length:
        raise DataError(f"{path} is truncated: {len(header)} bytes, the header alone has {length}")
    if header[2] != 0x08:
        raise DataError(f"{path} holds values of type 0x{header[2]:02x}, need 0x08 (bytes)")
    if header[3] != dimensions:
        raise DataError(f"{path} has {header[3]} dimensions, need {dimensions}")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    size = 1
    for extent in shape:
        size *= extent
    if size == 0:
        raise DataError(f"{path} is empty: its header states the shape {shape}")
    # One byte more than promised, so that what is too long shows without reading all of it. In
    # pieces, so that a header promising terabytes allocates what the file really holds.
    body = bytearray()
    while len(body) <= size:
        piece = stream.read(min(1 << 24, size + 1 - len(body)))
        if not piece:
            break
        body += piece
    if len(body) != size:
        how = "more" if len(body) > size else f"{len(body)}"
        raise DataError(f"{path}: its header states {shape}, {size} bytes, but it holds {how}")
    return torch.frombuffer(body, dtype=torch.uint8).reshape(shape)


def default_cache() -> Path:
    """Say where files are kept: ``$XDG_CACHE_HOME/fused_dni``, or ``~/.cache/fused_dni``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "fused_dni"


def fetch_mnist(
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Make sure that the four files are in the cache, whole, and return their folder.

    Each is checked by the SHA-256 of its uncompressed content; a file in the cache that fails is
    fetched anew. A file appears under its name only once it is complete.

    Raises:
        DataError: no mirror could deliver a file, or the cache cannot be written.
    """
    folder = (Path(cache) if cache is not None else default_cache()) / "mnist"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write the cache {folder}: {error.strerror or error}") from error
    for entry in MNIST_FILES.values():
        path = folder / f"{entry.name}.gz"
        if path.is_file() and _checksum(path) == entry.sha256:
            continue
        _fetch(entry, path, progress)
    return folder


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with gzip.open(path) as unpacked:
            while piece := unpacked.read(1 << 20):
                digest.update(piece)
    except (OSError, EOFError, zlib.error):
        return ""
    return digest.hexdigest()


def _fetch(entry: _File, path: Path, progress: Callable[[str, int, int], None] | None) -> None:
    partial = path.with_suffix(f".{os.getpid()}.part")
    reasons = []
    try:
        for mirror in MIRRORS:
            try:
                _download(mirror + path.name, partial, path.name, progress)
            except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
                reasons.append(f"{mirror.split('/')[2]}: {getattr(error, 'reason', None) or error}")
                continue
            if _checksum(partial) == entry.sha256:
                os.replace(partial, path)
                return
            reasons.append(f"{mirror.split('/')[2]}: wrong checksum")
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
    raise DataError(
        f"cannot fetch {path.name} ({'; '.join(reasons)}): "
        "give the folder of the four MNIST files with --data DIR"
    )


def _download(
    url: str, target: Path, name: str, progress: Callable[[str, int, int], None] | None
) -> None:
    with urllib.request.urlopen(url, timeout=20) as answer, target.open("wb") as out:
        total = int(answer.headers.get("Content-Length") or -1)
        done = 0
        while piece := answer.read(1 << 16):
            out.write(piece)
            done += len(piece)
            if progress is not None:
                progress(name, done, total)
