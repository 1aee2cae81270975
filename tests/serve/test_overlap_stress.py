"""Overlapped steps with threads, cancellations, deadlines, failures and shadow jobs: no job is lost or mixed up."""

import collections
import queue
import random
import threading
import time
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

import numpy as np
import pytest

from serve.engine import policy
from serve.engine.engine import Engine
from serve.engine.records import DeadlineError, OverloadedError, StageResult, Step, StepError
from tests.serve.fake_runner import CLASSES, Watcher, route

CAPACITY = 12


@dataclass
class Device:
    """Runs steps in the order of dispatch, in a thread; ``slabs`` holds the row in each slot."""

    routes: tuple
    seed: int
    failing: float
    capacity: int = CAPACITY
    jobs: queue.Queue = field(default_factory=queue.Queue)
    wrong: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.slabs: dict[tuple[int, int], np.ndarray | None] = {}
        threading.Thread(target=self.work, daemon=True).start()

    def dispatch(self, step: Step) -> "Future[StageResult]":
        if self.random.random() < self.failing:
            raise OSError("dispatch")
        done: Future[StageResult] = Future()
        images = [job.image for job in step.jobs] if step.stage == 0 else None
        fails = self.random.random() < self.failing
        self.jobs.put((done, step.stage, [job.slot for job in step.jobs], images, len(step.jobs), fails))
        return done

    def work(self) -> None:
        while True:
            done, stage, slots, images, count, fails = self.jobs.get()
            if self.random.random() < 0.3:
                time.sleep(self.random.random() * 3e-4)
            if len(set(slots)) != count or min(slots) < 0:
                self.wrong.append((stage, slots))
            rows = images if stage == 0 else [self.slabs.get((stage, slot)) for slot in slots]
            rows = [np.array([0, 0, -1]) if row is None else row for row in rows]
            hit = np.array([row[0] <= stage for row in rows])
            for slot, row in zip(slots, rows, strict=True):
                self.slabs[stage + 1, slot] = None if fails else row
            if fails:
                done.set_exception(OSError("result"))
                continue
            score = np.array([row[2] for row in rows], np.float64)
            classes = np.array([int(row[1]) for row in rows])
            done.set_result(StageResult(hit, classes, score, np.eye(CLASSES)[classes]))


class Shadowing(Watcher):
    """Shadows every third request, and compares its answer with the base's."""

    def __init__(self, routes: tuple) -> None:
        super().__init__()
        self.routes = routes

    def shadow(self, job, answer):
        job.mark = job.image[2]
        self.wanted = lambda number: number % 3 == 0
        return super().shadow(job, answer)

    def shadowed(self, job, answer):
        super().shadowed(job, answer)
        if answer is not None:
            expected = (self.routes[job.route].depth, job.image[1], job.image[2])
            assert (answer.exit, answer.class_index, answer.score) == expected


def submit(engine: Engine, images: np.ndarray, which: int, in_time: float | None) -> list[Future]:
    """Submit until admitted: a busy machine is not to decide how much the test sees."""
    while True:
        deadline = None if in_time is None else time.monotonic() + in_time
        try:
            return engine.submit(images, route=which, deadline=deadline)
        except OverloadedError:
            time.sleep(1e-4)


@pytest.mark.parametrize("failing", [0.0, 0.05])
@pytest.mark.parametrize("seed", range(4))
def test_no_job_is_lost_or_mixed_up(failing, seed, monkeypatch, caplog):
    monkeypatch.setattr(policy, "overlap_pays", lambda *_: True)
    routes = (route(1.0, 1.0, 1.0, 1.0), route(1.0, 1.0, name="other"))
    device = Device(routes, seed, failing)
    watcher = Shadowing(routes)
    engine = Engine(device, overlap=True, observer=watcher, shadow=watcher.shadow)
    engine.start()
    outcomes: collections.Counter[str] = collections.Counter()
    lock = threading.Lock()

    def outcome(image, which, future) -> str:
        try:
            answer = future.result(timeout=20)
        except (CancelledError, DeadlineError, StepError) as error:
            return type(error).__name__
        last = len(routes[which].exits) - 1
        expected = (int(image[1]), routes[which].exits[min(int(image[0]), last)], image[2])
        return "ok" if (answer.class_index, answer.exit, answer.score) == expected else "wrong"

    def client(number: int) -> None:
        mine = random.Random(seed * 100 + number)
        for i in range(250):
            n, which = mine.randint(1, 3), mine.randint(0, 1)
            ids = [number * 1e6 + i * 10 + k for k in range(n)]
            images = np.array([[mine.randint(0, 3), int(one) % CLASSES, one] for one in ids])
            in_time = mine.random() * 3e-3 if mine.random() < 0.1 else None
            futures = submit(engine, images, which, in_time)
            if mine.random() < 0.15:
                time.sleep(mine.random() * 1e-3)
                for future in futures[: mine.randint(1, n)]:
                    future.cancel()
            found = [outcome(image, which, future) for image, future in zip(images, futures, strict=True)]
            with lock:
                outcomes.update(found)
            if mine.random() < 0.3:
                time.sleep(mine.random() * 1e-3)  # so that the queues are empty, and steps overlap

    threads = [threading.Thread(target=client, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.stop(timeout=20)
    now = engine.statistics()
    chosen = sorted(mark for mark, _ in watcher.asked if watcher.wanted(mark))
    assert (device.wrong, outcomes["wrong"]) == ([], 0)
    assert "the observer failed" not in caplog.text
    assert sorted(mark for mark, _ in watcher.shadows) == chosen
    assert len(chosen) > 50
    assert failing or now.shadowed >= len(chosen) - CAPACITY  # the others are dropped as it stops
    names = ("ok", "DeadlineError", "CancelledError", "StepError")
    assert [outcomes[name] for name in names] == [now.answered, now.expired, now.abandoned, now.failed]
    assert (now.slots_in_use, now.waiting, now.backlog_ms) == (0, {}, 0.0)
    assert bool(now.failed) == bool(failing)
