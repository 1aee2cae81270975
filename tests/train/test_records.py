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
from train.config import Config, load
from train.records import count_looks, measured_tile, record_look


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
    assert written == [1, 2]  # select, certify: a run that is killed while certifying has looked
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
        return count_looks(record_look(path, rows, {"default": (plan, epsilon)}, 0.05))

    assert look(rows, first) == 1
    assert look(others, first) == 1
    assert look(rows, first) == 1  # the same again learns nothing new
    assert look(rows, second) == 2
    assert look(rows, second, epsilon=0.2) == 3  # an epsilon chosen afterwards pays, too
    assert look(others, second) == 2
    assert look(rows[:5], second) == 4  # part of the same rows, and so not new ones
    assert look(np.concatenate([rows[:1], others[:1]]), first) == 7


def test_plans_certified_together_are_one_look_with_as_many_plans(tmp_path):
    path, rows = tmp_path / "looks.json", np.arange(9, dtype=np.uint64)
    family = {"tight": (made_up_plan(1.0), 0.1), "loose": (made_up_plan(2.0), 0.2)}

    def look(plans: dict[str, tuple[Plan, float]], delta: float = 0.05) -> tuple[int, int]:
        looks = record_look(path, rows, plans, delta)
        return count_looks(looks), len(looks)

    assert look(family) == (1, 2)
    assert look(dict(reversed(family.items()))) == (1, 2)  # the same, in another order
    assert look({"b": family["loose"], "a": family["tight"]}) == (1, 2)  # under other names
    assert look({"default": family["tight"]}) == (2, 3)  # alone it would be tested at all of delta
    assert look(family, delta=0.1) == (3, 5)
    assert look({**family, "third": (made_up_plan(3.0), 0.3)}) == (4, 8)
    assert count_looks(record_look(path, rows[:1], family, 0.05)) == 5  # other rows, though some of the same


def test_looks_of_older_runs_are_read_and_kept(tmp_path):
    path, rows, plan = tmp_path / "looks.json", np.arange(3, dtype=np.uint64), made_up_plan(1.0)
    (look,) = record_look(path, rows, {"default": (plan, 0.1)}, 0.05)
    assert set(look.entry()) == {"plan_hash", "data_fingerprint", "epsilon", "delta"}  # as they always were
    assert record_look(path, rows, {"default": (plan, 0.1)}, 0.05) == (look,)


@pytest.mark.usefixtures("tiny")
def test_several_plans_are_certified_together_in_one_look(run, tmp_path):
    out = tmp_path / "caches"
    out.mkdir()
    shutil.copy(run.folder / "caches" / "costs.json", out)
    shutil.copytree(run.folder / "caches" / "checkpoints", out / "checkpoints")
    also = ["--out", str(out), "--plan.also", "[0.1, 0.4]"]
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
    assert len(bundle.provenance.looks) == 3
    assert len({look["together"] for look in bundle.provenance.looks}) == 1
    assert [result["certificate"]["name"], *(c["certificate"]["name"] for c in result["also"])] == [*certificates]
    for name, certificate in certificates.items():
        assert certificate.step == -1 or binom.cdf(certificate.disagreements, 300, certificate.epsilon) <= 0.05 / 3
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
        record_look(tmp_path / "looks.json", np.arange(3, dtype=np.uint64), {"a": (made_up_plan(1.0), 0.1)}, 0.05)
    assert (tmp_path / "looks.json").read_text() == content


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("damage", [lambda _: "{", lambda text: text[:40], lambda text: text.replace('"3"', '"4"')])
def test_costs_that_are_damaged_or_of_another_kind_are_measured_anew(run, tmp_path, damage):
    folder = run.folder / "caches"
    (tmp_path / "costs.json").write_text(damage((folder / "costs.json").read_text()))
    config = load(Config, Path(DIGITS[1]), caches_arguments(run.folder)[2:])
    chain = caches.read_base(config.base)
    _, measured = measured_tile(tmp_path / "costs.json", chain, run.bundle.caches, config)
    assert set(measured.lookup_ms) == {cache.name for cache in run.bundle.caches}
    assert measured_tile(tmp_path / "costs.json", chain, (), config)[1] == measured  # kept, this time
