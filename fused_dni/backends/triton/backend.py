"""The Triton backend: ``fused_dni.kernels`` behind the signature of :mod:`fused_dni.ops.types`.

Serves CUDA tensors and, where ``TRITON_INTERPRET=1`` was set before Triton was first imported,
tensors on a CPU (slowly: for tests). Launches go to the current stream of the tensors' device,
read nothing back and allocate with torch, so that they can be captured in a CUDA graph.

x may be float32, or bfloat16 or float16 with float32 parameters or parameters of its own dtype.
float32 products follow ``torch.get_float32_matmul_precision()``: "highest" is IEEE arithmetic (of
the LSTM's own products three TF32 ones, see fused_dni.kernels.lstm), anything else TF32. Operands
of the gradients' products are in bfloat16 for a bfloat16 x, and in TF32 for a float16 one (its
digits, with room for small gradients).

What needs a look at the data, a class index out of range say, is an exception on a CPU. On a GPU
nothing waits for it: the prediction is NaN there, the update skipped and counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from fused_dni.backends.common.gpu import (
    Backward,
    Forward,
    GpuStep,
    Predict,
    Train,
    Update,
)
from fused_dni.backends.common.precision import LOW_PRECISION
from fused_dni.backends.triton.launching import (
    architecture,
    barrier_on,
    precision,
    resident,
    run,
    shared_by,
    stream,
)
from fused_dni.backends.triton.lstm import TritonLSTM
from fused_dni.kernels import linear, tuning
from fused_dni.kernels import synthesizer as synthesizer_kernels
from fused_dni.kernels.launch import Launch
from fused_dni.ops import results
from fused_dni.ops.types import (
    LinearConfig,
    LinearTensors,
    RuleTensors,
    Step,
)


class _Prepared(NamedTuple):
    """A step's tensors with the workspace for one shape of batches, and the launches planned for
    it, without tensors."""

    tensors: linear.Tensors
    plans: dict[tuple[bool | str, ...], list[Launch]]


class _Step(GpuStep):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        layer, synthesizer, rule = self.layer, self.synthesizer, self.rule
        # Otherwise nobody in the step reads what a backward would, and it is written on demand.
        self.goes_back = self.config.interface == "output"
        self.problem = _problem(self.config, layer, True)._replace(
            source=synthesizer.kind, interface=self.config.interface, max_norm=self.max_norm,
            rule=rule.kind, nesterov=rule.nesterov, trainable=_four(rule.trainable),
            ignored=synthesizer.ignore_index,
        )  # fmt: skip
        self.fixed = linear.Tensors(
            None, *layer, synthesizer_weight=synthesizer.weight, down=synthesizer.down,
            context_weight=synthesizer.context_weight, synthesizer_bias=synthesizer.bias,
            table=synthesizer.table, **_rule(rule),
        )  # fmt: skip
        current = stream(layer.weight.device)
        if current is not None:  # so that the first call may be a captured one
            shared_by(layer.weight.device, current)

    def launch(
        self, x: Tensor, labels: Tensor | None, vectors: Tensor | None, scale: float, made: Step
    ) -> None:
        x, (h, prediction, dx, saved) = x.contiguous(), made
        tiles = _tiles("linear_step", x, self.layer.weight, self.problem.rule)
        current, barrier = stream(x.device), None
        if tiles.launches == "one":
            barrier = barrier_on(x.device, current)
        key = None if current is None else (x.shape[0], x.dtype, tiles, current)
        prepared = self.workspace_for(key, lambda: _Prepared(self._workspace(x, h, tiles), {}))
        scaled, reduced = (None, None) if prediction is None else prediction
        t = prepared.tensors._replace(
            x=x, h=h, dx=dx, labels=labels, vectors=vectors, scaled=scaled, barrier=barrier,
            reduced=prepared.tensors.reduced if reduced is None else reduced,
        )  # fmt: skip
        if saved is not None:
            t = t._replace(normalized=saved.normalized, rstd=saved.rstd)
        problem = self.problem._replace(target_scale=scale, precision=precision())
        given = (dx is None, prediction is None, labels is None)
        kind = (*given, precision(), x.data_ptr() % 16 == 0)
        planned = prepared.plans.get(kind)
        if planned is None:
            planned = linear.plan(
                t, problem, tiles, linear.STEP_PHASES, _sizes(t), resident(x.device)
            )
            prepared.plans[kind] = linear.unbind(planned)
        else:
            planned = linear.bind(planned, t, problem, tiles)
        run(planned, x.device)

    def _workspace(self, x: Tensor, h: Tensor, tiles: linear.Tiles) -> linear.Tensors:
        """Return the step's tensors with a workspace for a batch like x."""
        t = self.fixed._replace(x=x, h=h)
        if self.goes_back:
            normalized, rstd = results.saved_of(h, self.config, torch.float32)
            t = t._replace(normalized=normalized, rstd=rstd)
        if t.down is not None:
            reduced = x.new_empty(x.shape[0], t.down.shape[0], dtype=torch.float32)
            t = t._replace(reduced=reduced)
        low = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        t = t._replace(delta=x.new_empty(h.shape, dtype=low))
        t = linear.workspace(t, self.problem, tiles, linear.STEP_PHASES)
        return t._replace(x=None, h=None)


