"""How blocks of the CUDA kernels wait for each other: whose barrier word a launch has, streams and
graphs, a wait that nobody ends, a device that takes no clusters.

In the emulation, whose streams are queues that run side by side and in which a block can be made to
come to its barriers unseen; captures and streams are pretended (the words and workspaces that they
get are the backend's own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cuda_machine import BACKEND, CUDA, emulated
from strategies import (
    OPTIONS,
    Case,
    LSTMCase,
    bind,
    bind_lstm,
    lstm_rows,
    make_case,
    make_lstm,
    pairwise,
    slots,
    slots_of_step,
)
from torch import Tensor

from fused_dni.backends.cuda import backend, calls
from fused_dni.ops.types import BoundStep

CPU = torch.device("cpu")
BOUND = calls.spin_bound()
FULL = (torch.float32, torch.float32)
SMOOTH = {"frozen": None, "need_dx": True, "bias": True, "affine": True, "synthesizer_bias": True,
          "activation": "tanh", "max_norm": 0.0, "interface": "output"}  # fmt: skip
STEP: dict[str, Any] = {**pairwise(OPTIONS)[0], **SMOOTH, "normalization": "batch",
                        "kind": "lowrank", "context": "label"}  # fmt: skip
WINDOW: dict[str, Any] = {"rule": "sgd", "bias": True, "lengths": False, "dropout": False,
                          "need_dx": True, "arriving": "output h c", "frozen": None}  # fmt: skip
pytestmark = emulated


@pytest.fixture(autouse=True)
def _as_usual(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that was not used yet."""
    fresh = Fresh()
    for module in (calls, backend):
        monkeypatch.setattr(module, "words", fresh)
    CUDA.spin_bound(10**9)
    yield
    CUDA.emulate()
    CUDA.spin_bound(BOUND)


class Fresh:
    """``calls.words`` of a process that begins."""

    def __init__(self) -> None:
        self.of: dict[torch.device, calls.Words] = {}

    def __call__(self, device: torch.device) -> calls.Words:
        return self.of.setdefault(device, calls.Words(device))


