"""``Decoupled``: any segment of a network behind a synthetic gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_dni.context import fold_context
from fused_dni.modules.base import (
    NO_TARGET,
    DecoupledModule,
    LocalStep,
    apply_given,
    run_apart,
    sum_slots,
)
from fused_dni.ops import registry
from fused_dni.ops.types import Backend
from fused_dni.rules import Rule


class _Inner(NamedTuple):
    """A run of the segment: its output with its graph, and the inputs to differentiate for; by the
    identity of a parameter, what stood in for it (see :func:`run_apart`)."""

    h: Tensor
    leaves: list[Tensor | None]
    aliases: dict[int, Tensor]


class Decoupled(DecoupledModule):
    """Any module, decoupled at its output.

    The semantics are those of :class:`FusedDNILinear`: in training the segment's gradient comes
    from the synthesizer's prediction at its output h; the synthesizer learns from the gradient
    that arrives there. The segment itself runs as it is, under autograd.

    Args:
        module: the segment. It is called with the arguments of the forward and returns one tensor
            whose first dimension is the batch.
        synthesizer: see :mod:`fused_dni.synthesizers`; sees h as the segment returns it.
        update: rule for the segment's parameters, applied in the forward; None to leave gradients
            in ``.grad``.
        synthesizer_update: rule for the synthesizer; None for the same as ``update``.
        target_scale: kappa, the number by which the loss divides; None for the batch size.
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

    def forward(self, *inputs: Any, context: Tensor | None = None) -> Tensor:
        """Run the segment on ``inputs``; tensors among them may ask for gradients.

        Args:
            *inputs: the segment's arguments.
            context: class indices int64 [N] or conditioning vectors [N, K]; None to take it from
                :func:`fused_dni.condition_on`.

        Returns:
            What the segment returns.
        """
        plain = not self.training or not torch.is_grad_enabled()
        if plain or (self.synthesizer is None and self.update is None):
            return self._run(inputs)
        tensors = tuple(t for t in inputs if isinstance(t, Tensor))
        if any(t.dim() and t.shape[0] == 0 for t in tensors):
            raise RuntimeError("the batch is empty (0 rows): nothing can be trained on it")
        rows = self._rows(tensors, context)
        if self.phase.probe is not None:
            h = self._run(inputs)
            self.probe(h, h, rows)
            return h
        if self.delivery is not None:
            return self.deliver(
                tuple(t.requires_grad_(self.delivery.need_dx) for t in tensors), rows
            )
        need_dx = any(t.requires_grad and not hasattr(t, NO_TARGET) for t in tensors)
        device = tensors[0].device.type if tensors else "cpu"
        self.refuse_untold_scale(device)
        run = self.unruled_forward if self.update is None else self.ruled_forward
        h = run(inputs, tensors, rows, need_dx)
        if self.synthesizer is not None and not (self.phase.target or self.phase.warmup):
            setattr(h, NO_TARGET, True)
        return h

    def _rows(self, tensors: tuple[Tensor, ...], context: Tensor | None) -> Tensor | None:
        if self.synthesizer is None:
            return None
        features = getattr(self.synthesizer, "context_features", None)
        context = self.given_context(context, features)
        if not features:
            return context
        like = next(self.synthesizer.parameters())
        n = tensors[0].shape[:1] if tensors else torch.Size((0,))
        return fold_context(context, n, features, like)

    def _run(self, inputs: tuple[Any, ...]) -> Tensor:
        return self._checked(self.module(*inputs))

    @staticmethod
    def _checked(h: Any) -> Tensor:
        if not isinstance(h, Tensor):
            raise TypeError(
                "the decoupled segment must return one tensor, got "
                f"{type(h).__name__}; wrap it so that it does"
            )
        return h

    # -- what the base class asks for ----------------------------------------------------------

    def local_parameters(self) -> tuple[Tensor | None, ...]:
        return tuple(self.module.parameters())

    def synthesizer_backend(self, h: Tensor) -> Backend:
        assert self.synthesizer is not None
        return registry.resolve(None, h, next(self.synthesizer.parameters()))

    def _inner(self, inputs: tuple[Any, ...], need_dx: bool) -> _Inner:
        """Run the segment in a graph of its own."""
        leaves: list[Tensor | None] = []
        cut: list[Any] = []
        for t in inputs:
            if isinstance(t, Tensor):
                wanted = need_dx and t.requires_grad and not hasattr(t, NO_TARGET)
                t = t.detach().requires_grad_(wanted)
                leaves.append(t if wanted else None)
            cut.append(t)
        with torch.enable_grad():
            if self.update is not None:  # gradients are used here: hooks see them here
                return _Inner(self._run(tuple(cut)), leaves, {})
            h, aliases = run_apart(self.module, *cut)
            return _Inner(self._checked(h), leaves, aliases)

    def _differentiate(
        self, inner: _Inner, gradient: Tensor
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        h, leaves, aliases = inner
        slots = [*leaves, *(aliases.get(id(p), p) for p in self.local_parameters())]
        wanted = [t for t in slots if t is not None and t.requires_grad]
        made: tuple[Tensor | None, ...] = ()
        if wanted and h.requires_grad:
            made = torch.autograd.grad(h, wanted, gradient.to(h.dtype), allow_unused=True)
        by_id = {id(t): g for t, g in zip(wanted, made, strict=False)}
        out = tuple(None if t is None else by_id.get(id(t)) for t in slots)
        return out[: len(leaves)], out[len(leaves) :]

    def step_locally(
        self, inputs: tuple[Any, ...], context: Tensor | None, need_dx: bool, learns: bool
    ) -> LocalStep:
        self.check_labels(context)
        inner = self._inner(inputs, need_dx)
        h = inner.h.detach()
        forecast = self.predict(h, context, learns)
        dx, made = self._differentiate(inner, self.synthetic(forecast, h).detach())
        if self.update is not None:
            self.apply_update([made])
            made = ()
        return LocalStep(h, dx, forecast if learns else None, made)

    def open(self, inputs: tuple[Any, ...], need_dx: bool) -> tuple[Tensor, Any]:
        inner = self._inner(inputs, need_dx)
        return inner.h.detach(), inner

    def close(
        self, trace: Any, gradient: Tensor, need_dx: bool
    ) -> tuple[tuple[Tensor | None, ...], Any]:
        return self._differentiate(trace, gradient)

    def apply_update(self, contributions: list[Any]) -> None:
        assert self.update is not None
        slots = self.local_parameters()
        apply_given(slots, sum_slots(contributions), self.update.tensors(slots))
