"""Bulk scoring: what it writes is what evaluate and infer_batch say, once for every row, however often it is killed."""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from scipy.special import softmax

import gati_jax
from gati_jax import InputError, data
from gati_jax.bundle import Provenance
from gati_jax.caches import FullyConnected, SortedSelector
from tests.train.one_pass import BARE, ROOT, json_of
from train import score
from train.config import build_config

ALL = ["--data.name", "digits", "--data.split", "all", "--rows", "250", "--ledger", "none"]
CHAIN = f"{__name__}:network"


def flatten(params, x):
    return jnp.tanh(x.reshape(len(x), -1) @ params)


def dense(params, x):
    return jnp.tanh(x @ params)


def classify(params, x):
    return x @ params


@functools.cache
def network(shape=(8, 8, 1), scale=1 / 16):
    """Three blocks with drawn weights, for the digits' pixels or others."""
    draw, sizes = np.random.default_rng(0), (int(np.prod(shape)), 64, 64, 64, 10)
    params = [(draw.normal(size=pair) / np.sqrt(pair[0])).astype(np.float32) for pair in itertools.pairwise(sizes)]
    pixels = gati_jax.Normalization(mean=(0.305,) * shape[-1], std=(0.376,) * shape[-1], scale=scale)
    spec = jax.ShapeDtypeStruct(shape, "float32")
    return gati_jax.Chain((flatten, dense, dense), classify, params, spec, normalization=pixels)


