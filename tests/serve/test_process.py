"""The process: its command line and logs, readiness, signals, drain, ports, and what it imports."""

import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest

import gati_jax
from benchmarks.grammar import END_HEADERS, END_STREAM, HEADERS, PREFACE, SETTINGS, frame, literal
from gati_jax import InputError
from serve import logs
from serve.settings import Settings, parse
from tests.serve.transports import INFER

BUNDLE = ["--bundle", "b"]
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
IMAGE = json.dumps({"inputs": [{"name": "images", "datatype": "UINT8", "shape": [2, 3, 1], "data": [1] * 6}]}).encode()
WITHOUT_UVLOOP = """
import asyncio, runpy, sys
sys.modules["uvloop"] = None
if sys.argv.pop(1) == "windows":
    def add_signal_handler(*_): raise NotImplementedError
    asyncio.SelectorEventLoop.add_signal_handler = add_signal_handler
runpy.run_module("tests.serve.served", run_name="__main__", alter_sys=True)
"""


class Process:
    """``served.py`` in this folder: a server with the fake engine, on ports of its own."""

    def __init__(self, *words, how=("-m", "tests.serve.served")):
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, *how, *words]
        self.child = subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes)
        assert self.child.stdout
        where = json.loads(self.child.stdout.readline())
        self.http, self.grpc, self.admin, self.seen = where["http"], where["grpc"], where["admin"], []

    def get(self, path, body=None, *, admin=False):
        try:
            with urllib.request.urlopen((self.admin if admin else self.http) + path, body, 30) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    def client(self, body=IMAGE):
        """Ask for an inference from another process, which prints the status."""
        code = f"import urllib.request as u; print(u.urlopen({self.http + INFER!r}, {body!r}).status)"
        command = [sys.executable, "-c", code]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def release(self, *lines):
        """Let the fake engine continue: "warm" ends the warm-up, "answer" releases the images."""
        assert self.child.stdin
        self.child.stdin.write("".join(line + "\n" for line in lines))
        self.child.stdin.flush()

    def until(self, message):
        """Read the log up to a message."""
        assert self.child.stderr
        for line in self.child.stderr:
            self.seen.append(json.loads(line))
            if self.seen[-1]["message"] == message:
                return
        raise AssertionError(message)

    def until_starts(self, text):
        """Read the log up to a message that begins so."""
        assert self.child.stderr
        for line in self.child.stderr:
            self.seen.append(json.loads(line))
            if self.seen[-1]["message"].startswith(text):
                return
        raise AssertionError(text)

    def warm_up(self):
        self.release("warm")
        self.until("ready")

    def stop(self):
        """Ask it to stop, and wait until it begins to."""
        self.child.send_signal(signal.SIGTERM)
        self.until("stopping")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.communicate()


def test_ready_after_the_warm_up_and_not_ready_before_the_sockets_close():
    with Process("--grace", "60") as server:
        assert (server.get("/v2/health/live"), server.get("/v2/health/ready")) == (200, 503)
        server.warm_up()
        assert server.get("/v2/health/ready") == 200
        server.stop()
        assert (server.get("/v2/health/live"), server.get("/v2/health/ready")) == (200, 503)
        server.release("answer")
        assert server.get("/v2/models/gati/infer", IMAGE) == 200  # the grace is for clients that do not know yet
        server.child.send_signal(signal.SIGTERM)  # a second one stops at once
        assert server.child.wait(30) == 1


@pytest.mark.parametrize(
    "how",
    [("-m", "tests.serve.served"), ("-c", WITHOUT_UVLOOP, "unix"), ("-c", WITHOUT_UVLOOP, "windows")],
    ids=["uvloop", "asyncio", "asyncio on Windows"],
)
def test_admitted_requests_are_finished(how):
    with Process("--grace", "0", "--drain", "60", how=how) as server:
        server.warm_up()
        with server.client() as client:
            server.until("submitted")
            server.stop()
            server.release("answer")
            assert client.communicate(timeout=60)[0].strip() == "200"
        server.until("stopped")
        assert server.child.wait(30) == 0


