"""Fit, plan and certify caches for a frozen base: DIR/bundle.

The ``certify`` split is opened once the plan, with its whole path of thresholds, is fixed; a ledger counts every time
that happened, whatever the folder (see docs/explanation/certificates.md).
"""

import itertools
import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64
from scipy.stats import binom

import gati_jax
from gati_jax import Bundle, Chain, Head, InputError, Ledger, ReplayTable, data
from gati_jax.bundle.manifest import Provenance, read_looks
from gati_jax.bundle.save import check_free
from gati_jax.certification import AnyLedger, Certificate, count_duplicates, find_ledger, tightest
from gati_jax.evaluation.records import CertificateResult, record_of
from gati_jax.fitting import Candidates, network_head
from gati_jax.imports import load_chain
from gati_jax.models import fold, import_state_dict, read_weights, to_chain
from gati_jax.planning import Composition, CostTable, Plan, cascade_ms
from gati_jax.profiling import (
    BFLOAT16,
    Tuning,
    bfloat16_programs,
    onnx_tuning,
    replays_in_bfloat16,
    replays_on_onnx,
    run_by,
    tuning_for,
)

from . import cli, zoo
from .config import Base, Config
from .exploration import check_fit, explore
from .results import BaseOnSelect, Caches, PlannedCache, PlanResult, Predicted
from .source import Source

EXAMPLE = (
    "python -m train.caches --config configs/cifar10_resnet56.toml --out runs/r56"
    " --data.dir ../shared/data/tfds --base.weights ../shared/data/weights/resnet56-cifar10.safetensors"
)
_log = logging.getLogger("train.caches")  # not __name__, which is "__main__"


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments, config = cli.parse(parser(), Config, argv)
    config = zoo.completed(config)
    splits = config.data.splits.model_dump()
    data.check_disjoint(splits)
    saw_certify = base_saw_certify(config)
    # Refused before hours of work.
    path = arguments.out / "bundle"
    check_free(path)
    chain = read_base(config.base, own=True)
    parts = load_parts(config.data, {name: splits[name] for name in ("fit", "select", "certify")}, chain)
    check_certify(parts["certify"], config, arguments.ledger, arguments.out)
    check_fit(config, parts)
    heads = [*(head.build() for head in config.fit.heads), *small_networks(config, chain)]
    base = base_on_select(config.base, chain, parts["select"])

    found = explore(config, chain, heads, parts, arguments.out)
    candidates, select, costs = found.candidates, found.select, found.costs
    _log.info("fitted %d candidates in %.0f s", len(candidates), found.fit_seconds)
    composed = {name: (*found.plan(config, epsilon), epsilon) for name, epsilon in config.plan.epsilons.items()}
    plans = {name: (plan, epsilon) for name, (plan, _, epsilon) in composed.items()}
    chosen = candidates.take(tuple(dict.fromkeys(name for plan, _ in plans.values() for name in plan.names)))

    # From here on nothing may be chosen: the plans are fixed, and the certify split is opened.
    certify = gati_jax.replay(chain, chosen, parts["certify"].images, labels=parts["certify"].labels)
    on_onnx = also_certified(found.tuning, certify, chain, chosen, parts["certify"].images)
    halves = in_bfloat16(config, certify, chain, chosen, parts["certify"].images)
    numerics = gati_jax.certify_numerics(
        plans, certify, halves, config.plan.delta, ledger=arguments.ledger,
        reveal=arguments.reveal, base_saw_data=saw_certify,
        groups=parts["certify"].groups, group_tolerance=config.plan.group_tolerance,
        duplicates=True,  # what `count_duplicates` let pass above
        arithmetics=on_onnx,
    )  # fmt: skip
    certificates = numerics["reference"]
    default = tightest(certificates)
    plan, certificate = plans[default][0], certificates[default]
    also = [(plans[name][0], certificates[name]) for name in plans if name != default]
    rounded = numerics.get(BFLOAT16, {})
    gati_jax.save_bundle(
        path, chain, chosen, plan, certificate, also=also, bfloat16=rounded.values(),
        class_names=parts["fit"].class_names, provenance=provenance(config, parts),
        costs=[costs], ledger=arguments.ledger,
    )  # fmt: skip
    replays = certify, *next(iter(on_onnx.values()), ())
    bundle = gati_jax.load_bundle(path, chain=chain)
    keep_tuning(path, bundle, found.tuning, parts["certify"].images, replays, rounds=config.measure_rounds)

    result = Caches(
        **dict(summary(select, certify, costs, plan, certificate, rounded)),
        also=tuple(summary(select, certify, costs, *other, rounded) for other in also),
        base=base,
        bundle=str(path),
        fit_seconds=found.fit_seconds,
        epochs=candidates.epochs,
        dropped=found.dropped,
        ranking=tuple(found.ranking(config.plan.epsilon)),
        composition={name: composition_entry(composition) for name, (_, composition, _) in composed.items()},
    )
    result.write(arguments.out / "caches.json", print_json=arguments.json)
    if not arguments.json:
        print(f"{config.base.title} on {config.data.name}")
        show(result, [(plan, certificate), *also])
    for sentence in certificate.stays_off if arguments.json else ():  # else it was printed
        _log.warning(sentence)


