"""A process under bodies that do not end, a busy event loop, and the system's limits."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error

from serve.settings import parse
from tests.serve.test_process import BUNDLE, ENVIRONMENT, IMAGE, Process
from tests.serve.transports import INFER

FEW_DESCRIPTORS = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
runpy.run_module("tests.serve.served", run_name="__main__", alter_sys=True)
"""


def test_a_body_that_never_ends_does_not_hold_up_the_stop():
    """The server waited for the whole drain, and then logged a traceback."""
    with Process("--grace", "0", "--drain", "60") as server:
        server.release("warm", "answer")
        server.until("ready")
        host, port = server.http.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as client:
            client.sendall(f"POST {INFER} HTTP/1.1\r\ncontent-length: 100\r\nexpect: 100-continue\r\n\r\n".encode())
            assert client.recv(1000).split()[1] == b"100"  # it is admitted
            client.sendall(b"{")
            server.child.send_signal(signal.SIGTERM)
            assert server.child.wait(30) == 0
            assert client.recv(1000).split()[1] == b"503"
        assert server.child.stderr
        lines = [json.loads(line) for line in server.child.stderr]
        assert lines[-1]["message"] == "stopped"
        assert not [line for line in lines if "exception" in line]


def test_requests_that_do_not_end_within_the_drain_get_503_and_no_traceback():
    with Process("--grace", "0", "--drain", "0.3") as server:
        server.warm_up()
        host, port = server.http.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as client:
            client.sendall(b"POST %s HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % (INFER.encode(), len(IMAGE)) + IMAGE)
            server.until("submitted")
            server.child.send_signal(signal.SIGTERM)
            assert server.child.wait(30) == 1
            assert client.recv(1000).split()[1] == b"503"
        assert server.child.stderr
        assert not [line for line in server.child.stderr if "exception" in json.loads(line)]


def test_health_and_metrics_are_answered_while_the_event_loop_is_busy():
    with Process("--grace", "60") as server:
        assert (server.get("/v2/health/live", admin=True), server.get("/v2/health/ready", admin=True)) == (200, 503)
        server.warm_up()
        with server.client(IMAGE.replace(b"[1,", b"[77,")) as client:
            server.until("blocked")  # for a minute
            for path in ("/v2/health/live", "/v2/health/ready", "/metrics"):
                assert server.get(path, admin=True) == 200
            assert server.get("/v2", admin=True) == 404
            client.kill()


def test_out_of_descriptors_new_connections_are_refused_and_come_back():
    with Process("--grace", "0", how=("-c", FEW_DESCRIPTORS)) as server:
        server.warm_up()
        host, port = server.http.removeprefix("http://").split(":")
        clients = [socket.create_connection((host, int(port)), timeout=30) for _ in range(80)]
        with contextlib.suppress(ConnectionError):
            assert clients[-1].recv(1) == b""
        server.until("new connections are refused: Too many open files")
        for client in clients:
            client.close()
        patience = time.monotonic() + 20
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                assert server.get("/v2/health/live") == 200
                break
            assert time.monotonic() < patience
            time.sleep(0.05)
        server.release("answer")
        server.child.send_signal(signal.SIGTERM)
        assert server.child.wait(30) == 0
        assert server.child.stderr
        assert "refused" not in server.child.stderr.read()


def test_a_taken_port_is_reported_before_the_bundle_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for option in ("--http-port", "--grpc-port", "--admin-port"):
            command = [sys.executable, "-m", "serve", "--bundle", "nowhere", option, str(taken.getsockname()[1])]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
            assert (done.returncode, json.loads(done.stderr)["message"][: len(option) + 1]) == (2, f"{option}:")


def test_the_defaults_fit_the_30_seconds_of_kubernetes():
    settings = parse(BUNDLE, {})
    assert settings.grace + settings.drain <= 25
