"""Stored points: the nearest by brute force, scores by their formula, what stays and what goes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gati_jax import InputError
from gati_jax.adaptation import NearestCache, NearestCacheConfig, threshold_for

SHAPE = (4, 4, 1)


def points_of(images, logits, **config):
    points = NearestCache(SHAPE, "b", NearestCacheConfig(**({"cells": 4, "radius": 1000.0} | config)))
    for key, row in zip(points.keys(images), logits, strict=True):
        points.add(key, row, base="b")
    return points


def flat(values):
    """Return images of one grey level each: they are as far apart as their levels."""
    return np.broadcast_to(np.asarray(values, np.uint8)[:, None, None, None], (len(values), *SHAPE))


def logits_of(classes, margins):
    """Return logits of three classes that lead by the margins."""
    rows = np.zeros((len(classes), 3), np.float32)
    rows[np.arange(len(classes)), classes] = margins
    return rows


@given(seed=st.integers(0, 10**6), stored=st.integers(1, 30), cells=st.sampled_from([1, 2, 4]))
def test_the_nearest_point_answers(seed, stored, cells):
    rng = np.random.default_rng(seed)
    images, asked = (rng.integers(0, 256, (n, *SHAPE), dtype=np.uint8) for n in (stored, 20))
    logits = rng.standard_normal((stored, 3)).astype(np.float32)
    points = points_of(images, logits, cells=cells)
    found = points.ask(points.keys(asked))
    pooled = lambda x: x.reshape(-1, cells, 4 // cells, cells, 4 // cells).astype(float).mean((2, 4))  # noqa: E731
    apart = np.sqrt(((pooled(asked)[:, None] - pooled(images)[None]) ** 2).mean((2, 3)))
    by_hand = apart[np.arange(20), found.point]
    np.testing.assert_allclose(by_hand, apart.min(1), atol=1e-2)
    ordered = np.sort(logits, 1)[found.point]
    np.testing.assert_allclose(np.exp(found.score), (ordered[:, 2] - ordered[:, 1]) / (by_hand + 0.01), rtol=1e-3)
    np.testing.assert_array_equal(found.class_index, logits.argmax(1)[found.point])


def test_a_score_falls_with_the_distance_and_rises_with_the_margin():
    points = points_of(flat([0, 100]), logits_of([1, 2], [4.0, 1.0]))
    found = points.ask(points.keys(flat([0, 10, 20, 90])))
    assert found.class_index.tolist() == [1, 1, 1, 2]
    np.testing.assert_allclose(np.exp(found.score), [4 / 0.01, 4 / 10.01, 4 / 20.01, 1 / 10.01], rtol=1e-4)


def test_beyond_the_radius_nothing_is_said():
    points = points_of(flat([100]), logits_of([1], [1e9]), radius=20.0)
    assert np.isfinite(points.ask(points.keys(flat([79, 80, 100, 120, 121]))).score).tolist() == [
        False,
        *[True] * 3,
        False,
    ]


def test_no_point_answers_before_there_is_one():
    found = NearestCache(SHAPE, "b", NearestCacheConfig(cells=4)).ask(np.zeros((3, 16), np.float32))
    assert found.class_index.tolist() == [-1] * 3
    assert (found.score == -np.inf).all()


@given(actions=st.lists(st.booleans() | st.integers(0, 9), max_size=60), capacity=st.integers(1, 5))
def test_points_that_are_asked_outlive_those_that_are_not(actions, capacity):
    """The model: rows with their chances, and a hand that takes one from each point it passes (up to three given)."""
    points, rows, chances, hand, new = points_of(flat([]), [], capacity=capacity), [], [], 0, 0
    for action in actions:
        if isinstance(action, bool):
            if len(rows) < capacity:
                rows.append(new)
                chances.append(0)
            else:
                while chances[hand]:
                    chances[hand] -= 1
                    hand = (hand + 1) % capacity
                rows[hand], chances[hand], hand = new, 0, (hand + 1) % capacity
            points.add(points.keys(flat([new]))[0], logits_of([0], [1.0])[0], base="b")
            new += 1
        elif action < len(rows):
            points.used(action)
            chances[action] = min(3, chances[action] + 1)
        assert len(points) == len(rows) <= capacity
    if rows:
        found = points.ask(points.keys(flat(rows)))
        assert found.point.tolist() == list(range(len(rows)))
        np.testing.assert_allclose(found.score, np.log(1 / 0.01), rtol=1e-5)


def test_only_the_served_base_is_asked():
    points = points_of(flat([7]), logits_of([1], [2.0]))
    points.add(points.keys(flat([9]))[0], logits_of([2], [2.0])[0], base="the one before")
    points.add(points.keys(flat([9]))[0], np.array([np.nan, 0, 0], np.float32), base="b")
    assert len(points) == 1
    points.serve("b")
    assert len(points) == 1
    points.serve("c")
    assert len(points) == 0
    assert points.ask(points.keys(flat([7]))).class_index.tolist() == [-1]


def test_a_tie_of_the_base_is_hardly_a_point():
    points = points_of(flat([7]), np.ones((1, 3), np.float32))
    assert points.ask(points.keys(flat([7]))).score[0] < np.log(1e-3)


@pytest.mark.parametrize("wrong", [{"capacity": 0}, {"cells": 0}, {"cells": 3}, {"radius": 0.0}])
def test_settings_out_of_bounds_are_named(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))}.*: expected"):
        NearestCache(SHAPE, "b", NearestCacheConfig(**wrong))


@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.sampled_from([1.0, 1.0, 5.0])), max_size=40),
    risk=st.sampled_from([0.01, 0.1, 0.3]),
)
def test_the_lowest_threshold_within_the_risk(rows, risk):
    scores, wrong, weights = (np.array([row[i] for row in rows], kind) for i, kind in enumerate((float, bool, float)))

    def share(threshold):
        hits = scores >= threshold
        return ((weights * wrong)[hits].sum() + weights.max()) / (weights.sum() + weights.max())

    allowed = [threshold for threshold in set(scores) if share(threshold) <= risk]
    lower = [t for t in allowed if all(share(above) <= risk for above in set(scores) if above >= t)]
    assert threshold_for(scores, wrong, weights, risk=risk) == min(lower, default=np.inf)
