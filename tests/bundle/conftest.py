"""Bundles on disk."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import gati_jax
from gati_jax import Candidate, Normalization, Plan
from gati_jax.bundle import Versions
from gati_jax.caches import Grid, LinearSelector, SortedSelector
from gati_jax.models import ResNet, fold, init, to_chain
from tests.bundle.made import COSTS, PIXELS, Parts, cache_shapes, drawn, in_memory, make, make_certificate, make_plan


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A bundle that no test changes."""
    path = tmp_path_factory.mktemp("saved") / "bundle"
    gati_jax.save_bundle(path, *make(1), costs=[COSTS])
    return path


@pytest.fixture(scope="module")
def saved_versions(tmp_path_factory) -> Path:
    """Versions 1 and 2, which no test changes; the bundle of the second is the saved one."""
    path = tmp_path_factory.mktemp("versions") / "v"
    for seed in (2, 1):
        Versions(path, chain=make(77)[0]).save(in_memory(make(seed)))
    return path


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(saved, tmp_path / "bundle")


@pytest.fixture(scope="module")
def residual() -> Parts:
    """A small ResNet with random weights, with a projection and a normalization, and random caches."""
    network = ResNet(stages=(1, 1), widths=(4, 8), shortcut="B", classes=5, input_shape=(8, 8, 3))
    normalization = Normalization(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), scale=1 / 256)
    rng = np.random.default_rng(3)
    params = drawn(rng, jax.eval_shape(lambda: fold(init(network, jax.random.key(0)))))
    chain = to_chain(network, params, normalization)
    predictor, caches = Grid(5, cells=2, hidden=6), []
    for site, selector in ((0, LinearSelector()), (1, SortedSelector(hidden=3, top=2))):
        params = drawn(rng, cache_shapes(predictor, selector, chain.site_specs[site].shape))
        caches.append(Candidate(f"grid@{site}", site, predictor, selector, params))
    plan = make_plan(tuple(caches), depth=2)
    scores = gati_jax.replay(chain, caches, PIXELS).scores
    path = np.array([[np.inf, np.inf], np.median(scores, axis=1)], np.float32)  # about half of the requests hit
    plan = Plan(**{**vars(plan), "path": path, "disagreement": plan.disagreement[:2], "mean_ms": plan.mean_ms[:2]})
    return chain, tuple(caches), plan, make_certificate(plan, step=1)


@pytest.fixture(scope="module")
def saved_residual(residual, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("residual") / "bundle"
    gati_jax.save_bundle(path, *residual)
    return path
