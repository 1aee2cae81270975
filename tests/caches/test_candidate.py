"""Candidates: two modules and their parameters, as one pytree."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gati_jax.caches import Candidate, FullyConnected, LinearSelector, SortedSelector, choose, lookup
from gati_jax.errors import InputError

ACTIVATION = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def build(name="fc@1", seed=0, hidden=2, selector=None):
    predictor, selector = FullyConnected(classes=3, hidden=hidden), selector or LinearSelector()
    rng = np.random.default_rng(seed)
    shapes = {
        "predictor": jax.eval_shape(predictor.init, jax.random.key(0), ACTIVATION),
        "selector": jax.eval_shape(selector.init, jax.random.key(0), jnp.zeros((1, 3))),
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.1, 1, leaf.shape), leaf.dtype), shapes)
    return Candidate(name, 1, predictor, selector, params)


def dense(params, x):
    return x @ np.asarray(params["kernel"]) + np.asarray(params["bias"])


def test_lookup_feeds_the_predictor_into_the_selector():
    candidate = build()
    logits, scores = lookup(candidate, jnp.asarray(ACTIVATION))
    predictor = candidate.params["predictor"]["params"]
    statistics = candidate.params["predictor"]["statistics"]["standardize"]
    features = (ACTIVATION - np.asarray(statistics["mean"])) / np.asarray(statistics["std"])
    expected = dense(predictor["out"], np.maximum(dense(predictor["hidden"], features), 0))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    log_probabilities = expected - np.log(np.exp(expected).sum(1, keepdims=True))
    miss_hit = dense(candidate.params["selector"]["params"]["out"], log_probabilities)
    np.testing.assert_allclose(scores, miss_hit[:, 1] - miss_hit[:, 0], rtol=1e-4, atol=1e-5)


class Certain(nn.Module):
    """As sure as its dtype allows of one row, and of no other."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, logits):
        return jnp.where(jnp.arange(len(logits)) == 1, jnp.inf, -1.0).astype(self.dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_no_score_is_infinite_because_such_a_threshold_is_off(dtype):
    _, scores = lookup(build(selector=Certain(dtype)), jnp.asarray(ACTIVATION))
    assert scores.dtype == jnp.float32
    assert scores.tolist() == [-1.0, float(np.finfo(np.float32).max), -1.0]


def test_pytree_round_trip():
    candidate = build()
    # FC(2) on 4 values: 4 means, 4 deviations, 4 * 2 + 2, then 2 * 3 + 3; the selector: 3 * 2 + 2. A float has 4 bytes.
    assert candidate.bytes == 4 * (4 + 4 + 4 * 2 + 2 + 2 * 3 + 3 + 3 * 2 + 2)
    leaves, structure = jax.tree.flatten(candidate)
    assert len(leaves) == 8  # mean and deviation, then three kernels and biases
    rebuilt = jax.tree.unflatten(structure, leaves)
    for name in ("name", "site", "predictor", "selector"):
        assert getattr(rebuilt, name) == getattr(candidate, name)
    assert jax.tree.structure(rebuilt) == structure
    assert jax.tree.leaves(jax.tree.unflatten(structure, range(8))) == list(range(8))


def test_structure_depends_on_the_modules_and_not_on_parameters():
    structure = jax.tree.structure(build())
    assert structure == jax.tree.structure(build(seed=1))
    assert hash(structure) == hash(jax.tree.structure(build(seed=1)))
    for other in (build(name="fc@2"), build(hidden=3), build(selector=SortedSelector())):
        assert structure != jax.tree.structure(other)


def test_new_parameters_do_not_trace_again():
    traces = []

    @jax.jit
    def run(candidate, activation):
        traces.append(1)
        return lookup(candidate, activation)

    for seed in (0, 1):
        candidate = build(seed=seed)
        for jitted, eager in zip(run(candidate, ACTIVATION), lookup(candidate, jnp.asarray(ACTIVATION)), strict=True):
            np.testing.assert_allclose(jitted, eager, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


def test_choose_keeps_the_order_of_the_names_and_names_what_is_missing():
    candidates = [build(name) for name in "abc"]
    assert choose(candidates, ["c", "a"]) == (candidates[2], candidates[0])
    assert choose(iter(candidates), []) == ()
    with pytest.raises(InputError, match=r"candidates: expected x, y among them, got a, b"):
        choose([build("a"), build("b")], ["x", "a", "y"])
