"""What clients that exist send and ask for: KServe's, MLServer's, perf_analyzer, probes, grpcurl and browsers."""

import asyncio
import contextlib
import dataclasses
import functools
import gzip
import http.client
import json
import threading
import time
import tracemalloc
import zlib
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from hypothesis import given
from hypothesis import strategies as st

from serve.protocol import health_pb2, reflection_pb2
from serve.protocol import inference_pb2 as pb
from serve.protocol.codec import inflate
from serve.protocol.messages import RequestError, TooLargeError
from tests.serve import fake
from tests.serve.transports import INFER, Grpc, Http, ask, call, images, tensor

STREAM = "inference.GRPCInferenceService/ModelStreamInfer"
REFLECT = "grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


def classes(response):
    assert response.status_code == 200, response.text
    return response.json()["outputs"][0]["data"]


def request(value=0, **changes):
    one = {"name": "images", "datatype": "UINT8", "shape": [1, 2, 3, 1]} | changes.pop("tensor", {})
    return pb.ModelInferRequest(
        **{"model_name": "gati", "inputs": [one], "raw_input_contents": [bytes([value] * 6)]} | changes
    )


class Channel:
    """Methods by name, whose answers are messages of a kind."""

    def __init__(self, port, metadata=()):
        self.channel, self.metadata = grpc.insecure_channel(f"127.0.0.1:{port}"), metadata

    def ask(self, method, messages, kind) -> Any:
        """Send one message, or several as a stream; a method of streams returns an iterator."""
        how = {"request_serializer": lambda m: m.SerializeToString(), "response_deserializer": kind.FromString}
        one = isinstance(messages, health_pb2.HealthCheckRequest)
        make = self.channel.unary_stream if one else self.channel.stream_stream
        if method.endswith("/Check"):
            make = self.channel.unary_unary
        return make(f"/{method}", **how)(messages, metadata=self.metadata, timeout=30)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()


def code_of(answers) -> str:
    """Read to the end; return how it ended."""
    with contextlib.suppress(grpc.RpcError):
        list(answers)
    return answers.code().name


# Parameters


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_mlservers_codecs_name_a_content_type_everywhere(front, sockets, kind):
    transport = Http(front) if kind == "http" else Grpc(sockets[1])
    hint = {"content_type": "np"}
    message = {"inputs": [tensor((4,), parameters=hint)], "outputs": [{"name": "exit", "parameters": hint}]}
    assert transport.infer(message | {"parameters": hint | {"epsilon": 0.05}}).status == transport.status(200)
    assert front.engine.calls[0]["route"] == 1


def test_null_is_as_good_as_nothing(front):
    one = tensor((4,), parameters=None)
    outputs = [{"name": "class_index", "parameters": None}]
    for rest in ({"outputs": None}, {"outputs": outputs}):
        message = {"id": None, "parameters": None, "inputs": [one]} | rest
        assert classes(ask(front, json=message)) == [1]
    message = {"inputs": [tensor((4,), parameters={"content_type": None})], "parameters": {"epsilon": None}}
    assert classes(ask(front, json=message)) == [1]
    assert {call["route"] for call in front.engine.calls} == {0}
    assert ask(front, json={"inputs": None}).status_code == 400


def test_kserves_client_sends_binary_data_size_beside_raw_contents(front, sockets):
    size = {"parameters": {"binary_data_size": {"int64_param": 6}}}
    assert call(sockets[1], "ModelInfer", request(tensor=size)).outputs
    np.testing.assert_array_equal(front.engine.calls[0]["images"], images(0))


@pytest.mark.parametrize(
    ("size", "raw"), [({"int64_param": 7}, [bytes(6)]), ({"string_param": "6"}, [bytes(6)]), ({"int64_param": 6}, [])]
)
def test_a_binary_data_size_of_other_bytes_is_refused(front, sockets, size, raw):
    message = request(tensor={"parameters": {"binary_data_size": size}}, raw_input_contents=raw)
    with pytest.raises(grpc.RpcError, match=r"inputs\[0\]\.parameters\.binary_data_size: expected") as caught:
        call(sockets[1], "ModelInfer", message)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert not front.engine.calls


# Compression


INFLATED = json.dumps({"inputs": [tensor((2,))]}).encode()
packed = functools.partial(gzip.compress, mtime=0)  # the time would be in the tests' names


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [
        ("gzip", gzip.compress),
        ("X-GZIP", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", lambda body: zlib.compress(body, wbits=-15)),  # some clients' idea of it
        ("identity", bytes),
    ],
)
def test_a_body_may_be_compressed(front, encoding, compress):
    response = ask(front, content=compress(INFLATED), headers={"content-encoding": encoding})
    assert classes(response) == [2]


