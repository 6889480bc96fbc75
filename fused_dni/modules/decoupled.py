"""``Decoupled``: any segment of a network behind a synthetic gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fused_dni.context import fold_context, note_checkpoint
from fused_dni.functional import check
from fused_dni.modules import nodes
from fused_dni.modules.base import NO_TARGET
from fused_dni.modules.steps import SegmentSteps, segment_inputs
from fused_dni.rules import Rule
from fused_dni.synthesizers import Synthesizer


class Decoupled(SegmentSteps):
    """Any module, decoupled at its output.

    The semantics are those of :class:`FusedDNILinear`: in training the segment's gradient comes
    from the synthesizer's prediction at its output h; the synthesizer learns from the gradient
    that arrives there. The segment itself runs as it is, under autograd.

    Args:
        module: the segment. It is called with the arguments of the forward and returns one tensor
            whose first dimension is the batch.
        synthesizer: see :mod:`fused_dni.synthesizers`. Those that take rows [N, O] see an output
            [..., O] as rows; all others see it as the segment returns it.
        update: rule for the segment's parameters, applied in the forward; None to leave gradients
            in ``.grad``.
        synthesizer_update: rule for the synthesizer; None for the same as ``update``.
        target_scale: kappa: the synthesizer learns so many times the gradient; None for the batch
            size over a power of two that follows the size of the gradients.
        max_norm: bound of the synthetic gradient's Frobenius norm; None for no clipping.

    Raises:
        TypeError: a segment or synthesizer that is no module, or an output that is no tensor.
        ValueError, RuntimeError: as :class:`FusedDNILinear`.
    """

    def __init__(
        self,
        module: nn.Module,
        synthesizer: nn.Module | None,
        *,
        update: Rule | None = None,
        synthesizer_update: Rule | None = None,
        target_scale: float | None = None,
        max_norm: float | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
        super().__init__(update, synthesizer_update, target_scale, max_norm)
        self.module = module
        self.attach(synthesizer, synthesizer_update or update)

    def forward(self, *inputs: Any, context: Tensor | None = None, **named: Any) -> Tensor:
        """Run the segment on ``inputs``; tensors in them may ask for gradients.

        Args:
            *inputs, **named: the segment's arguments: tensors, lists, tuples, dictionaries and
                packed sequences of them, and what holds no tensor.
            context: class indices int64 [N] or conditioning vectors [N, K], or, for a segment
                that returns [N, ..., O], [N, ...] or [N, ..., K]; None to take it from
                :func:`fused_dni.condition_on`.

        Returns:
            What the segment returns.

        Raises:
            TypeError: a tensor that asks for a gradient in an object that is none of these.
        """
        plain = not self.training or not torch.is_grad_enabled()
        if self.training and plain:
            note_checkpoint()
        if plain or (self.synthesizer is None and self.update is None):
            return self._checked(self.module(*inputs, **named))
        self.refuse_recording()
        given = segment_inputs(inputs, named)
        tensors = tuple(t for t in given.leaves if isinstance(t, Tensor))
        if forward_ad._current_level >= 0:
            check.no_tangents(**{f"argument {i}": t for i, t in enumerate(tensors)})
        if any(t.dim() and t.shape[0] == 0 for t in tensors):
            raise RuntimeError("the batch is empty (0 rows): nothing can be trained on it")
        rows = self._rows(tensors, context)
        if self.phase.probe is not None:
            h = self._checked(self.module(*inputs, **named))
            self.probe(h, h, rows)
            return h
        if self.delivery is not None:
            for t in tensors:
                t.requires_grad_(self.delivery.need_dx)
            return nodes.delivered(self, given, rows)
        need_dx = any(
            t.requires_grad and getattr(t, NO_TARGET, None) != t._version for t in tensors
        )
        device = tensors[0].device.type if tensors else "cpu"
        self.refuse_untold_scale(device)
        run = nodes.unruled if self.update is None else nodes.ruled
        h = run(self, given, tensors, rows, need_dx)
        if self.synthesizer is not None and not (self.phase.target or self.phase.warmup):
            setattr(h, NO_TARGET, h._version)
        return h

    def reset_parameters(self) -> None:
        """Have every part of the segment draw its parameters anew, and forget everything that was
        learned, the rules' moments and counts too."""
        for module in self.module.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        self.forget()

    def _rows(self, tensors: tuple[Tensor, ...], context: Tensor | None) -> Tensor | None:
        if self.synthesizer is None:
            return None
        features = getattr(self.synthesizer, "context_features", None)
        context = self.given_context(context, features)
        if not features:
            return context
        if context is not None and getattr(self.synthesizer, "context_as_h", False):
            return context.detach()
        like = next(self.synthesizer.parameters())
        n = tensors[0].shape[:1] if tensors else torch.Size((0,))
        if context is not None and isinstance(self.synthesizer, Synthesizer):
            own = context.shape if context.dtype == torch.int64 else context.shape[:-1]
            if self.synthesizer.takes_rows and len(own) > 1:
                return context  # of the rows of h, which is not known yet
        return fold_context(context, n, features, like)
