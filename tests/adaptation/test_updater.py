"""From a window to a bundle, on a tiny chain whose traffic moves away from what the caches have learned."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import gati_jax
from gati_jax import Bundle, CostTable, FitConfig, InputError, planning
from gati_jax.adaptation import (
    Trial,
    TrialConfig,
    UpdateConfig,
    examine,
    refit_caches,
    replan,
    standing_cascade,
    updated,
)
from gati_jax.bundle import Versions
from gati_jax.caches import FullyConnected, unfold_standardize
from gati_jax.fitting import evaluate
from gati_jax.pytrees import call
from gati_jax.runtime import per_sample, predict_batch
from tests.fitting import tiny

CONFIG = UpdateConfig(fit=FitConfig(epochs=8, batch=32, learning_rate=0.01), least=64)


def traffic(n: int, seed: int) -> np.ndarray:
    """Drifted: other scales than in the fit, and a shift."""
    return (2.0 * np.random.default_rng(seed).standard_normal((n, 12)) + 1.0).astype(np.float32)


@pytest.fixture(scope="module")
def served() -> Bundle:
    chain, candidates = tiny.chain(), tiny.fit()
    costs = CostTable(device="test", batch=1, blocks_ms=(1.0,) * 3, lookup_ms={c.name: 0.01 for c in candidates})
    table = gati_jax.replay(chain, candidates, tiny.images()[1])
    plan = planning.plan(table, costs, epsilon=0.2, seconds=2.0)
    certify = np.random.default_rng(5).standard_normal((400, 12)).astype(np.float32)
    certificate = gati_jax.certify(plan, gati_jax.replay(chain, candidates, certify), 0.3)
    return Bundle(
        chain=chain, caches=gati_jax.caches.choose(candidates, plan.names), plan=plan, certificate=certificate,
        costs=(costs,),
    )  # fmt: skip


@pytest.fixture(scope="module")
def refitted(served):
    return refit_caches(served, traffic(1024, 1), traffic(256, 2), config=CONFIG)


def agreement(bundle: Bundle, caches: Any, images: np.ndarray) -> np.ndarray:
    said = evaluate(bundle.chain, caches, images)
    return (said.classes == said.answers).mean(axis=1)


def shapes(tree: Any) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def test_heads_learn_the_window_and_keep_their_shapes(served, refitted):
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(served.caches)]
    later = traffic(2000, 3)
    assert (agreement(served, refitted.items, later) > agreement(served, served.caches, later)).all()
    assert jax.tree.structure(refitted.items) == jax.tree.structure(served.caches), "or programs would compile anew"
    assert shapes(refitted.items) == shapes(served.caches)
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(served.caches)] == before, "those that are served"


def test_a_refit_goes_on_from_where_the_heads_are(served):
    still = dataclasses.replace(CONFIG, fit=dataclasses.replace(CONFIG.fit, learning_rate=1e-9, weight_decay=0.0))
    found = refit_caches(served, traffic(256, 1), traffic(128, 2), config=still)
    images = traffic(64, 4)
    for old, new in zip(served.caches, found, strict=True):
        said = [gati_jax.fitting.replay_logits(served.chain, [cache], images) for cache in (old, new)]
        np.testing.assert_allclose(*said, rtol=1e-3, atol=1e-3)


def test_unfolding_changes_nothing_but_the_scale():
    x = jax.random.normal(jax.random.key(0), (50, 6)) * 7.0 + 3.0
    folded = FullyConnected(3, hidden=4, standardize=False)
    variables = folded.init(jax.random.key(1), x)
    module, own = unfold_standardize(folded, variables, x)
    assert module == folded.clone(standardize=True)
    np.testing.assert_allclose(call(module, own, x), call(folded, variables, x), rtol=1e-4, atol=1e-4)


def test_rows_of_the_older_block_select_nothing(served):
    images, later = traffic(256, 1), traffic(128, 2)
    mixed = np.concatenate([later, images[:100]])
    found = refit_caches(served, images, mixed, config=CONFIG)
    assert not np.isin(found.select_rows, found.fit_rows).any()
    assert len(found.select_rows) == 128
    with pytest.raises(InputError, match="older block has not"):
        refit_caches(served, images, images, config=CONFIG)
    with pytest.raises(InputError, match="images"):
        refit_caches(served, images[:20], later, config=CONFIG)


def test_a_refit_pauses_and_can_be_ended(served):
    calls = 0

    class Enough(Exception):  # noqa: N818
        pass

    def pause() -> None:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise Enough

    with pytest.raises(Enough):
        refit_caches(served, traffic(256, 1), traffic(128, 2), config=CONFIG, pause=pause)


def test_from_window_to_bundle(served, refitted, tmp_path):
    later = traffic(256, 2)
    plan = replan(served, refitted, later, epsilon=0.2, config=CONFIG)
    assert plan.names == served.plan.names
    trial = Trial(refitted.items, plan, version=1, after=0, config=TrialConfig(epsilon=0.3, gap=0, enough=0.5))
    with pytest.raises(InputError, match="certified"):
        updated(served, trial)
    images = traffic(3000, 9)
    assert examine(served, trial, np.arange(1, 3001), images) == "certified"
    bundle = updated(served, trial, created="now")
    thresholds = plan.thresholds(trial.step)
    table = gati_jax.replay(served.chain, refitted.items, images[: bundle.certificate.n])
    wrong = planning.replay_plan(table, thresholds).disagrees
    assert bundle.certificate.disagreements == int(wrong.sum()), "counted again by replay"
    kept = Versions(tmp_path, chain=served.chain)
    kept.save(bundle)
    loaded = kept.load_current().bundle
    assert loaded.certificate == bundle.certificate
    said = [predict_batch(standing_cascade(one), images[:50]) for one in (bundle, loaded)]
    np.testing.assert_array_equal(said[0].exit, said[1].exit)
    np.testing.assert_array_equal(said[0].class_index, gati_jax.infer_batch(bundle, images[:50]).class_index)


def test_new_versions_run_by_the_old_programs(served, refitted):
    images = traffic(4, 0)
    standing = standing_cascade(served)
    predict_batch(standing, images)
    new = dataclasses.replace(standing, caches=refitted.items, thresholds=standing.thresholds - 1)
    programs = vars(per_sample)["_predict_batch"]._cache_size()
    jax.block_until_ready(predict_batch(new, images))
    assert vars(per_sample)["_predict_batch"]._cache_size() == programs
