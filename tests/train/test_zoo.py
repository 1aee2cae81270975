"""Weights that say what they are, and configs that leave it to them."""

import json

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import gati_jax
from gati_jax import InputError, WeightsError
from gati_jax.models import read_metadata
from tests.train.one_pass import BARE, ROOT
from train import base, caches, zoo
from train.config import Config, load
from train.zoo import Entry, completed, keep, read_entry

TENSORS = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}


def entry(**changes) -> Entry:
    given = {
        "network": "resnet20", "classes": 10, "input_shape": (8, 8, 1), "dataset": "digits",
        "trained_on": ("all[:897]",), "normalization": {"mean": [0.305], "std": [0.376], "scale": 0.0625},
        "split": "all[1497:]", "accuracy": 0.9, "recipe": {"epochs": 3}, "seed": 0,
    } | changes  # fmt: skip
    return Entry.model_validate(given)


def written(folder, **changes):
    path = folder / "weights.safetensors"
    save_file(TENSORS, path, metadata=entry(**changes).metadata() | {"note": "other keys are left alone"})
    return path


def bare(tmp_path, weights, more=""):
    (tmp_path / "bare.toml").write_text(f'{BARE}weights = "{weights}"\n{more}')
    return load(Config, tmp_path / "bare.toml")


@settings(deadline=None, max_examples=30)
@example("123", 0.5, [], None)  # reads as JSON
@given(
    st.from_regex(r"[a-z0-9_]{1,20}(/[A-Za-z0-9]{1,9})?(:1\.\*\.0)?", fullmatch=True),
    st.floats(0, 1),
    st.lists(st.text(min_size=1)),
    st.sampled_from(["A", "B", None]),
)
def test_an_entry_comes_back_from_its_strings(name, accuracy, parts, shortcut):
    one = entry(dataset=name, split=name, accuracy=accuracy, trained_on=tuple(parts), shortcut=shortcut)
    strings = one.metadata()
    assert all(isinstance(value, str) for value in strings.values())
    assert Entry.from_metadata(strings) == one


def test_a_trained_base_says_what_it_is(run):
    found = read_entry(run.folder / "base" / "base.safetensors")
    config = load(Config, ROOT / "configs" / "digits.toml")
    assert found is not None
    assert (found.network, found.dataset, found.trained_on) == ("resnet20", "digits", ("all[:897]",))
    assert found.normalization == config.base.normalize()
    assert found.accuracy == run.base["accuracy"]
    assert found.recipe["epochs"] == 6
    assert found.recipe["learning_rate"] == config.base.training.learning_rate


@pytest.mark.usefixtures("tiny")
def test_a_config_without_network_and_normalization_gives_the_same_chain(run, tmp_path):
    weights = run.folder / "base" / "base.safetensors"
    full = load(Config, ROOT / "configs" / "digits.toml", ["--base.weights", str(weights)])
    one, other = caches.read_base(full.base), caches.read_base(completed(bare(tmp_path, weights)).base)
    images = np.random.default_rng(0).integers(0, 17, (5, 8, 8, 1), np.uint8)
    np.testing.assert_array_equal(one(one.prepare(images)), other(other.prepare(images)))


def test_what_the_config_says_comes_first(tmp_path, caplog):
    path = written(tmp_path)
    more = 'network = "resnet32"\nnormalization = { mean = [0.5], std = [0.5] }\n'
    found = completed(bare(tmp_path, path, more)).base
    assert (found.network, found.input_shape) == ("resnet32", (8, 8, 1))
    assert found.normalization is not None
    assert found.normalization.mean == (0.5,)
    assert "trained with another normalization" in caplog.text
    assert completed(bare(tmp_path, path)).base.normalize().mean == (0.305,)


def test_what_the_base_has_seen_counts_whatever_the_config_says(tmp_path):
    certify = written(tmp_path, trained_on=("all[:897]", "all[1400:1500]"))
    assert caches.base_saw_certify(completed(bare(tmp_path, certify)))
    assert not caches.base_saw_certify(bare(tmp_path, certify))
    elsewhere = written(tmp_path, trained_on=("all[1400:1500]",), dataset="cifar10")
    assert not caches.base_saw_certify(completed(bare(tmp_path, elsewhere)))


