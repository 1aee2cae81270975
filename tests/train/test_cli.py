"""The scripts from the command line to evaluation.json, on the digits, and what they say to bad input.

A residual network of three blocks stands in for ResNet-20: the same code, a fraction of the compilation. Costs are
measured, then replaced by made-up ones, so that the same fit always gives the same plan.
"""

import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.stats import binom

import gati_jax
from gati_jax import CostTable, InputError, data
from gati_jax.fitting import loop
from gati_jax.models import ResNet, apply, export_state_dict, import_state_dict, init, resnet
from gati_jax.planning import ReplayTable
from gati_jax.runtime import Speed
from train import base, caches, cli, evaluate

ROOT = Path(__file__).parents[2]
DIGITS = ["--config", str(ROOT / "configs" / "digits.toml")]
TINY = ResNet(stages=(1, 1, 1), widths=(4, 8, 8), shortcut="A", input_shape=(8, 8, 1))
SMALLEST = ResNet(stages=(1,), widths=(4,), input_shape=(8, 8, 1))
HIDDEN, TESTED = 16, 60
HEADS = f'[{{name = "grid", predictor = {{kind = "grid", cells = 4, hidden = {HIDDEN}}}}}]'
FIT = ["--fit.epochs", "6", "--fit.heads", HEADS, "--measure_rounds", "3", "--plan.epsilon", "0.2"]
SPLITS = ["--data.splits.test", f"all[1497:{1497 + TESTED}]"]
KEYS = {
    "": "dataset split n versions seed",
    "base": "accuracy",
    "cascade": "accuracy agreement",
    "certificate": "epsilon delta n disagreements method numerics looks holds",
    "exits.0": "exit hits hit_rate agreement",
    "oracle": "saved_share",
    "cost": "blocks_mean saved_share ideal_speedup",
    "cost.measured.0": "device driver dtype batch full_ms cascade_ms speedup conversion lookup_share spread",
    "memory": "base_bytes cache_bytes",
}


def made_up_costs(measured: CostTable) -> CostTable:
    """A block takes a millisecond, a lookup a hundredth."""
    blocks = (1.0,) * len(measured.blocks_ms)
    return dataclasses.replace(measured, blocks_ms=blocks, lookup_ms=dict.fromkeys(measured.lookup_ms, 0.01))


@contextlib.contextmanager
def small_and_repeatable(network: ResNet = TINY) -> Generator[None]:
    measure = gati_jax.measure_costs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.config.resnet", lambda *_, **__: network)
        patch.setattr(gati_jax, "measure_costs", lambda *a, **k: made_up_costs(measure(*a, **k)))
        yield


@pytest.fixture
def tiny() -> Iterator[None]:
    with small_and_repeatable():
        yield


