"""The reference's layer against autograd and ``torch.optim``, in float64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from strategies import (
    OPTIONS,
    REFERENCE,
    Case,
    bind,
    make_case,
    named,
    pairwise,
    run_step,
    slots,
)
from torch import Tensor

import fused_dni.backends.reference.linear as linear
import fused_dni.backends.reference.rules as rules
from fused_dni.ops.types import (
    ACTIVATIONS,
    SKIPPED,
    STATISTICS_SIZE,
    STEP,
    LinearConfig,
    LinearTensors,
    SynthesizerTensors,
)
from fused_dni.rules import SGD, Adam, AdamW, Rule, RuleState

SHAPE = (11, 7, 13, 3, 5)
PLAIN: dict[str, Any] = {
    "activation": "tanh",
    "rule": "adam",
    "normalization": None,
    "kind": "lowrank",
    "context": "label",
    "max_norm": 0.0,
    "bias": True,
    "affine": True,
    "synthesizer_bias": True,
    "need_dx": True,
    "frozen": None,
}
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


def close(a: Tensor | None, b: Tensor | None, what: str = "", tolerance: float = 1e-12) -> None:
    assert (a is None) == (b is None), what
    if a is not None and b is not None:
        torch.testing.assert_close(
            a.detach(), b.detach(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
        )


def torch_forward(x: Tensor, p: dict[str, Tensor], config: LinearConfig, training: bool) -> Tensor:
    """The layer in PyTorch's own operations; moves the running statistics in ``p``."""
    return torch_above(F.linear(x, p["weight"], p.get("bias")), p, config, training)


def torch_above(z: Tensor, p: dict[str, Tensor], config: LinearConfig, training: bool) -> Tensor:
    """What lies between z and h."""
    y = z
    scale, shift = p.get("norm_weight"), p.get("norm_bias")
    if config.normalization == "batch":
        y = F.batch_norm(
            y, p.get("running_mean"), p.get("running_var"), scale, shift,
            training or "running_mean" not in p, config.momentum, config.eps,
        )  # fmt: skip
    elif config.normalization == "layer":
        y = F.layer_norm(y, y.shape[1:], scale, shift, config.eps)
    return PHI[config.activation](y)


def torch_prediction(h: Tensor, case: Case, p: dict[str, Tensor]) -> Tensor:
    """M(h) in PyTorch's own operations."""
    weight = p["synthesizer.weight"]
    if case.kind == "dense":
        s = F.linear(h, weight)
    elif case.kind == "lowrank":
        s = F.linear(F.linear(h, p["synthesizer.down"]), weight)
    elif case.kind == "cross_entropy":
        logits = F.linear(h, p["synthesizer.down"], p["synthesizer.context_weight"])
        y = case.inputs["context"]
        y = y if y.is_floating_point() else F.one_hot(y, logits.shape[1])
        return F.linear(logits.softmax(1) - y, weight, p.get("synthesizer.bias"))
    else:
        s = h * weight
    context, table = case.inputs.get("context"), p.get("synthesizer.table")
    counted = torch.ones(h.shape[0], 1, dtype=torch.bool)
    if table is not None and context is not None:
        counted = context.ne(case.synthesizer().ignore_index).unsqueeze(1)
        rows = F.embedding(context.clamp(min=0), table.detach())
        s = s - p["synthesizer.context_weight"] * rows
    elif context is not None:
        c = p["synthesizer.context_weight"]
        if not context.is_floating_point():
            context = F.one_hot(context, c.shape[1]).to(h.dtype)
        s = s + F.linear(context, c)
    s = s + p["synthesizer.bias"] if "synthesizer.bias" in p else s
    return torch.where(counted, s * h.shape[0] / counted.sum(), 0.0)


def torch_optimizer(rule: Rule, parameters: list[Tensor]) -> torch.optim.Optimizer:
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    parameters = parameters or [torch.zeros(1, requires_grad=True)]  # all frozen
    return made[rule.kind](parameters, **rule.defaults())  # type: ignore[operator]


