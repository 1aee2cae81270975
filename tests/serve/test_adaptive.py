"""Adaptation in the server: a drift and back over HTTP, swaps under load, requests, lost shadows."""

import collections
import contextlib
import dataclasses
import math
import re
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest
import tritonclient.http as triton
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

import gati_jax
from gati_jax.adaptation import (
    EVENT_KINDS,
    EXACT,
    NEAREST,
    MonitorConfig,
    NearestCache,
    NearestCacheConfig,
    Served,
    served_by,
)
from gati_jax.bundle import Versions
from gati_jax.bundle.record import certified_only
from serve import assemble
from serve.adaptive import gauges
from serve.adaptive.build import swapper
from serve.engine import routes
from serve.engine.engine import Engine
from serve.engine.records import DeadlineError, OverloadedError
from serve.engine.runner import JaxRunner
from serve.settings import Settings
from tests.adaptation import world
from tests.serve import fake
from tests.serve.adapted import DEPTH, PATIENCE, QUIET, build, running
from tests.serve.fake_runner import pixels


def right(images, classes):
    """Whether these are the base's answers; at a tie, either is."""
    chain = world.bundle().chain
    logits = np.asarray(chain(chain.prepare(images)))
    return (logits.argmax(-1) == classes) | (np.abs(logits[:, 0] - logits[:, 1]) < 1e-4)


@pytest.fixture
def start(tmp_path):
    """Start an adaptive engine without its worker."""
    with contextlib.ExitStack() as stack:
        yield lambda config=QUIET, *, capacity=64: stack.enter_context(
            running(build(tmp_path, config=config, capacity=capacity), capacity=capacity)
        )


def results(futures):
    return [future.result(PATIENCE) for future in futures]


def settled(one):
    """Wait until every request has been answered and observed."""
    while one.statistics().slots_in_use:
        time.sleep(0.001)
    one.engine.between_steps(lambda: None).result(PATIENCE)


# The whole


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(assemble.gati_jax, "load_bundle", lambda *_, **__: world.bundle())
    monkeypatch.setattr(assemble, "version_of", lambda _: "v")
    adapts: dict[str, Any] = {"adapt": True, "adapt_share": 0.9, "adapt_without": ("refit",)}
    settings = Settings(bundle=tmp_path / "bundle", capacity=64, program_cache="off", **adapts)
    parts = assemble.assemble(settings)
    entry = parts.service.models.find("gati")
    loaded, backend = entry.start()
    entry.serve(loaded, backend)
    with fake.sockets(parts.service, parts.metrics) as ports:
        yield parts, ports[0], settings.versions("gati")
    assert backend.engine.stop(PATIENCE)


