"""The scripts on a folder of JPEGs, by the example in the docs, and on a function's images."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gati_jax
from gati_jax import Chain, data
from gati_jax.errors import InputError
from tests.train.one_pass import DIGITS, FIT, ROOT, caches_arguments, json_of, looks_in, small_and_repeatable
from train import base, caches, cli, evaluate
from train.config import Config, build, load
from train.source import Data, Source

Image = pytest.importorskip("PIL.Image", reason="needs the extra train")
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)


def example() -> str:
    """The config of the docs, for digits of 8x8 pixels in place of photos."""
    page = (ROOT / "docs" / "how-to" / "own-data.md").read_text(encoding="utf-8")
    (text,) = (block for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "resnet50" in block)
    assert len([line for line in text.splitlines() if line]) <= 15
    changes = {
        "resize = 256": "resize = 8",
        "crop = 224": "crop = 8\nchannels = 1",
        "classes = 1000\n": "",
        "[224, 224, 3]": "[8, 8, 1]",
        "[0.485, 0.456, 0.406]": "[0.305]",
        "[0.229, 0.224, 0.225]": "[0.376]",
    }
    for theirs, ours in changes.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    return text


def test_a_folder_of_jpegs_goes_from_the_docs_config_to_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = data.load("digits", "all")
    assert digits.labels is not None
    for i, (image, label) in enumerate(zip(np.asarray(digits.images), digits.labels, strict=True)):
        path = Path("photos", f"digit {label}", f"{i}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0] * 15).resize((24, 16), Image.Resampling.NEAREST).save(path, quality=95)
    Path("photos.toml").write_text(example())
    given = ["--config", "photos.toml", "--data.memory_mb", "0"]
    trained = ["--data.base_trained_on", '["all[:60%]"]', "--base.training.epochs", "6", "--base.training.batch", "64"]
    with small_and_repeatable():
        fitted = json_of(base.main, *given, *trained, "--out", "base")
        assert fitted["accuracy"] > 0.6
        weights = ["--base.weights", "base/base.safetensors", "--plan.backend", "xla"]
        fitted = json_of(caches.main, *given, *weights, *FIT, *looks_in(tmp_path), "--out", "caches")
        found = json_of(
            evaluate.main, "--bundle", "caches/bundle", "--out", "eval", "--timed", "5", *looks_in(tmp_path)
        )
    assert (fitted["certificate"]["n"], found["n"]) == (269, 180)  # 15 and 10 % of 1797
    assert found["certificate"]["holds"]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own in the current folder, which says when it is imported."""
    np.save(tmp_path / "pixels.npy", PIXELS)
    text = (
        "import numpy as np, pathlib\npathlib.Path('imported').touch()\ndef images():\n    return np.load('pixels.npy')"
    )
    (tmp_path / "mine_for_tests.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    yield "mine_for_tests:images"
    sys.modules.pop("mine_for_tests", None)


def config_of(name: str) -> dict[str, Any]:
    return json.loads(load(Config, Path(DIGITS[1]), ["--data.name", name]).model_dump_json())


def test_a_function_is_named_by_the_users_config_and_never_by_a_bundle(mine):
    config = build(Config, config_of(mine))
    with pytest.raises(
        InputError, match=r"data\.name: expected the name of data, got mine_for_tests:images, which names"
    ):
        config.data.load("all[:5]")
    bundle: Any = SimpleNamespace(provenance=SimpleNamespace(config=config_of(mine)))
    for other in (None, "mine_for_tests:other", "digits"):
        with pytest.raises(
            InputError, match=r"--data-name: expected mine_for_tests:images, .* a bundle cannot ask to run"
        ):
            evaluate.fitted_on(bundle, Path("runs/bundle"), other)
    assert not Path("imported").exists()
    assert evaluate.fitted_on(bundle, Path("runs/bundle"), mine) == config
    loaded = config.data.load("all[:5]", own=True)
    assert Path("imported").exists()
    assert data.row_digests(np.asarray(loaded.images)).tolist() == [
        data.row_digests(PIXELS)[i] for i in np.random.default_rng(0).permutation(40)[:5]
    ]


@pytest.mark.parametrize("name", ["../x", "a b", "mine:", ":images", "mine:a:b", "mine/x:images", "a.b"])
def test_other_names_are_refused_by_the_config(name):
    with pytest.raises(InputError, match=r"data\.name: expected digits, folder, npz, .* or package\.module:function"):
        config_of(name)


def test_the_help_names_every_option_of_reading():
    shown = cli.help_of(Config)
    for key in (*data.Reading.model_fields, "name", "dir"):
        assert f"--data.{key} " in shown
    assert issubclass(Data, data.Reading)


def test_splits_of_a_config_share_no_group(tmp_path):
    chain = Chain((lambda params, x: x * params,), lambda params, x: x[..., 0, 0] * params, (1.0, 1.0), (8, 8, 1))
    np.savez(tmp_path / "x.npz", images=PIXELS.astype(np.float32), groups=np.arange(40) // 4)
    source = {"name": "npz", "dir": tmp_path / "x.npz", "base_trained_on": []}
    splits = {"fit": "all[:50%]", "certify": "all[50%:]"}
    parts = caches.load_parts(Source.model_validate(source), splits, chain)
    assert sorted(len(np.unique(np.asarray(part.groups))) for part in parts.values()) == [5, 5]
    np.savez(tmp_path / "x.npz", images=PIXELS.astype(np.float32), groups=np.arange(40) % 4)
    with pytest.raises(
        InputError, match=r"groups: expected every group in one split, got 0 in fit and certify \(4 such"
    ):
        caches.load_parts(Source.model_validate(source | {"shuffle_seed": "none"}), splits, chain)


@pytest.mark.slow
def test_rows_in_groups_are_certified_by_group_from_the_command_line(run, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    digits = data.load("digits", "all")
    patients = np.arange(len(digits)) // 3
    assert digits.labels is not None
    np.savez("digits.npz", images=np.asarray(digits.images), labels=digits.labels, groups=patients)
    parts = ["all[:50%]", "all[50%:65%]", "all[65%:90%]", "all[90%:]"]
    splits = dict(zip(("fit", "select", "certify", "test"), parts, strict=True))
    given = ["--data.name", "npz", "--data.dir", "digits.npz", "--data.base_trained_on", "[]"]
    given += [item for name, rows in splits.items() for item in (f"--data.splits.{name}", rows)]
    weights = ["--base.weights", str(run.folder / "base" / "base.safetensors"), "--plan.backend", "xla"]
    base_arguments = [*DIGITS, *given, *weights, *FIT, *looks_in(tmp_path)]
    with small_and_repeatable():
        fitted = json_of(
            caches.main, *base_arguments, "--plan.also", "[0.3]", "--plan.group_tolerance", "0.4", "--out", "caches"
        )
        certificate = fitted["certificate"]
        assert "groups" in certificate["method"]
        assert certificate["n"] % 3 == 0  # whole patients
        saved = gati_jax.load_bundle("caches/bundle")
        for one in (saved.certificate, *(other for _, other in saved.also)):
            assert one.groups is not None
            assert one.groups.n == one.n // 3
            assert one.groups.tolerance == 0.4
        found = json_of(
            evaluate.main, "--bundle", "caches/bundle", "--out", "eval", "--timed", "5", *looks_in(tmp_path)
        )
        assert found["n"] % 3 == 0
        assert "what is shown counts rows one by one" in caplog.text
        with pytest.raises(InputError, match=r"plan\.group_tolerance: expected data with groups"):
            caches.main(
                [*caches_arguments(run.folder), "--plan.group_tolerance", "0.4", *looks_in(tmp_path), "--out", "none"]
            )
        np.savez("digits.npz", images=np.asarray(digits.images), labels=digits.labels, groups=patients % 9)
        with pytest.raises(InputError, match=r"groups: expected every group in one split, got .* in fit and select"):
            caches.main([*base_arguments, "--data.shuffle_seed", "none", "--out", "mixed"])
