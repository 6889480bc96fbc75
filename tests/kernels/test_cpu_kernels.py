"""The C++ kernels themselves: every instruction set, edges of the tiles, and what the suites for
all backends (test_linear_backends.py) do not ask of one. Results are held against float64 PyTorch:
autograd for the gradients, ``torch.optim`` for the updates, nothing of this package."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

_cpu = pytest.importorskip("fused_dni.backends._cpu")

from fused_dni.backends.cpu import CpuBackend  # noqa: E402
from fused_dni.ops import registry  # noqa: E402
from fused_dni.ops.types import (  # noqa: E402
    ACTIVATIONS,
    SKIPPED,
    STATISTICS_SIZE,
    STEP,
    LinearConfig,
    LinearTensors,
    Prediction,
    SynthesizerTensors,
)
from fused_dni.rules import SGD, Adam, AdamW, Rule, RuleState  # noqa: E402

BACKEND = CpuBackend()
ISAS = _cpu.isas()

PHI = {
    "identity": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "mish": F.mish,
}
RULES: dict[str, Rule] = {
    "sgd": SGD(0.1, weight_decay=0.01),
    "momentum": SGD(0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": SGD(0.1, momentum=0.9, nesterov=True),
    # eps well above rounding: the step is a smooth function of the gradient
    "adam": Adam(0.05, eps=1e-3, weight_decay=0.01),
    "adamw": AdamW(0.05, eps=1e-3),
}


@pytest.fixture(autouse=True)
def _widest_again() -> Iterator[None]:
    yield
    _cpu.set_isa(ISAS[-1])


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    _cpu.set_isa(request.param)
    return request.param


def optimizer(rule: Rule, parameters: list[Tensor]) -> torch.optim.Optimizer:
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[rule.kind](parameters, **rule.defaults())


class Problem:
    """A layer and its low-rank, label-conditioned synthesizer; float64 masters of everything."""

    def __init__(self, shape: tuple[int, int, int], norm: str | None, activation: str) -> None:
        n, i, o = shape
        g = torch.Generator().manual_seed(n * 10007 + i * 101 + o)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, dtype=torch.float64)

        self.config = LinearConfig(norm, activation)
        self.x, self.grad_h = randn(n, i), randn(n, o) / n
        self.label = torch.randint(0, 5, (n,), generator=g)
        self.layer = [randn(o, i) / i**0.5, randn(o)]
        self.layer += [randn(o) + 2, randn(o)] if norm else []
        self.running = [randn(o), randn(o).abs() + 0.5] if norm == "batch" else []
        self.synthesizer = [randn(o, 3), randn(3, o) / o**0.5, randn(o, 5), randn(o)]

    def tensors(self, dtype: torch.dtype) -> tuple[LinearTensors, SynthesizerTensors]:
        def own(tensors: list[Tensor]) -> list[Any]:
            return [torch.nn.Parameter(t.to(dtype, copy=True)) for t in tensors]

        layer = [*own(self.layer), *([] if len(self.layer) == 4 else [None, None])]
        running = [t.to(dtype, copy=True) for t in self.running]
        return LinearTensors(*layer, *running), SynthesizerTensors(
            "lowrank", *own(self.synthesizer)
        )

    def forward(self, p: list[Tensor], x: Tensor, running: list[Tensor]) -> Tensor:
        y = F.linear(x, p[0], p[1])
        if self.config.normalization == "batch":
            y = F.batch_norm(y, *running, p[2], p[3], True, 0.1, 1e-5)
        elif self.config.normalization == "layer":
            y = F.layer_norm(y, y.shape[1:], p[2], p[3], 1e-5)
        return PHI[self.config.activation](y)

    def predict(self, p: list[Tensor], h: Tensor) -> Tensor:
        return h @ p[1].t() @ p[0].t() + p[2].t()[self.label] + p[3]


def close(
    got: Tensor, exact: Tensor, reduction: int, name: str, step: tuple[Tensor, float] | None = None
) -> None:
    """Rounding errors of a chain of a few sums of ``reduction`` terms: each sum a random walk of
    that length, 6 standard deviations, of the tensor's own scale. Conditioning of the chain (norm,
    products with matrices of norm about 2) is within the factor of 20. ``step`` is the gradient
    behind an updated parameter and how much of the gradient's error the rule passes on."""
    assert got.shape == exact.shape
    scale = float(exact.abs().max())
    if step is not None:
        scale += step[1] * float(step[0].abs().max())
    eps = torch.finfo(got.dtype).eps
    error = float((got.double() - exact).abs().max())
    assert error <= 20 * 6 * eps * max(reduction, 16) ** 0.5 * scale + eps, (name, error, scale)


