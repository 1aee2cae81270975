"""The engine with a runner whose answers and times are computed by hand."""

import concurrent.futures
import contextlib
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.engine import Engine
from serve.engine.records import DeadlineError, OverloadedError, StepError, StoppingError
from tests.serve.fake_runner import CLASSES, PATIENCE, FakeClock, FakeRunner, Gate, Watcher, image, images, route


class TickingClock(FakeClock):
    """Time that also passes whenever it is read: a turnaround that can be counted."""

    def __call__(self):
        self.now += 0.25
        return self.now


@contextlib.contextmanager
def running(runner, watcher=None, **options):
    watcher = watcher or Watcher()
    engine = Engine(runner, clock=runner.clock, observer=watcher, shadow=watcher.shadow, **options)
    engine.start()
    try:
        yield engine
    finally:
        assert engine.stop(PATIENCE)


@pytest.fixture
def make():
    with contextlib.ExitStack() as engines:
        yield lambda *given, **options: engines.enter_context(running(*given, **options))


def results(futures):
    return [future.result(PATIENCE) for future in futures]


def classes(futures):
    return [answer.class_index for answer in results(futures)]


def test_answers_and_times_by_hand(make):
    """Stages of 2 and 4 ms for one image, 3 and 6 for two: one leaves after 3 ms, the other after 3 + 4."""
    watcher = Watcher()
    engine = make(FakeRunner([route(2.0, 4.0)]), watcher)
    first, second = results(engine.submit(images((0, 7), (1, 3)), route=0, marks="ab"))
    assert (first.class_index, first.exit, first.score) == (7, 1, 1.0)
    assert (second.class_index, second.exit, second.score) == (3, 2, 2.0)
    np.testing.assert_array_equal(first.logits, np.eye(CLASSES)[7])
    assert engine.stop(PATIENCE)
    assert watcher.steps == [(0, 2, 3.0, False), (1, 1, 4.0, False)]
    assert watcher.answers == [("a", 1, 3.0), ("b", 2, 7.0)]
    now = engine.statistics()
    assert (now.answered, now.steps, now.slots_in_use) == (2, 2, 0)
    assert (now.waiting, now.backlog_ms, now.running) == ({}, 0.0, False)


def test_the_next_stage_is_dispatched_before_hits_are_known(make):
    """No other job waits: stages are dispatched early, and what is computed for a job that left is discarded."""
    watcher = Watcher()
    runner = FakeRunner([route(1.0, 1.0, 1.0, leave=(0.0, 0.0, 1.0))], clock=TickingClock())
    engine = make(runner, watcher, overlap=True)
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
    assert (engine.statistics().waiting, engine.statistics().slots_in_use) == ({(0, 0): 2}, 3)
    gate.opened.set()
    assert classes(futures) == [1, 2, 3]
    assert sorted(len(step.jobs) for step in runner.steps) == [1, 1, 2]


# Failures


def fail(step):
    if step.stage == 1:
        raise RuntimeError("the device is on fire")


def rows(count):
    return lambda step, result: result.take([0] * count) if step.stage == 1 else result


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ({"before": fail}, RuntimeError("the device is on fire")),
        ({"starting": fail}, RuntimeError("the device is on fire")),
        ({"altered": rows(0)}, ValueError("runner: expected 1 rows, got 0")),
        ({"altered": rows(2)}, ValueError("runner: expected 1 rows, got 2")),
    ],
)
def test_a_step_that_fails_fails_its_jobs_only(make, how, cause):
    watcher = Watcher()
    engine = make(FakeRunner([route(1.0, 1.0), route(1.0, name="base")], **how), watcher)
    bad, good = engine.submit(images((1, 1), (0, 2)), route=0)
    other = engine.submit(images((0, 3)), route=1)
    assert classes([good, *other]) == [2, 3]
    with pytest.raises(StepError, match=f"failed: {type(cause).__name__} on the way to exit 2") as failure:
        bad.result(PATIENCE)
    assert repr(failure.value.__cause__) == repr(cause)
    assert classes(engine.submit(images((0, 4)), route=0)) == [4]
    now = engine.statistics()
    assert (now.failed, now.failed_steps, now.answered, now.slots_in_use, now.running) == (1, 1, 3, 0, True)
    assert [failed for *_, failed in watcher.steps].count(True) == 1


def test_a_shadow_job_that_fails_is_reported_and_concerns_no_other(make):
    watcher = Watcher(lambda _: True)
    engine = make(FakeRunner([route(1.0, 1.0)], before=fail), watcher)
    hit, client = engine.submit(images((0, 7), (1, 1)), route=0, marks=["shadow", "client"])
    assert hit.result(PATIENCE).class_index == 7
    with pytest.raises(StepError):
        client.result(PATIENCE)
    watcher.until(1)
    assert watcher.shadows == [("shadow", None)]
    assert engine.stop(PATIENCE)
    now = engine.statistics()
    assert (now.failed, now.answered, now.shadowed, now.slots_in_use) == (1, 1, 0, 0)


