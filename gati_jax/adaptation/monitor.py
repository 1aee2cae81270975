"""The monitor: raises an alarm when the disagreement of served requests is no longer at most epsilon.

Guarantee: while the mean disagreement of the next served request, given the past, is at most epsilon, version j of the
cascade raises an alarm with probability at most delta_j = 6 delta / (pi^2 j^2), however long it is served (see
``certification.betting``). The delta_j add up to delta, so all versions together do with probability at most delta.
Served requests are all requests: a miss counts as no disagreement.

Conditions on the caller:

- Whether a hit is shadowed (the base's answer is computed, too) is decided by an independent coin with the probability
  ``q`` as it stood when the request came. Score, class and client must not influence it.
- Requests are observed in an order that does not depend on what their shadows showed: that of the requests, say. A
  shadowed hit whose base answer is still being computed holds back those behind it. ``in_flight`` requests may be
  answered under an older q than the monitor's; until they are through, the monitor bets with ``quiet_q``.
- After ``next_version``, requests that the cascade before it answered are not observed.
- A shadow that was lost is observed as ``LOST`` and counts as wrong, in the e-process and in the bound: it could have
  been. Left out, it would weigh as agreement, because the hits that no coin picked stay in with a loss of 0: where 90 %
  are lost, a disagreement of 20 % looks like one of 2 %. To weigh the others up instead, the chance of a loss would
  have to be known beforehand. So the loss that is bet on is "disagrees, or its shadow would be lost", whose mean the
  coin observes without bias: an alarm is false with probability at most delta where that mean is at most epsilon, and
  where it is more, the promise cannot be checked and what is open has to close all the same.

A restart of the server takes ``state`` along and ``resume``s it. Its time and the last writing of the state must not be
chosen by what shadows showed; what is forgotten in between was then never bet on. A fresh monitor at each restart would
spend delta anew each time, and never gather what an alarm needs.

Attention: in quiet a share ``quiet_q`` of the hits is shadowed. Once a shadow disagrees, or the traffic drifts, every
hit is, until ``attention`` requests in a row showed nothing. That decides how soon an alarm comes, not how often one is
false: q may depend on the whole past.

Drift is detected without labels, by ADWIN on the scores of hits and on exits (Bifet and Gavalda, "Learning from
time-changing data with adaptive windowing", 2007): it keeps a window of the latest numbers and drops its older part
whenever the means of both parts differ by more than chance. No guarantee rests on it.

An alarm names the sites to close: all that cannot be cleared. Its e-process is spent: go on with ``next_version`` and
what remains open. Bursts of disagreement, on video say, are violations: the mean given the past is what is bounded.

The cost guard watches what requests cost: a cascade certified on photographs may answer next to no frame of a video,
and every request then pays for lookups on top of the whole base. Pausing the caches for a while opens nothing and so
needs no certificate. Nor does resuming them: they are as certified as before, and the monitor never stopped.
"""

import collections
import dataclasses
import importlib
import itertools
import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator
from scipy.stats import binomtest

from gati_jax.caches import Candidate
from gati_jax.certification import trial_level
from gati_jax.certification.betting import RATIOS, Count, EProcess, mean_disagreement, upper_bound
from gati_jax.errors import InputError
from gati_jax.options import Count as AtLeastOne
from gati_jax.options import Strict, check_options
from gati_jax.planning import CostTable

from .request_log import EXACT, LOST, NEAREST, Observation

