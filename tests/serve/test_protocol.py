"""What clients get over either transport, and which errors they see."""

import http.client
import importlib.util
import json
import logging
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.grpc import service_pb2

from serve.engine.records import DeadlineError, OverloadedError, StepError, StoppingError
from serve.protocol import inference_pb2 as pb
from tests.serve import fake
from tests.serve.transports import INFER, Grpc, Http, ask, call, images, tensor

P, Q = np.exp(2) / (np.exp(2) + 2), 1 / (np.exp(2) + 2)
TRANSPORTS = {"http": tritonclient.http, "grpc": tritonclient.grpc}


@pytest.fixture(params=["http", "grpc"])
def transport(request, front) -> Http | Grpc:
    return Http(front) if request.param == "http" else Grpc(request.getfixturevalue("sockets")[1])


def connect(name, ports) -> Any:
    return TRANSPORTS[name].InferenceServerClient(f"127.0.0.1:{ports[name == 'grpc']}")


def given(name, *values, datatype="UINT8", dtype=np.uint8, **how) -> Any:
    array = images(*values, dtype=dtype)
    return TRANSPORTS[name].InferInput("images", list(array.shape), datatype).set_data_from_numpy(array, **how)


# Triton's clients


@pytest.mark.parametrize("name", TRANSPORTS)
def test_tritonclient_reads_health_metadata_config_and_statistics(front, sockets, name):
    client, how = connect(name, sockets), {} if name == "http" else {"as_json": True}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("gati", "v7")
    assert not client.is_model_ready("gati", "v8") if name == "http" else True
    assert client.get_server_metadata(**how)["name"] == "gati-jax"
    metadata = client.get_model_metadata("gati", **how)
    (described,) = metadata["inputs"]
    assert (described["name"], described["datatype"]) == ("images", "UINT8")
    assert [int(size) for size in described["shape"]] == [-1, 2, 3, 1]
    assert [output["name"] for output in metadata["outputs"]][:2] == ["class_index", "class_name"]
    probabilities = metadata["outputs"][2]
    assert (probabilities["name"], [int(size) for size in probabilities["shape"]]) == ("probabilities", [-1, 3])
    config = client.get_model_config("gati", **how)
    config = config.get("config", config)
    assert (config["max_batch_size"], config["input"][0]["data_type"]) == (8, "TYPE_UINT8")
    assert [int(size) for size in config["input"][0]["dims"]] == [2, 3, 1]
    assert config["dynamic_batching"] == {}
    assert json.loads(config["parameters"]["plans"]["string_value"])["loose"] == {"epsilon": 0.05, "delta": 0.05}
    for _ in range(3):
        client.infer("gati", [given(name, 1, 2)])
    (stats,) = client.get_inference_statistics(**how)["model_stats"]
    assert stats == client.get_inference_statistics("gati", **how)["model_stats"][0]
    assert (int(stats["inference_count"]), int(stats["execution_count"])) == (6, 3)
    (batch,) = stats["batch_stats"]
    assert [int(batch["batch_size"]), *(int(x) for x in batch["compute_infer"].values())] == [2, 3, 6_000_000]
    times = stats["inference_stats"]
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    assert int(times["success"]["ns"]) == sum(int(times[part]["ns"]) for part in parts)
    assert {int(times[part]["count"]) for part in (*parts, "success")} == {3}
    front.service.drain()
    assert client.is_server_live()
    assert not client.is_server_ready()
    assert not client.is_model_ready("gati")
    client.close()


@pytest.mark.parametrize(
    ("name", "binary_in", "binary_out"),
    [("grpc", True, True), *(("http", i, o) for i in (False, True) for o in (False, True))],
)
@pytest.mark.parametrize(("datatype", "dtype"), [("UINT8", np.uint8), ("FP32", np.float32)])
def test_tritonclient_infers(front, sockets, name, binary_in, binary_out, datatype, dtype):  # noqa: PLR0917
    binary = lambda value: {"binary_data": value} if name == "http" else {}  # noqa: E731
    client, module = connect(name, sockets), TRANSPORTS[name]
    sent = given(name, 3, 4, 5, datatype=datatype, dtype=dtype, **binary(binary_in))
    outputs = [module.InferRequestedOutput(one, **binary(binary_out)) for one in ("class_index", "class_name", "score")]
    options = {"outputs": outputs, "request_id": "r", "headers": {"x-request-id": "me"}}
    result = client.infer("gati", [sent], parameters={"epsilon": 0.05}, **options)
    assert result.as_numpy("class_index").tolist() == [0, 1, 2]
    names = [b"cat", b"dog", "élan".encode()]
    assert result.as_numpy("class_name").tolist() == (names if binary_out else [one.decode() for one in names])
    assert result.as_numpy("score")[:2].tolist() == [1.5, 2.0]
    response = result.get_response(**({} if name == "http" else {"as_json": True}))
    assert (response["model_version"], response["id"]) == ("v7", "r")
    plan, epsilon = (response["parameters"][key] for key in ("plan", "epsilon"))
    assert plan in ("loose", {"string_param": "loose"})
    assert epsilon in (0.05, {"double_param": 0.05})
    assert (front.engine.calls[0]["request_id"], front.engine.calls[0]["route"]) == ("me", 1)
    client.close()


