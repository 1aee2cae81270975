"""Bundles to serve: random ones, of a small ResNet with caches at sites 0 and 1, and of a user's own chain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import Candidate, Normalization, Plan
from gati_jax.caches import Grid, LinearSelector, SortedSelector
from gati_jax.models import ResNet, fold, init, to_chain
from tests.bundle.made import drawn, make_certificate, make_plan


@pytest.fixture(scope="session")
def residual() -> gati_jax.Bundle:
    """Two blocks with random weights and two random caches; of random pixels, about half hit at each."""
    network = ResNet(stages=(1, 1), widths=(4, 8), shortcut="B", classes=5, input_shape=(8, 8, 3))
    normalization = Normalization(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), scale=1 / 256)
    rng = np.random.default_rng(3)
    chain = to_chain(network, drawn(rng, lambda: fold(init(network, jax.random.key(0)))), normalization)
    caches = []
    for site, selector in ((0, LinearSelector()), (1, SortedSelector(hidden=3, top=2))):
        predictor, activation = Grid(5, cells=2, hidden=6), jnp.zeros((1, *chain.site_specs[site].shape))
        params = {
            "predictor": drawn(rng, lambda p=predictor, x=activation: p.init(jax.random.key(0), x)),
            "selector": drawn(rng, lambda s=selector: s.init(jax.random.key(0), jnp.zeros((1, 5)))),
        }
        caches.append(Candidate(f"grid@{site}", site, predictor, selector, params))
    plan = make_plan(tuple(caches), depth=2)
    scores = gati_jax.replay(chain, caches, pixels(64)).scores
    path = np.array([[np.inf, np.inf], np.median(scores, axis=1)], np.float32)
    plan = Plan(**{**vars(plan), "path": path, "disagreement": plan.disagreement[:2], "mean_ms": plan.mean_ms[:2]})
    certificate = make_certificate(plan, step=1)
    return gati_jax.Bundle(chain=chain, caches=tuple(caches), plan=plan, certificate=certificate)


def pixels(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), np.uint8)


@pytest.fixture(scope="session")
def dense(chain, candidates, planned) -> gati_jax.Bundle:
    """The dense network on digits, trained; prepared inputs only."""
    plan, certificate = planned
    named = {candidate.name: candidate for candidate in candidates}
    caches = tuple(named[name] for name in plan.names)
    return gati_jax.Bundle(chain=chain, caches=caches, plan=plan, certificate=certificate)
