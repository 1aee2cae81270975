"""A small network as a cache at site 0: the same logits as by itself, in a fit, in a bundle and tuned."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import Normalization
from gati_jax.caches import Grid, SortedSelector, describe_predictor, import_network, network_with_algorithms
from gati_jax.models import ResNet, fold, init, layers, to_chain
from gati_jax.pytrees import call
from gati_jax.runtime import Cascade, predict_one

BASE = ResNet(stages=(2, 1), widths=(4, 8), shortcut="B", classes=5, input_shape=(8, 8, 3))
SMALL = ResNet(stages=(1, 1), widths=(4, 6), classes=5, shortcut="A", input_shape=(8, 8, 3))
OF_BASE = Normalization(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), scale=1 / 256)
OF_SMALL = Normalization(mean=(0.4,), std=(0.25,))


def variables(network: ResNet, seed: int):
    """Random ones; variances are positive."""
    rng = np.random.default_rng(seed)

    def draw(path, v):
        value = rng.normal(size=v.shape).astype(np.float32) / 2
        return np.abs(value) + 0.5 if path[-1].key == "var" else value

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init(network, jax.random.key(0))))


@pytest.fixture(scope="module")
def chain() -> gati_jax.Chain:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: fold(init(BASE, jax.random.key(0))))
    return to_chain(BASE, jax.tree.map(lambda v: (rng.normal(size=v.shape) / 3).astype(np.float32), shapes), OF_BASE)


@pytest.fixture(scope="module")
def small():
    return variables(SMALL, 1)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (150, 8, 8, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def alone(small, pixels) -> np.ndarray:
    """Logits of the small network by itself."""
    network = to_chain(SMALL, fold(small), OF_SMALL)
    return np.asarray(network(network.prepare(pixels)))


def test_its_logits_behind_the_base_s_normalization_are_those_by_itself(small, pixels, alone):
    predictor, own = import_network(SMALL, small, trained=OF_SMALL, base=OF_BASE)
    found = call(predictor, own, OF_BASE(pixels))
    np.testing.assert_allclose(found, alone, atol=1e-4 * np.ptp(alone))
    same, unchanged = import_network(SMALL, small, trained=OF_BASE, base=OF_BASE)
    np.testing.assert_array_equal(unchanged["params"]["scale"], 1)
    np.testing.assert_array_equal(unchanged["params"]["shift"], 0)
    assert same == predictor


@pytest.mark.parametrize("algorithm", ["im2col", "winograd2", "winograd4"])
def test_other_algorithms_change_the_last_digits_only(small, pixels, alone, algorithm):
    predictor, own = import_network(SMALL, small, trained=OF_SMALL, base=OF_BASE)
    kinds = {layer.kind for block in layers(SMALL) for layer in block if algorithm in layer.applicable}
    tuned, stored = network_with_algorithms(predictor, own, dict.fromkeys(kinds, algorithm))
    assert {a for block in tuned.algorithms for a in block} >= {algorithm}
    np.testing.assert_allclose(call(tuned, stored, OF_BASE(pixels)), alone, atol=1e-3 * np.ptp(alone))
    with pytest.raises(gati_jax.InputError, match="before tuning"):
        describe_predictor(tuned)


def test_it_needs_a_site_of_the_input_s_shape(small):
    predictor, own = import_network(SMALL, small, trained=OF_SMALL, base=OF_BASE)
    with pytest.raises(gati_jax.InputError, match=r"network: expected a site .*\[8, 8, 3\], got \[4, 4, 3\]"):
        predictor.apply(own, jnp.zeros((1, 4, 4, 3)))


@pytest.fixture(scope="module")
def fitted(chain, small, pixels):
    """The network and a trained head beside it."""
    heads = [
        gati_jax.network_head("small", SMALL, small, trained=OF_SMALL, base=OF_BASE),
        gati_jax.Head(name="grid", predictor=lambda c: Grid(c, 2, 4), selector=SortedSelector(), sites=(1,)),
    ]
    config = gati_jax.FitConfig(epochs=1, batch=32)
    return gati_jax.fit(chain, pixels[:64], select=pixels[64:114], heads=heads, config=config, progress=False)


def test_a_fit_takes_its_weights_as_they_are_and_fits_its_selector(chain, fitted, pixels, alone):
    assert [c.name for c in fitted] == ["small@0", "grid@1"]
    table = gati_jax.replay(chain, fitted, pixels[64:])
    np.testing.assert_array_equal(table.classes[0], alone[64:].argmax(-1))
    answers = np.asarray(chain(chain.prepare(pixels[64:]))).argmax(-1)
    np.testing.assert_array_equal(table.answers, answers)
    assert np.unique(table.scores[0]).size > 10


def test_networks_alone_need_no_training(chain, small, pixels, monkeypatch):
    monkeypatch.delattr(importlib.import_module("gati_jax.fitting.predictors"), "run_loop")
    heads = [gati_jax.network_head("small", SMALL, small, trained=OF_SMALL, base=OF_BASE)]
    (only,) = gati_jax.fit(chain, pixels[:1], select=pixels[64:114], heads=heads, progress=False)
    assert (only.name, only.site) == ("small@0", 0)


def test_a_network_of_other_classes_is_refused(chain, pixels):
    other = ResNet(stages=(1,), widths=(4,), classes=3, input_shape=(8, 8, 3))
    head = gati_jax.network_head("other", other, variables(other, 0), trained=OF_BASE, base=OF_BASE)
    with pytest.raises(gati_jax.InputError, match="expected other to have the base's 5 classes, got 3"):
        gati_jax.fit(chain, pixels[:64], select=pixels[64:], heads=[head])


@pytest.fixture(scope="module")
def saved(chain, fitted, pixels, tmp_path_factory) -> Path:
    """A bundle with the network alone."""
    costs = gati_jax.CostTable(
        device="test", batch=1, blocks_ms=(1.0,) * len(chain), lookup_ms={"small@0": 0.1, "grid@1": 5.0}
    )
    chosen = fitted.take(["small@0"])
    plan = gati_jax.plan(gati_jax.replay(chain, chosen, pixels[64:114]), costs, epsilon=0.95, delta=0.5)
    certificate = gati_jax.certify(plan, gati_jax.replay(chain, chosen, pixels[114:]), 0.95, 0.5)
    path = tmp_path_factory.mktemp("network") / "bundle"
    gati_jax.save_bundle(path, chain, chosen, plan, certificate)
    return path


def test_it_answers_from_a_bundle_as_it_did_before(chain, fitted, pixels, saved):
    bundle = gati_jax.load_bundle(saved)
    assert bundle.cascade.sites == (0,)
    kept = Cascade(chain, fitted.take(["small@0"]).items, bundle.cascade.thresholds)
    for image in pixels[114:120]:
        found, expected = gati_jax.infer(bundle, image), predict_one(kept, image)
        assert int(found.exit) == int(expected.exit)
        np.testing.assert_array_equal(found.logits, expected.logits)


LOAD = """
import sys
import gati_jax, jax, numpy as np
assert jax.config.jax_enable_x64
bundle = gati_jax.load_bundle(sys.argv[1])
print(sorted({str(leaf.dtype) for leaf in jax.tree.leaves((bundle.chain, bundle.caches))}))
"""


def test_its_bundle_loads_where_64_bits_are_the_default(saved):
    """There, parameters that a network would be made with are float64; what was saved is float32."""
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-c", LOAD, str(saved)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert (result.returncode, result.stdout.strip()) == (0, "['float32']"), result.stderr
