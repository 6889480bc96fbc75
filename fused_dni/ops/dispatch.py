"""One entry an op: what ``torch.library`` registers, and what every floor above calls, are made of
the method of :class:`fused_dni.ops.types.Backend` that says what an op takes and returns.

The function takes a backend and then what the method takes. Eagerly it calls the backend straight
away; where it may not (:func:`fused_dni.ops.tracing.direct`) it goes through an op of the namespace
``fused_dni``, so that ``torch.compile(fullgraph=True)`` traces through and dispatch modes see it.
Registered ops carry no autograd formulas: ops that mutate cannot; :mod:`fused_dni.functional` wraps
them.

Schemas are flat. A tuple of tensors and numbers becomes an argument a field, ``layer_weight`` say,
in the order of the fields; the last argument is the backend's name. Results are tensors one behind
the other, or a list of them where their number depends on the arguments.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from types import SimpleNamespace, UnionType
from typing import (
    Any,
    Concatenate,
    NamedTuple,
    ParamSpec,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import Tensor

from fused_dni.ops import registry
from fused_dni.ops.tracing import direct
from fused_dni.ops.types import Backend

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    str | None: "str?",
}
_LISTS: dict[Any, str] = {Tensor: "Tensor[]", bool: "bool[]"}
# In a schema an absent tensor result is an empty one, and an absent tuple has tensors of two sizes.
_ABSENT, _ABSENT_TUPLE = (0,), (0, 0)


class _Kind(NamedTuple):
    """How a parameter's or result's type lies in a schema."""

    types: tuple[tuple[str, str], ...]  # type and name of each argument
    pack: Callable[[Any], Sequence[Any]]  # a value as these arguments
    unpack: Callable[[Iterator[Any]], Any]  # the value, of the next arguments


def op(
    method: Callable[Concatenate[Backend, P], R],
    results: Callable[..., R],
    fits: Callable[..., None],
    *,
    mutates: Sequence[str] = (),
    asks: Sequence[str] = ("x",),
    behind: Callable[..., None] | None = None,
) -> Callable[Concatenate[Backend, P], R]:
    """Register an op and return the function that calls it.

    Args:
        method: of :class:`Backend`, with types.
        results: makes room for what the op returns, of those of its arguments, by name, that this
            depends on; what stands for results in a trace.
        fits: raises, as ``results`` of those arguments that it names, where their shapes do not go
            together; asked wherever a backend is called.
        mutates: the arguments of the schema that are mutated.
        asks: the arguments of which :func:`direct` is asked; of tuples of tuples the first tensor.
        behind: called behind the registered op alone, with its arguments by name and its result.
    """
    name = method.__name__
    hints = get_type_hints(method)
    returned = hints.pop("return")
    names = tuple(hints)
    kinds = tuple([_kind(hint, called) for called, hint in hints.items()])
    chosen, shaped = (
        [names.index(called) for called in inspect.signature(of).parameters]
        for of in (results, fits)
    )
    asked = [(names.index(a), hints[a] is not Tensor) for a in asks]
    kernel = attrgetter(name)
    result = _result(returned)

    def arguments(flat: Sequence[Any]) -> list[Any]:
        left = iter(flat)
        return [kind.unpack(left) for kind in kinds]

    def registered(*flat: Any) -> Any:
        given = arguments(flat)
        fits(*[given[i] for i in shaped])
        made = kernel(registry.get(flat[-1]))(*given)
        if behind is not None:
            behind(SimpleNamespace(**dict(zip(names, given, strict=True))), made)
        return _flat(result, made, flat)

    def fake(*flat: Any) -> Any:
        given = arguments(flat)
        return _flat(result, results(*[given[i] for i in chosen]), flat)

    taken = [pair for kind in kinds for pair in kind.types]
    listed = ", ".join(
        [
            f"{f'Tensor(a{i}!)' + t[len('Tensor') :] if n in mutates else t} {n}"
            for i, (t, n) in enumerate([*taken, ("str", "backend")])
        ]
    )
    made = torch.library.custom_op(
        f"fused_dni::{name}",
        registered,
        mutates_args=mutates,
        schema=f"({listed}) -> {_returns(result)}",
    )
    made.register_fake(fake)

    def call(backend: Backend, *given: Any) -> Any:
        for i, nested in asked:
            if not direct(given[i][0][0] if nested else given[i]):
                break
        else:
            fits(*[given[i] for i in shaped])
            return kernel(backend)(*given)
        flat: list[Any] = []
        for kind, value in zip(kinds, given, strict=True):
            flat.extend(kind.pack(value))
        out = made(*flat, backend.name)
        return result.unpack(iter([out] if result.size == 1 else out or ()))

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"Call :meth:`fused_dni.ops.types.Backend.{name}` of a backend."
    return cast(Callable[Concatenate[Backend, P], R], call)


# ---------------------------------------------------------------------------------------------
# Types of parameters


def _fields(record: Any) -> tuple[str, ...]:
    """Return the names of the fields of a tuple with names or a dataclass."""
    if dataclasses.is_dataclass(record):
        return tuple(field.name for field in dataclasses.fields(record))
    return cast(tuple[str, ...], record._fields)


def _kind(hint: Any, name: str) -> _Kind:
    if hint in _PLAIN:
        return _Kind(((_PLAIN[hint], name),), lambda value: (value,), next)
    if get_origin(hint) is tuple:
        item, _ = get_args(hint)  # tuple[item, ...]
        if item in _LISTS:
            listed = _LISTS[item], name
            return _Kind((listed,), lambda value: (list(value),), lambda left: tuple(next(left)))
        return _partial(name, None if item == Tensor | None else item)
    names = _fields(hint)
    kinds = [_kind(of, f"{name}_{field}") for field, of in _hints(hint, names)]

    def pack(value: Any) -> Any:
        flat: list[Any] = []
        for field, kind in zip(names, kinds, strict=True):
            flat.extend(kind.pack(getattr(value, field)))
        return flat

    def unpack(left: Iterator[Any]) -> Any:
        return hint(*[kind.unpack(left) for kind in kinds])

    return _Kind(tuple([pair for kind in kinds for pair in kind.types]), pack, unpack)


def _partial(name: str, record: Any) -> _Kind:
    """Tensors of which some may be absent, or tuples of such: a list of those that exist, and which
    do. (A list with gaps that is mutated cannot be traced.)"""

    def pack(value: Any) -> Any:
        every = value if record is None else [t for item in value for t in item]
        return [t for t in every if t is not None], [int(t is not None) for t in every]

    def unpack(left: Iterator[Any]) -> Any:
        given = iter(next(left))
        every = [next(given) if there else None for there in next(left)]
        if record is None:
            return tuple(every)
        size = len(_fields(record))
        return tuple([record(*every[i : i + size]) for i in range(0, len(every), size)])

    return _Kind((("Tensor[]", name), ("int[]", f"{name}_given")), pack, unpack)


def _hints(record: Any, names: Sequence[str]) -> list[tuple[str, Any]]:
    hints = get_type_hints(record)
    return [(field, hints[field]) for field in names]


# ---------------------------------------------------------------------------------------------
# Results


class _Result(NamedTuple):
    """How what an op returns, or a part of it, lies among the results of a schema."""

    size: int | None  # of tensors, None where it depends on the arguments
    pack: Callable[[Any, Callable[[Tensor | None, tuple[int, ...]], None]], None]
    unpack: Callable[[Iterator[Tensor]], Any]


def _result(hint: Any) -> _Result:
    if hint is type(None):
        return _Result(0, lambda value, add: None, lambda left: None)
    if hint is Tensor:
        return _Result(1, lambda value, add: add(value, _ABSENT), next)
    optional = get_origin(hint) in (Union, UnionType)
    if optional:
        hint, _ = get_args(hint)  # X | None
    if hint is Tensor:
        return _Result(1, lambda value, add: add(value, _ABSENT), _present)
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if items[-1] is Ellipsis:
            return _several(_result(items[0]))
        return _together(lambda *parts: parts, [_result(item) for item in items], optional)
    hints = [_result(of) for _, of in _hints(hint, _fields(hint))]
    return _together(hint, hints, optional)


def _present(left: Iterator[Tensor]) -> Tensor | None:
    t = next(left)
    return None if t.numel() == 0 else t


def _together(make: Callable[..., Any], parts: list[_Result], optional: bool) -> _Result:
    counts = [part.size for part in parts]
    count = None if None in counts else sum(cast(list[int], counts))

    def pack(value: Any, add: Callable[[Tensor | None, tuple[int, ...]], None]) -> None:
        if value is None:
            for _ in range(count or 0):
                add(None, _ABSENT_TUPLE)
            return
        for part, item in zip(parts, value, strict=True):
            part.pack(item, add)

    def unpack(left: Iterator[Tensor]) -> Any:
        if not optional:
            return make(*[part.unpack(left) for part in parts])
        own = [next(left) for _ in range(count or 0)]
        if own[0].dim() == 2 and own[0].numel() == 0:
            return None
        again = iter(own)
        return make(*[part.unpack(again) for part in parts])

    return _Result(count, pack, unpack)


def _several(part: _Result) -> _Result:
    """Take the last of the results: all tensors that are left."""

    def pack(value: Any, add: Callable[[Tensor | None, tuple[int, ...]], None]) -> None:
        for item in value:
            part.pack(item, add)

    def unpack(left: Iterator[Tensor]) -> Any:
        own = list(left)
        again = iter(own)
        return tuple([part.unpack(again) for _ in range(len(own) // (part.size or 1))])

    return _Result(None, pack, unpack)


def _flat(result: _Result, made: Any, given: Sequence[Any]) -> Any:
    """Return what the registered op does: results that share no memory."""
    like = next(t for t in given if isinstance(t, Tensor))
    flat: list[Tensor] = []

    def add(t: Tensor | None, absent: tuple[int, ...]) -> None:
        if t is None:
            t = like.new_empty(absent)
        elif any(t is other for other in flat):  # the two biases of an LSTM have one gradient
            t = t.clone()
        flat.append(t)

    result.pack(made, add)
    if result.size is None:
        return flat
    return None if not flat else flat[0] if len(flat) == 1 else tuple(flat)


def _returns(result: _Result) -> str:
    if result.size is None:
        return "Tensor[]"
    listed = ", ".join(["Tensor"] * result.size)
    return listed if result.size == 1 else f"({listed})"
