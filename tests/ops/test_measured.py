"""Which backend is asked first on a GPU: the nearest measurement, a rule of thumb without one."""

from __future__ import annotations

import json

import pytest
import torch
from fused_dni.kernels import tuning

import fused_dni as fd
from fused_dni.backends.reference import ReferenceBackend
from fused_dni.ops import measured, registry

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16
SHAPE = (128, 256, 512)
CUDA_WINS, TRITON_WINS = {"cuda": 1e-5, "triton": 2e-5}, {"cuda": 2e-5, "triton": 1e-5}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A table of the test's own, and nothing in memory."""
    monkeypatch.setenv("FUSED_DNI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "_SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(measured, "_tables", None)
    return tmp_path / "cache" / "backends.json"


@pytest.fixture(autouse=True)
def _ieee():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


served: list[str] = []


class Cuda(ReferenceBackend):
    name = "cuda"

    def linear_forward(self, *given):
        served.append(self.name)
        return super().linear_forward(*given)


class Triton(Cuda):
    name = "triton"


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Tensors on a CPU are looked up as if they were on a GPU, where two backends serve."""
    monkeypatch.setattr(registry, "_MEASURED", "cpu")
    monkeypatch.setattr(registry, "_resolved", {})
    absent = "is not here"
    loaded = {"cpu": absent, "cuda": Cuda(), "triton": Triton(), "reference": ReferenceBackend()}
    monkeypatch.setattr(registry, "_loaded", loaded)


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(measured, "_tables", None)


def order(op="linear", sizes=SHAPE, dtype=BF16, device=CPU):
    return measured.order(op, sizes, dtype, device)


# --------------------------------------------------------------------------------------- look-ups


@pytest.mark.parametrize(
    ("op", "sizes", "first"),
    [
        ("linear", (128, 1024, 1024), "cuda"),
        ("linear", (256, 1024, 1024), "triton"),
        ("linear", (128, 2048, 1024), "triton"),
        ("linear", (128, 1024, 2048), "triton"),
        ("lstm", (1024, 64, 1024, 2048), "cuda"),
        ("lstm", (0, 0, 256, 256), "cuda"),
    ],
)
def test_without_a_table_it_is_a_rule_of_thumb(op, sizes, first):
    assert order(op, sizes)[0] == first
    assert set(order(op, sizes)) == {"cuda", "triton"}


def test_what_was_measured_counts_in_later_processes(cache, monkeypatch):
    assert order()[0] == "cuda"
    assert measured.remember("linear", SHAPE, BF16, CPU, TRITON_WINS) == cache
    for _ in range(2):
        assert order() == ("triton", "cuda")
        forget(monkeypatch)
    held = json.loads(cache.read_text())
    assert held["seconds"] == {"linear/interpreter/bfloat16/128x256x512": TRITON_WINS}


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({"sizes": (128, 256, 128)}, True),
        ({"sizes": (32, 1024, 512)}, True),
        ({"sizes": (128, 256, 64)}, False),
        ({"sizes": (16, 256, 512)}, False),
        ({"dtype": torch.float16}, False),
        ({"device": torch.device("meta")}, False),
        ({"op": "lstm", "sizes": (1, *SHAPE)}, False),
    ],
)
def test_an_entry_serves_its_neighbours_of_the_same_kind(change, taken):
    measured.remember("linear", SHAPE, BF16, CPU, TRITON_WINS)
    assert order(**change)[0] == ("triton" if taken else "cuda")


def test_the_nearest_entry_counts():
    measured.remember("linear", (64, 256, 256), BF16, CPU, TRITON_WINS)
    measured.remember("linear", (64, 1024, 256), BF16, CPU, CUDA_WINS)
    assert order(sizes=(64, 256, 128))[0] == "triton"
    assert order(sizes=(128, 1024, 256))[0] == "cuda"
    assert order(sizes=(512, 2048, 256))[0] == "triton"  # no one's neighbour


def test_float32_is_measured_for_each_precision():
    measured.remember("linear", SHAPE, F32, CPU, TRITON_WINS)
    assert order(dtype=F32)[0] == "triton"
    torch.set_float32_matmul_precision("high")
    assert order(dtype=F32)[0] == "cuda"


def test_the_users_table_counts_before_the_packages(cache, tmp_path, monkeypatch):
    measured.remember("linear", SHAPE, BF16, CPU, TRITON_WINS)
    cache.rename(tmp_path / "shipped.json")
    forget(monkeypatch)
    assert order()[0] == "triton"
    measured.remember("linear", (256, 256, 512), BF16, CPU, CUDA_WINS)
    forget(monkeypatch)
    assert order()[0] == "cuda"  # though the package's is nearer
    assert len(json.loads(cache.read_text())["seconds"]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": 0, "seconds": {"NAME": {"cuda": 2e-5, "triton": 1e-5}}}',
        '{"format": 1, "seconds": [1]}',
        '{"format": 1, "seconds": {"NAME": {"triton": 1e-5}}}',
        '{"format": 1, "seconds": {"NAME": {"cuda": "2e-5", "triton": 1e-5}}}',
        '{"format": 1, "seconds": {"NAME": {"cuda": 2e-5, "triton": -1e-5}}}',
        '{"format": 1, "seconds": {"NAME": {"cuda": NaN, "triton": 1e-5}}}',
        '{"format": 1, "seconds": {"NAMEx2": {"cuda": 2e-5, "triton": 1e-5}}}',
        '{"format": 1, "seconds": {"a/NAME": {"cuda": 2e-5, "triton": 1e-5}}}',
        '{"format": 1, "seconds": {"linear/interpreter/bfloat16/128x-1x1": {"a": 1.0, "b": 2.0}}}',
    ],
)
def test_a_table_that_is_no_table_is_ignored(cache, text):
    cache.parent.mkdir()
    name = "linear/interpreter/bfloat16/128x256x512"
    cache.write_text(text.replace("NAME", name))
    assert order()[0] == "cuda"
    assert measured.tables() == [{}, {}]
    measured.remember("linear", SHAPE, BF16, CPU, TRITON_WINS)
    assert order()[0] == "triton"


def test_a_table_that_cannot_be_written_is_an_error_and_the_order_holds(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSED_DNI_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError):
        measured.remember("linear", SHAPE, BF16, CPU, TRITON_WINS)
    assert order()[0] == "triton"


def test_it_lies_beside_the_tiles():
    assert measured.path().parent == tuning.folder()


@pytest.mark.parametrize(
    ("op", "x", "weight", "sizes"),
    [
        ("linear", (100, 200), (300, 200), (128, 256, 512)),
        ("linear", (3, 5, 64), (64, 64), (16, 64, 64)),
        ("linear", (7, 64), (64,), (8, 64, 64)),
        ("linear", (0, 1), (1, 1), (1, 1, 1)),
        ("lstm", (33, 16, 20), (400, 20), (64, 16, 32, 128)),
        ("lstm", (16, 20), (400, 20), (0, 0, 32, 128)),
    ],
)
def test_sizes_of_a_call(op, x, weight, sizes):
    assert measured.sizes(op, torch.empty(x), torch.empty(weight)) == sizes


def test_rows_of_an_lstm_go_where_its_windows_go():
    measured.remember("lstm", (32, 16, 256, 256), BF16, CPU, TRITON_WINS)
    assert order("lstm", (0, 0, 256, 256))[0] == "triton"
    assert order("lstm", (0, 0, 256, 2048))[0] == "cuda"


# --------------------------------------------------------------------------------------- registry


@pytest.mark.usefixtures("on_a_gpu")
def test_the_registry_asks_in_this_order():
    small, large, weight = torch.empty(8, 16), torch.empty(512, 16), torch.empty(16, 16)
    assert registry.resolve(None, small, weight).name == "cuda"
    assert registry.resolve(None, large, weight).name == "triton"
    assert registry.resolve(None, large, weight, "lstm").name == "cuda"
    assert registry.resolve("cuda", large, weight).name == "cuda"
    measured.remember("linear", (8, 16, 16), F32, CPU, TRITON_WINS)
    assert registry.resolve(None, small, weight).name == "cuda"  # until it is told to
    registry.forget()
    assert registry.resolve(None, small, weight).name == "triton"
    assert registry.resolve(None, small.bfloat16(), weight).name == "cuda"


@pytest.mark.usefixtures("on_a_gpu")
def test_the_next_serves_what_the_fastest_refuses(monkeypatch):
    tired = Cuda()
    monkeypatch.setattr(tired, "why_not", lambda x, weight: "is tired")
    registry._loaded["cuda"] = tired
    assert registry.resolve(None, torch.empty(8, 16), torch.empty(16, 16)).name == "triton"
    registry._loaded["triton"] = "is not here either"
    registry.forget()
    assert registry.resolve(None, torch.empty(8, 16), torch.empty(16, 16)).name == "reference"


@pytest.mark.usefixtures("on_a_gpu")
def test_a_precision_that_changes_is_noticed():
    measured.remember("linear", (8, 16, 16), F32, CPU, TRITON_WINS)
    x, weight = torch.empty(8, 16), torch.empty(16, 16)
    assert registry.resolve(None, x, weight).name == "triton"
    torch.set_float32_matmul_precision("high")
    assert registry.resolve(None, x, weight).name == "cuda"


def test_on_a_cpu_nothing_is_measured(monkeypatch):
    """The C++ kernels are first there, also where the others run on a CPU for tests."""

    def ask(*call):
        raise AssertionError("asked for a measurement")

    monkeypatch.setattr(registry, "_resolved", {})
    monkeypatch.setattr(measured, "order", ask)
    assert registry.resolve(None, torch.empty(8, 16), torch.empty(16, 16)).name == "cpu"


@pytest.mark.usefixtures("on_a_gpu")
def test_sizes_that_are_rounded_alike_are_looked_up_once(monkeypatch):
    asked = []
    real = measured.order
    monkeypatch.setattr(measured, "order", lambda *call: asked.append(call) or real(*call))
    weight = torch.empty(16, 16)
    for rows in (65, 128, 100, 65):
        registry.resolve(None, torch.empty(rows, 16), weight)
    assert len(asked) == 1
    registry.resolve(None, torch.empty(129, 16), weight)
    assert len(asked) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("on_a_gpu", "one_thread")
def test_compiled_graphs_hold_for_sizes_that_are_rounded_alike():
    """Traced in one graph, sizes that are not fixed among them; another backend, another graph."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("eager")(graph, inputs)

    layer = fd.FusedDNILinear(8, 8, activation="relu", update=None, synthesizer=None)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for rows in (130, 256, 200, 100, 65):
            served.clear()
            compiled(torch.randn(rows, 8))
            assert served == ["triton" if rows > 128 else "cuda"], rows
    assert len(graphs) == 2
    torch._dynamo.reset()
