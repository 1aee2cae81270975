"""Who waits in a queue, and for whom a step is run.

A ghost's client has been answered. So it stands behind all clients, and no step is run for it while any of them waits:
it takes rows that would be padding, and the device when that would be idle. But a server that never rests must not
collect ghosts until its slots are full. So whoever has been a ghost for ``BEHIND`` seconds counts as a client that came
then: shadows cost what they cost.
"""

import bisect
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from serve.engine import policy

from .policy import Shares
from .records import Job, OverloadedError, Route, Step

PATIENCE = 1.0  # seconds: who has no deadline is served, within its queue, as if it had this one
BEHIND = 0.25  # seconds


class Waiting(NamedTuple):
    """A job in its queue; sorts by what is due first, then by arrival."""

    due: float
    since: float
    number: int  # unique, so that jobs are never compared
    job: Job

    @classmethod
    def of(cls, job: Job, number: int) -> "Waiting":
        """Return a job as it waits."""
        since = job.arrived + BEHIND if job.ghost else job.arrived
        due = since + PATIENCE
        return cls(due if job.deadline is None else min(job.deadline, due), since, number, job)

    def counts(self, now: float) -> bool:
        """Whether a step is run for it, or it is only taken along."""
        return not self.job.ghost or self.since <= now


def oldest(queue: Iterable[Waiting], now: float) -> float:
    """Return since when any of them waits."""
    return min(now, *(waiting.since for waiting in queue))


def deadline_of(queue: Iterable[Waiting]) -> float | None:
    """Return the deadline of the client that is due first."""
    return next((waiting.job.deadline for waiting in queue if not waiting.job.ghost), None)


def is_expired(job: Job, now: float) -> bool:
    """Whether nobody waits for its answer any more."""
    return job.abandoned or (job.deadline is not None and job.deadline <= now)


_Key = tuple[int, int]  # route and stage


