"""Where the programs of the Triton kernels meet: whose words these are, and who waits in vain.

That programs agree on what they pass is test_triton_barrier.py's affair. Here: words and workspaces
are a stream's own, and a captured launch's; nothing of a capture is zeroed in it; a missing arrival
ends in an exception, whichever barrier it is missing at, and changes no parameter. Streams and
captures are pretended: what is looked at is what launches are handed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from strategies import (
    Case,
    LSTMCase,
    bind,
    bind_lstm,
    lstm_rows,
    make_case,
    make_lstm,
    slots_of_step,
)
from torch import Tensor

from fused_dni.ops import registry
from fused_dni.ops.types import STATISTICS_SIZE

registry_reason = dict(registry.report())["triton"]
if registry_reason is not None:
    pytest.skip(f"triton {registry_reason}", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("streams are pretended and kernels interpreted", allow_module_level=True)

from fused_dni.kernels import barrier, linear, lstm, synthesizer, tuning  # noqa: E402
from fused_dni.kernels.launch import Launch  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

from fused_dni.backends.triton import backend as adapter  # noqa: E402
from fused_dni.backends.triton import launching  # noqa: E402
from fused_dni.backends.triton import lstm as lstm_adapter  # noqa: E402

BACKEND = registry.get("triton")
CPU = torch.device("cpu")
TOP = 1 << 31
GARBAGE = 12345
# Tiles that hold neither all rows nor all features, in one launch.
TILES = linear.Tiles("one", 16, 16, 16, 16, 16, 32, 32, 16, 16, 4, 1)
SYNTHESIZER_TILES = synthesizer.Tiles("one", 16, 32, 32, 16, 16, 4, 1)
WINDOW = lstm.WindowTiles(True, 16, 32, 16, 1, 2)
PLAIN: dict[str, Any] = {
    "bias": True, "affine": True, "synthesizer_bias": True, "frozen": None, "need_dx": True,
    "activation": "tanh", "max_norm": 0.0, "interface": "output", "context": None,
    "normalization": "batch", "kind": "lowrank", "rule": "adam",
}  # fmt: skip
RECURRENT: dict[str, Any] = {
    "rule": "adamw", "bias": True, "lengths": False, "dropout": False, "need_dx": True,
    "arriving": "output h c", "frozen": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has run yet, patience is short, tiles are small."""
    monkeypatch.setattr(launching, "_shared", {})
    monkeypatch.setenv("FUSED_DNI_SPIN_BOUND", "5")
    forced = {f"linear_{op}": TILES for op in ("step", "forward", "backward", "update")}
    forced |= {f"synthesizer_{op}": SYNTHESIZER_TILES for op in ("predict", "train")}
    forced |= {f"lstm_{op}": WINDOW for op in ("forward", "backward")}
    monkeypatch.setattr(tuning, "_forced", forced)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``at.stream`` is the current stream, None a captured one: there no kernel runs, and what is
    zeroed is not. ``at.launches``: what was launched, each with its stream."""
    now = SimpleNamespace(stream=0, launches=[])
    for module in (launching, adapter, lstm_adapter):
        monkeypatch.setattr(module, "stream", lambda _: now.stream)
    run = Launch.run

    def record(launch: Launch) -> None:
        now.launches.append((now.stream, launch))
        if now.stream is not None:
            run(launch)

    monkeypatch.setattr(Launch, "run", record)

    def garbage(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            return t.fill_(GARBAGE) if now.stream is None else t

        return made

    monkeypatch.setattr(torch, "zeros", garbage(torch.zeros))
    monkeypatch.setattr(torch.Tensor, "new_zeros", garbage(torch.Tensor.new_zeros))
    return now


def tensors_of(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, torch.Tensor):
        yield arguments
    elif isinstance(arguments, (tuple, dict)):
        for each in arguments.values() if isinstance(arguments, dict) else arguments:
            yield from tensors_of(each)


def barriers_of(arguments: Any) -> Iterator[barrier.GridBarrier]:
    if isinstance(arguments, barrier.GridBarrier):
        yield arguments
    elif isinstance(arguments, (tuple, dict)):
        for each in arguments.values() if isinstance(arguments, dict) else arguments:
            yield from barriers_of(each)


def words(launch: Launch) -> Tensor:
    (found,) = barriers_of(launch.arguments)
    assert isinstance(found.words, torch.Tensor)
    return found.words


def addresses(words: Tensor) -> set[int]:
    return {words.data_ptr() + 4 * i for i in range(len(words))}


def linear_case(options: dict[str, Any] | None = None) -> Case:
    return make_case((35, 20, 37, 5, 7), PLAIN | (options or {}), 1, torch.float32)


def bound_step(case: Case) -> Callable[[], object]:
    """A step of this layer."""
    state, _ = bind(case)
    rule = state.tensors(slots_of_step(case))
    step = BACKEND.bind_step(case.layer(), case.config, case.synthesizer(), 0.0, rule)
    return lambda: step(case.inputs["x"], None, 35.0, True, True)


def taught(case: Case) -> Callable[[], object]:
    """A step of training the synthesizer of this layer."""
    _, state = bind(case)
    tensors = case.synthesizer()
    rule = state.tensors(tensors.parameters())
    h = case.inputs["grad_h"]
    statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64)
    prediction = BACKEND.synthesizer_predict(h, tensors, None)
    return lambda: BACKEND.synthesizer_update_(
        h, prediction, h, tensors, None, 35.0, statistics, rule
    )


def window(case: LSTMCase) -> Callable[[], object]:
    """A window forwards and backwards."""
    given, layers = case.inputs, case.stack()
    x = given["x"]

    def run() -> object:
        trace = BACKEND.lstm_forward(x, given["h"], given["c"], layers, None, (), True)
        return BACKEND.lstm_backward(
            given["grad_output"], None, None, x, layers, None, (), trace, True, True
        )

    return run


def lstm_case() -> LSTMCase:
    return make_lstm((3, 20, 5, 27, 2), RECURRENT, 1, torch.float32)


def parts(case: Case) -> Callable[[], object]:
    """Forward, backward and prediction, which bind nothing."""
    x, grad_h, layer = case.inputs["x"], case.inputs["grad_h"], case.layer()

    def run() -> object:
        h, saved = BACKEND.linear_forward(x, layer, case.config, True, True)
        BACKEND.linear_backward(grad_h, x, h, saved, layer, case.config, True, True, True)
        return BACKEND.synthesizer_predict(h, case.synthesizer(), None)

    return run


CALLS: dict[str, Callable[[], Callable[[], object]]] = {
    "step": lambda: bound_step(linear_case()),
    "parts": lambda: parts(linear_case()),
    "window": lambda: window(lstm_case()),
}

# ---------------------------------------------------------------------------------------------
# Whose words


@pytest.mark.parametrize("call", CALLS)
def test_streams_share_no_words_and_no_workspace(call: str, at: SimpleNamespace) -> None:
    """Interleaved, on a layer of both: not a word that another stream meets at, nor anything that
    is written, but for what an op is there to write."""
    run = CALLS[call]()
    at.launches.clear()  # what made the case
    kept = []
    for at.stream in (1, 2, 1, 2):
        kept.append(run())
    on: dict[int, list[Launch]] = {1: [], 2: []}
    for stream, launch in at.launches:
        on[stream].append(launch)
    met = {s: set.union(*[addresses(words(one)) for one in launches]) for s, launches in on.items()}
    assert not met[1] & met[2]
    assert len({words(one).data_ptr() for one in on[1]}) == 1  # serial: one is enough
    used = {
        s: set.union(*[memory(one.arguments) for one in launches]) for s, launches in on.items()
    }
    shared = launching.shared_by(CPU, 0)
    assert used[1] & used[2] <= memory(tuple(_given(run))) | memory((shared.words, shared.record))


def memory(arguments: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors_of(arguments) if t.numel()}


def _given(run: Callable[[], object]) -> Iterator[Any]:
    """All that a call was given: the same on every stream."""
    for cell in run.__closure__ or ():
        held = cell.cell_contents
        if isinstance(held, (Case, LSTMCase)):
            yield tuple(held.parameters.values())
            yield tuple(held.inputs.values())
        elif isinstance(held, adapter._Step):
            yield held.fixed
        else:
            yield held


def test_a_device_has_words_of_its_own(at: SimpleNamespace) -> None:
    """The default stream is number 0 on each."""
    own = [launching.barrier_on(torch.device(name), 0) for name in ("cpu", "cpu:0")]
    assert not addresses(own[0].words) & addresses(own[1].words)
    assert own[0].record.data_ptr() != own[1].record.data_ptr()


@pytest.mark.parametrize("call", CALLS)
def test_captured_first_then_run_eagerly(call: str, at: SimpleNamespace) -> None:
    """Before any replay: words are zero, and those of the graph are nobody else's."""
    bound_step(linear_case({"kind": "dense"}))()  # something else of the backend has run
    run = CALLS[call]()
    at.launches.clear()
    at.stream = None
    kept, taken = [], []
    for at.stream in (None, None, 0):
        at.launches.clear()
        kept.append(run())
        met = [words(launch) for _, launch in at.launches]
        assert all(not (w & (TOP - 1)).any() for w in met)
        taken.append(set.union(*map(addresses, met)))
    assert all(not a & b for a, b in itertools.combinations(taken, 2))


