"""Trials: later traffic shows how far along its path a plan may go, or whether the nearest cache may answer.

**Plans.** Caches that were refitted, or that an alarm closed, open again only by a trial. It takes every request behind
those that they were fitted and planned on (and behind a gap, for neighbours in time are alike), or those picked by an
independent coin; never the misses alone, which differ from the hits. Every step of the path is tested on the same
requests, strict to loose, at the trial's own part of delta: to certify a step that is not good enough, the first such
step must be certified. The test is anytime-valid: it may stop as soon as enough is certified, or go on, and needs no
number of requests fixed before.

**The nearest cache** is tried at one threshold, on requests that are all shadowed.
"""

import collections
import dataclasses
import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from gati_jax.caches import Candidate
from gati_jax.certification import SEQUENTIAL, Certificate, trial_level
from gati_jax.certification.sequential import SequentialCertifier
from gati_jax.data import fingerprint
from gati_jax.errors import InputError
from gati_jax.fitting import Outputs
from gati_jax.planning import Plan, ReplayTable, replay_plan

_HOPELESS = 0.01  # of the capital that a trial begins with
_RECENT = 50  # lookups from which it is judged whether entries are near
Verdict = Literal["open", "certified", "inconclusive"]
"""Still under way; some step is certified; the requests are used up and none is, which opens no cache."""


# --- Plans ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """What a trial has to show.

    Args:
        epsilon: The disagreement to certify.
        delta: The risk that any of all trials, however many, certifies wrongly.
        most: Requests after which it ends with what is certified.
        enough: Share of the saving at the path's end with which it ends sooner.
        gap: Requests to leave out behind those that the plan was made on.
    """

    epsilon: float
    delta: float = 0.05
    most: int = 20_000
    enough: float = 0.95
    gap: int = 100

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            InputError: Names the field.
        """
        for name in ("epsilon", "delta"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name}: expected a number between 0 and 1, got {getattr(self, name)}")
        if not (self.most >= 1 and self.gap >= 0 and 0 < self.enough <= 1):
            got = f"{self.most}, {self.gap} and {self.enough}"
            raise InputError(f"most, gap, enough: expected 1 or more, 0 or more, and a share above 0, got {got}")


