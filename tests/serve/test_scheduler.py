"""The scheduler: by hand, by properties, and against first come, first served."""

import collections
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.engine import policy
from serve.engine.records import Job, OverloadedError, Step
from serve.engine.scheduler import Scheduler
from tests.serve.fake_runner import image, route


def job(arrived=0.0, *, route=0, deadline=None, leaves_at=0, is_shadow=False) -> Job:
    return Job(image=image(leaves_at), route=route, arrived=arrived, deadline=deadline, is_shadow=is_shadow)


def admit(scheduler, *jobs: Job) -> tuple[Job, ...]:
    for each in jobs:
        scheduler.admit((each,))
    return jobs


def take(scheduler, now) -> Step:
    step = scheduler.next_step(now)
    assert step
    return step


def leaves(step):
    return [each.image[0] <= step.stage for each in step.jobs]


# What it costs and gains, by hand: a stage of 2 ms takes 2, 3, 5 ms for 1, 2, 4 images; one of 4 ms 4, 6, 10


def test_what_a_row_costs_and_gains():
    """A row counts at its cost in the best bucket, later stages by the share that reaches them; it looks far enough."""
    stage_ms = route(2.0, 4.0).stage_ms
    assert policy.row_ms(stage_ms) == (5 / 4, 10 / 4)
    assert policy.remaining_ms(stage_ms, (0.6, 1.0)) == pytest.approx((5 / 4 + 0.4 * 10 / 4, 10 / 4))
    assert policy.gain(stage_ms, (0.6, 1.0), 0, 2, 2) == pytest.approx(max(1.2 / 3, 2 / (3 + 0.8 * 2.5)))
    assert policy.gain(stage_ms, (0.0, 1.0), 0, 1, 1) == pytest.approx(1 / (2 + 2.5))  # none leaves at first
    assert policy.gain(stage_ms, (0.9, 1.0), 0, 1, 1) == pytest.approx(max(0.9 / 2, 1 / (2 + 0.1 * 2.5)))


@pytest.mark.parametrize(
    ("ms", "waiting", "bucket"),
    [
        *(((2.0, 2.2, 2.4), waiting, bucket) for waiting, bucket in ((1, 1), (2, 2), (3, 4), (4, 4), (9, 4))),
        ((2.0, 4.0, 8.0), 3, 1),  # 8 / 3 ms each when padded; 2 ms each in the others, of which the smaller is taken
    ],
)
def test_buckets_are_padded_only_where_that_is_cheaper(ms, waiting, bucket):
    stage_ms = {size: (one,) for size, one in zip((1, 2, 4), ms, strict=True)}
    assert policy.choose_bucket(stage_ms, (1.0,), 0, waiting).bucket == bucket


# Steps, by hand


def test_survivors_of_several_arrivals_are_merged():
    scheduler = Scheduler([route(1.0, 1.0)], 8)
    first, second = admit(scheduler, job(0.0, leaves_at=1), job(0.5, leaves_at=1))
    step = take(scheduler, 0.5)
    assert (step.stage, step.bucket, step.jobs) == (0, 2, (first, second))
    scheduler.finish(step, [False, False])
    (third,) = admit(scheduler, job(0.6, leaves_at=1))
    steps = [take(scheduler, 0.6) for _ in range(2)]
    assert {step.stage: step.jobs for step in steps} == {0: (third,), 1: (first, second)}
    assert scheduler.next_step(0.6) is None


def test_deeper_stages_come_first_where_the_gain_is_the_same():
    """Stage 0: two thirds leave in 1 ms, or all in 1 + 1/3 * 1.5; stage 1: all in 1.5. Gains and ages are equal."""
    flat = {1: (1.0, 1.5)}
    a_route = dataclasses.replace(route(1.0, 1.0), stage_ms=flat, leave=(2 / 3, 1.0))
    assert policy.gain(flat, (2 / 3, 1.0), 0, 1, 1) == policy.gain(flat, (2 / 3, 1.0), 1, 1, 1)
    scheduler = Scheduler([a_route], 8)
    (deep,) = admit(scheduler, job(0.0))
    scheduler.finish(take(scheduler, 0.0), [False])
    admit(scheduler, job(0.0))
    assert take(scheduler, 1.0).jobs == (deep,)


