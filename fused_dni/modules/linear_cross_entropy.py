"""``FusedDNILinearCrossEntropyLoss``: a classifier's last linear layer, with its loss."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_dni import ops
from fused_dni.functional import check
from fused_dni.functional.linear import exact_linear
from fused_dni.functional.linear_cross_entropy import exact_cross_entropy
from fused_dni.modules import nodes
from fused_dni.modules.base import NO_TARGET, leaf, untraced
from fused_dni.modules.quick import quicken, way
from fused_dni.modules.steps import Binding, LossInputs, LossSteps, LossTrace
from fused_dni.ops import registry
from fused_dni.ops.types import LinearConfig
from fused_dni.rules import Rule


class FusedDNILinearCrossEntropyLoss(LossSteps):
    """A linear layer with the cross-entropy of its outputs: the exact head of a classifier.

    ``loss = F.cross_entropy(F.linear(input, weight, bias), target)``, with its exact gradient: it
    has no synthesizer and needs none. With a rule the layer updates itself at the end of the
    backward, as an exact :class:`fused_dni.FusedDNILinear` does. As the last member of a
    :class:`fused_dni.DecoupledSequential` it is part of the container's step, which is then a whole
    classifier's: ``loss = net(x, target=y)``.

    Parameters have the names of ``nn.Linear``, which stands in its place in other models: state
    dicts go both ways. (``nn.LinearCrossEntropyLoss`` keeps them one module further down.)

    Args:
        in_features: I. num_classes: C.
        bias: whether the logits have an additive bias.
        label_smoothing: share of the uniform distribution in the targets', in [0, 1].
        ignore_index: rows of this target are not in the mean, and have no gradient.
        update: rule (``SGD``, ``Adam``, ``AdamW``) for weight and bias, or None to leave their
            gradients to an optimizer.
        backend: force a backend by name.
        device, dtype: of the parameters.

    Shape:
        input [..., I] and target [...], class indices int64, to the loss [], the mean over the rows
        that are not ignored; leading dimensions are rows of one batch. Class probabilities and
        other reductions: ``F.cross_entropy(head.logits(input), ...)``.

    Attributes:
        weight: [C, I]. bias: [C] or None. Initialised as those of ``nn.Linear``.

    Raises:
        ValueError: a size or share out of range, an unknown backend, no target in training.
        RuntimeError: a shape, dtype or device that does not fit, an empty batch, and what
            :class:`fused_dni.FusedDNILinear` raises it for.
        IndexError: a target outside ``[0, C)`` that is not ``ignore_index`` (on a GPU nothing waits
            for that: the loss is NaN, and the update skipped and counted).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    norm: None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        update: Rule | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check.sizes(in_features=in_features, num_classes=num_classes)
        check.flags(bias=bias)
        check.smoothing(label_smoothing)
        check.whole("ignore_index", ignore_index, None)
        check.backend(backend)
        check.dtype(dtype)
        super().__init__(update, None, None, None)
        self.in_features = in_features
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.backend = backend
        self.config = LinearConfig()
        plain = nn.Linear(in_features, num_classes, bias, device=device, dtype=dtype)
        self.weight = cast(nn.Parameter, plain.weight)
        self.bias = cast("nn.Parameter | None", plain.bias)
        self.register_module("norm", None)
        self.norm_update = None
        self._binding = Binding()
        self.attach(None, None)

    def forward(self, input: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss, or in ``eval()`` without a target the logits.

        Args:
            input: [..., I].
            target: class indices, int64 [...].

        Returns:
            The loss []; without a target :meth:`logits` [..., C].

        Raises:
            ValueError: no target in training.
        """
        tracing = torch.compiler.is_compiling()
        if not tracing:
            loss = self._quick(input, target)
            if loss is not None:
                return loss
        called: Tensor | None = None if type(input) is Tensor else leaf(self, input, target=target)
        if called is not None:
            return called
        training = self.training
        if target is None and not training:
            return self.logits(input)
        if target is not None and torch._C._get_tracing_state() is not None:
            return self._recorded(input, target)
        layer = self._layer()
        x = check.rows(input, layer.weight, "input")
        rows = self.check_target(target, input.shape[:-1], input.device)
        check.batch(x.shape[0], self.config, True)
        backend = registry.resolve(self.backend, x, layer.weight)
        need_dx = tracing or (x.requires_grad and getattr(input, NO_TARGET, None) != input._version)
        exact = self.update is None or not training or not torch.is_grad_enabled()
        if exact or self.phase.probe is not None:
            self._fit(layer)
            return exact_cross_entropy(
                x,
                layer.weight,
                layer.bias,
                rows,
                self.label_smoothing,
                self.ignore_index,
                backend,
                need_dx,
            )
        if layer.weight.is_meta:
            raise RuntimeError(
                "a fused rule cannot train parameters on the meta device: give them memory first, "
                "by to_empty(device=...) and reset_parameters()"
            )
        if x.dtype is torch.float16:
            self.refuse_untold_scale(x.device.type)
        run = untraced(nodes.ruled_loss) if tracing else nodes.ruled_loss
        loss = run(self, LossInputs(x, layer, backend, rows), need_dx)
        if type(self) is FusedDNILinearCrossEntropyLoss and x is input and not tracing:
            quicken(self, backend, None)
        return loss

    def _recorded(self, input: Tensor, target: Tensor) -> Tensor:
        """Run by PyTorch's own ops, in ``torch.jit.trace``."""
        self.refuse_recording()
        return F.cross_entropy(
            self.logits(input).reshape(-1, self.num_classes),
            target.reshape(-1),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def logits(self, input: Tensor) -> Tensor:
        """Return ``F.linear(input, weight, bias)``, differentiable.

        Nothing is updated by it: with a rule, a gradient that it brings to the parameters is added
        to that of the layer's own backward.

        Args:
            input: [..., I].

        Returns:
            [..., C].
        """
        layer = self._layer()
        if torch._C._get_tracing_state() is not None:
            return F.linear(input, layer.weight, layer.bias)
        x = check.rows(input, layer.weight, "input")
        shape = (*input.shape[:-1], self.num_classes)
        if x.shape[0] == 0:
            return F.linear(x, layer.weight, layer.bias).reshape(shape)
        self._fit(layer)
        backend = registry.resolve(self.backend, x, layer.weight)
        if torch.is_grad_enabled():
            z = exact_linear(x, layer, self.config, False, backend)
        else:
            z, _ = ops.linear_forward(backend, x, layer, self.config, False, False)
        return z.reshape(shape)

    def check_target(
        self, target: Tensor | None, leading: torch.Size | None, device: torch.device
    ) -> Tensor:
        """Refuse a target that no loss can be taken of; its rows int64 [N].

        Args:
            leading: the input's leading dimensions; None where they are not known yet.
            device: the input's.
        """
        return check.target(target, leading, device, self.num_classes, self.ignore_index)

    def _quick(self, input: Tensor, target: Tensor | None) -> Tensor | None:
        """Run the step's forward as one call, if there is one and nothing is in its way."""
        bound = self._binding
        if bound.exact is None:
            return None
        made = bound.exact.forward(self, input, target)
        if made is None:
            return None
        loss, delta, need_dx = made
        assert bound.layer is not None
        trace = LossTrace(input, bound.layer, delta, bound.exact)
        out: Tensor = nodes.Loss.run(self, (loss, trace), need_dx, bound.anchor, input)
        return out

    # -- the stock module's life ---------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Draw weight and bias anew as ``nn.Linear``, and forget the rule's moments and counts."""
        nn.Linear.reset_parameters(cast(nn.Linear, self))
        self.forget()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **kwargs: Any) -> FusedDNILinearCrossEntropyLoss:
        """Take over a linear layer, whose outputs are logits.

        The new layer holds the very same parameters (nothing is copied).

        Args:
            linear: an ``nn.Linear``.
            **kwargs: further arguments of the constructor.

        Raises:
            ValueError: anything but an ``nn.Linear`` itself.
        """
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"only nn.Linear itself can be taken over, got {type(linear).__name__}"
            )
        made = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
            **kwargs,
        )
        made.weight = cast(nn.Parameter, linear.weight)
        made.bias = cast("nn.Parameter | None", linear.bias)
        made.train(linear.training)
        return made

    def to_linear(self) -> nn.Linear:
        """Return the plain layer, whose outputs are the logits; it holds the very same
        parameters."""
        linear = nn.Linear(self.in_features, self.num_classes, self.bias is not None, device="meta")
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        linear.train(self.training)
        return linear

    def stock_module(self) -> nn.Module:
        return self.to_linear()

    def extra_repr(self) -> str:
        """Sizes, what the loss is, and the rule."""
        text = (
            f"in_features={self.in_features}, num_classes={self.num_classes}, "
            f"bias={self.bias is not None}"
        )
        if self.label_smoothing:
            text += f", label_smoothing={self.label_smoothing}"
        if self.ignore_index != -100:
            text += f", ignore_index={self.ignore_index}"
        if self.update is not None:
            text += f", update={self.update.rule}"
            if self._binding.tries and self.training:
                text += f", steps by {way(self)}"
        return text
