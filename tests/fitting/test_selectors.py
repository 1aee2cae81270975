"""Selectors: what they learn, and that no select row is scored by one that was fitted on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax.caches import LinearSelector, SortedSelector
from gati_jax.fitting import fit_selector
from gati_jax.fitting.fit import deal_folds

SELECTORS = [LinearSelector(), SortedSelector()]


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 300), st.integers(2, 12), st.integers(0, 9), st.integers(0, 40))
def test_distinct_rows_are_dealt_evenly_and_copies_together(n, folds, seed, copies):
    config = gati_jax.FitConfig(folds=folds, seed=seed)
    distinct = np.arange(n, dtype=np.uint64)
    rows = np.concatenate([distinct, distinct[:copies]])
    if n < folds:
        with pytest.raises(gati_jax.InputError, match=f"at least one distinct row for each of {folds} folds, got {n}"):
            deal_folds(rows, config)
        return
    fold = deal_folds(rows, config)
    counts = np.bincount(fold[:n], minlength=folds)
    assert len(counts) == folds
    assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(fold[n:], fold[: len(rows) - n])
    np.testing.assert_array_equal(fold, deal_folds(rows, config))


def test_folds_are_shuffled():
    rows = np.arange(100, dtype=np.uint64)
    fold = deal_folds(rows, gati_jax.FitConfig())
    assert not np.array_equal(fold, np.arange(100) % 5)
    assert not np.array_equal(fold, deal_folds(rows, gati_jax.FitConfig(seed=1)))


def toy(seed, n=300):
    """Logits whose first class is sure or unsure: it agrees exactly where it is sure."""
    rng = np.random.default_rng(seed)
    sure = rng.random(n) < 0.6
    logits = rng.standard_normal((n, 4)) * 0.3
    logits[:, 0] += np.where(sure, 3.0, 1.0)
    return jnp.asarray(logits, jnp.float32), jnp.asarray(sure)


def auc(scores, positive):
    """The share of pairs of one positive and one negative row that are in order."""
    pairs = scores[positive][:, None] - scores[~positive][None]
    return (pairs > 0).mean() + (pairs == 0).mean() / 2


@pytest.mark.parametrize("selector", SELECTORS, ids=["linear", "sorted"])
def test_a_selector_learns_when_to_trust(selector):
    logits, agrees = toy(0)
    variables = fit_selector(selector, logits, agrees, jnp.ones(300), jax.random.key(0))
    new_logits, new_agrees = toy(1)
    scores = np.asarray(selector.apply(variables, new_logits))
    assert auc(scores, np.asarray(new_agrees)) > 0.98
    # A score is the log-odds of agreeing: its sign decides.
    assert ((scores > 0) == np.asarray(new_agrees)).mean() > 0.93


@pytest.mark.parametrize("selector", SELECTORS, ids=["linear", "sorted"])
def test_held_out_rows_have_no_influence(selector):
    logits, agrees = toy(2)
    weight = jnp.asarray(np.arange(300) % 3 > 0, jnp.float32)
    held_out = weight == 0
    other_logits = jnp.where(held_out[:, None], -5 * logits[:, ::-1], logits)
    other_agrees = jnp.where(held_out, ~agrees, agrees)
    one = fit_selector(selector, logits, agrees, weight, jax.random.key(0))
    other = fit_selector(selector, other_logits, other_agrees, weight, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    all_rows = fit_selector(selector, other_logits, other_agrees, jnp.ones(300), jax.random.key(0))
    assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), one, all_rows)))


def predictor_logits(chain, candidate, rows):
    sites, _ = chain.activations(jnp.asarray(rows))
    return candidate.predictor.apply(candidate.params["predictor"], sites[candidate.site])


@pytest.mark.parametrize("item", [0, 3])
def test_select_rows_are_scored_by_the_selector_of_their_own_fold(chain, candidates, splits, item):
    """In any order and mixed with new rows, which the final selector scores."""
    rows = np.concatenate([splits["select"], splits["test"][:40]])
    folds = np.concatenate([candidates.select_fold, np.full(40, 5)])
    order = np.random.default_rng(0).permutation(len(rows))
    candidate, variables = candidates.items[item], candidates.fold_selectors[item]
    logits = predictor_logits(chain, candidate, rows)
    by_fold = np.stack(
        [candidate.selector.apply(jax.tree.map(lambda v, f=f: v[f], variables), logits) for f in range(6)]
    )
    expected = by_fold[folds, np.arange(len(rows))]
    table = gati_jax.replay(chain, candidates, rows[order], batch=64)
    np.testing.assert_allclose(table.scores[item], expected[order], rtol=1e-4, atol=1e-4)
    assert np.abs(by_fold[:5] - by_fold[5]).max() > 0.01  # the folds' selectors do differ
    np.testing.assert_array_equal(table.classes[item], np.asarray(logits).argmax(-1)[order])


def test_a_folds_selector_has_not_seen_the_fold(chain, candidates, splits):
    # Refitted with the labels of its fold turned round, it comes out the same.
    rows, candidate = splits["select"], candidates.items[0]
    logits = predictor_logits(chain, candidate, rows)
    agrees = np.asarray(logits).argmax(-1) == np.asarray(chain(jnp.asarray(rows))).argmax(-1)
    key = jax.random.key(2)  # of FitConfig's seed 0
    for fold in (0, 4, 5):
        mine = candidates.select_fold == fold
        turned = jnp.asarray(np.where(mine, ~agrees, agrees))
        refitted = fit_selector(candidate.selector, logits, turned, jnp.asarray(~mine, jnp.float32), key)
        stored = jax.tree.map(lambda v, f=fold: v[f], candidates.fold_selectors[0])
        scores = [np.asarray(candidate.selector.apply(v, logits)) for v in (refitted, stored)]
        np.testing.assert_allclose(*scores, rtol=2e-2, atol=2e-2)


def test_the_final_selector_is_the_one_fitted_on_all_folds(candidates):
    for candidate, variables in zip(candidates.items, candidates.fold_selectors, strict=True):
        last = jax.tree.map(lambda v: v[-1], variables)
        jax.tree.map(np.testing.assert_array_equal, candidate.params["selector"], last)


def test_single_candidates_score_with_their_final_selector(chain, candidates, splits):
    new = gati_jax.replay(chain, candidates, splits["test"][:30])
    single = gati_jax.replay(chain, tuple(candidates), splits["test"][:30])
    np.testing.assert_allclose(new.scores, single.scores, rtol=1e-5, atol=1e-5)


def test_replay_answers_are_the_bases(chain, candidates, splits, digits):
    table = gati_jax.replay(chain, candidates, splits["test"], labels=digits.labels[1450:], batch=100)
    x = splits["test"].astype(np.float64)
    for params in chain.params[:-1]:
        x = np.tanh(x @ np.asarray(params["w"], np.float64) + np.asarray(params["b"], np.float64))
    logits = x @ np.asarray(chain.params[-1]["w"], np.float64) + np.asarray(chain.params[-1]["b"], np.float64)
    np.testing.assert_array_equal(table.answers, logits.argmax(-1))
    np.testing.assert_array_equal(table.labels, digits.labels[1450:])
    assert (table.names, table.sites, table.depth) == (("fc@1", "fc@2", "fc@3", "fc@4"), (1, 2, 3, 4), 5)