def cifar():
    return network((32, 32, 3), 1 / 256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle that says what it was fitted on; some requests leave early."""
    path = tmp_path_factory.mktemp("score") / "bundle"
    config = build_config(tomllib.loads(BARE + f'chain = "{CHAIN}"'))
    parts = [config.data.load(rows).images for rows in ("all[:897]", "all[897:1197]", "all[1197:1497]")]
    save(path, network(), parts, provenance=Provenance(config=config.model_dump(mode="json")))
    return path


def save(path, chain, parts, **options):
    fit, select, certify = parts
    head = gati_jax.Head(
        name="fc", predictor=lambda n: FullyConnected(n, hidden=16), selector=SortedSelector(), sites=(2,)
    )
    caches = gati_jax.fit(chain, fit, select=select, heads=(head,), config=gati_jax.FitConfig(epochs=3), progress=False)
    costs = gati_jax.CostTable(device="test", batch=1, blocks_ms=(1.0,) * 3, lookup_ms={c.name: 0.1 for c in caches})
    plan = gati_jax.plan(gati_jax.replay(chain, caches, select), costs, epsilon=0.2)
    certificate = gati_jax.certify(plan, gati_jax.replay(chain, caches, certify), epsilon=0.2, ledger=None)
    gati_jax.save_bundle(path, chain, caches, plan, certificate, **options)


def scores(folder, out, *options):
    return json_of(score.main, "--bundle", str(folder), "--chain", CHAIN, "--out", str(out), *options)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """All digits, scored without an interruption."""
    out = tmp_path_factory.mktemp("whole")
    return out, scores(folder, out, *ALL)


def test_the_test_split_has_evaluate_s_numbers(folder, tmp_path):
    found = scores(folder, tmp_path, "--ledger", "none")
    split = data.load("digits", "all[1497:]")
    bundle = gati_jax.load_bundle(folder, chain=network())
    evaluated = gati_jax.evaluate(bundle, split.images, split.labels, timed=0, ledger=None, progress=False)
    assert (found["n"], found["split"]) == (300, "all[1497:]")
    assert found["accuracy"] == evaluated.cascade.accuracy
    assert found["exits"] == {str(e.exit): e.hits for e in evaluated.exits if e.hits}
    assert len(found["exits"]) == 2
    assert json.loads((tmp_path / "score.json").read_text()) == found


def test_rows_are_those_of_infer_batch(folder, whole):
    out, found = whole
    assert (found["n"], found["parts"]) == (1797, 8)
    table = ds.dataset(out, format="parquet", exclude_invalid_files=True).to_table().sort_by("id").to_pydict()
    assert table["id"] == list(range(1797))
    split = data.load("digits", "all")
    assert split.ids is not None
    assert split.labels is not None
    rows = slice(250, 500)
    bundle = gati_jax.load_bundle(folder, chain=network())
    expected = gati_jax.infer_batch(bundle, split.images[rows])
    at = [table["id"].index(row) for row in split.ids[rows]]
    for name, value in (("class", expected.class_index), ("exit", expected.exit), ("label", split.labels[rows])):
        assert [table[name][i] for i in at] == np.asarray(value).tolist()
    got = np.array([table["probabilities"][i] for i in at])
    np.testing.assert_allclose(got, softmax(np.asarray(expected.logits, np.float64), axis=1), rtol=1e-5, atol=1e-7)
    by_base = np.asarray(expected.exit) == len(bundle.chain)
    assert [table["score"][i] is None for i in at] == by_base.tolist()


def test_a_run_that_is_killed_three_times_scores_every_row_once(folder, whole, tmp_path, monkeypatch):
    answer, calls = gati_jax.infer_batch, []

    def killed(bundle, images, **options):
        calls.append(len(images))
        if len(calls) in {3, 5, 8}:
            raise KeyboardInterrupt
        return answer(bundle, images, **options)

    monkeypatch.setattr(gati_jax, "infer_batch", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            scores(folder, tmp_path, *ALL)
        (tmp_path / ".part-00003-of-00008.parquet.abc").write_bytes(b"half")
    again = scores(folder, tmp_path, *ALL)
    assert sum(calls) - 3 * 250 == 1797
    assert not list(tmp_path.glob(".part-*"))
    changing = {"seconds", "rows_per_second"}
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in whole[1].items() if k not in changing
    }
    for file in sorted(whole[0].glob("part-*")):
        assert pq.read_table(tmp_path / file.name).equals(pq.read_table(file))
    calls[:] = [0] * 10
    assert scores(folder, tmp_path, *ALL)["rows_per_second"] is None  # nothing was left
    assert len(calls) == 10


def test_devices_share_the_batches(folder, whole, tmp_path, monkeypatch):
    """One device twice, each time with a bundle of its own."""
    (device,), loaded = jax.local_devices(), []
    load = gati_jax.load_bundle
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: [device, device])
    monkeypatch.setattr(
        "train.cli.load_bundle", lambda *given, **named: loaded.append(load(*given, **named)) or loaded[-1]
    )
    answer, used = gati_jax.infer_batch, set()
    monkeypatch.setattr(
        gati_jax, "infer_batch", lambda own, *given, **named: used.add(id(own)) or answer(own, *given, **named)
    )
    scores(folder, tmp_path, *ALL[:-3], "1000", "--ledger", "none")
    assert used == {id(bundle) for bundle in loaded}
    assert len(used) == 2
    found, expected = (ds.dataset(out, format="parquet", exclude_invalid_files=True) for out in (tmp_path, whole[0]))
    assert found.to_table().equals(expected.to_table())


@pytest.mark.slow
def test_three_kills_of_the_process_leave_evaluate_s_numbers(shared, tmp_path):
    """CIFAR-10's test split: SIGKILL whenever some more parts are there, on three devices, then once to the end."""
    rows = [
        data.load("cifar10", part, shared / "tfds").images
        for part in ("train[:4000]", "train[4000:5000]", "train[5000:6000]")
    ]
    save(tmp_path / "bundle", cifar(), rows)
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "train.score", "--bundle", tmp_path / "bundle", "--chain", f"{__name__}:cifar"),
        *("--out", out, "--data.name", "cifar10", "--data.dir", shared / "tfds", "--rows", "250", "--ledger", "none"),
    ]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    for parts in (3, 12, 30):
        with subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, stderr=subprocess.PIPE) as process:
            while len(list(out.glob("part-*"))) < parts:
                assert process.poll() is None
                time.sleep(0.002)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert len(list(out.glob("part-*"))) < 40
    subprocess.run([*map(str, command)], cwd=ROOT, env=environment, check=True, capture_output=True)
    found = json.loads((out / "score.json").read_text())
    table = ds.dataset(out, format="parquet", exclude_invalid_files=True).to_table()
    assert sorted(table["id"].to_pylist()) == list(range(10_000))
    split = data.load("cifar10", "test", shared / "tfds")
    bundle = gati_jax.load_bundle(tmp_path / "bundle", chain=cifar())
    evaluated = gati_jax.evaluate(bundle, split.images, split.labels, timed=0, ledger=None, progress=False)
    assert (found["n"], found["parts"]) == (10_000, 40)
    assert found["accuracy"] == evaluated.cascade.accuracy
    assert found["exits"] == {str(e.exit): e.hits for e in evaluated.exits if e.hits}
    assert np.mean(table["class"].to_numpy() == table["label"].to_numpy()) == found["accuracy"]


