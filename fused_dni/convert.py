"""Converting whole models to decoupled layers and back, without loss, in place."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fused_dni.modules.linear import FusedDNILinear, activation_name, why_not_fusable


class Absorbed(nn.Identity):
    """Keeps the place in an ``nn.Sequential`` of a module that a fused layer has taken over."""


def convert(
    model: nn.Module,
    *,
    synthesizer: nn.Module | str | None = "default",
    head: str = "exact",
    **kwargs: Any,
) -> nn.Module:
    """Replace the linear layers of a model by fused ones that hold the same parameters.

    Inside an ``nn.Sequential`` a linear layer takes along the ``nn.BatchNorm1d`` / ``nn.LayerNorm``
    and the activation that follow it directly; their places are kept by :class:`Absorbed`. A linear
    layer that cannot be taken over (a subclass, one with hooks or a parametrization, one tied to
    another when a rule is given) is left as it is.

    Args:
        model: changed in place; may itself be an ``nn.Linear``.
        synthesizer: "default", None for backprop on the fused kernels, or a module of which each
            layer gets a copy.
        head: what becomes of the last linear layer of the model, whose output is usually what the
            loss sees: "exact" for no synthesizer there, "decoupled" for one as everywhere.
        **kwargs: ``context_features``, ``update``, ``synthesizer_update``, ``target_scale``,
            ``max_norm``, ``backend``, as of :class:`FusedDNILinear`.

    Returns:
        The model (a new module only if the model itself was a linear layer).

    Raises:
        ValueError: nothing in the model can be converted, or an argument is out of range.
    """
    if head not in ("exact", "decoupled"):
        raise ValueError(f"head must be 'exact' or 'decoupled', got {head!r}")
    places = _places(model)
    tied = _tied(model) if kwargs.get("update") is not None else set()
    places = [p for p in places if id(p[2].weight) not in tied]
    if not places:
        raise ValueError("model has no nn.Linear that can be converted")
    last = places[-1][2]
    made: dict[int, FusedDNILinear] = {}
    for _, _, linear, norm, activation in places:
        exact = linear is last and head == "exact"
        arguments = dict(kwargs)
        if exact or synthesizer is None:
            arguments.pop("context_features", None)
            if exact and synthesizer is not None:
                arguments.pop("synthesizer_update", None)
            chosen: nn.Module | str | None = None
        else:
            chosen = (
                copy.deepcopy(synthesizer) if isinstance(synthesizer, nn.Module) else synthesizer
            )
        made[id(linear)] = FusedDNILinear.from_linear(
            linear, norm, activation, synthesizer=chosen, **arguments
        )
    if isinstance(model, nn.Linear):
        return made[id(model)]
    for parent, name, linear, norm, activation in places:
        setattr(parent, name, made[id(linear)])
        for taken in (norm, activation):
            if taken is not None:
                where = next(k for k, m in parent._modules.items() if m is taken)
                setattr(parent, where, Absorbed())
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert`: put back plain layers that hold the same parameters and buffers.

    The synthesizers are dropped. Works on any model with :class:`FusedDNILinear` layers in it.

    Args:
        model: changed in place; may itself be a fused layer.

    Returns:
        The model (a new module only if the model itself was a fused layer).
    """
    if isinstance(model, FusedDNILinear):
        return model.to_linear()
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
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
