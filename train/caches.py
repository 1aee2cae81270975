"""Fit, plan and certify caches for a frozen base: DIR/bundle.

The ``certify`` split is opened once the plan, with its whole path of thresholds, is fixed; DIR/looks.json remembers
every time that happened.
"""

import dataclasses
import json
import logging
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

import gati_jax
from gati_jax import Chain, CostTable, InputError, data
from gati_jax._manifest import Provenance
from gati_jax.caches import choose
from gati_jax.fitting import Candidates
from gati_jax.models import fold, import_state_dict, read_weights, to_chain
from gati_jax.planning import cascade_ms
from gati_jax.runtime.measure import device_name

from . import cli
from .config import Config

EXAMPLE = (
    "python -m train.caches --config configs/cifar10_resnet56.toml --out runs/r56"
    " --data.dir ../shared/data/tfds --base.weights ../shared/data/weights/resnet56-cifar10.safetensors"
)
CERTIFICATE_KEYS = ("epsilon", "delta", "n", "certified", "disagreements", "looks")
_log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments, config = cli.parse_experiment(argv, "Fit, plan and certify caches for a frozen base.", EXAMPLE)
    splits = config.data.splits.model_dump()
    data.check_disjoint(splits)

    # --- Base and data ----------------------------------------------------------------------------------------------
    chain = load_base(config)
    parts = {name: data.load(config.data.name, splits[name], config.data.dir) for name in ("fit", "select", "certify")}

    # --- Fit --------------------------------------------------------------------------------------------------------
    started = time.perf_counter()
    candidates = gati_jax.fit(
        chain,
        parts["fit"].images,
        select=parts["select"].images,
        heads=[head.build() for head in config.fit.heads],
        config=config.fit.build(config.seed),
        checkpoint=arguments.out / "checkpoints",
    )
    fit_seconds = time.perf_counter() - started
    _log.info("fitted %d candidates in %.0f s", len(candidates), fit_seconds)

    # --- Plan -------------------------------------------------------------------------------------------------------
    select = gati_jax.replay(chain, candidates, parts["select"].images, labels=parts["select"].labels)
    costs = measured_costs(arguments.out / "costs.json", chain, candidates, config)
    plan = gati_jax.plan(
        select, costs, epsilon=config.plan.epsilon, delta=config.plan.delta, max_sites=config.plan.max_sites
    )
    chosen = choose(candidates, plan.names)

    # --- Certify ----------------------------------------------------------------------------------------------------
    looks = record_look(
        arguments.out / "looks.json", data.fingerprint(data.row_digests(parts["certify"].images)), plan.hash
    )
    certify = gati_jax.replay(chain, chosen, parts["certify"].images, labels=parts["certify"].labels)
    seen = any(
        data.Rows.parse(splits["certify"]).overlaps(data.Rows.parse(part)) for part in config.data.base_trained_on
    )
    certificate = gati_jax.certify(
        plan, certify, config.plan.epsilon, config.plan.delta, looks=looks, base_saw_data=seen
    )
    for sentence in certificate.stays_off:
        _log.warning(sentence)

    # --- Bundle -----------------------------------------------------------------------------------------------------
    provenance = Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=cli.versions(),
        seed=config.seed,
        data_fingerprints={name: data.fingerprint(data.row_digests(part.images)) for name, part in parts.items()},
        command=sys.argv,
        config=config.model_dump(mode="json"),
    )
    gati_jax.save_bundle(
        arguments.out / "bundle",
        chain,
        chosen,
        plan,
        certificate,
        class_names=parts["fit"].class_names,
        provenance=provenance,
        costs=[costs],
    )

    # --- Result -----------------------------------------------------------------------------------------------------
    thresholds = plan.thresholds(certificate.step)
    predicted = cascade_ms(certify, thresholds, costs)
    result = {
        "bundle": str(arguments.out / "bundle"),
        "fit_seconds": fit_seconds,
        "candidates": {name: float(agrees) for name, agrees in zip(select.names, select.agrees.mean(1), strict=True)},
        "sites": [site for site, threshold in zip(plan.sites, thresholds, strict=True) if np.isfinite(threshold)],
        "certificate": {name: getattr(certificate, name) for name in CERTIFICATE_KEYS},
        "predicted": {"full_ms": costs.full_ms, "cascade_ms": predicted},
    }
    cli.write_result(arguments.out / "caches.json", result)
    if arguments.json:
        print(json.dumps(result))
        return
    rows = [
        (name, site, t, float(a))
        for name, site, t, a in zip(
            plan.names, plan.sites, thresholds.tolist(), select.take(plan.names).agrees.mean(1), strict=True
        )
    ]
    cli.show(
        f"Plan for {config.base.network} on {config.data.name}",
        ("cache", "site", "threshold", "agreement on select"),
        rows,
    )
    print(certificate_line(result["certificate"]))
    print(
        f"predicted {costs.full_ms:.3f} ms -> {predicted:.3f} ms a request on {costs.device}, batch 1."
        f" Bundle: {result['bundle']}"
    )


def certificate_line(c: dict) -> str:
    """Say what was certified."""
    if not c["certified"]:
        return f"NOT certified at epsilon {c['epsilon']}: every cache stays off, the base answers"
    return (
        f"certified: at most {c['epsilon']:.1%} of requests disagree with the base (confidence {1 - c['delta']:.0%};"
        f" {c['disagreements']} of {c['n']} certify requests did)"
    )


def load_base(config: Config) -> Chain:
    """Read the base's weights into its inference chain.

    Raises:
        InputError: No weights are named, or they are another network's.
    """
    if config.base.weights is None:
        msg = "base.weights: expected a .safetensors file (train one with python -m train.base), got nothing"
        raise InputError(msg)
    network = config.base.resnet()
    variables = import_state_dict(network, read_weights(config.base.weights))
    return to_chain(network, fold(variables), config.base.normalize())


def measured_costs(path: Path, chain: Chain, candidates: Candidates, config: Config) -> CostTable:
    """Measure, or take what an earlier run of the same experiment measured here.

    Times never repeat exactly. A second measurement could change the plan, and cost a second look at ``certify``.
    """
    identity = {"fit": config.fit.model_dump_json(), "base": config.base.model_dump_json(), "device": device_name()}
    if path.is_file():
        saved = json.loads(path.read_text())
        if saved["identity"] == identity:
            _log.info("costs as measured before (remove %s to measure anew)", path)
            return TypeAdapter(CostTable).validate_json(json.dumps(saved["costs"]))
    costs = gati_jax.measure_costs(chain, candidates, rounds=config.measure_rounds)
    cli.write_result(path, {"identity": identity, "costs": dataclasses.asdict(costs)})
    return costs


def record_look(path: Path, fingerprint: str, plan_hash: str) -> int:
    """Write down that these rows are opened to certify this plan, before they are; return how many plans that makes."""
    try:
        looks = TypeAdapter(dict[str, list[dict[str, str]]]).validate_json(path.read_bytes())["looks"]
    except FileNotFoundError:
        looks = []
    except (ValidationError, KeyError) as error:
        msg = f"looks: {path} is damaged, and without it nobody knows how often the certify data has been opened"
        raise InputError(msg) from error
    look = {"data_fingerprint": fingerprint, "plan_hash": plan_hash}
    if look not in looks:  # the same plan again learns nothing new
        looks.append(look)
        cli.write_result(path, {"looks": looks})
    return sum(entry.get("data_fingerprint") == fingerprint for entry in looks)


if __name__ == "__main__":
    cli.run(main)
