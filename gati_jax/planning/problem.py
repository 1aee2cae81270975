"""The composition problem on arrays: at every site one of its candidates with one of its thresholds, or none.

Times are milliseconds summed over all requests of the table. A candidate's thresholds are only those just above a
request that would newly disagree: between two of them, lowering the threshold lets more requests leave, and rightly.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from .tables import CostTable, ReplayTable

MAX_THRESHOLDS = 64  # for each candidate: more would fit the noise of a few thousand requests

Option = tuple[int, int]
"""A candidate and the index of one of its thresholds."""
Choice = tuple[Option | None, ...]
"""For each site an option, or None for no cache there."""
RESOURCES = ("bytes of memory", "ms of lookups on a full miss", "sites")
"""What the columns of ``uses`` and ``limits`` count."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Candidates, their thresholds, and the budgets."""

    site: Int[np.ndarray, " candidates"]  # index among the K sites, rising
    lookup_ms: Float[np.ndarray, " candidates"]
    uses: Float[np.ndarray, "candidates resources"]
    wrong: Bool[np.ndarray, "candidates n"]
    level: Int[np.ndarray, "candidates n"]  # the first of the candidate's thresholds at which the request hits
    thresholds: tuple[Float[np.ndarray, "..."], ...]  # falling; a request of level ``len`` never hits
    before_ms: float  # blocks before the first site
    span_ms: Float[np.ndarray, " sites"]  # blocks from each site to the next, from the last one to the end
    disagreements: int  # the budget
    limits: Float[np.ndarray, " resources"]

    @property
    def n(self) -> int:
        """Number of requests."""
        return self.wrong.shape[1]

    @property
    def sites(self) -> int:
        """Number of sites, K."""
        return len(self.span_ms)

    @functools.cached_property
    def width(self) -> int:
        """The largest number of thresholds that a candidate has."""
        return max((len(t) for t in self.thresholds), default=0)

    @property
    def usable(self) -> Bool[np.ndarray, "candidates thresholds"]:
        """Which of ``width`` thresholds each candidate has."""
        return np.arange(self.width) < np.array([len(t) for t in self.thresholds], int)[:, None]

    @property
    def start_ms(self) -> float:
        """Time of all requests up to the first site."""
        return self.before_ms * self.n

    def at(self, site: int) -> Int[np.ndarray, " here"]:
        """Return the candidates at a site."""
        return np.flatnonzero(self.site == site)

    def index_of(self, candidate: int, threshold: float) -> int:
        """Return the index of one of a candidate's thresholds."""
        return int(np.searchsorted(-self.thresholds[candidate], -np.float32(threshold)))

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
    """Build the problem of a table.

    Args:
        table: Its candidates in the order of their sites.
        costs: Their times.
        disagreements: Requests that may disagree.
        limits: Of each of `RESOURCES`; None is no limit.
        memory: Bytes by candidate; 0 where left out.
    """
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
    """Pick thresholds: the strict ones densely, for level i brings about i wrong answers, and fewer beyond."""
    if levels <= most:
        return np.arange(levels)
    most -= keep is not None
    near = min(budget + 1, levels)
    many = max(1, min(near, most - most // 4))
    inside = (near - 1) * np.linspace(0, 1, many) ** (1.0 if many == near else 1.5)
    beyond = near - 1 + (levels - near) * np.linspace(0, 1, max(0, most - many) + 1)[1:] ** 2
    picks = np.unique(np.round(np.concatenate([inside, beyond])).astype(int))
    return picks if keep is None else np.union1d(picks, [keep])


def pass_site(
    problem: Problem, site: int, option: Option | None, rows: Int[np.ndarray, " left"], ms: float, wrong: int
) -> tuple[Int[np.ndarray, " behind"], float, int]:
    """Send the requests that are left through one site.

    Returns:
        Which requests are left behind it, the time of all up to there, and the number of wrong answers.
    """
    if option is not None:
        c, t = option
        ms += problem.lookup_ms[c] * len(rows)
        hits = problem.level[c].take(rows) <= t
        wrong += int(problem.wrong[c].take(rows[hits]).sum())
        rows = rows[~hits]
    return rows, float(ms + problem.span_ms[site] * len(rows)), wrong


def evaluate(problem: Problem, choice: Choice) -> tuple[float, int]:
    """Return the time of all requests and the number of wrong answers."""
    rows, ms, wrong = np.arange(problem.n), problem.start_ms, 0
    for site, option in enumerate(choice):
        rows, ms, wrong = pass_site(problem, site, option, rows, ms, wrong)
    return ms, wrong


def cost_to_go(
    problem: Problem, choice: Choice, penalty: float
) -> tuple[Float[np.ndarray, "sites_and_end n"], Float[np.ndarray, "sites_and_end n"]]:
    """Return each request's time from each site on, with ``penalty`` ms for a wrong answer, and the wrong answers."""
    ms = np.zeros((problem.sites + 1, problem.n))
    wrong = np.zeros_like(ms)
    for s in reversed(range(problem.sites)):
        ms[s], wrong[s] = problem.span_ms[s] + ms[s + 1], wrong[s + 1]
        if (option := choice[s]) is not None:
            c, t = option
            hit = problem.level[c] <= t
            wrong[s] = np.where(hit, problem.wrong[c], wrong[s])
            ms[s] = problem.lookup_ms[c] + np.where(hit, penalty * problem.wrong[c], ms[s])
    return ms, wrong


def used(problem: Problem, choice: Choice) -> Float[np.ndarray, " resources"]:
    """Return how much of each resource a choice takes."""
    return problem.uses[[option[0] for option in choice if option is not None]].sum(0)


def within(
    uses: Float[np.ndarray, "... resources"], limits: Float[np.ndarray, "... resources"]
) -> Bool[np.ndarray, "..."]:
    """Say which uses are within the limits, up to rounding."""
    return np.asarray((uses <= limits * (1 + 1e-12)).all(-1))
