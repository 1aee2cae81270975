"""A VGG goes the way of a residual network, from training to a loaded bundle; its config leaves it to the weights."""

import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import data
from gati_jax.models import VGG, apply, import_state_dict, read_weights
from tests.train.one_pass import BARE, DIGITS, FIT, SPLITS, json_of, small_and_repeatable
from train import base, caches

SMALL = VGG(convolutions=(1, 1, 1), channels=(4, 8, 8), input_shape=(8, 8, 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vgg")
    weights = folder / "base" / "base.safetensors"
    (folder / "bare.toml").write_text(f'{BARE}weights = "{weights}"\n[fit]\nbatch = 64\n')
    with small_and_repeatable(SMALL):
        json_of(base.main, *DIGITS, *SPLITS, "--out", str(folder / "base"), "--base.training.epochs", "4")
        bare = ["--config", str(folder / "bare.toml"), *SPLITS, *FIT, "--plan.backend", "xla"]
        fitted = json_of(caches.main, *bare, "--fit.epochs", "2", "--out", str(folder / "caches"))
    return weights, fitted, gati_jax.load_bundle(folder / "caches" / "bundle")


def test_the_loaded_bundle_answers_as_the_trained_network_does(made):
    weights, _, bundle = made
    images = np.asarray(data.load("digits", "all[1500:1520]").images)
    assert bundle.chain.network == SMALL
    pixels = (images.astype(np.float32) / 16 - np.float32(0.305)) / np.float32(0.376)
    expected = apply(SMALL, import_state_dict(SMALL, read_weights(weights)), jnp.asarray(pixels))
    found = bundle.chain(bundle.chain.prepare(images))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    prediction = gati_jax.infer(bundle, images[0])
    assert int(prediction.exit) in {1, 2, 3}


def test_what_the_weights_say_is_in_the_bundle_s_provenance(made):
    _, fitted, bundle = made
    config = bundle.provenance.config
    assert config["base"]["normalization"]["mean"] == [0.305]
    assert config["data"]["base_trained_on"] == ["all[:897]"]  # the config had said nothing
    assert {name.partition("@")[2] for name in fitted["candidates"]} <= {"1", "2"}
