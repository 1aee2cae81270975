"""Bundles with several plans: certified together, named, and refused where they were not."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

import gati_jax
from gati_jax import InputError
from gati_jax.certification import CONDITIONAL, ExitRate, accuracy_gap_bound
from gati_jax.data import fingerprint
from tests.bundle.made import (
    REQUESTS,
    answers,
    assert_refused,
    at,
    cache,
    edit,
    in_memory,
    load,
    make,
    make_certificate,
    make_plan,
    own_chain,
    same_plan,
    sign,
)

NAMES = ("1%", "2%", "exits")


def family():
    """Three plans; the second has a cache that the first has not, the third is certified per exit."""
    rng = np.random.default_rng(1)
    chain = own_chain(rng)
    one, two, zero = cache(rng, "fc@1", 1), cache(rng, "fc@2", 2), cache(rng, "fc@0", 0)
    plans = make_plan((one, two)), make_plan((zero, two), threshold=0.5), make_plan((one, two), threshold=-1.0)
    right = np.ones(100, bool)
    gap = accuracy_gap_bound(right, np.arange(100) > 0, 0.05, comparisons=6)
    certificates = [
        dataclasses.replace(make_certificate(plan), name=name, plans=3, n=300)
        for name, plan in zip(NAMES, plans, strict=True)
    ]
    certificates[0] = dataclasses.replace(certificates[0], n=100, disagreements=1, accuracy_gap=gap)
    exits = tuple(ExitRate(site=site, n=n, disagreements=2, p_value=0.0) for site, n in ((1, 200), (2, 300)))
    certificates[2] = dataclasses.replace(certificates[2], method=CONDITIONAL, exits=exits)
    return chain, (one, two, zero), list(zip(plans, certificates, strict=True))


def save(path, pairs, chain, caches):
    (plan, certificate), *also = pairs
    gati_jax.save_bundle(path, chain, caches, plan, certificate, also=also)


@pytest.fixture(scope="module")
def saved_family(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("family") / "bundle"
    chain, caches, pairs = family()
    save(path, pairs, chain, caches)
    return path


@pytest.fixture
def folder(saved_family, tmp_path) -> Path:
    return shutil.copytree(saved_family, tmp_path / "bundle")


def test_every_plan_comes_back_and_answers_as_its_own_bundle_would(saved_family):
    chain, caches, pairs = family()
    bundle = load(saved_family)
    assert [c.name for c in bundle.caches] == ["fc@1", "fc@2", "fc@0"]  # each once, the default plan's first
    assert tuple(bundle.plans) == tuple(bundle.certificates) == tuple(bundle.cascades) == NAMES
    exits = set()
    for plan, certificate in pairs:
        assert same_plan(bundle.plans[certificate.name], plan)
        assert bundle.certificates[certificate.name] == certificate
        alone = in_memory((chain, tuple(c for n in plan.names for c in caches if c.name == n), plan, certificate))
        named = gati_jax.infer_batch(bundle, REQUESTS, plan=certificate.name)
        assert [np.asarray(column).tobytes() for column in named] == answers(alone)
        exits.add(np.asarray(named.exit).tobytes())
        one = gati_jax.infer(bundle, REQUESTS[0], plan=certificate.name)
        assert int(one.exit) == int(named.exit[0])
        assert bundle.tuned_of(certificate.name) is None
    assert len(exits) == 3  # else the names would say nothing
    assert bundle.cascade is bundle.cascade_of(None) is bundle.cascade_of("1%")
    assert same_plan(bundle.plan, pairs[0][0])
    assert answers(bundle) == [np.asarray(c).tobytes() for c in gati_jax.infer_batch(bundle, REQUESTS, plan="1%")]


@pytest.mark.parametrize("name", ["3%", "", "default"])
def test_a_plan_that_is_not_there_is_refused(saved_family, name):
    with pytest.raises(InputError, match=r"plan: expected one of 1%, 2%, exits, got"):
        gati_jax.infer(load(saved_family), REQUESTS[0], plan=name)


def test_a_bundle_from_before_there_were_several_plans_is_read(folder, saved):
    assert (list(load(saved).plans), load(saved).also) == (["default"], ())
    old = shutil.copytree(saved, folder.parent / "old")
    new_fields = ("name", "plans", "exits", "accuracy_gap")
    edit(old / "certificates.json", lambda c: [c["certificates"][0].pop(field) for field in new_fields] and None)
    sign(old)
    assert load(old).certificate == load(saved).certificate
    assert answers(load(old)) == answers(in_memory(make(1)))


ONE_EXIT = {"site": 2, "n": 300, "disagreements": 2, "p_value": 0.0}
FEW = [{**ONE_EXIT, "site": site, "n": 20} for site in (1, 2)]
TOGETHER, UNCERTIFIED = "expected 3 plans to be certified together", "do not certify step 2"
FORGED_CERTIFICATES = {
    "certified alone": (at("certificates 1 plans", 1), f"{TOGETHER}, got 2% .*one of 1"),
    "certified with one other": (at("certificates 2 plans", 2), TOGETHER),
    "a plan composed on other rows": (
        at("certificates 0 select_fingerprint", "cd" * 16),
        "expected that of a plan composed on these rows",
    ),
    "more repeats than rows": (at("certificates 1 repeated", 301), "expected counts"),
    "no plans": (at("certificates 2 plans", 0), "expected counts"),
    "counts that do not pay for three": (at("certificates 1 disagreements", 21), UNCERTIFIED),
    "a name twice": (at("certificates 1 name", "1%"), "of different names"),
    "a name that is code": (at("certificates 1 name", "<script>"), "name: expected"),
    "each other's certificates": (lambda c: c["certificates"].reverse(), "expected that of this plan"),
    "a certificate too few": (lambda c: c["certificates"].pop() and None, "3 plans and 2 cert"),
    "no exits": (at("certificates 2 exits", []), UNCERTIFIED),
    "exits of a marginal certificate": (at("certificates 1 exits", [ONE_EXIT]), UNCERTIFIED),
    "an exit left out": (at("certificates 2 exits", [ONE_EXIT]), "expected a step of the plan's path and its exits"),
    "an exit that refutes it": (at("certificates 2 exits", FEW), UNCERTIFIED),
    "an unknown key of an exit": (at("certificates 2 exits", [{**ONE_EXIT, "x": 1}]), "certificates.2.exits.0.*x"),
    "another method": (at("certificates 1 method", "trust me"), "certificates.1.method"),
    "a conditional one said to be marginal": (
        at("certificates 2 method", "fixed-sequence testing, exact binomial"),
        UNCERTIFIED,
    ),
    "a smaller gap": (at("certificates 0 accuracy_gap upper", 0.01), "accuracy gap: 1 and 0 of 100 bound it by"),
    "a gap of fewer comparisons": (
        at("certificates 0 accuracy_gap comparisons", 2),
        "accuracy_gap: expected one of the same 100 requests",
    ),
    "an unknown key of a gap": (at("certificates 0 accuracy_gap x", 1), "accuracy_gap.*x"),
}
FORGED_PLANS = {
    "five plans": (lambda p: p["plans"].extend(p["plans"][:2]), "plans"),
    "a cache at two sites": (at("plans 2 sites", [0, 2]), "that of this plan|one site"),
    "a cache that no plan has": (lambda p: p["plans"].pop(1) and None, "3 certificates"),
}


@pytest.mark.parametrize(
    ("file", "case"),
    [*(("certificates.json", case) for case in FORGED_CERTIFICATES), *(("plans.json", case) for case in FORGED_PLANS)],
)
def test_forged_and_signed_plans_are_refused(folder, file, case):
    assert_refused(folder, file, *(FORGED_CERTIFICATES | FORGED_PLANS)[case])


def test_a_certificate_of_the_rows_that_its_plan_was_composed_on_is_read(folder, saved_family):
    rows = fingerprint(load(saved_family).plan.rows)
    edit(folder / "certificates.json", at("certificates 0 select_fingerprint", rows))
    sign(folder)
    assert load(folder).certificate.select_fingerprint == rows
    assert not load(saved_family).certificate.select_fingerprint  # as of before it was kept


def test_caches_that_no_plan_names_are_refused(folder):
    edit(folder / "plans.json", lambda p: p["plans"].pop(1) and None)
    assert_refused(folder, "certificates.json", lambda c: c["certificates"].pop(1) and None, "inconsistent")


def test_plans_that_did_not_pay_for_one_another_are_not_saved(tmp_path):
    chain, caches, pairs = family()
    alone = [(plan, dataclasses.replace(certificate, plans=2)) for plan, certificate in pairs]
    with pytest.raises(InputError, match="expected 3 plans to be certified together, got 1% certified as one of 2"):
        save(tmp_path / "b", alone, chain, caches)
    plan = pairs[0][0]
    five = [(plan, dataclasses.replace(make_certificate(plan), name=f"p{i}", plans=5, n=300)) for i in range(5)]
    with pytest.raises(InputError, match="plans: expected at most 4"):
        save(tmp_path / "b", five, chain, caches)
    same = [(plan, dataclasses.replace(c, name="x", plan_hash=plan.hash, step=-1)) for _, c in pairs]
    with pytest.raises(InputError, match="of different names"):
        save(tmp_path / "b", same, chain, caches)
    with pytest.raises(InputError, match="candidates: expected fc@0"):
        save(tmp_path / "b", pairs, chain, caches[:2])
    assert not list(tmp_path.iterdir())
