"""Neighbour caches against plain NumPy: distances, votes, centres, memory."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gati_jax import Candidate, InputError, caches
from gati_jax.caches import Centres, Confidence, Neighbours, key_features, lookup

CLASSES, UNITS, SITE = 4, 6, (4, 4, 3)


def hidden(features: int, units=UNITS) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    kernel = rng.standard_normal((features, units)).astype(np.float32)
    return {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(rng.standard_normal(units).astype(np.float32))}


def knn(keys, labels, *, empty=0, k=3, features=48, cells=None) -> Candidate:
    """A cache of points whose keys are given, with some rows without a point, as bundles may hold them."""
    predictor = Neighbours(CLASSES, points=len(keys) + empty, k=k, units=keys.shape[1], cells=cells)
    points = caches.stored_points(
        np.concatenate([keys, np.zeros((empty, keys.shape[1]), np.float32)]),
        np.concatenate([labels, np.full(empty, -1, np.int32)]),
    )
    params = {"params": {"hidden": hidden(features, keys.shape[1])}, "points": points}
    return Candidate("knn@1", 1, predictor, Confidence(), {"predictor": params, "selector": {}})


def random_points(n, seed=0, units=UNITS):
    rng = np.random.default_rng(seed)
    return (3 * rng.standard_normal((n, units))).astype(np.float32), rng.integers(0, CLASSES, n).astype(np.int32)


def activations(n=5, shape=SITE):
    return np.random.default_rng(1).standard_normal((n, *shape)).astype(np.float32)


def reference_keys(candidate, x):
    """Flatten channels first, as the paper's PyTorch does; float64."""
    own = candidate.params["predictor"]["params"]["hidden"]
    flat = np.moveaxis(x, -1, 1).reshape(len(x), -1).astype(np.float64)
    return np.maximum(flat @ np.asarray(own["kernel"], np.float64) + np.asarray(own["bias"], np.float64), 0)


def reference_scores(keys, points, labels, k):
    """(m_i / k) x the sum of 1 / distance over the neighbours of label i, one request at a time."""
    scores = np.zeros((len(keys), CLASSES))
    for row, key in enumerate(keys):
        distance = np.sqrt(((points.astype(np.float64) - key) ** 2).sum(1))
        for i in range(CLASSES):
            near = [n for n in np.argsort(distance, kind="stable")[:k] if labels[n] == i]
            scores[row, i] = len(near) / k * sum(1 / distance[n] for n in near)
    return scores


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 40), seed=st.integers(0, 99), empty=st.integers(0, 3))
def test_scores_are_the_papers(n, k, seed, empty):
    keys, labels = random_points(n, seed)
    k, x = min(n, k), activations()
    cache = knn(keys, labels, k=k, empty=empty)
    expected = reference_scores(reference_keys(cache, x), keys, labels, k)
    logits, score = lookup(cache, jnp.asarray(x))
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(np.exp(logits), expected, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(score, np.log(expected.max(1)), atol=2e-4)


def test_neighbours_are_scikit_learns():
    neighbors = pytest.importorskip("sklearn.neighbors")
    points, labels = random_points(500, units=32)
    asked, _ = random_points(60, seed=1, units=32)
    found, distances = caches.nearest(jnp.asarray(asked), jnp.asarray(points), jnp.sum(jnp.asarray(points) ** 2, 1), 50)
    model = neighbors.KNeighborsClassifier(50, algorithm="brute").fit(points, labels)
    expected_distances, expected = model.kneighbors(asked)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-4)
    same = np.mean([len(set(a) & set(b)) for a, b in zip(np.asarray(found).tolist(), expected.tolist(), strict=True)])
    assert same > 49.9  # the last may differ where two are equally far to seven digits


def test_an_exact_repeat_is_sure_and_finite():
    x = activations(1)
    keys, labels = random_points(12)
    keys, labels = np.concatenate([keys, reference_keys(knn(keys, labels), x).astype(np.float32)]), np.append(labels, 2)
    logits, score = lookup(knn(keys, labels.astype(np.int32), k=4), jnp.asarray(x))
    assert np.isfinite(logits).all()
    assert np.isfinite(score).all()
    assert int(jnp.argmax(logits[0])) == 2
    far, _ = lookup(knn(keys[:-1], labels[:-1].astype(np.int32), k=4), jnp.asarray(x))
    assert float(score[0]) > float(far.max()) + 5  # thousands of times surer