def test_a_rare_and_expensive_job_is_served_in_the_end():
    """Cheap images keep coming, one a step; the dear one gains a hundredth of them, and goes when it is old enough."""
    cheap, dear = route(1.0), route(100.0)
    scheduler = Scheduler([cheap, dear], 8, max_wait=0.00205)
    (rare,) = admit(scheduler, job(0.0, route=1))
    steps: list[Step] = []
    while len(steps) < 1000 and (not steps or steps[-1].jobs != (rare,)):
        now = len(steps) / 1e3
        admit(scheduler, job(now))
        steps.append(take(scheduler, now))
        scheduler.finish(steps[-1], [True])
    # gains 1 and 1/100, ages 0 and t: 1/100 * (1 + t / 2.05 ms) > 1 from t = 202.95 ms on
    assert len(steps) - 1 == 203


def test_an_urgent_job_goes_first_and_a_hopeless_one_does_not():
    for deadline, first in ((0.015, 0), (0.0105, 1), (0.009, 0)):  # time enough; needs 10 ms, 0.5 to spare; hopeless
        scheduler = Scheduler([route(1.0), route(10.0)], 8, max_wait=1.0)
        admit(scheduler, job(0.0), job(0.0, route=1, deadline=deadline))
        assert take(scheduler, 0.0).route == first


def test_a_queue_is_served_by_deadline_then_by_arrival():
    scheduler = Scheduler([route(1.0, buckets=(1,))], 8)
    late, early, second, soon = admit(scheduler, job(0.2), job(0.1), job(0.1), job(0.3, deadline=0.5))
    order = [take(scheduler, 0.3).jobs[0] for _ in range(4)]
    assert order == [soon, early, second, late]


def test_patience_keeps_deadlines_from_starving_jobs_without_one():
    scheduler = Scheduler([route(1.0, buckets=(1,))], 8)
    (patient,) = admit(scheduler, job(0.0))
    admit(scheduler, job(2.0, deadline=2.5))  # due after the patient one was
    assert take(scheduler, 2.0).jobs == (patient,)


def test_no_step_is_run_for_a_job_that_cannot_be_in_time():
    """A stage of 2 ms, where half leave, and one of 4: 2 ms may do; where none leaves at the first, it takes 6."""
    for leave, needed in (((0.5, 1.0), 0.002), ((0.0, 1.0), 0.006)):
        scheduler = Scheduler([route(2.0, 4.0, leave=leave)], 8)
        hopeless, _ = admit(scheduler, job(deadline=1 + needed - 1e-4), job(deadline=1 + needed + 1e-4))
        assert scheduler.drop(1.0) == [hopeless]
        assert scheduler.in_use == 1


def test_time_left_is_compared_with_what_steps_take_and_not_with_what_they_once_took():
    scheduler = Scheduler([route(2.0)], 8)
    for _ in range(100):  # a neighbour has half of the processor
        admit(scheduler, job())
        scheduler.finish(take(scheduler, 0.0), [True], seconds=0.004)
    hopeless, _ = admit(scheduler, job(deadline=0.0039), job(deadline=0.0041))
    assert scheduler.drop(0.0) == [hopeless]
    scheduler.finish(take(scheduler, 0.0), [True], seconds=1000.0)  # once is no rule
    admit(scheduler, job(deadline=0.01))
    assert not scheduler.drop(0.0)


def test_who_is_likely_to_be_late_lets_others_go_first_and_takes_free_rows():
    """Served at once, a job is through in 2 ms by half, in 6 by nine tenths."""
    scheduler = Scheduler([route(2.0, 4.0), route(5.0)], 8, max_wait=1.0)
    late, sure, patient = admit(scheduler, job(deadline=0.005), job(deadline=0.0075), job())
    assert take(scheduler, 0.0).jobs == (sure, patient)
    (other,) = admit(scheduler, job(route=1, deadline=0.0095))
    assert take(scheduler, 0.0).jobs == (other,)
    assert take(scheduler, 0.0).jobs == (late,)  # the device would be idle
    scheduler = Scheduler([route(2.0, 4.0, buckets=(4,))], 8)  # 5 and 10 ms
    late, first, second = admit(scheduler, job(deadline=0.014), job(deadline=0.016), job(deadline=0.016))
    assert take(scheduler, 0.0).jobs == (first, second, late)


# Admission, expiry and failure


