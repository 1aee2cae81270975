"""The engine with a runner whose answers and times are computed by hand."""

import concurrent.futures
import threading

import numpy as np
import pytest

from serve.engine.engine import Engine
from serve.engine.records import DeadlineError, OverloadedError, StageResult, StepError, StoppingError
from tests.serve.fake_runner import CLASSES, FakeClock, FakeRunner, FakeRunning, image, route

PATIENCE = 30  # seconds until a test that hangs fails


class Watcher:
    """An observer that remembers."""

    def __init__(self):
        self.steps, self.answers, self.reasons = [], [], []

    def step(self, step, seconds, *, failed):
        self.steps.append((step.stage, len(step.jobs), round(seconds * 1e3, 6), failed))

    def answered(self, job, answer, seconds):
        self.answers.append((job.request_id, answer.exit, round(seconds * 1e3, 6)))

    def refused(self, reason):
        self.reasons.append(reason)


class Gate:
    """Holds steps until it is opened, and says when one has come."""

    def __init__(self):
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, _):
        self.entered.set()
        assert self.opened.wait(PATIENCE)


class TickingClock(FakeClock):
    """Time that also passes whenever it is read: a turnaround that can be counted."""

    def __init__(self, tick):
        super().__init__()
        self.tick = tick

    def __call__(self):
        self.now += self.tick
        return self.now


@pytest.fixture
def make():
    engines = []

    def start(runner, **options):
        engines.append(Engine(runner, clock=runner.clock, **options))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        assert engine.stop(PATIENCE)


def images(*pairs):
    return np.stack([image(*pair) for pair in pairs])


def results(futures):
    return [future.result(PATIENCE) for future in futures]


def test_answers_and_times_by_hand(make):
    """Stages of 2 and 4 ms for one image, 3 and 6 for two: one leaves after 3 ms, the other after 3 + 4."""
    watcher = Watcher()
    engine = make(FakeRunner([route(2.0, 4.0)]), observer=watcher)
    first, second = results(engine.submit(images((0, 7), (1, 3)), route=0, request_id="a"))
    assert (first.class_index, first.exit, first.score) == (7, 1, 1.0)
    assert (second.class_index, second.exit, second.score) == (3, 2, 2.0)
    np.testing.assert_array_equal(first.logits, np.eye(CLASSES)[7])
    assert engine.stop(PATIENCE)
    assert watcher.steps == [(0, 2, 3.0, False), (1, 1, 4.0, False)]
    assert watcher.answers == [("a", 1, 3.0), ("a", 2, 7.0)]
    statistics = engine.statistics()
    assert (statistics.answered, statistics.steps, statistics.slots_in_use) == (2, 2, 0)
    assert (statistics.waiting, statistics.backlog_ms, statistics.running) == ({}, 0.0, False)


def test_the_next_stage_is_dispatched_before_hits_are_known(make):
    """No other job waits: stages are dispatched early, and what is computed for a job that left is discarded."""
    watcher = Watcher()
    runner = FakeRunner([route(1.0, 1.0, 1.0, leave=(0.0, 0.0, 1.0))], clock=TickingClock(0.25))
    engine = make(runner, observer=watcher, overlap=True)
    for _ in range(2):  # the first shows what a turnaround is
        results(engine.submit(images((2, 1)), route=0))
    runner.steps.clear()
    first, second = results(engine.submit(images((0, 7), (2, 3)), route=0))
    assert (first.class_index, first.exit, second.class_index, second.exit) == (7, 1, 3, 3)
    assert engine.stop(PATIENCE)
    dispatched = [(step.stage, len(step.jobs), step.follows is not None) for step in runner.steps]
    assert dispatched == [(0, 2, False), (1, 2, True), (2, 1, True)]
    assert [(stage, rows) for stage, rows, *_ in watcher.steps[-3:]] == [(0, 2), (1, 1), (2, 1)]
    assert engine.statistics().slots_in_use == 0