def test_tensors_behind_a_compressed_json_are_found(front):
    one = tensor(parameters={"binary_data_size": 6}, data=None)
    text = json.dumps({"inputs": [one]}).encode()
    headers = {"content-encoding": "gzip", "inference-header-content-length": str(len(text))}
    assert classes(ask(front, content=gzip.compress(text + bytes([4] * 6)), headers=headers)) == [1]


@pytest.mark.parametrize(
    ("sent", "encoding", "status", "message"),
    [
        (b"x", "br", 415, "Content-Encoding: expected gzip, deflate or none, got 'br'"),
        (b"x", "gzip, gzip", 415, "Content-Encoding: "),
        (b"x", "x" * 1000, 415, "Content-Encoding: "),
        (INFLATED, "gzip", 400, "body: expected gzip data"),
        (INFLATED, "deflate", 400, "body: expected deflate data"),
        (b"", "gzip", 400, "body: expected one whole stream of gzip, got a part"),
        (packed(INFLATED)[:-4], "gzip", 400, "body: expected one whole stream of gzip, got a part"),
        (packed(INFLATED) * 2, "gzip", 400, "body: expected one whole stream of gzip, got bytes behind it"),
        (packed(b"") * 100, "gzip", 400, "body: expected one whole stream of gzip, got bytes behind it"),
        (packed(bytes(fake.LIMIT + 1)), "gzip", 413, "body: expected at most 4096 bytes once it is inflated"),
        (zlib.compress(bytes(2**21)), "deflate", 413, "body: expected at most 4096 bytes once it is inflated"),
        (packed(bytes(fake.LIMIT)), "gzip", 400, "body: Invalid JSON"),  # as large as it may be
    ],
)
def test_a_compressed_body_that_is_something_else_is_refused(front, sent, encoding, status, message):
    response = ask(front, content=sent, headers={"content-encoding": encoding})
    assert (response.status_code, response.json()["error"][: len(message)]) == (status, message)
    assert len(response.json()["error"]) < 250
    assert not front.engine.calls


