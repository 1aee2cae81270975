"""Run Freeze Inference's protocol twice, as published and with clean splits: DIR/freeze.json.

As published, thresholds come from images that the base was trained on; then from images that it has not seen. Key
networks and points are shared, so the difference is the thresholds' doing.
"""

import dataclasses
import functools
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gati_jax
from gati_jax import Chain, FitConfig, FreezeConfig, Head, ReplayTable, data
from gati_jax.caches import MIB, Conv, FullyConnected, LinearSelector, Pool, memory_report
from gati_jax.fitting import Candidates
from gati_jax.planning import replay_plan
from gati_jax.profiling import device_name
from train import cli, zoo
from train.caches import read_base
from train.reproduce import published

from .freeze_config import FreezeExperiment
from .memory import published_memory
from .policies import zero_error_thresholds

EXAMPLE = (
    "python -m train.reproduce.freeze --config configs/repro_freeze_resnet18.toml --out runs/freeze"
    " --data.dir ../shared/data/tfds --base.weights ../shared/data/weights/resnet18-cifar10.safetensors"
)
PAPER_BLOCKS = [(32 // 2**i, 32 // 2**i, 64 * 2**i) for i in range(4) for _ in range(2)]
_log = logging.getLogger("train.reproduce.freeze")  # not __name__, which is "__main__"


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments, config = cli.parse(FreezeExperiment, argv, "Run Freeze Inference's protocol.", EXAMPLE)

    # --- Data and base ----------------------------------------------------------------------------------------------
    splits = config.data.splits.model_dump()
    data.check_disjoint(splits)
    parts = {name: data.load(config.data.name, rows, config.data.dir) for name, rows in splits.items()}
    config = config.model_copy(update={"base": zoo.completed_base(config.base)})
    chain = read_base(config.base)

    # --- The protocol -----------------------------------------------------------------------------------------------
    started = time.perf_counter()
    result = freeze_protocol(
        chain,
        parts,
        freeze=config.freeze.build(),
        fit=config.fit.build(config.seed),
        behind_last=config.freeze.behind_last,
        predictors=config.freeze.predictors,
        checkpoint=arguments.out / "checkpoints",
    )

    # --- Result -----------------------------------------------------------------------------------------------------
    for name, protocol in result["protocols"].items():
        rows = data.Rows.parse(splits[name])
        trained_on = [data.Rows.parse(part) for part in config.data.base_trained_on]
        protocol["base_saw_thresholds"] = any(rows.overlaps(part) for part in trained_on)
    result = {
        "dataset": config.data.name,
        "network": config.base.network,
        "splits": splits,
        **result,
        "published": published.FREEZE,
        "published_memory": [{**row._asdict(), "mb": row.mb} for row in published_memory(PAPER_BLOCKS)],
        "seconds": time.perf_counter() - started,
        "device": device_name(),
        "command": sys.argv,
        "config": config.model_dump(mode="json"),
        "versions": cli.versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    cli.write_result(arguments.out / "freeze.json", result)
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)
        print(f"written: {arguments.out / 'freeze.json'}")


def freeze_protocol(
    chain: Chain,
    parts: Mapping[str, data.Dataset],
    *,
    freeze: FreezeConfig,
    fit: FitConfig,
    behind_last: bool = True,
    predictors: bool = False,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Build caches, set thresholds on two splits, serve.

    Args:
        chain: The base, of N blocks.
        parts: The splits "build", "seen", "clean" and "serve".
        freeze: Which caches.
        fit: How key networks are trained.
        behind_last: Whether there is a cache behind block N, too.
        predictors: Whether the paper's FC, Pool and Conv are trained as well; FC's hidden layers are the keys then.
        checkpoint: Folder for an interrupted fit.

    Returns:
        For "seen" and "clean", and for each kind of cache, what ``served`` says; agreement of every cache; the oracle;
        memory.
    """
    base = with_exit_behind_last(chain) if behind_last else chain
    started = time.perf_counter()
    learned = paper_predictors(base, parts, freeze, fit, checkpoint) if predictors else None
    heads = None if learned is None else learned.take([c.name for c in learned if c.name.startswith("fc@")])
    candidates = gati_jax.fit_freeze(
        base,
        parts["build"].images,
        select=parts["clean"].images,
        freeze=freeze,
        config=fit,
        heads=heads,
        checkpoint=checkpoint,
    )
    fit_seconds = time.perf_counter() - started
    _log.info("fitted %d caches in %.0f s", len(candidates), fit_seconds)
    started = time.perf_counter()
    tables = {}
    for name in ("seen", "clean", "serve"):
        tables[name] = gati_jax.replay(base, candidates, parts[name].images, labels=parts[name].labels)
        _log.info("%s: replayed %d requests", name, len(tables[name]))
    return {
        **said_of_caches(candidates, tables, freeze.kinds, blocks=len(chain)),
        "base": {"accuracy": _accuracy(tables["serve"].answers, tables["serve"].labels), "bytes": base.bytes},
        "predictors": {} if learned is None else agreement_of(base, learned, parts["serve"].images),
        "epochs": candidates.epochs,
        "fit_seconds": fit_seconds,
        "replay_seconds": time.perf_counter() - started,
    }


def said_of_caches(
    candidates: Candidates, tables: Mapping[str, ReplayTable], kinds: Sequence[str], *, blocks: int
) -> dict[str, Any]:
    """Say of every kind of cache what the replays say.

    Args:
        candidates: The caches, named after their kind.
        tables: Replays of "seen", "clean" and "serve".
        kinds: Of the caches.
        blocks: N, of the base.
    """
    names = {kind: [c.name for c in candidates if c.name.startswith(kind)] for kind in kinds}
    requests = {kind: tables["serve"].take(own) for kind, own in names.items()}
    return {
        "blocks": blocks,
        "n": len(tables["serve"]),
        "protocols": {
            split: {kind: served(tables[split].take(own), requests[kind], blocks) for kind, own in names.items()}
            for split in ("seen", "clean")
        },
        "caches": {
            kind: [
                {"exit": site, "agreement": agreement}
                for site, agreement in zip(table.sites, table.agrees.mean(1).tolist(), strict=True)
            ]
            for kind, table in requests.items()
        },
        "oracle": {kind: oracle(table, blocks) for kind, table in requests.items()},
        "memory": {
            kind: [{**row._asdict(), "total": row.total} for row in memory_report(candidates.take(own))]
            for kind, own in names.items()
        },
    }


def paper_predictors(
    chain: Chain,
    parts: Mapping[str, data.Dataset],
    freeze: FreezeConfig,
    fit: FitConfig,
    checkpoint: Path | None,
) -> Candidates:
    """Train the paper's three predictors at every site, in one pass."""
    kinds = {"fc": functools.partial(FullyConnected, hidden=freeze.key_units), "pool": Pool, "conv": Conv}
    heads = [Head(name=name, predictor=kind, selector=LinearSelector()) for name, kind in kinds.items()]
    return gati_jax.fit(
        chain, parts["build"].images, select=parts["clean"].images, heads=heads, config=fit, checkpoint=checkpoint
    )


def agreement_of(chain: Chain, candidates: Candidates, images: np.ndarray) -> dict[str, dict[str, float]]:
    """Return the share of requests on which each predictor agrees with the base: by kind and site."""
    table = gati_jax.replay(chain, candidates, images)
    found: dict[str, dict[str, float]] = {}
    for name, site, share in zip(table.names, table.sites, table.agrees.mean(1).tolist(), strict=True):
        found.setdefault(name.partition("@")[0], {})[str(site)] = share
    return found


def with_exit_behind_last(chain: Chain) -> Chain:
    """Return the same base with an idle block in the end: what enters it is what leaves block N."""
    blocks, params = (*chain.blocks, _idle), (*chain.params[:-1], (), chain.params[-1])
    return dataclasses.replace(chain, blocks=blocks, params=params, network=None)


def _idle(params: object, x: jax.Array) -> jax.Array:
    del params  # it has none
    return x


def served(thresholds_from: ReplayTable, requests: ReplayTable, blocks: int) -> dict[str, Any]:
    """Set zero-error thresholds on one table, and say what they do to the requests of another.

    Args:
        thresholds_from: Replay of the split that sets them.
        requests: Replay of the requests, with the same caches.
        blocks: N; a request that leaves at N / 2 or before has saved half of them.
    """
    thresholds = zero_error_thresholds(thresholds_from)
    outcome = replay_plan(requests, thresholds)
    at = np.array([*requests.sites, blocks + 1])[outcome.exits]  # exit N may be a cache: the base comes behind it
    exits = []
    for i, exit_ in enumerate((*requests.sites, None)):
        here = outcome.exits == i
        exits.append(
            {
                "exit": "base" if exit_ is None else exit_,
                "hits": int(here.sum()),
                "hit_rate": float(here.mean()),
                "agreement": float(1 - outcome.disagrees[here].mean()) if here.any() else None,
                "threshold": None if exit_ is None or not np.isfinite(thresholds[i]) else float(thresholds[i]),
            }
        )
    return {
        "n_thresholds": len(thresholds_from),
        "exits": exits,
        "half_share": float((at <= blocks / 2).mean()),
        "before_last_block_share": float((at < blocks).mean()),
        "before_output_share": float((at <= blocks).mean()),
        "agreement": 1 - outcome.disagreement,
        "accuracy": _accuracy(outcome.classes, requests.labels),
        "blocks_mean": float(np.minimum(at, blocks).mean()),
    }


def oracle(requests: ReplayTable, blocks: int) -> dict[str, float]:
    """Return what a selector that knows when a cache is right would save."""
    right = np.vstack([requests.agrees, np.ones((1, len(requests)), bool)])
    at = np.array([*requests.sites, blocks + 1])[right.argmax(0)]
    return {"half_share": float((at <= blocks / 2).mean()), "blocks_mean": float(np.minimum(at, blocks).mean())}


def _accuracy(classes: np.ndarray, labels: np.ndarray | None) -> float | None:
    return None if labels is None else float((classes == labels).mean())


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    columns = ("cache", "thresholds from", "half saved", "published", "before output", "published", "agreement")
    rows = []
    for split, protocol in result["protocols"].items():
        for kind in result["memory"]:
            found, theirs = protocol[kind], published.FREEZE[kind]
            where = f"{result['splits'][split]}{', seen by the base' if protocol['base_saw_thresholds'] else ''}"
            half, out = (found[key] for key in ("half_share", "before_output_share"))
            own = (_share(half), _share(theirs["half_share"]), _share(out), _share(theirs["before_output_share"]))
            rows.append((kind, where, *own, _share(found["agreement"]), _share(theirs["agreement"])))
    cli.show(f"{result['network']} on {result['dataset']}, {result['n']} requests", (*columns, "published"), rows)
    for split, protocol in result["protocols"].items():
        for kind in result["memory"]:
            exits = protocol[kind]["exits"]
            rows = [(e["exit"], e["hits"], _share(e["hit_rate"]), _share(e["agreement"])) for e in exits]
            cli.show(f"{kind}, thresholds from {result['splits'][split]}", ("exit", "hits", "share", "agreement"), rows)
    rows = [
        (kind, *(f"{sum(row[key] for row in memory) / MIB:.1f}" for key in ("key_network", "points", "total")))
        for kind, memory in result["memory"].items()
    ]
    cli.show("Memory of all caches, MB of 2^20 bytes", ("cache", "key networks", "points", "total"), rows)
    paper = result["published_memory"]
    rows = [(r["what"], r["published_mb"] or "-", f"{r['mb']:.2f}", r["arithmetic"]) for r in paper]
    cli.show("The paper's memory, MB of 2^20 bytes", ("", "published", "by arithmetic", "which is"), rows)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


if __name__ == "__main__":
    cli.run(main)
