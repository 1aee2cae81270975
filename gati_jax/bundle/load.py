"""Read a bundle from its folder; everything in it is checked before it is used."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gati_jax.caches import Candidate, build_predictor, build_selector
from gati_jax.certification import Certificate, Looks, find_ledger
from gati_jax.errors import BundleError, InputError, as_path, describe_mismatch
from gati_jax.files import check_files, present
from gati_jax.models import Chain, check_chain, check_logits, fold, init, probe_chain, to_chain
from gati_jax.planning import Plan, ReplaySource
from gati_jax.profiling import Tuning, cannot_run
from gati_jax.profiling.compiler import are_tried
from gati_jax.profiling.tuned_cascade import applicable
from gati_jax.pytrees import restore_spec

from .checks import check_bfloat16, check_origin, check_plans
from .manifest import (
    FITTED,
    LOOKS,
    CacheEntry,
    Certificates,
    DeviceFile,
    Manifest,
    Plans,
    read_json,
    read_manifest,
    read_rows,
)
from .record import Bundle


def load_bundle(path: Path | str, *, chain: Chain | None = None) -> Bundle:
    """Load a bundle that ``save_bundle`` wrote.

    Args:
        path: Its folder.
        chain: The base's structure, for a bundle of a user's own chain; its parameters are replaced by the saved ones.

    Returns:
        The bundle, to be passed to ``infer`` and ``infer_batch``.

    Raises:
        BundleError: The folder is no bundle, is incomplete or damaged, has a newer format, or belongs to another chain,
            or to other functions of the same parameters.
        InputError: The logits of ``chain`` depend on the batch, or are not logits[batch, classes].
    """
    folder = present(as_path("path", path))
    if chain is not None:
        check_logits(chain)
    manifest = read_manifest(folder)
    check_files(folder, manifest.files)
    pairs, sites, halves = _read_plans(folder)
    if [(c.name, c.site) for c in manifest.caches] != list(sites.items()):
        raise BundleError(f"bundle: {folder} is inconsistent: its plan, certificate and caches do not belong together")
    skeleton = _skeleton(manifest, chain)
    if depths := {plan.depth for plan, _ in pairs} - {len(skeleton)}:
        raise BundleError(f"chain: expected {depths.pop()} blocks, for which {folder} was planned, got {len(skeleton)}")
    if (named := len(manifest.class_names)) not in {0, skeleton.classes}:
        expected = f"one for each of {skeleton.classes} logits, or none"
        raise BundleError(f"bundle: expected class names in {folder}, {expected}, got {named}")
    caches = tuple(_empty_cache(entry, skeleton) for entry in manifest.caches)
    values = _load_arrays(folder / "arrays", named_arrays(skeleton, caches))
    base = _filled(skeleton, values, "base")
    caches = tuple(_filled(cache, values, f"caches/{cache.name}") for cache in caches)
    if FITTED in manifest.files:
        fitted = read_rows(folder / FITTED)
        caches = tuple(dataclasses.replace(cache, fitted_rows=fitted) for cache in caches)
    if LOOKS in manifest.files and (ledger := find_ledger("user")):
        ledger.merge(read_json(folder / LOOKS, Looks))  # certifying on rows of a bundle is never a first look
    devices = _read_devices(folder / "tuning", base, caches)
    try:
        for plan, _ in pairs:
            check_origin(plan, base, caches, probed=False)
    except InputError as error:
        raise BundleError(f"bundle: {folder} is inconsistent: {error}") from error
    if chain is not None:  # the library's own networks are known
        _check_function(base, pairs, folder)
    return Bundle(
        chain=base,
        caches=caches,
        plan=pairs[0][0],
        certificate=pairs[0][1],
        also=pairs[1:],
        bfloat16=halves,
        class_names=manifest.class_names,
        provenance=manifest.provenance,
        costs=tuple(table for file in devices for table in file.costs),
        tunings=tuple(file.tuning for file in devices if file.tuning is not None),
    )


def _read_plans(
    folder: Path,
) -> tuple[tuple[tuple[Plan, Certificate], ...], dict[str, int], tuple[Certificate, ...]]:
    """Return the plans with their certificates, the sites of all caches by name, and certificates in bfloat16."""
    plans = read_json(folder / "plans.json", Plans).plans
    read = read_json(folder / "certificates.json", Certificates)
    certificates = read.certificates
    if len(plans) != len(certificates):
        got = f"{len(plans)} plans and {len(certificates)} certificates"
        raise BundleError(f"bundle: {folder} is inconsistent: expected a certificate for each plan, got {got}")
    try:
        pairs = tuple((plan.plan(), certificate) for plan, certificate in zip(plans, certificates, strict=True))
        check_bfloat16(pairs, read.bfloat16)
        return pairs, check_plans(pairs), read.bfloat16
    except InputError as error:
        raise BundleError(f"bundle: {folder} is inconsistent: {error}") from error


def _check_function(base: Chain, pairs: Sequence[tuple[Plan, Certificate]], folder: Path) -> None:
    """Check that a user's chain computes what the plans were made with, and not only has the same parameters."""
    check_chain(base)
    found = ReplaySource(**probe_chain(base)._asdict())
    if not all(plan.source.same_function(found) for plan, _ in pairs):
        raise BundleError(
            f"chain: expected the functions that {folder} was certified with, got others of the same parameter"
            " shapes: their logits differ"
        )


