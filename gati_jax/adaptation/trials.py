"""Trials: later traffic shows how far along its path a plan may go, or whether the nearest cache may answer.

A plan's trial takes every request behind those that its caches were fitted and planned on (and behind a gap, for
neighbours in time are alike), or those picked by an independent coin; never the misses alone, which differ from the
hits. Every step of the path is tested on the same requests, strict to loose, at the trial's own part of delta: to
certify a step that is not good enough, the first such step must be certified. The test is anytime-valid.

The nearest cache is tried at one threshold, on requests that are all shadowed.
"""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64
from pydantic import Field

from gati_jax.caches import Candidate
from gati_jax.certification import SEQUENTIAL, Certificate, SequentialCertifier, trial_level
from gati_jax.data import fingerprint
from gati_jax.errors import InputError
from gati_jax.fitting import Outputs
from gati_jax.options import Count, Share, check_options
from gati_jax.planning import Plan, ReplayTable, replay_plan

from .request_log import Observation

_HOPELESS = 0.01  # of the capital that a trial begins with
_RECENT = 50  # lookups from which it is judged whether entries are near
Verdict = Literal["open", "certified", "inconclusive"]
"""Still under way; some step is certified; the requests are used up and none is, which opens no cache."""


# --- Plans ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """What a trial has to show."""

    epsilon: Share
    """The disagreement to certify."""
    delta: Share = 0.05
    """The risk that any of all trials, however many, certifies wrongly."""
    most: Count = 20_000
    """Requests after which it ends with what is certified."""
    enough: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of the saving at the path's end with which it ends sooner."""
    gap: Annotated[int, Field(ge=0)] = 100
    """Requests to leave out behind those that the plan was made on."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_options(self)


class Trial:
    """The trial of one plan."""

    def __init__(
        self, caches: tuple[Candidate, ...], plan: Plan, *, version: int, after: int, config: TrialConfig
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
        level, steps = trial_level(config.delta, version), len(plan.path) - 1  # all but the first, which is the base
        self._certifier = SequentialCertifier(steps, config.epsilon, level, maximum=config.most)
        self._disagreements = np.zeros(len(plan.path), int)
        self._at_step = (0, 0)  # n and disagreements when it was certified
        self._rows: list[int] = []
        saved = plan.mean_ms[0] - plan.mean_ms
        self._enough = max(1, int(np.argmax(saved >= config.enough * saved[-1] - 1e-12)))  # the first step that will do

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
        plan = self.plan
        table = ReplayTable(
            names=plan.names, sites=plan.sites, depth=plan.depth, answers=outputs.answers, classes=outputs.classes,
            scores=outputs.scores, rows=rows,
        )  # fmt: skip
        disagrees = np.stack([replay_plan(table, thresholds).disagrees for thresholds in plan.path], axis=1)
        if cached is not None:
            disagrees = np.where(cached[:, None] >= 0, (cached != outputs.answers)[:, None], disagrees)
        for order, row, losses in zip(orders.tolist(), rows.tolist(), disagrees, strict=True):
            if order > self._last and self.verdict == "open":
                self._last = order
                self.n += 1
                self._rows.append(row)
                self._disagreements += losses
                self._certifier.add(losses[1:])
                if (step := self._certifier.certified + 1) > self.step:
                    self.step, self._at_step = step, (self.n, int(self._disagreements[step]))
        return self.verdict

    def certificate(self, name: str = "default") -> Certificate:
        """Return what is certified; where no step is, a certificate of nothing."""
        n, wrong = self._at_step if self.step else (self.n, 0)
        closed = np.isinf(self.plan.thresholds(self.step))
        where = f"off at the certified step {self.step} of {len(self.plan.path) - 1}"
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
            stays_off=tuple(
                f"{name}: {where}, after {self.n} requests of trial {self.version}"
                for name, is_off in zip(self.plan.names, closed, strict=True)
                if is_off
            ),
        )


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


class NearestTrial:
    """Decides when the nearest cache is open; holds no entries."""

    def __init__(self, epsilon: float, config: NearestTrialConfig | None = None) -> None:
        """Start to watch."""
        self.config, self.epsilon = config or NearestTrialConfig(), epsilon
        self.n = 0
        """Requests of the present trial."""
        self._wait = self.config.every
        self.close()

    def close(self) -> None:
        """Stop answering, as an alarm asks, and watch from the beginning."""
        known = self.config.known
        self.state: State = "watching"
        self.threshold = math.inf
        """From which on the cache answers, or would while it is on trial; infinite otherwise."""
        self._since = 0
        self._past: collections.deque[tuple[float, bool, float]] = collections.deque(maxlen=known)
        self._scores: collections.deque[float] = collections.deque(maxlen=known)
        self._near: collections.deque[bool] = collections.deque(maxlen=_RECENT)

    @property
    def lookups(self) -> float:
        """Share of requests for which the cache is to be asked."""
        some_near = len(self._near) < _RECENT or sum(self._near) >= self.config.share * _RECENT
        return 1.0 if some_near or self.state != "watching" else self.config.lookups

    def would_miss(self, score: float) -> bool:
        """Whether the cache would not answer a request, open or by the threshold on trial; NaN: it was not asked."""
        return not score >= self.threshold

    def begin(self, level: Callable[[], float | None], now: int) -> bool:
        """Begin a trial if it would be worth it, and return whether; to be called after every request.

        Only requests after the number ``now`` count; ``level`` returns the trial's part of the risk, or None: not yet.
        """
        if self.state != "watching" or len(self._past) < self.config.known or self._since < self._wait:
            return False
        self._since = 0
        threshold = self._propose()
        if np.mean(np.array(self._scores) >= threshold) < self.config.share:
            return False
        if (risk := level()) is None:
            return False
        self.state, self.threshold, self.n = "trial", threshold, 0
        self._after = now + self.config.gap
        self._certifier = SequentialCertifier(1, self.epsilon, risk, maximum=self.config.most)
        return True

    def _propose(self) -> float:
        scores, wrong, weights = (np.array(column) for column in zip(*self._past, strict=True))
        found = threshold_for(scores, wrong, weights, risk=self.config.risk * self.epsilon)
        if np.isfinite(found):
            return found
        # Too few rows to read so small a risk from: take the median of the scores above any that was wrong.
        right = scores[~wrong & np.isfinite(scores)]
        above = right[right > scores[wrong].max(initial=-np.inf)]
        return float(np.median(above)) if len(above) else np.inf

    def add(self, number: int, nearest_class: int, score: float, observation: Observation) -> State:
        """Take a served request; return the new state.

        Args:
            number: In the order in which requests came.
            nearest_class: Of the nearest entry.
            score: Of the nearest entry; -inf where there was none, NaN where the cache was not asked.
            observation: What was served, and whether the base's answer is known.
        """
        self._since += 1
        if math.isnan(score):
            return self.state
        self._scores.append(score)
        self._near.append(score > -math.inf)
        base_class, q = observation.base_class, observation.q
        if self.state == "watching" and base_class is not None:
            self._past.append((score, base_class != nearest_class, 1 / q))
        elif self.state == "trial" and number > self._after:
            self.n += 1
            class_index = observation.class_index if self.would_miss(score) else nearest_class
            certifier = self._certifier
            certifier.add(np.array([base_class != class_index]), q)  # a lost base answer counts as wrong
            if certifier.certified >= 0:
                self.state, self._wait = "open", self.config.every
            elif certifier.decided or certifier.log_capital()[0] < math.log(_HOPELESS):
                self.state = "inconclusive"
        return self.state

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
        risk: At most so large a share; infinity is returned where no threshold is high enough.
    """
    if not len(scores):
        return np.inf
    order = np.argsort(-scores, kind="stable")
    ranked, most = scores[order], weights.max()
    share = (np.cumsum((weights * wrong)[order]) + most) / (weights.sum() + most)
    last = np.append(ranked[1:] < ranked[:-1], True)  # equal scores hit together
    allowed = np.flatnonzero((share <= risk) & last & np.isfinite(ranked))
    return float(ranked[allowed[-1]]) if len(allowed) else np.inf
