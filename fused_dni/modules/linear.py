"""``FusedDNILinear``: ``nn.Linear`` with normalisation, activation and its own gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_dni import ops
from fused_dni.context import fold_context, note_checkpoint
from fused_dni.functional import check
from fused_dni.functional.linear import exact_linear
from fused_dni.modules import nodes
from fused_dni.modules.base import NO_TARGET, leaf, untraced
from fused_dni.modules.nodes import Exact, Mixed, Taught
from fused_dni.modules.quick import quicken, way
from fused_dni.modules.steps import Binding, LinearInputs, LinearSteps
from fused_dni.modules.target_unit import note_replicas
from fused_dni.ops import registry
from fused_dni.ops.types import (
    Backend,
    LinearConfig,
    LinearTensors,
)
from fused_dni.rules import Rule, RuleState
from fused_dni.synthesizers import LinearSynthesizer

# The smallest rank that costs no accuracy on MNIST: docs/benchmarks.md, "The default synthesizer".
DEFAULT_RANK = 16

_ACTIVATION_MODULES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "relu": (nn.ReLU, {}),
    "gelu": (nn.GELU, {}),
    "gelu_tanh": (nn.GELU, {"approximate": "tanh"}),
    "silu": (nn.SiLU, {}),
    "tanh": (nn.Tanh, {}),
    "sigmoid": (nn.Sigmoid, {}),
    "softplus": (nn.Softplus, {}),
    "mish": (nn.Mish, {}),
}


def activation_name(module: nn.Module) -> str | None:
    """Name of the fused activation that equals ``module``, or None if there is none."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if type(module) is nn.Softplus and (module.beta != 1 or module.threshold != 20):
        return None
    for name, (cls, _) in _ACTIVATION_MODULES.items():
        if type(module) is cls:
            return name
    return "identity" if type(module) is nn.Identity else None


_Binding = Binding  # whole modules that were pickled look it up here


