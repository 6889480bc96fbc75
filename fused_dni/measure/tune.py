"""Measuring the tiles of the Triton kernels for a shape, and then the backends, on scratch tensors.

An op is run once as it is, which tells what it asks :mod:`fused_dni.kernels.tuning` to choose, and
then with every candidate that its kernel file lists. The backends on a GPU are timed on what a
layer does most: :meth:`LinearScratch.whole`, :meth:`LSTMScratch.whole`. What is found is kept on
disk and serves every later process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_dni.kernels import tuning
from fused_dni.measure import timing
from fused_dni.measure.tiles import measure
from fused_dni.measure.tiles import tune as tune_tiles
from fused_dni.ops import measured, registry
from fused_dni.ops.types import (
    STATISTICS_SIZE,
    LinearConfig,
    LinearTensors,
    LSTMLayer,
    LSTMRows,
    SynthesizerTensors,
)
from fused_dni.rules import Rule, RuleState

#: Learning rate on scratch tensors, which thousands of updates must not drive out of range.
_RATE = 1e-9


@dataclass(frozen=True)
class Tuned:
    """What came of one op.

    Attributes:
        choice: what was chosen for: op, shape, dtype, device (``fused_dni.kernels.tuning.Choice``).
        tiles: the tiles from now on.
        usual: those before.
        trials: all candidates (``fused_dni.measure.tiles.Trial``), the fastest first.
    """

    choice: Any
    tiles: Any
    usual: Any
    trials: list[Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data; seconds."""
        return {
            "op": self.choice.op,
            "variant": self.choice.variant,
            "shape": list(self.choice.shape),
            "dtype": str(self.choice.dtype).removeprefix("torch."),
            "tiles": self.tiles._asdict(),
            "usual": self.usual._asdict(),
            "trials": [
                {
                    "tiles": trial.tiles._asdict(),
                    "timing": None if trial.timing is None else trial.timing.to_json(),
                    "skipped": trial.skipped,
                }
                for trial in self.trials
            ],
        }

    def table(self) -> str:
        """Return a line a candidate: its time and spread, and how it differs from the tiles
        before."""
        sizes = "x".join(map(str, self.choice.shape))
        name = str(self.choice.dtype).removeprefix("torch.")
        rows = []
        for trial in self.trials:
            before = self.usual._asdict()
            changes = [f"{k}={v}" for k, v in trial.tiles._asdict().items() if before[k] != v]
            taken = trial.timing
            figures = f"{'-':>9}  {'':>17}"
            if taken is not None:
                spread = f"{taken.p10 * 1e6:.2f}-{taken.p90 * 1e6:.2f}"
                figures = f"{taken.median * 1e6:9.2f}  {spread:>17}"
            said = ["as before" if not changes else " ".join(changes)]
            said += ["chosen"] if trial.tiles == self.tiles else []
            said += [trial.skipped] if trial.skipped is not None else []
            rows.append(f"{figures}  {'; '.join(said)}")
        head = f"{'us':>9}  {'p10-p90':>17}  {self.choice.op} {sizes} {name} {self.choice.variant}"
        return "\n".join([head.rstrip(), *rows])


