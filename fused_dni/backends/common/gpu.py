"""What backends for a GPU share of every op: what is given made fit for kernels, room for the
results, the versions of what is mutated. A backend adds the launches, which fill that room."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_dni.backends.common.closing import Window as Window
from fused_dni.backends.common.closing import close_window
from fused_dni.backends.common.precision import require_masters
from fused_dni.backends.common.synthesizer import check_context
from fused_dni.backends.common.tensors import Unbound, moved_statistics, split_context, updated
from fused_dni.backends.reference.linear_cross_entropy import linear_cross_entropy
from fused_dni.ops import results
from fused_dni.ops.types import (
    AFFINE,
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
    Step,
    SynthesizerTensors,
)


class Forward(NamedTuple):
    """What a launch of ``linear_forward`` is given; h and saved are filled."""

    x: Tensor
    layer: LinearTensors
    config: LinearConfig
    training: bool
    h: Tensor
    saved: Saved


class Backward(NamedTuple):
    """What one of ``linear_backward`` is given; the gradients are filled."""

    grad_h: Tensor
    x: Tensor
    h: Tensor
    saved: Saved
    layer: LinearTensors
    config: LinearConfig
    training: bool
    made: LinearGradients


class Update(NamedTuple):
    """What one of ``linear_update_`` is given: of the gradients delta and those of the vectors."""

    x: Tensor
    gradients: LinearGradients
    layer: LinearTensors
    rule: RuleTensors


class Predict(NamedTuple):
    """What one of ``synthesizer_predict`` is given; the prediction is filled."""

    h: Tensor
    made: Prediction
    synthesizer: SynthesizerTensors
    labels: Tensor | None
    vectors: Tensor | None


class Train(NamedTuple):
    """What one of a synthesizer's training is given: either the gradients to fill, or the rule to
    apply."""

    predicted: Predict
    grad_h: Tensor
    target_scale: float
    statistics: Tensor
    to: SlotGradients | RuleTensors


class GpuStep:
    """A decoupled step over tensors that stay where they are; keeps its workspace."""

    #: Streams and shapes of batches whose workspace is kept: a whole one, the last one of an epoch,
    #: and some more.
    most = 4
    # x, labels, vectors, target_scale; the results are filled
    launch: Callable[[Tensor, Tensor | None, Tensor | None, float, Step], None]

    def __init__(
        self,
        layer: LinearTensors,
        config: LinearConfig,
        synthesizer: SynthesizerTensors,
        max_norm: float,
        rule: RuleTensors,
    ) -> None:
        require_masters(layer[:4], rule.stochastic)
        _require_kind(synthesizer)
        self.layer, self.config, self.synthesizer = layer, config, synthesizer
        self.max_norm = max_norm
        self.rule = rule  # whoever holds the step holds the tensors whose addresses it has
        self.written = updated(layer[:4], rule) + moved_statistics(layer, config, True)
        self.workspaces: dict[Any, Any] = {}

    def __call__(
        self,
        x: Tensor,
        context: Tensor | None,
        target_scale: float,
        need_dx: bool,
        need_prediction: bool,
    ) -> Step:
        x = rows(x)
        labels, vectors = checked_context(self.synthesizer, context)
        made = results.linear_step_(
            x, self.layer, self.config, self.synthesizer, need_dx, need_prediction
        )
        self.launch(x, labels, vectors, target_scale, made)
        increment_version(self.written)
        return made

    def workspace_for(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the workspace for a key, of which the last few are kept; of None, a call that a
        graph captures, it is the graph's own, in its memory.

        One is made and used on its stream alone: forgotten, it is free for that stream, behind
        what still uses it.
        """
        if key is None:
            return make()
        workspace = self.workspaces.get(key)
        if workspace is None:
            workspace = self.workspaces[key] = make()
            if len(self.workspaces) > self.most:
                del self.workspaces[next(iter(self.workspaces))]
        return workspace


