"""HTTP's own: bodies and tensors <-> requests and arrays, size and encoding, paths and the OpenAPI description."""

import asyncio
import contextlib
import dataclasses
import json
import math
import struct
import time
import tracemalloc

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serve.protocol import grpc_messages
from serve.protocol import inference_pb2 as pb
from serve.protocol.codec import DTYPES, Incoming, Outgoing, decode, encode, to_array, to_bytes, to_json
from serve.protocol.messages import RequestError, UnknownModelError
from tests.serve import fake
from tests.serve.transports import INFER, ask, tensor

P, Q = np.exp(2) / (np.exp(2) + 2), 1 / (np.exp(2) + 2)


def outputs(response):
    assert response.status_code == 200, response.text
    return {output["name"]: output for output in response.json()["outputs"]}


def test_an_answer_has_class_exit_score_plan_certificate_and_version(front):
    response = ask(front, json={"id": "a", "inputs": [tensor((4, 2))]}, headers={"x-request-id": "me"})
    assert response.headers["x-request-id"] == front.engine.calls[0]["request_id"] == "me"
    body = response.json()
    assert (body["model_name"], body["model_version"], body["id"]) == ("gati", "v7", "a")
    assert body["parameters"] == {"plan": "tight", "epsilon": 0.01, "delta": 0.05}
    got = outputs(response)
    assert got["class_index"] == {"name": "class_index", "datatype": "INT32", "shape": [2], "data": [1, 2]}
    assert got["class_name"] == {"name": "class_name", "datatype": "BYTES", "shape": [2], "data": ["dog", "élan"]}
    assert got["exit"]["data"] == [2, 4]
    assert got["score"]["data"] == [2.0, float(np.finfo(np.float32).max)]
    assert got["logits"]["data"] == [0, 2, 0, 0, 0, 2]
    assert got["probabilities"]["shape"] == [2, 3]
    np.testing.assert_allclose(got["probabilities"]["data"], [Q, P, Q, Q, Q, P], rtol=1e-6)


def test_one_image_needs_no_batch_dimension(front):
    values = np.linspace(-1, 1, 6, dtype=np.float32)
    got = outputs(ask(front, json={"inputs": [tensor(shape=[2, 3, 1], datatype="FP32", data=values.tolist())]}))
    assert got["class_index"]["shape"] == [1]
    np.testing.assert_array_equal(front.engine.calls[0]["images"], values.reshape(1, 2, 3, 1))


def test_only_requested_outputs_are_sent_in_their_order(front):
    requested = [{"name": "exit"}, {"name": "class_index", "parameters": {"binary_data": True}}]
    response = ask(front, json={"inputs": [tensor((5,))], "outputs": requested})
    size = int(response.headers["inference-header-content-length"])
    described = json.loads(response.content[:size])["outputs"]
    assert [output["name"] for output in described] == ["exit", "class_index"]
    assert (described[0]["data"], response.content[size:]) == ([4], struct.pack("<i", 2))


@pytest.mark.parametrize(
    ("parameters", "route"),
    [({}, 0), ({"epsilon": 0.05}, 1), ({"epsilon": 0}, 2), ({"deadline_ms": 5000}, 0), ({"timeout": 5_000_000}, 0)],
)
def test_parameters_choose_the_plan_and_the_deadline(front, parameters, route):
    before = time.monotonic()
    body = ask(front, json={"inputs": [tensor()], "parameters": parameters}).json()
    call = front.engine.calls[0]
    assert (call["route"], body["parameters"]["plan"]) == (route, ("tight", "loose", "base")[route])
    waits = 5 if {"deadline_ms", "timeout"} & parameters.keys() else 30
    assert before + waits <= call["deadline"] <= time.monotonic() + waits


def text(**changes):
    return json.dumps({"inputs": [tensor()]} | changes).encode()