@dataclass(frozen=True)
class Ranked:
    """What came of the backends.

    Attributes:
        op: "linear" or "lstm".
        sizes: its sizes, as in :mod:`fused_dni.ops.measured`.
        dtype: of x.
        timings: of one call of each that ran, by name, the fastest first.
        skipped: why the others did not.
        kept: whether there were two or more to choose from, which are in the table then.
    """

    op: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    timings: dict[str, timing.Timing]
    skipped: dict[str, str]

    @property
    def kept(self) -> bool:
        return len(self.timings) > 1

    def to_json(self) -> dict[str, Any]:
        """Plain data; seconds."""
        return {
            "op": self.op,
            "sizes": list(self.sizes),
            "dtype": str(self.dtype).removeprefix("torch."),
            "timings": {name: taken.to_json() for name, taken in self.timings.items()},
            "skipped": self.skipped,
            "kept": self.kept,
        }

    def table(self) -> str:
        """Return a line a backend: its time and spread, and how it compares with the fastest."""
        sizes, name = "x".join(map(str, self.sizes)), str(self.dtype).removeprefix("torch.")
        rows = [f"{'us':>9}  {'p10-p90':>17}  backends: {self.op} {sizes} {name}"]
        best = next(iter(self.timings.values()), None)
        for backend, taken in self.timings.items():
            spread = f"{taken.p10 * 1e6:.2f}-{taken.p90 * 1e6:.2f}"
            if taken is best:
                said = "first from now on" if self.kept else "the only one that runs"
            else:
                assert best is not None
                ratio = timing.ratio(taken, best)
                said = f"{ratio.median:.2f} times as long"
                if ratio.verdict() == "inconclusive":
                    said += ", within the spread"
            rows.append(f"{taken.median * 1e6:9.2f}  {spread:>17}  {backend}; {said}")
        rows += [f"{'-':>9}  {'':>17}  {name}; {why}" for name, why in self.skipped.items()]
        return "\n".join(rows)


class LinearScratch:
    """A Linear-normalisation-activation of its own, and a way to run each of its ops.

    Args:
        backend: the one to run them.
        shape: N, I, O.
        dtype: of x; parameters are float32.
        update: its rule.
        rank, classes: of the synthesizer; 0 for a dense one, and for no context.
    """

    def __init__(
        self,
        backend: Any,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        config: LinearConfig,
        update: type[Rule],
        rank: int,
        classes: int,
    ) -> None:
        rows, inputs, outputs = shape
        rank = min(rank, outputs)

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*sizes, device=device) / sizes[-1] ** 0.5)

        self.backend, self.config = backend, config
        self.x = torch.randn(rows, inputs, device=device).to(dtype)
        self.g = torch.randn(rows, outputs, device=device).to(dtype) / rows
        self.scale = float(rows)
        norm = config.normalization
        self.layer = LinearTensors(
            parameter(outputs, inputs),
            None if norm == "batch" else parameter(outputs),
            None if norm is None else parameter(outputs),
            None if norm is None else parameter(outputs),
            torch.zeros(outputs, device=device) if norm == "batch" else None,
            torch.ones(outputs, device=device) if norm == "batch" else None,
        )
        self.synthesizer = SynthesizerTensors(
            "lowrank" if rank else "dense",
            parameter(outputs, rank or outputs),
            parameter(rank, outputs) if rank else None,
            parameter(outputs, classes) if classes else None,
            parameter(outputs),
        )
        self.labels = torch.randint(classes, (rows,), device=device) if classes else None
        rule = update(lr=_RATE)  # type: ignore[call-arg]
        self.rule = RuleState(rule).tensors(self.layer[:4])
        self.synthesizer_rule = RuleState(rule).tensors(self.synthesizer.parameters())
        self.statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64, device=device)

    name = "linear"
    ops = (
        "linear_step",
        "linear_forward",
        "linear_backward",
        "linear_update",
        "synthesizer_predict",
        "synthesizer_train",
    )
    #: Of these, what :meth:`whole` takes.
    parts = ("linear_step",)

    @property
    def sizes(self) -> tuple[int, ...]:
        """N, I, O."""
        outputs, inputs = self.layer.weight.shape
        return (self.x.shape[0], inputs, outputs)

    def whole(self) -> Callable[[], object]:
        """Return a callable that backends are compared by: the decoupled step."""
        return self.prepared("linear_step")

    def prepared(self, op: str) -> Callable[[], object]:
        """Return a callable that runs the op."""
        ours, x, layer, config = self.backend, self.x, self.layer, self.config
        if op == "linear_step":
            step = ours.bind_step(layer, config, self.synthesizer, 0.0, self.rule)
            return lambda: step(x, self.labels, self.scale, False, False)
        if op == "linear_forward":
            return lambda: ours.linear_forward(x, layer, config, True, True)
        h, saved = ours.linear_forward(x, layer, config, True, True)
        backward = (self.g, x, h, saved, layer, config, True, True, False)
        if op == "linear_backward":
            return lambda: ours.linear_backward(*backward)
        if op == "linear_update":
            gradients = ours.linear_backward(*backward)
            return lambda: ours.linear_update_(x, gradients, layer, self.rule)
        if op == "synthesizer_predict":
            return lambda: ours.synthesizer_predict(h, self.synthesizer, self.labels)
        prediction = ours.synthesizer_predict(h, self.synthesizer, self.labels)
        train = (self.g, self.synthesizer, self.labels, self.scale, self.statistics)
        return lambda: ours.synthesizer_update_(h, prediction, *train, self.synthesizer_rule)


