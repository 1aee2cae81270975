"""The worker's thread, and its throttle by a clock that the test turns."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gati_jax import InputError
from serve.adaptive.worker import Throttle, Worker


@given(st.floats(0.01, 1), st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_work_takes_its_share_of_the_time(share, pieces):
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    throttle = Throttle(share, clock=lambda: now, sleep=sleep).start()
    for piece in pieces:
        now += piece
        throttle()
    assert throttle.worked == pytest.approx(sum(pieces))
    assert throttle.worked == pytest.approx(share * now)
    assert throttle.longest == pytest.approx(max(pieces))


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_no_such_share(share):
    with pytest.raises(InputError, match="share"):
        Throttle(share)


PATIENCE = 60


class Job:
    """Work that can be counted; the first pieces fail."""

    def __init__(self, failing=0, pieces=10**9):
        self.failing, self.pieces, self.done, self.paused = failing, pieces, 0, threading.Event()

    def work(self, pause=None):
        if self.failing:
            self.failing -= 1
            raise RuntimeError("a bug")
        if self.done >= self.pieces:
            return False
        self.done += 1
        time.sleep(0.002)
        assert pause
        pause()
        self.paused.set()
        return True


def test_work_is_done_in_its_share_of_the_time():
    job = Job()
    worker = Worker(job, 0.5)
    began = time.monotonic()
    worker.start()
    assert job.paused.wait(PATIENCE)
    time.sleep(0.05)
    assert worker.stop(PATIENCE)
    assert 0 < worker.seconds < 0.75 * (time.monotonic() - began)
    assert worker.longest > 0


def test_a_long_pause_ends_when_the_server_stops():
    worker = Worker(job := Job(), 1e-6)  # sleeps for half an hour
    worker.start()
    while not job.done:
        time.sleep(0.001)
    assert worker.stop(PATIENCE)


def test_a_piece_that_fails_is_counted_and_tried_again(monkeypatch, caplog):
    monkeypatch.setattr("serve.adaptive.worker._RETRY", (0.001, 0.002))
    worker = Worker(job := Job(failing=3), 0.9)
    worker.start()
    assert job.paused.wait(PATIENCE)
    assert worker.stop(PATIENCE)
    assert worker.failures == 3
    assert "recovery failed" in caplog.text


def test_a_worker_that_never_started_is_stopped():
    assert Worker(Job(), 0.5).stop(0.1)