def json_of(main: Callable[[list[str]], None], *arguments: str) -> Any:
    """Run a script with --json; parse all of its standard output, strictly, as one document."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main([*arguments, "--json"])
    return strict(printed.getvalue())


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)  # NaN and Infinity are not JSON


@functools.cache
def load_once(path: Path) -> gati_jax.Bundle:
    return gati_jax.load_bundle(path)


class Run(NamedTuple):
    """One pass through the house."""

    folder: Path
    base: Any
    caches: Any
    evaluation: Any
    loaded: list[str]  # splits that train.caches loaded

    @property
    def bundle(self) -> gati_jax.Bundle:
        return load_once(self.folder / "caches" / "bundle")


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    """Base, caches, evaluation."""
    folder, loaded, load = tmp_path_factory.mktemp("run"), [], data.load

    def recording(name: str, split: str, data_dir: Path | None = None) -> data.Dataset:
        loaded.append(split)
        return load(name, split, data_dir)

    base_out = str(folder / "base")
    with small_and_repeatable():
        trained = json_of(base.main, *DIGITS, *SPLITS, "--out", base_out, "--base.training.epochs", "6")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "load", recording)
            fitted = json_of(caches.main, *caches_arguments(folder), "--out", str(folder / "caches"))
    evaluated = json_of(evaluate.main, *evaluate_arguments(folder, folder / "eval"), "--timed", str(TESTED))
    return Run(folder, trained, fitted, evaluated, loaded)


def caches_arguments(folder: Path) -> list[str]:
    return [*DIGITS, *SPLITS, *FIT, "--base.weights", str(folder / "base" / "base.safetensors")]


def evaluate_arguments(folder: Path, out: Path) -> list[str]:
    return ["--bundle", str(folder / "caches" / "bundle"), "--out", str(out)]


@pytest.fixture(scope="session")
def tested(run) -> data.Dataset:
    del run
    return data.load("digits", f"all[1497:{1497 + TESTED}]")


@pytest.fixture(scope="session")
def table(run, tested) -> ReplayTable:
    """What base and caches say to the test images, each alone."""
    return gati_jax.replay(run.bundle.chain, run.bundle.cascade.caches, tested.images, labels=tested.labels)


@pytest.fixture(scope="session")
def predictions(run, tested) -> list[gati_jax.Prediction]:
    return [gati_jax.infer(run.bundle, image) for image in tested.images]


# --- The pass ---------------------------------------------------------------------------------------------------------


def test_evaluation_has_every_key_and_is_what_was_printed(run):
    written = strict((run.folder / "eval" / "evaluation.json").read_text())
    assert written == run.evaluation
    for where, names in KEYS.items():
        section = written
        for key in filter(None, where.split(".")):
            section = section[int(key) if key.isdigit() else key]
        assert set(names.split()) <= set(section), where
    assert (written["dataset"], written["split"], written["n"]) == ("digits", f"all[1497:{1497 + TESTED}]", TESTED)


def test_base_accuracy_is_that_of_the_unfolded_network(run, tested):
    variables = import_state_dict(TINY, load_file(run.folder / "base" / "base.safetensors"))
    pixels = (tested.images.astype(np.float32) / 16 - np.float32(0.305)) / np.float32(0.376)
    accuracy = np.mean(np.argmax(apply(TINY, variables, jnp.asarray(pixels)), -1) == tested.labels)
    assert accuracy > 0.3  # it has learned: ten classes
    assert run.base["accuracy"] == pytest.approx(accuracy)
    assert run.evaluation["base"]["accuracy"] == pytest.approx(accuracy)
    assert strict((run.folder / "base" / "base.json").read_text())["n"] == TESTED


def test_exits_agreement_and_accuracy_are_those_of_single_requests(run, tested, table, predictions):
    exits = np.array([int(p.exit) for p in predictions])
    classes = np.array([int(p.class_index) for p in predictions])
    assert len(set(exits.tolist())) > 1  # else nothing below says much
    evaluation = run.evaluation
    assert [e["exit"] for e in evaluation["exits"]] == [*run.bundle.cascade.sites, 3]
    assert [e["hits"] for e in evaluation["exits"]] == [int((exits == e["exit"]).sum()) for e in evaluation["exits"]]
    assert sum(e["hits"] for e in evaluation["exits"]) == evaluation["n"] == TESTED
    for e in evaluation["exits"]:
        here = exits == e["exit"]
        assert e["hit_rate"] == pytest.approx(here.mean())
        expected = np.mean(classes[here] == table.answers[here]) if here.any() else None
        assert e["agreement"] == (None if expected is None else pytest.approx(expected))
    assert evaluation["exits"][-1]["agreement"] in (1.0, None)
    assert evaluation["cascade"]["agreement"] == pytest.approx(np.mean(classes == table.answers))
    assert evaluation["cascade"]["accuracy"] == pytest.approx(np.mean(classes == tested.labels))
    assert evaluation["cost"]["blocks_mean"] == pytest.approx(exits.mean())


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
    assert measured["speedup"] == pytest.approx(measured["full_ms"] / measured["cascade_ms"])
    assert cost["saved_share"] == pytest.approx(1 - 1 / cost["ideal_speedup"])
    # Every request of the split was timed, so their ideal is the split's.
    assert measured["conversion"] == pytest.approx(measured["speedup"] / cost["ideal_speedup"])
    assert (measured["batch"], measured["dtype"], measured["driver"]) == (1, "float32", "while_loop")
    looked = [sum(0.01 for s in run.bundle.cascade.sites if s <= e["exit"]) for e in run.evaluation["exits"]]
    mean = sum(ms * e["hit_rate"] for ms, e in zip(looked, run.evaluation["exits"], strict=True))
    assert measured["lookup_share"] == pytest.approx(mean / measured["cascade_ms"])


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
    cost = evaluate.cost(bundle, np.array([site, 3, site, 3]), speed)
    assert cost["ideal_speedup"] == pytest.approx(4 / 2.5)
    assert cost["saved_share"] == pytest.approx(1.5 / 4)
    assert cost["measured"][0]["speedup"] == pytest.approx(4 / 3)
    assert cost["measured"][0]["conversion"] == pytest.approx((4 / 3) / (4 / 2.5))


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
    assert evaluate.oracle_saved_share(table, speed) == pytest.approx(1 - (1 + 3 + 8 + 1) / 4 / 8)


def test_nothing_is_chosen_on_test(run):
    """Training caches never so much as loads it; training the base writes its accuracy only."""
    assert sorted(run.loaded) == sorted(["all[:897]", "all[897:1197]", "all[1197:1497]"])


def test_the_report_shows_the_evaluation(run):
    html = (run.folder / "eval" / "report.html").read_text()
    assert f"resnet20 on digits all[1497:{1497 + TESTED}]" in html
    assert f"{run.evaluation['cascade']['agreement']:.2%}" in html


def test_caches_json_and_provenance_say_where_it_comes_from(run):
    assert strict((run.folder / "caches" / "caches.json").read_text()) == run.caches
    provenance = run.bundle.provenance
    parts = {"fit": "all[:897]", "select": "all[897:1197]", "certify": "all[1197:1497]"}
    for name, part in parts.items():
        rows = data.row_digests(data.load("digits", part).images)
        assert provenance.data_fingerprints[name] == data.fingerprint(rows)
    assert provenance.config["fit"]["epochs"] == 6
    assert run.bundle.class_names == tuple("0123456789")
    assert run.caches["predicted"]["full_ms"] == 3.0


def test_another_split_can_be_evaluated(run, tmp_path):
    arguments = evaluate_arguments(run.folder, tmp_path)
    result = json_of(evaluate.main, *arguments, "--split", "certify", "--timed", "1")
    assert (result["split"], result["n"], result["cost"]["measured"][0]["requests"]) == ("all[1197:1497]", 300, 1)
    # The cascade repeats on these rows what was counted for the certificate.
    assert round((1 - result["cascade"]["agreement"]) * 300) == run.bundle.certificate.disagreements


def test_without_json_a_table_is_printed(run, tmp_path, capsys):
    evaluate.main([*evaluate_arguments(run.folder, tmp_path), "--timed", "1"])
    printed = capsys.readouterr().out
    assert "agreement with the base" in printed
    assert ("holds here" in printed) == run.evaluation["certificate"]["holds"]
    assert "evaluation.json" in printed


# --- Looks ------------------------------------------------------------------------------------------------------------


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


def test_looks_at_other_rows_do_not_count(tmp_path):
    looks = tmp_path / "looks.json"
    assert caches.record_look(looks, "rows", "plan") == 1
    assert caches.record_look(looks, "other rows", "plan") == 1
    assert caches.record_look(looks, "rows", "plan") == 1
    assert caches.record_look(looks, "rows", "other plan") == 2
    assert caches.record_look(looks, "rows", "third plan") == 3
    assert caches.record_look(looks, "other rows", "third plan") == 2


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"looks": [1]}'])
def test_damaged_looks_are_not_forgotten_but_reported(tmp_path, content):
    (tmp_path / "looks.json").write_text(content)
    with pytest.raises(InputError, match=r"looks\.json"):
        caches.record_look(tmp_path / "looks.json", "rows", "plan")
    assert (tmp_path / "looks.json").read_text() == content


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_logging() -> Iterator[None]:
    """Take back what ``cli.run`` does to the process's logging."""
    root, names = logging.getLogger(), ("gati_jax", "train", "absl")
    handlers, level, levels = root.handlers[:], root.level, [logging.getLogger(name).level for name in names]
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, old in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(old)
    logging.captureWarnings(capture=False)


