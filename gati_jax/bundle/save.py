"""Bundles: what is saved, loaded and served.

    manifest.json      network, normalization, caches, class names, provenance, digests of all other files
    plans.json         up to four plans, the default first: chosen caches in order, and the path of their thresholds
    certificates.json  what is known of the disagreement of each
    arrays/            parameters of the base and of the caches (Orbax)
    tuning/            measured costs, algorithms and tiles by device; not part of the digest, for it is measured anew

Loading never imports or unpickles what a bundle names: networks and caches come from a closed list, arrays only in
shapes that those imply.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from orbax.checkpoint import v1 as ocp

from gati_jax.bundle.load import MAX_ARRAY_BYTES, arrays
from gati_jax.caches import Candidate, choose, describe_predictor, describe_selector
from gati_jax.certification import Certificate
from gati_jax.errors import InputError
from gati_jax.models import Architecture, Chain
from gati_jax.planning import CostTable, Plan
from gati_jax.profiling import Tuning

from .load import load_bundle
from .manifest import (
    FORMAT_VERSION,
    CacheEntry,
    Certificates,
    DeviceFile,
    Manifest,
    PlanEntry,
    Plans,
    Provenance,
    digests,
    present,
    read_json,
    read_manifest,
    replacing,
    write_json,
)
from .record import Bundle, check_origin, check_plans, sites_of

__all__ = ["MAX_ARRAY_BYTES", "Bundle", "Provenance", "load_bundle", "save_bundle", "save_tuning"]


def save_bundle(
    path: Path | str,
    chain: Chain,
    candidates: Iterable[Candidate],
    plan: Plan,
    certificate: Certificate,
    *,
    also: Iterable[tuple[Plan, Certificate]] = (),
    class_names: tuple[str, ...] = (),
    provenance: Provenance | None = None,
    costs: Iterable[CostTable] = (),
) -> None:
    """Save a bundle; whatever stands at ``path`` is replaced as a whole, or, if this fails, stays as it is.

    Args:
        path: The folder to write.
        chain: The base.
        candidates: Among which are all plans'.
        plan: Which caches, in which order, with which thresholds; used unless another plan is named.
        certificate: Of that very plan.
        also: Up to three more plans, each with its certificate, under other names. All of them must have been certified
            together.
        class_names: Names of the classes, in the order of the logits.
        provenance: Versions, seeds, data, config.
        costs: Measured costs.

    Raises:
        InputError: A certificate is another plan's, the plans were not certified together or have the same name, or a
            cache is of a kind that no bundle can hold.
    """
    path, pairs = Path(path), ((plan, certificate), *also)
    check_plans(pairs)
    if path.exists() and not (path.is_dir() and ((path / "manifest.json").is_file() or not any(path.iterdir()))):
        raise InputError(f"path: expected a bundle or nothing at {path}, got something else, which is left alone")
    caches = choose(candidates, tuple(sites_of(pairs)))
    for one, _ in pairs:
        sites = tuple(c.site for c in choose(caches, one.names))
        if sites != one.sites or one.depth != len(chain):
            expected = f"sites {one.sites} of {one.depth} blocks"
            raise InputError(f"candidates: expected the plan's {expected}, got {sites} of {len(chain)}")
        check_origin(one, chain, caches)
    entries = tuple(
        CacheEntry(
            name=c.name, site=c.site, predictor=describe_predictor(c.predictor), selector=describe_selector(c.selector)
        )
        for c in caches
    )
    with replacing(path) as folder:
        ocp.save(str(folder.absolute() / "arrays"), arrays(chain, caches))
        write_json(folder / "plans.json", Plans(plans=tuple(PlanEntry.of(one) for one, _ in pairs)))
        write_json(folder / "certificates.json", Certificates(certificates=tuple(c for _, c in pairs)))
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            network=chain.network if isinstance(chain.network, Architecture) else None,
            normalization=chain.normalization,
            input_shape=chain.input_spec.shape,
            input_dtype=str(chain.input_spec.dtype),
            class_names=class_names,
            caches=entries,
            provenance=provenance or Provenance(),
            files=digests(folder),
        )
        write_json(folder / "manifest.json", manifest)
        tables = tuple(costs)
        for device in sorted({table.device for table in tables}):
            here = DeviceFile(costs=tuple(table for table in tables if table.device == device))
            write_json(folder / "tuning" / f"{device}.json", here)


def save_tuning(path: Path | str, tuning: Tuning) -> None:
    """Add to a saved bundle what ``tune`` found on a device; an older tuning of that device is replaced.

    Saving the bundle anew drops it, for the network may be another one.

    Raises:
        BundleError: There is no bundle at ``path``, or its file for the device is damaged.
    """
    folder = present(Path(path))
    read_manifest(folder)
    file = folder / "tuning" / f"{tuning.device}.json"
    here = read_json(file, DeviceFile) if file.is_file() else DeviceFile()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.tuning-") as fresh:
        write_json(Path(fresh) / file.name, here.model_copy(update={"tuning": tuning}))
        file.parent.mkdir(exist_ok=True)
        (Path(fresh) / file.name).replace(file)