def test_a_captured_step_has_a_workspace_of_its_own(at: SimpleNamespace) -> None:
    """Replays run beside eager calls, which neither see it nor keep it."""
    run = CALLS["step"]()
    kept, written = [], []
    for at.stream in (0, None, None, 0):
        at.launches.clear()
        kept.append(run())
        ((_, launch),) = at.launches
        t = launch.arguments["t"]
        written.append({name: getattr(t, name) for name in ("partial", "moments", "delta")})
    for name in written[0]:
        eager, first, second, again = [made[name].data_ptr() for made in written]
        assert eager == again and eager != first != second != eager, name


def test_a_bound_step_may_be_captured_first(at: SimpleNamespace) -> None:
    run = CALLS["step"]()
    assert not at.launches
    at.stream = None
    run()
    ((_, launch),) = at.launches
    assert not words(launch).any()


def test_a_capture_in_which_nothing_can_be_zeroed_is_refused(at: SimpleNamespace) -> None:
    """Before anything is changed; and what comes afterwards is as if it had not been."""
    case = lstm_case()
    run = window(case)
    before = {name: t.clone() for name, t in case.inputs.items()}
    at.stream = None
    with pytest.raises(RuntimeError, match=r"being captured.*run a step outside of the capture"):
        run()
    assert not at.launches
    assert all(torch.equal(t, before[name]) for name, t in case.inputs.items())
    at.stream = 0
    run()
    at.stream = None
    run()


