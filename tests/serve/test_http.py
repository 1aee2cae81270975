"""The protocol over HTTP: what clients get, and what they are told when they get nothing."""

import asyncio
import json
import logging
import socket
import struct

import httpx
import numpy as np
import pytest
import tritonclient.http as triton

from serve.engine.records import DeadlineError, OverloadedError, StepError, StoppingError

INFER = "/v2/models/gati/infer"
P, Q = np.exp(2) / (np.exp(2) + 2), 1 / (np.exp(2) + 2)


def images(*values, dtype=np.uint8):
    return np.stack([np.full((2, 3, 1), value, dtype) for value in values])


def tensor(values=(0,), **changes):
    array = images(*values)
    return {"name": "images", "datatype": "UINT8", "shape": list(array.shape), "data": array.ravel().tolist()} | changes


def ask(front, method="POST", path=INFER, **request):
    async def send():
        transport = httpx.ASGITransport(front.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def outputs(response):
    assert response.status_code == 200, response.text
    return {output["name"]: output for output in response.json()["outputs"]}


# Answers


def test_an_answer_says_class_exit_score_plan_certificate_and_version(front):
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
    got = outputs(ask(front, json={"inputs": [tensor(shape=[2, 3, 1])]}))
    assert got["class_index"]["shape"] == [1]
    assert front.engine.calls[0]["images"].shape == (1, 2, 3, 1)


def test_prepared_floats_come_to_the_engine_as_they_are(front):
    values = np.linspace(-1, 1, 6, dtype=np.float32)
    outputs(ask(front, json={"inputs": [tensor(datatype="FP32", data=values.tolist())]}))
    np.testing.assert_array_equal(front.engine.calls[0]["images"].ravel(), values)


def test_only_what_is_asked_for_is_sent_in_its_order(front):
    asked = [{"name": "exit"}, {"name": "class_index", "parameters": {"binary_data": True}}]
    response = ask(front, json={"inputs": [tensor((5,))], "outputs": asked})
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


# Triton's client


@pytest.fixture
def client(sockets):
    with triton.InferenceServerClient(f"127.0.0.1:{sockets[0]}") as made:
        yield made


def test_tritonclient_reads_health_metadata_config_and_statistics(client, front):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("gati", "v7")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "gati-jax"
    metadata = client.get_model_metadata("gati")
    assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 2, 3, 1]}]
    assert metadata["outputs"][2] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]}
    config = client.get_model_config("gati")
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (8, [2, 3, 1])
    assert json.loads(config["parameters"]["plans"]["string_value"])["loose"] == {"epsilon": 0.05, "delta": 0.05}
    given = triton.InferInput("images", [2, 2, 3, 1], "UINT8").set_data_from_numpy(images(1, 2))
    for _ in range(3):
        client.infer("gati", [given])
    (stats,) = client.get_inference_statistics()["model_stats"]
    assert stats == client.get_inference_statistics("gati")["model_stats"][0]
    assert (stats["inference_count"], stats["execution_count"]) == (6, 3)
    assert stats["batch_stats"][0]["batch_size"] == 2
    assert stats["batch_stats"][0]["compute_infer"] == {"count": 3, "ns": 6_000_000}
    times = stats["inference_stats"]
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    assert times["success"]["ns"] == sum(times[part]["ns"] for part in parts)
    assert {times[part]["count"] for part in (*parts, "success")} == {3}
    front.service.drain()
    assert client.is_server_live()
    assert not client.is_server_ready()


@pytest.mark.parametrize("binary_out", [False, True])
@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize(("datatype", "dtype"), [("UINT8", np.uint8), ("FP32", np.float32)])
def test_tritonclient_infers(client, datatype, dtype, binary_in, binary_out):
    given = triton.InferInput("images", [3, 2, 3, 1], datatype)
    given.set_data_from_numpy(images(3, 4, 5, dtype=dtype), binary_data=binary_in)
    wanted = [
        triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("class_index", "class_name", "score")
    ]
    result = client.infer("gati", [given], outputs=wanted, parameters={"epsilon": 0.05}, request_id="r")
    assert result.as_numpy("class_index").tolist() == [0, 1, 2]
    names = result.as_numpy("class_name").tolist()
    assert names == ([b"cat", b"dog", "élan".encode()] if binary_out else ["cat", "dog", "élan"])
    assert result.as_numpy("score")[:2].tolist() == [1.5, 2.0]
    assert result.get_response()["parameters"]["plan"] == "loose"