def run_step(
    shape: tuple[int, int, int],
    norm: str | None,
    activation: str,
    rule: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """A fused step and the synthesizer's update against autograd and torch.optim."""
    problem = Problem(shape, norm, activation)
    n = shape[0]
    kappa = float(n)
    depth = max(shape)

    # Exact: autograd through h with the synthetic gradient put in by hand.
    own = [p.clone().requires_grad_() for p in problem.layer]
    m = [p.clone().requires_grad_() for p in problem.synthesizer]
    x, running = problem.x.clone().requires_grad_(), [t.clone() for t in problem.running]
    h = problem.forward(own, x, running)
    scaled = problem.predict(m, h.detach())
    h.backward(scaled.detach() / kappa)
    if norm == "batch":
        own[1].grad = torch.zeros_like(own[1])  # exactly zero by contract
    optimizer(RULES[rule], own).step()
    target = kappa * problem.grad_h
    ((scaled - target).square().sum() / n).backward()
    optimizer(RULES[rule], m).step()

    layer, synthesizer = problem.tensors(dtype)
    state, other = RuleState(RULES[rule]), RuleState(RULES[rule])
    statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64)
    with torch.no_grad():
        step = BACKEND.linear_step_(
            problem.x.to(dtype), layer, problem.config, synthesizer, problem.label, kappa, 0.0,
            state.tensors(layer[:4]), True, True,
        )  # fmt: skip
        assert step.prediction is not None and step.dx is not None
        BACKEND.synthesizer_update_(
            step.h, step.prediction, problem.grad_h.to(dtype), synthesizer, problem.label, kappa,
            statistics, other.tensors(synthesizer.parameters()),
        )  # fmt: skip
    assert (state.steps, state.skipped, other.steps, other.skipped) == (1, 0, 1, 0)
    # Adam's step is lr g / (|g| + eps): steepest at zero.
    hyper = RULES[rule].defaults()
    passed = hyper["lr"] / hyper.get("eps", 1.0)
    close(step.h, h.detach(), depth, "h")
    assert x.grad is not None
    close(step.dx, x.grad, depth, "dx")
    close(step.prediction.scaled, scaled.detach(), depth, "scaled")
    assert step.prediction.reduced is not None
    close(step.prediction.reduced, h.detach() @ problem.synthesizer[1].t(), depth, "reduced")
    for name, got, exact in zip(LinearTensors._fields, layer[: len(own)], own, strict=False):
        assert got is not None and exact.grad is not None
        close(got.detach(), exact.detach(), depth, name, (exact.grad, passed))
    for got, exact in zip(layer[4:], running, strict=False):
        if got is not None:
            close(got, exact, depth, "running")
    for name, got, exact in zip(
        ["weight", "down", "context", "bias"], synthesizer.parameters(), m, strict=True
    ):
        assert isinstance(got, Tensor) and exact.grad is not None
        close(got.detach(), exact.detach(), depth, "synthesizer " + name, (exact.grad, passed))
    s, g = scaled.detach(), target
    sums = torch.stack([(s * g).sum(), (s * s).sum(), (g * g).sum(), (s - g).square().sum()])
    close(statistics[:4].to(dtype), sums, depth, "statistics")
    assert statistics[4] == n


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa: str, activation: str, dtype: torch.dtype) -> None:
    for norm in (None, "layer"):
        run_step((19, 33, 41), norm, activation, "momentum", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("norm", [None, "batch", "layer"])
def test_rules(isa: str, norm: str | None, rule: str, dtype: torch.dtype) -> None:
    run_step((40, 70, 45), norm, "tanh", rule, dtype)


# One, primes, around the widths of vectors, panels and strips, and beyond one block of a product's
# depth (128 rows with AVX-512, 384 with AVX2).
SIZES = st.sampled_from(
    (1, 2, 5, 7, 8, 15, 16, 17, 31, 40, 48, 63, 64, 65, 72, 96, 127, 130, 200, 257, 400)
)


@pytest.mark.parametrize("threads", [1, 2])
@given(
    shape=st.tuples(SIZES.filter(lambda n: n > 1), SIZES, SIZES),
    norm=st.sampled_from((None, "layer")),
    rule=st.sampled_from(tuple(RULES)),
)
def test_shapes(
    isa: str, threads: int, shape: tuple[int, int, int], norm: str | None, rule: str
) -> None:
    torch.set_num_threads(threads)
    if norm == "layer" and shape[2] < 5:
        norm = None  # the normalised values of few features are ill-conditioned
    run_step(shape, norm, "tanh", rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_weight_of_several_groups_of_rows(isa: str, dtype: torch.dtype) -> None:
    run_step((40, 700, 301), None, "tanh", "sgd", dtype)


@pytest.mark.parametrize("rows", [64, 200])
@pytest.mark.parametrize("wide", [False, True])
def test_same_input_same_bits(isa: str, rows: int, wide: bool) -> None:
    problem = Problem((rows, 96, 130), "batch", "gelu")
    dtype = torch.float64 if wide else torch.float32
    results = []
    for _ in range(3):
        layer, synthesizer = problem.tensors(dtype)
        rule = RuleState(RULES["adam"]).tensors(layer[:4])
        with torch.no_grad():
            step = BACKEND.linear_step_(
                problem.x.to(dtype), layer, problem.config, synthesizer, problem.label, 2.0, 0.1,
                rule, True, True,
            )  # fmt: skip
        results.append([step.h, step.dx, *layer])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is not None and b is not None and torch.equal(a, b)


@pytest.mark.parametrize("function", ACTIVATIONS)
def test_activations_are_good_to_a_few_units_in_the_last_place(isa: str, function: str) -> None:
    """Over the whole range, slopes too: both as a layer of one feature computes them."""
    y = torch.cat([torch.linspace(-30, 30, 20001), torch.logspace(-30, 4, 400)])
    y = torch.cat([y, -y])[:, None]
    layer = LinearTensors(torch.ones(1, 1))
    config = LinearConfig(None, function)
    h, saved = BACKEND.linear_forward(y, layer, config, True, True)
    slope = BACKEND.linear_backward(
        torch.ones_like(y), y, h, saved, layer, config, True, False, False
    ).delta
    exact_y = y.double().requires_grad_()
    exact = PHI[function](exact_y)
    (exact_slope,) = torch.autograd.grad(exact.sum(), exact_y)
    eps = torch.finfo(torch.float32).eps
    # Absolute in the scale of y where a function is y times something that cancels.
    assert ((h.double() - exact).abs() <= 8 * eps * (exact.abs() + y.double().abs())
            .clamp(min=2.0**-126)).all()  # fmt: skip
    assert ((slope.double() - exact_slope).abs() <= 16 * eps * (1 + exact_slope.abs())).all()


def test_not_a_number_stays_one(isa: str) -> None:
    x = torch.tensor([[torch.nan], [torch.inf], [1.0]])
    for function in ACTIVATIONS:
        h, _ = BACKEND.linear_forward(
            x, LinearTensors(torch.ones(1, 1)), LinearConfig(None, function), True, False
        )
        assert h[0].isnan().all() and not h[1:].isnan().any(), function


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_product_that_overflows_changes_nothing(isa: str, rule: str, dtype: torch.dtype) -> None:
    """Every factor of the weight's gradient is finite, one of its elements is not; and factors
    whose product just fits are applied."""
    big = torch.finfo(dtype).max ** 0.5
    for scale, fits in ((4.0, False), (0.1, True)):
        problem = Problem((24, 40, 33), None, "identity")
        layer, synthesizer = problem.tensors(dtype)
        state = RuleState(RULES[rule])
        rule_tensors = state.tensors(layer[:4])
        x = problem.x.to(dtype).zero_()
        x[3, 39] = big * scale
        with torch.no_grad():
            synthesizer.weight.zero_()
            assert synthesizer.context_weight is not None and synthesizer.bias is not None
            synthesizer.context_weight.zero_()
            synthesizer.bias.fill_(big)
            before = [t.clone() for t in layer if t is not None]
            BACKEND.linear_step_(
                x, layer, problem.config, synthesizer, problem.label, 1.0, 0.0, rule_tensors,
                True, True,
            )  # fmt: skip
        assert (state.steps, state.skipped) == ((1, 0) if fits else (0, 1))
        if fits and rule in ("adam", "adamw"):
            continue  # the square of such a gradient overflows: Adam's step is zero, as PyTorch's
        after = [t for t in layer if t is not None]
        assert all(torch.equal(a, b) != fits for a, b in zip(before, after, strict=True))


def test_class_indices_are_looked_at_first(isa: str) -> None:
    problem = Problem((24, 40, 33), "batch", "relu")
    layer, synthesizer = problem.tensors(torch.float32)
    rule = RuleState(RULES["sgd"]).tensors(layer[:4])
    before = [t.clone() for t in (*layer, rule.hyper) if t is not None]
    label = problem.label.clone()
    label[7] = 5
    with torch.no_grad(), pytest.raises(IndexError, match=r"5 .*\[0, 5\)"):
        BACKEND.linear_step_(
            problem.x.float(), layer, problem.config, synthesizer, label, 1.0, 0.0, rule, True, True
        )
    after = [t for t in (*layer, rule.hyper) if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_instruction_sets_by_name() -> None:
    assert ISAS[0] == "portable" and _cpu.isa() == ISAS[-1]
    for name in ISAS:
        _cpu.set_isa(name)
        assert _cpu.isa() == name
    with pytest.raises(ValueError, match="portable"):
        _cpu.set_isa("sse9")
    assert _cpu.isa() == ISAS[-1]


def test_more_threads_than_cores_and_callers() -> None:
    """Barriers among threads that have to wait for a core, in several calls at a time."""
    problem = Problem((33, 65, 70), "layer", "tanh")
    layer, _ = problem.tensors(torch.float32)
    exact, _ = BACKEND.linear_forward(problem.x.float(), layer, problem.config, True, False)
    failures: list[str] = []

    def work() -> None:
        torch.set_num_threads(5)
        for _ in range(20):
            h, _ = BACKEND.linear_forward(problem.x.float(), layer, problem.config, True, False)
            if not torch.allclose(h, exact, atol=1e-5):
                failures.append("wrong")

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


def test_one_thread_pool() -> None:
    """PyTorch's OpenMP and ours are one library: two pools on the same cores cost a factor."""
    code = """
import torch, fused_dni.backends._cpu
maps = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "iomp" in line}
assert len(maps) == 1, maps
torch.set_num_threads(3)
assert fused_dni.backends._cpu.max_threads() == 3
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/maps")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", ["dense", "lowrank", "diagonal"])
@pytest.mark.parametrize("classes", [3, 40])  # one-hot product and gather
def test_synthesizers(isa: str, kind: str, classes: int) -> None:
    n, o = 50, 37
    for context, dtype in itertools.product(
        (None, "label", "vector", "table"), (torch.float32, torch.float64)
    ):
        g = torch.Generator().manual_seed(1)

        def randn(*size: int, g: torch.Generator = g) -> Tensor:
            return torch.randn(*size, generator=g, dtype=torch.float64)

        h, grad_h = randn(n, o), randn(n, o) / n
        p: dict[str, Tensor] = {"weight": randn(o) if kind == "diagonal" else randn(o, o) / 6}
        if kind == "lowrank":
            p = {"weight": randn(o, 4), "down": randn(4, o) / 6}
        c = None
        table = randn(classes, o).bfloat16() if context == "table" else None
        if context:
            p["context_weight"] = randn(1)[0] if context == "table" else randn(o, classes)
            c = randn(n, classes)
            if context != "vector":
                c = torch.randint(classes, (n,), generator=g)
        p["bias"] = randn(o)
        exact = {k: t.clone().requires_grad_() for k, t in p.items()}
        s = h * exact["weight"] if kind == "diagonal" else None
        if s is None:
            s = (h @ exact["down"].t() if kind == "lowrank" else h) @ exact["weight"].t()
        s = s + exact["bias"]
        counted = torch.arange(n) % 5 > 0
        if table is not None and c is not None:
            c[~counted] = 99
            s = s - exact["context_weight"] * table.double()[c.where(counted, 0)]
            s = torch.where(counted[:, None], s * n / counted.sum(), 0.0)
        elif c is not None:
            wide = F.one_hot(c, classes).double() if context == "label" else c
            s = s + wide @ exact["context_weight"].t()
        ((s - 3.0 * grad_h).square().sum() / n).backward()

        mine = SynthesizerTensors(
            kind, **{k: t.to(dtype) for k, t in p.items()}, table=table, ignore_index=99
        )
        given_c = c.to(dtype) if c is not None and context == "vector" else c
        prediction = BACKEND.synthesizer_predict(h.to(dtype), mine, given_c)
        close(prediction.scaled, s.detach(), max(o, classes), "scaled")
        statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64)
        gradients = BACKEND.synthesizer_gradients(
            h.to(dtype), prediction, grad_h.to(dtype), mine, given_c, 3.0, statistics
        )
        names = ("weight", "down", "context_weight", "bias")
        for name, gradient in zip(names, gradients, strict=True):
            if name in exact:
                wanted = exact[name].grad
                assert gradient is not None and wanted is not None
                close(gradient, wanted, n, name)
            else:
                assert gradient is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("known", ["label", "vector"])
@pytest.mark.parametrize("classes", [1, 3, 16, 40])  # vectors that are filled, and that are not
def test_a_synthesizer_of_a_cross_entropy(
    isa: str, classes: int, known: str, dtype: torch.dtype
) -> None:
    n, o = 50, 37
    g = torch.Generator().manual_seed(classes)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    h, grad_h = randn(n, o), randn(n, o) / n
    p = [randn(o, classes), randn(classes, o) / 6, randn(classes), randn(o)]
    y = torch.randint(classes, (n,), generator=g) if known == "label" else randn(n, classes)
    weight, down, shift, bias = exact = [t.clone().requires_grad_() for t in p]
    probabilities = F.linear(h, down, shift).softmax(1)
    less = probabilities - (F.one_hot(y, classes) if known == "label" else y)
    s = F.linear(less, weight, bias)
    ((s - 3.0 * grad_h).square().sum() / n).backward()

    mine = SynthesizerTensors("cross_entropy", *[t.to(dtype) for t in p])
    given_y = y if known == "label" else y.to(dtype)
    prediction = BACKEND.synthesizer_predict(h.to(dtype), mine, given_y)
    close(prediction.scaled, s.detach(), max(o, classes), "scaled")
    assert prediction.reduced is not None
    scale = float((probabilities.max() + less.abs().max()).detach())  # what it is the difference of
    error = float((prediction.reduced.double() - less.detach()).abs().max())
    assert error <= 20 * 6 * torch.finfo(dtype).eps * o**0.5 * scale
    statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64)
    gradients = BACKEND.synthesizer_gradients(
        h.to(dtype), prediction, grad_h.to(dtype), mine, given_y, 3.0, statistics
    )
    for name, got, leaf in zip(("V", "U", "u", "c"), gradients, exact, strict=True):
        assert got is not None and leaf.grad is not None
        # Of a softmax of one class there is nothing to learn: what is subtracted gives the scale.
        close(got, leaf.grad, n, name, (p[0], 1.0))


@pytest.mark.parametrize("kind", ["lowrank", "cross_entropy"])
def test_a_prediction_that_does_not_say_what_its_weight_multiplied(kind: str) -> None:
    h, y, statistics = torch.randn(6, 5), torch.zeros(6, dtype=torch.int64), torch.zeros(5).double()
    context = torch.randn(3) if kind == "cross_entropy" else torch.randn(5, 3)
    synthesizer = SynthesizerTensors(kind, torch.randn(5, 3), torch.randn(3, 5), context)
    with pytest.raises(ValueError, match=r"prediction.reduced must be \[6, 3\], got none"):
        BACKEND.synthesizer_gradients(h, Prediction(h), h, synthesizer, y, 6.0, statistics)


def test_counters_of_a_skipped_step() -> None:
    problem = Problem((24, 40, 33), "batch", "relu")
    layer, synthesizer = problem.tensors(torch.float32)
    state = RuleState(RULES["sgd"])
    x = problem.x.float()
    x[0, 0] = torch.nan
    with torch.no_grad():
        BACKEND.linear_step_(
            x, layer, problem.config, synthesizer, problem.label, 1.0, 0.0,
            state.tensors(layer[:4]), False, False,
        )  # fmt: skip
    assert state.hyper[STEP] == 0 and state.hyper[SKIPPED] == 1


def test_a_tensor_without_memory_is_refused():
    """What no check in Python has seen: the address is looked at before it is read."""
    cpu = registry.get("cpu")
    weight, bias = torch.randn(4, 3), torch.randn(4)
    zeros = torch._efficientzerotensor((5, 3))
    with pytest.raises(ValueError, match="input is a tensor without memory"):
        cpu.linear_forward(zeros, LinearTensors(weight, bias), LinearConfig(), False, False)
    lost = LinearTensors(torch._efficientzerotensor((4, 3)), bias)
    with pytest.raises(ValueError, match="weight is a tensor without memory"):
        cpu.linear_forward(torch.randn(5, 3), lost, LinearConfig(), False, False)


@pytest.mark.parametrize("threads", [1, 4, 16])
@pytest.mark.parametrize("kind", [0, 1], ids=["momentum", "adam"])
def test_a_wide_input_of_an_lstm_is_updated_column_by_column(kind: int, threads: int) -> None:
    """However wide, by however many threads, in memory of its own: its columns are updated as they
    are alone."""
    rows, inputs, hidden = 8, 16_384, 8
    generator = torch.Generator().manual_seed(0)
    x, h, delta = (torch.randn(rows, n, generator=generator) for n in (inputs, hidden, 4 * hidden))

    def updated(columns: slice, threads: int) -> torch.Tensor:
        own = x[:, columns].contiguous()
        shapes = [(4 * hidden, own.shape[1]), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]
        parameters, first, second = ([torch.zeros(s) for s in shapes] for _ in range(3))
        hyper = torch.tensor([0.1, 0.9, 0.999, 1e-8, 0.0, 0.0, 0.0], dtype=torch.float64)
        moments = [t.data_ptr() for held in (first, second) for t in held]
        if kind == 0:
            moments[4:] = [0] * 4
        rule = (kind, False, hyper.data_ptr(), *moments, True, True, True, True)
        for _ in range(2):
            sizes = (hidden, threads, rows, own.shape[1])
            addresses = [t.data_ptr() for t in (own, h, delta)]
            _cpu.lstm_update(
                False, tuple(p.data_ptr() for p in parameters), rule, (*sizes, *addresses)
            )
        assert hyper[5] == 2
        return parameters[0]

    whole = updated(slice(None), threads)
    for begin in range(0, inputs, 4096):
        part = slice(begin, begin + 4096)
        assert torch.equal(whole[:, part], updated(part, 1))
