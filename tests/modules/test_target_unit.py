"""The unit in which synthesizers predict: training does not depend on the loss's scale."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from clusters import clusters
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from twins import close, disturb, double

import fused_dni as fd
from fused_dni.modules import target_unit
from fused_dni.synthesizers import TargetUnit

pytestmark = pytest.mark.usefixtures("one_thread")

# The rate of Adam, whose steps know no scale but for eps; of SGD on what knows none.
RATE = 1e-2


def of_layers(make: Callable[[int, int, dict[str, Any]], nn.Module]) -> Callable[..., nn.Module]:
    """A network of two of them and a head."""

    def model(**options: Any) -> nn.Module:
        return nn.Sequential(make(6, 8, options), make(8, 8, options), nn.Linear(8, 4))

    return model


def _linear(i: int, o: int, options: dict[str, Any]) -> nn.Module:
    return fd.FusedDNILinear(i, o, activation="relu", **options)


def _inside(i: int, o: int, options: dict[str, Any]) -> nn.Module:
    return fd.FusedDNILinear(
        i, o, normalization="layer", activation="tanh", interface="preactivation", **options
    )


def _segment(i: int, o: int, options: dict[str, Any]) -> nn.Module:
    synthesizer = fd.MLPSynthesizer(o, hidden=8)
    return fd.Decoupled(nn.Sequential(nn.Linear(i, o), nn.Tanh()), synthesizer, **options)


def _diagonal(i: int, o: int, options: dict[str, Any]) -> nn.Module:
    return fd.FusedDNILinear(i, o, synthesizer=fd.DiagonalSynthesizer(o), **options)


def _immediate(**options: Any) -> nn.Module:
    layers = [_linear(6, 8, options), nn.Linear(8, 8), _diagonal(8, 8, options), nn.Linear(8, 4)]
    return fd.DecoupledSequential(*layers)


MODELS = {
    "linear": of_layers(_linear),
    "preactivation": of_layers(_inside),
    "segment": of_layers(_segment),
    "diagonal": of_layers(_diagonal),
    "immediate": _immediate,
}


class Recurrent(nn.Module):
    """Windows of an LSTM or its cell, each continuing the last."""

    def __init__(self, cell: bool, **options: Any) -> None:
        super().__init__()
        kind = fd.FusedDNILSTMCell if cell else fd.FusedDNILSTM
        self.lstm = kind(6, 5, sg_scale=1.0, auxiliary=True, **options)
        self.head = nn.Linear(5, 4)
        self.state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """One window [T, B, 6]."""
        if isinstance(self.lstm, fd.FusedDNILSTM):
            out, self.state = self.lstm(x, self.state)
        else:
            steps = []
            for row in x:
                self.state = self.lstm(row, self.state)
                steps.append(self.state[0])
            out, self.state = torch.stack(steps), self.lstm.boundary(self.state)
        made: Tensor = self.head(out)
        return made


MODELS["window"] = lambda **options: Recurrent(False, **options)
MODELS["cell"] = lambda **options: Recurrent(True, **options)


def layers_of(model: nn.Module) -> list[Any]:
    """The decoupled layers."""
    return [m for m in model.modules() if getattr(m, "synthesizer", None) is not None]


def trained(name: str, scale: float, ruled: bool, steps: int = 20) -> nn.Module:
    """A model trained by SGD whose rate divides by the loss's scale, and whose synthesizers, where
    that has no scale any more, learn by one that does not."""
    torch.manual_seed(0)
    rates = {"update": fd.SGD(RATE / scale, 0.5), "synthesizer_update": fd.SGD(RATE, 0.5)}
    model = MODELS[name](**(rates if ruled else {}))
    heads = [
        p
        for layer in layers_of(model)
        for m in (layer.synthesizer, getattr(layer, "auxiliary_head", None))
        if m is not None
        for p in m.parameters()
    ]
    mine = {id(p) for layer in layers_of(model) for p in layer.parameters()} if ruled else set()
    of_heads = {id(p) for p in heads}
    others = [p for p in model.parameters() if id(p) not in mine | of_heads]
    optimizers = [torch.optim.SGD(others, RATE / scale, 0.5)]
    if not ruled:
        optimizers.append(torch.optim.SGD(heads, RATE, 0.5))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        shape = (3, 7) if "Recurrent" in type(model).__name__ else (7,)
        x = torch.randn(*shape, 6, generator=generator)
        y = torch.randint(4, shape, generator=generator).flatten()
        for optimizer in optimizers:
            optimizer.zero_grad()
        (F.cross_entropy(model(x).flatten(0, -2), y) * scale).backward()
        for optimizer in optimizers:
            optimizer.step()
    return model


@pytest.mark.parametrize("ruled", [True, False], ids=["fused", "returned"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("power", [-20, 17])
def test_a_power_of_two_in_the_loss_changes_no_bit(name: str, power: int, ruled: bool) -> None:
    plain, scaled = trained(name, 1.0, ruled), trained(name, 2.0**power, ruled)
    for (key, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert torch.equal(a, b), key
    for a, b in zip(layers_of(plain), layers_of(scaled), strict=True):
        assert a.synthesizer.unit.lessons == b.synthesizer.unit.lessons >= 16
        assert b.unit == a.unit * 2.0**power
        assert any(p.abs().max() > 0 for p in a.synthesizer.last_layer())
        if isinstance(a, (fd.FusedDNILSTM, fd.FusedDNILSTMCell)):
            assert torch.equal(a.auxiliary_statistics, b.auxiliary_statistics)
        assert torch.equal(a.statistics, b.statistics)


def accuracy_of(scale: float, seed: int, decoupled: bool) -> float:
    """Of a small network after some epochs of Adam, on clusters."""
    torch.manual_seed(seed)
    found = clusters(512, 1000)
    if decoupled:
        options: dict[str, Any] = {"normalization": "batch", "activation": "relu"}
        options |= {"context_features": 10, "update": fd.Adam(3e-3)}
        hidden: list[nn.Module] = [fd.FusedDNILinear(i, 32, **options) for i in (10, 32)]
    else:
        hidden = [nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU()]
        hidden += [nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(32, 10))
    own = model[-1] if decoupled else model
    optimizer = torch.optim.Adam(own.parameters(), 3e-3)
    for _ in range(12):
        for rows in torch.randperm(512).split(32):
            x, y = found.train.images[rows], found.train.labels[rows]
            optimizer.zero_grad()
            with fd.condition_on(y):
                loss = F.cross_entropy(model(x), y)
            (loss * scale).backward()
            optimizer.step()
    model.eval()
    right = model(found.test.images).argmax(1) == found.test.labels
    return float(right.float().mean())


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "stock"])
def test_ten_orders_of_magnitude_end_within_a_point(decoupled: bool) -> None:
    means = [
        sum(accuracy_of(scale, seed, decoupled) for seed in range(3)) / 3
        for scale in (1e-5, 1.0, 1e5)
    ]
    assert min(means) > 0.9 and max(means) - min(means) <= 0.01, means


# ---------------------------------------------------------------------------------------------
# The unit


def lesson(layer: fd.FusedDNILinear, size: float, rows: int = 6) -> None:
    """One training step whose target has rows of about this norm."""
    x = double(rows, layer.in_features)
    h = layer(x)
    arrived = torch.randn_like(h)
    (h * (arrived * (size / rows / layer.out_features**0.5))).sum().backward()


def layer_of(**options: Any) -> fd.FusedDNILinear:
    return fd.FusedDNILinear(4, 5, dtype=torch.float64, **options)


@pytest.mark.parametrize("size", [1e-9, 0.01, 1.0, 3e7])
@pytest.mark.parametrize("rule", [None, fd.Adam(0.01)], ids=["returned", "fused"])
def test_the_first_lesson_gives_it(size: float, rule: fd.Rule | None) -> None:
    layer = layer_of(update=rule)
    assert layer.unit == 1.0
    lesson(layer, 0.0)
    assert layer.synthesizer.unit == TargetUnit(1.0, 0)  # nothing was there to learn
    lesson(layer, size)
    assert 0.6 < size / layer.unit / target_unit.MOVED_TO < 1.6
    assert layer.unit.hex().startswith("0x1.0000000000000p")
    found = fd.diagnostics(nn.Sequential(layer))["0"]
    assert found["target_unit"] == layer.unit
    assert found["synthesizer_loss"] == pytest.approx(size**2, rel=1.0)


@pytest.mark.parametrize(
    "synthesizer",
    [
        fd.LinearSynthesizer(5),
        fd.LinearSynthesizer(5, rank=2),
        fd.DiagonalSynthesizer(5),
        fd.MLPSynthesizer(5, hidden=3),
    ],
    ids=["dense", "lowrank", "diagonal", "mlp"],
)
@pytest.mark.parametrize("rule", [None, fd.SGD(0.1, momentum=0.9), fd.Adam(0.1)], ids=str)
@pytest.mark.parametrize("factor", [2.0**-7, 2.0**9])
def test_a_move_changes_no_prediction(
    synthesizer: fd.Synthesizer, rule: fd.Rule | None, factor: float
) -> None:
    layer = layer_of(synthesizer=copy.deepcopy(synthesizer).double(), update=rule)
    for _ in range(3):
        lesson(layer, 1.0)
    twin = copy.deepcopy(layer)
    for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
        b.grad = None if a.grad is None else a.grad.clone()
    layer.rescale(layer.synthesizer, factor)
    h = double(3, 5)
    assert torch.equal(layer.synthesizer(h), twin.synthesizer(h) * factor)
    assert torch.equal(layer.statistics[:4], twin.statistics[:4] * factor**2)
    assert layer.statistics[4] == twin.statistics[4] == 18
    # What has been summed up is what lessons in the other unit would have come to.
    last = {id(p) for p in layer.synthesizer.last_layer()}
    for a, b in zip(layer.synthesizer.parameters(), twin.synthesizer.parameters(), strict=True):
        of = factor if id(a) in last else factor**2
        if rule is None:
            assert a.grad is not None and b.grad is not None
            assert torch.equal(a.grad, b.grad * of)
    if rule is not None:
        slots = layer.synthesizer_parameters()
        for order, (mine, other) in enumerate(
            zip(layer.synthesizer_update.moments(), twin.synthesizer_update.moments(), strict=True)
        ):
            for p, a, b in zip(slots, mine, other, strict=True):
                assert (a is None) == (b is None)
                of = 1.0 if p is None else factor if id(p) in last else factor**2
                assert a is None or torch.equal(a, b * of ** (order + 1))


def test_it_follows_later_lessons() -> None:
    layer = layer_of(update=fd.Adam(1e-9))
    lesson(layer, 1.0)
    first = layer.unit
    for n in range(2, 7):
        lesson(layer, 100.0)
        assert layer.unit == first, n
    lesson(layer, 100.0)
    lesson(layer, 100.0)
    assert layer.synthesizer.unit.lessons == 8 and layer.unit > 60 * first
    high = layer.unit
    for _ in range(8):
        lesson(layer, 50.0)  # within what it may be
    assert layer.unit == high
    for _ in range(16):
        lesson(layer, 1e-3)
    assert layer.unit < 1e-4 * high


def test_it_stays_above_predictions() -> None:
    """A synthesizer that predicts far too much comes down in its unit; were that to shrink to the
    targets', its parameters would grow with it and never come down."""
    layer = layer_of(update=fd.SGD(0.0))
    disturb(layer.synthesizer, 1.0)
    for _ in range(64):
        lesson(layer, 1e-6)
    assert 0.5 <= layer.unit <= 64.0


