"""The LSTM as differentiable function: a window of steps, and a single one.

The nodes here are exact. A decoupled module hands them its :class:`Ends`, through which it adds to
what a window's backward starts from and learns from what comes out of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_dni import ops
from fused_dni.functional.node import Node, once_differentiable, spend
from fused_dni.ops.types import (
    Backend,
    CellGradients,
    CellTrace,
    LSTMBoundary,
    LSTMClosed,
    LSTMGradients,
    LSTMLayer,
    LSTMRows,
    LSTMTrace,
)

# Looked up once: they are asked in every window.
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active

TWICE = (
    "a window's backward was run a second time (its state or output was used by a later loss): run "
    "one backward a window; a module with a rule and no synthesizer does not cut the state, as "
    "nn.LSTM, nor is one cut that was combined with other tensors that ask for a gradient: detach "
    "it for truncated backpropagation"
)


class Window(NamedTuple):
    """A window behind its forward."""

    x: Tensor  # [T, B, I]
    dropout: tuple[Tensor, ...]  # [T, B, H] each
    trace: LSTMTrace

    def rows(self, made: LSTMGradients) -> tuple[LSTMRows, ...]:
        """Return what the weights' gradients are products of, layer by layer."""
        hidden = self.trace.hidden
        out = []
        below = self.x
        for i, delta in enumerate(made.delta):
            out.append(
                LSTMRows(below.flatten(0, 1), hidden[i, :-1].flatten(0, 1), delta.flatten(0, 1))
            )
            below = hidden[i, 1:]
            if self.dropout and i < len(self.dropout):
                below = below * self.dropout[i]
        return tuple(out)


