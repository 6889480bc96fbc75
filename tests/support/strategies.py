"""Shapes, option tables, random layers, and tolerances, for the tests of ops.

A tolerance is derived and not chosen, by Monte Carlo arithmetic: the float64 reference is run
several times while every stage of it is disturbed by what one stage of working-precision
arithmetic may do, and the spread of its results is what a correct implementation may differ by.

* A product ``c = a @ b`` over K terms is disturbed by ``eps * sqrt(K) * sqrt(a^2 @ b^2)`` times a
  standard normal number (a random walk of K rounding errors, each ``eps`` of a partial sum), and
  by ``eps |c|`` for the result's own rounding.
* A sum over K rows likewise: by ``eps * sqrt(K * sum of squares)``.
* Activations, their derivatives, normalised values, reciprocal deviations, predictions and the
  probabilities of a softmax, with what is known in them and without, are disturbed by ``eps``
  relative to themselves; normalised values also by ``eps`` absolutely, which is what a rounding of
  z does to them after a column's mean has been taken out.
* The stages of an LSTM's step likewise, by ``eps`` relative to themselves.
* So is every input.

How a disturbance grows on its way (a small variance in a normalisation, a small second moment in
Adam) is in the spread by construction. An element may differ by :data:`SIGMAS` standard
deviations, its own and its tensor's added, plus ``2 eps`` of its tensor's largest element.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import seed
from hypothesis import strategies as st
from torch import Tensor

import fused_dni.backends.common.synthesizer as synthesizer_formulas
import fused_dni.backends.reference.linear as reference_linear
import fused_dni.backends.reference.lstm as reference_lstm
import fused_dni.backends.reference.synthesizer as reference_synthesizer
from fused_dni.backends.reference import ReferenceBackend
from fused_dni.ops import registry
from fused_dni.ops.types import (
    ACTIVATIONS,
    AFFINE,
    INTERFACES,
    STATISTICS_SIZE,
    SYNTHESIZERS,
    Backend,
    LinearConfig,
    LinearTensors,
    LSTMBoundary,
    LSTMLayer,
    LSTMRows,
    SynthesizerTensors,
)
from fused_dni.rules import SGD, Adam, AdamW, Rule, RuleState

SIGMAS = 8.0
SAMPLES = 8

REFERENCE = ReferenceBackend()

# ---------------------------------------------------------------------------------------------
# Options

RULES: dict[str, Rule] = {
    "sgd": SGD(lr=0.5),
    "momentum": SGD(lr=0.3, momentum=0.9, weight_decay=0.01),
    "nesterov": SGD(lr=0.3, momentum=0.8, nesterov=True),
    # eps well above rounding: the step is then a smooth function of the gradient
    "adam": Adam(lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.02),
    "adamw": AdamW(lr=0.05, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.1),
}

OPTIONS: dict[str, Sequence[Any]] = {
    "activation": ACTIVATIONS,
    "rule": tuple(RULES),
    "normalization": (None, "batch", "layer"),
    "kind": SYNTHESIZERS,
    "context": (None, "label", "vector", "table"),  # labels and a head's table, some ignored
    "max_norm": (0.0, 0.05),
    "bias": (True, False),
    "affine": (True, False),
    "synthesizer_bias": (True, False),
    "need_dx": (True, False),
    "frozen": (None, "weight", "bias"),
    "interface": INTERFACES,
}
#: With the kinds of synthesizers that GPUs have.
AFFINE_OPTIONS: dict[str, Sequence[Any]] = {**OPTIONS, "kind": AFFINE}


def pairwise(options: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows in which every two options meet in every combination of their values (greedy)."""
    keys = list(options)
    missing = {
        ((a, va), (b, vb))
        for a, b in itertools.combinations(keys, 2)
        for va in options[a]
        for vb in options[b]
    }

    def gain(row: dict[str, Any], key: str, value: Any) -> int:
        trial, nothing = {**row, key: value}, object()
        return sum(
            trial.get(a, nothing) == va and trial.get(b, nothing) == vb
            for (a, va), (b, vb) in missing
        )

    rows = []
    while missing:
        row: dict[str, Any] = dict(min(missing, key=repr))
        for key in keys:
            if key in row:
                continue
            row[key] = max(options[key], key=functools.partial(gain, row, key))
        rows.append({key: row[key] for key in keys})
        missing -= {((a, row[a]), (b, row[b])) for a, b in itertools.combinations(keys, 2)}
    return rows


def named(row: dict[str, Any]) -> str:
    """A test id."""
    return "-".join(str(v) for v in row.values())


