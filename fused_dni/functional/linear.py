"""The fused linear layer as differentiable function: exact, or with a synthetic gradient.

Nothing here changes a parameter. Gradients are returned by the node, so hooks, accumulation,
clipping, DDP and any ``torch.optim`` optimizer see them as they see those of ``F.linear``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_dni import ops
from fused_dni.backends.common.synthesizer import synthetic_gradient
from fused_dni.functional import check
from fused_dni.ops import registry
from fused_dni.ops.types import (
    FROM_OUTPUT,
    Backend,
    LinearConfig,
    LinearGradients,
    LinearTensors,
    Prediction,
    RuleTensors,
    Saved,
    Step,
    SynthesizerTensors,
)

TWICE = (
    "a decoupled layer's node was run backward a second time: its local gradient would be "
    "delivered twice; run the forward again (retain_graph=True does not help here)"
)


class Locality(NamedTuple):
    """How a decoupled layer's gradient is made in this call.

    Attributes:
        kind: the synthesizer's kind.
        true_share: share of the arriving gradient in the gradient used: 0 is plain DNI, 1 warm-up,
            between them mixing.
        target: train the synthesizer on what arrives.
        target_scale: kappa.
        max_norm: bound of the synthetic gradient's Frobenius norm; 0 for none.
        loss_scale: factor on the loss, as of a ``GradScaler``.
    """

    kind: str
    true_share: float
    target: bool
    target_scale: float
    max_norm: float
    loss_scale: float


def mixed_gradient(
    arrived: Tensor | None,
    scaled: Tensor | None,
    share: float,
    target_scale: float,
    max_norm: float,
) -> Tensor | None:
    """``share * arrived + (1 - share) * synthetic``, the synthetic gradient made from ``scaled`` =
    M(h); None if that has no defined part."""
    if share == 1.0 or scaled is None:
        return arrived
    synthetic = synthetic_gradient(Prediction(scaled), target_scale, max_norm)
    if share == 0.0:
        return synthetic
    if arrived is None:
        return (1.0 - share) * synthetic
    return share * arrived.to(synthetic.dtype) + (1.0 - share) * synthetic


def preactivation_gradients(
    backend: Backend,
    delta: Tensor,
    x: Tensor,
    h: Tensor,
    layer: LinearTensors,
    config: LinearConfig,
    need_dx: bool,
    need_weight: bool,
) -> LinearGradients:
    """From a gradient at z [N, O] alone: those of x and weight on demand, and the bias's (zero in
    front of a batch normalisation in training, which removes what a bias does). No other is known.
    h [N, O] is not read, but for its shape."""
    bare = LinearTensors(layer.weight, layer.bias)
    made = ops.linear_backward(
        backend, delta, x, h, Saved(), bare, LinearConfig(), True, need_dx, need_weight
    )
    if made.bias is not None and config.normalization == "batch":
        made = made._replace(bias=torch.zeros_like(made.bias))
    return made


class _Linear(torch.autograd.Function):
    """Inputs: x, 4 layer slots, 4 synthesizer slots (differentiable), then what is not.

    With the interface at the preactivation what arrives at h is taken back to z first, on steps
    with targets; the normalisation's scale and shift get their true gradients there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        synthesizer_weight: Tensor | None,
        down: Tensor | None,
        context_weight: Tensor | None,
        synthesizer_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        context: Tensor | None,
        statistics: Tensor | None,
        config: LinearConfig,
        training: bool,
        backend: Backend,
        how: Locality | None,
        need_dx: bool,
    ) -> Tensor:
        layer = LinearTensors(weight, bias, norm_weight, norm_bias, running_mean, running_var)
        h, saved = ops.linear_forward(backend, x, layer, config, training, save=True)
        ctx.set_materialize_grads(False)
        # An exact layer whose derivative does not need h leaves it to be overwritten behind it.
        reads_h = config.activation in FROM_OUTPUT and config.activation != "identity"
        keep = how is not None or reads_h
        ctx.save_for_backward(
            x,
            h if keep else None,
            *saved,
            weight,
            bias,
            norm_weight,
            norm_bias,
            synthesizer_weight,
            down,
            context_weight,
            synthesizer_bias,
            context,
        )
        ctx.statistics = statistics
        ctx.running = (running_mean, running_var)
        ctx.how = how
        ctx.need_dx = need_dx
        ctx.call = (config, training, backend)
        ctx.spent = False
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arrived: Tensor | None) -> tuple[Tensor | None, ...]:
        config, training, backend = ctx.call
        how: Locality | None = ctx.how
        none: tuple[Tensor | None, ...] = (None,) * 18
        if how is None and arrived is None:
            return none
        (x, h, normalized, rstd, weight, bias, norm_weight, norm_bias, *slots, context) = (
            ctx.saved_tensors
        )
        layer = LinearTensors(weight, bias, norm_weight, norm_bias, *ctx.running)
        saved = Saved(normalized, rstd)
        scale = 1.0
        prediction: Prediction | None = None
        gradient = arrived
        inside = how is not None and config.interface == "preactivation"
        behind: tuple[Tensor | None, ...] = (None, None)
        trained: tuple[Tensor | None, ...] = (None,) * 4
        if how is not None:
            if not torch.compiler.is_compiling():
                if ctx.spent:
                    raise RuntimeError(TWICE)
                ctx.spent = True
            scale = how.loss_scale
            if scale != 1.0 and arrived is not None:
                arrived = arrived / scale
            learns = how.target and arrived is not None
            if inside and learns and arrived is not None:
                true = ops.linear_backward(
                    backend,
                    arrived.contiguous(),
                    x,
                    h,
                    saved,
                    layer,
                    config,
                    training,
                    False,
                    False,
                )
                arrived, behind = true.delta, (true.norm_weight, true.norm_bias)
            tensors = SynthesizerTensors(how.kind, *slots)
            if learns or how.true_share < 1.0:
                prediction = ops.synthesizer_predict(backend, h, tensors, context)
            gradient = mixed_gradient(
                arrived,
                None if prediction is None else prediction.scaled,
                how.true_share,
                how.target_scale,
                how.max_norm,
            )
            if learns and prediction is not None and arrived is not None:
                trained = ops.synthesizer_gradients(
                    backend,
                    h,
                    prediction,
                    arrived.contiguous(),
                    tensors,
                    context,
                    how.target_scale,
                    ctx.statistics,
                )
            if gradient is None:
                return none
        assert gradient is not None
        gradient = gradient.contiguous()
        need_dx, need_weight = ctx.need_dx and ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        if inside:
            made = preactivation_gradients(
                backend, gradient, x, h, layer, config, need_dx, need_weight
            )
        else:
            made = ops.linear_backward(
                backend,
                gradient,
                x,
                gradient if h is None else h,  # not read then, but for its shape
                saved,
                layer,
                config,
                training,
                need_dx,
                need_weight,
            )
            behind = (made.norm_weight, made.norm_bias)
        out = (made.x, made.weight, made.bias, *behind, *trained)
        wanted = [t if want else None for t, want in zip(out, ctx.needs_input_grad, strict=False)]
        if scale != 1.0:
            wanted = [None if t is None else t * scale for t in wanted]
        return (*wanted, *none[len(wanted) :])


