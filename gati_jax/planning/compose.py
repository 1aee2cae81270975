"""Composition: which caches, with which thresholds, within which budgets (GATI's composition phase).

`prunable` and `rank` come before it: what needs no fit because it cannot save time, and what each candidate saves
alone. `compose` then chooses jointly. The choice is exact where time allows: a local search finds a good one; branch
and bound improves on it until it has proved that nothing is better, or reports how much better something could still
be. Where that is much, no proof would come, and the time goes to the local search. A proof refers to a grid: each
candidate has at most ``thresholds`` thresholds, the strict ones densely, and those of the choice among them; between
two of them a faster one may lie. Bounds are sharp for some eight sites; with dozens, most of the gap is the bound's.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from gati_jax.errors import InputError, check_kind

from .binomial import largest_passing
from .branch_and_bound import initial_multipliers, solve
from .local_search import Found, alternatives, first_search, polish, search_on
from .problem import MAX_THRESHOLDS, RESOURCES, Choice, Problem, evaluate, read_problem, used, within
from .tables import CostTable, ReplayTable, cascade_ms, replay_plan

GRID = 16  # thresholds a candidate in the exact search; the local one sees MAX_THRESHOLDS
RESTARTS = 30
SEARCH_UNTIL, BOUND_UNTIL = 0.3, 0.6  # shares of the time; the rest is for the proof, or for search if it is far off
WIDE = 0.05  # a gap of which no proof comes
PROVED = 1e-8  # a gap that rounding explains


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of a composition; None is no limit."""

    disagreements: int
    """Requests of the table that may get another answer than the base's."""
    memory_bytes: int | None = None
    """All chosen caches together."""
    worst_ms: float | None = None
    """Time of a request that no cache answers: all blocks and all lookups."""
    sites: int | None = None

    def __post_init__(self) -> None:
        """Check that nothing is negative.

        Raises:
            InputError: Names the field.
        """
        for name in ("disagreements", "memory_bytes", "worst_ms", "sites"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"{name}: expected 0 or more, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composition:
    """The chosen caches in the order of their sites, and how good the choice is."""

    names: tuple[str, ...]
    sites: tuple[int, ...]
    thresholds: tuple[float, ...]
    disagreements: int
    mean_ms: float
    memory_bytes: int
    bound_ms: float
    """Nothing within the budget takes less, with ``grid`` thresholds for each candidate."""
    gap: float
    """The share of ``mean_ms`` that might still be saved; 0 where it is proved that nothing can be."""
    proved: bool
    grid: int
    """The most thresholds of a candidate that the proof considers; those of the choice are among them."""
    nodes: int
    seconds: float
    refused: Mapping[str, str] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """For every candidate that was not chosen, the reason."""


def compose(
    table: ReplayTable,
    costs: CostTable,
    budget: Budget,
    *,
    bytes: Mapping[str, int] | None = None,  # noqa: A002
    seconds: float = 60.0,
    thresholds: int = GRID,
    progress: Callable[[int, float, float], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Composition:
    """Choose at most one candidate a site, and their thresholds, for the least expected latency within a budget.

    Args:
        table: Replay, with out-of-fold scores; hits are counted jointly.
        costs: Measured times of the same base and candidates.
        budget: The limits.
        bytes: For each candidate by name; needed for a budget of memory.
        seconds: To search for. A proof may come sooner; without one the remaining gap is reported.
        thresholds: At most so many for each candidate in the exact search, 64 at most.
        progress: Called now and then with the nodes so far, the best mean time and its lower bound.
        clock: What ``seconds`` are counted by; ``time.process_time`` where other work shares the machine.

    Raises:
        InputError: Tables of different bases, no request, bytes that are missing, a worst time that the base exceeds.
    """
    started = clock()
    check_tables(table, costs)
    if not 1 <= thresholds <= MAX_THRESHOLDS:
        raise InputError(f"thresholds: expected 1 to {MAX_THRESHOLDS}, got {thresholds}")
    order = sorted(range(len(table.names)), key=lambda i: (table.sites[i], table.names[i]))
    table = table.take([table.names[i] for i in order])
    problem = _stated(table, costs, budget, bytes or {})
    fine, _ = problem.thin(MAX_THRESHOLDS, (None,) * problem.sites)
    found, penalty = first_search(fine)
    rng, n, nodes = np.random.default_rng(0), len(table), 0

    def spent(share: float) -> bool:
        return clock() - started >= share * seconds

    found = search_on(
        fine, found, penalty, rng, restarts=min(RESTARTS, len(table.names)), out_of_time=lambda: spent(SEARCH_UNTIL)
    )
    multipliers = initial_multipliers(fine, found.choice, penalty)
    while True:
        coarse, choice = fine.thin(thresholds, found.choice)
        result = solve(
            coarse,
            Found(found.ms, choice),
            multipliers,
            out_of_time=lambda gap: spent(BOUND_UNTIL if gap > WIDE else 1.0),
            progress=lambda more, ms, bound, before=nodes: progress and progress(before + more, ms / n, bound / n),
        )
        nodes, multipliers, before = nodes + result.nodes, result.multipliers, found
        if result.found.ms < found.ms:
            found = polish(fine, _translate(coarse, fine, result.found.choice))
        if result.bound_ms < found.ms * (1 - PROVED):
            found = search_on(fine, found, penalty, rng, restarts=None, out_of_time=lambda: spent(1.0))
        # The bound holds for the coarse grid alone. A choice off it is bounded anew, on a grid with its own
        # thresholds; each time it is faster, so this ends. If no time is left, the same multipliers bound the new grid.
        if found.ms >= before.ms or all(
            fine.thresholds[o[0]][o[1]] in coarse.thresholds[o[0]] for o in found.choice if o is not None
        ):
            break
    return _composition(
        table, costs, fine, found.choice, bound_ms=result.bound_ms / n, grid=coarse.width, nodes=nodes,
        seconds=clock() - started,
    )  # fmt: skip


def _stated(table: ReplayTable, costs: CostTable, budget: Budget, bytes: Mapping[str, int]) -> Problem:  # noqa: A002
    """State the problem; refuse a budget that cannot be kept or checked."""
    if budget.memory_bytes is not None and (missing := sorted(set(table.names) - set(bytes))):
        raise InputError(f"bytes: expected those of every candidate, got none of {', '.join(missing)}")
    if budget.worst_ms is not None and budget.worst_ms < costs.full_ms * (1 - 1e-12):
        raise InputError(f"worst_ms: expected at least the base's own {costs.full_ms} ms, got {budget.worst_ms}")
    worst = None if budget.worst_ms is None else max(0.0, budget.worst_ms - costs.full_ms)
    limits = (budget.memory_bytes, worst, budget.sites)
    memory = {name: float(size) for name, size in bytes.items()}
    return read_problem(table, costs, disagreements=budget.disagreements, limits=limits, memory=memory)


def check_tables(table: ReplayTable, costs: CostTable) -> None:
    """Check that two tables are of the same base and candidates.

    Raises:
        InputError: They are not, or nothing has been replayed.
    """
    check_kind("table", table, ReplayTable, "what gati_jax.replay returns")
    check_kind("costs", costs, CostTable, "what gati_jax.measure_costs returns")
    if table.depth != len(costs.blocks_ms) or not set(table.names) <= set(costs.lookup_ms):
        got = f"{len(costs.blocks_ms)} and {tuple(costs.lookup_ms)}"
        raise InputError(f"costs: expected times of {table.depth} blocks and of {table.names}, got {got}")
    if len(table) == 0:
        raise InputError("table: expected at least one request, got none")


def _translate(coarse: Problem, fine: Problem, choice: Choice) -> Choice:
    """Return the same choice in the indices of the finer problem."""
    return tuple(o and (o[0], fine.index_of(o[0], float(coarse.thresholds[o[0]][o[1]]))) for o in choice)


def _composition(
    table: ReplayTable, costs: CostTable, problem: Problem, choice: Choice, *, bound_ms: float, grid: int, nodes: int,
    seconds: float,
) -> Composition:  # fmt: skip
    chosen = [option for option in choice if option is not None]
    part = table.take([table.names[c] for c, _ in chosen])
    thresholds = np.array([problem.thresholds[c][t] for c, t in chosen], np.float32)
    mean_ms = cascade_ms(part, thresholds, costs)
    wrong = int(replay_plan(part, thresholds).disagrees.sum())
    assert within(used(problem, choice), problem.limits)  # noqa: S101
    assert wrong == evaluate(problem, choice)[1] <= problem.disagreements  # noqa: S101
    gap = max(0.0, 1 - bound_ms / mean_ms) if mean_ms > 0 else 0.0
    proved = gap <= PROVED
    return Composition(
        names=part.names,
        sites=part.sites,
        thresholds=tuple(thresholds.tolist()),
        disagreements=wrong,
        mean_ms=mean_ms,
        memory_bytes=round(used(problem, choice)[0]),
        bound_ms=min(bound_ms, mean_ms),
        gap=0.0 if proved else gap,
        proved=proved,
        grid=grid,
        nodes=nodes,
        seconds=seconds,
        refused=MappingProxyType(_explanations(table, costs, problem, choice)),
    )


def _explanations(table: ReplayTable, costs: CostTable, problem: Problem, choice: Choice) -> dict[str, str]:
    """Return a sentence for every candidate that ``choice`` leaves out."""
    now_ms = evaluate(problem, choice)[0]
    found = alternatives(problem, choice)
    best = np.where(found.wrong <= problem.disagreements, found.ms, np.inf).min(1, initial=np.inf)
    sentences: dict[str, str] = {}
    for c, ms in enumerate(best.tolist()):
        option = choice[site := problem.site[c]]
        if option is None or c != option[0]:
            others = used(problem, (*choice[:site], None, *choice[site + 1 :]))
            rival = None if option is None else table.names[option[0]]
            sentences[table.names[c]] = (
                _alone(table, costs, problem, c)
                or _over("no room beside the others", others + problem.uses[c], problem)
                or _slower(rival, (ms - now_ms) / problem.n)
            )
    return sentences


def _alone(table: ReplayTable, costs: CostTable, problem: Problem, c: int) -> str | None:
    """Say what keeps a candidate out whatever else is chosen."""
    rest = costs.full_ms - costs.until(table.sites[c])
    if problem.lookup_ms[c] >= rest:
        return f"its lookup takes {problem.lookup_ms[c]:.3f} ms, all blocks behind it {rest:.3f} ms"
    if over := _over("over the budget by itself", problem.uses[c], problem):
        return over
    return None if len(problem.thresholds[c]) else "it answers nothing"


def _over(what: str, uses: Float[np.ndarray, " resources"], problem: Problem) -> str | None:
    """Say of which resource there is too little, if of any."""
    for need, limit, resource in zip(uses, problem.limits, RESOURCES, strict=True):
        if need > limit * (1 + 1e-12):
            return f"{what}: {need:g} {resource}, {limit:g} allowed"
    return None


def _slower(rival: str | None, lost_ms: float) -> str:
    """Compare with the choice, the other sites staying as they are."""
    if np.isinf(lost_ms):
        return "at every threshold too many requests would disagree"
    if rival is not None:
        return f"{rival} at the same site saves {max(0.0, lost_ms):.3f} ms more"
    return f"would cost {max(0.0, lost_ms):.3f} ms more than it saves beside the others"


def prunable(
    costs: CostTable, sites: Mapping[str, int], sizes: Mapping[str, int], *, memory_bytes: int | None = None
) -> dict[str, str]:
    """Return the candidates that cannot save time whatever they learn, or are too large, with the reasons.

    Args:
        costs: Measured times; a lookup takes as long before a fit as after it. Candidates over the memory budget need
            none.
        sites: Of every candidate by name.
        sizes: Bytes of every candidate by name.
        memory_bytes: What all caches of a plan may take together.
    """
    reasons = {}
    for name, site in sites.items():
        if memory_bytes is not None and sizes[name] > memory_bytes:
            mb, most = sizes[name] / 1e6, memory_bytes / 1e6
            reasons[name] = f"its {mb:.2f} MB are more than the {most:.2f} MB for all caches"
            continue
        lookup, saves = costs.lookup_ms[name], costs.full_ms - costs.until(site)
        if lookup >= saves:
            reasons[name] = f"its lookup takes {lookup:.3f} ms, and if every request left it would save {saves:.3f} ms"
    return reasons


def least_disagreement(table: ReplayTable, costs: CostTable) -> float | None:
    """Return the smallest share of requests that must disagree before any candidate, alone, saves time.

    None: no candidate saves time at any threshold.
    """
    rates = []
    for i, (name, site) in enumerate(zip(table.names, table.sites, strict=True)):
        order = np.argsort(-table.scores[i], kind="stable")
        scores, wrong = table.scores[i][order], np.cumsum(~table.agrees[i][order])
        saved = np.arange(1, len(table) + 1) * (costs.full_ms - costs.until(site)) - len(table) * costs.lookup_ms[name]
        ends = np.append(scores[1:] < scores[:-1], True)  # equal scores leave together
        rates += (wrong[ends & (saved > 0) & (scores > -np.inf)] / len(table)).tolist()
    return min(rates, default=None)


class Rank(NamedTuple):
    """What a candidate saves as the only cache."""

    name: str
    site: int
    agreement: float
    hits: float
    """Share of requests that leave, at as many disagreements as could be certified."""
    saved: float
    """Share of the base's time that this saves; negative where the lookup costs more than it saves."""


def rank(table: ReplayTable, costs: CostTable, *, epsilon: float, delta: float = 0.05) -> tuple[Rank, ...]:
    """Rank candidates by what each saves alone, the best first.

    Args:
        table: Replay of the select split.
        costs: Measured times.
        epsilon: The disagreement to be certified.
        delta: The certificate's.
    """
    target = max(0, largest_passing(len(table), epsilon, delta))
    ranks = []
    for i, (name, site) in enumerate(zip(table.names, table.sites, strict=True)):
        order = np.argsort(-table.scores[i], kind="stable")
        scores, wrong = table.scores[i][order], np.cumsum(~table.agrees[i][order])
        ends = np.append(scores[1:] < scores[:-1], True)
        stops = np.flatnonzero(ends & (wrong <= target) & (scores > -np.inf))  # -infinity never hits
        hits = (int(stops[-1]) + 1) / len(table) if len(stops) else 0.0
        saved = (hits * (costs.full_ms - costs.until(site)) - costs.lookup_ms[name]) / costs.full_ms
        ranks.append(Rank(name, site, float(table.agrees[i].mean()), hits, saved))
    return tuple(sorted(ranks, key=lambda r: -r.saved))
