"""Composition: which caches, with which thresholds, within which budgets (GATI's composition phase).

The choice is exact where time allows: a local search finds a good one, branch and bound improves on it until it has
proved that nothing is better, or says how much better something could still be. "Proved" refers to a grid: each
candidate has at most ``thresholds`` of them, the strict ones densely, and those of the choice among them. Between
two of the grid a faster one may lie. Bounds are sharp for some eight sites; with dozens, most of the gap is theirs.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from gati_jax.errors import InputError

from .binomial import largest_passing
from .branch_and_bound import first_prices, solve
from .greedy import MAX_THRESHOLDS, greedy
from .local_search import Found, alternatives, polish, search
from .problem import RESOURCES, Choice, Problem, evaluate, fits, read_problem, used
from .tables import CostTable, ReplayTable, cascade_ms, replay_plan

GRID = 16  # thresholds a candidate in the exact search; the local one sees MAX_THRESHOLDS
RESTARTS = 30
LOCAL_SHARE = 0.3  # of the time, at most
PROVED = 1e-8  # a gap that rounding explains


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a composition may take; None is no limit."""

    disagreements: int
    """Requests of the table that may get another answer than the base's."""
    memory_bytes: int | None = None
    """Of the chosen caches together."""
    worst_ms: float | None = None
    """Of a request that no cache answers: all blocks and all lookups."""
    sites: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is no budget.

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
    """Nothing within the budget takes less, with ``grid`` thresholds a candidate."""
    gap: float
    """The share of ``mean_ms`` that might still be saved; 0 where that is proved to be none."""
    proved: bool
    grid: int
    """Thresholds that the proof allows each candidate; those of the choice are among them."""
    nodes: int
    seconds: float
    refused: Mapping[str, str] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """For every candidate that was not chosen, why."""


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
        budget: What may not be exceeded.
        bytes: For each candidate by name; needed for a budget of memory.
        seconds: To search for. A proof may come sooner; without one the remaining gap is told.
        thresholds: At most so many a candidate in the exact search, 64 at most.
        progress: Told nodes, the best mean time and its lower bound now and then.
        clock: What ``seconds`` are counted by; ``time.process_time`` where other work shares the machine.

    Raises:
        InputError: Tables of different bases, no request, bytes that are missing, a worst time that the base exceeds.
    """
    began = clock()
    check_tables(table, costs)
    if not 1 <= thresholds <= MAX_THRESHOLDS:
        raise InputError(f"thresholds: expected 1 to {MAX_THRESHOLDS}, got {thresholds}")
    memory = {name: float(size) for name, size in (bytes or {}).items()}
    if budget.memory_bytes is not None and (missing := sorted(set(table.names) - set(memory))):
        raise InputError(f"bytes: expected those of every candidate, got none of {', '.join(missing)}")
    if budget.worst_ms is not None and budget.worst_ms < costs.full_ms * (1 - 1e-12):
        raise InputError(f"worst_ms: expected at least the base's own {costs.full_ms} ms, got {budget.worst_ms}")
    table = in_order(table)
    worst = None if budget.worst_ms is None else max(0.0, budget.worst_ms - costs.full_ms)
    options = read_problem(
        table, costs, disagreements=budget.disagreements, limits=(budget.memory_bytes, worst, budget.sites),
        memory=memory,
    )  # fmt: skip

    def over(share: float) -> Callable[[], bool]:
        return lambda: clock() - began >= share * seconds

    found, fine, price = _good_choice(table, costs, options, over(LOCAL_SHARE))
    prices, nodes, n = first_prices(fine, found.choice, price), 0, len(table)

    def tell(more: int, ms: float, bound: float) -> None:
        if progress:
            progress(nodes + more, ms / n, bound / n)

    while True:
        coarse, choice = fine.thin(thresholds, found.choice)
        result = solve(coarse, Found(found.ms, choice), prices, out_of_time=over(1.0), progress=tell)
        nodes, prices = nodes + result.nodes, result.prices
        if result.found.ms >= found.ms:
            break
        found = polish(fine, _translate(coarse, fine, result.found.choice))
        # The bound speaks of the coarse grid alone. A choice that has left it is judged anew, on a grid with its own
        # thresholds; each time it is faster, so this ends. Without time left, the same prices bound the new grid.
        if _has(coarse, fine, found.choice):
            break
    return _told(table, costs, fine, found.choice, result.bound_ms / n, coarse.width, nodes, clock() - began)


def check_tables(table: ReplayTable, costs: CostTable) -> None:
    """Check that two tables are of the same base and candidates.

    Raises:
        InputError: They are not, or nothing has been replayed.
    """
    if table.depth != len(costs.blocks_ms) or not set(table.names) <= set(costs.lookup_ms):
        got = f"{len(costs.blocks_ms)} and {tuple(costs.lookup_ms)}"
        raise InputError(f"costs: expected times of {table.depth} blocks and of {table.names}, got {got}")
    if len(table) == 0:
        raise InputError("table: expected at least one request, got none")


def in_order(table: ReplayTable) -> ReplayTable:
    """Return the table with its candidates in the order of their sites, and of their names at one site."""
    order = sorted(range(len(table.names)), key=lambda i: (table.sites[i], table.names[i]))
    return table.take([table.names[i] for i in order])


def _good_choice(
    table: ReplayTable, costs: CostTable, options: Problem, out_of_time: Callable[[], bool]
) -> tuple[Found, Problem, float]:
    """Search from the greedy walk's end; return the options with few enough thresholds, its own among them."""
    index = {name: c for c, name in enumerate(table.names)}

    def room(names: Sequence[str]) -> bool:
        chosen = [index[name] for name in names]
        return bool((options.uses[chosen].sum(0) <= options.limits * (1 + 1e-12)).all())

    _, opened = greedy(table, costs, options.disagreements, fits=room, out_of_time=out_of_time)
    start: list[tuple[int, int] | None] = [None] * options.sites
    for name, threshold in opened.items():
        c = index[name]
        start[options.site[c]] = (c, int(np.searchsorted(-options.thresholds[c], -np.float32(threshold))))
    fine, choice = options.thin(MAX_THRESHOLDS, tuple(start))
    found, price = search(fine, choice, restarts=min(RESTARTS, len(table.names)), out_of_time=out_of_time)
    return found, fine, price


