"""Exploration's bookkeeping: what cannot pay is dropped before it is fitted, what was fitted is ranked."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .binomial import largest_passing
from .tables import CostTable, ReplayTable


def unpayable(
    costs: CostTable, sites: Mapping[str, int], sizes: Mapping[str, int], *, memory_bytes: int | None = None
) -> dict[str, str]:
    """Say which candidates cannot pay, whatever they will learn, and why.

    Args:
        costs: Measured times; a lookup takes as long before a fit as after it. Of candidates over the memory budget
            none are needed.
        sites: Of every candidate by name.
        sizes: Bytes of every candidate by name.
        memory_bytes: What all caches of a plan may take together.

    Returns:
        Reasons by name.
    """
    reasons = {}
    for name, site in sites.items():
        if memory_bytes is not None and sizes[name] > memory_bytes:
            reasons[name] = (
                f"its {sizes[name] / 1e6:.2f} MB are more than the {memory_bytes / 1e6:.2f} MB for all caches"
            )
            continue
        saves = costs.full_ms - costs.until(site)
        if costs.lookup_ms[name] >= saves:
            lookup = costs.lookup_ms[name]
            reasons[name] = f"its lookup takes {lookup:.3f} ms, and if every request left it would save {saves:.3f} ms"
    return reasons


class Rank(NamedTuple):
    """What a candidate is worth if it is the only cache."""

    name: str
    site: int
    agreement: float
    hits: float
    """Share of requests that leave, at as many disagreements as could be certified."""
    saved: float
    """Share of the base's time that this saves; below 0 where the lookup costs more than it brings."""


def rank(table: ReplayTable, costs: CostTable, *, epsilon: float, delta: float = 0.05) -> tuple[Rank, ...]:
    """Rank candidates by what each saves alone, the best first.

    Args:
        table: Replay of the select split.
        costs: Measured times.
        epsilon: The disagreement to be certified.
        delta: The certificate's.
    """
    target = max(0, largest_passing(len(table), epsilon, delta))
    found = []
    for i, (name, site) in enumerate(zip(table.names, table.sites, strict=True)):
        order = np.argsort(-table.scores[i], kind="stable")
        scores, wrong = table.scores[i][order], np.cumsum(~table.agrees[i][order])
        ends = np.append(scores[1:] < scores[:-1], True)
        fine = np.flatnonzero(ends & (wrong <= target) & (scores > -np.inf))  # -infinity never hits
        hits = (int(fine[-1]) + 1) / len(table) if len(fine) else 0.0
        saved = (hits * (costs.full_ms - costs.until(site)) - costs.lookup_ms[name]) / costs.full_ms
        found.append(Rank(name, site, float(table.agrees[i].mean()), hits, saved))
    return tuple(sorted(found, key=lambda r: -r.saved))