def test_what_has_learned_elsewhere_is_left_alone_at_first() -> None:
    layer = layer_of(update=fd.SGD(0.0))
    disturb(layer.synthesizer, 1.0)
    for _ in range(7):
        lesson(layer, 1e3)
        assert layer.unit == 1.0
    lesson(layer, 1e3)
    assert layer.unit > 500.0


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_moves_nothing(value: float) -> None:
    layer = layer_of(update=fd.Adam(0.01))
    lesson(layer, 1.0)
    before = layer.unit
    layer.synthesizer.unit.lessons = 7
    lesson(layer, value)
    assert layer.unit == before and layer.synthesizer_update.skipped == 1


def test_an_explicit_target_scale_turns_it_off() -> None:
    layer = layer_of(update=fd.Adam(0.01), target_scale=6.0)
    for _ in range(20):
        lesson(layer, 1e6)
    assert layer.synthesizer.unit == TargetUnit(1.0, 0)


def test_a_prediction_from_before_a_move_is_learned_from_after_it() -> None:
    """Two forwards, then their backwards; the first moves the unit."""
    layer = layer_of(update=fd.SGD(0.0), synthesizer_update=fd.SGD(0.0))
    disturb(layer.synthesizer, 1.0)
    layer.synthesizer.unit.lessons = 7
    twin = copy.deepcopy(layer)
    twin.target_scale = 6.0
    xs, arrived = (double(6, 4), double(6, 4)), (double(6, 5), double(6, 5))
    for module in (layer, twin):
        made = [module(x) for x in xs]
        for h, g in zip(made, arrived, strict=True):
            h.backward(100 * g)
    assert layer.unit > 100.0 and twin.unit == 1.0
    seen = layer.statistics * torch.tensor([layer.unit**2] * 4 + [1.0], dtype=torch.float64)
    close(seen, twin.statistics, 1e-12)