class LSTMScratch:
    """A one-layer window of its own, and a way to run each of its ops.

    Args:
        backend: the one to run them.
        shape: T, B, I, H.
        dtype: of x; parameters are float32.
        update: its rule.
    """

    def __init__(
        self,
        backend: Any,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        update: type[Rule],
    ) -> None:
        steps, batch, inputs, hidden = shape
        self.backend = backend
        self.x = torch.randn(steps, batch, inputs, device=device).to(dtype)
        self.g = torch.randn(steps, batch, hidden, device=device).to(dtype) / (steps * batch)
        self.state = torch.zeros(1, batch, hidden, device=device, dtype=dtype)

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*sizes, device=device) * hidden**-0.5)

        gates = 4 * hidden
        self.layer = LSTMLayer(
            parameter(gates, inputs), parameter(gates, hidden), parameter(gates), parameter(gates)
        )
        self.rule = RuleState(update(lr=_RATE)).tensors(self.layer)  # type: ignore[call-arg]

    name = "lstm"
    ops = ("lstm_forward", "lstm_backward", "lstm_update")
    #: Of these, what :meth:`whole` takes.
    parts = ops[:2]

    @property
    def sizes(self) -> tuple[int, ...]:
        """T, B, I, H."""
        return (*self.x.shape, self.g.shape[2])

    def whole(self) -> Callable[[], object]:
        """Return a callable that backends are compared by: the window forwards and backwards,
        gradients of the weights and of the input."""
        ours, x, layers, none = self.backend, self.x, (self.layer,), (None, ())

        def window() -> None:
            trace = ours.lstm_forward(x, self.state, self.state, layers, *none, True)
            ours.lstm_backward(self.g, None, None, x, layers, *none, trace, True, True)

        return window

    def prepared(self, op: str) -> Callable[[], object]:
        """Return a callable that runs the op."""
        ours, x, layers, none = self.backend, self.x, (self.layer,), (None, ())
        forward = (x, self.state, self.state, layers, *none, True)
        if op == "lstm_forward":
            return lambda: ours.lstm_forward(*forward)
        trace = ours.lstm_forward(*forward)
        backward = (self.g, None, None, x, layers, *none, trace, True, False)
        if op == "lstm_backward":
            return lambda: ours.lstm_backward(*backward)
        delta: Tensor = ours.lstm_backward(*backward).delta
        flat = [t.flatten(0, 1) for t in (x, trace.hidden[0, :-1], delta[0])]
        rows = (LSTMRows(*flat),)
        return lambda: ours.lstm_update_(rows, layers, self.rule)


def candidates(choice: Any, usual: Any) -> Iterator[Any]:
    """Tiles to try for a choice, those in use first."""
    from fused_dni.backends.triton.lstm import machine
    from fused_dni.kernels import linear, lstm

    yield usual
    if choice.op.startswith("lstm"):
        here = machine(choice.device)
        if here is None:
            return
        if choice.op == "lstm_update":
            yield from lstm.update_candidates(choice.shape[1], here)
        else:
            backward = choice.op == "lstm_backward"
            yield from lstm.window_candidates(*choice.shape, backward, here)
        return
    families = [usual]
    for launches in ("one", "several"):
        if launches != usual.launches:
            families.append(usual._replace(launches=launches))
    for tiles in families:
        if choice.op.startswith("linear"):
            tiles = tiles._replace(descriptors=tiles.descriptors and tiles.launches == "several")
            yield from linear.tile_candidates(tiles)
        else:
            yield tiles


