"""Other people's rules for leaving early, on the same predictors: what composed plans are compared with.

A policy turns the logits of one kind of head at every site into the table that any plan is judged on: a class and a
score for each request at each site. All of them leave at the first site whose score reaches one threshold that all
sites share, as their papers do; ``shared_threshold_plan`` lays the path of that threshold.

Two policies need nothing of their own here. Zero Time Waste (arXiv:2106.05409) is ``max_probability`` on cascaded
heads, whose logits are the geometric ensemble already. The paper's selector is what ``replay`` scored.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp

from .planned import Plan
from .tables import CostTable, ReplayTable, cascade_ms, replay_plan

Logits = Float[np.ndarray, "sites n classes"]
Score = Callable[[Logits], Float[np.ndarray, "sites n"]]
STEPS = 400  # of a path: each moves a quarter of a percent of the scores


def max_probability(logits: Logits) -> Float[np.ndarray, "sites n"]:
    """Return the log-odds of the largest probability (Shallow-Deep Networks, arXiv:1810.07052).

    Of the order of the probability itself, but it does not saturate in float32.
    """
    ordered = np.sort(logits.astype(np.float64), axis=-1)
    return ordered[..., -1] - logsumexp(ordered[..., :-1], axis=-1)


def negative_entropy(logits: Logits) -> Float[np.ndarray, "sites n"]:
    """Return the entropy's negative (BranchyNet, arXiv:1709.01686)."""
    log_p = logits.astype(np.float64) - logsumexp(logits.astype(np.float64), axis=-1, keepdims=True)
    return (np.exp(log_p) * log_p).sum(-1)


def patience(logits: Logits) -> Float[np.ndarray, "sites n"]:
    """Return how many sites in a row, before this one, said what this one says (PABEE, arXiv:2006.04152)."""
    classes = logits.argmax(-1)
    count = np.zeros(classes.shape)
    for site in range(1, len(classes)):
        count[site] = np.where(classes[site] == classes[site - 1], count[site - 1] + 1, 0)
    return count


POLICIES: dict[str, Score] = {
    "max probability (SDN)": max_probability,
    "entropy (BranchyNet)": negative_entropy,
    "patience (PABEE)": patience,
}


def policy_table(table: ReplayTable, logits: Logits, score: Score) -> ReplayTable:
    """Return the table that a policy would leave by.

    Args:
        table: Of one candidate at each site, in order.
        logits: Theirs.
        score: The policy's.
    """
    classes: Int[np.ndarray, "sites n"] = logits.argmax(-1)
    return dataclasses.replace(table, classes=classes, scores=score(logits))


def shared_threshold_plan(table: ReplayTable, costs: CostTable, *, epsilon: float) -> Plan:
    """Lay the path of a threshold that all sites share, from never leaving to where more than epsilon disagree.

    Args:
        table: Replay of the select split, one candidate at each site, in order.
        costs: Measured times.
        epsilon: The disagreement at which the path ends.
    """
    ranked = np.unique(table.scores[table.scores > -np.inf])[::-1]
    levels = ranked[np.unique(np.linspace(0, len(ranked) - 1, min(len(ranked), STEPS)).astype(int))]
    m = len(table.names)
    path, disagreement = [np.full(m, np.inf, np.float32)], [0.0]
    for level in levels:
        thresholds = np.full(m, level, np.float32)
        disagrees = replay_plan(table, thresholds).disagreement
        if disagrees > epsilon:
            break
        path.append(thresholds)
        disagreement.append(disagrees)
    return Plan(
        names=table.names,
        sites=table.sites,
        depth=table.depth,
        path=np.stack(path),
        n=len(table),
        rows=table.rows,
        origin=table.origin,
        disagreement=np.array(disagreement),
        mean_ms=np.array([cascade_ms(table, thresholds, costs) for thresholds in path]),
    )


def oracle_exits(table: ReplayTable) -> Int[np.ndarray, " n"]:
    """Return the earliest site where any candidate says what the base says; N where none does."""
    sites = np.asarray(table.sites)[:, None]
    return np.where(table.agrees, sites, table.depth).min(axis=0, initial=table.depth)
