"""Write a bundle, as a whole or not at all; add what tuning found on a device."""

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from gati_jax.caches import Candidate, choose, describe_predictor, describe_selector
from gati_jax.caches.candidate import fitted_rows
from gati_jax.certification import AnyLedger, Certificate, Ledger, find_ledger
from gati_jax.errors import InputError, as_path, check_kind
from gati_jax.files import digests, present, replacing
from gati_jax.models import AnyNetwork, Chain, check_is_chain, to_chain
from gati_jax.planning import CostTable, Plan
from gati_jax.profiling import Tuning

from .checks import check_bfloat16, check_origin, check_plans
from .load import named_arrays
from .manifest import (
    FITTED,
    FORMAT_VERSION,
    LOOKS,
    CacheEntry,
    Certificates,
    DeviceFile,
    Manifest,
    PlanEntry,
    Plans,
    Provenance,
    installed_versions,
    read_json,
    read_looks,
    read_manifest,
    write_json,
)


def save_bundle(
    path: Path | str,
    chain: Chain,
    candidates: Iterable[Candidate],
    plan: Plan,
    certificate: Certificate,
    *,
    also: Iterable[tuple[Plan, Certificate]] = (),
    bfloat16: Iterable[Certificate] = (),
    class_names: tuple[str, ...] = (),
    provenance: Provenance | None = None,
    costs: Iterable[CostTable] = (),
    ledger: AnyLedger = "user",
) -> None:
    """Save a bundle; a bundle at ``path`` is replaced as a whole, or stays as it is if saving fails.

    Args:
        path: The folder to write.
        chain: The base.
        candidates: The caches of all plans; others are left out.
        plan: Which caches, in which order, with which thresholds; used unless another plan is named.
        certificate: The certificate of ``plan``.
        also: Up to three more plans, each with its certificate, under other names. All of them must have been certified
            together.
        bfloat16: Certificates of some of the plans, by their names, in bfloat16: of the same look, see
            ``certify_numerics``.
        class_names: Names of all classes, in the order of the logits, or none.
        provenance: Date, versions, seed, data, config; None: the date, the versions, and what plan and certificate say
            of the data.
        costs: Measured costs.
        ledger: The one that the certificate was made with: its looks at the certify rows are copied into the bundle.

    Raises:
        InputError: A certificate is another plan's, the plans were not certified together or have the same name, a
            cache is of a kind that no bundle can hold, the certificate's ledger had lost looks that the bundle at
            ``path`` knows of, there are other class names than logits, ``path`` is something else than a bundle, or
            the chain's blocks are not those of its network, from which they would be rebuilt.
    """
    from orbax.checkpoint import v1 as ocp  # noqa: PLC0415 (takes seconds to import, and answering does without)

    path, pairs, halves = as_path("path", path), ((plan, certificate), *also), tuple(bfloat16)
    check_is_chain(chain)
    for one, its in pairs:
        check_kind("plan", one, Plan, "what gati_jax.plan returns")
        check_kind("certificate", its, Certificate, "what gati_jax.certify returns")
    caches = choose(candidates, tuple(check_plans(pairs)))
    check_bfloat16(pairs, halves)
    check_free(path)
    counted = find_ledger(ledger)
    _check_looks(path, certificate, counted)
    _check_chain(chain, class_names)
    for one, _ in pairs:
        _check_caches(one, chain, caches)
    entries = tuple(map(_entry, caches))
    with replacing(path) as folder:
        ocp.save(str(folder.absolute() / "arrays"), named_arrays(chain, caches))
        write_json(folder / "plans.json", Plans(plans=tuple(PlanEntry.of(one) for one, _ in pairs)))
        write_json(folder / "certificates.json", Certificates(certificates=tuple(c for _, c in pairs), bfloat16=halves))
        if len(fitted := fitted_rows(caches)):
            (folder / FITTED).write_bytes(fitted.astype("<u8").tobytes())
        if counted and (looks := counted.of(certificate.data_fingerprint)).looks:
            write_json(folder / LOOKS, looks)
        said = provenance or _provenance(certificate)
        write_json(folder / "manifest.json", _manifest(chain, entries, class_names, said, digests(folder)))
        _write_costs(folder, tuple(costs))


