"""Replicas that adapt, in one process: engines of their own, and one controller that is called directly."""

import contextlib
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import gati_jax
from gati_jax import InputError
from gati_jax.adaptation import EXACT, NEAREST
from serve.engine.engine import Engine
from serve.engine.records import OverloadedError
from serve.engine.runner import JaxRunner
from serve.settings import Settings
from tests.adaptation import world
from tests.serve.adapted import DEPTH, PATIENCE

pytest.importorskip("ray")
from serve.ray import controller as controllers
from serve.ray.controller import Controller
from serve.ray.watched import Line, UnreachableError, parts_of

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
CAPACITY = 64
SILENCE = SimpleNamespace(report=SimpleNamespace(remote=lambda _: None))  # a directory
ONE = threading.Lock()  # an actor takes one call after another


@pytest.fixture
def settings(tmp_path):
    gati_jax.save_bundle(tmp_path / "bundle", *_parts(world.bundle()), costs=world.bundle().costs)
    names = {"chain": "tests.adaptation.world:chain", "adapt": True, "adapt_dir": tmp_path / "versions"}
    return Settings(bundle=(str(tmp_path / "bundle"),), adapt_without=("refit", "exact", "nearest"), **names)


def _parts(bundle):
    return bundle.chain, bundle.caches, bundle.plan, bundle.certificate


@pytest.fixture
def controller(settings):
    """The controller, which is no actor here; its directory hears nothing."""
    made = Controller(settings, 2 * CAPACITY, SILENCE)
    made.begin()
    yield made
    made.stop()


class Replica:
    """One engine, and its way to the controller, which can be cut."""

    def __init__(self, controller, name):
        self.cut: object = False

        def send(*what):
            with ONE:
                answer = None if self.cut == "before" else controller.exchange(*what)

            def wait():
                if self.cut or answer is None:
                    raise UnreachableError("cut")
                return answer

            return wait

        self.parts = parts_of(world.bundle(), Line(send, name), None)
        self.runner = JaxRunner(self.parts.sources, capacity=CAPACITY, buckets=(1, 4))
        one = self.parts.adapting
        self.engine = Engine(self.runner, observer=one, shadow=one.shadow, turn=self.parts.turn)
        self.parts.serve(self.engine, self.runner)
        self.thresholds = lambda: self.runner._thresholds[0][:-1]

    def ask(self, images):
        """Answers, and what the response says of adaptation."""
        futures = self.parts.adapting.submit(images, route=0)
        notes = self.parts.adapting.notes(0)["adaptation"]
        return [future.result(PATIENCE) for future in futures], notes

    def settle(self):
        while self.engine.statistics().slots_in_use:
            time.sleep(0.001)


@pytest.fixture
def replicas(controller):
    found = [Replica(controller, name) for name in "ab"]
    yield found
    for one in found:
        assert one.parts.adapting.stop(PATIENCE)


def watched(controller):
    return controller._adapting.read(lambda one: one.monitor.watched)


def until(true):
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_one_alarm_closes_both_before_their_next_step(controller, replicas):
    first, second = replicas
    for one in replicas:
        one.ask(world.images(4, 5))  # to base: thresholds come with the first step
        answers, note = one.ask(world.images(32, 6))
        assert note == "1"
        assert any(answer.exit < DEPTH for answer in answers)
        assert np.isfinite(one.thresholds()).any()
    controller._adapting.read(lambda one: one.monitor.shadow_all(on=True))
    note = ""
    for seed in range(1000, 1500):
        with contextlib.suppress(OverloadedError):  # shadow jobs take places, too
            _, note = first.ask(world.images(16, seed, bright=True))
        if note == "safe":
            break
        time.sleep(0.001)
    assert note == "safe"
    assert controller._adapting.controller.monitor.version > 1
    assert np.isfinite(second.thresholds()).any()  # idle since: it has not run a step yet
    answers, note = second.ask(world.images(32, 7))
    assert note == "safe"
    assert np.isinf(second.thresholds()).all()
    assert {answer.exit for answer in answers} == {DEPTH}


def test_every_request_of_both_is_observed_once(controller, replicas):
    for seed in range(6):
        for one in replicas:
            one.ask(world.images(5, 50 + seed))
    for one in replicas:
        one.settle()
    until(lambda: watched(controller) == 60)  # the last reports come with a heartbeat


