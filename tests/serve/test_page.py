"""The page at /: its files, the stream of what happens, its box, and what it must not do."""

import asyncio
import contextlib
import dataclasses
import functools
import http.client
import json
import math
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import gati_jax
import serve.page
from serve import assemble
from serve.page import routes, snapshot
from serve.page.feed import Feed, Feeds
from serve.protocol import codec
from serve.protocol.messages import LoadError
from serve.settings import Settings, parse
from tests.serve import fake
from tests.serve.fake_runner import pixels
from tests.serve.test_process import Process
from tests.serve.test_repository import Folder, Shop
from tests.serve.transports import ask, tensor

STATIC = Path(serve.page.__file__).with_name("static")
BODY = {"inputs": [tensor()]}
GOOD = {"authorization": "Bearer secret"}


def events(port, count, headers=GOOD, path=routes.STREAM):
    """The first events of a stream: names and data."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    client.request("GET", path, headers=headers)
    response, found = client.getresponse(), []
    assert (response.status, response.getheader("content-type")) == (200, "text/event-stream; charset=utf-8")
    while len(found) < count:
        name, data, end = (response.readline().decode() for _ in range(3))
        assert end == "\n"
        found.append((name.removeprefix("event: ").strip(), json.loads(data.removeprefix("data: "))))
    client.close()
    return found


# Files


def test_the_page_loads_nothing_from_elsewhere_and_runs_nothing_that_is_written_into_it(front):
    response = ask(front, "GET", "/")
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert {policy[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    named = re.findall(r'(?:src|href)="([^"]+)"', response.text)
    assert {name for name in named if name.startswith("page/")} >= {"page/main.js", "page/page.css", "page/uplot.js"}
    for name in named:
        assert ask(front, "GET", f"/{name}").status_code == 200, name
    assert "<style" not in response.text
    assert not re.search(r"\son\w+=|<script>|style=", response.text)
    for file in STATIC.glob("*.js"):
        text = file.read_text()
        assert file.name == "uplot.js" or not re.search(r"https?://|innerHTML|eval\(", text), file
        for module in re.findall(r'from "\./([^"]+)"', text):
            assert ask(front, "GET", f"/page/{module}").headers["content-type"].startswith("text/javascript")


def test_uplot_is_shipped_with_its_licence_and_its_version_is_named():
    assert "v1.6.32" in (STATIC / "uplot.js").read_text()[:100]
    assert "1.6.32" in (serve.page.__doc__ or "")
    assert (STATIC / "uplot.LICENSE.txt").read_text().startswith("The MIT License")


def test_without_the_page_its_addresses_are_unknown():
    assert parse(["--bundle", "b", "--no-page"], {}).no_page
    front = fake.Front(with_page=False)
    for path in ("/", "/page/main.js", routes.STREAM):
        assert ask(front, "GET", path).status_code == 404
    assert ask(front, path=routes.COMPARE, json=BODY).status_code == 404
    assert ask(front, json=BODY).status_code == 200


def test_the_files_need_no_token_and_all_that_is_of_the_server_does():
    front = fake.Front(token="secret")
    assert ask(front, "GET", "/").status_code == ask(front, "HEAD", "/page/main.js").status_code == 200
    for how in ({}, {"authorization": "Bearer wrong"}):
        assert ask(front, "GET", routes.STREAM, headers=how).status_code == 401
        assert ask(front, path=routes.COMPARE, json=BODY, headers=how).status_code == 401
    assert not front.engine.calls
    assert ask(front, path=routes.COMPARE, json=BODY, headers=GOOD).status_code == 200


# The stream


def test_the_stream_says_what_metrics_say():
    front = fake.Front(token="secret")
    with front.sockets() as (port, _):
        for values in ((0, 1), (2,), (3, 4, 5)):
            assert ask(front, json={"inputs": [tensor(values)]}, headers=GOOD).status_code == 200
        ask(front, content=b"{", headers=GOOD)
        (first, about), (second, now) = events(port, 2)
        text = ask(front, "GET", "/metrics", headers=GOOD).text
    got = {
        (s.name, *sorted(s.labels.items())): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }

    def total(name, **labels):
        return sum(
            value for (found, *its), value in got.items() if found == name and labels.items() <= dict(its).items()
        )

    assert (first, second) == ("about", "now")
    assert [(plan["name"], plan["epsilon"]) for plan in about["plans"]] == [
        ("tight", 0.01),
        ("loose", 0.05),
        ("base", 0),
    ]
    assert (about["model"], about["version"], about["depth"], about["default"]) == ("gati", "v7", 4, "tight")
    assert now["left"] == {str(exit_): total("gati_left_total", exit=str(exit_)) for exit_ in fake.EXITS}
    assert sum(now["left"].values()) == 6
    assert now["by_plan"]["tight"] == total("gati_left_total", plan="tight") == 6
    bounds = [math.inf if le is None else le for le in now["latency"]["le"]]
    assert bounds == sorted(bounds)
    for le, count in zip(bounds, now["latency"]["counts"], strict=True):
        assert count == total("gati_latency_seconds_bucket", le="+Inf" if le == math.inf else str(le))
    assert now["refused"] == {"invalid": total("gati_refused_total", reason="invalid")} == {"invalid": 1}
    assert now["queue_depth"]["2"] == total("gati_queue_depth", stage="2") == 5
    assert (now["used"], now["admitted"]) == (3, 16)
    assert (now["ready"], now["stopping"], now["adaptation"]) == (True, False, None)


def test_a_server_that_warms_up_says_so_and_then_what_it_serves():
    front = fake.Front(ready=False)
    with (
        front.sockets() as (port, _),
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as c,
    ):
        c.request("GET", routes.STREAM)
        response, seen = c.getresponse(), []
        while len(seen) < 4:
            if (line := response.readline()).startswith(b"data"):
                seen.append(json.loads(line[6:]))
            if len(seen) == 2 and not front.service.ready:
                front.warm_up()
    assert [one.get("depth", one.get("ready")) for one in seen] == [0, False, 4, True]


def test_of_several_models_the_page_is_of_the_one_that_it_names():
    shop = Shop(Folder("one"), Folder("two"))
    with shop.sockets() as (port, _):
        for path, name in ((routes.STREAM, "one"), (f"{routes.STREAM}?model=two", "two")):
            (kind, facts), (_, now) = events(port, 2, path=path)
            assert (kind, facts["model"], now["model"], now["ready"]) == ("about", name, name, True)
            assert now["models"] == {"one": "READY", "two": "READY"}
        address = f"http://127.0.0.1:{port}{routes.COMPARE}?model="
        request = urllib.request.Request(address + "two", json.dumps(BODY).encode(), GOOD)
        with urllib.request.urlopen(request) as response:
            assert response.status == 200
        calls = [len(shop.folders[name].engine.calls) for name in ("one", "two")]
        assert calls == [0, 2]  # the plan's answer, and the base's
        request = urllib.request.Request(address + "three", json.dumps(BODY).encode(), GOOD)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(request)


def test_a_model_that_could_not_be_loaded_says_why_and_names_the_others():
    shop = Shop(Folder("good"), Folder("bad", broken="bundle: plan.json is missing"))
    with shop.sockets() as (port, _):
        ((kind, now),) = events(port, 1, path=f"{routes.STREAM}?model=bad")
        assert (kind, now["model"], now["ready"], now["reason"]) == (
            "now",
            "bad",
            False,
            "bundle: plan.json is missing",
        )
        assert now["models"] == {"good": "READY", "bad": "UNAVAILABLE"}
        shop.folders["good"].broken = "bundle: no such folder"
        with pytest.raises(LoadError):  # what answered before goes on
            asyncio.run(shop.models.load("good"))
        now = events(port, 2)[1][1]
        assert (now["ready"], now["reason"]) == (True, "bundle: no such folder")


def test_the_stream_says_when_its_process_began(front):
    before = time.time()
    again = fake.Front()
    for one in (front, again):
        with one.sockets() as (port, _):
            started = events(port, 2, {})[1][1]["started"]
            assert (started >= before) == (one is again)
            assert started <= time.time()


@pytest.mark.parametrize(
    ("scale", "levels"),
    [(1 / 16, 16), (1 / 255, 255), (1 / 256, 255), (1 / 127.5, 255), (1, 255), (1.0, 255), (-1.0, 255)],
)
def test_the_largest_value_of_a_pixel_follows_from_the_scale(scale, levels):
    front = fake.Front()
    normalization = {"mean": (0.5,), "std": (0.5,), "scale": scale}
    front.entry.loaded = front.loaded._replace(model=dataclasses.replace(fake.MODEL, normalization=normalization))
    facts = snapshot.describe(front.entry, most_bytes=4096)
    assert (facts.levels, facts.most_bytes) == (levels, 4096)


def test_a_stream_ends_when_the_server_stops():
    """Otherwise it would be a request in flight, for which the stop waits until the drain is over."""
    with Process("--grace", "0", "--drain", "60") as server:
        server.release("warm", "answer")
        server.until("ready")
        with urllib.request.urlopen(server.http + routes.STREAM, timeout=30) as stream:
            assert stream.readline() == b"event: about\n"
            server.child.send_signal(signal.SIGTERM)
            assert b'"stopping":true' in stream.read()
        assert server.child.wait(20) == 0


def test_too_many_streams_are_refused_and_one_that_is_not_read_is_cut_off(monkeypatch):
    def feed(compute, closing):  # a comment of a megabyte after each item soon fills what the system buffers
        return Feed(lambda: compute() + b":" + bytes(2**20) + b"\n\n", closing, period=0.001)

    monkeypatch.setattr(routes, "Feed", feed)
    monkeypatch.setattr(routes, "Feeds", functools.partial(Feeds, most=1))
    front = fake.Front(limits=dataclasses.replace(fake.LIMITS, idle_timeout=0.3))
    with front.sockets() as (port, _):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET /page/stream HTTP/1.1\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as another:
                another.request("GET", routes.STREAM)
                refused = another.getresponse()
                assert (refused.status, json.load(refused)["error"][:5]) == (429, "page:")
            patience = time.monotonic() + 60
            while in_flight(front):
                assert time.monotonic() < patience
                time.sleep(0.05)
        assert len(events(port, 2, {})) == 2  # the place is free again


def in_flight(front):
    return 'gati_requests_in_flight{protocol="http"} 1.0' in front.metrics.page().decode()


# The box


def test_an_input_is_answered_with_the_base_beside_it(front):
    response = ask(front, path=routes.COMPARE, json={"inputs": [tensor((4,))]}, headers={"x-request-id": "me"})
    assert [(call["route"], call["request_id"]) for call in front.engine.calls] == [(0, "me"), (2, "me")]
    found = response.json()
    assert (found["plan"], found["epsilon"], found["agrees"]) == ("tight", 0.01, True)
    assert [name for _, name, _ in found["answer"]["top"]] == ["dog", "cat", "élan"]
    assert found["answer"]["top"][0][2] == pytest.approx(0.787, abs=1e-3)
    assert (front.door.images, front.door.bytes) == (0, 0)


def test_inputs_of_the_box_are_counted_apart_from_the_traffic(front):
    ask(front, json={"inputs": [tensor((4,))]})
    before = counts(front)
    ask(front, path=routes.COMPARE, json={"inputs": [tensor((4,))]})
    after = counts(front)
    assert after.pop("gati_page_images_total") == before.pop("gati_page_images_total") + 2 == 2
    assert after == before
    assert sum(after.values()) == 2  # one image, in two series


def counts(front):
    """Sums over all series of what is measured of images."""
    found = dict.fromkeys(("gati_left_total", "gati_latency_seconds_count", "gati_page_images_total"), 0.0)
    for family in text_string_to_metric_families(front.metrics.page().decode()):
        for sample in family.samples:
            if sample.name in found:
                found[sample.name] += sample.value
    return found


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": [tensor((1, 2))]}, "images: expected one, got 2"),
        ({"inputs": [tensor(shape=[1, 6])]}, "inputs[0].shape: expected [n, 2, 3, 1] with n = 1 to 8, got [1, 6]"),
        ({"inputs": [tensor(data=[1] * 5)]}, "inputs[0].data: expected 6 numbers of shape [1, 2, 3, 1], got shape [5]"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_in_one_line(front, body, message):
    response = ask(front, path=routes.COMPARE, json=body)
    assert (response.status_code, response.json()) == (400, {"error": message})
    assert not front.engine.calls


def test_the_box_has_no_way_past_the_door(front):
    limits = front.door.limits
    held = [front.door.enter() for _ in range(limits.capacity - 1)]
    response = ask(front, path=routes.COMPARE, json=BODY)
    assert (response.status_code, front.engine.calls) == (429, [])  # one place is free, and two are needed
    assert ask(front, path=routes.COMPARE, content=b"x" * 5000).status_code == 413
    for admission in held:
        front.door.leave(admission)
    front.service.close()
    assert ask(front, path=routes.COMPARE, json=BODY).status_code == 503


def test_scores_on_the_way_are_those_of_the_bundle(residual, tmp_path):
    """Beside ``replay``: every cache's score of every image, computed without the server."""
    folder = tmp_path / "bundle"
    gati_jax.save_bundle(folder, residual.chain, residual.caches, residual.plan, residual.certificate)
    settings = Settings(bundle=folder, capacity=4, program_cache="off")
    parts, images = assemble.assemble(settings), pixels(6, seed=7)
    (entry,) = parts.service.models.entries.values()
    entry.serve(*entry.start())
    replayed = gati_jax.replay(residual.chain, residual.caches, images)
    thresholds = residual.plan.thresholds(residual.certificate.step)

    async def compare(image):
        request = codec.Request(
            model="gati", version="", id="", parameters={}, outputs=[],
            inputs=[codec.Incoming("inputs[0]", "images", "UINT8", image.shape, raw=image.tobytes())],
        )  # fmt: skip
        with parts.service.admit() as admission:
            return await parts.service.compare(request, admission=admission)

    exits = set()
    for i, image in enumerate(images):
        found = asyncio.run(compare(image))
        passed = [lookup.exit for lookup in found.answer.lookups]
        exits.add(found.answer.exit)
        assert passed == [site for site in residual.plan.sites if site <= found.answer.exit]
        for lookup, scores, threshold in zip(found.answer.lookups, replayed.scores, thresholds, strict=False):
            assert lookup.score == pytest.approx(float(scores[i]), rel=1e-4)
            assert lookup.threshold == pytest.approx(float(threshold))
            assert (lookup.score >= lookup.threshold) == (lookup.exit == found.answer.exit)
        assert found.base.exit == len(residual.chain)
        assert found.base.lookups == ()
        np.testing.assert_array_equal(found.base.class_index, replayed.answers[i])
    assert len(exits) > 1
    assert entry.backend is not None
    assert entry.backend.engine.stop(60)