class Scheduler:
    """Queues, slots, and the choice of the next step.

    Args:
        routes: Ways through the base, with their measured times.
        capacity: Slots of the runner.
        max_wait: Seconds of age that count as much as the whole gain of a step, see ``next_step``.
        admitted: The most jobs on their way at once; unless told, as many as there are slots.
    """

    def __init__(
        self, routes: Sequence[Route], capacity: int, *, max_wait: float = 0.002, admitted: int | None = None
    ) -> None:
        """Start empty."""
        self.routes = tuple(routes)
        self.admitted = capacity if admitted is None else min(admitted, capacity)
        self._max_wait = max(max_wait, 1e-6)  # as good as first come, first served
        self._free = list(range(capacity))[::-1]  # the lowest is taken first, so that slabs stay warm
        self._capacity = capacity
        self._queues: dict[_Key, list[Waiting]] = {}
        self._ghosts = 0  # on their way
        self._running: list[Step] = []
        self._numbers = itertools.count()
        self._shares = Shares(self.routes)

    # What it says

    @property
    def in_use(self) -> int:
        """Slots that are taken."""
        return self._capacity - len(self._free)

    @property
    def waiting(self) -> dict[tuple[int, int], int]:
        """How many jobs wait, by route and stage."""
        return {key: len(queue) for key, queue in self._queues.items()}

    @property
    def leave(self) -> tuple[tuple[float, ...], ...]:
        """The share that leaves, by route and stage, as lately seen."""
        return self._shares.leave

    @property
    def backlog_ms(self) -> float:
        """Milliseconds that the device is expected to need for all on their way; running steps count whole."""
        rest = [(*policy.remaining_ms(r.stage_ms, seen), 0.0) for r, seen in zip(self.routes, self.leave, strict=True)]
        total = sum(len(queue) * rest[route][stage] for (route, stage), queue in self._queues.items())
        for step in self._running:
            route, stage = step.route, step.stage
            survivors = 0 if self._runs_on(step) else len(step.jobs) * (1 - self.leave[route][stage])
            total += self._step_ms((route, stage), step.bucket) + survivors * rest[route][stage + 1]
        return total

    # What changes it

    def admit(self, jobs: Sequence[Job]) -> None:
        """Give every job a slot and a place in its first queue; all of them or none.

        Raises:
            OverloadedError: There are not as many slots; says when to try again.
            ValueError: There could never be as many.
        """
        if len(jobs) > self.admitted:
            raise ValueError(f"images: expected at most {self.admitted} at once, got {len(jobs)}")
        if (missing := self.in_use + len(jobs) - self.admitted) > 0:
            retry = max(self._max_wait, missing * self.backlog_ms / 1e3 / self.in_use)  # all leave at an even pace
            msg = f"overloaded: {self.in_use} of {self.admitted} places are taken; try again in {retry:.3f} s"
            raise OverloadedError(msg, retry)
        for job in jobs:
            job.slot = self._free.pop()
            self._ghosts += job.ghost
            self._queue(job, 0)

    def drop(self, now: float) -> list[Job]:
        """Take out, and return, who waits in vain: past the deadline, or abandoned."""
        dropped: list[Job] = []
        for key, queue in list(self._queues.items()):
            parts: tuple[list[Waiting], list[Waiting]] = [], []  # a client may leave at any moment: it is asked once
            for waiting in queue:
                parts[is_expired(waiting.job, now)].append(waiting)
            rest, vain = parts
            if vain:
                self._keep(key, rest)
                dropped += [waiting.job for waiting in vain]
        self._release(dropped)
        return dropped

    def drop_ghosts(self) -> list[Job]:
        """Take out, and return, all ghosts who wait, as when the server stops."""
        dropped = [waiting.job for queue in self._queues.values() for waiting in queue if waiting.job.ghost]
        if dropped:
            for key, queue in list(self._queues.items()):
                self._keep(key, [waiting for waiting in queue if not waiting.job.ghost])
            self._release(dropped)
        return dropped

    def next_step(self, now: float) -> Step | None:
        """Take out of the queues, and return, what is best run next; None where nothing waits.

        Queues are compared by what they gain (see ``policy``), times one more than the age of their oldest job in units
        of ``max_wait``. So a gain is outweighed in the end by any age, and nobody starves. But where someone would miss
        a deadline by waiting for one more step, and can still make it, the one that is due first goes first.
        """
        if not self._queues:
            return None
        choices = {key: self._shares.choose(*key, rows) for key, rows in self._counted(now).items()}
        urgent = self._urgent(choices, now)
        key = urgent or max(choices, key=lambda key: (self._score(key, choices[key], now), key[1]))  # deeper on ties
        queue, bucket = self._queues[key], choices[key].bucket
        self._keep(key, queue[bucket:])
        step = Step(*key, bucket, tuple(waiting.job for waiting in queue[:bucket]))
        self._running.append(step)
        return step

    def finish(self, step: Step, left: Sequence[bool], ghosts: Collection[Job] = ()) -> list[Job]:
        """Free the slots of those who left; the others queue for the next stage.

        Args:
            step: What ran.
            left: Of its jobs; of the last stage, all.
            ghosts: Of those who left, who goes on all the same, as ghosts.

        Returns:
            Those who did not leave but were abandoned: they are not queued.
        """
        self._running.remove(step)
        runs_on = self._runs_on(step)
        clients = [is_out for job, is_out in zip(step.jobs, left, strict=True) if not job.ghost]
        self._shares.learn(step, len(clients), sum(clients))
        for job in ghosts:
            job.ghost, job.deadline = True, None
        self._ghosts += len(ghosts)
        self._release(job for job, is_out in zip(step.jobs, left, strict=True) if is_out and job not in ghosts)
        others = [job for job in step.jobs if job.slot >= 0]
        given_up = [job for job in others if job.abandoned]
        self._release(given_up)
        for job in others:
            if job.slot < 0:  # given up: a client may leave at any moment, so this is not asked twice
                continue
            if runs_on:
                job.stage = step.stage + 1
            else:
                self._queue(job, step.stage + 1)
        return given_up

    def overlap(self, step: Step, turnaround_ms: float) -> Step | None:
        """Return the stage behind that of a running step, for all its jobs: to dispatch before it is known who leaves.

        The paper's overlapped lookups. Who goes on need not wait for the host; what leaves has been computed in vain.
        None where anyone else waits, or where the latter is expected to outweigh the former.

        Args:
            step: Running, and chosen by ``next_step`` (or narrowed): nothing runs on from what may not be.
            turnaround_ms: What the device idles, as measured, between a result and the step after it.
        """
        route, stage = self.routes[step.route], step.stage + 1
        if self._queues or not step.jobs or step.follows is not None or stage > len(route.sites):
            return None
        leave, next_ms = self.leave[step.route][step.stage], route.stage_ms[step.bucket][stage]
        if not policy.overlap_pays(leave, next_ms, turnaround_ms):
            return None
        further = step._replace(stage=stage, follows=step)
        self._running.append(further)
        return further

    def narrow(self, step: Step) -> Step:
        """Return a step that ran on, with those of its jobs that are still on their way; what it followed is over."""
        self._running.remove(step)
        narrowed = step._replace(jobs=tuple(job for job in step.jobs if job.slot >= 0), follows=None)
        self._running.append(narrowed)
        return narrowed

    def fail(self, step: Step) -> None:
        """Free the slots of all."""
        self._running.remove(step)
        self._release(step.jobs)

    def clear(self) -> list[Job]:
        """Take out, and return, all who wait."""
        jobs = [waiting.job for queue in self._queues.values() for waiting in queue]
        self._queues.clear()
        self._release(jobs)
        return jobs

    def _runs_on(self, step: Step) -> bool:
        return any(other.follows is step for other in self._running)

    def _queue(self, job: Job, stage: int) -> None:
        job.stage = stage
        bisect.insort(self._queues.setdefault((job.route, stage), []), Waiting.of(job, next(self._numbers)))

    def _keep(self, key: _Key, rest: list[Waiting]) -> None:
        if rest:
            self._queues[key] = rest
        else:
            del self._queues[key]

    def _release(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._free.append(job.slot)
            self._ghosts -= job.ghost
            job.slot = -1

    # How it chooses

    def _counted(self, now: float) -> dict[_Key, int]:
        """Return, by queue, how many a step would be run for; ghosts only if nobody else waits."""
        everyone = {key: len(queue) for key, queue in self._queues.items()}
        if not self._ghosts:
            return everyone
        counted = {key: sum(waiting.counts(now) for waiting in queue) for key, queue in self._queues.items()}
        return {key: rows for key, rows in counted.items() if rows} or everyone

    def _score(self, key: _Key, choice: policy.Choice, now: float) -> float:
        since = oldest(self._queues[key][: choice.bucket], now)
        return choice.gain * (1 + (now - since) / self._max_wait)

    def _urgent(self, choices: dict[_Key, policy.Choice], now: float) -> _Key | None:
        """Return the queue whose first job would miss its deadline if another step came first, and else would not."""
        step_ms = {key: self._step_ms(key, choice.bucket) for key, choice in choices.items()}
        urgent: list[tuple[float, _Key]] = []
        for key, choice in choices.items():
            deadline = deadline_of(self._queues[key])
            if deadline is None:
                continue
            slack_ms = (deadline - now) * 1e3 - self._alone_ms(key, choice.bucket)
            if 0 <= slack_ms < max((ms for other, ms in step_ms.items() if other != key), default=0):
                urgent.append((deadline, key))
        return min(urgent)[1] if urgent else None

    def _step_ms(self, key: _Key, bucket: int) -> float:
        return self.routes[key[0]].stage_ms[bucket][key[1]]

    def _alone_ms(self, key: _Key, bucket: int) -> float:
        """Return what a job takes that is served at once, in this bucket, then alone, and leaves at the very end."""
        stage_ms = self.routes[key[0]].stage_ms
        return self._step_ms(key, bucket) + sum(stage_ms[min(stage_ms)][key[1] + 1 :])
