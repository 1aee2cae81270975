"""Several models in one server: each answers for itself, and they come and go without losing a request."""

import asyncio
import contextlib
import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

import gati_jax
from gati_jax import InputError
from serve.assemble import assemble
from serve.engine.records import OverloadedError
from serve.metrics import Metrics
from serve.protocol.admission import Door, Limits
from serve.protocol.backend import Backend
from serve.protocol.drain import FULL
from serve.protocol.model import Tally
from serve.protocol.repository import Entry, Loaded, Repository, Source
from serve.protocol.service import Service
from serve.settings import Settings, parse
from tests.serve import fake
from tests.serve.fake_runner import FakeClock, pixels
from tests.serve.transports import images

OPERATOR = {"authorization": "Bearer operator"}


class Folder:
    """A folder: the version in it, and the engine of what was loaded last; ``broken`` says why it cannot be."""

    def __init__(self, name, version="1", broken=""):
        self.name, self.version, self.broken = name, version, broken
        self.engine, self.loads = fake.FakeEngine(), 0

    def load(self):
        if self.broken:
            raise InputError(self.broken)
        self.engine, self.loads = fake.FakeEngine(), self.loads + 1
        engine, model = self.engine, dataclasses.replace(fake.MODEL, name=self.name, version=self.version)
        return Loaded(model, lambda: Backend(engine, fake.choose_route))


class Shop:
    """A server of such folders."""

    def __init__(self, *folders, exclusive=False):
        self.folders, self.settled = {folder.name: folder for folder in folders}, 0
        sources = {one.name: Source(one.load, lambda one=one: one.version, exclusive) for one in folders}
        entries = [Entry(name, source, Tally()) for name, source in sources.items()]
        self.models, self.metrics = Repository(entries, settle=self.settle), Metrics()
        self.service = Service(self.models, door=Door(fake.LIMITS, refused=self.metrics.refused))
        self.metrics.watch(self.service)
        asyncio.run(self.models.begin())

    def settle(self):
        self.settled += 1

    def sockets(self):
        return fake.sockets(self.service, self.metrics, token="secret", operator="operator")

    def index(self):
        return {one.name: (one.state, one.version, one.reason) for one in self.models.index()}


class Client:
    """Triton's client over either transport."""

    def __init__(self, kind, ports):
        self.module: Any = tritonclient.http if kind == "http" else tritonclient.grpc
        options = {"concurrency": 2} if kind == "http" else {}
        self.client = self.module.InferenceServerClient(f"127.0.0.1:{ports[kind == 'grpc']}", **options)
        self.kind, self.headers = kind, {"authorization": "Bearer secret"}

    def infer(self, name, value=1):
        given = self.module.InferInput("images", [1, 2, 3, 1], "UINT8").set_data_from_numpy(images(value))
        return self.client.infer(name, [given], headers=self.headers)

    def version(self, name):
        response = self.infer(name).get_response()
        return response["model_version"] if self.kind == "http" else response.model_version

    def index(self):
        found = self.client.get_model_repository_index(headers=self.headers)
        models = found if self.kind == "http" else [
            {"name": one.name, "state": one.state, "reason": one.reason, "version": one.version} for one in found.models
        ]  # fmt: skip
        return {one["name"]: (one["state"], one["version"], one["reason"]) for one in models}


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_a_model_that_cannot_be_loaded_does_not_stop_the_others_and_may_come_later(kind):
    good, bad = Folder("good"), Folder("bad", broken="bundle: plan.json is missing")
    shop = Shop(bad, good)
    with shop.sockets() as ports:
        client = Client(kind, ports)
        assert client.client.is_server_ready()
        assert client.index() == {"good": ("READY", "1", ""), "bad": ("UNAVAILABLE", "", bad.broken)}
        assert client.infer("good", 1).as_numpy("class_index").tolist() == [1]
        for name, message in (("bad", "'bad' is not loaded"), ("other", "expected one of 'bad', 'good', got 'other'")):
            with pytest.raises(InferenceServerException, match=message):
                client.infer(name)
        with pytest.raises(InferenceServerException, match=r"cannot be loaded: bundle: plan.json is missing"):
            client.client.load_model("bad", headers=OPERATOR)
        bad.broken = ""
        client.client.load_model("bad", headers=OPERATOR)
        assert client.version("bad") == "1"
        client.client.unload_model("good", headers=OPERATOR)
        assert client.index() == {"good": ("UNAVAILABLE", "", "unloaded"), "bad": ("READY", "1", "")}
        with pytest.raises(InferenceServerException, match="'good' is not loaded"):
            client.infer("good")
        page = shop.metrics.page().decode()
        assert 'gati_model_ready{model="good"} 0.0' in page
        assert 'gati_slots{model="bad",state="used"} 3.0' in page
        client.client.load_model("good", headers=OPERATOR)
        assert client.version("good") == "1"
        client.client.close()


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_only_who_has_the_repositorys_own_token_may_load(kind):
    shop = Shop(Folder("one"))
    with shop.sockets() as ports:
        client = Client(kind, ports)
        for headers in ({}, client.headers, {"authorization": "Bearer operato"}):
            for ask in (client.client.load_model, client.client.unload_model):
                with pytest.raises(InferenceServerException, match="expected 'Bearer' and the repository's token"):
                    ask("one", headers=headers)
        with pytest.raises(InferenceServerException, match="this server's token"):
            client.client.get_model_repository_index(headers=OPERATOR)
        with pytest.raises(InferenceServerException, match="parameters"):
            client.client.load_model("one", headers=OPERATOR, config='{"x": 1}')
        client.client.close()
    assert shop.folders["one"].loads == 1
    front = fake.Front()
    with front.sockets() as ports:
        client = Client(kind, ports)
        with pytest.raises(InferenceServerException, match="expected a server that has GATI_REPOSITORY_TOKEN"):
            client.client.unload_model("gati", headers={"authorization": "Bearer "})
        client.client.close()


