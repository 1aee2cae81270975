"""Run Freeze Inference's protocol twice, as published and with clean splits: DIR/freeze.json.

As published, thresholds come from images that the base was trained on; then from images that it has not seen. Key
networks and points are the same in both, so the results differ by the thresholds alone.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from pydantic import Field

import gati_jax
from gati_jax import Chain, FitConfig, FreezeConfig, Head, ReplayTable, data
from gati_jax.caches import MIB, Conv, FullyConnected, LinearSelector, Pool, memory_report
from gati_jax.evaluation.run import accuracy
from gati_jax.fitting import Candidates
from gati_jax.options import Strict
from gati_jax.planning import replay_plan

from .. import cli, zoo
from ..caches import load_parts, overlapping, read_base
from ..config import Base, Experiment
from ..source import Source
from . import published, results
from .policies import zero_error_thresholds

EXAMPLE = (
    "python -m train.reproduce.freeze --config configs/repro_freeze_resnet18.toml --out runs/freeze"
    " --data.dir ../shared/data/tfds --base.weights ../shared/data/weights/resnet18-cifar10.safetensors"
)
THRESHOLD_SPLITS = ("seen", "clean")
_log = logging.getLogger("train.reproduce.freeze")  # not __name__, which is "__main__"


class FreezeSplits(Strict):
    """Disjoint parts of the source, in TFDS's notation."""

    build: str = Field(description="trains key networks, and becomes points")
    seen: str = Field(description="sets thresholds as published, on images that the base was trained on")
    clean: str = Field(description="sets thresholds once more, on images that the base has not seen")
    serve: str = Field(description="requests; nothing is chosen on them")


class FreezeData(Source):
    """Where images come from, and which are for what."""

    splits: FreezeSplits


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezeCaches(FreezeConfig):
    """Which neighbour caches are made, and what beside them."""

    predictors: Annotated[bool, Field(description="also train the paper's FC, Pool and Conv")] = False
    behind_last: Annotated[bool, Field(description="a cache behind the last block, too, as the paper has one")] = True


class FreezeExperiment(Experiment):
    """The published protocol, and the same with clean splits."""

    data: FreezeData
    base: Base
    fit: FitConfig = FitConfig()
    freeze: FreezeCaches = FreezeCaches()


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    p = cli.config_parser(FreezeExperiment, "Run Freeze Inference's protocol.", EXAMPLE)
    arguments, config = cli.parse(p, FreezeExperiment, argv)
    splits = config.data.splits.model_dump()
    data.check_disjoint(splits)
    config = config.model_copy(update={"base": zoo.completed_base(config.base)})
    chain = read_base(config.base)
    parts = load_parts(config.data, splits, chain)
    data.check_no_groups({name: part.groups for name, part in parts.items()})

    started = time.perf_counter()
    outcome = freeze_protocol(config, chain, parts, arguments.out / "checkpoints")
    result = results.Freeze(
        **results.describe_run(config.data.name, config.base.network, splits),
        **dict(outcome),
        seconds=time.perf_counter() - started,
        config=config.model_dump(mode="json"),
    )
    path = arguments.out / "freeze.json"
    result.write(path, print_json=arguments.json)
    if not arguments.json:
        show(result)
        print(f"written: {path}")


def freeze_protocol(
    config: FreezeExperiment, chain: Chain, parts: Mapping[str, data.Dataset], checkpoint: Path
) -> results.FreezeOutcome:
    """Build caches, set thresholds on two splits, and replay the requests under both."""
    freeze, blocks = config.freeze, len(chain)
    base = with_exit_behind_last(chain) if freeze.behind_last else chain
    started = time.perf_counter()
    learned, candidates = fit_caches(config, base, parts, checkpoint)
    fit_seconds = time.perf_counter() - started
    _log.info("fitted %d caches in %.0f s", len(candidates), fit_seconds)

    started = time.perf_counter()
    tables = {}
    for name in (*THRESHOLD_SPLITS, "serve"):
        tables[name] = gati_jax.replay(base, candidates, parts[name].images, labels=parts[name].labels)
        _log.info("%s: replayed %d requests", name, len(tables[name]))

    requests = tables["serve"]
    names: dict[results.Kind, list[str]] = {
        kind: _names(candidates, kind) for kind in results.KINDS if kind in freeze.kinds
    }
    own: dict[results.Kind, ReplayTable] = {kind: requests.take(those) for kind, those in names.items()}
    protocols = {
        split: results.Protocol(
            **{kind: served(tables[split].take(names[kind]), own[kind], blocks) for kind in names},
            base_saw_thresholds=bool(overlapping(getattr(config.data.splits, split), config.data.base_trained_on)),
        )
        for split in THRESHOLD_SPLITS
    }
    return results.FreezeOutcome(
        blocks=blocks,
        n=len(requests),
        protocols=results.Protocols(**protocols),
        agreement={kind: _by_site(table) for kind, table in own.items()},
        oracle={kind: oracle(table, blocks) for kind, table in own.items()},
        memory={
            kind: tuple(results.Memory.model_validate(row) for row in memory_report(candidates.take(those)))
            for kind, those in names.items()
        },
        base=results.FreezeBase(accuracy=accuracy(requests.answers, requests.labels), bytes=base.bytes),
        predictors={} if learned is None else predictor_agreement(base, learned, np.asarray(parts["serve"].images)),
        epochs=candidates.epochs,
        fit_seconds=fit_seconds,
        replay_seconds=time.perf_counter() - started,
    )