_ADWIN_DELTA = 0.002  # ADWIN's default: roughly, the chance per window that it finds a change where there is none
_SCORE_RANGE = 50.0  # scores are clipped to it: beyond it a selector is certain, and one wild score fills no window


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is promised, and what may be spent on checking it."""

    epsilon: Annotated[float, Field(gt=0, le=0.5)] = 0.01
    """The mean disagreement, given the past, that served requests may have."""
    delta: Annotated[float, Field(gt=0, le=1)] = 0.05
    """The risk of ever raising a false alarm, all versions together."""
    quiet_q: Annotated[float, Field(gt=0, le=1)] = 0.02
    """The share of hits that are shadowed in quiet."""
    attention: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    """Requests without a disagreement after which it is quiet again; None: 1 / epsilon, in which a tolerable cascade
    disagrees about once, and one that disagrees five times as often goes unseen in 7 of 1,000 cases."""
    in_flight: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """The most requests that are served at a time: as many may still carry an older q."""
    drift: bool = True
    """Whether changes of scores and exits raise q; needs the package river."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_options(self)

    @property
    def hold(self) -> int:
        """Requests for which q stays up after a disagreement or a drift."""
        return math.ceil(1 / self.epsilon) if self.attention is None else self.attention


class Alarm(NamedTuple):
    """The cascade disagrees more often than it may."""

    sites: tuple[int, ...]
    """Exits to close, in order: those that cannot be cleared."""
    e_value: float
    version: int


class Watched(NamedTuple):
    """What a version has shown so far; for metrics."""

    version: int
    requests: int
    hits: int
    shadows: dict[int, int]
    """Hits whose base answer is known, by the exits that have any."""
    disagreements: int
    """Of the shadows; those that were lost are among both."""
    lost: int
    """Shadows whose base answer never came, see the module."""
    estimate: float
    """Of the share of requests that disagree."""
    upper: float
    """Anytime-valid bound on the running mean of conditional risks; delta is shared out as it is for alarms, so that
    with confidence 1 - delta no bound of any version is ever wrong."""
    e_value: float
    q: float
    drifts: int
    """Changes that the drift detector found."""
    alarmed: bool


Natural = Annotated[int, Field(ge=0, lt=2**53)]
_Capital = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Stakes = Annotated[int, Field(ge=1, lt=2**31)]


class MonitorState(Strict):
    """The evidence of a monitor's present version, for the next process; q starts low there."""

    version: Annotated[int, Field(ge=1, lt=2**53)]
    watched: Natural
    alarmed: bool
    playing: Annotated[tuple[_Capital, ...], Field(min_length=len(RATIOS), max_length=len(RATIOS))]
    """See ``EProcess``."""
    restarts: Annotated[tuple[_Stakes, ...], Field(min_length=len(RATIOS), max_length=len(RATIOS))]
    counts: Annotated[tuple[tuple[Annotated[float, Field(gt=0, le=1)], Natural, Natural], ...], Field(max_length=16)]
    """q that was bet on, requests, and disagreements seen."""
    bounded: bool
    hits: Natural
    lost: Natural
    shadows: Annotated[dict[int, Natural], Field(max_length=4096)]

    @model_validator(mode="after")
    def _adds_up(self) -> "MonitorState":
        if any(seen > requests for _, requests, seen in self.counts):
            raise ValueError("counts: expected at most as many disagreements as requests")
        return self


ChangeTest = Callable[[float], bool]
"""Takes the next number; returns whether it shows that the mean has changed."""


def _adwin() -> ChangeTest:
    try:
        drift = importlib.import_module("river.drift")
    except ImportError as error:
        raise InputError(
            'drift: expected the package river for ADWIN (pip install "gati-jax[adapt]"), got none; or drift=False'
        ) from error
    adwin = drift.ADWIN(delta=_ADWIN_DELTA)

    def changed(x: float) -> bool:
        adwin.update(x)
        return bool(adwin.drift_detected)

    return changed


class DriftDetector:
    """Two change tests: one on the scores of requests that hit, one on the exits of all."""

    def __init__(self, depth: int, make: Callable[[], ChangeTest] = _adwin) -> None:
        """Start without a past; ``make`` returns a new change test, and exits are taken as shares of the depth."""
        self._depth = depth
        self._scores, self._exits = make(), make()
        self.count = 0
        """Changes found so far."""

    def update(self, observation: Observation) -> bool:
        """Take one request; return whether it shows that the traffic has changed."""
        found = self._exits(observation.exit / self._depth)
        if math.isfinite(observation.score):
            found = self._scores(min(max(observation.score, -_SCORE_RANGE), _SCORE_RANGE)) or found
        self.count += found
        return found


