"""Converting whole models to decoupled layers and back, without loss, in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, overload

from torch import Tensor, nn

from fused_dni.convert.uses import reached_into, runs_in_order
from fused_dni.functional import check
from fused_dni.modules.base import DecoupledModule
from fused_dni.modules.linear import FusedDNILinear, activation_name, why_not_fusable
from fused_dni.modules.lstm import FusedDNILSTM
from fused_dni.modules.lstm_cell import FusedDNILSTMCell
from fused_dni.modules.recurrent import Recurrent
from fused_dni.modules.sequential import DecoupledSequential

# Options of recurrent modules alone; linear layers are converted without them.
RECURRENT_OPTIONS = ("sg_scale", "auxiliary")
# Options of linear layers alone.
LINEAR_OPTIONS = ("interface",)


class Absorbed(nn.Identity):
    """Keeps the place in an ``nn.Sequential`` of a module that a fused layer has taken over.

    Where a normalisation stood, its parameters in a plain model's checkpoint, which are named by
    this place, are loaded into the fused layer.
    """

    _layer: tuple[str, FusedDNILinear] | None = None  # its name beside this one, and itself

    def __init__(self, layer: tuple[str, FusedDNILinear] | None = None) -> None:
        super().__init__()
        self._layer = layer

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        here = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
        name, layer = self._layer or ("", None)
        norm = None if layer is None else layer.norm
        if norm is None or not here:
            given = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            super()._load_from_state_dict(state_dict, prefix, *given)
            return
        beside = prefix[:-1].rpartition(".")[0]
        own = f"{beside}.{name}.norm." if beside else f"{name}.norm."
        missing_keys[:] = [key for key in missing_keys if key not in {own + leaf for leaf in here}]
        norm._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, [], unexpected_keys, error_msgs
        )


class Conversion(NamedTuple):
    """What :func:`fused_dni.convert` did with one module."""

    name: str  # in the model
    kind: str  # the class it had
    made: str | None  # the class it has now; None if it was left as it is
    why: str

    def __str__(self) -> str:
        now = "left as it is" if self.made is None else self.made
        return f"{self.name or '(the model)'}: {self.kind}, {now}: {self.why}"


class Report(list[Conversion]):
    """What :func:`fused_dni.convert` did with every linear and recurrent layer, and with what
    stands behind them in an ``nn.Sequential``; ``print(report)`` shows a line each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    def converted(self) -> list[str]:
        """Return the names of the modules that were converted or taken along."""
        return [entry.name for entry in self if entry.made is not None]

    def left(self) -> dict[str, str]:
        """Return the names of the modules that were left as they are, and why."""
        return {entry.name: entry.why for entry in self if entry.made is None}


@overload
def convert(
    model: nn.Module,
    *,
    synthesizer: nn.Module | str | None = "default",
    head: str = "exact",
    delivery: str = "deferred",
    report: Literal[False] = False,
    **kwargs: Any,
) -> nn.Module: ...


@overload
def convert(
    model: nn.Module,
    *,
    synthesizer: nn.Module | str | None = "default",
    head: str = "exact",
    delivery: str = "deferred",
    report: Literal[True],
    **kwargs: Any,
) -> tuple[nn.Module, Report]: ...


