"""HTTP's own: JSON bodies, their size and encoding, paths and the OpenAPI description."""

import asyncio
import json
import struct

import numpy as np
import pytest

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
    before = front.service._clock()
    body = ask(front, json={"inputs": [tensor()], "parameters": parameters}).json()
    call = front.engine.calls[0]
    assert (call["route"], body["parameters"]["plan"]) == (route, ("tight", "loose", "base")[route])
    waits = 5 if {"deadline_ms", "timeout"} & parameters.keys() else 30
    assert before + waits <= call["deadline"] <= front.service._clock() + waits


def text(**changes):
    return json.dumps({"inputs": [tensor()]} | changes).encode()


def floats(first):
    return text(inputs=[tensor(datatype="FP32", data=["?"] + [0] * 5)]).replace(b'"?"', first)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"inputs": [', "body: Invalid JSON"),
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


@pytest.mark.parametrize("length", ["0" * 5000, "0" * 20 + "99999"])  # int() refuses more than 4300 digits
def test_a_header_length_of_many_digits_gets_400(front, length):
    response = ask(front, content=text(), headers={"Inference-Header-Content-Length": length})
    assert response.status_code == 400, response.text


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


def test_a_compressed_body_is_refused(front):
    response = ask(front, content=b"x", headers={"content-encoding": "gzip"})
    assert (response.status_code, response.json()["error"][:17]) == (415, "Content-Encoding:")


def test_a_body_that_never_ends_gets_408(fake):
    async def slow():
        yield b"{"
        await asyncio.Event().wait()

    assert ask(fake.Front(timeout=0.01), content=slow()).status_code == 408


@pytest.mark.parametrize("given", ["", "a" * 129, "naïve", "tab\tbed"])
def test_an_id_unfit_for_logs_is_replaced(front, given):
    response = ask(front, "GET", "/v2", headers={"x-request-id": given.encode()})
    assert len(response.headers["x-request-id"]) == 32


def test_the_description_names_every_route_and_its_errors(front):
    paths = ask(front, "GET", "/openapi.json").json()["paths"]
    for end in ("", "/ready", "/config", "/stats", "/infer"):
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            assert model + end in paths
    infer = paths[INFER.replace("gati", "{model}")]["post"]
    assert {"200", "400", "404", "413", "415", "429", "503", "504"} <= infer["responses"].keys()
    assert ask(front, "GET", "/docs").status_code == 200