def paired(**options: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise a test by rows in which every two arguments meet in all their values."""
    rows = [tuple(row.values()) for row in pairwise(options)]
    ids = ["-".join(str(v) for v in row) for row in rows]
    return pytest.mark.parametrize(tuple(options), rows, ids=ids)


# ---------------------------------------------------------------------------------------------
# Shapes

# Otherwise hypothesis draws others for each parameter of a test: so all backends get the same ones,
# and what they are compared with is derived once.
same_examples = seed(0)

SIZES = (1, 2, 3, 7, 13, 16, 17, 31, 33, 48, 61, 64, 67, 97, 127, 129, 150)


@st.composite
def shapes(draw: st.DrawFn, least_rows: int = 1) -> tuple[int, int, int, int, int]:
    """(N, I, O, R, K): ones, primes, and numbers that no block size divides."""
    size = st.sampled_from(SIZES)
    n = draw(st.sampled_from([s for s in SIZES if s >= least_rows]))
    return (
        n,
        draw(size),
        draw(size),
        draw(st.sampled_from((1, 3, 16, 19))),
        draw(st.sampled_from((1, 2, 10, 17))),
    )


# ---------------------------------------------------------------------------------------------
# A layer with everything that an op takes


@dataclass
class Case:
    """Inputs of every op. Tensors of ``parameters`` and ``inputs`` are leaves to be cloned."""

    config: LinearConfig
    kind: str
    rule: Rule
    target_scale: float
    max_norm: float
    need_dx: bool
    inputs: dict[str, Tensor]
    parameters: dict[str, Tensor]
    frozen: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def to(self, x: torch.dtype, parameter: torch.dtype) -> Case:
        """A copy with activations and parameters of these dtypes."""
        return replace(
            self,
            inputs={
                k: t.to(x, copy=True) if t.is_floating_point() else t.clone()
                for k, t in self.inputs.items()
            },
            parameters={k: t.detach().to(parameter, copy=True) for k, t in self.parameters.items()},
        )

    def on(self, device: str) -> Case:
        """A copy on that device."""
        return replace(
            self,
            inputs={k: t.to(device, copy=True) for k, t in self.inputs.items()},
            parameters={k: t.to(device, copy=True) for k, t in self.parameters.items()},
        )

    def layer(self) -> LinearTensors:
        p = self.parameters
        return LinearTensors(**{k: p.get(k) for k in LinearTensors._fields})

    def synthesizer(self) -> SynthesizerTensors:
        p = self.parameters
        fields = SynthesizerTensors._fields[1:6]
        return SynthesizerTensors(self.kind, **{k: p.get("synthesizer." + k) for k in fields})


def make_case(
    shape: tuple[int, int, int, int, int],
    options: dict[str, Any],
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    parameter_dtype: torch.dtype | None = None,
) -> Case:
    """A random layer with random options.

    With relu the seed is moved on until no pre-activation lies so near to zero that rounding
    could carry it to the other side, where the derivative is another.
    """
    n, i, o, r, k = shape
    crossed = options["kind"] == "cross_entropy"
    if crossed:
        r = k
        if options["context"] != "vector":  # which it is not without, and has no table for
            options = {**options, "context": "label"}
    parameter_dtype = dtype if parameter_dtype is None else parameter_dtype
    for attempt in range(200):
        g = torch.Generator().manual_seed(1000 * seed + attempt)

        def randn(*size: int, scale: float = 1.0, g: torch.Generator = g) -> Tensor:
            return scale * torch.randn(*size, generator=g, dtype=torch.float64)

        p = {"weight": randn(o, i, scale=i**-0.5)}
        if options["bias"]:
            p["bias"] = randn(o, scale=0.3)
        if options["normalization"] and options["affine"]:
            p["norm_weight"] = 1 + randn(o, scale=0.2)
            p["norm_bias"] = randn(o, scale=0.2)
        if options["normalization"] == "batch":
            p["running_mean"] = randn(o, scale=0.1)
            p["running_var"] = 0.5 + randn(o).abs()
        p["synthesizer.weight"] = {
            "dense": lambda: randn(o, o, scale=o**-0.5),
            "lowrank": lambda: randn(o, r, scale=r**-0.5),
            "diagonal": lambda: randn(o),
            "cross_entropy": lambda: randn(o, r, scale=r**-0.5),
        }[options["kind"]]()
        if options["kind"] in ("lowrank", "cross_entropy"):
            p["synthesizer.down"] = randn(r, o, scale=o**-0.5)
        frozen = {options["frozen"]} - {None}
        if options["context"] == "table":
            p["synthesizer.context_weight"] = randn(1)[0]
            p["synthesizer.table"] = randn(k, o)
            frozen.add("synthesizer.table")
        elif options["context"]:
            p["synthesizer.context_weight"] = randn(k) if crossed else randn(o, k)
        if options["synthesizer_bias"]:
            p["synthesizer.bias"] = randn(o)
        inputs = {"x": randn(n, i) + 0.2, "grad_h": randn(n, o) / n}
        if options["context"] in ("label", "table"):
            inputs["context"] = torch.randint(k, (n,), generator=g)
            if options["context"] == "table":
                inputs["context"][1::3] = SynthesizerTensors._field_defaults["ignore_index"]
        elif options["context"] == "vector":
            inputs["context"] = randn(n, k).softmax(1) if crossed else randn(n, k)
        case = Case(
            LinearConfig(
                options["normalization"],
                options["activation"],
                1e-5,
                0.1,
                options.get("interface", "output"),
            ),
            options["kind"],
            RULES[options["rule"]],
            float(n),
            options["max_norm"],
            options["need_dx"],
            inputs,
            p,
            tuple(frozen),
        ).to(dtype, parameter_dtype)
        if options["activation"] != "relu" or _clear_of_zero(case):
            return case
    raise AssertionError("no seed keeps clear of relu's corner")


def _clear_of_zero(case: Case) -> bool:
    wide = case.to(torch.float64, torch.float64)
    config = replace(wide.config, activation="identity")
    for training in (True, False):
        y, _ = REFERENCE.linear_forward(wide.inputs["x"], wide.layer(), config, training, False)
        if y.abs().min() < 1e-5:
            return False
        wide = case.to(torch.float64, torch.float64)
    return True


# ---------------------------------------------------------------------------------------------
# Running ops


def bind(case: Case) -> tuple[RuleState, RuleState]:
    """Rule states of layer and synthesizer, frozen slots marked on the parameters."""
    for name, p in case.parameters.items():
        if not name.startswith("running"):
            case.parameters[name] = torch.nn.Parameter(p.detach(), name not in case.frozen)
    return RuleState(case.rule), RuleState(case.rule)


def slots(layer: LinearTensors) -> tuple[Tensor | None, ...]:
    return (layer.weight, layer.bias, layer.norm_weight, layer.norm_bias)


def slots_of_step(case: Case) -> tuple[Tensor | None, ...]:
    """What a decoupled step moves: scale and shift only where a gradient reaches them."""
    layer = case.layer()
    if case.config.interface == "preactivation":
        return (layer.weight, layer.bias, None, None)
    return slots(layer)


def _collect(case: Case, states: dict[str, RuleState], out: dict[str, Any]) -> dict[str, Tensor]:
    for name, p in case.parameters.items():
        out["after." + name] = p.detach()
    for name, state in states.items():
        out[name + ".hyper"] = state.hyper
        for order, moments in enumerate(state.moments()):
            for slot, moment in enumerate(moments):
                out[f"{name}.moment{order}.{slot}"] = moment
    return {name: t for name, t in out.items() if t is not None}


def run_step(backend: Backend, case: Case) -> dict[str, Tensor]:
    """``linear_step_`` twice, the synthesizer trained after each; with the interface at the
    preactivation on the gradient there, and scale and shift with it. Mutates ``case``.

    Only once with relu: :func:`make_case` keeps the first step clear of its corner and no other.
    """
    steps = 1 if case.config.activation == "relu" else 2
    inside = case.config.interface == "preactivation"
    state, synthesizer_state = bind(case)
    states = {"rule": state, "synthesizer_rule": synthesizer_state}
    if inside and "norm_weight" in case.parameters:
        states["norm_rule"] = RuleState(case.rule)
    statistics = case.inputs["x"].new_zeros(STATISTICS_SIZE, dtype=torch.float64)
    x, grad_h, context = case.inputs["x"], case.inputs["grad_h"], case.inputs.get("context")
    out: dict[str, Any] = {}
    for t in range(steps):
        step = backend.linear_step_(
            x, case.layer(), case.config, case.synthesizer(), context, case.target_scale,
            case.max_norm, state.tensors(slots_of_step(case)), case.need_dx, True,
        )  # fmt: skip
        assert step.prediction is not None
        assert (step.dx is not None) == case.need_dx
        assert (step.saved is not None) == inside
        grad = grad_h
        if step.saved is not None:
            made = backend.linear_backward(
                grad_h, x, step.h, step.saved, case.layer(), case.config, True, False, False
            )
            grad = out[f"{t}.delta"] = made.delta
            if "norm_rule" in states:
                rule = states["norm_rule"].tensors((None, None, *slots(case.layer())[2:]))
                backend.linear_update_(x, made, case.layer(), rule)
        backend.synthesizer_update_(
            step.h, step.prediction, grad, case.synthesizer(), context, case.target_scale,
            statistics, synthesizer_state.tensors(case.synthesizer().parameters()),
        )  # fmt: skip
        out |= {f"{t}.h": step.h, f"{t}.dx": step.dx, f"{t}.scaled": step.prediction.scaled}
        out[f"{t}.reduced"] = step.prediction.reduced
    out["statistics"] = statistics
    return _collect(case, states, out)


def run_parts(backend: Backend, case: Case, training: bool = True) -> dict[str, Tensor]:
    """Forward, backward, update, prediction and its gradients, each on its own."""
    state, _ = bind(case)
    x, grad_h, context = case.inputs["x"], case.inputs["grad_h"], case.inputs.get("context")
    layer, synthesizer = case.layer(), case.synthesizer()
    statistics = x.new_zeros(STATISTICS_SIZE, dtype=torch.float64)
    h, saved = backend.linear_forward(x, layer, case.config, training, True)
    g = backend.linear_backward(
        grad_h, x, h, saved, layer, case.config, training, case.need_dx, True
    )
    assert (g.x is not None) == case.need_dx
    prediction = backend.synthesizer_predict(h, synthesizer, context)
    made = backend.synthesizer_gradients(
        h, prediction, grad_h, synthesizer, context, case.target_scale, statistics
    )
    out: dict[str, Any] = {"h": h, "scaled": prediction.scaled, "reduced": prediction.reduced}
    out |= {"d." + name: t for name, t in g._asdict().items()}
    out |= {f"d.synthesizer.{i}": t for i, t in enumerate(made)}
    out["statistics"] = statistics
    backend.linear_update_(x, g, layer, state.tensors(slots(layer)))
    return _collect(case, {"rule": state}, out)


# ---------------------------------------------------------------------------------------------
# The LSTM

LSTM_OPTIONS: dict[str, Sequence[Any]] = {
    "rule": tuple(RULES),
    "bias": (True, False),
    "lengths": (True, False),
    "dropout": (True, False),
    "need_dx": (True, False),
    # which of the gradients at output, h and c there is
    "arriving": ("output h c", "output", "h", "c"),
    "frozen": (None, "weight_ih_l0", "weight_hh_l0", "bias_ih_l0"),
}

CLOSE_OPTIONS: dict[str, Sequence[Any]] = {
    "kind": AFFINE,
    "synthesizer_bias": (True, False),
    "ended": ("no mask", "none", "some", "all"),
    "fresh": ("none", "some", "all"),  # rows whose state at the entrance is zero
    "strength": (0.7, 0.0),
    "max_norm": (0.0, 0.05),
    "max_target_norm": (0.0, 2.0),
    "learns": (True, False),
    "entrance": (True, False),
    "statistics": (True, False),
    "arriving": ("output h c", "output", "h", "c"),
    "lengths": (True, False),
    "need_dx": (True, False),
}

LSTM_SIZES = (1, 2, 3, 7, 13, 16, 17, 31, 33, 48, 64, 67)


@st.composite
def lstm_shapes(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """(T, B, I, H, L): ones, primes, and numbers that no block size divides."""
    return (
        draw(st.sampled_from((1, 2, 3, 5, 8))),
        draw(st.sampled_from((1, 2, 3, 4, 5, 16, 17, 33))),
        draw(st.sampled_from(LSTM_SIZES)),
        draw(st.sampled_from(LSTM_SIZES)),
        draw(st.integers(1, 3)),
    )


@dataclass
class LSTMCase:
    """Inputs of the LSTM's ops, as :class:`Case`; of the cell's, where T and L are 1."""

    rule: Rule
    need_dx: bool
    layers: int
    inputs: dict[str, Tensor]
    parameters: dict[str, Tensor]
    frozen: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)  # of :func:`make_closing`

    def to(self, x: torch.dtype, parameter: torch.dtype) -> LSTMCase:
        """A copy with inputs and parameters of these dtypes."""
        return replace(
            self,
            inputs={
                k: t.to(x, copy=True) if t.is_floating_point() else t.clone()
                for k, t in self.inputs.items()
            },
            parameters={k: t.detach().to(parameter, copy=True) for k, t in self.parameters.items()},
        )

    def on(self, device: str) -> LSTMCase:
        """A copy on that device."""
        return replace(
            self,
            inputs={k: t.to(device, copy=True) for k, t in self.inputs.items()},
            parameters={k: t.to(device, copy=True) for k, t in self.parameters.items()},
        )

    def stack(self) -> tuple[LSTMLayer, ...]:
        p = self.parameters
        return tuple(
            LSTMLayer(*(p.get(f"{name}_l{k}") for name in LSTMLayer._fields))
            for k in range(self.layers)
        )

    def slots(self) -> tuple[Tensor | None, ...]:
        return tuple(p for layer in self.stack() for p in layer)

    def dropout(self) -> tuple[Tensor, ...]:
        return tuple(t for name, t in self.inputs.items() if name.startswith("dropout"))

    def alive(self) -> Tensor:
        """Whether a step is one of its row's own, [T, B]."""
        steps, batch = self.inputs["x"].shape[:2]
        device = self.inputs["x"].device
        lengths = self.inputs.get("lengths", torch.full((batch,), steps, device=device))
        return torch.arange(steps, device=device)[:, None] < lengths


def make_lstm(
    shape: tuple[int, int, int, int, int],
    options: dict[str, Any],
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    parameter_dtype: torch.dtype | None = None,
) -> LSTMCase:
    """A random window. What lies past a row's length is NaN in x and in the arriving gradient."""
    steps, batch, inputs, hidden, layers = shape
    g = torch.Generator().manual_seed(seed)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, generator=g, dtype=torch.float64)

    p = {}
    for k in range(layers):
        width = inputs if k == 0 else hidden
        p[f"weight_ih_l{k}"] = randn(4 * hidden, width, scale=width**-0.5)
        p[f"weight_hh_l{k}"] = randn(4 * hidden, hidden, scale=hidden**-0.5)
        if options["bias"]:
            p[f"bias_ih_l{k}"] = randn(4 * hidden, scale=0.3)
            p[f"bias_hh_l{k}"] = randn(4 * hidden, scale=0.3)
    given = {
        "x": randn(steps, batch, inputs),
        "h": randn(layers, batch, hidden, scale=0.5),
        "c": randn(layers, batch, hidden),
    }
    arriving = {
        "output": randn(steps, batch, hidden, scale=1 / (steps * batch)),
        "h": randn(layers, batch, hidden, scale=1 / batch),
        "c": randn(layers, batch, hidden, scale=1 / batch),
    }
    given |= {f"grad_{name}": arriving[name] for name in options["arriving"].split()}
    if options["dropout"]:
        for k in range(layers - 1):
            kept = torch.rand(steps, batch, hidden, generator=g) < 0.75
            given[f"dropout_{k}"] = kept.double() / 0.75
    if options["lengths"]:
        lengths = torch.randint(1, steps + 1, (batch,), generator=g)
        given["lengths"] = lengths
        past = torch.arange(steps)[:, None] >= lengths  # [T, B]
        for name in {"x", "grad_output"} & given.keys():
            given[name][past] = torch.nan
    frozen = options["frozen"]
    return LSTMCase(
        RULES[options["rule"]],
        options["need_dx"],
        layers,
        given,
        p,
        () if frozen is None else (frozen,),
    ).to(dtype, dtype if parameter_dtype is None else parameter_dtype)