def convert(
    model: nn.Module,
    *,
    synthesizer: nn.Module | str | None = "default",
    head: str = "exact",
    delivery: str = "deferred",
    report: bool = False,
    **kwargs: Any,
) -> nn.Module | tuple[nn.Module, Report]:
    """Replace linear layers, ``nn.LSTM`` and ``nn.LSTMCell`` of a model by fused modules that hold
    the same parameters.

    In ``eval()`` the model computes what it did. How well it *trains* is another matter:
    ``convert(model)`` alone, without normalisation inside the layers and without labels, often
    ends far behind backprop. Give the model ``nn.BatchNorm1d`` or ``nn.LayerNorm`` behind its
    linear layers, and the synthesizers the labels: ``context_features=classes`` here, ``with
    fused_dni.condition_on(labels):`` around the forward. ``synthesizer=None`` is backprop.

    Inside an ``nn.Sequential`` a linear layer takes along the ``nn.BatchNorm1d`` / ``nn.LayerNorm``
    and the activation that follow it directly; their places are kept by ``Absorbed``. It does
    not where another order of use is possible: a subclass with a ``forward`` of its own, a
    container whose parts the model's code uses one by one (as its source says; code outside of the
    model's classes is not read), a linear layer that stands in several places with different
    modules behind it. What cannot be taken over (a subclass, a module with hooks, a ``forward`` or
    parameters of its own or a parametrization, one tied to another when a rule is given) is left
    as it is; so is, unless ``synthesizer=None``, a bidirectional
    ``nn.LSTM`` (a truncated stream has no right-to-left future) and one with projections, and with
    a rule or a backend given either of them always (both run on PyTorch's own kernels).

    An ``nn.LSTM`` becomes decoupled by this alone: each call is a window. An ``nn.LSTMCell`` cannot
    know where a window ends: the loop around it has to call :meth:`FusedDNILSTMCell.boundary`;
    until it does, the cell is plain backprop on the fused kernels.

    Checkpoints of the plain model load with ``strict=False`` (the synthesizers' keys are missing).

    Args:
        model: changed in place; may itself be such a module. With ``update`` the ``.grad`` of
            parameters that get a rule is set to None.
        synthesizer: "default", None for backprop on the fused kernels, or a module of which each
            layer gets a copy (its features must be those of every layer, and 2 L H of an LSTM).
        head: what becomes of the linear layer that was registered last, whose output is usually
            what the loss sees: "exact" for no synthesizer there, "decoupled" for one as everywhere.
        delivery: "immediate" to make each ``nn.Sequential`` that holds several linear layers, and
            that the model's code calls as a whole, a :class:`fused_dni.DecoupledSequential` of the
            same modules under the same names: with ``update`` their steps are one call on a CPU,
            and a second consumer of what is between them is an error. "deferred" to leave
            containers as they are.
        report: return, too, what was converted, what was not, and why.
        **kwargs: ``context_features``, ``update``, ``synthesizer_update``, ``target_scale``,
            ``max_norm``, ``backend``, as of :class:`FusedDNILinear` and :class:`FusedDNILSTM`;
            ``interface``, of linear layers with a synthesizer alone; ``sg_scale`` and
            ``auxiliary``, of recurrent modules alone.

    Returns:
        The model (a new module only if the model itself was one that is replaced); with
        ``report=True`` the model and a :class:`fused_dni.convert.Report`.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: nothing in the model can be converted, or an argument is out of range.
    """
    check.module("model", model)
    if head not in ("exact", "decoupled"):
        raise ValueError(f"head must be 'exact' or 'decoupled', got {head!r}")
    if delivery not in ("deferred", "immediate"):
        raise ValueError(f"delivery must be 'deferred' or 'immediate', got {delivery!r}")
    ruled = kwargs.get("update") is not None
    tied = _tied(model) if ruled else set()
    stock = synthesizer is None and not ruled and kwargs.get("backend") is None
    told = Report()
    places: list[_Place] = []
    recurrent: list[_Place] = []
    reached = reached_into(model) if delivery == "immediate" else {}
    for place in _places(model):
        plain = place.module
        why = _why_not(plain)
        if why is None and tied.intersection(map(id, plain.parameters())):
            why = "a parameter is tied to another module's, and a rule needs it for itself"
        if why is None and _stock_only(plain) and not stock:
            why = (
                "bidirectional or with projections: only with synthesizer=None, without update "
                "and backend"
            )
        if why is not None:
            told.append(Conversion(place.path, type(plain).__name__, None, why))
        else:
            (places if isinstance(plain, nn.Linear) else recurrent).append(place)
    if not places and not recurrent:
        reasons = "".join(f"\n{entry}" for entry in told)
        raise ValueError(
            f"model has no nn.Linear, nn.LSTM or nn.LSTMCell that can be converted{reasons}"
        )
    places = _agreed(places)
    last = places[-1].module if places else None
    made: dict[int, nn.Module] = {}
    for place in places:
        linear = place.module
        if id(linear) in made:
            continue
        exact = linear is last and head == "exact"
        arguments = {k: v for k, v in kwargs.items() if k not in RECURRENT_OPTIONS}
        if exact and synthesizer is not None:
            arguments.pop("synthesizer_update", None)
        made[id(linear)] = FusedDNILinear.from_linear(
            linear,
            place.norm,
            place.activation,
            **_chosen(None if exact else synthesizer, arguments),
        )
    for place in recurrent:
        plain = place.module
        if id(plain) in made:
            continue
        take: Any = (
            FusedDNILSTM.from_lstm
            if isinstance(plain, nn.LSTM)
            else FusedDNILSTMCell.from_lstm_cell
        )
        arguments = {k: v for k, v in kwargs.items() if k not in LINEAR_OPTIONS}
        made[id(plain)] = take(plain, **_chosen(synthesizer, arguments))
    if ruled:
        for module in made.values():
            for p in module.parameters():
                p.grad = None
    for place in (*places, *recurrent):
        told += _told(place, made[id(place.module)], place.module is last and head == "exact")
        if place.parent is None:
            continue
        layer = made[id(place.module)]
        setattr(place.parent, place.name, layer)
        for name in place.taken:
            assert isinstance(layer, FusedDNILinear)
            was = place.parent._modules[name]
            absorbed = Absorbed((place.name, layer) if was is place.norm else None)
            setattr(place.parent, name, absorbed.train(place.parent.training))
    found = made.get(id(model), model)
    if delivery == "immediate":
        found = _contained(found, reached, told)
    order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    told.sort(key=lambda entry: order.get(entry.name, 0))
    return (found, told) if report else found


