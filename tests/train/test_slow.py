"""The trained networks through the scripts, as the README says it."""

import pytest

from tests.train.one_pass import ROOT, json_of
from train import caches, evaluate


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet56", "resnet44", "resnet20"])
def test_a_trained_network_goes_through_the_house(shared, tmp_path, network):
    """A sixth of the fit split and one epoch: enough for caches that agree, if not for the README's figures."""
    weights = shared / "weights" / f"{network}-cifar10.safetensors"
    base = ["--base.network", network, "--base.weights", str(weights), "--data.dir", str(shared / "tfds")]
    small = ["--data.splits.fit", "train[:8000]", "--fit.epochs", "1", "--measure_rounds", "5"]
    config = ["--config", str(ROOT / "configs" / "cifar10_resnet56.toml")]
    fitted = json_of(caches.main, *config, *base, *small, "--out", str(tmp_path / "caches"))
    bundle = ["--bundle", str(tmp_path / "caches" / "bundle"), "--out", str(tmp_path / "eval")]
    result = json_of(evaluate.main, *bundle, "--timed", "5")
    assert fitted["certificate"]["certified"]
    assert result["n"] == 5000
    assert result["certificate"]["holds"]
    assert result["cost"]["ideal_speedup"] > 1.1
