"""The raw load generator against servers whose behaviour is known, and the figures of overload and soak by hand."""

import argparse
import contextlib
import socket
import socketserver
import threading
import time
from typing import Any

import numpy as np
import pytest

from benchmarks import overload, process, soak, table
from benchmarks.overload import PLACES, PROBES, LoadResult, Overload, Watched, criteria, summarize
from benchmarks.sockets import CLOSED, SILENT, Outcomes, Stream, drive, message
from gati_jax import InputError
from tests.serve import fake
from tests.serve.transports import images


@contextlib.contextmanager
def answering(behave):
    """A server whose connections are left to a function."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                behave(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, request_queue_size = True, 128

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def answers(connection, seconds=0.0, status=b"200 OK", close=b""):
    """Answer all requests of a connection, each after some seconds."""
    waiting = b""
    while data := connection.recv(1000):
        waiting += data
        while (end := waiting.find(b"\r\n\r\n")) >= 0:
            waiting = waiting[end + 4 :]
            time.sleep(seconds)
            connection.sendall(b"HTTP/1.1 " + status + b"\r\ncontent-length: 2\r\n" + close + b"\r\no")
            connection.sendall(b"k")
            if close:
                return


def stream(port, n=20, rate=200.0, **changes):
    """Requests for a page, evenly in time."""
    given = {"port": port, "messages": [message("/")], "rows": np.zeros(n, np.int64), "seconds": np.arange(n) / rate}
    return Stream(**(given | changes))


@pytest.mark.parametrize("keep", [True, False])
def test_every_request_gets_its_own_answer(front, sockets, keep):
    messages = process.inferences(images(0, 1, 2), keep=keep)
    rows = np.random.default_rng(0).integers(0, 3, 150)
    asked = Stream(port=sockets[0], messages=messages, rows=rows, seconds=np.arange(150) / 500, keep=keep, reads=2)
    (outcomes,) = drive([asked])
    assert set(outcomes.status) == {200}
    np.testing.assert_array_equal(outcomes.values, np.stack([rows, np.array(fake.EXITS)[rows]], 1))
    assert (outcomes.sent >= outcomes.scheduled).all()
    assert (outcomes.done > outcomes.sent).all()
    assert 0 < outcomes.busy < outcomes.seconds
    assert len(front.engine.calls) == 150


def test_requests_without_an_answer_are_told_apart():
    def behave(connection):
        connection.recv(1000)
        if not next_one.acquire(blocking=False):
            time.sleep(1.5)  # says nothing for longer than anyone waits

    next_one = threading.Semaphore(3)
    with answering(behave) as port:
        (outcomes,) = drive([stream(port, 5, keep=False)], patience=0.3)
    assert sorted(outcomes.status) == [SILENT, SILENT, CLOSED, CLOSED, CLOSED]
    assert np.isinf(outcomes.done).all()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    (outcomes,) = drive([stream(port, 2)], patience=0.3)
    assert (set(outcomes.status), "Refused" in outcomes.error) == ({CLOSED}, True)


def test_waiting_for_a_connection_counts_from_the_scheduled_time():
    with answering(lambda connection: answers(connection, 0.1)) as port:
        (outcomes,) = drive([stream(port, 3, 1e3, connections=1)])
    assert (outcomes.done - outcomes.scheduled >= [0.1, 0.19, 0.29]).all()
    assert (outcomes.sent - outcomes.scheduled >= [0, 0.09, 0.19]).all()


def test_a_closed_loop_keeps_its_clients_busy_and_no_more():
    lock, inside, most = threading.Lock(), [0], [0]

    def behave(connection):
        while connection.recv(1000):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            with lock:
                inside[0] -= 1
            connection.sendall(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n")

    with answering(behave) as port:
        (outcomes,) = drive([stream(port, 10_000, seconds=None, clients=4, until=0.3)])
        (few,) = drive([stream(port, 6, seconds=None, clients=4)])
    assert most[0] == 4
    assert 8 <= len(outcomes.rows) <= 4 * 0.3 / 0.02 + 4
    assert set(outcomes.status) == {429}
    assert len(few.rows) == 6


def test_a_connection_that_the_server_closes_is_not_used_again():
    with answering(lambda connection: answers(connection, close=b"Connection: close\r\n")) as port:
        (outcomes,) = drive([stream(port, 10, 50.0)])
    assert set(outcomes.status) == {200}


def test_a_server_that_does_not_start_says_why(tmp_path):
    with (
        pytest.raises(InputError, match=r"^server: expected it to start, got: .*bundle"),
        process.serving(tmp_path / "b"),
    ):
        pass


# Figures


def outcomes(status, ms, late=0.0, rows=None, values=None):
    """Requests that were scheduled at 0, 1, 2, ... seconds and answered after so many milliseconds."""
    n = len(status)
    at = np.arange(n, dtype=float)
    return Outcomes(
        np.zeros(n, np.int64) if rows is None else np.array(rows),
        at,
        at + late,
        at + np.array(ms) / 1e3,
        np.array(status, np.int16),
        np.full((n, 2), -1) if values is None else np.array(values),
        seconds=10.0,
        busy=1.5,
        error="first",
    )


ARGUMENTS = argparse.Namespace(seconds=10.0, deadline_ms=100.0)


def test_the_figures_of_a_load():
    status = [200] * 6 + [429, 429, 503, 0]
    ms = [10, 20, 30, 40, 50, 60, 1, 2, 3, np.inf]
    asked = outcomes(status, ms, rows=[0, 1] * 5, values=[[1, 0], [2, 0]] * 4 + [[-1, -1]] * 2)
    probed = [outcomes([200, 200], [5, 70])] * (len(PROBES) - 1) + [outcomes([200, -1], [5, np.inf])]
    watched = Watched([asked, *probed], (100.0, 101.0), 0.9)
    run = summarize(watched, ARGUMENTS, np.array([1, 3]), "kept", 2.0, 1.5)
    assert (run.sent, run.answered, run.refused, run.lost) == (10, 6, {"429": 2, "503": 1}, 1)
    assert (run.goodput, run.share) == (pytest.approx(0.6), pytest.approx(0.4))
    assert (run.p50_ms, run.different) == (pytest.approx(35.0), 3)
    assert run.bound_ms == pytest.approx(PLACES / 0.6 * 1e3 + 100)
    assert (run.probes["live"], run.probes["metrics, admin"]) == (pytest.approx(0.07), pytest.approx(0.005))
    assert (run.probes_lost, run.generator_cores) == (1, 0.15)
    assert run.invalid_because == ("1 requests had no answer; the first: first",)
    late = summarize(
        watched._replace(outcomes=[outcomes([200], [9], 0.006), *probed]), ARGUMENTS, np.zeros(1), "new", 1, 1
    )
    assert late.invalid_because == ("100.0% of the requests were sent more than 5 ms late",)


def result(*runs) -> Overload:
    given: dict[str, Any] = {
        "network": "n",
        "backend": "b",
        "machine": "m",
        "neighbours": 0,
        "deadline_ms": None,
        "versions": {},
    }
    return Overload(**given, runs=runs, commit="c", date="d")


def test_a_result_is_read_back_and_judged(tmp_path, capsys):
    watched = Watched([outcomes([200] * 10, [10] * 10), *[outcomes([200], [5])] * len(PROBES)], (100.0, 101.0), 0.9)
    run = summarize(watched, ARGUMENTS, np.full(1, -1), "kept", 2.0, 1.0)
    good = result(run)
    assert all(one.holds for one in criteria(good))
    good.write(tmp_path / "o.json", print_json=False)
    assert Overload.read(tmp_path / "o.json") == good
    table.main([str(tmp_path / "o.json")])
    assert [line.count("|") for line in capsys.readouterr().out.splitlines()] == [1 + len(overload.COLUMNS)] * 3
    changes: list[tuple[dict[str, Any], str]] = [
        ({"probes": run.probes | {"ready": 1.1}}, "ready"),
        ({"probes_lost": 1}, "health"),
        ({"lost": 1}, "requests without"),
        ({"goodput": 0.89}, "goodput"),
        ({"p99_ms": run.bound_ms + 1}, "p99"),
        ({"p99_ms": None}, "p99"),
        ({"rss_mib": (100.0, 107.0)}, "growth"),
    ]
    for change, what in changes:
        wrong = result(run, LoadResult.model_validate(run.model_dump() | change))
        assert [one.what.startswith(what) or what in one.what for one in criteria(wrong) if not one.holds] == [True], (
            what
        )


def test_slopes_and_what_a_soak_finds():
    rising = soak.slope([500.0, 400.0, *(100.0 + 0.5 * i for i in range(8))])
    assert (rising.per_hour, rising.low, rising.high) == (pytest.approx(60), pytest.approx(60), pytest.approx(60))
    assert rising.growth == pytest.approx(3.5 / 101.75)
    noisy = soak.slope([100.0 + (-1) ** i for i in range(20)])
    assert noisy.low < 0 < noisy.high
    given: dict[str, Any] = {
        "network": "n",
        "machine": "m",
        "adapt": True,
        "seconds": 1.0,
        "capacity": 1.0,
        "rate": 1.0,
        "sent": 1,
    }
    given |= {"answered": 1, "refused": {}, "different": 0, "versions": {}, "commit": "c", "date": "d", "turns": ()}
    clean = soak.Soak(**given, lost=0, rss=rising, descriptors=noisy, left_behind=(), exit_code=0)
    assert clean.problems == []
    more = rising.model_copy(update={"growth": 0.06})
    dirty = clean.model_copy(update={"lost": 2, "rss": more, "left_behind": ("x.tmp",), "exit_code": 1})
    assert dirty.problems == ["2 requests without an answer", "x.tmp left behind", "memory grew by 6.0%", "exit code 1"]


def test_drifted_pictures_are_other_pictures_of_the_same_kind():
    pictures = np.random.default_rng(0).integers(0, 17, (20, 8, 8, 1), dtype=np.uint8)
    other = soak.drifted(pictures, np.random.default_rng(1))
    assert (other.dtype, other.shape, other.max() <= pictures.max()) == (np.uint8, pictures.shape, True)
    distance = [np.abs(other.astype(float) - shifted).mean() for shifted in (pictures, np.roll(pictures, 1, axis=2))]
    assert distance[1] < distance[0] / 2


def test_what_is_left_behind(tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "kept" / "versions").mkdir(parents=True)
    for name in ("tmp/x", "kept/state.json", "kept/.state.json.abc", "kept/versions/.000001.saving-q"):
        (tmp_path / name).touch()
    assert soak.left_behind(tmp_path / "tmp", tmp_path / "kept") == (".000001.saving-q", ".state.json.abc", "x")
