"""Synthesizers: small models that predict a layer's gradient from its output.

**Protocol.** A synthesizer is an ``nn.Module`` called as ``synthesizer(h, context)`` with the
detached output h of the layer, rows first, and the context (None without one). It returns a tensor
of h's shape: the prediction of ``kappa * dL/dh``, where kappa is the layer's target scale (the
batch size, for a mean loss). It is trained by regression on that, in the synthesizer's own unit
(:class:`TargetUnit`) if it is one of those here. Its last layer should start at
zero, so that an untrained synthesizer does nothing (Jaderberg et al. 2016, arXiv 1608.05343,
appendix). Subclasses of :class:`Synthesizer` that return their parameters from
:meth:`fused_dni.Synthesizer.fused` run inside the fused kernels; all others run as they are, under
autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_dni.functional import check
from fused_dni.ops.types import SynthesizerTensors


@dataclass
class TargetUnit:
    """The size of what a synthesizer learns: its output is ``kappa * dL/dh / size``.

    Layers without an explicit ``target_scale`` set it (see
    ``fused_dni.modules.target_unit``), so that the loss may have any scale.

    Attributes:
        size: a power of two, so that a division by it rounds nothing.
        lessons: how many there have been, which says when the size is looked at.
    """

    size: float = 1.0
    lessons: int = 0


def _is_unit(given: Any) -> bool:
    if not isinstance(given, list) or len(given) != 2:
        return False
    size, lessons = given
    return math.frexp(size)[0] == 0.5 and lessons >= 0 and float(lessons).is_integer()


def _before(metadata: Any, version: int) -> bool:
    """Say whether a module's entry of a state dict says that an earlier version wrote it."""
    written = metadata.get("version")
    return written is not None and written < version


def _rank(rank: Any, features: int, least: int = 1) -> None:
    """Refuse a rank that is no whole number from ``least`` to ``features``; 0 stands for None."""
    if rank is None and least == 1:
        return
    check.whole("rank", rank, None)
    if not least <= rank <= features:
        none = " or None" if least == 1 else ""
        raise ValueError(f"rank must be in [{least}, features={features}]{none}, got {rank}")