class Monitor:
    """Monitors one served bundle, version after version."""

    def __init__(self, config: MonitorConfig, depth: int, drift: DriftDetector | None = None) -> None:
        """Start with version 1; the depth is the exit of requests that missed everywhere.

        Raises:
            InputError: A depth below 1; river is needed and not installed.
        """
        if depth < 1:
            raise InputError(f"depth: expected 1 or more, got {depth}")
        self.config, self.depth = config, depth
        self.watched, self.version = 0, 0
        self.q = config.quiet_q
        """The probability with which the next hit is to be shadowed."""
        self._drift = drift or (DriftDetector(depth) if config.drift else None)
        self._attentive = 0  # requests for which q stays up
        self._raised = 0  # requests observed since q went up
        self._shadow_all = False
        self.next_version()

    def next_version(self, version: int | None = None) -> None:
        """Start anew for another cascade, as this version if given: a fresh e-process, at a smaller delta."""
        self.version = version or self.version + 1
        self._needed = 1 / self.level
        self._e_process, self._alarmed = EProcess(self.config.epsilon), False
        self._counts: dict[float, list[int]] = {}  # requests and disagreements seen, by the q that was bet on
        self._hits = self._lost = 0
        self._shadows = collections.Counter[int]()  # by exit
        self._bounded = True
        self._begin_episode()

    @property
    def level(self) -> float:
        """The present version's part of delta."""
        return trial_level(self.config.delta, self.version)

    @property
    def state(self) -> MonitorState:
        """What to ``resume`` behind a restart."""
        return MonitorState(
            version=self.version, watched=self.watched, alarmed=self._alarmed, bounded=self._bounded, hits=self._hits,
            playing=tuple(self._e_process.playing), restarts=tuple(self._e_process.restarts), lost=self._lost,
            counts=tuple((q, n, seen) for q, (n, seen) in self._counts.items()), shadows=dict(self._shadows),
        )  # fmt: skip

    def resume(self, state: MonitorState) -> None:
        """Go on where another process stopped, which promised the same."""
        self.next_version(state.version)
        self._e_process.resume(state.playing, state.restarts)
        self.watched, self._alarmed, self._bounded = state.watched, state.alarmed, state.bounded
        self._counts = {q: [requests, seen] for q, requests, seen in state.counts}
        self._hits, self._lost = state.hits, state.lost
        self._shadows.update(state.shadows)

    def watch(self, observation: Observation) -> Alarm | None:
        """Take one served request.

        Returns:
            An alarm, at most one for each version.
        """
        site, _, class_index, q, base_class = observation
        self.watched += 1
        hit, known = site != self.depth, base_class is not None
        disagrees = hit and known and base_class != class_index
        self._hits += hit
        self._lost += base_class == LOST
        if hit and known and site != EXACT:  # whose answer is the base's, at no cost
            self._shadows[site] += 1
        drifted = self._drift is not None and self._drift.update(observation)
        alert = disagrees or drifted
        probability = self.q if self._raised >= self.config.in_flight else self.config.quiet_q
        count = self._counts.setdefault(probability, [0, 0])
        count[0] += 1
        if alert or self.q > self.config.quiet_q:
            self._attend(alert=alert)
            self._episode += 1
            if hit and not known:
                self._unknown[site] += 1
        if disagrees:
            count[1] += 1
            self._disagreed.add(site)
            self._bounded = self._bounded and q >= probability
        if self._alarmed:
            return None
        e_value = self._e_process.bet(1 / q if disagrees else 0.0, probability)
        if e_value < self._needed:
            return None
        self._alarmed = True
        return Alarm(self._suspects(), e_value, self.version)

    @property
    def report(self) -> Watched:
        """What the version has shown so far."""
        counts = {q: Count(*count) for q, count in self._counts.items()}
        return Watched(
            version=self.version,
            requests=sum(c.requests for c in counts.values()),
            hits=self._hits,
            shadows=dict(sorted(self._shadows.items())),
            disagreements=sum(c.seen for c in counts.values()),
            lost=self._lost,
            estimate=mean_disagreement(counts),
            upper=upper_bound(counts, self.level) if self._bounded else 1.0,
            e_value=self._e_process.total,
            q=self.q,
            drifts=self._drift.count if self._drift else 0,
            alarmed=self._alarmed,
        )

    def _attend(self, *, alert: bool) -> None:
        """Set q for requests to come."""
        if self.q == self.config.quiet_q:
            self._begin_episode()
            self._raised = -1  # the present request came before q went up
        self._raised += 1
        self._attentive = self.config.hold if alert else max(0, self._attentive - 1)
        self.q = 1.0 if self._attentive or self._shadow_all else self.config.quiet_q

    def shadow_all(self, *, on: bool) -> None:
        """Shadow every hit from the next request on, as a trial of the nearest cache asks; or no longer."""
        if on and self.q < 1:
            self._begin_episode()
            self._raised = 0
        self._shadow_all = on
        self.q = 1.0 if self._attentive or on else self.config.quiet_q

    def _begin_episode(self) -> None:
        self._episode = 0  # requests since q went up
        self._unknown = collections.Counter[int]()  # of those, by exit: hits that were not shadowed
        self._disagreed: set[int] = set()  # exits with a disagreement

    def _suspects(self) -> tuple[int, ...]:
        """Return the exits that cannot be cleared.

        Those that disagreed since q went up cannot: an alarm comes with one of them, so it names one. Of the others,
        those are cleared that together, at their worst, disagree by epsilon at most. An exit's worst is the upper
        confidence bound (Clopper and Pearson) on the share of requests that leave there unshadowed. Few requests clear
        nothing. The guarantee does not rest on this choice, for what stays open is monitored on.
        """
        confidence = 1 - self.config.delta / (self.depth + 1)
        worst: dict[int, float] = {}
        for exit_ in sorted({NEAREST, *range(self.depth)} - self._disagreed):
            test = binomtest(self._unknown[exit_], self._episode, alternative="less")
            worst[exit_] = float(test.proportion_ci(confidence).high)
        order = sorted(worst, key=worst.__getitem__)
        cleared = sum(total <= self.config.epsilon for total in itertools.accumulate(worst[site] for site in order))
        return tuple(sorted(self._disagreed.union(order[cleared:])))


