"""The phases of a training step, each as a candidate of its own.

============================  ====================================================================
``forward``                   forward of the decoupled modules
``predict``                   their synthesizers' predictions
``local backward``            from the prediction to the parameters' gradients
``local backward, dx``        the same and the gradient of the input, as on steps with targets
``update``                    the rule applied; of a linear layer also its weight's gradient
``fused step``                these four in one call, as in a step without targets
``fused step, dx``            the same in a step with targets
``train``                     synthesizers learn from what arrived, on steps with targets
``exact``, ``exact, dx``      modules without a synthesizer: forward, backward, update
``others forward``            modules that are not decoupled (a function behind the interface)
``others backward``           their backward, where it runs in a step with targets
``others update``             their optimizer
``loss``                      the loss and its gradient
``forward call``              what the user's loop calls: the model
``backward call``             ... ``backward()``: nodes of autograd, delivery of dx, training
``bookkeeping``               ... optimizer and schedule
``... call, dx``              the same in a step with targets
============================  ====================================================================
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_dni.measure.baseline import stock_optimizer
from fused_dni.measure.timing import Candidate, Staged
from fused_dni.measure.verdict.candidates import Problem, our_step, stock_step
from fused_dni.measure.verdict.work import Work, count
from fused_dni.modules.base import DecoupledModule, Predicted
from fused_dni.modules.linear import FusedDNILinear
from fused_dni.modules.nodes import Call, watching
from fused_dni.synthesizers import Synthesizer

STOCK = ("stock forward", "stock backward", "stock optimizer")
#: Phases of a step without and with targets, where the model has them.
PHASES = (
    *("forward", "predict", "local backward", "update"),
    *("exact", "others forward", "others update", "loss", "bookkeeping"),
)
PHASES_DX = (
    *("forward", "predict", "local backward, dx", "update", "train"),
    *("exact, dx", "others forward", "others backward", "others update", "loss", "bookkeeping"),
)
#: The calls that a user's loop makes.
CALLS = ("forward call", "backward call", "bookkeeping")
CALLS_DX = ("forward call, dx", "backward call, dx", "bookkeeping")


def part_candidates(
    plain: nn.Module, decoupled: nn.Module, problem: Problem
) -> dict[str, Candidate]:
    """Return the parts as candidates of one :func:`fused_dni.measure.timing.compare`."""
    return {
        **stock_parts(plain, problem),
        "stock step": stock_step(plain, problem),
        **decoupled_parts(decoupled, problem),
        # Each on a model of its own: there is one schedule to a model.
        **_calls(copy.deepcopy(decoupled), problem, 1),
        **_calls(copy.deepcopy(decoupled), problem, None),
    }


# ------------------------------------------------------------------------------------------ chains

#: Phases of a step in their order, each given what the one before returned (None the first).
Chain = Sequence[tuple[str, Callable[[Any], Any]]]


def staged(chain: Chain) -> dict[str, Candidate]:
    """Each phase as a candidate that is timed after those before it have run."""

    def candidate(i: int) -> Candidate:
        def prepare() -> Any:
            made = None
            for _, run in chain[:i]:
                made = run(made)
            return made

        return Staged(prepare, chain[i][1])

    return {name: candidate(i) for i, (name, _) in enumerate(chain)}


# ------------------------------------------------------------------------------------------- stock


def stock_parts(module: nn.Module, problem: Problem) -> dict[str, Candidate]:
    """Forward, backward and optimizer of a step by stock backprop."""
    step = stock_step(module, problem)
    chain: Chain = [
        ("stock forward", step.forward),
        ("stock backward", step.backward),
        ("stock optimizer", step.finish),
    ]
    parts = staged(chain)

    def gradients_of(wanted: list[Any]) -> Callable[[Tensor], object]:
        return lambda out: torch.autograd.grad(out, wanted, problem.arriving, allow_unused=True)

    if step.x.requires_grad:
        parameters = [p for p in module.parameters() if p.requires_grad]
        for name, wanted in (("parameters", parameters), ("input", [step.x])):
            parts |= staged([chain[0], (f"stock backward, {name}", gradients_of(wanted))])
    return parts


# --------------------------------------------------------------------------------------- decoupled


class _Use(NamedTuple):
    """A module that is not decoupled, and what one step called it with."""

    module: nn.Module
    inputs: tuple[Any, ...]


def decoupled_parts(model: nn.Module, problem: Problem) -> dict[str, Candidate]:
    """Return the phases of a decoupled model's step, over all its modules."""
    sites, uses = record(model, problem)
    learners = [_Phases(site) for site in sites if site.module.synthesizer is not None]
    exact = [_Phases(site) for site in sites if site.module.synthesizer is None]
    parts: dict[str, Candidate] = {}
    if learners:
        parts |= staged(_chain(learners, dx=False))
        parts |= staged(_chain(learners, dx=True))
        parts["fused step"] = _each(partial(p.step, False) for p in learners)
        parts["fused step, dx"] = _each(partial(p.step, True) for p in learners)
    if exact:
        parts["exact"] = _each(p.exact for p in exact)
        parts["exact, dx"] = _each(p.exact_dx for p in exact)
    if uses:
        parts |= _others(uses, problem)
    if problem.loss is not None:
        parts["loss"] = _loss(model, problem)
    return parts