def test_a_drain_takes_no_longer_than_it_may():
    with Process("--grace", "0", "--drain", "0") as server:
        server.warm_up()
        with server.client() as client:
            server.until("submitted")
            server.child.send_signal(signal.SIGTERM)
            assert server.child.wait(60) == 1
            client.kill()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_hangup_has_folders_looked_at_and_does_not_end_the_process():
    with Process("--grace", "0") as server:
        server.release("warm", "answer")
        server.until("ready")
        server.child.send_signal(signal.SIGHUP)
        server.until("folders are looked at")
        assert server.get("/v2/models/gati/infer", IMAGE) == 200
        server.child.send_signal(signal.SIGTERM)
        assert server.child.wait(30) == 0


def test_an_idle_client_over_tls_does_not_delay_the_stop(tmp_path):
    """The closing connection waited for the client's own goodbye until the whole drain was over (then exit code 1)."""
    pem, key = make_certificate(tmp_path)
    with Process("--grace", "0", "--drain", "60", "--tls-cert", str(pem), "--tls-key", str(key)) as server:
        server.release("warm", "answer")
        server.until("ready")
        port = int(server.http.rsplit(":", 1)[1])
        client = http.client.HTTPSConnection("localhost", port, context=ssl.create_default_context(cafile=pem))
        client.request("GET", "/v2")
        assert client.getresponse().read()
        server.child.send_signal(signal.SIGTERM)
        assert server.child.wait(20) == 0
        client.close()


def test_a_grpc_call_whose_path_is_no_text_does_not_end_the_server():
    """grpcio decodes the path in the task that accepts all calls, which ended with it (found by generated requests)."""
    fields = ((":method", "POST"), (":scheme", "http"), (":path", "/infer\udcee"), (":authority", "h"))
    block = b"".join(literal(*field) for field in (*fields, ("te", "trailers"), ("content-type", "application/grpc")))
    with Process("--grace", "0", "--drain", "60") as server:
        server.release("warm", "answer")
        server.until("ready")
        port = int(server.grpc.rsplit(":", 1)[1])
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
                client.sendall(
                    PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS | END_STREAM, 1, block)
                )
                server.until_starts("gRPC's server has ended")
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
                assert live(b"", timeout=30, wait_for_ready=True) == b"\x08\x01"
        server.child.send_signal(signal.SIGTERM)
        assert server.child.wait(30) == 0


def test_stopped_while_warming_up_and_a_taken_port_is_one_line_and_exit_code_2():
    with Process() as server:
        port = server.http.rsplit(":", 1)[1]
        for option in ("--http-port", "--grpc-port", "--admin-port"):
            second = [sys.executable, "-m", "tests.serve.served", option, port]
            done = subprocess.run(second, capture_output=True, text=True, check=False, env=ENVIRONMENT)
            assert done.returncode == 2
            assert done.stderr.count("\n") == 1
            line = json.loads(done.stderr)
            assert line["level"] == "error"
            assert line["message"].startswith(f"{option}: cannot listen at 127.0.0.1")
        server.child.send_signal(signal.SIGINT)
        assert server.child.wait(30) == 0


def make_certificate(folder):
    pem, key = folder / "cert.pem", folder / "key.pem"
    given = f"-newkey rsa:2048 -nodes -keyout {key} -out {pem} -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(["openssl", "req", "-x509", *given.split()], check=True, capture_output=True)
    return pem, key


def test_a_log_reader_that_stalls_stalls_no_request_and_gets_all_lines_later():
    """Once the pipe was full (64 KiB, some 300 lines), a line blocked the event loop until somebody read."""
    with Process("--grace", "0", "--access-log") as server:
        server.release("warm", "answer")
        server.until("ready")
        host, port = server.http.removeprefix("http://").rsplit(":", 1)
        client = http.client.HTTPConnection(host, int(port), timeout=30)
        for _ in range(1000):
            client.request("GET", "/v2/health/live", headers={"x-request-id": "a" * 100})
            assert client.getresponse().read() == b'{"live":true}'
        client.close()
        server.child.send_signal(signal.SIGTERM)
        lines = [json.loads(line) for line in server.child.communicate(timeout=60)[1].splitlines()]
        requests = [line for line in lines if line["message"] == "request"]
        assert len(requests) == 1000
        assert requests[0]["client"].startswith("127.0.0.1:")
        assert (requests[0]["path"], requests[0]["status"], requests[0]["bytes"]) == ("/v2/health/live", 200, 13)


