"""The door: places for images and bytes before a body is read, expected waits, and bounds of connections."""

import asyncio
import contextlib
import dataclasses
import json
import math
import resource
import time

import numpy as np
import pytest

from serve.engine.records import DeadlineError, Job, OverloadedError, StoppingError
from serve.engine.scheduler import Scheduler
from serve.protocol.admission import FULL, MARGIN, Door, Limits
from serve.protocol.messages import TooLargeError
from tests.serve import fake
from tests.serve.fake_runner import image, route
from tests.serve.transports import Grpc, Http, ask, tensor

BODY = {"inputs": [tensor()]}


class Clock:
    """A clock that is put forward by hand."""

    now = 100.0

    def __call__(self):
        return self.now


def door(**limits):
    """A door, its clock, and the reasons of its refusals."""
    clock, reasons = Clock(), []
    return Door(Limits(**limits), refused=reasons.append, clock=clock), clock, reasons


def drain(door, clock, rate, images=100):
    """Answer so many images, one after another at this rate, with ``FULL`` on the way all the time."""
    inside = [whole(door) for _ in range(FULL)]
    for _ in range(images):
        clock.now += 1 / rate
        inside[0].answered = True
        with inside.pop(0):
            pass
        inside.append(whole(door))
    for admission in inside:
        door.leave(admission)


def whole(door, **how):
    """A request of one image whose body is here."""
    admission = door.enter(**how)
    admission.take(1)
    return admission


# Places


def test_places_are_given_back_once_however_a_request_ends():
    gate, _, reasons = door(capacity=4, max_body=60, max_bodies=100)
    with contextlib.suppress(RuntimeError), gate.enter(size=60) as admission:
        admission.take(3, math.inf)
        assert (gate.images, gate.bytes) == (3, 60)
        with pytest.raises(OverloadedError, match="60 of 100 bytes"):
            gate.enter(size=41)
        with gate.enter(size=40) as other, pytest.raises(OverloadedError, match="4 of 4 places"):
            other.take(2, math.inf)
        assert (gate.images, gate.bytes) == (3, 60)
        raise RuntimeError
    gate.leave(admission)
    assert (gate.images, gate.bytes, reasons) == (0, 0, ["memory", "overloaded"])
    with pytest.raises(TooLargeError):
        gate.enter(size=61)


def test_the_drain_rate_is_measured_under_load_only():
    gate, clock, _ = door()
    for _ in range(50):  # one client at a time: it says nothing of the server
        with gate.enter() as admission:
            clock.now += 1.0
            admission.answered = True
    assert gate.rate is None
    drain(gate, clock, 200.0)
    assert gate.rate == pytest.approx(200, rel=0.05)
    clock.now += 1000.0  # idle
    assert gate.rate == pytest.approx(200, rel=0.05)
    drain(gate, clock, 50.0, 1000)
    assert gate.rate == pytest.approx(50, rel=0.05)


def test_retry_after_is_the_time_to_drain_what_is_here():
    gate, clock, _ = door(capacity=50)
    drain(gate, clock, 10.0)
    inside = [gate.enter() for _ in range(50)]
    with pytest.raises(OverloadedError) as refused:
        gate.enter()
    assert refused.value.retry_after == pytest.approx(5.0, rel=0.05)
    for admission in inside:
        gate.leave(admission)


def test_a_deadline_that_cannot_be_met_is_refused_and_what_is_due_later_does_not_count():
    gate, clock, reasons = door()
    drain(gate, clock, 100.0)
    for _ in range(80):
        gate.enter().take(1, math.inf)  # due in a second
    with gate.enter() as late, pytest.raises(OverloadedError, match="ms expected"):
        late.take(1, 0.8 / MARGIN)
    gate.enter().take(1, 0.9 / MARGIN)
    assert reasons == ["late"]
    for _ in range(FULL):
        gate.enter().take(1, 0.1)  # before all of them
    with gate.enter() as late, pytest.raises(OverloadedError, match="90 ms expected, and 100 ms left"):
        late.take(1, 0.1)


def test_with_few_on_the_way_no_deadline_is_refused():
    gate, clock, _ = door()
    drain(gate, clock, 1.0)
    for _ in range(FULL):
        gate.enter().take(1, 0.01)
    with pytest.raises(OverloadedError):
        gate.enter().take(1, 0.01)


def test_bodies_that_do_not_come_say_nothing_of_the_rate_and_hold_up_no_deadline():
    gate, clock, _ = door()
    for _ in range(4 * FULL):  # stalled
        gate.enter()
    clock.now += 1.0
    for _ in range(50):  # one client at a time
        with whole(gate) as admission:
            clock.now += 0.1
            admission.answered = True
    assert gate.rate is None
    drain(gate, clock, 100.0)
    whole(gate, patience=0.1)


