"""Replicas on a Ray cluster of this machine: one address, the same answers, one killed, a bundle swapped under load."""

import collections
import contextlib
import http.client
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

import gati_jax
from gati_jax import InputError
from serve.ray import options
from serve.ray.proxy import Retryable
from tests.adaptation import world
from tests.serve.fake_runner import pixels
from tests.serve.transports import ask

ROOT = Path(__file__).parents[2]
LONG = 240.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--replicas", "0"], "--replicas: expected"),
        (["--replicas", "3", "--max-replicas", "2"], "--max-replicas: expected --replicas \\(3\\) at least, got 2"),
        (["--adapt"], "--adapt: expected it together with --adapt-without refit"),
        (["--adapt", "--adapt-without", "refit", "--overlap"], "--adapt: expected one bundle for replicas, and no"),
        (["--json"], "--json: expected a server of its own"),
        (["--replicaz", "2"], "unrecognized arguments: --replicaz"),
        (["--capacity", "none"], "--capacity: expected"),
    ],
)
def test_what_replicas_cannot_have_is_one_line(words, message):
    with pytest.raises(InputError, match=message):
        options.parse(["--bundle", "b", *words], {})


def test_options_are_of_the_cluster_and_of_each_server():
    parsed = options.parse(["--bundle", "b", "--replicas", "2", "--capacity", "8"], {"GATI_TOKEN": "t"})
    assert (parsed.ray.replicas, parsed.ray.max_replicas) == (2, None)
    assert (parsed.server.capacity, parsed.server.token) == (8, "t")


def test_a_request_that_serve_has_no_answer_for_may_be_asked_again():
    """Serve's proxy returns without a response where a replica has died."""

    async def app(scope, receive, send):
        del receive
        if scope["path"] == "/answered":
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

    front = SimpleNamespace(app=Retryable(app))
    lost, answered = ask(front, "GET", "/lost"), ask(front, "GET", "/answered")
    assert (lost.status_code, lost.headers["retry-after"]) == (503, "1")
    assert "ask again" in lost.json()["error"]
    assert (answered.status_code, answered.content) == (500, b"{}")


