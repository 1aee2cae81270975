"""An exported folder: programs, a manifest with what holds of their answers, and ``cascade.py``, which runs them.

What the programs are is a form's business: ``models`` has ONNX, ``stablehlo`` has StableHLO.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic_core import to_json

from gati_jax import Bundle, Certificate, InputError
from gati_jax.bundle.manifest import read_json, write_json
from gati_jax.certification import ArithmeticCheck, ServedBound, cascade_id, served_bound
from gati_jax.files import replacing
from gati_jax.inference import check_arithmetic
from gati_jax.options import Strict
from gati_jax.runtime import Cascade

_log = logging.getLogger("train.export")

_OWN = ("cascade.py", "manifest.json")  # files of every export
Answers = tuple[np.ndarray, np.ndarray]
"""Classes and exits, of all rows."""


class Form(Protocol):
    """The programs of a bundle in one format."""

    bundle: Bundle
    arithmetic: str
    """Its name in promises."""
    runner: str
    """The source of ``cascade.py``, which runs the programs without this library."""
    device: str
    """What the answers are compared on: the versions of its software, and the devices."""

    def files(self, promises: Mapping[str, str]) -> dict[str, bytes]:
        """Return the programs by file name; they bear the promises of each plan where their format has a place."""
        ...

    def describe(self, *, checked: bool) -> dict[str, Any]:
        """Return the manifest's keys that only this form has."""
        ...

    def thresholds(self, cascade: Cascade) -> np.ndarray:
        """Return the thresholds of a cascade of the bundle as the programs take them."""
        ...

    def each_way(self, folder: Path, cascade: Cascade, rows: np.ndarray) -> Iterator[Answers]:
        """Answer all rows by the programs in a folder, in each way in which requests may come."""
        ...


def input_dtype(bundle: Bundle) -> np.dtype:
    """Return the dtype of the images that the programs take: pixels where the bundle normalises them."""
    return np.dtype(bundle.chain.input_spec.dtype if bundle.chain.normalization is None else np.uint8)


def export_bundle(
    form: Form, path: Path | str, *, images: np.ndarray | None = None, why: str = "", counts: Path | None = None
) -> dict[str, Any]:
    """Write the cascades of a bundle as programs, and what holds of their answers.

    Args:
        form: The bundle in a format.
        path: The folder; an earlier export there is replaced as a whole.
        images: The certify rows, on which the exported programs are compared with the certified arithmetic, see
            ``check_arithmetic``.
        why: Why there are no images.
        counts: The file that numbers the exports of the bundle in this format which were compared, so that delta holds
            for all of them; None: there is no other, on your word.

    Returns:
        The manifest.

    Raises:
        InputError: The images prove nothing, or ``path`` is something else than an export.
    """
    path, bundle = Path(path), form.bundle
    if path.exists() and not _is_export(path):
        raise InputError(f"out: expected an export or nothing at {path}, got something else, which is left alone")
    if images is not None and images.dtype != (dtype := input_dtype(bundle)):
        raise InputError(f"images: expected {dtype}, which the programs take, got {images.dtype}")
    _log.info("writing %s", path)
    with replacing(path) as folder:
        _write(folder, form, _manifest(form, {}, why))
        promised = len(bundle.compared) > 1  # else there is nothing to keep
        checks = _checks(form, images, folder, counts) if images is not None and promised else {}
        manifest = _manifest(form, checks, why)
        _write(folder, form, manifest)
    return manifest


def _write(folder: Path, form: Form, manifest: Mapping[str, Any]) -> None:
    for name, content in form.files({name: plan["promise"] for name, plan in manifest["plans"].items()}).items():
        (folder / name).write_bytes(content)
    runner, own = _OWN
    (folder / own).write_bytes(to_json(manifest, indent=2) + b"\n")
    shutil.copyfile(form.runner, folder / runner)


def _is_export(path: Path) -> bool:
    return path.is_dir() and (all((path / name).is_file() for name in _OWN) or not any(path.iterdir()))


def _manifest(form: Form, checks: Mapping[str, ArithmeticCheck], why: str) -> dict[str, Any]:
    """Return what ``manifest.json`` says."""
    bundle, chain, plans = form.bundle, form.bundle.chain, {}
    for name, certificate in bundle.certificates.items():
        bound = _bound(form.arithmetic, certificate, checks.get(cascade_id(certificate)), why)
        where = f" ({bound.check.device})" if bound.check else ""
        plans[name] = {
            "thresholds": form.thresholds(bundle.cascades[name]).tolist(),  # infinity becomes null
            "promise": f"{bound}{where}",
            "bound": bound,
            "certificate": certificate,
        }
    manifest = {
        "format_version": 1,
        "input": {"dtype": str(input_dtype(bundle)), "shape": chain.input_spec.shape},
        "normalization": chain.normalization,
        "classes": chain.classes,
        "class_names": bundle.class_names,
        **form.describe(checked=bool(checks)),
        "plans": plans,
    }
    return json.loads(to_json(manifest, inf_nan_mode="null"))


def _bound(arithmetic: str, certificate: Certificate, check: ArithmeticCheck | None, why: str) -> ServedBound:
    """Return what holds of the exported answers, which are in another arithmetic than the certified one."""
    bound = served_bound(certificate, arithmetic, check)
    if bound.epsilon is not None or bound.why:
        return bound
    if not certificate.certified:
        why = "no plan is certified"
    elif certificate.by_group:
        why = "the certificate is by groups, and rows were compared one by one"
    return replace(bound, why=why or "its answers were not compared with the certified arithmetic's")


def _checks(form: Form, images: np.ndarray, folder: Path, counts: Path | None) -> dict[str, ArithmeticCheck]:
    """Compare the programs in a folder with the certified arithmetic."""
    _log.info("comparing the exported programs with the certified arithmetic on %d rows", len(images))
    digest = hashlib.sha256(form.device.encode())
    for content in form.files({}).values():
        digest.update(content)
    programs = digest.hexdigest()[:32]
    checks = check_arithmetic(
        form.bundle,
        images,
        lambda cascade, rows: form.each_way(folder, cascade, rows),
        arithmetic=form.arithmetic,
        programs=programs,
        device=form.device,
        number=_number(counts, programs),
    )
    return {check.cascade: check for check in checks}


class Compared(Strict):
    """Programs of a bundle that were compared with the certified arithmetic, by their digests, in order."""

    programs: tuple[str, ...] = ()


def _number(counts: Path | None, programs: str) -> int:
    """Return j: these are the j-th programs of the bundle that are compared. It is noted before anything is seen."""
    if counts is None:
        return 1
    known = read_json(counts, Compared).programs if counts.is_file() else ()
    if programs not in known:
        known = (*known, programs)
        write_json(counts, Compared(programs=known))
    return 1 + known.index(programs)
