"""A plan on trial: later traffic, request by request, says how far along its path it may go.

Caches that are refitted, or that an alarm has closed, open again only by a trial. It takes every request of the traffic
behind those that they were fitted and planned on (and behind a gap, for neighbours in time are alike), or those that a
coin picked which knows nothing of them; never just the misses, which are other requests than the hits.

Every step of the path is tested on the same requests, strict to loose, at the trial's own part of delta: a mistake is
certifying a step that is not good enough, and the first of these must be certified for one to happen. The test holds at
any time: it may stop as soon as enough is certified, or go on, and needs no number of requests fixed before.
"""

import collections
import dataclasses
import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64

from gati_jax.caches import Candidate
from gati_jax.certification import SEQUENTIAL, Certificate, trial_level
from gati_jax.certification.sequential import SequentialCertifier
from gati_jax.data import fingerprint
from gati_jax.errors import InputError
from gati_jax.fitting import Outputs
from gati_jax.planning import Plan, ReplayTable, replay_plan

from .nearest_cache import threshold_for

_HOPELESS = 0.01  # of the capital that a trial begins with
Verdict = Literal["open", "certified", "empirical"]
"""Still under way; some step is certified; the requests are used up and none is, which opens no cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """What a trial is to show.

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
        """Refuse what could not be shown.

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
    """One plan's trial."""

    def __init__(
        self,
        caches: tuple[Candidate, ...],
        plan: Plan,
        *,
        version: int,
        after: int,
        config: TrialConfig,
    ) -> None:
        """Begin.

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
        self._last = after + config.gap  # of the orders; what is not behind it is left out
        level = trial_level(config.delta, version)
        steps = len(plan.path) - 1  # all but the first, which is the base
        self._certifier = SequentialCertifier(steps, config.epsilon, level, maximum=config.most)
        self._disagreements = np.zeros(len(plan.path), int)
        self._at_step = (0, 0)  # n and disagreements when it was certified
        self._rows: list[int] = []
        self._enough = _first_step_with(plan, config.enough)

    @property
    def verdict(self) -> Verdict:
        """How it stands."""
        if self.step < self._enough and self.n < self.config.most and not self._hopeless:
            return "open"
        return "certified" if self.step else "empirical"

    def add(
        self,
        orders: Int[np.ndarray, " n"],
        rows: UInt64[np.ndarray, " n"],
        said: Outputs,
        front: Int[np.ndarray, " n"] | None = None,
    ) -> Verdict:
        """Take requests, until it is decided; those that came before the gap's end are left out.

        Args:
            orders: Order numbers, rising from call to call.
            rows: Digests of the images.
            said: What the base and the caches, in the plan's order, say.
            front: What was answered in front of the network, whatever the caches say; negative where nothing was.

        Raises:
            InputError: Orders that do not rise.
        """
        if len(orders) and (np.any(np.diff(orders) <= 0) or (self.n and orders[0] <= self._last)):
            raise InputError(f"orders: expected rising numbers behind {self._last}, got {orders[0]} to {orders[-1]}")
        disagrees = self._disagrees(rows, said)
        if front is not None:
            disagrees = np.where(front[:, None] >= 0, (front != said.answers)[:, None], disagrees)
        for order, row, losses in zip(orders.tolist(), rows.tolist(), disagrees, strict=True):
            if order > self._last and self.verdict == "open":
                self._take(order, row, losses)
        return self.verdict

    @property
    def _hopeless(self) -> bool:
        """Whether the strictest step has lost nearly all: a trial may end at any time, and this one had better."""
        return not self.step and bool(self._certifier.log_capital()[0] < math.log(_HOPELESS))

    def certificate(self, name: str = "default") -> Certificate:
        """Return what is known: nothing is certified where no step is, however the requests went."""
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

    def _disagrees(self, rows: UInt64[np.ndarray, " n"], said: Outputs) -> Bool[np.ndarray, "n steps"]:
        plan = self.plan
        table = ReplayTable(
            names=plan.names, sites=plan.sites, depth=plan.depth, answers=said.answers, classes=said.classes,
            scores=said.scores, rows=rows,
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


_RECENT = 50  # lookups by which it is judged whether points are near
State = Literal["watching", "trial", "open", "empirical"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearestTrialConfig:
    """How points are opened."""

    known: int = 200
    """Requests with a known base answer from which thresholds are read."""
    every: int = 100
    """Requests between two looks at whether a trial would be worth it."""
    share: float = 0.05
    """Of the requests, that points must be expected to answer for a trial to begin."""
    risk: float = 0.25
    """Over epsilon, for which the threshold is read."""
    most: int = 4000
    """Requests of a trial, and to wait for the next after the first that came to nothing."""
    gap: int = 10
    """Requests left out before it."""
    lookups: float = 0.1
    """Share of requests for which points are asked while hardly any has a point near it: a look at 2,000 points takes
    0.15 ms, for nothing where requests do not repeat."""


class Seen(NamedTuple):
    """A served request, as points see it."""

    score: float
    """Of the nearest point; -inf where there was none, NaN where points were not asked."""
    point_wrong: bool
    """Whether the point disagrees with the base; only where that is known."""
    served_wrong: bool
    """Whether what was served does, as far as is known."""
    q: float
    """The probability with which the base's answer was to be known."""
    known: bool


