"""A small sample of the generated requests on the fake engine, and the scripts of fuzzing and of clients."""

import json
import time

from benchmarks import clients, fuzz
from benchmarks.grammar import Model, Random, frame, grpc_connection, http_request, literal
from tests.serve import fake
from tests.serve.transports import images

MODEL = Model(name="gati", shape=fake.SHAPE)


def test_no_generated_request_makes_the_server_fail(front, sockets):
    http, rpc = sockets
    sent = fuzz.send(http, rpc, MODEL, seed=1, numbers=range(400))
    assert sum(sent.values()) >= 350  # of the operations of the description, as many each
    assert min(sent.values()) > 10
    assert fuzz.wrong(http, rpc, images(0, 1, 2, 4), [0, 1, 2, 1]) == []
    counted = fuzz.counted(front.metrics.page())
    assert not [key for key in counted if fuzz.is_failure(key)], counted
    assert counted["http 200"] > 40  # so many come as far as the engine, or to a page
    assert counted["grpc 200"] + counted["grpc 400"] > 10
    assert len(front.engine.calls) > 40
    assert counted["http 400"] > 10


def test_a_request_is_the_same_whatever_came_before_it():
    for make in (http_request, grpc_connection):
        one, other = ([make(Random(f"7/{i}"), MODEL) for i in numbers] for numbers in (range(30), range(29, -1, -1)))
        assert one == other[::-1]
        assert len(set(one)) > 25


def test_a_server_that_is_not_well_is_noticed(front, sockets):
    http, rpc = sockets
    assert fuzz.wrong(http, rpc, images(1), [2]) == ["classes [1] instead of [2]"] * 2
    assert fuzz.wrong(1, rpc, images(1), [1])[0].startswith("no answer")
    front.engine.failure = RuntimeError("broken")
    assert fuzz.wrong(http, rpc, images(1), [1])[0].startswith("no answer")
    until = time.monotonic() + 30
    while not (failures := list(filter(fuzz.is_failure, fuzz.counted(front.metrics.page())))):
        assert time.monotonic() < until  # a request is counted after its answer
    assert failures == ["http 500"]
    assert [fuzz.is_failure(f"grpc {code}") for code in (200, 499, 500, 503, 504)] == [False, False, True, True, False]
    assert not fuzz.is_error(json.dumps({"level": "warning", "logger": "serve"}))
    assert not fuzz.is_error(json.dumps({"level": "error", "logger": "grpc._cython.cygrpc"}))
    assert fuzz.is_error(json.dumps({"level": "error", "logger": "serve.grpc"}))
    assert fuzz.is_error("Traceback")
    line = {"level": "error", "logger": "serve", "message": "m", "exception": "Traceback ...\nValueError: v\n"}
    assert fuzz.error_of(json.dumps(line)) == "m: ValueError: v"


def test_frames_and_header_fields_are_those_of_the_standard():
    assert frame(1, 4, 3, b"ab") == bytes((0, 0, 2, 1, 4, 0, 0, 0, 3)) + b"ab"
    assert literal("a", "bc") == b"\0\x01a\x02bc"
    assert fuzz.is_answered(frame(4, 0, 0, b"") + frame(1, 4, 1, b"x") + frame(1, 5, 1, b"yy"))
    assert not fuzz.is_answered(frame(4, 0, 0, b"") + frame(1, 4, 1, b"x") + frame(0, 1, 1, b"y"))
    assert fuzz.is_answered(b"HTTP/1.1 400 Bad Request")
    # RFC 7541, C.1.2: 1337 with a prefix of five bits; of seven bits, 1337 - 127 = 1210 = 9 * 128 + 58.
    assert literal("a", "x" * 1337)[3:6] == bytes((127, 58 + 128, 9))


# Clients


def asked(sockets, folder):
    class Server:
        http, grpc = sockets

    return clients.Asked(Server, images(0, 1, 2), [0, 1, 2], folder)  # pyright: ignore[reportArgumentType]


def test_libraries_and_tools_are_asked_and_judged(sockets, tmp_path):
    rows = clients.libraries(asked(sockets, tmp_path), clients.interpreters(None))
    by = {row.client: row.result for row in rows}
    for name in ("http", "http.aio", "grpc", "grpc.aio"):
        assert by[f"tritonclient.{name}"] == "right answers"
    assert {row.result for row in rows} <= {"right answers", clients.NOT_RUN}
    assert clients.judge([0, 1, 2], [0, 1, 1]) == "FAILS: classes [0, 1, 2] instead of [0, 1, 1]"


def test_tools_are_judged_by_what_they_print():
    judges = {tool.client: tool.judge for tool in clients.TOOLS}
    good = {
        "curl": '{"outputs": [{"name": "class_index", "data": [3, 1]}]}',
        "grpcurl": '{"rawOutputContents": ["AwAAAAEAAAA="]}',
        "hey": "Status code distribution:\n  [200]\t400 responses\n",
        "wrk": "Requests/sec: 10\nanswers 300 wrong 0\n",
        "h2load": "requests: 400 total, 400 succeeded, 0 failed, 0 errored, 0 timeout\n"
        "status codes: 400 2xx, 0 3xx, 0 4xx",
        "locust": '[{"num_requests": 20, "num_failures": 0}]',
    }
    bad = {
        "curl": '{"error": "no"}',
        "grpcurl": "Failed to dial",
        "hey": "  [200]\t399 responses\n  [429]\t1 responses\n",
        "wrk": "answers 300 wrong 2\n",
        "h2load": "400 succeeded, 0 failed, 0 errored\nstatus codes: 399 2xx, 0 3xx, 1 4xx",
        "locust": '[{"num_requests": 20, "num_failures": 1}]',
    }
    for name, text in good.items():
        judged = judges[name](text, [3, 1])
        assert judged is not None
        assert not judged.startswith("FAILS")
    for name, text in bad.items():
        assert judges[name](text, [3, 1]) is None, name
    assert str(judges["curl"](good["curl"], [3, 2])).startswith("FAILS: classes [3, 1]")


def test_the_page_of_clients_has_a_line_for_each():
    row = clients.ClientResult(client="curl", version="8.1", protocol="HTTP", result="right answers")
    page = clients.page([row], clients.EXAMPLE, 4)
    assert "| curl | 8.1 | HTTP | right answers |" in page
    assert clients.EXAMPLE in page
    assert max(map(len, page.splitlines())) <= 120