def test_all_of_standard_error_is_json_also_what_grpc_and_python_write_themselves(tmp_path):
    pem, key = make_certificate(tmp_path)
    code = """
import os, runpy, sys, threading
def spoil():
    os.write(2, b"E0000 00:00:1.5       7 a.cc:1] no json\\n\\xff" + b"more\\n")
    print("print", file=sys.stderr)
    raise ValueError("of a thread")
import serve.logs
serve.logs.configure("info")
spoiled = threading.Thread(target=spoil)
spoiled.start()
spoiled.join()
runpy.run_module("tests.serve.served", run_name="__main__", alter_sys=True)
"""
    how = ("-c", code)
    with Process("--grace", "0", "--tls-cert", str(pem), "--tls-key", str(key), how=how) as server:
        for port in (server.http.rsplit(":", 1)[1], server.grpc.rsplit(":", 1)[1]):
            with socket.create_connection(("127.0.0.1", int(port)), timeout=30) as client:
                client.sendall(b"GET / HTTP/1.1\r\n\r\n")  # where a TLS handshake is expected
                with contextlib.suppress(OSError):
                    client.recv(100)
        server.release("warm", "answer")
        server.until("ready")
        server.child.send_signal(signal.SIGTERM)
        rest = server.child.communicate(timeout=60)[1]
        lines = [*server.seen, *map(json.loads, rest.splitlines())]
    native = [line["message"] for line in lines if line["logger"] == "stderr"]
    assert {"E0000 00:00:1.5       7 a.cc:1] no json", "\ufffdmore", "print"} <= set(native)
    assert any("Handshake failed" in message for message in native)
    (uncaught,) = (line for line in lines if line["message"] == "uncaught exception")
    assert "ValueError: of a thread" in uncaught["exception"]


def test_at_a_terminal_bad_input_is_a_line_for_people():
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "serve", "--bundle", "b", "--http-port", "x"]
    with subprocess.Popen(command, stderr=theirs, env=ENVIRONMENT) as child:
        assert child.wait(60) == 2
    os.close(theirs)
    assert os.read(ours, 4096).startswith(b"error: --http-port: ")
    os.close(ours)


IMPORTED = """
import sys
from serve import __main__, lifecycle
from serve.assemble import assemble
from serve.settings import parse
parts = assemble(parse(["--bundle", sys.argv[1], "--capacity", "2", "--program-cache", "off"], {}))
_, backend = parts.service.models.find("gati").start()
assert backend.engine.statistics().running
assert backend.engine.stop(60)
names = ("gati_jax.adaptation", "gati_jax.fitting", "serve.adaptive", "tensorflow_datasets")
print([name for name in names if name in sys.modules])
"""


