"""``FusedDNILSTMCell``: one step, with the ends of windows said by the user."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_dni import ops
from fused_dni.functional import check
from fused_dni.functional.lstm import lstm_cell, origin, origins
from fused_dni.functional.node import Node, once_differentiable
from fused_dni.modules.base import leaf, untraced
from fused_dni.modules.recurrent import (
    DEFAULT_SCALE,
    NODES,
    WINDOWS,
    Arrival,
    Entrance,
    Exit,
    Known,
    Recurrent,
    Slots,
    State,
)
from fused_dni.ops import registry
from fused_dni.ops.types import LSTMLayer, LSTMRows
from fused_dni.rules import Rule


class _StepEnds:
    """A step of a cell: :class:`fused_dni.functional.lstm.CellEnds`. Most steps close nothing."""

    def __init__(self, site: FusedDNILSTMCell, steps: int, entrance: Entrance | None) -> None:
        self.site = site
        self.steps = steps  # since the entrance, this one included
        self.entrance = entrance
        self.exit: Exit | None = None
        self.closes = False  # a boundary follows
        self.made: State | None = None  # the state behind the step, as it was returned
        self.loss_scale = site.phase.loss_scale or 1.0
        self.returns_weights = site.update is None or site.phase.probe is not None

    def arrive(
        self, h: Tensor, c: Tensor, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Arrival]:
        if self.exit is None:
            return grad_h, grad_c, Arrival()
        grads = (None if g is None else g.unsqueeze(0) for g in (grad_h, grad_c))
        grad_h, grad_c, arrival = self.exit.inject(h.unsqueeze(0), c.unsqueeze(0), *grads)
        self.exit.arrival = arrival  # for the entrance, whose backward comes later
        return (
            None if grad_h is None else grad_h.squeeze(0),
            None if grad_c is None else grad_c.squeeze(0),
            arrival,
        )

    def leave(self, rows: LSTMRows, arrival: Arrival) -> Slots:
        if not self.returns_weights:
            self.site.defer((rows,), self.loss_scale)
        regressions = []
        if self.exit is not None and self.entrance is None:  # where there is one, it teaches both
            regressions = self.exit.examples(arrival)
        return self.site.teach(regressions, [], self.loss_scale)


class Boundary(Node):
    """The entrance of a cell's window: the state goes on, its gradient stays here."""

    @staticmethod
    def forward(
        ctx: Any,
        site: FusedDNILSTMCell,
        entrance: Entrance,
        h: Tensor,
        c: Tensor,
        *learners: Tensor,
    ) -> State:
        ctx.set_materialize_grads(False)
        ctx.site, ctx.entrance, ctx.learners, ctx.spent = site, entrance, len(learners), False
        ctx.save_for_backward(h, c)
        return h.clone(), c.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None) -> Slots:
        none: Slots = (None,) * (4 + ctx.learners)
        entrance: Entrance = ctx.entrance
        if ctx.spent or entrance.exit is None or (grad_h is None and grad_c is None):
            return none
        ctx.spent = True
        h, c = ctx.saved_tensors
        grads = (torch.zeros_like(h) if g is None else g for g in (grad_h, grad_c))
        rows, grad = torch.cat((h, c), 1), torch.cat(tuple(grads), 1)
        end, site = entrance.exit, ctx.site
        regressions, heads = entrance.examples(rows, grad, end.arrival)
        taught: Slots = site.teach(regressions + end.examples(end.arrival), heads, end.loss_scale)
        return none[:4] + (taught or none[4:])  # with a rule the parameters are anchors alone


def _reset(h: Tensor, c: Tensor, start: Tensor | None) -> State:
    """Return the state with the rows where ``start`` [B, 1] is true set to zero."""
    return (h, c) if start is None else (h.masked_fill(start, 0.0), c.masked_fill(start, 0.0))


