"""Bodies, endings and logs that once went wrong."""

import http.client
import json
import logging
import signal
import ssl
import subprocess
import tracemalloc

import grpc
import pytest

from serve.engine.engine import Engine
from serve.protocol.messages import RequestError
from serve.protocol.codec import Incoming, to_array
from tests.serve.fake_runner import FakeRunner, route
from tests.serve.test_http import ask, tensor
from tests.serve.test_settings import Process


def test_text_among_numbers_takes_no_more_memory_than_the_body():
    """NumPy gives every element of a mixed list the width of its longest text: 64 x 100 kB of text x 4 bytes = 26 MB.

    Over sockets a body of 4 MB took 4 GB and held the event loop for a minute; a larger one is a MemoryError, a 500.
    """
    numbers = ["a" * 100_000] + [1] * 63
    tracemalloc.start()
    try:
        with pytest.raises(RequestError):
            to_array(Incoming("inputs[0]", "images", "UINT8", (64,), numbers=numbers))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_text_that_no_memory_is_large_enough_for_is_a_400():
    """2**22 elements as wide as 2**22 characters of 4 bytes: a MemoryError, on any machine."""
    numbers = ["a" * 2**22] + [1] * 2**22  # 2**46 bytes
    with pytest.raises(RequestError):
        to_array(Incoming("inputs[0]", "images", "UINT8", (64,), numbers=numbers))


def test_a_header_of_many_digits_is_a_400(front):
    """int() refuses more than 4300 digits; only the first 20 are looked at before."""
    headers = {"Inference-Header-Content-Length": "0" * 5000}
    response = ask(front, content=json.dumps({"inputs": [tensor()]}), headers=headers)
    assert response.status_code == 400, response.text


def test_a_header_length_beyond_the_body_is_a_400(front):
    """Only its first 20 digits are compared with the body."""
    headers = {"Inference-Header-Content-Length": "0" * 20 + "99999"}
    response = ask(front, content=json.dumps({"inputs": [tensor()]}), headers=headers)
    assert response.status_code == 400, response.text


@pytest.mark.parametrize(("datatype", "rest"), [("UINT8", 1), ("FP32", 0.5)])
def test_true_among_numbers_is_no_number(front, datatype, rest):
    """[true, true, ...] is refused; [true, 1, ...] was taken for [1, 1, ...]."""
    given = tensor(datatype=datatype, data=[True] + [rest] * 5)
    response = ask(front, json={"inputs": [given]})
    assert response.status_code == 400, response.text


def test_an_engine_on_which_nobody_waits_stops_in_no_time():
    """--drain 0, or a drain that a client with half a body has used up, ended in exit code 1 and a false log line."""
    engine = Engine(FakeRunner([route(1.0)]))
    engine.start()
    try:
        assert engine.stop(0.0)
    finally:
        engine.stop()


def test_debug_logs_tell_of_grpcs_requests_too(sockets, caplog):
    """docs/serving.md: "--log-level debug tells of every request"."""
    with caplog.at_level(logging.DEBUG, "serve"), grpc.insecure_channel(f"127.0.0.1:{sockets[1]}") as channel:
        channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=30)
    assert "request" in [record.message for record in caplog.records if record.name.startswith("serve")]


def test_an_idle_client_over_tls_does_not_hold_the_server_up(tmp_path):
    """The closing connection waited for the client's own goodbye until the whole drain was over (then exit code 1)."""
    pem, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    given = f"-newkey rsa:2048 -nodes -keyout {key} -out {pem} -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(["openssl", "req", "-x509", *given.split()], check=True, capture_output=True)
    with Process("--grace", "0", "--drain", "60", "--tls-cert", str(pem), "--tls-key", str(key)) as server:
        server.say("warm")
        server.say("answer")
        server.until("ready")
        port = int(server.http.rsplit(":", 1)[1])
        client = http.client.HTTPSConnection("localhost", port, context=ssl.create_default_context(cafile=pem))
        client.request("GET", "/v2")
        assert client.getresponse().read()
        server.child.send_signal(signal.SIGTERM)
        assert server.child.wait(20) == 0
        client.close()
