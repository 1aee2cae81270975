"""Made-up tables, costs and plans, and the plain, slow computations that two rooms are compared with."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np

from gati_jax.planning import CostTable, Plan, ReplayTable

OFF = np.inf


def make_table(classes, scores, *, sites=None, depth=4, answers=None, first_row=0):
    """A table whose base always answers 0, if ``answers`` does not say otherwise; digests count from ``first_row``."""
    scores = np.asarray(scores, np.float32)
    candidates, n = scores.shape
    return ReplayTable(
        names=tuple(f"c{i}" for i in range(candidates)),
        sites=tuple(sites or range(1, candidates + 1)),
        depth=depth,
        answers=np.zeros(n, np.int32) if answers is None else np.asarray(answers, np.int32),
        classes=np.asarray(classes, np.int32),
        scores=scores,
        rows=np.arange(first_row, first_row + n, dtype=np.uint64),
    )


def make_costs(blocks_ms, lookups_ms):
    named = {f"c{i}": float(ms) for i, ms in enumerate(lookups_ms)}
    return CostTable(device="made-up", batch=1, blocks_ms=tuple(map(float, blocks_ms)), lookup_ms=named)


def random_tables(seed, candidates, n, *, levels=4, agreement=0.7):
    """Few score levels make ties; costs are random multiples of 1/8 ms, lookups mostly cheaper than blocks."""
    rng = np.random.default_rng(seed)
    depth = candidates + 1
    sites = sorted(rng.choice(depth, candidates, replace=False).tolist())
    answers = rng.integers(3, size=n)
    classes = np.where(rng.random((candidates, n)) < agreement, answers, (answers + 1) % 3)
    table = make_table(classes, rng.integers(levels, size=(candidates, n)), sites=sites, depth=depth, answers=answers)
    return table, make_costs(rng.integers(1, 17, depth) / 8, rng.integers(5, size=candidates) / 8)


def make_plan(path, *, sites=None, depth=4, first_row=10**9):
    """A plan as if it had been composed on other rows."""
    path = np.asarray(path, np.float32)
    steps, caches = path.shape
    return Plan(
        names=tuple(f"c{i}" for i in range(caches)),
        sites=tuple(sites or range(1, caches + 1)),
        depth=depth,
        path=path,
        disagreement=np.zeros(steps),
        mean_ms=np.zeros(steps),
        n=100,
        rows=np.arange(first_row, first_row + 100, dtype=np.uint64),
    )


def random_plan(rng, table):
    """Three random steps after the bare base, in any order."""
    path = rng.choice([0, 1, 2, 3, OFF], (4, len(table.names)))
    path[0] = OFF
    return make_plan(path, sites=table.sites, depth=table.depth)


def serve(table, thresholds, costs=None):
    """Serve one request after another: blocks, lookups, and comparisons, each by itself."""
    exits, classes, total = [], [], 0.0
    for r in range(len(table.answers)):
        at, exit_, class_ = 0, len(table.names), table.answers[r]
        for c, (name, site) in enumerate(zip(table.names, table.sites, strict=True)):
            if thresholds[c] == OFF:
                continue
            if costs:
                total += sum(costs.blocks_ms[at:site]) + costs.lookup_ms[name]
            at = site
            if table.scores[c, r] >= thresholds[c]:
                exit_, class_ = c, table.classes[c, r]
                break
        else:
            total += sum(costs.blocks_ms[at:]) if costs else 0.0
        exits.append(exit_)
        classes.append(int(class_))
    wrong = sum(int(given != truth) for given, truth in zip(classes, table.answers, strict=True))
    return SimpleNamespace(exits=exits, classes=classes, wrong=wrong, mean_ms=total / len(table.answers))


def exact_cdf(k, n, epsilon) -> Fraction:
    """P(at most k of n), by summing the binomial pmf in rational numbers."""
    p = Fraction(epsilon)
    yes, no, over = p.numerator, p.denominator - p.numerator, p.denominator
    return Fraction(sum(math.comb(n, i) * yes**i * no ** (n - i) for i in range(k + 1)), over**n)
