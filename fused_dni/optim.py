"""``FusedOptimizer``: a model's fused update rules as one ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fused_dni.modules.base import DecoupledModule
from fused_dni.rules import RuleState

_STATE_NAMES = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}
_STATE_NAMES["adamw"] = _STATE_NAMES["adam"]

_Slots = tuple[Tensor | None, ...]


def _rules(model: nn.Module) -> Iterator[tuple[str, DecoupledModule, RuleState, _Slots]]:
    """Every rule in the model: its name, its module, its state, the slots it works on."""
    for name, module in model.named_modules():
        if isinstance(module, DecoupledModule):
            for part, rule, slots in module.rules():
                yield f"{name}.{part}" if part else name, module, rule, slots


def ordinary_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model that no fused rule updates: what an optimizer is to be given."""
    ruled = {id(p) for *_, slots in _rules(model) for p in slots}
    return (p for p in model.parameters() if id(p) not in ruled)


class FusedOptimizer(torch.optim.Optimizer):
    """The hyper-parameters and state of all fused rules of a model, where PyTorch looks for them.

    The rules are applied by the layers themselves; :meth:`step` applies nothing. What this object
    gives is everything else an optimizer is for: ``param_groups`` (one a rule; changing ``lr``
    there, as every ``torch.optim.lr_scheduler`` does, is obeyed by the next update) and
    ``state_dict`` / ``load_state_dict`` with moments and step counts, under PyTorch's names.

    Parameters without a fused rule belong to another optimizer: see :func:`ordinary_parameters`.

    Args:
        model: a model with layers built with ``update=...``.

    Raises:
        ValueError: the model has no fused rule with anything to train.
    """

    def __init__(self, model: nn.Module) -> None:
        self._linked: list[tuple[RuleState, _Slots]] = []
        self._modules: list[DecoupledModule] = []
        groups: list[dict[str, Any]] = []
        for name, module, rule, slots in _rules(model):
            trained = [p for p in slots if p is not None and p.requires_grad]
            if not trained:
                continue
            rule.group.update(params=trained, name=name)
            groups.append(rule.group)
            self._linked.append((rule, slots))
            self._modules.append(module)
        if not groups:
            raise ValueError("model has no layer with a fused rule (update=...) to optimize")
        super().__init__(groups, {})
        # What all rules have, for schedulers that look whether there is a momentum to cycle.
        common = set.intersection(*(set(rule.rule.defaults()) for rule, _ in self._linked))
        first = self._linked[0][0].rule.defaults()
        self.defaults = {name: value for name, value in first.items() if name in common}
        for (rule, _), group in zip(self._linked, self.param_groups, strict=True):
            rule.group = group

    # GradScaler then hands its scale to this object instead of refusing to find gradients.
    _step_supports_amp_scaling = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply nothing (the layers have updated themselves); evaluate ``closure`` if given.

        Raises:
            RuntimeError: called by a ``GradScaler`` whose scale the layers were not told.
        """
        scale = getattr(self, "grad_scale", None)
        if scale is not None and any(m.phase.loss_scale is None for m in self._modules):
            raise RuntimeError(
                "the loss was scaled by a GradScaler that decoupled layers were not told about, so "
                "gradients of different scales were mixed: use "
                "fused_dni.Schedule(model, loss_scale=scaler)"
            )
        for hook in self._optimizer_step_pre_hooks.values():
            hook(self, (closure,), {})
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, (closure,), {})
        return loss

    # PyTorch wraps every optimizer's step for its profiler, which takes longer than all there is to
    # do here; this tells it that the hooks are run already.
    step.hooked = True  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``, with the rules' present state (references)."""
        self.state.clear()
        for rule, slots in self._linked:
            first, second = rule.moments()
            if not first:
                continue
            for i, p in enumerate(slots):
                if p is None or not p.requires_grad:
                    continue
                entry = {
                    "step": torch.tensor(float(rule.steps)),
                    "skipped": torch.tensor(float(rule.skipped)),
                }
                moments = (m for m in (first[i], second[i]) if m is not None)
                entry.update(zip(_STATE_NAMES[rule.rule.kind], moments, strict=False))
                self.state[p] = entry
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; hyper-parameters, moments and counts are taken over.

        Raises:
            ValueError: groups or parameters that do not fit this model's; nothing is changed.
        """
        _check_shapes(state_dict, self.param_groups)
        for old, (rule, _) in zip(state_dict["param_groups"], self._linked, strict=True):
            absent = [name for name in rule.rule.defaults() if name not in old]
            if absent:
                raise ValueError(
                    f"the saved group {old.get('name')!r} has no {absent[0]!r}: it belongs to "
                    f"another update rule than {rule.rule}"
                )
        super().load_state_dict(state_dict)
        for (rule, slots), group in zip(self._linked, self.param_groups, strict=True):
            rule.group = group
            entries = [self.state.get(p, {}) if p is not None else {} for p in slots]
            names = (*_STATE_NAMES[rule.rule.kind], "")[:2]
            known = next((e for e in entries if e), None)
            if known is None:
                rule.reset()
                continue
            rule.load(
                int(known["step"]),
                int(known.get("skipped", 0)),
                [e.get(names[0]) for e in entries],
                [e.get(names[1]) for e in entries],
            )


def _check_shapes(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Refuse moments of another shape than their parameter's before anything is taken over."""
    saved = state_dict["param_groups"]
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in groups]:
        raise ValueError(
            "the saved optimizer state has other parameter groups than this model: "
            f"{[len(g['params']) for g in saved]} parameters by group, here "
            f"{[len(g['params']) for g in groups]}"
        )
    for old, new in zip(saved, groups, strict=True):
        for key, p in zip(old["params"], new["params"], strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and value.dim() and value.shape != p.shape:
                    raise ValueError(
                        f"the saved {name} of group {new['name']!r} has shape "
                        f"{list(value.shape)}, its parameter {list(p.shape)}"
                    )