class NearestTrial:
    """Decides when points are open; state only, no points."""

    def __init__(self, epsilon: float, config: NearestTrialConfig | None = None) -> None:
        """Watch."""
        self.config, self.epsilon = config or NearestTrialConfig(), epsilon
        self.state: State = "watching"
        self.threshold = np.inf
        """From which on points may answer; infinite but when open."""
        self.n = 0
        """Requests of the present trial."""
        self._proposed, self._wait = np.inf, self.config.every
        self._begin_watch()

    def _begin_watch(self) -> None:
        self._past: collections.deque[Seen] = collections.deque(maxlen=self.config.known)
        self._since = 0
        self._would: collections.deque[float] = collections.deque(maxlen=self.config.known)
        self._near: collections.deque[bool] = collections.deque(maxlen=_RECENT)

    @property
    def lookups(self) -> float:
        """Share of requests for which points are to be asked."""
        some_near = len(self._near) < _RECENT or sum(self._near) >= self.config.share * _RECENT
        return 1.0 if some_near or self.state != "watching" else self.config.lookups

    @property
    def wants_trial(self) -> bool:
        """Whether one would be worth it, as things are; ask after every request, and ``begin`` it."""
        if self.state != "watching" or len(self._past) < self.config.known or self._since < self._wait:
            return False
        self._since = 0
        self._proposed = self._propose()
        return self._share(self._proposed) >= self.config.share

    def would_miss(self, score: float) -> bool:
        """Whether points would not have answered a request, now or by the threshold on trial; NaN: were not asked."""
        return not score >= {"trial": self._proposed, "open": self.threshold}.get(self.state, np.inf)

    def _propose(self) -> float:
        past = self._past
        scores, wrong = np.array([s.score for s in past]), np.array([s.point_wrong for s in past])
        weights = np.array([1 / s.q for s in past])
        found = threshold_for(scores, wrong, weights, risk=self.config.risk * self.epsilon)
        if np.isfinite(found):
            return found
        # Fewer rows than a risk so small can be read from: the best of what was seen.
        right = scores[~wrong & np.isfinite(scores)]
        above = right[right > scores[wrong].max(initial=-np.inf)]
        return float(np.median(above)) if len(above) else np.inf

    def _share(self, threshold: float) -> float:
        return float(np.mean(np.array(self._would) >= threshold))

    def begin(self, delta: float, now: int) -> None:
        """Begin the trial that was wanted.

        Args:
            delta: Its part of the risk.
            now: Number of the newest request that has come: only later ones count.
        """
        self.state, self.n = "trial", 0
        self._after = now + self.config.gap
        self._certifier = SequentialCertifier(1, self.epsilon, delta, maximum=self.config.most)

    def close(self) -> None:
        """Stop answering, as an alarm asks, and watch again."""
        self.state, self.threshold = "watching", np.inf
        self._begin_watch()

    def add(self, number: int, seen: Seen) -> State:
        """Take a served request, in order; says how things stand.

        Args:
            number: In the order in which requests came.
            seen: What is known of it.
        """
        self._since += 1
        if math.isnan(seen.score):
            return self.state
        self._would.append(seen.score)
        self._near.append(seen.score > -math.inf)
        if self.state == "watching" and seen.known:
            self._past.append(seen)
        elif self.state == "trial" and number > self._after:
            self.n += 1
            wrong = seen.point_wrong if seen.score >= self._proposed else seen.served_wrong
            self._certifier.add(np.array([wrong or not seen.known]), seen.q)  # a base answer that was lost: the worst
            self._decide()
        return self.state

    def _decide(self) -> None:
        certifier = self._certifier
        if certifier.certified >= 0:
            self.state, self.threshold, self._wait = "open", self._proposed, self.config.every
        elif certifier.decided or certifier.log_capital()[0] < np.log(_HOPELESS):
            self.state = "empirical"

    def watch_again(self) -> None:
        """After an empirical end: begin anew, and wait twice as long as the last time."""
        self._wait = max(self.config.most, 2 * self._wait)
        self.close()