def parser() -> cli.Parser:
    """Return the command line's parser."""
    p = cli.config_parser(Config, "Fit, plan and certify caches for a frozen base.", EXAMPLE, looks=True)
    cli.add_chain(p)
    return p


def load_parts(source: Source, splits: Mapping[str, str], chain: Chain) -> dict[str, data.Dataset]:
    """Load splits that a base takes and that share no rows and no groups; warn of near copies among them.

    Raises:
        InputError: A split has other images or classes than the base, or rows or a group of another split.
    """
    parts = {name: source.load(rows, own=True) for name, rows in splits.items()}
    for name, part in parts.items():
        part.check(f"data.splits.{name}", chain.input_spec.shape, chain.classes)
    data.check_whole_groups({name: part.groups for name, part in parts.items()})
    rows = {name: data.row_digests(part.images) for name, part in parts.items()}
    for one, other in itertools.combinations(parts, 2):
        data.check_distinct_rows(rows[one], rows[other], names=(one, other))
    # Certify rows that were made of each other, as by augmentation, are counted as independent; equal ones are refused.
    within = [("certify", "certify")] if "certify" in parts else []
    for one, other in [*itertools.combinations(parts, 2), *within]:
        images = [parts[name].images for name in (one, other)]
        if images[0].dtype != np.uint8 or images[0].ndim != len("nhwc"):
            continue
        if one == other:
            near = data.count_near_copies(data.take(images[0], np.unique(rows[one], return_index=True)[1]))
        else:
            near = data.count_near_copies(images[1], images[0])
        if near:
            _log.warning(
                "%d of %d rows of %s are near copies of rows of %s (a little noise, or mirrored): leave them out unless"
                " requests repeat themselves like this",
                *(near, len(parts[other]), other, one),
            )
    return parts


def provenance(config: Config, parts: Mapping[str, data.Dataset]) -> Provenance:
    """Return what a bundle says of how it was made."""
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=cli.versions(),
        seed=config.seed,
        data_fingerprints={name: data.fingerprint(data.row_digests(part.images)) for name, part in parts.items()},
        command=sys.argv,
        config=config.model_dump(mode="json"),
    )


def also_certified(
    tuning: Tuning, table: ReplayTable, chain: Chain, candidates: Candidates, images: data.Images
) -> dict[str, Sequence[ReplayTable]]:
    """Return replays in the arithmetic that plans were made for, where it runs as it will answer: on ONNX Runtime."""
    if tuning.backend != "onnxruntime":
        return {}
    _log.info("replaying certify on ONNX Runtime")
    caches = sorted(candidates, key=lambda cache: cache.site)
    return {tuning.programs: replays_on_onnx(table, chain, caches, images)}


def in_bfloat16(
    config: Config, table: ReplayTable, chain: Chain, candidates: Candidates, images: data.Images
) -> dict[str, tuple[str, Sequence[ReplayTable]]]:
    """Return replays in bfloat16, if plans are to be certified in it as well."""
    if not config.plan.bfloat16:
        return {}
    _log.info("replaying certify in bfloat16")
    caches = sorted(candidates, key=lambda cache: cache.site)
    return {BFLOAT16: (bfloat16_programs(), replays_in_bfloat16(table, chain, caches, images))}