def test_a_server_that_does_not_adapt_imports_nothing_for_fitting_or_adapting(residual, tmp_path):
    """Optax and Rich are not among the names: Orbax and Flax may import them."""
    path = tmp_path / "bundle"
    gati_jax.save_bundle(path, residual.chain, residual.caches, residual.plan, residual.certificate)
    command = [sys.executable, "-c", IMPORTED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.strip() == "[]"


# The command line and the logs


def test_by_default_only_this_machine_can_connect():
    settings = parse(BUNDLE, {})
    assert settings == Settings(bundle=("b",))
    assert (settings.host, settings.loopback, settings.token) == ("127.0.0.1", True, None)
    assert not Settings(bundle=("b",), host="0.0.0.0").loopback


def test_only_the_environment_has_the_token_and_no_text_shows_it():
    settings = parse(BUNDLE, {"GATI_TOKEN": "s3cret"})
    assert settings.token == "s3cret"
    assert "s3cret" not in repr(settings)


def test_words_become_values():
    words = "--http-port 80 --timeout 1.5 --log-level debug --tls-key k --overlap --json --adapt --adapt-epsilon 0.02"
    with pytest.raises(InputError, match="--tls-cert: expected together with --tls-key"):
        parse([*BUNDLE, *words.split()], {})
    settings = parse([*BUNDLE, *words.replace("--tls-key k", "--adapt-dir d").split()], {})
    assert (settings.http_port, settings.timeout, settings.log_level) == (80, 1.5, "debug")
    assert (settings.overlap, settings.json_output, settings.reference) == (True, True, False)
    assert (settings.adapt_epsilon, settings.versions("gati")) == (0.02, Path("d"))
    assert parse([*BUNDLE, "--adapt"], {}).versions("gati") == Path("b-adapt").absolute()


def test_layers_are_also_known_by_their_former_names():
    words = [*BUNDLE, "--adapt", "--adapt-without"]
    assert parse([*words, "nearest", "exact", "refit"], {}).adapt_without == ("nearest", "exact", "refit")
    assert parse([*words, "points", "repeats"], {}).adapt_without == ("nearest", "exact")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "arguments: the following arguments are required: --bundle"),
        ([*BUNDLE, "--http-port", "65536"], "--http-port: expected a number less than or equal to 65535, got '65536'"),
        ([*BUNDLE, "--http-port", "-1"], "--http-port: expected a number greater than or equal to 0, got '-1'"),
        (
            [*BUNDLE, "--http-port", "http"],
            "--http-port: expected a valid integer, unable to parse string as an integer",
        ),
        ([*BUNDLE, "--grpc-port", "9" * 5000], "--grpc-port: "),
        ([*BUNDLE, "--http-port", "9000", "--grpc-port", "9000"], "--grpc-port: expected another port"),
        (
            [*BUNDLE, "--admin-port", "8000"],
            "--admin-port: expected another port than --http-port's, got 8000 for both",
        ),
        ([*BUNDLE, "--max-bodies", "33554431"], "--max-bodies: expected --max-body (33554432) at least, got 33554431"),
        ([*BUNDLE, "--keep-alive", "0"], "--keep-alive: expected a number greater than or equal to 0.1, got '0'"),
        (
            [*BUNDLE, "--header-bytes", "100"],
            "--header-bytes: expected a number greater than or equal to 1024, got '100'",
        ),
        ([*BUNDLE, "--max-body", "1000"], "--max-body: expected a number greater than or equal to 1024, got '1000'"),
        ([*BUNDLE, "--capacity", "0"], "--capacity: expected a number greater than or equal to 1, got '0'"),
        ([*BUNDLE, "--timeout", "nan"], "--timeout: expected a finite number, got 'nan'"),
        ([*BUNDLE, "--drain", "-1"], "--drain: expected a number greater than or equal to 0, got '-1'"),
        ([*BUNDLE, "--name", "stats"], "--name: expected letters, digits, dots, dashes and underscores, and not"),
        ([*BUNDLE, "--name", "a/b"], "--name: expected letters"),
        ([*BUNDLE, "--log-level", "loud"], "--log-level: expected 'debug', 'info', 'warning' or 'error', got 'loud'"),
        ([*BUNDLE, "--tls-cert", "c.pem"], "--tls-cert: expected together with --tls-key"),
        ([*BUNDLE, "--tls-cert", "no.pem", "--tls-key", "no.pem"], "--tls-cert: expected a certificate"),
        ([*BUNDLE, "--adapt", "--adapt-dir", "b/adapt"], "--adapt-dir: expected a folder outside the bundle, which"),
        ([*BUNDLE, "--adapt", "--adapt-dir", __file__], "--adapt-dir: expected a folder, got the file"),
        ([*BUNDLE, "--adapt-share", "0.2"], "--adapt-share: expected together with --adapt, got it alone"),
        ([*BUNDLE, "--adapt", "--adapt-share", "1"], "--adapt-share: expected a number less than 1, got '1'"),
        (
            [*BUNDLE, "--adapt", "--adapt-without", "all"],
            "--adapt-without: expected 'nearest', 'exact' or 'refit', got 'all'",
        ),
        ([*BUNDLE, "--token", "x"], "arguments: unrecognized arguments: --token x"),
    ],
)
def test_a_bad_command_line_is_one_sentence(words, message):
    with pytest.raises(InputError) as caught:
        parse(words, {})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("token", ["", " ", "two words", "ümlaut", "line\n"])
def test_a_token_that_no_header_can_carry_is_refused(token):
    with pytest.raises(InputError, match="GATI_TOKEN") as caught:
        parse(BUNDLE, {"GATI_TOKEN": token})
    assert "got something else" in str(caught.value)


def test_help_has_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"], {})
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "python -m serve --bundle runs/digits/caches/bundle" in text
    assert "(default: 8000)" in text
    assert "None" not in text
    flags = {line.split()[0] for line in text.splitlines() if line.startswith("  --")}
    assert len(flags) == len(Settings.model_fields) - 2  # all but the tokens


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
