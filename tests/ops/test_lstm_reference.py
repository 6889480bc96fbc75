"""The reference's LSTM against ``torch.nn.LSTM``, autograd and ``torch.optim``, in float64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    CLOSE_OPTIONS,
    LSTM_OPTIONS,
    REFERENCE,
    RULES,
    LSTMCase,
    bind_lstm,
    lstm_rows,
    lstm_shapes,
    make_closing,
    make_lstm,
    named,
    pairwise,
    run_cell,
    run_close,
    run_window,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_dni.backends.reference.lstm as lstm
import fused_dni.backends.reference.rules as rules
from fused_dni.ops.types import ROWS, SKIPPED, SQUARED_ERROR, STEP, LSTMGradients, LSTMTrace

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN: dict[str, Any] = {
    "rule": "adam",
    "bias": True,
    "lengths": False,
    "dropout": False,
    "need_dx": True,
    "arriving": "output h c",
    "frozen": None,
}
SHAPE = (5, 4, 3, 6, 2)
TABLE = pairwise({k: v for k, v in LSTM_OPTIONS.items() if k not in ("frozen", "rule", "need_dx")})


def close(a: Tensor | None, b: Tensor | None, what: str = "", tolerance: float = 1e-12) -> None:
    assert (a is None) == (b is None), what
    if a is not None and b is not None:
        torch.testing.assert_close(
            a.detach(), b.detach(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
        )


def stock(case: LSTMCase) -> nn.LSTM:
    """nn.LSTM with the case's parameters."""
    p = case.parameters
    hidden, inputs = p["weight_hh_l0"].shape[1], p["weight_ih_l0"].shape[1]
    made = nn.LSTM(inputs, hidden, case.layers, bias="bias_ih_l0" in p, dtype=torch.float64)
    made.load_state_dict(p)
    return made


def leaves(case: LSTMCase) -> tuple[Tensor, Tensor, Tensor]:
    """x, h and c to differentiate by; x without the NaN past the rows' lengths, for autograd."""
    x, h, c = (case.inputs[name].clone() for name in ("x", "h", "c"))
    return x.nan_to_num().requires_grad_(), h.requires_grad_(), c.requires_grad_()


def by_nn_lstm(case: LSTMCase, x: Tensor, h: Tensor, c: Tensor) -> tuple[Any, ...]:
    """The window by nn.LSTM: output, h, c and the parameters."""
    module = stock(case)
    lengths = case.inputs.get("lengths")
    if lengths is None:
        output, (last_h, last_c) = module(x, (h, c))
    else:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        out, (last_h, last_c) = module(packed, (h, c))
        output, _ = pad_packed_sequence(out, total_length=x.shape[0])
    return output, last_h, last_c, dict(module.named_parameters())


