"""``DecoupledSequential``: targets delivered during the forward, memory that does not grow."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.parameter import is_lazy

from fused_dni.functional import check
from fused_dni.functional.node import Node, once_differentiable, spend
from fused_dni.modules.base import (
    NO_TARGET,
    DecoupledModule,
    Regression,
    leaf,
    run_apart,
    untraced,
)
from fused_dni.modules.linear import FusedDNILinear
from fused_dni.modules.nodes import TWICE, Delivery, rescaled, teach_later, through, unscaled
from fused_dni.modules.quick import Stacked, stacked
from fused_dni.modules.steps import LinearSteps, LossSteps


class DecoupledSequential(nn.Sequential):
    """``nn.Sequential`` with immediate delivery between its decoupled modules.

    The gradient that a decoupled module makes for its input goes down at once, through whatever
    ordinary modules lie between, and trains the synthesizer of the decoupled module below; after
    that nothing of the lower module is kept. So the activation memory of a training step does not
    grow with depth. Gradients of ordinary modules in between, and of decoupled modules without a
    rule, land in ``.grad`` during the backward. What lies behind the last decoupled module (a head,
    say) runs as it always does; what precedes the container gets its gradient in the backward.

    Phases in which the true gradient is needed (warm-up, mixing), ``eval()`` (of a decoupled module
    alone, too) and ``no_grad()`` run as ``nn.Sequential``. The forward is not traceable by
    ``torch.compile``.

    A hook that runs in the backward of a decoupled module, or another forward in the place of its
    own, has the step run as that of ``nn.Sequential``, with the same bits.

    Each h between two modules has one consumer, the next module; running a backward through
    another (taken with a forward hook, say) is an error.

    Where all modules up to the last decoupled one are fused linear layers with rules and
    synthesizers, one directly behind the other (``nn.Identity`` between does not count), or all are
    such layers without synthesizers, and no hook looks between them, a step is one call on a CPU.

    The last module may be a :class:`fused_dni.FusedDNILinearCrossEntropyLoss`, a classifier's head:
    the container is then called with the targets and returns the loss, and what is one call has the
    head in it. In ``eval()`` it returns the logits where it is given no target.

    Args:
        *modules: as ``nn.Sequential``. Decoupled modules without synthesizer count as ordinary.
    """

    _stack: Stacked | None = None
    _apart = ""  # why there is none, or why the head is not in it
    _true: Stacked | None = None  # of layers with synthesizers, by the true gradient

    def forward(
        self, input: Tensor, context: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Run the modules in turn.

        Args:
            input: what the first module takes.
            context: given to every decoupled module; None to take it from
                :func:`fused_dni.condition_on`. Where the classes are both, give them twice:
                ``net(x, context=y, target=y)``.
            target: class indices, given to the head that is the last module.

        Returns:
            What the last module returns.

        Raises:
            ValueError: a target that no module takes, or none for a head in training; a head that
                is not the last module.
        """
        if torch.compiler.is_compiling():
            out: Tensor = untraced(self._run)(input, context, target)
            return out
        stack = self._stack
        if self._true is not None and self._true.last.phase.true_share > 0.0:
            stack = self._true
        if target is not None and stack is not None and stack.head is None:
            self._head(list(self), input, target)  # which is behind what is one call
        h = None if stack is None else stack.run(self, input, context, target)
        if stack is None or h is None:
            return self._run(input, context, target)
        if stack.covered == len(self._modules):
            return h
        return _plain(list(self)[stack.covered :], h, context, target)

    def extra_repr(self) -> str:
        """Say how steps are taken: in one call, or why not."""
        stack, apart = self._stack, self._apart
        if self._true is not None and self._true.last.phase.true_share > 0.0:
            stack = self._true
        if not self.training or (stack is None and not apart):
            return ""
        if stack is None:
            return f"steps layer by layer ({apart})"
        return f"steps by {stack.way()}" + (f", then the head ({apart})" if apart else "")

    def __prepare_scriptable__(self) -> nn.Module:
        """Stand in for the container in ``torch.jit.script`` by ``nn.Sequential`` of what stands in
        for its modules."""
        modules = [(name, module) for name, module in self._modules.items() if module is not None]
        plain = nn.Sequential(OrderedDict(modules))
        plain.training = self.training  # not by train(): the modules are those of the container
        return plain

    def _run(self, input: Tensor, context: Tensor | None, target: Tensor | None) -> Tensor:
        called: Tensor | None = leaf(self, input, context=context, target=target)
        if called is not None:
            return called
        modules = list(self)
        head = self._head(modules, input, target)
        interfaces = [i for i, m in enumerate(modules) if _decouples(m)]
        if not self.training or not torch.is_grad_enabled():
            return _plain(modules, input, context, target)
        if not interfaces:
            out = _plain(modules, input, context, target)
            self._bind(modules if head is None else modules[:-1], head, True)
            return out
        split = interfaces[-1] + 1
        body = modules[:split]
        deciding = [m for m in body if isinstance(m, DecoupledModule) and _decouples(m)]
        phases = [m.phase for m in deciding]
        behind = [m for m in modules[split:] if not _passes(m)]
        follows = head if behind == [head] else None
        if any(p.true_share > 0.0 or p.probe is not None for p in phases):
            out = _plain(modules, input, context, target)
            if all(p.true_share > 0.0 for p in phases):
                self._bind(body, follows, True)
            return out
        # One of them predicts nothing, or is watched by what runs when a backward comes through it.
        if not all(m.training for m in deciding) or _watched(deciding):
            return _plain(modules, input, context, target)
        learns = phases[-1].target
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
        _look_ahead(self._modules, input, context)
        h = Delivered.apply(body, context, learns, input, *_owed(body, learns))
        if not learns:
            setattr(h, NO_TARGET, h._version)
        out = _plain(modules[split:], h, context, target)
        self._bind(body, follows, False)
        return out

    def _head(
        self, modules: list[nn.Module], input: Tensor, target: Tensor | None
    ) -> LossSteps | None:
        """Return the head, if the last module is one; what it could not take is refused before a
        module is updated."""
        if any([isinstance(m, LossSteps) for m in modules[:-1]]):
            raise ValueError(
                "FusedDNILinearCrossEntropyLoss returns a loss: it must be the last module of a "
                "DecoupledSequential"
            )
        head = modules[-1] if modules else None
        if not isinstance(head, LossSteps):
            if target is not None:
                raise ValueError(
                    "target is unexpected: the last module is no FusedDNILinearCrossEntropyLoss, "
                    f"but {type(head).__name__}"
                )
            return None
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
        if self.training or target is not None:
            rows_are_kept = all([isinstance(m, FusedDNILinear) for m in modules[:-1]])
            check.target(
                target,
                input.shape[:-1] if rows_are_kept else None,
                input.device,
                head.weight.shape[0],
                head.ignore_index,
            )
        return head

    def _bind(self, body: list[nn.Module], head: LossSteps | None, exact: bool) -> None:
        """Have the next step of the body, by the true gradient if that is ``exact``, be one call,
        if its layers' are, and of the head behind it."""
        layers = [m for m in body if not _passes(m)]
        others = [type(m).__name__ for m in layers if type(m) is not FusedDNILinear]
        if others:
            decoupled = any([isinstance(m, DecoupledModule) for m in body])
            self._stack, self._apart = None, f"it holds a {others[0]}" if decoupled else ""
            return
        found: tuple[Stacked | None, str] = (None, "")
        if layers:
            steps = cast("list[LinearSteps]", layers)
            if exact and steps[-1]._modules["synthesizer"] is not None:
                self._true, _ = stacked(self, steps, len(body), head, self._true, True)
                return
            found = stacked(self, steps, len(body), head, self._stack, exact)
        self._stack, self._apart = found


