"""Read a bundle from its folder; everything in it is checked before it is used."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gati_jax.caches import Candidate, Network, build_predictor, build_selector
from gati_jax.certification import Looks, find_ledger
from gati_jax.errors import BundleError, InputError, describe_mismatch
from gati_jax.models import Architecture, Chain, check_chain, check_logits, fold, init, layers, probe_chain, to_chain
from gati_jax.planning import ReplaySource
from gati_jax.profiling import Tile, Tuning
from gati_jax.profiling.tuned_cascade import OPTIONS
from gati_jax.pytrees import restore_spec

from .files import check_files, present
from .manifest import LOOKS, CacheEntry, Certificates, DeviceFile, Manifest, Plans, read_json, read_manifest
from .record import Bundle, CertifiedPlans, check_origin, check_plans, sites_of


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
    folder = present(Path(path))
    if chain is not None:
        check_logits(chain)
    manifest = read_manifest(folder)
    check_files(folder, manifest.files)
    pairs = _read_plans(folder)
    if [(c.name, c.site) for c in manifest.caches] != list(sites_of(pairs).items()):
        raise BundleError(f"bundle: {folder} is inconsistent: its plan, certificate and caches do not belong together")
    skeleton = _skeleton(manifest, chain)
    for plan, _ in pairs:
        if len(skeleton) != plan.depth:
            raise BundleError(
                f"chain: expected {plan.depth} blocks, for which {folder} was planned, got {len(skeleton)}"
            )
    caches = tuple(_empty_cache(entry, skeleton) for entry in manifest.caches)
    values = _load_arrays(folder / "arrays", named_arrays(skeleton, caches))
    base = _filled(skeleton, values, "base")
    caches = tuple(_filled(cache, values, f"caches/{cache.name}") for cache in caches)
    if LOOKS in manifest.files and (ledger := find_ledger("user")):
        ledger.merge(read_json(folder / LOOKS, Looks))  # certifying on rows of a bundle is never a first look
    devices = _read_devices(folder / "tuning", base, caches)
    try:
        for plan, _ in pairs:
            check_origin(plan, base, caches, probed=False)
    except InputError as error:
        raise BundleError(f"bundle: {folder} is inconsistent: {error}") from error
    if chain is not None:  # the library's own networks are known
        check_chain(base)
        found = ReplaySource(**probe_chain(base)._asdict())
        if not all(plan.source.same_function(found) for plan, _ in pairs):
            raise BundleError(
                f"chain: expected the functions that {folder} was certified with, got others of the same parameter"
                " shapes: their logits differ"
            )
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
        raise BundleError(f"bundle: {folder} is inconsistent: expected a certificate for each plan, got {got}")
    pairs = tuple(zip(plans, certificates, strict=True))
    try:
        check_plans(pairs)
    except InputError as error:
        raise BundleError(f"bundle: {folder} is inconsistent: {error}") from error
    return pairs


def _skeleton(manifest: Manifest, chain: Chain | None) -> Chain:
    """Return the chain with parameters that are only shapes."""
    if chain is None:
        if manifest.network is None:
            raise BundleError("bundle: it holds a user's own chain: pass it as load_bundle(path, chain=my_chain)")
        network = manifest.network
        chain = to_chain(network, jax.eval_shape(lambda: fold(init(network, jax.random.key(0)))))
    got = (chain.input_spec.shape, str(chain.input_spec.dtype))
    if got != (manifest.input_shape, manifest.input_dtype):
        raise BundleError(
            f"chain: expected inputs {manifest.input_dtype}{list(manifest.input_shape)}, got {got[1]}{list(got[0])}"
        )
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
    """Read what was measured on devices; a tuning for another network or compiler is left out with a warning.

    Raises:
        BundleError: A file is damaged.
    """
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            device = read_json(file, DeviceFile)
        except BundleError as error:
            raise BundleError(f"{error} (it holds only measurements: remove it, and tune again)") from error
        if device.tuning is not None and (reason := _misfit(device.tuning, file.stem, chain, caches)):
            msg = f"bundle: the tuning in {file} is left out: {reason}; run python -m train.tune --bundle DIR again"
            warnings.warn(msg, stacklevel=3)
            device = device.model_copy(update={"tuning": None})
        found.append(device)
    return tuple(found)


def _misfit(tuning: Tuning, device: str, chain: Chain, caches: Sequence[Candidate]) -> str | None:
    """Return why a tuning cannot be this bundle's, on the device that its file is named after; None if it can."""
    if tuning.device != device:
        return f"expected one of {device}, got {tuning.device}"
    if tuning.jaxlib not in {"", version("jaxlib")}:
        return f"expected one of jaxlib {version('jaxlib')}, got {tuning.jaxlib}"
    networks = [chain.network, *(c.predictor.network for c in caches if isinstance(c.predictor, Network))]
    known = {
        layer.kind: layer.applicable
        for network in networks
        if isinstance(network, Architecture)
        for block in layers(network)
        for layer in block
    }
    names = {cache.name for cache in caches}
    reasons = (_tile_misfit(tile, device.partition("-")[0], len(chain), known, names) for tile in tuning.tiles)
    return next((reason for reason in reasons if reason), None)


