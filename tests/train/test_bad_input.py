"""Bad input to the scripts: one line, exit code 2."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import gati_jax
from gati_jax import data
from gati_jax.models import export_state_dict, init, resnet
from tests.train.one_pass import DIGITS, FREEZE, SPLITS, evaluate_arguments
from tests.train.reproduce.written_results import freeze as freeze_result
from tests.train.reproduce.written_results import reproduction as reproduction_result
from train import base, caches, cli, evaluate
from train.reproduce import freeze, page, run

pytestmark = pytest.mark.usefixtures("quiet_logging")


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


@pytest.fixture(scope="module")
def zeros(tmp_path_factory) -> Path:
    """Weights for ResNet-20, all zeros."""
    network = resnet("resnet20", input_shape=(8, 8, 1))
    shapes = jax.eval_shape(lambda: init(network, jax.random.key(0)))
    tensors = export_state_dict(network, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))
    path = tmp_path_factory.mktemp("weights") / "zeros.safetensors"
    base.save_file(tensors, path)
    return path


def digits(tmp_path: Path, zeros: Path, *more: str) -> list[str]:
    return [*DIGITS, "--base.weights", str(zeros), "--out", str(tmp_path / "out"), *more]


NO_ROWS = ["--data.splits.fit", "all[5000:]", "--data.base_trained_on", '["all[5000:]"]']
EVERY_SCRIPT = {
    "missing config": (["--config", "nowhere.toml"], "nowhere.toml"),
    "unknown key": (["--fit.epoch", "1"], "unknown key fit.epoch; did you mean fit.epochs?"),
    "wrong type": (["--fit.epochs", "many"], "fit.epochs"),
    "missing value": (["--fit.epochs"], "expected a value behind --fit.epochs"),
    "unknown network": (["--base.network", "resnet21"], "resnet21"),
    "unknown split": (["--data.splits.fit", "train", "--data.base_trained_on", '["train"]'], "split"),
    "no such rows": ([*SPLITS, *NO_ROWS], "all has 1797 rows"),
    "rows and percentages": (["--data.splits.test", "all[10%:]"], "all[10%:]"),
    "data folder": (["--data.name", "cifar10", "--data.dir", "nowhere"], "data.dir"),
    "normalization": (["--base.normalization.std", "[0]"], "normalization"),
}
OVERLAP = "expected disjoint splits"
ONE_SCRIPT = [
    (caches.main, ["--data.splits.select", "all[800:1197]"], OVERLAP, "fit=", "select=all[800:1197]"),
    (caches.main, ["--data.splits.certify", "all[1196:1497]"], OVERLAP, "select=", "certify=all[1196:1497]"),
    (caches.main, ["--data.splits.test", "all"], OVERLAP, "fit=", "test=all"),
    (run.main, ["--data.splits.select", "all[800:1197]"], OVERLAP, "fit=", "select=all[800:1197]"),
    (base.main, ["--data.splits.test", "all[896:]"], OVERLAP, "test=all[896:]", "base_trained_on 0="),
    (base.main, ["--data.base_trained_on", "[]"], "base_trained_on"),
    (base.main, ["--base.training.batch", "5000"], "5000"),
    (base.main, ["--seed", "-1"], "seed"),
    (base.main, ["--base.normalization.mean", "[0.1, 0.2]", "--base.normalization.std", "[1, 1]"], "normalization"),
    (base.main, ["--base.input_shape", "[16, 16, 1]"], "the network takes (16, 16, 1)"),
    (caches.main, ["--config", "unnamed.toml"], "base.weights: expected a .safetensors file"),
    (freeze.main, ["--config", "nowhere.toml"], "nowhere.toml"),
    (freeze.main, ["--fit.heads", "[]"], "unknown key fit.heads"),  # a key of another script
    (freeze.main, ["--plan.epsilon", "0.1"], "unknown flag --plan.epsilon"),
    (freeze.main, ["--freeze.neighbours", "3"], "unknown key freeze.neighbours"),
    (freeze.main, ["--freeze.kinds", "[]"], "error: config: freeze.kinds: expected knn, kmeans or both, got []"),
    (freeze.main, ["--freeze.kinds", '["knn", "knn"]'], "error: config: freeze.kinds: expected knn, kmeans"),
    (freeze.main, ["--freeze.kinds", '["tree"]'], "freeze.kinds.0"),
    (freeze.main, ["--freeze.cells", "0"], "freeze.cells"),
    (freeze.main, ["--data.splits.serve", "all[1200:]"], OVERLAP),
    (freeze.main, ["--data.splits.serve", "all[5000:]"], "all has 1797 rows"),
    (freeze.main, [], "base.weights: expected a .safetensors file"),
]
EVERY = [(main, *case) for main in (base.main, caches.main, run.main) for case in EVERY_SCRIPT.values()]


@pytest.mark.parametrize("case", [*EVERY, *ONE_SCRIPT])
def test_a_bad_config_is_one_line(capsys, monkeypatch, tmp_path, zeros, case):
    main, arguments, *messages = case
    monkeypatch.chdir(tmp_path)
    Path("freeze.toml").write_text(FREEZE)
    lines = Path(DIGITS[1]).read_text().splitlines()
    Path("unnamed.toml").write_text("\n".join(line for line in lines if not line.startswith("weights")))
    if "--config" not in arguments:
        weights = ["--base.weights", str(zeros)] if arguments or main is not freeze.main else []
        arguments = [*(["--config", "freeze.toml"] if main is freeze.main else DIGITS), *weights, *arguments]
    said = refuse(capsys, main, *arguments, "--out", "out")
    assert all(message in said for message in messages)
    assert main is not freeze.main or "base_trained_on" not in said  # nobody wants to read the whole config
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _path, _zeros: None, "no such file"),
        (lambda path, _: path.write_bytes(b"\0" * 40), "not a readable safetensors file"),
        (lambda path, zeros: path.write_bytes(zeros.read_bytes()[:-100]), "not a readable safetensors file"),
        (lambda path, _: base.save_file({"a.weight": np.zeros(3, np.float32)}, path), "1 unexpected: a.weight"),
    ],
    ids=["missing", "garbage", "truncated", "another network's"],
)
def test_bad_weights_are_one_line(capsys, tmp_path, zeros, make, message):
    make(tmp_path / "w.safetensors", zeros)
    assert message in refuse(capsys, caches.main, *digits(tmp_path, tmp_path / "w.safetensors"))


def test_a_base_that_knows_one_answer_is_refused_before_anything_is_fitted(capsys, tmp_path, zeros):
    said = refuse(capsys, caches.main, *digits(tmp_path, zeros, "--ledger", str(tmp_path / "looks")))
    assert "one answer for 100.0% of select's images: check base.weights, base.normalization (Normal" in said
    assert "or give --base.accept-low-accuracy true" in said
    assert not (tmp_path / "out").exists()


def test_policies_are_not_compared_without_labels(capsys, monkeypatch, tmp_path, zeros):
    load = data.load
    monkeypatch.setattr(data, "load", lambda *a, **k: dataclasses.replace(load(*a, **k), labels=None))
    assert "expected labels" in refuse(capsys, run.main, *digits(tmp_path, zeros))
    assert not (tmp_path / "out").exists()


def other_data(monkeypatch: pytest.MonkeyPatch, change: Callable[[data.Dataset], data.Dataset], of: str = "") -> None:
    """Change what is loaded, or only that of one part."""
    load = data.load
    changed = lambda name, rows, folder: change(load(name, rows, folder)) if of in {"", rows} else load(name, rows)  # noqa: E731
    monkeypatch.setattr(data, "load", changed)


def is_too_late(*_: object, **__: object) -> None:
    raise AssertionError


CERTIFY = "all[1197:1497]"
FITTED_ON = data.load("digits", "all[:300]")
SMALL = '[{name = "s", weights = "none.safetensors", network = "resnet20", trained_on = []}]'
UNFIT_DATA: dict[str, tuple[Callable[[data.Dataset], data.Dataset], str, str]] = {
    "few names": (lambda d: dataclasses.replace(d, class_names=tuple("12345678")), "", "10 classes, got 8 class names"),
    "many classes": (lambda d: dataclasses.replace(d, class_names=(), labels=np.arange(len(d), dtype=np.int32) % 12),
                     "", "10 classes, got label 11"),
    "channels first": (lambda d: dataclasses.replace(d, images=np.moveaxis(np.asarray(d.images), 3, 1)), CERTIFY,
                       "data.splits.certify: the network takes (8, 8, 1), got images (1, 8, 8)"),
    "rows of fit": (lambda _: FITTED_ON, CERTIFY, "expected certify and fit disjoint, got 300 rows of certify in fit"),
    "duplicates": (lambda d: dataclasses.replace(d, images=d.images[[0] * 300]), CERTIFY,
                   "expected distinct rows, got 299"),
}  # fmt: skip
UNFIT_OPTIONS = {
    "batch": (["--fit.batch", "898"], "fit.batch: expected at most the 897 rows of data.splits.fit, got 898"),
    "folds": (["--data.splits.select", "all[897:898]"], "select: expected at least one distinct row for each of"),
    "base": (["--base.input_shape", "[16, 16, 1]"], "the network takes (16, 16, 1), got images (8, 8, 1)"),
    "networks": (["--fit.networks", SMALL], "no such file"),
}


@pytest.fixture
def nothing_runs(monkeypatch) -> None:
    for name in ("fit", "replay", "measure_costs", "certify", "certify_together"):
        monkeypatch.setattr(gati_jax, name, is_too_late)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("main", [caches.main, run.main])
@pytest.mark.parametrize("case", [*UNFIT_DATA, *UNFIT_OPTIONS])
def test_what_cannot_be_certified_is_refused_before_anything_runs(capsys, monkeypatch, tmp_path, zeros, main, case):
    options, message = UNFIT_OPTIONS.get(case, ([], ""))
    if case in UNFIT_DATA:
        change, of, message = UNFIT_DATA[case]
        other_data(monkeypatch, change, of)
    assert message in refuse(capsys, main, *digits(tmp_path, zeros, *options))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_runs")
def test_a_bundle_that_could_not_be_saved_is_not_fitted(capsys, tmp_path, zeros):
    (tmp_path / "out" / "bundle").mkdir(parents=True)
    (tmp_path / "out" / "bundle" / "thesis.txt").write_text("years of work")
    assert "path: expected a bundle or nothing at" in refuse(capsys, caches.main, *digits(tmp_path, zeros))


def test_near_copies_are_warned_of(monkeypatch, caplog, tmp_path, zeros):
    """Of 300 certify rows, 20 are mirrored select rows, one level brighter, and 5 mirror others: no bytes are equal."""
    copies = np.minimum(data.load("digits", "all[900:920]").images[:, :, ::-1] + 1, 16)

    def copied(d):
        return dataclasses.replace(d, images=np.concatenate([copies, d.images[20:-5], d.images[20:25, :, ::-1]]))

    other_data(monkeypatch, copied, CERTIFY)
    monkeypatch.setattr(caches, "explore", is_too_late)
    with caplog.at_level(logging.WARNING, logger="train"), pytest.raises(AssertionError):
        caches.main(digits(tmp_path, zeros, "--base.accept_low_accuracy", "true"))
    said, itself = (record.getMessage() for record in caplog.records if "near copies" in record.getMessage())
    assert said.startswith("20 of 300 rows of certify are near copies of rows of select")
    assert itself.startswith("10 of 300 rows of certify are near copies of rows of certify")


# --- Bundles --------------------------------------------------------------------------------------------------------


def other_provenance(**changes: object) -> Callable[[Path], None]:
    def edit(bundle: Path) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["provenance"] |= changes
        (bundle / "manifest.json").write_text(json.dumps(manifest))

    return edit


def cut_an_array(bundle: Path) -> str:
    files = [file for file in (bundle / "arrays").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    return largest.name


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "manifest.json"),
        (lambda bundle: (bundle / "manifest.json").write_text("{"), "manifest.json"),
        (cut_an_array, ""),
        (other_provenance(config={}), "does not say what it was fitted on"),
        (other_provenance(data_fingerprints={"certify": "0" * 32}), "expected the rows of certify that the bundle was"),
    ],
    ids=["missing", "no JSON", "a byte short", "of unknown data", "of other rows"],
)
def test_bad_bundles_are_one_line(capsys, run, tmp_path, damage, message):
    bundle = shutil.copytree(run.folder / "caches" / "bundle", tmp_path / "bundle")
    damaged = damage(bundle)
    arguments = ["--bundle", str(bundle), "--out", str(tmp_path / "out"), "--split", "certify", "--timed", "1"]
    assert (message or damaged) in refuse(capsys, evaluate.main, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_no_request_to_time_is_refused(capsys, run, tmp_path, count):
    arguments = (*evaluate_arguments(run.folder, tmp_path / "out"), f"--timed={count}")
    assert f"--timed: expected 1 or more, got {count}" in refuse(capsys, evaluate.main, *arguments)


@pytest.mark.parametrize("flag", ["--out", "--ledger"])
def test_what_a_script_writes_is_not_put_into_a_bundle(capsys, run, tmp_path, flag):
    """Its files are listed in it with their digests; its copy of looks is no ledger."""
    bundle = run.folder / "caches" / "bundle"
    inside = str(bundle / ("eval" if flag == "--out" else "looks.json"))
    said = refuse(capsys, evaluate.main, *evaluate_arguments(run.folder, tmp_path / "out"), flag, inside)
    assert f"{flag}: expected a folder outside the bundle {bundle}, which would not load any more" in said


def test_an_out_that_is_a_file_is_refused(capsys, run, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "out" in refuse(capsys, evaluate.main, *evaluate_arguments(run.folder, tmp_path / "out"), "--timed", "1")
    assert (tmp_path / "out").read_text() == "mine"


# --- Results and their page -----------------------------------------------------------------------------------------


def without(result: dict[str, Any], section: str, key: str) -> str:
    del result[section][key]
    return json.dumps(result)


RESULT_ERRORS = {
    "empty": ("reproduction", "", "Invalid JSON"),
    "cut off": ("freeze", json.dumps(freeze_result())[:-9], "Invalid JSON"),
    "no UTF-8": ("freeze", b"\xff\xfe", "Invalid JSON"),
    "an empty object": ("freeze", "{}", "Field required; and"),
    "a list": ("reproduction", "[]", "expected an object"),
    "a number": ("reproduction", json.dumps(reproduction_result()).replace("0.925", "NaN"), "base.accuracy"),
    "half": ("reproduction", without(reproduction_result(), "measured", "certified"), "measured.certified: Field"),
    "no policies": ("reproduction", json.dumps(reproduction_result() | {"certified": {"rows": []}}), "certified.rows"),
    "one protocol": ("freeze", without(freeze_result(), "protocols", "clean"), "protocols.clean: Field required"),
    "the other's": ("freeze", json.dumps(reproduction_result()), "protocols: Field required"),
}


@pytest.mark.parametrize("case", RESULT_ERRORS)
def test_bad_results_are_one_line(capsys, tmp_path, case):
    name, text, message = RESULT_ERRORS[case]
    file = tmp_path / "given.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refuse(capsys, page.main, f"--{name}", str(file), "--out", str(tmp_path / "page.md"))
    assert said.startswith(f"error: {name}: expected a whole {name}.json, got {file}: ")
    assert message in said
    assert not (tmp_path / "page.md").exists()


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
