"""The event loop: chains of stages, their messages, and what a stage does next.

A stage is one worker. Whenever it is free it looks at what has come and at what its mode allows,
and begins one piece of work: forward, backward, the weights' part of a backward, a lesson. Messages
leave at its end. Events do not pass one by one through a queue. Every piece of work takes time and
every message its latency, so what begins now is felt elsewhere no earlier than the shortest work
and the latency later; all stages of all chains whose next beginning lies before that begin
together, as one operation on arrays. An update of a thousand stages, eight million pieces of work,
takes seconds; SimPy, at 13 microseconds for a piece, would take two minutes.

Times are whole picoseconds, so that what happens at the same moment does: a gradient that arrives
just when a stage is free is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fused_dni.measure.simulate import draws
from fused_dni.measure.simulate_settings import Link, Stragglers

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

#: Seconds of a tick.
TICK = 1e-12
#: Later than everything.
NEVER = 2**62
#: Entries of the largest arrays of one loop; more chains than that run one after the other.
ROOM = 2**23
#: What a stage may do, the first before the others where several could begin.
_BACKWARD, _FORWARD, _WEIGHT = range(3)


@dataclass(frozen=True)
class Outage:
    """A stage that fails once, at ``start``, and works again ``length`` seconds later; the work
    that it was at is done anew."""

    stage: int
    start: float
    length: float


@dataclass(frozen=True)
class Chain:
    """A chain of stages and what it does.

    Attributes:
        forward, backward, weight, optimizer: seconds by stage. Of a one-way chain ``forward`` is
            a whole step and ``backward`` a lesson.
        link, forward_bytes, backward_bytes: what messages take.
        total: microbatches.
        skip: of them not measured.
        windows: by stage, how many forwards may be ahead of the backwards.
        split: the weights' part of a backward is work of its own, done when nothing else can be.
        hold: how many forwards may be ahead of the weights' parts.
        every: microbatches of an update, for which the optimizer runs.
        flush: no forward of the next update begins before a stage's own update.
        forwards_first: no backward of an update begins before all its forwards.
        late: messages are asked for when they are needed.
        one_way: nothing waits for what comes back.
        buffer: messages of a one-way chain that are under way to a stage or at it.
        targets: k, 0 for none: a one-way chain sends something back for every k-th microbatch.
        extra: seconds by stage that this adds.
        max_age: steps after which it is dropped on arrival.
        stragglers, seed, outage: disturbances.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    weight: Sequence[float]
    optimizer: Sequence[float]
    link: Link
    forward_bytes: float
    backward_bytes: float
    total: int
    skip: int
    windows: Sequence[int] = ()
    split: bool = False
    hold: int = NEVER
    every: int = 1
    flush: bool = False
    forwards_first: bool = False
    late: bool = False
    one_way: bool = False
    buffer: int = 1
    targets: int = 0
    extra: Sequence[float] = ()
    max_age: int | None = None
    stragglers: Stragglers = field(default_factory=Stragglers)
    seed: int = 0
    outage: Outage | None = None

    @property
    def stages(self) -> int:
        """How many."""
        return len(self.forward)

    @property
    def ring(self) -> int:
        """How many messages lie between two stages at most."""
        if self.one_way:
            return self.buffer
        return min(max(self.windows), self.total)


@dataclass(frozen=True)
class Ran:
    """What became of a chain.

    Attributes:
        begins, ends: by stage, when what is measured began and ended, in seconds.
        busy: by stage, seconds at work in between.
        age: by stage, mean age in steps of the gradients that updates were made from, or of the
            targets that lessons were; NaN where there were none.
        oldest: the largest of these ages, by stage.
        lessons: targets that were learned from, by stage.
        dropped: targets that were too old or found no room, by the stage that lacked them.
    """

    begins: list[float]
    ends: list[float]
    busy: list[float]
    age: list[float]
    oldest: list[int]
    lessons: list[int]
    dropped: list[int]