class FusedDNILinear(LinearSteps):
    """A linear layer, with optional normalisation and activation, that predicts its own gradient.

    ``h = activation(normalization(x @ weight.T + bias))``. In training a synthesizer predicts
    dL/dh from h; the layer's gradient is taken from the prediction, and the synthesizer is
    trained by regression on the gradient that arrives at h in the backward (Jaderberg et al. 2016,
    arXiv 1608.05343). With ``interface="preactivation"`` it predicts, from h still, the gradient at
    z = x @ weight.T + bias: no update has to go back through activation and normalisation, and
    what arrives is taken back to z for the synthesizer to learn from, on steps with targets alone.
    Scale and shift of the normalisation, which no prediction reaches then, learn there too, from
    the gradient that arrived. In ``eval()`` and under ``no_grad()`` it is exactly the plain layer.

    With ``update=None`` it is a drop-in for ``nn.Linear``: gradients land in ``.grad`` and any
    optimizer and training loop work. With a rule the layer updates itself inside its forward, in
    the same kernel launch (or, where the true gradient is needed, at the end of the backward).

    Args:
        in_features: I. out_features: O.
        bias: whether there is an additive bias. In front of batch normalisation its gradient is
            exactly zero.
        normalization: None, "batch" (as ``nn.BatchNorm1d``) or "layer" (as ``nn.LayerNorm``).
        activation: "identity", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "softplus"
            or "mish".
        synthesizer: "default" for ``LinearSynthesizer(O, rank=min(16, O), context_features)``;
            None for backprop on the same kernels; or a module (see
            :mod:`fused_dni.synthesizers` for the protocol).
        context_features: K of the default synthesizer: number of classes or size of the
            conditioning vector; 0 for none.
        interface: where the gradient is predicted: "output" for the one at h, "preactivation" for
            the one at z, in front of normalisation and activation.
        update: rule (``SGD``, ``Adam``, ``AdamW``) for the layer's own parameters, or None.
        synthesizer_update: rule for the synthesizer; None for the same as ``update``.
        target_scale: kappa: the synthesizer learns so many times the gradient. None for the number
            of rows, by which a mean loss divides, over a power of two that follows the size of the
            gradients, so that the loss may have any scale. A number is taken as it is.
        max_norm: bound of the synthetic gradient's Frobenius norm; None for no clipping.
        eps, momentum: of the normalisation; a cumulative average (``momentum=None``) has no fused
            form.
        backend: force a backend by name.
        device, dtype: of the parameters.

    Shape:
        input [..., I] to output [..., O]; leading dimensions are rows of one batch.

    Attributes:
        weight: [O, I]. bias: [O] or None. norm: ``nn.BatchNorm1d``, ``nn.LayerNorm`` or None, the
        holder of scale, shift and running statistics. Initialised as PyTorch's layers.

    Raises:
        ValueError: an unknown name, a rate or size out of range, context missing or unexpected,
            one row under batch normalisation in training.
        RuntimeError: a shape, dtype or device that does not fit, an empty batch in training, a use
            in which a fused rule would be silently wrong (DDP, checkpointing, an untold loss
            scale, replaced or tied parameters), a second backward through one forward.
        IndexError: a class index outside ``[0, K)``.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    norm: nn.BatchNorm1d | nn.LayerNorm | None
    # What was found in the normalisation's holder when it was last looked at.
    _seen: tuple[Any, ...] = ()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        normalization: str | None = None,
        activation: str = "identity",
        synthesizer: nn.Module | str | None = "default",
        context_features: int = 0,
        interface: str = "output",
        update: Rule | None = None,
        synthesizer_update: Rule | None = None,
        target_scale: float | None = None,
        max_norm: float | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check.sizes(in_features=in_features, out_features=out_features)
        check.flags(bias=bias)
        check.options(normalization, activation, interface)
        check.number("eps", eps)
        check.number("momentum", momentum, high=1.0)
        check.backend(backend)
        check.dtype(dtype)
        check.whole("context_features", context_features, 0)
        if isinstance(synthesizer, str):
            if synthesizer != "default":
                raise ValueError(
                    f"synthesizer must be 'default', None or a module, got {synthesizer!r}"
                )
        elif context_features:
            raise ValueError(
                "context_features belongs to the default synthesizer; give it to the synthesizer "
                f"itself, got context_features={context_features} with {synthesizer!r}"
            )
        if synthesizer is None and interface != "output":
            raise ValueError(
                f"interface={interface!r} says what a synthesizer predicts; got synthesizer=None"
            )
        features = getattr(synthesizer, "features", out_features)
        if features != out_features:
            raise ValueError(
                f"synthesizer has features={features}, the layer out_features={out_features}"
            )
        super().__init__(update, synthesizer_update, target_scale, max_norm)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features = in_features
        self.out_features = out_features
        self.backend = backend
        self.config = LinearConfig(normalization, activation, eps, momentum, interface)
        plain = nn.Linear(in_features, out_features, bias, **factory)
        if isinstance(synthesizer, str):  # behind the weight: a seed gives that of nn.Linear
            rank = min(DEFAULT_RANK, out_features)
            synthesizer = LinearSynthesizer(out_features, rank, context_features, **factory)
        self.weight = cast(nn.Parameter, plain.weight)
        self.bias = cast("nn.Parameter | None", plain.bias)
        if normalization == "batch":
            self.norm = nn.BatchNorm1d(out_features, eps, momentum, **factory)
        elif normalization == "layer":
            self.norm = nn.LayerNorm(out_features, eps, **factory)
        else:
            self.register_module("norm", None)
        self._binding = Binding()
        self._flat = False  # whether input must be [N, I]: see from_linear
        self.attach(synthesizer, synthesizer_update or update)
        # Scale and shift do not move in a step, but with the synthesizer: a rule with counts of its
        # own.
        self.norm_update: RuleState | None = None
        if update is not None and normalization is not None and self._inside():
            self.norm_update = RuleState(update)

    # -- forward -------------------------------------------------------------------------------

    def forward(self, input: Tensor, context: Tensor | None = None) -> Tensor:
        """Run the layer; see the class.

        Args:
            input: [..., I].
            context: class indices int64 [...] or conditioning vectors [..., K]; None to take it
                from :func:`fused_dni.condition_on`.

        Returns:
            [..., O].
        """
        tracing = torch.compiler.is_compiling()
        if not tracing:
            quick = self._quick(input, context)
            if quick is not None:
                return quick
        if torch._C._get_tracing_state() is not None:
            return self._recorded(input)
        called: Tensor | None = (
            None if type(input) is Tensor else leaf(self, input, context=context)
        )
        if called is not None:
            return called
        layer = self._layer()
        norm = self._modules["norm"]
        config = self.config
        if norm is not None:
            own = norm.__dict__  # what users change of it behind its construction
            seen = (type(norm), own.get("eps"), own.get("momentum"), own.get("track_running_stats"))
            if seen != self._seen:
                config = self._followed(norm, seen)
        x = check.rows(input, layer.weight, "input")
        training, grad = self.training, torch.is_grad_enabled()
        if training or self._flat:
            self._refuse_batch(input.shape, x.shape[0], "input")
        if x.shape[0] == 0:  # in eval()
            return self._recorded(input)
        backend = registry.resolve(self.backend, x, layer.weight)
        decoupled = training and grad and self._modules["synthesizer"] is not None
        rows = self._rows(input, context) if decoupled or context is not None else None
        if not grad:
            if training:
                note_checkpoint()
            self._fit(layer)
            h, _ = ops.linear_forward(backend, x, layer, config, training, False)
            self._count_batch()
            return self._unfold(h, input)
        need_dx = tracing or (x.requires_grad and getattr(input, NO_TARGET, None) != input._version)
        if not training:
            self._fit(layer)
            h = exact_linear(x, layer, config, False, backend, need_dx)
            return self._unfold(h, input)
        if self.update is not None and layer.weight.is_meta:
            raise RuntimeError(
                "a fused rule cannot train parameters on the meta device: give them memory first, "
                "by to_empty(device=...) and reset_parameters()"
            )
        phase = self.phase
        if x.dtype is torch.float16 and (decoupled or self.update is not None):
            self.refuse_untold_scale(x.device.type)
        if phase.probe is not None:
            self._fit(layer, self.fused_synthesizer(x))
            return self._probed(x, input, layer, backend, rows)
        inputs = LinearInputs(x, layer, backend)
        if decoupled and self.delivery is not None:
            h = nodes.delivered(self, inputs, (x,), rows)
        elif self.update is not None:
            run = untraced(nodes.ruled) if tracing else nodes.ruled
            h = run(self, inputs, (x,), rows, need_dx)
        elif decoupled:
            h = self._local(inputs, rows, need_dx)
        else:
            self._fit(layer)
            h = exact_linear(x, layer, config, True, backend, need_dx)
        self._count_batch()
        h = self._unfold(h, input)
        if decoupled and not tracing and not (phase.target or phase.warmup):
            setattr(h, NO_TARGET, h._version)
        as_given = x.shape == input.shape  # of another type under autocast
        if type(self) is FusedDNILinear and self.update is not None and as_given and not tracing:
            quicken(self, backend, rows)
        return h

    def _quick(self, input: Tensor, context: Tensor | None) -> Tensor | None:
        """Run the step as one call, if there is one and nothing is in its way."""
        bound = self._binding
        phase = self.phase
        h: Tensor | None = None
        if self._modules["synthesizer"] is None:
            if bound.exact is not None:
                made = bound.exact.forward(self, input, context)
                if made is not None:
                    h = Exact.run(self, made, bound.anchor, input)
        elif phase.warmup or (phase.target and phase.mix):
            if bound.exact is not None and self.training and torch.is_grad_enabled():
                return self._quick_mixed(input, context)
        elif bound.quick is not None:
            made = bound.quick(self, input, context)
            h = made if type(made) is not tuple else Taught.run(self, made, bound.anchor, input)
        return h

    def _quick_mixed(self, input: Tensor, context: Tensor | None) -> Tensor | None:
        """Run the forward of a step by the true gradient, or mixed with it, as one call; its
        backward is one too, and lets the synthesizer learn."""
        bound = self._binding
        weight = self._parameters["weight"]
        if (
            weight is None
            or type(input) is not Tensor
            or input.ndim != 2
            or input.shape[1] != weight.shape[1]
            or input.dtype is not weight.dtype
            or input.device != weight.device
        ):
            return None
        rows = self._rows(input, context)
        # What a lesson at the end of the backward would raise for.
        assert self.synthesizer_update is not None
        self.synthesizer_update.tensors(self.synthesizer_parameters())
        self.check_context(rows)
        made = bound.exact.forward(self, input, None)
        return None if made is None else Mixed.run(self, made, rows, bound.exact_anchor, input)

    def _refuse_batch(self, shape: torch.Size, rows: int, name: str) -> None:
        """Refuse an input of that shape and number of rows as it is now to be normalised."""
        if self._flat and len(shape) != 2:
            raise RuntimeError(
                f"{name} must be [N, I] in front of a batch normalisation taken over from "
                f"nn.BatchNorm1d, got {list(shape)}"
            )
        if not self.training:
            return
        check.batch(rows, self.config, True)
        norm = self._modules["norm"]
        if norm is not None and self.config.normalization == "batch" and not norm.training:
            raise RuntimeError(
                "norm is in eval mode but its layer is training: batch statistics are part of "
                "the fused layer; put the whole layer into eval mode, or keep the "
                "normalisation outside of it"
            )

    def refuse_input(
        self,
        given: Tensor,
        shape: torch.Size,
        dtype: torch.dtype,
        context: Tensor | None,
        name: str,
    ) -> None:
        super().refuse_input(given, shape, dtype, context, name)
        self._refuse_batch(shape, shape[:-1].numel(), name)
        if self._modules["synthesizer"] is not None:
            self.check_context(self._rows(given, context))

    def _followed(self, norm: nn.Module, seen: tuple[Any, ...]) -> LinearConfig:
        """Return the configuration as the normalisation's holder has it now: as in PyTorch, its
        attributes count (``torch.optim.swa_utils.update_bn`` and momentum schedules set them)."""
        config = self.config
        batch = config.normalization == "batch"
        kind: type[nn.Module] = nn.BatchNorm1d if batch else nn.LayerNorm
        # With running statistics a synchronised normalisation is an ordinary one.
        synchronised = batch and not self.training and type(norm) is nn.SyncBatchNorm
        # A parametrization makes a class of its own of it.
        parametrized = isinstance(norm, kind) and "parametrizations" in norm._modules
        if type(norm) is not kind and not (synchronised or parametrized):
            raise RuntimeError(
                f"norm must be nn.{kind.__name__}, which the fused layer computes itself, got "
                f"nn.{type(norm).__name__}; keep another normalisation outside of the layer"
            )
        eps: Any = norm.eps
        momentum: Any = config.momentum
        if batch:
            if not norm.track_running_stats or norm._buffers["running_mean"] is None:
                raise RuntimeError(
                    "norm has no running statistics (track_running_stats=False), which the fused "
                    "layer needs; keep such a normalisation outside of the layer"
                )
            momentum = norm.momentum
            if momentum is None:  # a cumulative average
                momentum = 1.0 / (float(norm._buffers["num_batches_tracked"] or 0) + 1.0)
        if eps != config.eps or momentum != config.momentum:
            self.config = config = replace(config, eps=eps, momentum=momentum)
        settled = not synchronised and (not batch or norm.momentum is not None)
        if not torch.compiler.is_compiling():
            self._seen = seen if settled else ()
        return config

    def _unfold(self, h: Tensor, input: Tensor) -> Tensor:
        """Return rows [N, O] to the leading dimensions of the input."""
        if input.dim() == 2:
            return h
        return h.reshape(*input.shape[:-1], self.out_features)

    def _rows(self, input: Tensor, context: Tensor | None) -> Tensor | None:
        """Return the context of this call, a row each."""
        synthesizer = self._modules["synthesizer"]
        features = getattr(synthesizer, "context_features", None)
        context = self.given_context(context, features)
        if not features:
            return context
        return fold_context(context, input.shape[:-1], features, input)

    def _local(self, use: LinearInputs, context: Tensor | None, need_dx: bool) -> Tensor:
        """Without a rule: local gradients are returned by the node."""
        x, layer, backend = use
        fused = self.fused_synthesizer(x)
        if fused is None:
            return nodes.unruled(self, use, (x,), context, need_dx)
        self._fit(layer, fused)
        self.check_context(context, fused=True)
        tracing = torch.compiler.is_compiling()
        if not tracing:
            note_replicas(self)
        h: Tensor = nodes.Local.apply(
            x,
            *layer[:4],
            *fused.parameters(),
            *layer[4:],
            *fused[5:],
            context,
            self.statistics_on(x.device),
            self.config,
            backend,
            fused.kind,
            self.how(x.shape[0]),
            self.unit,
            None if tracing else self,
            need_dx,
        )
        return h

    def _probed(
        self,
        x: Tensor,
        input: Tensor,
        layer: LinearTensors,
        backend: Backend,
        context: Tensor | None,
    ) -> Tensor:
        """Forward with exact gradients, where predictions are held against them."""
        if self._inside():  # by PyTorch's own modules, which let z be looked at
            z = F.linear(x, layer.weight, layer.bias)
            if not z.requires_grad:
                z.requires_grad_()
            rows = self._behind(z)
            self.probe(z, rows, context)
            return self._unfold(rows, input)
        rows = exact_linear(x, layer, self.config, True, backend)
        self._count_batch()
        h = self._unfold(rows, input)
        self.probe(h, rows, context)
        return h

    def _recorded(self, input: Tensor) -> Tensor:
        """Run by PyTorch's own modules: in ``torch.jit.trace``, of which whoever runs what was
        recorded needs nothing else, and of no rows at all."""
        self.refuse_recording()
        weight, bias, *_ = self._layer()
        z = F.linear(input, weight, bias)
        if z.dim() == 2:
            return self._behind(z)
        return self._unfold(self._behind(z.reshape(-1, self.out_features)), input)

    def _behind(self, z: Tensor) -> Tensor:
        """Take the rows z through normalisation and activation."""
        for part in self._parts_behind():
            z = part(z)
        return z

    # -- the stock module's life ---------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Draw weight and bias anew as ``nn.Linear``, and forget everything that was learned: the
        normalisation's, the synthesizer's, and the rules' moments and counts."""
        nn.Linear.reset_parameters(cast(nn.Linear, self))
        if self.norm is not None:
            self.norm.reset_parameters()
        self.forget()

    # -- conversion ----------------------------------------------------------------------------

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        norm: nn.BatchNorm1d | nn.LayerNorm | None = None,
        activation: nn.Module | str | None = None,
        **kwargs: Any,
    ) -> FusedDNILinear:
        """Take over a linear layer, the normalisation behind it and the activation behind that.

        The new layer holds the very same parameters and buffers (nothing is copied).

        Args:
            linear: an ``nn.Linear``.
            norm: ``nn.BatchNorm1d`` (affine or not, with running statistics) or ``nn.LayerNorm``
                over the last dimension, or None. With the former the layer takes [N, I] alone:
                behind more dimensions ``nn.BatchNorm1d`` normalises another one than the last.
            activation: a module or a name; None for none.
            **kwargs: further arguments of the constructor.

        Raises:
            ValueError: a module that has no fused form; the message says which and why.
        """
        reason = why_not_fusable(linear, norm)
        if reason is not None:
            raise ValueError(reason)
        name = activation if isinstance(activation, str) else "identity"
        if isinstance(activation, nn.Module):
            found = activation_name(activation)
            if found is None:
                raise ValueError(f"activation {activation!r} has no fused form")
            name = found
        kind = {nn.BatchNorm1d: "batch", nn.LayerNorm: "layer"}.get(type(norm))
        extra: dict[str, Any] = {}
        if norm is not None:
            extra["eps"] = norm.eps
        if isinstance(norm, nn.BatchNorm1d):
            extra["momentum"] = norm.momentum
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            normalization=kind,
            activation=name,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
            **extra,
            **kwargs,
        )
        layer.weight = cast(nn.Parameter, linear.weight)
        layer.bias = cast("nn.Parameter | None", linear.bias)
        layer.norm = norm
        layer._flat = isinstance(norm, nn.BatchNorm1d)
        layer.train(linear.training)
        return layer

    def to_linear(self) -> nn.Module:
        """Return the plain module: ``nn.Linear``, or an ``nn.Sequential`` of it with what was
        fused.

        Holds the very same parameters and buffers (nothing is copied).
        """
        parts = self.plain_parts()
        return parts[0] if len(parts) == 1 else nn.Sequential(*parts).train(self.training)

    def stock_module(self) -> nn.Module:
        return self.to_linear()

    def plain_parts(self) -> list[nn.Module]:
        """Linear, then normalisation and activation where there are any."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        linear.train(self.training)
        return [linear, *self._parts_behind()]

    def _parts_behind(self) -> list[nn.Module]:
        """Normalisation and activation, where there are any."""
        parts: list[nn.Module] = []
        if self.norm is not None:
            parts.append(self.norm)
        if self.config.activation != "identity":
            made, arguments = _ACTIVATION_MODULES[self.config.activation]
            parts.append(made(**arguments))
        for part in parts:
            part.train(self.training)
        return parts

    def extra_repr(self) -> str:
        """Sizes, what is fused, and the rule."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )
        if self.config.activation != "identity":
            text += f", activation={self.config.activation!r}"
        if self.config.interface != "output":
            text += f", interface={self.config.interface!r}"
        if self.update is not None:
            text += f", update={self.update.rule}"
            if self._binding.tries and self.training:
                text += f", steps by {way(self)}"
        return text


def why_not_fusable(linear: nn.Module, norm: nn.Module | None = None) -> str | None:
    """Return None if :meth:`FusedDNILinear.from_linear` takes these modules, else the reason."""
    if type(linear) is not nn.Linear:
        return f"only nn.Linear itself can be taken over, got {type(linear).__name__}"
    if norm is None:
        return None
    if type(norm) is nn.BatchNorm1d:
        if not norm.track_running_stats:
            return "nn.BatchNorm1d without running statistics has no fused form"
        if norm.momentum is None:
            return "nn.BatchNorm1d with momentum=None (cumulative average) has no fused form"
        size = norm.num_features
    elif type(norm) is nn.LayerNorm:
        if len(norm.normalized_shape) != 1:
            return f"nn.LayerNorm over {len(norm.normalized_shape)} dimensions has no fused form"
        size = norm.normalized_shape[0]
    else:
        return f"norm must be nn.BatchNorm1d or nn.LayerNorm, got {type(norm).__name__}"
    if size != linear.out_features:
        return f"norm has {size} features, the linear layer {linear.out_features}"
    return None
