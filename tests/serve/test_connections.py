"""What reaches a server from outside: bounds of connections and heads, the admin port, the stop, descriptors."""

import asyncio
import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error

import numpy as np
import pytest

from serve.protocol.admission import Limits
from serve.protocol.connections import HttpServer, Reply
from serve.settings import parse
from tests.serve.test_process import BUNDLE, ENVIRONMENT, IMAGE, Process
from tests.serve.transports import INFER, tensor

FEW_DESCRIPTORS = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
runpy.run_module("tests.serve.served", run_name="__main__", alter_sys=True)
"""


async def pages(scope, receive, send):
    """Answer "ok"; on /read after the whole body."""
    while scope["path"] == "/read" and (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextlib.contextmanager
def serving(loop_factory=None, app=pages, refuse=lambda _: None, **limits):
    """An HTTP server in a thread: its port and the reasons of its refusals."""
    listener, reasons = socket.socket(), []
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = HttpServer(app, listener, Limits(**limits), refused=reasons.append, refuse=refuse)

    def body():
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(server.serve())

    thread = threading.Thread(target=body)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.001)
        yield port, reasons
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def exchange(port, *parts, pause=0.0):
    """Send parts with pauses between them; returns all that comes until the server hangs up.

    What comes meanwhile is read before the next part is sent: sent to a socket that the server has closed, it would
    bring a reset, by which the system forgets what was not read.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        got = b""
        with contextlib.suppress(ConnectionError):
            for part in parts:
                client.sendall(part)
                until = time.monotonic() + pause
                while (left := until - time.monotonic()) > 0 and select.select([client], [], [], left)[0]:
                    if not (data := client.recv(65536)):
                        return got
                    got += data
            while data := client.recv(65536):
                got += data
        return got


def is_ok(client):
    got = b""
    while not got.endswith(b"ok") and (data := client.recv(1000)):
        got += data
    return got.endswith(b"ok")


