"""``SyntheticInput``: a layer that does not wait for its input, either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_dni.functional.node import Node, once_differentiable
from fused_dni.modules.base import NO_TARGET, DecoupledModule, untraced

Loss = Callable[[Tensor, Tensor], Tensor]


class _Stand(Node):
    """What stands in for an input: the gradient at it is the input's, and the loss of the model
    that made it is one of the losses that the backward starts from."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, stand: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.start = torch.full_like(loss, scale)
        return stand.view_as(stand)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arrived: Tensor | None) -> tuple[Tensor | None, ...]:
        return arrived, None, ctx.start, None


class SyntheticInput(nn.Module):
    """A layer that takes a prediction of its input in training, made from what all layers have at
    once: the network's input.

    With a layer's synthetic gradient nothing waits for the backward; with its input predicted too
    nothing waits for the forward of what is below (Jaderberg et al. 2016, arXiv 1608.05343, the
    complete unlock)::

        layer = fd.SyntheticInput(layer, nn.Linear(784, 256))
        h = layer(h, source=x, context=y)

    In training the layer sees ``model(source)`` and never the value of its input, which the model
    learns to predict: the backward adds the gradients of ``loss(model(source), input)`` to those of
    the model's parameters, whatever arrives from above. The gradient at the predicted input goes
    down as that of the input, the target of the synthesizer that stands there. In a schedule's
    warm-up the layer sees its input while the model learns. In ``eval()``, under ``no_grad()`` and
    for :func:`fused_dni.diagnostics` this is the layer alone, and ``source`` may be left out.

    Processes that have no input yet do the two halves by themselves: :func:`fused_dni.step_local`
    of ``module`` on a detached ``model(source)``, and ``loss(model(source), input).backward()``
    when the input has come.

    Args:
        module: the layer, any module; its first argument is what is predicted.
        model: makes of ``source`` a tensor of the input's shape. Its parameters are trained by
            whoever trains them elsewhere: an optimizer, or its own rule
            (``fd.FusedDNILinear(784, 256, synthesizer=None, update=fd.Adam())``).
        loss: called with prediction and input, gives a scalar; by default the mean squared error.

    Attributes:
        module, model: as given; their parameters are those of the state dict.

    Raises:
        TypeError: a module or model that is none, or a loss that cannot be called.
    """

    def __init__(self, module: nn.Module, model: nn.Module, loss: Loss = F.mse_loss) -> None:
        super().__init__()
        for name, given in (("module", module), ("model", model)):
            if not isinstance(given, nn.Module):
                raise TypeError(f"{name} must be an nn.Module, got {type(given).__name__}")
        if not callable(loss):
            raise TypeError(f"loss must be callable, got {type(loss).__name__}")
        self.module, self.model, self.loss = module, model, loss

    def forward(
        self, input: Tensor, *inputs: Any, source: Tensor | None = None, **named: Any
    ) -> Any:
        """Run the layer on a prediction of its input.

        Args:
            input: what the layer takes outside of training, and what the model learns.
            inputs, named: the layer's other arguments, the context among them.
            source: what the input is predicted from, rows first as those of the input. No gradient
                flows back to it.

        Returns:
            What the layer returns. A layer with a rule is updated as ever (mutated); the model is
            not, before the backward.

        Raises:
            TypeError: in training, no source.
            RuntimeError: a prediction of another shape than the input, or a loss that is no scalar.
                Nothing has been changed.
        """
        layer = self.module if isinstance(self.module, DecoupledModule) else None
        trains = self.training and torch.is_grad_enabled()
        if not trains or (layer is not None and layer.phase.probe is not None):
            return self.module(input, *inputs, **named)
        run = untraced(self._train) if torch.compiler.is_compiling() else self._train
        return run(input, source, layer, inputs, named)

    def _train(
        self,
        input: Tensor,
        source: Tensor | None,
        layer: DecoupledModule | None,
        inputs: tuple[Any, ...],
        named: dict[str, Any],
    ) -> Any:
        if not isinstance(source, Tensor):
            raise TypeError(
                "source must be the tensor that the input is predicted from, in training, got "
                f"{type(source).__name__}"
            )
        true = input.detach()
        predicted = self.model(source.detach())
        if not isinstance(predicted, Tensor) or predicted.shape != input.shape:
            given = getattr(predicted, "shape", type(predicted).__name__)
            raise RuntimeError(
                f"model must return the shape of the input, {list(input.shape)}, got "
                f"{list(given) if isinstance(given, torch.Size) else given}"
            )
        loss = self.loss(predicted, true)
        if not isinstance(loss, Tensor) or loss.dim():
            raise RuntimeError("loss must return a scalar tensor")
        warmup = layer is not None and layer.phase.warmup
        scale = 1.0 if layer is None else layer.phase.loss_scale or 1.0
        stand: Tensor = _Stand.apply(
            input, true if warmup else predicted.detach().to(input.dtype), loss, scale
        )
        marked = getattr(input, NO_TARGET, None)
        if marked is not None and marked == input._version:  # nobody below is owed a gradient
            setattr(stand, NO_TARGET, stand._version)
        return self.module(stand, *inputs, **named)