def test_tritonclient_gets_everything_as_bytes_where_it_asks_for_nothing(client):
    given = triton.InferInput("images", [1, 2, 3, 1], "UINT8").set_data_from_numpy(images(5))
    result = client.infer("gati", [given])
    assert result.as_numpy("score").tolist() == [np.inf]
    assert result.as_numpy("class_name").tolist() == ["élan".encode()]
    np.testing.assert_allclose(result.as_numpy("probabilities"), [[Q, Q, P]], rtol=1e-6)


def test_tritonclient_is_told_what_is_wrong(client):
    given = triton.InferInput("images", [1, 2, 3, 2], "UINT8").set_data_from_numpy(np.zeros((1, 2, 3, 2), np.uint8))
    with pytest.raises(triton.InferenceServerException, match=r"inputs\[0\]\.shape: expected \[n, 2, 3, 1\]"):
        client.infer("gati", [given])


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
        ({"inputs": [tensor([1] * 9)]}, "inputs[0].shape: "),
        ({"inputs": [tensor(shape=[])]}, "inputs[0].shape: "),
        ({"inputs": [tensor(shape=[10**300] * 4)]}, "inputs[0].shape[0]: "),
        ({"inputs": [tensor(data=[0] * 5)]}, "inputs[0].data: expected 6 numbers"),
        ({"inputs": [tensor(data=None)]}, "inputs[0].data: "),
        ({"inputs": [tensor(parameters={"shared_memory_region": "a"})]}, "inputs[0].parameters: "),
        ({"outputs": [{"name": "nothing"}]}, "outputs[0].name: expected each at most once of class_index"),
        ({"outputs": [{"name": "exit"}, {"name": "exit"}]}, "outputs[1].name: "),
        ({"outputs": [{"name": "exit", "parameters": {"classification": 2}}]}, "outputs[0].parameters: "),
        ({"outputs": [{"name": "exit", "parameters": {"binary_data": 1}}]}, "outputs[0].parameters.binary_data: "),
        ({"parameters": {"epsilom": 0.1}}, "parameters: expected epsilon, "),
        ({"parameters": {"epsilon": "0.1"}}, "parameters.epsilon: "),
        ({"parameters": {"epsilon": True}}, "parameters.epsilon: "),
        ({"parameters": {"epsilon": -0.1}}, "parameters.epsilon: expected a number from 0 to 1"),
        ({"parameters": {"epsilon": 0.9}}, "epsilon: expected at most 0.5"),
        ({"parameters": {"deadline_ms": 0}}, "parameters.deadline_ms: "),
        ({"parameters": {"binary_data_output": "yes"}}, "parameters.binary_data_output: "),
        ({"parameters": {"epsilon": [1]}}, "parameters.epsilon"),
        ({"id": "x" * 201}, "id: "),
    ],
)
def test_bad_requests_get_400_and_the_name_of_the_field(front, change, message):
    response = ask(front, json={"inputs": [tensor()]} | change)
    assert (response.status_code, list(response.json())) == (400, ["error"])
    assert response.json()["error"].startswith(message)
    assert not front.engine.calls


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"inputs": [', "body: Invalid JSON"),
        (b"", "body: Invalid JSON"),
        (b"null", "body: "),
        (
            b'{"inputs": [{"name": "images", "datatype": "FP32", "shape": [2, 3, 1], "data": [NaN, 0, 0, 0, 0, 0]}]}',
            "inputs[0].data: expected finite",
        ),
        (
            b'{"inputs": [{"name": "images", "datatype": "FP32", "shape": [2, 3, 1], "data": [1e999, 0, 0, 0, 0, 0]}]}',
            "inputs[0].data: expected finite",
        ),
        (b'{"inputs": [], "parameters": {"epsilon": NaN}}', "parameters.epsilon: "),
        (b'{"inputs": [], "parameters": {"epsilon": %s}}' % (b"9" * 3000), "parameters.epsilon: "),
    ],
)
def test_bad_json_gets_400(front, text, message):
    response = ask(front, content=text)
    assert response.status_code == 400
    assert response.json()["error"].startswith(message)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/v2/models/other/infer", 404, "model: expected 'gati', got 'other'"),
        ("/v2/models/gati/versions/8/infer", 404, "version: expected 'v7', got '8'"),
        ("/v2/models/gati/train", 404, "path: Not Found"),
        ("/v2", 405, "path: Method Not Allowed"),
    ],
)
def test_what_is_not_there_gets_404(front, path, status, message):
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
    front = fake.Front(timeout=0.01)

    async def slow():
        yield b"{"
        await asyncio.Event().wait()

    assert ask(front, content=slow()).status_code == 408


# Trouble behind the front