class Trial:
    """The trial of one plan."""

    def __init__(
        self,
        caches: tuple[Candidate, ...],
        plan: Plan,
        *,
        version: int,
        after: int,
        config: TrialConfig,
    ) -> None:
        """Start without any request.

        Args:
            caches: The plan's.
            plan: Its path was fixed before the first request of the trial.
            version: Number of this trial among all, from 1 on; see ``Versions.next_trial``.
            after: Order number of the newest request that caches or plan have learned from.
            config: See ``TrialConfig``.

        Raises:
            InputError: The caches are not the plan's, or its path has the base alone.
        """
        if [(c.name, c.site) for c in caches] != list(zip(plan.names, plan.sites, strict=True)):
            raise InputError(
                f"caches: expected the plan's, {', '.join(plan.names)}, got {', '.join(c.name for c in caches)}"
            )
        self.caches, self.plan, self.version, self.config = caches, plan, version, config
        self.n = 0
        """Requests taken."""
        self.step = 0
        """The farthest certified step; 0 is the base."""
        self._last = after + config.gap  # order numbers up to this one are left out
        level = trial_level(config.delta, version)
        steps = len(plan.path) - 1  # all but the first, which is the base
        self._certifier = SequentialCertifier(steps, config.epsilon, level, maximum=config.most)
        self._disagreements = np.zeros(len(plan.path), int)
        self._at_step = (0, 0)  # n and disagreements when it was certified
        self._rows: list[int] = []
        self._enough = _first_step_with(plan, config.enough)

    @property
    def verdict(self) -> Verdict:
        """The state of the trial."""
        hopeless = not self.step and bool(self._certifier.log_capital()[0] < math.log(_HOPELESS))
        if self.step < self._enough and self.n < self.config.most and not hopeless:
            return "open"
        return "certified" if self.step else "inconclusive"

    def add(
        self,
        orders: Int[np.ndarray, " n"],
        rows: UInt64[np.ndarray, " n"],
        outputs: Outputs,
        cached: Int[np.ndarray, " n"] | None = None,
    ) -> Verdict:
        """Take requests until the trial is decided; those before the gap's end are left out.

        Args:
            orders: Order numbers, rising from call to call.
            rows: Digests of the images.
            outputs: Of the base and of the caches, in the plan's order.
            cached: The input cache's answers, which count whatever the caches say; negative where there was none.

        Raises:
            InputError: Orders that do not rise.
        """
        if len(orders) and (np.any(np.diff(orders) <= 0) or (self.n and orders[0] <= self._last)):
            raise InputError(f"orders: expected rising numbers behind {self._last}, got {orders[0]} to {orders[-1]}")
        disagrees = self._disagrees(rows, outputs)
        if cached is not None:
            disagrees = np.where(cached[:, None] >= 0, (cached != outputs.answers)[:, None], disagrees)
        for order, row, losses in zip(orders.tolist(), rows.tolist(), disagrees, strict=True):
            if order > self._last and self.verdict == "open":
                self._take(order, row, losses)
        return self.verdict

    def certificate(self, name: str = "default") -> Certificate:
        """Return what is certified; where no step is, a certificate of nothing."""
        n, wrong = self._at_step if self.step else (self.n, 0)
        return Certificate(
            name=name,
            epsilon=self.config.epsilon,
            delta=self.config.delta,
            step=self.step or -1,
            n=n,
            disagreements=wrong,
            p_value=trial_level(self.config.delta, self.version) if self.step else 1.0,
            method=SEQUENTIAL,
            version=self.version,
            plan_hash=self.plan.hash,
            data_fingerprint=fingerprint(np.array(self._rows[:n], np.uint64)),
            select_fingerprint=fingerprint(self.plan.rows),
            repeated=n - len(set(self._rows[:n])),
            stays_off=self._stays_off(),
        )

    def _take(self, order: int, row: int, losses: Bool[np.ndarray, " steps"]) -> None:
        self._last = order
        self.n += 1
        self._rows.append(row)
        self._disagreements += losses
        self._certifier.add(losses[1:])
        if (step := self._certifier.certified + 1) > self.step:
            self.step, self._at_step = step, (self.n, int(self._disagreements[step]))

    def _disagrees(self, rows: UInt64[np.ndarray, " n"], outputs: Outputs) -> Bool[np.ndarray, "n steps"]:
        plan = self.plan
        table = ReplayTable(
            names=plan.names, sites=plan.sites, depth=plan.depth, answers=outputs.answers, classes=outputs.classes,
            scores=outputs.scores, rows=rows,
        )  # fmt: skip
        return np.stack([replay_plan(table, thresholds).disagrees for thresholds in plan.path], axis=1)

    def _stays_off(self) -> tuple[str, ...]:
        closed = np.isinf(self.plan.thresholds(self.step))
        end = f"after {self.n} requests of trial {self.version}"
        return tuple(
            f"{name}: off at the certified step {self.step} of {len(self.plan.path) - 1}, {end}"
            for name, is_off in zip(self.plan.names, closed, strict=True)
            if is_off
        )


def _first_step_with(plan: Plan, share: float) -> int:
    """Return the first step that saves this share of what the last one does."""
    saved = plan.mean_ms[0] - plan.mean_ms
    return max(1, int(np.argmax(saved >= share * saved[-1] - 1e-12)))


# --- The nearest cache ------------------------------------------------------------------------------------------------


