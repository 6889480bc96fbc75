"""``FusedDNILSTM``: truncated windows that hear of their future."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fused_dni import ops
from fused_dni.backends.common.windows import state_rows
from fused_dni.functional import check
from fused_dni.functional.lstm import Window, lstm_window
from fused_dni.modules.base import Predicted, Regression, leaf, untraced
from fused_dni.modules.nodes import teach_later
from fused_dni.modules.recurrent import (
    DEFAULT_SCALE,
    WINDOWS,
    Arrival,
    Entrance,
    Example,
    Exit,
    Known,
    Recurrent,
    Slots,
    State,
)
from fused_dni.ops import registry
from fused_dni.ops.types import LSTMBoundary, LSTMClosed, LSTMGradients, LSTMLayer
from fused_dni.rules import Rule


class _WindowEnds:
    """Both ends of a whole window: :class:`fused_dni.functional.lstm.Ends`."""

    def __init__(self, exit: Exit, entrance: Entrance | None) -> None:
        self.exit, self.entrance = exit, entrance
        self.returns_weights = exit.site.update is None

    def boundary(self, x: Tensor, plain: bool) -> tuple[LSTMBoundary, Tensor | None] | None:
        if self.exit.sources:
            self.exit.begin()
        site = self.exit.site
        boundary = self.exit.boundary(self.entrance is not None, x, plain)
        if boundary is None:
            return None
        fused = boundary.synthesizer
        return boundary, site.statistics_on(fused.weight.device) if self.returns_weights else None

    def closed(self, window: Window, closed: LSTMClosed) -> Slots:
        site = self.exit.site
        if self.returns_weights:
            return tuple(g for g in closed.synthesizer if g is not None)
        site.defer(window.rows(closed.gradients), 1.0)
        if closed.regression is not None:
            rows, grad, prediction = closed.regression
            predicted = Predicted(prediction.scaled, prediction, None, site.unit)
            teach_later(site, Regression(rows, predicted, None, grad, self.exit.target_scale))
        return ()

    def arrive(
        self, h: Tensor, c: Tensor, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Arrival]:
        return self.exit.inject(h, c, grad_h, grad_c)

    def leave(self, window: Window, made: LSTMGradients, arrival: Arrival) -> Slots:
        site = self.exit.site
        if not self.returns_weights:
            site.defer(window.rows(made), self.exit.loss_scale)
        regressions = self.exit.examples(arrival)
        heads: list[Example] = []
        if self.entrance is not None and self.exit.learns:
            trace = window.trace
            assert trace.cells is not None
            rows = state_rows(trace.hidden[:, 0], trace.cells[:, 0])
            found, heads = self.entrance.examples(rows, state_rows(made.h, made.c), arrival)
            regressions = found + regressions
        return site.teach(regressions, heads, self.exit.loss_scale)


class FusedDNILSTM(Recurrent):
    """``nn.LSTM`` whose truncated windows receive the gradient of their future.

    In training, a window's backward starts from what its own losses send *plus* the synthetic
    gradient of everything that comes later, predicted by a synthesizer from the window's final
    state (Jaderberg et al. 2016, arXiv 1608.05343, section 2.1). The next call cuts the graph at
    its entrance, and the gradient that its own backward brings there trains the synthesizer. In
    ``eval()``, under ``no_grad()`` and with ``synthesizer=None`` it is exactly ``nn.LSTM``.

    ::

        for window, target in stream:                       # [T, B, I] each
            output, state = lstm(window, state)             # no detach() needed, none forbidden
            loss(output, target).backward()                 # one backward a window
            optimizer.step(); optimizer.zero_grad()

    Under a :class:`fused_dni.Schedule` nothing is injected during the warm-up, while the
    synthesizer learns; on steps without targets it does not learn; ``mix`` = m, there being no true
    gradient of the future to mix with, leaves 1 - m of the synthetic one.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout: as in ``nn.LSTM``.
        bidirectional, proj_size: as in ``nn.LSTM``; only with ``synthesizer=None`` and
            ``update=None``, and on PyTorch's own kernels.
        synthesizer: "default" for ``LinearSynthesizer(2 * num_layers * hidden_size, rank=16)``;
            None for plain backprop: then nothing is cut, and truncation is the user's
            ``detach()``, as ever; or a module (see :mod:`fused_dni.synthesizers`) that is called
            with rows [B, 2 L H], each h_0, c_0, h_1, c_1, ... of a sequence, and predicts
            ``kappa`` times the gradient there.
        sg_scale: factor on the synthetic gradient. 1 trusts the prediction fully; go there with
            ``max_target_norm``, as targets are made of predictions in their turn.
        auxiliary: add a head that predicts, from the state at a window's entrance, the synthetic
            gradient at its exit. Its squared error trains the head and, through the synthesizer's
            target, the layers.
        context_features: K of the default synthesizer, 0 for none.
        update: rule (``SGD``, ``Adam``, ``AdamW``) applied to the layers at the end of the
            backward; None to leave gradients in ``.grad``.
        synthesizer_update: rule for synthesizer and auxiliary head; None for the same.
        target_scale: kappa: the synthesizer learns so many times the gradient. None for the steps
            times the rows of the window, by which a mean loss divides, over a power of two that
            follows the size of the gradients. A number is taken as it is.
        max_norm: bound of the synthetic gradient's Frobenius norm; None for no clipping.
        max_target_norm: bound of the norm, row by row, of the synthesizer's target, kappa times the
            gradient; None for none. A target is made of a prediction in its turn, and where the
            gradient grows on its way through a window the two drive each other up.
        backend: force a backend by name.
        device, dtype: of the parameters.

    Attributes:
        weight_ih_l[k], weight_hh_l[k], bias_ih_l[k], bias_hh_l[k]: as in ``nn.LSTM`` (gate order
        i, f, g, o), initialised alike. synthesizer, auxiliary_head: modules or None.

    Raises:
        ValueError: an option out of range; an option that has no decoupled form; as ``nn.LSTM``, an
            input of other dimensions or dtype.
        RuntimeError: a shape, dtype or device that does not fit; a use in which a fused rule would
            be silently wrong; a second backward through one window.
    """

    _states = 3
    mode = "LSTM"  # as nn.LSTM says

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
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
        check.flags(bias=bias, batch_first=batch_first, bidirectional=bidirectional)
        check.whole("proj_size", proj_size, 0)
        check.share("dropout", dropout)
        check.dtype(dtype)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._plain = bidirectional or proj_size > 0
        if self._plain:
            option = "bidirectional=True" if bidirectional else f"proj_size={proj_size}"
            if synthesizer is not None:
                reason = (
                    "a truncated stream has no right-to-left future"
                    if bidirectional
                    else "the fused window has no projection"
                )
                raise ValueError(f"{option} needs synthesizer=None: {reason}")
            if update is not None or backend is not None:
                raise ValueError(
                    f"{option} runs on PyTorch's own kernels: update and backend must be None"
                )
        super().__init__(
            (input_size, hidden_size, num_layers),
            sg_scale,
            update,
            synthesizer_update,
            target_scale,
            max_norm,
            max_target_norm,
            backend,
        )
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bidirectional, proj_size
        plain = nn.LSTM(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            **factory,
        )
        for name, parameter in plain.named_parameters():
            self.register_parameter(name, parameter)
        self._names = tuple(self._parameters)
        self._attach_heads(
            synthesizer, auxiliary, context_features, synthesizer_update or update, factory
        )

    # -- forward -------------------------------------------------------------------------------

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        end_of_sequence: Tensor | None = None,
        lengths: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run a window; see the class.

        Args:
            input: [T, B, I], [B, T, I] with ``batch_first``, [T, I] unbatched, or packed.
            hx: the state h, c, [L, B, H] each ([L, H] unbatched); None for zeros. In training
                with a synthesizer it is cut here, and learned from, if it is what an earlier call
                of this module returned, detached, copied or not, or rows of it in order; the
                gradient of any other goes on as with ``nn.LSTM`` (see :meth:`remember`).
            end_of_sequence: bool [B] ([] unbatched): rows whose sequence ends with this window.
                Nothing is injected there, the synthesizer is trained towards zero, and the next
                call starts those rows from a zero state, if it is given this state.
            lengths: int64 [B], steps of each row, in [1, T]; not with packed input.
            context: what the synthesizer is conditioned on, int64 [B] or [B, K]; None to take it
                from :func:`fused_dni.condition_on`.

        Returns:
            output, as ``input`` with H in the last place (zero behind a row's length), and the
            state h_n, c_n [L, B, H]. The state stays in this window's graph.
        """
        if type(input) is not Tensor:
            given = {"end_of_sequence": end_of_sequence, "lengths": lengths, "context": context}
            called: tuple[Tensor, State] | None = leaf(self, input, hx=hx, **given)
            if called is not None:
                return called
        if self._plain:
            if end_of_sequence is not None or lengths is not None or context is not None:
                raise ValueError(
                    "end_of_sequence, lengths and context have no meaning with bidirectional=True "
                    "or proj_size"
                )
            return self._stock(input, hx)
        if torch._C._get_tracing_state() is not None:
            self.refuse_recording()
            if end_of_sequence is None and lengths is None:
                return self._stock(input, hx)
        tracing = torch.compiler.is_compiling()
        if tracing and (
            end_of_sequence is not None
            or self._returned.marked
            or self.update is not None
            or self._asks_untraced(context)
        ):
            run = untraced(self._run)
        else:
            run = self._run
        output, (h, c) = run(input, hx, end_of_sequence, lengths, context)
        if h.requires_grad:  # for traced code, which sees neither memory nor graph
            if tracing:  # no sign can be set there on a node's own output
                h, c = h.view_as(h), c.view_as(c)
            h._fused_dni_owner = c._fused_dni_owner = id(self)
        return output, (h, c)

    def _asks_untraced(self, context: Tensor | None) -> bool:
        """Say whether M is a module of its own, or is conditioned: what it was conditioned on at a
        state is remembered outside of traced code."""
        if not self.training or self._modules["synthesizer"] is None:
            return False
        return context is not None or self.fused_state_synthesizer() is None

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: State | None,
        ended: Tensor | None,
        lengths: Tensor | None,
        context: Tensor | None,
    ) -> tuple[Tensor | PackedSequence, State]:
        if type(input) is not Tensor and isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths belongs to the packed input: do not give it again")
            padded, counts = pad_packed_sequence(input)
            output, state = self._window(
                padded, hx, ended, counts.to(padded.device), context, padded
            )
            order = input.sorted_indices
            if order is not None:
                output, counts = output.index_select(1, order), counts[order.cpu()]
            data = pack_padded_sequence(output, counts).data
            return input._replace(data=data), state
        if type(input) is not Tensor and not isinstance(input, Tensor):
            raise TypeError(
                f"input must be a torch.Tensor or a PackedSequence, got {type(input).__name__}"
            )
        none = not (self.training or all(input.shape))
        if none and input.ndim == 3 and ended is None and lengths is None:
            return self._stock(input, hx)  # no rows
        if input.ndim not in (2, 3):
            raise ValueError(f"input must have 2 or 3 dimensions, got {list(input.shape)}")
        if input.ndim == 2:
            if hx is not None:
                signed = all(map(self._bears_sign, hx))
                hx = check.unbatched(hx, (self.num_layers, self.hidden_size), 1)
                if signed:
                    hx[0]._fused_dni_owner = hx[1]._fused_dni_owner = id(self)  # type: ignore[attr-defined]
            output, (h, c) = self._window(input.unsqueeze(1), hx, ended, lengths, context, input)
            return output.squeeze(1), (h.squeeze(1), c.squeeze(1))
        steps_first = input.transpose(0, 1) if self.batch_first else input
        output, state = self._window(steps_first, hx, ended, lengths, context, input)
        return (output.transpose(0, 1) if self.batch_first else output), state

    def _window(
        self,
        x: Tensor,
        hx: State | None,
        ended: Tensor | None,
        lengths: Tensor | None,
        context: Tensor | None,
        given: Tensor,
    ) -> tuple[Tensor, State]:
        """Run the window for x [T, B, I]; ``given`` is the input as it came, for messages."""
        tracing = torch.compiler.is_compiling()
        bound = self._bound
        if bound is not None and (tracing or context is not None or not bound.hold(True)):
            bound = None
        layers = self._layers() if bound is None else bound.layers
        weight = layers[0].weight_ih
        x = check.step(x, weight, given, ValueError)
        steps, batch = x.shape[:2]
        if ended is not None:
            ended = check.ended(ended, batch, x.device, given.dim() == 2)
        lengths = None if lengths is None else check.lengths(lengths, steps, batch, x.device)
        if lengths is not None:  # what lies behind a row's length may be anything, NaN included
            behind = torch.arange(steps, device=x.device).unsqueeze(1) >= lengths
            x = x.masked_fill(behind.unsqueeze(2), 0.0)
        probing = self.training and self.phase.probe is not None
        if bound is None:
            self._fit(layers)
            decoupled = self._decoupled(x)
        else:
            decoupled = not probing and bound.synthesizer is not None
        if context is not None or (bound is None and (decoupled or probing)):
            context = self._context_rows(context, batch, x)
        h, c, entrance, sources = self._enter(hx, x, decoupled, context, tracing)
        if bound is None:
            backend = registry.resolve(self.backend, x, weight, "lstm")
        else:
            backend = bound.backend
        masks = self._dropout_masks(steps, batch, x) if self.dropout else ()
        scale = self.kappa(steps * batch)
        ends = None
        ruled = self.training and self.update is not None and not probing
        if bound is not None or torch.is_grad_enabled():
            if decoupled or ruled:
                exit = Exit(self, ended, context, scale)
                exit.sources = sources
                if entrance is not None:
                    entrance.exit = exit
                ends = _WindowEnds(exit, entrance)
            learners: tuple[Tensor, ...] = ()
            if ends is not None:
                learners = self._learners() if bound is None else bound.learners
            output, h, c = lstm_window(
                backend,
                x,
                h,
                c,
                layers,
                lengths,
                masks,
                ends,
                self,
                learners,
                settled=bound is not None,
            )
            if bound is None and self.training and not tracing and type(self) is FusedDNILSTM:
                self._settle(backend)
        else:
            trace = ops.lstm_forward(backend, x, h, c, layers, lengths, masks, False)
            output, h, c = trace.hidden[-1, 1:], trace.h, trace.c
        if probing:
            h, c = self._probe(h, c, ended, context, scale)
        told = ended is not None or (context is not None and decoupled)
        if (told or self._modules["synthesizer"] is not None) and not (
            tracing or torch._C._are_functorch_transforms_active()
        ):
            self._returned.note(h, c, Known(ended, context) if told else None)
            if ended is not None and decoupled:
                self._windows.told_ends = True
        return output, (h, c)

    def _enter(
        self,
        hx: State | None,
        x: Tensor,
        decoupled: bool,
        context: Tensor | None,
        tracing: bool,
    ) -> tuple[Tensor, Tensor, Entrance | None, list[Any]]:
        """Return the state that the window starts from; where it continues one, its entrance; and
        the nodes of this module that its gradient goes on to."""
        batch = x.shape[1]
        known: Known | None = None
        sources: list[Any] | None = []
        if hx is None:
            h = x.new_zeros(self.num_layers, batch, self.hidden_size)
            c = h.clone()
        else:
            h, c = check.state(hx, (self.num_layers, batch, self.hidden_size), x)
            if tracing:
                return self._enter_traced(h, c, decoupled)
            known, sources = self._known(h, c, decoupled)
        if decoupled and not tracing and not self.phase.warmup:
            windows = self._windows
            if known is not None:
                windows.continued += 1
            elif windows.predicted - windows.continued >= windows.judge_at:
                self._judge_starts()
            windows.predicted += 1
            if not windows.predicted % WINDOWS and self.statistics.device.type == "cpu":
                self.warn_of_norm(self.statistics.tolist())
        if known is None:
            if sources is None:
                h, c, sources = h.detach(), c.detach(), []
            return h.contiguous(), c.contiguous(), None, sources
        if decoupled:
            h, c = h.detach(), c.detach()
        if known.ended is not None:
            start = known.ended.unsqueeze(1)
            h, c = h.masked_fill(start, 0.0), c.masked_fill(start, 0.0)
        h, c = h.contiguous(), c.contiguous()
        # M is asked again at that state: with the context that it had there, or not at all.
        if not decoupled or (context is not None and known.context is None):
            return h, c, None, []
        context = None if context is None else known.context
        return h, c, Entrance(context, known.ended), []

    def _enter_traced(
        self, h: Tensor, c: Tensor, decoupled: bool
    ) -> tuple[Tensor, Tensor, Entrance | None, list[Any]]:
        """Enter as :meth:`_enter` where no graph is seen: a state that asks for its gradient is cut
        if it bears the module's sign; which rows are its own is seen when the code runs."""
        signed = self._bears_sign(h) and self._bears_sign(c)
        attached = h.requires_grad or c.requires_grad
        if not decoupled or (attached and not signed):
            return h.contiguous(), c.contiguous(), None, []
        h, c = h.detach(), c.detach()
        counted = ops.lstm_returned_rows(h, c, self._layers()[0].weight_ih.detach(), attached)
        return h.contiguous(), c.contiguous(), Entrance(None, None, counted), []

    def _dropout_masks(self, steps: int, batch: int, x: Tensor) -> tuple[Tensor, ...]:
        if not (self.training and self.dropout and self.num_layers > 1):
            return ()
        ones = x.new_ones(steps, batch, self.hidden_size)
        return tuple(nn.functional.dropout(ones, self.dropout) for _ in range(self.num_layers - 1))

    def _layers(self) -> tuple[LSTMLayer, ...]:
        own = self._parameters
        values: list[Any] = [
            own[name] if name in own else getattr(self, name) for name in self._names
        ]
        return ops.layers_of(values, self.bias)

    def _stock(
        self, input: Tensor | PackedSequence, hx: State | None
    ) -> tuple[Tensor | PackedSequence, State]:
        """``nn.LSTM`` itself on this module's parameters."""
        if torch._C._get_tracing_state() is not None:  # where functional_call is refused
            recorded: tuple[Tensor | PackedSequence, State] = self.to_lstm()(input, hx)
            return recorded
        plain = self._meta()
        parameters = {name: getattr(self, name) for name in self._names}
        out: tuple[Tensor | PackedSequence, State] = torch.func.functional_call(
            plain, parameters, (input, hx)
        )
        return out

    # -- nn.LSTM's other methods -----------------------------------------------------------------

    def flatten_parameters(self) -> None:
        """Do nothing: the kernels pack the weights themselves."""

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters by layer (and direction), as in ``nn.LSTM``."""
        kinds = 2 + 2 * self.bias + (self.proj_size > 0)
        named = [getattr(self, name) for name in self._names]
        return [named[i : i + kinds] for i in range(0, len(named), kinds)]

    def _meta(self) -> nn.LSTM:
        """``nn.LSTM`` of these options, without parameters of its own."""
        return nn.LSTM(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.bias,
            self.batch_first,
            self.dropout,
            self.bidirectional,
            self.proj_size,
            device="meta",
        ).train(self.training)

    # -- conversion ------------------------------------------------------------------------------

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM, **kwargs: Any) -> FusedDNILSTM:
        """Take over an ``nn.LSTM``: the new module holds the very same parameters.

        Args:
            lstm: an ``nn.LSTM``; bidirectional or with projections only with
                ``synthesizer=None``.
            **kwargs: further arguments of the constructor.

        Raises:
            ValueError: a subclass, or an option that has no decoupled form.
        """
        if type(lstm) is not nn.LSTM:
            raise ValueError(f"only nn.LSTM itself can be taken over, got {type(lstm).__name__}")
        weight = cast(Tensor, lstm.weight_ih_l0)
        made = cls(
            lstm.input_size,
            lstm.hidden_size,
            lstm.num_layers,
            lstm.bias,
            lstm.batch_first,
            lstm.dropout,
            lstm.bidirectional,
            lstm.proj_size,
            device=weight.device,
            dtype=weight.dtype,
            **kwargs,
        )
        for name in made._names:
            made._parameters[name] = lstm._parameters[name]
        return made.train(lstm.training)

    def to_lstm(self) -> nn.LSTM:
        """``nn.LSTM`` holding the very same parameters; the synthesizer is left behind."""
        plain = self._meta()
        for name in self._names:
            setattr(plain, name, getattr(self, name))
        return plain

    def stock_module(self) -> nn.Module:
        return self.to_lstm()

    def extra_repr(self) -> str:
        """Show what ``nn.LSTM`` does, and the rule."""
        text = f"{self.input_size}, {self.hidden_size}"
        for name, default in (
            ("proj_size", 0),
            ("num_layers", 1),
            ("bias", True),
            ("batch_first", False),
            ("dropout", 0.0),
            ("bidirectional", False),
            ("sg_scale", DEFAULT_SCALE),
        ):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        if self.update is not None:
            text += f", update={self.update.rule}"
        return text