def test_all_images_of_a_request_are_admitted_or_none():
    scheduler = Scheduler([route(2.0)], 3, max_wait=0.001)
    scheduler.admit([job(), job()])
    with pytest.raises(OverloadedError, match="2 of 3 places are taken") as refused:
        scheduler.admit([job(), job()])
    assert (scheduler.in_use, scheduler.waiting) == (2, {(0, 0): 2})
    # two rows of 5/4 ms wait; half of that until one of them has left
    assert refused.value.retry_after == pytest.approx(2 * 1.25e-3 / 2)
    with pytest.raises(ValueError, match="images: expected at most 3 at once, got 4"):
        scheduler.admit([job()] * 4)


def test_the_backlog_counts_running_steps_and_their_survivors():
    scheduler = Scheduler([route(2.0, 4.0)], 8)
    admit(scheduler, job(), job(), job())
    # a row takes 5/4 ms, and half of them 10/4 more
    assert scheduler.backlog_ms == pytest.approx(3 * 2.5)
    step = take(scheduler, 0.0)
    assert len(step.jobs) == 2
    assert scheduler.backlog_ms == pytest.approx(3.0 + 1 * 2.5 + 2.5)  # the step, its survivor, who waits
    scheduler.fail(step)
    assert scheduler.backlog_ms == pytest.approx(2.5)


def test_shares_follow_the_traffic():
    scheduler = Scheduler([route(1.0, 1.0, leave=(0.9, 1.0), buckets=(4,))], 8)
    for _ in range(1000):
        scheduler.admit([job() for _ in range(4)])
        scheduler.finish(take(scheduler, 0.0), [True, False, False, False])
        while step := scheduler.next_step(0.0):
            scheduler.finish(step, [True] * len(step.jobs))
    assert scheduler.leave[0][0] == pytest.approx(0.25, abs=0.01)
    assert scheduler.leave[0][1] == 1.0


# Shadow jobs


def test_no_step_is_run_for_a_shadow_job_while_a_client_waits_and_it_takes_rows_that_are_free():
    scheduler = Scheduler([route(1.0, buckets=(2,)), route(100.0)], 8)
    first, second = admit(scheduler, job(is_shadow=True), job(is_shadow=True))
    lone, patient = admit(scheduler, job(0.1), job(0.1, route=1))
    assert [take(scheduler, 0.2).jobs for _ in range(3)] == [(lone, first), (patient,), (second,)]


def test_a_shadow_job_that_has_waited_long_counts_as_a_client_that_came_later():
    """It gains 1 / 1 ms against 1 / 100, so once it counts, it goes first; and who came 0.25 s later goes behind it."""
    for now, first in ((0.2, 1), (0.3, 0)):
        scheduler = Scheduler([route(1.0), route(100.0)], 8, max_wait=10.0)
        admit(scheduler, job(is_shadow=True), job(0.1, route=1))
        assert take(scheduler, now).route == first
    scheduler = Scheduler([route(1.0, buckets=(1,))], 8)
    early, waiting, late = admit(scheduler, job(0.2), job(is_shadow=True), job(0.3))
    assert [take(scheduler, 0.4).jobs[0] for _ in range(3)] == [early, waiting, late]


def test_a_shadow_job_at_the_head_hides_no_deadline():
    scheduler = Scheduler([route(10.0, buckets=(2,)), route(1.0)], 8, max_wait=10.0)
    admit(scheduler, job(is_shadow=True), job(0.9, deadline=1.4155), job(1.4, route=1))
    assert take(scheduler, 1.4).route == 0  # 0.5 ms to spare, and the other step takes 1


# Properties


