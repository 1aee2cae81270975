"""Reproduce the papers' experiment, from exploration to the comparison of policies: DIR/reproduction.json.

Plans are composed on ``select`` and certified on ``certify``. On ``test`` nothing is chosen but the step of one figure,
"read off test", because the papers read theirs off such curves. What a request costs is measured: the way to every exit
of every policy is timed, all of them taking turns, under one tuning.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import gati_jax
from gati_jax import Certificate, Chain, InputError, Plan, ReplayTable, data
from gati_jax.certification import count_duplicates
from gati_jax.profiling import device_name
from train import cli, zoo
from train.caches import base_saw_certify, composition_entry, load_base, small_networks
from train.config import Config
from train.exploration import Explored, explore
from train.records import count_looks, record_look

from .evaluation import BASE, Open, exit_times, exits_summary, judge, measure
from .figures import draw
from .policies import (
    Contestant,
    accuracy,
    certified_step,
    contestants,
    farthest_on_test,
    logits_of,
    oracle_exits,
    step_at_accuracy,
)

EXAMPLE = (
    "python -m train.reproduce --config configs/repro_resnet18.toml --out runs/repro18"
    " --data.dir ../shared/data/tfds --base.weights ../shared/data/weights/resnet18-cifar10.safetensors"
)
ACCURACY_SHARE = 0.97  # the paper's operating point
FARTHEST = 0.10  # disagreement at which the path for it ends
DEFAULT = "default plan"
ROUNDS = 25  # of the ways to every exit
_log = logging.getLogger("train.reproduce")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments, config = cli.parse_experiment(argv, "Reproduce the papers' experiment.", EXAMPLE)
    config = zoo.completed(config)
    splits = config.data.splits.model_dump()
    data.check_disjoint(splits)
    chain = load_base(config)
    parts = {name: data.load(config.data.name, rows, config.data.dir) for name, rows in splits.items()}
    if any(part.labels is None for part in parts.values()):
        raise InputError(f"data: expected labels, for accuracies are compared, got none in {config.data.name}")
    count_duplicates(
        data.row_digests(parts["certify"].images), drawn=config.plan.repeats
    )  # refused before hours of work
    heads = [*(head.build() for head in config.fit.heads), *small_networks(config)]
    started = time.perf_counter()
    found = explore(config, chain, heads, parts, arguments.out)
    _log.info("explored %d candidates in %.0f s", len(found.candidates), time.perf_counter() - started)
    tables = {"select": found.select} | {
        name: gati_jax.replay(chain, found.candidates, parts[name].images, labels=parts[name].labels)
        for name in ("certify", "test")
    }
    result = {
        "dataset": config.data.name,
        "network": config.base.network,
        "splits": splits,
        "base": {"accuracy": accuracy(tables["test"].answers, tables["test"])},
        "explored": {
            "epochs": found.candidates.epochs,
            "ranking": found.ranking(config.plan.epsilon),
            "dropped": found.dropped,
        },
        **compare(config, chain, found, tables, {name: part.images for name, part in parts.items()}, arguments.out),
        "device": device_name(),
        "command": sys.argv,
        "versions": cli.versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    cli.write_result(arguments.out / "reproduction.json", result)
    draw(result, arguments.out / "figures")
    if arguments.json:
        print(json.dumps(result))
    else:
        found.show(f"{config.base.network} on {config.data.name}: candidates", config.plan.epsilon)
        show(result)
        print(f"written: {arguments.out / 'reproduction.json'}, {arguments.out / 'figures'}")


def compare(
    config: Config,
    chain: Chain,
    found: Explored,
    tables: Mapping[str, ReplayTable],
    images: Mapping[str, np.ndarray],
    out: Path,
) -> dict[str, Any]:
    """Compose, certify and time the default plan and every policy."""
    epsilon, delta = config.plan.epsilon, config.plan.delta
    plan, composition = found.plan(config, epsilon)
    far, _ = found.plan(config, FARTHEST)
    looks = count_looks(record_look(out / "looks.json", tables["certify"].rows, {DEFAULT: (plan, epsilon)}, delta))
    logits = logits_of(chain, found.candidates, {name: images[name] for name in tables})
    field = contestants(found.candidates, tables, logits, found.costs, ours=plan.sites, epsilon=epsilon)
    loose = contestants(found.candidates, tables, logits, found.costs, ours=far.sites, epsilon=FARTHEST)
    certified, accurate = [_ours(plan, tables), *field], [_ours(far, tables), *loose]
    options = {"looks": looks, "base_saw_data": base_saw_certify(config), "duplicates": True}  # what main let pass
    certificates = {c.name: certified_step(c, epsilon, delta, **options) for c in certified}
    steps = {
        "certified": [certificates[c.name].step for c in certified],
        "accurate": [step_at_accuracy(c, ACCURACY_SHARE) for c in accurate],
    }
    standings = {
        group: [(c, Open.of(c.plan, step)) for c, step in zip(field, steps[group], strict=True)]
        for group, field in (("certified", certified), ("accurate", accurate))
    }
    ways = {f"{group} {c.name}": on.names for group, rows in standings.items() for c, on in rows}
    ms = exit_times(chain, found.candidates, {BASE: (), **ways}, found.tile, images["test"][0], ROUNDS)
    oracle = oracle_exits(tables["test"])
    measured = {
        "certified": Open.of(plan, steps["certified"][0]),
        "accurate": Open.of(far, steps["accurate"][0]),
        "read off test": Open.of(far, farthest_on_test(accurate[0], ACCURACY_SHARE)),
    }
    return {
        "epsilon": epsilon,
        "delta": delta,
        "looks": looks,
        "composition": composition_entry(composition),
        "candidates": len(found.candidates),
        "oracle": exits_summary(oracle, found) | {"half_share": float((oracle <= len(chain) / 2).mean())},
        "certified": {
            "rows": judge(standings["certified"], ms, "certified", found),
            "disagreements": {name: [one.disagreements, one.n] for name, one in certificates.items()},
            "certificates": {name: _certificate_entry(one) for name, one in certificates.items()},
        },
        "accurate": {"rows": judge(standings["accurate"], ms, "accurate", found)},
        "measured": {name: measure(chain, found, on, images["test"]) for name, on in measured.items()},
    }


def _certificate_entry(certificate: Certificate) -> dict[str, Any]:
    keys = ("epsilon", "delta", "n", "disagreements", "step", "certified", "looks", "method", "numerics")
    return {key: getattr(certificate, key) for key in (*keys, "base_saw_data")}


def _ours(plan: Plan, tables: Mapping[str, ReplayTable]) -> Contestant:
    own = {name: table.take(plan.names) for name, table in tables.items()}
    return Contestant(name=DEFAULT, heads="composed", plan=plan, tables=own)


def show(result: dict[str, Any]) -> None:
    """Print the comparison."""
    for group, title in (
        ("certified", f"Certified at {result['epsilon']:.1%} disagreement"),
        ("accurate", f"At {ACCURACY_SHARE:.0%} of the base's accuracy (chosen on certify by one standard error)"),
    ):
        rows = [
            (
                r["policy"],
                r["heads"],
                f"{r['mean_ms']:.3f}",
                f"{r['full_ms'] / r['mean_ms']:.2f}",
                f"{r['slower_by']['mean_ms']:.3f} [{r['slower_by']['low_ms']:.3f}, {r['slower_by']['high_ms']:.3f}]",
                f"{r['saved_share']:.1%}",
                f"{r['disagreement']:.2%}",
                f"{r['accuracy'] / result['base']['accuracy']:.2%}",
            )
            for r in result[group]["rows"]
        ]
        columns = ("policy", "heads", "ms", "gain", "slower by ms", "saved", "disagree", "of base's accuracy")
        cli.show(title, columns, rows)
    oracle, measured = result["oracle"], result["measured"]
    print(f"oracle: saves {oracle['saved_share']:.1%}; {oracle['half_share']:.2%} could save half of the blocks")
    for name, m in measured.items():
        share = m["cache_bytes"] / m["base_bytes"]
        times = f"{m['full_ms']:.2f} -> {m['cascade_ms']:.2f} ms on {m['requests']} requests, spread {m['spread']:.0%}"
        print(f"{name}: measured {m['speedup']:.2f} ({times}); caches take {share:.1%} of the base's bytes")
