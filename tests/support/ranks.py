"""Functions run by several ranks: processes that are forked from one that has imported all."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
# By names that are found without this process's path; what optimizers import takes seconds.
CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.checkpoint", "fused_dni.distributed"]
)


def _rank(function: Callable[..., Any], rank: int, world: int, store: str, results: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=timedelta(seconds=200),
    )  # fmt: skip
    try:
        results.send_bytes(pickle.dumps((True, function(rank, world))))
    except BaseException as problem:
        told = (type(problem).__name__, str(problem), traceback.format_exc())
        results.send_bytes(pickle.dumps((False, told)))
    finally:
        results.close()
    dist.barrier()  # a normal exit looks to the others like a death


class Ranks:
    """Processes at work on a function.

    Args:
        function: called as ``function(rank, world)``, to be pickled; what it returns too.
        world: how many.
    """

    def __init__(self, function: Callable[..., Any], world: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self.ends, self.processes = [], []
        for rank in range(world):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(
                target=_rank, args=(function, rank, world, store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.ends.append(ours)
            self.processes.append(process)

    def results(self, seconds: float = 200.0, only: Collection[int] | None = None) -> list[Any]:
        """By rank, of all or of some (None for the others), what it returned; an exception's (name,
        text, traceback), or None of a process that died. Everything is stopped afterwards.

        Raises:
            TimeoutError: a rank was not done.
        """
        found: list[Any] = []
        deadline = time.monotonic() + seconds
        try:
            for rank, end in enumerate(self.ends):
                if only is not None and rank not in only:
                    found.append(None)
                    continue
                if not end.poll(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"rank {rank} is not done after {seconds:g} s")
                try:
                    found.append(pickle.loads(end.recv_bytes())[1])
                except EOFError:
                    found.append(None)
        finally:
            self.stop()
        return found

    def stop(self) -> None:
        """Kill what still runs."""
        for process in self.processes:
            process.join(0.5)
            if process.is_alive():
                process.kill()
                process.join()
        self.folder.cleanup()


def replicas(function: Callable[..., None], *arguments: Any) -> None:
    """Run ``function(rank, *arguments)`` on two ranks, which make their process group themselves.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them raised.
    """
    import torch

    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")


def ranks(function: Callable[..., Any], world: int, seconds: float = 200.0) -> list[Any]:
    """Run ``function(rank, world)`` on so many ranks; see :meth:`Ranks.results`.

    Raises:
        AssertionError: one of them raised.
    """
    found = Ranks(function, world).results(seconds)
    for rank, result in enumerate(found):
        failed = isinstance(result, tuple) and len(result) == 3 and "Traceback" in str(result[2])
        assert not failed, f"rank {rank}: {result[2]}"
    return found
