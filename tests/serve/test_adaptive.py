"""Adaptation in the server: how it starts, a drift and back over HTTP, swaps under load, lost requests, the worker."""

import collections
import dataclasses
import logging
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

import gati_jax
from gati_jax import InputError
from gati_jax.adaptation import (
    EVENT_KINDS,
    EXACT,
    NEAREST,
    Alarm,
    ControllerConfig,
    ExactCacheConfig,
    MonitorConfig,
    NearestCache,
    NearestCacheConfig,
    Observation,
    Recovery,
    Served,
    served_by,
)
from gati_jax.bundle import Versions, save_bundle
from gati_jax.bundle.record import certified_only
from gati_jax.pytrees import tree_digest
from serve import adaptive, assemble
from serve.adaptive import gauges
from serve.adaptive.build import swapper
from serve.adaptive.worker import Throttle, Worker
from serve.engine import routes
from serve.engine.engine import Engine
from serve.engine.records import DeadlineError, OverloadedError
from serve.engine.runner import JaxRunner
from serve.metrics import Metrics
from serve.protocol.model import Tally
from serve.settings import Settings
from tests.adaptation import world
from tests.serve import fake
from tests.serve.fake_runner import pixels

DEPTH = 3
PATIENCE = 60
QUIET = ControllerConfig(
    monitor=MonitorConfig(epsilon=world.EPSILON, drift=False), exact=ExactCacheConfig(often=2), nearest=None
)


def build(folder, bundle=None, *, capacity=8, **options):
    options = {"config": QUIET, "observer": Metrics(Tally()), **options}
    return adaptive.build(bundle or world.bundle(), folder, capacity=capacity, **options)


# How it starts: from a folder of versions, after a kill, and with large images


def certified(*, step=None, epsilon=world.EPSILON):
    """The certified plan at an earlier step: other thresholds than those that the bundle came with."""
    bundle = certified_only(world.bundle())
    step = len(bundle.plan.path) - 2 if step is None else step
    certificate = dataclasses.replace(bundle.certificate, step=step, plan_hash=bundle.plan.hash, epsilon=epsilon)
    return dataclasses.replace(bundle, certificate=certificate)


def served(folder):
    """The thresholds that a server with this folder of versions starts with."""
    return build(folder).adapting.controller.served.thresholds.tolist()


def of(bundle):
    return served_by(bundle).thresholds.tolist()


def as_given():
    return of(certified_only(world.bundle()))


def test_without_versions_the_bundle_is_served_as_it_was_given(tmp_path):
    parts = build(tmp_path)
    assert parts.adapting.controller.served.thresholds.tolist() == as_given()
    assert [source.name for source in parts.sources] == ["default", "base"]
    assert parts.sources[0].epsilon == world.EPSILON
    assert not list(tmp_path.iterdir())


def test_the_current_version_is_served(tmp_path):
    saved = certified()
    Versions(tmp_path, chain=saved.chain).save(saved)
    parts = build(tmp_path)
    assert served(tmp_path) == of(saved) != as_given()
    np.testing.assert_array_equal(parts.sources[0].cascade.thresholds, served_by(saved).thresholds)
    assert parts.adapting.controller.monitor.version == 2


def test_a_version_that_does_not_fit_is_not_served(tmp_path, caplog):
    other = certified()
    chain = dataclasses.replace(other.chain, params=[np.ones((), np.float32), *other.chain.params[1:]])
    moved = dataclasses.replace(other, chain=chain)
    source = dataclasses.replace(moved.plan.source, base=str(tree_digest(chain.params)), logits=())
    plan = dataclasses.replace(moved.plan, source=source)
    certificate = dataclasses.replace(moved.certificate, plan_hash=plan.hash)
    Versions(tmp_path / "base", chain=chain).save(dataclasses.replace(moved, plan=plan, certificate=certificate))
    assert served(tmp_path / "base") == as_given()
    assert "a version is not served" in caplog.text
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "versions.json").write_text('{"history": [1], "newest": 1}')
    assert served(tmp_path / "damaged") == as_given()
    assert "served as it was given" in caplog.text


