"""Plans for ONNX Runtime, from train.caches to train.evaluate; which backend is planned for, by made-up times."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import gati_jax
from gati_jax import CostTable, InputError, data
from gati_jax.evaluation import timing
from gati_jax.evaluation.timing import contenders  # as it is: conftest.py replaces it
from gati_jax.profiling import Tuning, backends, device_name, onnx_tuning, reference_tuning
from tests.train.one_pass import (
    DIGITS,
    TESTED,
    Run,
    caches_arguments,
    evaluate_arguments,
    json_of,
    looks_in,
    small_and_repeatable,
)
from train import caches, evaluate, records, tune
from train.config import Config, load
from train.records import costs_in, measured_tuning

pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")


def made_up(chain: gati_jax.Chain, candidates: Any, *, batch: int = 1, **_: object) -> CostTable:
    """A block takes a millisecond, a lookup a hundredth, on ONNX Runtime."""
    lookup_ms = dict.fromkeys((c.name for c in candidates), 0.01)
    blocks = (1.0,) * len(chain)
    return CostTable(device=device_name("onnxruntime"), batch=batch, blocks_ms=blocks, lookup_ms=lookup_ms)


@pytest.fixture(scope="module")
def steady() -> Iterator[None]:
    with small_and_repeatable(), pytest.MonkeyPatch.context() as patch:
        for module in (records, backends):
            patch.setattr(module, "measure_onnx_costs", made_up)
        yield


def arguments(run: Run, folder: Path) -> list[str]:
    return [*caches_arguments(run.folder), "--plan.backend", "onnxruntime", "--out", str(folder), *looks_in(folder)]


@pytest.fixture(scope="module")
def passed(run, steady, tmp_path_factory) -> tuple[Path, Any]:
    """The fit of the pass on XLA, planned for ONNX Runtime and certified in its arithmetic, too."""
    del steady
    folder = tmp_path_factory.mktemp("onnx") / "caches"
    shutil.copytree(run.folder / "caches" / "checkpoints", folder / "checkpoints")
    return folder, json_of(caches.main, *arguments(run, folder))


def certify_rows() -> np.ndarray:
    return np.asarray(data.load("digits", "all[1197:1497]").images)


def test_the_bundle_answers_on_it_and_promises_what_was_certified(passed):
    folder, result = passed
    bundle = gati_jax.load_bundle(folder / "bundle")  # warnings are errors
    (tuning,) = bundle.tunings
    assert (tuning.backend, [tile.size for tile in tuning.tiles]) == ("onnxruntime", [1, 8, 32, 128])
    assert result["predicted"]["device"] == tuning.device == device_name("onnxruntime")
    certificate, bound = bundle.certificate, bundle.bound_of()
    assert (certificate.certified, certificate.arithmetics) == (True, (tuning.programs,))
    assert (bound.numerics, bound.epsilon, bound.delta, bound.check) == ("fast", 0.2, 0.05, None)
    assert bundle.bound_of(numerics="reference").epsilon == 0.2
    assert {check.n for check in bundle.checks.values()} == {300}
    image = certify_rows()[0]
    by_default, asked = gati_jax.infer(bundle, image), gati_jax.infer(bundle, image, backend="onnxruntime")
    np.testing.assert_array_equal(by_default.logits, asked.logits)


def test_what_was_counted_is_the_union_of_both_arithmetics(passed):
    folder, _ = passed
    bundle, images = gati_jax.load_bundle(folder / "bundle"), certify_rows()
    base = gati_jax.replay(bundle.chain, (), images).answers
    wrong = np.asarray(gati_jax.infer_batch(bundle, images, numerics="reference").class_index) != base
    for size in (1, 8, 256):
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            found = gati_jax.infer_batch(bundle, images[part], backend="onnxruntime").class_index
            wrong[part] |= np.asarray(found) != base[part]
    assert bundle.certificate.disagreements == wrong.sum()


@pytest.mark.usefixtures("steady")
def test_the_same_again_measures_nothing_and_is_no_other_look(run, passed, tmp_path, monkeypatch):
    folder, result = passed
    out = shutil.copytree(folder, tmp_path / "caches")
    kept = json.loads((out / "costs.json").read_text())["tuning"]
    assert (kept["onnxruntime"], kept["tiles"][-1]["costs"]["blocks_ms"]) == (backends.onnx_version(), [1.0] * 3)
    monkeypatch.setattr(records, "measure_onnx_costs", None)
    assert json_of(caches.main, *arguments(run, out))["certificate"] == result["certificate"]


@pytest.mark.usefixtures("steady")
def test_it_can_be_tuned_and_evaluated(passed, tmp_path):
    folder = tmp_path / "caches"
    shutil.copytree(passed[0], folder)
    bundle = gati_jax.load_bundle(folder / "bundle")
    (tuning,) = json_of(tune.main, "--bundle", str(folder / "bundle"), "--backend", "onnxruntime", "--rounds", "1")
    again = gati_jax.load_bundle(folder / "bundle")
    assert (again.tunings[0].programs, again.bound_of()) == (bundle.tunings[0].programs, bundle.bound_of())
    assert len(tuning["checks"]) == 2
    result = json_of(
        evaluate.main, *evaluate_arguments(tmp_path, tmp_path / "eval"), "--batches", "8", "--timed", "8",
        *looks_in(folder),
    )  # fmt: skip
    assert (result["served"]["numerics"], result["served"]["epsilon"]) == ("fast", 0.2)
    tested = data.load("digits", f"all[1497:{1497 + TESTED}]").images
    found = gati_jax.infer_batch(bundle, tested, backend="onnxruntime")
    assert [e["hits"] for e in result["exits"]] == [int((found.exit == e["exit"]).sum()) for e in result["exits"]]
    rows = result["cost"]["measured"]
    assert [(r["batch"], r["driver"], r["backend"], r["numerics"]) for r in rows] == [
        (batch, "spans", "onnxruntime", "fast") for batch in (1, 8)
    ]
    for row in rows:
        assert row["full"] in {"reference", "tuned"}
        assert row["conversion"] == pytest.approx(row["full_ms"] / row["cascade_ms"] / row["ideal"])
        assert 0 < row["predicted_ms"] < np.inf


# --- Which one --------------------------------------------------------------------------------------------------------


def table(full_ms: float, **more: Any) -> CostTable:
    return CostTable(device="made-up", batch=1, blocks_ms=(full_ms / 3,) * 3, **more)


@pytest.fixture
def timed(monkeypatch) -> dict[str, Any]:
    """Made-up milliseconds of the whole base; counts measurements by backend."""
    said: dict[str, Any] = {"probe": 4.0, "xla": 4.0, "onnxruntime": 2.0, "measured": []}

    def measure(backend: str) -> Any:
        def measured(_: gati_jax.Chain, candidates: Any, **__: object) -> CostTable:
            said["measured"].append(backend)
            return table(said[backend], lookup_ms=dict.fromkeys((c.name for c in candidates), 0.01))

        return measured

    def probe(*_: object, sizes: tuple[int, ...]) -> Tuning:
        first, *rest = reference_tuning(sizes).tiles
        tuning = reference_tuning(sizes)
        return dataclasses.replace(tuning, tiles=(dataclasses.replace(first, milliseconds=said["probe"]), *rest))

    monkeypatch.setattr(records, "probe", probe)
    monkeypatch.setattr(records, "measure_onnx_costs", measure("onnxruntime"))
    monkeypatch.setattr(gati_jax, "measure_costs", measure("xla"))
    return said


def planned_for(bundle: gati_jax.Bundle, path: Path, *options: str) -> tuple[str, float]:
    config = load(Config, Path(DIGITS[1]), ["--plan.backend", "auto", *options])
    tuning = measured_tuning(path / "costs.json", bundle.chain, bundle.caches, config)
    return tuning.backend, costs_in(tuning, config).full_ms


@pytest.mark.parametrize(
    ("times", "chosen", "measured"),
    [
        ({"probe": 4.0, "xla": 4.0, "onnxruntime": 2.0}, ("onnxruntime", 2.0), ["onnxruntime"]),  # XLA is far behind
        ({"probe": 2.5, "xla": 2.5, "onnxruntime": 2.0}, ("onnxruntime", 2.0), ["onnxruntime", "xla"]),
        ({"probe": 2.5, "xla": 1.5, "onnxruntime": 2.0}, ("xla", 1.5), ["onnxruntime", "xla"]),
        ({"probe": 1.0, "xla": 1.0, "onnxruntime": 2.0}, ("xla", 1.0), ["onnxruntime", "xla"]),
    ],
)
def test_plans_are_for_the_faster_backend(run, timed, tmp_path, times, chosen, measured):
    timed |= times
    name, ms = planned_for(run.bundle, tmp_path)
    assert (name, ms, timed["measured"]) == (chosen[0], pytest.approx(chosen[1]), measured)
    assert planned_for(run.bundle, tmp_path) == (name, ms)
    assert timed["measured"] == measured  # kept


def test_a_backend_can_be_given(run, timed, tmp_path):
    assert planned_for(run.bundle, tmp_path, "--plan.backend", "xla")[0] == "xla"
    timed |= {"xla": 1.0}
    assert planned_for(run.bundle, tmp_path, "--plan.backend", "onnxruntime")[0] == "onnxruntime"
    with pytest.raises(InputError, match=r"plan\.backend"):
        planned_for(run.bundle, tmp_path, "--plan.backend", "tpu")


def test_costs_of_another_version_of_it_are_measured_anew(run, timed, tmp_path, monkeypatch):
    """What is certified is named by the version; without the package there is no such plan."""
    planned_for(run.bundle, tmp_path)
    monkeypatch.setattr(records, "onnx_version", lambda: "99.0")
    planned_for(run.bundle, tmp_path)
    assert timed["measured"] == ["onnxruntime"] * 2
    monkeypatch.setattr(records, "onnx_version", lambda: "")
    monkeypatch.setattr(records, "onnx_unavailable", lambda *_: "onnx cannot be imported")
    assert planned_for(run.bundle, tmp_path)[0] == "xla"


def test_it_is_not_tried_beside_an_accelerator_or_for_what_it_cannot_run(
    run, timed, tmp_path, monkeypatch, sorting, caplog
):
    with caplog.at_level("INFO"), monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        assert planned_for(run.bundle, tmp_path)[0] == "xla"
    assert "not on ONNX Runtime: there is a faster device" in caplog.text
    own = dataclasses.replace(run.bundle, chain=sorting, caches=())
    timed["measured"].clear()
    assert planned_for(own, tmp_path / "own", "--seed", "1")[0] == "xla"
    assert timed["measured"] == ["xla"]
    with pytest.raises(InputError, match=r"^backend: expected functions that ONNX can express"):
        planned_for(own, tmp_path / "own", "--plan.backend", "onnxruntime")
    bundle = dataclasses.replace(own, tunings=())
    with pytest.raises(InputError, match=r"^--backend: expected functions that ONNX can express"):
        tune.to_tune(bundle, "onnxruntime")
    assert tune.to_tune(bundle, "auto") == ["xla"]
    assert tune.to_tune(run.bundle, "auto") == ["onnxruntime", "xla"]


def test_which_backend_is_preferred_is_printed(run, capsys):
    one, many = onnx_tuning(run.bundle.chain, sizes=(1, 4)), reference_tuning((1, 8))
    tunings = []
    for tuning, ms in ((one, (1.0, 2.0)), (many, (3.0, 6.0))):
        tiles = (dataclasses.replace(tile, milliseconds=t) for tile, t in zip(tuning.tiles, ms, strict=True))
        tunings.append(dataclasses.replace(tuning, tiles=tuple(tiles)))
    tune.compare(dataclasses.replace(run.bundle, tunings=tuple(tunings)))
    printed = capsys.readouterr().out
    assert "onnxruntime is preferred to xla: the whole base takes 3.00 times as long" in printed
    assert "1.50 times in the largest batches" in printed  # 0.75 and 0.5 ms a row


def test_a_speed_up_is_over_the_fastest_full_network_of_all(run, passed, sorting, monkeypatch):
    """Where a bundle is tuned for a backend, its tuning is the contender there; one that answers is timed anyway."""
    searches = []

    def probe(*_: object, sizes: tuple[int, ...]) -> Tuning:
        searches.append(sizes)
        return reference_tuning(sizes)

    monkeypatch.setattr(timing, "probe", probe)
    found = contenders(run.bundle, 1)
    assert {name: way.tuning.backend for name, way in found.items()} == {"xla": "xla", "onnxruntime": "onnxruntime"}
    images = np.asarray(data.load("digits", "all[1497:1505]").images)
    expected = gati_jax.replay(run.bundle.chain, (), images).answers
    for way in found.values():
        prediction = way.predict(images)
        np.testing.assert_array_equal(prediction.class_index, expected)
        assert set(np.asarray(prediction.exit).tolist()) == {len(run.bundle.chain)}
    on_onnx = gati_jax.load_bundle(passed[0] / "bundle")
    assert list(contenders(on_onnx, 8)) == ["xla"]
    assert searches == [(1,), (8,)]
    both = dataclasses.replace(on_onnx, tunings=(*on_onnx.tunings, tuning := reference_tuning((1, 8))))
    assert [way.tuning for way in contenders(both, 1).values()] == [tuning]
    assert list(contenders(dataclasses.replace(run.bundle, chain=sorting), 1)) == ["xla"]
    assert len(searches) == 3
