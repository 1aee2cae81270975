"""Parts that cannot be saved as a bundle, and paths that are not overwritten."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import gati_jax
from gati_jax import CostTable, InputError
from gati_jax.caches import FullyConnected
from gati_jax.planning import ReplaySource
from tests.bundle.made import CLASSES, answers, in_memory, load, make, make_certificate, make_plan, sign


class Odd(FullyConnected):
    """A predictor of which the library knows nothing."""


CHAIN, (ONE, TWO), PLAN, CERTIFICATE = make(1)
REFUSED = {
    "another plan's certificate": (
        (ONE, TWO),
        make_certificate(make_plan((ONE, TWO), threshold=0.5)),
        "certificate: expected that of this plan",
    ),
    "a cache that no bundle can hold": (
        (dataclasses.replace(ONE, predictor=Odd(CLASSES, hidden=5)), TWO),
        CERTIFICATE,
        "a bundle can hold .*FullyConnected.*got Odd",
    ),
    "a cache too few": ((ONE,), CERTIFICATE, "candidates: expected fc@2"),
    "a cache at another site than the plan says": ((dataclasses.replace(ONE, site=0), TWO), CERTIFICATE, "site"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_do_not_belong_together_are_refused(tmp_path, case):
    caches, certificate, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        gati_jax.save_bundle(tmp_path / "b", CHAIN, caches, PLAN, certificate)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["thesis/chapter.txt", "thesis"])
def test_what_is_no_bundle_is_not_overwritten(tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("years of work")
    with pytest.raises(InputError, match="path: expected a bundle or nothing"):
        gati_jax.save_bundle(tmp_path / "thesis", *make(1))
    assert (tmp_path / file).read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]


def test_an_empty_folder_and_a_bundle_are_replaced(tmp_path):
    (tmp_path / "b").mkdir()
    for seed in (1, 2):
        gati_jax.save_bundle(tmp_path / "b", *make(seed))
        assert answers(load(tmp_path / "b")) == answers(in_memory(make(seed)))
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_no_plan_without_the_base_and_no_costs_of_a_device_that_is_a_path():
    with pytest.raises(InputError, match="path: expected its first step to be the bare base"):
        dataclasses.replace(PLAN, path=PLAN.path[1:], disagreement=PLAN.disagreement[1:], mean_ms=PLAN.mean_ms[1:])
    with pytest.raises(InputError, match="device"):
        CostTable(device="../../escaped", batch=1, blocks_ms=(1.0,), lookup_ms={})


def scaled(cache: gati_jax.Candidate, factor: float) -> gati_jax.Candidate:
    params = jax.tree.map(lambda v: np.asarray(v) * np.float32(factor), cache.params)
    return dataclasses.replace(cache, params=params)


def test_parameters_that_the_plan_was_not_made_from_are_refused(tmp_path, chain, candidates, planned):
    """The certificate would say nothing of them."""
    plan, certificate = planned
    other = [scaled(c, 1.001) for c in candidates]
    with pytest.raises(InputError, match=rf"candidates: expected the parameters .* of the plan.*{plan.names[0]}"):
        gati_jax.save_bundle(tmp_path / "b", chain, other, plan, certificate)
    params = jax.tree.map(lambda v: np.asarray(v) + np.float32(1e-3), chain.params)
    base = gati_jax.Chain(chain.blocks, chain.classifier, params, chain.input_spec)
    with pytest.raises(InputError, match=r"candidates: expected .* got other ones: the base"):
        gati_jax.save_bundle(tmp_path / "b", base, candidates, plan, certificate)
    assert not (tmp_path / "b").exists()


def test_arrays_of_another_bundle_are_refused_even_when_signed(tmp_path, chain, candidates, planned, bundle_path):
    plan, certificate = planned
    loose = dataclasses.replace(plan, source=ReplaySource())
    certificate = dataclasses.replace(certificate, plan_hash=loose.hash)
    gati_jax.save_bundle(tmp_path / "other", chain, [scaled(c, 2) for c in candidates], loose, certificate)
    shutil.rmtree(bundle_path / "arrays")
    shutil.copytree(tmp_path / "other" / "arrays", bundle_path / "arrays")
    sign(bundle_path)
    with pytest.raises(gati_jax.BundleError, match="is inconsistent: candidates: expected the parameters"):
        gati_jax.load_bundle(bundle_path, chain=chain)
