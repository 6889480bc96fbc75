"""Data files are parsed strictly, fetched by checksum, and batches are a function of the seed."""

import gzip
import hashlib
import http.server
import os
import struct
import threading

import pytest
import torch

from fused_dni import cli
from fused_dni.experiments import data


def _idx(values: torch.Tensor, *, kind: int = 0x08, dimensions: int | None = None) -> bytes:
    shape = values.shape
    header = bytes([0, 0, kind, len(shape) if dimensions is None else dimensions])
    return header + struct.pack(f">{len(shape)}I", *shape) + values.numpy().tobytes()


def _write(folder, compressed: bool = True, train: int = 30, test: int = 12, side: int = 4):
    generator = torch.Generator().manual_seed(0)
    for (kind, entry), n in zip(data.MNIST_FILES.items(), (train, train, test, test), strict=True):
        if kind.endswith("images"):
            values = torch.randint(256, (n, side, side), generator=generator, dtype=torch.uint8)
        else:
            values = torch.randint(10, (n,), generator=generator, dtype=torch.uint8)
        body = _idx(values)
        path = folder / (f"{entry.name}.gz" if compressed else entry.name)
        path.write_bytes(gzip.compress(body) if compressed else body)
    return folder


@pytest.mark.parametrize("compressed", [True, False])
def test_a_folder_of_idx_files(tmp_path, compressed):
    found = data.load(folder=_write(tmp_path, compressed))
    assert found.train.images.shape == (30, 16) and found.test.images.shape == (12, 16)
    assert found.train.labels.dtype == torch.int64
    # derived: mean and deviation of 480 fp32 numbers that were normalised by the same two scalars
    assert abs(float(found.train.images.mean())) < 1e-5
    assert abs(float(found.train.images.std()) - 1) < 1e-5


def test_the_folder_that_torchvision_makes(tmp_path):
    inner = tmp_path / "MNIST" / "raw"
    inner.mkdir(parents=True)
    _write(inner, compressed=False)
    assert data.load(folder=tmp_path).features == 16


def test_the_held_out_part_is_the_end_of_the_training_set(tmp_path):
    _write(tmp_path)
    whole, part = data.load(folder=tmp_path), data.load(folder=tmp_path, held_out=True)
    assert len(part.train.labels) == 25 and len(part.test.labels) == 5
    assert torch.equal(part.test.labels, whole.train.labels[25:])
    assert part.held_out and not whole.held_out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\0\0\x08", "truncated"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2, 4, 4) + bytes(31), "states .* but it holds 31"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2, 4, 4) + bytes(33), "but it holds more"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 0, 4, 4), "empty"),
        (b"\0\0\x08\x01" + struct.pack(">I", 12) + bytes(12), "has 1 dimensions, need 3"),
        (b"\0\0\x0d\x03" + struct.pack(">3I", 1, 1, 1) + bytes(4), "type 0x0d"),
        (b"<!DOCTYPE html><html>", "not an IDX file"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2**32 - 1, 2**16, 2**16) + bytes(9), "holds 9"),
    ],
)
@pytest.mark.parametrize("compressed", [True, False])
def test_a_broken_file_is_named(tmp_path, content, message, compressed):
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(data.DataError, match=message) as caught:
        data.read_idx(path, dimensions=3)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("cut", [20, 100])