def test_top_keeps_the_likeliest_classes(folder, tmp_path):
    scores(folder, tmp_path, "--ledger", "none", "--top", "2")
    (file,) = tmp_path.glob("part-*")
    table = pq.read_table(file).to_pydict()
    assert [row[0] for row in table["top_classes"]] == table["class"]
    assert all(len(row) == 2 and row[0] >= row[1] for row in table["probabilities"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*ALL, "--top", "1"], "--out: expected parts of the same bundle, data and options, got others in"),
        ([*ALL[:-3], "500", "--ledger", "none"], "--out: expected the parts of this scoring, or none, got"),
        (["--data.name", "npz"], "data.dir: expected the folder or file of npz, got none"),
        (["--data.splitt", "all"], "unknown key data.splitt; did you mean data.split"),
    ],
    ids=["another option", "other parts", "no folder", "a typo"],
)
def test_what_does_not_belong_together_is_refused(folder, whole, options, message):
    with pytest.raises(InputError, match=message):
        scores(folder, whole[0], *options)


def test_rows_that_have_other_labels_now_are_refused(folder, tmp_path):
    """Parts of before and after would have labels of both."""
    split, file = data.load("digits", "all[:300]"), tmp_path / "rows.npz"
    source = ["--data.name", "npz", "--data.dir", str(file), "--data.split", "all", "--rows", "250", "--ledger", "none"]
    assert split.labels is not None
    np.savez(file, images=np.asarray(split.images), labels=split.labels)
    scores(folder, tmp_path / "out", *source)
    (tmp_path / "out" / "part-00000-of-00002.parquet").unlink()
    np.savez(file, images=np.asarray(split.images), labels=np.roll(split.labels, 1))
    with pytest.raises(InputError, match=r"data: expected the rows that were scored into .*part-00001-of-00002"):
        scores(folder, tmp_path / "out", *source)


def test_a_log_says_how_many_rows_are_left(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("train.score._LOG_SECONDS", 0.0)
    caplog.set_level("INFO", "train.score")
    scores(folder, tmp_path, "--ledger", "none")
    said = [record.getMessage() for record in caplog.records if record.name == "train.score"]
    assert [text.partition(" rows,")[0] for text in said] == ["250 of 300", "300 of 300"]
    assert said[-1].endswith("0.0 minutes left")


def test_a_picture_s_id_is_its_path(folder, tmp_path):
    from PIL import Image  # noqa: PLC0415 (optional)

    (tmp_path / "photos").mkdir()
    for i, image in enumerate(data.load("digits", "all[:3]").images):
        Image.fromarray(image[..., 0] * 15).save(tmp_path / "photos" / f"{i}.png")
    source = ["--data.name", "folder", "--data.dir", str(tmp_path / "photos"), "--data.split", "all"]
    found = scores(folder, tmp_path / "out", *source, "--data.channels", "1", "--ledger", "none")
    assert found["accuracy"] is None
    table = pq.read_table(tmp_path / "out" / "part-00000-of-00001.parquet")
    assert sorted(table["id"].to_pylist()) == [str(tmp_path / "photos" / f"{i}.png") for i in range(3)]