def _contained(model: nn.Module, reached: dict[int, str], told: Report) -> nn.Module:
    """Make containers of converted layers deliver at once; the model, or what stands for it now."""
    made: dict[int, nn.Module] = {}
    for path, module in model.named_modules():
        layers = [m for m in module._modules.values() if isinstance(m, FusedDNILinear)]
        if type(module) is not nn.Sequential or len(layers) < 2:
            continue
        why = None
        if id(module) in reached:
            why = reached[id(module)]
        elif not _plain(module):
            why = "it has hooks or a forward of its own, which would be lost"
        if why is None:
            container = DecoupledSequential()
            container._modules.update(module._modules)
            container.training = module.training
            made[id(module)] = container
            why = "gradients go down during the forward"
        kind = None if id(module) not in made else "DecoupledSequential"
        told.append(Conversion(path, "Sequential", kind, why))
    _put(model, made)
    return made.get(id(model), model)


def _put(model: nn.Module, made: dict[int, nn.Module]) -> None:
    """Put modules into the places of others, by the identity of these."""
    for parent in [*model.modules(), *made.values()]:
        for name, child in list(parent._modules.items()):
            if id(child) in made:
                setattr(parent, name, made[id(child)])


def _told(place: _Place, layer: nn.Module, head: bool) -> Iterator[Conversion]:
    """Return what to say of a place that was converted."""
    why = "it is the head, whose gradient is exact" if head else "decoupled at its output"
    if getattr(layer, "synthesizer", None) is None and not head:
        why = "exact, on the fused kernels"
    if isinstance(layer, FusedDNILSTMCell):
        why += ", where the loop around it calls boundary()"
    if place.alone is not None:
        why += f"; what stands behind it stays there: {place.alone}"
    yield Conversion(place.path, type(place.module).__name__, type(layer).__name__, why)
    above = place.path.rpartition(".")[0]
    behind = [m for m in (place.norm, place.activation) if m is not None]
    for name, module in zip(place.taken, behind, strict=True):
        path = f"{above}.{name}" if above else name
        yield Conversion(path, type(module).__name__, "Absorbed", f"part of {place.path!r}")