def _translate(coarse: Problem, fine: Problem, choice: Choice) -> Choice:
    """Return the same choice in the indices of other options."""
    return tuple(
        o and (o[0], int(np.searchsorted(-fine.thresholds[o[0]], -coarse.thresholds[o[0]][o[1]]))) for o in choice
    )


def _has(coarse: Problem, fine: Problem, choice: Choice) -> bool:
    """Say whether all thresholds of a choice among the fine options are coarse ones, too."""
    return all(fine.thresholds[o[0]][o[1]] in coarse.thresholds[o[0]] for o in choice if o is not None)


def _told(  # noqa: PLR0917
    table: ReplayTable, costs: CostTable, options: Problem, choice: Choice, bound_ms: float, grid: int, nodes: int,
    seconds: float,
) -> Composition:  # fmt: skip
    chosen = [option for option in choice if option is not None]
    part = table.take([table.names[c] for c, _ in chosen])
    thresholds = np.array([options.thresholds[c][t] for c, t in chosen], np.float32)
    mean_ms = cascade_ms(part, thresholds, costs)
    wrong = int(replay_plan(part, thresholds).disagrees.sum())
    assert fits(options, choice)  # noqa: S101
    assert wrong == evaluate(options, choice)[1] <= options.disagreements  # noqa: S101
    gap = max(0.0, 1 - bound_ms / mean_ms) if mean_ms > 0 else 0.0
    proved = gap <= PROVED
    return Composition(
        names=part.names,
        sites=part.sites,
        thresholds=tuple(thresholds.tolist()),
        disagreements=wrong,
        mean_ms=mean_ms,
        memory_bytes=round(options.uses[[c for c, _ in chosen], 0].sum()),
        bound_ms=min(bound_ms, mean_ms),
        gap=0.0 if proved else gap,
        proved=proved,
        grid=grid,
        nodes=nodes,
        seconds=seconds,
        refused=MappingProxyType(reasons(table, costs, options, choice)),
    )


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


def reasons(table: ReplayTable, costs: CostTable, options: Problem, choice: Choice) -> dict[str, str]:
    """Return a sentence for every candidate that ``choice`` leaves out."""
    chosen = {option[0] for option in choice if option is not None}
    now_ms = evaluate(options, choice)[0]
    told: dict[str, str] = {}
    for site, option in enumerate(choice):
        found = alternatives(options, choice, site)
        within = found.allowed & (found.wrong <= options.disagreements)
        best = np.where(within, found.ms, np.inf).min(1, initial=np.inf)
        for c, ms in zip(found.candidates, best, strict=True):
            if c not in chosen:
                rival = None if option is None else table.names[option[0]]
                lost = (float(ms) - now_ms) / options.n
                told[table.names[c]] = _alone(table, costs, options, int(c)) or _beside(
                    options, choice, site, int(c), rival, lost
                )
    return told


def _alone(table: ReplayTable, costs: CostTable, options: Problem, c: int) -> str | None:
    """Say what keeps a candidate out whatever else is chosen."""
    behind = costs.full_ms - costs.until(table.sites[c])
    if options.lookup_ms[c] >= behind:
        return f"its lookup takes {options.lookup_ms[c]:.3f} ms, all blocks behind it {behind:.3f} ms"
    for need, limit, what in zip(options.uses[c], options.limits, RESOURCES, strict=True):
        if need > limit * (1 + 1e-12):
            return f"over the budget by itself: {need:g} {what}, {max(0.0, limit):g} allowed"
    if not len(options.thresholds[c]):
        return "it answers nothing"
    return None


def _beside(options: Problem, choice: Choice, site: int, c: int, rival: str | None, lost: float) -> str:
    """Compare with the choice, the other sites staying as they are."""
    others = used(options, (*choice[:site], None, *choice[site + 1 :]))
    for need, limit, what in zip(others + options.uses[c], options.limits, RESOURCES, strict=True):
        if need > limit * (1 + 1e-12):
            return f"no room beside the others: {need:g} {what}, {limit:g} allowed"
    if np.isinf(lost):
        return "at every threshold too many requests would disagree"
    if rival is not None:
        return f"{rival} at the same site saves {max(0.0, lost):.3f} ms more"
    return f"would cost {max(0.0, lost):.3f} ms more than it saves beside the others"
