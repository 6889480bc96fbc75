"""Converting whole models to decoupled layers and back, without loss, in place."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fused_dni.modules.linear import FusedDNILinear, activation_name, why_not_fusable
from fused_dni.modules.lstm import FusedDNILSTM
from fused_dni.modules.lstm_cell import FusedDNILSTMCell
from fused_dni.modules.recurrent import Recurrent

# Options of recurrent modules alone; linear layers are converted without them.
RECURRENT_OPTIONS = ("sg_scale", "auxiliary")
# Options of linear layers alone.
LINEAR_OPTIONS = ("interface",)


class Absorbed(nn.Identity):
    """Keeps the place in an ``nn.Sequential`` of a module that a fused layer has taken over."""


def convert(
    model: nn.Module,
    *,
    synthesizer: nn.Module | str | None = "default",
    head: str = "exact",
    **kwargs: Any,
) -> nn.Module:
    """Replace linear layers, ``nn.LSTM`` and ``nn.LSTMCell`` of a model by fused modules that hold
    the same parameters.

    Inside an ``nn.Sequential`` a linear layer takes along the ``nn.BatchNorm1d`` / ``nn.LayerNorm``
    and the activation that follow it directly; their places are kept by :class:`Absorbed`. What
    cannot be taken over (a subclass, a module with hooks or a parametrization, one tied to another
    when a rule is given) is left as it is; so is, unless ``synthesizer=None``, a bidirectional
    ``nn.LSTM`` (a truncated stream has no right-to-left future) and one with projections, and with
    a rule or a backend given either of them always (both run on PyTorch's own kernels).

    An ``nn.LSTM`` becomes decoupled by this alone: each call is a window. An ``nn.LSTMCell`` cannot
    know where a window ends: the loop around it has to call :meth:`FusedDNILSTMCell.boundary`;
    until it does, the cell is plain backprop on the fused kernels.

    Args:
        model: changed in place; may itself be such a module.
        synthesizer: "default", None for backprop on the fused kernels, or a module of which each
            layer gets a copy (its features must be those of every layer, and 2 L H of an LSTM).
        head: what becomes of the last linear layer of the model, whose output is usually what the
            loss sees: "exact" for no synthesizer there, "decoupled" for one as everywhere.
        **kwargs: ``context_features``, ``update``, ``synthesizer_update``, ``target_scale``,
            ``max_norm``, ``backend``, as of :class:`FusedDNILinear` and :class:`FusedDNILSTM`;
            ``interface``, of linear layers with a synthesizer alone; ``sg_scale`` and
            ``auxiliary``, of recurrent modules alone.

    Returns:
        The model (a new module only if the model itself was one that is replaced).

    Raises:
        ValueError: nothing in the model can be converted, or an argument is out of range.
    """
    if head not in ("exact", "decoupled"):
        raise ValueError(f"head must be 'exact' or 'decoupled', got {head!r}")
    ruled = kwargs.get("update") is not None
    tied = _tied(model) if ruled else set()
    places = [p for p in _places(model) if id(p[2].weight) not in tied]
    stock = synthesizer is None and not ruled and kwargs.get("backend") is None
    recurrent = [
        place
        for place in _recurrent_places(model)
        if (stock or not _stock_only(place[2]))
        and not tied.intersection(map(id, place[2].parameters()))
    ]
    if not places and not recurrent:
        raise ValueError("model has no nn.Linear, nn.LSTM or nn.LSTMCell that can be converted")
    last = places[-1][2] if places else None
    made: dict[int, nn.Module] = {}
    for _, _, linear, norm, activation in places:
        exact = linear is last and head == "exact"
        arguments = {k: v for k, v in kwargs.items() if k not in RECURRENT_OPTIONS}
        if exact and synthesizer is not None:
            arguments.pop("synthesizer_update", None)
        made[id(linear)] = FusedDNILinear.from_linear(
            linear, norm, activation, **_chosen(None if exact else synthesizer, arguments)
        )
    for _, _, plain in recurrent:
        take = (
            FusedDNILSTM.from_lstm
            if isinstance(plain, nn.LSTM)
            else FusedDNILSTMCell.from_lstm_cell
        )
        arguments = {k: v for k, v in kwargs.items() if k not in LINEAR_OPTIONS}
        made[id(plain)] = take(plain, **_chosen(synthesizer, arguments))
    if id(model) in made:
        return made[id(model)]
    for parent, name, linear, norm, activation in places:
        setattr(parent, name, made[id(linear)])
        for taken in (norm, activation):
            if taken is not None:
                where = next(k for k, m in parent._modules.items() if m is taken)
                setattr(parent, where, Absorbed())
    for parent, name, plain in recurrent:
        setattr(parent, name, made[id(plain)])
    return model


def _chosen(synthesizer: nn.Module | str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one module: a synthesizer of its own, or none and nothing that needs one."""
    if synthesizer is None:
        without = ("context_features", "interface", "auxiliary")
        return {"synthesizer": None, **{k: v for k, v in kwargs.items() if k not in without}}
    own = copy.deepcopy(synthesizer) if isinstance(synthesizer, nn.Module) else synthesizer
    return {"synthesizer": own, **kwargs}


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert`: put back plain layers that hold the same parameters and buffers.

    The synthesizers are dropped. Works on any model with :class:`FusedDNILinear`,
    :class:`FusedDNILSTM` or :class:`FusedDNILSTMCell` in it.

    Args:
        model: changed in place; may itself be a fused layer.

    Returns:
        The model (a new module only if the model itself was a fused layer).
    """
    if isinstance(model, FusedDNILinear):
        return model.to_linear()
    if isinstance(model, Recurrent):
        return _stock(model)
    plain: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, Recurrent):  # one module in two places stays one
                setattr(parent, name, plain.setdefault(id(child), _stock(child)))
            if not isinstance(child, FusedDNILinear):
                continue
            parts = child.plain_parts()
            names = list(parent._modules)
            places = names[names.index(name) + 1 :][: len(parts) - 1]
            if (
                all(isinstance(parent._modules[p], Absorbed) for p in places)
                and len(places) == len(parts) - 1
            ):
                for place, part in zip([name, *places], parts, strict=True):
                    setattr(parent, place, part)
            else:
                setattr(parent, name, child.to_linear())
    return model


def _stock(module: Recurrent) -> nn.Module:
    """PyTorch's own module with a recurrent module's parameters."""
    if isinstance(module, FusedDNILSTM):
        return module.to_lstm()
    assert isinstance(module, FusedDNILSTMCell)
    return module.to_lstm_cell()


_Place = tuple[nn.Module, str, nn.Linear, Any, Any]


def _places(model: nn.Module) -> list[_Place]:
    """Where convertible linear layers stand, in the order of ``model.modules()``: parent, name,
    linear, norm behind it, activation."""
    if isinstance(model, nn.Linear):
        return [(model, "", model, None, None)] if _plain(model) else []
    found: list[_Place] = []
    for parent in model.modules():
        if isinstance(parent, FusedDNILinear):
            continue
        children = [(n, m) for n, m in parent._modules.items() if m is not None]
        for i, (name, child) in enumerate(children):
            if not isinstance(child, nn.Linear) or not _plain(child):
                continue
            norm = activation = None
            behind = [m for _, m in children[i + 1 :]] if isinstance(parent, nn.Sequential) else []
            if behind and _plain(behind[0]) and why_not_fusable(child, behind[0]) is None:
                norm = behind.pop(0)
            if (
                behind
                and _plain(behind[0])
                and activation_name(behind[0]) not in (None, "identity")
            ):
                activation = behind[0]
            found.append((parent, name, child, norm, activation))
    order = {id(m): i for i, m in enumerate(model.modules())}
    return sorted(found, key=lambda place: order[id(place[2])])


def _recurrent_places(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Where ``nn.LSTM`` and ``nn.LSTMCell`` stand: parent, name, module."""
    kinds = (nn.LSTM, nn.LSTMCell)
    if type(model) in kinds:
        return [(model, "", model)] if _plain(model) else []
    return [
        (parent, name, child)
        for parent in model.modules()
        if not isinstance(parent, Recurrent)
        for name, child in parent._modules.items()
        if child is not None and type(child) in kinds and _plain(child)
    ]


def _stock_only(module: nn.Module) -> bool:
    """Whether an ``nn.LSTM`` has options that only PyTorch's own kernels have."""
    return isinstance(module, nn.LSTM) and (module.bidirectional or module.proj_size > 0)


def _plain(module: nn.Module) -> bool:
    """Whether nothing is attached to a module that a replacement would lose."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(hooks) or hasattr(module, "parametrizations"):
        return False
    return not isinstance(module, nn.Linear) or why_not_fusable(module) is None


def _tied(model: nn.Module) -> set[int]:
    """Identities of parameters that several modules hold."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                (tied if id(p) in seen else seen).add(id(p))
    return tied