# ---------------------------------------------------------------------------------------------
# Its state


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("name", ["linear", "window"])
def test_training_goes_on_with_the_same_bits(name: str, way: str) -> None:
    def made() -> tuple[nn.Module, fd.FusedOptimizer]:
        torch.manual_seed(0)
        model = MODELS[name](update=fd.Adam(RATE))
        return model, fd.FusedOptimizer(model)

    def train(model: nn.Module, optimizer: fd.FusedOptimizer, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            shape = (3, 7, 6) if name == "window" else (7, 6)
            loss = model(torch.randn(*shape, generator=generator)).square().mean()
            optimizer.zero_grad()
            (loss * 10.0 ** (step // 4)).backward()
            optimizer.step()

    model, optimizer = made()
    train(model, optimizer, range(7))
    if way == "state_dict":
        again, resumed = made()
        again.load_state_dict(copy.deepcopy(model.state_dict()))
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if name == "window":
            again.state = again.lstm.remember(tuple(t.detach().clone() for t in model.state))
    elif way == "pickle":
        if name == "window":
            model.state = None
        again, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        if name == "window":
            model.state = None
        again, resumed = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(7, 20))
    train(again, resumed, range(7, 20))
    for a, b in zip(layers_of(model), layers_of(again), strict=True):
        assert a.synthesizer.unit == b.synthesizer.unit and a.unit != 1.0
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_dict_without_units_loads() -> None:
    layer = layer_of(update=fd.Adam(0.01))
    lesson(layer, 1e4)
    state = layer.state_dict()
    del state["synthesizer._extra_state"]
    state._metadata["synthesizer"]["version"] = 1  # as there were none
    other = layer_of()
    lesson(other, 1e-4)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert other.synthesizer.unit == TargetUnit(1.0, 0) and len(state) == 5


def test_a_unit_that_was_left_out_of_a_state_dict_is_a_missing_key() -> None:
    layer = layer_of(update=fd.Adam(0.01))
    lesson(layer, 1e4)
    state = {k: v for k, v in layer.state_dict().items() if "extra_state" not in k}
    with pytest.raises(RuntimeError, match=r'Missing key.*"synthesizer._extra_state"'):
        layer_of().load_state_dict(state)
    other = layer_of()
    lesson(other, 1e-4)
    told = other.load_state_dict(state, strict=False)
    assert told.missing_keys == ["synthesizer._extra_state"] and not told.unexpected_keys
    assert other.synthesizer.unit == TargetUnit(1.0, 0)  # as what was loaded is taken to be in


def test_a_synthesizer_pickled_without_a_unit_loads() -> None:
    synthesizer = fd.LinearSynthesizer(3)
    del synthesizer.unit
    assert pickle.loads(pickle.dumps(synthesizer)).unit == TargetUnit(1.0, 0)


@pytest.mark.parametrize("name", ["linear", "segment", "window", "cell"])
def test_reset_parameters_forgets_it(name: str) -> None:
    model = trained(name, 2.0**20, True)
    for layer in layers_of(model):
        assert layer.unit > 100.0
        layer.reset_parameters()
        assert layer.synthesizer.unit == TargetUnit(1.0, 0)


# ---------------------------------------------------------------------------------------------
# Where it cannot follow


class Own(nn.Module):
    """A synthesizer of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 5).double()

    def forward(self, h: Tensor, context: Tensor | None) -> Tensor:
        made: Tensor = self.last(h)
        return made


def test_a_synthesizer_of_ones_own_sees_kappa_times_the_gradient() -> None:
    layer = layer_of(synthesizer=Own())
    for _ in range(9):
        lesson(layer, 1e4)
    assert layer.unit == 1.0 and layer.statistics[4] == 54


def test_a_parametrized_synthesizer_stays_in_its_unit_and_says_so() -> None:
    layer = layer_of()
    nn.utils.parametrize.register_parametrization(layer.synthesizer, "weight", nn.Identity())
    with pytest.warns(UserWarning, match="target_scale=.* its last layer is not known|not known"):
        lesson(layer, 1e4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lesson(layer, 1e4)  # said once
    assert layer.unit == 1.0


@pytest.mark.filterwarnings("ignore")
def test_compiled_code_keeps_it() -> None:
    layer = layer_of()
    lesson(layer, 1e5)
    layer.zero_grad()
    unit = copy.copy(layer.synthesizer.unit)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, g = double(6, 4), double(6, 5)
    for module in (compiled, twin):
        module(x).backward(1e4 * g)
    close(
        {n: p.grad for n, p in layer.named_parameters()},
        {n: p.grad for n, p in twin.named_parameters()},
        1e-12,
    )
    assert layer.synthesizer.unit == unit != twin.synthesizer.unit


def _replica(rank: int, file: str, out: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(layer_of(), nn.Linear(5, 2).double())
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), 1e-20)
        found = []
        for step in range(20):
            torch.manual_seed(step)
            optimizer.zero_grad()
            # The second sees gradients a thousand times as large.
            (parallel(double(6, 4)).square().mean() * 1e3**rank * 9.0**step).backward()
            optimizer.step()
            found.append(model[0].unit)
        sharded = nn.Sequential(layer_of(), nn.Linear(5, 2).double())
        for part in sharded:
            fully_shard(part)
        fully_shard(sharded)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                (sharded(double(6, 4)).square().mean() * 1e6).backward()
        told = [str(w.message) for w in said if "targets of a synthesizer" in str(w.message)]
        torch.save((found, model.state_dict(), told, sharded[0].unit), f"{out}.{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What two processes found: units by step, the state, what was said when sharded, the unit."""
    folder = tmp_path_factory.mktemp("gloo")
    ranks.replicas(_replica, folder / "init", folder / "out")
    return [torch.load(f"{folder / 'out'}.{rank}") for rank in range(2)]


def test_replicas_have_one_unit(replicas: list[Any]) -> None:
    (units, state, *_), (others, other, *_) = replicas
    assert units == others and len(set(units)) > 2
    for key, value in state.items():
        assert torch.equal(value, other[key]), key


def test_sharded_it_stays_and_says_so(replicas: list[Any]) -> None:
    for _, _, said, unit in replicas:
        assert len(said) == 1 and "fully_shard" in said[0] and "target_scale=" in said[0]
        assert unit == 1.0
