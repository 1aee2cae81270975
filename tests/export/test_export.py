"""Exported cascades answer as the library does: spans by their runner, the single file, every kind of module."""

import dataclasses
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from scipy.stats import binom

import gati_jax
from gati_jax import Bundle
from gati_jax.caches import Grid, SortedSelector
from gati_jax.data import row_digests
from tests.bundle.made import make
from tests.export.made import CASES, CLASSES, OF_SMALL, VGGS, N, assert_same, made, planned, with_two_plans

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
from gati_jax.export.sessions import open_session  # noqa: E402
from train.export import __main__ as script  # noqa: E402
from train.export import cascade as runner  # noqa: E402
from train.export import models  # noqa: E402
from train.export.folder import export_bundle  # noqa: E402


def export_onnx(bundle: Bundle, folder: Path, **given: Any) -> dict[str, Any]:
    return export_bundle(models.OnnxForm(bundle), folder, **given)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[Bundle, np.ndarray, Path]:
    bundle, images = CASES[request.param]()
    folder = tmp_path_factory.mktemp("case") / "export"
    export_onnx(bundle, folder)
    return bundle, images, folder


def test_spans_and_file_answer_as_the_library_does(case):
    bundle, images, folder = case
    expected, thresholds = gati_jax.infer_batch(bundle, images), np.asarray(bundle.cascade.thresholds)
    assert set(np.asarray(expected.exit)) == {*bundle.cascade.sites, len(bundle.chain)}  # every exit is taken
    cascade = runner.Cascade(folder)
    assert_same(cascade.predict(images), expected, thresholds)
    for size in (1, 7):
        assert_same(cascade.predict(images[:size]), jax.tree.map(lambda v, n=size: v[:n], expected), thresholds)
    assert_same(models.answer_one_by_one(folder / "cascade.onnx", images, thresholds), expected, thresholds)
    session = open_session(onnx.load(folder / "cascade.onnx"))
    index, site, score, logits = session.run(None, {"images": images[3:4]})  # by the default thresholds
    assert_same((index, site, score, logits), jax.tree.map(lambda v: v[3:4], expected), thresholds)
    assert [(v.dtype, v.shape) for v in (index, site, score)] == [("int32", (1,)), ("int32", (1,)), ("float32", (1,))]
    assert cascade.predict(images[:0]).logits.shape == (0, CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_ten_thousand_rows_are_answered_alike(case, engine, monkeypatch):
    """At most one of a thousand differs, and lies at a threshold or is a tie."""
    bundle, few, folder = case
    if engine == "openvino":
        monkeypatch.setattr(runner.onnxruntime, "InferenceSession", OpenVino)
    rng = np.random.default_rng(7)
    shape = (10_000, *few.shape[1:])
    if np.issubdtype(few.dtype, np.integer):  # pixels, or tokens
        images = rng.integers(few.min(), few.max(), shape, few.dtype, endpoint=True)
    else:
        images = rng.normal(size=shape).astype(np.float32)
    found = runner.Cascade(folder).predict(images)
    parts = [gati_jax.infer_batch(bundle, images[i : i + 500]) for i in range(0, len(images), 500)]
    expected = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    assert_same(found, expected, np.asarray(bundle.cascade.thresholds), most=0.001)


class OpenVino:
    """OpenVINO in the place of ONNX Runtime's session, as the runner uses it."""

    def __init__(self, file: str, *_: Any) -> None:
        core = pytest.importorskip("openvino", reason="needs the extra bench").Core()
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        self._model = core.compile_model(core.read_model(file), "CPU", exact)

    def get_inputs(self) -> list[Any]:
        return [types.SimpleNamespace(name=self._model.input(0).any_name)]

    def run(self, names: list[str] | None, given: dict[str, np.ndarray], *_: Any) -> list[np.ndarray]:
        found = self._model(given)
        outputs = [self._model.output(name) for name in names] if names else self._model.outputs
        return [found[output].copy() for output in outputs]


def test_models_are_well_formed_and_hold_every_weight_once(case):
    bundle, _, folder = case
    span_bytes = 0
    for file in folder.glob("*.onnx"):
        model = onnx.load(file)
        onnx.checker.check_model(model, full_check=True)
        batch = model.graph.input[0].type.tensor_type.shape.dim[0]
        assert (batch.dim_param, batch.dim_value) == (("", 1) if file.name == "cascade.onnx" else ("batch", 0))
        span_bytes += 0 if file.name == "cascade.onnx" else file.stat().st_size
    held = bundle.chain.bytes + sum(cache.bytes for cache in bundle.caches)
    assert span_bytes < 1.1 * held + 20_000 * len(bundle.chain)


def test_rows_at_a_threshold_are_the_only_ones_that_may_differ(tmp_path):
    bundle, images = CASES["basic, shortcut A"]()
    scores = gati_jax.replay(bundle.chain, bundle.caches, images).scores
    bundle = planned(bundle.chain, bundle.caches, scores[:, 0])
    export_onnx(bundle, tmp_path / "export")
    found = runner.Cascade(tmp_path / "export").predict(images)
    assert_same(found, gati_jax.infer_batch(bundle, images), np.asarray(bundle.cascade.thresholds))


@pytest.fixture(scope="module")
def two_plans(tmp_path_factory) -> tuple[Bundle, np.ndarray, Path]:
    bundle, images = with_two_plans()
    folder = tmp_path_factory.mktemp("plans") / "export"
    export_onnx(bundle, folder)
    return bundle, images, folder


@pytest.mark.parametrize("plan", ["default", "other"])
def test_one_folder_serves_every_plan(two_plans, plan):
    bundle, images, folder = two_plans
    expected, thresholds = gati_jax.infer_batch(bundle, images, plan=plan), bundle.cascade_of(plan).thresholds
    assert len(set(np.asarray(expected.exit))) == len(thresholds) + 1
    assert_same(runner.Cascade(folder, plan).predict(images), expected, np.asarray(thresholds))
    of_plan = json.loads((folder / "manifest.json").read_text())["plans"][plan]["thresholds"]
    given = np.array([np.inf if t is None else t for t in of_plan], np.float32)
    assert len(given) == 3
    assert_same(models.answer_one_by_one(folder / "cascade.onnx", images, given), expected, np.asarray(thresholds))


ALONE = """
import runpy, sys
sys.modules.update(dict.fromkeys(("jax", "flax", "gati_jax", "train", "onnx")))  # importing them fails
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_the_runner_needs_neither_jax_nor_this_library(two_plans, tmp_path):
    bundle, images, folder = two_plans
    np.save(tmp_path / "images.npy", images[:9])
    command = [sys.executable, "-I", "-c", ALONE, str(folder / "cascade.py"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    expected = gati_jax.infer_batch(bundle, images[:9])
    printed = [line.split(" score")[0] for line in done.stdout.splitlines()]
    pairs = zip(np.asarray(expected.class_index), np.asarray(expected.exit), strict=True)
    assert printed == [f"{index} exit {site}" for index, site in pairs]


# --- What is promised -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[Bundle, np.ndarray]:
    return made(VGGS, [(1, Grid(CLASSES, 2, 6), SortedSelector(4, 3))])


def metadata(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(next(p.value for p in onnx.load(file).metadata_props if p.key == "gati_jax.promises"))
        for file in folder.glob("*.onnx")
    ]


def test_without_certify_rows_nothing_is_certified(small, tmp_path):
    bundle, _ = small
    manifest = export_onnx(bundle, tmp_path / "a", why="they are lost")
    assert manifest["plans"]["default"]["bound"]["epsilon"] is None
    assert manifest["plans"]["default"]["promise"] == "onnx arithmetic, of which nothing is certified: they are lost"
    nothing = dataclasses.replace(bundle, certificate=dataclasses.replace(bundle.certificate, step=-1))
    manifest = export_onnx(nothing, tmp_path / "a", images=small[1])  # in place of the first
    assert manifest["plans"]["default"]["promise"].endswith("nothing is certified: no plan is certified")
    assert metadata(tmp_path / "a") == [{"default": manifest["plans"]["default"]["promise"]}] * 2


@pytest.mark.parametrize("way", ["spans", "alone", "one file"])
def test_rows_that_any_form_answers_otherwise_are_in_the_promise(small, tmp_path, monkeypatch, way):
    bundle, images = small
    wrong = set(row_digests(images[:3]).tolist())
    real, one_by_one = runner.Cascade.predict, models.answer_one_by_one

    def changed(answers: Any, rows: np.ndarray) -> Any:
        found = np.isin(row_digests(rows), list(wrong))
        return answers._replace(class_index=answers.class_index + found)

    def predict(self: Any, rows: np.ndarray) -> Any:
        answers = real(self, rows)
        return changed(answers, rows) if way == ("alone" if len(rows) == 1 else "spans") else answers

    def one_file(file: Path, rows: np.ndarray, thresholds: np.ndarray) -> Any:
        answers = one_by_one(file, rows, thresholds)
        return changed(answers, rows) if way == "one file" else answers

    monkeypatch.setattr(runner.Cascade, "predict", predict)
    monkeypatch.setattr(models, "answer_one_by_one", one_file)
    manifest = export_onnx(bundle, tmp_path / "export", images=images)
    bound = manifest["plans"]["default"]["bound"]
    assert (bound["check"]["differ"], bound["check"]["n"], bound["numerics"]) == (3, N, "onnx")
    upper = bound["epsilon"] - bundle.certificate.epsilon
    assert binom.cdf(3, N, upper) == pytest.approx(0.01 * 6 / np.pi**2)  # one step, the first export
    assert bound["delta"] == pytest.approx(bundle.certificate.delta + 0.01)
    for part in (f"3 of {N} rows", f"onnxruntime {ort.__version__} on a CPU"):
        assert part in manifest["plans"]["default"]["promise"]
    assert metadata(tmp_path / "export") == [{"default": manifest["plans"]["default"]["promise"]}] * 3
    assert json.loads((tmp_path / "export" / "manifest.json").read_text()) == manifest


def test_each_other_export_that_is_compared_has_a_smaller_part_of_delta(small, tmp_path):
    bundle, images = small
    other = dataclasses.replace(bundle, chain=dataclasses.replace(bundle.chain, normalization=OF_SMALL))
    given: Any = {"images": images, "counts": tmp_path / "tuning" / "exports" / "onnx.json"}
    manifests = [export_onnx(b, tmp_path / "export", **given) for b in (bundle, bundle, other)]
    checks = [manifest["plans"]["default"]["bound"]["check"] for manifest in manifests]
    assert [check["number"] for check in checks] == [1, 1, 2]
    assert all(check["differ"] == 0 for check in checks)
    with pytest.raises(gati_jax.InputError, match=r"images: expected .* copies|images.*fit"):
        export_onnx(bundle, tmp_path / "export", images=np.tile(images[:4], (20, 1, 1, 1)))
    assert json.loads((tmp_path / "export" / "manifest.json").read_text()) == manifests[-1]  # the last stays


def test_another_onnxruntime_is_said_to_be_another(small, tmp_path):
    export_onnx(small[0], tmp_path / "export", images=small[1])
    file = tmp_path / "export" / "manifest.json"
    file.write_text(file.read_text().replace(f'"onnxruntime": "{ort.__version__}"', '"onnxruntime": "1.0"'))
    with pytest.warns(UserWarning, match=r"checked with onnxruntime 1\.0, not with this one: onnx arithmetic"):
        runner.Cascade(tmp_path / "export")


# --- What is refused --------------------------------------------------------------------------------------------------


def test_odd_requests_are_refused_in_a_line(small, tmp_path):
    bundle, images = small
    export_onnx(bundle, tmp_path / "export")
    cascade = runner.Cascade(tmp_path / "export")
    bad_ones: list[Any] = [images[0], images[:, :-1], images.astype(np.float32), [["a"]]]
    for bad in bad_ones:
        with pytest.raises(ValueError, match=r"images: expected finite uint8\[batch, 11, 9, 3\], got .*\["):
            cascade.predict(bad)
    with pytest.raises(ValueError, match="plan: expected one of default, got 'none'"):
        runner.Cascade(tmp_path / "export", "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["none.npy"], "error: .*none.npy"), (["images.npy", "other"], "error: plan: expected"), ([], "Run an exported")],
)
def test_the_runner_ends_with_a_line(small, tmp_path, arguments, message):
    export_onnx(small[0], tmp_path / "export")
    np.save(tmp_path / "images.npy", small[1])
    command = [sys.executable, str(tmp_path / "export" / "cascade.py"), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 1
    assert re.match(message, done.stderr)
    assert "Traceback" not in done.stderr


def test_what_cannot_be_exported_is_named(small, tmp_path, monkeypatch, capsys):
    own = make(1)
    gati_jax.save_bundle(tmp_path / "own", *own)
    with pytest.raises(gati_jax.InputError, match="chain"):  # a bundle names no code
        script.main(["--bundle", str(tmp_path / "own"), "--out", str(tmp_path / "out")])
    with pytest.raises(gati_jax.InputError, match="out: expected a folder outside the bundle"):
        script.main(["--bundle", str(tmp_path / "own"), "--out", str(tmp_path / "own" / "onnx")])
    bundle, _ = small
    strange = dataclasses.replace(bundle.caches[0], selector=nn.Dense(1))
    with pytest.raises(gati_jax.InputError, match="the selector of cache 0 cannot be traced"):
        export_onnx(dataclasses.replace(bundle, caches=(strange,)), tmp_path / "out")
    with pytest.raises(gati_jax.InputError, match="images: expected uint8, which the programs take, got float32"):
        export_onnx(bundle, tmp_path / "out", images=small[1].astype(np.float32))
    with pytest.raises(gati_jax.InputError, match=r"out: expected an export or nothing .*, which is left alone"):
        export_onnx(bundle, tmp_path / "own")
    monkeypatch.setattr("gati_jax.export.models.MOST_BYTES", 100)
    with pytest.raises(gati_jax.InputError, match="expected at most 100 bytes of parameters"):
        export_onnx(bundle, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "train.export.models", None)
    with pytest.raises(gati_jax.InputError, match=r"format: onnx needs .*pip install 'gati-jax\[onnx\]'"):
        script.main(["--bundle", str(tmp_path / "own"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


def test_more_caches_than_can_be_nested_are_exported_as_spans(small, tmp_path, monkeypatch):
    """A file of as many caches as are allowed is read by onnx and by onnxruntime."""
    bundle, _ = small
    first, last = models.stages_of(bundle)
    again = first._replace(start=first.site)
    deep = models.single_model(bundle, [first, *[again] * (models.MOST_NESTED - 2), last])
    onnx.checker.check_model(deep, full_check=True)
    open_session(onnx.load_from_string(deep.SerializeToString()))
    monkeypatch.setattr(models, "MOST_NESTED", 1)
    manifest = export_onnx(bundle, tmp_path / "deep")
    assert manifest["one_file"] is None
    assert not (tmp_path / "deep" / "cascade.onnx").exists()


def test_the_command_writes_what_it_prints(small, tmp_path, capsys):
    bundle, _ = small
    gati_jax.save_bundle(tmp_path / "bundle", bundle.chain, bundle.caches, bundle.plan, bundle.certificate)
    script.main(["--bundle", str(tmp_path / "bundle"), "--out", str(tmp_path / "out"), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "does not say what it was fitted on" in printed["plans"]["default"]["promise"]
    script.main(["--bundle", str(tmp_path / "bundle"), "--out", str(tmp_path / "out")])
    assert "default: onnx arithmetic, of which nothing is certified" in capsys.readouterr().out
