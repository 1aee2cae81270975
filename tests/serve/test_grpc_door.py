"""The door over gRPC: what is refused before a message is there, and bounds of messages and connections."""

import contextlib
import dataclasses
import resource
import socket
import threading
import time
from typing import Any

import grpc
import pytest

from serve.protocol import inference_pb2 as pb
from tests.serve import fake
from tests.serve.transports import Grpc, ask, call


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


@pytest.mark.parametrize("field", [4, 5, 6, 7])
def test_a_message_of_a_million_empty_parts_is_not_parsed(field):
    front = fake.Front(limits=dataclasses.replace(fake.LIMITS, max_body=2**24, max_bodies=2**24))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with front.sockets() as ports, pytest.raises(grpc.RpcError) as caught:
        call(ports[1], "ModelInfer", bytes([8 * field + 2, 0]) * 2**22)
    assert caught.value.code().name == "INVALID_ARGUMENT"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@pytest.mark.parametrize("body", [b"\x2a", b"\x2a\x80", b"\xff" * 20, b"\x2b", b"\x2a\x05abc"])
def test_a_message_that_is_cut_off_is_refused(body, sockets):
    with pytest.raises(grpc.RpcError) as caught:
        call(sockets[1], "ModelInfer", body)
    assert caught.value.code().name == "INVALID_ARGUMENT"


def test_calls_whose_messages_do_not_come_hold_up_neither_health_nor_inference():
    """Eight of them did, for as long as a body may idle."""
    limits = dataclasses.replace(fake.LIMITS, capacity=64, max_bodies=8 * fake.LIMIT)
    front, end = fake.Front(limits=limits), threading.Event()

    def slowly():
        time.sleep(0.5)
        yield infer().SerializeToString()

    def ended(number):
        """The codes of the calls for inference that have ended, so many."""
        patience = time.monotonic() + 20
        while sum(one.done() for one in waiting[:12]) < number:
            assert time.monotonic() < patience
            time.sleep(0.01)
        return [one.code().name for one in waiting[:12] if one.done()]

    kserve = "inference.GRPCInferenceService"
    paths = (f"{kserve}/ModelInfer", f"{kserve}/ServerMetadata", "grpc.health.v1.Health/Check")
    with front.sockets() as ports, grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
        waiting = [channel.stream_unary(f"/{path}").future(withheld(end)) for path in paths for _ in range(12)]
        time.sleep(0.5)  # some have all the places
        begun = time.monotonic()
        call(ports[1], "ServerLive", pb.ServerLiveRequest())
        call(ports[1], "ModelInfer", infer())
        call(ports[1], "ServerMetadata", pb.ServerMetadataRequest())
        assert time.monotonic() - begun < 8
        codes = ended(4)
        assert codes == 4 * ["RESOURCE_EXHAUSTED"]
        time.sleep(0.8)  # the others have stalled
        channel.stream_unary("/inference.GRPCInferenceService/ModelInfer").future(slowly()).result(timeout=30)
        assert sorted(ended(5)) == ["DEADLINE_EXCEEDED", *codes]
        end.set()
        for one in waiting:
            one.cancel()


def test_grpc_connections_are_bounded_and_not_idle_for_ever():
    front = fake.Front(limits=dataclasses.replace(fake.LIMITS, connections=3, keep_alive=1.0))
    with front.sockets() as ports, contextlib.ExitStack() as stack:

        def connect():
            client = stack.enter_context(socket.create_connection(("127.0.0.1", ports[1]), timeout=20))
            return client, client.recv(1000)  # its settings, or the end

        idle = [connect() for _ in range(3)]
        assert all(got for _, got in idle)
        assert connect()[1] == b""
        for client, _ in idle:
            while client.recv(1000):
                pass
        call(ports[1], "ModelInfer", infer())


def test_a_server_whose_engine_has_ended_is_neither_ready_nor_alive(front, sockets):
    """A probe of liveness restarts it: nothing else would."""
    front.engine.running = False
    assert [ask(front, "GET", f"/v2/health/{kind}").status_code for kind in ("live", "ready")] == [503, 503]
    assert not call(sockets[1], "ServerLive", pb.ServerLiveRequest()).live
    front.service.drain()  # its end is meant
    assert ask(front, "GET", "/v2/health/live").status_code == 200