def replicas_of(parent, name="ServeReplica"):
    """The processes of replicas below a process, or of another actor."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text()

    def is_below(pid):
        while pid > 1 and pid != parent:
            pid = parents.get(pid, 0)
        return pid == parent

    return [pid for pid, found in names.items() if found.startswith(f"ray::{name}") and is_below(pid)]


class Load:
    """Clients that ask for the same images again and again, and count what they get."""

    def __init__(self, address, images):
        tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape), "data": images.ravel().tolist()}
        self.body = json.dumps({"inputs": [tensor]}).encode()
        self._request = urllib.request.Request(f"{address}/v2/models/gati/infer", self.body)
        self.answers, self.errors, self.classes = collections.Counter(), [], set()
        self._stop, self._lock = threading.Event(), threading.Lock()

    def __enter__(self):
        self._threads = [threading.Thread(target=self._ask) for _ in range(3)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self):
        while not self._stop.is_set():
            try:
                with urllib.request.urlopen(self._request, timeout=60) as response:
                    found = json.loads(response.read())
                with self._lock:
                    self.answers[found["model_version"]] += 1
                    self.classes.add(tuple(next(o["data"] for o in found["outputs"] if o["name"] == "class_index")))
            except urllib.error.HTTPError as error:
                with self._lock, error:
                    self.errors.append((error.code, error.headers["retry-after"], error.read().decode()))


def finishes(address, images, stop):
    """The status of a request of which a replica has half when something stops."""
    body = Load(address, images).body
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/v2/models/gati/infer")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[:100])
    time.sleep(1.0)
    stop()
    time.sleep(1.5)
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(f"{address}/v2/health/ready")
    assert refused.value.code == 404  # Serve's own: there is no application any more
    refused.value.close()
    connection.send(body[100:])
    with connection.getresponse() as response:
        response.read()
    connection.close()
    return response.status


def until(true, seconds=LONG):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def get(url):
    with urllib.request.urlopen(url, timeout=30) as response:
        return response.read().decode()


@pytest.fixture
def bundle(residual, tmp_path):
    gati_jax.save_bundle(tmp_path / "bundle", residual.chain, residual.caches, residual.plan, residual.certificate)
    return tmp_path / "bundle"


@contextlib.contextmanager
def started(bundle, log, *options):
    """A cluster of two replicas: the process and its address."""
    command = [sys.executable, "-m", "serve.ray", "--bundle", bundle, "--replicas", "2", "--cpus", "0.5"]
    port = 18000 + os.getpid() % 1000
    command += ["--http-port", port, "--program-cache", "off", "--drain", "5", *options]
    environment = {**os.environ, "RAY_raylet_start_wait_time_s": "150"}  # of a busy machine
    with (
        log.open("wb") as file,
        subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, stderr=file, stdout=file) as process,
    ):
        try:
            until(lambda: b'"listening"' in log.read_bytes() or process.poll() is not None)
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            yield process, f"http://127.0.0.1:{port}"
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.fixture
def cluster(bundle, tmp_path):
    """Two replicas of a bundle."""
    pytest.importorskip("ray")
    with started(bundle, tmp_path / "log") as found:
        yield found


@pytest.fixture
def adapting(tmp_path):
    """Two replicas of a bundle whose caches are wrong in bright light, which adapt."""
    pytest.importorskip("ray")
    one = world.bundle()
    gati_jax.save_bundle(tmp_path / "bundle", one.chain, one.caches, one.plan, one.certificate, costs=one.costs)
    adapt = ["--adapt", "--adapt-without", "refit", "exact", "nearest", "--adapt-dir", tmp_path / "versions"]
    with started(tmp_path / "bundle", tmp_path / "log", "--chain", "tests.adaptation.world:chain", *adapt) as found:
        yield found


@pytest.mark.ray
def test_replicas_answer_as_one_survive_a_kill_and_swap_without_a_loss(cluster, bundle, residual):
    process, address = cluster
    images = pixels(3, 8)
    expected = tuple(np.asarray(gati_jax.infer_batch(residual, images).class_index).tolist())
    with Load(address, images) as load:
        until(lambda: len(json.loads(get(f"{address}/replicas"))[0]["targets"]) == 2)
        until(lambda: sum(load.answers.values()) >= 40)
        assert not load.errors
        targets = json.loads(get(f"{address}/replicas"))[0]["targets"]
        for target in targets:  # each has answered some
            assert 'gati_requests_total{code="200",method="infer",protocol="http"}' in get(f"http://{target}/metrics")

        first, _ = replicas_of(process.pid)
        os.kill(first, signal.SIGKILL)
        until(lambda: len(replicas_of(process.pid)) == 2 and first not in replicas_of(process.pid))
        until(lambda: len({*json.loads(get(f"{address}/replicas"))[0]["targets"]} - {*targets}) == 1)
        assert len(load.errors) <= 3  # at most what each client had in flight
        for status, after, text in load.errors:
            assert (status, after) == (503, "1")
            assert "ask again" in json.loads(text)["error"]

        load.errors.clear()
        (old,) = load.answers
        manifest = bundle / "manifest.json"
        about = json.loads(manifest.read_text())
        about["provenance"]["created"] = "2026-01-01T00:00:00+00:00"
        manifest.with_suffix(".new").write_text(json.dumps(about))
        manifest.with_suffix(".new").replace(manifest)
        process.send_signal(signal.SIGHUP)
        until(lambda: len(load.answers) == 2)
        (new,) = load.answers.keys() - {old}

        def all_are_new():
            before = dict(load.answers)
            time.sleep(2)
            return load.answers[old] == before[old] and load.answers[new] > before[new] + 10

        until(all_are_new)
        assert not load.errors
    assert load.classes == {expected}

    assert finishes(address, images, lambda: process.send_signal(signal.SIGTERM)) == 200


class Asked(NamedTuple):
    since: float
    until: float
    note: str
    exits: set[int]


class Drifted:
    """Clients that ask for images of one kind, each with what the response says of adaptation."""

    def __init__(self, address, *, bright):
        self._url, self._bright, self._seeds = f"{address}/v2/models/gati/infer", bright, itertools.count(1000)
        self.found, self._stop = list[Asked](), threading.Event()

    def ask(self, n=16):
        images = world.images(n, next(self._seeds), bright=self._bright)
        tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape), "data": images.ravel().tolist()}
        since = time.monotonic()
        body = json.dumps({"inputs": [tensor]}).encode()
        with urllib.request.urlopen(urllib.request.Request(self._url, body), timeout=60) as response:
            answer = json.loads(response.read())
        exits = next(set(output["data"]) for output in answer["outputs"] if output["name"] == "exit")
        self.found.append(Asked(since, time.monotonic(), answer["parameters"]["adaptation"], exits))
        return self.found[-1]

    def __enter__(self):
        self._threads = [threading.Thread(target=self._run) for _ in range(3)]
        for thread in self._threads:
            thread.start()
        return self

    def _run(self):
        while not self._stop.is_set():
            self.ask()

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def metrics(address):
    """What the controller shows; empty while it is being replaced."""
    for target in json.loads(get(f"{address}/replicas"))[0]["targets"]:
        with contextlib.suppress(urllib.error.URLError):
            if "gati_adaptation_state" in (text := get(f"http://{target}/metrics")):
                return text
    return ""


@pytest.mark.ray
def test_one_alarm_closes_both_replicas_and_holds_when_the_controller_is_killed(adapting):
    process, address = adapting
    dim = Drifted(address, bright=False)
    until(lambda: any(exit_ < 3 for exit_ in dim.ask().exits))  # each begins closed, until its first step
    assert {one.note for one in dim.found} <= {"1", "safe"}
    with Drifted(address, bright=True) as bright:
        until(lambda: any(one.note == "safe" for one in bright.found))
        safe = min(one.until for one in bright.found if one.note == "safe")
        until(lambda: sum(one.since > safe for one in bright.found) >= 60)
    assert any(one.note == "1" and min(one.exits) < 3 for one in bright.found)
    after = [one for one in bright.found if one.since > safe]  # of both replicas
    assert {(one.note, *one.exits) for one in after} == {("safe", 3)}
    until(lambda: 'gati_adaptation_events_total{kind="alarm",model="gati"} 1.0' in metrics(address))
    assert 'gati_adaptation_state{model="gati",state="safe"} 1.0' in metrics(address)

    (first,) = replicas_of(process.pid, "Controller")
    os.kill(first, signal.SIGKILL)
    assert {(one.note, *one.exits) for one in (dim.ask() for _ in range(20))} == {("safe", 3)}
    until(lambda: replicas_of(process.pid, "Controller") not in ([], [first]))
    until(lambda: 'gati_adaptation_version{model="gati"} 2.0' in metrics(address))  # of the folder
    assert {(one.note, *one.exits) for one in (dim.ask() for _ in range(20))} == {("safe", 3)}
