"""Exploration: drop what cannot pay, fit the rest in one pass, rank it (GATI's exploration phase)."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import gati_jax
from gati_jax import Chain, CostTable, Head, Plan, ReplayTable, data
from gati_jax.caches import on_its_own
from gati_jax.fitting import Candidates, head_sizes, untrained
from gati_jax.planning import rank, unpayable
from gati_jax.runtime import Tile

from . import cli
from .config import Config
from .records import measured_tile

_log = logging.getLogger("train.exploration")
SHOWN = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explored:
    """What exploration found."""

    candidates: Candidates
    select: ReplayTable
    tile: Tile
    """What is fastest at the planned batch; with the costs."""
    costs: CostTable
    dropped: dict[str, str]
    """Candidates that were not fitted, and why."""
    memory_bytes: int | None
    """What the caches of a plan may take."""

    def plan(self, config: Config, epsilon: float) -> Plan:
        """Compose a plan of what a cascade can run, within the config's budgets."""
        alone = [c for c in self.candidates if c.previous is None]
        worst = config.plan.worst_share
        return gati_jax.plan(
            self.select.take([c.name for c in alone]),
            self.costs,
            epsilon=epsilon,
            delta=config.plan.delta / len(config.plan.epsilons),
            max_sites=config.plan.max_sites,
            memory_bytes=self.memory_bytes,
            worst_ms=None if worst is None else worst * self.costs.full_ms,
            bytes={c.name: c.bytes for c in alone},
            seconds=config.plan.seconds,
        )

    def ranking(self, epsilon: float = 0.01) -> list[dict[str, Any]]:
        """Return what each candidate would save as the only cache, the best first."""
        sizes = {c.name: c.bytes for c in self.candidates}
        ranked = rank(self.select, self.costs, epsilon=epsilon)
        return [
            row._asdict() | {"lookup_ms": self.costs.lookup_ms[row.name], "bytes": sizes[row.name]} for row in ranked
        ]

    def show(self, title: str) -> None:
        """Print the best of the ranking, and what was dropped."""
        columns = ("candidate", "site", "agreement", "leave at 1 %", "saves alone", "lookup ms", "MB")
        rows = [
            (
                r["name"],
                r["site"],
                f"{r['agreement']:.2%}",
                f"{r['hits']:.1%}",
                f"{r['saved']:.1%}",
                f"{r['lookup_ms']:.3f}",
                f"{r['bytes'] / 1e6:.2f}",
            )
            for r in self.ranking()[:SHOWN]
        ]
        cli.show(title, columns, rows)
        for name, reason in self.dropped.items():
            print(f"{name} was not fitted: {reason}")


def explore(
    config: Config, chain: Chain, heads: Sequence[Head], parts: Mapping[str, data.Dataset], out: Path
) -> Explored:
    """Measure lookups, drop what cannot pay, fit the rest, replay it on select.

    Args:
        config: The experiment's.
        chain: The base.
        heads: The declared search space.
        parts: The splits "fit" and "select".
        out: For costs.json and checkpoints, from which a killed run resumes.
    """
    base_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(chain))
    memory = None if config.plan.memory_share is None else int(config.plan.memory_share * base_bytes)
    sizes = head_sizes(chain, heads)
    too_large = {name for name, size in sizes.items() if memory is not None and size > memory}
    small = _without(chain, heads, too_large)
    trial = untrained(chain, small)
    # What an ensemble with the cache before adds, a product of classes x classes, is too little to be measured.
    tile, costs = measured_tile(out / "costs.json", chain, [on_its_own(c) for c in trial], config)
    sites = {name: int(name.rpartition("@")[2]) for name in sizes}
    dropped = unpayable(costs, sites, sizes, memory_bytes=memory)
    for name, reason in dropped.items():
        _log.info("%s is not fitted: %s", name, reason)
    candidates = gati_jax.fit(
        chain,
        parts["fit"].images,
        select=parts["select"].images,
        heads=_without(chain, small, set(dropped)),
        config=config.fit.build(config.seed),
        checkpoint=out / "checkpoints",
    )
    select = gati_jax.replay(chain, candidates, parts["select"].images, labels=parts["select"].labels)
    return Explored(candidates=candidates, select=select, tile=tile, costs=costs, dropped=dropped, memory_bytes=memory)


def _without(chain: Chain, heads: Sequence[Head], names: set[str]) -> list[Head]:
    """Return the heads at the sites that remain; one whose further selectors are too dear keeps its own."""
    kept = []
    for head in heads:
        sites = range(1, len(chain)) if head.sites is None else head.sites
        left = tuple(site for site in sites if f"{head.name}@{site}" not in names)
        if left:
            kept.append(dataclasses.replace(head, sites=left))
    return kept
