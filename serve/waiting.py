"""Who waits in a queue, and for whom a step is run.

A ghost's client has been answered. So it stands behind all clients, and no step is run for it while any of them waits:
it takes rows that would be padding, and the device when that would be idle. But a server that never rests must not
collect ghosts until its slots are full. So whoever has been a ghost for ``BEHIND`` seconds counts as a client that came
then: shadows cost what they cost.
"""

from collections.abc import Iterable
from typing import NamedTuple

from .records import Job

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


def in_vain(job: Job, now: float) -> bool:
    """Whether nobody waits for its answer any more."""
    return job.abandoned or (job.deadline is not None and job.deadline <= now)