class Client:
    """Asks 32 images at a time."""

    def __init__(self, port: int) -> None:
        self.connection, self.seed = triton.InferenceServerClient(f"127.0.0.1:{port}"), 1000

    def ask(self, *, bright: bool) -> tuple[str, np.ndarray, np.ndarray]:
        """Return the response's note on adaptation, exits, and whether answers were right."""
        self.seed += 1
        images = world.images(32, self.seed, bright=bright)
        given = triton.InferInput("images", list(images.shape), "UINT8").set_data_from_numpy(images)
        result: Any = None
        while result is None:  # shadow jobs take places, too: a client tries again, as it is asked to
            try:
                result = self.connection.infer("gati", [given])
            except InferenceServerException as error:
                if "overloaded" not in str(error):
                    raise
                time.sleep(0.01)
        note = result.get_response()["parameters"]["adaptation"]
        return note, result.as_numpy("exit"), right(images, result.as_numpy("class_index"))

    def until(self, *, bright: bool, most: int, safe: bool) -> int:
        """Ask until all is closed, or no longer; return how many requests that took."""
        for i in range(most // 32):
            note, exits, agrees = self.ask(bright=bright)
            if note == "safe":
                assert (exits == DEPTH).all()
                assert agrees.all()
            if (note == "safe") == safe:
                return i * 32
        pytest.fail(f"nothing changed within {most} requests")


def test_through_a_drift_and_back(server):
    parts, port, folder = server
    client = Client(port)
    quiet = [client.ask(bright=False) for _ in range(40)]
    assert {note for note, _, _ in quiet} == {"1"}
    saved = np.mean([exits < DEPTH for _, exits, _ in quiet])
    assert saved > 0.5
    client.until(bright=True, most=2000, safe=True)
    for _ in range(40):
        note, exits, agrees = client.ask(bright=True)
        assert note == "safe"
        assert (exits == DEPTH).all()
        assert agrees.all()
    client.until(bright=False, most=30_000, safe=False)
    back = [client.ask(bright=False) for _ in range(40)]
    assert np.mean([exits < DEPTH for _, exits, _ in back]) > 0.7 * saved
    assert np.mean([agrees for _, _, agrees in back]) > 1 - 2 * world.EPSILON
    assert Versions(folder, chain=world.bundle().chain).load_current().bundle.certificate.certified
    page = parts.metrics.page().decode()
    for line in ('state{model="gati",state="open"} 1.0', 'recovery_failures_total{model="gati"} 0.0'):
        assert f"gati_adaptation_{line}" in page, page
    families = {family.name: family for family in text_string_to_metric_families(page)}
    documented = set(re.findall(r"^    (gati_\w+)", gauges.__doc__ or "", re.MULTILINE))
    assert {name.removesuffix("_total") for name in documented} == {n for n in families if "adaptation" in n}
    events = {sample.labels["kind"]: sample.value for sample in families["gati_adaptation_events"].samples}
    assert events.keys() == set(EVENT_KINDS)
    assert (events["alarm"], events["swap"], events["paused"]) == (1, 1, 0)


# Swaps


class Swapping:
    """A server of three versions, which notes by whom every step of a request is dispatched."""

    def __init__(self, bundle):
        self.bundle = certified_only(bundle)
        first, selectors = served_by(self.bundle), [c.params["selector"] for c in self.bundle.caches]
        turned = [jax.tree.map(lambda leaf: -leaf, selector) for selector in selectors]
        other = tuple(
            dataclasses.replace(c, params={**c.params, "selector": selector})
            for c, selector in zip(self.bundle.caches, turned, strict=True)
        )
        self.versions = [first, Served(other, -first.thresholds), first.closed()]
        sources = routes.load(self.bundle)
        runner = JaxRunner(sources, capacity=32, buckets=(1, 4))
        self.under, self._dispatch = collections.defaultdict[object, list[int]](list), runner.dispatch
        runner.dispatch = self._noting
        self.engine, self._prepare = Engine(runner), swapper(runner, sources[0])
        self.serving = self.swaps = 0

    def _noting(self, step):
        for job in step.jobs:
            self.under[job.mark].append(self.serving)
        return self._dispatch(step)

    def swap(self):
        number = (self.swaps + 1) % len(self.versions)
        swap = self._prepare(self.versions[number])

        def work():
            swap()
            self.serving = number

        self.engine.between_steps(work).result(PATIENCE)
        self.swaps += 1


def test_a_swap_under_load_loses_no_request_and_each_is_answered_by_what_was_served(residual):
    server, images = Swapping(residual), pixels(60, 9)
    tables = [gati_jax.replay(server.bundle.chain, version.caches, images) for version in server.versions]
    stop = threading.Event()

    def swapping():
        while not stop.is_set():
            server.swap()

    server.engine.start()
    thread = threading.Thread(target=swapping)
    thread.start()
    futures = []
    while server.swaps < 30 or len(futures) < 1500:
        i = len(futures)
        try:
            futures += server.engine.submit(images[[i % 60, (i + 1) % 60]], route=0, marks=[i, i + 1])
        except OverloadedError:
            results(futures[-8:])
    answers = results(futures)
    stop.set()
    thread.join(PATIENCE)
    assert server.engine.stop(PATIENCE)
    assert any(len(set(path)) > 1 for path in server.under.values()), "some were on their way"
    for mark, answer in enumerate(answers):
        path, row = server.under[mark], mark % 60
        hits = [
            (server.bundle.plan.sites[stage], int(tables[version].classes[stage, row]))
            for stage, version in enumerate(path[:2])
            if tables[version].scores[stage, row] >= server.versions[version].thresholds[stage]
        ]
        assert (answer.exit, answer.class_index) == (hits[0] if hits else (2, int(tables[0].answers[row])))


# Requests


def test_repeats_get_the_base_s_answer_from_the_exact_cache(start):
    one = start()
    images = world.images(20, 5)
    results(one.submit(images, route=0))
    second = results(one.submit(images, route=0))  # their second coming: the base is asked
    settled(one)
    third = results(one.submit(images, route=0))
    assert {answer.exit for answer in second} <= {DEPTH, EXACT}
    assert [answer.exit for answer in third] == [EXACT] * 20
    assert right(images, [answer.class_index for answer in third]).all()
    assert right(images, [int(answer.logits.argmax()) for answer in third]).all()
    assert one.cache_answers["exact"] >= 20
    mixed = np.concatenate([images[:3], world.images(3, 6), images[3:5]])
    exits = [answer.exit for answer in results(one.submit(mixed, route=0))]
    assert [exit_ == EXACT for exit_ in exits] == [True] * 3 + [False] * 3 + [True] * 2
    assert one.read(lambda controller: controller.request_log.count) == 68


def test_other_routes_prepared_inputs_and_what_is_no_traffic_pass_it_by(start):
    one = start()
    images = world.images(8, 5)
    assert {answer.exit for answer in results(one.submit(images, route=1))} == {DEPTH}
    prepared = np.asarray(world.bundle().chain.prepare(images))
    assert len(results(one.submit(prepared, route=0))) == 8
    assert len(results(one.submit(images, route=0, is_traffic=False))) == 8
    assert one.read(lambda controller: controller.monitor.watched) == 0
    assert one.read(lambda controller: controller.request_log.count) == 0
    assert (one.notes(1), one.notes(0)) == ({}, {"adaptation": "unwatched"}), "no version: no monitor has seen them"


def test_caches_not_certified_for_the_promise_begin_closed(start):
    tight = dataclasses.replace(QUIET, monitor=MonitorConfig(epsilon=world.EPSILON / 10, drift=False))
    one = start(tight)
    images = world.images(16, 5)
    answers = results(one.submit(images, route=0))
    assert (one.state, one.notes(0)) == ("safe", {"adaptation": "safe"})
    assert {answer.exit for answer in answers} == {DEPTH}
    assert {a.exit for a in results(one.submit(np.asarray(world.bundle().chain.prepare(images)), route=0))} == {DEPTH}


def test_requests_that_are_never_answered_hold_none_back(start):
    one = start(capacity=16)
    gate = threading.Event()
    one.engine.between_steps(lambda: gate.wait(PATIENCE) and None)
    first = one.submit(world.images(9, 5), route=0)
    with pytest.raises(OverloadedError):
        one.submit(world.images(8, 5), route=0)
    with pytest.raises(ValueError, match="at most 16"):
        one.submit(world.images(17, 5), route=0)
    (late,) = one.submit(world.images(1, 6), route=0, deadline=0.0)
    gate.set()
    with pytest.raises(DeadlineError):
        late.result(PATIENCE)
    assert len(results(first)) == 9
    settled(one)
    for future in one.submit(world.images(8, 7), route=0):
        future.cancel()
    results(one.submit(world.images(4, 8), route=0))
    assert one.engine.stop(PATIENCE)
    assert one.read(lambda controller: len(controller._waiting)) == 0


def test_where_adaptation_fails_the_base_answers(start, caplog):
    one = start()
    images = world.images(8, 5)
    results(one.submit(images, route=0))
    one.controller.monitor = None  # a bug
    answers = results(one.submit(images + 1, route=0))
    assert (one.failed, one.state) == (True, "failed")
    assert {answer.exit for answer in answers} == {DEPTH}
    assert "adaptation has failed" in caplog.text


def test_a_swap_that_fails_is_said_and_the_base_answers(start, caplog):
    """The base answered, and nothing said why."""

    def prepare(_):
        def swap():
            raise MemoryError("no room")

        return swap

    one = start()
    one._prepare = prepare
    one.read(lambda controller: controller.adopt(controller.served, "the same once more"))
    settled(one)
    assert (one.failed, one.state) == (True, "failed")
    assert "no room" in caplog.text
    assert {answer.exit for answer in results(one.submit(world.images(8, 5), route=0))} == {DEPTH}


def test_every_hit_is_compared_with_the_base_where_the_monitor_shadows_all(start):
    one = start()
    one.read(lambda controller: controller.monitor.shadow_all(on=True))
    images = world.images(64, 5)
    answers = results(one.submit(images[:32], route=0)) + results(one.submit(images[32:], route=0))
    hits = [answer for answer in answers if answer.exit < DEPTH]
    settled(one)
    wrong = (~right(images, [answer.class_index for answer in answers])).sum()
    report = one.read(lambda controller: controller.monitor.report)
    assert report.requests == 64
    assert sum(report.shadows.values()) == len(hits) > 10
    assert report.disagreements == wrong
    assert one.statistics().shadowed == len(hits)


@pytest.fixture
def nearest(start):
    """An engine whose nearest cache answers everything like these images; every hit is shadowed."""

    def started(images, **options):
        config = dataclasses.replace(QUIET, exact=None, nearest=NearestCacheConfig(cells=4, capacity=50))
        one = start(config, **options)
        one.read(lambda controller: controller.monitor.shadow_all(on=True))
        results(one.submit(images, route=0))
        settled(one)
        one.controller.input_cache.threshold = -math.inf
        return one

    return started


def test_answers_of_the_nearest_cache_are_shadowed(nearest, monkeypatch):
    """A request at once; each answer is compared with the base's by a shadow job."""
    asked, ask = [], NearestCache.ask

    def noting(cache, keys):
        asked.append((len(keys), one._lock.locked()))
        return ask(cache, keys)

    images = world.images(8, 5)
    one = nearest(images)
    monkeypatch.setattr(NearestCache, "ask", noting)
    answers = results(one.submit(images, route=0))
    settled(one)
    assert asked == [(8, False)]  # without the lock
    assert {answer.exit for answer in answers} == {NEAREST}
    report = one.read(lambda controller: controller.monitor.report)
    assert (report.shadows[NEAREST], report.requests, one.cache_answers["nearest"]) == (8, 16, 8)


def test_the_nearest_cache_answers_only_where_its_shadow_has_a_place(nearest):
    """Under overload its requests are refused, whatever their coins say; none is answered that was not comparable."""
    images, gate = world.images(8, 5), threading.Event()
    one = nearest(images, capacity=16)
    one.engine.between_steps(lambda: gate.wait(PATIENCE) and None)
    answers = results(one.submit(images, route=0))  # at once; their shadows wait
    for q in (1.0, 1e-9):
        one.read(lambda controller, q=q: setattr(controller.monitor, "q", q))
        with pytest.raises(OverloadedError):
            one.submit(world.images(9, 6), route=0)
        with pytest.raises(ValueError, match="at most 16"):
            one.submit(world.images(17, 6), route=0)
    prepared = np.asarray(world.bundle().chain.prepare(images))
    held = one.submit(prepared, route=0)
    with pytest.raises(OverloadedError):
        one.submit(images[:1], route=0)
    gate.set()
    results(held)
    settled(one)
    assert {answer.exit for answer in answers} == {NEAREST}
    report = one.read(lambda controller: controller.monitor.report)
    assert (report.shadows[NEAREST], report.requests, report.lost) == (8, 16, 0)


def test_shadows_lost_in_a_step_count_as_wrong_but_not_those_given_up_at_a_stop(nearest):
    images = world.images(8, 5)
    one = nearest(images)
    runner, gate = one.engine._loop.runner, threading.Event()
    dispatch = runner.dispatch
    one.engine.between_steps(lambda: setattr(runner, "dispatch", lambda _: 1 / 0)).result(PATIENCE)
    results(one.submit(images[:1], route=0))
    settled(one)
    assert one.read(lambda controller: controller.monitor.report.lost) == 1
    one.engine.between_steps(lambda: setattr(runner, "dispatch", dispatch)).result(PATIENCE)
    watched = one.read(lambda controller: controller.monitor.watched)
    one.engine.between_steps(lambda: gate.wait(PATIENCE) and None)
    results(one.submit(images, route=0))
    threading.Timer(0.1, gate.set).start()
    assert one.stop(PATIENCE)
    assert one.read(lambda controller: (controller.monitor.report.lost, controller.monitor.watched)) == (1, watched)
