"""Which points are kept and how centres are found; neighbour caches from fit to bundle, on a tiny chain."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax import CostTable, FreezeConfig, Head, InputError
from gati_jax.caches import Neighbours, choose, point_bytes
from gati_jax.fitting import choose_points
from gati_jax.fitting.freeze import labelled_centres
from gati_jax.planning import replay_plan
from gati_jax.runtime import Cascade, predict_batch
from gati_jax.runtime.batched import BatchedCascade, Schedule, predict_tiled
from tests.fitting import tiny
from train.reproduce import zero_error_thresholds

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
    one, again = (choose_points(*clusters(), size, k=3, classes=CLASSES, how=how, seed=4) for _ in range(2))
    assert len(set(one.tolist())) == size
    assert np.array_equal(one, again)


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
    with pytest.raises(InputError, match=f"points: expected 1 to 90, got {size}"):
        choose_points(*clusters(), size, k=1, classes=CLASSES)


def test_k_means_finds_clusters_and_their_majority_labels():
    keys, labels = clusters(spread=0.3)
    cluster = labels.copy()
    labels[-1] = 1  # in the last of three clusters, of ten keys
    centres, majority, share = labelled_centres(keys, labels, CLASSES, classes=CLASSES, seed=1)
    assert sorted(majority.tolist()) == [0, 1, 2]
    assert dict(zip(majority.tolist(), share.tolist(), strict=True)) == pytest.approx({0: 1, 1: 1, 2: 0.9})
    for centre, label in zip(centres, majority.tolist(), strict=True):
        np.testing.assert_allclose(centre, keys[cluster == label].mean(0), atol=1e-5)
    again = labelled_centres(keys, labels, CLASSES, classes=CLASSES, seed=1)
    np.testing.assert_array_equal(centres, again[0])


def test_repeated_keys_leave_centres_without_a_label():
    keys = np.repeat(np.eye(2, dtype=np.float32), 5, axis=0)
    centres, labels, share = labelled_centres(keys, np.zeros(10, np.int32), 4, classes=2, seed=0)
    assert sorted(labels.tolist()) == [-1, -1, 0, 0]
    assert sorted(share.tolist()) == [0, 0, 1, 1]
    assert {tuple(centre) for centre in centres[labels == 0].tolist()} == {(1.0, 0.0), (0.0, 1.0)}


def test_k_means_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(InputError, match=r'"kmeans" needs scikit-learn \(pip install "gati-jax\[train\]"\)'):
        labelled_centres(np.eye(3, dtype=np.float32), np.zeros(3, np.int32), 2, classes=2, seed=0)


UNITS, K, CENTRES = 16, 5, 16
FREEZE = FreezeConfig(key_units=UNITS, k=K, centres=CENTRES)


def fit(*, freeze=FREEZE, **options):
    rows, select = tiny.images()
    return gati_jax.fit_freeze(
        tiny.chain(), rows, select=select, freeze=freeze, config=tiny.CONFIG, progress=False, **options
    )


@pytest.fixture(scope="module")
def candidates():
    return fit()


@pytest.fixture(scope="module")
def certify_rows():
    return np.random.default_rng(5).standard_normal((400, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def select(candidates):
    return gati_jax.replay(tiny.chain(), candidates, tiny.images()[1])


def costs(candidates):
    return CostTable(device="test", batch=1, blocks_ms=(1.0,) * 3, lookup_ms={c.name: 0.05 for c in candidates})


def of_kind(candidates, kind):
    return candidates.take([c.name for c in candidates if c.name.startswith(kind)])


def test_all_points_are_the_keys_and_answers_of_the_fit_images(candidates):
    assert [c.name for c in candidates] == ["knn@1", "knn@2", "kmeans@1", "kmeans@2"]
    rows, _ = tiny.images()
    sites, logits = tiny.chain().activations(jnp.asarray(rows))
    for c in of_kind(candidates, "knn"):
        points = c.params["predictor"]["points"]
        hidden = c.params["predictor"]["params"]["hidden"]
        keys = np.maximum(np.asarray(sites[c.site]) @ np.asarray(hidden["kernel"]) + np.asarray(hidden["bias"]), 0)
        np.testing.assert_allclose(points["keys"], keys, atol=1e-5)
        assert np.array_equal(points["labels"], np.argmax(logits, -1))


def test_fitted_caches_agree_more_often_than_the_most_frequent_answer(select):
    most_frequent = np.bincount(select.answers).max() / len(select)
    assert (select.agrees.mean(1) > most_frequent + 0.15).all()
    assert np.isfinite(select.scores).all()


def test_select_rows_have_the_same_scores_as_new_rows_and_fit_rows_are_refused(candidates, select):
    alone = gati_jax.replay(tiny.chain(), list(candidates), tiny.images()[1])
    assert np.array_equal(select.scores, alone.scores)  # nothing was fitted on them
    with pytest.raises(InputError, match="images and fit disjoint"):
        gati_jax.replay(tiny.chain(), candidates, tiny.images()[0])


def test_thresholds_are_above_every_wrong_answer_and_no_higher(select):
    thresholds = zero_error_thresholds(select)
    for agrees, scores, threshold in zip(select.agrees, select.scores, thresholds, strict=True):
        hit = scores >= threshold
        assert agrees[hit].all()
        surest = scores[~agrees].max()
        assert hit.sum() == (scores > surest).sum()
        assert np.nextafter(threshold, np.float32(-np.inf)) == surest


def test_a_cache_that_was_never_wrong_is_always_believed(select):
    perfect = dataclasses.replace(select, classes=np.tile(select.answers, (len(select.names), 1)))
    thresholds = zero_error_thresholds(perfect)
    assert np.isfinite(thresholds).all()
    assert (replay_plan(perfect, thresholds).exits == 0).all()
    cut = {"answers": select.answers[:0], "classes": select.classes[:, :0], "scores": select.scores[:, :0]}
    with pytest.raises(InputError, match="at least one request"):
        zero_error_thresholds(dataclasses.replace(select, **cut, rows=select.rows[:0]))


@pytest.mark.parametrize("kind", ["knn", "kmeans"])
def test_replay_plan_certify_bundle_infer(kind, candidates, select, certify_rows, tmp_path):
    chain, chosen = tiny.chain(), of_kind(candidates, kind)
    plan = gati_jax.plan(select.take([c.name for c in chosen.items]), costs(chosen), epsilon=0.3)
    table = gati_jax.replay(chain, chosen, certify_rows)
    certificate = gati_jax.certify(plan, table, epsilon=0.5, delta=0.1)
    assert certificate.certified
    outcome = replay_plan(table.take(plan.names), plan.thresholds(certificate.step))
    assert (outcome.exits < len(plan.names)).mean() > 0
    gati_jax.save_bundle(tmp_path / "bundle", chain, chosen, plan, certificate)
    bundle = gati_jax.load_bundle(tmp_path / "bundle", chain=chain)
    saved = choose(chosen, [cache.name for cache in bundle.caches])
    assert jax.tree.all(jax.tree.map(np.array_equal, bundle.caches, saved))
    found = gati_jax.infer_batch(bundle, certify_rows[:100], numerics="reference")
    assert np.array_equal(found.exit, np.array([*plan.sites, 3])[outcome.exits[:100]])
    assert np.array_equal(found.class_index, outcome.classes[:100])
    one = gati_jax.infer(bundle, certify_rows[3])
    assert (int(one.exit), int(one.class_index)) == (int(found.exit[3]), int(found.class_index[3]))


@pytest.mark.parametrize("kind", ["knn", "kmeans"])
def test_batches_leave_as_single_requests_do(kind, candidates, select, certify_rows):
    chosen = of_kind(candidates, kind)
    thresholds = np.quantile(select.take([c.name for c in chosen]).scores, 0.6, axis=1)
    cascade = Cascade(tiny.chain(), chosen.items, jnp.asarray(thresholds, jnp.float32))
    images = certify_rows[:53]
    single = predict_batch(cascade, images)
    tiled = predict_tiled(BatchedCascade.of(cascade, Schedule.of({8: 4.0, 2: 1.5})), images)
    assert len(set(np.asarray(single.exit).tolist())) == 3
    assert np.array_equal(single.exit, tiled.exit)
    assert np.array_equal(single.class_index, tiled.class_index)
    np.testing.assert_allclose(single.score, tiled.score, atol=1e-3)


@pytest.mark.parametrize("choice", ["random", "condensed", "spread"])
def test_a_budget_is_kept(choice):
    budget = 2 * (40 * point_bytes(UNITS) + 4)  # 4: each cache's count of its points
    freeze = dataclasses.replace(FREEZE, kinds=("knn",), budget=budget, choice=choice)
    fitted = fit(freeze=freeze)
    for c in fitted:
        assert isinstance(c.predictor, Neighbours)
        assert c.predictor.points == 40
        assert int((c.params["predictor"]["points"]["labels"] >= 0).sum()) == 40
    rows = gati_jax.caches.memory_report(fitted)
    assert sum(row.points for row in rows) == budget
    for less, points in ((0, 40), (1, 39), (2 * point_bytes(UNITS), 39), (2 * point_bytes(UNITS) + 1, 38)):
        assert dataclasses.replace(freeze, budget=budget - less).points(256, 2) == points


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 257}, "k: expected at most the points of a cache, got 257, and room for 256 points"),
        ({"budget": 100}, "k: expected at most .* room for 0 points"),
        ({"centres": 257}, "centres: expected at most the 256 images, got 257"),
    ],
    ids=["k", "budget", "centres"],
)
def test_what_cannot_be_made_is_refused_before_training(options, message):
    with pytest.raises(InputError, match=message):
        fit(freeze=dataclasses.replace(FREEZE, **options))


@pytest.mark.parametrize("bad", [{"kinds": ()}, {"kinds": ("knn", "knn")}, {"k": 0}, {"cells": 0}, {"budget": 0}])
def test_a_config_that_cannot_be_is_refused(bad):
    with pytest.raises(InputError, match=f"{next(iter(bad))}: expected"):
        FreezeConfig(**bad)


def test_neighbour_caches_are_not_trained_by_gradients():
    rows, select = tiny.images()
    head = Head(name="knn", predictor=lambda c: Neighbours(c, points=9), selector=gati_jax.caches.Confidence())
    with pytest.raises(InputError, match="see fit_freeze"):
        gati_jax.fit(tiny.chain(), rows, select=select, heads=[head])