def test_observers_that_raise_change_nothing(make, caplog):
    class Rude(Watcher):
        def step(self, *args, **kwargs):
            raise RuntimeError(args, kwargs)

        answered = shadow = step

    watcher = Rude()
    engine = make(FakeRunner([route(1.0, 1.0)]), watcher)
    for k in range(2):
        assert classes(engine.submit(images((0, k)), route=0)) == [k]
    assert engine.stop(PATIENCE)
    assert "the observer failed" in caplog.text
    assert "the choice of shadow jobs failed" in caplog.text
    assert (engine.statistics().slots_in_use, watcher.shadows) == (0, [])


def test_a_bug_fails_all_jobs_in_flight(make, monkeypatch, caplog):
    gate = Gate()
    engine = make(FakeRunner([route(1.0, buckets=(1,))], before=gate))
    futures = engine.submit(images((0, 1), (0, 2)), route=0)
    assert gate.entered.wait(PATIENCE)
    monkeypatch.setattr("serve.engine.scheduler.Scheduler.finish", lambda *_: 1 / 0)
    gate.opened.set()
    for future in futures:
        with pytest.raises(StepError, match="the engine had to stop"):
            future.result(PATIENCE)
    with pytest.raises(StoppingError):
        engine.submit(images((0, 1)), route=0)
    assert "the engine's thread ends" in caplog.text


# Refusals, deadlines, clients that leave, and the end


def test_beyond_the_bound_requests_are_refused(make):
    gate, watcher = Gate(), Watcher()
    engine = make(FakeRunner([route(1.0)], capacity=3, before=gate), watcher)
    futures = engine.submit(images((0, 1), (0, 2)), route=0)
    with pytest.raises(OverloadedError, match="try again"):
        engine.submit(images((0, 3), (0, 4)), route=0)
    futures += engine.submit(images((0, 5)), route=0)
    gate.opened.set()
    assert classes(futures) == [1, 2, 5]
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
    engine = make(runner, watcher)
    first = engine.submit(images((0, 1)), route=0)
    assert gate.entered.wait(PATIENCE)
    (late,) = engine.submit(images((0, 2)), route=0, deadline=runner.clock.now + 0.004)  # the first takes 5 ms
    kept = engine.submit(images((0, 3)), route=0, deadline=runner.clock.now + 0.020)
    gate.opened.set()
    assert classes(first + kept) == [1, 3]
    with pytest.raises(DeadlineError, match=r"no time is left for an answer after 0.005 s"):
        late.result(PATIENCE)
    assert (engine.statistics().expired, watcher.reasons) == (1, ["deadline"])


def test_a_client_that_leaves_frees_its_slot(make):
    gate = Gate()
    runner = FakeRunner([route(1.0, 1.0, buckets=(1,))], before=gate, capacity=2)
    engine = make(runner)
    leaving = engine.submit(images((1, 1), (0, 2)), route=0)
    assert gate.entered.wait(PATIENCE)
    assert all(future.cancel() for future in leaving)
    assert engine.statistics().slots_in_use == 2  # one is being written; the other is freed before the next step
    gate.opened.set()
    assert not concurrent.futures.wait(leaving, PATIENCE).not_done  # cancelled, and notified
    results(engine.submit(images((0, 3)), route=0))
    assert [step.stage for step in runner.steps] == [0, 0]
    now = engine.statistics()
    assert (now.abandoned, now.answered, now.slots_in_use) == (2, 1, 0)


def test_stopping_finishes_admitted_requests_and_drops_shadow_jobs_that_wait(make):
    gate, watcher = Gate(), Watcher(lambda mark: mark in "ab")
    engine = make(FakeRunner([route(1.0, 1.0, buckets=(1,))], before=gate), watcher)
    futures = engine.submit(images((0, 1), (0, 2), (1, 3)), route=0, marks="abc")
    assert gate.entered.wait(PATIENCE)
    assert not engine.stop(0.0)  # it is not finished
    for late in (lambda: engine.submit(images((0, 4)), route=0), lambda: engine.submit_shadow(image(0), route=0)):
        with pytest.raises(StoppingError):
            late()
    with pytest.raises(StoppingError):
        engine.between_steps(lambda: None).result(PATIENCE)
    gate.opened.set()
    assert engine.stop(PATIENCE)
    assert [future.result(0).class_index for future in futures] == [1, 2, 3]
    assert sorted(watcher.shadows) == [("a", None), ("b", None)]
    assert watcher.reasons == ["stopping"]
    assert (engine.statistics().running, engine.statistics().slots_in_use) == (False, 0)


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


# Shadow jobs: a cache has answered their clients, and they go on for the base's answer