def test_arrivals_meet_while_a_step_runs(make):
    gate = Gate()
    runner = FakeRunner([route(1.0, 1.0)], before=gate)
    engine = make(runner)
    futures = engine.submit(images((1, 1)), route=0)
    assert gate.entered.wait(PATIENCE)
    futures += [future for k in range(2) for future in engine.submit(images((0, 2 + k)), route=0)]
    assert engine.statistics().waiting == {(0, 0): 2}
    assert engine.statistics().slots_in_use == 3
    gate.opened.set()
    assert [answer.class_index for answer in results(futures)] == [1, 2, 3]
    assert sorted(len(step.jobs) for step in runner.steps) == [1, 1, 2]


def test_a_step_that_fails_fails_its_jobs_only(make):
    gate, watcher = Gate(), Watcher()

    def before(step):
        gate(step)
        if step.stage == 1:
            raise RuntimeError("the device is on fire")

    engine = make(FakeRunner([route(1.0, 1.0), route(1.0, name="base")], before=before), observer=watcher)
    bad, good = engine.submit(images((1, 1), (0, 2)), route=0)
    other = engine.submit(images((0, 3)), route=1)
    gate.opened.set()
    assert good.result(PATIENCE).class_index == 2
    assert other[0].result(PATIENCE).class_index == 3
    with pytest.raises(StepError, match="failed: RuntimeError on the way to exit 2") as failure:
        bad.result(PATIENCE)
    assert str(failure.value.__cause__) == "the device is on fire"
    assert results(engine.submit(images((0, 4)), route=0))[0].class_index == 4
    statistics = engine.statistics()
    assert (statistics.failed, statistics.failed_steps, statistics.answered) == (1, 1, 3)
    assert (statistics.slots_in_use, statistics.running) == (0, True)
    assert [failed for *_, failed in watcher.steps].count(True) == 1


@pytest.mark.parametrize("rows", [0, 2])
def test_a_result_of_other_rows_fails_the_step(make, rows):
    class OfOthers(FakeRunning):
        def result(self):
            return StageResult(*(np.concatenate([column] * 2)[:rows] for column in super().result()))

    class Wrong(FakeRunner):
        def dispatch(self, step):
            return OfOthers(self, step)

    with pytest.raises(StepError, match="ValueError"):
        make(Wrong([route(1.0)])).submit(images((0, 1)), route=0)[0].result(PATIENCE)


def test_a_dispatch_that_raises_fails_the_step(make):
    class Broken(FakeRunner):
        def dispatch(self, step):
            del step
            raise MemoryError

    engine = make(Broken([route(1.0)]))
    for _ in range(2):
        with pytest.raises(StepError, match="MemoryError"):
            engine.submit(images((0, 1)), route=0)[0].result(PATIENCE)
    assert engine.statistics().failed_steps == 2


def test_beyond_the_bound_requests_are_refused(make):
    gate, watcher = Gate(), Watcher()
    engine = make(FakeRunner([route(1.0)], before=gate), admitted=3, observer=watcher)
    futures = engine.submit(images((0, 1), (0, 2)), route=0)
    with pytest.raises(OverloadedError, match="try again"):
        engine.submit(images((0, 3), (0, 4)), route=0)
    futures += engine.submit(images((0, 5)), route=0)
    gate.opened.set()
    assert [answer.class_index for answer in results(futures)] == [1, 2, 5]
    assert engine.statistics().refused == 2
    assert watcher.reasons == ["overloaded"]
    with pytest.raises(ValueError, match="images: expected at most 3 at once, got 4"):
        engine.submit(images(*[(0, 1)] * 4), route=0)
    assert engine.statistics().refused == 6
    assert watcher.reasons == ["overloaded", "too_large"]  # what is counted as refused, the observer gets
    for bad in (-1, 1):
        with pytest.raises(ValueError, match="route: expected 0 to 0"):
            engine.submit(images((0, 1)), route=bad)