def twin_step(case: Case, steps: int) -> dict[str, Tensor]:
    """What :func:`strategies.run_step` does, by autograd and ``torch.optim``."""
    bind(case)
    p = case.parameters
    own = {k: t for k, t in p.items() if t.requires_grad and not k.startswith("synthesizer")}
    at_output = case.config.interface == "output"
    # With the interface at z scale and shift learn from what arrives, by a rule of their own.
    apart = {} if at_output else {k: t for k, t in own.items() if k.startswith("norm")}
    optimizer = torch_optimizer(case.rule, [t for k, t in own.items() if k not in apart])
    norm_optimizer = torch_optimizer(case.rule, list(apart.values()))
    regression = torch_optimizer(
        case.rule, [t for k, t in p.items() if k.startswith("synthesizer")]
    )
    out: dict[str, Tensor] = {}
    statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64)
    for t in range(steps):
        x = case.inputs["x"].clone().requires_grad_()
        z = F.linear(x, p["weight"], p.get("bias"))
        h = torch_above(z, p, case.config, True)
        scaled = torch_prediction(h.detach(), case, p)
        synthetic = scaled.detach() / case.target_scale
        if 0 < case.max_norm < synthetic.norm():
            synthetic = synthetic * case.max_norm / synthetic.norm()
        optimizer.zero_grad()
        arrived = case.inputs["grad_h"]
        if not at_output:
            arrived, *moves = torch.autograd.grad(
                h, [z, *apart.values()], arrived, retain_graph=True
            )
        (h if at_output else z).backward(synthetic)
        bias = p.get("bias")
        if case.config.normalization == "batch" and bias is not None and bias.grad is not None:
            if at_output:
                assert bias.grad.abs().max() < 1e-13  # noise, which the reference leaves out
            bias.grad.zero_()
        optimizer.step()
        if not at_output:
            for parameter, move in zip(apart.values(), moves, strict=True):
                parameter.grad = move
            norm_optimizer.step()
        target = case.target_scale * arrived
        regression.zero_grad()
        ((scaled - target) ** 2).sum().div(x.shape[0]).backward()
        s = scaled.detach()
        statistics += torch.stack(
            [(s * target).sum(), (s * s).sum(), (target * target).sum(),
             ((s - target) ** 2).sum(), torch.tensor(float(x.shape[0]), dtype=torch.float64)]
        )  # fmt: skip
        regression.step()
        out |= {f"{t}.h": h, f"{t}.scaled": scaled}
        if case.need_dx:
            assert x.grad is not None
            out[f"{t}.dx"] = x.grad
    out["statistics"] = statistics
    return out | {"after." + name: t for name, t in p.items()}


def check_against_twin(options: dict[str, Any], seed: int = 0) -> None:
    case = make_case(SHAPE, options, seed)
    steps = 1 if options["activation"] == "relu" else 2
    got = run_step(REFERENCE, case.to(torch.float64, torch.float64))
    for name, t in twin_step(case.to(torch.float64, torch.float64), steps).items():
        close(got[name], t, name, 2e-11)  # Adam's eps of 1e-3 magnifies rounding 50-fold


@pytest.mark.parametrize("options", pairwise(OPTIONS), ids=named)
def test_step_is_autograd_and_torch_optim(options: dict[str, Any]) -> None:
    check_against_twin(options)


def planted(target: Any, name: str, change: Any) -> Any:
    old = getattr(target, name)
    return mock.patch.object(target, name, lambda *a, **k: change(old(*a, **k)))


ERRORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "derivative": (
        lambda: planted(linear, "derivative_from_output", lambda d: d * (1 + 1e-9)),
        {},
    ),
    "product": (lambda: planted(linear, "weight_gradient", lambda d: d * (1 + 1e-9)), {}),
    "clip": (
        lambda: planted(linear, "synthetic_gradient", lambda s: s * (1 + 1e-9)),
        {"max_norm": 0.05},
    ),
    "rule": (
        lambda: planted(rules, "adam", lambda new: new._replace(second=new.second * 1.0001)),
        {"activation": "mish"},
    ),
    "running": (
        lambda: planted(linear, "normalize", lambda r: (r[0], r[1], r[2]._replace(rows=10))),
        {"normalization": "batch"},
    ),
    "batch taken for constant": (
        lambda: mock.patch.object(linear, "uses_batch_statistics", return_value=False),
        {"normalization": "batch"},
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_a_planted_error_is_caught(error: str) -> None:
    plant, options = ERRORS[error]
    check_against_twin({**PLAIN, **options})
    with plant(), pytest.raises(AssertionError):
        check_against_twin({**PLAIN, **options})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_is_autograd(activation: str, normalization: str | None, training: bool) -> None:
    options = {**PLAIN, "activation": activation, "normalization": normalization}
    case = make_case((12, 5, 9, 2, 3), options, seed=3)
    case.parameters["weight"] *= 4  # reach the flat parts too
    config, layer = case.config, case.layer()
    p = {k: t.clone().requires_grad_(t.is_floating_point()) for k, t in case.parameters.items()}
    for name in ("running_mean", "running_var"):
        if name in p:
            p[name] = p[name].detach()
    x, grad_h = case.inputs["x"], torch.randn(12, 9, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    h_torch = torch_forward(leaf, p, config, training)
    h, saved = REFERENCE.linear_forward(x, layer, config, training, True)
    close(h, h_torch, "h")
    g = REFERENCE.linear_backward(grad_h, x, h, saved, layer, config, training, True, True)
    h_torch.backward(grad_h)
    close(g.x, leaf.grad, "dx", 1e-11)
    for name in ("weight", "bias", "norm_weight", "norm_bias"):
        if name in p:
            close(getattr(g, name), p[name].grad, name, 1e-11)
    for name in ("running_mean", "running_var"):
        if name in p:
            close(getattr(layer, name), p[name], name)
    if normalization == "batch" and training:
        assert g.bias is not None and not g.bias.any()
    assert saved.normalized is not None or (
        normalization is None and activation in ("identity", "relu", "tanh", "sigmoid")
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_extremes(activation: str) -> None:
    """Far out, at zero, and where torch's softplus has a threshold."""
    y = torch.tensor([[-800, -40, -20.5, -1e-9, 0.0, 1e-9, 19.9, 20.5, 40, 800]]).double()
    leaf = y.clone().requires_grad_()
    h_torch = PHI[activation](leaf)
    h_torch.backward(torch.ones_like(y))
    eye = LinearTensors(torch.eye(10, dtype=torch.float64))
    config = LinearConfig(activation=activation)
    h, saved = REFERENCE.linear_forward(y, eye, config, True, True)
    g = REFERENCE.linear_backward(torch.ones_like(y), y, h, saved, eye, config, True, False, False)
    assert leaf.grad is not None
    close(h, h_torch, "h", 2.1e-9 if activation == "softplus" else 1e-12)
    close(g.delta, leaf.grad, "derivative", 2.1e-9 if activation == "softplus" else 1e-12)
    assert g.x is None and g.weight is None and g.bias is None


def test_batch_norm_without_running_statistics() -> None:
    """Then evaluation too uses the batch's, as in PyTorch."""
    case = make_case(SHAPE, {**PLAIN, "normalization": "batch"})
    del case.parameters["running_mean"], case.parameters["running_var"]
    x = case.inputs["x"]
    h, _ = REFERENCE.linear_forward(x, case.layer(), case.config, False, False)
    close(h, torch_forward(x, case.parameters, case.config, False))


def test_batch_norm_over_one_row_is_refused() -> None:
    case = make_case((1, 4, 4, 1, 2), {**PLAIN, "normalization": "batch"})
    with pytest.raises(ValueError, match="more than one row"):
        run_step(REFERENCE, case)


def test_hand_formula() -> None:
    """dz = s * relu'(z), dW = dz^T x, e = 2/B (s - g), dA = e^T h, dC = e^T onehot; plain SGD."""
    options = {**PLAIN, "activation": "relu", "kind": "dense", "rule": "sgd"}
    case = make_case(SHAPE, options, seed=5)
    case.target_scale = 1.0
    p = {k: t.clone() for k, t in case.parameters.items()}
    x, g, label = case.inputs["x"], case.inputs["grad_h"], case.inputs["context"]
    got = run_step(REFERENCE, case)
    lr = case.rule.defaults()["lr"]
    z = x @ p["weight"].T + p["bias"]
    h = z * (z > 0)
    onehot = torch.eye(5, dtype=torch.float64)[label]
    s = (
        h @ p["synthesizer.weight"].T
        + onehot @ p["synthesizer.context_weight"].T
        + p["synthesizer.bias"]
    )
    dz = s * (z > 0)
    e = 2 / len(x) * (s - g)
    close(got["0.h"], h, "h", 1e-14)
    close(got["0.dx"], dz @ p["weight"], "dx", 1e-14)
    for name, gradient in {
        "weight": dz.T @ x,
        "bias": dz.sum(0),
        "synthesizer.weight": e.T @ h,
        "synthesizer.context_weight": e.T @ onehot,
        "synthesizer.bias": e.sum(0),
    }.items():
        close(got["after." + name], p[name] - lr * gradient, name, 1e-14)


def step(case: Case, state: RuleState, **changes: Any) -> Any:
    given = {"context": case.inputs.get("context"), "x": case.inputs["x"], **changes}
    return REFERENCE.linear_step_(
        given["x"], case.layer(), case.config, case.synthesizer(), given["context"],
        case.target_scale, case.max_norm, state.tensors(slots(case.layer())), True, True,
    )  # fmt: skip


@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
def test_step_is_its_parts_composed(normalization: str | None) -> None:
    """Bit by bit: forward, predict, backward, update; dx from the weights before the update."""
    options = {**PLAIN, "normalization": normalization, "activation": "gelu"}
    whole, parts = make_case(SHAPE, options), make_case(SHAPE, options)
    fused, before = step(whole, bind(whole)[0]), parts.parameters["weight"].clone()
    state, layer, x = bind(parts)[0], parts.layer(), parts.inputs["x"]
    h, saved = REFERENCE.linear_forward(x, layer, parts.config, True, True)
    prediction = REFERENCE.synthesizer_predict(h, parts.synthesizer(), parts.inputs["context"])
    synthetic = prediction.scaled / parts.target_scale
    g = REFERENCE.linear_backward(synthetic, x, h, saved, layer, parts.config, True, True, False)
    REFERENCE.linear_update_(x, g, layer, state.tensors(slots(layer)))
    assert torch.equal(fused.h, h)
    assert torch.equal(fused.prediction.scaled, prediction.scaled)
    assert torch.equal(fused.dx, g.x)
    assert torch.equal(fused.dx, g.delta @ before)
    assert not torch.allclose(fused.dx, g.delta @ layer.weight.detach())
    for name, t in parts.parameters.items():
        assert torch.equal(whole.parameters[name], t), name


def test_the_gradient_of_the_weight_is_formed_where_it_is_applied() -> None:
    """``gradients.weight`` is not read."""
    a, b = make_case(SHAPE, PLAIN), make_case(SHAPE, PLAIN)
    for case, lie in ((a, False), (b, True)):
        state = bind(case)[0]
        x, layer = case.inputs["x"], case.layer()
        h, saved = REFERENCE.linear_forward(x, layer, case.config, True, True)
        g = REFERENCE.linear_backward(
            case.inputs["grad_h"], x, h, saved, layer, case.config, True, False, True
        )
        assert g.weight is not None
        if lie:
            g = g._replace(weight=torch.full_like(g.weight, torch.nan))
        REFERENCE.linear_update_(x, g, layer, state.tensors(slots(layer)))
    assert torch.equal(a.parameters["weight"], b.parameters["weight"])


@pytest.mark.parametrize("max_norm", [1e-3, 0.0, 1e6])
def test_clipping(max_norm: float) -> None:
    """The synthetic gradient's Frobenius norm is max_norm where that is positive and exceeded."""
    case = make_case(SHAPE, {**PLAIN, "activation": "identity", "rule": "sgd"})
    case.max_norm = max_norm
    weight, bias = case.parameters["weight"].clone(), case.parameters["bias"].clone()
    result = step(case, bind(case)[0])
    synthetic = result.prediction.scaled / case.target_scale
    assert synthetic.norm() > 1e-3
    if max_norm == 1e-3:
        synthetic = synthetic * 1e-3 / synthetic.norm()
    close(case.parameters["weight"], weight - 0.5 * synthetic.T @ case.inputs["x"])
    close(case.parameters["bias"], bias - 0.5 * synthetic.sum(0))
    close(result.dx, synthetic @ weight)


def test_clipping_does_not_overflow() -> None:
    """Finite elements whose float32 norm is infinite are clipped, not lost."""
    scaled = torch.full((4, 4), 1e30)
    clipped = linear.synthetic_gradient(linear.synthesizer_predict(
        scaled, SynthesizerTensors("diagonal", torch.ones(4)), None), 1.0, 1.0)  # fmt: skip
    close(clipped, torch.full((4, 4), 0.25), tolerance=1e-6)


def snapshot(case: Case, state: RuleState) -> dict[str, Tensor]:
    tensors = dict(case.parameters) | {"hyper": state.hyper}
    for order, moments in enumerate(state.moments()):
        tensors |= {f"{order}.{i}": m for i, m in enumerate(moments) if m is not None}
    return {k: t.detach().clone() for k, t in tensors.items()}


@pytest.mark.parametrize("where", ["x", "synthesizer.weight", "synthesizer.bias", "grad"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
def test_a_gradient_that_is_not_finite_is_counted_and_skipped(
    where: str, value: float, normalization: str | None
) -> None:
    """Not even the running statistics move."""
    options = {**PLAIN, "normalization": normalization, "activation": "silu"}
    case = make_case(SHAPE, options)
    state, _ = bind(case)
    step(case, state)
    if where == "x":
        case.inputs["x"][2, 1] = value
    elif where != "grad":
        with torch.no_grad():
            case.parameters[where][0] = value
    before = snapshot(case, state)
    if where == "grad":
        layer, x = case.layer(), case.inputs["x"]
        h, saved = REFERENCE.linear_forward(x, layer, case.config, False, True)
        grad_h = case.inputs["grad_h"].clone()
        grad_h[3, 2] = value
        g = REFERENCE.linear_backward(grad_h, x, h, saved, layer, case.config, True, False, False)
        REFERENCE.linear_update_(x, g, layer, state.tensors(slots(layer)))
    else:
        step(case, state)
    before["hyper"][SKIPPED] += 1
    after = snapshot(case, state)
    assert before["hyper"][STEP] == 1
    for name, t in before.items():
        assert torch.equal(after[name].nan_to_num(), t.nan_to_num()), name


@pytest.mark.parametrize("label", [-1, 5, 2**40])
def test_a_label_out_of_range_changes_nothing(label: int) -> None:
    case = make_case(SHAPE, {**PLAIN, "normalization": "batch"})
    state, _ = bind(case)
    step(case, state)
    before = snapshot(case, state)
    context = case.inputs["context"].clone()
    context[4] = label
    with pytest.raises(IndexError, match=f"label {label} is out of range.*context_features=5"):
        step(case, state, context=context)
    for name, t in snapshot(case, state).items():
        assert torch.equal(before[name], t), name


def test_context_missing_or_unexpected() -> None:
    case = make_case(SHAPE, PLAIN)
    with pytest.raises(ValueError, match="takes a context, got none"):
        step(case, bind(case)[0], context=None)
    case = make_case(SHAPE, {**PLAIN, "context": None})
    with pytest.raises(ValueError, match="takes no context"):
        step(case, bind(case)[0], context=torch.zeros(11, dtype=torch.int64))


@pytest.mark.parametrize("rule", [SGD(0.1, momentum=0.9), Adam(), AdamW()], ids=lambda r: r.kind)
def test_versions_move_and_frozen_slots_do_not(rule: Rule) -> None:
    case = make_case(SHAPE, {**PLAIN, "normalization": "batch", "frozen": "weight"})
    case.rule = rule
    state, _ = bind(case)
    versions = {k: t._version for k, t in case.parameters.items()}
    weight = case.parameters["weight"].clone()
    step(case, state)
    step(case, state)
    assert torch.equal(case.parameters["weight"], weight)
    for name, t in case.parameters.items():
        moved = t._version > versions[name]
        assert moved == (name != "weight" and not name.startswith("synthesizer")), name
    assert state.steps == 2 and state.skipped == 0


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
def test_low_precision_inputs_over_float32_masters(
    half: torch.dtype, normalization: str | None
) -> None:
    """h and dx in x's dtype, the rest in float32, and near the float64 result."""
    options = {**PLAIN, "normalization": normalization, "rule": "sgd"}
    case = make_case((64, 32, 24, 4, 5), options, 0, half, torch.float32)
    wide = case.to(torch.float64, torch.float64)
    before = case.parameters["weight"].clone()
    result, exact = step(case, bind(case)[0]), step(wide, bind(wide)[0])
    assert result.h.dtype == result.dx.dtype == half
    assert result.prediction.scaled.dtype == result.prediction.reduced.dtype == torch.float32
    for t in case.parameters.values():
        assert t.dtype == torch.float32
    eps = torch.finfo(half).eps
    for a, b in ((result.h, exact.h), (result.dx, exact.dx),
                 (result.prediction.scaled, exact.prediction.scaled),
                 (case.parameters["weight"] - before,
                  wide.parameters["weight"] - before)):  # fmt: skip
        assert (a.double() - b).norm() < 8 * eps * b.norm()
        assert (a.double() - b).norm() > 0


def test_float16_gradients_do_not_underflow() -> None:
    """A mean over many rows makes gradients that float16 cannot hold; the update keeps them."""
    case = make_case((8, 16, 8, 4, 5), {**PLAIN, "rule": "sgd"}, 0, torch.float16, torch.float32)
    case.target_scale = 1e9
    before = case.parameters["weight"].clone()
    state = bind(case)[0]
    state.group["lr"] = 1e9
    wide = case.to(torch.float64, torch.float64)
    wide_state = bind(wide)[0]
    wide_state.group["lr"] = 1e9
    step(case, state)
    step(wide, wide_state)
    change, exact = case.parameters["weight"] - before, wide.parameters["weight"] - before
    assert (change - exact).norm() < 8 * torch.finfo(torch.float16).eps * exact.norm()


def test_parameters_of_low_precision_serve_but_are_not_updated() -> None:
    case = make_case(SHAPE, PLAIN, 0, torch.bfloat16)
    h, saved = REFERENCE.linear_forward(case.inputs["x"], case.layer(), case.config, True, True)
    assert h.dtype == torch.bfloat16 and saved.normalized is None
    with pytest.raises(TypeError, match="float32 masters"):
        step(case, bind(case)[0])
