"""``FusedOptimizer``: a model's fused update rules as one ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from fused_dni.functional import check
from fused_dni.modules.base import DecoupledModule, nonzero, other_gradient
from fused_dni.modules.other_optimizers import OptimizerWatch
from fused_dni.ops.tracing import direct
from fused_dni.rules import RuleState

_STATE_NAMES = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}
_STATE_NAMES["adamw"] = _STATE_NAMES["adam"]

_COUNTS = ("step", "skipped")

_Slots = tuple[Tensor | None, ...]


class _Linked(NamedTuple):
    """A rule of a model."""

    layer: str  # the module's name in the model
    part: str  # what of it the rule trains; empty for the module's own parameters
    module: DecoupledModule
    rule: RuleState
    slots: _Slots

    @property
    def name(self) -> str:
        """The name of the rule's parameter group."""
        return f"{self.layer}.{self.part}" if self.part else self.layer

    def holds(self, parameter: Tensor) -> bool:
        return any(parameter is p for p in self.slots)


def _rules(model: nn.Module) -> Iterator[_Linked]:
    """Return every rule in the model."""
    for name, module in model.named_modules():
        if isinstance(module, DecoupledModule):
            for part, rule, slots in module.rules():
                yield _Linked(name, part, module, rule, slots)


def ordinary_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Return the parameters of a model that no fused rule updates: what an optimizer is to be
    given."""
    check.module("model", model)
    ruled = {id(p) for linked in _rules(model) for p in linked.slots}
    return (p for p in model.parameters() if id(p) not in ruled)


class _Shown(dict[Any, Any]):
    """State as the rules have it now: to be read, and its moments to be changed in place."""

    def __missing__(self, key: Any) -> _Shown:
        return _Shown()

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "this shows the state of fused rules and cannot be changed key by key: change the "
            "moments in place, assign a whole dictionary to optimizer.state (an empty one forgets "
            "everything), or use load_state_dict"
        )

    def __setitem__(self, key: Any, value: Any) -> None:
        # Lightning writes back what it has read, moved to the device where it is, or to the CPU.
        shown = self[key]
        if isinstance(shown, Tensor) and isinstance(value, Tensor):
            same = shown is value or torch.equal(shown.cpu(), value.cpu())
        else:
            same = shown is value
        if not same:
            self._refuse()

    __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


class FusedOptimizer(torch.optim.Optimizer):
    """The hyper-parameters and state of all fused rules of a model, where PyTorch looks for them.

    The rules are applied by the layers themselves; :meth:`step` applies nothing. What this object
    gives is everything else an optimizer is for: ``param_groups`` (one a rule, under the layer's
    name in ``group["name"]``; changing ``lr`` there, as every ``torch.optim.lr_scheduler`` does, is
    obeyed by the next update), ``state`` (by parameter, as it is now) and ``state_dict`` /
    ``load_state_dict`` with moments and step counts, under PyTorch's names; hooks; copies and
    pickles together with the model.

    Groups hold the parameters that asked for gradients when this object was made. One that is
    thawed later joins its layer's group at the next :meth:`step`; a layer that was frozen
    altogether needs :meth:`add_param_group`, and a warning says so.

    Parameters without a fused rule belong to another optimizer: see :func:`ordinary_parameters`.

    An optimizer of ``torch.optim`` that was given parameters under a rule, and steps in the first
    training step, is warned of once: it passes them by in silence.

    Args:
        model: a model with layers built with ``update=...``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model has no fused rule with anything to train.
    """

    shows_rules = True  # and steps nothing: see modules.other_optimizers
    _others: OptimizerWatch | None = None

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                "model must be an nn.Module, whose layers' rules are the parameter groups (told "
                f"apart by group['name']), got {type(model).__name__}"
            )
        self._linked: list[_Linked] = []
        # Rules without a group: nothing that they train asked for a gradient.
        self._frozen = list(_rules(model))
        self._said = False
        groups = [
            self._link(linked)
            for linked in tuple(self._frozen)
            if any(p is not None and p.requires_grad for p in linked.slots)
        ]
        if not groups:
            raise ValueError("model has no layer with a fused rule (update=...) to optimize")
        super().__init__(groups, {})
        # Through the second: another optimizer may step behind this one.
        self._others = OptimizerWatch(self, model, steps=2)
        # What all rules have, for schedulers that look whether there is a momentum to cycle.
        rules = [linked.rule.rule.defaults() for linked in self._linked]
        common = set.intersection(*map(set, rules))
        self.defaults = {name: value for name, value in rules[0].items() if name in common}

    def _link(self, linked: _Linked) -> dict[str, Any]:
        """Give a rule a group: the rule's own dictionary."""
        self._frozen = [other for other in self._frozen if other.rule is not linked.rule]
        self._linked.append(linked)
        group = linked.rule.group
        group.update(params=_trained(linked.slots, ()), name=linked.name)
        return group

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in thawed parameters: a group for each rule that has none yet.

        Args:
            param_group: ``params``, all of them under fused rules of the model and in no group yet,
                and hyper-parameters of their rules.

        Raises:
            ValueError: parameters that no rule of the model updates, or that are in a group;
                a hyper-parameter that a rule does not have, or out of range. Nothing is changed.
        """
        if any(param_group is linked.rule.group for linked in self._linked):
            super().add_param_group(param_group)
            return
        given, options = _split(param_group)
        listed = {id(p) for group in self.param_groups for p in group["params"]}
        everyone = [*self._linked, *self._frozen]
        for p in given:
            if id(p) in listed:
                raise ValueError(
                    "some parameters appear in more than one parameter group: "
                    f"{_name_of(p, everyone)} is in one already"
                )
            if not any(linked.holds(p) for linked in everyone):
                raise ValueError(
                    f"a parameter of shape {list(p.shape)} in params is updated by no fused rule "
                    "(update=...) of the model, so FusedOptimizer would never move it: give it to "
                    "an optimizer of torch.optim (see fused_dni.ordinary_parameters)"
                )
        touched = [linked for linked in everyone if any(linked.holds(p) for p in given)]
        for linked in touched:
            known = linked.rule.rule.defaults()
            unknown = [name for name in options if name not in known]
            if unknown:
                raise ValueError(
                    f"{unknown[0]!r} is no hyper-parameter of {linked.rule.rule}, the rule of "
                    f"{linked.name!r}, which has {list(known)}"
                )
            linked.rule.checked({**linked.rule.group, **options})
        for linked in touched:
            linked.rule.group.update(options)
            if any(linked.rule is other.rule for other in self._linked):
                linked.rule.group["params"] = _trained(
                    linked.slots, (*linked.rule.group["params"], *given)
                )
                continue
            group = self._link(linked)
            group["params"] = _trained(linked.slots, given)
            super().add_param_group(group)

    # GradScaler then hands its scale to this object instead of refusing to find gradients.
    _step_supports_amp_scaling = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply nothing (the layers have updated themselves); evaluate ``closure`` if given.

        Raises:
            RuntimeError: a parameter has a gradient that no rule saw; or called by a ``GradScaler``
                whose scale the layers were not told.
        """
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        ):
            return _observed(self, *(() if closure is None else (closure,)))
        return self._step(closure)

    # PyTorch wraps every optimizer's step for its profiler, which takes longer than all there is to
    # do here; this tells it that the hooks are run already.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        scale = getattr(self, "grad_scale", None)
        if scale is not None and any(m.module.phase.loss_scale is None for m in self._linked):
            raise RuntimeError(
                "the loss was scaled by a GradScaler that decoupled layers were not told about, so "
                "gradients of different scales were mixed: use "
                "fused_dni.Schedule(model, loss_scale=scaler)"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._others is not None and self._others.step():
            self._others = None
        for linked in self._linked:
            thawed = len(linked.rule.group["params"])
            for p in linked.slots:
                if p is None or not p.requires_grad:
                    continue
                thawed -= 1
                if p.grad is not None and nonzero(p.grad):
                    raise RuntimeError(other_gradient(_name_of(p, [linked])))
            if thawed < 0:
                self._join(linked)
        if self._frozen:
            self._look_at_frozen()
        return loss

    def _join(self, linked: _Linked) -> None:
        """Take thawed parameters into their rule's group."""
        group = linked.rule.group
        group["params"] = _trained(linked.slots, group["params"])

    def _look_at_frozen(self) -> None:
        for linked in self._frozen:
            if not self._said and any(p is not None and p.requires_grad for p in linked.slots):
                self._said = True
                warnings.warn(
                    f"the layer {linked.name!r} was frozen when this FusedOptimizer was made and "
                    "trains now, by its rule's own hyper-parameters: param_groups and state_dict "
                    "do not hold it until it is given to add_param_group",
                    stacklevel=3,
                )

    # -- state ---------------------------------------------------------------------------------

    _entry: type[dict[Any, Any]] = _Shown  # what an entry of ``state`` is

    def state_dict(self) -> dict[str, Any]:
        """Return what ``torch.optim.Optimizer.state_dict`` does, with the rules' present state
        (references)."""
        self._entry = dict
        try:
            return super().state_dict()
        finally:
            del self._entry

    @property
    def state(self) -> Any:
        """The rules' present state by parameter: ``step``, ``skipped`` (copies) and the moments
        (themselves), zero before the first update."""
        shown: dict[Tensor, dict[Any, Any]] = {}
        for linked in self._linked:
            rule = linked.rule
            self._join(linked)
            rule.allocate(linked.slots)
            names = _STATE_NAMES[rule.rule.kind]
            for p, *moments in zip(linked.slots, *rule.moments(), strict=True):
                made = {n: m for n, m in zip(names, moments, strict=False) if m is not None}
                if p is None or not (p.requires_grad or made):
                    continue
                if any(p is q for q in rule.group["params"]):
                    counts = {"step": rule.steps, "skipped": rule.skipped}
                    entry = {
                        n: torch.tensor(float(count), device="cpu") for n, count in counts.items()
                    }
                    shown[p] = self._entry(entry | made)
        return _Shown(shown)

    @state.setter
    def state(self, state: Mapping[Tensor, Mapping[str, Any]]) -> None:
        if "param_groups" not in self.__dict__:  # torch.optim.Optimizer.__init__ begins with it
            return
        for linked in self._linked:
            entries = [{} if p is None else state.get(p, {}) for p in linked.slots]
            known = next((e for e in entries if e), {})
            names = (*_STATE_NAMES[linked.rule.rule.kind], "")[:2]
            linked.rule.load(
                int(known.get("step", 0)),
                int(known.get("skipped", 0)),
                [e.get(names[0]) for e in entries],
                [e.get(names[1]) for e in entries],
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; hyper-parameters, moments and counts are taken over.

        Raises:
            ValueError: groups or parameters that do not fit this model's; nothing is changed.
        """
        state_dict = state_dict.copy()
        for load in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = load(self, state_dict) or state_dict
        if not {"param_groups", "state"} <= set(state_dict):
            raise ValueError(
                f"state_dict must hold 'param_groups' and 'state', got {sorted(state_dict)}"
            )
        saved = state_dict["param_groups"]
        kinds = [linked.rule.rule.kind for linked in self._linked]
        _check_state(state_dict, self.param_groups, kinds)
        for old, linked in zip(saved, self._linked, strict=True):
            rule = linked.rule
            absent = [name for name in rule.rule.defaults() if name not in old]
            if absent:
                raise ValueError(
                    f"the saved group {old.get('name')!r} has no {absent[0]!r}: it belongs to "
                    f"another update rule than {rule.rule}"
                )
            rule.checked(old)
        state: dict[Tensor, dict[str, Any]] = {}
        for old, group in zip(saved, self.param_groups, strict=True):
            keys, params, name = old["params"], group["params"], group["name"]
            entries = state_dict["state"]
            state.update((p, entries[k]) for k, p in zip(keys, params, strict=True) if k in entries)
            group.clear()  # the rule's own dictionary: it stays the same object
            group.update(copy.deepcopy({k: v for k, v in old.items() if k != "params"}))
            group.update(params=params, name=name)
        self.state = state
        for done in self._optimizer_load_state_dict_post_hooks.values():
            done(self)

    # -- copies --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: the layers too, for a copy without its model is the
        optimizer of a model that nothing else refers to (as of ``torch.optim``)."""
        names = ("defaults", "param_groups", "_linked", "_frozen", "_said")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`__getstate__` gave.

        Raises:
            TypeError: it was pickled before 0.2, without the link to its model's rules.
        """
        if "_linked" not in state and "_linked" not in self.__dict__:
            raise TypeError(
                "this FusedOptimizer was pickled by a version that did not keep its rules: make "
                "a new FusedOptimizer(model) and use load_state_dict"
            )
        super().__setstate__(state)


# torch.optim's own step around ours: hooks, those common to all optimizers, and the profiler.
_observed = torch.optim.Optimizer.profile_hook_step(FusedOptimizer._step)


def _trained(slots: _Slots, listed: Iterable[Tensor]) -> list[Tensor]:
    """Return the slots that ask for gradients, or that are listed, in their order."""
    kept = {id(p) for p in listed}
    return [p for p in slots if p is not None and (p.requires_grad or id(p) in kept)]


def _name_of(parameter: Tensor, among: Iterable[_Linked]) -> str:
    """Return a parameter's name in the model."""
    linked = next(linked for linked in among if linked.holds(parameter))
    return ".".join(n for n in (linked.layer, linked.module.name_of(parameter)) if n)


def _split(param_group: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the parameters of a group that is to be added, and its options."""
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
    given = param_group["params"]
    if isinstance(given, set):
        raise TypeError("params must have an order: give a list of tensors, got a set")
    given = [given] if isinstance(given, Tensor) else list(given)
    given = [p[1] if isinstance(p, tuple) else p for p in given]  # of named_parameters()
    for p in given:
        if not isinstance(p, Tensor):
            raise TypeError(f"params must be tensors, got {type(p).__name__}")
    return given, {k: v for k, v in param_group.items() if k != "params"}


def _check_state(
    state_dict: dict[str, Any], groups: list[dict[str, Any]], kinds: list[str]
) -> None:
    """Refuse counts that are none, and moments that are missing or do not fit their parameter,
    before anything is taken over."""
    saved = state_dict["param_groups"]
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in groups]:
        raise ValueError(
            "the saved optimizer state has other parameter groups than this model: "
            f"{[len(g['params']) for g in saved]} parameters by group, here "
            f"{[len(g['params']) for g in groups]} (those that asked for gradients)"
        )
    for old, new, kind in zip(saved, groups, kinds, strict=True):
        for key, p in zip(old["params"], new["params"], strict=True):
            entry = state_dict["state"].get(key, {})
            group = f"of group {new['name']!r}"
            for name in _COUNTS:
                if not _counts(entry.get(name, 0)):
                    raise ValueError(
                        f"the saved {name} {group} must be a whole number from 0 on, got "
                        f"{entry[name]!r}"
                    )
            for name in _STATE_NAMES[kind]:
                value = entry.get(name)
                if value is None:
                    if kind != "sgd" and float(entry.get("step", 0)):
                        raise ValueError(f"the saved state {group} has steps and no {name}")
                elif not isinstance(value, Tensor) or value.layout is not torch.strided:
                    raise ValueError(f"the saved {name} {group} must be a dense tensor")
                elif value.shape != p.shape:
                    raise ValueError(
                        f"the saved {name} {group} has shape {list(value.shape)}, its parameter "
                        f"{list(p.shape)}"
                    )
                elif value.is_meta:
                    if not p.is_meta:
                        raise ValueError(
                            f"the saved {name} {group} is on the meta device and has no values: "
                            "load the state with map_location='cpu'"
                        )
                elif direct(value) and bool(value.isnan().any()):
                    raise ValueError(
                        f"the saved {name} {group} holds NaN: every parameter that it moves would "
                        "become NaN; load the state of an earlier step, or the model alone"
                    )


def _counts(value: Any) -> bool:
    """Say whether this is a number of steps."""
    try:
        return float(value) >= 0.0 and float(value).is_integer()
    except (TypeError, ValueError, RuntimeError):
        return False
