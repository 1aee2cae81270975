"""Bundles: what is saved, loaded and served.

    manifest.json      network, normalization, caches, class names, provenance, digests of all other files
    plans.json         up to four plans, the default first: chosen caches in order, and the path of their thresholds
    certificates.json  what is known of the disagreement of each
    arrays/            parameters of the base and of the caches (Orbax)
    tuning/            measured costs, algorithms and tiles by device; not part of the digest, for it is measured anew

Loading never imports or unpickles what a bundle names: networks and caches come from a closed list, arrays only in
shapes that those imply.
"""

import dataclasses
import functools
import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from ._checkpoint import restore_spec
from ._devices import read_devices
from ._errors import BundleError, InputError, describe_mismatch
from ._folder import check_files, digests, present, replacing
from ._manifest import (
    FORMAT_VERSION,
    MAX_JSON_BYTES,
    CacheEntry,
    Certificates,
    DeviceFile,
    Manifest,
    PlanEntry,
    Plans,
    Provenance,
    read_json,
    write_json,
)
from ._plans import CertifiedPlans, check_plans, sites_of
from .caches import Candidate, build_predictor, build_selector, choose, describe_predictor, describe_selector
from .models import Chain, ResNet, fold, init, to_chain
from .planning import Certificate, CostTable, Origin, Plan
from .runtime import Cascade, TunedCascade, Tuning, check_cascade, device_name, origin

MAX_ARRAY_BYTES = 8 * 2**30  # a manifest of a few lines may imply any number; compressed, so may a small file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A base with its caches, a plan for them, and a certificate of the plan; or up to four of both."""

    chain: Chain
    caches: tuple[Candidate, ...]
    """The plan's, in its order; then those that only the other plans have."""
    plan: Plan
    """The one that is used unless another is named."""
    certificate: Certificate
    also: tuple[tuple[Plan, Certificate], ...] = ()
    """Other plans, each with its certificate."""
    class_names: tuple[str, ...] = ()
    provenance: Provenance = Provenance()  # noqa: RUF009 (frozen)
    costs: tuple[CostTable, ...] = ()
    """By device."""
    tunings: tuple[Tuning, ...] = ()
    """By device."""

    @property
    def plans(self) -> dict[str, Plan]:
        """All plans by name, the default one first."""
        return {certificate.name: plan for plan, certificate in ((self.plan, self.certificate), *self.also)}

    @property
    def certificates(self) -> dict[str, Certificate]:
        """Their certificates."""
        return {certificate.name: certificate for certificate in (self.certificate, *(c for _, c in self.also))}

    @property
    def cascade(self) -> Cascade:
        """The certified step of the plan, ready to run: caches that stay off are left out."""
        return self.cascades[self.certificate.name]

    @property
    def tuned(self) -> TunedCascade | None:
        """The cascade as this device runs it fastest; None where nobody has tuned it for this device."""
        return self.tuned_of(None)

    @functools.cached_property
    def cascades(self) -> dict[str, Cascade]:
        """The cascade of every plan by name."""
        return {name: self._cascade(plan, self.certificates[name].step) for name, plan in self.plans.items()}

    def cascade_of(self, name: str | None) -> Cascade:
        """Return the cascade of a plan; None names the default one.

        Raises:
            InputError: There is no such plan.
        """
        return self.cascades[self._known(name)]

    def tuned_of(self, name: str | None) -> TunedCascade | None:
        """Return ``cascade_of(name)`` as this device runs it fastest, if the bundle has been tuned for it.

        Raises:
            InputError: There is no such plan.
        """
        return self._tuned.get(self._known(name))

    @functools.cached_property
    def _tuned(self) -> dict[str, TunedCascade]:
        tuning = next((tuning for tuning in self.tunings if tuning.device == device_name()), None)
        return {} if tuning is None else {name: TunedCascade(c, tuning) for name, c in self.cascades.items()}

    def _known(self, name: str | None) -> str:
        name = self.certificate.name if name is None else name
        if name not in self.plans:
            msg = f"plan: expected one of {', '.join(self.plans)}, got {name!r}"
            raise InputError(msg)
        return name

    def _cascade(self, plan: Plan, step: int) -> Cascade:
        thresholds = plan.thresholds(step)
        on = np.isfinite(thresholds)
        caches = choose(self.caches, [name for name, is_on in zip(plan.names, on, strict=True) if is_on])
        cascade = Cascade(self.chain, caches, jnp.asarray(thresholds[on], jnp.float32))
        check_cascade(cascade)
        return cascade


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
        msg = f"path: expected a bundle or nothing at {path}, got something else, which is left alone"
        raise InputError(msg)
    caches = choose(candidates, tuple(sites_of(pairs)))
    for one, _ in pairs:
        sites = tuple(c.site for c in choose(caches, one.names))
        if sites != one.sites or one.depth != len(chain):
            expected = f"sites {one.sites} of {one.depth} blocks"
            msg = f"candidates: expected the plan's {expected}, got {sites} of {len(chain)}"
            raise InputError(msg)
        _check_origin(one, chain, caches)
    entries = tuple(
        CacheEntry(
            name=c.name, site=c.site, predictor=describe_predictor(c.predictor), selector=describe_selector(c.selector)
        )
        for c in caches
    )
    with replacing(path) as folder:
        ocp.save(str(folder.absolute() / "arrays"), _arrays(chain, caches))
        write_json(folder / "plans.json", Plans(plans=tuple(PlanEntry.of(one) for one, _ in pairs)))
        write_json(folder / "certificates.json", Certificates(certificates=tuple(c for _, c in pairs)))
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            network=chain.network if isinstance(chain.network, ResNet) else None,
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
    _read_manifest(folder)
    file = folder / "tuning" / f"{tuning.device}.json"
    here = read_json(file, DeviceFile) if file.is_file() else DeviceFile()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.tuning-") as fresh:
        write_json(Path(fresh) / file.name, here.model_copy(update={"tuning": tuning}))
        file.parent.mkdir(exist_ok=True)
        (Path(fresh) / file.name).replace(file)