class TritonBackend(TritonLSTM):
    """:class:`fused_dni.ops.types.Backend` in Triton."""

    name = "triton"

    bind_step = _Step

    def __init__(self) -> None:
        # Looked up here, once: torch.compile traces why_not and cannot look into the environment.
        self.interpreted: bool = knobs.runtime.interpret
        self.old: dict[torch.device, str] = {}
        for index in range(torch.cuda.device_count()):
            if torch.cuda.get_device_capability(index) < (8, 0):
                self.old[torch.device("cuda", index)] = torch.cuda.get_device_name(index)

    def available(self) -> str | None:
        """Say why kernels cannot run here at all; None if they can."""
        if not self.interpreted and not torch.cuda.is_available():
            return (
                "needs a CUDA device (torch.cuda.is_available() is false), or TRITON_INTERPRET=1 "
                "in the environment to be interpreted on a CPU"
            )
        return None

    def why_not(self, x: Tensor, weight: Tensor) -> str | None:
        """Say why these tensors cannot be served; None if they can."""
        here = "cpu" if self.interpreted else "cuda"
        how = " while it is interpreted (TRITON_INTERPRET=1)"
        if why := self.elsewhere(x, weight, here, how):
            return why
        if x.device in self.old:
            return f"needs compute capability 8.0 or newer, got {self.old[x.device]}"
        if not (x.dtype == weight.dtype == torch.float32 or x.dtype in LOW_PRECISION) or (
            x.dtype in LOW_PRECISION and weight.dtype not in (torch.float32, x.dtype)
        ):
            return (
                "serves float32, or a bfloat16 or float16 x with parameters of its dtype or "
                f"float32, got x {x.dtype} and weight {weight.dtype}"
            )
        return None

    def launch_forward(self, of: Forward) -> None:
        """Launch the phases of ``linear_forward``."""
        x, layer, config, training, h, saved = of
        t = linear.Tensors(
            x.contiguous(), *layer, h=h, normalized=saved.normalized, rstd=saved.rstd
        )
        tiles = _tiles("linear_forward", x, layer.weight, "none")
        _launch(t, _problem(config, layer, training), tiles, linear.FORWARD_PHASES)

    def launch_backward(self, of: Backward) -> None:
        """Launch the phases of ``linear_backward``."""
        grad_h, x, h, saved, layer, config, training, made = of
        trainable = _four([g is not None for g in made[2:]])
        problem = _problem(config, layer, training)._replace(source="given", trainable=trainable)
        t = linear.Tensors(
            x.contiguous(), *layer, grad_h=grad_h, h=h, normalized=saved.normalized,
            rstd=saved.rstd, delta=made.delta, dx=made.x, grad_weight=made.weight,
            grad_bias=made.bias, grad_norm_weight=made.norm_weight, grad_norm_bias=made.norm_bias,
        )  # fmt: skip
        tiles = _tiles("linear_backward", x, layer.weight, "none")
        _launch(t, problem, tiles, linear.BACKWARD_PHASES)

    def launch_update(self, of: Update) -> None:
        """Launch the phases of ``linear_update_``."""
        x, gradients, layer, rule = of
        tiles = _tiles("linear_update", x, layer.weight, rule.kind)
        t = linear.Tensors(
            x.contiguous(), *layer[:4], delta=gradients.delta, grad_bias=gradients.bias,
            grad_norm_weight=gradients.norm_weight, grad_norm_bias=gradients.norm_bias,
            **_rule(rule),
        )  # fmt: skip
        problem = linear.Problem(
            rule=rule.kind, nesterov=rule.nesterov, trainable=_four(rule.trainable),
            precision=precision(),
        )  # fmt: skip
        _launch(t, problem, tiles, linear.UPDATE_PHASES)

    def launch_predict(self, of: Predict) -> None:
        """Launch ``synthesizer_predict``."""
        _launch_synthesizer("synthesizer_predict", _synthesizer(of), _learning(of, False))

    def launch_train(self, of: Train) -> None:
        """Launch ``synthesizer_gradients`` or ``synthesizer_update_``."""
        t = _synthesizer(of.predicted)._replace(grad_h=of.grad_h, statistics=of.statistics)
        problem, to = _learning(of.predicted, True, of.target_scale), of.to
        if isinstance(to, RuleTensors):
            moments = _moments(to, ("weight", "down", "context", "bias"))
            t = t._replace(hyper=to.hyper, **moments)
            problem = problem._replace(
                rule=to.kind, nesterov=to.nesterov, trainable=_four(to.trainable)
            )
        else:
            weight, down, context, bias = to
            t = t._replace(grad_weight=weight, grad_down=down, grad_context=context, grad_bias=bias)
            problem = problem._replace(trainable=_four([g is not None for g in to]))
        _launch_synthesizer("synthesizer_train", t, problem)


