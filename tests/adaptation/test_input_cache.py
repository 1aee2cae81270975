"""The input cache: exact repeats by a plain record, nearest entries by brute force, and both in batches."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gati_jax import InputError
from gati_jax.adaptation import (
    EXACT,
    NEAREST,
    ExactCache,
    ExactCacheConfig,
    InputCache,
    NearestCache,
    NearestCacheConfig,
    Ticket,
)

SHAPE = (4, 4, 1)


def cache_of(images, logits, **config):
    cache = NearestCache(SHAPE, NearestCacheConfig(**({"cells": 4, "radius": 1000.0} | config)))
    for key, row in zip(cache.keys(images), logits, strict=True):
        cache.add(key, row)
    return cache


def flat(values):
    """Return images of one grey level each: they are as far apart as their levels."""
    return np.broadcast_to(np.asarray(values, np.uint8)[:, None, None, None], (len(values), *SHAPE))


def logits_of(classes, margins):
    """Return logits of three classes that lead by the margins."""
    rows = np.zeros((len(classes), 3), np.float32)
    rows[np.arange(len(classes)), classes] = margins
    return rows


# --- Exact repeats ----------------------------------------------------------------------------------------------------

ACTIONS = st.lists(st.tuples(st.sampled_from(["ask", "store"]), st.integers(0, 5), st.integers(0, 4)), max_size=80)


@given(actions=ACTIONS, capacity=st.integers(1, 4), often=st.integers(1, 3))
def test_the_exact_cache_knows_what_the_latest_few_were_answered(actions, capacity, often):
    """The model is a list, least recent first: [input, class or None, when that was stored, how often it was asked]."""
    cache = ExactCache(ExactCacheConfig(capacity=capacity, seconds=10.0, often=often))
    model, now = [], 0.0
    for action, number, passed in actions:
        now += passed
        key = cache.key(np.array([number], np.uint8))
        mine = next((row for row in model if row[0] == number), [number, None, 0.0, 0])
        model = ([row for row in model if row is not mine] + [mine])[-capacity:]
        if action == "ask":
            mine[3] += 1
            known = mine[1] if mine[1] is not None and now < mine[2] + 10 else None
            assert cache.ask(key, now) == (known, known is None and mine[3] >= often)
        else:
            mine[1:3] = number + 100, now
            cache.store(key, number + 100, now)
        assert len(cache) == len(model) <= capacity


def test_inputs_are_told_apart_by_bytes_shape_and_dtype():
    cache = ExactCache()
    row = np.arange(12, dtype=np.uint8)
    like = [row, row.reshape(3, 4), row.reshape(4, 3), row.view(np.int8), row.view(np.uint16), row[::-1]]
    assert len({cache.key(image) for image in like}) == len(like)
    transposed = row.reshape(3, 4).T
    assert cache.key(transposed) == cache.key(np.ascontiguousarray(transposed)), "values count, not strides"
    assert cache.key(row) != ExactCache().key(row), "no client can prepare a collision"


# --- Near repeats -----------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), stored=st.integers(1, 30), cells=st.sampled_from([1, 2, 4]))
def test_the_nearest_entry_is_found(seed, stored, cells):
    rng = np.random.default_rng(seed)
    images, asked = (rng.integers(0, 256, (n, *SHAPE), dtype=np.uint8) for n in (stored, 20))
    logits = rng.standard_normal((stored, 3)).astype(np.float32)
    cache = cache_of(images, logits, cells=cells)
    found = cache.ask(cache.keys(asked))
    pooled = lambda x: x.reshape(-1, cells, 4 // cells, cells, 4 // cells).astype(float).mean((2, 4))  # noqa: E731
    apart = np.sqrt(((pooled(asked)[:, None] - pooled(images)[None]) ** 2).mean((2, 3)))
    by_hand = apart[np.arange(20), found.entry]
    np.testing.assert_allclose(by_hand, apart.min(1), atol=1e-2)
    ordered = np.sort(logits, 1)[found.entry]
    np.testing.assert_allclose(np.exp(found.score), (ordered[:, 2] - ordered[:, 1]) / (by_hand + 0.01), rtol=1e-3)
    np.testing.assert_array_equal(found.class_index, logits.argmax(1)[found.entry])


def test_beyond_the_radius_and_without_entries_nothing_is_found():
    cache = cache_of(flat([100]), logits_of([1], [1e9]), radius=20.0)
    near = np.isfinite(cache.ask(cache.keys(flat([79, 80, 100, 120, 121]))).score)
    assert near.tolist() == [False, True, True, True, False]
    found = cache_of(flat([]), []).ask(np.zeros((3, 16), np.float32))
    assert found.class_index.tolist() == [-1] * 3
    assert (found.score == -np.inf).all()
    tie = cache_of(flat([7]), np.ones((1, 3), np.float32))
    assert tie.ask(tie.keys(flat([7]))).score[0] < np.log(1e-3)


@pytest.mark.parametrize(("used", "outlives"), [(0, 0), (1, 2), (3, 6), (9, 6)])
def test_entries_that_answer_outlive_those_that_do_not(used, outlives):
    """In three rows: an entry stays a round of the two others longer for each answer, up to three rounds."""
    cache = cache_of(flat([0, 10, 20]), logits_of([2, 1, 1], [1.0] * 3), capacity=3)
    for _ in range(used):
        cache.used(int(cache.ask(cache.keys(flat([0]))).entry[0]))
    stored = []
    while cache.ask(cache.keys(flat([0]))).class_index[0] == 2 and len(stored) < 20:
        stored.append(100 + len(stored))
        cache.add(cache.keys(flat(stored[-1:]))[0], logits_of([1], [1.0])[0])
        latest = cache.ask(cache.keys(flat(stored[-1:])))
        assert (len(cache), latest.class_index[0]) == (3, 1)
    assert len(stored) == outlives + 1


def test_answers_that_are_not_finite_are_not_stored():
    cache = cache_of(flat([7]), logits_of([1], [2.0]))
    cache.add(cache.keys(flat([9]))[0], np.array([np.nan, 0, 0], np.float32))
    cache.add(np.full(16, np.inf, np.float32), np.zeros(3, np.float32))
    assert len(cache) == 1


def test_cells_divide_the_image():
    with pytest.raises(InputError, match="cells: expected a divisor of 4 and 4, got 3"):
        cache_of(flat([]), [], cells=3)


# --- Both -------------------------------------------------------------------------------------------------------------


def tickets(cache, images, *, search):
    made = []
    for number, (image, key) in enumerate(zip(images, cache.keys(images), strict=True)):
        made.append(Ticket(number=number, image=image, q=1.0, shadow=True, search=search[number], version=1, key=key))
        cache.ask_exact(made[-1], 0.0)
    return made


def layered():
    """An exact and an open nearest cache; level 10 is known exactly, 100 nearly, 200 not at all."""
    cache = InputCache(ExactCache(ExactCacheConfig(often=2)), cache_of(flat([100]), logits_of([1], [4.0]), radius=20.0))
    cache.threshold = 0.0
    assert cache.exact is not None
    cache.exact.store(cache.exact.key(flat([10])[0]), 2, 0.0)
    return cache


def said(made):
    return [(t.cached, t.frequent, t.nearest_class, t.nearest_score, t.features is None) for t in made]


def test_a_batch_is_answered_as_its_images_one_by_one_by_one_lookup(monkeypatch):
    images, search = flat([10, 100, 101, 200, 101, 10, 100]), [True, True, True, True, True, True, False]
    batch, single, asked = layered(), layered(), []
    ask = NearestCache.ask
    monkeypatch.setattr(NearestCache, "ask", lambda self, keys: asked.append(len(keys)) or ask(self, keys))
    together = tickets(batch, images, search=search)
    batch.resolve(together, batch.search(together))
    batch.resolve([], batch.search([]))
    assert asked == [4], "of those that are not answered exactly and are to be looked up"
    alone = []
    for image, wanted in zip(images, search, strict=True):
        (one,) = tickets(single, image[None], search=[wanted])
        single.resolve([one], single.search([one]))
        alone.append(one)
    np.testing.assert_equal(said(together), said(alone))
    exits = [t.cached and t.cached.exit for t in together]
    assert exits == [EXACT, NEAREST, NEAREST, None, None, EXACT, None]
    assert [t.frequent for t in together] == [False] * 4 + [True, False, True], "the base is to answer what comes often"


def test_a_lookup_beside_a_store_is_confirmed():
    """What is stored between lookup and answer counts, and what it replaces does not."""
    cache = layered()
    nearest = cache.nearest
    assert nearest is not None
    made = tickets(cache, flat([100]), search=[True])
    found = cache.search(made)
    nearest.add(nearest.keys(flat([100]))[0], logits_of([0], [9.0])[0])
    nearest.add(nearest.keys(flat([50]))[0], logits_of([2], [1.0])[0])
    cache.resolve(made, found)
    now = nearest.ask(nearest.keys(flat([100])))
    assert (made[0].nearest_class, made[0].nearest_score) == (now.class_index[0], now.score[0])


def test_confirmed_lookups_beside_a_writer_have_read_whole_entries():
    """Entry j has class j % 3 and margin 1 + j % 5, so a torn row would show."""
    cache, stop = cache_of(flat([]), [], capacity=7), threading.Event()
    levels = np.arange(20)
    keys, logits = cache.keys(flat(10 * levels)), logits_of(levels % 3, 1.0 + levels % 5)
    apart = 10.0 * np.abs(levels[:, None] - levels)
    possible = np.log((1 + levels % 5) / (apart + 0.01))

    def write():
        number = 0
        while not stop.wait(1e-4):
            cache.add(keys[number % 20], logits[number % 20])
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    confirmed = 0
    while confirmed < 100:
        found = cache.ask(keys)
        if len(cache) == 7 and cache.confirm(keys, found) is found:
            confirmed += 1
            entry = np.abs(possible - found.score[:, None]) + 100 * (levels % 3 != found.class_index[:, None])
            assert entry.min(1).max() < 1e-3
    stop.set()
    writer.join()