def test_a_promise_that_nothing_certifies_has_to_be_named(tmp_path):
    bundle = world.bundle()
    none = dataclasses.replace(bundle, certificate=dataclasses.replace(bundle.certificate, step=-1))
    with pytest.raises(InputError, match="--adapt-epsilon"):
        build(tmp_path, none, config=None)
    assert build(tmp_path, none, config=None, epsilon=0.1).adapting.state == "safe"


@pytest.mark.parametrize(("side", "rows"), [(224, (1716, 858)), (448, None)])
def test_bundles_of_large_images_are_served(tmp_path, caplog, side, rows):
    """The log keeps fewer requests, so that its images fit; where a refit finds too few, there are none."""
    caplog.set_level(logging.WARNING)
    small = world.bundle()
    spec = jax.ShapeDtypeStruct((side, side, 3), np.dtype("float32"))
    large = dataclasses.replace(small, chain=dataclasses.replace(small.chain, input_spec=spec))
    parts = build(tmp_path, large, config=None)
    assert parts.adapting.request_log.capacity == 512 * 2**20 // (side * side * 3)
    assert isinstance(parts.worker.recovery, Recovery)
    assert parts.worker.recovery.rows == rows
    said = [record.getMessage() for record in caplog.records if "no refits" in record.getMessage()]
    assert ["--adapt-without refit" in line for line in said] == [True] * (rows is None)
    caplog.clear()
    build(tmp_path, large, config=None, without=("refit",))
    assert "no refits" not in caplog.text


KILLED = """
import os, signal, sys
from pathlib import Path
from gati_jax import load_bundle
from gati_jax.bundle import Versions, versions
from tests.adaptation.world import chain

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def save_half(path, *args, real=versions.save_bundle, **kwargs):
    real(path, *args, **kwargs)
    (path / "certificates.json").unlink()
    kill()

def update(folder, where):
    bundle = load_bundle(folder / "next", chain=chain())
    if where == "half":
        versions.save_bundle = save_half
    elif where == "saved":
        Versions._update = kill
    elif where == "entered":
        Versions._prune = kill
    Versions(folder / where, chain=chain()).save(bundle)

for where in sys.argv[2:]:  # one process each, which nothing but the fork slows down: JAX has not started here yet
    if not (child := os.fork()):
        update(Path(sys.argv[1]), where)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, where
"""


def test_a_server_killed_in_an_update_resumes_the_last_good_version(tmp_path):
    """Half a version written; written whole, but not entered; entered, but the old ones not deleted."""
    old, new = certified(step=1), certified()
    save_bundle(tmp_path / "next", new.chain, new.caches, new.plan, new.certificate, costs=new.costs)
    cases = {"half": old, "saved": old, "entered": new}
    for where in cases:
        Versions(tmp_path / where, chain=old.chain).save(old)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), *cases], check=True, cwd=root, env=environment)
    for where, expected in cases.items():
        assert served(tmp_path / where) == of(expected), where
        Versions(tmp_path / where, chain=new.chain).save(new)
        assert served(tmp_path / where) == of(new), where


# Running


def right(images, classes):
    """Whether these are the base's answers; at a tie, either is."""
    chain = world.bundle().chain
    logits = np.asarray(chain(chain.prepare(images)))
    return (logits.argmax(-1) == classes) | (np.abs(logits[:, 0] - logits[:, 1]) < 1e-4)


@pytest.fixture
def start(tmp_path):
    """Start an adaptive engine without its worker."""
    engines = []

    def started(config=QUIET, *, capacity=64):
        metrics = Metrics(Tally())
        one = build(tmp_path, config=config, capacity=capacity, observer=metrics)
        runner = JaxRunner(one.sources, capacity=capacity, buckets=(1, 4))
        engine = Engine(runner, observer=one.adapting, shadow=one.adapting.shadow)
        metrics._routes = engine.routes
        one.adapting.serve(engine, swapper(runner, one.sources[0]))
        engine.start()
        engines.append(engine)
        return one.adapting

    yield started
    for engine in engines:
        assert engine.stop(PATIENCE)


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
    monkeypatch.setattr(assemble.gati_jax, "load_bundle", lambda _: world.bundle())
    monkeypatch.setattr(assemble, "version_of", lambda _: "v")
    settings = Settings(bundle=tmp_path / "bundle", capacity=64, adapt=True, adapt_share=0.9, adapt_without=("refit",))
    parts = assemble.assemble(settings)
    backend = parts.start()
    parts.service.warmed_up(backend)
    with fake.sockets(parts.service, parts.metrics, limit=2**20) as ports:
        yield parts, ports[0], settings.versions
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
    for line in ('state{state="open"} 1.0', "recovery_failures_total 0.0"):
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


