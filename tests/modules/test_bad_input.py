"""Bad input: a clear error that names the argument, and nothing changed by it.

Contexts have their tests in ``test_context.py``, optimizer states in ``test_optimizer.py``,
arguments of synthesizers and schedules beside what they belong to.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import twins
from torch import nn
from twins import BACKENDS, close, double, kept, linear, present

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")
backends = pytest.mark.parametrize("backend", BACKENDS)
KINDS = {
    "returned": {},
    "fused": {"update": fd.Adam(0.1)},
    "exact": {"synthesizer": None},
    "exact rule": {"synthesizer": None, "update": fd.Adam(0.1)},
    "mlp": {"synthesizer": "mlp"},
    "mlp rule": {"synthesizer": "mlp", "update": fd.Adam(0.1)},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def layer_of(kind, backend, normalization="batch", **more):
    options = {**KINDS[kind], **more}
    if options.get("synthesizer") == "mlp":
        options["synthesizer"] = fd.MLPSynthesizer(5, 4, dtype=torch.float64)
    layer = linear(4, 5, normalization=normalization, backend=backend, **options)
    layer(double(6, 4)).sum().backward()  # there is state to be kept
    return layer


INPUTS = {
    "width": (double(6, 3), RuntimeError, r"input must have shape \[..., 4\] .*got \[6, 3\]"),
    "scalar": (torch.tensor(1.0), RuntimeError, r"input must have shape \[..., 4\]"),
    "dtype": (torch.randn(6, 4), RuntimeError, "input has dtype torch.float32, the weight"),
    "integers": (torch.ones(6, 4, dtype=torch.int64), RuntimeError, "input has dtype torch.int64"),
    "device": (torch.randn(6, 4, device="meta"), RuntimeError, "input is on meta, the weight on"),
    "list": ([[1.0] * 4] * 6, TypeError, "input must be a torch.Tensor, got list"),
    "empty": (double(0, 4), RuntimeError, r"the batch is empty \(0 rows\)"),
    "one row": (double(1, 4), ValueError, "expected more than 1 row .*normalization='batch'"),
}


@backends
@kinds
@pytest.mark.parametrize("case", INPUTS)
def test_input(backend, kind, case):
    x, error, message = INPUTS[case]
    layer = layer_of(kind, backend)
    before = twins.snapshot(layer)
    with pytest.raises(error, match=message):
        layer(x)
    twins.unchanged(before, twins.snapshot(layer))


@backends
@pytest.mark.parametrize("normalization", [None, "layer"])
def test_one_row_is_enough_without_batch_statistics(backend, normalization):
    layer = layer_of("fused", backend, normalization)
    layer(double(1, 4)).sum().backward()
    batch = layer_of("fused", backend).eval()
    assert torch.isfinite(batch(double(1, 4))).all()


@backends
@pytest.mark.parametrize("normalization", twins.NORMALIZATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["fused", "mlp rule", "exact rule"])
def test_input_that_is_not_finite(backend, normalization, value, kind):
    """A counted skip with a rule: parameters and moments stay."""
    layer = layer_of(kind, backend, normalization, activation="tanh")
    before, steps = kept(layer.parameters()), layer.update.steps
    moments = twins._tensors(layer.update.moments())
    x = double(6, 4)
    x[2, 1] = value
    h = layer(x)
    if h.requires_grad:
        h.sum().backward()
    infinite = normalization is not None or math.isnan(value)
    if not infinite:  # tanh(inf) is finite, and its slope zero; the product with x is not
        assert torch.isfinite(h).all()
    assert layer.skipped_updates == 1 and layer.update.steps == steps
    for p, b, name in zip(layer.parameters(), before, dict(layer.named_parameters()), strict=True):
        if not name.startswith("synthesizer") or infinite:
            close(p, b, 0)
    assert twins.same(moments, twins._tensors(layer.update.moments()))
    if kind == "fused" and normalization == "batch":
        assert all(torch.isfinite(b).all() for b in layer.buffers())
    layer(double(6, 4)).sum().backward()  # and goes on
    assert layer.update.steps == steps + 1


@backends
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["fused", "mlp rule"])
def test_prediction_that_is_not_finite(backend, value, kind):
    layer = layer_of(kind, backend, None)
    bias = layer.synthesizer.bias if kind == "fused" else layer.synthesizer.layers[-1].bias
    with torch.no_grad():
        bias[0] = value
    before = twins.snapshot(layer)
    layer(double(6, 4))
    assert layer.skipped_updates == 1
    after = twins.snapshot(layer)
    # a synthesizer of one's own runs as it is: its running statistics are its affair
    changed = [n for n in twins.differences(before, after) if "synthesizer.layers.1" not in n]
    assert not changed


@backends
@pytest.mark.parametrize("kind", ["fused", "mlp rule", "exact rule"])
def test_arriving_gradient_that_is_not_finite(backend, kind):
    layer = layer_of(kind, backend, None)
    h = layer(double(6, 4))
    before = twins.snapshot(layer)
    h.backward(torch.full((6, 5), math.inf, dtype=torch.float64))
    twins.unchanged(before, twins.snapshot(layer))
    if kind == "exact rule":
        assert layer.skipped_updates == 1
    else:
        assert layer.synthesizer_update.skipped == 1


# ---------------------------------------------------------------------------------------------
# Tensors of the layer that do not fit together


def _norm(layer):
    layer.norm.float()


def _bias(layer):
    layer.bias.data = layer.bias.data.float()


def _synthesizer(layer):
    layer.synthesizer.float()


def _meta(layer):
    layer.norm.to_empty(device="meta")


@backends
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["returned", "fused", "exact", "exact rule"])
@pytest.mark.parametrize("damage", [_norm, _bias, _synthesizer, _meta])
def test_mixed_dtypes_and_devices(backend, kind, training, damage):
    """Raw pointers must never be read as what they are not."""
    layer = layer_of(kind, backend)
    if damage is _synthesizer and (layer.synthesizer is None or not training):
        return
    damage(layer)
    layer.train(training)
    with pytest.raises(RuntimeError, match="must be torch.float64 .* got"):
        layer(double(6, 4))


@backends
@pytest.mark.parametrize("kind", ["returned", "fused", "exact", "exact rule"])
def test_weights_that_are_not_contiguous(backend, kind):
    layer = layer_of(kind, backend, None)
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    before = twins.snapshot(layer)
    for training in (True, False):
        with pytest.raises(RuntimeError, match="weight must be contiguous"):
            layer.train(training)(double(6, 4))
    twins.unchanged(before, twins.snapshot(layer))


@pytest.mark.parametrize("kind", ["returned", "fused"])
def test_inputs_that_are_not_contiguous(kind):
    layer = layer_of(kind, None, None)
    twin = copy.deepcopy(layer)
    x = double(4, 6).t()
    a = layer(x)
    b = twin(x.contiguous())
    a.backward(torch.ones(1, 1, dtype=torch.float64).expand(6, 5))
    b.backward(torch.ones(6, 5, dtype=torch.float64))
    close(a, b, 0)
    close(kept(layer.parameters()), kept(twin.parameters()), 0)


def test_autocast_casts_neither_float64_nor_integers():
    """As nn.Linear under it."""
    wide, narrow = linear(4, 5), fd.FusedDNILinear(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(double(6, 4)).dtype == torch.float64
        for layer, x in (
            (wide, torch.randn(6, 4)),
            (narrow, double(6, 4)),
            (narrow, double(6, 4).long()),
        ):
            with pytest.raises(RuntimeError, match=f"input has dtype {x.dtype}, the weight"):
                layer(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor():
    x = torch.nested.nested_tensor([double(2, 4), double(3, 4)])
    with pytest.raises(RuntimeError, match="input must be a dense tensor, got a nested one"):
        linear(4, 5)(x)


def test_a_rule_needs_masters():
    layer = fd.FusedDNILinear(4, 5, update=fd.SGD(0.1), dtype=torch.bfloat16)
    before = kept(layer.parameters())
    with pytest.raises((TypeError, RuntimeError), match="float32"):
        layer(torch.randn(6, 4, dtype=torch.bfloat16))
    close(kept(layer.parameters()), before, 0)


# ---------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features must be at least 1, got 0"),
        ({"out_features": -3}, ValueError, "out_features must be at least 1, got -3"),
        ({"normalization": "group"}, ValueError, "normalization must be one of .*got 'group'"),
        ({"activation": "swish"}, ValueError, "activation must be one of .*got 'swish'"),
        ({"backend": "cuda13"}, ValueError, "backend must be None or one of .*got 'cuda13'"),
        ({"synthesizer": "linear"}, ValueError, "synthesizer must be 'default', None or a module"),
        ({"synthesizer": 3}, TypeError, r"synthesizer must be None or an nn\.Module .*got 3"),
        ({"synthesizer": fd.LinearSynthesizer(7)}, ValueError, "synthesizer has features=7"),
        ({"synthesizer": None, "context_features": 3}, ValueError, "context_features belongs to"),
        ({"context_features": -1}, ValueError, "context_features must be at least 0, got -1"),
        ({"update": torch.optim.SGD}, TypeError, "update must be None or a fused_dni rule"),
        ({"update": 0.1}, TypeError, "update must be None or a fused_dni rule .*got float"),
        ({"synthesizer_update": fd.SGD(0.1)}, ValueError, "synthesizer_update needs update"),
        ({"target_scale": 0.0}, ValueError, "target_scale must be None or positive and finite"),
        ({"target_scale": math.nan}, ValueError, "target_scale must be None or positive"),
        ({"max_norm": -1.0}, ValueError, "max_norm must be None or positive and finite"),
        ({"eps": -1e-5}, ValueError, "eps must be finite and at least 0"),
        ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\]"),
    ],
    ids=str,
)
def test_arguments_of_the_layer(arguments, error, message):
    with pytest.raises(error, match=message):
        fd.FusedDNILinear(**{"in_features": 4, "out_features": 5, **arguments})


def test_options_that_are_set_later():
    layer = layer_of("fused", None)
    layer.max_norm, layer.target_scale = 0.5, 3.0
    assert (
        (layer.max_norm, layer.target_scale)
        == (0.5, 3.0)
        == (
            layer.__dict__["max_norm"],
            layer.__dict__["target_scale"],
        )
    )
    assert copy.deepcopy(layer).max_norm == 0.5
    with pytest.raises(ValueError, match="max_norm must be None or positive and finite, got -1"):
        layer.max_norm = -1
    assert layer.max_norm == 0.5


LAYER = fd.FusedDNILinear(4, 6, context_features=3)
RULED = fd.FusedDNILinear(4, 6, update=fd.SGD(0.1))
ROWS = torch.randn(3, 4)
KINDS_OF_ARGUMENTS = [
    (lambda: fd.SGD("0.1"), TypeError, r"lr must be a number, finite .* got '0.1' \(str\)"),
    (lambda: fd.AdamW(None), TypeError, "lr must be a number, .* got None"),
    (lambda: fd.Adam(betas=0.9), TypeError, r"betas must be two numbers.* got 0.9"),
    (lambda: fd.Adam(betas=(0.9,)), TypeError, r"betas must be two numbers.* got \(0.9,\)"),
    (lambda: fd.SGD(stochastic_rounding="yes"), TypeError, "stochastic_rounding must be True or"),
    (lambda: fd.SGD(nesterov="yes"), TypeError, "nesterov must be True or False, got 'yes'"),
    (lambda: fd.SGD(True), TypeError, r"lr must be a number, finite .* got True \(bool\)"),
    (
        lambda: fd.FusedDNILinear(4, 6, max_norm=True),
        TypeError,
        "max_norm must be None or a .*True",
    ),
    (lambda: setattr(LAYER, "max_norm", -1), ValueError, "max_norm must be None or positive .* -1"),
    (
        lambda: setattr(LAYER, "target_scale", math.nan),
        ValueError,
        "target_scale must be None or positive and finite, got nan",
    ),
    (lambda: fd.FusedDNILinear(4.5, 6), TypeError, "in_features must be a whole .* got 4.5"),
    (lambda: fd.FusedDNILinear(4, True), TypeError, "out_features must be a whole .* got True"),
    (lambda: fd.FusedDNILinear(4, 6, bias="no"), TypeError, "bias must be True or False, got 'no'"),
    (lambda: fd.FusedDNILinear(4, 6, max_norm="1"), TypeError, "max_norm must be None or a number"),
    (lambda: fd.FusedDNILinear(4, 6, momentum=None), TypeError, "momentum must be a number, in"),
    (lambda: fd.FusedDNILinear(4, 6, context_features=2.5), TypeError, "context_features must be"),
    (lambda: fd.FusedDNILinear(4, 6, dtype="float32"), TypeError, "dtype must be None or a torch"),
    (lambda: fd.FusedDNILinear(4, 6, dtype=torch.complex64), ValueError, "dtype must be floating"),
    (
        lambda: fd.FusedDNILinear(4, 6, synthesizer=nn.Linear(6, 6)),
        TypeError,
        r"synthesizer must take two arguments, as synthesizer\(h, context\), got Linear",
    ),
    (
        lambda: fd.FusedDNILinearCrossEntropyLoss(4, 6, ignore_index=1.5),
        TypeError,
        "ignore_index must be a whole number, got 1.5",
    ),
    (lambda: fd.LinearSynthesizer(6.5), TypeError, "features must be a whole number"),
    (lambda: fd.LinearSynthesizer(6, rank=2.5), TypeError, "rank must be a whole number"),
    (lambda: fd.LinearSynthesizer(6, dtype=torch.complex64), ValueError, "dtype must be floating"),
    (
        lambda: fd.LinearSynthesizer(6, context_features=3)(torch.ones(1, 6), torch.tensor([5])),
        IndexError,
        "label 5 in context is out of range",
    ),
    (
        lambda: fd.MLPSynthesizer(6, 4, 1, 3)(torch.ones(2, 6), torch.tensor([0, -1])),
        IndexError,
        "label -1 in context is out of range",
    ),
    (
        lambda: LAYER.synthesizer.set_extra_state(torch.tensor([3.0, 1.0])),
        ValueError,
        r"_extra_state of a synthesizer must be its unit, a power of two.* got \[3.0, 1.0\]",
    ),
    (lambda: LAYER(ROWS, [0, 1, 2]), TypeError, r"context must be a torch.Tensor, got list"),
    (lambda: LAYER(ROWS.to_sparse()), RuntimeError, "input must be a dense tensor .*sparse_coo"),
    (lambda: fd.Schedule([1]), TypeError, r"model must be an nn.Module, got list"),
    (lambda: fd.Schedule(LAYER, warmup_steps=1.5), TypeError, "warmup_steps must be a whole"),
    (lambda: fd.Schedule(LAYER, mix="1"), TypeError, r"mix must be a number, in \[0, 1\], got '1'"),
    (lambda: fd.Schedule(LAYER, loss_scale="2"), TypeError, "loss_scale must be None or a number"),
    (lambda: fd.Schedule(LAYER).load_state_dict({}), ValueError, "state must hold 'steps', got"),
    (
        lambda: fd.Schedule(LAYER).load_state_dict({"steps": -5}),
        ValueError,
        "steps in state must be at least 0, got -5",
    ),
    (
        lambda: fd.FusedOptimizer(RULED).load_state_dict({}),
        ValueError,
        "state_dict must hold 'param_groups' and 'state'",
    ),
    (lambda: fd.ordinary_parameters("x"), TypeError, r"model must be an nn.Module, got str"),
    (lambda: fd.convert("x"), TypeError, r"model must be an nn.Module, got str"),
    (lambda: fd.revert("x"), TypeError, r"model must be an nn.Module, got str"),
    (lambda: fd.diagnostics("x"), TypeError, r"model must be an nn.Module, got str"),
    (lambda: fd.diagnostics(LAYER, 3), TypeError, "closure must be None or a function, got int"),
    (lambda: fd.diagnostics(LAYER, lambda: 3), TypeError, "closure must return the loss.* got int"),
    (lambda: fd.verdict("x", ROWS), TypeError, r"module must be an nn.Module, got str"),
    (lambda: fd.verdict(LAYER, ROWS, update="adam"), TypeError, "update must be None or a fused"),
    (
        lambda: fd.verdict(LAYER, ROWS, context_features=-1),
        ValueError,
        "context_features must be at least 0, got -1",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), KINDS_OF_ARGUMENTS)
def test_arguments_of_another_kind(call, error, message):
    before = [twins.snapshot(layer) for layer in (LAYER, RULED)]
    with pytest.raises(error, match=message):
        call()
    for layer, was in zip((LAYER, RULED), before, strict=True):
        twins.unchanged(was, twins.snapshot(layer))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fd.SGD(lr=-0.1), "lr must be finite and at least 0"),
        (lambda: fd.SGD(lr=math.nan), "lr must be finite"),
        (lambda: fd.SGD(momentum=1.0), r"momentum must be in \[0, 1\)"),
        (lambda: fd.SGD(weight_decay=-1.0), "weight_decay must be finite and at least 0"),
        (lambda: fd.SGD(nesterov=True), "nesterov=True needs momentum > 0"),
        (lambda: fd.Adam(betas=(1.0, 0.9)), r"betas\[0\] must be in \[0, 1\)"),
        (lambda: fd.Adam(betas=(0.9, -0.1)), r"betas\[1\] must be in"),
        (lambda: fd.AdamW(eps=-1.0), "eps must be finite and at least 0"),
    ],
)
def test_rates(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_functions():
    x, w = double(6, 4), double(5, 4)
    f = fd.functional.linear
    for call, error, message in (
        (lambda: f(x, w, activation="swish"), ValueError, "activation must be one of"),
        (lambda: f(x, w, normalization="rms"), ValueError, "normalization must be one of"),
        (lambda: f(x, w, backend="gpu"), ValueError, "unknown backend 'gpu'"),
        (lambda: f(x, w, double(4)), RuntimeError, r"bias must be torch.float64 \[5\]"),
        (lambda: f(x, w.float()), RuntimeError, "input has dtype"),
        (lambda: f(x, w[0]), RuntimeError, "weight must be floating point"),
        (lambda: f(x, w, normalization="batch"), ValueError, "needs running_mean and running_var"),
        (lambda: f(x[:0], w), RuntimeError, "the batch is empty"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_backend_that_cannot_serve_is_no_silent_fallback():
    layer = fd.FusedDNILinear(4, 5, backend="cpu", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot serve this call: it serves float"):
        layer(torch.randn(6, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("what", ["weight", "norm.running_mean", "synthesizer.weight"])
def test_a_checkpoint_of_another_shape(what):
    layer = layer_of("fused", None)
    state = {**layer.state_dict(), what: double(3, 3)}
    before = twins.snapshot(layer)
    with pytest.raises(RuntimeError, match=f"size mismatch for {what}"):
        layer.load_state_dict({what: state[what]}, strict=False)
    twins.unchanged(before, twins.snapshot(layer))


def test_batch_norm_frozen_inside_a_training_layer_is_refused():
    """``model.apply`` that puts norms alone into eval would be ignored by the fused kernels."""
    layer = layer_of("fused", None)
    layer.norm.eval()
    before = twins.snapshot(layer)
    with pytest.raises(RuntimeError, match=r"norm is in eval mode .*layer is training"):
        layer(double(6, 4))
    twins.unchanged(before, twins.snapshot(layer))


def test_decoupled_segments():
    layer = fd.Decoupled(nn.Linear(4, 5).double(), fd.LinearSynthesizer(5).double(),
                         update=fd.SGD(0.1))  # fmt: skip
    before = twins.snapshot(layer)
    for x, error in ((double(6, 3), RuntimeError), (torch.randn(6, 4), RuntimeError)):
        with pytest.raises(error, match="mat1|shapes"):
            layer(x)
    with pytest.raises(RuntimeError, match="the batch is empty"):
        layer(double(0, 4))
    twins.unchanged(before, twins.snapshot(layer))
    assert present(layer.local_parameters())


def test_a_weight_transposed_in_place_is_refused():
    """Its address and shape stay as they were."""
    layer = fd.FusedDNILinear(6, 6, update=fd.SGD(0.1))
    x = torch.randn(4, 6)
    layer(x)
    layer.weight.data = layer.weight.data.t()
    with pytest.raises(RuntimeError, match="weight must be contiguous"):
        layer(x)


# ---------------------------------------------------------------------------------------------
# What was kept from a forward and fits no longer: kernels would read past it


KEPT = {
    "h": ({"h": double(6, 4)}, r"weight must have shape \[4, 2\], got \[5, 2\]"),
    "scaled": ({"scaled": double(5, 5)}, r"prediction.scaled must have shape \[6, 5\]"),
    "scaled dtype": ({"scaled": torch.randn(6, 5)}, "prediction.scaled must be torch.float64"),
    "reduced": ({"reduced": double(6, 1)}, r"prediction.reduced must have shape \[6, 2\]"),
    "grad_h": ({"grad_h": double(5, 5)}, r"grad_h must have shape \[6, 5\], got \[5, 5\]"),
    "context": ({"context": torch.zeros(5, dtype=torch.int64)}, r"context must have shape \[6\]"),
    "vectors": ({"context": double(6, 2)}, r"context must have shape \[6, 3\], got \[6, 2\]"),
    "statistics": ({"statistics": torch.zeros(5)}, "statistics must be torch.float64"),
}


@backends
@pytest.mark.parametrize("case", KEPT)
def test_kept_tensors_of_a_synthesizer(backend, case):
    changed, message = KEPT[case]
    synthesizer = fd.LinearSynthesizer(5, 2, 3, dtype=torch.float64)
    slots, rule = tuple(synthesizer.parameters()), fd.rules.RuleState(fd.Adam(0.1))
    fused = synthesizer.fused()
    given = {
        "h": double(6, 5),
        "scaled": double(6, 5),
        "reduced": double(6, 2),
        "grad_h": double(6, 5),
        "context": torch.zeros(6, dtype=torch.int64),
        "statistics": None,
        **changed,
    }
    before = kept(slots)
    with pytest.raises(RuntimeError, match=message):
        fd.functional.synthesizer_update_(
            given["h"],
            fd.ops.types.Prediction(given["scaled"], given["reduced"]),
            given["grad_h"],
            fused,
            rule.tensors(fused.parameters()),
            context=given["context"],
            statistics=given["statistics"],
            backend=backend,
        )
    close(kept(slots), before, 0)


def _smaller(layer):
    layer.weight.data = layer.weight.data[:2].clone()


def _other_synthesizer(layer):
    layer.synthesizer = fd.LinearSynthesizer(500, dtype=torch.float64)


@backends
@pytest.mark.parametrize(
    ("kind", "damage"),
    [("fused", _other_synthesizer), ("exact", _smaller), ("exact rule", _smaller)],
)
def test_parameters_of_another_size_between_forward_and_backward(backend, kind, damage):
    layer = layer_of(kind, backend, None)
    h = layer(double(6, 4))
    damage(layer)
    before = kept(layer.parameters())
    with pytest.raises(RuntimeError, match=r"must have shape \[.*\], got|same size|size of"):
        h.sum().backward()
    close(kept(layer.parameters()), before, 0)


MOVED = {
    "exact rule": (lambda layer: layer.bias, lambda: layer_of("exact rule", None)),
    "norm": (lambda layer: layer.norm.weight, lambda: layer_of("exact rule", None)),
    "lesson": (lambda layer: layer.synthesizer.down, lambda: layer_of("fused", None)),
    "cross entropy": (
        lambda layer: layer.synthesizer.logits.weight,
        lambda: linear(4, 5, synthesizer=_crossed(), update=fd.SGD(0.1)),
    ),
    "segment": (
        lambda layer: layer.synthesizer.bias,
        lambda: fd.Decoupled(
            nn.Linear(4, 5).double(), fd.LinearSynthesizer(5).double(), update=fd.SGD(0.1)
        ),
    ),
    "head": (
        lambda layer: layer.bias,
        lambda: fd.FusedDNILinearCrossEntropyLoss(4, 5, update=fd.SGD(0.1)).double(),
    ),
}


def _crossed():
    return fd.CrossEntropySynthesizer(5, 3).double()


@pytest.mark.parametrize("kind", MOVED)
def test_a_parameter_that_moves_between_forward_and_backward(kind):
    """model.bfloat16() there: kernels would read and write past its end."""
    which, make = MOVED[kind]
    layer = make()
    labels = torch.arange(6) % 3
    given = (labels,) if kind in ("head", "cross entropy") else ()
    h = layer(double(6, 4), *given)
    p = which(layer)
    p.data = p.data.bfloat16()
    with pytest.raises((RuntimeError, TypeError), match="bfloat16"):
        h.sum().backward()


@pytest.mark.parametrize("where", [torch.bfloat16, "meta"])
def test_a_segments_synthesizer_of_mixed_dtypes_and_devices(where):
    layer = fd.Decoupled(nn.Linear(4, 5), fd.LinearSynthesizer(5), update=fd.SGD(0.1))
    layer.synthesizer.bias = nn.Parameter(layer.synthesizer.bias.detach().to(where))
    before = kept(layer.module.parameters())
    with pytest.raises(RuntimeError, match="synthesizer's parameters must be of one dtype and"):
        layer(torch.randn(6, 4))
    close(kept(layer.module.parameters()), before, 0)
