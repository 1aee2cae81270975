"""Read a bundle from its folder, believing nothing that it says before it is checked."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ._arrays import arrays, filled, load_arrays
from ._bundle import Bundle, check_origin
from ._devices import read_devices
from ._errors import BundleError, InputError
from ._folder import check_files, present
from ._manifest import CacheEntry, Certificates, Manifest, Plans, read_json, read_manifest
from ._plans import CertifiedPlans, check_plans, sites_of
from .caches import Candidate, build_predictor, build_selector
from .models import Chain, fold, init, to_chain


def load_bundle(path: Path | str, *, chain: Chain | None = None) -> Bundle:
    """Load a bundle.

    Args:
        path: The folder.
        chain: The base's structure, for a bundle of a user's own chain; its parameters are replaced by the saved ones.

    Raises:
        BundleError: The folder is no bundle, is incomplete or damaged, has a newer format, or belongs to another chain.
    """
    folder = present(Path(path))
    manifest = read_manifest(folder)
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
    values = load_arrays(folder / "arrays", arrays(skeleton, caches))
    base = filled(skeleton, values, "base")
    caches = tuple(filled(cache, values, f"caches/{cache.name}") for cache in caches)
    devices = read_devices(folder / "tuning", base, caches)
    try:
        for plan, _ in pairs:
            check_origin(plan, base, caches)
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
