"""Requests that a cache has answered and that go on for the base's answer; and work between two steps."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.engine import Engine
from serve.engine.records import Job, StepError, StoppingError
from serve.engine.scheduler import Scheduler
from tests.serve.fake_runner import FakeRunner, image, route

PATIENCE = 30  # seconds until a test that hangs fails


class Watcher:
    """An observer that remembers, and shadows what it is asked to."""

    def __init__(self, wanted=lambda _: True):
        self.wanted, self.asked, self.answers, self.shadows, self.steps = wanted, [], [], [], []

    def shadow(self, job, answer):
        self.asked.append((job.mark, answer.exit))
        return self.wanted(job.mark)

    def step(self, step, seconds, *, failed):
        self.steps.append((step.stage, len(step.jobs), seconds, failed))

    def answered(self, job, answer, seconds):
        self.answers.append((job.mark, answer.exit, round(seconds * 1e3, 6)))

    def shadowed(self, job, answer):
        self.shadows.append((job.mark, None if answer is None else (answer.exit, answer.class_index)))

    def refused(self, reason):
        pass


class Gate:
    """Holds steps until it is opened."""

    def __init__(self):
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, _):
        self.entered.set()
        assert self.opened.wait(PATIENCE)


@pytest.fixture
def make():
    engines = []

    def start(runner, watcher, **options):
        made = Engine(runner, clock=runner.clock, observer=watcher, shadow=watcher.shadow, **options)
        engines.append(made)
        made.start()
        return made

    yield start
    for engine in engines:
        assert engine.stop(PATIENCE)


def images(*pairs):
    return np.stack([image(*pair) for pair in pairs])


def until(watcher, count):
    """Wait until so many shadow jobs have been reported."""
    for _ in range(PATIENCE * 1000):
        if len(watcher.shadows) >= count:
            return
        threading.Event().wait(0.001)
    pytest.fail(f"expected {count} shadow jobs, got {watcher.shadows}")


def test_a_hit_is_answered_at_once_and_runs_on_by_hand(make):
    """Stages of 2, 4 and 8 ms: it hits at the first, would hit at the second, and the third answers its shadow job."""
    watcher, runner = Watcher(), FakeRunner([route(2.0, 4.0, 8.0)])
    engine = make(runner, watcher)
    (answer,) = (future.result(PATIENCE) for future in engine.submit(images((0, 7)), route=0, marks=["a"]))
    assert (answer.class_index, answer.exit) == (7, 1)
    until(watcher, 1)
    assert watcher.asked == [("a", 1)], "shadow jobs hit no more"
    assert watcher.answers == [("a", 1, 2.0)]
    assert watcher.shadows == [("a", (3, 7))]
    assert engine.stop(PATIENCE)
    now = engine.statistics()
    assert (now.answered, now.shadowed, now.slots_in_use, now.abandoned, now.failed) == (1, 1, 0, 0, 0)
    assert now.leave == ((0.5 + 0.5 / 501, 0.5, 1.0),), "one row has left at the first stage; shadow jobs teach nothing"


def test_the_bases_answers_are_not_shadowed_nor_is_what_is_not_wanted(make):
    watcher, runner = Watcher(lambda mark: mark == "b"), FakeRunner([route(1.0, 1.0)])
    engine = make(runner, watcher)
    futures = engine.submit(images((1, 1), (0, 2), (0, 3)), route=0, marks="cba")
    assert [future.result(PATIENCE).class_index for future in futures] == [1, 2, 3]
    until(watcher, 1)
    assert engine.stop(PATIENCE)
    assert sorted(watcher.asked) == [("a", 1), ("b", 1)]
    assert watcher.shadows == [("b", (2, 2))]


def test_a_shadow_job_outlives_its_deadline_and_a_client_that_has_left_leaves_none(make):
    gate, watcher = Gate(), Watcher()
    runner = FakeRunner([route(2.0, 4.0)], before=gate)
    engine = make(runner, watcher)
    deadline = runner.clock.now + 0.0025
    (kept,) = engine.submit(images((0, 7)), route=0, deadline=deadline, marks=["kept"])
    assert gate.entered.wait(PATIENCE)
    (gone,) = engine.submit(images((0, 8)), route=0, marks=["gone"])
    engine.abandon([gone])
    gate.opened.set()
    assert kept.result(PATIENCE).exit == 1
    until(watcher, 1)
    assert watcher.shadows == [("kept", (2, 7))]
    assert runner.clock.now > deadline
    assert engine.stop(PATIENCE)
    assert [mark for mark, _ in watcher.asked] == ["kept"]
    assert engine.statistics().expired == 0


def test_a_shadow_job_that_fails_is_reported_and_concerns_no_other(make):
    def before(step):
        if step.stage == 1:
            raise RuntimeError("the device is on fire")

    watcher = Watcher()
    engine = make(FakeRunner([route(1.0, 1.0)], before=before), watcher)
    futures = engine.submit(images((0, 7), (1, 1)), route=0, marks=["shadow", "client"])
    assert futures[0].result(PATIENCE).class_index == 7
    with pytest.raises(StepError):
        futures[1].result(PATIENCE)
    until(watcher, 1)
    assert watcher.shadows == [("shadow", None)]
    assert engine.stop(PATIENCE)
    now = engine.statistics()
    assert (now.failed, now.answered, now.shadowed, now.slots_in_use) == (1, 1, 0, 0)


def test_a_shadow_that_fails_keeps_no_client_from_an_answer(make):
    def broken(_):
        raise RuntimeError("a bug")

    watcher = Watcher(broken)
    engine = make(FakeRunner([route(1.0, 1.0)]), watcher)
    assert engine.submit(images((0, 7)), route=0)[0].result(PATIENCE).class_index == 7
    assert engine.stop(PATIENCE)
    assert (engine.statistics().slots_in_use, watcher.shadows) == (0, [])


def test_shadow_jobs_that_wait_are_dropped_when_the_server_stops(make):
    gate, watcher = Gate(), Watcher()
    runner = FakeRunner([route(1.0, 1.0, buckets=(1,))], before=gate)
    engine = make(runner, watcher)
    futures = engine.submit(images((0, 1), (0, 2), (1, 3)), route=0, marks="abc")
    assert gate.entered.wait(PATIENCE)
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    while not engine._shared.stopping:
        pass
    gate.opened.set()
    stopping.join(PATIENCE)
    assert [future.result(0).class_index for future in futures] == [1, 2, 3]
    assert sorted(watcher.shadows) == [("a", None), ("b", None)]
    assert engine.statistics().slots_in_use == 0


def test_a_shadow_job_from_the_start_is_answered_by_the_last_stage_only(make):
    watcher = Watcher()
    engine = make(FakeRunner([route(1.0, 1.0)]), watcher)
    engine.submit_shadow(image(0, 5), route=0, mark="g")
    until(watcher, 1)
    assert (watcher.shadows, watcher.answers, watcher.asked) == ([("g", (2, 5))], [], [])
    assert engine.stop(PATIENCE)
    with pytest.raises(StoppingError):
        engine.submit_shadow(image(0, 5), route=0)
    assert (engine.statistics().answered, engine.statistics().shadowed) == (0, 1)


# Who goes first


def shadow(arrived=0.0, *, route=0):
    return Job(image=image(9), route=route, arrived=arrived, is_shadow=True)


def client(arrived=0.0, *, route=0, deadline=None):
    return Job(image=image(9), route=route, arrived=arrived, deadline=deadline)


def test_no_step_is_run_for_a_shadow_job_while_a_client_waits_and_it_takes_rows_that_are_free():
    scheduler = Scheduler([route(1.0, buckets=(2,)), route(100.0)], 8)
    first, second, lone, patient = shadow(), shadow(), client(0.1), client(0.1, route=1)
    scheduler.admit([first, second, lone, patient])
    steps = [scheduler.next_step(0.2) for _ in range(3)]
    assert [step and step.jobs for step in steps] == [(lone, first), (patient,), (second,)]


def test_a_shadow_job_that_has_waited_long_counts_as_a_client_that_came_later():
    """It gains 1 / 1 ms against 1 / 100, so once it counts, it goes first; and who came 0.25 s later goes behind it."""
    for now, first in ((0.2, 1), (0.3, 0)):
        scheduler = Scheduler([route(1.0), route(100.0)], 8, max_wait=10.0)
        scheduler.admit([shadow(), client(0.1, route=1)])
        step = scheduler.next_step(now)
        assert step
        assert step.route == first
    scheduler = Scheduler([route(1.0, buckets=(1,))], 8)
    early, waiting, late = client(0.2), shadow(), client(0.3)
    scheduler.admit([early, waiting, late])
    steps = [scheduler.next_step(0.4) for _ in range(3)]
    assert [step and step.jobs[0] for step in steps] == [early, waiting, late]


def test_a_shadow_job_at_the_head_hides_no_deadline():
    scheduler = Scheduler([route(10.0, buckets=(2,)), route(1.0)], 8, max_wait=10.0)
    scheduler.admit([shadow(), client(0.9, deadline=1.4155), client(1.4, route=1)])
    step = scheduler.next_step(1.4)  # 0.5 ms to spare, and the other step takes 1
    assert step
    assert step.route == 0


# Whatever happens


ROWS = st.tuples(st.integers(0, 3), st.integers(0, 9), st.booleans(), st.integers(0, 1))
"""The stage it leaves at, class, whether it is to be shadowed, route."""


@settings(max_examples=60, deadline=None)
@given(
    st.lists(ROWS, min_size=1, max_size=24),
    st.booleans(),
    st.integers(1, 3),
)
def test_shadows_change_no_answer_and_every_shadow_job_is_answered_by_the_base(rows, overlap, ahead):
    routes = [route(1.0, 1.0, 1.0), route(1.0, 1.0, name="other")]
    wanted = {i for i, (_, _, is_wanted, _) in enumerate(rows) if is_wanted}
    watcher = Watcher(lambda mark: mark in wanted)
    runner = FakeRunner(routes, capacity=6)
    engine = Engine(runner, clock=runner.clock, observer=watcher, shadow=watcher.shadow, overlap=overlap, ahead=ahead)
    engine.start()
    hits, deepest = set(), []
    for i, (leaves_at, class_index, _, number) in enumerate(rows):
        (future,) = engine.submit(images((leaves_at, class_index)), route=number, marks=[i])
        exits = routes[number].exits
        stage = min(leaves_at, len(exits) - 1)
        answer = future.result(PATIENCE)
        assert (answer.class_index, answer.exit, answer.score) == (class_index, exits[stage], stage + 1.0)
        if stage < len(exits) - 1:
            hits.add(i)
        deepest.append((exits[-1], class_index))
    until(watcher, len(hits & wanted))
    assert engine.stop(PATIENCE)
    assert {mark for mark, _ in watcher.asked} == hits
    assert sorted(watcher.shadows) == [(i, deepest[i]) for i in sorted(hits & wanted)]
    assert sorted(engine._shared.scheduler._free) == list(range(6))
    assert engine._shared.scheduler._shadows == 0
    assert (engine.statistics().answered, engine.statistics().shadowed) == (len(rows), len(hits & wanted))


# Between two steps


def test_work_between_steps_runs_in_the_engines_thread_and_in_no_step(make):
    running, seen = threading.Event(), []

    def before(_):
        running.set()
        seen.append("step")
        running.clear()

    engine = make(FakeRunner([route(1.0, 1.0)], before=before), Watcher())

    def work():
        seen.append((threading.current_thread().name, running.is_set()))

    futures = engine.submit(images((1, 1)), route=0)
    engine.between_steps(work).result(PATIENCE)
    assert futures[0].result(PATIENCE).exit == 2
    engine.between_steps(work).result(PATIENCE)  # nobody waits: it need not wait for anybody
    assert [one for one in seen if one != "step"] == [("engine", False)] * 2
    assert seen.count("step") == 2


def test_work_that_fails_says_so_and_the_server_goes_on(make):
    engine = make(FakeRunner([route(1.0)]), Watcher())

    def work():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.between_steps(work).result(PATIENCE)
    assert engine.submit(images((0, 7)), route=0)[0].result(PATIENCE).class_index == 7
    assert engine.stop(PATIENCE)
    with pytest.raises(StoppingError):
        engine.between_steps(lambda: None).result(PATIENCE)
