"""train.reproduce on the digits: every policy, both operating points, figures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gati_jax import InputError
from tests.train.one_pass import Run, caches_arguments, json_of, looks_in, small_and_repeatable, strict
from tests.train.reproduce.written_results import texts
from train.reproduce import evaluation, page
from train.reproduce import run as script
from train.reproduce.results import Reproduction

HEADS = (
    '[{name = "grid", predictor = {kind = "grid", cells = 2, hidden = 8}, selectors = [{kind = "linear"}]},'
    ' {name = "grid2", predictor = {kind = "grid", cells = 2, hidden = 8}, cascaded = true},'
    ' {name = "huge", predictor = {kind = "fc", hidden = 4096}}]'
)


def reproduce_in(folder: Path, run: Run, *more: str) -> Any:
    options = ["--fit.heads", HEADS, "--fit.epochs", "2", "--plan.epsilon", "0.2", "--plan.memory_share", "4"]
    arguments = [*caches_arguments(run.folder), *options, "--measure_rounds", "3", "--out", str(folder), *more]
    arguments += looks_in(folder)
    with small_and_repeatable():
        return json_of(script.main, *arguments)


@pytest.fixture(scope="module")
def reproduced(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduced")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "ROUNDS", 2)
        patch.setattr(evaluation, "TIMED", 4)
        return folder, reproduce_in(folder, run)


def test_every_policy_is_evaluated_on_the_same_requests(reproduced):
    folder, result = reproduced
    assert result == json.loads((folder / "reproduction.json").read_text())
    assert result == Reproduction.model_validate(result).model_dump(mode="json")
    policies = [row["policy"] for row in result["certified"]["rows"]]
    assert policies[0] == "default plan"
    assert {"max probability (SDN)", "entropy (BranchyNet)", "patience (PABEE)", "ZTW ensemble"} <= set(policies)
    assert "the paper's selector" in policies
    n = {sum(row["exits"]) for group in ("certified", "accurate") for row in result[group]["rows"]}
    assert n == {sum(result["oracle"]["exits"])}
    for row in result["certified"]["rows"]:
        assert row["slower_by"]["low_ms"] <= row["slower_by"]["mean_ms"] <= row["slower_by"]["high_ms"]
        assert np.isfinite(row["mean_ms"])
        assert row["saved_share"] <= result["oracle"]["saved_share"] + row["disagreement"] + 1e-9


def test_candidates_over_budget_are_not_fitted(reproduced):
    _, result = reproduced
    assert result["explored"]["dropped"]
    assert all(name.startswith("huge@") for name in result["explored"]["dropped"])
    assert not any(row["name"].startswith("huge") for row in result["explored"]["ranking"])


def test_the_first_look_at_certify_is_written_down(reproduced):
    folder, result = reproduced
    look, composed, test = strict((folder / "looks.json").read_text())["looks"]
    assert (composed["closed"], test["closed"]) == ("composed", "revealed")
    assert (look["epsilon"], look["delta"], result["looks"]) == (0.2, 0.05, 1)


def test_what_is_shown_of_every_policy_closes_the_rows(run, reproduced, tmp_path):
    folder, _ = reproduced
    again = shutil.copytree(folder, tmp_path / "again")
    with pytest.raises(InputError, match="ledger: expected certify rows that are open"):
        reproduce_in(again, run, "--plan.epsilon", "0.1")


def test_certificates_bound_the_accuracy_that_is_lost(reproduced):
    _, result = reproduced
    certificates = result["certified"]["certificates"].values()
    assert any(one["certified"] for one in certificates)
    assert all(
        one["accuracy_gap"]["upper"] < 1 if one["certified"] else one["accuracy_gap"] is None for one in certificates
    )


def test_the_composition_reports_its_gap_and_why_it_leaves_caches_out(reproduced):
    _, result = reproduced
    composition = result["composition"]
    assert set(composition) == {"gap", "proved", "grid", "nodes", "seconds", "refused"}
    assert composition["proved"] == (composition["gap"] == 0)
    chosen = set(result["certified"]["rows"][0]["caches"])
    alone = {row["name"] for row in result["explored"]["ranking"]}
    assert set(composition["refused"]) <= alone - chosen
    assert all(composition["refused"].values())


def test_figures_name_every_policy_and_every_head(reproduced):
    folder, result = reproduced
    drawn = {path.stem: path for path in (folder / "figures").glob("*.svg")}
    assert set(drawn) == {"exits", "agreement", "front", "memory"}
    assert {row["policy"] for row in result["certified"]["rows"]} <= texts(drawn["front"])
    heads = {row["name"].partition("@")[0] for row in result["explored"]["ranking"]}
    assert {head for head in heads if "+" not in head} <= texts(drawn["agreement"])
    assert {f"site {row['site']}" for row in result["explored"]["ranking"]} <= texts(drawn["memory"])


def test_the_page_has_what_was_measured(reproduced, tmp_path):
    folder, result = reproduced
    page.main(["--reproduction", str(folder / "reproduction.json"), "--out", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    for row in result["certified"]["rows"]:
        assert f"| {row['policy']} | {row['heads']} | {row['mean_ms']:.2f} |" in text
    assert f"| {100 * result['oracle']['half_share']:.2f} % | [reproduce](#reproduce) |" in text
    for name in ("certified", "accurate", "read_off_test"):
        assert f"| {result['measured'][name]['speedup']:.2f} (spread " in text
