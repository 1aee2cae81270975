"""Reproduce the papers' experiment, from exploration to the comparison of policies: DIR/reproduction.json.

Plans are composed on ``select`` and certified on ``certify``; the ``test`` split is only looked at. What a request
costs is measured: the way to every exit of every policy is timed, all of them taking turns, under one tuning.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gati_jax
from gati_jax import Chain, InputError, Plan, ReplayTable, data
from gati_jax.planning import oracle_exits, replay_plan
from gati_jax.runtime import Cascade, TunedCascade, Tuning, device_name, measure_batches

from . import cli
from .caches import composition_entry, load_base, small_networks
from .config import Config
from .contest import Contestant, certified_step, contestants, exit_times, logits_of, paired, step_at_accuracy
from .exploration import Explored, explore
from .figures import draw
from .records import count_looks, record_look

EXAMPLE = (
    "python -m train.reproduce --config configs/repro_resnet18.toml --out runs/repro18"
    " --data.dir ../shared/data/tfds --base.weights ../shared/data/weights/resnet18-cifar10.safetensors"
)
ACCURACY_SHARE = 0.97  # the paper's operating point
FARTHEST = 0.10  # disagreement at which the path for it ends
DEFAULT = "default plan"
ROUNDS = 25  # of the ways to every exit
TIMED, TURNS = 500, 5  # requests, from all over the test split, and how often each
_log = logging.getLogger("train.reproduce")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments, config = cli.parse_experiment(argv, "Reproduce the papers' experiment.", EXAMPLE)
    splits = config.data.splits.model_dump()
    data.check_disjoint(splits)
    chain = load_base(config)
    parts = {name: data.load(config.data.name, rows, config.data.dir) for name, rows in splits.items()}
    if any(part.labels is None for part in parts.values()):
        msg = f"data: expected labels, for accuracies are compared, got none in {config.data.name}"
        raise InputError(msg)
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
    certified = [_ours(plan, tables), *field]
    accurate = [_ours(far, tables), *loose]
    timed = {f"certified {c.name}": c.plan for c in certified} | {f"accurate {c.name}": c.plan for c in accurate}
    ms = exit_times(chain, found.candidates, timed, found.tile, images["test"][0], rounds=ROUNDS)
    steps = {c.name: certified_step(c, epsilon, delta, looks) for c in certified}
    oracle = oracle_exits(tables["test"])
    return {
        "epsilon": epsilon,
        "delta": delta,
        "looks": looks,
        "composition": composition_entry(composition),
        "candidates": len(found.candidates),
        "oracle": _exits_summary(oracle, found) | {"half_share": float((oracle <= len(chain) / 2).mean())},
        "certified": _rows(certified, {c.name: steps[c.name].step for c in certified}, ms, "certified", found)
        | {"disagreements": {name: [one.disagreements, one.n] for name, one in steps.items()}},
        "accurate": _rows(
            accurate, {c.name: step_at_accuracy(c, ACCURACY_SHARE) for c in accurate}, ms, "accurate", found
        ),
        "measured": {
            "certified": _measured(chain, found, plan, steps[DEFAULT].step, images["test"]),
            "accurate": _measured(chain, found, far, step_at_accuracy(accurate[0], ACCURACY_SHARE), images["test"]),
            "read off test": _measured(chain, found, far, _farthest_on_test(accurate[0]), images["test"]),
        },
    }


def _ours(plan: Plan, tables: Mapping[str, ReplayTable]) -> Contestant:
    own = {name: table.take(plan.names) for name, table in tables.items()}
    return Contestant(name=DEFAULT, heads="composed", plan=plan, tables=own)


def _farthest_on_test(contestant: Contestant) -> int:
    """Return the step that keeps the accuracy on the test split itself: published gains are read off such curves."""
    table = contestant.tables["test"]
    least = ACCURACY_SHARE * accuracy(table.answers, table)
    kept = [accuracy(replay_plan(table, t).classes, table) >= least for t in contestant.plan.path]
    return int(np.flatnonzero(kept)[-1])


def _rows(
    field: list[Contestant], steps: Mapping[str, int], ms: Mapping[str, np.ndarray], group: str, found: Explored
) -> dict[str, Any]:
    """Say what each contestant does on test at its step; the first is what the others are compared with."""
    rows, first = [], None
    for one in field:
        table, step = one.tables["test"], steps[one.name]
        outcome = replay_plan(table, one.plan.thresholds(step))
        latency = ms[f"{group} {one.name}"][outcome.exits]
        first = latency if first is None else first
        at = np.array([*table.sites, table.depth])[outcome.exits]
        rows.append(
            {
                "policy": one.name,
                "heads": one.heads,
                "caches": list(one.plan.names),
                "step": step,
                "thresholds": [None if np.isinf(t) else float(t) for t in one.plan.thresholds(step)],
                "mean_ms": float(latency.mean()),
                "full_ms": found.costs.full_ms,
                "disagreement": outcome.disagreement,
                "accuracy": accuracy(outcome.classes, table),
                **_exits_summary(at, found),
                "slower_by": paired(first, latency),
            }
        )
    return {"rows": rows}


def _exits_summary(at: np.ndarray, found: Explored) -> dict[str, Any]:
    """Return where requests leave, and the share of the base's time that this saves, lookups left out."""
    until = np.array([found.costs.until(site) for site in range(found.select.depth + 1)])
    counts = np.bincount(at, minlength=found.select.depth + 1)
    return {"exits": counts.tolist(), "saved_share": float(1 - until[at].mean() / found.costs.full_ms)}


def _measured(chain: Chain, found: Explored, plan: Plan, step: int, images: np.ndarray) -> dict[str, Any]:
    """Run the cascade and the fastest full network side by side on real requests, one at a time."""
    thresholds = plan.thresholds(step)
    on = np.isfinite(thresholds)
    caches = found.candidates.take([name for name, is_on in zip(plan.names, on, strict=True) if is_on])
    tuned = TunedCascade(
        Cascade(chain, tuple(caches), jnp.asarray(thresholds[on])), Tuning(device=device_name(), tiles=(found.tile,))
    )
    requests = images[np.linspace(0, len(images) - 1, min(TIMED, len(images))).astype(int)]
    speed = measure_batches(tuned, requests, batch=1, rounds=TURNS)
    return {
        "full_ms": speed.full_ms,
        "cascade_ms": speed.cascade_ms,
        "speedup": speed.speedup,
        "ideal": speed.ideal,
        "spread": speed.spread,
        "requests": len(speed.exits),
        "cache_bytes": sum(c.bytes for c in caches),
        "base_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(chain)),
        "sites": [c.site for c in caches],
    }


def accuracy(classes: np.ndarray, table: ReplayTable) -> float:
    """Return the share of right classes."""
    return float((classes == table.labels).mean())


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


if __name__ == "__main__":
    cli.run(main)