def test_what_a_small_network_has_seen_counts_whatever_the_config_says(tmp_path, monkeypatch):
    weights = written(tmp_path, trained_on=("all[:1497]",))
    config = bare(
        tmp_path,
        weights,
        f"""[[fit.networks]]
        name = "small"
        network = "resnet20"
        trained_on = ["all[:897]"]
        weights = "{weights}"
    """,
    )
    monkeypatch.setattr(caches, "import_state_dict", lambda *_: ())
    monkeypatch.setattr(caches, "network_head", lambda *_, **__: None)
    spec, none = jax.ShapeDtypeStruct((8, 8, 1), "float32"), np.zeros(1, np.float32)
    chain = gati_jax.Chain((lambda _, x: x,), lambda _, x: x, (none, none), spec)
    with pytest.raises(InputError, match="other rows than select"):
        caches.small_networks(completed(config), chain)


def test_files_of_others_change_nothing(tmp_path):
    save_file(TENSORS, tmp_path / "other.safetensors", metadata={"network": "resnet20", "classes": "many"})
    for weights in (tmp_path / "other.safetensors", tmp_path / "missing.safetensors"):
        config = bare(tmp_path, weights)
        assert completed(config) is config
        with pytest.raises(InputError, match=r"base\.network: expected a name, or weights whose metadata say it"):
            config.base.architecture()
        with pytest.raises(InputError, match=r"base\.normalization: expected mean and std"):
            config.base.normalize()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *((k, "[[]]", k) for k in ("gati_jax", "network", "classes", "input_shape", "normalization", "recipe")),
        ("input_shape", "[-8, 8, 1]", "input_shape"),
        ("accuracy", "NaN", "accuracy"),
        ("recipe", "[" * 100_000, "nested too deep"),
        ("dataset", "../escaped", "dataset"),  # which the zoo would make part of a path
        ("dataset", "/escaped", "dataset"),
    ],
)
def test_damaged_metadata_are_named_and_nothing_is_kept(tmp_path, key, value, message):
    path = tmp_path / "weights.safetensors"
    save_file(TENSORS, path, metadata=entry().metadata() | {key: value})
    for read in (read_entry, lambda path: completed(bare(tmp_path, path)), lambda path: keep(path, tmp_path / "zoo")):
        with pytest.raises(WeightsError, match=f"the metadata of .* are damaged: {message}"):
            read(path)
    assert {file.name for file in tmp_path.iterdir()} == {"weights.safetensors", "bare.toml"}


def test_keeping_halves_the_kernels_only(tmp_path):
    path = keep(written(tmp_path), tmp_path / "zoo")
    kept = load_file(path)
    assert {name: v.dtype for name, v in kept.items()} == {"kernel": np.float16, "bias": np.float32}
    assert read_entry(path) == entry()
    assert json.loads(read_metadata(path)["recipe"]) == {"epochs": 3}
    assert keep(written(tmp_path), tmp_path / "zoo") == path  # its own place is no other file's


@pytest.mark.parametrize(("limit", "recipe"), [(20, {"epochs": 3}), (5000, {"note": "x" * 10_000})])
def test_a_zoo_stays_small(tmp_path, monkeypatch, limit, recipe):
    """By what lies there and what is written, metadata included."""
    weights = written(tmp_path, recipe=recipe)
    monkeypatch.setattr(zoo, "MAX_BYTES", limit)
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "other").write_bytes(bytes(10))
    with pytest.raises(InputError, match="out: expected at most"):
        keep(weights, tmp_path / "zoo")
    assert [file.name for file in (tmp_path / "zoo").iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("metadata", "value", "message"),
    [({}, 1.0, "without its metadata"), (entry().metadata(), 1e6, "within float16's range, got larger ones in kernel")],
)
def test_what_cannot_be_kept_is_refused(tmp_path, metadata, value, message):
    save_file({"kernel": np.full((2, 2), value, np.float32)}, tmp_path / "w.safetensors", metadata=metadata)
    with np.errstate(over="ignore"), pytest.raises(InputError, match=message):
        keep(tmp_path / "w.safetensors", tmp_path / "zoo")


@pytest.mark.usefixtures("tiny")
def test_mirror_images_are_added_up(run):
    """By hand: the logits of both, and their sum's class."""
    config = load(Config, ROOT / "configs" / "digits.toml")
    network, normalization = config.base.architecture(), config.base.normalize()
    weights = load_file(run.folder / "base" / "base.safetensors")
    variables = caches.import_state_dict(network, weights)
    test = base.data.load("digits", "all[1497:1597]")
    images = np.asarray(test.images)
    sides = (images, images[:, :, ::-1])
    both = [np.asarray(base.apply(network, variables, normalization(x))) for x in sides]
    expected = np.mean(np.argmax(both[0] + both[1], -1) == test.labels)
    found = base.evaluate(network, normalization, variables, test, flips=True, batch=30)
    assert found == pytest.approx(expected)
    assert base.evaluate(network, normalization, variables, test) == pytest.approx(
        np.mean(np.argmax(both[0], -1) == test.labels)
    )