class Ends(Protocol):
    """What a module does at the two ends of a window's backward.

    What ``arrive`` returns last is handed to ``leave``."""

    # Whether the node returns the weights' gradients; otherwise the module applies them.
    returns_weights: bool

    def arrive(
        self, h: Tensor, c: Tensor, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        """Return the gradients at the final state, h and c [L, B, H], that the backward starts
        from."""
        ...

    def boundary(self, x: Tensor, plain: bool) -> tuple[LSTMBoundary, Tensor | None] | None:
        """Return what :meth:`Backend.lstm_close` needs to see to both ends itself, and the
        statistics to add to; None to have :meth:`arrive` and :meth:`leave` called instead, as where
        something looks on. ``plain`` says that the input x is known to be plain memory."""
        ...

    def closed(self, window: Window, closed: LSTMClosed) -> tuple[Tensor | None, ...]:
        """Called behind :meth:`Backend.lstm_close`: gradients of the learners, or ()."""
        ...

    def leave(self, window: Window, made: LSTMGradients, arrival: Any) -> tuple[Tensor | None, ...]:
        """Called when the backward has reached the entrance: gradients of the learners, or ()."""
        ...


class Call(NamedTuple):
    """What of a call is not a tensor."""

    backend: Backend
    bias: bool
    dropout: int  # how many masks come first among the trailing tensors
    learners: int  # how many parameters of synthesizers come last among them
    need_dx: bool
    # Where nothing looks on and no op that is registered need be called: the parameters.
    layers: ops.Layers = ()


class WindowNode(Node):
    """Trailing tensors: dropout masks, the layers' parameters, the learners' parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        ends: Ends | None,
        site: object,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        lengths: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dropout = tensors[: call.dropout]
        parameters = tensors[call.dropout : -call.learners or None]
        layers = call.layers or ops.layers_of(parameters, call.bias)
        if call.layers:
            trace = call.backend.lstm_forward(x, h, c, layers, lengths, dropout, True)
        else:
            trace = ops.lstm_forward(call.backend, x, h, c, layers, lengths, dropout, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, lengths, *trace, *dropout, *parameters)
        ctx.call, ctx.ends, ctx.site, ctx.spent = call, ends, site, False
        return trace.hidden[-1, 1:], trace.h, trace.c

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        ends: Ends | None = ctx.ends
        if ends is not None:
            spend(ctx, TWICE)
        (x, lengths, *rest) = ctx.saved_tensors
        trace = LSTMTrace(*rest[:5])
        dropout = tuple(rest[5 : 5 + call.dropout])
        parameters = rest[5 + call.dropout :]
        # Both ends in one call where nothing looks on: no op is registered for that.
        boundary = None if ends is None else ends.boundary(x, bool(call.layers))
        arrival = None
        if ends is not None and boundary is None:
            grad_h, grad_c, arrival = ends.arrive(trace.h, trace.c, grad_h, grad_c)
        wants = ctx.needs_input_grad
        none: tuple[Tensor | None, ...] = (None,) * len(wants)
        started = boundary is not None and boundary[0].strength != 0.0
        if grad_output is None and grad_h is None and grad_c is None and not started:
            return none
        returns_weights = ends is None or ends.returns_weights
        first, count = 7 + call.dropout, len(parameters)
        wanted = wants[first : first + count]
        learned: tuple[Tensor | None, ...] = (None,) * call.learners
        given = (
            None if grad_output is None else _contiguous(grad_output),
            None if grad_h is None else _contiguous(grad_h),
            None if grad_c is None else _contiguous(grad_c),
            x,
            call.layers or ops.layers_of(parameters, call.bias),
            lengths,
            dropout,
            trace,
            call.need_dx and wants[3],
            returns_weights and any(wanted),
        )
        if ends is not None and boundary is not None:
            closed = call.backend.lstm_close(*given, *boundary)
            made = closed.gradients
            learned = ends.closed(Window(x, dropout, trace), closed) or learned
        else:
            if call.layers and not (_modes() or _transforms()):
                made = call.backend.lstm_backward(*given)
            else:
                made = ops.lstm_backward(call.backend, *given)
            if ends is not None:
                learned = ends.leave(Window(x, dropout, trace), made, arrival) or learned
        weights: tuple[Tensor | None, ...] = (None,) * count
        if made.layers:
            parts = zip(ops.flat(made.layers), wanted, strict=True)
            weights = tuple([g if want else None for g, want in parts])
        return (
            *none[:3],
            made.x,
            made.h if wants[4] else None,
            made.c if wants[5] else None,
            *none[6:first],
            *weights,
            *learned,
        )


class CellEnds(Protocol):
    """What a module does in the backward of one step of its cell."""

    returns_weights: bool

    def arrive(
        self, h: Tensor, c: Tensor, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        """Return the gradients at the state behind the step, h and c [B, H], to start from."""
        ...

    def leave(self, rows: LSTMRows, arrival: Any) -> tuple[Tensor | None, ...]:
        """Called behind the step's backward: gradients of the learners, or ()."""
        ...


class CellNode(Node):
    """Trailing tensors: the layer's parameters, the learners' parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        ends: CellEnds | None,
        site: object,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        parameters = tensors[: len(tensors) - call.learners]
        layer = LSTMLayer(*parameters)
        trace = ops.lstm_cell_forward(call.backend, x, h, c, layer, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h, c, *trace, *parameters)
        ctx.call, ctx.ends, ctx.site, ctx.spent = call, ends, site, False
        return trace.h, trace.c

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        ends: CellEnds | None = ctx.ends
        if ends is not None:
            spend(ctx, TWICE)
        (x, h, c, *rest) = ctx.saved_tensors
        trace = CellTrace(*rest[:3])
        parameters = rest[3:]
        arrival = None
        if ends is not None:
            grad_h, grad_c, arrival = ends.arrive(trace.h, trace.c, grad_h, grad_c)
        wants = ctx.needs_input_grad
        none: tuple[Tensor | None, ...] = (None,) * len(wants)
        if grad_h is None and grad_c is None:
            return none
        returns_weights = ends is None or ends.returns_weights
        wanted = wants[6 : 6 + len(parameters)]
        made: CellGradients = ops.lstm_cell_backward(
            call.backend,
            _contiguous(grad_h),
            _contiguous(grad_c),
            x,
            h,
            c,
            LSTMLayer(*parameters),
            trace,
            call.need_dx and wants[3],
            returns_weights and any(wanted),
        )
        learned: tuple[Tensor | None, ...] = (None,) * call.learners
        if ends is not None:
            learned = ends.leave(LSTMRows(x, h, made.delta), arrival) or learned
        weights: list[Tensor | None] = [None] * len(parameters)
        if made.layer is not None:
            weights = list(ops.flat((made.layer,)))
        return (
            *none[:3],
            made.x,
            made.h if wants[4] else None,
            made.c if wants[5] else None,
            *(g if want else None for g, want in zip(weights, wanted, strict=True)),
            *learned,
        )


def _contiguous(t: Tensor | None) -> Tensor | None:
    if t is None or torch.compiler.is_dynamo_compiling():
        return t if t is None else t.contiguous()
    return (t.resolve_neg() if not t._is_zerotensor() else t.new_zeros(t.shape)).contiguous()


def lstm_window(
    backend: Backend,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    layers: ops.Layers,
    lengths: Tensor | None,
    dropout: tuple[Tensor, ...],
    ends: Ends | None = None,
    site: object = None,
    learners: tuple[Tensor, ...] = (),
    need_dx: bool = True,
    settled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """:class:`WindowNode` on checked tensors: output [T, B, H] and the final h and c [L, B, H].

    ``site`` is remembered on the node: the module to which the states belong. ``learners`` are the
    parameters whose gradients ``ends.leave`` returns. ``settled`` says that neither a mode, a
    transform nor a trace looks on.
    """
    bias = layers[0].bias_ih is not None
    plain = settled and type(x) is Tensor and not (x._is_zerotensor() or x.is_neg())
    masks, taught = len(dropout) if dropout else 0, len(learners) if learners else 0
    call = Call(backend, bias, masks, taught, need_dx, layers if plain else ())
    node = WindowNode.run if plain else WindowNode.apply
    made: tuple[Tensor, Tensor, Tensor] = node(
        call, ends, site, x, h, c, lengths, *dropout, *ops.flat(layers), *learners
    )
    return made


def lstm_cell(
    backend: Backend,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    layer: LSTMLayer,
    ends: CellEnds | None = None,
    site: object = None,
    learners: tuple[Tensor, ...] = (),
    need_dx: bool = True,
) -> tuple[Tensor, Tensor]:
    """:class:`CellNode` on checked tensors: the next h and c [B, H]; see :func:`lstm_window`."""
    call = Call(backend, layer.bias_ih is not None, 0, len(learners), need_dx)
    made: tuple[Tensor, Tensor] = CellNode.apply(
        call, ends, site, x, h, c, *ops.flat((layer,)), *learners
    )
    return made


def origin(state: Tensor, site: object) -> Any:
    """Return the node by which ``site`` made a state, directly or through a few ordinary ops, or
    None."""
    node: Any = state.grad_fn
    if node is None or getattr(node, "site", None) is site:
        return node
    nodes, _ = origins((state,), site, 32)
    return nodes[0] if nodes else None


def origins(state: tuple[Tensor, ...], site: object, most: int) -> tuple[list[Any], bool]:
    """Say where a state's gradient would go.

    Args:
        state: tensors.
        site: a module.
        most: how many nodes of the graph to look at.

    Returns:
        The nodes by which ``site`` made the state, directly or through other ops; and whether
        nothing else asks for its gradient. What has no graph asks for none.
    """
    waiting: list[Any] = [t.grad_fn for t in state if t.requires_grad]
    found: list[Any] = []
    seen, alone = set(waiting), True
    while waiting:
        if most == 0:
            return found, False
        most -= 1
        node = waiting.pop(0)
        if node is None:  # a leaf
            alone = False
        elif getattr(node, "site", None) is site:
            found.append(node)
        else:
            following = [n for n, _ in node.next_functions if n is not None]
            alone = alone and bool(following)  # none behind the node of a leaf
            waiting += [n for n in following if n not in seen]
            seen.update(following)
    return found, alone
