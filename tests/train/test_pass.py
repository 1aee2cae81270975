"""What a pass writes, against independent computations."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.stats import beta, binom

import gati_jax
from gati_jax import CostTable, data
from gati_jax.evaluation import timing
from gati_jax.models import apply, import_state_dict
from gati_jax.planning import ReplayTable
from gati_jax.profiling import Speed
from tests.train.one_pass import HIDDEN, KEYS, TESTED, TINY, evaluate_arguments, json_of, strict
from train import evaluate
from train.results import Caches, Evaluation


def test_evaluation_has_every_key_and_is_what_was_printed_and_reported(run):
    html = (run.folder / "eval" / "report.html").read_text()
    assert f"resnet20 on digits all[1497:{1497 + TESTED}]" in html
    differ = f"{100 - 100 * run.evaluation['cascade']['agreement']:.2f}".rstrip("0").rstrip(".")
    assert f'<dd class="number">{differ}%</dd>' in html
    written = strict((run.folder / "eval" / "evaluation.json").read_text())
    assert written == run.evaluation
    assert Evaluation.read(run.folder / "eval" / "evaluation.json").as_json() == written
    for where, names in KEYS.items():
        section = written
        for key in filter(None, where.split(".")):
            section = section[int(key) if key.isdigit() else key]
        assert set(names.split()) <= set(section), where
    assert (written["dataset"], written["split"], written["n"]) == ("digits", f"all[1497:{1497 + TESTED}]", TESTED)


def unfolded_accuracy(run, split):
    variables = import_state_dict(TINY, load_file(run.folder / "base" / "base.safetensors"))
    pixels = (split.images.astype(np.float32) / 16 - np.float32(0.305)) / np.float32(0.376)
    return np.mean(np.argmax(apply(TINY, variables, jnp.asarray(pixels)), -1) == split.labels)


def test_base_accuracy_is_that_of_the_unfolded_network(run, tested):
    accuracy = unfolded_accuracy(run, tested)
    assert accuracy > 0.3  # it has learned: ten classes
    assert run.base["accuracy"] == pytest.approx(accuracy)
    assert run.evaluation["base"]["accuracy"] == pytest.approx(accuracy)
    assert strict((run.folder / "base" / "base.json").read_text())["n"] == TESTED
    select = pytest.approx(unfolded_accuracy(run, data.load("digits", "all[897:1197]")))
    assert (run.caches["base"]["accuracy_select"], run.caches["base"]["n"]) == (select, 300)


def test_exits_agreement_and_accuracy_are_those_of_single_requests(run, tested, table, predictions):
    exits = np.array([int(p.exit) for p in predictions])
    classes = np.array([int(p.class_index) for p in predictions])
    assert len(set(exits.tolist())) > 1  # else nothing below says much
    evaluation = run.evaluation
    assert [e["exit"] for e in evaluation["exits"]] == [*run.bundle.cascade.sites, 3]
    assert evaluation["n"] == TESTED
    for e in evaluation["exits"]:
        here = exits == e["exit"]
        assert (e["hits"], e["hit_rate"]) == (here.sum(), pytest.approx(here.mean()))
        expected = np.mean(classes[here] == table.answers[here]) if here.any() else None
        assert e["agreement"] == (None if expected is None else pytest.approx(expected))
    assert evaluation["exits"][-1]["agreement"] in (1.0, None)
    assert evaluation["cascade"]["agreement"] == pytest.approx(np.mean(classes == table.answers))
    assert evaluation["cascade"]["accuracy"] == pytest.approx(np.mean(classes == tested.labels))
    assert evaluation["cost"]["blocks_mean"] == pytest.approx(exits.mean())


def test_details_are_those_of_single_requests(run, table, predictions):
    exits = np.array([int(p.exit) for p in predictions])
    agrees = np.array([int(p.class_index) for p in predictions]) == table.answers
    found, stops = run.evaluation, [*run.bundle.cascade.sites, 3]
    assert sum(c["n"] for c in found["classes"]) == TESTED
    for c in found["classes"]:
        here = table.answers == c["index"]
        assert (c["n"], c["name"]) == (here.sum(), str(c["index"]))
        assert c["exits"] == [int((exits[here] == stop).sum()) for stop in stops]
        assert c["disagreements"] == (~agrees[here]).sum()
    assert sum(pair["n"] for pair in found["confusions"]) == (~agrees).sum()
    for sample in found["samples"]:
        row = sample["row"]
        assert (sample["exit"], sample["agrees"]) == (exits[row], agrees[row])
        assert (sample["base"], sample["cascade"]) == (str(table.answers[row]), str(int(predictions[row].class_index)))
    assert {sample["exit"] for sample in found["samples"]} == set(exits.tolist())
    assert sum(not sample["agrees"] for sample in found["samples"]) == (~agrees).sum()
    for e in found["exits"]:
        if e["hits"]:
            k, n = round(e["agreement"] * e["hits"]), e["hits"]
            low, high = (beta.ppf(0.025, k, n - k + 1) if k else 0.0), (beta.ppf(0.975, k + 1, n - k) if k < n else 1.0)
            assert e["interval"] == pytest.approx([low, high])


def test_the_path_begins_at_the_base_and_has_the_plan_on_it(run):
    first, *_, last = found = run.evaluation["path"]
    (plan,) = [point for point in found if point["certified"]]
    assert (first["agreement"], first["ms"]) == (1.0, 3.0)  # by the made-up costs of three blocks
    assert first["accuracy"] == pytest.approx(run.evaluation["base"]["accuracy"])
    assert plan["step"] == run.bundle.certificate.step
    assert plan["agreement"] == pytest.approx(run.evaluation["cascade"]["agreement"])
    lookups = [sum(0.01 for s in run.bundle.cascade.sites if s <= e["exit"]) for e in run.evaluation["exits"]]
    expected = sum(e["hit_rate"] * (e["exit"] + ms) for e, ms in zip(run.evaluation["exits"], lookups, strict=True))
    assert plan["ms"] == pytest.approx(expected)
    assert last["step"] == len(run.bundle.plan.path) - 1
    assert run.evaluation["layout"]["blocks_ms"] == [1.0, 1.0, 1.0]
    assert [c["site"] for c in run.evaluation["layout"]["caches"]] == list(run.bundle.cascade.sites)


def test_certificate_is_the_bundle_s_and_holds_as_it_should(run, table, predictions):
    said, certificate = run.evaluation["certificate"], run.bundle.certificate
    for name in ("epsilon", "delta", "n", "disagreements", "method", "numerics", "looks"):
        assert said[name] == getattr(certificate, name)
    assert (said["epsilon"], said["n"], said["looks"], said["base_saw_data"]) == (0.2, 300, 1, False)
    wrong = np.mean([int(p.class_index) != a for p, a in zip(predictions, table.answers, strict=True)])
    assert said["holds"] == (certificate.step >= 0 and wrong <= 0.2)
    assert binom.cdf(said["disagreements"], said["n"], said["epsilon"]) <= said["delta"]


def test_costs_are_consistent(run):
    cost = run.evaluation["cost"]
    (measured,) = cost["measured"]
    assert measured["requests"] == TESTED
    for name in ("full", "cascade"):  # every run of every request; a request's time is the median of its runs
        runs = np.reshape(measured[f"{name}_each_ms"], (TESTED, 7))
        assert np.median(runs, axis=1).mean() == pytest.approx(measured[f"{name}_ms"], abs=1e-4)
    low, high = measured["interval"]
    assert low <= high
    assert measured["full"] == "reference"  # the bundle is not tuned: there is no other
    assert measured["speedup"] == pytest.approx(measured["full_ms"] / measured["cascade_ms"])
    assert cost["saved_share"] == pytest.approx(1 - 1 / cost["ideal_speedup"])
    # Every request of the split was timed, so their ideal is the split's.
    assert measured["conversion"] == pytest.approx(measured["speedup"] / cost["ideal_speedup"])
    assert (measured["batch"], measured["dtype"], measured["driver"]) == (1, "float32", "while_loop")
    looked = [sum(0.01 for s in run.bundle.cascade.sites if s <= e["exit"]) for e in run.evaluation["exits"]]
    mean = sum(ms * e["hit_rate"] for ms, e in zip(looked, run.evaluation["exits"], strict=True))
    # By the costs that were measured for the plan: here a block takes 1 ms.
    assert measured["lookup_share"] == pytest.approx(mean / (mean + cost["blocks_mean"]))


def test_memory_is_counted_tensor_by_tensor(run):
    tensors = load_file(run.folder / "base" / "base.safetensors")
    # Folded: a kernel and a bias for every convolution, and the classifier.
    kept = [v.size for k, v in tensors.items() if k.startswith("fc.") or "conv" in k or k.endswith(".bias")]
    assert run.evaluation["memory"]["base_bytes"] == 4 * sum(kept)
    arrays = [leaf for c in run.bundle.cascade.caches for leaf in jax.tree.leaves(c.params)]
    assert run.evaluation["memory"]["cache_bytes"] == sum(np.asarray(a).nbytes for a in arrays)
    # At least the two layers of a head on a 4x4 grid of four channels.
    assert run.evaluation["memory"]["cache_bytes"] >= 4 * (4 * 4 * 4 * HIDDEN + HIDDEN * 10)


def test_a_made_up_timing_gives_costs_by_hand(run):
    """Half leave at the first cache (1 of 4 ms), half at the base; the cascade itself takes 3 ms."""
    bundle = run.bundle
    site = bundle.cascade.sites[0]
    exit_ms = dict.fromkeys(bundle.cascade.sites, 1.0) | {3: 4.0}
    speed = Speed(full_ms=4.0, cascade_ms=3.0, exit_ms=exit_ms, exits=(site, 3), spread=0.0)
    described = timing.describe(bundle, speed, numerics="reference")
    cost = timing.cost(np.array([site, 3, site, 3]), speed, [described])
    assert cost.ideal_speedup == pytest.approx(4 / 2.5)
    assert cost.saved_share == pytest.approx(1.5 / 4)
    assert cost.measured[0].speedup == pytest.approx(4 / 3)
    assert cost.measured[0].conversion == pytest.approx((4 / 3) / (4 / 2.5))


def test_the_time_before_the_input_is_a_float():
    """A cache may stand at site 0, before all blocks."""
    nothing = CostTable(device="cpu", batch=1, blocks_ms=(1.0,), lookup_ms={}).until(0)
    assert (nothing, type(nothing)) == (0.0, float)


def test_the_oracle_leaves_at_the_first_cache_that_agrees():
    columns = np.array([[0, 9, 9, 0], [0, 1, 9, 9]])  # what the two caches say; the base says 0, 1, 2, 0
    table = ReplayTable(
        names=("a", "b"), sites=(1, 2), depth=3, answers=np.array([0, 1, 2, 0]), classes=columns,
        scores=np.zeros((2, 4), np.float32), rows=np.arange(4, dtype=np.uint64),
    )  # fmt: skip
    speed = Speed(full_ms=8.0, cascade_ms=1.0, exit_ms={1: 1.0, 2: 3.0, 3: 8.0}, exits=(3,), spread=0.0)
    costs = CostTable(device="cpu", batch=1, blocks_ms=(1.0, 2.0, 5.0), lookup_ms={"a": 0.1, "b": 0.2})
    found = timing.oracle(table, speed, costs)
    assert found.saved_share == pytest.approx(1 - (1 + 3 + 8 + 1) / 4 / 8)
    assert found.ms == pytest.approx((1.1 + 3.3 + 8.3 + 1.1) / 4)


def test_nothing_is_chosen_on_test(run):
    """Training caches never so much as loads it; training the base writes its accuracy only."""
    assert sorted(run.loaded) == sorted(["all[:897]", "all[897:1197]", "all[1197:1497]"])


def test_caches_json_and_provenance_say_where_it_comes_from(run):
    written = run.folder / "caches" / "caches.json"
    assert strict(written.read_text()) == run.caches == Caches.read(written).as_json()
    provenance = run.bundle.provenance
    parts = {"fit": "all[:897]", "select": "all[897:1197]", "certify": "all[1197:1497]"}
    for name, part in parts.items():
        rows = data.row_digests(data.load("digits", part).images)
        assert provenance.data_fingerprints[name] == data.fingerprint(rows)
    assert provenance.config["fit"]["epochs"] == 6
    assert run.bundle.class_names == tuple("0123456789")
    assert run.caches["predicted"]["full_ms"] == 3.0


@pytest.mark.parametrize("split", ["certify", "select"])
def test_another_split_can_be_evaluated(run, tmp_path, caplog, split):
    """On certify, the cascade repeats what was counted for the certificate; on select, its agreement says little."""
    arguments = evaluate_arguments(run.folder, tmp_path)
    with caplog.at_level(logging.WARNING, logger="train"):
        result = json_of(evaluate.main, *arguments, "--split", split, "--timed", "1")
    rows = {"certify": "all[1197:1497]", "select": "all[897:1197]"}[split]
    assert (result["split"], result["n"], result["cost"]["measured"][0]["requests"]) == (rows, 300, 1)
    wrong = round((1 - result["cascade"]["agreement"]) * 300)
    assert split == "select" or wrong == run.bundle.certificate.disagreements
    assert ("its agreement here says little" in caplog.text) == (split == "select")


def test_an_uncertified_bundle_is_said_to_be_one(run, tmp_path, capsys):
    bundle = run.bundle
    off = dataclasses.replace(bundle.certificate, step=-1, disagreements=0)
    gati_jax.save_bundle(tmp_path / "b", bundle.chain, bundle.caches, bundle.plan, off, provenance=bundle.provenance)
    evaluate.main(["--bundle", str(tmp_path / "b"), "--out", str(tmp_path / "out"), "--timed", "1"])
    printed = capsys.readouterr().out
    assert "NOTHING CERTIFIED" in printed
    assert "NOT hold" not in printed
    assert "Nothing could be certified" in (tmp_path / "out" / "report.html").read_text()
