"""The command line, logs, and the life of the process: readiness, drain, signals."""

import json
import logging
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from gati_jax import InputError
from serve import logs
from serve.settings import Settings, parse

HERE = Path(__file__).parent
BUNDLE = ["--bundle", "b"]


def test_unless_told_otherwise_only_this_machine_can_connect():
    settings = parse(BUNDLE, {})
    assert settings == Settings(bundle=Path("b"))
    assert (settings.host, settings.loopback, settings.token) == ("127.0.0.1", True, None)
    assert not Settings(bundle=Path("b"), host="0.0.0.0").loopback
    assert parse(BUNDLE, {"GATI_TOKEN": "s3cret"}).token == "s3cret"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "arguments: the following arguments are required: --bundle"),
        ([*BUNDLE, "--http-port", "65536"], "arguments: argument --http-port: expected a whole number from 0 to 65535"),
        ([*BUNDLE, "--http-port", "-1"], "arguments: argument --http-port"),
        ([*BUNDLE, "--grpc-port", "9" * 5000], "arguments: argument --grpc-port"),
        ([*BUNDLE, "--http-port", "9000", "--grpc-port", "9000"], "--grpc-port: expected another port"),
        ([*BUNDLE, "--timeout", "nan"], "arguments: argument --timeout: expected a number"),
        ([*BUNDLE, "--drain", "-1"], "arguments: argument --drain"),
        ([*BUNDLE, "--name", "stats"], "arguments: argument --name"),
        ([*BUNDLE, "--name", "a/b"], "arguments: argument --name"),
        ([*BUNDLE, "--log-level", "loud"], "arguments: argument --log-level: expected one of debug"),
        ([*BUNDLE, "--tls-cert", "c.pem"], "--tls-cert: expected together with --tls-key"),
        ([*BUNDLE, "--tls-cert", "no.pem", "--tls-key", "no.pem"], "--tls-cert: expected a certificate"),
        ([*BUNDLE, "--token", "x"], "arguments: unrecognized arguments: --token x"),
    ],
)
def test_a_bad_command_line_is_one_sentence(words, message):
    with pytest.raises(InputError) as told:
        parse(words, {})
    assert str(told.value).startswith(message)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("token", ["", " ", "two words", "ümlaut", "line\n"])
def test_a_token_that_no_header_can_carry_is_refused(token):
    with pytest.raises(InputError, match="GATI_TOKEN"):
        parse(BUNDLE, {"GATI_TOKEN": token})


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"], {})
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "python -m serve --bundle runs/digits/caches/bundle" in said
    assert "(default: 8000)" in said
    assert "None" not in said


def test_logs_are_json_with_the_id_of_the_request():
    record = logging.makeLogRecord({"name": "serve", "levelname": "INFO", "msg": "a %s", "args": ("b",), "ms": 3})
    token = logs.request_id.set("me")
    try:
        line = json.loads(logs.JsonFormatter().format(record))
    finally:
        logs.request_id.reset(token)
    assert (line["message"], line["request_id"], line["ms"], line["level"]) == ("a b", "me", 3, "info")
    record.exc_info = (ValueError, ValueError("why"), None)
    text = logs.JsonFormatter().format(record)
    assert "\n" not in text
    assert "why" in json.loads(text)["exception"]


# The process


class Process:
    """``served.py`` beside this file: a server before the fake engine, on ports of its own."""

    def __init__(self, *words):
        command = [sys.executable, str(HERE / "served.py"), *words]
        self.child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.child.stdout
        self.http = json.loads(self.child.stdout.readline())["http"]

    def get(self, path, body=None):
        try:
            with urllib.request.urlopen(self.http + path, body) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    def say(self, line):
        """Let the fake engine go on: "warm" ends the warm-up, "answer" releases the images."""
        assert self.child.stdin
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()

    def until(self, message):
        """Read the log up to a message."""
        assert self.child.stderr
        for line in self.child.stderr:
            if json.loads(line)["message"] == message:
                return
        raise AssertionError(message)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.communicate()


IMAGE = json.dumps({"inputs": [{"name": "images", "datatype": "UINT8", "shape": [2, 3, 1], "data": [1] * 6}]}).encode()


def test_ready_after_the_warm_up_and_not_ready_before_the_sockets_close():
    with Process("--grace", "60") as server:
        assert (server.get("/v2/health/live"), server.get("/v2/health/ready")) == (200, 503)
        server.say("warm")
        server.until("ready")
        assert server.get("/v2/health/ready") == 200
        server.child.send_signal(signal.SIGTERM)
        server.until("stopping")
        assert (server.get("/v2/health/live"), server.get("/v2/health/ready")) == (200, 503)
        server.say("answer")
        assert server.get("/v2/models/gati/infer", IMAGE) == 200  # the grace is for those who do not know yet
        server.child.send_signal(signal.SIGTERM)  # a second one stops at once
        assert server.child.wait(30) == 1


def test_what_was_admitted_is_finished():
    with Process("--grace", "0", "--drain", "60") as server:
        server.say("warm")
        server.until("ready")
        request = f"{server.http}/v2/models/gati/infer"
        code = f"import urllib.request as u; print(u.urlopen({request!r}, {IMAGE!r}).status)"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as client:
            server.until("submitted")
            server.child.send_signal(signal.SIGTERM)
            server.until("stopping")
            server.say("answer")
            assert client.communicate(timeout=60)[0].strip() == "200"
        server.until("stopped")
        assert server.child.wait(30) == 0


def test_a_drain_takes_no_longer_than_it_may():
    with Process("--grace", "0", "--drain", "0") as server:
        server.say("warm")
        server.until("ready")
        code = f"import urllib.request as u; u.urlopen({server.http + '/v2/models/gati/infer'!r}, {IMAGE!r})"
        with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as client:
            server.until("submitted")
            server.child.send_signal(signal.SIGTERM)
            assert server.child.wait(60) == 1
            client.kill()


def test_stopped_while_warming_up():
    with Process() as server:
        server.child.send_signal(signal.SIGINT)
        assert server.child.wait(30) == 0


def test_a_taken_port_is_one_line_and_exit_code_2():
    with Process() as server:
        port = server.http.rsplit(":", 1)[1]
        for option in ("--http-port", "--grpc-port"):
            second = [sys.executable, str(HERE / "served.py"), option, port]
            done = subprocess.run(second, capture_output=True, text=True, check=False)
            assert done.returncode == 2
            assert done.stderr.startswith(f"error: {option}: cannot listen at 127.0.0.1")
            assert done.stderr.count("\n") == 1