State = Literal["watching", "trial", "open", "inconclusive"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearestTrialConfig:
    """How the nearest cache is opened."""

    known: int = 200
    """Requests with a known base answer from which thresholds are read."""
    every: int = 100
    """Requests between two checks whether a trial would be worth it."""
    share: float = 0.05
    """Of the requests, that the cache must be expected to answer for a trial to begin."""
    risk: float = 0.25
    """Over epsilon, for which the threshold is read."""
    most: int = 4000
    """Requests of a trial, and the wait for the next after the first inconclusive one."""
    gap: int = 10
    """Requests left out before it."""
    lookups: float = 0.1
    """Share of requests for which the cache is asked while hardly any has an entry near it: a lookup among 2,000
    entries takes 0.15 ms, for nothing where requests do not repeat."""


class Seen(NamedTuple):
    """A served request, as the nearest cache's trial sees it."""

    score: float
    """Of the nearest entry; -inf where there was none, NaN where the cache was not asked."""
    nearest_wrong: bool
    """Whether the nearest entry disagrees with the base; only where that is known."""
    served_wrong: bool
    """Whether the served answer does, as far as is known."""
    q: float
    """The probability with which the base's answer was to be known."""
    known: bool


class NearestTrial:
    """Decides when the nearest cache is open; holds no entries."""

    def __init__(self, epsilon: float, config: NearestTrialConfig | None = None) -> None:
        """Start to watch."""
        self.config, self.epsilon = config or NearestTrialConfig(), epsilon
        self.state: State = "watching"
        self.threshold = np.inf
        """From which on the cache may answer; infinite unless open."""
        self.n = 0
        """Requests of the present trial."""
        self._proposed, self._wait = np.inf, self.config.every
        self._begin_watch()

    def _begin_watch(self) -> None:
        self._past: collections.deque[Seen] = collections.deque(maxlen=self.config.known)
        self._since = 0
        self._scores: collections.deque[float] = collections.deque(maxlen=self.config.known)
        self._near: collections.deque[bool] = collections.deque(maxlen=_RECENT)

    @property
    def lookups(self) -> float:
        """Share of requests for which the cache is to be asked."""
        some_near = len(self._near) < _RECENT or sum(self._near) >= self.config.share * _RECENT
        return 1.0 if some_near or self.state != "watching" else self.config.lookups

    @property
    def wants_trial(self) -> bool:
        """Whether a trial would be worth it now; ask after every request, and ``begin`` it."""
        if self.state != "watching" or len(self._past) < self.config.known or self._since < self._wait:
            return False
        self._since = 0
        self._proposed = self._propose()
        return float(np.mean(np.array(self._scores) >= self._proposed)) >= self.config.share

    def would_miss(self, score: float) -> bool:
        """Whether the cache would not answer a request, open or by the threshold on trial; NaN: it was not asked."""
        return not score >= {"trial": self._proposed, "open": self.threshold}.get(self.state, np.inf)

    def _propose(self) -> float:
        past = self._past
        scores, wrong = np.array([s.score for s in past]), np.array([s.nearest_wrong for s in past])
        weights = np.array([1 / s.q for s in past])
        found = threshold_for(scores, wrong, weights, risk=self.config.risk * self.epsilon)
        if np.isfinite(found):
            return found
        # Too few rows to read so small a risk from: take the median of the scores above any that was wrong.
        right = scores[~wrong & np.isfinite(scores)]
        above = right[right > scores[wrong].max(initial=-np.inf)]
        return float(np.median(above)) if len(above) else np.inf

    def begin(self, delta: float, now: int) -> None:
        """Begin the trial that was wanted.

        Args:
            delta: Its part of the risk.
            now: Number of the newest request: only later ones count.
        """
        self.state, self.n = "trial", 0
        self._after = now + self.config.gap
        self._certifier = SequentialCertifier(1, self.epsilon, delta, maximum=self.config.most)

    def close(self) -> None:
        """Stop answering, as an alarm asks, and watch again."""
        self.state, self.threshold = "watching", np.inf
        self._begin_watch()

    def add(self, number: int, seen: Seen) -> State:
        """Take a served request, in order; return the new state.

        Args:
            number: In the order in which requests came.
            seen: What is known of it.
        """
        self._since += 1
        if math.isnan(seen.score):
            return self.state
        self._scores.append(seen.score)
        self._near.append(seen.score > -math.inf)
        if self.state == "watching" and seen.known:
            self._past.append(seen)
        elif self.state == "trial" and number > self._after:
            self.n += 1
            wrong = seen.nearest_wrong if seen.score >= self._proposed else seen.served_wrong
            self._certifier.add(np.array([wrong or not seen.known]), seen.q)  # a lost base answer counts as wrong
            self._decide()
        return self.state

    def _decide(self) -> None:
        certifier = self._certifier
        if certifier.certified >= 0:
            self.state, self.threshold, self._wait = "open", self._proposed, self.config.every
        elif certifier.decided or certifier.log_capital()[0] < np.log(_HOPELESS):
            self.state = "inconclusive"

    def watch_again(self) -> None:
        """Start anew after an inconclusive trial, and wait twice as long as the last time."""
        self._wait = max(self.config.most, 2 * self._wait)
        self.close()


def threshold_for(
    scores: Float[np.ndarray, " n"], wrong: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"], *, risk: float
) -> float:
    """Return the lowest threshold at which the nearest cache would have disagreed on a share ``risk`` of requests.

    The share is of all requests, hits or not, with one more that disagrees at the largest weight added: conformal risk
    control (Angelopoulos et al., arXiv:2208.02814). It holds on average for requests like these; it is no certificate.

    Args:
        scores: Of requests whose base answer is known.
        wrong: Whether the nearest entry disagrees with it.
        weights: 1 / the probability with which the base answer was to be known: 1 for misses, 1 / q for shadowed hits.
        risk: At most so large a share.

    Returns:
        Infinity where none is high enough.
    """
    if not len(scores):
        return np.inf
    order = np.argsort(-scores, kind="stable")
    ranked, most = scores[order], weights.max()
    share = (np.cumsum((weights * wrong)[order]) + most) / (weights.sum() + most)
    last = np.append(ranked[1:] < ranked[:-1], True)  # equal scores hit together
    allowed = np.flatnonzero((share <= risk) & last & np.isfinite(ranked))
    return float(ranked[allowed[-1]]) if len(allowed) else np.inf