def load_bundle(path: Path | str, *, chain: Chain | None = None) -> Bundle:
    """Load a bundle.

    Args:
        path: The folder.
        chain: The base's structure, for a bundle of a user's own chain; its parameters are replaced by the saved ones.

    Raises:
        BundleError: The folder is no bundle, is incomplete or damaged, has a newer format, or belongs to another chain.
    """
    folder = present(Path(path))
    manifest = _read_manifest(folder)
    check_files(folder, manifest.files)
    pairs = _read_plans(folder)
    if [(c.name, c.site) for c in manifest.caches] != list(sites_of(pairs).items()):
        msg = f"bundle: {folder} is inconsistent: its plan, certificate and caches do not belong together"
        raise BundleError(msg)
    skeleton = _skeleton(manifest, chain)
    for plan, _ in pairs:
        if len(skeleton) != plan.depth:
            msg = f"chain: expected {plan.depth} blocks, for which {folder} was planned, got {len(skeleton)}"
            raise BundleError(msg)
    caches = tuple(_empty_cache(entry, skeleton) for entry in manifest.caches)
    arrays = _load_arrays(folder / "arrays", _arrays(skeleton, caches))
    base = _filled(skeleton, arrays, "base")
    caches = tuple(_filled(cache, arrays, f"caches/{cache.name}") for cache in caches)
    devices = read_devices(folder / "tuning", base, caches)
    try:
        for plan, _ in pairs:
            _check_origin(plan, base, caches)
    except InputError as error:
        msg = f"bundle: {folder} is inconsistent: {error}"
        raise BundleError(msg) from error
    return Bundle(
        chain=base,
        caches=caches,
        plan=pairs[0][0],
        certificate=pairs[0][1],
        also=pairs[1:],
        class_names=manifest.class_names,
        provenance=manifest.provenance,
        costs=tuple(table for file in devices for table in file.costs),
        tunings=tuple(file.tuning for file in devices if file.tuning is not None),
    )


def _read_plans(folder: Path) -> CertifiedPlans:
    """Read the plans with their certificates.

    Raises:
        BundleError: A file is damaged, or they do not belong together.
    """
    plans = [entry.plan() for entry in read_json(folder / "plans.json", Plans).plans]
    certificates = read_json(folder / "certificates.json", Certificates).certificates
    if len(plans) != len(certificates):
        got = f"{len(plans)} plans and {len(certificates)} certificates"
        msg = f"bundle: {folder} is inconsistent: expected a certificate for each plan, got {got}"
        raise BundleError(msg)
    pairs = tuple(zip(plans, certificates, strict=True))
    try:
        check_plans(pairs)
    except InputError as error:
        msg = f"bundle: {folder} is inconsistent: {error}"
        raise BundleError(msg) from error
    return pairs


def _check_origin(plan: Plan, chain: Chain, caches: tuple[Candidate, ...]) -> None:
    """Check that plan and certificate were made from these very parameters; a plan made by hand does not say."""
    if plan.origin != Origin():
        plan.origin.check(origin(chain, choose(caches, plan.names), plan.origin.dtype), "candidates")


def _read_manifest(folder: Path) -> Manifest:
    """Read the manifest; the version comes first, since a newer one may have any other form."""
    file = folder / "manifest.json"
    if not file.is_file():
        msg = f"bundle: expected a bundle folder with a manifest.json, got {folder}"
        raise BundleError(msg)
    if file.stat().st_size > MAX_JSON_BYTES:
        msg = f"bundle: {file} is larger than {MAX_JSON_BYTES} bytes"
        raise BundleError(msg)
    try:
        version = json.loads(file.read_bytes()).get("format_version")
    except (ValueError, AttributeError, RecursionError) as error:
        msg = f"bundle: {file} is damaged: {error}"
        raise BundleError(msg) from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        msg = f"bundle: {folder} has format version {version}, gati_jax reads up to {FORMAT_VERSION}: upgrade it"
        raise BundleError(msg)
    return read_json(file, Manifest)


