"""Queues, slots, and the choice of the next step.

A shadow job's client has been answered. So it queues behind all clients, and no step is run for it while any of them
waits: it takes rows that would be padding, and the device when that would be idle. But a server that is never idle must
not collect shadow jobs until its slots are full: after ``BEHIND`` seconds a shadow job counts as a client that has just
arrived.

Beyond the device's capacity, jobs with equal deadlines come to the head of a queue as their time runs out. So a job
that cannot be answered by its deadline is dropped, and one that is likely to be late lets all others go first.
"""

import bisect
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from . import policy
from .records import Job, OverloadedError, Route, Step

PATIENCE = 1.0  # seconds: a job without a deadline is ordered, within its queue, as if it had this one
BEHIND = 0.25  # seconds that a shadow job stands behind clients
_NONE, _MOST = 0.01, 0.9  # shares that leave: fewer than the first are none, the second are as good as all
_MEMORY = 0.05  # weight of the newest step in the mean of what steps take
_LONGEST = 4.0  # times the expected time that a step counts at most
_Key = tuple[int, int]  # route and stage


class Waiting(NamedTuple):
    """A job in its queue; sorts by what is due first, then by arrival."""

    due: float
    since: float
    number: int  # unique, so that jobs are never compared
    job: Job

    @classmethod
    def of(cls, job: Job, number: int) -> "Waiting":
        """Return a job with its place in a queue."""
        since = job.arrived + BEHIND if job.is_shadow else job.arrived
        due = since + PATIENCE
        return cls(due if job.deadline is None else min(job.deadline, due), since, number, job)

    def counts(self, now: float) -> bool:
        """Whether a step may be run for it; otherwise it only fills up other steps."""
        return not self.job.is_shadow or self.since <= now

    def is_late(self, soon: float) -> bool:
        """Whether its client wants an answer before this time."""
        return not self.job.is_shadow and self.job.deadline is not None and self.job.deadline < soon


class _Line(NamedTuple):
    """A queue as it would be served now."""

    in_time: list[Waiting]
    late: list[Waiting]  # likely so