def test_words_that_run_out_in_a_capture(at: SimpleNamespace) -> None:
    """Are made again by the next eager call, of which there is one now and then."""
    launching.barrier_on(CPU, 0)
    used = launching._BLOCK // launching._SECTOR - 1
    taken = [launching.barrier_on(CPU, None).words.data_ptr() for _ in range(used)]
    assert len(set(taken)) == used
    with pytest.raises(RuntimeError, match="is used up: run a step outside"):
        launching.barrier_on(CPU, None)
    launching.barrier_on(CPU, 0)
    later = launching.barrier_on(CPU, None, 11).words
    assert len(later) >= 11 and not later.any()
    assert not addresses(later) & set(taken)
    # A graph keeps only the address: the memory is never given back.
    kept = set.union(*map(addresses, launching.shared_by(CPU, 0).blocks))
    assert addresses(later) | set(taken) <= kept


# ---------------------------------------------------------------------------------------------
# Who waits in vain


class Planted:
    """In the place of a kernel's ``wait_for_all``: at its ``missing``-th barrier one program more
    is waited for than there is."""

    def __init__(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real, self.count, self.missing = module.wait_for_all, 0, 0
        monkeypatch.setattr(module, "wait_for_all", self)

    def __call__(self, where: Any, group: Any, programs: Any, *rest: Any) -> Any:
        self.count += 1
        return self.real(where, group, programs + (self.count == self.missing), *rest)


def state_of(case: Case | LSTMCase) -> list[Tensor]:
    return [p.detach().clone() for p in case.parameters.values()]


STEPS: list[tuple[str, dict[str, Any]]] = [
    ("step", {}),
    ("step", {"kind": "dense", "normalization": "layer", "rule": "momentum", "need_dx": False}),
    ("step", {"kind": "diagonal", "normalization": None, "interface": "preactivation"}),
    ("taught", {}),
    ("taught", {"kind": "dense"}),
]


@pytest.mark.parametrize(("what", "options"), STEPS)
def test_a_missing_arrival_ends_in_an_exception(
    what: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every barrier in turn: no parameter moves, the next call says where it was, and the one
    behind that runs as if nothing had been."""
    module = {"step": linear, "taught": synthesizer}[what]
    planted = Planted(module, monkeypatch)
    make = {"step": bound_step, "taught": taught}[what]
    phases = []
    while True:
        case = linear_case(options)
        planted.count, planted.missing = 0, 0
        run = make(case)
        planted.count, planted.missing = 0, len(phases) + 1
        before = state_of(case)
        run()
        if planted.count < planted.missing:
            break
        assert planted.count == planted.missing  # who did not pass goes to no other barrier
        assert all(torch.equal(a, b) for a, b in zip(state_of(case), before, strict=True))
        with pytest.raises(RuntimeError, match=rf"{module.KERNEL.name}, in front of phase '") as e:
            run()
        assert "gave up after 5 looks (FUSED_DNI_SPIN_BOUND" in str(e.value)
        assert ("N = 35, I = 20, O = 37" if what == "step" else "N = 35, O = 37") in str(e.value)
        assert all(torch.equal(a, b) for a, b in zip(state_of(case), before, strict=True))
        phases.append(str(e.value).split("'")[3])
        run()
        assert not all(torch.equal(a, b) for a, b in zip(state_of(case), before, strict=True))
    assert phases == sorted(phases, key=module.PHASES.index)
    assert phases, "no barrier"


def test_programs_that_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of two, which are interpreted one after the other: the first waits in vain, and the
    second, which comes too late, passes no barrier either."""
    monkeypatch.setattr(adapter, "resident", lambda _: 2)
    case = linear_case()
    run, before = bound_step(case), state_of(case)
    run()
    assert all(torch.equal(a, b) for a, b in zip(state_of(case), before, strict=True))
    with pytest.raises(RuntimeError, match="linear_kernel, in front of phase 'normalize'"):
        run()


def test_later_launches_of_the_stream_change_nothing_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that were on their way before anybody could know."""
    planted = Planted(linear, monkeypatch)
    case, other = linear_case(), linear_case({"kind": "dense"})
    run, follow = bound_step(case), bound_step(other)
    before = state_of(case) + state_of(other)
    planted.missing = 2
    run()
    monkeypatch.setattr(launching._Shared, "fail", lambda self: None)
    follow()
    now = state_of(case) + state_of(other)
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
    monkeypatch.undo()
    assert launching.barrier.describe([1, 3, 35, 20, 37], launching._KERNELS, 5).startswith(
        "linear_kernel, in front of phase 'reduce', for N = 35, I = 20, O = 37: "
    )


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_window_whose_programs_do_not_meet(
    direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written behind the step; and nothing is updated by what it left."""
    planted = Planted(lstm, monkeypatch)
    case = make_lstm((4, 9, 5, 27, 1), RECURRENT, 1, torch.float32)
    given, layers = case.inputs, case.stack()
    x = given["x"]
    if direction == "forward":
        planted.missing = 2
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: _nan(empty(*a, **k))
    )  # fmt: skip
    trace = BACKEND.lstm_forward(x, given["h"], given["c"], layers, None, (), True)
    if direction == "forward":
        assert trace.hidden[0, :3].isfinite().all() and trace.hidden[0, 3:].isnan().all()
        assert trace.cells is not None and trace.cells[0, 2:].isnan().all()
        said = "lstm_window_forward, behind step 1, for T = 4, B = 9, H = 27"
    else:
        planted.missing = planted.count + 3
        like = torch.empty_like
        monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _nan(like(*a, **k)))
        made = BACKEND.lstm_backward(
            given["grad_output"], None, None, x, layers, None, (), trace, False, False
        )
        assert made.delta[0, 1:].isfinite().all() and made.delta[0, 0].isnan().all()
        assert made.h.isnan().all() and made.c.isnan().all()
        said = "lstm_window_backward, behind step 1, for T = 4, B = 9, H = 27"
    with pytest.raises(RuntimeError, match=said):
        BACKEND.lstm_forward(x, given["h"], given["c"], layers, None, (), True)
    again = BACKEND.lstm_forward(x, given["h"], given["c"], layers, None, (), True)
    assert again.h.isfinite().all()


