"""Bad input to the scripts: one line, exit code 2."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gati_jax import data
from gati_jax.models import export_state_dict, init, resnet
from tests.train.one_pass import DIGITS, FREEZE, ROOT, SPLITS, evaluate_arguments
from tests.train.reproduce.written_results import freeze as freeze_result
from tests.train.reproduce.written_results import reproduction as reproduction_result
from train import base, caches, cli, evaluate
from train.reproduce import freeze, page, run


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


@pytest.mark.parametrize("main", [base.main, caches.main, run.main], ids=["base", "caches", "reproduce"])
@pytest.mark.parametrize("case", CONFIG_ERRORS)
@pytest.mark.usefixtures("quiet_logging")
def test_bad_config_is_one_line(capsys, monkeypatch, tmp_path, main, case):
    arguments, message = CONFIG_ERRORS[case]
    monkeypatch.chdir(tmp_path)
    if case in {"no such rows", "data folder", "normalization", "unknown split"} and main is not base.main:
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
        (run.main, "select", "all[800:1197]", ("fit=", "select=all[800:1197]")),
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
@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_no_request_to_time_is_refused(capsys, run, tmp_path, count):
    arguments = (*evaluate_arguments(run.folder, tmp_path / "out"), f"--timed={count}")
    assert f"--timed: expected 1 or more, got {count}" in refuse(capsys, evaluate.main, *arguments)


def test_brackets_in_names_are_printed(capsys):
    cli.show("a [bold] title", ("name",), [("[red]cache[/red]",), ("[/]",)])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("a [bold] title", "[red]cache[/red]", "[/]"))


@pytest.mark.usefixtures("quiet_logging")
def test_a_bundle_that_does_not_say_its_data_is_refused(capsys, run, tmp_path):
    copy = shutil.copytree(run.folder / "caches" / "bundle", tmp_path / "bundle")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["provenance"]["config"] = {}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    said = refuse(capsys, evaluate.main, "--bundle", str(copy), "--out", str(tmp_path / "out"))
    assert "does not say what it was fitted on" in said


@pytest.mark.usefixtures("quiet_logging")
def test_policies_are_not_compared_without_labels(capsys, monkeypatch, tmp_path):
    load = data.load
    monkeypatch.setattr(data, "load", lambda *a, **k: dataclasses.replace(load(*a, **k), labels=None))
    arguments = [*DIGITS, "--base.weights", str(weights_of(tmp_path)), "--out", str(tmp_path / "out")]
    assert "expected labels" in refuse(capsys, run.main, *arguments)
    assert not (tmp_path / "out").exists()


FREEZE_ERRORS = {
    "missing config": (["--config", "nowhere.toml"], "nowhere.toml"),
    "a key of another script": (["--fit.heads", "[]"], "unknown key fit.heads"),
    "a flag of another script": (["--plan.epsilon", "0.1"], "unknown flag --plan.epsilon"),
    "no kind": (["--freeze.kinds", "[]"], "freeze.kinds: expected knn, kmeans or both, got []"),
    "the same kind twice": (["--freeze.kinds", '["knn", "knn"]'], "freeze.kinds: expected knn, kmeans"),
    "another kind": (["--freeze.kinds", '["tree"]'], "freeze.kinds.0"),
    "no cells": (["--freeze.cells", "0"], "freeze.cells"),
    "overlapping splits": (["--data.splits.serve", "all[1200:]"], "expected disjoint splits"),
    "no such rows": (["--data.splits.serve", "all[5000:]"], "all has 1797 rows"),
    "no weights": ([], "base.weights: expected a .safetensors file"),
}


@pytest.mark.parametrize("case", FREEZE_ERRORS)
@pytest.mark.usefixtures("quiet_logging")
def test_a_bad_protocol_is_one_line(capsys, monkeypatch, tmp_path, case):
    arguments, message = FREEZE_ERRORS[case]
    monkeypatch.chdir(tmp_path)
    Path("digits.toml").write_text(FREEZE)
    config = [] if "--config" in arguments else ["--config", "digits.toml"]
    said = refuse(capsys, freeze.main, *config, *arguments, "--out", "out")
    assert message in said
    assert "base_trained_on" not in said  # nobody wants to read the whole config
    assert not (tmp_path / "out").exists()


def without(result: dict[str, Any], *path: str) -> str:
    """Return a result as JSON, less one of its parts."""
    below = result
    for key in path[:-1]:
        below = below[key]
    del below[path[-1]]
    return json.dumps(result)


RESULT_ERRORS = {
    "empty": ("reproduction", "", "Invalid JSON"),
    "cut off": ("freeze", json.dumps(freeze_result())[:-9], "Invalid JSON"),
    "no UTF-8": ("freeze", b"\xff\xfe", "Invalid JSON"),
    "an empty object": ("freeze", "{}", "Field required; and"),
    "a list": ("reproduction", "[]", "Input should be an object"),
    "a number": ("reproduction", json.dumps(reproduction_result()).replace("0.925", "NaN"), "base.accuracy"),
    "half of it": (
        "reproduction",
        without(reproduction_result(), "measured", "certified"),
        "measured.certified: Field",
    ),
    "no policies": ("reproduction", json.dumps(reproduction_result() | {"certified": {"rows": []}}), "certified.rows"),
    "one protocol": ("freeze", without(freeze_result(), "protocols", "clean"), "protocols.clean: Field required"),
    "the other's": ("freeze", json.dumps(reproduction_result()), "protocols: Field required"),
}


@pytest.mark.parametrize("case", RESULT_ERRORS)
@pytest.mark.usefixtures("quiet_logging")
def test_bad_results_are_one_line(capsys, tmp_path, case):
    name, text, message = RESULT_ERRORS[case]
    file = tmp_path / "given.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refuse(capsys, page.main, f"--{name}", str(file), "--out", str(tmp_path / "page.md"))
    assert said.startswith(f"error: {name}: expected a whole {name}.json, got {file}: ")
    assert message in said
    assert not (tmp_path / "page.md").exists()


@pytest.mark.usefixtures("quiet_logging")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reproduction", "nowhere.json"], "nowhere.json"),
        (["--remarks", "nowhere.md"], "nowhere.md"),
        (["--remarks", "latin.md"], "remarks: expected Markdown in UTF-8, got latin.md"),
        (["--figures", "nowhere"], "figures: expected a drawing at nowhere/repro-exits.svg"),
        (["--out", "."], "--out: expected a file, got the folder ."),
        (["--freezer", "a"], "unknown flag --freezer; did you mean --freeze?"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("latin.md").write_bytes("naïve".encode("latin-1"))
    assert message in refuse(capsys, page.main, "--out", "page.md", *arguments)
    assert not Path("page.md").exists()
