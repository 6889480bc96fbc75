"""``DecoupledPipelineStage``: a stage for the schedules of ``torch.distributed.pipelining``."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from fused_dni.distributed.links import LINGER, Bell, GroupIncoming, GroupOutgoing
from fused_dni.distributed.mailbox import Mailbox
from fused_dni.distributed.wire import Kind, Message, PipelineError
from fused_dni.modules.late import step_local
from fused_dni.modules.steps import Steps

#: What is overridden or called of torch's class, with the names of the arguments.
_NEEDED = {
    "forward_one_chunk": ["self", "fwd_chunk_id", "args", "kwargs", "save_forward_output"],
    "backward_one_chunk": ["self", "bwd_chunk_id", "loss", "full_backward", "last_backward"],
    "get_bwd_recv_ops": ["self", "bwd_chunk_id"],
    "get_bwd_send_ops": ["self", "bwd_chunk_id"],
    "_retrieve_recv_activations": ["self", "fwd_chunk_id"],
}


class DecoupledPipelineStage(PipelineStage):
    """Update a stage from its synthesizer under the stock ``ScheduleGPipe`` and ``Schedule1F1B``:
    their backward of a chunk waits for nothing.

    A forward of a chunk is :func:`fused_dni.step_local`; gradients are in ``.grad``, or rules have
    applied them. The gradient at the output comes back beside the schedule, in a mailbox by chunk,
    and teaches the synthesizer; dropped where the stage below has no room for it. The last stage is
    trained by the schedule's loss. Contexts go in as the keyword that
    modules take: ``schedule.step(x, context=y)`` on every rank whose synthesizer has one.

    Outputs still travel as the schedule sends them: it posts a receive when it needs it, which over
    a link costs two latencies a chunk. :class:`Pipeline` posts them ahead.

    Args:
        submodule: of all stages but the last a :class:`fused_dni.Decoupled` or
            :class:`fused_dni.FusedDNILinear` with a synthesizer.
        stage_index, num_stages, device, input_args, output_args: as in ``PipelineStage``; both
            examples are needed, as what infers shapes runs the module.
        window: gradients that may be on their way over a link.
        max_age: chunks after which a gradient is dropped. Default ``8 * window``.
        lag: use each gradient exactly so many chunks late, and wait for it; None: when it comes.
        timeout: seconds that a neighbour may be silent while something is waited for.

    Raises:
        RuntimeError: a version of PyTorch whose ``PipelineStage`` has other methods; no process
            group.
        ValueError: stages that are not the ranks of the default group, one each; a submodule
            without a synthesizer, or the last with one.
    """

    def __init__(
        self,
        submodule: torch.nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device,
        input_args: Any,
        output_args: Any,
        *,
        window: int = 4,
        max_age: int | None = None,
        lag: int | None = None,
        timeout: float = 300.0,
    ) -> None:
        why = _why_not(PipelineStage)
        if why:
            raise RuntimeError(f"torch {torch.__version__} does not fit: {why}")
        if not dist.is_initialized():
            raise RuntimeError("there is no process group: call init_process_group first")
        if (dist.get_rank(), dist.get_world_size()) != (stage_index, num_stages):
            raise ValueError(
                f"stage_index={stage_index} of num_stages={num_stages} on rank {dist.get_rank()} "
                f"of {dist.get_world_size()}: the stages must be the ranks, one each"
            )
        last = stage_index == num_stages - 1
        predicts = isinstance(submodule, Steps) and submodule.synthesizer is not None
        if last == predicts:
            raise ValueError(
                "the last stage has its loss's gradient and takes no synthesizer"
                if last
                else "submodule needs a synthesizer: fused_dni.Decoupled(submodule, synthesizer)"
            )
        for name, value, least in (("window", window, 1), ("max_age", max_age, 0), ("lag", lag, 0)):
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        super().__init__(submodule, stage_index, num_stages, device, input_args, output_args)
        self.lag = lag
        oldest = max(8 * window if max_age is None else max_age, lag or 0)
        self.mailbox = Mailbox(submodule, oldest) if predicts else None  # type: ignore[arg-type]
        self.forwards = 0  # forwards so far
        self.dropped = 0  # gradients for which the stage below had no room
        self._come: list[tuple[int, Tensor]] = []
        self._asked: list[int] = []
        self._open_chunks: dict[int, tuple[int, Any]] = {}  # by the schedule's chunk: ours, and dx
        pairs = [dist.new_group([i, i + 1], backend="gloo") for i in range(num_stages - 1)]
        bell = Bell()
        self._up = self._down = self._from_up = self._from_down = None
        if not last:
            at = (
                stage_index + 1,
                f"stage {stage_index + 1}",
                pairs[stage_index],
                window,
                timeout,
                bell,
            )
            self._from_up = GroupIncoming(*at)
            self._up = GroupOutgoing(*at, None, self._from_up)
        if stage_index:
            at = (
                stage_index - 1,
                f"stage {stage_index - 1}",
                pairs[stage_index - 1],
                window,
                timeout,
                bell,
            )
            self._from_down = GroupIncoming(*at)
            self._down = GroupOutgoing(*at, None, self._from_down)

    # -- what a schedule calls -------------------------------------------------------------------

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        """Run a step of the chunk from its prediction; the last stage's forward."""
        chunk, self.forwards = self.forwards, self.forwards + 1
        if self.mailbox is None:
            out = super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)
            self._open_chunks[fwd_chunk_id] = chunk, None
            return out
        given = args if self.is_first else self._retrieve_recv_activations(fwd_chunk_id)
        phase = self.mailbox.module.phase
        h, dx, ticket = step_local(self.submod, *given, **(kwargs or {}))
        if phase.target:
            self.mailbox.put(chunk, ticket)
            self._asked.append(chunk)
        self._open_chunks[fwd_chunk_id] = chunk, dx
        self.fwd_cache[fwd_chunk_id] = (h,), list(given)
        return h

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """Send the chunk's gradient down, and learn from those that have come from above."""
        if not full_backward:
            raise RuntimeError(
                "schedules that split a backward (zero-bubble) gain nothing here: use "
                "ScheduleGPipe or Schedule1F1B"
            )
        chunk, dx = self._open_chunks.pop(bwd_chunk_id)
        if self.mailbox is None:
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
            dx = () if self.is_first else self.bwd_cache.pop(bwd_chunk_id)
        else:
            self.fwd_cache.pop(bwd_chunk_id)
        if self._down is not None:
            (gradient,) = [g for g in dx if g is not None]
            wait = self.lag is not None
            if not self._down.send(Message(Kind.GRADIENT, chunk, 0, (gradient,)), wait):
                self.dropped += 1
        if self.mailbox is not None:
            self._learn(chunk)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive nothing: gradients come beside the schedule."""
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Send nothing, likewise."""
        return []

    # -- gradients -------------------------------------------------------------------------------

    def _learn(self, chunk: int) -> None:
        assert self.mailbox is not None and self._from_up is not None
        due = [] if self.lag is None else [c for c in self._asked if c <= chunk - self.lag]
        while True:
            message = self._from_up.receive(not set(due) <= {of for of, _ in self._come})
            if message is None:
                break
            (gradient,) = message.tensors if len(message.tensors) == 1 else (None,)
            if (
                message.kind is not Kind.GRADIENT
                or gradient is None
                or message.step >= self.forwards
            ):
                raise PipelineError(
                    f"{self._from_up.name} sent {message.kind.name} of chunk {message.step} where "
                    f"a gradient of a chunk below {self.forwards} was due"
                )
            self._come.append((message.step, gradient.to(self.device)))
        come, self._come = self._come, []
        for of, gradient in come:
            if self.lag is not None and of > chunk - self.lag:
                self._come.append((of, gradient))
                continue
            self._asked = [c for c in self._asked if c > of]
            self.mailbox.learn(of, chunk, gradient)

    def close(self) -> None:
        """End the links, on all ranks together; gradients that are on their way are dropped."""
        if self._up is not None:
            self._up.close()
        for end in (self._from_down, self._from_up):
            while end is not None and not end.ended:
                end.receive()
            if end is self._from_down and self._down is not None:
                self._down.close()
        for one in (self._from_up, self._from_down, self._up, self._down):
            if one is not None:
                with suppress(RuntimeError):
                    one.end(LINGER)


def _why_not(kind: type) -> str:
    """Return what of torch's class is not as it is needed; empty if all is."""
    for name, wanted in _NEEDED.items():
        method = getattr(kind, name, None)
        if method is None:
            return f"PipelineStage has no {name}"
        found = list(inspect.signature(method).parameters)
        if found != wanted:
            return f"PipelineStage.{name} takes {found}, not {wanted}"
    return ""