def linear_tensors(
    x: Tensor,
    layer: LinearTensors,
    config: LinearConfig,
    training: bool,
    backend: Backend,
    synthesizer: SynthesizerTensors | None = None,
    context: Tensor | None = None,
    statistics: Tensor | None = None,
    how: Locality | None = None,
    need_dx: bool = True,
) -> Tensor:
    """:class:`_Linear` on checked two-dimensional tensors (what the modules call).

    ``need_dx=False`` says that the producer of x wants no gradient though x asks for one.
    """
    slots = (None, None, None, None) if synthesizer is None else synthesizer.parameters()
    h: Tensor = _Linear.apply(
        x,
        *layer[:4],
        *slots,
        *layer[4:],
        context,
        statistics,
        config,
        training,
        backend,
        how,
        need_dx,
    )
    return h


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    normalization: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    eps: float = 1e-5,
    momentum: float = 0.1,
    activation: str = "identity",
    backend: str | None = None,
) -> Tensor:
    """``activation(normalization(input @ weight.T + bias))`` with its exact gradient, fused.

    Args:
        input: [..., I], floating point.
        weight: [O, I]. bias: [O] or None.
        normalization: None, "batch" (over all leading dimensions) or "layer".
        norm_weight, norm_bias: [O] or None, scale and shift of the normalisation.
        running_mean, running_var: [O]; needed by "batch", which moves them in training (mutated).
        training: batch statistics (and moving the running ones) instead of the running ones.
        eps, momentum: as in ``nn.BatchNorm1d`` / ``nn.LayerNorm``.
        activation: one of ``fused_dni.ops.types.ACTIVATIONS``.
        backend: force one by name.

    Returns:
        [..., O].

    Raises:
        ValueError: an unknown name, or batch statistics over a single row.
        RuntimeError: a shape, dtype or device that does not fit, or a backend that cannot serve.
    """
    check.options(normalization, activation)
    layer = LinearTensors(weight, bias, norm_weight, norm_bias, running_mean, running_var)
    config = LinearConfig(normalization, activation, eps, momentum)
    check.layer(layer, config)
    x = check.rows(input, weight, "input")
    check.batch(x, config, training)
    h = linear_tensors(x, layer, config, training, registry.resolve(backend, x, weight))
    return h.reshape(*input.shape[:-1], weight.shape[0])