def by_hand(case: LSTMCase, x: Tensor, h: Tensor, c: Tensor) -> tuple[Any, ...]:
    """The same in elementary operations, with dropout by the case's masks."""
    p = {name: t.clone().requires_grad_() for name, t in case.parameters.items()}
    alive, below = case.alive(), x
    last_h, last_c = [], []
    for k in range(case.layers):
        h_k, c_k, outputs = h[k], c[k], []
        for t in range(x.shape[0]):
            z = below[t] @ p[f"weight_ih_l{k}"].T + h_k @ p[f"weight_hh_l{k}"].T
            if f"bias_ih_l{k}" in p:
                z = z + p[f"bias_ih_l{k}"] + p[f"bias_hh_l{k}"]
            i, f, g, o = z.split(z.shape[1] // 4, 1)
            cell = torch.sigmoid(f) * c_k + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
            on = alive[t][:, None]
            h_k, c_k = torch.where(on, hidden, h_k), torch.where(on, cell, c_k)
            outputs.append(torch.where(on, hidden, 0.0))
        last_h.append(h_k)
        last_c.append(c_k)
        output = torch.stack(outputs)
        if k < len(case.dropout()):
            below = output * case.dropout()[k]
        else:
            below = output
    return output, torch.stack(last_h), torch.stack(last_c), p


def window(case: LSTMCase) -> tuple[LSTMTrace, LSTMGradients]:
    given, layers = case.inputs, case.stack()
    lengths = given.get("lengths")
    trace = REFERENCE.lstm_forward(
        given["x"], given["h"], given["c"], layers, lengths, case.dropout(), True
    )
    made = REFERENCE.lstm_backward(
        given.get("grad_output"), given.get("grad_h"), given.get("grad_c"), given["x"], layers,
        lengths, case.dropout(), trace, True, True,
    )  # fmt: skip
    return trace, made


def check_window(case: LSTMCase) -> None:
    """Outputs and all gradients against autograd's."""
    x, h, c = leaves(case)
    twin = by_hand if case.dropout() else by_nn_lstm
    output, last_h, last_c, p = twin(case, x, h, c)
    arriving = [(output, "output"), (last_h, "h"), (last_c, "c")]
    pairs = [
        (t, case.inputs[f"grad_{name}"].nan_to_num())
        for t, name in arriving
        if f"grad_{name}" in case.inputs
    ]
    torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
    trace, made = window(case)
    close(trace.hidden[-1, 1:], output, "output")
    close(trace.h, last_h, "h")
    close(trace.c, last_c, "c")
    close(made.x, x.grad, "dx")
    close(made.h, h.grad, "dh")
    close(made.c, c.grad, "dc")
    for k, layer in enumerate(made.layers):
        for name, gradient in layer._asdict().items():
            name = f"{name}_l{k}"
            wanted = p[name].grad if name in p else None
            if wanted is None and name in p:  # autograd found no way to it
                wanted = torch.zeros_like(p[name])
            close(gradient, wanted, name)
    assert not made.delta[:, ~case.alive()].any()


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("options", TABLE, ids=named)
def test_window_is_nn_lstm(layers: int, options: dict[str, Any]) -> None:
    check_window(make_lstm((5, 4, 3, 6, layers), {**PLAIN, **options}))


@given(shape=lstm_shapes(), row=st.sampled_from(TABLE), seed=st.integers(0, 9))
def test_any_shape(shape: tuple[int, int, int, int, int], row: dict[str, Any], seed: int) -> None:
    check_window(make_lstm(shape, {**PLAIN, **row}, seed))


def test_the_two_twins_agree() -> None:
    """The composition that stands in for nn.LSTM where masks are given is nn.LSTM."""
    case = make_lstm(SHAPE, {**PLAIN, "lengths": True})
    for a, b in zip(by_hand(case, *leaves(case))[:3], by_nn_lstm(case, *leaves(case))[:3],
                    strict=True):  # fmt: skip
        close(a, b)


@pytest.mark.parametrize("arriving", ["output h c", "h", "c"])
@pytest.mark.parametrize("bias", [True, False])
def test_cell_is_nn_lstm_cell(bias: bool, arriving: str) -> None:
    case = make_lstm((1, 7, 5, 6, 1), {**PLAIN, "bias": bias, "arriving": arriving})
    given = case.inputs
    cell = nn.LSTMCell(5, 6, bias, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): t for name, t in case.parameters.items()})
    x, h, c = (given[name][0].clone().requires_grad_() for name in ("x", "h", "c"))
    new_h, new_c = cell(x, (h, c))
    grad_h, grad_c = (given[n][0] if n in given else None for n in ("grad_h", "grad_c"))
    pairs = [(t, g) for t, g in ((new_h, grad_h), (new_c, grad_c)) if g is not None]
    torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
    (layer,) = case.stack()
    plain = (given["x"][0], given["h"][0], given["c"][0], layer)
    trace = REFERENCE.lstm_cell_forward(*plain, True)
    made = REFERENCE.lstm_cell_backward(grad_h, grad_c, *plain, trace, True, True)
    for name, a, b in (
        ("h", trace.h, new_h), ("c", trace.c, new_c), ("dx", made.x, x.grad),
        ("dh", made.h, h.grad), ("dc", made.c, c.grad),
    ):  # fmt: skip
        close(a, b, name)
    assert made.layer is not None
    for name, gradient in made.layer._asdict().items():
        wanted = getattr(cell, name, None)
        close(gradient, None if wanted is None else wanted.grad, name)


def test_cells_in_a_row_are_a_window() -> None:
    """Bit by bit, forward and back."""
    case = make_lstm((5, 4, 3, 6, 1), PLAIN)
    given, (layer,) = case.inputs, case.stack()
    trace, made = window(case)
    h, c = given["h"][0], given["c"][0]
    steps = []
    for x in given["x"]:
        step = REFERENCE.lstm_cell_forward(x, h, c, layer, True)
        steps.append((x, h, c, step))
        h, c = step.h, step.c
    assert torch.equal(torch.stack([s.h for *_, s in steps]), trace.hidden[0, 1:])
    assert torch.equal(c, trace.c[0])
    grad_h, grad_c = given["grad_h"][0], given["grad_c"][0]
    for (x, h, c, step), above in zip(steps[::-1], given["grad_output"].flip(0), strict=True):
        back = REFERENCE.lstm_cell_backward(
            grad_h + above, grad_c, x, h, c, layer, step, False, False
        )
        assert back.x is None and back.layer is None
        grad_h, grad_c = back.h, back.c
    assert torch.equal(grad_h, made.h[0]) and torch.equal(grad_c, made.c[0])


