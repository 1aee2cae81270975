"""The life of the process: readiness, signals, drain, ports, and what it imports."""

import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import gati_jax

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
        self.child = subprocess.Popen([sys.executable, *how, *words], env=ENVIRONMENT, text=True, **pipes)
        assert self.child.stdout
        self.http = json.loads(self.child.stdout.readline())["http"]

    def get(self, path, body=None):
        try:
            with urllib.request.urlopen(self.http + path, body) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    def client(self):
        """Ask for an inference from another process, which prints the status."""
        url = f"{self.http}/v2/models/gati/infer"
        code = f"import urllib.request as u; print(u.urlopen({url!r}, {IMAGE!r}).status)"
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
            if json.loads(line)["message"] == message:
                return
        raise AssertionError(message)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.communicate()


def test_ready_after_the_warm_up_and_not_ready_before_the_sockets_close():
    with Process("--grace", "60") as server:
        assert (server.get("/v2/health/live"), server.get("/v2/health/ready")) == (200, 503)
        server.release("warm")
        server.until("ready")
        assert server.get("/v2/health/ready") == 200
        server.child.send_signal(signal.SIGTERM)
        server.until("stopping")
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
        server.release("warm")
        server.until("ready")
        with server.client() as client:
            server.until("submitted")
            server.child.send_signal(signal.SIGTERM)
            server.until("stopping")
            server.release("answer")
            assert client.communicate(timeout=60)[0].strip() == "200"
        server.until("stopped")
        assert server.child.wait(30) == 0


def test_a_drain_takes_no_longer_than_it_may():
    with Process("--grace", "0", "--drain", "0") as server:
        server.release("warm")
        server.until("ready")
        with server.client() as client:
            server.until("submitted")
            server.child.send_signal(signal.SIGTERM)
            assert server.child.wait(60) == 1
            client.kill()


def test_an_idle_client_over_tls_does_not_delay_the_stop(tmp_path):
    """The closing connection waited for the client's own goodbye until the whole drain was over (then exit code 1)."""
    pem, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    given = f"-newkey rsa:2048 -nodes -keyout {key} -out {pem} -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(["openssl", "req", "-x509", *given.split()], check=True, capture_output=True)
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


def test_stopped_while_warming_up_and_a_taken_port_is_one_line_and_exit_code_2():
    with Process() as server:
        port = server.http.rsplit(":", 1)[1]
        for option in ("--http-port", "--grpc-port"):
            second = [sys.executable, "-m", "tests.serve.served", option, port]
            done = subprocess.run(second, capture_output=True, text=True, check=False, env=ENVIRONMENT)
            assert done.returncode == 2
            assert done.stderr.startswith(f"error: {option}: cannot listen at 127.0.0.1")
            assert done.stderr.count("\n") == 1
        server.child.send_signal(signal.SIGINT)
        assert server.child.wait(30) == 0


IMPORTED = """
import sys
from serve import __main__, lifecycle
from serve.assemble import assemble
from serve.settings import parse
backend = assemble(parse(["--bundle", sys.argv[1], "--capacity", "2"], {})).start()
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
