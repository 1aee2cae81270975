"""Exported StableHLO programs answer as the library does, with JAX and NumPy alone, whatever the base is made of."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import gati_jax
from gati_jax import Bundle
from tests.bundle.made import make
from tests.export.made import CASES, assert_same, with_two_plans
from train.export import __main__ as script
from train.export import stablehlo
from train.export import stablehlo_cascade as runner
from train.export.folder import export_bundle

FEW = (1, 8)


@pytest.fixture(autouse=True)
def _two_sizes(monkeypatch):
    monkeypatch.setattr(stablehlo, "BUCKETS", FEW)


def export(bundle: Bundle, folder: Path, **given: Any) -> dict[str, Any]:
    return export_bundle(stablehlo.StableHloForm(bundle), folder, **given)


@pytest.mark.parametrize("case", ["bottleneck, 7x7 stem, floats", "VGG, stored points", "no cache"])
def test_programs_answer_as_the_library_does(case, tmp_path):
    bundle, images = CASES[case]()
    export(bundle, tmp_path / "export")
    expected, thresholds = gati_jax.infer_batch(bundle, images), np.asarray(bundle.cascade.thresholds)
    cascade = runner.Cascade(tmp_path / "export")
    for n in (len(images), 11, 8, 3, 1):  # more than a program takes, padded, exact
        assert_same(cascade.predict(images[:n]), jax.tree.map(lambda v, n=n: v[:n], expected), thresholds)
    assert cascade.predict(images[:0]).logits.shape == (0, bundle.chain.classes)
    found = cascade.predict(images[:2])
    assert [(v.dtype, v.shape) for v in found[:3]] == [("int32", (2,)), ("int32", (2,)), ("float32", (2,))]
    bad_ones: list[Any] = [images[0], images[:, :-1], images.astype(np.float16), [["a"]]]
    for bad in bad_ones:
        with pytest.raises(ValueError, match=r"images: expected finite .*\[batch, .*\], got .*\["):
            cascade.predict(bad)


def test_plans_share_arrays_and_what_differs_is_in_their_promises(tmp_path, monkeypatch):
    bundle, images = with_two_plans()
    real = runner.Cascade.predict

    def predict(self: Any, rows: np.ndarray) -> Any:
        found = real(self, rows)
        return found._replace(exit=found.exit + (rows == images[5]).all((1, 2, 3)))

    with monkeypatch.context() as context:
        context.setattr(runner.Cascade, "predict", predict)
        manifest = export(bundle, tmp_path / "export", images=images)
    held = (tmp_path / "export" / "arrays.bin").stat().st_size
    opened = {cache.name: cache for cascade in bundle.cascades.values() for cache in cascade.caches}
    assert held == bundle.chain.bytes + sum(cache.bytes for cache in opened.values())  # each once, and no more
    for plan in ("default", "other"):
        expected, thresholds = gati_jax.infer_batch(bundle, images, plan=plan), bundle.cascade_of(plan).thresholds
        cascade = runner.Cascade(tmp_path / "export", plan)
        assert_same(cascade.predict(images), expected, np.asarray(thresholds))
        bound = manifest["plans"][plan]["bound"]
        assert (bound["numerics"], bound["check"]["differ"], bound["check"]["n"]) == ("stablehlo", 1, len(images))
        assert cascade.promise == manifest["plans"][plan]["promise"]
        assert f"jax {jax.__version__} on" in cascade.promise
    with pytest.raises(ValueError, match="plan: expected one of default, other, got 'none'"):
        runner.Cascade(tmp_path / "export", "none")


ALONE = """
import runpy, sys
sys.modules.update(dict.fromkeys(("flax", "gati_jax", "train", "onnx", "onnxruntime")))  # importing them fails
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_a_users_own_chain_runs_on_jax_alone(tmp_path):
    chain, caches, plan, certificate = make(1)
    gati_jax.save_bundle(tmp_path / "bundle", chain, caches, plan, certificate)
    bundle = gati_jax.load_bundle(tmp_path / "bundle", chain=chain)
    export(bundle, tmp_path / "out")
    images = np.random.default_rng(0).normal(size=(9, *chain.input_spec.shape)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path / "out" / "cascade.py"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    expected = gati_jax.infer_batch(bundle, images)
    printed = [line.split(" score")[0] for line in done.stdout.splitlines()]
    names = bundle.class_names or range(chain.classes)
    pairs = zip(np.asarray(expected.class_index), np.asarray(expected.exit), strict=True)
    assert printed == [f"{names[index]} exit {site}" for index, site in pairs]
    bad = subprocess.run([*command[:-1], "none.npy"], check=False, capture_output=True, text=True, timeout=120)
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: ")
    assert "Traceback" not in bad.stderr


def test_another_jax_or_platform_is_said(tmp_path):
    export(CASES["no cache"]()[0], tmp_path / "export")
    file = tmp_path / "export" / "manifest.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {"jax": "0.1"}))
    with pytest.warns(UserWarning, match=r"written by jax 0\.1, not by this one: stablehlo arithmetic"):
        runner.Cascade(tmp_path / "export")
    file.write_text(json.dumps(written | {"platform": "tpu"}))
    with pytest.raises(ValueError, match="folder: expected programs for cpu, got some for tpu"):
        runner.Cascade(tmp_path / "export")


def test_the_command_replaces_an_export_and_nothing_else(tmp_path, capsys):
    bundle, _ = CASES["no cache"]()
    gati_jax.save_bundle(tmp_path / "bundle", bundle.chain, bundle.caches, bundle.plan, bundle.certificate)
    given = ["--bundle", str(tmp_path / "bundle"), "--format", "stablehlo", "--out"]
    for _ in range(2):
        script.main([*given, str(tmp_path / "out"), "--json"])
        assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "manifest.json").read_text())
    script.main([*given, str(tmp_path / "out")])
    assert "default_8.stablehlo" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cascade.py").write_text("my own")
    with pytest.raises(gati_jax.InputError, match=r"out: expected an export or nothing .*, which is left alone"):
        script.main([*given, str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "cascade.py").read_text() == "my own"