def tune(
    make: Callable[[], LinearScratch | LSTMScratch],
    ops: Sequence[str],
    device: torch.device,
    *,
    seconds: float = 1.0,
    progress: Callable[[str, float], None] | None = None,
) -> Iterator[Tuned]:
    """Tune ops of a scratch layer, one after the other.

    Args:
        make: gives tensors that nobody needs; called for every candidate. It may draw random
            numbers, whose generators' state is put back.
        ops: of those that it has.
        device: of the tensors.
        seconds: budget of an op's timed calls; compiling comes on top.
        progress: called with an op and the share of its candidates that are compiled.

    Raises:
        RuntimeError: the current stream is capturing a CUDA graph, or no candidate of an op runs.
        OSError: the result cannot be written.
    """

    def scratch() -> LinearScratch | LSTMScratch:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return make()

    for op in ops:
        call = scratch().prepared(op)
        with tuning.recording() as found:
            call()
        ((choice, usual),) = [(c, tiles) for c, tiles in found.items() if c.op == op]
        tried = list(dict.fromkeys(candidates(choice, usual)))
        done = 0

        def prepare(tiles: Any, op: str = op, count: int = len(tried)) -> Callable[[], object]:
            nonlocal done
            own = scratch().prepared(op)

            def run() -> None:
                with tuning.using(op, tiles):
                    own()

            done += 1
            if progress is not None:
                progress(op, done / count)
            return run

        trials: list[Any] = []
        tiles = tune_tiles(choice, tried, prepare, seconds=seconds, report=trials.append)
        yield Tuned(choice, tiles, usual, trials)


def rank(
    make: Callable[[Any], LinearScratch | LSTMScratch],
    device: torch.device,
    *,
    seconds: float = 1.0,
    progress: Callable[[str, float], None] | None = None,
) -> Ranked:
    """Time the backends that serve tensors of this kind on a GPU, and have the fastest asked first
    from now on.

    Args:
        make: gives tensors that nobody needs, of a backend. It may draw random numbers, whose
            generators' state is put back.
        device: of the tensors.
        seconds: budget of the timed calls of all backends; compiling comes on top.
        progress: called with "backends" and the share of those that are ready.

    Raises:
        RuntimeError: the current stream is capturing a CUDA graph.
        OSError: the result cannot be written.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("backends cannot be timed while a CUDA graph is being captured")
    names = measured.BACKENDS
    made: list[LinearScratch | LSTMScratch] = []

    def prepare(name: Any) -> Callable[[], object]:
        if progress is not None:
            progress("backends", (names.index(name) + 1) / len(names))
        scratch = make(registry.get(name))
        made.append(scratch)
        weight = scratch.layer[0]
        registry.resolve(name, scratch.x, weight)  # or why not
        return scratch.whole()

    # Candidates of a choice are tiles elsewhere; nothing is asked of them but to be told apart.
    candidates: Any = names
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        trials = measure(candidates, prepare, device, seconds)
    timings = {str(trial.tiles): trial.timing for trial in trials if trial.timing is not None}
    skipped = {str(trial.tiles): trial.skipped for trial in trials if trial.skipped is not None}
    if not made:
        raise RuntimeError(f"no backend can be timed: {'; '.join(skipped.values())}")
    ranked = Ranked(made[0].name, made[0].sizes, made[0].x.dtype, timings, skipped)
    if ranked.kept:
        medians = {name: taken.median for name, taken in timings.items()}
        measured.remember(ranked.op, ranked.sizes, ranked.dtype, device, medians)
        registry.forget()
    return ranked


def report(found: list[Tuned], ranked: Ranked | None, device: torch.device) -> dict[str, Any]:
    """Say what was found, where it holds and where it is kept, as plain data."""
    import triton

    cuda = device.type == "cuda"
    return {
        "kind": "tune",
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "architecture": tuning.architecture(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kept in": str(tuning.folder()),
        "ops": [tuned.to_json() for tuned in found],
        "backends": None if ranked is None else ranked.to_json(),
    }