def _chosen(synthesizer: nn.Module | str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of one module: a synthesizer of its own, or none and nothing that needs
    one."""
    if synthesizer is None:
        without = ("context_features", "interface", "auxiliary")
        return {"synthesizer": None, **{k: v for k, v in kwargs.items() if k not in without}}
    own = copy.deepcopy(synthesizer) if isinstance(synthesizer, nn.Module) else synthesizer
    return {"synthesizer": own, **kwargs}


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert`: put back plain layers that hold the same parameters and buffers.

    The synthesizers are dropped. Works on any model with :class:`FusedDNILinear`,
    :class:`FusedDNILSTM` or :class:`FusedDNILSTMCell` in it. A ``DecoupledSequential`` in which
    nothing is decoupled any more becomes an ``nn.Sequential``.

    Args:
        model: changed in place; may itself be a fused layer.

    Returns:
        The model (a new module only if the model itself was a fused layer or such a container).

    Raises:
        TypeError: ``model`` is no module.
    """
    check.module("model", model)
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
    containers: dict[int, nn.Module] = {}
    for module in model.modules():
        if type(module) is DecoupledSequential and not _decoupled(module):
            sequential = nn.Sequential()
            sequential._modules.update(module._modules)
            sequential.training = module.training
            containers[id(module)] = sequential
    _put(model, containers)
    return containers.get(id(model), model)


def _decoupled(model: nn.Module) -> bool:
    """Say whether any module in it predicts gradients or has a loss of its own."""
    return any(isinstance(m, DecoupledModule) for m in model.modules())


def _stock(module: Recurrent) -> nn.Module:
    """PyTorch's own module with a recurrent module's parameters."""
    if isinstance(module, FusedDNILSTM):
        return module.to_lstm()
    assert isinstance(module, FusedDNILSTMCell)
    return module.to_lstm_cell()


class _Place(NamedTuple):
    """Where a module stands that may be converted, and what stands behind it."""

    path: str
    parent: nn.Module | None  # None for the model itself
    name: str
    module: Any
    norm: Any = None
    activation: nn.Module | None = None
    taken: tuple[str, ...] = ()  # names, in the parent, of normalisation and activation
    alone: str | None = None  # why nothing behind it is taken along, where something could be


def _places(model: nn.Module) -> Iterator[_Place]:
    """Return every place of a linear layer, an ``nn.LSTM`` or an ``nn.LSTMCell``, in the order in
    which the modules were registered."""
    kinds = (nn.Linear, nn.LSTM, nn.LSTMCell)
    if isinstance(model, kinds):
        yield _Place("", None, "", model)
        return
    reached = reached_into(model)
    found: list[_Place] = []
    for above, parent in model.named_modules():
        if isinstance(parent, (FusedDNILinear, Recurrent)):
            continue
        children = [(n, m) for n, m in parent._modules.items() if m is not None]
        for i, (name, child) in enumerate(children):
            path = f"{above}.{name}" if above else name
            if isinstance(child, nn.Linear):
                found.append(_with_behind(path, parent, name, child, children[i + 1 :], reached))
            elif isinstance(child, kinds):
                found.append(_Place(path, parent, name, child))
    order = {id(m): i for i, m in enumerate(model.modules())}
    yield from sorted(found, key=lambda place: order[id(place.module)])


def _with_behind(
    path: str,
    parent: nn.Module,
    name: str,
    linear: nn.Linear,
    behind: list[tuple[str, nn.Module]],
    reached: dict[int, str],
) -> _Place:
    """Return a linear layer's place with the normalisation and activation that it can take
    along."""
    place = _Place(path, parent, name, linear)
    if not isinstance(parent, nn.Sequential) or not behind or _why_not(linear) is not None:
        return place
    norm = activation = None
    taken: list[str] = []
    if _takes_norm(linear, behind[0][1]):
        where, norm = behind.pop(0)
        taken.append(where)
    fused = _plain(behind[0][1]) and activation_name(behind[0][1]) if behind else None
    if fused not in (None, False, "identity"):
        where, activation = behind[0]
        taken.append(where)
    if not taken:
        return place
    if not runs_in_order(parent):
        return place._replace(alone=f"{type(parent).__name__} has a forward of its own")
    if id(parent) in reached:
        return place._replace(alone=reached[id(parent)])
    return place._replace(norm=norm, activation=activation, taken=tuple(taken))


def _takes_norm(linear: nn.Linear, norm: nn.Module) -> bool:
    """Say whether a fused layer of this linear one and the normalisation computes what they do."""
    if not _plain(norm) or why_not_fusable(linear, norm) is not None:
        return False
    tensors = [t for t in (*norm.parameters(), *norm.buffers()) if t.is_floating_point()]
    like = linear.weight
    same = all(t.dtype == like.dtype and t.device == like.device for t in tensors)
    return same and norm.training == linear.training


def _agreed(places: list[_Place]) -> list[_Place]:
    """Have a linear layer in several places take along what stands behind it in all of them
    alike."""
    out = []
    for place in places:
        all_of_it = [other for other in places if other.module is place.module]
        forms = {(id(p.norm), p.activation and activation_name(p.activation)) for p in all_of_it}
        if len(forms) > 1:
            why = "the layer stands in several places with different modules behind it"
            place = place._replace(norm=None, activation=None, taken=(), alone=why)
        out.append(place)
    return out


def _stock_only(module: nn.Module) -> bool:
    """Say whether an ``nn.LSTM`` has options that only PyTorch's own kernels have."""
    return isinstance(module, nn.LSTM) and (module.bidirectional or module.proj_size > 0)


# What may be attached to a module, and would be lost with it.
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _plain(module: nn.Module) -> bool:
    """Say whether nothing is attached to a module that a replacement would lose."""
    return not (
        any(getattr(module, hooks, None) for hooks in _HOOKS)
        or hasattr(module, "parametrizations")
        or "forward" in vars(module)
    )


def _why_not(module: nn.Module) -> str | None:
    """Say why a linear layer, ``nn.LSTM`` or ``nn.LSTMCell`` cannot be replaced, or None."""
    kind = next(k for k in (nn.Linear, nn.LSTM, nn.LSTMCell) if isinstance(module, k))
    if hasattr(module, "parametrizations"):
        return "it has a parametrization"
    if type(module) is not kind:
        return f"only nn.{kind.__name__} itself can be taken over, got {type(module).__name__}"
    if not _plain(module):
        return "it has hooks or a forward of its own, which would be lost"
    if isinstance(module, nn.Linear):
        known: Iterable[str] = ("weight", "bias")
    else:
        sizes = (module.input_size, module.hidden_size)
        meta = (
            nn.LSTM(
                *sizes,
                module.num_layers,
                module.bias,
                bidirectional=module.bidirectional,
                proj_size=module.proj_size,
                device="meta",
            )
            if isinstance(module, nn.LSTM)
            else nn.LSTMCell(*sizes, module.bias, device="meta")
        )
        known = meta._parameters
    more = [*(set(module._parameters) - set(known)), *module._buffers, *module._modules]
    if more:
        return f"it has {sorted(more)[0]!r}, which would be lost"
    return None


def _tied(model: nn.Module) -> set[int]:
    """Identities of parameters that several modules hold."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for p in module._parameters.values():
            if isinstance(p, Tensor):
                (tied if id(p) in seen else seen).add(id(p))
    return tied
