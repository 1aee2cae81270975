"""Every selector through the same tests, and each against NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from gati_jax.caches import LinearSelector, SortedSelector

SELECTORS: dict[str, Any] = {
    "linear": LinearSelector(),
    "sorted": SortedSelector(hidden=7, top=3),
    "sorted, all classes": SortedSelector(hidden=7, top=50),
}
FLOOR = -16.0  # log-probabilities below it say nothing more
every_selector = pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS)


def random_logits(batch=5, classes=6, spread=3.0):
    return np.random.default_rng(2).normal(0, spread, (batch, classes)).astype(np.float32)


def random_variables(selector, classes=6):
    """Variables of the selector's shapes, none of them zero."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(selector.init, jax.random.key(0), jnp.zeros((1, classes))))
    rng = np.random.default_rng(3)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


apply = jax.jit(lambda selector, variables, logits: selector.apply(variables, logits), static_argnums=0)


@functools.cache
def fresh_variables(selector):
    return jax.jit(selector.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 6)))  # rbg compiles fast


def log_probabilities(logits):
    return np.maximum(log_softmax(logits.astype(np.float64), axis=1), FLOOR)


def dense(params, x):
    return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_linear_selector_equals_numpy(spread):
    selector, logits = SELECTORS["linear"], random_logits(spread=spread)
    variables = random_variables(selector)
    miss_hit = dense(variables["params"]["out"], log_probabilities(logits))
    # The log-odds of the softmax over the two.
    expected = np.diff(log_softmax(miss_hit, axis=1))[:, 0]
    np.testing.assert_allclose(apply(selector, variables, jnp.asarray(logits)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("top", [1, 3, 6, 50])
def test_sorted_selector_equals_numpy(spread, top):
    selector, logits = SortedSelector(hidden=7, top=top), random_logits(spread=spread)
    params = random_variables(selector)["params"]
    largest = -np.sort(-log_probabilities(logits), axis=1)[:, :top]
    hidden = np.maximum(dense(params["hidden"], largest / 16), 0)
    expected = dense(params["out"], np.concatenate([hidden, largest[:, :1]], axis=1))[:, 0]
    found = apply(selector, {"params": params}, jnp.asarray(logits))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)))
def test_sorted_selector_does_not_know_the_classes(order):
    selector, logits = SELECTORS["sorted"], random_logits()
    variables = random_variables(selector)
    scores = apply(selector, variables, jnp.asarray(logits))
    np.testing.assert_allclose(
        apply(selector, variables, jnp.asarray(logits[:, np.array(order)])), scores, rtol=1e-4, atol=1e-5
    )


def test_linear_selector_knows_the_classes():
    selector, logits = SELECTORS["linear"], random_logits()
    variables = random_variables(selector)
    scores = [np.asarray(apply(selector, variables, jnp.asarray(x))) for x in (logits, logits[:, ::-1].copy())]
    assert np.abs(scores[0] - scores[1]).max() > 0.1


@every_selector
def test_scores_ignore_a_shift_of_the_logits(selector):
    variables = random_variables(selector)
    one, other = (apply(selector, variables, jnp.asarray(random_logits() + shift)) for shift in (0, np.float32(5)))
    np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-4)


@every_selector
def test_scores_stay_finite_for_extreme_logits(selector):
    extreme = np.array([[1e4, -1e4, 0, 0, 0, 0], [1e4] * 6, [-1e4] * 6, [-1e4] * 5 + [1e4], [3e38] + [-3e38] * 5])
    for variables in (random_variables(selector), fresh_variables(selector)):
        scores = apply(selector, variables, jnp.asarray(extreme, jnp.float32))
        assert scores.shape == (5,)
        assert jnp.isfinite(scores).all()
        gradient = jax.grad(lambda x, v=variables: apply(selector, v, x).sum())(jnp.asarray(extreme, jnp.float32))
        assert jnp.isfinite(gradient).all()


@every_selector
def test_selectors_are_pure_and_rows_independent(selector):
    logits = jnp.asarray(random_logits())
    variables = fresh_variables(selector)
    assert set(variables) == {"params"}
    scores, state = selector.apply(variables, logits, mutable=True)
    assert (scores.shape, scores.dtype) == ((5,), jnp.float32)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state, variables))
    np.testing.assert_allclose(apply(selector, variables, logits), scores, rtol=1e-5, atol=1e-6)
    poisoned = apply(selector, variables, logits.at[0].set(jnp.nan))
    np.testing.assert_allclose(poisoned[1:], scores[1:], rtol=1e-6)
    for i in range(5):
        np.testing.assert_allclose(apply(selector, variables, logits[i : i + 1]), scores[i : i + 1], rtol=1e-5)