def _skeleton(manifest: Manifest, chain: Chain | None) -> Chain:
    """Return the chain with parameters that are only shapes."""
    if chain is None:
        if (network := manifest.network) is None:
            raise BundleError(
                "bundle: it holds a user's own chain: pass it as load_bundle(path, chain=my_chain), or as --chain"
                " package.module:function"
            )
        chain = to_chain(network, jax.eval_shape(lambda: fold(init(network, jax.random.key(0)))))
    expected = f"{manifest.input_dtype}{list(manifest.input_shape)}"
    if (got := _describe(chain.input_spec)) != expected:
        raise BundleError(f"chain: expected inputs {expected}, got {got}")
    try:
        return dataclasses.replace(chain, normalization=manifest.normalization)
    except InputError as error:
        raise BundleError(f"bundle: {error}") from error


def _empty_cache(entry: CacheEntry, chain: Chain) -> Candidate:
    if entry.site >= len(chain):
        raise BundleError(
            f"bundle: {entry.name} is at site {entry.site}, but the chain has sites 0 to {len(chain) - 1}"
        )
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
        raise BundleError(f"bundle: {entry.name} does not fit site {entry.site}: {error}") from error


def _read_devices(folder: Path, chain: Chain, caches: Sequence[Candidate]) -> tuple[DeviceFile, ...]:
    """Read what was measured on devices; a tuning for another network or compiler is left out with a warning."""
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            device = read_json(file, DeviceFile)
        except BundleError as error:
            raise BundleError(f"{error} (it holds only measurements: remove it, and tune again)") from error
        if device.tuning is not None and (reason := next(_misfits(device.tuning, file.stem, chain, caches), None)):
            msg = f"bundle: the tuning in {file} is left out: {reason}; run gati-jax tune --bundle DIR again"
            warnings.warn(msg, stacklevel=3)
            device = device.model_copy(update={"tuning": None})
        found.append(device)
    return tuple(found)


def _misfits(tuning: Tuning, device: str, chain: Chain, caches: Sequence[Candidate]) -> Iterator[str]:
    """Yield reasons why a tuning cannot be this bundle's, on the device that its file is named after."""
    if tuning.device != device:
        yield f"expected one of {device}, got {tuning.device}"
        return
    platform = device.partition("-")[0]
    if odd := next(
        (tile.options for tile in tuning.tiles if tile.options and not are_tried(tile.options, platform)), ()
    ):
        yield f"{odd} are no options for {platform}"
        return
    if why := cannot_run(tuning, chain, caches):
        yield why
    known, names = applicable(chain, caches), {cache.name for cache in caches}
    for tile in tuning.tiles:
        for kind, algorithm in tile.algorithms.items():
            if algorithm not in known.get(kind, ()):
                yield f"the network has no {kind} that {algorithm} could do"
        if (costs := tile.costs) is None:
            continue
        if (costs.batch, len(costs.blocks_ms)) != (tile.size, len(chain)):
            got = f"{len(costs.blocks_ms)} for {costs.batch}"
            yield f"expected costs of {len(chain)} blocks for {tile.size} rows, got {got}"
        if not set(costs.lookup_ms) <= names:
            yield f"expected costs of {', '.join(sorted(names))}, got {', '.join(sorted(costs.lookup_ms))}"


MAX_ARRAY_BYTES = 8 * 2**30  # a manifest of a few lines may imply any number; compressed, so may a small file


def named_arrays(chain: Chain, caches: Iterable[Candidate]) -> dict[str, Any]:
    """Return every array under a flat name, such as "base/0/block/conv1/conv/kernel".

    Raises:
        InputError: Two arrays have the same name.
    """
    trees = {"base": chain, **{f"caches/{c.name}": c for c in caches}}
    found: dict[str, Any] = {}
    for prefix, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = f"{prefix}{_name(path)}"
            if name in found:
                raise InputError(f"params: expected distinct names, got {name} twice")
            found[name] = jnp.asarray(leaf) if isinstance(leaf, int | float | complex) else leaf
    return found


def _name(path: tuple[Any, ...]) -> str:
    """Name a leaf; the first key is the field that holds all parameters."""
    return "".join(f"/{jax.tree_util.keystr((key,), simple=True)}" for key in path[1:])


def _filled(tree: Any, values: Mapping[str, Any], prefix: str) -> Any:  # noqa: ANN401 (a Chain or a Candidate)
    """Return the tree with the arrays of these names in the places of its leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, _: values[f"{prefix}{_name(path)}"], tree)


def _load_arrays(folder: Path, expected: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Load arrays of exactly these names, shapes and dtypes."""
    if (total := sum(math.prod(v.shape) * v.dtype.itemsize for v in expected.values())) > MAX_ARRAY_BYTES:
        raise BundleError(f"bundle: {folder} would take {total} bytes of memory, {MAX_ARRAY_BYTES} are allowed")
    from orbax.checkpoint import v1 as ocp  # noqa: PLC0415 (takes seconds to import, and answering does without)

    path, shapes = str(folder.absolute()), {name: _describe(v) for name, v in expected.items()}
    try:
        problems = describe_mismatch(shapes, _described(ocp.metadata(path).metadata))
        values = {} if problems else ocp.load(path, restore_spec(dict(expected)))
    except (ocp.errors.InvalidLayoutError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"bundle: {folder} is damaged: {error}") from error
    if problems:
        raise BundleError(f"bundle: the arrays are not this chain's. {problems}")
    return values


def _described(metadata: Any) -> dict[str, str]:  # noqa: ANN401 (whatever Orbax found)
    if not isinstance(metadata, dict):
        raise TypeError("it does not say which arrays it holds")
    return {name: _describe(array) for name, array in metadata.items()}


def _describe(array: Any) -> str:  # noqa: ANN401 (an array, or the shape of one)
    return f"{array.dtype}{list(array.shape)}"
