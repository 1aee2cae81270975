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
from gati_jax import InputError, Plan, data
from gati_jax.planning import ReplayTable
from tests.train.one_pass import DIGITS, caches_arguments, json_of, strict
from train import caches
from train.config import load_config
from train.records import measured_costs, record_look


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


def test_the_first_look_is_tested_at_delta(run):
    assert len(strict((run.folder / "caches" / "looks.json").read_text())["looks"]) == 1
    assert run.bundle.certificate.step == step_at(run.bundle, 0.05)


@pytest.mark.usefixtures("tiny")
def test_the_same_plan_again_is_no_new_look_and_another_one_pays(run, tmp_path, monkeypatch):
    out = shutil.copytree(run.folder / "caches", tmp_path / "caches")
    arguments = [*caches_arguments(run.folder), "--out", str(out)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = json_of(caches.main, *arguments)
    assert again["certificate"] == run.caches["certificate"]
    assert len(strict((out / "looks.json").read_text())["looks"]) == 1

    replay, written = gati_jax.replay, []

    def watched(*given: Any, **options: Any) -> ReplayTable:
        written.append(len(strict((out / "looks.json").read_text())["looks"]))
        return replay(*given, **options)

    monkeypatch.setattr(gati_jax, "replay", watched)
    with pytest.warns(UserWarning, match="look 2 at this certify data"):
        second = json_of(caches.main, *arguments, "--plan.epsilon", "0.05")
    monkeypatch.undo()
    assert written == [1, 2]  # select, certify: whoever is killed while certifying has looked
    bundle = gati_jax.load_bundle(out / "bundle")
    assert bundle.plan.hash != run.bundle.plan.hash
    assert (second["certificate"]["looks"], bundle.certificate.looks, bundle.certificate.delta) == (2, 2, 0.05)
    assert bundle.certificate.step == step_at(bundle, 0.05 / 2)
    assert {look["plan_hash"] for look in strict((out / "looks.json").read_text())["looks"]} == {
        run.bundle.plan.hash,
        bundle.plan.hash,
    }


def made_up_plan(threshold: float) -> Plan:
    return Plan(
        names=("a",), sites=(1,), depth=2, path=np.array([[np.inf], [threshold]]), disagreement=np.zeros(2),
        mean_ms=np.ones(2), n=1, rows=np.zeros(1, np.uint64),
    )  # fmt: skip


def test_looks_count_where_they_share_rows(tmp_path):
    path, rows, others = tmp_path / "looks.json", np.arange(9, dtype=np.uint64), np.arange(20, 29, dtype=np.uint64)
    first, second = made_up_plan(1.0), made_up_plan(2.0)

    def look(rows: np.ndarray, plan: Plan, epsilon: float = 0.1) -> int:
        return len(record_look(path, rows, plan, epsilon, 0.05))

    assert look(rows, first) == 1
    assert look(others, first) == 1
    assert look(rows, first) == 1  # the same again learns nothing new
    assert look(rows, second) == 2
    assert look(rows, second, epsilon=0.2) == 3  # an epsilon chosen afterwards pays, too
    assert look(others, second) == 2
    assert look(rows[:5], second) == 4  # part of the same rows, and so not new ones
    assert look(np.concatenate([rows[:1], others[:1]]), first) == 7


def test_a_bundle_tells_of_all_looks(run):
    (look,) = run.bundle.provenance.looks
    certificate = run.bundle.certificate
    assert look == {
        "plan_hash": run.bundle.plan.hash,
        "data_fingerprint": certificate.data_fingerprint,
        "epsilon": certificate.epsilon,
        "delta": certificate.delta,
    }


LOOK = {"plan_hash": "p", "data_fingerprint": "f", "epsilon": 0.1, "delta": 0.05}


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"looks": [1], "rows": {}}', json.dumps({"looks": [LOOK], "rows": {}}),
     json.dumps({"looks": [LOOK], "rows": {"f": "123"}})],
)  # fmt: skip
def test_damaged_looks_are_not_forgotten_but_reported(tmp_path, content):
    (tmp_path / "looks.json").write_text(content)
    with pytest.raises(InputError, match=r"looks\.json"):
        record_look(tmp_path / "looks.json", np.arange(3, dtype=np.uint64), made_up_plan(1.0), 0.1, 0.05)
    assert (tmp_path / "looks.json").read_text() == content


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("damage", [lambda _: "{", lambda text: text[:40], lambda text: text.replace('"3"', '"4"')])
def test_costs_that_are_damaged_or_of_another_kind_are_measured_anew(run, tmp_path, damage):
    folder = run.folder / "caches"
    (tmp_path / "costs.json").write_text(damage((folder / "costs.json").read_text()))
    config = load_config(Path(DIGITS[1]), caches_arguments(run.folder)[2:])
    chain = caches.load_base(config)
    measured = measured_costs(tmp_path / "costs.json", chain, run.bundle.caches, config)
    assert set(measured.lookup_ms) == {cache.name for cache in run.bundle.caches}
    assert measured_costs(tmp_path / "costs.json", chain, (), config) == measured  # kept, this time