def test_other_routes_and_prepared_inputs_pass_it_by(start):
    one = start()
    images = world.images(8, 5)
    assert {answer.exit for answer in results(one.submit(images, route=1))} == {DEPTH}
    prepared = np.asarray(world.bundle().chain.prepare(images))
    assert len(results(one.submit(prepared, route=0))) == 8
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


def test_answers_of_the_nearest_cache_are_shadowed(start, monkeypatch):
    """It answers everything, a request at once; each answer is compared with the base's by a shadow job."""
    one = start(dataclasses.replace(QUIET, exact=None, nearest=NearestCacheConfig(cells=4, capacity=50)))
    asked, ask = [], NearestCache.ask

    def noting(cache, keys):
        asked.append((len(keys), one._lock.locked()))
        return ask(cache, keys)

    monkeypatch.setattr(NearestCache, "ask", noting)
    images = world.images(8, 5)
    one.read(lambda controller: controller.monitor.shadow_all(on=True))
    results(one.submit(images, route=0))
    settled(one)
    one.controller.input_cache.threshold = -math.inf
    answers = results(one.submit(images, route=0))
    settled(one)
    assert asked == [(8, False)] * 2  # without the lock
    assert {answer.exit for answer in answers} == {NEAREST}
    report = one.read(lambda controller: controller.monitor.report)
    assert (report.shadows[NEAREST], report.requests, one.cache_answers["nearest"]) == (8, 16, 8)


def test_a_stored_point_answers_only_where_its_shadow_has_a_place(start):
    """Under overload its requests are refused, whatever their coins say; none is answered that was not comparable."""
    one = start(dataclasses.replace(QUIET, exact=None, nearest=NearestCacheConfig(cells=4, capacity=50)), capacity=16)
    images = world.images(8, 5)
    one.read(lambda controller: controller.monitor.shadow_all(on=True))
    results(one.submit(images, route=0))
    settled(one)
    one.controller.input_cache.threshold = -math.inf
    gate = threading.Event()
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


def test_shadows_lost_in_a_step_count_as_wrong_but_not_those_given_up_at_a_stop(start):
    one = start(dataclasses.replace(QUIET, exact=None, nearest=NearestCacheConfig(cells=4, capacity=50)))
    images = world.images(8, 5)
    one.read(lambda controller: controller.monitor.shadow_all(on=True))
    results(one.submit(images, route=0))
    settled(one)
    one.controller.input_cache.threshold = -math.inf
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


# Restarts


def alarmed(parts):
    """Have every cache closed by an alarm."""
    controller = parts.adapting.controller
    parts.adapting.resume(lambda _: controller.on_alarm(Alarm(tuple(range(DEPTH)), 100.0, controller.monitor.version)))


def test_an_alarm_and_its_delta_outlive_the_server(tmp_path):
    for version in (2, 2, 2):
        parts = build(tmp_path)
        controller = parts.adapting.controller
        if version > controller.monitor.version:
            assert controller.served.is_open
            alarmed(parts)
        assert not controller.served.is_open
        assert (controller.monitor.version, controller.closed_at) == (version, 0)
    assert (tmp_path / "monitor.json").stat().st_size < 4096
    assert as_given() == of(certified_only(world.bundle()))


def test_evidence_outlives_the_server(tmp_path):
    miss = Observation(DEPTH, math.inf, 0, 1.0, 0)
    wrong = Observation(1, 2.0, 0, 1.0, 1)
    for number in range(20):
        parts = build(tmp_path)
        monitor = parts.adapting.controller.monitor
        assert (monitor.version, monitor.watched, monitor.report.disagreements) == (1, 50 * number, number)
        for observation in [miss] * 49 + [wrong]:
            monitor.watch(observation)
        parts.adapting.keep()


