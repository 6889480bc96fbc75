"""Where an interface stands in a module, and what predicts the gradient there.

A module is decoupled in one of two forms:

``layers``
    its linear layers, with the normalisations and activations behind them, each become a
    :class:`fused_dni.FusedDNILinear`; whatever else there is stays as it is.
``segment``
    it becomes, whole, one :class:`fused_dni.Decoupled`.

With the interface at the *output* a module that ends in something without a fused form is a
segment: the gradient is predicted behind all of it. With the interface at the *preactivation* it is
predicted in front of normalisation, activation and everything that follows a linear layer: these
run backward on steps with targets only.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from fused_dni.convert import convert
from fused_dni.measure.verdict.errors import VerdictError
from fused_dni.modules.decoupled import Decoupled
from fused_dni.modules.linear import DEFAULT_RANK, FusedDNILinear
from fused_dni.ops.types import INTERFACES
from fused_dni.report import text
from fused_dni.rules import Rule
from fused_dni.synthesizers import ConvSynthesizer, DiagonalSynthesizer, LinearSynthesizer

#: Of synthesizers for features in the last dimension; any other rank goes too.
LINEAR_NAMES = (f"rank{DEFAULT_RANK}", "dense", "diagonal")
#: Of synthesizers for maps [N, C, *spatial].
MAP_NAMES = ("conv",)


def synthesizer_names(output: Tensor) -> tuple[str, ...]:
    """Return the synthesizers that fit a module with this output."""
    return MAP_NAMES if output.dim() == 4 else LINEAR_NAMES


def check_name(name: str, output: Tensor) -> None:
    """Refuse a synthesizer that is unknown or does not fit.

    Raises:
        VerdictError: with what is allowed.
    """
    known = (*LINEAR_NAMES, *MAP_NAMES)
    if name != "default" and name not in known and not re.fullmatch(r"rank[1-9]\d*", name):
        raise VerdictError(text.unknown("synthesizer", name, known))
    fits = ("default", *synthesizer_names(output))
    if name not in fits and not (name.startswith("rank") and output.dim() != 4):
        raise VerdictError(
            f"synthesizer {name!r} does not fit an output of shape {list(output.shape)}: "
            f"there are {', '.join(fits[1:])}"
        )


def make_synthesizer(name: str, like: Tensor, classes: int) -> nn.Module:
    """Make a synthesizer by name.

    Args:
        name: ``dense``, ``rankR`` (R at most the features), ``diagonal`` or ``conv``.
        like: an output that it is to predict the gradient of.
        classes: that it is conditioned on, 0 for none.
    """
    factory: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    if name == "conv":
        channels = like.shape[1]
        return ConvSynthesizer(channels, channels, context_features=classes, **factory)
    features = like.shape[-1]
    if name == "diagonal":
        return DiagonalSynthesizer(features, classes, **factory)
    rank = None if name == "dense" else min(int(name.removeprefix("rank")), features)
    return LinearSynthesizer(features, rank, classes, **factory)


def form_of(module: nn.Module, interface: str, exact_head: bool) -> str:
    """``layers`` or ``segment``.

    Args:
        interface: ``output`` or ``preactivation``.
        exact_head: the module is a whole network, of which the last linear layer is not decoupled.

    Raises:
        VerdictError: an unknown interface, or one at the preactivation with no linear layer.
    """
    if interface not in INTERFACES:
        raise VerdictError(text.unknown("interface", interface, INTERFACES))
    trial = _trial(module)
    spine = _spine(trial)
    layers = [part for part in spine if isinstance(part, FusedDNILinear)]
    if interface == "preactivation":
        if len(layers) <= exact_head:
            raise VerdictError(
                "interface 'preactivation' stands behind a linear layer, and there is none to "
                "decouple among what the module runs one after the other"
            )
        return "layers"
    if exact_head:
        found = sum(isinstance(part, FusedDNILinear) for part in trial.modules())
        return "layers" if found > 1 else "segment"
    return "layers" if spine and isinstance(spine[-1], FusedDNILinear) else "segment"


def distinct_interfaces(module: nn.Module, exact_head: bool) -> tuple[str, ...]:
    """Return the interfaces that a module can have, those alone that differ."""
    layers = [part for part in _spine(_trial(module)) if isinstance(part, FusedDNILinear)]
    decoupled = layers[:-1] if exact_head else layers
    if not decoupled:
        return INTERFACES[:1]
    bare = all(
        m.config.normalization is None and m.config.activation == "identity" for m in decoupled
    )
    same = bare and form_of(module, "output", exact_head) == "layers"
    return INTERFACES[:1] if same else INTERFACES


def decouple(
    module: nn.Module,
    sample: Tensor,
    output: Tensor,
    *,
    synthesizer: nn.Module | str | None,
    interface: str = "output",
    context_features: int = 0,
    update: Rule,
    exact_head: bool,
    backend: str | None = None,
) -> nn.Module:
    """Return a copy of ``module`` on our layers.

    Args:
        sample, output: of the module.
        synthesizer: a name (:func:`make_synthesizer`; ``default`` for the one of
            :class:`fused_dni.FusedDNILinear`, or the first that fits a segment), a module of which
            each layer gets a copy, or None for backprop in the same form.
        interface: ``output`` or ``preactivation``.
        context_features: classes that synthesizers made here are conditioned on.
        update: rule.
        exact_head: the last linear layer gets exact gradients.
        backend: force a backend of our kernels.

    Raises:
        VerdictError: the interface does not go with the module.
    """
    form = form_of(module, interface, exact_head)
    if form == "segment":
        return _segment(module, sample, synthesizer, context_features, update, exact_head, backend)
    if synthesizer is None:
        return convert(copy.deepcopy(module), synthesizer=None, update=update, backend=backend)
    named = isinstance(synthesizer, str)
    options: dict[str, Any] = {"context_features": context_features} if named else {}
    ours: nn.Module = convert(
        copy.deepcopy(module),
        synthesizer=synthesizer if not named else "default",
        head="exact" if exact_head else "decoupled",
        interface=interface,
        update=update,
        backend=backend,
        **options,
    )
    if named and synthesizer != "default":
        for layer in ours.modules():
            if isinstance(layer, FusedDNILinear) and layer.synthesizer is not None:
                like = layer.weight.new_empty(0, layer.out_features)
                layer.attach(make_synthesizer(str(synthesizer), like, context_features), update)
    return ours


def _segment(
    module: nn.Module,
    sample: Tensor,
    synthesizer: nn.Module | str | None,
    classes: int,
    update: Rule,
    exact_head: bool,
    backend: str | None,
) -> nn.Module:
    """Return the module, or what lies in front of its head, as one segment."""
    body, head = copy.deepcopy(module), []
    if exact_head and isinstance(body, nn.Sequential) and type(body[-1]) is nn.Linear:
        last, body = body[-1], body[:-1]
        head = [FusedDNILinear.from_linear(last, synthesizer=None, update=update, backend=backend)]
    if isinstance(synthesizer, str):
        with torch.no_grad():
            h = copy.deepcopy(body)(sample)
        name = synthesizer
        if name == "default":
            name = "conv" if h.dim() == 4 else f"rank{DEFAULT_RANK}"
        synthesizer = make_synthesizer(name, h, classes)
    return nn.Sequential(Decoupled(body, copy.deepcopy(synthesizer), update=update), *head)


def _trial(module: nn.Module) -> nn.Module:
    """Return a copy on our layers, as far as there are any that fit."""
    module = copy.deepcopy(module)
    with torch.random.fork_rng(devices=[]):
        try:
            return convert(module, synthesizer=None)
        except ValueError:
            return module


def _spine(module: nn.Module) -> list[nn.Module]:
    """List what a module runs one after the other."""
    if not isinstance(module, nn.Sequential):
        return [module]
    parts = [part for child in module for part in _spine(child)]
    return [part for part in parts if not isinstance(part, nn.Identity)]
