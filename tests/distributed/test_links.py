"""Links between real processes: order, bounds, room, and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import ranks

from fused_dni.distributed.links import Bell, GroupIncoming, GroupOutgoing
from fused_dni.distributed.wire import Kind, Message, PipelineError

ROOT = Path(__file__).resolve().parents[2]


def ends(rank: int, window: int, timeout: float = 20.0) -> tuple[GroupOutgoing, GroupIncoming]:
    """Both of a rank's, of a pair of two."""
    group = dist.new_group([0, 1])
    at = (1 - rank, f"stage {1 - rank}", group, window, timeout, Bell())
    incoming = GroupIncoming(*at)
    return GroupOutgoing(*at, None, incoming), incoming


def shut(out: GroupOutgoing, incoming: GroupIncoming) -> int:
    """Close both directions; the threads that are left."""
    out.close()
    while not incoming.ended:
        incoming.receive()
    return sum(t.name.startswith("fused_dni") for t in threading.enumerate())


def forward(step: int, size: int = 1) -> Message:
    return Message(Kind.FORWARD, step, tensors=(torch.full((size,), float(step)),))


def stream(rank: int, world: int, window: int, size: int) -> tuple[list[int], int]:
    out, incoming = ends(rank, window)
    found = []
    if rank == 0:
        for step in range(50):
            assert out.send(forward(step, size))
    else:
        for _ in range(50):
            message = incoming.receive()
            assert bool((message.tensors[0] == message.step).all())
            found.append(message.step)
    return found, shut(out, incoming)


@pytest.mark.parametrize(("window", "size"), [(1, 1), (1, 1 << 20), (3, 1000)])
def test_order_is_kept(window, size):
    """And nothing of one message is another's; no thread is left."""
    (_, a), (found, b) = ranks(partial(stream, window=window, size=size), 2)
    assert found == list(range(50)) and (a, b) == (0, 0)


def room(rank: int, world: int, window: int) -> list[Any]:
    """How many messages go where nobody takes any, and after each one that is taken."""
    out, incoming = ends(rank, window)
    sent: list[Any] = []
    if rank == 0:
        step = 0
        for _ in range(4):
            quiet = time.monotonic()
            while time.monotonic() < quiet + 0.3:  # until none has gone for so long
                if out.send(forward(step), wait=False):
                    step, quiet = step + 1, time.monotonic()
                else:
                    time.sleep(0.01)
            sent.append(step)
            dist.barrier()  # the other end has looked
            dist.barrier()  # and taken one
    else:
        for step in range(4):
            dist.barrier()
            message = incoming.receive()
            assert message.step == step
            dist.barrier()
        for _ in range(2 * window - 1):
            incoming.receive()
    assert shut(out, incoming) == 0
    return sent


@pytest.mark.parametrize("window", [1, 4])
def test_at_most_two_windows_are_on_their_way(window):
    """The bound, exactly: what both ends have buffers for."""
    sent, _ = ranks(partial(room, window=window), 2)
    # Before the other end has looked at what opens the link, its room is not there yet.
    assert sent == [window, *(2 * window + taken for taken in (1, 2, 3))]


def crossing(rank: int, world: int) -> int:
    """Both send more than there is room for before they look at what came."""
    out, incoming = ends(rank, 1)
    came: list[Message] = []

    def take() -> None:
        while (message := incoming.receive(False)) is not None:
            came.append(message)

    out.meanwhile = take
    for step in range(20):
        out.send(forward(step))
    while len(came) < 20:
        came.append(incoming.receive())
    assert [m.step for m in came] == list(range(20))
    out.meanwhile = None
    return shut(out, incoming)


def test_two_that_wait_for_each_others_room():
    assert ranks(crossing, 2) == [0, 0]


def last_words(rank: int, world: int, full: bool) -> str:
    """One end fails, with all room taken or none, and nobody waiting yet."""
    out, incoming = ends(rank, 2, timeout=10.0)
    if rank == 0:
        if full:
            while out.messages < 4:
                out.send(forward(out.messages), wait=False)
        out.fail("of a reason")
        out.end(10.0)
        incoming.end(10.0)
        return ""
    time.sleep(0.3)
    with pytest.raises(PipelineError) as raised:
        while True:
            incoming.receive()
    out.fail(str(raised.value))
    out.end(10.0)
    incoming.end(10.0)
    assert not any(t.name.startswith("fused_dni") for t in threading.enumerate())
    return str(raised.value)