def refuse(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], *arguments: str) -> str:
    """Run as ``python -m`` would; check that it ends with code 2 and one line on standard error; return the line."""
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: main(list(arguments)))
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


CONFIG_ERRORS = {
    "missing config": (["--config", "nowhere.toml"], "nowhere.toml"),
    "unknown key": ([*DIGITS, "--fit.epoch", "1"], "unknown key fit.epoch; did you mean fit.epochs?"),
    "wrong type": ([*DIGITS, "--fit.epochs", "many"], "fit.epochs"),
    "missing value": ([*DIGITS, "--fit.epochs"], "expected a value behind --fit.epochs"),
    "unknown network": ([*DIGITS, "--base.network", "resnet21"], "resnet21"),
    "unknown split": ([*DIGITS, "--data.splits.fit", "train", "--data.base_trained_on", '["train"]'], "split"),
    "no such rows": (
        [*DIGITS, *SPLITS, "--data.splits.fit", "all[5000:]", "--data.base_trained_on", '["all[5000:]"]'],
        "all has 1797 rows",
    ),
    "split of another form": ([*DIGITS, "--data.splits.test", "all[10%:]"], "all[10%:]"),
    "data folder": ([*DIGITS, "--data.name", "cifar10", "--data.dir", "nowhere"], "data.dir"),
    "normalization": ([*DIGITS, "--base.normalization.std", "[0]"], "normalization"),
}


