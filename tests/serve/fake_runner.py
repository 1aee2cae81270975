"""A runner whose answers and times can be computed by hand.

An image is two numbers: the stage at which it leaves, and its class. The score is the stage's number plus one, and
logits are zero but for a one at the class. Nothing waits: a step moves the clock by its time in the route's table.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from serve.engine.records import Route, StageResult, Step

CLASSES = 10
PATIENCE = 30  # seconds until a test that hangs fails


def route(
    *stages: float, leave: Sequence[float] | None = None, buckets: Sequence[int] = (1, 2, 4), name="plan"
) -> Route:
    """Stages of so many ms for one image, a half more for every further one; sites 1, 2, ..."""
    depth = len(stages)
    return Route(
        name=name,
        sites=tuple(range(1, depth)),
        depth=depth,
        epsilon=0.01,
        stage_ms={bucket: tuple(ms * (1 + bucket) / 2 for ms in stages) for bucket in buckets},
        leave=tuple(leave or (*[0.5] * (depth - 1), 1.0)),
    )


def image(leaves_at: int, class_index: int = 0) -> np.ndarray:
    return np.array([leaves_at, class_index], np.float32)


def images(*pairs: tuple[int, int]) -> np.ndarray:
    return np.stack([image(*pair) for pair in pairs])


def pixels(n: int, seed: int = 0) -> np.ndarray:
    """Random images for the small ResNet."""
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), np.uint8)


class FakeClock:
    """Time that passes only when it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclasses.dataclass
class FakeRunner:
    """Answers at once; remembers its steps."""

    routes: Sequence[Route]
    capacity: int = 8
    clock: FakeClock = dataclasses.field(default_factory=FakeClock)
    starting: Callable[[Step], None] = lambda _: None
    """Called at dispatch; may raise."""
    before: Callable[[Step], None] = lambda _: None
    """Called before each step runs; may raise, or block."""
    altered: Callable[[Step, StageResult], StageResult] = lambda _, result: result
    """Returns the result in place of the right one."""
    steps: list[Step] = dataclasses.field(default_factory=list)
    reached: dict[int, int] = dataclasses.field(default_factory=dict)
    """By slot, the stage whose activation it holds: a step must find what the last one left."""

    def dispatch(self, step: Step) -> "FakeRunning":
        self.starting(step)
        return FakeRunning(self, step)


@dataclasses.dataclass
class FakeRunning:
    runner: FakeRunner
    step: Step

    def __post_init__(self) -> None:
        self.slots = [job.slot for job in self.step.jobs]  # a job may have left when its result comes

    def result(self) -> StageResult:
        runner, (route_, stage, bucket, jobs, _) = self.runner, self.step
        runner.steps.append(self.step)
        runner.before(self.step)
        assert 0 < len(jobs) <= bucket
        assert len(set(self.slots)) == len(jobs)
        for slot in self.slots:
            assert 0 <= slot < runner.capacity
            assert stage == 0 or runner.reached[slot] == stage - 1
            runner.reached[slot] = stage
        runner.clock.now += runner.routes[route_].stage_ms[bucket][stage] / 1e3
        rows = np.stack([job.image for job in jobs])
        classes = rows[:, 1].astype(int)
        result = StageResult(
            hit=rows[:, 0] <= stage,
            class_index=classes,
            score=np.full(len(jobs), stage + 1.0, np.float32),
            logits=np.eye(CLASSES, dtype=np.float32)[classes],
        )
        return runner.altered(self.step, result)


class Watcher:
    """An observer that remembers, and shadows what it is asked to."""

    def __init__(self, wanted=lambda _: False):
        self.wanted, self.asked, self.steps, self.answers, self.shadows, self.reasons = wanted, [], [], [], [], []

    def shadow(self, job, answer):
        self.asked.append((job.mark, answer.exit))
        return self.wanted(job.mark)

    def step(self, step, seconds, *, failed):
        self.steps.append((step.stage, len(step.jobs), round(seconds * 1e3, 6), failed))

    def answered(self, job, answer, seconds):
        self.answers.append((job.mark, answer.exit, round(seconds * 1e3, 6)))

    def shadowed(self, job, answer):
        self.shadows.append((job.mark, None if answer is None else (answer.exit, answer.class_index)))

    def refused(self, reason):
        self.reasons.append(reason)

    def until(self, shadows):
        """Wait until so many shadow jobs have been reported."""
        patience = time.monotonic() + PATIENCE
        while len(self.shadows) < shadows:
            assert time.monotonic() < patience, self.shadows
            time.sleep(0.001)


class Gate:
    """Holds steps until it is opened, and says when one has come."""

    def __init__(self):
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, _):
        self.entered.set()
        assert self.opened.wait(PATIENCE)
