"""``Decoupled``: any segment of a network behind a synthetic gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fused_dni.context import fold_context, note_checkpoint
from fused_dni.functional import check
from fused_dni.modules import nodes
from fused_dni.modules.base import NO_TARGET, leaf, untraced
from fused_dni.modules.steps import SegmentSteps, segment_call, segment_output
from fused_dni.rules import Rule


class Decoupled(SegmentSteps):
    """Any module, decoupled at its output.

    The semantics are those of :class:`FusedDNILinear`: in training the segment's gradient comes
    from the synthesizer's prediction at its output h; the synthesizer learns from the gradient
    that arrives there. The segment itself runs as it is, under autograd.

    A segment may return more than its output: a tuple or list, named or nested (``nn.LSTM``'s
    output and state), whose first element, or the first of that, is h. In training all else is
    handed on detached: no gradient flows through it, in no phase. Of a packed sequence h is the
    data [N, O], and the context is packed alike.

    Args:
        module: the segment. It is called with the arguments of the forward and returns h, whose
            first dimension is the batch, alone or first. Decoupled modules inside it keep their
            rules; ``update`` is for the other parameters.
        synthesizer: see :mod:`fused_dni.synthesizers`. Those that take rows [N, O] see an output
            [..., O] as rows; all others see it as the segment returns it.
        update: rule for the segment's parameters, applied in the forward; None to leave gradients
            in ``.grad``.
        synthesizer_update: rule for the synthesizer; None for the same as ``update``.
        target_scale: kappa: the synthesizer learns so many times the gradient; None for the batch
            size over a power of two that follows the size of the gradients.
        max_norm: bound of the synthetic gradient's Frobenius norm; None for no clipping.

    Raises:
        TypeError: a segment or synthesizer that is no module; an output that is no tensor and has
            none first, or one of integers.
        RuntimeError: an output that carries no graph though the segment's parameters ask for
            gradients, or has not the synthesizer's features. Nothing is changed then, nor are the
            segment's buffers and the random generators, where shapes alone are the reason.
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

    def forward(self, *inputs: Any, context: Tensor | None = None, **named: Any) -> Any:
        """Run the segment on ``inputs``; tensors in them may ask for gradients.

        Args:
            *inputs, **named: the segment's arguments: tensors, lists, tuples, dictionaries and
                packed sequences of them, and what holds no tensor.
            context: class indices int64 [N] or conditioning vectors [N, K], or, for a segment
                that returns [N, ..., O], [N, ...] or [N, ..., K]; None to take it from
                :func:`fused_dni.condition_on`.

        Returns:
            What the segment returns; in training all of it but h is detached. In ``eval()``, under
            ``no_grad()`` and without synthesizer and rule it is as the segment returns it.

        Raises:
            TypeError: a tensor that asks for a gradient in an object that is none of these.
        """
        if inputs and type(inputs[0]) is not Tensor:
            called = leaf(self, *inputs, context=context, **named)
            if called is not None:
                return called
        plain = not self.training or not torch.is_grad_enabled()
        if self.training and plain:
            note_checkpoint()
        if plain or (self.synthesizer is None and self.update is None):
            out = self.module(*inputs, **named)
            segment_output(out)  # refuses what training would
            return out
        self.refuse_recording()
        run = untraced(self._train) if torch.compiler.is_compiling() else self._train
        return run(inputs, named, context)

    def _train(self, inputs: tuple[Any, ...], named: dict[str, Any], context: Tensor | None) -> Any:
        given = segment_call(inputs, named)
        tensors = tuple(t for t in given.leaves if isinstance(t, Tensor))
        if forward_ad._current_level >= 0:
            check.no_tangents(**{f"argument {i}": t for i, t in enumerate(tensors)})
        if any(t.dim() and t.shape[0] == 0 for t in tensors):
            raise RuntimeError("the batch is empty (0 rows): nothing can be trained on it")
        given.context = rows = self._rows(tensors, context)
        if self.phase.probe is not None:
            out = self.module(*inputs, **named)
            h = segment_output(out).h
            self.probe(h, h, rows)
            return out
        if self.delivery is not None:
            return nodes.delivered(self, given, tensors, rows)
        need_dx = any(
            t.requires_grad and getattr(t, NO_TARGET, None) != t._version for t in tensors
        )
        device = tensors[0].device.type if tensors else "cpu"
        self.refuse_untold_scale(device)
        run = nodes.unruled if self.update is None else nodes.ruled
        h = run(self, given, tensors, rows, need_dx)
        if self.synthesizer is not None and not (self.phase.target or self.phase.warmup):
            setattr(h, NO_TARGET, h._version)
        assert given.output is not None
        return given.output.around(h)

    def reset_parameters(self) -> None:
        """Have every part of the segment draw its parameters anew, and forget everything that was
        learned, the rules' moments and counts too."""
        for module in self.module.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        self.forget()

    def stock_module(self) -> nn.Module:
        return self.module

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
        if self._takes_rows():
            return fold_context(context, None, features, like)  # h's rows are not known yet
        n = tensors[0].shape[:1] if tensors else torch.Size((0,))
        return fold_context(context, n, features, like)