def _passes(module: nn.Module) -> bool:
    """Say whether a module hands on what it is given: ``nn.Identity``, and what ``convert`` leaves
    in the place of what a layer took along."""
    return isinstance(module, nn.Identity) and type(module).forward is nn.Identity.forward


def _decouples(module: nn.Module) -> bool:
    return isinstance(module, DecoupledModule) and module.synthesizer is not None


def _watched(modules: Sequence[nn.Module]) -> bool:
    """Say whether there are hooks that run in a module's backward, which there is none of where its
    gradient goes down at once, or a forward of somebody else's, who need not hand it down."""
    if nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks:
        return True
    return any(
        [m._backward_hooks or m._backward_pre_hooks or "forward" in m.__dict__ for m in modules]
    )


def _ruled(module: nn.Module) -> bool:
    return isinstance(module, DecoupledModule) and module.update is not None


def _plain(
    modules: list[nn.Module], x: Tensor, context: Tensor | None, target: Tensor | None
) -> Tensor:
    for module in modules:
        if isinstance(module, LossSteps):
            x = module(x, target)
            continue
        takes = context is not None and _decouples(module)
        x = module(x, context=context) if takes else module(x)
    return x


# What hands on a tensor of the shape and, without autocast, the dtype that it was given.
_ELEMENTWISE = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Mish,
    nn.Dropout,
)  # fmt: skip


