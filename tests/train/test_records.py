"""Looks and costs that one run leaves for the next."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

import gati_jax
from gati_jax import InputError, data
from tests.train.one_pass import DIGITS, caches_arguments, json_of, looks_in, strict
from train import caches, evaluate
from train.config import Config, load
from train.records import costs_in, measured_tuning


def step_at(bundle: gati_jax.Bundle, delta: float) -> int:
    """Walk the path by hand: the last step before the first whose exact binomial tail is above delta."""
    part = data.load("digits", "all[1197:1497]")
    table = gati_jax.replay(bundle.chain, bundle.caches, part.images)
    step = -1
    for thresholds in bundle.plan.path:
        wrong = 0
        for row, answer in enumerate(table.answers):
            hits = [i for i, t in enumerate(thresholds) if table.scores[i, row] >= t]
            wrong += bool(hits) and table.classes[hits[0], row] != answer
        if binom.cdf(wrong, len(table), bundle.certificate.epsilon) > delta:
            break
        step += 1
    return step if step > 0 else -1


def looks(folder: Path) -> list[Any]:
    entries = strict((folder / "looks.json").read_text())["looks"]
    return [entry for entry in entries if entry["closed"] != "composed"]  # those are what plans were composed on


def test_the_first_look_has_its_part_of_delta_and_closes_the_rows(run):
    (look,) = looks(run.folder / "caches")
    assert (look["plan_hash"], look["number"], look["closed"]) == (run.bundle.plan.hash, 1, "passed")
    assert run.bundle.certificate.step == step_at(run.bundle, 0.05 * 6 / np.pi**2)
    assert run.caches["certificate"]["basis"] == "look 1 at these rows"


@pytest.mark.usefixtures("tiny")
def test_the_same_plan_again_is_no_new_look_and_another_one_is_refused(run, tmp_path):
    out = shutil.copytree(run.folder / "caches", tmp_path / "caches")
    arguments = [*caches_arguments(run.folder), "--out", str(out), *looks_in(out)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = json_of(caches.main, *arguments)
    assert again["certificate"] == run.caches["certificate"]
    with pytest.raises(InputError, match="ledger: expected certify rows that are open, but 300 of 300 are closed"):
        json_of(caches.main, *arguments, "--plan.epsilon", "0.05")
    assert len(looks(out)) == 1
    (out / "costs.json").unlink()  # in another folder this is known before anything is fitted
    with pytest.raises(InputError, match=r"data\.splits\.certify: expected rows that are open"):
        json_of(caches.main, *arguments)


@pytest.mark.usefixtures("tiny")
def test_looks_that_an_older_version_left_in_the_folder_count(run, tmp_path):
    rows = data.row_digests(data.load("digits", "all[1197:1497]").images)
    old = {"plan_hash": "p", "data_fingerprint": "f", "epsilon": 0.1, "delta": 0.05}
    file = tmp_path / "looks.json"
    file.write_text(json.dumps({"looks": [old], "rows": {"f": rows[:9].astype("<u8").tobytes().hex()}}))
    with pytest.raises(InputError, match=r"data\.splits\.certify: expected rows .* 9 of 300 are closed"):
        caches.main([*caches_arguments(run.folder), "--out", str(tmp_path)])


@pytest.mark.usefixtures("tiny")
def test_after_a_look_that_failed_another_plan_pays_for_both(run, tmp_path):
    out = shutil.copytree(run.folder / "caches", tmp_path / "caches")
    (out / "looks.json").unlink()
    shutil.rmtree(out / "bundle")  # it knows of them, too
    arguments = [*caches_arguments(run.folder), "--out", str(out), *looks_in(out)]
    first = json_of(caches.main, *arguments, "--plan.epsilon", "0.001")
    assert (first["certificate"]["certified"], first["certificate"]["disagreements"]) == (False, 0)
    with pytest.raises(InputError, match="images: expected others than the certify rows"):
        json_of(evaluate.main, "--bundle", str(out / "bundle"), "--out", str(out), "--split", "certify", *looks_in(out))
    with pytest.warns(UserWarning, match="look 2 at this certify data"):
        second = json_of(caches.main, *arguments)
    bundle = gati_jax.load_bundle(out / "bundle")
    assert (second["certificate"]["looks"], bundle.certificate.looks, bundle.certificate.delta) == (2, 2, 0.05)
    assert bundle.certificate.step == step_at(bundle, 0.05 * 6 / (2 * np.pi) ** 2)
    assert [(look["number"], look["closed"]) for look in looks(out)] == [(1, ""), (2, "passed")]
    assert looks(out) == looks(out / "bundle")


@pytest.mark.usefixtures("tiny")
def test_rows_that_were_evaluated_certify_no_plan_that_was_chosen_by_it(run, tmp_path):
    """Among them those of certify that no look had closed, where others of the split were."""
    evaluated = ["--bundle", str(run.folder / "caches" / "bundle"), "--out", str(tmp_path / "out"), "--timed", "1"]
    json_of(evaluate.main, *evaluated, *looks_in(tmp_path))
    swapped = ["--data.splits.test", "all[1197:1497]", "--data.splits.certify", "all[1497:]"]
    with pytest.raises(InputError, match=r"data\.splits\.certify: expected rows .* 60 of 300 are closed since what"):
        caches.main([*caches_arguments(run.folder), *swapped, "--out", str(tmp_path), *looks_in(tmp_path)])
    rows = data.row_digests(data.load("digits", "all[1197:1497]").images)
    ledger = gati_jax.Ledger(tmp_path / "few.json")
    ledger.reveal(rows[:9], {"default": (run.bundle.plan, 0.1)}, 0.05)
    with pytest.raises(InputError, match="images: expected others than the certify rows"):
        gati_jax.evaluate(run.bundle, data.load("digits", "all[1197:1497]").images, ledger=ledger)


@pytest.mark.usefixtures("tiny")
def test_several_plans_are_certified_together_in_one_look(run, tmp_path):
    out = tmp_path / "caches"
    out.mkdir()
    shutil.copy(run.folder / "caches" / "costs.json", out)
    shutil.copytree(run.folder / "caches" / "checkpoints", out / "checkpoints")
    also = ["--out", str(out), "--plan.also", "[0.1, 0.4]", *looks_in(out)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a second look would warn
        result = json_of(caches.main, *caches_arguments(run.folder), *also)
    bundle = gati_jax.load_bundle(out / "bundle")
    certificates = bundle.certificates
    assert {name: c.epsilon for name, c in certificates.items()} == {"10%": 0.1, "20%": 0.2, "40%": 0.4}
    assert {(c.plans, c.looks, c.delta) for c in certificates.values()} == {(3, 1, 0.05)}
    assert any(c.certified for c in certificates.values())
    first = min((c for c in certificates.values() if c.certified), key=lambda c: c.epsilon)
    assert (bundle.certificate, next(iter(bundle.plans))) == (first, first.name)
    assert len(looks(out / "bundle")) == 3
    assert len({look["together"] for look in looks(out / "bundle")}) == 1
    assert [result["certificate"]["name"], *(c["certificate"]["name"] for c in result["also"])] == [*certificates]
    level = 0.05 / 3 * 6 / np.pi**2
    for name, certificate in certificates.items():
        assert certificate.step == -1 or binom.cdf(certificate.disagreements, 300, certificate.epsilon) <= level
        gap = certificate.accuracy_gap
        assert (gap is not None) == certificate.certified, name
    part = data.load("digits", "all[1197:1497]")
    for name, certificate in certificates.items():
        # The cascade of each plan repeats on these rows what was counted for its certificate.
        prediction = gati_jax.infer_batch(bundle, part.images, numerics="reference", plan=name)
        table = gati_jax.replay(bundle.chain, (), part.images)
        right, base = np.asarray(prediction.class_index) == part.labels, table.answers == part.labels
        assert int((prediction.class_index != table.answers).sum()) == certificate.disagreements
        if gap := certificate.accuracy_gap:
            assert (gap.losses, gap.gains) == (int((base & ~right).sum()), int((right & ~base).sum()))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("damage", [lambda _: "{", lambda text: text[:40], lambda text: text.replace('"3"', '"4"')])
def test_costs_that_are_damaged_or_of_another_kind_are_measured_anew(run, tmp_path, damage):
    folder = run.folder / "caches"
    (tmp_path / "costs.json").write_text(damage((folder / "costs.json").read_text()))
    config = load(Config, Path(DIGITS[1]), caches_arguments(run.folder)[2:])
    chain = caches.read_base(config.base)
    measured = costs_in(measured_tuning(tmp_path / "costs.json", chain, run.bundle.caches, config), config)
    assert set(measured.lookup_ms) == {cache.name for cache in run.bundle.caches}
    kept = measured_tuning(tmp_path / "costs.json", chain, (), config)  # this time
    assert costs_in(kept, config) == measured
