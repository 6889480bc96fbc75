"""What backends for a GPU share of every op: what is given made fit for kernels, room for the
results, the versions of what is mutated. A backend adds the launches, which fill that room."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_dni.backends.common.closing import close_window
from fused_dni.backends.common.precision import require_masters
from fused_dni.backends.common.synthesizer import check_context
from fused_dni.backends.common.tensors import Unbound, moved_statistics, split_context, updated
from fused_dni.backends.reference.linear_cross_entropy import linear_cross_entropy
from fused_dni.ops import results
from fused_dni.ops.types import (
    Layers,
    LinearConfig,
    LinearGradients,
    LinearTensors,
    LSTMBoundary,
    LSTMClosed,
    LSTMGradients,
    LSTMRows,
    LSTMTrace,
    Prediction,
    RuleTensors,
    Saved,
    SlotGradients,
    SynthesizerTensors,
)

Arriving = tuple[Tensor | None, Tensor | None, Tensor | None]  # at output, h and c


class GpuBackend(Unbound):
    """The ops of :class:`fused_dni.ops.types.Backend`, but for the LSTM's forwards and its cell."""

    # x, layer, config, training; h and saved are filled
    launch_forward: Callable[[Tensor, LinearTensors, LinearConfig, bool, Tensor, Saved], None]
    # grad_h, x, h, saved, layer, config, training; the gradients are filled
    launch_backward: Callable[
        [Tensor, Tensor, Tensor, Saved, LinearTensors, LinearConfig, bool, LinearGradients], None
    ]
    # x, delta, the gradients of the vectors, layer, rule
    launch_update: Callable[[Tensor, Tensor, LinearGradients, LinearTensors, RuleTensors], None]
    # h, synthesizer, labels, vectors; the prediction is filled
    launch_predict: Callable[
        [Tensor, SynthesizerTensors, Tensor | None, Tensor | None, Prediction], None
    ]
    # h, prediction, grad_h, synthesizer, labels, vectors, target_scale, statistics; then either the
    # gradients to fill or the rule to apply
    launch_train: Callable[
        [
            Tensor, Prediction, Tensor, SynthesizerTensors, Tensor | None, Tensor | None, float,
            Tensor, SlotGradients | RuleTensors,
        ],
        None,
    ]  # fmt: skip
    # What arrives, x, layers, lengths, dropout, trace, need_dx, need_weights; the boundary is given
    # if its synthetic gradient is to be added
    window_backward: Callable[
        [
            Arriving, Tensor, Layers, Tensor | None, tuple[Tensor, ...], LSTMTrace, bool, bool,
            LSTMBoundary | None,
        ],
        LSTMGradients,
    ]  # fmt: skip
    # contiguous rows, layers, rule
    launch_lstm_update: Callable[[tuple[LSTMRows, ...], Layers, RuleTensors], None]

    # PyTorch's own product, and its softmax behind it.
    linear_cross_entropy = staticmethod(linear_cross_entropy)

    def linear_forward(
        self, x: Tensor, layer: LinearTensors, config: LinearConfig, training: bool, save: bool
    ) -> tuple[Tensor, Saved]:
        """See :meth:`fused_dni.ops.types.Backend.linear_forward`."""
        x = rows(x)
        h, saved = results.linear_forward(x, layer, config, save)
        self.launch_forward(x, layer, config, training, h, saved)
        moved = moved_statistics(layer, config, training)
        if moved:
            increment_version(moved)
        return h, saved

    def linear_backward(
        self,
        grad_h: Tensor,
        x: Tensor,
        h: Tensor,
        saved: Saved,
        layer: LinearTensors,
        config: LinearConfig,
        training: bool,
        need_dx: bool,
        need_weight: bool,
    ) -> LinearGradients:
        """See :meth:`fused_dni.ops.types.Backend.linear_backward`."""
        x, h, grad_h = rows(x), h.contiguous(), grad_h.contiguous()
        made = results.linear_backward(x, h, layer, need_dx, need_weight)
        self.launch_backward(grad_h, x, h, saved, layer, config, training, made)
        return made

    def linear_update_(
        self, x: Tensor, gradients: LinearGradients, layer: LinearTensors, rule: RuleTensors
    ) -> None:
        """See :meth:`fused_dni.ops.types.Backend.linear_update_`.

        Raises:
            TypeError: parameters that would lose the update to rounding.
        """
        require_masters(layer[:4], rule.stochastic)
        self.launch_update(rows(x), gradients.delta.contiguous(), gradients, layer, rule)
        increment_version(updated(layer[:4], rule))

    def synthesizer_predict(
        self, h: Tensor, synthesizer: SynthesizerTensors, context: Tensor | None
    ) -> Prediction:
        """See :meth:`fused_dni.ops.types.Backend.synthesizer_predict`."""
        h = h.contiguous()
        made = results.synthesizer_predict(h, synthesizer)
        self.launch_predict(h, synthesizer, *checked_context(synthesizer, context), made)
        return made

    def synthesizer_gradients(
        self,
        h: Tensor,
        prediction: Prediction,
        grad_h: Tensor,
        synthesizer: SynthesizerTensors,
        context: Tensor | None,
        target_scale: float,
        statistics: Tensor,
    ) -> SlotGradients:
        """See :meth:`fused_dni.ops.types.Backend.synthesizer_gradients`."""
        made = results.synthesizer_gradients(synthesizer)
        self.launch_train(
            h.contiguous(), _contiguous(prediction), grad_h.contiguous(), synthesizer,
            *checked_context(synthesizer, context), target_scale, statistics, made,
        )  # fmt: skip
        increment_version(statistics)
        return made

    def synthesizer_update_(
        self,
        h: Tensor,
        prediction: Prediction,
        grad_h: Tensor,
        synthesizer: SynthesizerTensors,
        context: Tensor | None,
        target_scale: float,
        statistics: Tensor,
        rule: RuleTensors,
    ) -> None:
        """See :meth:`fused_dni.ops.types.Backend.synthesizer_update_`.

        Raises:
            TypeError: parameters that would lose the update to rounding.
        """
        parameters = synthesizer.parameters()
        require_masters(parameters, rule.stochastic)
        self.launch_train(
            h.contiguous(), _contiguous(prediction), grad_h.contiguous(), synthesizer,
            *checked_context(synthesizer, context), target_scale, statistics, rule,
        )  # fmt: skip
        increment_version([statistics, *updated(parameters, rule)])

    @torch.no_grad()
    def lstm_backward(
        self,
        grad_output: Tensor | None,
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        x: Tensor,
        layers: Layers,
        lengths: Tensor | None,
        dropout: tuple[Tensor, ...],
        trace: LSTMTrace,
        need_dx: bool,
        need_weights: bool,
    ) -> LSTMGradients:
        """See :meth:`fused_dni.ops.types.Backend.lstm_backward`."""
        return self.window_backward(
            (grad_output, grad_h, grad_c), x, layers, lengths, dropout, trace, need_dx,
            need_weights, None,
        )  # fmt: skip

    @torch.no_grad()
    def lstm_close(
        self,
        grad_output: Tensor | None,
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        x: Tensor,
        layers: Layers,
        lengths: Tensor | None,
        dropout: tuple[Tensor, ...],
        trace: LSTMTrace,
        need_dx: bool,
        need_weights: bool,
        boundary: LSTMBoundary,
        statistics: Tensor | None,
    ) -> LSTMClosed:
        """See :meth:`fused_dni.ops.types.Backend.lstm_close`.

        The synthetic gradient is predicted and added in the backward's kernel.
        """

        def backward(
            grad_h: Tensor | None, grad_c: Tensor | None, boundary: LSTMBoundary | None
        ) -> LSTMGradients:
            return self.window_backward(
                (grad_output, grad_h, grad_c), x, layers, lengths, dropout, trace, need_dx,
                need_weights, boundary,
            )  # fmt: skip

        return close_window(backward, grad_h, grad_c, trace, boundary, statistics)

    @torch.no_grad()
    def lstm_update_(self, rows: tuple[LSTMRows, ...], layers: Layers, rule: RuleTensors) -> None:
        """See :meth:`fused_dni.ops.types.Backend.lstm_update_`.

        Raises:
            TypeError: parameters that would lose the update to rounding.
        """
        parameters = tuple(chain.from_iterable(layers))
        require_masters(parameters, rule.stochastic)
        operands = tuple([LSTMRows(*[t.contiguous() for t in of]) for of in rows])
        self.launch_lstm_update(operands, layers, rule)
        increment_version(updated(parameters, rule))


def rows(x: Tensor) -> Tensor:
    """Make x [N, I] fit for kernels: its rows are contiguous, if apart."""
    if x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x
    return x.contiguous()


def checked_context(
    synthesizer: SynthesizerTensors, context: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Split labels from vectors; checked on a CPU, where looking costs no synchronisation."""
    if context is not None and context.device.type == "cpu":
        check_context(synthesizer, context)
    return split_context(synthesizer, context)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Make a tensor contiguous, if there is one."""
    return None if tensor is None else tensor.contiguous()


def of_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Make a tensor contiguous and of this dtype."""
    return tensor.to(dtype).contiguous()


def _contiguous(prediction: Prediction) -> Prediction:
    scaled, reduced = prediction
    return Prediction(scaled.contiguous(), contiguous(reduced))
