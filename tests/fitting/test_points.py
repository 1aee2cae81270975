"""Points to keep, and k-means, against what must hold of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gati_jax import InputError
from gati_jax.fitting import choose_points, k_means
from gati_jax.fitting.freeze import describe_centres

CLASSES = 3


def clusters(n=90, seed=0, spread=0.5):
    """Three clusters, of 6/9, 2/9 and 1/9 of the points."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), [n * 6 // 9, n * 2 // 9, n // 9]).astype(np.int32)
    middle = np.array([[0, 0], [9, 0], [0, 9]])
    return (middle[labels] + spread * rng.standard_normal((len(labels), 2))).astype(np.float32), labels


@pytest.mark.parametrize("how", ["random", "condensed", "spread"])
@pytest.mark.parametrize("size", [1, 10, 40, 90])
def test_so_many_different_points_are_kept_and_repeatably(how, size):
    keys, labels = clusters()
    chosen = choose_points(keys, labels, size, k=3, classes=CLASSES, how=how, seed=4)
    assert len(set(chosen.tolist())) == size
    assert np.array_equal(chosen, choose_points(keys, labels, size, k=3, classes=CLASSES, how=how, seed=4))


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=6), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_every_class_has_its_share_as_far_as_it_has_points(counts, share, seed):
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    if not len(labels):
        return
    size = max(1, int(share * len(labels)))
    keys = np.zeros((len(labels), 2), np.float32)
    chosen = choose_points(keys, labels, size, k=1, classes=len(counts), seed=seed)
    kept = np.bincount(labels[chosen], minlength=len(counts))
    assert kept.sum() == size
    short = kept < counts  # a class with points left has as many as any other, but for what does not divide
    assert not short.any() or kept[short].min() >= kept.max() - 1


def test_spread_takes_the_farthest_every_time():
    keys = np.array([[0], [1], [2], [3], [10], [11]], np.float32)
    chosen = choose_points(keys, np.zeros(6, np.int32), 3, k=1, classes=1, how="spread")
    assert chosen.tolist() == [0, 3, 5]  # nearest the mean 4.5; then 8 away; then 3 away


def test_condensed_keeps_what_a_cache_without_it_gets_wrong():
    """Ten points of class 1 in the middle of class 0, and half of the room drawn at random."""
    keys, labels = clusters(900, spread=1.0)
    odd = np.flatnonzero(labels == 0)[:10]
    keys[odd], labels[odd] = keys[odd] * 0.05, 1
    missing = [
        len(set(odd.tolist()) - set(choose_points(keys, labels, 90, k=5, classes=CLASSES, how=how).tolist()))
        for how in ("condensed", "random")
    ]
    assert missing[0] <= 2  # which those that it has got in answer for
    assert missing[1] > 5


@pytest.mark.parametrize("size", [0, 91])
def test_more_points_than_there_are_cannot_be_kept(size):
    keys, labels = clusters()
    with pytest.raises(InputError, match=f"points: expected 1 to 90, got {size}"):
        choose_points(keys, labels, size, k=1, classes=CLASSES)


def test_k_means_finds_clusters():
    keys, labels = clusters(spread=0.3)
    at, nearest = k_means(keys, CLASSES, seed=1)
    majority, share = describe_centres(nearest, labels, CLASSES, CLASSES)
    assert sorted(majority.tolist()) == [0, 1, 2]
    assert share.tolist() == [1, 1, 1]
    for centre, label in zip(np.asarray(at), majority.tolist(), strict=True):
        np.testing.assert_allclose(centre, keys[labels == label].mean(0), atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000))
def test_k_means_ends_where_no_point_and_no_centre_moves(seed):
    keys = np.random.default_rng(seed).standard_normal((80, 3)).astype(np.float32)
    at, nearest = k_means(keys, 9, seed=seed, rounds=500)
    distance = np.linalg.norm(keys[:, None] - np.asarray(at)[None], axis=-1)
    np.testing.assert_allclose(distance[np.arange(80), nearest], distance.min(1), rtol=1e-4)
    assert len(set(np.asarray(nearest).tolist())) == 9  # none is empty
    for centre in range(9):
        np.testing.assert_allclose(at[centre], keys[np.asarray(nearest) == centre].mean(0), atol=1e-5)


def test_scikit_learn_finds_nothing_much_better():
    cluster = pytest.importorskip("sklearn.cluster")
    keys = np.random.default_rng(0).standard_normal((400, 4)).astype(np.float32)
    ours = min(_inertia(keys, *k_means(keys, 12, seed=seed)) for seed in range(4))
    theirs = cluster.KMeans(12, n_init=4, random_state=0).fit(keys).inertia_
    assert ours < 1.05 * theirs


def _inertia(keys, at, nearest):
    return float(np.sum((keys - np.asarray(at)[np.asarray(nearest)]) ** 2))


def test_repeated_points_leave_centres_without_any_which_nobody_is_near_to():
    keys = np.repeat(np.eye(2, dtype=np.float32), 5, axis=0)
    at, nearest = k_means(keys, 4, seed=0)
    assert _inertia(keys, at, nearest) == 0
    labels, share = describe_centres(nearest, np.zeros(10, np.int32), 4, 2)
    assert sorted(labels.tolist()) == [-1, -1, 0, 0]
    assert sorted(share.tolist()) == [0, 0, 1, 1]


def test_an_empty_centre_moves_to_the_farthest_point():
    from gati_jax.fitting.freeze import _round  # noqa: PLC0415

    points = jnp.asarray([[0.0], [1.0], [8.0]])
    moved, nearest = _round(points, jnp.asarray([[0.0], [50.0]]), jnp.zeros(3, jnp.int32))
    assert moved.tolist() == [[3.0], [8.0]]
    assert nearest.tolist() == [0, 0, 1]


@pytest.mark.parametrize("centres", [0, 4])
def test_more_centres_than_points_are_refused(centres):
    with pytest.raises(InputError, match=f"centres: expected 1 to the 3 points, got {centres}"):
        k_means(np.zeros((3, 2), np.float32), centres, seed=0)