class Synthesizer(nn.Module):
    """Base of the synthesizers shipped here.

    Args:
        features: size O of the layer's output.
        context_features: K, number of classes or size of the conditioning vector; 0 for none.

    Attributes:
        unit: in what unit gradients are predicted; part of the state dict.
        takes_rows: it is called with h [N, features] alone; a layer folds the leading dimensions
            of other shapes into N.
        context_as_h: its context is called for in the shape of h, as the segment returns it.
        ignore_index: the label of rows that are not in the loss, None if there is none.
    """

    _version = 2  # of state dicts: since there are units (1 is that of every module)

    takes_rows = False
    context_as_h = False
    ignore_index: int | None = None

    def __init__(self, features: int, context_features: int = 0) -> None:
        super().__init__()
        check.sizes(features=features)
        check.whole("context_features", context_features, 0)
        self.features = features
        self.context_features = context_features
        self.unit = TargetUnit()

    def check(self, context: Tensor | None, shape: torch.Size | None = None) -> None:
        """Raise for what nothing can be predicted from. Layers ask before they change anything.

        Args:
            context: int64 or floating point with K last, what else they have being any shape that
                the layer takes; with ``shape`` as the forward takes it.
            shape: of h as the forward takes it; None while it is not known.

        Raises:
            RuntimeError: what does not fit.
        """
        if shape is not None and self.takes_rows and shape[-1] != self.features:
            raise RuntimeError(
                f"h must have shape [..., {self.features}], the synthesizer's features, got "
                f"[..., {shape[-1]}]"
            )

    def last_layer(self) -> tuple[Tensor, ...]:
        """Return the parameters that scale the output when all are scaled together. None by
        default: what such a synthesizer predicts has the unit 1."""
        return ()

    def get_extra_state(self) -> Tensor:
        """Return the unit, for the state dict."""
        unit = [self.unit.size, self.unit.lessons]
        return torch.tensor(unit, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Take over the unit of a state dict."""
        given = state.tolist() if isinstance(state, Tensor) else state
        if not _is_unit(given):
            raise ValueError(
                "_extra_state of a synthesizer must be its unit, a power of two, and a number of "
                f"lessons, got {given!r}"
            )
        size, lessons = given
        self.unit = TargetUnit(size, int(lessons))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
        unexpected_keys: Any, error_msgs: Any,
    ) -> None:  # fmt: skip
        """Load a state dict. Of one from before there were units predictions are in the unit 1; in
        one that does not say when it was written a unit that is not there is a missing key, and 1
        is assumed."""
        key = f"{prefix}_extra_state"
        if key not in state_dict and any(k.startswith(prefix) for k in state_dict):
            if _before(local_metadata, self._version):
                state_dict[key] = torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu")
            else:
                self.unit = TargetUnit()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("unit", TargetUnit())  # pickled before there were units

    def fused(self) -> SynthesizerTensors | None:
        """Return the parameters in the form that kernels take, or None if there is no such form."""
        return None

    def extra_repr(self) -> str:
        return f"features={self.features}, context_features={self.context_features}"


class _Affine(Synthesizer):
    """Synthesizers of the form ``f(h) + context + bias`` with fused kernels."""

    takes_rows = True
    kind: str
    weight: nn.Parameter
    down: nn.Parameter | None
    context_weight: nn.Parameter | None
    bias: nn.Parameter

    def _shared(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        check.dtype(dtype)
        features, k = self.features, self.context_features
        self.context_weight = (
            nn.Parameter(torch.empty(features, k, device=device, dtype=dtype)) if k else None
        )
        self.bias = nn.Parameter(torch.empty(features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Zero what forms the output; draw what reduces the input."""
        _start(self.down, (self.weight, self.context_weight, self.bias))

    def last_layer(self) -> tuple[Tensor, ...]:
        if "parametrizations" in self._modules:
            return ()
        return _given((self.weight, self.context_weight, self.bias))

    def fused(self) -> SynthesizerTensors | None:
        if "parametrizations" in self._modules:
            return None
        p = self._parameters
        return SynthesizerTensors(
            self.kind,
            p["weight"],  # type: ignore[arg-type]
            p.get("down"),
            p.get("context_weight"),
            p["bias"],
        )

    def _predict(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict ``kappa * dL/dh``, in the synthesizer's unit.

        Args:
            h: [N, O].
            context: int64 [N] or floating point [N, K] if ``context_features`` > 0, else None.

        Returns:
            [N, O].
        """
        out = self._predict(h) + self.bias
        if self.context_weight is not None:
            if context is None:
                raise ValueError("context is missing: context_features is not 0")
            if context.dtype == torch.int64:
                check.labels(context, self.context_features)
                out = out + F.embedding(context, self.context_weight.t())
            else:
                out = out + F.linear(context, self.context_weight)
        return out


class LinearSynthesizer(_Affine):
    """``M(h) = h A.T + C[context] + c``, with A dense or of low rank ``A = weight @ down``.

    A linear synthesizer is exact for losses quadratic in h (Czarnecki et al. 2017,
    arXiv 1703.00522).

    Args:
        features: O.
        rank: R of the low-rank form; None for dense.
        context_features: K, 0 for an unconditional synthesizer.
        device, dtype: of the parameters.

    Attributes:
        weight: [O, O], or [O, R] for low rank; starts at zero.
        down: [R, O] for low rank, else None; starts random (Kaiming uniform, as ``nn.Linear``).
        context_weight: [O, K] or None; starts at zero.
        bias: [O]; starts at zero.

    Raises:
        ValueError: a size below 1, or a rank above ``features``.
    """

    def __init__(
        self,
        features: int,
        rank: int | None = None,
        context_features: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, context_features)
        _rank(rank, features)
        self.rank = rank
        self.kind = "dense" if rank is None else "lowrank"
        inner = features if rank is None else rank
        self.weight = nn.Parameter(torch.empty(features, inner, device=device, dtype=dtype))
        self.down = (
            None
            if rank is None
            else nn.Parameter(torch.empty(rank, features, device=device, dtype=dtype))
        )
        self._shared(device, dtype)
        self.reset_parameters()

    def _predict(self, h: Tensor) -> Tensor:
        if self.down is not None:
            h = F.linear(h, self.down)  # [N, R]
        return F.linear(h, self.weight)  # [N, O]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class DiagonalSynthesizer(_Affine):
    """``M(h) = a * h + C[context] + c``: no matrix product at all.

    Args:
        features: O.
        context_features: K, 0 for none.
        device, dtype: of the parameters.

    Attributes:
        weight: a, [O]; context_weight: [O, K] or None; bias: [O]. All start at zero.
    """

    kind = "diagonal"

    def __init__(
        self,
        features: int,
        context_features: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, context_features)
        self.weight = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.down = None
        self._shared(device, dtype)
        self.reset_parameters()

    def _predict(self, h: Tensor) -> Tensor:
        return h * self.weight


def _start(down: Tensor | None, last: Iterable[Tensor | None]) -> None:
    """Zero what forms the output; draw what reduces the input."""
    if down is not None:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    for p in last:
        if p is not None:
            nn.init.zeros_(p)


def _given(parameters: Iterable[Tensor | None]) -> tuple[nn.Parameter, ...]:
    """Return those that are there, if all of them are parameters of their own."""
    there = [p for p in parameters if p is not None]
    own = [p for p in there if isinstance(p, nn.Parameter)]
    return tuple(own) if len(own) == len(there) else ()


def _one_hot(context: Tensor | None, features: int, like: Tensor) -> Tensor:
    """Return the context as dense rows [N, K]."""
    if context is None:
        raise ValueError("context is missing: context_features is not 0")
    if context.dtype == torch.int64:
        check.labels(context, features)
        return F.one_hot(context, features).to(like.dtype)
    return context.to(like.dtype)


def _check_as_h(context: Tensor | None, shape: torch.Size | None, form: str) -> None:
    """Refuse a context that is not what h, of this shape or form, should be."""
    fits = context is not None and context.is_floating_point()
    if context is None or not fits or (shape is not None and context.shape != shape):
        given = "none" if context is None else f"{context.dtype} {list(context.shape)}"
        wanted = form if shape is None else str(list(shape))
        raise RuntimeError(
            f"context must have the shape of h, floating point {wanted}, got {given}"
        )


def _with_difference(h: Tensor, context: Tensor | None) -> Tensor:
    """``[h, t, h - t]`` beside each other: [N, 3 O, ...]."""
    assert context is not None
    t = context.to(h.dtype)
    return torch.cat([h, t, h - t], dim=1)


def _own_size(features: int, context_features: int) -> int:
    """Return the size of a context that h is held against."""
    if context_features not in (0, features):
        raise ValueError(
            f"with difference=True the context has the size of h, context_features={features} "
            f"(or 0, to leave it out), got {context_features}"
        )
    return features


class _FromZero(nn.Module):
    """Parameters that start, and start anew, from zero."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]  # the layer's own, for its draws
        with torch.no_grad():
            for p in self.parameters():
                p.zero_()


class _LastLinear(_FromZero, nn.Linear):
    pass


class _LastConv1d(_FromZero, nn.Conv1d):
    pass


class _LastConv2d(_FromZero, nn.Conv2d):
    pass


class _LastConv3d(_FromZero, nn.Conv3d):
    pass


class MLPSynthesizer(Synthesizer):
    """Hidden layers of Linear-BatchNorm-ReLU on [h, context], then a linear layer from zero.

    The paper's unconditional synthesizer is ``hidden=1024, layers=2``. Runs under autograd, not
    inside the fused kernels.

    Args:
        features: O.
        hidden: width of the hidden layers.
        layers: number of hidden layers, at least 1.
        context_features: K, 0 for none.
        difference: the context t is what h should be, [N, O], and the first layer sees
            [h, t, h - t].
        device, dtype: of the parameters.

    Raises:
        ValueError: a size below 1, or with ``difference`` a context of another size than h.
    """

    takes_rows = True
    difference = False  # as it was pickled before there was one

    def __init__(
        self,
        features: int,
        hidden: int = 1024,
        layers: int = 1,
        context_features: int = 0,
        *,
        difference: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if difference:
            context_features = _own_size(features, context_features)
        super().__init__(features, context_features)
        self.difference = difference
        check.sizes(hidden=hidden, layers=layers)
        stack: list[nn.Module] = []
        width = features + context_features + (features if difference else 0)
        for _ in range(layers):
            stack += [
                nn.Linear(width, hidden, bias=False, device=device, dtype=dtype),
                nn.BatchNorm1d(hidden, device=device, dtype=dtype),
                nn.ReLU(),
            ]
            width = hidden
        last = _LastLinear(width, features, device=device, dtype=dtype)
        self.layers = nn.Sequential(*stack, last)

    def last_layer(self) -> tuple[Tensor, ...]:
        last: Any = self.layers[-1]
        return _given((last.weight, last.bias))

    def check(self, context: Tensor | None, shape: torch.Size | None = None) -> None:
        super().check(context, shape)
        if self.difference:
            _check_as_h(context, shape, f"[..., {self.features}]")

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict ``kappa * dL/dh`` [N, O] from h [N, O] and the context."""
        self.check(context, h.shape)
        if self.difference:
            h = _with_difference(h, context)  # [N, 3 O]
        elif self.context_features:
            h = torch.cat([h, _one_hot(context, self.context_features, h)], dim=1)  # [N, O + K]
        out: Tensor = self.layers(h)
        return out


class SoftmaxSynthesizer(Synthesizer):
    """Predict the gradient in front of a softmax: ``M(h, y) = h A.T + c - g W[y]``.

    Of a cross entropy, a mean over N rows, of ``softmax(h W.T + b)`` the gradient at h is
    ``(sum_w p_w W[w] - W[y]) / N``. The second part is known: the head's own row, read at each
    prediction, nothing of the head being copied or trained here. The first, what the model expects,
    is predicted from h. So the context is the label, which takes no table of classes, however many
    there are. A lesson takes the head's rows as they are when it is applied.

    Runs inside the fused kernels where the head's weight is contiguous and of the synthesizer's
    dtype or bfloat16; else under autograd.

    Args:
        head: the layer in front of the softmax: a module with a ``weight`` [classes, O], as
            ``nn.Linear(O, classes)``, or the ``nn.Embedding(classes, O)`` that a model ties to it.
            It is not registered here: it is neither saved nor moved with the synthesizer, and of a
            copy or pickle of the synthesizer without it there is a copy of its own. A model that
            takes another module for its head needs a new synthesizer too, and nothing can notice
            that; another ``weight`` of the same module is seen.
        rank: R of a low-rank A; None for dense.
        ignore_index: rows with this label are not in the loss: their gradient is zero, they
            teach nothing, and the mean is over the others.
        label_smoothing: as in ``F.cross_entropy``: where g starts.

    Attributes:
        weight: [O, O], or [O, R] for low rank; down: [R, O] or None; bias: c, [O]; gain: g, [].
        They start as those of :class:`LinearSynthesizer`, g at ``1 - label_smoothing``.

    Raises:
        TypeError: a head without such a weight.
        ValueError: a rank, or a smoothing, out of range.
        RuntimeError: in a forward, a head whose weight has another shape than it had, or is on
            another device; a context that is not labels.
    """

    takes_rows = True

    def __init__(
        self,
        head: nn.Module,
        rank: int | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        table = getattr(head, "weight", None)
        if not isinstance(table, Tensor) or table.dim() != 2:
            raise TypeError(
                "head must be a module with a weight [classes, features], as nn.Linear, got "
                f"{type(head).__name__}"
            )
        classes, features = table.shape
        super().__init__(features, classes)
        _rank(rank, features)
        check.number("label_smoothing", label_smoothing, high=1.0, below=True)
        check.whole("ignore_index", ignore_index, None)
        self.__dict__["head"] = head  # no submodule: it is not this module's to train or to save
        self.rank = rank
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        factory: Any = {"device": table.device, "dtype": table.dtype}
        inner = features if rank is None else rank
        self.weight = nn.Parameter(torch.empty(features, inner, **factory))
        self.down = None if rank is None else nn.Parameter(torch.empty(rank, features, **factory))
        self.bias = nn.Parameter(torch.empty(features, **factory))
        self.gain = nn.Parameter(torch.empty((), **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let it start anew: what the model expects is taken for zero."""
        _start(self.down, (self.weight, self.bias))
        nn.init.constant_(self.gain, 1.0 - self.label_smoothing)

    def last_layer(self) -> tuple[Tensor, ...]:
        if "parametrizations" in self._modules:
            return ()
        return _given((self.weight, self.bias, self.gain))

    def fused(self) -> SynthesizerTensors | None:
        if "parametrizations" in self._modules:
            return None
        p: Any = self._parameters
        weight, table = p["weight"], self._table()
        # A subclass (a sharded head) need not have its elements where a kernel would look.
        readable = type(table) is Tensor and table.is_contiguous()
        if not readable or table.dtype not in (weight.dtype, torch.bfloat16):
            return None
        assert self.ignore_index is not None
        return SynthesizerTensors(
            "dense" if self.rank is None else "lowrank",
            weight,
            p.get("down"),
            p["gain"],
            p["bias"],
            table,
            self.ignore_index,
        )

    def _table(self) -> Tensor:
        """Return the head's weight [classes, O], as it is now."""
        head: Any = self.head
        table: Tensor = head.weight.detach()
        if table.shape != (self.context_features, self.features):
            raise RuntimeError(
                f"the head's weight is {list(table.shape)}, where the synthesizer was made for "
                f"[{self.context_features}, {self.features}]: make a new synthesizer for it"
            )
        if table.device != self.bias.device:
            raise RuntimeError(
                f"the head is on {table.device}, the synthesizer on {self.bias.device}: it does "
                "not move with the synthesizer"
            )
        return table

    def check(self, context: Tensor | None, shape: torch.Size | None = None) -> None:
        self._table()
        rows = "..." if shape is None else shape[0]
        fits = context is not None and context.dtype == torch.int64
        if context is None or not fits or (shape is not None and context.shape != shape[:1]):
            given = "none" if context is None else f"{context.dtype} {list(context.shape)}"
            raise RuntimeError(f"context must be labels, int64 [{rows}], got {given}")
        super().check(context, shape)

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict ``kappa * dL/dh`` [N, O], in the synthesizer's unit, from h [N, O] and labels,
        int64 [N]."""
        self.check(context, h.shape)
        table = self._table()
        assert context is not None and self.ignore_index is not None
        counted = context.ne(self.ignore_index).unsqueeze(1)  # [N, 1]
        rows = F.embedding(context.where(counted.squeeze(1), 0), table)  # [N, O]
        reduced = h if self.down is None else F.linear(h, self.down)  # [N, R]
        out = F.linear(reduced, self.weight, self.bias) - self.gain * rows.to(h.dtype)
        share = counted.sum().clamp(min=1).to(h.dtype) / h.shape[0]
        return torch.where(counted, out / share, 0.0)  # the loss divides by those that count

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class _WithLowRank(Synthesizer):
    """Synthesizers of a weight and a bias, with ``up @ down`` beside them if their rank is not 0.

    Raises:
        ValueError: a size below 1, or a rank outside [0, features].
    """

    takes_rows = True
    weight: nn.Parameter
    up: nn.Parameter | None
    down: nn.Parameter | None
    bias: nn.Parameter

    def __init__(self, features: int, context_features: int, rank: int) -> None:
        super().__init__(features, context_features)
        _rank(rank, features, 0)
        self.rank = rank

    def _form(self, shape: tuple[int, ...], factory: dict[str, Any]) -> None:
        """Make the parameters, the weight of this shape, and start them."""
        features, rank = self.features, self.rank
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self.up = nn.Parameter(torch.empty(features, rank, **factory)) if rank else None
        self.down = nn.Parameter(torch.empty(rank, features, **factory)) if rank else None
        self.bias = nn.Parameter(torch.empty(features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero what forms the output; draw ``down``, which reduces the input."""
        _start(self.down, (self.weight, self.up, self.bias))

    def last_layer(self) -> tuple[Tensor, ...]:
        if "parametrizations" in self._modules:
            return ()
        return _given((self.weight, self.up, self.bias))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class CrossEntropySynthesizer(_WithLowRank):
    """Predict as a classifier's gradient: ``M(h, y) = (softmax(h U.T + u) - y) V.T + B A h + c``.

    Of a cross entropy behind a linear head the gradient at h has this form, with U and V.T the head
    and y one-hot; below that a synthesizer of this form learns what of h says how sure the network
    is, so that rows that are classified well get a small gradient, which no linear synthesizer can
    give them (Czarnecki et al. 2017, arXiv 1703.00522, on the sigmoid in the gradient of a
    log loss). All of it is learned by regression on what arrives, U and u too.

    Without a linear part it runs inside the fused kernels on a CPU, and in the reference backend;
    with one, and on a GPU, under autograd.

    Args:
        features: O.
        context_features: K, the number of classes; the context is labels, int64 [N], or their
            probabilities [N, K].
        rank: R of a linear part; 0 for none.
        device, dtype: of the parameters.

    Attributes:
        logits: U [K, O] and u [K], an ``nn.Linear``, which draws them.
        weight: V, [O, K]; bias: c, [O]; up: B, [O, R] or None; down: A, [R, O] or None. All start
            at zero but ``down``.

    Raises:
        ValueError: a size below 1, or a rank outside [0, features].
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        rank: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, context_features, rank)
        check.sizes(context_features=context_features)
        factory: Any = {"device": device, "dtype": dtype}
        self.logits = nn.Linear(features, context_features, **factory)  # draws by itself
        self._form((features, context_features), factory)

    def fused(self) -> SynthesizerTensors | None:
        logits = self._modules["logits"]
        if (
            self.rank
            or "parametrizations" in self._modules
            or type(logits) is not nn.Linear  # parametrized, or another layer
            or logits.bias is None
            or type(self).forward is not CrossEntropySynthesizer.forward
        ):
            return None
        own: Any = self._parameters
        made: Any = logits._parameters
        return SynthesizerTensors(
            "cross_entropy", own["weight"], made["weight"], made["bias"], own["bias"]
        )

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict ``kappa * dL/dh`` [N, O], in the synthesizer's unit, from h [N, O] and labels,
        int64 [N], or probabilities [N, K]."""
        wrong = self.logits(h).softmax(1) - _one_hot(context, self.context_features, h)  # [N, K]
        out = F.linear(wrong, self.weight, self.bias)
        if self.up is not None and self.down is not None:
            out = out + F.linear(F.linear(h, self.down), self.up)
        return out


class DifferenceSynthesizer(_WithLowRank):
    """Predict from how far h is from where it should be: ``a * (h - t) + V U (h - t) + c``.

    For a loss that is a distance of h from a context t of the same size, in whatever space: of an
    autoencoder's output from its input as a frozen network sees both, of a student from a teacher.
    Runs under autograd, not inside the fused kernels.

    Args:
        features: O, of h and of the context [N, O].
        rank: R of the low-rank part; 0 for none: then these are 2 O numbers.
        device, dtype: of the parameters.

    Attributes:
        weight: a, [O]; up: V, [O, R] or None; down: U, [R, O] or None; bias: c, [O]. All start at
        zero but ``down``.

    Raises:
        ValueError: a size below 1, or a rank outside [0, features].
        RuntimeError: in a forward, a context that has not the shape of h.
    """

    def __init__(
        self,
        features: int,
        rank: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, features, rank)
        self._form((features,), {"device": device, "dtype": dtype})

    def check(self, context: Tensor | None, shape: torch.Size | None = None) -> None:
        super().check(context, shape)
        _check_as_h(context, shape, f"[..., {self.features}]")

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict ``kappa * dL/dh`` [N, O], in the synthesizer's unit; h and context [N, O]."""
        self.check(context, h.shape)
        assert context is not None
        away = h - context.to(h.dtype)  # [N, O]
        out = away * self.weight + self.bias
        if self.up is not None and self.down is not None:
            out = out + F.linear(F.linear(away, self.down), self.up)
        return out

    def extra_repr(self) -> str:
        return f"features={self.features}, rank={self.rank}"


class ConvSynthesizer(Synthesizer):
    """Convolutional synthesizer for maps ``[N, C, *spatial]``; the last convolution starts at zero.

    The context is laid out as K constant channels beside h, unless it is what h should be.

    Args:
        features: C, channels of h.
        hidden: channels in between.
        layers: convolutions before the last one, at least 1.
        kernel_size: odd; "same" padding.
        context_features: K, 0 for none.
        dims: number of spatial dimensions, 1, 2 or 3.
        difference: the context t is what h should be, of h's shape, and the first convolution sees
            the channels [h, t, h - t].
        device, dtype: of the parameters.

    Raises:
        ValueError: a size out of range, or with ``difference`` a context of other channels than h.
    """

    difference = False  # as it was pickled before there was one

    def __init__(
        self,
        features: int,
        hidden: int = 64,
        layers: int = 1,
        kernel_size: int = 5,
        context_features: int = 0,
        *,
        dims: int = 2,
        difference: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if difference:
            context_features = _own_size(features, context_features)
        super().__init__(features, context_features)
        self.difference = self.context_as_h = difference
        check.sizes(hidden=hidden, layers=layers, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        if dims not in (1, 2, 3):
            raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        half = kernel_size // 2
        stack: list[nn.Module] = []
        width = features + context_features + (features if difference else 0)
        for _ in range(layers):
            stack += [
                conv(
                    width, hidden, kernel_size, padding=half, bias=False, device=device, dtype=dtype
                ),
                norm(hidden, device=device, dtype=dtype),
                nn.ReLU(),
            ]
            width = hidden
        last = (_LastConv1d, _LastConv2d, _LastConv3d)[dims - 1](
            width, features, kernel_size, padding=half, device=device, dtype=dtype
        )
        self.dims = dims
        self.layers = nn.Sequential(*stack, last)

    def last_layer(self) -> tuple[Tensor, ...]:
        last: Any = self.layers[-1]
        return _given((last.weight, last.bias))

    def check(self, context: Tensor | None, shape: torch.Size | None = None) -> None:
        if shape is not None and (len(shape) != self.dims + 2 or shape[1] != self.features):
            raise RuntimeError(
                f"h must have {self.dims + 2} dimensions [N, {self.features}, *spatial], got "
                f"{list(shape)}"
            )
        if self.difference:
            _check_as_h(context, shape, f"[N, {self.features}, *spatial]")

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict ``kappa * dL/dh`` [N, C, *spatial] from h of that shape and the context."""
        self.check(context, h.shape)
        if self.difference:
            h = _with_difference(h, context)  # [N, 3 C, *spatial]
        elif self.context_features:
            rows = _one_hot(context, self.context_features, h)  # [N, K]
            maps = rows.reshape(*rows.shape, *(1 for _ in h.shape[2:]))
            h = torch.cat([h, maps.expand(*rows.shape, *h.shape[2:])], dim=1)  # [N, C + K, ...]
        out: Tensor = self.layers(h)
        return out


class SurrogateSynthesizer(Synthesizer):
    """Correct a cheap loss's gradient: ``M(h, t) = a * ds/dh + correction(h, t)``.

    For a dear loss that has a cheap stand-in s: the error of pixels for the error as a network sees
    it, a small critic for a large one. Untaught, M is the stand-in's gradient; the first lesson
    gives it the true gradient's size, and what is learned from then on is how much of it to take
    of each feature and, by the correction, what it leaves out. Runs under autograd, not inside the
    fused kernels.

    Args:
        features: O, of h; C for maps ``[N, C, *spatial]``, which need a correction that takes maps.
        surrogate: called as ``surrogate(h, context)``, returns what each row costs, [N]. It is
            differentiated at h, at each prediction; nothing of it is registered, copied or trained
            here.
        correction: a synthesizer of the same features, whose prediction is added; None for none.
        context_features: K, of the context; None for O: it is what h should be. 0 for none.
        device, dtype: of the gain.

    Attributes:
        gain: a, [O], but for a factor ``scale`` that is not trained: set in the first lesson, it
            follows the synthesizer's unit, so that the gain stays about as large as it starts, one.

    Raises:
        TypeError: a surrogate that cannot be called, or a correction that is no module.
        ValueError: a size out of range, or a correction of other features or another context.
        RuntimeError: in a forward, a surrogate that does not return [N], or is not differentiable
            at h.
    """

    def __init__(
        self,
        features: int,
        surrogate: Callable[[Tensor, Tensor | None], Tensor],
        correction: nn.Module | None = None,
        *,
        context_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, features if context_features is None else context_features)
        if not callable(surrogate):
            raise TypeError(
                "surrogate must be called as surrogate(h, context), got "
                f"{type(surrogate).__name__}, which cannot be"
            )
        if correction is not None and not isinstance(correction, nn.Module):
            raise TypeError(
                f"correction must be None or an nn.Module, got {type(correction).__name__}"
            )
        if isinstance(correction, Synthesizer):
            of = (correction.features, correction.context_features)
            if of[0] != features or of[1] not in (0, self.context_features):
                raise ValueError(
                    f"correction must have features={features} and context_features="
                    f"{self.context_features} or 0, got features={of[0]} and context_features="
                    f"{of[1]}"
                )
            self.takes_rows, self.context_as_h = correction.takes_rows, correction.context_as_h
        else:
            self.takes_rows = correction is None
        self.__dict__["surrogate"] = surrogate  # no submodule: it is not this module's to train
        self.gain = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        # Were the gain in the unit, a step of Adam's might be a large part of it.
        self.scale: Tensor
        self.register_buffer("scale", torch.empty((), device=device, dtype=dtype))
        self.correction = correction
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the stand-in's gradient be taken as it is. The correction starts anew by its own."""
        nn.init.ones_(self.gain)
        nn.init.ones_(self.scale)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        if _before(local_metadata, self._version):  # without one: the gain was in the unit
            state_dict.setdefault(prefix + "scale", torch.ones_like(self.scale))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "scale" not in self._buffers:
            self.register_buffer("scale", torch.ones((), dtype=self.gain.dtype))

    def untaught(self) -> bool:
        """Say whether the stand-in's gradient is still taken as it is. (This waits for a GPU.)"""
        return bool((self.scale * self.gain == 1.0).all())

    def last_layer(self) -> tuple[Tensor, ...]:
        if self.correction is None:
            return (self.scale,)
        more = self.correction.last_layer() if isinstance(self.correction, Synthesizer) else ()
        return (self.scale, *more) if more else ()

    def check(self, context: Tensor | None, shape: torch.Size | None = None) -> None:
        super().check(context, shape)
        if isinstance(self.correction, Synthesizer):
            self.correction.check(context, shape)

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict ``kappa * dL/dh``, of h's shape [N, O] or [N, C, *spatial], in the synthesizer's
        unit."""
        surrogate: Any = self.surrogate
        with torch.enable_grad():
            at = h.detach().requires_grad_()
            costs = surrogate(at, context)
            if not isinstance(costs, Tensor) or costs.shape != h.shape[:1]:
                given = list(costs.shape) if isinstance(costs, Tensor) else type(costs).__name__
                raise RuntimeError(
                    f"surrogate must return a cost a row, [{h.shape[0]}], got {given}"
                )
            if not costs.requires_grad:
                raise RuntimeError("surrogate must be differentiable at h: its result has no graph")
            (slope,) = torch.autograd.grad(costs.sum(), at)
        out = slope * (self.scale * self.gain).view(-1, *(1 for _ in h.shape[2:]))
        return out if self.correction is None else out + self.correction(h, context)
