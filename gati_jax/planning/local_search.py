"""Good compositions by local search: branch and bound starts from one, and its own finds are polished here."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from .problem import Choice, Option, Problem, cost_to_go, evaluate, pass_site, used, within

HALVINGS = 10  # of the penalty of a wrong answer
SPREAD = 0.3  # of the log penalty, from one descent to the next


class Found(NamedTuple):
    """A choice within the budgets, and the time of all requests."""

    ms: float
    choice: Choice


class Alternatives(NamedTuple):
    """What a whole choice would come to with another option in place of what it has at that option's site."""

    ms: Float[np.ndarray, "candidates thresholds"]  # infinity: no such threshold, or over the limits
    wrong: Int[np.ndarray, "candidates thresholds"]


def alternatives(problem: Problem, choice: Choice) -> Alternatives:
    """Evaluate every option, the other sites staying as they are."""
    ms, wrong = np.full(problem.usable.shape, np.inf), np.zeros(problem.usable.shape, int)
    after, later = cost_to_go(problem, choice, 0.0)
    rows, now_ms, now_wrong = np.arange(problem.n), problem.start_ms, 0
    for site, option in enumerate(choice):
        here = problem.at(site)
        others = used(problem, _replaced(choice, site, None))
        here = here[within(others + problem.uses[here], problem.limits)]
        if len(here):
            level = problem.level[here].take(rows, 1)
            on_ms, on_wrong = after[site + 1].take(rows) + problem.span_ms[site], later[site + 1].take(rows)
            lookup_ms = problem.lookup_ms[here, None] * len(rows)
            ms[here] = now_ms + on_ms.sum() + lookup_ms + _summed(level, -on_ms, problem.width + 1)
            more = _summed(level, problem.wrong[here].take(rows, 1) - on_wrong, problem.width + 1)
            wrong[here] = now_wrong + np.rint(on_wrong.sum() + more)
        rows, now_ms, now_wrong = pass_site(problem, site, option, rows, now_ms, now_wrong)
    return Alternatives(np.where(problem.usable, ms, np.inf), wrong)


def _replaced(choice: Choice, site: int, option: Option | None) -> Choice:
    return (*choice[:site], option, *choice[site + 1 :])


def _summed(
    level: Int[np.ndarray, "here left"], values: Float[np.ndarray, "..."], width: int
) -> Float[np.ndarray, "here thresholds"]:
    """Sum values over the requests that hit at each threshold."""
    index = level + width * np.arange(len(level))[:, None]
    sums = np.bincount(index.ravel(), np.broadcast_to(values, index.shape).ravel(), width * len(level))
    return sums.astype(float).reshape(len(level), width)[:, :-1].cumsum(1)  # of nothing, bincount gives integers


def descend(problem: Problem, choice: Choice, value: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Choice:
    """Make the changes that lessen ``value(ms, wrong)``, until none is left.

    A change closes one site or none, then chooses the best option at any site: so it opens a cache, closes one, moves
    a threshold, or, where the limits leave no room for another cache, exchanges two.
    """
    now = float(value(*map(np.array, evaluate(problem, choice))))
    since = 0
    for site in itertools.cycle((None, *range(problem.sites))):
        if since > problem.sites:
            return choice
        since += 1
        if site is not None and choice[site] is None:
            continue
        trial = choice if site is None else _replaced(choice, site, None)
        best = float(value(*map(np.array, evaluate(problem, trial))))
        found = alternatives(problem, trial)
        values = value(*found)
        if values.size and values.min() < best:
            c, t = divmod(int(values.argmin()), problem.width)
            best, trial = float(values[c, t]), _replaced(trial, int(problem.site[c]), (c, t))
        if best < now - 1e-9 * max(1.0, abs(now)):
            choice, now, since = trial, best, 0
    return choice


def polish(problem: Problem, choice: Choice) -> Found:
    """Descend within the budget of disagreements, from a choice within it."""
    choice = descend(problem, choice, lambda ms, wrong: np.where(wrong <= problem.disagreements, ms, np.inf))
    return Found(evaluate(problem, choice)[0], choice)


def first_search(problem: Problem) -> tuple[Found, float]:
    """Descend from nothing at many penalties of a wrong answer, and polish what is within the budgets.

    Returns:
        The best, and the penalty in ms at which the budget of disagreements binds.
    """
    low, high = 0.0, 1.0 + problem.start_ms + problem.span_ms.sum() * problem.n
    nothing: Choice = (None,) * problem.sites
    best = polish(problem, nothing)
    penalty, scale = high, 8.0 * (problem.before_ms + problem.span_ms.sum()) + 1e-9
    for turn in range(HALVINGS):
        penalty = (low + min(high, scale)) / 2 if turn else scale
        choice = _descend_penalised(problem, nothing, penalty)
        if evaluate(problem, choice)[1] <= problem.disagreements:
            high = penalty
            best = min(best, polish(problem, choice), key=lambda found: found.ms)
        else:
            low, scale = penalty, scale * 4 if penalty == scale else scale
    return best, min(high, max(low, scale))


def search_on(
    problem: Problem, best: Found, penalty: float, rng: np.random.Generator, *, restarts: int | None,
    out_of_time: Callable[[], bool],
) -> Found:  # fmt: skip
    """Descend from the best with two of its caches exchanged at random, again and again; return the best then."""
    turn = 0
    while (restarts is None or turn < restarts) and not out_of_time():
        turn, best = turn + 1, _restart(problem, best, penalty, rng)
    return best


def _restart(problem: Problem, best: Found, penalty: float, rng: np.random.Generator) -> Found:
    able, opened = np.flatnonzero(problem.usable.any(1)), [s for s, option in enumerate(best.choice) if option]
    choice = best.choice
    for site in rng.permutation(opened)[:2]:
        choice = _replaced(choice, int(site), None)
    for c in rng.permutation(able)[:2].tolist():
        trial = _replaced(choice, int(problem.site[c]), (c, int(rng.integers(1 + len(problem.thresholds[c]) // 2))))
        choice = trial if within(used(problem, trial), problem.limits) else choice
    penalty *= float(np.exp(SPREAD * rng.standard_normal()))
    for _ in range(6):
        choice = _descend_penalised(problem, choice, penalty)
        if evaluate(problem, choice)[1] <= problem.disagreements:
            found = polish(problem, choice)
            return found if found.ms < best.ms - 1e-9 * max(1.0, best.ms) else best
        penalty *= 1.15
    return best


def _descend_penalised(problem: Problem, choice: Choice, penalty: float) -> Choice:
    return descend(problem, choice, lambda ms, wrong: ms + penalty * wrong)