def test_a_body_to_the_repository_is_small():
    front = fake.Front(operator="operator")
    for path in ("index", "models/gati/load", "models/gati/unload"):
        status = fake_ask(front, path, content=b"x" * 5000)
        assert (status.status_code, "4096" in status.text) == (413, True)
    assert fake_ask(front, "index", content=b'{"ready": 3}').status_code == 400
    assert fake_ask(front, "index", content=b'{"ready": true}').json()[0]["name"] == "gati"
    assert fake_ask(front, "models/other/load").status_code == 404
    front.engine.stop()


def fake_ask(front, path, **request):
    from tests.serve.transports import ask  # noqa: PLC0415 (the name is taken)

    return ask(front, path=f"/v2/repository/{path}", headers=OPERATOR, **request)


def test_what_the_old_one_has_admitted_it_answers_while_the_new_one_serves():
    folder = Folder("one")
    shop = Shop(folder)
    old, released = folder.engine, threading.Event()
    run = old._run

    def held(jobs, route):
        released.wait(30)
        run(jobs, route)

    old._run = held
    with shop.sockets() as ports:
        client, found = Client("http", ports), []
        asking = threading.Thread(target=lambda: found.append(Client("http", ports).version("one")))
        asking.start()
        assert old.submitted.wait(30)
        folder.version = "2"
        client.client.load_model("one", headers=OPERATOR)
        assert client.version("one") == "2"
        assert not found
        released.set()
        asking.join(30)
        assert found == ["1"]
        client.client.close()
    assert folder.engine is not old


def test_a_folder_that_has_become_worse_changes_nothing_but_the_index():
    folder = Folder("one")
    shop = Shop(folder)
    folder.version, folder.broken = "2", "bundle: damaged"
    asyncio.run(shop.models.refresh())
    assert shop.index() == {"one": ("READY", "1", "bundle: damaged")}
    assert shop.service.ready
    folder.broken = ""
    asyncio.run(shop.models.refresh())
    assert shop.index() == {"one": ("READY", "2", "")}


def test_only_what_has_changed_is_loaded_again():
    folders = Folder("same"), Folder("other"), Folder("bad", broken="x"), Folder("away")
    shop = Shop(*folders)
    asyncio.run(shop.models.unload("away"))
    folders[1].version, folders[2].broken = "2", ""
    asyncio.run(shop.models.refresh())
    assert [folder.loads for folder in folders] == [1, 2, 1, 1]
    assert shop.index()["away"][0] == "UNAVAILABLE"  # as an operator wanted it
    assert shop.settled >= 1


def test_one_that_adapts_is_unloaded_first():
    shop = Shop(Folder("one"), exclusive=True)
    with pytest.raises(Exception, match="is to be unloaded before"):
        asyncio.run(shop.models.load("one"))
    asyncio.run(shop.models.unload("one"))
    asyncio.run(shop.models.load("one"))
    assert shop.index() == {"one": ("READY", "1", "")}