def _tile_misfit(
    tile: Tile, platform: str, depth: int, known: Mapping[str, Sequence[str]], names: set[str]
) -> str | None:
    unknown = [kind for kind, algorithm in tile.algorithms.items() if algorithm not in known.get(kind, ())]
    if unknown:
        return f"the network has no {unknown[0]} that {tile.algorithms[unknown[0]]} could do"
    if tile.options and tile.options not in OPTIONS.get(platform, ()):
        return f"{tile.options} are no options for {platform}"
    costs = tile.costs
    if costs is not None and (costs.batch, len(costs.blocks_ms)) != (tile.size, depth):
        return f"expected costs of {depth} blocks for {tile.size} rows, got {len(costs.blocks_ms)} for {costs.batch}"
    if costs is not None and not set(costs.lookup_ms) <= names:
        return f"expected costs of {', '.join(sorted(names))}, got {', '.join(sorted(costs.lookup_ms))}"
    return None


MAX_ARRAY_BYTES = 8 * 2**30  # a manifest of a few lines may imply any number; compressed, so may a small file


def named_arrays(chain: Chain, caches: Iterable[Candidate]) -> dict[str, Any]:
    """Return every array under a flat name, such as "base/0/block/conv1/conv/kernel".

    Raises:
        InputError: Two arrays have the same name.
    """
    trees = {"base": chain, **{f"caches/{c.name}": c for c in caches}}
    named = [(f"{prefix}{_name(path)}", leaf) for prefix, tree in trees.items() for path, leaf in _leaves(tree)]
    found = {name: jnp.asarray(leaf) if isinstance(leaf, int | float | complex) else leaf for name, leaf in named}
    if len(found) < len(named):
        names = [name for name, _ in named]
        raise InputError(
            f"params: expected distinct names, got twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}"
        )
    return found


def _leaves(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:  # noqa: ANN401 (a Chain or a Candidate)
    return jax.tree_util.tree_leaves_with_path(tree)


def _name(path: tuple[Any, ...]) -> str:
    """Name a leaf; the first key is the field that holds all parameters."""
    return "".join(f"/{jax.tree_util.keystr((key,), simple=True)}" for key in path[1:])


def _filled(tree: Any, values: Mapping[str, Any], prefix: str) -> Any:  # noqa: ANN401 (a Chain or a Candidate)
    """Return the tree with the arrays of these names in the places of its leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, _: values[f"{prefix}{_name(path)}"], tree)


def _load_arrays(folder: Path, expected: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Load arrays of exactly these names, shapes and dtypes.

    Raises:
        BundleError: Sorted lists of missing, unexpected and misshapen names; or Orbax cannot read the folder.
    """
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