def keep_tuning(
    path: Path, bundle: Bundle, tuning: Tuning, certify: data.Images, replays: Sequence[ReplayTable], *, rounds: int
) -> None:
    """Keep in a new bundle what its plans were made for, with its costs and a bound of how its answers differ.

    Args:
        path: Of the bundle.
        bundle: Loaded from there.
        tuning: What its plans were made for.
        certify: Images.
        replays: Of these images: the certified one, then those of ``also_certified``.
        rounds: See ``measure_costs``.
    """
    if tuning.is_reference or len(bundle.compared) == 1:
        return
    if tuning.backend == "onnxruntime":
        tuning = onnx_tuning(bundle.chain, bundle.caches)
    else:
        tuning = tuning_for(tuning, bundle.chain, bundle.caches)
    tuning = run_by(tuning, bundle.cascade).measured(rounds=max(5, rounds // 3))
    _log.info("comparing the answers of %s with the reference arithmetic's", tuning.backend)
    gati_jax.save_tuning(
        path, gati_jax.check_tuning(bundle, tuning, certify, certified=replays[0], replays=replays[1:])
    )


def check_certify(certify: data.Dataset, config: Config, ledger: AnyLedger, out: Path) -> None:
    """Check that certify rows are independent of each other, but for their groups, and open for another look.

    Raises:
        InputError: They are not; or bad groups are to be counted where there are no groups.
    """
    if config.plan.group_tolerance is not None and certify.groups is None:
        raise InputError(f"plan.group_tolerance: expected data with groups, got none from {config.data.name}")
    rows = data.row_digests(certify.images)
    count_duplicates(rows, drawn=config.plan.repeats)
    check_open(ledger, rows, out)


def check_open(ledger: AnyLedger, rows: UInt64[np.ndarray, " n"], out: Path) -> None:
    """Check that certify rows are open for another look, unless a run in ``out`` is repeated, which is none.

    A run in a new folder measures costs anew, and so comes to another plan. Older versions kept looks in ``out``.

    Raises:
        InputError: They are closed.
    """
    counted, older = find_ledger(ledger), out / "looks.json"
    if counted and older.is_file():
        counted.merge(Ledger(older).read())
    if counted:  # which may have been lost, with a container say, where the bundle was not
        counted.merge(read_looks(out / "bundle"))
    if counted and not (out / "costs.json").exists() and (why := counted.closed(rows)):
        raise InputError(
            f"data.splits.certify: expected rows that are open for a look, but {why}; give fresh rows, or --ledger FILE"
            " for a study that owes nothing to that look"
        )


_ALWAYS, _RISK = 0.99, 0.05


def base_on_select(config: Base, chain: Chain, select: data.Dataset) -> BaseOnSelect:
    """Return how good the base is, before anything is fitted: caches of a broken base are certified like any others.

    Raises:
        InputError: It guesses, or gives almost always the same answer, and the config does not accept that.
    """
    table = gati_jax.replay(chain, (), select.images, labels=select.labels)
    n, commonest = len(table), float(np.bincount(table.answers).max() / len(table))
    correct = None if table.labels is None else int((table.answers == table.labels).sum())
    base = BaseOnSelect(accuracy_select=None if correct is None else correct / n, n=n, commonest_answer=commonest)
    why = f"one answer for {commonest:.1%} of select's images" if commonest > _ALWAYS else ""
    poor = 1 / chain.classes + min(0.5 / chain.classes, 0.05)  # half as good again as guessing, of two classes 55 %
    if not why and correct is not None and binom.sf(correct - 1, n, poor) > _RISK:
        why = f"{correct / n:.1%} of {n} correct on select, where guessing gives {1 / chain.classes:.1%}"
    if why and not config.accept_low_accuracy:
        raise InputError(
            f"base: expected one that has learned the classes, got {why}: check base.weights, base.normalization"
            f" ({chain.normalization}) and the labels, or give --base.accept-low-accuracy true"
        )
    _log.info(base_line(base))
    return base


def base_line(base: BaseOnSelect) -> str:
    """Describe the base."""
    accuracy = "of unknown accuracy" if base.accuracy_select is None else f"{base.accuracy_select:.2%} accurate"
    return f"base: {accuracy} on select ({base.n} images); its commonest answer has {base.commonest_answer:.1%} of them"


def base_saw_certify(config: Config) -> bool:
    """Return whether the base was trained on rows of the certify split."""
    return bool(overlapping(config.data.splits.certify, config.data.base_trained_on))


def overlapping(rows: str, parts: Sequence[str]) -> list[str]:
    """Return the parts that have any of these rows."""
    return [part for part in parts if data.Rows.parse(rows).overlaps(data.Rows.parse(part))]


def summary(
    select: ReplayTable, certify: ReplayTable, costs: CostTable, plan: Plan, certificate: Certificate,
    rounded: Mapping[str, Certificate],
) -> PlanResult:  # fmt: skip
    """Return what caches.json says of a plan: its caches, what was certified (also, by name, in bfloat16), its time."""
    thresholds = plan.thresholds(certificate.step)
    agreement = dict(zip(select.names, select.agrees.mean(1).tolist(), strict=True))
    planned = [
        PlannedCache(name=name, site=site, threshold=t if np.isfinite(t) else None, agreement=agreement[name])
        for name, site, t in zip(plan.names, plan.sites, thresholds.tolist(), strict=True)
    ]
    return PlanResult(
        candidates=agreement,
        plan=tuple(planned),
        sites=tuple(cache.site for cache in planned if cache.threshold is not None),
        certificate=record_of(CertificateResult, certificate),
        bfloat16=record_of(CertificateResult, rounded[certificate.name]) if certificate.name in rounded else None,
        predicted=Predicted.of(costs, cascade_ms=cascade_ms(certify.take(plan.names), thresholds, costs)),
    )


def composition_entry(composition: Composition) -> dict[str, Any]:
    """Return how good a composition is known to be, and why it left the other candidates out."""
    keys = ("gap", "proved", "grid", "nodes", "seconds")
    return {key: getattr(composition, key) for key in keys} | {"refused": dict(composition.refused)}


def show(result: Caches, pairs: Sequence[tuple[Plan, Certificate]]) -> None:
    """Print the base's accuracy, the plans with their certificates, and what they are predicted to save."""
    if result.base:
        print(base_line(result.base))
    for (plan, certificate), one in zip(pairs, (result, *result.also), strict=True):
        predicted = one.predicted
        print(f"\n{certificate.name}: {plan.summary(certificate.step)}\n{certificate.summary()}")
        if one.bfloat16:
            wrong = f"{one.bfloat16.disagreements} of {one.bfloat16.n} certify requests disagree"
            print(f"in bfloat16: {f'certified, {wrong}' if one.bfloat16.certified else 'NOT CERTIFIED'}")
        print(
            f"predicted {predicted.full_ms:.3f} ms -> {predicted.cascade_ms:.3f} ms on {predicted.device},"
            f" batch {predicted.batch}"
        )
    for name, c in result.composition.items():
        known = "nothing is better" if c["proved"] else f"something may be {c['gap']:.1%} faster"
        print(f"composition {name}: {known}, with {c['grid']} thresholds a cache ({c['seconds']:.0f} s)")
    print(f"Bundle: {result.bundle}")


def small_networks(config: Config, chain: Chain) -> list[Head]:
    """Read the networks that come before the base, ``chain``, as heads at site 0."""
    heads = []
    for small in config.fit.networks:
        trained_on = zoo.seen(zoo.read_entry(small.weights), small.trained_on, config.data.name)
        check_unseen(small.name, trained_on, config)
        network, base = small.architecture(chain), chain.normalization
        variables = import_state_dict(network, read_weights(small.weights))
        if base is not None:  # else it was refused
            trained = small.normalization or base
            heads.append(network_head(small.name, network, variables, trained=trained, base=base))
    return heads


def check_unseen(name: str, trained_on: Sequence[str], config: Config) -> None:
    """Check that a small network was trained on none of the rows on which it is evaluated: it would look too good."""
    for split in ("select", "certify", "test"):
        where = getattr(config.data.splits, split)
        if seen := overlapping(where, trained_on):
            raise InputError(
                f"fit.networks: expected {name} to be trained on other rows than {split} ({where}), got {seen}"
            )


def read_base(base: Base, *, own: bool = False) -> Chain:
    """Read the base's weights into its inference chain.

    Args:
        base: Of a config.
        own: Whether it may be a function of the user's own that returns the chain. Never if the config comes from a
            bundle, which may not decide on what is imported.

    Raises:
        InputError: There are no weights, or they are not the network's; the function is refused or fails.
    """
    if base.chain is not None:
        if own:
            return load_chain(base.chain, "base.chain")
        raise InputError(f"base.chain: expected a network of this library here, got {base.chain}")
    if base.weights is None:
        raise InputError("base.weights: expected a .safetensors file (train one with gati-jax train-base), got nothing")
    network = base.architecture()
    variables = import_state_dict(network, read_weights(base.weights))
    return to_chain(network, fold(variables), base.normalize())


if __name__ == "__main__":
    cli.run(main)