def test_a_deadline_in_the_head_is_checked_with_the_head():
    gate, clock, reasons = door()
    drain(gate, clock, 100.0)
    for _ in range(15):
        gate.enter(patience=0.22)  # with bodies that will be here at once
    with pytest.raises(OverloadedError, match="160 ms expected, and 220 ms left"):
        gate.enter(patience=0.22)
    gate.enter(patience=0.21)  # before all of them
    with pytest.raises(DeadlineError):
        gate.enter(arrived=clock.now - 0.2, patience=0.2)
    clock.now += 0.15  # the bodies do not come
    gate.enter(patience=0.22)
    assert (reasons, gate.images) == (["late", "deadline"], 17)


@pytest.mark.parametrize("load", [1.5, 4.0])
def test_beyond_capacity_what_is_admitted_is_answered_and_no_less_than_the_server_can(load):
    """The door before the scheduler of a device with two stages, behind the first of which half of all leave."""
    gate, clock, reasons = door(capacity=10_000)
    a_route = route(2.0, 4.0, buckets=(1, 2, 4, 8))  # 9 and 18 ms for eight
    capacity = 8 / (0.009 + 0.018 / 2)
    drain(gate, clock, capacity)  # before it is known, all are admitted
    began = clock.now
    rng = np.random.default_rng(1)
    arrivals = (clock.now + rng.exponential(1 / (load * capacity), 4000).cumsum()).tolist()
    until, answered, late = arrivals[-1], 0, 0
    scheduler, inside = Scheduler([a_route], 10_000), {}
    while arrivals or scheduler.waiting:
        while arrivals and arrivals[0] <= clock.now:
            arrived = arrivals.pop(0)
            with contextlib.suppress(OverloadedError, DeadlineError):
                admission = whole(gate, arrived=arrived, patience=0.2)
                job = Job(image=image(int(rng.random() < 0.5)), route=0, arrived=arrived, deadline=arrived + 0.2)
                scheduler.admit([job])
                inside[job] = admission
        dropped = scheduler.drop(clock.now)
        late += len(dropped)
        step = scheduler.next_step(clock.now)
        if step is not None:
            clock.now += a_route.stage_ms[step.bucket][step.stage] / 1e3
            left = [job.image[0] <= step.stage for job in step.jobs]
            scheduler.finish(step, left, seconds=a_route.stage_ms[step.bucket][step.stage] / 1e3)
            for job in (job for job, is_out in zip(step.jobs, left, strict=True) if is_out):
                in_time = job.deadline is not None and clock.now <= job.deadline
                inside[job].answered, answered, late = True, answered + in_time, late + (not in_time)
                gate.leave(inside.pop(job))
        elif arrivals:
            clock.now = max(clock.now, arrivals[0])
        for job in dropped:
            gate.leave(inside.pop(job))
    assert answered > 0.9 * capacity * (until - began)
    assert late < 0.05 * answered
    assert reasons.count("late") > 0.8 * (1 - 1 / load) * 4000


def test_a_closed_door_admits_health_alone():
    gate, _, _ = door()
    gate.close()
    with pytest.raises(StoppingError):
        gate.enter()
    with gate.enter(images=0):
        pass


# Before the body is read


async def never():
    raise AssertionError("the body was read")
    yield b""


def endless(read):
    async def chunks():
        while True:
            read.append(1000)
            yield bytes(1000)

    return chunks()


@pytest.mark.parametrize("how", ["images", "bytes"])
def test_a_full_server_refuses_before_it_reads(front, how):
    limits = front.door.limits
    held = [front.door.enter(size=4096 if how == "bytes" else 0) for _ in range(limits.capacity)]
    if how == "bytes":
        front.door.bytes = limits.max_bodies
        front.door.images = 1
    response = ask(front, content=never(), headers={"content-length": "10"})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"].startswith("overloaded: ")
    assert ask(front, "GET", "/v2").status_code == 200
    assert 'gati_requests_total{code="429",method="infer",protocol="http"} 1.0' in front.metrics.page().decode()
    assert len(held) == limits.capacity


def test_bytes_of_bodies_without_a_length_count_as_they_come():
    front, read = fake.Front(limits=dataclasses.replace(fake.LIMITS, max_bodies=5000, max_body=5000)), []
    with front.door.enter(size=3000):
        assert ask(front, content=endless(read)).status_code == 429
        assert 2000 <= sum(read) <= 4000
    assert (front.door.images, front.door.bytes) == (0, 0)


def test_the_deadline_counts_from_the_first_byte():
    front = fake.Front()
    front.engine.silent = True
    body = json.dumps(BODY | {"parameters": {"deadline_ms": 50}}).encode()

    async def slow():
        yield body[:20]
        await asyncio.sleep(0.06)
        yield body[20:]

    response = ask(front, content=slow())
    assert (response.status_code, front.engine.calls) == (504, [])