def _nan(t: Tensor) -> Tensor:
    return t.fill_(torch.nan) if t.is_floating_point() else t


def test_no_update_by_what_a_window_left_that_waited_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its gradient may be finite: the update looks at the record, and counts as skipped."""
    case = make_lstm((4, 9, 5, 27, 1), {**RECURRENT, "lengths": False}, 1, torch.float32)
    given = case.inputs
    trace = BACKEND.lstm_forward(given["x"], given["h"], given["c"], case.stack(), None, (), True)
    made = BACKEND.lstm_backward(
        given["grad_output"], None, None, given["x"], case.stack(), None, (), trace, False, False
    )
    rows = lstm_rows(case, trace.hidden, made.delta, case.alive())
    state = bind_lstm(case)
    rule, before = state.tensors(case.slots()), state_of(case)
    monkeypatch.setattr(launching._Shared, "fail", lambda self: None)
    for number, steps, skipped in ((lstm_number(), 0, 1), (0, 1, 1)):
        launching.shared_by(CPU, 0).record[0] = number
        BACKEND.lstm_update_(rows, case.stack(), rule)
        assert (state.steps, state.skipped) == (steps, skipped)
        moved = [
            not torch.equal(a, b) for a, b in zip(state_of(case), before, strict=True)
        ]  # fmt: skip
        assert all(moved) if steps else not any(moved)


def lstm_number() -> int:
    return int(barrier.LSTM_BACKWARD.value)


@pytest.mark.parametrize("said", ["-1", "", "1.5", "2147483648", "²", "none"])
def test_a_bound_that_is_none_is_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_DNI_SPIN_BOUND", said)
    with pytest.raises(ValueError, match=r"FUSED_DNI_SPIN_BOUND is how often .* from 0"):
        CALLS["window"]()()


def test_the_bound_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launching.barrier_on(CPU, 0).bound == 5
    for said, bound in (("0", 0), ("2147483647", 2**31 - 1), (None, 2**21)):
        monkeypatch.setattr(launching, "_shared", {})
        if said is None:
            del os.environ["FUSED_DNI_SPIN_BOUND"]
        else:
            monkeypatch.setenv("FUSED_DNI_SPIN_BOUND", said)
        assert launching.barrier_on(CPU, 0).bound == bound


# ---------------------------------------------------------------------------------------------
# Where programs do not meet


def test_a_diagonal_synthesizers_tiles_have_to_be_alike(at: SimpleNamespace) -> None:
    """A program reads what it wrote itself: said by the launcher, and by the compiler."""
    options = {"kind": "diagonal", "normalization": None}
    for tiles in (TILES._replace(product_outs=32), TILES._replace(rows=32)):
        with tuning.using("linear_step", tiles):
            with pytest.raises(ValueError, match=r"diagonal synthesizer.*have to be alike"):
                bound_step(linear_case(options))()
            # Where something stands between them that others wrote, they need not be.
            bound_step(linear_case(options | {"normalization": "batch"}))()
            bound_step(linear_case(options | {"kind": "dense"}))()
    at.launches.clear()
    bound_step(linear_case(options))()
    ((_, launch),) = at.launches
    for field, size in (("product_outs", 32), ("rows", 32)):
        constants = launch.arguments["C"]._replace(**{field: size})
        with pytest.raises(InterpreterError, match="have to be alike"):
            launch._replace(arguments={**launch.arguments, "C": constants}).run()