def _problem(config: LinearConfig, layer: LinearTensors, training: bool) -> linear.Problem:
    return linear.Problem(
        norm=config.normalization or "none",
        statistics=training or layer.running_mean is None,
        activation=config.activation,
        eps=config.eps,
        momentum=config.momentum,
        precision=precision(),
    )


def _tiles(op: str, x: Tensor, weight: Tensor, rule: str) -> linear.Tiles:
    rows, (outputs, inputs) = x.shape[0], weight.shape

    def default() -> linear.Tiles:
        kind = architecture(x.device)
        return linear.default_tiles(rows, inputs, outputs, x.dtype, rule, precision(), kind)

    variant = f"{rule}-{precision()}"
    return tuning.choose(op, (rows, inputs, outputs), x.dtype, x.device, default, variant)


def _sizes(t: linear.Tensors) -> tuple[int, int, int, int, int]:
    outputs, inputs = t.weight.shape
    rank = 0 if t.down is None else t.down.shape[0]
    return t.x.shape[0], inputs, outputs, rank, _classes(t)


def _classes(t: Any) -> int:
    if t.table is not None:
        return int(t.table.shape[0])
    return 0 if t.context_weight is None else int(t.context_weight.shape[1])


def _launch(
    t: linear.Tensors, problem: linear.Problem, tiles: linear.Tiles, phases: tuple[int, int]
) -> None:
    device = t.x.device
    if tiles.launches == "one":
        t = t._replace(barrier=barrier_on(device, stream(device)))
    t = linear.workspace(t, problem, tiles, phases)
    run(linear.plan(t, problem, tiles, phases, _sizes(t), resident(device)), device)


def _four(values: Any) -> tuple[bool, bool, bool, bool]:
    a, b, c, d = values
    return bool(a), bool(b), bool(c), bool(d)


def _moments(rule: RuleTensors, slots: tuple[str, ...]) -> dict[str, Tensor | None]:
    """Name moments as the kernels name the slots."""
    return {
        f"{order}_{slot}": moment
        for order, moments in (("first", rule.first), ("second", rule.second))
        for slot, moment in zip(slots, moments, strict=True)
    }


def _rule(rule: RuleTensors) -> dict[str, Tensor | None]:
    slots = ("weight", "bias", "norm_weight", "norm_bias")
    return {"hyper": rule.hyper, **_moments(rule, slots)}


def _learning(of: Predict, trains: bool, scale: float = 1.0) -> synthesizer_kernels.Problem:
    kind, ignored = of.synthesizer.kind, of.synthesizer.ignore_index
    return synthesizer_kernels.Problem(kind, trains, scale, precision=precision(), ignored=ignored)


def _synthesizer(of: Predict) -> synthesizer_kernels.Tensors:
    slots, table = of.synthesizer.parameters(), of.synthesizer.table
    scaled, reduced = of.made
    return synthesizer_kernels.Tensors(
        of.h, *slots, table, of.labels, of.vectors, scaled=scaled, reduced=reduced
    )


def _launch_synthesizer(
    op: str, t: synthesizer_kernels.Tensors, problem: synthesizer_kernels.Problem
) -> None:
    rows, outputs = t.h.shape
    device, dtype = t.h.device, t.h.dtype

    def default() -> synthesizer_kernels.Tiles:
        return synthesizer_kernels.default_tiles(rows, outputs, dtype, architecture(device))

    tiles = tuning.choose(op, (rows, outputs), dtype, device, default)
    rank = 0 if t.down is None else t.down.shape[0]
    if tiles.launches == "one":
        t = t._replace(barrier=barrier_on(device, stream(device)))
    t = synthesizer_kernels.workspace(t, problem, tiles, rank)
    sizes = (rows, outputs, rank, _classes(t))
    run(synthesizer_kernels.plan(t, problem, tiles, sizes, resident(device)), device)
