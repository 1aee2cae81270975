"""Good compositions by local search: where the exact search starts from, and what it polishes its own finds with."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from .problem import Choice, Problem, cost_to_go, evaluate, fits, used

HALVINGS = 10  # of the price of a wrong answer
SPREAD = 0.3  # of the log price, when a search is restarted


class Found(NamedTuple):
    """A choice within the budget."""

    ms: float
    choice: Choice


class Alternatives(NamedTuple):
    """What a whole choice would come to with another option at one site."""

    ms: Float[np.ndarray, "here thresholds"]
    wrong: Int[np.ndarray, "here thresholds"]
    allowed: Bool[np.ndarray, "here thresholds"]
    candidates: Int[np.ndarray, " here"]
    closed: tuple[float, int]


def alternatives(options: Problem, choice: Choice, site: int) -> Alternatives:
    """Evaluate every option of a site, the other sites staying as they are."""
    left = np.ones(options.n, bool)
    ms, wrong = options.start_ms, 0
    for option, span in zip(choice[:site], options.span_ms[:site], strict=True):
        if option is not None:
            hits = left & (options.level[option[0]] <= option[1])
            ms += options.lookup_ms[option[0]] * left.sum()
            wrong += int((hits & options.wrong[option[0]]).sum())
            left &= ~hits
        ms += span * left.sum()
    after, later = cost_to_go(options, choice, 0.0)
    on_ms, on_wrong = after[site + 1][left] + options.span_ms[site], later[site + 1][left]
    closed = (float(ms + on_ms.sum()), wrong + int(on_wrong.sum()))

    here, width = options.at(site), options.width + 1
    level = options.level[here][:, left]
    lengths = np.array([len(options.thresholds[c]) for c in here], int)
    others = used(options, (*choice[:site], None, *choice[site + 1 :]))
    room = np.all(others + options.uses[here] <= options.limits * (1 + 1e-12), axis=1)
    return Alternatives(
        ms=closed[0] + _summed(level, -on_ms, width) + (options.lookup_ms[here] * left.sum())[:, None],
        wrong=closed[1] + np.rint(_summed(level, options.wrong[here][:, left] - on_wrong, width)).astype(int),
        allowed=(np.arange(width - 1) < lengths[:, None]) & room[:, None],
        candidates=here,
        closed=closed,
    )


def _summed(
    level: Int[np.ndarray, "here left"], values: Float[np.ndarray, "..."], width: int
) -> Float[np.ndarray, "here thresholds"]:
    """Sum values over the requests that hit at each threshold."""
    index = level + width * np.arange(len(level))[:, None]
    sums = np.bincount(index.ravel(), np.broadcast_to(values, index.shape).ravel(), width * len(level))
    return sums.astype(float).reshape(len(level), width)[:, :-1].cumsum(1)  # of nothing, bincount gives integers


def descend(options: Problem, choice: Choice, value: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Choice:
    """Change one site at a time for the least ``value(ms, wrong)``, until no change helps."""
    ms, wrong = evaluate(options, choice)
    now = float(value(np.array(ms), np.array(wrong)))
    since = 0
    for site in itertools.cycle(range(options.sites)):
        if since == options.sites:
            break
        since += 1
        found = alternatives(options, choice, site)
        best, option = float(value(np.array(found.closed[0]), np.array(found.closed[1]))), None
        if found.ms.size:
            values = np.where(found.allowed, value(found.ms, found.wrong), np.inf)
            c, t = np.unravel_index(values.argmin(), values.shape)
            if values[c, t] < best:
                best, option = float(values[c, t]), (int(found.candidates[c]), int(t))
        if best < now - 1e-9 * max(1.0, abs(now)):
            choice, now, since = (*choice[:site], option, *choice[site + 1 :]), best, 0
    return choice


def penalised(price: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Milliseconds, a wrong answer costing ``price`` of them."""
    return lambda ms, wrong: ms + price * wrong


def polish(options: Problem, choice: Choice) -> Found:
    """Descend within the budget of disagreements, from a choice within it."""
    choice = descend(options, choice, lambda ms, wrong: np.where(wrong <= options.disagreements, ms, np.inf))
    return Found(evaluate(options, choice)[0], choice)


def search(options: Problem, start: Choice, *, restarts: int, out_of_time: Callable[[], bool]) -> tuple[Found, float]:
    """Search from ``start``, from nothing at many prices of a wrong answer, and from the best with two sites closed.

    Returns:
        The best within the budget, never worse than ``start``, and the price of a wrong answer where the budget binds.
    """
    best = polish(options, start)
    low, high = 0.0, 1.0 + options.start_ms + options.span_ms.sum() * options.n
    nothing: Choice = (None,) * options.sites
    price, scale = high, 8.0 * (options.before_ms + options.span_ms.sum()) + 1e-9
    for turn in range(HALVINGS):
        if out_of_time():
            break
        price = (low + min(high, scale)) / 2 if turn else scale
        choice = descend(options, nothing, penalised(price))
        if evaluate(options, choice)[1] <= options.disagreements:
            high = price
            best = min(best, polish(options, choice), key=lambda found: found.ms)
        else:
            low, scale = price, scale * 4 if price == scale else scale
    price = min(high, max(low, scale))
    rng = np.random.default_rng(0)
    for _ in range(restarts):
        if out_of_time() or options.sites == 0:
            break
        closed = rng.choice(options.sites, min(2, options.sites), replace=False)
        choice = tuple(None if s in closed else option for s, option in enumerate(best.choice))
        trial = price * float(np.exp(SPREAD * rng.standard_normal()))
        for _ in range(6):
            choice = descend(options, choice, penalised(trial))
            if evaluate(options, choice)[1] <= options.disagreements:
                found = polish(options, choice)
                best = found if found.ms < best.ms - 1e-9 * max(1.0, best.ms) else best
                break
            trial *= 1.15
    assert fits(options, best.choice)  # noqa: S101
    return best, price