def _manifest(
    chain: Chain,
    caches: tuple[CacheEntry, ...],
    class_names: tuple[str, ...],
    provenance: Provenance,
    files: dict[str, str],
) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        network=chain.network if isinstance(chain.network, AnyNetwork) else None,
        normalization=chain.normalization,
        input_shape=chain.input_spec.shape,
        input_dtype=str(chain.input_spec.dtype),
        class_names=class_names,
        caches=caches,
        provenance=provenance,
        files=files,
    )


def _entry(cache: Candidate) -> CacheEntry:
    predictor, selector = describe_predictor(cache.predictor), describe_selector(cache.selector)
    return CacheEntry(name=cache.name, site=cache.site, predictor=predictor, selector=selector)


def _provenance(certificate: Certificate) -> Provenance:
    """Return what is known without being told."""
    data = {"select": certificate.select_fingerprint, "certify": certificate.data_fingerprint}
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=installed_versions(),
        data_fingerprints={name: digest for name, digest in data.items() if digest},
    )


def _write_costs(folder: Path, tables: tuple[CostTable, ...]) -> None:
    for device in sorted({table.device for table in tables}):
        of_device = DeviceFile(costs=tuple(table for table in tables if table.device == device))
        write_json(folder / "tuning" / f"{device}.json", of_device)


def _check_looks(path: Path, certificate: Certificate, counted: Ledger | None) -> None:
    """Check that a certificate counts the looks that the bundle at ``path`` knows of; from now on the ledger does."""
    if counted is None:
        return
    before = {look.key for look in counted.read().looks}
    counted.merge(read_looks(path))
    looks = [look for look in counted.of(certificate.data_fingerprint).looks if look.closed != "composed"]
    missed = sum(look.key not in before for look in looks)
    if missed and certificate.certified and certificate.recorded:
        lost = f"{counted.path or 'memory'}, which had lost {missed} that the bundle at {path} knows of"
        raise InputError(
            f"certificate: expected one that counts all looks at its rows, got one by the ledger in {lost}: load that"
            " bundle first, and certify again"
        )


def _check_chain(chain: Chain, class_names: tuple[str, ...]) -> None:
    """Check that a chain is what would be rebuilt from the bundle, and has as many classes as names."""
    if len(class_names) not in {0, chain.classes}:
        raise InputError(
            f"class_names: expected one for each of {chain.classes} logits, or none, got {len(class_names)}"
        )
    if isinstance(chain.network, AnyNetwork):
        rebuilt = to_chain(chain.network, tuple(chain.params))
        if (rebuilt.blocks, rebuilt.classifier) != (chain.blocks, chain.classifier):
            raise InputError(
                "chain: expected the blocks of its network, from which they are rebuilt, got other functions: give it"
                " network=None"
            )


def _check_caches(plan: Plan, chain: Chain, caches: tuple[Candidate, ...]) -> None:
    """Check that caches and chain are those of a plan."""
    sites = tuple(c.site for c in choose(caches, plan.names))
    if sites != plan.sites or plan.depth != len(chain):
        expected = f"sites {plan.sites} of {plan.depth} blocks"
        raise InputError(f"candidates: expected the plan's {expected}, got {sites} of {len(chain)}")
    check_origin(plan, chain, caches)


def check_free(path: Path) -> None:
    """Check that a bundle may be written: there is one, an empty folder, or nothing.

    Raises:
        InputError: There is something else.
    """
    if path.exists() and not (path.is_dir() and ((path / "manifest.json").is_file() or not any(path.iterdir()))):
        raise InputError(f"path: expected a bundle or nothing at {path}, got something else, which is left alone")


def save_tuning(path: Path | str, tuning: Tuning) -> None:
    """Add to a saved bundle what ``tune`` found on a device; an older tuning of that device is replaced.

    Saving the bundle anew drops it, for the network may be another one.

    Args:
        path: The bundle's folder.
        tuning: See ``tune``.

    Raises:
        BundleError: There is no bundle at ``path``, or its file for the device is damaged.
    """
    folder = present(as_path("path", path))
    read_manifest(folder)
    file = folder / "tuning" / f"{tuning.device}.json"
    device = read_json(file, DeviceFile) if file.is_file() else DeviceFile()
    write_json(file, device.model_copy(update={"tuning": tuning}))
