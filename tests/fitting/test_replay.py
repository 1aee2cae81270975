"""Replay's rim, and the logits of predictors against plain NumPy."""

import dataclasses

import jax
import numpy as np
import pytest

import gati_jax
from gati_jax import InputError
from gati_jax.fitting import replay_logits, untrained
from tests.fitting import tiny

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((23, 12)).astype(np.float32)


def with_values(cache):
    """Values of a size that tells rows and classes apart, which an untrained cache's are not."""
    draw = lambda leaf: RNG.standard_normal(leaf.shape).astype(leaf.dtype)  # noqa: E731
    return dataclasses.replace(cache, params=jax.tree.map(draw, cache.params))


CANDIDATES = tuple(with_values(cache) for cache in untrained(tiny.chain(), [tiny.head(0, 1, 2)]))


def by_hand(images):
    """Activations by tanh(x W); then Linear, ReLU, Linear: float64, all rows at once."""
    said, x = [], images.astype(np.float64)
    for cache, weights in zip(CANDIDATES, tiny.chain().params, strict=False):
        p = jax.tree.map(lambda v: np.asarray(v, np.float64), cache.params["predictor"]["params"])
        hidden = np.maximum(x @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
        said.append(hidden @ p["out"]["kernel"] + p["out"]["bias"])
        x = np.tanh(x @ weights)
    return np.stack(said)


@pytest.mark.parametrize(("n", "batch"), [(23, 7), (21, 7), (1, 7), (23, 64)])
def test_logits_are_each_rows_own_whatever_the_batch(n, batch):
    found = replay_logits(tiny.chain(), CANDIDATES, IMAGES[:n], batch=batch)
    assert found.shape == (3, n, tiny.CLASSES)
    np.testing.assert_allclose(found, by_hand(IMAGES[:n]), rtol=1e-4, atol=1e-5)


def test_a_table_says_what_the_logits_say_whatever_the_batch():
    one, other = (gati_jax.replay(tiny.chain(), CANDIDATES, IMAGES, batch=batch) for batch in (7, 64))
    np.testing.assert_array_equal(one.classes, by_hand(IMAGES).argmax(-1))
    np.testing.assert_array_equal(one.classes, other.classes)
    np.testing.assert_array_equal(one.answers, other.answers)
    np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4, atol=1e-5)


def test_no_candidates_and_no_images_are_refused():
    with pytest.raises(InputError, match="candidates, images: expected at least one of each, got 0 and 23"):
        replay_logits(tiny.chain(), (), IMAGES)
    with pytest.raises(InputError, match="candidates, images: expected at least one of each, got 3 and 0"):
        replay_logits(tiny.chain(), iter(CANDIDATES), IMAGES[:0])


@pytest.mark.parametrize("batch", [0, -3])
def test_a_batch_of_no_rows_is_refused(batch):
    for function in (replay_logits, gati_jax.replay):
        with pytest.raises(InputError, match=f"batch: expected 1 or more, got {batch}"):
            function(tiny.chain(), CANDIDATES, IMAGES, batch=batch)