def _calls(model: nn.Module, problem: Problem, target_every: int | None) -> dict[str, Candidate]:
    """Return a step with or without targets, and the three calls that it is made of."""
    step = our_step(model, problem, target_every)
    names = CALLS if target_every is None else CALLS_DX
    calls: dict[str, Candidate] = staged(
        list(zip(names, (step.forward, step.backward, step.finish), strict=True))
    )
    return {**calls, f"step {'without' if target_every is None else 'with'} targets": step}


def _chain(learners: list[_Phases], *, dx: bool) -> Chain:
    """Phase by phase, each over all modules; with ``dx`` as in a step with targets."""

    def over(phase: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda made: [
            phase(p, given)
            for p, given in zip(learners, made or [None] * len(learners), strict=True)
        ]

    chain: list[tuple[str, Callable[[Any], Any]]] = [
        ("forward", over(partial(_Phases.forward, dx=dx))),
        ("predict", over(partial(_Phases.predict, learns=dx))),
        ("local backward, dx" if dx else "local backward", over(partial(_Phases.backward, dx=dx))),
        ("update", over(_Phases.update)),
    ]
    return [*chain, ("train", over(_Phases.train))] if dx else chain


def record(model: nn.Module, problem: Problem) -> tuple[list[Call], list[_Use]]:
    """Say what one step with targets calls the modules with. The model is trained by that step."""
    sites: list[Call] = []
    uses: list[_Use] = []
    handles = [
        module.register_forward_pre_hook(lambda m, inputs: uses.append(_Use(m, inputs)))
        for module in _not_decoupled(model)
    ]
    try:
        with watching(sites.append):
            our_step(model, problem, 1)()
    finally:
        for handle in handles:
            handle.remove()
    return sites, uses


class Passed(NamedTuple):
    """What the phases of a module's step hand on."""

    h: Tensor
    trace: Any = None
    predicted: Predicted | None = None
    contribution: Any = None


class _Phases:
    """The phases of one decoupled module's step, called apart."""

    def __init__(self, site: Call) -> None:
        self.module, self.inputs, self.context, self.need_dx = site
        h, _ = self.module.open(self.inputs, False)
        generator = torch.Generator().manual_seed(3)
        arrived = torch.randn(h.shape, generator=generator) / (h.shape[0] if h.dim() else 1)
        self.h, self.arrived = h, arrived.to(device=h.device, dtype=h.dtype)

    def forward(self, _: None, dx: bool) -> Passed:
        return Passed(*self.module.open(self.inputs, dx and self.need_dx))

    def predict(self, given: Passed, learns: bool) -> Passed:
        return given._replace(predicted=self.module.predict(given.h, self.context, learns))

    def backward(self, given: Passed, dx: bool) -> Passed:
        assert given.predicted is not None
        gradient = self.module.synthetic(given.predicted, given.h)
        _, contribution = self.module.close(given.trace, gradient, dx and self.need_dx)
        return given._replace(contribution=contribution)

    def update(self, given: Passed) -> Passed:
        self.module.apply_update([given.contribution])
        return given

    def step(self, dx: bool) -> Passed:
        made = self.module.step_locally(self.inputs, self.context, dx and self.need_dx, dx)
        return Passed(made.h, predicted=made.predicted)

    def train(self, given: Passed) -> None:
        module, predicted = self.module, given.predicted
        assert predicted is not None
        regression = module.regression(given.h, predicted, self.context, self.arrived, given.trace)
        module.learn([regression])

    def plainly_predicted(self) -> Tensor:
        """M(h) by PyTorch alone, with its graph."""
        assert self.module.synthesizer is not None
        made: Tensor = self.module.synthesizer(self.h.detach(), self.context)
        return made

    def exact(self) -> None:
        self._exactly(False)

    def exact_dx(self) -> None:
        self._exactly(self.need_dx)

    def _exactly(self, need_dx: bool) -> None:
        _, trace = self.module.open(self.inputs, need_dx)
        _, contribution = self.module.close(trace, self.arrived, need_dx)
        self.module.apply_update([contribution])


def _each(calls: Iterator[Callable[[], object]]) -> Candidate:
    kept = list(calls)

    def run() -> None:
        for call in kept:
            call()

    return run


def _others(uses: list[_Use], problem: Problem) -> dict[str, Candidate]:
    """Modules between the decoupled ones: they run under autograd as they are."""
    leaves = [
        _Use(
            module,
            tuple(
                t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
                for t in inputs
            ),
        )
        for module, inputs in uses
    ]

    def forward() -> list[Tensor]:
        return [module(*inputs) for module, inputs in leaves]

    parts: dict[str, Candidate] = {"others forward": forward}
    arriving = [torch.ones_like(out) for out in forward()]
    wanted = [
        [t for t in (*inputs, *module.parameters()) if isinstance(t, Tensor) and t.requires_grad]
        for module, inputs in leaves
    ]

    def backward(outs: list[Tensor]) -> None:
        for out, given, asked in zip(outs, arriving, wanted, strict=True):
            if asked:
                torch.autograd.grad(out, asked, given, allow_unused=True)

    if any(wanted):
        parts["others backward"] = Staged(forward, backward)
    trained = [p for module, _ in leaves for p in module.parameters() if p.requires_grad]
    if trained:
        for p in trained:
            p.grad = torch.full_like(p, 1e-3)
        parts["others update"] = stock_optimizer(nn.ParameterList(trained), problem.rule).step
    return parts


def _loss(model: nn.Module, problem: Problem) -> Candidate:
    assert problem.loss is not None
    loss = problem.loss
    was = model.training
    with torch.no_grad():
        out = model.eval()(problem.sample)
    model.train(was)
    out = out.detach().requires_grad_()
    return lambda: torch.autograd.grad(loss(out), out)


def _decoupled(model: nn.Module) -> Iterator[DecoupledModule]:
    """Outermost decoupled modules."""
    if isinstance(model, DecoupledModule):
        yield model
    else:
        for child in model.children():
            yield from _decoupled(child)


def _not_decoupled(model: nn.Module) -> Iterator[nn.Module]:
    """Outermost modules with no decoupled one inside, beside decoupled ones."""
    if isinstance(model, (DecoupledModule, nn.Identity)):
        return
    if any(isinstance(m, DecoupledModule) for m in model.modules()):
        for child in model.children():
            yield from _not_decoupled(child)
    else:
        yield model


def fuses(model: nn.Module) -> bool:
    """Say whether one call of a kernel makes several phases of some module's step."""
    return any(
        isinstance(layer, FusedDNILinear)
        and isinstance(layer.synthesizer, Synthesizer)
        and layer.fused_synthesizer(layer.weight) is not None
        for layer in _decoupled(model)
    )


# -------------------------------------------------------------------------------------------- work


def count_work(plain: nn.Module, model: nn.Module, problem: Problem) -> dict[str, Work]:
    """Work by part, as PyTorch's own operations do it; ours have the same formulas.

    Phases of the decoupled modules are counted on ``plain``, and so only if they are all there is.
    """
    work: dict[str, Work] = {}
    for name, call in stock_parts(plain, problem).items():
        if isinstance(call, Staged):
            run, given = call.run, call.prepare()
            work[name] = count(lambda run=run, given=given: run(given))  # type: ignore[misc]
        else:
            work[name] = count(call)
    sites, uses = record(model, problem)
    learners = [_Phases(site) for site in sites if site.module.synthesizer is not None]
    work["predict"] = _total(count(p.plainly_predicted) for p in learners)
    work["train"] = _total(_count_training(p) for p in learners)
    if not uses and len(learners) == len(sites):
        work["forward"] = work["stock forward"]
        whole, update = work["stock backward"], work["stock optimizer"]
        parameters = work.get("stock backward, parameters", whole)
        if fuses(model):  # a linear layer makes the product of its weight's gradient in the update
            work["local backward, dx"] = work.get("stock backward, input", whole)
            work["update"] = Work(parameters.flops, update.bytes)
        else:
            work["local backward, dx"], work["local backward"] = whole, parameters
            work["update"] = update
    return work


def _count_training(phases: _Phases) -> Work:
    synthesizer = phases.module.synthesizer
    assert synthesizer is not None
    out = phases.plainly_predicted()
    wanted = [p for p in synthesizer.parameters() if p.requires_grad]
    return count(lambda: torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True))


def _total(counted: Iterator[Work]) -> Work:
    found = list(counted)
    return Work(sum(w.flops for w in found), sum(w.bytes for w in found))