def test_a_deadline_that_has_passed_is_an_error(make):
    gate, watcher = Gate(), Watcher()
    runner = FakeRunner([route(5.0, buckets=(1,))], before=gate)
    engine = make(runner, observer=watcher)
    (first,) = engine.submit(images((0, 1)), route=0)
    assert gate.entered.wait(PATIENCE)
    (late,) = engine.submit(images((0, 2)), route=0, deadline=runner.clock.now + 0.004)  # the first takes 5 ms
    (kept,) = engine.submit(images((0, 3)), route=0, deadline=runner.clock.now + 0.020)
    gate.opened.set()
    assert first.result(PATIENCE).class_index == 1
    assert kept.result(PATIENCE).class_index == 3
    with pytest.raises(DeadlineError, match=r"passed after 0.005 s"):
        late.result(PATIENCE)
    assert engine.statistics().expired == 1
    assert watcher.reasons == ["deadline"]


@pytest.mark.parametrize("how", ["cancel", "abandon"])
def test_a_client_that_leaves_frees_its_slot(make, how):
    gate = Gate()
    runner = FakeRunner([route(1.0, 1.0, buckets=(1,))], before=gate, capacity=2)
    engine = make(runner)
    running, waiting = engine.submit(images((1, 1), (0, 2)), route=0)
    assert gate.entered.wait(PATIENCE)
    if how == "cancel":
        assert running.cancel()
        assert waiting.cancel()
    else:
        engine.abandon([running, waiting])
    assert engine.statistics().slots_in_use == 2  # one is being written; the other is freed before the next step
    gate.opened.set()
    assert not concurrent.futures.wait([running, waiting], PATIENCE).not_done  # cancelled, and notified
    results(engine.submit(images((0, 3)), route=0))
    assert [step.stage for step in runner.steps] == [0, 0]
    statistics = engine.statistics()
    assert (statistics.abandoned, statistics.answered, statistics.slots_in_use) == (2, 1, 0)


def test_stopping_finishes_admitted_requests(make):
    gate, watcher = Gate(), Watcher()
    engine = make(FakeRunner([route(1.0, 1.0)], before=gate), observer=watcher)
    futures = engine.submit(images((1, 1), (0, 2), (1, 3)), route=0)
    assert not engine.stop(0.0)  # it is not finished
    with pytest.raises(StoppingError):
        engine.submit(images((0, 4)), route=0)
    gate.opened.set()
    assert engine.stop(PATIENCE)
    assert [future.result(0).class_index for future in futures] == [1, 2, 3]
    assert watcher.reasons == ["stopping"]
    assert not engine.statistics().running


@pytest.mark.parametrize("started", [False, True])
def test_an_idle_engine_stops_in_no_time(started):
    """--drain 0, or a drain that a client with half a body has used up, ended in exit code 1 and a false log line."""
    engine = Engine(FakeRunner([route(1.0)]))
    if started:
        engine.start()
    try:
        assert engine.stop(0.0)
    finally:
        engine.stop()


def test_observers_and_callbacks_that_raise_change_nothing(make, caplog):
    class Rude(Watcher):
        def step(self, *args, **kwargs):
            raise RuntimeError(args, kwargs)

        answered = step

    engine = make(FakeRunner([route(1.0)]), observer=Rude())
    for k in range(2):
        assert results(engine.submit(images((0, k)), route=0))[0].class_index == k
    assert "the observer failed" in caplog.text


def test_a_bug_fails_all_jobs_in_flight(make, monkeypatch, caplog):
    gate = Gate()
    engine = make(FakeRunner([route(1.0, buckets=(1,))], before=gate))
    futures = engine.submit(images((0, 1), (0, 2)), route=0)
    assert gate.entered.wait(PATIENCE)
    monkeypatch.setattr(engine._shared.scheduler, "finish", lambda *_: 1 / 0)
    gate.opened.set()
    for future in futures:
        with pytest.raises(StepError, match="the engine had to stop"):
            future.result(PATIENCE)
    with pytest.raises(StoppingError):
        engine.submit(images((0, 1)), route=0)
    assert "the engine's thread ends" in caplog.text