class Anything(RuleBasedStateMachine):
    """Whatever arrives, runs, fails and leaves, in any order: no job is lost or served twice, slots are one job's."""

    CAPACITY = 5

    def __init__(self):
        super().__init__()
        self.routes = [route(1.0, 2.0, 1.0), route(3.0, name="base")]
        self.scheduler = Scheduler(self.routes, self.CAPACITY)
        self.now = 0.0
        self.on_their_way, self.ended, self.running = [], collections.Counter(), collections.deque()

    def is_expired(self, each):
        least = ((1.0, 2.0, 1.0), (3.0,))[each.route][each.stage] / 1e3  # seconds; some leave behind every stage
        deadline = each.deadline or math.inf
        return each.abandoned or deadline <= self.now or deadline < self.now + least

    def end(self, jobs):
        for each in jobs:
            self.ended[each] += 1
            self.on_their_way.remove(each)

    @rule(
        to=st.integers(0, 1),
        leaves_at=st.integers(0, 2),
        number=st.integers(1, 3),
        patience=st.floats(0.1, 5) | st.none(),
    )
    def arrive(self, to, leaves_at, number, patience):
        deadline = None if patience is None else self.now + patience
        new = [job(self.now, route=to, leaves_at=leaves_at, deadline=deadline) for _ in range(number)]
        if len(self.on_their_way) + number > self.CAPACITY:
            with pytest.raises(OverloadedError) as refused:
                self.scheduler.admit(new)
            assert refused.value.retry_after > 0
        else:
            self.scheduler.admit(new)
            self.on_their_way += new

    @rule(which=st.integers(0, CAPACITY - 1))
    def cancel(self, which):
        if which < len(self.on_their_way):
            self.on_their_way[which].done.cancel()

    @rule()
    def step(self):
        self.now += 0.25
        running = [each for step in self.running for each in step.jobs]
        late = [each for each in self.on_their_way if each not in running and self.is_expired(each)]
        dropped = self.scheduler.drop(self.now)
        assert set(dropped) == set(late)
        self.end(dropped)
        waiting = self.scheduler.waiting
        step = self.scheduler.next_step(self.now)
        assert (step is None) == (not waiting)  # the device is never idle while anyone waits
        if step is not None:
            self.running.append(step)
            assert 0 < len(step.jobs) <= min(step.bucket, waiting[step.route, step.stage])
            assert all((each.route, each.stage) == (step.route, step.stage) for each in step.jobs)
            likely = ((4.0, 3.0, 1.0), (3.0,))[step.route][step.stage] / 1e3
            due = [
                (
                    (each.deadline or math.inf) < self.now + likely,
                    min(each.deadline or math.inf, each.arrived + 1.0),
                    each.arrived,
                )
                for each in step.jobs
            ]
            assert due == sorted(due)

    @precondition(lambda self: self.running)
    @rule()
    def finish(self):
        step = self.running.popleft()
        out = [each.image[0] <= step.stage for each in step.jobs]
        if step.stage == len(self.routes[step.route].sites):
            out = [True] * len(out)
        given_up = self.scheduler.finish(step, out)
        stayed = [each for each, is_out in zip(step.jobs, out, strict=True) if not is_out]
        assert given_up == [each for each in stayed if each.abandoned]
        self.end([each for each in step.jobs if each not in stayed] + given_up)

    @precondition(lambda self: self.running)
    @rule()
    def fail(self):
        step = self.running.popleft()
        self.scheduler.fail(step)
        self.end(step.jobs)

    @invariant()
    def slots_are_unique_and_given_back(self):
        slots = [each.slot for each in self.on_their_way]
        assert len(set(slots)) == len(slots) == self.scheduler.in_use
        assert set(slots) <= set(range(self.CAPACITY))
        assert all(each.slot == -1 and count == 1 for each, count in self.ended.items())

    @invariant()
    def everyone_is_somewhere(self):
        running = sum(len(step.jobs) for step in self.running)
        assert sum(self.scheduler.waiting.values()) + running == len(self.on_their_way)

    def teardown(self):
        while self.on_their_way:
            self.step()
            if self.running:
                self.finish()
        assert self.scheduler.in_use == 0


Anything.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnything = Anything.TestCase


@settings(max_examples=20, deadline=None)
@given(cheap=st.floats(0.1, 1.0), dear=st.floats(1.0, 10.0), leave=st.floats(0.0, 0.99), deadlines=st.booleans())
def test_no_job_starves(cheap, dear, leave, deadlines):
    """However much more others gain, and with a full house at all times, a job is through in bounded time.

    A job that is served before it has arrived before it, or has at least 1/R of its age, less max_wait, where R
    is the largest ratio of gains; so it waits at most about R times as long as a full house takes.
    """
    routes = [route(cheap, buckets=(1,)), route(dear, dear, buckets=(1,), leave=(leave, 1.0))]
    scheduler = Scheduler(routes, 8, max_wait=0.002)
    (victim,) = admit(scheduler, job(0.0, route=1, leaves_at=1))
    now = 0.0
    gains = [policy.choose_bucket(r.stage_ms, r.leave, s, 1).gain for r in routes for s in range(r.depth)]
    house = 8 * 2 * dear / 1e3
    bound = 4 * (max(gains) / min(gains)) * (house + 0.002) + 2.0
    while victim.slot >= 0:
        while scheduler.in_use < 8:
            admit(scheduler, job(now, deadline=now + 0.9 if deadlines else None))
        scheduler.drop(now)
        step = take(scheduler, now)
        now += routes[step.route].stage_ms[step.bucket][step.stage] / 1e3
        scheduler.finish(step, leaves(step))
        assert now < bound


