"""What the service, the engine, the scheduler and the runner exchange, and their interfaces. Imports no JAX."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """A path through the base that requests may take: one of a bundle's plans, or the base without caches."""

    name: str
    """The plan's name; "base" for the one without caches."""
    sites: tuple[int, ...]
    """Sites of its caches: stage i ends at sites[i], the last stage at the end of the base."""
    depth: int
    """Blocks of the base: the exit of the last stage."""
    epsilon: float | None
    """The certified bound of its disagreement with the base: 0 for the base itself, None without a certificate."""
    stage_ms: Mapping[int, tuple[float, ...]]
    """By bucket (the rows of a program): measured milliseconds of every stage."""
    leave: tuple[float, ...]
    """By stage, the expected share of the requests entering it that leave there; 1 for the last."""

    @property
    def exits(self) -> tuple[int, ...]:
        """The exit of every stage."""
        return (*self.sites, self.depth)


class Lookup(NamedTuple):
    """What a cache said of an image on its way."""

    exit: int
    score: float
    threshold: float
    """The least score that leaves there, as it was at that moment; infinite where the cache is closed."""


class Answer(NamedTuple):
    """The answer for one image."""

    class_index: int
    exit: int
    score: float  # infinity from the base
    logits: Float[np.ndarray, " classes"]
    computed: float = 0.0  # seconds spent in steps, for the protocol's statistics
    lookups: tuple[Lookup, ...] = ()  # of the caches that it passed, the one that answered included


@dataclasses.dataclass(eq=False, kw_only=True)
class Job:
    """One image in flight; only the scheduler changes it, under the engine's lock."""

    image: Shaped[np.ndarray, "*input"]
    route: int
    arrived: float
    """Seconds, by the engine's clock."""
    deadline: float | None = None
    """Seconds, by the same clock, after which the answer is too late."""
    done: "Future[Answer]" = dataclasses.field(default_factory=Future)
    request_id: str = ""
    mark: object = None
    """Any object by which the submitter recognises the job in the observer's calls."""
    is_traffic: bool = True
    """Whether it is part of what is measured of the traffic; an input of the page's box is not."""
    is_shadow: bool = False
    """Whether its client has been answered by a cache, and it continues only for the base's answer (a shadow job)."""
    stage: int = 0
    slot: int = -1
    computed: float = 0.0
    """Seconds spent in steps; the engine's thread alone adds to it."""
    lookups: list[Lookup] = dataclasses.field(default_factory=list)
    """So far; from the engine's thread alone, too."""

    @property
    def abandoned(self) -> bool:
        """Whether its client has left; its slot is freed before the next step, or after the one that it is in."""
        return self.done.cancelled()


class Step(NamedTuple):
    """A stage of a route, to be run on some jobs."""

    route: int
    stage: int
    bucket: int
    jobs: tuple[Job, ...]
    follows: "Step | None" = None
    """The unfinished step whose survivors it continues, see ``Scheduler.overlap``."""


class StageResult(NamedTuple):
    """The result of a step, in the order of its jobs."""

    hit: Bool[np.ndarray, " jobs"]
    class_index: Int[np.ndarray, " jobs"]
    score: Float[np.ndarray, " jobs"]
    logits: Float[np.ndarray, "jobs classes"]
    threshold: float = math.nan
    """Of the stage, at its dispatch; minus infinity at the last one."""

    def take(self, rows: Sequence[int]) -> "StageResult":
        """Return some of the rows."""
        columns = (self.hit, self.class_index, self.score, self.logits)
        return StageResult(*(column[list(rows)] for column in columns), threshold=self.threshold)


class Running(Protocol):
    """A dispatched step."""

    def result(self) -> StageResult:
        """Wait for the result.

        Raises:
            Exception: Any failure on the device; it fails the jobs of this step only.
        """
        ...


class Runner(Protocol):
    """Owns the device and executes steps; called from the engine's thread only."""

    @property
    def routes(self) -> Sequence[Route]:
        """The routes that it can run."""
        ...

    @property
    def capacity(self) -> int:
        """Slots: the most jobs in flight."""
        ...

    def dispatch(self, step: Step) -> Running:
        """Start a step without waiting for it; steps on the same slot run in the order of dispatch."""
        ...


class Observer(Protocol):
    """Receives the engine's events; must return quickly. Its exceptions are logged and otherwise ignored."""

    def step(self, step: Step, seconds: float, *, failed: bool) -> None:
        """Take a finished step, and the seconds from its dispatch to its result. Called from the engine's thread."""

    def answered(self, job: Job, answer: Answer, seconds: float) -> None:
        """Take an answer, and the seconds since its job arrived. Called from the engine's thread."""

    def shadowed(self, job: Job, answer: Answer | None) -> None:
        """Take the base's answer to a shadow job, None if the job was lost. Called from the engine's thread."""

    def refused(self, reason: str) -> None:
        """Take the reason of a refusal.

        Of a request: "overloaded", "stopping" or "too_large", from the thread that submitted it; of a job: "deadline",
        from the engine's thread.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """The engine at one moment; counters count images since the start."""

    waiting: Mapping[tuple[int, int], int]
    """Jobs that wait, by route and stage; queues that are empty are left out."""
    slots_in_use: int
    admitted: int
    """The most slots that may be in use."""
    backlog_ms: float
    """Expected milliseconds of work for all jobs in flight, in their best buckets; a running step counts in full."""
    oldest: float = 0.0
    """Age in seconds of the client that is due first, of the queue where it is oldest; 0 if none waits."""
    answered: int = 0
    refused: int = 0
    expired: int = 0
    """Dropped before a step because their deadline had passed."""
    abandoned: int = 0
    failed: int = 0
    """In a step that failed."""
    shadowed: int = 0
    """Shadow jobs that the base has answered."""
    steps: int = 0
    failed_steps: int = 0
    batches: tuple[int, ...] = ()
    """The buckets that are compiled so far."""
    leave: tuple[tuple[float, ...], ...] = ()
    """By route and stage: the recent share of jobs that left there."""
    running: bool = False
    """Whether the engine's thread is alive."""


class ServeError(Exception):
    """Why a request is not answered."""


class OverloadedError(ServeError):
    """All admitted places are taken."""

    def __init__(self, message: str, retry_after: float) -> None:
        """Take the message, and the seconds after which to try again."""
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(ServeError):
    """The deadline passed before the answer was ready."""


class StepError(ServeError):
    """The step that ran the request failed."""


class StoppingError(ServeError):
    """The server is stopping and admits no more requests."""