@contextmanager
def on_stream(number: int) -> Iterator[None]:
    """What is launched here goes to this stream."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (calls, backend):
            patch.setattr(module, "current", lambda device: number)
        yield


@contextmanager
def capture() -> Iterator[list[tuple[int, int]]]:
    """What is launched here is not run, and memory that is zeroed here is not zero yet; yields the
    words and workspaces of the launches, by their addresses."""
    made: list[tuple[int, int]] = []
    zeros = torch.zeros

    def launch(op: Callable[..., int], items: tuple[Any, ...], room: Tensor) -> None:
        word, _ = calls.barrier(room.device)
        assert word is not None
        made.append((word[0], room.data_ptr()))
        kept.append(room)

    kept: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (calls, backend):
            patch.setattr(module, "capturing", lambda device: True)
        patch.setattr(backend, "launch", launch)
        patch.setattr(torch, "zeros", lambda *a, **k: zeros(*a, **k).fill_(0x7FFFFFFF))
        yield made


def step_of(case: Case) -> BoundStep:
    state, _ = bind(case)
    return BACKEND.bind_step(
        case.layer(), case.config, case.synthesizer(), 0.0, state.tensors(slots_of_step(case))
    )


def a_step(seed: int = 1) -> tuple[Case, Callable[[], list[Tensor]]]:
    """A step, the call of which returns all that it has made and changed."""
    case = make_case((45, 20, 37, 5, 7), STEP, seed, *FULL)
    step = step_of(case)

    def call() -> list[Tensor]:
        made = step(case.inputs["x"], case.inputs["context"], 45.0, True, True)
        assert made.prediction is not None
        # A launch that is deferred writes to all of it.
        parts = (made.h, made.dx, *made.prediction, *slots(case.layer()))
        return [t for t in parts if t is not None]

    return case, call


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------
# Captures


def test_a_step_that_is_captured_before_its_first_use_is_used_before_the_first_replay() -> None:
    expected = [t.clone() for t in a_step()[1]()]
    _, call = a_step()
    with capture() as captured:
        call()
    assert len(captured) == 1
    same(call(), expected)


def test_a_first_use_in_a_capture_leaves_no_word_that_others_use() -> None:
    """Where not even binding happened before: the graph zeroes a word of its own."""
    case = make_case((45, 20, 37, 5, 7), STEP, 1, *FULL)
    with capture() as captured:
        step = step_of(case)
        step(case.inputs["x"], case.inputs["context"], 45.0, True, True)
    words = calls.words(CPU)
    assert not words.of_stream and not words.spare and len(captured) == 1
    expected = [t.clone() for t in a_step()[1]()]
    made = step(case.inputs["x"], case.inputs["context"], 45.0, True, True)
    same([made.h, *(p for p in slots(case.layer()) if p is not None)], [expected[0], *expected[4:]])


def test_each_captured_launch_has_a_word_and_a_workspace_of_its_own() -> None:
    _, call = a_step()
    call()
    with capture() as captured:
        for _ in range(5):
            call()
    eager = {word.data_ptr() for word in calls.words(CPU).of_stream.values()}
    words, rooms = ({pair[i] for pair in captured} for i in (0, 1))
    assert len(words) == len(rooms) == 5 and not words & eager
    for word in words:
        assert word % 128 == min(words) % 128


def test_words_for_captures_do_not_run_out() -> None:
    """What a launch outside of a capture makes ready, and what a long capture does without it."""
    words = calls.Words(CPU)
    words.word(0)
    ready = len(words.spare)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "capturing", lambda device: True)
        taken = [words.word(0) for _ in range(ready + 3)]
        assert words.spare == []
        words.prepare()
        assert words.spare == []
    words.word(0)
    assert len(words.spare) == ready
    everything = [*taken, *words.spare, words.word(0)]
    assert len({t.data_ptr() for t in everything}) == len(everything)
    assert not any(t.any() for t in everything)
    # A graph may outlive whoever captured it.
    assert {t.untyped_storage().data_ptr() for t in taken[:ready]} <= {
        t.untyped_storage().data_ptr() for t in words.kept
    }


# ---------------------------------------------------------------------------------------------
# Streams


def test_streams_share_no_word_and_no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    _, call = a_step()
    real = backend.launch
    rooms: dict[int, set[tuple[int, int]]] = {}

    def launch(op: Any, items: tuple[Any, ...], room: Tensor) -> None:
        word, stream = calls.barrier(room.device)
        assert word is not None
        rooms.setdefault(stream, set()).add((word[0], room.data_ptr()))
        real(op, items, room)

    monkeypatch.setattr(backend, "launch", launch)
    for number in (1, 2, 1, 2):
        with on_stream(number):
            call()
    (one,), (other,) = rooms.values()
    assert one[0] != other[0] and one[1] != other[1]


def test_launches_of_two_streams_run_side_by_side() -> None:
    """And give what they give one after the other."""
    expected = [[t.clone() for t in a_step(seed)[1]()] for seed in (1, 2)]
    for order in range(4):
        CUDA.emulate(seed=order, deferred=True)
        made = []
        for number in (1, 2):
            with on_stream(number):
                made.append(a_step(number)[1])
        results = []
        for number, call in zip((1, 2), made, strict=True):
            with on_stream(number):
                results.append(call())
        CUDA.synchronize()
        for got, wanted in zip(results, expected, strict=True):
            same(got, wanted)


def test_launches_side_by_side_on_one_word_are_seen() -> None:
    """What the test before would not miss."""
    wrong = 0
    expected = [[t.clone() for t in a_step(seed)[1]()] for seed in (1, 2)]
    for order in range(6):
        CUDA.emulate(seed=order, deferred=True)
        shared = torch.zeros(1, dtype=torch.int32)
        calls.words(CPU).of_stream = {1: shared, 2: shared}
        kept, results = [], []
        for number in (1, 2):
            with on_stream(number):
                kept.append(a_step(number)[1])
                results.append(kept[-1]())
        try:
            CUDA.synchronize()
        except CUDA.CudaError:
            wrong += 1
            continue
        wrong += any(
            not torch.equal(a, b)
            for got, wanted in zip(results, expected, strict=True)
            for a, b in zip(got, wanted, strict=True)
        )
    assert wrong > 0


# ---------------------------------------------------------------------------------------------
# A wait that nobody ends


def _window(case: LSTMCase) -> dict[str, Callable[[], Any]]:
    given, layers = case.inputs, case.stack()
    trace = BACKEND.lstm_forward(given["x"], given["h"], given["c"], layers, None, (), True)
    assert trace.gates is not None
    rows, state = lstm_rows(case, trace.hidden, trace.gates, case.alive()), bind_lstm(case)
    return {
        "lstm_forward": lambda: BACKEND.lstm_forward(
            given["x"], given["h"], given["c"], layers, None, (), True
        ),
        "lstm_backward": lambda: BACKEND.lstm_backward(
            given["grad_output"], None, None, given["x"], layers, None, (), trace, True, True
        ),
        "lstm_update": lambda: BACKEND.lstm_update_(rows, layers, state.tensors(case.slots())),
    }


def _ops() -> dict[str, tuple[Callable[[], Any], str]]:
    """A call of each kernel, and what is said of it."""
    case, step = a_step()
    window = _window(make_lstm((3, 5, 7, 24, 1), WINDOW, 1, torch.float32))
    shape = r"x \[3, 5, 7\], h \[1, 5, 24\]"
    word = torch.zeros(1, dtype=torch.int32)
    return {
        "linear": (step, r"linear_step \(x \[45, 20\], weight \[37, 20\]\)"),
        "synthesizer": (
            lambda: BACKEND.synthesizer_predict(
                case.inputs["grad_h"], case.synthesizer(), case.inputs["context"]
            ),
            r"synthesizer_predict \(h \[45, 37\]\)",
        ),
        "lstm_forward": (window["lstm_forward"], rf"lstm_forward \({shape}\)"),
        "lstm_backward": (window["lstm_backward"], rf"lstm_backward \({shape}\)"),
        "lstm_update": (
            window["lstm_update"], r"lstm_update \(input \[15, 7\], hidden \[15, 24\]\)",
        ),
        "barriers": (
            lambda: CUDA.grid_barriers((0, 2, 1, calls.described(word), 0)),
            r"grid_barriers \(count \[2\]\)",
        ),
    }  # fmt: skip


PHASES = {"linear": "reduce", "synthesizer": "predict", "lstm_forward": "steps",
          "lstm_backward": "step", "lstm_update": "weight", "barriers": "round"}  # fmt: skip


@pytest.mark.parametrize("kernel", PHASES)
def test_a_block_that_never_comes_ends_in_an_exception(kernel: str) -> None:
    call, what = _ops()[kernel]
    CUDA.emulate(lost_arrival=True, clusters=False)
    message = (
        rf"{what}: cudaErrorLaunchFailure: {what} was stopped: block \d waited in front of its "
        rf"phase '{PHASES[kernel]}' longer than FUSED_DNI_SPIN_BOUND \(1000000000 ns\) for other "
        "blocks. The CUDA context is lost: this process has to be started again"
    )
    with pytest.raises(CUDA.CudaError, match=message) as caught:
        call()
    assert caught.value.name == "cudaErrorLaunchFailure"


def test_without_a_bound_it_is_the_machine_that_ends_the_wait() -> None:
    call, _ = _ops()["linear"]
    CUDA.emulate(lost_arrival=True)
    CUDA.spin_bound(0)
    with pytest.raises(CUDA.CudaError, match="thread 0 spins in pause"):
        call()


@pytest.mark.parametrize(("text", "bound"), [("", 10**9), ("0", 0), (" 250 ", 250)])
def test_the_bound_is_the_environments(
    text: str, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_DNI_SPIN_BOUND", text)
    assert calls.spin_bound() == bound


@pytest.mark.parametrize("text", ["-1", "1.5", "soon", "9223372036854775808", "٣"])
def test_a_bound_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_DNI_SPIN_BOUND", text)
    with pytest.raises(ValueError, match="FUSED_DNI_SPIN_BOUND: got .*, takes nanoseconds"):
        calls.spin_bound()


# ---------------------------------------------------------------------------------------------
# Clusters


@pytest.mark.parametrize("op", ["lstm_forward", "lstm_backward"])
def test_a_device_that_takes_no_clusters_is_asked_once(op: str) -> None:
    """Whatever it says of them: the launch is repeated without, with the same bits."""
    call = _window(make_lstm((3, 18, 7, 24, 1), WINDOW, 1, torch.float32))[op]

    def result() -> list[Tensor]:
        made = call()
        parts = (
            made if op == "lstm_forward" else (made.delta, made.h, made.c, made.x, *made.layers[0])
        )
        return [t.clone() for t in parts if t is not None]

    CUDA.emulate(clusters=False, resident=7)
    expected = result()
    meetings = CUDA.additions()
    CUDA.emulate(resident=7)
    same(result(), expected)
    assert CUDA.additions() < meetings and CUDA.attempts() == 1
    CUDA.emulate(cluster_launches=False, resident=7)
    for attempts in (2, 3):
        same(result(), expected)
        assert (CUDA.additions(), CUDA.attempts()) == (meetings, attempts)