@pytest.mark.parametrize("full", [False, True])
def test_a_failure_is_told_where_there_is_no_room(full):
    assert ranks(partial(last_words, full=full), 2)[1] == "stage 0 failed: of a reason"


def gone(rank: int, world: int) -> str:
    """The reason is known to who only sends, though the other end is gone already."""
    out, incoming = ends(rank, 1)
    if rank == 0:
        out.send(forward(0))
        dist.barrier()
        out.fail("of a reason")
        incoming.timeout = 0.2
        incoming.end(0.2)  # breaks the pair
        out.end(0.2)
        dist.barrier()
        return ""
    incoming.receive()
    dist.barrier()
    dist.barrier()
    with pytest.raises(PipelineError) as raised:
        for step in range(10):
            out.send(forward(step))
    incoming.end(1.0)
    out.end(1.0)
    return str(raised.value)


def test_the_last_word_of_an_end_that_is_gone():
    assert ranks(gone, 2)[1] == "stage 0 failed: of a reason"


def busy(rank: int, world: int) -> str:
    """An end fails behind a full window, and is gone before the other has looked at anything."""
    out, incoming = ends(rank, 1)
    if rank == 0:
        out.send(forward(0))
        dist.barrier()  # it was taken, and there is room for one more
        out.send(forward(1))
        out.send(forward(2))
        out.fail("of a reason")
        incoming.timeout = 0.2
        incoming.end(0.2)  # breaks the pair
        out.end(0.2)
        dist.barrier()
        return ""
    incoming.receive()
    dist.barrier()
    dist.barrier()
    with pytest.raises(PipelineError) as raised:
        while incoming.receive() is not None:
            pass
    incoming.end(1.0)
    out.end(1.0)
    return str(raised.value)


def test_the_last_word_passes_a_full_window():
    assert ranks(busy, 2)[1] == "stage 0 failed: of a reason"


def strange(rank: int, world: int, opening: Message) -> str:
    """An end that begins with something else."""
    group = dist.new_group([0, 1])
    if rank == 0:
        from fused_dni.distributed.wire import encode

        buffer = torch.zeros(448, dtype=torch.uint8)
        encode(opening, buffer)
        dist.send(buffer, 1, group=group)
        return ""
    incoming = GroupIncoming(0, "stage 0", group, 2, 10.0, Bell())
    with pytest.raises(PipelineError) as raised:
        incoming.receive()
    return str(raised.value)


@pytest.mark.parametrize(
    ("opening", "text"),
    [
        (Message(Kind.END), "began with a message of kind END"),
        (Message(Kind.OPEN), "began with"),
        (Message(Kind.OPEN, tensors=(torch.zeros(2),)), "began with"),
        (Message(Kind.OPEN, tensors=(torch.tensor([10**5, 3]),)), "window=3"),
        (Message(Kind.OPEN, tensors=(torch.tensor([8, 2]),)), "messages of 8 bytes"),
        (Message(Kind.OPEN, tensors=(torch.tensor([2**60, 2]),)), "there is no memory"),
    ],
    ids=["end", "empty", "floats", "window", "too small", "too large"],
)
def test_what_opens_a_link_is_looked_at(opening, text):
    assert text in ranks(partial(strange, opening=opening), 2)[1]


SCRIPT = """
import sys, torch, torch.distributed as dist, torch.nn.functional as F
from stages import batches, stage
from fused_dni.distributed import Pipeline, PipelineError
rank, world, store, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
pipeline = Pipeline(stage(rank, world), loss=F.cross_entropy, timeout=20.0)
try:
    for out in pipeline.run(batches(40)):
        if how != "success" and rank == 1 and out.step == 20:
            sys.exit(7) if how == "exit" else 1 / 0
except PipelineError as problem:
    print(problem, flush=True)
"""


@pytest.mark.parametrize("how", ["success", "raise", "exit"])
def test_processes_end_cleanly(how):
    """No abort when the interpreter ends, without with, close() or destroy_process_group()."""
    env = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
    }
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(rank), "2", f"{folder}/store", how],
                env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        told = [process.communicate(timeout=100) for process in started]
    codes = [process.returncode for process in started]
    assert codes == [0, {"success": 0, "raise": 1, "exit": 7}[how]], told
    assert not any("terminate called" in err for _, err in told), told
    if how != "success":
        assert told[0][0].startswith("stage 1 failed: the process has ended"), told
