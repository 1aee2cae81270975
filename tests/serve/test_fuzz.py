"""Requests made up from the OpenAPI description, and good ones damaged at random."""

import asyncio
import contextlib
import json

import numpy as np
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.protocol import grpc
from serve.protocol.messages import RequestError, UnknownModelError, parse_request
from tests.serve import fake, transports

FRONT = fake.Front()
schema = schemathesis.openapi.from_asgi("/openapi.json", FRONT.app)


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_no_request_makes_the_server_fail(case):
    response = case.call()
    assert response.status_code < 500, response.text
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
    response = transports.ask(FRONT, content=json.dumps(request))
    assert response.status_code in {200, 400}, response.text


@given(st.binary(max_size=40), st.integers(0, 400), st.text(max_size=6) | st.integers().map(str))
@settings(max_examples=100, deadline=None)
def test_bytes_behind_the_json_never_make_the_server_fail(extra, cut, length):
    headers = {"inference-header-content-length": length.encode("utf-8", "replace")}
    response = transports.ask(FRONT, content=GOOD.encode()[:cut] + extra, headers=headers)
    assert response.status_code in {200, 400}, response.text


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_json_is_read_or_refused(text):
    with contextlib.suppress(RequestError):
        parse_request(text)


@given(st.binary(max_size=60), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_messages_are_read_or_refused(extra, at):
    message = grpc.pb.ModelInferRequest(
        model_name="gati",
        inputs=[{"name": "images", "datatype": "FP32", "shape": [1, 2, 3, 1]}],
        raw_input_contents=[np.zeros(6, np.float32).tobytes()],
    )
    message.parameters["epsilon"].double_param = 0.1
    good = message.SerializeToString()
    with contextlib.suppress(RequestError, UnknownModelError):
        decoded = grpc.decode(grpc._parse(grpc.pb.ModelInferRequest, good[:at] + extra + good[at:]))
        asyncio.run(FRONT.service.infer(decoded))
