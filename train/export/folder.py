"""An exported folder: its models, its manifest, and what holds of its answers.

cascade.onnx     one file for batch 1: nested Ifs, thresholds as an input
span_0.onnx ...  from each open cache's site to the next, with the cache's lookup; the last ends with the classifier
manifest.json    spans, plans with thresholds and promises, class names
cascade.py       runs the spans
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, helper
from pydantic_core import to_json

from gati_jax import Bundle, Certificate, InputError
from gati_jax.bundle.manifest import read_json, write_json
from gati_jax.certification import ArithmeticCheck, ServedBound, cascade_id, served_bound
from gati_jax.export.models import OPSET, check_exportable
from gati_jax.export.sessions import VERSION, open_session
from gati_jax.files import replacing
from gati_jax.inference import check_arithmetic
from gati_jax.options import Strict
from gati_jax.profiling import device_name
from gati_jax.runtime import Cascade

from . import cascade as runner
from .models import ONE_FILE, THRESHOLDS, input_dtype, models_of, stages_of, thresholds_of

ARITHMETIC = "onnx"
_CHUNK = 256


def export_bundle(
    bundle: Bundle, path: Path | str, *, images: np.ndarray | None = None, why: str = "", counts: Path | None = None
) -> dict[str, Any]:
    """Write the cascades of a bundle as ONNX models, and what holds of their answers.

    Args:
        bundle: Its base must be a network of this library.
        path: The folder; an earlier export there is replaced as a whole.
        images: The certify rows, on which the exported models are compared with the certified arithmetic, see
            ``check_arithmetic``.
        why: Why there are no images.
        counts: The file that numbers the exports of the bundle which were compared, so that delta holds for all of
            them; None: there is no other, on your word.

    Returns:
        The manifest.

    Raises:
        InputError: The bundle cannot be exported, the images prove nothing, or ``path`` is something else.
    """
    path = Path(path)
    check_exportable(bundle.chain, bundle.caches)
    dtype = input_dtype(bundle.chain)
    if path.exists() and not (path.is_dir() and ((path / "span_0.onnx").is_file() or not any(path.iterdir()))):
        raise InputError(f"out: expected an export or nothing at {path}, got something else, which is left alone")
    if images is not None and images.dtype != dtype:
        raise InputError(f"images: expected {dtype}, which the models take, got {images.dtype}")
    models = models_of(bundle)
    with replacing(path) as folder:
        _write(folder, models, _manifest(bundle, models, {}, why))
        promised = len(bundle.compared) > 1  # else there is nothing to keep
        checks = _checks(bundle, images, folder, models, counts) if images is not None and promised else {}
        manifest = _manifest(bundle, models, checks, why)
        promises = json.dumps({name: plan["promise"] for name, plan in manifest["plans"].items()})
        for model in models.values():
            helper.set_model_props(model, {"gati_jax.promises": promises})
        _write(folder, models, manifest)
    return manifest


def _write(folder: Path, models: Mapping[str, ModelProto], manifest: Mapping[str, Any]) -> None:
    for name, model in models.items():
        (folder / name).write_bytes(model.SerializeToString(deterministic=True))
    (folder / "manifest.json").write_bytes(to_json(manifest, indent=2) + b"\n")
    shutil.copyfile(runner.__file__, folder / "cascade.py")


def _manifest(
    bundle: Bundle, models: Mapping[str, ModelProto], checks: Mapping[str, ArithmeticCheck], why: str
) -> dict[str, Any]:
    """Return what ``manifest.json`` says."""
    chain, stages, plans = bundle.chain, stages_of(bundle), {}
    for name, certificate in bundle.certificates.items():
        bound = _bound(certificate, checks.get(cascade_id(certificate)), why)
        where = f" ({bound.check.device})" if bound.check else ""
        plans[name] = {
            "thresholds": thresholds_of(bundle.cascades[name], stages).tolist(),  # infinity becomes null
            "promise": f"{bound}{where}",
            "bound": bound,
            "certificate": certificate,
        }
    spans = [(stage.file, stage.start, stage.site, stage.cache and stage.cache.name) for stage in stages]
    manifest = {
        "format_version": 1,
        "opset": OPSET,
        "onnxruntime": VERSION if checks else "",
        "input": {"dtype": str(input_dtype(chain)), "shape": chain.input_spec.shape},
        "normalization": chain.normalization,
        "classes": chain.classes,
        "class_names": bundle.class_names,
        "one_file": ONE_FILE if ONE_FILE in models else None,
        "spans": [dict(zip(("file", "start", "site", "cache"), span, strict=True)) for span in spans],
        "plans": plans,
    }
    return json.loads(to_json(manifest, inf_nan_mode="null"))


def _bound(certificate: Certificate, check: ArithmeticCheck | None, why: str) -> ServedBound:
    """Return what holds of the exported answers, which are in another arithmetic than the certified one."""
    bound = served_bound(certificate, ARITHMETIC, check)
    if bound.epsilon is not None or bound.why:
        return bound
    if not certificate.certified:
        why = "no plan is certified"
    elif certificate.by_group:
        why = "the certificate is by groups, and rows were compared one by one"
    return replace(bound, why=why or "its answers were not compared with the certified arithmetic's")


def _checks(
    bundle: Bundle, images: np.ndarray, folder: Path, models: Mapping[str, ModelProto], counts: Path | None
) -> dict[str, ArithmeticCheck]:
    """Compare the models in a folder with the certified arithmetic."""
    device = f"onnxruntime {VERSION} on a CPU, reference on {device_name()}"
    digest = hashlib.sha256(device.encode())
    for model in models.values():
        digest.update(model.SerializeToString(deterministic=True))
    programs, stages = digest.hexdigest()[:32], stages_of(bundle)

    def each_way(cascade: Cascade, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        thresholds, spans = thresholds_of(cascade, stages), runner.Cascade(folder)
        spans.thresholds = np.append(thresholds, np.float32(-np.inf))
        for size in (_CHUNK, 1):
            parts = [spans.predict(rows[i : i + size])[:2] for i in range(0, len(rows), size)]
            yield np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        if ONE_FILE in models:
            yield answer_one_by_one(folder / ONE_FILE, rows, thresholds)[:2]

    what = {"arithmetic": ARITHMETIC, "programs": programs, "device": device, "number": _number(counts, programs)}
    return {check.cascade: check for check in check_arithmetic(bundle, images, each_way, **what)}


def answer_one_by_one(file: Path, images: np.ndarray, thresholds: np.ndarray) -> runner.Prediction:
    """Answer images by the single file, one after another."""
    session = open_session(onnx.load(file))
    given = {THRESHOLDS: thresholds} if len(thresholds) else {}
    rows = [session.run(None, {"images": images[i : i + 1], **given}) for i in range(len(images))]
    return runner.Prediction(*map(np.concatenate, zip(*rows, strict=True)))


class Compared(Strict):
    """Models of a bundle that were compared with the certified arithmetic, by their digests, in order."""

    programs: tuple[str, ...] = ()


def _number(counts: Path | None, programs: str) -> int:
    """Return j: these are the j-th models of the bundle that are compared. It is noted before anything is seen."""
    if counts is None:
        return 1
    known = read_json(counts, Compared).programs if counts.is_file() else ()
    if programs not in known:
        known = (*known, programs)
        write_json(counts, Compared(programs=known))
    return 1 + known.index(programs)
