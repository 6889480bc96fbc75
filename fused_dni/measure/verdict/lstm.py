"""What credit beyond the window costs, for your LSTM, on your device.

DNI at a window of T steps promises the quality of backprop through a longer window, T2, at T's
memory. :func:`verdict_lstm` takes an LSTM and a window of its input and builds, from the same
weights,

====================  ============================================================================
``dni T``             windows of T with the synthetic gradient of their future
``fused T``           truncated backprop at T on the same kernels: no credit beyond the window
``backprop T``        the same by ``nn.LSTM`` with ``torch.optim``'s ``fused=True`` optimizer
``fused T2``          backprop at the longer window, on our kernels
``backprop T2``       the same by ``nn.LSTM``
``floor T``           the matrix products that no window of T can avoid, alone
====================  ============================================================================

and measures a training step of each, interleaved in one process (:mod:`fused_dni.measure.timing`),
and its peak memory. Windows differ in length, so times are per time step of the sequence. Which T2
reaches the quality of DNI at T is not measured here: ``fused-dni train charlm`` does that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fused_dni.measure import timing
from fused_dni.measure.baseline import stock_optimizer
from fused_dni.measure.options import VERDICT_SECONDS
from fused_dni.measure.timing import Ratio, Timing
from fused_dni.measure.verdict.candidates import (
    TIMING_RATE,
    at_rate,
    check_sample,
    trying,
)
from fused_dni.measure.verdict.errors import GateError, VerdictError
from fused_dni.measure.verdict.layer import facts_of
from fused_dni.measure.verdict.result import Measured, ratios
from fused_dni.modules.lstm import FusedDNILSTM
from fused_dni.optim import FusedOptimizer
from fused_dni.report.progress import teller
from fused_dni.report.schema import Result
from fused_dni.rules import SGD, Adam, Rule

#: T2 over T, where T2 is not given.
LONGER = 5
#: Memory that differs by less counts as the same.
MEMORY_MARGIN = 0.01

PER_STEP = (
    "per time step of the sequence: a training step (a window, forward, backward and "
    "update) divided by its window. The update is made after every window, so a longer window has "
    "fewer."
)


@dataclass
class LSTMVerdict(Measured):
    """Result of :func:`verdict_lstm`.

    Attributes:
        title: what was measured.
        window, long: T and T2.
        timings: seconds per time step of the sequence by candidate, in the order of the table.
        memory: peak bytes of a training step by candidate.
        memory_is: what these bytes are.
        gate: what was checked before anything was timed, with the deviations found.
        facts: device, versions, settings.
        notes: what the reader should know.
    """

    title: str
    window: int
    long: int
    timings: dict[str, Timing]
    memory: dict[str, int]
    memory_is: str
    gate: dict[str, Any]
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def dni(self) -> str:
        """The row of DNI at T."""
        return f"dni T={self.window}"

    def ratio(self, name: str, base: str) -> Ratio:
        """Time of one candidate over another's, per time step."""
        return timing.ratio(self.timings[name], self.timings[base])

    def cheaper(self, base: str) -> dict[str, str]:
        """Say whether ``dni`` or the row ``base`` is cheaper, in ``time`` and in ``memory``:
        ``inconclusive`` where the intervals of the times overlap, ``same`` for memory within one
        per cent."""
        words = {"faster": "dni", "slower": base, "inconclusive": "inconclusive"}
        ours, theirs = self.memory[self.dni], self.memory[base]
        held = "same"
        if abs(ours - theirs) > MEMORY_MARGIN * theirs:
            held = "dni" if ours < theirs else base
        return {"time": words[self.ratio(self.dni, base).verdict()], "memory": held}

    def report(self) -> Result:
        """Gather all of it."""
        body = {
            "window": self.window,
            "long": self.long,
            "ratios": ratios(self.timings, self.timings),
            "cheaper": {base: self.cheaper(base) for base in self.memory if base != self.dni},
            "gate": self.gate,
            "per_step": PER_STEP,
        }
        return self._gathered("verdict lstm", body)