def test_repeats_far_from_the_origin_stay_repeats():
    """Where the matrix product's rounding is larger than the distances between points."""
    rng = np.random.default_rng(0)
    points = jnp.asarray(1000 + rng.standard_normal((30, UNITS)), jnp.float32)
    index, distance = caches.nearest(points, points, jnp.sum(points**2, 1), 1)
    floor = 1e-4 * np.linalg.norm(points, axis=1)
    np.testing.assert_allclose(distance[:, 0], np.maximum(np.linalg.norm(points - points[index[:, 0]], axis=1), floor))
    assert np.isfinite(distance).all()
    assert (caches.squared_distances(points, points, jnp.sum(points**2, 1)) >= 0).all()


def test_ties_go_to_the_first_point_and_the_lowest_class():
    keys = np.ones((6, UNITS), np.float32)
    labels = np.array([3, 1, 1, 3, 0, 0], np.int32)
    index, _ = caches.nearest(jnp.zeros((1, UNITS)), jnp.asarray(keys), jnp.sum(jnp.asarray(keys) ** 2, 1), 4)
    assert index.tolist() == [[0, 1, 2, 3]]
    logits, _ = lookup(knn(keys, labels, k=4), jnp.asarray(activations(1)))
    assert float(logits[0, 1]) == float(logits[0, 3])
    assert int(jnp.argmax(logits[0])) == 1


def test_rows_without_a_point_are_never_neighbours():
    keys, labels = random_points(3)
    far = keys + 1e4  # empty rows hold zeros, which are much nearer
    logits, _ = lookup(knn(far, labels, empty=47, k=10), jnp.asarray(activations()))
    full, _ = lookup(knn(far, labels, k=3), jnp.asarray(activations()))
    np.testing.assert_allclose(logits, np.where(full > -60, full + np.log(3 / 10), full), atol=1e-4)
    empty, score = lookup(knn(keys[:0], labels[:0], empty=5, k=5), jnp.asarray(activations()))
    assert np.isfinite(empty).all()
    assert (score == score.min()).all()


def test_more_neighbours_than_points_are_refused():
    keys, labels = random_points(3)
    with pytest.raises(InputError, match="k: expected at most the 3 points, got 4"):
        lookup(knn(keys, labels, k=4), jnp.asarray(activations()))


def test_a_pooled_key_averages_fields():
    keys, labels = random_points(20)
    x = activations()
    cache = knn(keys, labels, cells=2, features=12)
    own = cache.params["predictor"]["params"]["hidden"]
    means = x.reshape(5, 2, 2, 2, 2, 3).mean((2, 4)).reshape(5, 12)
    expected = np.maximum(means @ np.asarray(own["kernel"]) + np.asarray(own["bias"]), 0)
    np.testing.assert_allclose(key_features(jnp.asarray(x), 2), means, rtol=1e-5, atol=1e-6)
    scores = reference_scores(expected, keys, labels, 3)
    np.testing.assert_allclose(np.exp(lookup(cache, jnp.asarray(x))[0]), scores, rtol=1e-3, atol=1e-6)


def test_the_nearest_centre_answers_with_its_share_over_the_distance():
    keys, _ = random_points(7)
    labels, share = np.array([0, 1, 2, 3, 0, 1, -1], np.int32), np.linspace(0.4, 1, 7).astype(np.float32)
    predictor = Centres(CLASSES, centres=7, units=UNITS)
    params = {"params": {"hidden": hidden(48)}, "points": caches.stored_centres(keys, labels, share)}
    cache = Candidate("kmeans@1", 1, predictor, Confidence(), {"predictor": params, "selector": {}})
    x = activations(40)
    logits, score = lookup(cache, jnp.asarray(x))
    distance = np.linalg.norm(reference_keys(cache, x)[:, None] - keys[None, :6], axis=-1)  # the last has no points
    at = distance.argmin(1)
    assert np.array_equal(logits.argmax(1), labels[at])
    np.testing.assert_allclose(score, np.log(share[at] / distance.min(1)), atol=1e-4)
    assert np.isfinite(logits).all()


def test_memory_is_counted_with_the_key_network():
    cache = knn(*random_points(20), empty=10)
    (row,) = caches.memory_report([cache])
    assert (row.name, row.site) == ("knn@1", 1)
    assert row.key_network == 4 * (48 * UNITS + UNITS)
    assert row.points == 30 * caches.point_bytes(UNITS) + 4  # the count of points
    assert row.key_network + row.points == cache.bytes
    head = Candidate("fc@1", 1, caches.FullyConnected(CLASSES), Confidence(), {})
    with pytest.raises(InputError, match="expected neighbour caches, got fc@1, a FullyConnected"):
        caches.memory_report([head])
