"""Engines that share a device: equal shares of its time, whatever their steps take."""

import threading
import time

import pytest

from serve.engine.engine import Engine
from serve.engine.turns import Turns
from tests.serve.fake_runner import FakeClock, FakeRunner, images, route


def test_of_two_that_always_wait_each_gets_half_of_the_time():
    """Steps of 3 ms and of 1 ms: one of the first for three of the second."""
    clock, order, lock = FakeClock(), [], threading.Lock()
    turns, over = Turns(clock), threading.Event()

    def work(name, seconds, turn):
        while not over.is_set():
            turn.take()
            with lock:
                order.append(name)
                over.set() if len(order) >= 80 else None
            clock.now += seconds
            until = time.monotonic() + 1
            while len(turns._waiting) < 1 and not over.is_set() and time.monotonic() < until:
                time.sleep(1e-4)  # the other one is back in the queue
            turn.give_back()

    threads = [threading.Thread(target=work, args=(*what, turns.join())) for what in (("long", 3.0), ("short", 1.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert 19 <= order[:80].count("long") <= 21


def test_who_was_idle_has_saved_nothing_up():
    clock = FakeClock()
    turns = Turns(clock)
    busy, idle = turns.join(), turns.join()
    for _ in range(10):
        busy.take()
        clock.now += 1
        busy.give_back()
    idle.take()
    clock.now += 1.5
    idle.give_back()
    holder, order = turns.join(), []

    def work(name, turn):
        turn.take()
        order.append(name)
        clock.now += 1
        turn.give_back()

    holder.take()
    threads = [threading.Thread(target=work, args=one) for one in (("idle", idle), ("busy", busy))]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 10
    while len(turns._waiting) < 2 and time.monotonic() < until:
        time.sleep(1e-4)
    holder.give_back()
    for thread in threads:
        thread.join(30)
    assert order == ["busy", "idle"]  # ten seconds behind, the idle one would have gone first


def test_a_turn_is_taken_once_and_given_back_once():
    turn = Turns().join()
    turn.take()
    turn.take()
    turn.give_back()
    turn.give_back()
    turn.take()


@pytest.mark.parametrize("fails", [False, True])
def test_engines_on_one_device_run_one_step_at_a_time_and_answer_all(fails):
    """Also where steps fail, and when one of them stops."""
    turns, running, most = Turns(), [], []

    def before(step):
        running.append(step)
        most.append(len(running))
        time.sleep(0.001)
        running.remove(step)
        if fails and len(most) % 5 == 0:
            raise RuntimeError("a step that fails")

    engines = [Engine(FakeRunner([route(1.0, 1.0)], before=before), turn=turns.join()) for _ in range(3)]
    for engine in engines:
        engine.start()
    futures = [engine.submit(images((n % 2, n)), route=0)[0] for n in range(8) for engine in engines]
    done = [future.exception(30) for future in futures]
    assert max(most) == 1
    assert fails or not any(done)
    assert engines[0].stop(30)
    (last,) = engines[1].submit(images((1, 7)), route=0)
    assert last.exception(30) is None or fails
    assert all(engine.stop(30) for engine in engines[1:])
