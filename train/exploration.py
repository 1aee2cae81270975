"""Exploration: drop candidates that cannot save time, fit the others in one pass, rank them (GATI's first phase)."""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gati_jax
from gati_jax import Chain, CostTable, Head, InputError, Plan, ReplayTable, data
from gati_jax.caches import on_its_own
from gati_jax.fitting import Candidates, head_sizes, untrained
from gati_jax.fitting.fit import deal_folds
from gati_jax.planning import Composition, compose_plan, prunable, rank
from gati_jax.profiling import Tuning, unsteady

from . import cli
from .config import Config
from .records import costs_in, keep_composition, kept_composition, measured_tuning

_log = logging.getLogger("train.exploration")
SHOWN = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explored:
    """The candidates of an exploration, and what planning needs to know of them."""

    candidates: Candidates
    select: ReplayTable
    tuning: Tuning  # how the planned batch runs fastest
    costs: CostTable  # measured so
    dropped: dict[str, str]  # candidates that were not fitted, by name, and why
    memory_bytes: int | None  # most bytes of all caches of a plan together
    fit_seconds: float
    folder: Path  # where compositions are kept for the next run

    def plan(self, config: Config, epsilon: float) -> tuple[Plan, Composition]:
        """Compose a plan within the config's budgets, or take the one that an earlier run composed of the same."""
        alone = [c for c in self.candidates if c.previous is None]  # a cascade cannot run the others
        table = self.select.take([c.name for c in alone])
        worst = config.plan.worst_share
        budget = {
            "epsilon": epsilon,
            "delta": config.plan.delta / config.plan.tests,
            "sites": config.plan.max_sites,
            "memory_bytes": self.memory_bytes,
            "worst_ms": None if worst is None else worst * self.costs.full_ms,
            "bytes": {c.name: c.bytes for c in alone},
            "seconds": config.plan.seconds,
        }
        measured = ", ".join(f"{f.name}={getattr(self.costs, f.name)!r}" for f in dataclasses.fields(self.costs))
        text = f"({table.names!r}, CostTable({measured}), {budget!r})"
        digest = hashlib.blake2b(text.encode(), digest_size=16)
        for column in (table.answers, table.classes, table.scores, table.rows):
            digest.update(np.ascontiguousarray(column).tobytes())
        path, identity = self.folder / f"composition-{epsilon:g}.json", digest.hexdigest()
        kept = kept_composition(path, identity)
        plan, composition = compose_plan(table, self.costs, **budget, composed=kept)
        if kept is None:
            keep_composition(path, identity, composition)
        return plan, composition

    def ranking(self, epsilon: float) -> list[dict[str, Any]]:
        """Return what each candidate would save as the only cache, the best first."""
        sizes = {c.name: c.bytes for c in self.candidates}
        ranked = rank(self.select, self.costs, epsilon=epsilon)
        return [
            row._asdict() | {"lookup_ms": self.costs.lookup_ms[row.name], "bytes": sizes[row.name]} for row in ranked
        ]

    def show(self, title: str, epsilon: float) -> None:
        """Print the best of the ranking, and what was dropped."""
        columns = ("candidate", "site", "agreement", f"leave at {epsilon:.1%}", "saves alone", "lookup ms", "MB")
        rows = [
            (r["name"], r["site"], f"{r['agreement']:.2%}", f"{r['hits']:.1%}", f"{r['saved']:.1%}",
             f"{r['lookup_ms']:.3f}", f"{r['bytes'] / 1e6:.2f}")
            for r in self.ranking(epsilon)[:SHOWN]
        ]  # fmt: skip
        cli.show(title, columns, rows)
        for name, reason in self.dropped.items():
            print(f"{name} was not fitted: {reason}")


def explore(
    config: Config, chain: Chain, heads: Sequence[Head], parts: Mapping[str, data.Dataset], out: Path
) -> Explored:
    """Measure lookups, drop candidates that cannot save time, fit the others, replay them on select.

    Args:
        config: The experiment's.
        chain: The base.
        heads: The declared search space.
        parts: The splits "fit" and "select".
        out: Folder for costs.json, compositions, and checkpoints from which a killed run resumes.
    """
    check_fit(config, parts)
    memory = None if config.plan.memory_share is None else int(config.plan.memory_share * chain.bytes)
    sizes = head_sizes(chain, heads)
    small = within(chain, heads, {name for name, size in sizes.items() if memory is None or size <= memory})
    if memory is not None and not small:
        least = f"{min(sizes.values()) / 1e6:.2f} MB, the smallest of fit.heads"
        raise InputError(f"plan.memory_share: expected room for {least}, got {memory / 1e6:.2f} MB")
    trial = untrained(chain, small)
    # A cascaded cache is timed without its ensemble: a product of classes x classes is too little to be measured.
    tuning = measured_tuning(out / "costs.json", chain, [on_its_own(c) for c in trial], config)
    costs = costs_in(tuning, config)
    sites = {name: int(name.rpartition("@")[2]) for name in sizes}
    reasons = prunable(costs, sites, sizes, memory_bytes=memory)
    kept = within(chain, small, set(sizes) - set(reasons))
    fitted = head_sizes(chain, kept) if kept else {}
    dropped = {name: reason for name, reason in reasons.items() if name not in fitted}
    for name, reason in dropped.items():
        _log.info("%s is not fitted: %s", name, reason)
    if not kept:
        why = unsteady(costs)
        busy = f". But the machine was busy when costs were measured ({why}): run again when it is idle" if why else ""
        raise InputError(f"fit.heads: expected at least one that can save time, got none; see the reasons above{busy}")
    started = time.perf_counter()
    candidates = gati_jax.fit(
        chain,
        parts["fit"].images,
        select=parts["select"].images,
        heads=kept,
        config=config.fit,
        checkpoint=out / "checkpoints",
    )
    fit_seconds = time.perf_counter() - started
    select = gati_jax.replay(chain, candidates, parts["select"].images, labels=parts["select"].labels)
    return Explored(
        candidates=candidates,
        select=select,
        tuning=tuning,
        costs=costs,
        dropped=dropped,
        memory_bytes=memory,
        fit_seconds=fit_seconds,
        folder=out,
    )


def check_fit(config: Config, parts: Mapping[str, data.Dataset]) -> None:
    """Check that there are rows enough for a fit.

    Raises:
        InputError: Fewer than a batch, or than one for each fold.
    """
    if config.fit.batch > (n := len(parts["fit"])):
        raise InputError(f"fit.batch: expected at most the {n} rows of data.splits.fit, got {config.fit.batch}")
    deal_folds(data.row_digests(parts["select"].images), config.fit)


def within(chain: Chain, heads: Sequence[Head], names: set[str]) -> list[Head]:
    """Return the heads at the sites where one of their candidates, with whichever selector, is among ``names``.

    Selectors cost next to nothing: where their lookups differ, it is noise, and a predictor is fitted once for all.
    """
    kept = []
    for head in heads:
        sites = range(1, len(chain)) if head.sites is None else head.sites
        kinds = [head.name, *(f"{head.name}+{other}" for other, _ in head.selectors)]
        left = tuple(site for site in sites if any(f"{kind}@{site}" in names for kind in kinds))
        if left:
            kept.append(dataclasses.replace(head, sites=left))
    return kept
