"""Replicas on a Ray cluster of this machine: one address, the same answers, one killed, a bundle swapped under load."""

import collections
import contextlib
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

import numpy as np
import pytest

import gati_jax
from gati_jax import InputError
from serve.ray import options
from serve.ray.proxy import Retryable
from tests.serve.fake_runner import pixels
from tests.serve.transports import ask

ROOT = Path(__file__).parents[2]
LONG = 240.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--replicas", "0"], "--replicas: expected"),
        (["--replicas", "3", "--max-replicas", "2"], "--max-replicas: expected --replicas \\(3\\) at least, got 2"),
        (["--adapt"], "--adapt: expected a server of its own"),
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


def replicas_of(parent):
    """The processes of replicas below a process."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text()

    def is_below(pid):
        while pid > 1 and pid != parent:
            pid = parents.get(pid, 0)
        return pid == parent

    return [pid for pid, name in names.items() if name.startswith("ray::ServeReplica") and is_below(pid)]


class Load:
    """Clients that ask for the same images again and again, and count what they get."""

    def __init__(self, address, images):
        tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape), "data": images.ravel().tolist()}
        self._request = urllib.request.Request(
            f"{address}/v2/models/gati/infer", json.dumps({"inputs": [tensor]}).encode()
        )
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


@pytest.fixture
def cluster(bundle, tmp_path):
    """The process and its address; two replicas."""
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "serve.ray", "--bundle", bundle, "--replicas", "2", "--cpus", "0.5"]
    port = 18000 + os.getpid() % 1000
    command += ["--http-port", port, "--program-cache", "off", "--drain", "5"]
    log, environment = tmp_path / "log", {**os.environ, "RAY_raylet_start_wait_time_s": "150"}  # of a busy machine
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