def run(chains: Sequence[Chain], progress: Callable[[float], None] | None = None) -> list[Ran]:
    """Run chains of one mode, each from an idle start until its microbatches are done.

    Args:
        chains: any numbers of stages; ``split``, ``late`` and ``one_way`` are the same for all.
        progress: called with the fraction done, now and then.

    Raises:
        ValueError: an unfit list, or work that takes no time.
        OverflowError: a simulated time of more than 26 days, half of what its picoseconds hold.
    """
    kinds = {(chain.split, chain.late, chain.one_way) for chain in chains}
    if len(kinds) > 1:
        raise ValueError("chains of one run must share split, late and one_way")
    found: list[Ran] = []
    work = sum(chain.stages * chain.total for chain in chains)
    done = 0
    for group in _groups(chains):
        loop = _Loop(group)
        whole = sum(chain.stages * chain.total for chain in group)

        def tell(share: float, done: int = done, whole: int = whole) -> None:
            if progress is not None:
                progress((done + share * whole) / work)

        loop.run(tell)
        found += loop.found()
        done += whole
    return found


def _groups(chains: Sequence[Chain]) -> list[list[Chain]]:
    groups: list[list[Chain]] = []
    rows, ring = 0, 0
    for chain in chains:
        rows, ring = rows + chain.stages, max(ring, chain.ring)
        if not groups or rows * ring > ROOM:
            groups.append([])
            rows, ring = chain.stages, chain.ring
        groups[-1].append(chain)
    return groups


def ticks(seconds: float) -> int:
    """Whole picoseconds."""
    return round(seconds / TICK)


class _Queue:
    """Messages to every stage, in the order of sending: when each arrives."""

    def __init__(self, stages: int, ring: int) -> None:
        self.size = 1 << max(ring - 1, 0).bit_length()
        self.mask = self.size - 1
        self.at = np.zeros(stages * self.size, np.int64)
        self.sent = np.zeros(stages, np.int64)
        self.last = np.zeros(stages, np.int64)

    def place(self, to: Ints, number: Ints) -> Ints:
        """Return where message ``number`` of stage ``to`` lies."""
        return to * self.size + (number & self.mask)

    def put(self, to: Ints, arrival: Ints) -> Ints:
        """Send a message to each of the stages, none of them twice; none overtakes another."""
        arrival = np.maximum(arrival, self.last[to])
        self.last[to] = arrival
        place = self.place(to, self.sent[to])
        self.at[place] = arrival
        self.sent[to] += 1
        return place

    def head(self, to: Ints, number: Ints) -> Ints:
        """When message ``number`` arrives, NEVER if it is not sent yet."""
        return np.where(number < self.sent[to], self.at[self.place(to, number)], NEVER)