class Scheduler:
    """Queues, slots, and the choice of the next step.

    Args:
        routes: The runner's routes, with their measured times.
        capacity: Slots of the runner: the most jobs in flight.
        max_wait: Seconds of age that count as much as the whole gain of a step, see ``next_step``.
    """

    def __init__(self, routes: Sequence[Route], capacity: int, *, max_wait: float = 0.002) -> None:
        """Start empty."""
        self.routes = tuple(routes)
        self.capacity = capacity
        self._max_wait = max(max_wait, 1e-6)  # as good as first come, first served
        self._free = list(range(capacity))[::-1]  # the lowest is taken first, so that slabs stay warm
        self._queues: dict[_Key, list[Waiting]] = {}
        self._shadows = 0  # in flight
        self._running: list[Step] = []
        self._numbers = itertools.count()
        self._shares = policy.Shares(self.routes)
        self._slowness = 1.0  # what steps take, over what the routes expect: the processor may have other work

    # State

    @property
    def in_use(self) -> int:
        """Slots that are taken."""
        return self.capacity - len(self._free)

    @property
    def waiting(self) -> dict[tuple[int, int], int]:
        """The number of jobs that wait, by route and stage."""
        return {key: len(queue) for key, queue in self._queues.items()}

    @property
    def waits(self) -> bool:
        """Whether any job waits."""
        return bool(self._queues)

    @property
    def leave(self) -> tuple[tuple[float, ...], ...]:
        """The recent share of jobs that left, by route and stage."""
        return self._shares.leave

    @property
    def backlog_ms(self) -> float:
        """Milliseconds that the device is expected to need for all jobs in flight; running steps count in full."""
        rest = [(*policy.remaining_ms(r.stage_ms, seen), 0.0) for r, seen in zip(self.routes, self.leave, strict=True)]
        total = sum(len(queue) * rest[route][stage] for (route, stage), queue in self._queues.items())
        for step in self._running:
            route, stage = step.route, step.stage
            survivors = 0 if self._is_followed(step) else len(step.jobs) * (1 - self.leave[route][stage])
            total += self._step_ms((route, stage), step.bucket) + survivors * rest[route][stage + 1]
        return total

    def oldest(self, now: float) -> float:
        """Return the age in seconds of the client that is due first, of the queue where it is oldest."""
        first = (next((w.job for w in queue if not w.job.is_shadow), None) for queue in self._queues.values())
        return max((now - job.arrived for job in first if job is not None), default=0.0)

    def widen(self, routes: Sequence[Route]) -> None:
        """Use further buckets of the same routes."""
        self.routes = tuple(routes)
        self._shares.widen(routes)

    # Jobs in and out

    def admit(self, jobs: Sequence[Job], spare: int = 0) -> None:
        """Give every job a slot and a place in its first queue; all of them or none.

        So many slots must be spare besides, for jobs that may follow.

        Raises:
            OverloadedError: There are not enough free slots; says when to try again.
            ValueError: There can never be enough.
        """
        if (needed := len(jobs) + spare) > self.capacity:
            raise ValueError(f"images: expected at most {self.capacity} at once, got {needed}")
        if (missing := self.in_use + needed - self.capacity) > 0:
            retry = max(self._max_wait, missing * self.backlog_ms / 1e3 / self.in_use)  # at an even pace
            raise OverloadedError(
                f"overloaded: {self.in_use} of {self.capacity} places are taken; try again in {retry:.3f} s", retry
            )
        for job in jobs:
            job.slot = self._free.pop()
            self._shadows += job.is_shadow
            self._queue(job, 0)

    def drop(self, now: float) -> list[Job]:
        """Remove, and return, the waiting jobs that are not worth a step: abandoned, or too late for any exit."""
        first = {key: now + self._until_ms(key, _NONE) / 1e3 for key in self._queues}

        def goes(job: Job) -> bool:
            late = job.deadline is not None and (job.deadline <= now or job.deadline < first[job.route, job.stage])
            return late or job.abandoned

        return self._remove(goes)

    def drop_shadows(self) -> list[Job]:
        """Remove, and return, the waiting shadow jobs, when the server stops."""
        return self._remove(lambda job: job.is_shadow)

    def clear(self) -> list[Job]:
        """Remove, and return, all waiting jobs."""
        return self._remove(lambda _: True)

    # Steps

    def next_step(self, now: float) -> Step | None:
        """Remove the best step's jobs from their queue and return it; None if no job waits.

        Queues are compared by their gain (see ``policy``), times one plus the age of their oldest job in units of
        ``max_wait``. So a large enough age outweighs any gain, and no job starves. But if some job would miss its
        deadline by waiting for one more step, and can still make it, the one that is due first goes first. Jobs that
        are likely to be late are served as shadow jobs are.
        """
        if not self._queues:
            return None
        lines = {key: self._line_up(key, now) for key in self._queues}
        choices = {key: self._shares.choose_bucket(*key, rows) for key, rows in self._counted(lines, now).items()}
        urgent = self._urgent(lines, choices, now)
        key = urgent or max(choices, key=lambda key: (self._score(lines[key], choices[key], now), key[1]))  # deeper
        line, bucket = [*lines[key].in_time, *lines[key].late], choices[key].bucket
        self._keep(key, sorted(line[bucket:]))
        step = Step(*key, bucket, tuple(waiting.job for waiting in line[:bucket]))
        self._running.append(step)
        return step

    def finish(
        self, step: Step, left: Sequence[bool], shadows: Collection[Job] = (), *, seconds: float | None = None
    ) -> list[Job]:
        """Free the slots of the jobs that left; queue the others for the next stage.

        Some of the jobs that left may continue as shadow jobs. Returns those that were abandoned instead of queued.
        ``seconds`` is what the step took, if that is known.
        """
        self._running.remove(step)
        if seconds is not None:
            ratio = min(seconds * 1e3 / self._step_ms((step.route, step.stage), step.bucket), _LONGEST)
            self._slowness += _MEMORY * (ratio - self._slowness)
        followed = self._is_followed(step)
        clients = [is_out for job, is_out in zip(step.jobs, left, strict=True) if not job.is_shadow]
        self._shares.learn(step, len(clients), sum(clients))
        for job in shadows:
            job.is_shadow, job.deadline = True, None
        self._shadows += len(shadows)
        self._release(job for job, is_out in zip(step.jobs, left, strict=True) if is_out and job not in shadows)
        others = [job for job in step.jobs if job.slot >= 0]
        abandoned = [job for job in others if job.abandoned]
        self._release(abandoned)
        for job in others:
            if job.slot < 0:  # abandoned: a client may leave at any moment, so do not ask twice
                continue
            if followed:
                job.stage = step.stage + 1
            else:
                self._queue(job, step.stage + 1)
        return abandoned

    def fail(self, step: Step) -> None:
        """Free the slots of all jobs of a step."""
        self._running.remove(step)
        self._release(step.jobs)

    def overlap(self, step: Step, turnaround_ms: float) -> Step | None:
        """Return the stage after that of a running step, for all its jobs: to dispatch before its hits are known.

        The paper's overlapped lookups: survivors need not wait for the host, and what is computed for the jobs that
        leave is discarded. None if any other job waits, if the step itself ran ahead, or if the waste is expected to
        outweigh the saving: ``turnaround_ms``, in which the device idles between a result and the step after it.
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
        """Return a step that ran ahead with the jobs that are still in flight, now that the one before it is over."""
        self._running.remove(step)
        narrowed = step._replace(jobs=tuple(job for job in step.jobs if job.slot >= 0), follows=None)
        self._running.append(narrowed)
        return narrowed

    def _is_followed(self, step: Step) -> bool:
        return any(other.follows is step for other in self._running)

    def _queue(self, job: Job, stage: int) -> None:
        job.stage = stage
        bisect.insort(self._queues.setdefault((job.route, stage), []), Waiting.of(job, next(self._numbers)))

    def _remove(self, goes: Callable[[Job], bool]) -> list[Job]:
        removed: list[Job] = []
        for key, queue in list(self._queues.items()):
            parts: tuple[list[Waiting], list[Waiting]] = [], []  # a client may leave at any moment: ask once
            for waiting in queue:
                parts[goes(waiting.job)].append(waiting)
            rest, gone = parts
            if gone:
                self._keep(key, rest)
                removed += [waiting.job for waiting in gone]
        self._release(removed)
        return removed

    def _keep(self, key: _Key, rest: list[Waiting]) -> None:
        if rest:
            self._queues[key] = rest
        else:
            del self._queues[key]

    def _release(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._free.append(job.slot)
            self._shadows -= job.is_shadow
            job.slot = -1

    # The choice

    def _line_up(self, key: _Key, now: float) -> _Line:
        queue, soon = self._queues[key], now + self._until_ms(key, _MOST) / 1e3
        if queue[0].due >= soon:
            return _Line(queue, [])
        return _Line(
            [waiting for waiting in queue if not waiting.is_late(soon)],
            [waiting for waiting in queue if waiting.is_late(soon)],
        )

    def _counted(self, lines: Mapping[_Key, _Line], now: float) -> dict[_Key, int]:
        """Return, by queue, the jobs that a step would be run for.

        Those that are likely to be late are left out if there are others, and shadow jobs if any client waits.
        """
        for clients in ({key: line.in_time for key, line in lines.items()}, self._queues):
            rows = {key: sum(waiting.counts(now) for waiting in queue) for key, queue in clients.items()}
            if any(rows.values()):
                return {key: count for key, count in rows.items() if count}
        return {key: len(queue) for key, queue in self._queues.items()}

    def _score(self, line: _Line, choice: policy.Choice, now: float) -> float:
        served = (*line.in_time[: choice.bucket], *line.late[: max(0, choice.bucket - len(line.in_time))])
        since = min(now, *(waiting.since for waiting in served))
        return choice.gain * (1 + (now - since) / self._max_wait)

    def _urgent(self, lines: Mapping[_Key, _Line], choices: dict[_Key, policy.Choice], now: float) -> _Key | None:
        """Return the queue whose first client would miss its deadline only if another step came first."""
        step_ms = {key: self._step_ms(key, choice.bucket) * self._slowness for key, choice in choices.items()}
        urgent: list[tuple[float, _Key]] = []
        for key, choice in choices.items():
            clients = (waiting.job for waiting in lines[key].in_time if not waiting.job.is_shadow)
            deadline = next((job.deadline for job in clients), None)
            if deadline is None:
                continue
            slack_ms = (deadline - now) * 1e3 - self._until_ms(key, _MOST, choice.bucket)
            if 0 <= slack_ms < max((ms for other, ms in step_ms.items() if other != key), default=0):
                urgent.append((deadline, key))
        return min(urgent)[1] if urgent else None

    def _until_ms(self, key: _Key, share: float, bucket: int | None = None) -> float:
        """Return when this share of the jobs of a queue would have left, each served at once and alone.

        Args:
            key: The queue.
            share: In (0, 1).
            bucket: Of its first step; None for the smallest one.
        """
        route, stage = key
        stage_ms, leave = self.routes[route].stage_ms, self.leave[route]
        alone = stage_ms[min(stage_ms)]
        ms, staying = stage_ms[bucket or min(stage_ms)][stage], 1 - leave[stage]
        while 1 - staying < share and stage + 1 < len(alone):
            stage += 1
            ms, staying = ms + alone[stage], staying * (1 - leave[stage])
        return ms * self._slowness

    def _step_ms(self, key: _Key, bucket: int) -> float:
        return self.routes[key[0]].stage_ms[bucket][key[1]]