def _some(count: int, which: str) -> Tensor:
    """A mask [count]: none, every third, all."""
    return torch.arange(count) % 3 == 1 if which == "some" else torch.full((count,), which == "all")


def make_closing(
    shape: tuple[int, int, int, int, int],
    options: dict[str, Any],
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LSTMCase:
    """A random window and the synthesizer at its ends; ``options`` of :data:`CLOSE_OPTIONS`."""
    plain = {"rule": "sgd", "bias": True, "dropout": False, "frozen": None}
    case = make_lstm(shape, {**plain, **options}, seed)
    batch, features = shape[1], 2 * shape[3] * shape[4]
    g = torch.Generator().manual_seed(seed)
    sizes = {
        "dense": {"weight": (features, features)},
        "lowrank": {"weight": (features, 3), "down": (3, features)},
        "diagonal": {"weight": (features,)},
    }[options["kind"]]
    if options["synthesizer_bias"]:
        sizes["bias"] = (features,)
    for name, size in sizes.items():
        scale = size[-1] ** -0.5
        p = scale * torch.randn(*size, generator=g, dtype=torch.float64)
        case.parameters[f"synthesizer.{name}"] = p
    if options["ended"] != "no mask":
        case.inputs["ended"] = _some(batch, options["ended"])
    for name in ("h", "c"):
        case.inputs[name][:, _some(batch, options["fresh"])] = 0.0
    case.options = options
    return case.to(dtype, dtype)


def bind_lstm(case: LSTMCase) -> RuleState:
    """The rule's state, frozen slots marked on the parameters."""
    for name, p in case.parameters.items():
        case.parameters[name] = torch.nn.Parameter(p.detach(), name not in case.frozen)
    return RuleState(case.rule)


def _updated(case: LSTMCase, state: RuleState, out: dict[str, Any]) -> dict[str, Tensor]:
    out |= {f"after.{name}": p.detach() for name, p in case.parameters.items()}
    out["hyper"] = state.hyper
    for order, moments in enumerate(state.moments()):
        out |= {f"moment{order}.{slot}": moment for slot, moment in enumerate(moments)}
    return {name: t for name, t in out.items() if t is not None}


def _gradients(layers: Sequence[LSTMLayer | None]) -> dict[str, Any]:
    return {
        f"d.{name}_l{k}": gradient
        for k, layer in enumerate(layers)
        if layer is not None
        for name, gradient in layer._asdict().items()
    }


def lstm_rows(case: LSTMCase, hidden: Tensor, delta: Tensor, alive: Tensor) -> tuple[LSTMRows, ...]:
    """What the weights' gradients are products of: the steps that are there."""
    below, made = case.inputs["x"], []
    for k in range(case.layers):
        made.append(LSTMRows(below[alive], hidden[k, :-1][alive], delta[k][alive]))
        below = hidden[k, 1:]
        if k < len(case.dropout()):
            below = below * case.dropout()[k]
    return tuple(made)


def run_window(backend: Backend, case: LSTMCase) -> dict[str, Tensor]:
    """Two training steps on a window: forward (also without ``save``), backward, update."""
    state = bind_lstm(case)
    given = case.inputs
    x, h, c, lengths = given["x"], given["h"], given["c"], given.get("lengths")
    alive = case.alive()
    out: dict[str, Any] = {}
    for t in range(2):
        layers = case.stack()
        short = backend.lstm_forward(x, h, c, layers, lengths, case.dropout(), False)
        trace = backend.lstm_forward(x, h, c, layers, lengths, case.dropout(), True)
        g = backend.lstm_backward(
            given.get("grad_output"), given.get("grad_h"), given.get("grad_c"), x, layers,
            lengths, case.dropout(), trace, case.need_dx, True,
        )  # fmt: skip
        assert (g.x is not None) == case.need_dx
        assert not g.delta[:, ~alive].any()
        out |= {f"{t}.short": short.hidden[-1], f"{t}.short_h": short.h, f"{t}.short_c": short.c}
        out |= {f"{t}.hidden": trace.hidden, f"{t}.h": trace.h, f"{t}.c": trace.c}
        out |= {f"{t}.dh": g.h, f"{t}.dc": g.c, f"{t}.dx": g.x}
        out |= {f"{t}.{name}": made for name, made in _gradients(g.layers).items()}
        rows = lstm_rows(case, trace.hidden, g.delta, alive)
        backend.lstm_update_(rows, layers, state.tensors(case.slots()))
    return _updated(case, state, out)


def run_cell(backend: Backend, case: LSTMCase) -> dict[str, Tensor]:
    """Two training steps on one step of a cell; ``grad_output`` is not used."""
    state = bind_lstm(case)
    given = case.inputs
    x, h, c = given["x"][0], given["h"][0], given["c"][0]
    grad_h, grad_c = (given[k][0] if k in given else None for k in ("grad_h", "grad_c"))
    out: dict[str, Any] = {}
    for t in range(2):
        (layer,) = case.stack()
        short = backend.lstm_cell_forward(x, h, c, layer, False)
        trace = backend.lstm_cell_forward(x, h, c, layer, True)
        g = backend.lstm_cell_backward(grad_h, grad_c, x, h, c, layer, trace, case.need_dx, True)
        assert (g.x is not None) == case.need_dx
        out |= {f"{t}.short_h": short.h, f"{t}.short_c": short.c}
        out |= {f"{t}.h": trace.h, f"{t}.c": trace.c, f"{t}.dh": g.h, f"{t}.dc": g.c}
        out[f"{t}.dx"] = g.x
        out |= {f"{t}.{name}": made for name, made in _gradients((g.layer,)).items()}
        backend.lstm_update_((LSTMRows(x, h, g.delta),), (layer,), state.tensors(case.slots()))
    return _updated(case, state, out)


def run_close(backend: Backend, case: LSTMCase) -> dict[str, Tensor]:
    """A window's forward, and its backward between its two ends."""
    given, options, layers = case.inputs, case.options, case.stack()
    x, lengths = given["x"], given.get("lengths")
    trace = backend.lstm_forward(x, given["h"], given["c"], layers, lengths, (), True)
    fields = SynthesizerTensors._fields[1:5]
    synthesizer = SynthesizerTensors(
        options["kind"], **{k: case.parameters.get(f"synthesizer.{k}") for k in fields}
    )
    boundary = LSTMBoundary(
        synthesizer,
        given.get("ended"),
        float(x.shape[0] * x.shape[1]),
        **{name: options[name] for name in LSTMBoundary._fields[3:]},
    )
    statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64, device=x.device)
    closed = backend.lstm_close(
        given.get("grad_output"), given.get("grad_h"), given.get("grad_c"), x, layers, lengths,
        (), trace, case.need_dx, True, boundary, statistics if options["statistics"] else None,
    )  # fmt: skip
    g, lesson = closed.gradients, closed.regression
    out: dict[str, Any] = {"dh": g.h, "dc": g.c, "dx": g.x, "statistics": statistics}
    out |= _gradients(g.layers)
    if lesson is not None:
        out |= {"rows": lesson.rows, "grad": lesson.grad}
        out |= {"scaled": lesson.prediction.scaled, "reduced": lesson.prediction.reduced}
    made = closed.synthesizer
    if options["statistics"] and options["learns"] and (options["entrance"] or "ended" in given):
        # With no row to learn from they may be zero or left out.
        made = made or tuple(
            [None if p is None else torch.zeros_like(p) for p in synthesizer.parameters()]
        )
    out |= {f"d.synthesizer.{i}": gradient for i, gradient in enumerate(made)}
    return {name: t for name, t in out.items() if t is not None}