@pytest.mark.parametrize("name", TRANSPORTS)
def test_tritonclient_gets_all_outputs_as_bytes_by_default(sockets, name):
    with connect(name, sockets) as client:
        result = client.infer("gati", [given(name, 5)])
        assert result.as_numpy("score").tolist() == [np.inf]
        assert result.as_numpy("exit").tolist() == [4]
        assert result.as_numpy("class_name").tolist() == ["élan".encode()]
        np.testing.assert_allclose(result.as_numpy("probabilities"), [[Q, Q, P]], rtol=1e-6)
        bad = TRANSPORTS[name].InferInput("images", [1, 2, 3, 2], "UINT8")
        bad.set_data_from_numpy(np.zeros((1, 2, 3, 2), np.uint8))
        with pytest.raises(Exception, match=r"inputs\[0\]\.shape: expected \[n, 2, 3, 1\]"):
            client.infer("gati", [bad])


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_tensors_may_be_numbers(front, transport, datatype):
    assert transport.infer({"inputs": [tensor((4,), datatype=datatype)]}).status == transport.status(200)
    np.testing.assert_array_equal(front.engine.calls[0]["images"], images(4))
    assert front.engine.calls[0]["images"].dtype == {"UINT8": np.uint8, "FP32": np.float32}[datatype]


# Bad requests


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": []}, "inputs: expected one tensor, images, got 0"),
        ({"inputs": [tensor(), tensor()]}, "inputs: expected one tensor"),
        ({"inputs": [tensor(name="pixels")]}, "inputs[0].name: expected images"),
        ({"inputs": [tensor(datatype="INT32")]}, "inputs[0].datatype: expected UINT8 or FP32"),
        ({"inputs": [tensor(shape=[1, 3, 2, 1])]}, "inputs[0].shape: expected [n, 2, 3, 1] with n = 1 to 8"),
        ({"inputs": [tensor(shape=[0, 2, 3, 1], data=[])]}, "inputs[0].shape: "),
        ({"inputs": [tensor([1] * 9)]}, "inputs[0]."),
        ({"inputs": [tensor(shape=[])]}, "inputs[0].shape: "),
        ({"inputs": [tensor(shape=[-1, 2, 3, 1])]}, "inputs[0].shape"),
        ({"inputs": [tensor(shape=[2**31 - 1, 2, 3, 1])]}, "inputs[0].shape: "),
        ({"inputs": [tensor(data=[0] * 5)]}, "inputs[0].data: expected 6 numbers"),
        ({"inputs": [tensor(data=None)]}, "inputs[0].data: "),
        ({"inputs": [tensor(data=[256] * 6)]}, "inputs[0].data: expected 0 to 255"),
        ({"inputs": [tensor(parameters={"shared_memory_region": "a"})]}, "inputs[0].parameters: "),
        ({"outputs": [{"name": "nothing"}]}, "outputs[0].name: expected each at most once of class_index"),
        ({"outputs": [{"name": "exit"}, {"name": "exit"}]}, "outputs[1].name: "),
        ({"outputs": [{"name": "exit", "parameters": {"classification": 2}}]}, "outputs[0].parameters: "),
        ({"outputs": [{"name": "exit", "parameters": {"binary_data": 1}}]}, "outputs[0].parameters.binary_data: "),
        ({"parameters": {"epsilom": 0.1}}, "parameters: expected epsilon, "),
        ({"parameters": {"epsilon": "0.1"}}, "parameters.epsilon: expected a number"),
        ({"parameters": {"epsilon": True}}, "parameters.epsilon: "),
        ({"parameters": {"epsilon": -0.1}}, "parameters.epsilon: expected a number from 0 to 1"),
        ({"parameters": {"epsilon": 0.9}}, "epsilon: expected at most 0.5"),
        ({"parameters": {"deadline_ms": 0}}, "parameters.deadline_ms: "),
        ({"parameters": {"binary_data_output": "yes"}}, "parameters.binary_data_output: "),
    ],
)
def test_a_bad_request_is_refused_with_the_name_of_the_field(front, transport, change, message):
    reply = transport.infer({"inputs": [tensor()]} | change)
    assert reply.status == transport.status(400)
    assert reply.message.startswith(message)
    assert not front.engine.calls