def linear_step_(
    input: Tensor,
    layer: LinearTensors,
    config: LinearConfig,
    synthesizer: SynthesizerTensors,
    rule: RuleTensors,
    *,
    context: Tensor | None = None,
    target_scale: float | None = None,
    max_norm: float | None = None,
    need_dx: bool = False,
    need_prediction: bool = True,
    backend: str | None = None,
) -> Step:
    """Forward, synthetic gradient and update of a decoupled linear layer, in one launch.

    Args:
        input: [N, I].
        layer, rule: the layer's parameters and the rule that updates them; mutated.
        config: normalisation, activation and interface.
        synthesizer: predicts the gradient at the interface; only read.
        context: int64 [N] or floating point [N, K], if the synthesizer has a context weight.
        target_scale: kappa; None for N.
        max_norm: bound of the synthetic gradient's Frobenius norm; None for none.
        need_dx: return dL/dinput, taken with the weights as they were.
        need_prediction: return what :func:`synthesizer_update_` needs; with the interface at the
            preactivation also what :func:`linear_backward` needs to take a gradient at h there.
        backend: force one by name.

    Returns:
        h [N, O], and prediction (with ``saved``) and dx [N, I] on demand. None of them carries a
        graph.

    Raises:
        IndexError: a class index outside ``[0, K)``; nothing has been changed then.
        RuntimeError, ValueError: as :func:`linear`.

    A gradient that is not finite changes nothing but the rule's skip counter.
    """
    check.options(config.normalization, config.activation, config.interface)
    if config.interface == "preactivation" and any(rule.trainable[2:]):
        raise ValueError(
            "interface='preactivation' makes no gradient for norm_weight and norm_bias: rule must "
            f"not train them, got trainable={rule.trainable}"
        )
    check.layer(layer, config)
    check.synthesizer(synthesizer, layer.weight)
    x = check.rows(input, layer.weight, "input")
    check.batch(x, config, True)
    found = registry.resolve(backend, x, layer.weight)
    scale = float(x.shape[0]) if target_scale is None else target_scale
    return ops.linear_step_(
        found,
        x,
        layer,
        config,
        synthesizer,
        context,
        scale,
        max_norm or 0.0,
        rule,
        need_dx,
        need_prediction,
    )
