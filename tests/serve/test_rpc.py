"""The protocol over gRPC."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

from serve.engine.records import DeadlineError, OverloadedError, StepError, StoppingError
from serve.protocol import grpc as rpc
from serve.protocol import inference_pb2 as pb

FOLDER = Path(rpc.__file__).parent


def images(*values, dtype=np.uint8):
    return np.stack([np.full((2, 3, 1), value, dtype) for value in values])


# The messages are everyone's


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
    ours = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert ours.full_name == theirs.full_name
    for method in ours.methods:
        other = theirs.methods_by_name[method.name]
        for message in ("input_type", "output_type"):
            assert getattr(method, message).full_name == getattr(other, message).full_name
            same(getattr(method, message), getattr(other, message))


def test_the_compiled_messages_are_those_of_the_proto_file(tmp_path):
    if importlib.util.find_spec("grpc_tools") is None:
        pytest.skip("needs grpcio-tools")
    compiler = (sys.executable, "-m", "grpc_tools.protoc", f"-I{FOLDER}", f"--python_out={tmp_path}")
    subprocess.run((*compiler, "inference.proto"), check=True)
    written = (tmp_path / "inference_pb2.py").read_text()
    committed = (FOLDER / "inference_pb2.py").read_text()
    descriptors = [re.search(r"AddSerializedFile\((.*)\)", text) for text in (written, committed)]
    assert descriptors[0]
    assert descriptors[1]
    assert descriptors[0][1] == descriptors[1][1]


# Triton's client


@pytest.fixture
def client(sockets):
    with triton.InferenceServerClient(f"127.0.0.1:{sockets[1]}") as made:
        yield made


def given(*values, datatype="UINT8", dtype=np.uint8):
    array = images(*values, dtype=dtype)
    return triton.InferInput("images", list(array.shape), datatype).set_data_from_numpy(array)


def test_tritonclient_reads_health_metadata_config_and_statistics(client, front):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("gati", "v7")
    assert client.get_server_metadata().name == "gati-jax"
    metadata = client.get_model_metadata("gati")
    assert list(metadata.inputs[0].shape) == [-1, 2, 3, 1]
    assert [output.name for output in metadata.outputs][:2] == ["class_index", "class_name"]
    config = client.get_model_config("gati").config
    assert (config.max_batch_size, config.input[0].data_type) == (8, pb.DataType.TYPE_UINT8)
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    for _ in range(2):
        client.infer("gati", [given(1, 2)])
    (stats,) = client.get_inference_statistics("gati").model_stats
    assert (stats.inference_count, stats.execution_count, stats.batch_stats[0].batch_size) == (4, 2, 2)
    times = stats.inference_stats
    parts = (times.queue, times.compute_input, times.compute_infer, times.compute_output)
    assert sum(part.ns for part in parts) == times.success.ns
    assert {part.count for part in parts} == {2}
    front.service.drain()
    assert client.is_server_live()
    assert not client.is_server_ready()
    assert not client.is_model_ready("gati")


@pytest.mark.parametrize(("datatype", "dtype"), [("UINT8", np.uint8), ("FP32", np.float32)])
def test_tritonclient_infers(client, front, datatype, dtype):
    wanted = [triton.InferRequestedOutput(name) for name in ("class_name", "score", "exit")]
    result = client.infer(
        "gati",
        [given(3, 4, 5, datatype=datatype, dtype=dtype)],
        outputs=wanted,
        request_id="r",
        parameters={"epsilon": 0.05},
        headers={"x-request-id": "me"},
    )
    assert result.as_numpy("class_name").tolist() == [b"cat", b"dog", "élan".encode()]
    assert result.as_numpy("score").tolist() == [1.5, 2.0, np.inf]
    assert result.as_numpy("exit").tolist() == [0, 2, 4]
    response = result.get_response()
    assert (response.model_version, response.id) == ("v7", "r")
    assert response.parameters["plan"].string_param == "loose"
    assert response.parameters["epsilon"].double_param == 0.05
    assert (front.engine.calls[0]["request_id"], front.engine.calls[0]["route"]) == ("me", 1)


@pytest.mark.parametrize(("datatype", "contents"), [("UINT8", "uint_contents"), ("FP32", "fp32_contents")])
def test_tensors_may_come_as_numbers(sockets, datatype, contents):
    message = pb.ModelInferRequest(model_name="gati")
    tensor = message.inputs.add(name="images", datatype=datatype, shape=[2, 3, 1])
    getattr(tensor.contents, contents).extend([4] * 6)
    response = call(sockets, "ModelInfer", message)
    assert [output.name for output in response.outputs][:1] == ["class_index"]
    assert response.raw_output_contents[0] == b"\1\0\0\0"


# Bad requests


def call(sockets, method, message, *, metadata=None, timeout: float = 30):
    """Call without a client that checks anything; ``message`` may be any bytes."""
    body = message if isinstance(message, bytes) else message.SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{sockets[1]}") as channel:
        answer, _ = channel.unary_unary(f"/inference.GRPCInferenceService/{method}").with_call(
            body, metadata=metadata, timeout=timeout
        )
    return getattr(pb, f"{method}Response").FromString(answer)


def metadata_of(error):
    return {str(key): value for key, value in error.trailing_metadata()}


def request(**changes):
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 2, 3, 1]}
    return pb.ModelInferRequest(
        **{"model_name": "gati", "inputs": [tensor], "raw_input_contents": [bytes(6)]} | changes
    )


def of(**changes):
    return [{"name": "images", "datatype": "UINT8", "shape": [1, 2, 3, 1]} | changes]


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        (b"\xff\xff", "INVALID_ARGUMENT", "message: expected a ModelInferRequest"),
        (request(model_name="other"), "NOT_FOUND", "model: expected 'gati'"),
        (request(model_version="8"), "NOT_FOUND", "version: expected 'v7'"),
        (request(inputs=[]), "INVALID_ARGUMENT", "raw_input_contents: expected one for each of the 0"),
        (request(inputs=[], raw_input_contents=[]), "INVALID_ARGUMENT", "inputs: expected one tensor"),
        (request(raw_input_contents=[bytes(5)]), "INVALID_ARGUMENT", "inputs[0].data: expected 6 bytes"),
        (request(raw_input_contents=[]), "INVALID_ARGUMENT", "inputs[0].data: expected 6 numbers"),
        (request(inputs=of(datatype="BYTES")), "INVALID_ARGUMENT", "inputs[0].datatype: expected UINT8 or FP32"),
        (request(inputs=of(shape=[-1, 2, 3, 1])), "INVALID_ARGUMENT", "inputs[0].shape: "),
        (request(inputs=of(shape=[2**62, 2, 3, 1])), "INVALID_ARGUMENT", "inputs[0].shape: "),
        (request(inputs=of(contents={"uint_contents": [1]})), "INVALID_ARGUMENT", "inputs[0].contents: "),
        (request(inputs=of(parameters={"shared_memory_region": {}})), "INVALID_ARGUMENT", "inputs[0].parameters: "),
        (
            request(inputs=of(contents={"uint_contents": [256] * 6}), raw_input_contents=[]),
            "INVALID_ARGUMENT",
            "inputs[0].data: expected 0 to 255",
        ),
        (
            request(inputs=of(datatype="FP32"), raw_input_contents=[np.full(6, np.nan, np.float32).tobytes()]),
            "INVALID_ARGUMENT",
            "inputs[0].data: expected finite",
        ),
        (request(parameters={"epsilon": {}}), "INVALID_ARGUMENT", "parameters.epsilon: expected a value"),
        (request(parameters={"epsilon": {"string_param": "0"}}), "INVALID_ARGUMENT", "parameters.epsilon: expected a"),
        (request(outputs=[{"name": "nothing"}]), "INVALID_ARGUMENT", "outputs[0].name: "),
        (request(id="x" * 5000), "RESOURCE_EXHAUSTED", ""),
    ],
)
def test_bad_requests_are_told_the_name_of_the_field(sockets, front, message, code, words):
    with pytest.raises(grpc.RpcError) as told:
        call(sockets, "ModelInfer", message)
    assert told.value.code() == grpc.StatusCode[code]
    assert str(told.value.details()).startswith(words)
    assert not front.engine.calls


@pytest.mark.parametrize("method", ["ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"])
def test_an_unknown_model_is_not_found(sockets, method):
    with pytest.raises(grpc.RpcError) as told:
        call(sockets, method, getattr(pb, f"{method}Request")(name="other"))
    assert told.value.code() == grpc.StatusCode.NOT_FOUND


# Trouble behind the front


@pytest.mark.parametrize(
    ("refusal", "code", "retry"),
    [
        (OverloadedError("overloaded: 16 of 16", 0.25), "RESOURCE_EXHAUSTED", "250"),
        (StoppingError("stopping"), "UNAVAILABLE", "1000"),
    ],
)
def test_refusals_say_when_to_try_again(sockets, front, refusal, code, retry):
    front.engine.refusal = refusal
    with pytest.raises(grpc.RpcError) as told:
        call(sockets, "ModelInfer", request())
    assert (told.value.code(), told.value.details()) == (grpc.StatusCode[code], str(refusal))
    assert metadata_of(told.value)["grpc-retry-pushback-ms"] == retry


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (StepError("/secret/path"), "INTERNAL"),
        (MemoryError("/secret/path"), "INTERNAL"),
        (DeadlineError("it passed"), "DEADLINE_EXCEEDED"),
    ],
)
def test_failures_name_nothing_secret(sockets, front, failure, code):
    front.engine.failure = failure
    with pytest.raises(grpc.RpcError) as told:
        call(sockets, "ModelInfer", request(), metadata=(("x-request-id", "look-me-up"),))
    assert told.value.code() == grpc.StatusCode[code]
    assert "secret" not in str(told.value.details())
    assert metadata_of(told.value)["x-request-id"] == "look-me-up"


def test_the_clients_own_deadline_abandons_its_images(sockets, front):
    front.engine.silent = True
    with pytest.raises(grpc.RpcError) as told:
        call(sockets, "ModelInfer", request(), timeout=0.05)
    assert told.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    if front.engine.submitted.wait(0.5):  # on a slow machine the request may never have come so far
        assert front.engine.abandoned.wait(30)


def test_a_client_that_leaves_abandons_its_images(sockets, front):
    front.engine.silent = True
    with grpc.insecure_channel(f"127.0.0.1:{sockets[1]}") as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        waiting = infer.future(request().SerializeToString())
        assert front.engine.submitted.wait(30)
        assert not front.engine.abandoned.is_set()
        waiting.cancel()
        assert front.engine.abandoned.wait(30)


# Readiness and tokens


def test_nothing_is_answered_before_the_warm_up(fake):
    front = fake.Front(ready=False)
    with front.sockets() as ports:
        assert call(ports, "ServerLive", b"").live
        assert not call(ports, "ServerReady", b"").ready
        assert not call(ports, "ModelReady", pb.ModelReadyRequest(name="gati")).ready
        with pytest.raises(grpc.RpcError) as told:
            call(ports, "ModelInfer", request())
        assert told.value.code() == grpc.StatusCode.UNAVAILABLE


def test_without_the_token_only_health_is_told(fake):
    front = fake.Front(token="secret")
    with front.sockets() as ports:
        assert call(ports, "ServerReady", b"").ready
        for metadata in ((), (("authorization", "Bearer other"),)):
            for method, message in (("ServerMetadata", b""), ("ModelInfer", request())):
                with pytest.raises(grpc.RpcError) as told:
                    call(ports, method, message, metadata=metadata)
                assert told.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert call(ports, "ModelInfer", request(), metadata=(("authorization", "Bearer secret"),)).outputs