def test_an_unknown_model_or_version_is_not_found(transport):
    message, missing = {"inputs": [tensor()]}, transport.status(404)
    assert transport.infer(message, model="other")[:2] == (missing, "model: expected 'gati', got 'other'")
    assert transport.infer(message, version="8")[:2] == (missing, "version: expected 'v7', got '8'")
    for method in ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"):
        assert transport.get(method, "other").status == missing


# Failures of the engine


@pytest.mark.parametrize(
    ("refusal", "status", "seconds", "ms"),
    [
        (OverloadedError("overloaded: 16 of 16 places are taken", 0.25), 429, "1", "250"),
        (OverloadedError("overloaded: 16 of 16 places are taken", 2.3), 429, "3", "2300"),
        (StoppingError("stopping"), 503, "1", "1000"),
    ],
)
def test_refusals_say_when_to_try_again(front, transport, refusal, status, seconds, ms):
    front.engine.refusal = refusal
    reply = transport.infer({"inputs": [tensor()]})
    assert (reply.status, reply.message) == (transport.status(status), str(refusal))
    assert reply.headers[transport.retry_after] == (seconds if isinstance(transport, Http) else ms)


@pytest.mark.parametrize(
    ("failure", "status"),
    [(StepError("/secret/path"), 500), (MemoryError("/secret/path"), 500), (DeadlineError("it passed"), 504)],
)
def test_a_failure_tells_nothing_secret(front, transport, failure, status, caplog):
    front.engine.failure = failure
    with caplog.at_level(logging.CRITICAL):
        reply = transport.infer({"inputs": [tensor((1, 2))]}, {"x-request-id": "look-me-up"})
    assert (reply.status, reply.headers["x-request-id"]) == (transport.status(status), "look-me-up")
    assert "secret" not in reply.message
    front.engine.failure = None
    assert transport.infer({"inputs": [tensor()]}).status == transport.status(200)


def test_a_step_that_hangs_does_not_keep_the_client(front, transport):
    front.engine.silent = True
    reply = transport.infer({"inputs": [tensor()], "parameters": {"deadline_ms": 200}})
    assert (reply.status, reply.message[:11]) == (transport.status(504), "the deadlin")
    assert front.engine.abandoned.is_set()


def test_the_clients_own_grpc_deadline_abandons_its_images(sockets, front):
    front.engine.silent = True
    with pytest.raises(grpc.RpcError) as caught:
        call(sockets[1], "ModelInfer", request(), timeout=0.05)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    if front.engine.submitted.wait(0.5):  # on a slow machine the request may never have come so far
        assert front.engine.abandoned.wait(30)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_client_that_leaves_abandons_its_images(front, sockets, name):
    front.engine.silent = True
    if name == "http":
        leaving = http.client.HTTPConnection("127.0.0.1", sockets[0])
        leaving.request("POST", INFER, json.dumps({"inputs": [tensor((1, 2))]}))
    else:
        leaving = connect(name, sockets)
        leaving.async_infer("gati", [given(name, 1, 2)], callback=lambda *_: None)
    assert front.engine.submitted.wait(30)
    assert not front.engine.abandoned.is_set()
    leaving.close()
    assert front.engine.abandoned.wait(30)
    front.engine.silent = False
    with connect(name, sockets) as other:
        assert other.is_server_ready()


# Readiness, tokens, logs


def test_nothing_is_answered_before_the_warm_up():
    front = fake.Front(ready=False)
    with front.sockets() as ports:
        for transport in (Http(front), Grpc(ports[1])):
            assert transport.get("ServerLive").status == transport.status(200)
            assert transport.get("ServerReady").status == transport.status(503)
            assert transport.get("ModelReady", "gati").status == transport.status(503)
            reply = transport.infer({"inputs": [tensor()]})
            assert reply[:2] == (transport.status(503), "the server is warming up")
        front.warm_up()
        for transport in (Http(front), Grpc(ports[1])):
            assert transport.get("ServerReady").status == transport.status(200)
        front.service.drain()
        for transport in (Http(front), Grpc(ports[1])):
            assert transport.get("ServerReady").status == transport.status(503)
            assert transport.infer({"inputs": [tensor()]}).status == transport.status(200)  # late ones are answered
    assert ask(front, json={"inputs": [tensor()]}).headers["connection"] == "close"  # and their connection closed


