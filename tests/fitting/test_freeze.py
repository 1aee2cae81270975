"""Neighbour caches through the whole house on a tiny chain, like learned ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import CostTable, FreezeConfig, Head, InputError
from gati_jax.caches import Neighbours, keys_of, point_bytes
from gati_jax.planning import replay_plan
from gati_jax.runtime import Cascade, predict_batch
from gati_jax.runtime.batched import BatchedCascade, Schedule, predict_tiled
from train.reproduce import freeze_plan, zero_error_thresholds

UNITS, K, CENTRES = 16, 5, 12
FREEZE = FreezeConfig(key_units=UNITS, k=K, centres=CENTRES)


def fit(tiny, *, freeze=FREEZE, **options):
    rows, select = tiny.images()
    return gati_jax.fit_freeze(
        tiny.chain(), rows, select=select, freeze=freeze, config=tiny.CONFIG, progress=False, **options
    )


@pytest.fixture(scope="module")
def candidates(tiny):
    return fit(tiny)


@pytest.fixture(scope="module")
def certify_rows():
    return np.random.default_rng(5).standard_normal((400, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def select(tiny, candidates):
    return gati_jax.replay(tiny.chain(), candidates, tiny.images()[1])


def costs(candidates):
    return CostTable(device="test", batch=1, blocks_ms=(1.0,) * 3, lookup_ms={c.name: 0.05 for c in candidates})


def of_kind(candidates, kind):
    return candidates.take([c.name for c in candidates if c.name.startswith(kind)])


def test_all_points_are_the_keys_and_answers_of_the_fit_images(tiny, candidates):
    assert [c.name for c in candidates] == ["knn@1", "knn@2", "kmeans@1", "kmeans@2"]
    rows, _ = tiny.images()
    sites, logits = tiny.chain().activations(jnp.asarray(rows))
    for c in of_kind(candidates, "knn"):
        points = c.params["predictor"]["points"]
        np.testing.assert_allclose(points["keys"], keys_of(c, sites[c.site]), atol=1e-5)
        assert np.array_equal(points["labels"], np.argmax(logits, -1))


def test_caches_that_were_fitted_know_something(select):
    most_frequent = np.bincount(select.answers).max() / len(select)
    assert (select.agrees.mean(1) > most_frequent + 0.15).all()
    assert np.isfinite(select.scores).all()


def test_select_rows_are_no_others_scores_and_fit_rows_are_refused(tiny, candidates, select):
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
    with pytest.raises(InputError, match="at least one request"):
        zero_error_thresholds(
            dataclasses.replace(
                select, answers=select.answers[:0], classes=select.classes[:, :0], scores=select.scores[:, :0],
                rows=select.rows[:0],
            )
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["knn", "kmeans"])
def test_replay_plan_certify_bundle_infer(kind, tiny, candidates, select, certify_rows, tmp_path):
    chain, chosen = tiny.chain(), of_kind(candidates, kind)
    plan = freeze_plan(select.take([c.name for c in reversed(chosen.items)]), costs(chosen))
    assert plan.sites == (1, 2)
    assert plan.disagreement.tolist() == [0, 0]
    table = gati_jax.replay(chain, chosen, certify_rows)
    outcome = replay_plan(table, plan.thresholds(1))
    assert 0 < (outcome.exits < 2).mean() < 1
    certificate = gati_jax.certify(plan, table, epsilon=0.3, delta=0.1)
    assert certificate.certified
    gati_jax.save_bundle(tmp_path / "bundle", chain, chosen, plan, certificate)
    bundle = gati_jax.load_bundle(tmp_path / "bundle", chain=chain)
    assert jax.tree.all(jax.tree.map(np.array_equal, bundle.caches, tuple(chosen)))
    found = gati_jax.infer_batch(bundle, certify_rows[:100], numerics="reference")
    assert np.array_equal(found.exit, np.array([1, 2, 3])[outcome.exits[:100]])
    assert np.array_equal(found.class_index, outcome.classes[:100])
    one = gati_jax.infer(bundle, certify_rows[3])
    assert (int(one.exit), int(one.class_index)) == (int(found.exit[3]), int(found.class_index[3]))


def test_the_house_composes_them_too(tiny, candidates, select, certify_rows):
    plan = gati_jax.plan(select, costs(candidates), epsilon=0.3)
    table = gati_jax.replay(tiny.chain(), candidates, certify_rows)
    assert gati_jax.certify(plan, table, epsilon=0.5).certified


@pytest.mark.parametrize("kind", ["knn", "kmeans"])
def test_batches_leave_as_single_requests_do(kind, tiny, candidates, select, certify_rows):
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
def test_a_budget_is_kept(choice, tiny):
    budget = 2 * (40 * point_bytes(UNITS) + 4)  # 4: each cache's count of its points
    freeze = dataclasses.replace(FREEZE, kinds=("knn",), budget=budget, choice=choice)
    fitted = fit(tiny, freeze=freeze)
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
def test_what_cannot_be_made_is_refused_before_training(options, message, tiny):
    with pytest.raises(InputError, match=message):
        fit(tiny, freeze=dataclasses.replace(FREEZE, **options))


@pytest.mark.parametrize("bad", [{"kinds": ()}, {"kinds": ("knn", "knn")}, {"k": 0}, {"cells": 0}, {"budget": 0}])
def test_a_config_that_cannot_be_is_refused(bad):
    with pytest.raises(InputError, match=f"{next(iter(bad))}: expected"):
        FreezeConfig(**bad)


def test_overlapping_splits_and_training_by_gradients_are_refused(tiny):
    rows, select = tiny.images()
    with pytest.raises(InputError, match="select and fit disjoint"):
        gati_jax.fit_freeze(tiny.chain(), rows, select=rows[:60], progress=False)
    head = Head(name="knn", predictor=lambda c: Neighbours(c, points=9), selector=gati_jax.caches.Confidence())
    with pytest.raises(InputError, match="see fit_freeze"):
        gati_jax.fit(tiny.chain(), rows, select=select, heads=[head])