# --- Cost guard -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostGuardConfig:
    """When to pause, and for how long."""

    requests: AtLeastOne = 200
    """Requests answered by the network over which their cost is compared with the base's."""
    pause: AtLeastOne = 1000
    """Requests of the first pause; each further one in a row is twice as long."""
    longest: int = 16_000
    """Requests of the longest pause."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_options(self)
        if self.pause > self.longest:
            raise InputError(f"pause, longest: expected a pause at most longest, got {self.pause} and {self.longest}")


class CostGuard:
    """Adds up what requests cost, a fixed number of requests at a time."""

    def __init__(self, config: CostGuardConfig, full_ms: float) -> None:
        """Start with no request counted; the base alone takes ``full_ms`` milliseconds."""
        self.config, self._full_ms = config, full_ms
        self._next = config.pause
        self._n, self._spent = 0, 0.0

    def add(self, ms: float) -> int:
        """Count the milliseconds of a request that the network answered; return for how many to pause the caches."""
        self._n += 1
        self._spent += ms
        if self._n < self.config.requests:
            return 0
        wasteful = self._spent > self._n * self._full_ms
        self._n, self._spent = 0, 0.0
        pause = self._next if wasteful else 0
        self._next = min(2 * pause, self.config.longest) if wasteful else self.config.pause
        return pause


def exit_ms(caches: tuple[Candidate, ...], costs: CostTable, exit_: int) -> float:
    """Return milliseconds until an exit of a cascade, lookups included; the base's is the depth."""
    return costs.until(exit_) + sum(costs.lookup_ms[cache.name] for cache in caches if cache.site <= exit_)