BIG = b"x" * 300_000
CHUNKED = b"POST /read HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        (b"GET / HTTP/1.1\r\na: ", *(BIG,) * 3),
        (b"GET / HTTP/1.1\r\n", BIG, BIG),
        (b"GET /", *(BIG,) * 3),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 11 + b"\r\n",),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 2000 + b"\r\n\r\n",),
        (CHUNKED + b"1\r\na\r\n0\r\na: ", *(BIG,) * 3),
        (CHUNKED + b"1\r\na\r\n0\r\n" + b"a: b\r\n" * 100,),
        (CHUNKED + b"1;", *(BIG,) * 3),
        (b"\x16\x03\x01" + BIG,),
    ],
    ids=["value", "name", "path", "many", "long", "trailer", "trailers", "extension", "TLS"],
)
def test_a_head_too_large_is_cut_off(parts):
    with serving(header_bytes=1000, header_count=10) as (port, reasons):
        begun = time.monotonic()
        got = exchange(port, *parts)
        assert got == b"" or got.split()[1] in {b"431", b"400"}  # nothing, where the reset came first
        assert reasons == ["head"]
        assert exchange(port, b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n").endswith(b"ok")
        assert time.monotonic() - begun < 10


def test_a_client_that_leaves_with_another_request_waiting_has_left_both(caplog):
    """Only the last one heard of it: the first was computed, and uvloop raised where its answer was written."""
    begun, left = threading.Event(), []

    async def until_left(scope, receive, send):
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        left.append(scope["path"])
        await pages(scope, receive, send)

    with serving(pytest.importorskip("uvloop").new_event_loop, app=until_left) as (port, _):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\n")
            assert begun.wait(30)
        until = time.monotonic() + 10
        while not left and time.monotonic() < until:
            time.sleep(0.01)
    assert left == ["/a"]
    assert not caplog.records


def test_nonsense_behind_the_last_request_is_not_answered(caplog):
    def last(scope):
        return Reply(429, [(b"content-length", b"0")], b"") if scope["path"] == "/last" else None

    with serving(pytest.importorskip("uvloop").new_event_loop, refuse=last) as (port, reasons):
        got = exchange(port, b"GET /last HTTP/1.1\r\nconnection: close\r\n\r\nnonsense\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 429")
    assert got.count(b"HTTP/1.1") == 1
    assert (reasons, caplog.records) == ([], [])


def test_heads_and_idle_connections_have_their_time():
    with serving(header_timeout=0.3, keep_alive=0.5, timeout=0.4, max_body=1000) as (port, reasons):
        assert exchange(port, b"GET / HTTP/1.1\r\n", b"a", b"b", b":", b"c", pause=0.1).split()[1] == b"408"
        assert exchange(port) == b""
        assert exchange(port, b"GET / HTTP/1.1\r\n\r\n").endswith(b"ok")
        # Refused before its body was read; the rest is discarded, but not for ever.
        late = exchange(port, b"POST / HTTP/1.1\r\ncontent-length: 900\r\n\r\n", *(b"x",) * 9, pause=0.05)
        assert late.endswith(b"ok")
        more = exchange(port, b"POST / HTTP/1.1\r\ncontent-length: 9000000\r\n\r\n", *(b"x" * 1000,) * 3, pause=0.05)
        assert more.endswith(b"ok")
        assert reasons == ["slow"]


def test_a_kept_connection_is_kept():
    with serving(header_timeout=0.3, timeout=0.3, keep_alive=30) as (port, _):
        client = socket.create_connection(("127.0.0.1", port), timeout=30)
        for _ in range(3):
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert is_ok(client)
            time.sleep(0.4)
        client.close()


def test_connections_are_bounded_and_places_come_back():
    with serving(connections=3) as (port, reasons):
        kept = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(3)]
        for client in kept:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert is_ok(client)
        assert exchange(port, b"GET / HTTP/1.1\r\n\r\n") == b""
        assert reasons == ["connections"]
        kept.pop().close()
        patience = time.monotonic() + 10
        while not exchange(port, b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n").endswith(b"ok"):
            assert time.monotonic() < patience
        for client in kept:
            client.close()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_new_connections_do_not_wait_for_one_turn_each(loop):
    """libuv accepts one connection a turn: of 60 in turns of 20 ms, the last one waited for 1.2 s."""
    turns = []

    async def busy(scope, receive, send):
        if scope["path"] == "/busy":
            while len(turns) < 1000 and not done.is_set():
                time.sleep(0.02)
                turns.append(len(turns))
                await asyncio.sleep(0)
        await pages(scope, receive, send)

    done = threading.Event()
    with serving(pytest.importorskip(loop).new_event_loop, busy) as (port, _):
        other = socket.create_connection(("127.0.0.1", port), timeout=30)
        other.sendall(b"GET /busy HTTP/1.1\r\n\r\n")
        while not turns:
            time.sleep(0.001)
        clients = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(60)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        before = len(turns)
        for client in clients:
            assert is_ok(client)
            client.close()
        took = len(turns) - before
        done.set()
        other.close()
    assert took < 30


def test_a_request_reaches_the_service_with_the_time_of_its_first_byte(front):
    front.engine.silent = True
    body = json.dumps({"inputs": [tensor((1,))], "parameters": {"deadline_ms": 300}}).encode()
    head = b"POST %s HTTP/1.1\r\ncontent-length: %d\r\nconnection: close\r\n" % (INFER.encode(), len(body))
    with front.sockets() as ports:
        begun = time.monotonic()
        assert exchange(ports[0], head, b"\r\n" + body[:9], body[9:], pause=0.05).split()[1] == b"504"
    (asked,) = front.engine.calls
    assert begun + 0.3 <= asked["deadline"] <= begun + 0.35  # the pauses count
    assert np.array_equal(asked["images"], np.ones((1, 2, 3, 1), np.uint8))


# The process


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
