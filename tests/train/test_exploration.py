"""What is fitted, what is not and why: made-up times on a tiny chain."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax import Chain, CostTable, Head, InputError, data
from gati_jax.caches import FullyConnected, LinearSelector
from gati_jax.fitting import untrained
from gati_jax.planning import Composition, compose, threshold_path
from tests.fitting import tiny
from tests.train.one_pass import DIGITS
from train.caches import base_line, base_on_select
from train.config import Config, load
from train.exploration import Explored, explore, within
from train.records import costs_in, measured_tuning

TWO = dataclasses.replace(tiny.head(1, 2), selectors=(("linear", LinearSelector()),))
WIDE = Head(name="wide", predictor=lambda classes: FullyConnected(classes, hidden=1024), selector=LinearSelector())


def config(*options: str) -> Config:
    quick = ["--fit.epochs", "1", "--fit.batch", "32", "--fit.augment", "{}", "--measure_rounds", "3"]
    return load(Config, Path(DIGITS[1]), [*quick, *options])


def parts() -> dict[str, data.Dataset]:
    images = dict(zip(("fit", "select"), tiny.images(), strict=True))
    return {name: data.Dataset(images=rows, labels=np.zeros(len(rows), np.int32)) for name, rows in images.items()}


@pytest.fixture
def lookups(monkeypatch):
    """Lookups take what a test says, or a hundredth of a millisecond; a block takes one. Counts measurements."""
    said: dict[str, float] = {}
    measured: list[Sequence[str]] = []

    def measure(chain: Chain, caches: Sequence[gati_jax.Candidate], **_: object) -> CostTable:
        measured.append([cache.name for cache in caches])
        lookup_ms = {cache.name: said.get(cache.name, 0.01) for cache in caches}
        return CostTable(device="cpu", batch=1, blocks_ms=(1.0,) * len(chain), lookup_ms=lookup_ms)

    monkeypatch.setattr(gati_jax, "measure_costs", measure)
    return said, measured


def explored(tmp_path, *heads: Head, options: Sequence[str] = ()) -> Explored:
    return explore(config(*options), tiny.chain(), heads, parts(), tmp_path)


@pytest.mark.parametrize(("right", "passes"), [(0.25, False), (0.4, False), (0.6, True), (None, True)])
def test_a_base_must_be_better_than_guessing_where_labels_say_so(caplog, right, passes):
    """Of 60 images and four classes, 37.5 % is half as good again as guessing."""
    chain, select = tiny.chain(), tiny.images()[1]
    answers = np.argmax(np.asarray(chain(jnp.asarray(select))), -1).astype(np.int32)
    labels = None if right is None else np.where(np.arange(60) < 60 * right, answers, (answers + 1) % 4)
    split = data.Dataset(images=select, labels=labels)
    accepting = config("--base.accept-low-accuracy", "true").base
    with caplog.at_level("INFO"):
        found = base_on_select(accepting, chain, split)
    assert found.accuracy_select == (None if right is None else pytest.approx(right))
    assert found.commonest_answer == np.bincount(answers).max() / 60
    assert base_line(found) in caplog.text
    if passes:
        assert base_on_select(config().base, chain, split) == found
    else:
        with pytest.raises(InputError, match=rf"^base: .*got {right:.1%} of 60 correct .* guessing gives 25.0%"):
            base_on_select(config().base, chain, split)


NAMES = [f"{kind}@{site}" for kind in ("fc", "fc+linear", "fc2", "wide") for site in (1, 2)]


@settings(deadline=None)
@given(st.sets(st.sampled_from([*NAMES, "fc+other@1", "fc@0", "fc@10"])))
def test_a_predictor_is_kept_where_any_of_its_selectors_is_named(names):
    heads = [TWO, dataclasses.replace(tiny.head(1, 2), name="fc2"), WIDE]  # wide: at every site but 0, by default
    kept = within(tiny.chain(), heads, names)
    found = {(head.name, site) for head in kept for site in head.sites or ()}
    known = names & set(NAMES)
    assert found == {(name.partition("@")[0].partition("+")[0], int(name[-1])) for name in known}
    for head in kept:  # but for its sites it is as it was: all its selectors are fitted
        (before,) = (h for h in heads if h.name == head.name)
        assert dataclasses.replace(head, sites=before.sites) == before


def test_one_selector_that_can_pay_keeps_the_predictor_and_its_other_selectors(lookups, tmp_path):
    said, _ = lookups
    said |= {"fc@1": 2.5, "fc@2": 1.5, "fc+linear@2": 1.01}  # a hit saves two blocks at site 1, one at site 2
    found = explored(tmp_path, TWO)
    assert [c.name for c in found.candidates] == ["fc@1", "fc+linear@1"]
    assert set(found.dropped) == {"fc@2", "fc+linear@2"}
    assert "1.500 ms" in found.dropped["fc@2"]
    assert {row["name"] for row in found.ranking(0.1)} == {"fc@1", "fc+linear@1"}  # and none of those dropped


def test_what_is_over_the_memory_budget_is_neither_measured_nor_fitted(lookups, tmp_path):
    _, measured = lookups
    found = explored(tmp_path, tiny.head(1), WIDE, options=["--plan.memory_share", "2"])
    assert measured == [["fc@1"]]
    assert [c.name for c in found.candidates] == ["fc@1"]
    assert set(found.dropped) == {"wide@1", "wide@2"}
    assert all("MB" in reason for reason in found.dropped.values())


def test_where_nothing_can_pay_that_is_said_and_nothing_is_fitted(lookups, tmp_path, monkeypatch):
    said, measured = lookups
    monkeypatch.setattr(gati_jax, "fit", None)  # would raise TypeError
    said |= dict.fromkeys(("fc@1", "fc+linear@1", "fc@2", "fc+linear@2"), 3.0)
    with pytest.raises(InputError, match=r"fit\.heads: expected at least one that can save time"):
        explored(tmp_path / "dear", TWO)
    assert len(measured) == 1
    with pytest.raises(InputError, match=r"plan\.memory_share: expected room for .* MB, the smallest"):
        explored(tmp_path / "large", TWO, options=["--plan.memory_share", "0.001"])
    assert len(measured) == 1  # nor measured


BUSY = {
    "times that spread": lambda table: dataclasses.replace(table, spread=0.11),
    "a block that took no time": lambda table: dataclasses.replace(table, blocks_ms=(2.0, 0.0, *table.blocks_ms[2:])),
}


@pytest.fixture(params=BUSY)
def busy(request, lookups, monkeypatch):
    """The machine is busy in the first of so many measurements."""
    _, measured = lookups
    measure, until = gati_jax.measure_costs, [0]

    def disturbed(*given: Any, **options: Any) -> CostTable:
        table = dataclasses.replace(measure(*given, **options), spread=0.1)
        return BUSY[request.param](table) if len(measured) <= until[0] else table

    monkeypatch.setattr(gati_jax, "measure_costs", disturbed)
    return until


@pytest.mark.parametrize(("disturbed", "measurements"), [(0, 1), (1, 2), (2, 3), (9, 3)])
def test_costs_of_a_busy_machine_are_measured_again_and_never_kept(
    busy, lookups, tmp_path, caplog, disturbed, measurements
):
    _, measured = lookups
    busy[0], path = disturbed, tmp_path / "costs.json"
    steady = disturbed < 3
    measured_tuning(path, tiny.chain(), untrained(tiny.chain(), [TWO]), config())
    assert (len(measured), path.exists()) == (measurements, steady)
    assert ("COSTS ARE UNRELIABLE" in caplog.text) != steady
    if not steady:
        busy[0] = 0
        tuning = measured_tuning(path, tiny.chain(), untrained(tiny.chain(), [TWO]), config())
        costs = costs_in(tuning, config())
        assert (costs.full_ms, len(measured), path.exists()) == (len(tiny.chain()), 4, True)


def test_that_nothing_can_pay_on_a_busy_machine_is_no_conclusion(busy, lookups, tmp_path):
    said, _ = lookups
    said |= dict.fromkeys(("fc@1", "fc+linear@1", "fc@2", "fc+linear@2"), 3.0)
    busy[0] = 3
    with pytest.raises(InputError, match=r"save time, got none.* the machine was busy when costs were measured"):
        explored(tmp_path, TWO)
    with pytest.raises(InputError, match=r"see the reasons above$"):
        explored(tmp_path, TWO)  # measured anew, on an idle machine


def test_costs_under_another_memory_budget_are_measured_anew(lookups, tmp_path):
    """The budget decides which candidates are measured."""
    said, measured = lookups

    def costs(*options: str) -> Mapping[str, float]:
        caches = untrained(tiny.chain(), [TWO])
        tuning = measured_tuning(tmp_path / "costs.json", tiny.chain(), caches, config(*options))
        return costs_in(tuning, config()).lookup_ms

    first = costs("--plan.memory_share", "2")
    said["fc@1"] = 0.5  # a measurement would show it
    assert costs("--plan.memory_share", "2") == first
    assert len(measured) == 1
    for share, times in (("3", 2), (None, 3)):
        options = () if share is None else ("--plan.memory_share", share)
        assert costs(*options)["fc@1"] == 0.5
        assert len(measured) == times
    assert costs() == costs()
    assert len(measured) == 3


@pytest.mark.usefixtures("lookups")
def test_what_was_composed_once_is_composed_again_though_the_clock_says_otherwise(tmp_path, monkeypatch):
    """A busier machine would end the search elsewhere; other costs or budgets compose anew; so does damage."""
    found = explored(tmp_path, TWO)
    plan, composition = found.plan(config(), 0.5)
    calls = []

    def out_of_time(*args: Any, seconds: float, **options: Any) -> Composition:
        calls.append(seconds)
        return compose(*args, seconds=0.0, **options)

    monkeypatch.setattr(threshold_path, "compose", out_of_time)
    again, kept = found.plan(config(), 0.5)
    assert (again.hash, kept, calls) == (plan.hash, composition, [])
    found.plan(config(), 0.4)
    found.plan(config("--plan.max_sites", "1"), 0.5)
    assert len(calls) == 2
    (tmp_path / "composition-0.5.json").write_text("{")
    found.plan(config("--plan.max_sites", "1"), 0.5)
    assert len(calls) == 3