def test_what_a_replica_that_ends_was_asked_is_left_out_and_holds_no_other_back(controller, replicas, monkeypatch):
    first, second = replicas
    controller._adapting.read(lambda one: one.monitor.shadow_all(on=True))
    state = controller.exchange("gone", (), world.images(8, 70), 1)
    assert len(state.places) == 8
    second.ask(world.images(8, 71))
    first.ask(world.images(8, 72))
    for one in replicas:
        one.settle()
    time.sleep(0.2)
    assert watched(controller) == 0  # held back
    monkeypatch.setattr(controllers, "SILENT", 1.0)  # a busy machine is not silent for so long
    until(lambda: watched(controller) == 16)
    assert controller._adapting.controller.monitor.report.lost == 0


@pytest.mark.parametrize("cut", ["before", "after"])
def test_without_the_controller_the_base_answers_and_nothing_is_held_back(controller, replicas, cut):
    first, second = replicas
    first.ask(world.images(4, 80))
    first.ask(world.images(4, 81))
    first.cut = cut
    answers, note = first.ask(world.images(16, 82))
    assert note == "safe"
    assert {answer.exit for answer in answers} == {DEPTH}
    assert np.isinf(first.thresholds()).all()
    first.cut = False
    second.ask(world.images(4, 83))

    def is_back():
        answers, note = first.ask(world.images(16, 84))
        return note == "1" and any(answer.exit < DEPTH for answer in answers)

    until(is_back)
    for one in replicas:
        one.settle()
    before = watched(controller)
    second.ask(world.images(4, 85))
    until(lambda: watched(controller) >= before + 4)


def test_a_full_replica_refuses_before_the_controller_is_asked(controller, replicas):
    first, _ = replicas
    first.ask(world.images(4, 90))
    with pytest.raises((OverloadedError, ValueError)):
        first.parts.adapting.submit(world.images(CAPACITY + 1, 91), route=0)
    first.settle()
    until(lambda: watched(controller) == 4)


def test_a_controller_that_is_replaced_goes_on_from_the_folder(settings, controller):
    exchange = controller.exchange
    exchange("a", (), None, 1)
    controller._adapting.controller.monitor.next_version()
    controller._adapting.save()
    controller.stop()
    other = Controller(settings, 2 * CAPACITY, controller._directory)
    state = other.exchange("a", (), world.images(2, 1), 2)
    assert state.life != exchange("a", (), None, 3).life
    assert state.note == "2"
    other.stop()


def test_a_folder_in_use_is_one_line(settings, controller):
    del controller
    with pytest.raises(InputError, match="--adapt-dir: expected a folder that no other server uses"):
        Controller(settings, 8, None).begin()


@pytest.fixture
def with_input_cache(settings):
    """A controller that stores answers, and two replicas; every hit is shadowed."""
    made = Controller(settings.model_copy(update={"adapt_without": ("refit",)}), 2 * CAPACITY, SILENCE)
    made.begin()
    found = [Replica(made, name) for name in "ab"]
    made._adapting.read(lambda one: one.monitor.shadow_all(on=True))
    yield made, *found
    for one in found:
        assert one.parts.adapting.stop(PATIENCE)
    made.stop()


def test_what_one_replica_has_answered_the_other_repeats(with_input_cache):
    controller, first, second = with_input_cache
    images = world.images(8, 60)
    first.ask(images)  # the base answers, and that is stored
    first.settle()
    until(lambda: watched(controller) == 8)
    answers, _ = second.ask(images)
    assert {answer.exit for answer in answers} == {EXACT}
    assert second.engine.statistics().answered == 0


def test_stored_answers_are_compared_by_the_replica_that_gave_them(with_input_cache):
    controller, first, second = with_input_cache
    first.ask(world.images(8, 61))
    first.settle()
    until(lambda: watched(controller) == 8)
    controller._adapting.controller.input_cache.exact = None
    controller._adapting.controller.input_cache.threshold = -math.inf
    answers, _ = second.ask(world.images(8, 61))
    assert {answer.exit for answer in answers} == {NEAREST}
    second.settle()
    until(lambda: watched(controller) == 16)
    report = controller._adapting.read(lambda one: one.monitor.report)
    assert (report.shadows[NEAREST], report.lost, second.engine.statistics().shadowed) == (8, 0, 8)