Run = Callable[[Backend, Any], dict[str, Tensor]]

# Every backend; of those that serve GPUs, tests need one where there is one.
BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.gpu if name in ("cuda", "triton") and torch.cuda.is_available() else (),
    )
    for name in registry.names()
]


def device_of(backend: Backend) -> str:
    """Where the backend is tested: on a CPU if it serves it, emulated or interpreted too."""
    one = torch.zeros(1, 1)
    return "cpu" if backend.why_not(one, one) is None else "cuda"


def set_threads(backend: Backend, threads: int) -> None:
    """Only the C++ kernels have threads of their own."""
    if backend.name != "cpu" and threads > 1:
        pytest.skip(f"{backend.name} has no threads of its own")
    torch.set_num_threads(threads)


def is_slow(backend: Backend) -> bool:
    """Whether kernels are interpreted, a thousand times slower than others: such a backend gets
    shorter windows and a part of the examples (test_triton_linear.py and test_triton_lstm.py have
    more)."""
    return backend.name == "triton" and device_of(backend) == "cpu"


# ---------------------------------------------------------------------------------------------
# Tolerances


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def disturbed(eps: float, generator: torch.Generator) -> Iterator[None]:
    """The reference, each stage disturbed as the module's head says."""

    def noise(t: Tensor) -> Tensor:
        return eps * torch.randn(t.shape, generator=generator, dtype=t.dtype)

    def relative(stage: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def staged(*args: Any, **kwargs: Any) -> Tensor:
            t = stage(*args, **kwargs)
            return t * (1 + noise(t))

        return staged

    exact = reference_linear.product

    def product(a: Tensor, b: Tensor, operands: torch.dtype, result: torch.dtype) -> Tensor:
        c = exact(a, b, operands, result)
        walk = (a.shape[1] * ((a * a) @ (b * b))).sqrt()
        return c + noise(c) * walk + noise(c) * c

    def sum_rows(a: Tensor) -> Tensor:
        c = a.sum(0)
        return c + noise(c) * (a.shape[0] * (a * a).sum(0)).sqrt()

    normalized = reference_linear.normalize

    def normalize(z: Tensor, *args: Any) -> Any:
        n, rstd, moments = normalized(z, *args)
        if rstd is None:
            return n, rstd, moments
        # z is a rounded number: the mean that is taken out of it leaves that rounding behind
        config: LinearConfig = args[1]
        shift = z.abs() * (rstd if config.normalization == "batch" else rstd[:, None])
        return n * (1 + noise(n)) + noise(n) * shift, rstd * (1 + noise(rstd)), moments

    with ExitStack() as stack:
        for module in (reference_linear, synthesizer_formulas, reference_lstm):
            stack.enter_context(mock.patch.object(module, "product", product))
            stack.enter_context(mock.patch.object(module, "sum_rows", sum_rows))
        stack.enter_context(mock.patch.object(reference_synthesizer, "sum_rows", sum_rows))
        for name in ("softmax", "less_known"):
            stage = getattr(synthesizer_formulas, name)
            stack.enter_context(mock.patch.object(synthesizer_formulas, name, relative(stage)))
        stack.enter_context(mock.patch.object(reference_linear, "normalize", normalize))
        for name in ("activate", "derivative_from_input", "derivative_from_output"):
            stage = getattr(reference_linear, name)
            stack.enter_context(mock.patch.object(reference_linear, name, relative(stage)))
        for name in ("squash", "next_cell", "shown", "next_hidden"):
            stage = getattr(reference_lstm, name)
            stack.enter_context(mock.patch.object(reference_lstm, name, relative(stage)))
        stepped = reference_lstm.step_backward

        def step_backward(*args: Tensor) -> tuple[Tensor, ...]:
            return tuple(t * (1 + noise(t)) for t in stepped(*args))

        stack.enter_context(mock.patch.object(reference_lstm, "step_backward", step_backward))
        yield


class _Known(NamedTuple):
    """What :func:`tolerances` found, and the versions of its tensors: nobody may write to them."""

    exact: dict[str, Tensor]
    allowed: dict[str, Tensor]
    versions: list[int]

    def written(self) -> list[int]:
        return [t._version for part in (self.exact, self.allowed) for t in part.values()]


# Backends are compared with the same numbers in the same cases, one after another: half of what
# these tests take was to derive them again. The latest are kept, by everything they follow from.
_known: OrderedDict[Any, _Known] = OrderedDict()
KNOWN = 100


def _fingerprint(case: Case | LSTMCase) -> tuple[Any, ...]:
    """Equal for equal cases alone."""

    def content(tensors: dict[str, Tensor]) -> bytes:
        digest = hashlib.blake2b()
        for name, t in tensors.items():
            flat = t.detach().cpu().reshape(-1).contiguous()
            digest.update(f"{name} {t.dtype} {tuple(t.shape)} ".encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.digest()

    plain = {f.name: getattr(case, f.name) for f in fields(case)}
    tensors = [content(plain.pop(name)) for name in ("inputs", "parameters")]
    return (type(case), *tensors, repr(plain))


def tolerances(
    run: Run, case: Case | LSTMCase, eps: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The float64 reference's results and, element by element, how far others may be from them.

    On one thread: two that wait for each other on a busy machine take a hundred times longer.
    """
    called: Any = run
    if isinstance(run, functools.partial):
        called = (run.func, run.args, tuple(sorted(run.keywords.items())))
    key = (called, eps, _fingerprint(case))
    if key in _known:
        _known.move_to_end(key)
    else:
        with threads(1):
            exact, allowed = _tolerances(run, case, eps)
        known = _Known(exact, allowed, [])
        _known[key] = known._replace(versions=known.written())
        if len(_known) > KNOWN:
            _known.popitem(last=False)
    found = _known[key]
    assert found.written() == found.versions, "a test wrote to what it was to compare with"
    return dict(found.exact), dict(found.allowed)


def _tolerances(
    run: Run, case: Case | LSTMCase, eps: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    wide = case.to(torch.float64, torch.float64)
    generator = torch.Generator().manual_seed(1)
    exact = run(REFERENCE, wide)
    square = {name: torch.zeros_like(t) for name, t in exact.items()}
    for _ in range(SAMPLES):
        trial = case.to(torch.float64, torch.float64)
        for t in (*trial.inputs.values(), *trial.parameters.values()):
            if t.is_floating_point():
                t *= 1 + eps * torch.randn(t.shape, generator=generator, dtype=t.dtype)
        with disturbed(eps, generator):
            for name, t in run(REFERENCE, trial).items():
                square[name] += (t - exact[name]) ** 2
    allowed = {}
    for name, t in exact.items():
        own = (square[name] / SAMPLES).sqrt()
        whole = (square[name].mean() / SAMPLES).sqrt()
        allowed[name] = SIGMAS * (own + whole) + 2 * eps * t.abs().max()
    return exact, allowed


def compare(got: dict[str, Tensor], exact: dict[str, Tensor], allowed: dict[str, Tensor]) -> None:
    """Assert that the same results exist and that each is within its tolerance."""
    assert got.keys() == exact.keys(), got.keys() ^ exact.keys()
    for name, t in got.items():
        assert t.shape == exact[name].shape, name
        t = t.cpu()
        error = (t.double() - exact[name]).abs()
        excess = torch.where(torch.isfinite(error), error - allowed[name], torch.inf)
        worst = int(excess.argmax())
        assert excess.max() <= 0, (
            f"{name} {tuple(t.shape)}: element {worst} is {t.flatten()[worst].item()!r}, "
            f"should be {exact[name].flatten()[worst].item()!r} "
            f"within {allowed[name].flatten()[worst].item():.2e}"
        )