def test_a_version_whose_alarm_has_fired_is_withdrawn(tmp_path):
    """Loaded at the start, closed by an alarm; the server ends before its worker has done anything, or after."""
    saved = certified()
    versions = Versions(tmp_path, chain=saved.chain)
    number = versions.save(saved)
    assert build(tmp_path).adapting.controller.served.is_open
    parts = build(tmp_path)
    assert parts.adapting.controller.served.is_open
    alarmed(parts)
    parts = build(tmp_path)
    assert (parts.adapting.state, versions.history) == ("safe", (number,))
    parts.worker.recovery.work()
    assert versions.history == ()
    parts = build(tmp_path)
    assert (parts.adapting.state, parts.adapting.controller.number) == ("safe", 0), "nor the bundle, before a trial"
    versions.save(saved)  # as a trial does, the server being killed before it could serve it
    parts = build(tmp_path)
    assert (parts.adapting.state, parts.adapting.controller.monitor.version) == ("open", 4)


DAMAGES = {
    "empty": lambda _: b"", "no JSON": lambda text: text[:-9], "not UTF-8": lambda _: b"\xff" * 99,
    "large": lambda text: text + b" " * 2**21, "deep": lambda _: b"[" * 100_000,
    "another field": lambda text: text.replace(b'"number"', b'"nombre"'),
    "no number": lambda text: text.replace(b'"watched": 0', b'"watched": NaN'),
    "another bundle": lambda text: text.replace(b'"bundle": "', b'"bundle": "a'),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_trusted_begins_closed_and_with_fresh_numbers(tmp_path, caplog, damage):
    build(tmp_path).adapting.keep()
    file = tmp_path / "monitor.json"
    text = file.read_bytes()
    file.write_bytes(DAMAGES[damage](text))
    assert file.read_bytes() != text
    parts = build(tmp_path)
    assert parts.adapting.state == "safe"
    assert parts.adapting.controller.monitor.version > 1
    (line,) = [record for record in caplog.records if "begin closed" in record.getMessage()]
    assert len(line.why) < 500
    assert "monitor.json" in line.why
    parts.adapting.keep()
    assert build(tmp_path).adapting.state == "safe", "until a trial"


def test_another_promise_shares_delta_and_where_trials_came_before_a_missing_file_is_no_fresh_start(tmp_path):
    build(tmp_path).adapting.keep()
    wide = dataclasses.replace(QUIET, monitor=MonitorConfig(epsilon=2 * world.EPSILON, drift=False))
    controller = build(tmp_path, config=wide).adapting.controller
    assert (controller.monitor.version, controller.served.is_open) == (2, True)
    (tmp_path / "monitor.json").unlink()
    controller = build(tmp_path).adapting.controller
    assert controller.monitor.version > DEPTH
    assert not controller.served.is_open


def test_a_folder_that_cannot_be_written_is_said(tmp_path, caplog):
    parts = build(tmp_path)
    (tmp_path / "monitor.json").mkdir()
    alarmed(parts)
    assert "a restart will forget" in caplog.text
    assert not parts.adapting.failed


# The worker


def test_the_worker_keeps_what_a_restart_needs(monkeypatch):
    monkeypatch.setattr("serve.adaptive.worker._KEEP", 0.0)
    kept = threading.Event()
    worker = Worker(Job(), 0.9, kept.set)
    worker.start()
    assert kept.wait(PATIENCE)
    assert worker.stop(PATIENCE)


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


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_no_such_share(share):
    with pytest.raises(InputError, match="share"):
        Throttle(share)


class Job:
    """Work that can be counted; the first pieces fail."""

    def __init__(self, failing=0):
        self.failing, self.done, self.paused = failing, 0, threading.Event()

    def work(self, pause=None):
        if self.failing:
            self.failing -= 1
            raise RuntimeError("a bug")
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
    assert 0 < worker.throttle.worked < 0.75 * (time.monotonic() - began)


def test_a_long_pause_ends_when_the_server_stops():
    assert Worker(Job(), 0.5).stop(0.1), "it never started"
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