def test_without_the_token_only_health_is_answered():
    front, good = fake.Front(token="secret"), {"authorization": "Bearer secret"}
    message = {"inputs": [tensor()]}
    with front.sockets() as ports:
        for transport in (Http(front), Grpc(ports[1])):
            assert transport.get("ServerReady").status == transport.status(200)
            for bad in ({}, {"authorization": "secret"}, {"authorization": "Bearer secreT"}):
                for reply in (transport.get("ServerMetadata", headers=bad), transport.infer(message, bad)):
                    assert reply.status == transport.status(401)
                    assert reply.message.startswith("authorization: ")
            assert transport.get("ServerMetadata", headers=good).status == transport.status(200)
            assert transport.infer(message, good).status == transport.status(200)
    for path in ("/v2/models/gati", "/metrics", "/docs", "/openapi.json", "/nowhere"):
        for bad in (b"", b"Bearer \xc3\xbc"):
            response = ask(front, "GET", path, headers={"authorization": bad})
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        assert ask(front, "GET", path, headers=good).status_code == (404 if path == "/nowhere" else 200)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_debug_logs_report_every_request(sockets, name, caplog):
    with caplog.at_level(logging.DEBUG, "serve"), connect(name, sockets) as client:
        assert client.is_server_live()
        patience = time.monotonic() + 10  # the line may come after the answer
        while not (lines := [r for r in caplog.records if r.name == "serve.access"]):
            assert time.monotonic() < patience
            time.sleep(0.01)
    seen = vars(lines[0])
    path = {"http": "/v2/health/live", "grpc": "ServerLive"}[name]
    assert (seen["message"], seen["protocol"], seen["path"], seen["status"]) == ("request", name, path, 200)
    assert seen["client"].startswith("127.0.0.1:")


# gRPC's own messages: the same as Triton's, and what their parts may be


FOLDER = Path(pb.__file__).parent


def same(ours, theirs):
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        for fact in ("number", "type", "is_repeated"):
            assert getattr(field, fact) == getattr(other, fact), (ours.full_name, field.name, fact)
        oneofs = [f.containing_oneof and f.containing_oneof.name for f in (field, other)]
        assert oneofs[0] == oneofs[1]
        if field.message_type:
            assert field.message_type.full_name == other.message_type.full_name
            same(field.message_type, other.message_type)
        if field.enum_type:
            pairs = [{v.name: v.number for v in f.enum_type.values} for f in (field, other)]
            assert pairs[0] == pairs[1]


def test_messages_have_the_names_numbers_and_types_of_tritonclients():
    assert pb.DESCRIPTOR.package == service_pb2.DESCRIPTOR.package
    ours, theirs = (m.DESCRIPTOR.services_by_name["GRPCInferenceService"] for m in (pb, service_pb2))
    assert ours.full_name == theirs.full_name
    for method in ours.methods:
        other = theirs.methods_by_name[method.name]
        for message in ("input_type", "output_type"):
            assert getattr(method, message).full_name == getattr(other, message).full_name
            same(getattr(method, message), getattr(other, message))


@pytest.mark.parametrize("name", ["inference", "health", "reflection"])
def test_the_compiled_messages_are_those_of_the_proto_file(tmp_path, name):
    if importlib.util.find_spec("grpc_tools") is None:
        pytest.skip("needs grpcio-tools")
    compiler = (sys.executable, "-m", "grpc_tools.protoc", f"-I{FOLDER}", f"--python_out={tmp_path}")
    subprocess.run((*compiler, f"{name}.proto"), check=True)
    written, committed = ((folder / f"{name}_pb2.py").read_text() for folder in (tmp_path, FOLDER))
    descriptors = [re.search(r"AddSerializedFile\((.*)\)", text) for text in (written, committed)]
    assert descriptors[0]
    assert descriptors[1]
    assert descriptors[0][1] == descriptors[1][1]


def request(tensor=None, **changes):
    inputs = [{"name": "images", "datatype": "UINT8", "shape": [1, 2, 3, 1]} | (tensor or {})]
    return pb.ModelInferRequest(**{"model_name": "gati", "inputs": inputs, "raw_input_contents": [bytes(6)]} | changes)


NAN = np.full(6, np.nan, np.float32).tobytes()


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"\xff\xff", "message: expected a ModelInferRequest"),
        (request(inputs=[]), "raw_input_contents: expected one for each of the 0"),
        (request(raw_input_contents=[bytes(5)]), "inputs[0].data: expected 6 bytes"),
        (request({"datatype": "BYTES"}), "inputs[0].datatype: expected UINT8 or FP32"),
        (request({"shape": [2**62, 2, 3, 1]}), "inputs[0].shape: "),
        (request({"contents": {"uint_contents": [1]}}), "inputs[0].contents: "),
        (request({"datatype": "FP32"}, raw_input_contents=[NAN]), "inputs[0].data: expected finite"),
        (request(parameters={"epsilon": {}}), "parameters.epsilon: expected a value"),
        (request(id="x" * 5000), ""),
    ],
)
def test_grpc_messages_whose_parts_do_not_fit_are_refused(sockets, front, message, words):
    with pytest.raises(grpc.RpcError) as caught:
        call(sockets[1], "ModelInfer", message)
    assert caught.value.code().name == ("INVALID_ARGUMENT" if words else "RESOURCE_EXHAUSTED")
    assert str(caught.value.details()).startswith(words)
    assert not front.engine.calls