# Against first come, first served


def simulate(a_route, arrivals, leaves_at, patience=math.inf, capacity=256):
    """Return the seconds that each request takes that is answered, on a device that takes the times of the table."""
    scheduler, now, seconds, queue = Scheduler([a_route], capacity), 0.0, {}, collections.deque()
    for number, (arrived, stage) in enumerate(zip(map(float, arrivals), leaves_at, strict=True)):
        deadline = None if patience == math.inf else arrived + patience
        queue.append((number, job(arrived, leaves_at=min(stage, a_route.depth - 1), deadline=deadline)))
    names = {each: number for number, each in queue}
    while queue or scheduler.waiting:
        while queue and queue[0][1].arrived <= now:
            admit(scheduler, queue.popleft()[1])
        scheduler.drop(now)
        step = scheduler.next_step(now)
        if step is None:
            now = queue[0][1].arrived if queue else now
            continue
        now += a_route.stage_ms[step.bucket][step.stage] / 1e3
        out = [stage or step.stage == len(a_route.sites) for stage in leaves(step)]
        seconds |= {names[each]: now - each.arrived for each, is_out in zip(step.jobs, out, strict=True) if is_out}
        scheduler.finish(step, out)
    return np.array([seconds[number] for number in sorted(seconds)])


def test_two_requests_at_once_by_hand():
    """Two arrive at 0; stages of 2 and 4 ms (one image), 3 and 6 ms (two); one leaves behind each.

    Both together, 3 ms: the first is out. The other goes on alone, 4 ms: out at 7. Their mean is 5 ms; that of the full
    network, 6 ms for one and 9 for two, is 9.
    """
    seconds = simulate(route(2.0, 4.0), [0.0, 0.0], [0, 1])
    np.testing.assert_allclose(seconds, [0.003, 0.007])
    np.testing.assert_allclose(simulate(route(6.0), [0.0, 0.0], [0, 0]), [0.009, 0.009])


def test_at_80_percent_of_the_full_networks_capacity_mean_and_tail_are_less_than_half():
    """Four stages of 1.5 ms against one of 6; of those who come to each stage, 0.45, 0.4, 0.4 and all leave."""
    rng = np.random.default_rng(0)
    capacity = 4 / (6e-3 * 2.5)  # four images take 2.5 times as long as one
    arrivals = rng.exponential(1 / (0.8 * capacity), 4000).cumsum()
    leave = (0.45, 0.4, 0.4, 1.0)
    leaves_at = (rng.random((4000, 4)) < leave).argmax(1)
    full, cascade = (simulate(r, arrivals, leaves_at) for r in (route(6.0), route(1.5, 1.5, 1.5, 1.5, leave=leave)))
    assert cascade.mean() < full.mean() / 2
    assert np.quantile(cascade, 0.99) < np.quantile(full, 0.99) / 2


@pytest.mark.parametrize("load", [1.5, 3.0])
def test_beyond_capacity_equal_deadlines_cost_no_goodput(load):
    """Each job came to the device as its time ran out, and was late: the device was busy and answered none in time."""
    rng = np.random.default_rng(0)
    leave = (0.45, 0.4, 0.4, 1.0)
    a_route = route(1.5, 1.5, 1.5, 1.5, leave=leave)
    leaves_at = (rng.random((6000, 4)) < leave).argmax(1)
    # rows that share a step take 5/8 of 1.5 ms each, and go through 1 + .55 + .33 + .2 stages
    capacity = 1e3 / (1.5 * 5 / 8 * (1 + 0.55 + 0.55 * 0.6 + 0.55 * 0.6 * 0.6))
    arrivals = rng.exponential(1 / (load * capacity), 6000).cumsum()
    seconds = simulate(a_route, arrivals, leaves_at, patience=0.1, capacity=10_000)
    assert (seconds <= 0.1).sum() > 0.8 * capacity * arrivals[-1]  # some steps are not full
    assert (seconds > 0.1).mean() < 0.05
