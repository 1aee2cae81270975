"""The trained networks through the scripts, as the README says it."""

import numpy as np
import pytest

import gati_jax
from gati_jax import data
from gati_jax.models import layers
from gati_jax.profiling import Tile, Tuning, device_name
from tests.train.one_pass import ROOT, json_of
from train import caches, evaluate

NEAR = 1e-3  # of the range of logits, or of scores: what another order of additions may change


@pytest.fixture(scope="module", params=["resnet56", "resnet44", "resnet20"])
def passed(request, shared, tmp_path_factory):
    """A sixth of the fit split and one epoch: enough for caches that agree, if not for the README's figures."""
    network, folder = request.param, tmp_path_factory.mktemp(request.param)
    weights = shared / "weights" / f"{network}-cifar10.safetensors"
    base = ["--base.network", network, "--base.weights", str(weights), "--data.dir", str(shared / "tfds")]
    small = ["--data.splits.fit", "train[:8000]", "--fit.epochs", "1", "--measure_rounds", "5"]
    config = ["--config", str(ROOT / "configs" / "cifar10_resnet56.toml")]
    fitted = json_of(caches.main, *config, *base, *small, "--out", str(folder / "caches"))
    bundle = ["--bundle", str(folder / "caches" / "bundle"), "--out", str(folder / "eval")]
    return fitted, json_of(evaluate.main, *bundle, "--timed", "5"), folder / "caches" / "bundle"


@pytest.mark.slow
def test_a_trained_network_goes_through_the_house(passed):
    fitted, result, _ = passed
    assert fitted["certificate"]["certified"]
    assert result["n"] == 5000
    assert result["certificate"]["holds"]
    assert result["cost"]["ideal_speedup"] > 1.1


@pytest.mark.slow
def test_fast_numerics_differ_only_where_it_is_close(passed, shared):
    """Winograd everywhere: at most one row in a thousand is answered otherwise, and those lie at a tie or threshold."""
    path = passed[2]
    bundle = gati_jax.load_bundle(path)
    kinds = {layer.kind for block in layers(bundle.chain.network) for layer in block if "winograd2" in layer.applicable}
    tile = {"milliseconds": 1.0, "options": (), "algorithms": dict.fromkeys(kinds, "winograd2")}
    tiles = tuple(Tile(size=size, **{**tile, "milliseconds": size**0.5}) for size in (1, 16))
    gati_jax.save_tuning(path, Tuning(device=device_name(), tiles=tiles))
    images = data.load("cifar10", "test[5000:]", shared / "tfds").images
    bundle = gati_jax.load_bundle(path)
    fast, exact = (gati_jax.infer_batch(bundle, images, numerics=n) for n in ("fast", "reference"))
    differ = np.flatnonzero((fast.class_index != exact.class_index) | (fast.exit != exact.exit))
    assert len(differ) <= 0.001 * len(images)
    same = np.setdiff1d(np.arange(len(images)), differ)
    tolerance = NEAR * np.ptp(np.asarray(exact.logits))
    np.testing.assert_allclose(fast.logits[same], exact.logits[same], atol=tolerance)
    thresholds = dict(zip(bundle.cascade.sites, np.asarray(bundle.cascade.thresholds), strict=True))
    for row in differ:
        exit_ = int(min(fast.exit[row], exact.exit[row]))  # of the one that hit first
        score = (fast if int(fast.exit[row]) == exit_ else exact).score[row]
        first, second = np.sort(np.asarray(exact.logits[row]))[[-1, -2]]
        assert first - second < tolerance or abs(float(score) - thresholds[exit_]) < tolerance
