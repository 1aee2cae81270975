"""The composition problem on arrays: at every site one of the candidates with one of its thresholds, or none.

Times are milliseconds summed over all requests of the table. Only thresholds just above a request that would newly
disagree are options: between two of them, a lower threshold makes requests leave rightly and sooner, and no more wrong.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from .tables import CostTable, ReplayTable

Choice = tuple[tuple[int, int] | None, ...]
"""For each site a candidate and the index of its threshold, or None where nothing is open."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What may be chosen, in the order of the sites."""

    site: Int[np.ndarray, " candidates"]  # index among the K sites, rising
    lookup_ms: Float[np.ndarray, " candidates"]
    uses: Float[np.ndarray, "candidates resources"]  # bytes, full-miss time, places
    wrong: Bool[np.ndarray, "candidates n"]
    level: Int[np.ndarray, "candidates n"]  # the first of the candidate's thresholds at which the request hits
    thresholds: tuple[Float[np.ndarray, "..."], ...]  # falling; level ``len`` never hits
    before_ms: float  # blocks before the first site
    span_ms: Float[np.ndarray, " sites"]  # blocks from each site to the next, from the last one to the end
    disagreements: int  # the budget
    limits: Float[np.ndarray, " resources"]

    @property
    def n(self) -> int:
        """Requests."""
        return self.wrong.shape[1]

    @property
    def sites(self) -> int:
        """K."""
        return len(self.span_ms)

    @property
    def width(self) -> int:
        """The largest number of thresholds that any candidate has."""
        return max((len(t) for t in self.thresholds), default=0)

    @property
    def usable(self) -> Bool[np.ndarray, "candidates thresholds"]:
        """Which candidate has so many thresholds."""
        return np.arange(self.width) < np.array([len(t) for t in self.thresholds], int)[:, None]

    @property
    def start_ms(self) -> float:
        """What all requests take up to the first site."""
        return self.before_ms * self.n

    def at(self, site: int) -> Int[np.ndarray, " here"]:
        """Return the candidates at a site."""
        return np.flatnonzero(self.site == site)

    def thin(self, most: int, keep: Choice) -> tuple["Problem", Choice]:
        """Leave each candidate at most ``most`` thresholds, those of ``keep`` among them; return ``keep`` in them."""
        kept = dict(option for option in keep if option is not None)
        picks = [_spread(len(t), most, self.disagreements, kept.get(c)) for c, t in enumerate(self.thresholds)]
        level = [np.searchsorted(pick, row) for pick, row in zip(picks, self.level, strict=True)]
        fewer = dataclasses.replace(
            self,
            level=np.array(level, np.int64).reshape(self.level.shape),
            thresholds=tuple(t[pick] for t, pick in zip(self.thresholds, picks, strict=True)),
        )
        return fewer, tuple(o and (o[0], int(np.searchsorted(picks[o[0]], o[1]))) for o in keep)


def read_problem(
    table: ReplayTable,
    costs: CostTable,
    *,
    disagreements: int,
    limits: Sequence[float | int | None],
    memory: Mapping[str, float],
) -> Problem:
    """Turn a table, its candidates in the order of their sites, into options; limits None is no limit."""
    wrong = ~table.agrees
    levels = [_levels(scores, bad) for scores, bad in zip(table.scores, wrong, strict=True)]
    sites = sorted(set(table.sites))
    lookup = np.array([costs.lookup_ms[name] for name in table.names])
    until = np.array([costs.until(site) for site in (*sites, table.depth)])
    uses = np.stack([[memory.get(name, 0.0) for name in table.names], lookup, np.ones(len(lookup))], axis=1)
    return Problem(
        site=np.searchsorted(sites, table.sites),
        lookup_ms=lookup,
        uses=uses.astype(float),
        wrong=wrong,
        level=np.array([level for level, _ in levels], np.int64).reshape(wrong.shape),
        thresholds=tuple(thresholds for _, thresholds in levels),
        before_ms=float(until[0]),
        span_ms=np.diff(until),
        disagreements=disagreements,
        limits=np.array([np.inf if limit is None else limit for limit in limits], float),
    )


def _levels(
    scores: Float[np.ndarray, " n"], wrong: Bool[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " levels"]]:
    """Return each request's level, and the thresholds just above a request that would newly disagree."""
    hits = scores > -np.inf  # -infinity never does
    values = -np.unique(-scores[hits])  # falling
    bad = np.isin(values, scores[hits & wrong])
    stops = values[np.append(bad[1:], True)] if len(values) else values
    level = np.full(len(scores), len(stops))
    level[hits] = np.searchsorted(-stops, -scores[hits])
    return level, stops


def _spread(levels: int, most: int, budget: int, keep: int | None) -> Int[np.ndarray, " kept"]:
    """Choose thresholds: the strict ones densely, for level i comes with about i wrong answers; fewer beyond."""
    if levels <= most:
        return np.arange(levels)
    most -= keep is not None
    near = min(budget + 1, levels)
    many = max(1, min(near, most - most // 4))
    inside = (near - 1) * np.linspace(0, 1, many) ** (1.0 if many == near else 1.5)
    beyond = near - 1 + (levels - near) * np.linspace(0, 1, max(0, most - many) + 1)[1:] ** 2
    picks = np.unique(np.round(np.concatenate([inside, beyond])).astype(int))
    return picks if keep is None else np.union1d(picks, [keep])


def evaluate(options: Problem, choice: Choice) -> tuple[float, int]:
    """Return the time of all requests and the number of wrong answers."""
    left = np.ones(options.n, bool)
    ms, wrong = options.start_ms, 0
    for option, span in zip(choice, options.span_ms, strict=True):
        if option is not None:
            c, t = option
            ms += options.lookup_ms[c] * left.sum()
            hits = left & (options.level[c] <= t)
            wrong += int((hits & options.wrong[c]).sum())
            left &= ~hits
        ms += span * left.sum()
    return float(ms), wrong


def cost_to_go(
    options: Problem, choice: Choice, price: float
) -> tuple[Float[np.ndarray, "sites_and_end n"], Float[np.ndarray, "sites_and_end n"]]:
    """Return what each request still takes from each site on, with ``price`` ms a wrong answer; and the wrong ones."""
    ms = np.zeros((options.sites + 1, options.n))
    wrong = np.zeros_like(ms)
    for s in reversed(range(options.sites)):
        ms[s], wrong[s] = options.span_ms[s] + ms[s + 1], wrong[s + 1]
        if (option := choice[s]) is not None:
            c, t = option
            hit = options.level[c] <= t
            wrong[s] = np.where(hit, options.wrong[c], wrong[s])
            ms[s] = options.lookup_ms[c] + np.where(hit, price * options.wrong[c], ms[s])
    return ms, wrong


def used(options: Problem, choice: Choice) -> Float[np.ndarray, " resources"]:
    """Return the bytes, the full-miss time of lookups, and the places that a choice takes."""
    return options.uses[[option[0] for option in choice if option is not None]].sum(0)


def fits(options: Problem, choice: Choice) -> bool:
    """Say whether a choice stays within the limits."""
    return bool((used(options, choice) <= options.limits * (1 + 1e-12)).all())


RESOURCES = ("bytes of memory", "ms of lookups on a full miss", "sites")