@pytest.mark.parametrize("name", ["x-request-timeout-ms", "x-envoy-expected-rq-timeout-ms"])
def test_a_deadline_in_a_header_counts_before_the_body_is_read(front, name):
    front.answers(10.0)
    held = [whole(front.door, model="gati") for _ in range(FULL)]
    for admission in held:
        admission.deadline = time.monotonic()
    response = ask(front, content=never(), headers={name: "100"})
    assert (response.status_code, "ms left" in response.json()["error"]) == (429, True)
    for admission in held:
        front.door.leave(admission)
    front.engine.silent = True
    assert ask(front, json=BODY, headers={name: "20.5"}).status_code == 504
    for value in ("-1", "0", "1e3", "", "x" * 1000, "9" * 20):
        response = ask(front, content=never(), headers={name: value})
        assert response.status_code == 400
        assert response.json()["error"].startswith(f"{name}: expected milliseconds")
        assert len(response.json()["error"]) < 300


def test_a_body_that_comes_too_late_for_its_deadline_is_given_up(front):
    async def slow():
        yield b"{"
        await asyncio.sleep(30)
        yield b"}"

    response = ask(front, content=slow(), headers={"x-request-timeout-ms": "50"})
    assert (response.status_code, response.json()["error"]) == (504, "the deadline passed before the body was here")
    assert 'gati_refused_total{reason="deadline"} 1.0' in front.metrics.page().decode()


def test_an_answer_that_is_there_is_given_even_if_the_event_loop_was_late(front):
    submit = front.engine.submit

    def slowly(images, **how):
        futures = submit(images, **how)
        time.sleep(0.1)  # other requests have the loop
        return futures

    front.engine.submit = slowly
    assert ask(front, json=BODY | {"parameters": {"deadline_ms": 50}}).status_code == 200


def test_a_model_that_is_not_there_is_said_before_the_body_is_read(front):
    assert ask(front, path="/v2/models/other/infer", content=never()).status_code == 404


def test_every_place_is_free_again_after_any_answer(front):
    front.engine.failure = MemoryError()
    for content in (b"{", json.dumps(BODY).encode(), json.dumps({"inputs": []}).encode()):
        assert ask(front, content=content).status_code in {400, 500}
    assert ask(front, path="/nowhere", content=b"x").status_code == 404
    assert (front.door.images, front.door.bytes) == (0, 0)


# Values in errors


LONG = "é\n" * 500_000


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": {"binary_data_output": LONG}},
        {"parameters": {LONG: 1}},
        {"parameters": {LONG: [1]}},
        {"parameters": {"epsilon": LONG}},
        {"outputs": [{"name": LONG}]},
        {"outputs": [{"name": "exit", "parameters": {"binary_data": LONG}}]},
        {"outputs": [{"name": "exit", "parameters": {LONG: LONG}}]},
        {"inputs": [tensor(name=LONG)]},
        {"inputs": [tensor(datatype=LONG)]},
        {"inputs": [tensor(shape=[2**31 - 1] * 8)]},
        {"inputs": [tensor(parameters={LONG: 1})]},
        {"inputs": [tensor(parameters={"binary_data_size": LONG})]},
    ],
    ids=lambda changes: str(changes)[:50],
)
def test_an_error_repeats_no_more_than_the_start_of_a_value(changes):
    front = fake.Front(limits=dataclasses.replace(fake.LIMITS, max_body=2**24, max_bodies=2**24))
    response = ask(front, json=BODY | changes)
    assert response.status_code == 400
    assert len(response.json()["error"]) < 1000
    assert response.json()["error"].count("é") <= 200


@pytest.mark.parametrize("name", ["inputs", "outputs", "parameters"])
def test_a_million_items_cost_neither_memory_nor_time(name):
    """Every error of every item was written down: 2.4 MB of them took 2 GB and 10 s."""
    front = fake.Front(limits=dataclasses.replace(fake.LIMITS, max_body=2**24, max_bodies=2**24))
    front.entry.loaded = front.loaded._replace(model=dataclasses.replace(fake.MODEL, max_rows=10**6))
    items = {str(i): [] for i in range(500_000)} if name == "parameters" else [{}] * 800_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    response = ask(front, content=json.dumps(BODY | {name: items}))
    assert (response.status_code, response.json()["error"][: len(name) + 10]) == (400, f"{name}: expected")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


@pytest.mark.parametrize("name", ["http", "grpc"])
def test_a_late_request_is_refused_over_both_transports(front, sockets, name):
    transport = Http(front) if name == "http" else Grpc(sockets[1])
    front.answers(10.0)
    held = [front.service.admit() for _ in range(FULL)]
    for admission in held:
        admission.take(1, 0.05)
    reply = transport.infer(BODY | {"parameters": {"deadline_ms": 100}})
    assert reply.status == transport.status(429)
    assert reply.message.startswith("overloaded: ")
    assert "ms left" in reply.message
    assert 'gati_refused_total{reason="late"} 1.0' in front.metrics.page().decode()