def _as_here(module: nn.Module) -> TypeGuard[LinearSteps]:
    """Say whether a module is a linear layer, or one with its loss, whose forward is ours."""
    if isinstance(module, FusedDNILinear):
        return type(module).forward is FusedDNILinear.forward
    return isinstance(module, LossSteps)


def _look_ahead(
    modules: Mapping[str, nn.Module | None], input: Tensor, context: Tensor | None
) -> None:
    """Refuse what a module further on would, before one in front of it is updated: rules that
    cannot be applied, and inputs, as far as linear layers and what keeps a shape stand one behind
    the other, with no hook between them and no forward in the place of their own, which may change
    what is handed on."""
    known = not (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)
    shape, dtype = input.shape, input.dtype
    for i, (key, module) in enumerate(modules.items()):
        if isinstance(module, DecoupledModule) and module.update is not None and module.training:
            if not any(map(is_lazy, module.parameters())):  # else its forward makes them
                module.refuse_rules()
            module.refuse_fused_rule()
        if (
            not known
            or module is None
            or module._forward_hooks
            or module._forward_pre_hooks
            or "forward" in module.__dict__
        ):
            known = False
            continue
        if type(module) in _ELEMENTWISE or _passes(module):
            continue
        weight = module._parameters.get("weight")  # parametrized it would have to be computed
        name = f"the input of module {key!r}" if i else "input"
        if weight is None:
            known = False
        elif _as_here(module):
            module.refuse_input(input, shape, dtype, context, name)
        elif type(module) is nn.Linear:
            check.handed(shape, dtype, input.device, weight, name)
        else:
            known = False
        if known:
            assert weight is not None
            shape, dtype = torch.Size((*shape[:-1], weight.shape[0])), weight.dtype


def _owed(body: list[nn.Module], target: bool) -> list[nn.Parameter]:
    """Parameters whose gradients the container's node returns: those that no rule updates, and, to
    make the node require a gradient on steps with targets, those that learn from it."""
    owed: dict[int, nn.Parameter] = {}
    for module in body:
        owed.update((id(p), p) for p in (() if _ruled(module) else module.parameters()))
    last = body[-1]
    assert isinstance(last, DecoupledModule)
    if target:
        learners = (cast(nn.Parameter, p) for p in last.learners() if p is not None)
        owed.update((id(p), p) for p in learners)
    return [p for p in owed.values() if p.requires_grad]


class _Gradients:
    """Gradients of parameters that no rule updates, by the parameter's identity."""

    def __init__(self) -> None:
        self.of: dict[int, Tensor] = {}

    def add(self, parameters: Sequence[Tensor | None], made: Sequence[Tensor | None]) -> None:
        """Add ``made`` (possibly nothing at all) to the gradients of ``parameters``."""
        for p, g in zip(parameters, made, strict=bool(made)):
            if p is not None and g is not None:
                known = self.of.get(id(p))
                self.of[id(p)] = g if known is None else known + g


