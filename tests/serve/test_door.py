"""The door: places for images and bytes before a body is read, expected waits, and bounds of connections."""

import asyncio
import contextlib
import dataclasses
import json
import math
import socket
import threading
import time
from typing import Any

import grpc
import pytest

from serve.engine.records import OverloadedError, StoppingError
from serve.protocol import inference_pb2 as pb
from serve.protocol.admission import FULL, MARGIN, Door, Limits
from serve.protocol.messages import TooLargeError
from tests.serve import fake
from tests.serve.transports import Grpc, Http, ask, call, tensor

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
    inside = [door.enter() for _ in range(FULL)]
    for _ in range(images):
        clock.now += 1 / rate
        inside[0].answered = True
        with inside.pop(0):
            pass
        inside.append(door.enter())
    for admission in inside:
        door.leave(admission)


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
        late.take(1, clock.now + 0.8 / MARGIN)
    gate.enter().take(1, clock.now + 0.9 / MARGIN)
    assert reasons == ["late"]
    for _ in range(FULL):
        gate.enter().take(1, clock.now + 0.1)  # before all of them
    with gate.enter() as late, pytest.raises(OverloadedError, match="90 ms expected, and 100 ms left"):
        late.take(1, clock.now + 0.1)


def test_with_few_on_the_way_no_deadline_is_refused():
    gate, clock, _ = door()
    drain(gate, clock, 1.0)
    for _ in range(FULL):
        gate.enter().take(1, clock.now + 0.01)
    with pytest.raises(OverloadedError):
        gate.enter().take(1, clock.now + 0.01)


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


def head(*lines, body=b""):
    return "\r\n".join(("POST /v2/models/gati/infer HTTP/1.1", "host: h", *lines, "", "")).encode() + body


def take_answers(client, count):
    """Read so many HTTP answers: their statuses, headers and bodies."""
    file, found = client.makefile("rb"), []
    for _ in range(count):
        status = int(file.readline().split()[1])
        lines = iter(file.readline, b"\r\n")
        headers = dict(line.decode().strip().lower().split(": ", 1) for line in lines)
        found.append((status, headers, file.read(int(headers["content-length"]))))
    return found


@contextlib.contextmanager
def full(front):
    """All places are taken."""
    held = [front.door.enter() for _ in range(front.door.limits.capacity)]
    with front.sockets() as ports, socket.create_connection(("127.0.0.1", ports[0]), timeout=30) as client:
        yield client, held


def test_a_refusal_by_the_head_alone_says_what_the_application_would_say(front):
    with full(front) as (client, _):
        client.sendall(head("content-length: 10", "x-request-id: mine"))  # and no body
        ((status, headers, body),) = take_answers(client, 1)
    slow = ask(front, content=b"1234567890", headers={"x-request-id": "mine"})
    assert (status, body) == (slow.status_code, slow.content)
    assert status == 429
    assert {name: value for name, value in headers.items() if name != "date"} == dict(slow.headers)
    assert (
        front.metrics.page().decode().count('gati_requests_total{code="429",method="infer",protocol="http"} 2.0') == 1
    )
    assert 'gati_refused_total{reason="overloaded"} 2.0' in front.metrics.page().decode()


def test_a_refused_connection_stays_in_order(front):
    """Bodies of refused requests are discarded as they come, and what follows them is answered."""
    body = json.dumps(BODY).encode()
    whole = head(f"content-length: {len(body)}", body=body)
    with full(front) as (client, held):
        client.sendall(whole + whole + b"GET /v2/health/live HTTP/1.1\r\n\r\n" + whole[:-5])
        assert [status for status, *_ in take_answers(client, 4)] == [429, 429, 200, 429]
        for admission in held:
            front.door.leave(admission)
        client.sendall(whole[-5:] + whole)
        client.sendall(head("transfer-encoding: chunked", body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)))
        assert [status for status, *_ in take_answers(client, 2)] == [200, 200]
        while front.door.images:  # an answer is sent before its place is free
            time.sleep(0.001)
        held += [front.door.enter() for _ in range(front.door.limits.capacity)]
        client.sendall(head("transfer-encoding: chunked", body=b"5\r\n12345\r\n"))
        client.sendall(b"0\r\n\r\n" + head("connection: close", "content-length: 0") + whole)
        (_, kept, _), (status, closed, _) = take_answers(client, 2)
        assert ("connection" in kept, status, closed["connection"]) == (False, 429, "close")
        assert client.recv(1) == b""


