"""What passes between the front, the engine, the scheduler and the runner. No JAX here."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """A way through the base that requests may take: one of a bundle's plans, or the base alone."""

    name: str
    """The plan's; "base" where no cache is asked."""
    sites: tuple[int, ...]
    """Where its caches are; stage i ends there, the last stage behind the base."""
    depth: int
    """Blocks of the base: the exit of the last stage."""
    epsilon: float | None
    """What is certified of its disagreement: 0 for the base alone, None where nothing is."""
    stage_ms: Mapping[int, tuple[float, ...]]
    """By bucket (rows that a program takes): measured milliseconds of every stage."""
    leave: tuple[float, ...]
    """The share of the requests entering each stage that is expected to leave there; 1 in the last."""

    @property
    def exits(self) -> tuple[int, ...]:
        """The exit of every stage."""
        return (*self.sites, self.depth)


class Answer(NamedTuple):
    """What a client gets for one image."""

    class_index: int
    exit: int
    score: float  # infinity from the base
    logits: Float[np.ndarray, " classes"]
    computed: float = 0.0  # seconds spent in steps, for the protocol's statistics


@dataclasses.dataclass(eq=False, kw_only=True)
class Job:
    """One image on its way; only the scheduler changes it, under the engine's lock."""

    image: Shaped[np.ndarray, "*input"]
    route: int
    arrived: float
    """Seconds, by the engine's clock."""
    deadline: float | None = None
    """When the answer comes too late."""
    done: "Future[Answer]" = dataclasses.field(default_factory=Future)
    request_id: str = ""
    mark: object = None
    """What who submitted it knows it by."""
    ghost: bool = False
    """Whether nobody waits for it but the observer: a cache has answered it, and it goes on for the base's answer."""
    stage: int = 0
    slot: int = -1
    computed: float = 0.0
    """Seconds spent in steps; the engine's thread alone adds to it."""

    @property
    def abandoned(self) -> bool:
        """Whether its client has left; the slot is freed before the next step, or after the one that it is in."""
        return self.done.cancelled()


class Step(NamedTuple):
    """What runs next: a stage of a route on some jobs."""

    route: int
    stage: int
    bucket: int
    jobs: tuple[Job, ...]
    follows: "Step | None" = None
    """The step whose result it does not wait for, see ``Scheduler.overlap``."""


class StageResult(NamedTuple):
    """What a step says of its jobs, in their order."""

    hit: Bool[np.ndarray, " jobs"]
    class_index: Int[np.ndarray, " jobs"]
    score: Float[np.ndarray, " jobs"]
    logits: Float[np.ndarray, "jobs classes"]

    def take(self, rows: Sequence[int]) -> "StageResult":
        """Return these rows of it."""
        return StageResult(*(column[list(rows)] for column in self))


class Running(Protocol):
    """A dispatched step."""

    def result(self) -> StageResult:
        """Wait for it.

        Raises:
            Exception: Whatever went wrong on the device; only this step's jobs are concerned.
        """
        ...


class Runner(Protocol):
    """Owns the device; called from the engine's thread only. It never decides what runs."""

    @property
    def routes(self) -> Sequence[Route]:
        """What it can run."""
        ...

    @property
    def capacity(self) -> int:
        """Slots: jobs that may be on their way at once."""
        ...

    def dispatch(self, step: Step) -> Running:
        """Start a step, without waiting for it; rows of the same slot follow one another in the order of dispatch."""
        ...


class Observer(Protocol):
    """Is told what happens; must be quick. What it raises is logged and changes nothing."""

    def step(self, step: Step, seconds: float, *, failed: bool) -> None:
        """Hear of a step: how long from dispatch to its result. From the engine's thread."""
        ...

    def answered(self, job: Job, answer: Answer, seconds: float) -> None:
        """Hear of an answer: how long since the job arrived. From the engine's thread."""
        ...

    def shadowed(self, job: Job, answer: Answer | None) -> None:
        """Hear the base's answer to a ghost; None if it was lost. From the engine's thread."""
        ...

    def refused(self, reason: str) -> None:
        """Hear of a request "overloaded" or "stopping" (from whoever submitted it), or of a job past its "deadline"."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """The engine at one moment; counters count images since the start."""

    waiting: Mapping[tuple[int, int], int]
    """By route and stage, where any wait."""
    slots_in_use: int
    admitted: int
    """The bound of ``slots_in_use``."""
    backlog_ms: float
    """What everyone on the way is expected to take, in the buckets that are best; running steps count whole."""
    answered: int = 0
    refused: int = 0
    expired: int = 0
    """Dropped before a step, because their deadline had passed."""
    abandoned: int = 0
    failed: int = 0
    """Lost in a step that failed."""
    shadowed: int = 0
    """Ghosts that the base has answered."""
    steps: int = 0
    failed_steps: int = 0
    leave: tuple[tuple[float, ...], ...] = ()
    """By route and stage: the share that leaves there, as lately seen."""
    running: bool = False
    """Whether the engine's thread is there to answer."""


class ServeError(Exception):
    """A request that is not answered, and why."""


class OverloadedError(ServeError):
    """Refused: as many requests as are admitted are on their way."""

    def __init__(self, message: str, retry_after: float) -> None:
        """Say when to try again, in seconds."""
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(ServeError):
    """The deadline passed before the answer was there."""


class StepError(ServeError):
    """The step that the request was in failed."""


class StoppingError(ServeError):
    """The server is stopping and admits nothing more."""