# ------------------------------------------------------------------------------------------ steps


class _Stream:
    """An LSTM trained window by window inside a network: a fixed gradient arrives at its outputs,
    and its input's producer asks for one. The state goes on from window to window."""

    def __init__(
        self,
        lstm: nn.Module,
        window: Tensor,
        arriving: Tensor,
        rule: Rule,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.lstm, self.arriving = lstm, arriving
        self.x = window.detach().clone().requires_grad_()
        self.options = options or {}
        self.optimizer: torch.optim.Optimizer
        self.ours = isinstance(lstm, FusedDNILSTM)
        self.optimizer = FusedOptimizer(lstm) if self.ours else stock_optimizer(lstm, rule)
        self.state: tuple[Tensor, Tensor] | None = None

    def step(self) -> None:
        """Run a window, its backward and its update."""
        if not self.ours:
            self.optimizer.zero_grad()
        self.x.grad = None
        output, (h, c) = self.lstm(self.x, self.state, **self.options)
        output.backward(self.arriving)
        self.optimizer.step()
        self.state = h.detach(), c.detach()


@dataclass
class _Problem:
    """What all candidates are made from."""

    plain: nn.LSTM
    options: dict[str, Any]  # of the decoupled LSTM
    sample: Tensor  # a window of T2
    arriving: Tensor  # of T2 steps too
    backend: str | None

    def part(self, whole: Tensor, steps: int) -> Tensor:
        """Return the first ``steps`` of a tensor with steps and rows."""
        return whole.narrow(1 if self.plain.batch_first else 0, 0, steps).contiguous()

    def stream(self, kind: str, steps: int, rule: Rule, **options: Any) -> _Stream:
        """Return a candidate: ``backprop``, ``fused`` or ``dni`` at a window, from the same
        weights."""
        lstm: nn.Module = copy.deepcopy(self.plain)
        batch = self.sample.shape[0 if self.plain.batch_first else 1]
        call: dict[str, Any] = {}
        if kind != "backprop":
            chosen: dict[str, Any] = {"synthesizer": None}
            if kind == "dni":
                chosen = {**self.options, "synthesizer": copy.deepcopy(self.options["synthesizer"])}
            assert isinstance(lstm, nn.LSTM)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                lstm = FusedDNILSTM.from_lstm(
                    lstm, update=rule, backend=self.backend, **{**chosen, **options}
                )
            classes = getattr(lstm.synthesizer, "context_features", 0)
            if classes:
                generator = torch.Generator().manual_seed(0)
                labels = torch.randint(classes, (batch,), generator=generator)
                call["context"] = labels.to(self.sample.device)
        x, arriving = self.part(self.sample, steps), self.part(self.arriving, steps)
        # From a loss that is a mean over the steps and rows of the window.
        return _Stream(lstm, x, arriving / (steps * batch), rule, call)


def _gate(problem: _Problem, window: int, long: int) -> dict[str, Any]:
    """Check that the candidates compute the same windows before timing them.

    Two windows with SGD at rate 1 move every parameter by its gradients. Compared with ``nn.LSTM``:
    truncated backprop on our kernels at both windows, and DNI at T with a factor of zero on the
    synthetic gradient; there the synthesizer has to learn.
    """
    rule = SGD(1.0)
    problem = _Problem(**{**vars(problem), "plain": copy.deepcopy(problem.plain)})
    problem.plain.dropout = 0.0  # masks are drawn anew by each
    eps = torch.finfo(problem.sample.dtype).eps
    report: dict[str, Any] = {"checks": []}
    start = dict(problem.plain.named_parameters())

    def moved(stream: _Stream) -> dict[str, Tensor]:
        before = {name: p.detach().clone() for name, p in stream.lstm.named_parameters()}
        for _ in range(2):
            stream.step()
        return {name: p.detach() - before[name] for name, p in stream.lstm.named_parameters()}

    for name, steps, options in (
        ("fused", window, {}),
        ("fused", long, {}),
        ("dni", window, {"sg_scale": 0.0, "auxiliary": False}),
    ):
        wanted = moved(problem.stream("backprop", steps, rule))
        found = moved(problem.stream(name, steps, rule, **options))
        # The roundings of a sum grow with the root of its length, and every step and layer adds
        # its own. The subtraction rounds at the weight's size.
        rows = problem.sample.numel() // problem.sample.shape[-1]
        length = max(rows, *(p.shape[0] for p in start.values()))
        share = 8.0 * eps * math.sqrt(length) * math.sqrt(2 * steps * problem.plain.num_layers)
        worst = 0.0
        for parameter, move in wanted.items():
            wrong = (found[parameter] - move).abs().max().item()
            size = start[parameter].detach().abs().max().item()
            allowed = share * move.abs().max().item() + 8.0 * eps * size
            worst = max(worst, wrong / allowed if math.isfinite(wrong) else math.inf)
        row = f"{name} T={steps}"
        report["checks"].append({"name": row, "deviation_of_tolerance": worst})
        if not worst <= 1.0:
            raise GateError(
                f"no verdict: {row} disagrees with nn.LSTM by {worst:.3g} times the tolerance "
                "after two windows, so their times must not be compared"
            )
        pupils = [move for key, move in found.items() if key.startswith("synthesizer.")]
        if name == "dni" and not any(bool(move.any()) for move in pupils):
            raise GateError("no verdict: the synthesizer did not learn in a window")
    return report


# ----------------------------------------------------------------------------------------- verdict


def verdict_lstm(
    lstm: nn.LSTM | FusedDNILSTM,
    sample: Tensor,
    *,
    long: int | None = None,
    update: Rule | None = None,
    synthesizer: nn.Module | str = "default",
    seconds: float = VERDICT_SECONDS,
    backend: str | None = None,
    title: str | None = None,
    progress: Callable[[str, float], None] | bool = False,
) -> LSTMVerdict:
    """Measure what an LSTM costs by DNI at a window, by truncated backprop there, and by backprop
    at a longer window, on this machine.

    Args:
        lstm: an ``nn.LSTM``, or a :class:`fused_dni.FusedDNILSTM`, whose synthesizer, auxiliary
            head and factor on the synthetic gradient are then those measured. It is not changed.
        sample: a window of input [T, B, I] ([B, T, I] with ``batch_first``); it fixes T, batch and
            dtype.
        long: T2, the window that reaches the same quality by backprop; by default five times T.
        update: rule, by default ``Adam``. Its rate is replaced while timing.
        synthesizer: as in ``FusedDNILSTM``; "default" for the one that ``lstm`` has, if any.
        seconds: budget of the timed rounds of all candidates together.
        backend: force a backend of our kernels.
        title: name in table and sentence.
        progress: called with what is being done and the fraction done; True for bars.

    Returns:
        A :class:`LSTMVerdict`.

    Raises:
        GateError: a candidate's windows do not agree with nn.LSTM's; nothing is reported.
        VerdictError: ``lstm`` and ``sample`` do not fit, or the LSTM has no decoupled form.
        ValueError: an argument out of range.
    """
    timing.require_positive(seconds=seconds)
    say = teller(progress)
    update = update or Adam()
    rule = at_rate(update, TIMING_RATE)
    problem, window, long = _pose(lstm, sample, long, synthesizer, backend)

    say("checking", 0.0)
    gate = _gate(problem, window, long)
    say("checking", 1.0)

    streams: dict[str, tuple[int, _Stream]] = {}
    for kind, steps in (
        ("dni", window),
        ("fused", window),
        ("backprop", window),
        ("fused", long),
        ("backprop", long),
    ):
        streams[f"{kind} T={steps}"] = steps, problem.stream(kind, steps, rule)
    _spread(streams[f"dni T={window}"][1].lstm)
    calls: dict[str, Callable[[], object]] = {name: s.step for name, (_, s) in streams.items()}
    batch = problem.sample.shape[0 if problem.plain.batch_first else 1]
    calls[f"floor T={window}"] = timing.lstm_floor(
        window,
        batch,
        problem.plain.input_size,
        problem.plain.hidden_size,
        problem.plain.num_layers,
        dtype=sample.dtype,
        device=sample.device,
    )
    measured = timing.compare(
        calls,
        seconds=seconds,
        device=sample.device,
        progress=lambda fraction: say("measuring", fraction),
    )
    per_step = {
        name: timing.combine(name, [(1 / streams[name][0] if name in streams else 1 / window, t)])
        for name, t in measured.items()
    }
    memory = {
        name: timing.peak_memory(stream.step, sample.device)
        for name, (_, stream) in streams.items()
    }
    facts = facts_of(sample, update, problem.options["synthesizer"], 0, backend)
    return LSTMVerdict(
        title=title or _title(problem.plain, batch),
        window=window,
        long=long,
        timings=per_step,
        memory=memory,
        memory_is=timing.memory_is(sample.device),
        gate=gate,
        facts=facts,
    )


def _pose(
    lstm: nn.LSTM | FusedDNILSTM,
    sample: Tensor,
    long: int | None,
    synthesizer: nn.Module | str,
    backend: str | None,
) -> tuple[_Problem, int, int]:
    """Check the arguments and make what all candidates are made from; T and T2."""
    options: dict[str, Any] = {"synthesizer": synthesizer}
    if isinstance(lstm, FusedDNILSTM):
        if synthesizer == "default" and lstm.synthesizer is not None:
            options["synthesizer"] = lstm.synthesizer
        options |= {
            "auxiliary": lstm.auxiliary_head is not None,
            "sg_scale": lstm.sg_scale,
            "max_norm": lstm.max_norm,
            "target_scale": lstm.target_scale,
        }
        backend = backend or lstm.backend
        lstm = lstm.to_lstm()
    if type(lstm) is not nn.LSTM:
        raise VerdictError(f"lstm must be an nn.LSTM or FusedDNILSTM, got {type(lstm).__name__}")
    if lstm.bidirectional or lstm.proj_size:
        what = "a bidirectional LSTM" if lstm.bidirectional else "an LSTM with projections"
        raise VerdictError(f"{what} has no decoupled form")
    check_sample(sample)
    order = "[B, T, I]" if lstm.batch_first else "[T, B, I]"
    if sample.dim() != 3 or sample.shape[2] != lstm.input_size or not sample.numel():
        raise VerdictError(
            f"sample must be a window {order} with I = {lstm.input_size}, got {list(sample.shape)}"
        )
    axis = 1 if lstm.batch_first else 0
    window = sample.shape[axis]
    long = LONGER * window if long is None else long
    if long <= window:
        raise VerdictError(f"long must be longer than the window of {window} steps, got {long}")
    plain = copy.deepcopy(lstm).train()
    repeats = [1, 1, 1]
    repeats[axis] = -(-long // window)
    whole = sample.detach().repeat(repeats).narrow(axis, 0, long)
    generator = torch.Generator().manual_seed(0)
    arriving = torch.randn(*whole.shape[:2], plain.hidden_size, generator=generator)
    problem = _Problem(
        plain, options, whole, arriving.to(device=sample.device, dtype=sample.dtype), backend
    )
    with trying(VerdictError, "the LSTM cannot be measured"):
        with torch.no_grad():
            plain(sample)
        problem.stream("dni", window, SGD())
    return problem, window, long


def _spread(lstm: nn.Module) -> None:
    """Give heads that start at zero small numbers, so that what is timed is ordinary."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in lstm.named_parameters():
            if name.startswith(("synthesizer.", "auxiliary_head.")):
                noise = torch.randn(p.shape, generator=generator) * 0.01
                p.add_(noise.to(device=p.device, dtype=p.dtype))


def _title(lstm: nn.LSTM, batch: int) -> str:
    layers = "" if lstm.num_layers == 1 else f", {lstm.num_layers} layers,"
    return f"an LSTM {lstm.input_size} to {lstm.hidden_size}{layers} at batch {batch}"
