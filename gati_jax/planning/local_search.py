"""Good compositions by local search: branch and bound starts from one, and its own finds are polished here."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from .problem import Choice, Option, Problem, cost_to_go, evaluate, pass_sites, used, within

HALVINGS = 10  # of the penalty of a wrong answer
SPREAD = 0.3  # of the log penalty, when a search is restarted


class Found(NamedTuple):
    """A choice within the budgets, and the time of all requests."""

    ms: float
    choice: Choice


class Alternatives(NamedTuple):
    """What a whole choice would come to with another option at one site."""

    ms: Float[np.ndarray, "here thresholds"]
    wrong: Int[np.ndarray, "here thresholds"]
    allowed: Bool[np.ndarray, "here thresholds"]  # the candidate has the threshold, and is within the limits
    candidates: Int[np.ndarray, " here"]
    closed: tuple[float, int]  # time and wrong answers with no cache at the site


def alternatives(problem: Problem, choice: Choice, site: int) -> Alternatives:
    """Evaluate every option of a site, the other sites staying as they are."""
    left, ms, wrong = pass_sites(problem, choice[:site])
    after, later = cost_to_go(problem, choice, 0.0)
    on_ms, on_wrong = after[site + 1][left] + problem.span_ms[site], later[site + 1][left]
    closed = (float(ms + on_ms.sum()), wrong + int(on_wrong.sum()))

    here, width = problem.at(site), problem.width + 1
    level = problem.level[here][:, left]
    lengths = np.array([len(problem.thresholds[c]) for c in here], int)
    others = used(problem, _replaced(choice, site, None))
    room = within(others + problem.uses[here], problem.limits)
    return Alternatives(
        ms=closed[0] + _summed(level, -on_ms, width) + (problem.lookup_ms[here] * left.sum())[:, None],
        wrong=closed[1] + np.rint(_summed(level, problem.wrong[here][:, left] - on_wrong, width)).astype(int),
        allowed=(np.arange(width - 1) < lengths[:, None]) & room[:, None],
        candidates=here,
        closed=closed,
    )


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
    """Change one site at a time for the least ``value(ms, wrong)``, until no change helps."""
    ms, wrong = evaluate(problem, choice)
    now = float(value(np.array(ms), np.array(wrong)))
    since = 0
    for site in itertools.cycle(range(problem.sites)):
        if since == problem.sites:
            break
        since += 1
        found = alternatives(problem, choice, site)
        best, option = float(value(np.array(found.closed[0]), np.array(found.closed[1]))), None
        if found.ms.size:
            values = np.where(found.allowed, value(found.ms, found.wrong), np.inf)
            c, t = np.unravel_index(values.argmin(), values.shape)
            if values[c, t] < best:
                best, option = float(values[c, t]), (int(found.candidates[c]), int(t))
        if best < now - 1e-9 * max(1.0, abs(now)):
            choice, now, since = _replaced(choice, site, option), best, 0
    return choice


def polish(problem: Problem, choice: Choice) -> Found:
    """Descend within the budget of disagreements, from a choice within it."""
    choice = descend(problem, choice, lambda ms, wrong: np.where(wrong <= problem.disagreements, ms, np.inf))
    return Found(evaluate(problem, choice)[0], choice)


def search(problem: Problem, start: Choice, *, restarts: int, out_of_time: Callable[[], bool]) -> tuple[Found, float]:
    """Search from ``start``, from nothing at many penalties of a wrong answer, and from the best with two sites closed.

    Returns:
        The best within the budgets, never worse than ``start``, and the penalty in ms at which the budget of
        disagreements binds.
    """
    best, penalty = _bisect_penalty(problem, polish(problem, start), out_of_time)
    rng = np.random.default_rng(0)
    for _ in range(restarts if problem.sites else 0):
        if out_of_time():
            break
        closed = rng.choice(problem.sites, min(2, problem.sites), replace=False)
        choice = tuple(None if s in closed else option for s, option in enumerate(best.choice))
        trial = penalty * float(np.exp(SPREAD * rng.standard_normal()))
        for _ in range(6):
            choice = _descend_penalised(problem, choice, trial)
            if evaluate(problem, choice)[1] <= problem.disagreements:
                found = polish(problem, choice)
                best = found if found.ms < best.ms - 1e-9 * max(1.0, best.ms) else best
                break
            trial *= 1.15
    assert within(used(problem, best.choice), problem.limits)  # noqa: S101
    return best, penalty


def _bisect_penalty(problem: Problem, best: Found, out_of_time: Callable[[], bool]) -> tuple[Found, float]:
    """Look for the penalty at which a descent from nothing just meets the budget; polish what it finds on the way."""
    low, high = 0.0, 1.0 + problem.start_ms + problem.span_ms.sum() * problem.n
    nothing: Choice = (None,) * problem.sites
    penalty, scale = high, 8.0 * (problem.before_ms + problem.span_ms.sum()) + 1e-9
    for turn in range(HALVINGS):
        if out_of_time():
            break
        penalty = (low + min(high, scale)) / 2 if turn else scale
        choice = _descend_penalised(problem, nothing, penalty)
        if evaluate(problem, choice)[1] <= problem.disagreements:
            high = penalty
            best = min(best, polish(problem, choice), key=lambda found: found.ms)
        else:
            low, scale = penalty, scale * 4 if penalty == scale else scale
    return best, min(high, max(low, scale))


def _descend_penalised(problem: Problem, choice: Choice, penalty: float) -> Choice:
    return descend(problem, choice, lambda ms, wrong: ms + penalty * wrong)