def test_a_truncated_or_damaged_archive_is_named(tmp_path, cut):
    _write(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with pytest.raises(data.DataError, match="truncated or damaged") as caught:
        data.load(folder=tmp_path)
    assert str(path) in str(caught.value)
    path.write_bytes(whole[:40] + bytes(len(whole) - 40))
    with pytest.raises(data.DataError, match=path.name):
        data.load(folder=tmp_path)


def test_what_does_not_fit_together_is_named(tmp_path):
    _write(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(_idx(torch.zeros(29, dtype=torch.uint8))))
    with pytest.raises(data.DataError, match=r"30 images but .* 29 labels"):
        data.load(folder=tmp_path)
    labels.write_bytes(gzip.compress(_idx(torch.full((30,), 11, dtype=torch.uint8))))
    with pytest.raises(data.DataError, match="label 11, allowed are 0 to 9"):
        data.load(folder=tmp_path)


def test_absent_files_and_folders_are_named(tmp_path):
    with pytest.raises(data.DataError, match="does not exist"):
        data.load(folder=tmp_path / "nowhere")
    with pytest.raises(data.DataError, match=r"train-images-idx3-ubyte.gz .* is not in"):
        data.load(folder=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(data.DataError, match="is a file"):
        data.load(folder=tmp_path / "file")
    with pytest.raises(data.DataError, match="unknown dataset 'cifar'"):
        data.load("cifar")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path):
    _write(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").chmod(0)
    with pytest.raises(data.DataError, match=r"cannot read .*train-images"):
        data.load(folder=tmp_path)


def test_the_embedded_digits():
    found = data.load("digits")
    assert found.features == 64 and len(found.train.labels) + len(found.test.labels) == 1797
    assert set(found.train.labels.tolist()) == set(found.test.labels.tolist()) == set(range(10))
    again = data.load("digits")
    assert torch.equal(found.train.images, again.train.images)


def test_permutations_depend_on_seed_and_epoch_alone():
    first = data.permutation(100, seed=3, epoch=5)
    torch.manual_seed(123)
    assert torch.equal(first, data.permutation(100, seed=3, epoch=5))
    assert not torch.equal(first, data.permutation(100, seed=3, epoch=6))
    assert not torch.equal(first, data.permutation(100, seed=4, epoch=5))
    assert sorted(first.tolist()) == list(range(100))


def test_batches_are_whole_and_continue_anywhere():
    order = torch.arange(23)
    every = list(data.batches(order, 5))
    assert [len(b) for b in every] == [5, 5, 5, 5]
    rest = list(data.batches(order, 5, start=2))
    assert all(torch.equal(a, b) for a, b in zip(rest, every[2:], strict=True))
    split = data.Split(torch.randn(23, 3), torch.arange(23))
    images, labels = data.pick(split, every[1])
    assert torch.equal(labels, every[1]) and images.is_contiguous()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A mirror on this machine with four small files, which the checksums are made to fit."""
    root = tmp_path / "mirror"
    root.mkdir()
    _write(root)
    entries = {
        kind: entry._replace(
            sha256=hashlib.sha256(
                gzip.decompress((root / f"{entry.name}.gz").read_bytes())
            ).hexdigest()
        )
        for kind, entry in data.MNIST_FILES.items()
    }
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(root))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setattr(data, "MNIST_FILES", entries)
    monkeypatch.setattr(
        data,
        "MIRRORS",
        ("http://127.0.0.1:9/", f"http://127.0.0.1:{running.server_address[1]}/"),
    )
    yield root, asked
    running.shutdown()
    running.server_close()


def test_fetching_uses_the_next_mirror_the_checksum_and_the_cache(server, tmp_path):
    _, asked = server
    seen = []
    cache = tmp_path / "cache"
    found = data.load("mnist", cache=cache, progress=lambda *state: seen.append(state))
    assert found.features == 16 and len(asked) == 4 and seen
    assert all(done <= total for _, done, total in seen)
    data.load("mnist", cache=cache)
    assert len(asked) == 4
    broken = cache / "mnist" / "train-labels-idx1-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:-5])
    data.load("mnist", cache=cache)
    assert len(asked) == 5
    assert not list(cache.rglob("*.part"))


def test_a_wrong_file_is_not_kept(server, tmp_path):
    root, _ = server
    (root / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(data.DataError, match=r"wrong checksum.*--data DIR"):
        data.load("mnist", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "mnist").iterdir())


def test_without_a_network_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MIRRORS", ("http://127.0.0.1:9/",))
    with pytest.raises(data.DataError, match=r"cannot fetch train-images.*--data DIR") as caught:
        data.fetch_mnist(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif("FUSED_DNI_MNIST" not in os.environ, reason="FUSED_DNI_MNIST names no folder")
def test_the_real_mnist():
    found = data.load(folder=os.environ["FUSED_DNI_MNIST"])
    assert found.train.images.shape == (60_000, 784) and found.test.images.shape == (10_000, 784)
    for entry in data.MNIST_FILES.values():
        path = data._find(data.Path(os.environ["FUSED_DNI_MNIST"]), entry.name)
        assert data._checksum(path) == entry.sha256


# ------------------------------------------------------------------------------- tiny and broken


@pytest.mark.parametrize("count", [1, 5])
def test_too_few_images_to_hold_a_sixth_out(tmp_path, count):
    _write(tmp_path, train=count)
    with pytest.raises(data.DataError, match=f"mnist has {count} images .* too few to hold"):
        data.load(folder=tmp_path, held_out=True)
    assert len(data.load(folder=tmp_path).train.labels) == count


def test_six_images_hold_one_out(tmp_path):
    found = data.load(folder=_write(tmp_path, train=6), held_out=True)
    assert len(found.train.labels) == 5 and len(found.test.labels) == 1


GOOD = gzip.compress(_idx(torch.arange(80, dtype=torch.uint8).view(5, 4, 4)))


@pytest.mark.parametrize(
    "content",
    [
        GOOD[:-12],
        GOOD + b"<html>",
        gzip.compress(_idx(torch.arange(5, dtype=torch.uint8))),
        b"version https://git-lfs.github.com/spec/v1\n",
        b"",
        b"\x1f\x8b",
        b"PK\x03\x04",
    ],
    ids=["cut", "behind the archive", "labels", "LFS pointer", "empty", "two bytes", "zip"],
)
@pytest.mark.parametrize("part", ["train images", "test images"])
def test_a_folder_with_a_broken_file_is_one_line_with_its_name(tmp_path, content, part):
    path = _write(tmp_path, train=5, test=5) / f"{data.MNIST_FILES[part].name}.gz"
    path.write_bytes(content)
    with pytest.raises(data.DataError) as caught:
        data.load(folder=tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--held-out"], "too few to hold a sixth out"),
        (["train"], "batch_size 64 is larger than the training set (5 images)"),
        (["demo"], "batch_size 64 is larger than the training set (5 images)"),
        (["rivals", "--tune"], "too few to hold a sixth out"),
        (["rivals"], "is larger than the training set (5 images)"),
        (["interfaces"], "is larger than the training set (5 images)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_commands_refuse_tiny_data_before_they_train(tmp_path, capsys, argv, message):
    folder = tmp_path / "data"
    folder.mkdir()
    _write(folder, train=5)
    out = str(tmp_path / "out")
    more = ["--batch-size", "64", "--quiet", "--data", str(folder), "--out", out]
    assert cli.main([*argv, *more]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
