"""Bundles to serve: random ones, of a small ResNet with caches at sites 0 and 1, and of a user's own chain.

Fronts: a service in front of a fake engine, with or without sockets.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import Candidate, Normalization, Plan
from gati_jax.caches import Grid, LinearSelector, SortedSelector
from gati_jax.models import ResNet, fold, init, to_chain
from tests.bundle.made import drawn, make_certificate
from tests.export import made
from tests.serve import fake
from tests.serve.fake_runner import pixels


@pytest.fixture(scope="session")
def residual() -> gati_jax.Bundle:
    """Two blocks with random weights and two random caches; of random pixels, about half hit at each."""
    network = ResNet(stages=(1, 1), widths=(4, 8), shortcut="B", classes=5, input_shape=(8, 8, 3))
    normalization = Normalization(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), scale=1 / 256)
    rng = np.random.default_rng(3)
    chain = to_chain(network, drawn(rng, jax.eval_shape(lambda: fold(init(network, jax.random.key(0))))), normalization)
    caches = []
    # At site 1, deviations that may be negative would leave no hidden unit alive, and all scores the same.
    for site, selector, draw in (
        (0, LinearSelector(), functools.partial(drawn, rng)),
        (1, SortedSelector(hidden=3, top=2), functools.partial(made.drawn, np.random.default_rng(3))),
    ):
        predictor, activation = Grid(5, cells=2, hidden=6), jnp.zeros((1, *chain.site_specs[site].shape))
        params = {
            "predictor": draw(jax.eval_shape(predictor.init, jax.random.key(0), activation)),
            "selector": draw(jax.eval_shape(selector.init, jax.random.key(0), jnp.zeros((1, 5)))),
        }
        caches.append(Candidate(f"grid@{site}", site, predictor, selector, params))
    return half_hit(chain, caches, pixels(64))


@pytest.fixture(scope="session")
def dense(chain, candidates, splits) -> gati_jax.Bundle:
    """The dense network on digits, trained, with a cache at each of its sites 1 to 4; prepared inputs only."""
    return half_hit(chain, candidates, splits["test"][:256])


def half_hit(chain, caches, images) -> gati_jax.Bundle:
    """A bundle that takes every exit: thresholds are medians, of an even number of scores, so that none is at one."""
    caches = tuple(caches)
    scores = gati_jax.replay(chain, caches, images).scores
    path = np.stack([np.full(len(caches), np.inf), np.median(scores, axis=1)]).astype(np.float32)
    plan = Plan(
        names=tuple(cache.name for cache in caches),
        sites=tuple(cache.site for cache in caches),
        depth=len(chain),
        path=path,
        disagreement=np.array([0.0, 0.01]),
        mean_ms=np.array([3.0, 2.0]),
        n=2,
        rows=np.array([1, 2**64 - 1], np.uint64),
    )
    return gati_jax.Bundle(chain=chain, caches=caches, plan=plan, certificate=make_certificate(plan, step=1))


@pytest.fixture
def front():
    """A service that is ready, in front of a fake engine."""
    made = fake.Front()
    yield made
    made.engine.stop()


@pytest.fixture
def sockets(front):
    """The same behind sockets: its HTTP and gRPC ports."""
    with front.sockets() as ports:
        yield ports