class _Loop:
    """Chains of one mode, all stages in one row of arrays."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        self.chains = chains
        sizes = [chain.stages for chain in chains]
        self.first_of = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        stages = int(self.first_of[-1])
        self.top = stages - 1
        lead = chains[0]
        self.split, self.late, self.one_way = lead.split, lead.late, lead.one_way

        def spread(value: Callable[[Chain], int]) -> Ints:
            return np.repeat(np.array([value(c) for c in chains], np.int64), sizes)

        def listed(value: Callable[[Chain], Sequence[float]]) -> Ints:
            return np.array([ticks(v) for c in chains for v in value(c)], np.int64)

        index = np.arange(stages)
        self.first = np.zeros(stages, np.bool_)
        self.first[self.first_of[:-1]] = True
        self.final = np.zeros(stages, np.bool_)
        self.final[self.first_of[1:] - 1] = True
        number = index - np.repeat(self.first_of[:-1], sizes)

        self.forward = listed(lambda c: c.forward)
        self.backward = listed(lambda c: c.backward)
        self.weight = listed(lambda c: c.weight)
        self.optimizer = listed(lambda c: c.optimizer)
        self.extra = listed(lambda c: c.extra or [0.0] * c.stages)
        self.every = spread(lambda c: c.every)
        self.total = spread(lambda c: c.total)
        self.skip = spread(lambda c: c.skip)
        self.flush = spread(lambda c: c.flush) > 0
        self.forwards_first = spread(lambda c: c.forwards_first) > 0
        self.hold = spread(lambda c: c.hold)
        self.buffer = spread(lambda c: c.buffer)
        self.targets = spread(lambda c: c.targets)
        self.max_age = spread(lambda c: NEVER if c.max_age is None else c.max_age)
        if not self.one_way:
            self.windows = np.array([w for c in chains for w in c.windows], np.int64)
        self._links(chains, spread, number)
        self._disturbances(chains, spread, number)

        work = self.forward if self.one_way else np.minimum(self.forward, self.backward)
        if int(work.min()) <= 0:
            raise ValueError("work must take time, at least a picosecond, at every stage")
        starts = self.first_of[:-1]
        self.look = np.minimum.reduceat(work, starts) + np.minimum(
            self.f_latency[starts], self.b_latency[starts]
        )

        self.free = np.zeros(stages, np.int64)
        self.posted = np.zeros(stages, np.int64)
        self.nf = np.zeros(stages, np.int64)  # forwards begun
        self.nb = np.zeros(stages, np.int64)  # backwards or lessons begun
        self.nw = np.zeros(stages, np.int64)  # weights' parts begun
        self.begins = np.zeros(stages, np.int64)
        self.ends = np.zeros(stages, np.int64)
        self.busy = np.zeros(stages, np.int64)
        self.aged = np.zeros(stages, np.int64)
        self.oldest = np.zeros(stages, np.int64)
        self.taught = np.zeros(stages, np.int64)
        self.dropped = np.zeros(stages, np.int64)
        ring = max(chain.ring for chain in chains)
        self.down = _Queue(stages, ring)
        self.back = _Queue(stages, ring)
        self.credits = _Queue(stages if self.one_way else 0, ring)
        if self.one_way:
            self.target_of = np.zeros(stages * self.back.size, np.int64)
        if self.late:
            self.down_way = np.zeros(stages * self.down.size, np.int64)
            self.back_way = np.zeros(stages * self.back.size, np.int64)

    def _links(
        self,
        chains: Sequence[Chain],
        spread: Callable[[Callable[[Chain], int]], Ints],
        number: Ints,
    ) -> None:
        self.f_latency = spread(lambda c: ticks(c.link.latency))
        self.b_latency = spread(lambda c: ticks(c.link.back))
        self.f_transfer = spread(lambda c: ticks(c.forward_bytes / c.link.bandwidth))
        self.b_transfer = spread(lambda c: ticks(c.backward_bytes / c.link.wide_back))
        self.f_jitter = spread(lambda c: ticks(c.link.jitter_of(c.link.latency)))
        self.b_jitter = spread(lambda c: ticks(c.link.jitter_of(c.link.back)))
        self.shape = chains[0].link.shape
        self.jitters = bool((self.f_jitter + self.b_jitter).any())
        self.keys = {
            purpose: np.concatenate(
                [
                    draws.keys(c.seed, purpose, number[a:b])
                    for c, a, b in zip(chains, self.first_of, self.first_of[1:], strict=False)
                ]
            )
            for purpose in (draws.FORWARD, draws.BACKWARD, draws.CREDIT, draws.GAP, draws.SPELL)
        }
        self.f_link = np.zeros(len(number), np.int64)  # by sender: when the link is free
        self.b_link = np.zeros(len(number), np.int64)

    def _disturbances(
        self,
        chains: Sequence[Chain],
        spread: Callable[[Callable[[Chain], int]], Ints],
        number: Ints,
    ) -> None:
        sizes = [c.stages for c in chains]
        self.factor = np.repeat([c.stragglers.factor for c in chains], sizes)
        share = np.repeat([c.stragglers.share for c in chains], sizes)
        spell = np.repeat([c.stragglers.spell / TICK for c in chains], sizes)
        only = spread(lambda c: -1 if c.stragglers.stage is None else c.stragglers.stage)
        struck = ((only < 0) | (only == number)) & (share > 0.0) & (self.factor > 1.0)
        self.struck = bool(struck.any())
        self.spell = spell
        self.gap = np.where(struck, spell * (1.0 - share) / np.maximum(share, 1e-12), 0.0)
        self.spells = np.zeros(len(number), np.int64)
        # A spell is from slow_from to slow_to; the first follows a gap from time 0.
        self.slow_from = np.where(struck, 0, NEVER)
        self.slow_to = np.where(struck, 0, NEVER)
        self.out_from = np.full(len(number), NEVER)
        self.out_to = np.full(len(number), NEVER)
        for chain, start in zip(chains, self.first_of, strict=False):
            if chain.outage is not None:
                at = int(start) + chain.outage.stage
                self.out_from[at] = ticks(chain.outage.start)
                self.out_to[at] = self.out_from[at] + ticks(chain.outage.length)
        self.outages = any(chain.outage is not None for chain in chains)

    def run(self, progress: Callable[[float], None]) -> None:
        """Let everything happen."""
        lanes = np.arange(len(self.chains))
        stages = np.arange(int(self.first_of[-1]))
        choose = self._choose_one_way if self.one_way else self._choose
        when, what = choose(stages)
        everything = float(self.total.sum())
        rounds = 0
        while True:
            sizes = self.first_of[lanes + 1] - self.first_of[lanes]
            starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
            look = self.look[lanes]
            while True:
                soon = when[stages]
                earliest = np.minimum.reduceat(soon, starts)
                if int(earliest.max()) >= NEVER:
                    break
                go = stages[np.flatnonzero(soon < np.repeat(earliest + look, sizes))]
                self._begin(go, when[go], what[go])
                # Only they and their neighbours have seen anything new.
                seen = stages
                if 3 * go.size < stages.size:
                    seen = np.concatenate([go, np.maximum(go, 1) - 1, np.minimum(go + 1, self.top)])
                when[seen], what[seen] = choose(seen)
                rounds += 1
                if not rounds & 255:
                    progress(float(self._counted().sum()) / everything)
                    if int(self.free.max()) > NEVER // 2:
                        raise OverflowError("the simulated time is longer than 26 days")
            over = lanes[earliest >= NEVER]
            for lane in over:
                part = slice(self.first_of[lane], self.first_of[lane + 1])
                assert (self._counted()[part] == self.total[part]).all(), "stages wait for ever"
            lanes = lanes[earliest < NEVER]
            if not lanes.size:
                break
            stages = np.concatenate(
                [np.arange(self.first_of[lane], self.first_of[lane + 1]) for lane in lanes]
            )
        progress(1.0)

    def _counted(self) -> Ints:
        """Microbatches that stages have begun to finish."""
        if self.one_way:
            return self.nf
        return self.nw if self.split else self.nb

    # --------------------------------------------------------------------- what a stage does next

    def _choose(self, s: Ints) -> tuple[Ints, Ints]:
        nf, nb, free = self.nf[s], self.nb[s], self.free[s]
        nw = self.nw[s] if self.split else nb
        update = (nw // self.every[s] + 1) * self.every[s]
        end = np.where(self.flush[s], np.minimum(update, self.total[s]), self.total[s])
        may = np.minimum(nb + self.windows[s], end)
        if self.split:
            may = np.minimum(may, nw + self.hold[s])
        forward, backward = nf < may, nb < nf
        backward &= ~self.forwards_first[s] | (nf >= end)
        down, back = self.down.head(s, nf), self.back.head(s, nb)
        if self.late:
            # What is awaited next is asked for; it leaves when the question has come.
            asked = self.posted[s]
            ready = np.maximum(down, asked + self.b_latency[s])
            down = np.where(down < NEVER, ready + self.down_way[self.down.place(s, nf)], NEVER)
            ready = np.maximum(back, asked + self.f_latency[s])
            back = np.where(back < NEVER, ready + self.back_way[self.back.place(s, nb)], NEVER)
            backward &= ~forward
        down = np.where(self.first[s], 0, down)
        back = np.where(self.final[s], 0, back)
        begin_f = np.where(forward, np.maximum(free, down), NEVER)
        begin_b = np.where(backward, np.maximum(free, back), NEVER)
        when = np.minimum(begin_f, begin_b)
        what = np.where(begin_b <= when, _BACKWARD, _FORWARD)
        if self.split:
            begin_w = np.where(nw < nb, free, NEVER)
            what = np.where(begin_w < when, _WEIGHT, what)
            when = np.minimum(when, begin_w)
        return when, what

    def _choose_one_way(self, s: Ints) -> tuple[Ints, Ints]:
        nf, nb, free = self.nf[s], self.nb[s], self.free[s]
        more = nf < self.total[s]
        down = np.where(self.first[s], 0, self.down.head(s, nf))
        granted = nf - self.buffer[s]
        room = np.where(self.final[s] | (granted < 0), 0, self.credits.head(s, granted))
        begin_f = np.maximum(np.maximum(free, down), room)
        begin_f = np.where(more, begin_f, NEVER)
        begin_b = np.where(more, np.maximum(free, self.back.head(s, nb)), NEVER)
        when = np.minimum(begin_f, begin_b)
        return when, np.where(begin_b <= when, _BACKWARD, _FORWARD)

    # -------------------------------------------------------------------------------- doing it

    def _begin(self, s: Ints, when: Ints, what: Ints) -> None:
        chosen = what == _FORWARD
        if chosen.any():
            (self._step if self.one_way else self._forward)(s[chosen], when[chosen])
        chosen = what == _BACKWARD
        if chosen.any():
            (self._lesson if self.one_way else self._backward)(s[chosen], when[chosen])
        if self.split:
            chosen = what == _WEIGHT
            if chosen.any():
                self._weight(s[chosen], when[chosen])

    def _forward(self, s: Ints, when: Ints) -> None:
        self._age(s, self.nf[s] - self.nb[s], self.nf[s] >= self.skip[s])
        end = self._work(s, when, self.forward[s])
        self.posted[s] = end
        self.nf[s] += 1
        self._send_down(s, end)

    def _backward(self, s: Ints, when: Ints) -> None:
        end = self._work(s, when, self.backward[s])
        self.posted[s] = end
        self.nb[s] += 1
        self._send_back(s, end)
        if not self.split:  # an update follows, which the stage below does not wait for
            self._finish(s, self.nb[s], self._work(s, end, self._update(s, self.nb[s] - 1)))

    def _weight(self, s: Ints, when: Ints) -> None:
        end = self._work(s, when, self.weight[s] + self._update(s, self.nw[s]))
        self.nw[s] += 1
        self._finish(s, self.nw[s], end)

    def _step(self, s: Ints, when: Ints) -> None:
        k = self.targets[s]
        target = (k > 0) & (self.nf[s] % np.maximum(k, 1) == 0) & ~self.first[s]
        end = self._work(s, when, self.forward[s] + np.where(target, self.extra[s], 0))
        self.nf[s] += 1
        self._send_down(s, end)
        below = s[~self.first[s]]
        if below.size:  # room for one message more
            arrival = end[~self.first[s]] + self.b_latency[below]
            if self.jitters:
                arrival += self._jitter(draws.CREDIT, below, self.nf[below], self.b_jitter)
            self.credits.put(below - 1, arrival)
        if target.any():
            self._send_target(s[target], end[target])
        self._finish(s, self.nf[s], end)

    def _lesson(self, s: Ints, when: Ints) -> None:
        age = self.nf[s] - self.target_of[self.back.place(s, self.nb[s])] - 1
        measured = self.nf[s] >= self.skip[s]
        self.nb[s] += 1
        fresh = age <= self.max_age[s]
        self.free[s] = when  # a target that is too old is passed over
        self.dropped[s] += ~fresh & measured
        s, age, measured = s[fresh], age[fresh], measured[fresh]
        self._age(s, age, measured)
        self._work(s, when[fresh], self.backward[s])

    def _age(self, s: Ints, age: Ints, measured: Bools) -> None:
        s, age = s[measured], age[measured]
        self.aged[s] += age
        self.taught[s] += 1
        self.oldest[s] = np.maximum(self.oldest[s], age)

    def _update(self, s: Ints, before: Ints) -> Ints:
        """Spend the optimizer's time, for the last microbatch of an update."""
        return np.where((before + 1) % self.every[s] == 0, self.optimizer[s], 0)

    def _work(self, s: Ints, when: Ints, takes: Ints) -> Ints:
        if self.struck:
            self._draw_spells(s, when)
            slow = (self.slow_from[s] <= when) & (when < self.slow_to[s])
            takes = np.where(slow, np.rint(takes * self.factor[s]).astype(np.int64), takes)
        if self.outages:
            hit = (when + takes > self.out_from[s]) & (when < self.out_to[s])
            when = np.where(hit, self.out_to[s], when)
        end: Ints = when + takes
        self.free[s] = end
        self.busy[s] += takes
        return end

    def _draw_spells(self, s: Ints, when: Ints) -> None:
        while True:
            s, when = s[when >= self.slow_to[s]], when[when >= self.slow_to[s]]
            if not s.size:
                return
            n = self.spells[s]
            gap = self.gap[s] * draws.exponential(self.keys[draws.GAP][s], n)
            length = self.spell[s] * draws.exponential(self.keys[draws.SPELL][s], n)
            self.slow_from[s] = self.slow_to[s] + np.rint(gap).astype(np.int64)
            self.slow_to[s] = self.slow_from[s] + np.rint(length).astype(np.int64) + 1
            self.spells[s] += 1

    def _finish(self, s: Ints, count: Ints, end: Ints) -> None:
        start = count == self.skip[s]
        if start.any():
            self.begins[s[start]] = end[start]
            self.busy[s[start]] = 0
        stop = count == self.total[s]
        if stop.any():
            self.ends[s[stop]] = end[stop]

    # -------------------------------------------------------------------------------- messages

    def _jitter(self, purpose: int, s: Ints, number: Ints, mean: Ints) -> Ints:
        found = draws.delay(self.shape, self.keys[purpose][s], number) * mean[s]
        return np.rint(found).astype(np.int64)

    def _send_down(self, s: Ints, end: Ints) -> None:
        there = ~self.final[s]
        s, end = s[there], end[there]
        if not s.size:
            return
        way = self.f_latency[s]
        if self.jitters:
            way = way + self._jitter(draws.FORWARD, s, self.nf[s], self.f_jitter)
        if self.late:
            place = self.down.put(s + 1, end)
            self.down_way[place] = way + self.f_transfer[s]
            return
        left = np.maximum(end, self.f_link[s]) + self.f_transfer[s]
        self.f_link[s] = left
        self.down.put(s + 1, left + way)

    def _send_back(self, s: Ints, end: Ints) -> None:
        there = ~self.first[s]
        s, end = s[there], end[there]
        if not s.size:
            return
        way = self.b_latency[s]
        if self.jitters:
            way = way + self._jitter(draws.BACKWARD, s, self.nb[s], self.b_jitter)
        if self.late:
            place = self.back.put(s - 1, end)
            self.back_way[place] = way + self.b_transfer[s]
            return
        left = np.maximum(end, self.b_link[s]) + self.b_transfer[s]
        self.b_link[s] = left
        self.back.put(s - 1, left + way)

    def _send_target(self, s: Ints, end: Ints) -> None:
        """Send a target if the link is idle and there is room; a later one is worth more than an
        old one."""
        waiting = self.back.sent[s - 1] - self.nb[s - 1]
        fits = (self.b_link[s] <= end) & (waiting < self.buffer[s])
        lost = s[~fits]
        counts = (self.nf[lost - 1] > self.skip[lost]) & (self.nf[lost - 1] < self.total[lost])
        self.dropped[lost - 1] += counts
        s, end = s[fits], end[fits]
        if not s.size:
            return
        left = end + self.b_transfer[s]
        self.b_link[s] = left
        way = self.b_latency[s]
        if self.jitters:
            way = way + self._jitter(draws.BACKWARD, s, self.nf[s], self.b_jitter)
        place = self.back.put(s - 1, left + way)
        self.target_of[place] = self.nf[s] - 1

    def found(self) -> list[Ran]:
        """Return what became of each chain."""
        made = []
        for a, b in zip(self.first_of, self.first_of[1:], strict=False):
            part = slice(a, b)
            taught = self.taught[part]
            ages = np.where(taught > 0, self.aged[part] / np.maximum(taught, 1), math.nan)
            made.append(
                Ran(
                    begins=(self.begins[part] * TICK).tolist(),
                    ends=(self.ends[part] * TICK).tolist(),
                    busy=(self.busy[part] * TICK).tolist(),
                    age=ages.tolist(),
                    oldest=self.oldest[part].tolist(),
                    lessons=taught.tolist(),
                    dropped=self.dropped[part].tolist(),
                )
            )
        return made