def test_compressed_bodies_hold_the_memory_of_the_largest_one_only_while_they_are_inflated():
    """Each held it until it was answered: more than seven at once were refused."""
    front = fake.Front(limits=dataclasses.replace(fake.LIMITS, max_bodies=4 * fake.LIMIT))
    front.engine.silent = True
    path, sent, how = "/v2/models/gati/infer", gzip.compress(INFLATED), {"content-encoding": "gzip"}

    async def ask_all():
        transport = httpx.ASGITransport(front.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            asking = [asyncio.ensure_future(client.post(path, content=sent, headers=how)) for _ in range(12)]
            patience = time.monotonic() + 30
            while len(front.engine.calls) < 12:
                assert time.monotonic() < patience
                assert not any(one.done() for one in asking)
                await asyncio.sleep(0.01)
            assert front.door.bytes == 12 * len(INFLATED)
            for one in asking:
                one.cancel()

    asyncio.run(ask_all())


def test_a_small_body_does_not_fill_the_memory():
    """64 kB of gzip are 64 MB of zeros: inflation ends at the limit."""
    bomb = gzip.compress(bytes(2**26))
    tracemalloc.start()
    try:
        with pytest.raises(TooLargeError):
            inflate(bomb, "gzip", 2**20)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate"]), st.integers(0, 300))
def test_what_is_inflated_is_what_was_compressed_or_refused(data, encoding, limit):
    sent = gzip.compress(data) if encoding == "gzip" else zlib.compress(data)
    try:
        assert inflate(sent, encoding, limit) == data
        assert len(data) <= limit
    except TooLargeError:
        assert len(data) > limit
    with contextlib.suppress(RequestError, TooLargeError):
        assert len(inflate(data, encoding, limit)) <= limit


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_tritonclient_compresses(sockets, algorithm):
    for port, module, option in zip(
        sockets,
        (tritonclient.http, tritonclient.grpc),
        ("request_compression_algorithm", "compression_algorithm"),
        strict=True,
    ):
        given: Any = module.InferInput("images", [2, 2, 3, 1], "UINT8").set_data_from_numpy(images(1, 2))
        client: Any = module.InferenceServerClient(f"127.0.0.1:{port}")
        with client:
            result = client.infer("gati", [given], **{option: algorithm})
            assert result.as_numpy("class_index").tolist() == [1, 2]


def test_a_small_grpc_message_does_not_fill_the_memory(front, sockets):
    with grpc.insecure_channel(f"127.0.0.1:{sockets[1]}") as channel:
        method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            method(bytes(2**20), compression=grpc.Compression.Gzip, timeout=30)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not front.engine.calls


# Streams


def test_tritonclient_streams(sockets):
    results, enough = [], threading.Event()

    def take(result, error):
        results.append((result, error))
        if len(results) == 21:
            enough.set()

    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{sockets[1]}") as client:
        client.start_stream(take)
        for i in range(21):
            given = tritonclient.grpc.InferInput("images", [1, 2, 3, 1], "UINT8").set_data_from_numpy(images(i))
            name = "gati" if i < 20 else "other"
            client.async_stream_infer(name, [given], request_id=str(i), enable_empty_final_response=True)
        assert enough.wait(30)
        client.stop_stream()
    assert [result.as_numpy("class_index").tolist() for result, error in results if error is None] == [
        [i % 3] for i in range(20)
    ]
    responses = [result.get_response() for result, error in results if error is None]
    assert [response.id for response in responses] == [str(i) for i in range(20)]
    assert all(response.parameters["triton_final_response"].bool_param for response in responses)
    assert "expected 'gati', got 'other'" in str(results[-1][1])


def test_an_error_in_a_stream_names_its_request_and_the_stream_goes_on(sockets):
    with Channel(sockets[1]) as channel:
        messages = [request(1, id="a"), request(id="b", model_name="x"), request(id="c", inputs=[]), request(2, id="d")]
        parts = list(channel.ask(STREAM, iter(messages), pb.ModelStreamInferResponse))
    assert [part.infer_response.id for part in parts] == ["a", "b", "c", "d"]
    assert [part.error_message.partition(":")[0] for part in parts] == ["", "model", "raw_input_contents", ""]
    assert [bool(part.infer_response.outputs) for part in parts] == [True, False, False, True]


def test_a_stream_that_asks_without_reading_is_held_up(front, sockets):
    """Only so many requests of one stream are answered at a time, and none is lost."""
    front.engine.silent = True
    with Channel(sockets[1]) as channel:
        answers = channel.ask(STREAM, iter([request(i) for i in range(50)]), pb.ModelStreamInferResponse)
        assert front.engine.submitted.wait(30)
        threading.Event().wait(0.3)
        assert len(front.engine.calls) <= 8
        answers.cancel()
        assert front.engine.abandoned.wait(30)


def test_a_stream_needs_the_token_and_health_does_not():
    front = fake.Front(token="secret")
    with front.sockets() as ports:
        for metadata, code in (((), "UNAUTHENTICATED"), ((("authorization", "Bearer secret"),), "OK")):
            with Channel(ports[1], metadata) as channel:
                assert code_of(channel.ask(STREAM, iter([request()]), pb.ModelStreamInferResponse)) == code
                assert code_of(channel.ask(REFLECT, iter([]), reflection_pb2.ServerReflectionResponse)) == code
                reply = channel.ask("grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(), HEALTH)
                assert reply.status == HEALTH.SERVING
    assert len(front.engine.calls) == 1


def test_idle_streams_end_when_the_service_does(front, sockets):
    """Otherwise each idle one keeps a server that stops until its drain is over."""
    idle = threading.Event()

    def wait():
        idle.wait(30)
        yield from ()

    with Channel(sockets[1]) as channel:
        streams = [
            channel.ask(STREAM, wait(), pb.ModelStreamInferResponse),
            channel.ask(REFLECT, wait(), reflection_pb2.ServerReflectionResponse),
            channel.ask("grpc.health.v1.Health/Watch", health_pb2.HealthCheckRequest(), HEALTH),
        ]
        assert next(streams[-1]).status == HEALTH.SERVING
        front.service.close()
        assert [code_of(stream) for stream in streams] == ["UNAVAILABLE"] * 3
        idle.set()


# Health and reflection


HEALTH = health_pb2.HealthCheckResponse


@pytest.mark.parametrize(
    ("service", "serving"),
    [("", False), ("readiness", False), ("inference.GRPCInferenceService", False), ("liveness", True)],
)
def test_grpc_probes_ask_for_readiness_or_liveness(service, serving):
    front = fake.Front(ready=False)
    asked = health_pb2.HealthCheckRequest(service=service)
    with front.sockets() as ports, Channel(ports[1]) as channel:
        watched = channel.ask("grpc.health.v1.Health/Watch", asked, HEALTH)
        for well in (serving, True, serving):
            reply = channel.ask("grpc.health.v1.Health/Check", asked, HEALTH)
            assert (reply.status == HEALTH.SERVING) == well
            if not serving:  # otherwise nothing changes
                assert (next(watched).status == HEALTH.SERVING) == well
            front.service.drain() if front.service.ready else front.warm_up()
        watched.cancel()
    front.engine.stop()


def test_an_unknown_service_is_not_found_but_may_be_watched(sockets):
    asked = health_pb2.HealthCheckRequest(service="other")
    with Channel(sockets[1]) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.ask("grpc.health.v1.Health/Check", asked, HEALTH)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        watched = channel.ask("grpc.health.v1.Health/Watch", asked, HEALTH)
        assert next(watched).status == HEALTH.SERVICE_UNKNOWN
        watched.cancel()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_describes_every_method_that_is_there(sockets, version):
    ask_ = reflection_pb2.ServerReflectionRequest
    names = [
        "inference.GRPCInferenceService",
        "inference.GRPCInferenceService.ModelStreamInfer",
        "inference.ModelInferRequest.InferInputTensor",
        "grpc.health.v1.Health.Check",
        "grpc.reflection.v1.ServerReflection",
    ]
    wrong = ["inference.GRPCInferenceService.Train", "inference", "os.system", ""]
    questions = [ask_(list_services="")]
    questions += [ask_(file_containing_symbol=name) for name in (*names, *wrong)]
    questions += [ask_(file_by_filename="health.proto"), ask_(file_by_filename="/etc/passwd"), ask_(), ask_(host="h")]
    with Channel(sockets[1]) as channel:
        method = REFLECT.replace(".v1.", f".{version}.")
        services, *rest = channel.ask(method, iter(questions), reflection_pb2.ServerReflectionResponse)
    listed = {one.name for one in services.list_services_response.service}
    assert listed == {"inference.GRPCInferenceService", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"}
    files = [b"".join(one.file_descriptor_response.file_descriptor_proto) for one in rest]
    mine, health, reflection = (m.DESCRIPTOR.serialized_pb for m in (pb, health_pb2, reflection_pb2))
    assert files == [mine, mine, mine, health, reflection, *[b""] * len(wrong), health, *[b""] * 3]
    assert all(one.error_response.error_code for one, file in zip(rest, files, strict=True) if not file)


def test_a_question_longer_than_any_name_is_refused(sockets):
    with Channel(sockets[1]) as channel:
        long = reflection_pb2.ServerReflectionRequest(file_by_filename="x" * 1100)
        answers = channel.ask(REFLECT, iter([long]), reflection_pb2.ServerReflectionResponse)
        assert code_of(answers) == "INVALID_ARGUMENT"


# Paths


@pytest.mark.parametrize("path", ["/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/gati/ready", "/metrics"])
def test_head_is_get_without_a_body(front, path):
    head, get = ask(front, "HEAD", path), ask(front, "GET", path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    front.service.drain()
    assert ask(front, "HEAD", "/v2/health/ready").status_code == 503
    assert ask(front, "HEAD", INFER).status_code == 405


def test_head_over_a_socket_leaves_the_connection_in_order(sockets):
    connection = http.client.HTTPConnection("127.0.0.1", sockets[0], timeout=30)
    for method in ("HEAD", "GET", "HEAD", "GET"):
        connection.request(method, "/v2/health/live")
        assert connection.getresponse().read() == (b"" if method == "HEAD" else b'{"live":true}')
    connection.close()


@pytest.mark.parametrize("path", ["/v2/", "/v2/health/live/", "/v2/models/gati/", "/docs/", "/nowhere/", "//", "/v2//"])
def test_no_answer_repeats_the_host_of_the_request(front, path):
    """A slash at the end was redirected to wherever the Host header said."""
    response = ask(front, "GET", path, headers={"host": "evil.example"})
    assert response.status_code == (404 if path in {"/nowhere/", "/v2//"} else 200)
    assert "location" not in response.headers
    assert "evil" not in response.text


def test_a_slash_at_the_end_is_no_way_around_the_token():
    front = fake.Front(token="secret")
    assert ask(front, "GET", "/v2/health/live/").status_code == 200
    for path in ("/v2/", "/metrics/", "/docs/", "/v2/health/live//"):
        assert ask(front, "GET", path).status_code == 401


def test_the_page_for_people_needs_no_other_host(front):
    response = ask(front, "GET", "/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "<script" not in response.text
    assert "//" not in response.text.replace("</", "")
    for path in ask(front, "GET", "/openapi.json").json()["paths"]:
        assert path in response.text
    assert ask(front, "GET", "/redoc").status_code == 404