@pytest.mark.parametrize(
    ("refusal", "status", "retry"),
    [
        (OverloadedError("overloaded: 16 of 16 places are taken", 0.2), 429, "1"),
        (OverloadedError("overloaded: 16 of 16 places are taken", 2.3), 429, "3"),
        (StoppingError("stopping"), 503, "1"),
    ],
)
def test_refusals_say_when_to_try_again(front, refusal, status, retry):
    front.engine.refusal = refusal
    response = ask(front, json={"inputs": [tensor()]})
    assert (response.status_code, response.headers["retry-after"]) == (status, retry)
    assert response.json() == {"error": str(refusal)}


@pytest.mark.parametrize("failure", [StepError("/secret/path"), MemoryError("/secret/path")])
def test_a_failure_inside_names_nothing_secret(front, failure, caplog):
    front.engine.failure = failure
    with caplog.at_level(logging.CRITICAL):
        response = ask(front, json={"inputs": [tensor((1, 2))]}, headers={"x-request-id": "look-me-up"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "look-me-up")
    assert "secret" not in response.text
    front.engine.failure = None
    outputs(ask(front, json={"inputs": [tensor()]}))


def test_a_deadline_that_passed_gets_504(front):
    front.engine.failure = DeadlineError("deadline: it passed")
    assert ask(front, json={"inputs": [tensor()]}).status_code == 504


def test_a_step_that_hangs_does_not_keep_the_client(front):
    front.engine.silent = True
    response = ask(front, json={"inputs": [tensor()], "parameters": {"deadline_ms": 1}})
    assert (response.status_code, response.json()["error"][:11]) == (504, "the deadlin")
    assert front.engine.abandoned.is_set()


def test_a_client_that_leaves_abandons_its_images(front, sockets):
    front.engine.silent = True
    text = json.dumps({"inputs": [tensor((1, 2))]}).encode()
    with socket.create_connection(("127.0.0.1", sockets[0])) as leaving:
        leaving.sendall(
            b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (INFER.encode(), len(text)) + text
        )
        assert front.engine.submitted.wait(30)
        assert not front.engine.abandoned.is_set()
    assert front.engine.abandoned.wait(30)
    front.engine.silent = False
    with triton.InferenceServerClient(f"127.0.0.1:{sockets[0]}") as other:
        assert other.is_server_ready()


# Readiness, tokens, ids, pages


def test_nothing_is_answered_before_the_warm_up(fake):
    front = fake.Front(ready=False)
    assert ask(front, "GET", "/v2/health/live").json() == {"live": True}
    for method, path in (("GET", "/v2/health/ready"), ("GET", "/v2/models/gati/ready"), ("POST", INFER)):
        response = ask(front, method, path, json={"inputs": [tensor()]})
        assert (response.status_code, response.json()) == (503, {"error": "the server is warming up"})
    front.warm_up()
    assert ask(front, "GET", "/v2/health/ready").json() == {"ready": True}
    front.service.drain()
    assert ask(front, "GET", "/v2/health/ready").status_code == 503
    response = ask(front, json={"inputs": [tensor()]})  # who comes all the same is answered
    assert outputs(response)
    assert response.headers["connection"] == "close"  # and does not stay


@pytest.mark.parametrize("path", [INFER, "/v2", "/v2/models/gati", "/metrics", "/docs", "/openapi.json", "/nowhere"])
def test_without_the_token_only_health_is_told(fake, path):
    front = fake.Front(token="secret")
    method = "POST" if path == INFER else "GET"
    for headers in ({}, {"authorization": "secret"}, {"authorization": "Bearer secreT"}, {"authorization": "Bearer ü"}):
        response = ask(front, method, path, headers={k: v.encode() for k, v in headers.items()}, json={})
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        assert response.json()["error"].startswith("authorization: ")
    response = ask(front, method, path, headers={"authorization": "Bearer secret"}, json={"inputs": [tensor()]})
    assert response.status_code == (404 if path == "/nowhere" else 200)
    assert ask(front, "GET", "/v2/health/ready").status_code == 200


@pytest.mark.parametrize("given", ["", "a" * 129, "naïve", "tab\tbed"])
def test_an_id_unfit_for_logs_is_replaced(front, given):
    response = ask(front, "GET", "/v2", headers={"x-request-id": given.encode()})
    assert len(response.headers["x-request-id"]) == 32


def test_the_description_names_every_route_and_its_errors(front):
    paths = ask(front, "GET", "/openapi.json").json()["paths"]
    for end in ("", "/ready", "/config", "/stats", "/infer"):
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            assert model + end in paths
    infer = paths[f"{INFER.replace('gati', '{model}')}"]["post"]
    assert {"200", "400", "404", "413", "415", "429", "503", "504"} <= infer["responses"].keys()
    assert ask(front, "GET", "/docs").status_code == 200
