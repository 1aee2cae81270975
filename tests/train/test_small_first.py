"""The scripts with a small network before the base, a plan for batches on tuned times, and a tuned evaluation."""

import html
import shutil

import numpy as np
import pytest

import gati_jax
from gati_jax.caches import Network
from tests.train.one_pass import caches_arguments, evaluate_arguments, json_of, small_and_repeatable
from tests.train.test_bad_input import refuse
from train import caches, evaluate, tune
from train.results import Evaluation

NOT_SEEN = '["all[:897]"]'


def networks(weights, trained_on: str = NOT_SEEN) -> list[str]:
    small = f'{{name = "small", network = "resnet20", weights = "{weights}", trained_on = {trained_on}}}'
    return ["--fit.networks", f"[{small}]"]


@pytest.fixture(scope="module")
def passed(run, tmp_path_factory):
    """The base itself is the small network: it always agrees, so the planner cannot but take it if it is cheap."""
    folder = tmp_path_factory.mktemp("small")
    weights = run.folder / "base" / "base.safetensors"
    shutil.copytree(run.folder / "caches" / "checkpoints", folder / "caches" / "checkpoints")
    arguments = [*caches_arguments(run.folder), *networks(weights), "--plan.batch", "2", "--plan.tuned", "true"]
    with small_and_repeatable():
        return folder, json_of(caches.main, *arguments, "--out", str(folder / "caches"))


def test_it_is_planned_certified_and_saved_like_any_other_cache(passed):
    folder, result = passed
    assert result["predicted"]["batch"] == 2
    first = result["plan"][0]
    assert (first["name"], first["site"], first["agreement"]) == ("small@0", 0, 1.0)
    bundle = gati_jax.load_bundle(folder / "caches" / "bundle")
    assert isinstance(bundle.caches[0].predictor, Network)
    assert bundle.cascade.sites[0] == 0


def test_what_the_plan_was_tuned_for_is_kept(passed):
    """Also where the search chose algorithms for networks that the plan has no use for."""
    folder, _ = passed
    bundle = gati_jax.load_bundle(folder / "caches" / "bundle")  # warnings are errors
    for tuning in bundle.tunings:  # none where the compiler's own programs are the fastest
        assert [tile.size for tile in tuning.tiles] == [1, 2]
        assert all(tile.costs and set(tile.costs.lookup_ms) == {c.name for c in bundle.caches} for tile in tuning.tiles)
    assert len(bundle.checks) == (2 if bundle.tunings else 0)


def test_a_tuned_evaluation_says_how_fast_every_batch_is(passed):
    folder, _ = passed
    bundle = ["--bundle", str(folder / "caches" / "bundle"), "--backend", "xla"]
    (tuning,) = json_of(tune.main, *bundle, "--tiles", "1", "4", "--rounds", "1")
    assert [tile["size"] for tile in tuning["tiles"]] == [1, 4]
    assert all("small@0" in tile["costs"]["lookup_ms"] for tile in tuning["tiles"])
    # What is served has a bound: the base and the plan were compared on the certify rows.
    certificate, checked = gati_jax.load_bundle(folder / "caches" / "bundle").certificate, tuning["checks"]
    assert [(c["cascade"], c["n"]) for c in checked] == [
        ("base", certificate.n), (f"{certificate.plan_hash}:{certificate.step}", certificate.n)
    ]  # fmt: skip
    assert {c["data_fingerprint"] for c in checked} == {certificate.data_fingerprint}
    arguments = [*evaluate_arguments(folder, folder / "eval"), "--batches", "1", "4", "64", "--timed", "8"]
    result = json_of(evaluate.main, *arguments)
    served = result["served"]
    assert (served["numerics"], served["delta"]) == ("fast", pytest.approx(certificate.delta + 0.01))
    assert certificate.epsilon < served["epsilon"] < 1
    assert served["text"] in html.unescape((folder / "eval" / "report.html").read_text())
    measured = result["cost"]["measured"]
    assert [(row["batch"], row["driver"]) for row in measured] == [(1, "while_loop"), (4, "tiles")]  # 60 rows: no 64
    for row in measured:
        assert (row["numerics"], row["backend"]) == ("fast", "xla")
        assert row["full"] in {"reference", "tuned"}
        assert row["speedup"] == pytest.approx(row["full_ms"] / row["cascade_ms"])
        assert row["conversion"] == pytest.approx(row["speedup"] / row["ideal"])
        assert 0 < row["predicted_ms"] < np.inf
    slow = [row | {"full": "tuned", "reference_ms": 2 * row["full_ms"]} for row in measured]
    printed = Evaluation.model_validate(result | {"cost": result["cost"] | {"measured": slow}}).summary()
    assert "Tuned for this device: xla" in printed
    assert "answers by default" in printed
    assert "over the fastest full network here (tuned like the cascade)" in " ".join(printed.split())
    assert "XLA's reference programs take 2.0 times as long" in printed


@pytest.mark.usefixtures("quiet_logging", "tiny")
def test_a_network_that_has_seen_what_it_is_judged_on_is_refused(capsys, run, tmp_path):
    weights = run.folder / "base" / "base.safetensors"
    for trained_on, split in (('["all[:1000]"]', "select"), ('["all[1490:]"]', "certify")):
        arguments = [*caches_arguments(run.folder), *networks(weights, trained_on), "--out", str(tmp_path / "out")]
        message = refuse(capsys, caches.main, *arguments)
        assert f"expected small to be trained on other rows than {split}" in message
    assert not (tmp_path / "out").exists()