def fit_caches(
    config: FreezeExperiment, chain: Chain, parts: Mapping[str, data.Dataset], checkpoint: Path
) -> tuple[Candidates | None, Candidates]:
    """Train the paper's three predictors, where asked for, at every site in one pass; then build neighbour caches.

    The keys are FC's hidden layers where there is one.
    """
    images, select, freeze = parts["build"].images, parts["clean"].images, config.freeze
    learned = heads = None
    if freeze.predictors:
        specs = {"fc": functools.partial(FullyConnected, hidden=freeze.key_units), "pool": Pool, "conv": Conv}
        kinds = [Head(name=name, predictor=spec, selector=LinearSelector()) for name, spec in specs.items()]
        learned = gati_jax.fit(chain, images, select=select, heads=kinds, config=config.fit, checkpoint=checkpoint)
        heads = learned.take(_names(learned, "fc"))
    candidates = gati_jax.fit_freeze(
        chain, images, select=select, freeze=freeze, config=config.fit, heads=heads, checkpoint=checkpoint
    )
    return learned, candidates


def predictor_agreement(chain: Chain, candidates: Candidates, images: np.ndarray) -> dict[str, dict[int, float]]:
    """Return the share of requests on which each predictor agrees with the base, by the predictor's name and site."""
    table = gati_jax.replay(chain, candidates, images)
    return {name: _by_site(table.take(_names(candidates, name))) for name in published.PREDICTORS}


def _names(candidates: Candidates, head: str) -> list[str]:
    return [c.name for c in candidates if c.name.startswith(f"{head}@")]


def _by_site(table: ReplayTable) -> dict[int, float]:
    return dict(zip(table.sites, table.agrees.mean(1).tolist(), strict=True))


def with_exit_behind_last(chain: Chain) -> Chain:
    """Append an idle block to the base: its input is the output of block N."""
    blocks, params = (*chain.blocks, _idle), (*chain.params[:-1], (), chain.params[-1])
    return dataclasses.replace(chain, blocks=blocks, params=params, network=None)


def _idle(params: object, x: jax.Array) -> jax.Array:
    del params  # it has none
    return x


def served(thresholds_from: ReplayTable, requests: ReplayTable, blocks: int) -> results.Served:
    """Set zero-error thresholds on one table, and replay the requests of another, of the same caches, under them."""
    thresholds = zero_error_thresholds(thresholds_from)
    outcome = replay_plan(requests, thresholds)
    sites = _exit_sites(requests, outcome.exits, blocks)
    exits = []
    for i, (name, threshold) in enumerate(zip((*requests.sites, "base"), (*thresholds, np.inf), strict=True)):
        here = outcome.exits == i
        exits.append(
            results.ExitResult(
                exit=name,
                hits=int(here.sum()),
                hit_rate=float(here.mean()),
                agreement=float(1 - outcome.disagrees[here].mean()) if here.any() else None,
                threshold=float(threshold) if np.isfinite(threshold) else None,
            )
        )
    return results.Served(
        **dict(_half(sites, blocks)),
        n_thresholds=len(thresholds_from),
        exits=tuple(exits),
        before_last_block_share=float((sites < blocks).mean()),
        before_output_share=float((sites <= blocks).mean()),
        agreement=1 - outcome.disagreement,
        accuracy=accuracy(outcome.classes, requests.labels),
    )


def oracle(requests: ReplayTable, blocks: int) -> results.Half:
    """Return what a selector that knows when a cache is right would save."""
    right = np.vstack([requests.agrees, np.ones((1, len(requests)), bool)])
    return _half(_exit_sites(requests, right.argmax(0), blocks), blocks)


def _exit_sites(requests: ReplayTable, exits: np.ndarray, blocks: int) -> np.ndarray:
    return np.array([*requests.sites, blocks + 1])[exits]  # a cache may stand behind block N: the base is N + 1


def _half(sites: np.ndarray, blocks: int) -> results.Half:
    mean = float(np.minimum(sites, blocks).mean())
    return results.Half(half_share=float((sites <= blocks / 2).mean()), blocks_mean=mean)


def show(result: results.Freeze) -> None:
    """Print the tables."""
    protocols = dict(result.protocols)
    rows, tables = [], []
    for split, protocol in protocols.items():
        where = result.splits[split]
        seen = ", seen by the base" if protocol.base_saw_thresholds else ""
        for kind in result.memory:
            own, theirs = getattr(protocol, kind), published.FREEZE[kind]
            keys = ("half_share", "before_output_share", "agreement")
            shares = [_share(value) for key in keys for value in (getattr(own, key), theirs[key])]
            rows.append((kind, f"{where}{seen}", *shares))
            exits = [(e.exit, e.hits, _share(e.hit_rate), _share(e.agreement)) for e in own.exits]
            tables.append((f"{kind}, thresholds from {where}", ("exit", "hits", "share", "agreement"), exits))
    columns = ("cache", "thresholds from", "half saved", "published", "before output", "published", "agreement")
    cli.show(f"{result.network} on {result.dataset}, {result.n} requests", (*columns, "published"), rows)
    for title, heads, exits in tables:
        cli.show(title, heads, exits)
    memory = [
        (kind, *(f"{sum(getattr(row, key) for row in own) / MIB:.1f}" for key in ("key_network", "points", "total")))
        for kind, own in result.memory.items()
    ]
    cli.show("Memory of all caches, MB of 2^20 bytes", ("cache", "key networks", "points", "total"), memory)
    rows = [
        (
            what,
            mb or "-",
            f"{math.prod(factors.values()) / MIB:.2f}",
            " x ".join(f"{n:,} {u}" for u, n in factors.items()),
        )
        for what, mb, factors in published.MEMORY
    ]
    cli.show("The paper's memory, MB of 2^20 bytes", ("", "published", "by arithmetic", "which is"), rows)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


if __name__ == "__main__":
    cli.run(main)