def test_a_server_of_two_bundles_answers_with_each_ones_own(residual, tmp_path):
    save = lambda name: gati_jax.save_bundle(tmp_path / name, residual.chain, residual.caches, *rest)  # noqa: E731
    rest = residual.plan, residual.certificate
    save("a")
    words = [f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}", "--capacity", "9", "--program-cache", str(tmp_path / "kept")]
    parts = assemble(parse(["--bundle", *words, "--reference"], {}))
    models = parts.service.models
    asyncio.run(models.begin())
    assert [one.state for one in models.index()] == ["READY", "UNAVAILABLE"]
    assert parts.service.ready
    save("b")
    asyncio.run(models.load("b"))
    expected = gati_jax.infer_batch(residual, pixels(4), numerics="reference")
    for entry in models.entries.values():
        assert entry.model.max_rows == 4  # nine places for two
        assert entry.backend is not None
        futures = entry.backend.engine.submit(pixels(4), route=0)
        np.testing.assert_array_equal([one.result(60).exit for one in futures], expected.exit)
    asyncio.run(ended(models))


async def ended(models):
    assert all([await one for one in models.stop(60)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a=x", "y"], "--bundle: expected NAME=DIR for each of several, got y"),
        (["a=x", "a=y"], "--bundle: expected names that differ, and not 'stats', got a, a"),
        (["stats=x"], "--bundle: expected names that differ, and not 'stats', got stats"),
        (["a=x", "--name", "b"], "--name: expected a bundle without a name of its own, got b and a"),
        (["a=x", "b=y", "--overlap"], "--overlap: expected one bundle, got 2"),
        (["a=x", "b=y", "--chain", "m:f"], "--chain: expected one bundle, got 2"),
        (["a=x", "b=y", "--capacity", "1"], "--capacity: expected 2 at least, one for each bundle, got 1"),
        ([f"a{n}=x" for n in range(33)], "--bundle: expected 1 to 32 of them, got 33"),
        (["a=x", "b=y", "--adapt", "--adapt-dir", "x"], "--adapt-dir: expected a folder outside the bundle"),
    ],
)
def test_command_lines_of_several_bundles_that_make_no_sense(words, message):
    with pytest.raises(InputError, match=f"^{message}"):
        parse(["--bundle", *words], {})


def test_the_only_bundle_ends_the_server_with_its_reason():
    with pytest.raises(InputError, match="no device"):
        Shop(Folder("one", broken="no device"))


def test_a_model_on_its_way_again_keeps_the_server_ready():
    good, other = Folder("good"), Folder("other", broken="x")
    shop, seen = Shop(good, other), []
    load, other.broken = other.load, ""
    shop.models.entries["other"].source = Source(
        lambda: seen.append((shop.service.ready, shop.index()["other"][0])) or load(), lambda: "1"
    )
    asyncio.run(shop.models.load("other"))
    assert seen == [(True, "LOADING")]
    assert shop.service.ready


def test_images_of_a_slow_model_do_not_delay_those_of_another():
    """A hundred wait for the slow one: a deadline of a second is not met there, and is here."""
    clock = FakeClock()
    door = Door(Limits(capacity=200), clock=clock)
    for _ in range(100):  # 100 a second
        with contextlib.ExitStack() as others, door.enter(model="slow") as one:
            for _ in range(FULL):
                others.enter_context(door.enter(model="slow")).take(1)
            one.take(1)
            clock.now += 0.01
            one.answered = True
    for _ in range(100):
        door.enter(model="slow").take(1)
    with pytest.raises(OverloadedError, match="ms expected"):
        door.enter(model="slow", patience=1.0)
    door.enter(model="quick", patience=1.0).take(1, model="quick")


def test_names_folders_and_places():
    settings = parse(["--bundle", "a=x", "--bundle", "b=y/b=c", "--capacity", "9", "--adapt"], {})
    assert {name: str(path) for name, path in settings.bundles.items()} == {"a": "x", "b": "y/b=c"}
    assert (settings.places, settings.versions("b").name) == (4, "b=c-adapt")
    settings = Settings(bundle=("a=x", "b=y"), adapt=True, adapt_dir=Path("d"))
    assert str(settings.versions("b")) == "d/b"
    assert {name: str(path) for name, path in parse(["--bundle", "./a=b"], {}).bundles.items()} == {"gati": "a=b"}