def floats(first):
    return text(inputs=[tensor(datatype="FP32", data=["?"] + [0] * 5)]).replace(b'"?"', first)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "body: Invalid JSON"),
        (b"null", "body: "),
        (floats(b"NaN"), "inputs[0].data: expected finite"),
        (floats(b"1e999"), "inputs[0].data: expected finite"),
        (floats(b"true"), "inputs[0].data: expected numbers"),  # [true, 1, ...] was taken for [1, 1, ...]
        (text(inputs=[tensor(data=[True] + [1] * 5)]), "inputs[0].data: expected whole numbers"),
        (text(inputs=[tensor(shape=[10**300] * 4)]), "inputs[0].shape[0]: "),
        (text(parameters={"epsilon": [1]}), "parameters.epsilon"),
        (text(id="x" * 201), "id: "),
        (b'{"inputs": [], "parameters": {"epsilon": NaN}}', "parameters.epsilon: "),
        (b'{"inputs": [], "parameters": {"epsilon": %s}}' % (b"9" * 3000), "parameters.epsilon: "),
    ],
)
def test_a_bad_body_gets_400(front, body, message):
    response = ask(front, content=body)
    assert (response.status_code, list(response.json())) == (400, ["error"])
    assert response.json()["error"].startswith(message)
    assert not front.engine.calls


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [("/v2/models/gati/train", 404, "path: Not Found"), ("/v2", 405, "path: Method Not Allowed")],
)
def test_an_unknown_path_or_method_is_refused(front, path, status, message):
    response = ask(front, path=path, json={"inputs": [tensor()]})
    assert (response.status_code, response.json()) == (status, {"error": message})


def test_a_body_too_large_is_refused_before_it_is_read(front):
    read = []

    async def endless():
        while True:
            read.append(1000)
            yield bytes(1000)

    announced = ask(front, content=endless(), headers={"content-length": "4097"})
    assert (announced.status_code, len(read)) == (413, 0)
    assert announced.json()["error"].startswith("Content-Length: expected at most 4096 bytes")
    chunked = ask(front, content=endless())
    assert (chunked.status_code, chunked.json()["error"][:5]) == (413, "body:")
    assert sum(read) <= 6000


def test_a_body_that_never_ends_gets_408():
    async def slow():
        yield b"{"
        await asyncio.Event().wait()

    for limits in ({"timeout": 0.01}, {"idle_timeout": 0.01}):
        front = fake.Front(limits=dataclasses.replace(fake.LIMITS, **limits))
        assert ask(front, content=slow()).status_code == 408
        assert (front.door.images, front.door.bytes) == (0, 0)


@pytest.mark.parametrize("unfit", ["", "a" * 129, "naïve", "tab\tbed"])
def test_an_id_unfit_for_logs_is_replaced(front, unfit):
    response = ask(front, "GET", "/v2", headers={"x-request-id": unfit.encode()})
    assert len(response.headers["x-request-id"]) == 32


def test_the_description_names_every_route_and_its_errors(front):
    paths = ask(front, "GET", "/openapi.json").json()["paths"]
    for end in ("", "/ready", "/config", "/stats", "/infer"):
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            assert model + end in paths
    infer = paths[INFER.replace("gati", "{model}")]["post"]
    assert {"200", "400", "404", "413", "415", "429", "503", "504"} <= infer["responses"].keys()
    assert ask(front, "GET", "/docs").status_code == 200


# Tensors


def incoming(datatype, shape, **how):
    return Incoming("inputs[0]", "images", datatype, tuple(shape), **how)


@st.composite
def arrays(draw):
    datatype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(hnp.array_shapes(max_dims=4, max_side=4))
    elements = {"allow_nan": False, "allow_infinity": False} if datatype == "FP32" else None
    return datatype, draw(hnp.arrays(DTYPES[datatype], shape, elements=elements))


@given(arrays())
def test_bytes_come_in_without_a_copy_and_go_out_the_same(case):
    datatype, array = case
    raw = bytes(7) + array.tobytes()
    view = memoryview(raw)[7:]  # behind a JSON of any length: not aligned
    read = to_array(incoming(datatype, array.shape, raw=view))
    np.testing.assert_array_equal(read, array)
    assert np.shares_memory(read, np.frombuffer(raw, np.uint8))
    assert to_bytes(Outgoing("x", datatype, array.shape, read)) == array.tobytes()


@given(arrays(), st.booleans())
def test_numbers_come_in_flat_or_nested_and_go_out_flat(case, nested):
    datatype, array = case
    numbers = json.loads(json.dumps(array.tolist() if nested else array.ravel().tolist()))
    read = to_array(incoming(datatype, array.shape, numbers=numbers))
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)
    assert to_json(Outgoing("x", datatype, array.shape, read)) == array.ravel().tolist()


def test_strings_follow_their_lengths():
    out = Outgoing("class_name", "BYTES", (2,), ["élan".encode(), b""])
    assert to_bytes(out) == b"\x05\x00\x00\x00\xc3\xa9lan\x00\x00\x00\x00"
    assert to_json(out) == ["élan", ""]


def test_json_has_no_infinity_and_no_nan():
    values = np.array([np.inf, -np.inf, np.nan, 1.5], np.float32)
    largest = float(np.finfo(np.float32).max)
    numbers = to_json(Outgoing("score", "FP32", (4,), values))
    assert numbers == [largest, -largest, None, 1.5]
    json.dumps(numbers, allow_nan=False)