def _skeleton(manifest: Manifest, chain: Chain | None) -> Chain:
    """Return the chain with parameters that are only shapes."""
    if chain is None:
        if manifest.network is None:
            msg = "bundle: it holds a user's own chain: pass it as load_bundle(path, chain=my_chain)"
            raise BundleError(msg)
        network = manifest.network
        chain = to_chain(network, jax.eval_shape(lambda: fold(init(network, jax.random.key(0)))))
    got = (chain.input_spec.shape, str(chain.input_spec.dtype))
    if got != (manifest.input_shape, manifest.input_dtype):
        msg = f"chain: expected inputs {manifest.input_dtype}{list(manifest.input_shape)}, got {got[1]}{list(got[0])}"
        raise BundleError(msg)
    try:
        return dataclasses.replace(chain, normalization=manifest.normalization)
    except InputError as error:
        msg = f"bundle: {error}"
        raise BundleError(msg) from error


def _empty_cache(entry: CacheEntry, chain: Chain) -> Candidate:
    if entry.site >= len(chain):
        msg = f"bundle: {entry.name} is at site {entry.site}, but the chain has sites 0 to {len(chain) - 1}"
        raise BundleError(msg)
    predictor, selector = build_predictor(entry.predictor, chain.classes), build_selector(entry.selector)
    site = chain.site_specs[entry.site]

    def init_params() -> dict[str, Any]:
        key, activation = jax.random.key(0), jnp.zeros((1, *site.shape), site.dtype)
        return {
            "predictor": predictor.init(key, activation),
            "selector": selector.init(key, jnp.zeros((1, chain.classes))),
        }

    try:
        return Candidate(entry.name, entry.site, predictor, selector, jax.eval_shape(init_params))
    except (TypeError, ValueError, ArithmeticError) as error:
        msg = f"bundle: {entry.name} does not fit site {entry.site}: {error}"
        raise BundleError(msg) from error


def _arrays(chain: Chain, caches: Iterable[Candidate]) -> dict[str, Any]:
    """Return every array under a flat name, such as "base/0/block/conv1/conv/kernel".

    Raises:
        InputError: Two arrays have the same name.
    """
    trees = {"base": chain, **{f"caches/{c.name}": c for c in caches}}
    named = [(f"{prefix}{_name(path)}", leaf) for prefix, tree in trees.items() for path, leaf in _leaves(tree)]
    arrays = {name: jnp.asarray(leaf) if isinstance(leaf, int | float | complex) else leaf for name, leaf in named}
    if len(arrays) < len(named):
        names = [name for name, _ in named]
        msg = (
            f"params: expected distinct names, got twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}"
        )
        raise InputError(msg)
    return arrays


def _leaves(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:  # noqa: ANN401 (a Chain or a Candidate)
    return jax.tree_util.tree_leaves_with_path(tree)


def _name(path: tuple[Any, ...]) -> str:
    """Name a leaf; the first key is the field that holds all parameters."""
    return "".join(f"/{jax.tree_util.keystr((key,), simple=True)}" for key in path[1:])


def _filled(tree: Any, arrays: Mapping[str, Any], prefix: str) -> Any:  # noqa: ANN401 (a Chain or a Candidate)
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[f"{prefix}{_name(path)}"], tree)


def _load_arrays(folder: Path, expected: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Load arrays of exactly these names, shapes and dtypes.

    Raises:
        BundleError: Sorted lists of missing, unexpected and misshapen names; or Orbax cannot read the folder.
    """
    if (total := sum(math.prod(v.shape) * v.dtype.itemsize for v in expected.values())) > MAX_ARRAY_BYTES:
        msg = f"bundle: {folder} would take {total} bytes of memory, {MAX_ARRAY_BYTES} are allowed"
        raise BundleError(msg)
    path = str(folder.absolute())
    try:
        found = ocp.metadata(path).metadata
        if not isinstance(found, dict):
            msg = f"bundle: {folder} is damaged: it does not say which arrays it holds"
            raise BundleError(msg)
        shapes = {name: _describe(v) for name, v in expected.items()}
        if problems := describe_mismatch(shapes, {name: _describe(v) for name, v in found.items()}):
            msg = f"bundle: the arrays are not this chain's. {problems}"
            raise BundleError(msg)
        return ocp.load(path, restore_spec(dict(expected)))
    except (ocp.errors.InvalidLayoutError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, BundleError):
            raise
        msg = f"bundle: {folder} is damaged: {error}"
        raise BundleError(msg) from error


def _describe(array: Any) -> str:  # noqa: ANN401 (an array, or the shape of one)
    return f"{array.dtype}{list(array.shape)}"