def _take_down(
    x: Tensor,
    h: Tensor,
    wants: bool,
    trained: list[nn.Parameter],
    aliases: dict[int, Tensor],
    gradient: Tensor | None,
    grads: _Gradients,
) -> Tensor | None:
    """Take the gradient at x through the ordinary modules between h and x; the gradient at h if
    it is wanted there."""
    if gradient is None:
        return None
    gradient = gradient.reshape(x.shape)
    if x is h:
        return gradient if wants else None
    wanted: list[Tensor] = [*([h] if wants else []), *(aliases.get(id(p), p) for p in trained)]
    if not wanted or not x.requires_grad:
        return None
    made = torch.autograd.grad(x, wanted, gradient, allow_unused=True)
    grads.add(trained, made[len(wanted) - len(trained) :])
    return made[0] if wants else None


def _teach(module: DecoupledModule, regression: Regression, grads: _Gradients) -> None:
    """Learn at once, by the rules, or add the gradients to what is owed."""
    if module.synthesizer_update is not None:
        module.learn([regression])
        return
    grads.add(module.parameters_behind(), regression.behind or ())
    grads.add(module.synthesizer_parameters(), module.regression_gradients(regression))


class Delivered(Node):
    """The whole container up to its last decoupled module, as one node."""

    @staticmethod
    def forward(
        ctx: Any,
        body: list[nn.Module],
        context: Tensor | None,
        target: bool,
        input: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        grads = _Gradients()
        wants = input.requires_grad and getattr(input, NO_TARGET, None) != input._version
        bottom = input.detach().requires_grad_(wants)
        out = h = bottom  # what the modules above the last interface read, and that interface
        below: Delivery | None = None  # that interface, whose lesson waits for a gradient at h
        between: list[nn.Module] = []
        dx: Tensor | None = None
        for module in body:
            if not _decouples(module):
                between.append(module)
                continue
            assert isinstance(module, DecoupledModule)
            with torch.enable_grad():
                x = out
                aliases: dict[int, Tensor] = {}
                for ordinary in between:
                    if _ruled(ordinary):
                        x = ordinary(x)
                        continue
                    x, made = run_apart(ordinary, x)
                    aliases.update(made)
                trained = [p for m in between for p in m.parameters() if p.requires_grad]
                delivery = Delivery(module, wants or bool(trained), target)
                entrance = x.detach().requires_grad_(delivery.need_dx)
                above = delivery.run(entrance, context=context)
            grads.add(module.local_parameters(), delivery.gradients)
            arrived = _take_down(x, h, wants, trained, aliases, delivery.dx[0], grads)
            if below is None:
                dx = arrived
            elif arrived is not None:
                _teach(below.module, below.regression(arrived), grads)
            assert delivery.sealed is not None
            out, h, below, between, wants = above, delivery.sealed, delivery, [], target
        assert below is not None
        ctx.set_materialize_grads(False)
        ctx.last, ctx.dx, ctx.grads, ctx.spent = below, dx, grads, False
        ctx.parameters = [id(p) for p in parameters]
        ctx.loss_scale = below.module.phase.loss_scale
        ctx.behind = None if out is h else (out, h)  # through a hook
        handed = out.detach()
        ctx.save_for_backward(handed)
        return handed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arrived: Tensor | None) -> tuple[Tensor | None, ...]:
        spend(ctx, TWICE)
        _ = ctx.saved_tensors  # raises if the output was changed in place
        last: Delivery = ctx.last
        arrived = unscaled(arrived, ctx.loss_scale)
        if arrived is not None and ctx.behind is not None:
            handed, sealed = ctx.behind
            (arrived,) = through((handed,), (sealed,), (arrived,))
        if arrived is not None and last.learns:
            regression = last.regression(arrived)
            if last.module.synthesizer_update is not None:
                teach_later(last.module, regression)
            else:
                _teach(last.module, regression, ctx.grads)
        out = (ctx.dx, *(ctx.grads.of.get(i) for i in ctx.parameters))
        ctx.last = ctx.dx = ctx.grads = ctx.behind = None
        return (None,) * 3 + rescaled(out, ctx.loss_scale)
