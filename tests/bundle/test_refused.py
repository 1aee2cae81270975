"""Parts that cannot be saved as a bundle, and paths that are not overwritten."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import gati_jax
from gati_jax import BundleError, Candidate, CostTable, InputError
from gati_jax.caches import FullyConnected, SortedSelector
from gati_jax.planning import ReplaySource
from tests.bundle.made import CLASSES, answers, edit, in_memory, load, make, make_certificate, make_plan, sign


def test_certificate_of_another_plan_is_refused(tmp_path):
    chain, caches, plan, _ = make(1)
    other = make_certificate(make_plan(caches, threshold=0.5))
    with pytest.raises(InputError, match="certificate: expected that of this plan"):
        gati_jax.save_bundle(tmp_path / "b", chain, caches, plan, other)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c", "d")])
def test_other_class_names_than_logits_are_refused(tmp_path, names):
    """The server would have no name for an answer, or the wrong one."""
    with pytest.raises(InputError, match=rf"class_names: expected .* {CLASSES} logits, or none, got {len(names)}"):
        gati_jax.save_bundle(tmp_path / "b", *make(1), class_names=names)
    assert not list(tmp_path.iterdir())
    gati_jax.save_bundle(tmp_path / "b", *make(1), class_names=("a", "b", "c"))
    edit(tmp_path / "b" / "manifest.json", lambda manifest: manifest.update(class_names=names))
    with pytest.raises(BundleError, match=rf"class names in .* {CLASSES} logits, or none, got {len(names)}"):
        load(tmp_path / "b")


class Odd(FullyConnected):
    """A predictor of which the library knows nothing."""


def test_a_cache_that_no_bundle_can_hold_is_refused(tmp_path):
    chain, caches, plan, certificate = make(1)
    odd = Candidate("fc@1", 1, Odd(CLASSES, hidden=5), SortedSelector(), caches[0].params)
    with pytest.raises(InputError, match=r"a bundle can hold .*FullyConnected.*got Odd"):
        gati_jax.save_bundle(tmp_path / "b", chain, (odd, caches[1]), plan, certificate)
    assert not list(tmp_path.iterdir())


def test_a_plan_without_its_candidate_is_refused(tmp_path):
    chain, caches, plan, certificate = make(1)
    with pytest.raises(InputError, match="candidates: expected fc@2"):
        gati_jax.save_bundle(tmp_path / "b", chain, caches[:1], plan, certificate)


def test_a_candidate_at_another_site_than_the_plan_says_is_refused(tmp_path):
    chain, caches, plan, certificate = make(1)
    moved = Candidate("fc@1", 0, caches[0].predictor, caches[0].selector, caches[0].params)
    with pytest.raises(InputError, match="site"):
        gati_jax.save_bundle(tmp_path / "b", chain, (moved, caches[1]), plan, certificate)


def test_what_is_no_bundle_is_not_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(InputError, match="path: expected a bundle or nothing"):
        gati_jax.save_bundle(tmp_path / "thesis", *make(1))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]


def test_a_file_is_not_overwritten(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="path: expected"):
        gati_jax.save_bundle(tmp_path / "notes", *make(1))
    assert (tmp_path / "notes").read_text() == "mine"


def test_an_empty_folder_and_a_bundle_are_replaced(tmp_path):
    (tmp_path / "b").mkdir()
    for seed in (1, 2):
        gati_jax.save_bundle(tmp_path / "b", *make(seed))
        assert answers(load(tmp_path / "b")) == answers(in_memory(make(seed)))
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_path_that_does_not_begin_with_the_base_is_no_plan():
    plan = make(1)[2]
    with pytest.raises(InputError, match="path: expected its first step to be the bare base"):
        dataclasses.replace(plan, path=plan.path[1:], disagreement=plan.disagreement[1:], mean_ms=plan.mean_ms[1:])


def test_a_device_name_cannot_leave_the_bundle():
    with pytest.raises(InputError, match="device"):
        CostTable(device="../../escaped", batch=1, blocks_ms=(1.0,), lookup_ms={})


def test_parameters_that_the_plan_was_not_made_from_are_refused(tmp_path, chain, candidates, planned):
    """The certificate would say nothing of them."""
    plan, certificate = planned
    other = [
        dataclasses.replace(c, params=jax.tree.map(lambda v: np.asarray(v) * np.float32(1.001), c.params))
        for c in candidates
    ]
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
    other = [dataclasses.replace(c, params=jax.tree.map(lambda v: np.asarray(v) * 2, c.params)) for c in candidates]
    gati_jax.save_bundle(
        tmp_path / "other", chain, other, loose, dataclasses.replace(certificate, plan_hash=loose.hash)
    )
    shutil.rmtree(bundle_path / "arrays")
    shutil.copytree(tmp_path / "other" / "arrays", bundle_path / "arrays")
    sign(bundle_path)
    with pytest.raises(gati_jax.BundleError, match="is inconsistent: candidates: expected the parameters"):
        gati_jax.load_bundle(bundle_path, chain=chain)
