"""Updates that wait for the end of the backward.

A rule whose gradient is made *in* a backward (exact backprop, warm-up, mixing, the training of a
synthesizer on what arrived) is applied once, when the whole backward has succeeded: a layer used
twice adds up first, the weights stay as they are for whoever still needs them, and a backward that
raises changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch.autograd import Variable

LEARN = "learn"  # the role of a synthesizer's lessons
UPDATE = "update"  # of what a module's own rule is applied to


class Owner(Protocol):
    """Whose update waits."""

    @property
    def shares(self) -> Sequence[tuple[Any, str]]:
        """The modules that this stands for, each with the role of what it can apply in one go with
        that of the others; none where it is a module itself."""
        ...

    def refuse_other_gradients(self, added: bool) -> None:
        """Raise if its parameters have gradients that its update would not see; ``added`` says
        that this update is next."""
        ...


class _Batch:
    """What one backward has collected, by (owner, role), in order of arrival."""

    def __init__(self) -> None:
        self.owners: dict[int, Owner] = {}
        self.jobs: dict[tuple[int, str], tuple[Callable[[list[Any]], None], list[Any]]] = {}

    def flush(self) -> None:
        """Apply everything, or raise before anything is applied."""
        for owner in tuple(self.owners.values()):
            if owner.shares and self._meet(owner):
                self._divide(owner)
        owners, self.owners = self.owners, {}
        jobs, self.jobs = self.jobs, {}
        for owner in owners.values():
            owner.refuse_other_gradients(True)
        # Lessons first: a synthesizer may read what another layer's update moves, a head's rows.
        for regressions in (True, False):
            for (_, role), (apply, contributions) in jobs.items():
                if (role == LEARN) is regressions:
                    apply(contributions)
        torch.clear_autocast_cache()  # it may hold parameters as they were before

    def _meet(self, joint: Owner) -> bool:
        """Say whether one of its shares had another use in this backward: a rule is applied
        once."""
        (_, contributions) = self.jobs[id(joint), UPDATE]
        used = set(self.jobs)
        for other in self.owners.values():
            if other is not joint:
                used.update([(id(member), role) for member, role in other.shares])
        own = [(id(member), role) for member, role in joint.shares]
        return len(contributions) > 1 or not used.isdisjoint(own)

    def _divide(self, joint: Any) -> None:
        """Give each of its shares what is its own."""
        del self.owners[id(joint)]
        _, contributions = self.jobs.pop((id(joint), UPDATE))
        for contribution in contributions:
            for share, own in zip(joint.shares, joint.divided(contribution), strict=True):
                member, role = share
                self.owners[id(member)] = member
                job = self.jobs.setdefault((id(member), role), (applying(member, role), []))
                job[1].append(own)


# By graph task. The engine alone holds a batch (through its callback): when a backward raises, its
# callbacks are dropped and the batch with them.
_batches: WeakValueDictionary[int, _Batch] = WeakValueDictionary()


def applying(module: Any, role: str) -> Callable[[list[Any]], None]:
    """Return the method of a module that applies contributions of that role."""
    apply: Callable[[list[Any]], None] = module.learn if role == LEARN else module.apply_update
    return apply


def inside_backward() -> bool:
    """Say whether this thread is executing a backward."""
    return torch._C._current_graph_task_id() != -1


def at_end_of_backward(
    owner: Owner, role: str, apply: Callable[[list[Any]], None], contribution: Any
) -> None:
    """Call ``apply([contribution, ...])`` once at the end of the running backward, with every
    contribution given under the owner's role. Must be called inside a backward."""
    task = torch._C._current_graph_task_id()
    batch = _batches.get(task)
    if batch is None:
        batch = _batches[task] = _Batch()
        Variable._execution_engine.queue_callback(batch.flush)
    batch.owners[id(owner)] = owner
    key = (id(owner), role)
    job = batch.jobs.get(key)
    if job is None:
        batch.jobs[key] = (apply, [contribution])
    else:
        job[1].append(contribution)