@pytest.mark.parametrize("main", [base.main, caches.main], ids=["base", "caches"])
@pytest.mark.parametrize("case", CONFIG_ERRORS)
@pytest.mark.usefixtures("quiet_logging")
def test_bad_config_is_one_line(capsys, monkeypatch, tmp_path, main, case):
    arguments, message = CONFIG_ERRORS[case]
    monkeypatch.chdir(tmp_path)
    if case in {"no such rows", "data folder", "normalization", "unknown split"} and main is caches.main:
        arguments = [*arguments, "--base.weights", str(weights_of(tmp_path))]
    assert message in refuse(capsys, main, *arguments, "--out", "out")
    assert not (tmp_path / "out").exists()


def weights_of(folder: Path) -> Path:
    """Weights for ResNet-20, all zeros."""
    network = resnet("resnet20", input_shape=(8, 8, 1))
    shapes = jax.eval_shape(lambda: init(network, jax.random.key(0)))
    tensors = export_state_dict(network, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))
    base.save_file(tensors, folder / "zeros.safetensors")
    return folder / "zeros.safetensors"


@pytest.mark.parametrize(
    ("main", "key", "value", "names"),
    [
        (caches.main, "select", "all[800:1197]", ("fit=", "select=all[800:1197]")),
        (caches.main, "certify", "all[1196:1497]", ("select=", "certify=all[1196:1497]")),
        (caches.main, "test", "all", ("fit=", "test=all")),
        (base.main, "test", "all[896:]", ("test=all[896:]", "base_trained_on 0=")),
    ],
)
@pytest.mark.usefixtures("quiet_logging")
def test_overlapping_splits_are_named(capsys, tmp_path, main, key, value, names):
    said = refuse(capsys, main, *DIGITS, f"--data.splits.{key}", value, "--out", str(tmp_path))
    assert "expected disjoint splits" in said
    for name in names:
        assert name in said


@pytest.mark.usefixtures("quiet_logging", "tiny")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.base_trained_on", "[]"], "base_trained_on"),
        (["--base.training.batch", "5000"], "5000"),
        (["--seed", "-1"], "seed"),
        (["--base.normalization.mean", "[0.1, 0.2]", "--base.normalization.std", "[1, 1]"], "normalization"),
    ],
)
def test_training_a_base_that_cannot_be_is_refused(capsys, tmp_path, arguments, message):
    common = ["--base.training.epochs", "1", "--out", str(tmp_path / "out")]
    assert re.search(message, refuse(capsys, base.main, *DIGITS, *common, *arguments))


@pytest.mark.usefixtures("quiet_logging")
def test_training_on_images_of_another_shape_is_refused(capsys, tmp_path):
    shape = ["--base.input_shape", "[16, 16, 1]", "--out", str(tmp_path / "out")]
    assert "the network takes (16, 16, 1)" in refuse(capsys, base.main, *DIGITS, *shape)