def test_a_hit_is_answered_at_once_and_runs_on_by_hand(make):
    """Stages of 2, 4 and 8 ms: it hits at the first, would hit at the second, and the third answers its shadow job."""
    watcher = Watcher(lambda _: True)
    engine = make(FakeRunner([route(2.0, 4.0, 8.0)]), watcher)
    (answer,) = results(engine.submit(images((0, 7)), route=0, marks=["a"]))
    assert (answer.class_index, answer.exit) == (7, 1)
    watcher.until(1)
    assert watcher.asked == [("a", 1)], "shadow jobs hit no more"
    assert (watcher.answers, watcher.shadows) == ([("a", 1, 2.0)], [("a", (3, 7))])
    assert engine.stop(PATIENCE)
    now = engine.statistics()
    assert (now.answered, now.shadowed, now.slots_in_use, now.abandoned, now.failed) == (1, 1, 0, 0, 0)
    assert now.leave == ((0.5 + 0.5 / 501, 0.5, 1.0),), "one row has left at the first stage; shadow jobs teach nothing"


def test_a_shadow_job_outlives_its_deadline_and_a_client_that_has_left_leaves_none(make):
    gate, watcher = Gate(), Watcher(lambda _: True)
    runner = FakeRunner([route(2.0, 4.0)], before=gate)
    engine = make(runner, watcher)
    deadline = runner.clock.now + 0.0025
    (kept,) = engine.submit(images((0, 7)), route=0, deadline=deadline, marks=["kept"])
    assert gate.entered.wait(PATIENCE)
    (gone,) = engine.submit(images((0, 8)), route=0, marks=["gone"])
    assert gone.cancel()
    gate.opened.set()
    assert kept.result(PATIENCE).exit == 1
    watcher.until(1)
    assert watcher.shadows == [("kept", (2, 7))]
    assert runner.clock.now > deadline
    assert engine.stop(PATIENCE)
    assert [mark for mark, _ in watcher.asked] == ["kept"]
    assert engine.statistics().expired == 0


def test_a_shadow_job_from_the_start_is_answered_by_the_last_stage_only(make):
    watcher = Watcher(lambda _: True)
    engine = make(FakeRunner([route(1.0, 1.0)]), watcher)
    engine.submit_shadow(image(0, 5), route=0, mark="g")
    watcher.until(1)
    assert (watcher.shadows, watcher.answers, watcher.asked) == ([("g", (2, 5))], [], [])
    assert engine.stop(PATIENCE)
    assert (engine.statistics().answered, engine.statistics().shadowed) == (0, 1)


ROWS = st.tuples(st.integers(0, 3), st.integers(0, 9), st.booleans(), st.integers(0, 1))
"""The stage it leaves at, class, whether it is to be shadowed, route."""


@settings(max_examples=60, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=24), st.booleans())
def test_shadows_change_no_answer_and_every_shadow_job_is_answered_by_the_base(rows, overlap):
    routes = [route(1.0, 1.0, 1.0), route(1.0, 1.0, name="other")]
    wanted = {i for i, (_, _, is_wanted, _) in enumerate(rows) if is_wanted}
    watcher = Watcher(lambda mark: mark in wanted)
    hits, deepest = set(), []
    with running(FakeRunner(routes, capacity=6), watcher, overlap=overlap) as engine:
        for i, (leaves_at, class_index, _, number) in enumerate(rows):
            (answer,) = results(engine.submit(images((leaves_at, class_index)), route=number, marks=[i]))
            exits = routes[number].exits
            stage = min(leaves_at, len(exits) - 1)
            assert (answer.class_index, answer.exit, answer.score) == (class_index, exits[stage], stage + 1.0)
            if stage < len(exits) - 1:
                hits.add(i)
            deepest.append((exits[-1], class_index))
        watcher.until(len(hits & wanted))
    assert {mark for mark, _ in watcher.asked} == hits
    assert sorted(watcher.shadows) == [(i, deepest[i]) for i in sorted(hits & wanted)]
    now = engine.statistics()
    assert (now.answered, now.shadowed, now.slots_in_use) == (len(rows), len(hits & wanted), 0)


# Between two steps


def test_work_between_steps_runs_in_the_engines_thread_and_in_no_step(make):
    stepping, seen = threading.Event(), []

    def before(_):
        stepping.set()
        seen.append("step")
        stepping.clear()

    engine = make(FakeRunner([route(1.0, 1.0)], before=before))

    def work():
        seen.append((threading.current_thread().name, stepping.is_set()))

    futures = engine.submit(images((1, 1)), route=0)
    engine.between_steps(work).result(PATIENCE)
    assert results(futures)[0].exit == 2
    engine.between_steps(work).result(PATIENCE)  # no job waits: it runs at once
    assert [one for one in seen if one != "step"] == [("engine", False)] * 2
    assert seen.count("step") == 2


def test_work_that_fails_says_so_and_the_server_goes_on(make):
    engine = make(FakeRunner([route(1.0)]))
    with pytest.raises(ZeroDivisionError):
        engine.between_steps(lambda: 1 / 0 and None).result(PATIENCE)
    assert classes(engine.submit(images((0, 7)), route=0)) == [7]