@pytest.mark.parametrize("frozen", [None, "weight_ih_l0", "weight_hh_l1", "bias_hh_l0"])
@pytest.mark.parametrize("rule", RULES)
def test_update_is_torch_optim(rule: str, frozen: str | None) -> None:
    case = make_lstm(SHAPE, {**PLAIN, "rule": rule, "frozen": frozen})
    state = bind_lstm(case)
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in case.parameters.items()}
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizer = kinds[case.rule.kind](
        [p for name, p in twins.items() if name != frozen], **case.rule.defaults()
    )
    for steps in (1, 2):
        trace, made = window(case)
        for k, layer in enumerate(made.layers):
            for name, gradient in layer._asdict().items():
                twins[f"{name}_l{k}"].grad = gradient
        optimizer.step()
        rows = lstm_rows(case, trace.hidden, made.delta, case.alive())
        REFERENCE.lstm_update_(rows, case.stack(), state.tensors(case.slots()))
        assert (state.steps, state.skipped) == (steps, 0)
    for name, p in case.parameters.items():
        close(p, twins[name], name)
        assert name != frozen or torch.equal(p, twins[name])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["input", "hidden", "delta"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_gradient_that_is_not_finite_is_counted_and_skipped(
    layer: int, where: str, value: float
) -> None:
    case = make_lstm(SHAPE, PLAIN)
    state = bind_lstm(case)
    trace, made = window(case)
    rows = list(lstm_rows(case, trace.hidden, made.delta, case.alive()))
    rule = state.tensors(case.slots())
    REFERENCE.lstm_update_(tuple(rows), case.stack(), rule)
    wrong = getattr(rows[layer], where).clone()
    wrong[3, 2] = value
    rows[layer] = rows[layer]._replace(**{where: wrong})
    watched = [*case.parameters.values(), *rule.first, *rule.second]
    before = [(t, t.detach().clone(), t._version) for t in watched if t is not None]
    REFERENCE.lstm_update_(tuple(rows), case.stack(), rule)
    for t, value_before, version in before:
        assert torch.equal(t, value_before) and t._version == version
    assert rule.hyper[STEP] == 1 and rule.hyper[SKIPPED] == 1


def test_frozen_parameters_need_no_finite_gradient() -> None:
    case = make_lstm((3, 2, 3, 4, 1), {**PLAIN, "frozen": "weight_ih_l0"})
    state = bind_lstm(case)
    trace, made = window(case)
    (rows,) = lstm_rows(case, trace.hidden, made.delta, case.alive())
    rows = rows._replace(input=torch.full_like(rows.input, torch.nan))
    REFERENCE.lstm_update_((rows,), case.stack(), state.tensors(case.slots()))
    assert (state.steps, state.skipped) == (1, 0)


def test_nothing_is_mutated_or_shared() -> None:
    case = make_lstm(SHAPE, {**PLAIN, "dropout": True, "lengths": True})
    given = [*case.inputs.values(), *case.parameters.values()]
    before = [(t, t.clone(), t._version) for t in given]
    trace, made = window(case)
    for t, value, version in before:
        assert torch.equal(t.nan_to_num(), value.nan_to_num()) and t._version == version
    parts = [t for t in (*trace, made.delta, made.h, made.c, made.x) if t is not None]
    assert len({t.untyped_storage().data_ptr() for t in parts}) == len(parts) == 9


def test_what_is_not_asked_for_is_not_made() -> None:
    case = make_lstm(SHAPE, PLAIN)
    given, layers = case.inputs, case.stack()
    short = REFERENCE.lstm_forward(given["x"], given["h"], given["c"], layers, None, (), False)
    assert short.cells is None and short.gates is None
    trace, made = window(case)
    assert torch.equal(short.hidden, trace.hidden[-1:]) and torch.equal(short.c, trace.c)
    less = REFERENCE.lstm_backward(
        given["grad_output"], given["grad_h"], given["grad_c"], given["x"], layers, None, (),
        trace, False, False,
    )  # fmt: skip
    assert less.x is None and less.layers == ()
    assert torch.equal(less.delta, made.delta) and torch.equal(less.h, made.h)


@pytest.mark.parametrize("ended", ["no mask", "some"])
@pytest.mark.parametrize("lengths", [False, True])
def test_closing_is_autograd(lengths: bool, ended: str) -> None:
    """The synthetic gradient is that of a linear term in the final state, and the regression is
    on the gradient at the entrance: both as losses, differentiated by autograd."""
    strength, options = 0.7, {name: values[0] for name, values in CLOSE_OPTIONS.items()}
    options |= {"lengths": lengths, "ended": ended, "fresh": "some"}
    case = make_closing((5, 4, 3, 6, 2), options)
    weight = case.parameters.pop("synthesizer.weight").requires_grad_()
    bias = case.parameters.pop("synthesizer.bias").requires_grad_()
    x, h, c = leaves(case)
    kappa = float(x.shape[0] * x.shape[1])
    mask = case.inputs.get("ended", torch.zeros(x.shape[1], dtype=torch.bool))
    fresh = torch.arange(x.shape[1]) % 3 == 1
    output, last_h, last_c, p = by_nn_lstm(case, x, h, c)

    def rows(h: Tensor, c: Tensor) -> Tensor:
        return torch.cat([t for k in range(len(h)) for t in (h[k], c[k])], 1)

    exit_state = rows(last_h, last_c)
    predicted = exit_state.detach() @ weight.T + bias
    loss = strength / kappa * (predicted.detach() * exit_state)[~mask].sum()
    for t, name in ((output, "output"), (last_h, "h"), (last_c, "c")):
        loss = loss + (t * case.inputs[f"grad_{name}"].nan_to_num()).sum()
    made = torch.autograd.grad(loss, (x, h, c, p["weight_ih_l0"], p["bias_hh_l1"]))
    errors = rows(h, c).detach() @ weight.T + bias - kappa * rows(made[1], made[2])
    count = int((~fresh).sum() + mask.sum())
    regression = ((errors[~fresh] ** 2).sum() + (predicted[mask] ** 2).sum()) / count
    wanted = torch.autograd.grad(regression, (weight, bias))

    case.parameters |= {"synthesizer.weight": weight.detach(), "synthesizer.bias": bias.detach()}
    got = run_close(REFERENCE, case)
    for name, gradient in zip(("dx", "dh", "dc", "d.weight_ih_l0", "d.bias_hh_l1"), made,
                              strict=True):  # fmt: skip
        close(got[name], gradient, name)
    close(got["d.synthesizer.0"], wanted[0], "weight")
    close(got["d.synthesizer.3"], wanted[1], "bias")
    assert got["statistics"][ROWS] == count
    close(got["statistics"][SQUARED_ERROR] / count, regression, "loss")


def planted(name: str, change: Any, module: Any = lstm) -> Any:
    old = getattr(module, name)
    return mock.patch.object(module, name, lambda *a, **k: change(old(*a, **k)))


ERRORS = {
    "gate": lambda: planted("squash", lambda z: z * (1 + 1e-9)),
    "cell": lambda: planted("next_cell", lambda c: c * (1 + 1e-9)),
    "hidden": lambda: planted("shown", lambda h: h * (1 + 1e-9)),
    "delta": lambda: planted("step_backward", lambda d: (d[0] * (1 + 1e-9), d[1])),
    "carried": lambda: planted("step_backward", lambda d: (d[0], d[1] * (1 + 1e-9))),
    "product": lambda: planted("product", lambda c: c * (1 + 1e-9)),
    "bias": lambda: planted("sum_rows", lambda c: c * (1 + 1e-9)),
    "lengths": lambda: planted("alive_steps", lambda a: a | True),
}


@pytest.mark.parametrize("error", ERRORS)
def test_a_planted_error_is_caught(error: str) -> None:
    case = make_lstm(SHAPE, {**PLAIN, "lengths": True})
    check_window(case)
    with ERRORS[error](), pytest.raises(AssertionError):
        check_window(case)


def test_a_planted_error_of_the_update_is_caught() -> None:
    wrong = planted("adam", lambda new: new._replace(second=new.second * (1 + 1e-6)), rules)
    with wrong, pytest.raises(AssertionError):
        test_update_is_torch_optim("adam", None)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", [run_window, run_cell])
def test_low_precision_inputs_over_float32_masters(half: torch.dtype, run: Any) -> None:
    """All but the parameters in x's dtype, and near the float64 result."""
    shape = (6, 8, 32, 24, 1 if run is run_cell else 2)
    case = make_lstm(shape, {**PLAIN, "rule": "sgd"}, 0, half, torch.float32)
    exact = run(REFERENCE, case.to(torch.float64, torch.float64))
    before = {name: p.clone() for name, p in case.parameters.items()}
    got = run(REFERENCE, case)
    # A step rounds twice what it hands on (h and the operands of the products), 6 of them in a
    # row and then back; independent errors add up as the root of their number.
    eps = torch.finfo(half).eps * (2 * 6 * 2) ** 0.5
    for name, t in got.items():
        wanted = exact[name]
        if name.startswith("after."):
            t, wanted = (p - before[name.removeprefix("after.")] for p in (t, wanted))
        if name.startswith(("after.", "0.d.", "1.d.")):
            assert t.dtype == torch.float32
        elif name != "hyper":
            assert t.dtype == half, name
        assert (t.double() - wanted).norm() <= 2 * eps * wanted.norm(), name


def test_parameters_of_low_precision_serve_but_are_not_updated() -> None:
    case = make_lstm(SHAPE, PLAIN, 0, torch.bfloat16)
    trace, made = window(case)
    assert trace.h.dtype == made.delta.dtype == made.layers[0].weight_ih.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="float32 masters"):
        run_window(REFERENCE, case)