@pytest.mark.usefixtures("quiet_logging")
def test_an_out_that_is_a_file_is_refused(capsys, run, tmp_path):
    (tmp_path / "out").write_text("mine")
    said = refuse(capsys, evaluate.main, *evaluate_arguments(run.folder, tmp_path / "out"), "--timed", "1")
    assert "out" in said
    assert (tmp_path / "out").read_text() == "mine"


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.usefixtures("quiet_logging")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "base.weights: expected a .safetensors file"),
        (lambda _: None, "no such file"),
        (lambda path: path.write_bytes(b"\0" * 40), "not a readable safetensors file"),
        (lambda path: (shutil.copy(weights_of(path.parent), path), truncated(path)), "not a readable safetensors file"),
        (lambda path: base.save_file({"a.weight": np.zeros(3, np.float32)}, path), "1 unexpected: a.weight"),
    ],
    ids=["none named", "missing", "garbage", "truncated", "another network's"],
)
def test_bad_weights_are_one_line(capsys, tmp_path, make, message):
    config = tmp_path / "c.toml"
    text = (ROOT / "configs" / "digits.toml").read_text()
    path = tmp_path / "w.safetensors"
    config.write_text(
        text.replace('weights = "runs/digits/base/base.safetensors"', f'weights = "{path}"' if make else "")
    )
    if make:
        make(path)
    assert message in refuse(capsys, caches.main, "--config", str(config), "--out", str(tmp_path / "out"))


@pytest.mark.usefixtures("quiet_logging")
def test_bad_bundles_are_one_line(capsys, run, tmp_path):
    copy = shutil.copytree(run.folder / "caches" / "bundle", tmp_path / "bundle")
    out = ("--out", str(tmp_path / "out"))
    assert "manifest.json" in refuse(capsys, evaluate.main, "--bundle", str(tmp_path / "nothing"), *out)
    array = max((file for file in (copy / "arrays").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    array.write_bytes(array.read_bytes()[:-1])
    assert array.name in refuse(capsys, evaluate.main, "--bundle", str(copy), *out)
    (copy / "manifest.json").write_text("{")
    assert "manifest.json" in refuse(capsys, evaluate.main, "--bundle", str(copy), *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quiet_logging")
def test_a_bundle_that_does_not_say_its_data_is_refused(capsys, run, tmp_path):
    copy = shutil.copytree(run.folder / "caches" / "bundle", tmp_path / "bundle")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["provenance"]["config"] = {}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    said = refuse(capsys, evaluate.main, "--bundle", str(copy), "--out", str(tmp_path / "out"))
    assert "does not say what it was fitted on" in said


# --- Processes --------------------------------------------------------------------------------------------------------


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=False, timeout=300
    )


@pytest.mark.parametrize("script", ["base", "caches", "evaluate"])
def test_help_shows_an_example(script):
    result = start("-m", f"train.{script}", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"python -m train.{script} --" in result.stdout.split("example:")[1]


def test_bad_input_ends_a_process_with_code_2_and_one_line(tmp_path):
    result = start("-m", "train.base", *DIGITS, "--out", str(tmp_path), "--fit.epoch", "3")
    expected = "error: config: unknown key fit.epoch; did you mean fit.epochs?\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)


RESUMED = [
    *DIGITS, "--base.training.epochs", "2", "--data.base_trained_on", '["all[:192]"]', "--data.splits.test",
    "all[1497:1527]",
]  # fmt: skip


def victim(arguments: list[str]) -> None:
    """Train a base with a checkpoint behind every step, and die in the middle of the fifth of six."""
    steps = loop._steps

    def mortal(*given: Any) -> Iterator[np.ndarray]:
        for i, rows in enumerate(steps(*given)):
            if i == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            yield rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.config.resnet", lambda *_, **__: SMALLEST)
        patch.setattr(loop, "_steps", mortal)
        patch.setattr(base, "LoopConfig", lambda **options: loop.LoopConfig(**options, checkpoint_seconds=0.0))
        base.main(arguments)


def test_a_killed_base_resumes_to_the_same_bits(tmp_path, caplog):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    result = start(__file__, *RESUMED, "--out", str(killed))
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (killed / "base.safetensors").exists()
    with caplog.at_level(logging.INFO, logger="gati_jax"), small_and_repeatable(SMALLEST):
        base.main([*RESUMED, "--out", str(killed)])
        base.main([*RESUMED, "--out", str(whole)])
    assert "resumed at step 4 of 6" in caplog.text
    one, other = (load_file(folder / "base.safetensors") for folder in (killed, whole))
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []
    assert not (killed / "checkpoints").exists()


if __name__ == "__main__":
    victim(sys.argv[1:])