class FusedDNILSTMCell(Recurrent):
    """``nn.LSTMCell`` whose unrolled windows receive the gradient of their future.

    As :class:`FusedDNILSTM`, with the ends of a window said by the user::

        for t, x in enumerate(stream):                       # [B, I] each
            state = cell(x, state)
            ...                                              # losses on state[0]
            if (t + 1) % T == 0:
                next_state = cell.boundary(state)
                loss.backward()                              # or backward_boundary(state)
                state = next_state

    Args, attributes, errors: as :class:`FusedDNILSTM`; parameters weight_ih, weight_hh, bias_ih,
    bias_hh. The default ``target_scale`` counts the steps since the last boundary.
    """

    _states = 2
    weight_ih: nn.Parameter
    weight_hh: nn.Parameter
    bias_ih: nn.Parameter | None
    bias_hh: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        synthesizer: nn.Module | str | None = "default",
        sg_scale: float = DEFAULT_SCALE,
        auxiliary: bool = False,
        context_features: int = 0,
        update: Rule | None = None,
        synthesizer_update: Rule | None = None,
        target_scale: float | None = None,
        max_norm: float | None = None,
        max_target_norm: float | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check.flags(bias=bias)
        check.dtype(dtype)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            (input_size, hidden_size, 1),
            sg_scale,
            update,
            synthesizer_update,
            target_scale,
            max_norm,
            max_target_norm,
            backend,
        )
        self.bias = bias
        for name, p in nn.LSTMCell(input_size, hidden_size, bias, **factory)._parameters.items():
            self.register_parameter(name, p)
        self._attach_heads(
            synthesizer, auxiliary, context_features, synthesizer_update or update, factory
        )

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """Run one step.

        Args:
            input: [B, I] or [I].
            hx: h, c, [B, H] each ([H] unbatched); None for zeros.

        Returns:
            The next h and c.
        """
        if torch._C._get_tracing_state() is not None:
            self.refuse_recording()
            recorded: State = self.to_lstm_cell()(input, hx)
            return recorded
        if torch.compiler.is_compiling() and self.update is not None:
            stepped: State = untraced(self._run)(input, hx)
            return stepped
        return self._run(input, hx)

    def _run(self, input: Tensor, hx: State | None) -> State:
        called: State | None = leaf(self, input, hx=hx)
        if called is not None:
            return called
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
        if input.dim() not in (1, 2):
            raise ValueError(f"input must have 1 or 2 dimensions, got {list(input.shape)}")
        if not (self.training or all(input.shape)):
            stepped: State = self.to_lstm_cell()(input, hx)  # no rows
            return stepped
        (layer,) = self._layers()
        alone = input.dim() == 1
        x = check.step(input.unsqueeze(0) if alone else input, layer.weight_ih, input)
        batch = x.shape[0]
        if hx is None:
            h = x.new_zeros(batch, self.hidden_size)
            c = h.clone()
        else:
            if alone:
                hx = check.unbatched(hx, (self.hidden_size,), 0)
            h, c = check.state(hx, (batch, self.hidden_size), x)
        self._fit((layer,))
        decoupled = self._decoupled(x)
        backend = registry.resolve(self.backend, x, layer.weight_ih, "lstm")
        if not torch.is_grad_enabled():
            trace = ops.lstm_cell_forward(backend, x, h.contiguous(), c.contiguous(), layer, False)
            h, c = trace.h, trace.c
        else:
            ends = None
            if decoupled and not torch.compiler.is_compiling():
                h, c = self._started(h, c, hx is not None)
            if decoupled or (self.training and (self.update or self.phase.probe)):
                ends = self._ends(h)
            learners = () if ends is None else self._learners()
            h, c = lstm_cell(
                backend, x, h.contiguous(), c.contiguous(), layer, ends, self, learners
            )
            if ends is not None:
                ends.made = h.detach(), c.detach()
        return (h.squeeze(0), c.squeeze(0)) if alone else (h, c)

    def _ends(self, h: Tensor) -> _StepEnds:
        """Return this step's place in its window, told from the node that made h."""
        node = None if torch.compiler.is_compiling() else origin(h, self)
        entrance, before = getattr(node, "entrance", None), getattr(node, "ends", None)
        if isinstance(entrance, Entrance):
            if not self.phase.warmup:
                self._windows.continued += 1
            return _StepEnds(self, 1, entrance)
        if isinstance(before, _StepEnds):
            return _StepEnds(self, 1 if before.closes else before.steps + 1, before.entrance)
        return _StepEnds(self, 1, None)

    def boundary(
        self,
        state: State,
        end_of_sequence: Tensor | None = None,
        context: Tensor | None = None,
    ) -> State:
        """Close a window: call it with the state of its last step, before the backward.

        The backward of the window then starts from the synthetic gradient at ``state``. What is
        returned is where the next window starts: it carries no gradient back, and what arrives
        there trains the synthesizer.

        Args:
            state: h, c, as the cell returned them.
            end_of_sequence: bool [B]: rows that end here. Nothing is injected there, the
                synthesizer is trained towards zero, and the rows start anew from zero.
            context: what the synthesizer is conditioned on at this state, int64 [B] or [B, K].

        Returns:
            The state for the next step; in ``eval()``, under ``no_grad()`` and without a
            synthesizer the same state, but for the rows that end.

        Raises:
            RuntimeError: a state that this cell's last step did not make.
        """
        run = untraced(self._boundary) if torch.compiler.is_compiling() else self._boundary
        made: State = run(state, end_of_sequence, context)
        return made

    def _boundary(
        self, state: State, end_of_sequence: Tensor | None, context: Tensor | None
    ) -> State:
        check.pair(state, "state")
        h, c = state
        batch = 1 if h.dim() == 1 else h.shape[0]
        end_of_sequence = check.ended(end_of_sequence, batch, h.device, h.dim() == 1)
        start = None if end_of_sequence is None else end_of_sequence.unsqueeze(1)
        decoupled = self.training and torch.is_grad_enabled()
        if self._modules["synthesizer"] is None:
            return _reset(h, c, start)
        if not decoupled:
            h, c = _reset(h, c, start)
            self._returned.note(h, c, None if start is None else Known(end_of_sequence))
            return h, c
        if h.dim() == 1:
            raise RuntimeError("boundary needs a batch: call the cell with [B, I]")
        ends = self._step_of(h, c)
        if ends is None:
            raise RuntimeError(
                "boundary: state was not made by this cell's last step, into whose backward the "
                "synthetic gradient is injected: give it as it was returned, not detached, by a "
                "cell that is not compiled"
            )
        ends.closes = True
        context = self._context_rows(context, batch, h)
        scale = self.kappa(ends.steps * batch)
        if self.phase.probe is not None:
            probed = self._probe(h.unsqueeze(0), c.unsqueeze(0), end_of_sequence, context, scale)
            return _reset(probed[0].squeeze(0), probed[1].squeeze(0), start)
        exit = Exit(self, end_of_sequence, context, scale)
        ends.exit = exit
        if ends.entrance is not None:
            ends.entrance.exit = exit
        h, c = _reset(h.detach(), c.detach(), start)
        made = self._start(h, c, end_of_sequence, context)
        told = start is not None or context is not None
        self._returned.note(*made, Known(end_of_sequence, context) if told else None)
        if exit.strength:
            windows = self._windows
            windows.predicted += 1
            windows.told_ends = windows.told_ends or start is not None
            if not windows.predicted % WINDOWS and self.statistics.device.type == "cpu":
                self.warn_of_norm(self.statistics.tolist())
        return made

    def _step_of(self, h: Tensor, c: Tensor) -> _StepEnds | None:
        """Return the step that returned this state: its memory, unchanged, in the step's graph."""
        first: Any = h.grad_fn
        nodes = [first] if hasattr(first, "ends") else origins((h,), self, NODES)[0]
        for node in nodes:
            ends = getattr(node, "ends", None)
            if not isinstance(ends, _StepEnds) or ends.site is not self or ends.made is None:
                continue
            made_h, made_c = ends.made
            if (
                (h.data_ptr(), c.data_ptr()) == (made_h.data_ptr(), made_c.data_ptr())
                and (h.shape, c.shape) == (made_h.shape, made_c.shape)
                and (h.stride(), c.stride()) == (made_h.stride(), made_c.stride())
            ):
                return ends
        return None

    def _started(self, h: Tensor, c: Tensor, given: bool) -> State:
        """Start a window at a state that came without a graph, detached or copied behind its
        boundary, if it is this cell's."""
        if h.requires_grad or c.requires_grad:
            return h, c
        known = self._known(h, c, True)[0] if given else None
        if known is None:
            windows = self._windows
            if windows.predicted - windows.continued >= windows.judge_at:
                self._judge_starts()
            return h, c
        if known.context is None and getattr(
            self._modules["synthesizer"], "context_features", False
        ):
            return h, c  # M cannot be asked there
        if known.ended is not None:
            h, c = _reset(h, c, known.ended.unsqueeze(1))
        return self._start(h, c, known.ended, known.context)

    def _start(self, h: Tensor, c: Tensor, started: Tensor | None, context: Tensor | None) -> State:
        """Return the entrance of a window at a detached state."""
        anchors = self._learners() or tuple(
            p for p in self.synthesizer_parameters() if p is not None
        )
        entrance = Entrance(context, started)
        made: State = Boundary.apply(self, entrance, h, c, *anchors)
        return made

    def _layers(self) -> tuple[LSTMLayer, ...]:
        return (LSTMLayer(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh),)

    @classmethod
    def from_lstm_cell(cls, cell: nn.LSTMCell, **kwargs: Any) -> FusedDNILSTMCell:
        """Take over an ``nn.LSTMCell``: the new module holds the very same parameters.

        Raises:
            ValueError: a subclass of ``nn.LSTMCell``.
        """
        if type(cell) is not nn.LSTMCell:
            raise ValueError(
                f"only nn.LSTMCell itself can be taken over, got {type(cell).__name__}"
            )
        made = cls(
            cell.input_size,
            cell.hidden_size,
            cell.bias,
            device=cell.weight_ih.device,
            dtype=cell.weight_ih.dtype,
            **kwargs,
        )
        for name in cell._parameters:
            made._parameters[name] = cell._parameters[name]
        return made.train(cell.training)

    def to_lstm_cell(self) -> nn.LSTMCell:
        """``nn.LSTMCell`` holding the very same parameters; the synthesizer is left behind."""
        plain = nn.LSTMCell(self.input_size, self.hidden_size, self.bias, device="meta")
        for name in plain._parameters:
            plain._parameters[name] = self._parameters[name]
        return plain.train(self.training)

    def stock_module(self) -> nn.Module:
        return self.to_lstm_cell()

    def extra_repr(self) -> str:
        """Show what ``nn.LSTMCell`` does, and the rule."""
        text = f"{self.input_size}, {self.hidden_size}"
        if not self.bias:
            text += ", bias=False"
        if self.update is not None:
            text += f", update={self.update.rule}"
        return text
