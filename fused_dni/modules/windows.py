"""What the windows of an LSTM ask of their module, looked up once.

A short window is mostly Python: are the parameters still those, what rules work on them, does the
synthesizer fit? Where a backend can hold the answers against a list of checks in one call
(:mod:`fused_dni.modules.checks`), a window that follows another asks that alone. If one is answered
otherwise than before, the window goes its usual way, which gives the errors and binds anew.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_dni.modules.checks import (
    ALWAYS,
    SURROUNDINGS,
    addresses,
    fixed,
    holder,
    items,
    memory,
    rule_checks,
)
from fused_dni.ops.types import Backend, Check, LSTMLayer, RuleTensors, SynthesizerTensors
from fused_dni.rules import RuleState
from fused_dni.synthesizers import DiagonalSynthesizer, LinearSynthesizer

Slots = tuple[Tensor | None, ...]


class BoundWindows:
    """What was looked up; gone in a copied or unpickled module.

    Attributes:
        backend: which serves. layers: their parameters; slots: the same, as the rule sees them.
        synthesizer: its tensors, None without one. learners: the parameters whose gradients a
            window returns for it.
    """

    def __init__(self, module: Any, backend: Backend, watch: Any, own: list[Check]) -> None:
        self.backend = backend
        self.layers: tuple[LSTMLayer, ...] = module._layers()
        self.slots: Slots = module.local_parameters()
        self.synthesizer: SynthesizerTensors | None = module.fused_state_synthesizer()
        self.learners: tuple[Tensor, ...] = module._learners()
        # Each rule, its slots, and where its rate stands among the hyper-parameters it wrote.
        self._rates = [(rule, slots, rule._names.index("lr")) for _, rule, slots in module.rules()]
        self._around = watch([*SURROUNDINGS, *ALWAYS, *own])
        self._behind = watch([*ALWAYS, *own])

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def hold(self, around: bool) -> bool:
        """Say whether all is as it was; rates that changed are written.

        Args:
            around: in a forward, with what surrounds it; else in a backward or at its end.
        """
        if not (self._around() if around else self._behind()):
            return False
        for rule, slots, lr in self._rates:
            if rule._written[lr] != rule.group["lr"]:
                rule.tensors(slots)
        return True


def rule_of(state: RuleState | None) -> RuleTensors:
    """Return the tensors of a rule that is bound."""
    assert state is not None and state._tensors is not None
    return state._tensors


def bind_windows(module: Any, backend: Backend) -> BoundWindows | None:
    """Look up what the module's windows ask for; None where a list of checks does not say it, or
    the backend cannot hold it.

    Args:
        module: a :class:`~fused_dni.modules.recurrent.Recurrent`, of which a window has just been
            run in training. backend: by which.
    """
    watch = getattr(backend, "watch", None)
    own, synthesizer = module.__dict__, module._modules["synthesizer"]
    if watch is None or module._modules["auxiliary_head"] is not None:
        return None
    if synthesizer is not None and (
        type(synthesizer) not in (LinearSynthesizer, DiagonalSynthesizer)
        or module.fused_state_synthesizer() is None
    ):
        return None
    own_parameters = {id(p) for p in module._parameters.values()}
    if any([p is not None and id(p) not in own_parameters for p in module.local_parameters()]):
        return None  # parametrized, or computed before each call
    if synthesizer is not None:
        module.statistics_on(module.local_parameters()[0].device)
    rules = [rule for _, rule, _ in module.rules()]
    if any([rule._tensors is None or not fixed(rule) for rule in rules]):
        return None
    if any([isinstance(rule.group["lr"], Tensor) for rule in rules]):  # filled in place
        return None
    names = [name for name in module.rule_names if name in own]
    checks = [
        *items(own, "training", "backend", "statistics", *names),
        *memory([module.statistics]),
        *holder(module, "_parameters", "_modules"),
        *[check for rule in rules for check in rule_checks(rule)],
        *addresses(module.local_parameters()),
    ]
    if synthesizer is not None:
        checks += holder(synthesizer, "_parameters", "_modules")
        checks += addresses(module.synthesizer_parameters())
    return BoundWindows(module, backend, watch, checks)