def test_a_refusal_behind_an_admitted_request_waits_for_its_answer():
    front = fake.Front(limits=dataclasses.replace(fake.LIMITS, capacity=1))
    body = json.dumps(BODY).encode()
    with full(front) as (client, held):
        front.door.leave(held[0])
        client.sendall(head(f"content-length: {len(body)}", body=body) * 3)
        statuses = [status for status, *_ in take_answers(client, 3)]
        assert statuses[0] == 200
        assert set(statuses) <= {200, 429}
    front.engine.stop()


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ((), 401),
        (("authorization: Bearer wrong",), 401),
        (("authorization: Bearer secret",), 429),
        (("authorization: Bearer secret", f"content-length: {fake.LIMIT + 1}"), 413),
        (("authorization: Bearer secret", "content-length: 9", "expect: 100-continue"), 429),
    ],
)
def test_a_full_server_tells_others_what_they_have_to_hear(lines, status):
    front = fake.Front(token="secret")
    with full(front) as (client, _):
        client.sendall(head(*lines))
        assert take_answers(client, 1)[0][0] == status
        client.sendall(b"x" * 9)
    front.engine.stop()


def test_a_client_that_reads_no_refusal_fills_no_memory(front):
    """What it sends on is left to the system, as for a client that does not read other answers."""
    with full(front) as (client, _):
        client.setblocking(False)
        sent, whole, quiet = 0, head("content-length: 0") * 100, time.monotonic()
        until = quiet + 20
        while time.monotonic() < until:
            try:
                sent += client.send(whole)
                quiet = time.monotonic()
            except BlockingIOError:
                if time.monotonic() - quiet > 0.5:
                    break
                time.sleep(0.01)
        assert time.monotonic() < until, f"{sent} bytes were taken"


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


# gRPC


def infer(**changes):
    inputs = [{"name": "images", "datatype": "UINT8", "shape": [1, 2, 3, 1]}]
    return pb.ModelInferRequest(**{"model_name": "gati", "inputs": inputs, "raw_input_contents": [bytes(6)]} | changes)


def stream(port, messages, metadata=()):
    """Send messages one after another where one is expected; returns the error."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")(messages, metadata=metadata, timeout=30)
    error: Any = caught.value
    return error


def withheld(end):
    """A message that does not come before the test is over."""
    end.wait(30)
    yield b""


@pytest.mark.parametrize("refusal", ["UNAUTHENTICATED", "RESOURCE_EXHAUSTED"])
def test_grpc_refuses_before_the_message_is_there(refusal):
    front, end = fake.Front(token="secret"), threading.Event()
    with front.sockets() as ports:
        held = [front.door.enter() for _ in range(front.door.limits.capacity)]
        good = (("authorization", "Bearer secret"),)
        error = stream(ports[1], withheld(end), good if refusal == "RESOURCE_EXHAUSTED" else ())
        end.set()
        assert error.code().name == refusal
        assert ("grpc-retry-pushback-ms" in dict(error.trailing_metadata())) == (refusal == "RESOURCE_EXHAUSTED")
        assert Grpc(ports[1]).get("ServerLive").status == "OK"
        assert len(held) == front.door.images


def test_a_grpc_message_that_does_not_come_is_given_up():
    front, end = fake.Front(limits=dataclasses.replace(fake.LIMITS, idle_timeout=0.1)), threading.Event()
    with front.sockets() as ports:
        error = stream(ports[1], withheld(end))
        end.set()
        assert (error.code().name, str(error.details())[:5]) == ("DEADLINE_EXCEEDED", "body:")
        assert stream(ports[1], iter(())).code().name == "INVALID_ARGUMENT"
        call(ports[1], "ModelInfer", infer())
    assert (front.door.images, front.door.bytes) == (0, 0)


@pytest.mark.parametrize(
    ("message", "metadata", "code"),
    [
        (infer(id="x" * 201), (), "INVALID_ARGUMENT"),
        (infer(inputs=[{"name": "images", "datatype": "UINT8", "shape": [1] * 400}]), (), "INVALID_ARGUMENT"),
        (infer(), (("x", "y" * 5000),), "RESOURCE_EXHAUSTED"),
    ],
    ids=["id", "shape", "metadata"],
)
def test_ids_shapes_and_metadata_are_bounded_over_grpc(message, metadata, code):
    front = fake.Front(limits=dataclasses.replace(fake.LIMITS, header_bytes=2000))
    with front.sockets() as ports:
        with pytest.raises(grpc.RpcError) as caught:
            call(ports[1], "ModelInfer", message, metadata=metadata)
        assert caught.value.code().name == code
        assert len(str(caught.value.details())) < 1000
        assert not front.engine.calls


@pytest.mark.parametrize("name", ["http", "grpc"])
def test_a_late_request_is_refused_over_both_transports(front, sockets, name):
    transport = Http(front) if name == "http" else Grpc(sockets[1])
    front.door._answered, front.door._loaded = 10.0, 1.0
    held = [front.door.enter() for _ in range(FULL)]
    for admission in held:
        admission.take(1, time.monotonic())
    reply = transport.infer(BODY | {"parameters": {"deadline_ms": 100}})
    assert reply.status == transport.status(429)
    assert reply.message.startswith("overloaded: ")
    assert "ms left" in reply.message
    assert 'gati_refused_total{reason="late"} 1.0' in front.metrics.page().decode()