class GpuBackend(Unbound):
    """The ops of :class:`fused_dni.ops.types.Backend`, but for the LSTM's forwards and its cell."""

    synthesizers = AFFINE

    launch_forward: Callable[[Forward], None]
    launch_backward: Callable[[Backward], None]
    launch_update: Callable[[Update], None]
    launch_predict: Callable[[Predict], None]
    launch_train: Callable[[Train], None]
    window_backward: Callable[[Window], LSTMGradients]
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
        self.launch_forward(Forward(x, layer, config, training, h, saved))
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
        self.launch_backward(Backward(grad_h, x, h, saved, layer, config, training, made))
        return made

    def linear_update_(
        self, x: Tensor, gradients: LinearGradients, layer: LinearTensors, rule: RuleTensors
    ) -> None:
        """See :meth:`fused_dni.ops.types.Backend.linear_update_`.

        Raises:
            TypeError: parameters that would lose the update to rounding.
        """
        require_masters(layer[:4], rule.stochastic)
        gradients = gradients._replace(delta=gradients.delta.contiguous())
        self.launch_update(Update(rows(x), gradients, layer, rule))
        increment_version(updated(layer[:4], rule))

    def synthesizer_predict(
        self, h: Tensor, synthesizer: SynthesizerTensors, context: Tensor | None
    ) -> Prediction:
        """See :meth:`fused_dni.ops.types.Backend.synthesizer_predict`."""
        h = h.contiguous()
        made = results.synthesizer_predict(h, synthesizer)
        given = checked_context(synthesizer, context)
        self.launch_predict(Predict(h, made, synthesizer, *given))
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
        predicted = _predicted(h, prediction, synthesizer, context)
        self.launch_train(Train(predicted, grad_h.contiguous(), target_scale, statistics, made))
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
        predicted = _predicted(h, prediction, synthesizer, context)
        self.launch_train(Train(predicted, grad_h.contiguous(), target_scale, statistics, rule))
        increment_version([statistics, *updated(parameters, rule)])

    def elsewhere(self, x: Tensor, weight: Tensor, here: str, how: str) -> str | None:
        """Say why tensors that lie elsewhere cannot be served; None if they lie ``here``, which is
        the CPU because of ``how``."""
        if x.device != weight.device:
            return f"needs tensors of one device, got x on {x.device}, weight on {weight.device}"
        if x.device.type == here:
            return None
        return f"serves tensors on {here}{how if here == 'cpu' else ''}, got x on {x.device}"

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
        arriving = (grad_output, grad_h, grad_c)
        return self.window_backward(
            Window(arriving, x, layers, lengths, dropout, trace, need_dx, need_weights)
        )

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

        arriving = (grad_output, grad_h, grad_c)
        window = Window(arriving, x, layers, lengths, dropout, trace, need_dx, need_weights)
        return close_window(self.window_backward, window, boundary, statistics)

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
    """Split labels from vectors; checked on a CPU, where looking costs no synchronisation.

    Raises:
        ValueError: a synthesizer of a kind that these backends have not.
    """
    _require_kind(synthesizer)
    if context is not None and context.device.type == "cpu":
        check_context(synthesizer, context)
    return split_context(synthesizer, context)


def _require_kind(synthesizer: SynthesizerTensors) -> None:
    if synthesizer.kind not in AFFINE:
        raise ValueError(
            f"backends on a GPU have synthesizers of the kinds {', '.join(AFFINE)}, got "
            f"{synthesizer.kind!r}, which runs under autograd there"
        )


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Make a tensor contiguous, if there is one."""
    return None if tensor is None else tensor.contiguous()


def of_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Make a tensor contiguous and of this dtype."""
    return tensor.to(dtype).contiguous()


def _predicted(
    h: Tensor, prediction: Prediction, synthesizer: SynthesizerTensors, context: Tensor | None
) -> Predict:
    made = Prediction(prediction.scaled.contiguous(), contiguous(prediction.reduced))
    return Predict(h.contiguous(), made, synthesizer, *checked_context(synthesizer, context))