@pytest.mark.parametrize(
    ("datatype", "shape", "how", "message"),
    [
        ("UINT8", [2, 2], {"raw": b"abc"}, r"data: expected 4 bytes for UINT8\[2, 2\], got 3"),
        ("UINT8", [2, 2], {"raw": b"abcde"}, r"data: expected 4 bytes .* got 5"),
        ("FP32", [2], {"raw": bytes(7)}, r"data: expected 8 bytes"),
        ("UINT8", [2**31, 2**31, 2**31], {"raw": b"x"}, r"data: expected \d+ bytes"),
        ("UINT8", [-1, -4], {"raw": b"abcd"}, r"shape: expected no negative"),
        ("FP64", [1], {"raw": bytes(8)}, r"datatype: expected one of UINT8, INT32, FP32, got 'FP64'"),
        ("FP32", [1], {"raw": np.float32(np.nan).tobytes()}, r"data: expected finite"),
        ("FP32", [1], {"numbers": [math.inf]}, r"data: expected finite"),
        ("FP32", [1], {"numbers": [1e39]}, r"data: expected finite"),
        ("FP32", [1], {"numbers": ["1"]}, r"data: expected numbers for FP32"),
        ("FP32", [1], {"numbers": [True]}, r"data: expected numbers"),
        ("FP32", [1], {"numbers": [None]}, r"data: expected numbers"),
        ("FP32", [1], {"numbers": [{}]}, r"data: expected numbers"),
        ("UINT8", [1], {"numbers": [256]}, r"data: expected 0 to 255"),
        ("UINT8", [1], {"numbers": [-1]}, r"data: expected 0 to 255"),
        ("UINT8", [1], {"numbers": [1.5]}, r"data: expected whole numbers"),
        ("UINT8", [1], {"numbers": [10**30]}, r"data: expected whole numbers"),
        ("UINT8", [2, 2], {"numbers": [[1, 2], [3]]}, r"data: .* got a ragged list"),
        ("UINT8", [2, 2], {"numbers": [1, 2, 3]}, r"data: expected 4 numbers .* got shape \[3\]"),
        ("UINT8", [2, 3], {"numbers": [[1, 2], [3, 4], [5, 6]]}, r"data: .* got shape \[3, 2\]"),
        ("UINT8", [1], {"numbers": None}, r"data: .* got nothing"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(datatype, shape, how, message):
    with pytest.raises(RequestError, match=rf"^inputs\[0\]\.{message}"):
        to_array(incoming(datatype, shape, **how))


def test_text_among_numbers_takes_no_more_memory_than_the_body():
    """NumPy gives every element of a mixed list the width of its longest text: 64 x 100 kB of text x 4 bytes = 26 MB.

    Over sockets a body of 4 MB took 4 GB and blocked the event loop for a minute; a larger one is a MemoryError, a 500:
    2**22 elements as wide as 2**22 characters of 4 bytes are 2**46 bytes.
    """
    tracemalloc.start()
    try:
        with pytest.raises(RequestError):
            to_array(incoming("UINT8", [64], numbers=["a" * 100_000] + [1] * 63))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    with pytest.raises(RequestError):
        to_array(incoming("UINT8", [64], numbers=["a" * 2**22] + [1] * 2**22))


# Bodies: JSON, then bytes


def body(*sizes, rest=b"", data=None):
    inputs = [
        {"name": f"x{i}", "datatype": "UINT8", "shape": [2], "parameters": {"binary_data_size": size}}
        | ({} if data is None else {"data": data})
        for i, size in enumerate(sizes)
    ]
    text = json.dumps({"inputs": inputs}).encode()
    return text + rest, str(len(text))


def test_every_tensor_gets_its_part_of_the_bytes():
    request = decode(*body(2, 0, 3, rest=b"abcde"), model="m")
    assert [bytes(tensor.raw or b"") for tensor in request.inputs] == [b"ab", b"", b"cde"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (body(2, 3, rest=b"abcd"), r"inputs\[1\]\.parameters\.binary_data_size: .*got 3, and 2 bytes"),
        (body(2, rest=b"abc"), r"inputs: .* got 1 bytes more"),
        (body(2, rest=b"ab", data=[1]), r"inputs\[0\]\.parameters\.binary_data_size: .*got data beside it"),
        ((b"{}", "3"), r"Inference-Header-Content-Length: .*got '3' with a body of 2"),
        ((b"{}", "-1"), r"Inference-Header-Content-Length"),
        ((b"{}", "1e1"), r"Inference-Header-Content-Length"),
        ((b"{}", "²"), r"Inference-Header-Content-Length"),
        *(((b"{}", many), r"Inference-Header-Content-Length") for many in ("9" * 5000, "0" * 5000)),
        *(
            (body(size, rest=b"ab"), r"inputs\[0\]\.parameters\.binary_data_size")
            for size in ("2", True, 2.0, -1, 9**3999)
        ),
        ((b"{}", None), r"inputs: Field required"),
        ((b"{", None), r"body: Invalid JSON"),
        ((b"\xff", None), r"body: Invalid JSON"),
        ((b"[" * 100_000, None), r"body: Invalid JSON"),
        ((b"[]", None), r"body: Input should be"),
        ((b'{"inputs": [{"name": 1, "datatype": "UINT8", "shape": [1]}]}', None), r"inputs\[0\]\.name: Input should"),
        ((b'{"inputs": [{"name": "x", "datatype": "UINT8", "shape": ["1"]}]}', None), r"inputs\[0\]\.shape\[0\]: "),
        ((b'{"inputs": [{"name": "x", "datatype": "UINT8", "shape": [-1]}]}', None), r"inputs\[0\]\.shape\[0\]: "),
        ((b'{"inputs": [], "id": 3}', None), r"id: Input should"),
    ],
)
def test_bodies_whose_parts_do_not_fit_are_refused_by_name(made, message):
    with pytest.raises(RequestError, match=f"^{message}"):
        decode(*made, model="m")


def test_answers_are_json_with_bytes_behind_it():
    one = Outgoing("exit", "INT32", (2,), np.array([1, 2], np.int32), binary=True)
    other = Outgoing("score", "FP32", (1,), np.array([np.inf], np.float32), binary=False)
    sent, json_bytes = encode({"id": "a"}, [one, other, one])
    described = json.loads(sent[:json_bytes])["outputs"]
    assert [tensor.get("parameters", {}).get("binary_data_size") for tensor in described] == [8, None, 8]
    assert sent[json_bytes:] == b"\x01\0\0\0\x02\0\0\0" * 2
    sent, json_bytes = encode({}, [other])
    assert json_bytes is None
    assert json.loads(sent)["outputs"][0]["data"] == [float(np.finfo(np.float32).max)]


# Requests made up from the OpenAPI description, and good ones damaged at random


FRONT = fake.Front()
schema = schemathesis.openapi.from_asgi("/openapi.json", FRONT.app)


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_no_request_makes_the_server_fail(case):
    response = case.call()
    late = response.status_code == 504 and any("timeout" in name.lower() for name in case.headers or {})
    assert response.status_code < 500 or late, response.text
    if response.status_code >= 400:
        assert list(response.json()) == ["error"]


GOOD = json.dumps(
    {
        "id": "a",
        "parameters": {"epsilon": 0.01, "deadline_ms": 1000.0, "binary_data_output": True},
        "inputs": [{"name": "images", "datatype": "FP32", "shape": [1, 2, 3, 1], "data": [0.5] * 6}],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_anything_in_the_place_of_anything_gets_an_answer_or_a_400(data):
    request = json.loads(GOOD)
    path = data.draw(st.sampled_from(list(places(request))[1:]))
    spot = request
    for key in path[:-1]:
        spot = spot[key]
    spot[path[-1]] = data.draw(JSON)
    response = ask(FRONT, content=json.dumps(request))
    assert response.status_code in {200, 400}, response.text


@given(st.binary(max_size=200), st.integers(0, 400), st.none() | st.text(max_size=6) | st.integers().map(str))
@settings(max_examples=200, deadline=None)
def test_a_damaged_body_never_makes_the_server_fail(extra, cut, length):
    headers = {} if length is None else {"inference-header-content-length": length.encode("utf-8", "replace")}
    response = ask(FRONT, content=GOOD.encode()[:cut] + extra, headers=headers)
    assert response.status_code in {200, 400}, response.text


@given(st.binary(max_size=60), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_messages_are_read_or_refused(extra, at):
    message = pb.ModelInferRequest(
        model_name="gati",
        inputs=[{"name": "images", "datatype": "FP32", "shape": [1, 2, 3, 1]}],
        raw_input_contents=[np.zeros(6, np.float32).tobytes()],
    )
    message.parameters["epsilon"].double_param = 0.1
    good = message.SerializeToString()
    with contextlib.suppress(RequestError, UnknownModelError):
        decoded = grpc_messages.decode(grpc_messages.parse(pb.ModelInferRequest, good[:at] + extra + good[at:]))
        asyncio.run(FRONT.service.infer(decoded))
