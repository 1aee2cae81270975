"""Attacks by another base, or other rows, than the promise speaks of, all of which fail.

1. Rows that the caches were fitted on, as certify rows: whatever became of the fit meanwhile.
2. Other functions of the same parameters: in the answers, or in what the caches see.
3. Looks that were forgotten with the ledger, but not with the bundle.
4. A base that was trained on the certify rows.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import InputError, Ledger
from gati_jax.fitting import refit
from tests.conftest import linear_classifier

EPSILON, DELTA = 0.08, 0.1


def test_rows_that_caches_were_fitted_on_cannot_certify_them(chain, candidates, splits, costs, planned, bundle_path):
    """Caches are better there than they will be, and selectors surer; whatever became of the fit meanwhile."""
    some = [candidate for candidate in candidates if candidate.site > 1]
    by_hand = gati_jax.plan(gati_jax.replay(chain, some, splits["select"]), costs, epsilon=EPSILON)
    again = refit(chain, some, splits["test"][:150], select=splits["test"][150:])
    refitted = gati_jax.plan(gati_jax.replay(chain, again, splits["test"][150:]), costs, epsilon=EPSILON)
    bundle = gati_jax.load_bundle(bundle_path, chain=chain)
    ways = (
        (candidates, planned[0]), (tuple(candidates), planned[0]), (some, by_hand), (again, refitted),
        (tuple(again), refitted), (bundle.caches, bundle.plan),
    )  # fmt: skip
    for given, plan in ways:
        for part in ("fit", "select"):
            rows = np.concatenate([splits["certify"], splits[part][-50:]])
            with pytest.raises(InputError, match="disjoint"):
                gati_jax.certify(plan, gati_jax.replay(chain, given, rows), EPSILON, DELTA)


def test_blocks_that_end_elsewhere_are_other_functions(chain, candidates, planned, splits, bundle_path, tmp_path):
    """The answers are the same, but caches look at what passes between blocks: here, ahead of its tanh."""
    before = lambda p, x: x @ p["w"] + p["b"].reshape(1, -1)  # noqa: E731
    moved = dataclasses.replace(
        chain,
        blocks=(before, *[lambda p, x: before(p, jnp.tanh(x))] * 4),
        classifier=lambda p, x: linear_classifier(p, jnp.tanh(x)),
    )
    test = jnp.asarray(splits["test"])
    np.testing.assert_allclose(moved(test), chain(test), atol=1e-4)
    with pytest.raises(InputError, match=r"functions \(chain\)"):
        gati_jax.certify(planned[0], gati_jax.replay(moved, candidates, splits["certify"]), EPSILON, DELTA)
    with pytest.raises(InputError, match=r"functions \(chain\)"):
        gati_jax.save_bundle(tmp_path / "b", moved, candidates, *planned)
    with pytest.raises(InputError, match=r"^chain: expected the functions that"):
        gati_jax.load_bundle(bundle_path, chain=moved)


def test_a_bundle_that_is_replaced_hands_on_its_looks(tmp_path, chain, candidates, planned, splits):
    """A container forgets the ledger at its end; the folder of the bundle stays."""
    table = gati_jax.replay(chain, candidates, splits["certify"])
    path, (plan, _) = tmp_path / "bundle", planned
    for look in (1, 2):
        ledger = Ledger(tmp_path / f"{look}.json")
        failed = gati_jax.certify(plan, table, look / 1000, DELTA, ledger=ledger)
        assert not failed.certified
        gati_jax.save_bundle(path, chain, candidates, plan, failed, ledger=ledger)
    passed = gati_jax.certify(plan, table, EPSILON, DELTA, ledger=Ledger(tmp_path / "3.json"))
    with pytest.raises(InputError, match=r"certificate: .* lost 2 that the bundle at .* knows of"):
        gati_jax.save_bundle(path, chain, candidates, plan, passed, ledger=Ledger(tmp_path / "3.json"))
    gati_jax.load_bundle(path, chain=chain)
    with pytest.warns(UserWarning, match="look 3"):
        assert gati_jax.certify(plan, table, EPSILON, DELTA).looks == 3


def test_a_base_that_was_trained_on_the_certify_rows_is_told_wherever_its_promise_is(
    chain, candidates, planned, splits, tmp_path
):
    """It is surer of them than of others, and so are its caches."""
    table = gati_jax.replay(chain, candidates, splits["certify"])
    certificate = gati_jax.certify(planned[0], table, EPSILON, DELTA, base_saw_data=True)
    assert certificate.certified
    assert "the base was trained on" in certificate.basis
    gati_jax.save_bundle(tmp_path / "b", chain, candidates, planned[0], certificate)
    bound = gati_jax.load_bundle(tmp_path / "b", chain=chain).bound_of()
    assert bound.epsilon is None
    assert "trained on" in str(bound)
