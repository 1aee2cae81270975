"""gRPC's own messages: the same as Triton's, and what their parts may be."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from serve.protocol import inference_pb2 as pb
from tests.serve.transports import call

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


def test_the_compiled_messages_are_those_of_the_proto_file(tmp_path):
    if importlib.util.find_spec("grpc_tools") is None:
        pytest.skip("needs grpcio-tools")
    compiler = (sys.executable, "-m", "grpc_tools.protoc", f"-I{FOLDER}", f"--python_out={tmp_path}")
    subprocess.run((*compiler, "inference.proto"), check=True)
    written, committed = ((folder / "inference_pb2.py").read_text() for folder in (tmp_path, FOLDER))
    descriptors = [re.search(r"AddSerializedFile\((.*)\)", text) for text in (written, committed)]
    assert descriptors[0]
    assert descriptors[1]
    assert descriptors[0][1] == descriptors[1][1]


def request(tensor=None, **changes):
    inputs = [{"name": "images", "datatype": "UINT8", "shape": [1, 2, 3, 1]} | (tensor or {})]
    return pb.ModelInferRequest(**{"model_name": "gati", "inputs": inputs, "raw_input_contents": [bytes(6)]} | changes)


NAN = np.full(6, np.nan, np.float32).tobytes()


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        (b"\xff\xff", "INVALID_ARGUMENT", "message: expected a ModelInferRequest"),
        (request(inputs=[]), "INVALID_ARGUMENT", "raw_input_contents: expected one for each of the 0"),
        (request(raw_input_contents=[bytes(5)]), "INVALID_ARGUMENT", "inputs[0].data: expected 6 bytes"),
        (request({"datatype": "BYTES"}), "INVALID_ARGUMENT", "inputs[0].datatype: expected UINT8 or FP32"),
        (request({"shape": [2**62, 2, 3, 1]}), "INVALID_ARGUMENT", "inputs[0].shape: "),
        (request({"contents": {"uint_contents": [1]}}), "INVALID_ARGUMENT", "inputs[0].contents: "),
        (
            request({"datatype": "FP32"}, raw_input_contents=[NAN]),
            "INVALID_ARGUMENT",
            "inputs[0].data: expected finite",
        ),
        (request(parameters={"epsilon": {}}), "INVALID_ARGUMENT", "parameters.epsilon: expected a value"),
        (request(id="x" * 5000), "RESOURCE_EXHAUSTED", ""),
    ],
)
def test_messages_whose_parts_do_not_fit_are_refused(sockets, front, message, code, words):
    with pytest.raises(grpc.RpcError) as caught:
        call(sockets[1], "ModelInfer", message)
    assert caught.value.code() == grpc.StatusCode[code]
    assert str(caught.value.details()).startswith(words)
    assert not front.engine.calls
