"""The monitor: watches served requests and says when their disagreement is no longer at most epsilon.

What it guarantees: while, given the past, the mean disagreement of the next served request is at most epsilon, version
j of the cascade raises an alarm with probability at most delta_j = 6 delta / (pi^2 j^2), however long it is served
(`wealth.py`); all versions together with at most delta, for the delta_j add up to it. Served requests are all: misses
count 0.

What that asks of who serves:

- Whether a hit is looked at is decided by a coin of its own, with the probability ``q`` as it stood when the request
  came. The score, the class or the client may not sway it.
- Requests are watched in an order that does not depend on what was seen of them: that of their answers, say. A
  shadowed hit whose base answer is still being computed holds back those behind it. ``in_flight`` requests may be
  answered under an older q than the monitor's; until they are through, it bets as in quiet.
- After ``next_version``, requests that the cascade before still answered are not watched.

Attention: in quiet a share ``quiet_q`` of the hits is looked at. Once one of them is seen to disagree, or the traffic
stirs, every hit is, until ``attention`` requests in a row showed nothing. That decides how soon an alarm comes, not
how often a false one does: q may depend on all that is past.

An alarm names the sites to close: all that cannot be cleared. Its wealth is spent: go on with ``next_version``, with
what remains open. Bursts of disagreement, on video say, are violations: the mean given the past is what is bounded.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

from scipy.stats import beta

from gati_jax.certification.betting import Count, EProcess, mean_disagreement, upper_bound
from gati_jax.errors import InputError

from .drift import DriftDetector
from .request_log import POINTS, REPEATED, Observation


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is promised, and what may be spent on watching it."""

    epsilon: float = 0.01
    """The mean disagreement, given the past, that served requests may have."""
    delta: float = 0.05
    """The risk of ever raising a false alarm, all versions together."""
    quiet_q: float = 0.02
    """The share of hits that are looked at in quiet."""
    attention: int | None = None
    """Requests without anything seen after which it is quiet again; None: 1 / epsilon, in which a tolerable cascade
    disagrees about once, and one that disagrees five times as often goes unseen in 7 of 1,000 cases."""
    in_flight: int = 0
    """The most requests that are served at a time: as many may still carry an older q."""
    stir: bool = True
    """Whether changes of scores and exits raise q; needs river."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            InputError: Names the field.
        """
        for name, largest in (("epsilon", 0.5), ("delta", 1.0), ("quiet_q", 1.0)):
            value = getattr(self, name)
            if not 0 < value <= largest:
                raise InputError(f"{name}: expected a number in (0, {largest:g}], got {value}")
        if not 0 < self.hold < 2**31 or not 0 <= self.in_flight < 2**31:
            got = f"{self.attention} and {self.in_flight}"
            raise InputError(f"attention, in_flight: expected 1 or more requests and 0 or more, got {got}")

    @property
    def hold(self) -> int:
        """Requests for which q stays up after something was seen."""
        return math.ceil(1 / self.epsilon) if self.attention is None else self.attention

    def level(self, version: int) -> float:
        """Return delta_j, version j's part of delta; versions count from 1."""
        return 6 * self.delta / (math.pi * version) ** 2


class Alarm(NamedTuple):
    """The cascade disagrees more often than it may."""

    guilty: tuple[int, ...]
    """Sites to close, in order: those that cannot be cleared."""
    wealth: float
    when: int
    """Requests watched in all, the one that gave the alarm included."""
    version: int


class Watched(NamedTuple):
    """What a version has shown so far; for metrics."""

    version: int
    requests: int
    hits: int
    shadows: dict[int, int]
    """Hits that were looked at, by exit; the rest of the base behind that site is what each has cost."""
    disagreements: int
    """Those seen."""
    estimate: float
    """Of the share of requests that disagree."""
    upper: float
    """At any time, with confidence 1 - delta: of the running mean of conditional risks, see `estimate.py`."""
    wealth: float
    q: float
    stirs: int
    alarmed: bool


class Monitor:
    """Watches one served bundle, version after version."""

    def __init__(self, config: MonitorConfig, depth: int, stir: DriftDetector | None = None) -> None:
        """Watch version 1 from its first request on.

        Args:
            config: What to promise.
            depth: Of the base: the exit of requests that missed everywhere.
            stir: In place of ADWIN on scores and exits.

        Raises:
            InputError: A depth below 1; river is needed and not installed.
        """
        if depth < 1:
            raise InputError(f"depth: expected 1 or more, got {depth}")
        self.config, self.depth = config, depth
        self.watched, self.version = 0, 0
        self.q = config.quiet_q
        """The probability with which the next hit is to be looked at."""
        self._stir = stir or (DriftDetector(depth) if config.stir else None)
        self._attentive = 0  # requests for which q stays up
        self._raised = 0  # requests watched since it went up
        self._closely = False
        self.next_version()

    def next_version(self) -> None:
        """Start anew for another cascade: fresh wealth, at a smaller delta."""
        self.version += 1
        self._needed = 1 / self.config.level(self.version)
        self._wealth, self._alarmed = EProcess(self.config.epsilon), False
        self._counts: dict[float, list[int]] = {}  # requests and disagreements seen, by the q that was bet on
        self._hits = [0] * (self.depth + 2)  # by exit; the last two places are those of POINTS and REPEATED
        self._shadows = [0] * (self.depth + 2)
        self._bounded = True
        self._begin_episode()

    def watch(self, observed: Observation) -> Alarm | None:
        """Take one served request.

        Returns:
            An alarm, at most one for each version.
        """
        site, _, class_index, q, base_class = observed
        self.watched += 1
        hit, seen = site != self.depth, False
        if hit:
            self._hits[site] += 1
            if base_class is not None:
                self._shadows[site] += site != REPEATED  # whose answer is the base's, at no cost
                seen = base_class != class_index
        roused = seen
        if self._stir is not None and self._stir.stirred(observed):
            roused = True
        probability = self.q if self._raised >= self.config.in_flight else self.config.quiet_q
        count = self._counts.get(probability) or self._counts.setdefault(probability, [0, 0])
        count[0] += 1
        if roused or self.q > self.config.quiet_q:
            self._attend(roused=roused)
            self._episode += 1
            if hit and base_class is None:
                self._unknown[site] += 1
        if seen:
            count[1] += 1
            self._blamed.add(site)
            self._bounded = self._bounded and q >= probability
        if self._alarmed:
            return None
        wealth = self._wealth.bet(1 / q if seen else 0.0, probability)
        if wealth < self._needed:
            return None
        self._alarmed = True
        return Alarm(self._guilty(), wealth, self.watched, self.version)

    @property
    def report(self) -> Watched:
        """What the version has shown so far."""
        counts = {q: Count(*count) for q, count in self._counts.items()}
        sites = [*range(self.depth), POINTS, REPEATED]
        return Watched(
            version=self.version,
            requests=sum(c.requests for c in counts.values()),
            hits=sum(self._hits),
            shadows={site: self._shadows[site] for site in sites if self._shadows[site]},
            disagreements=sum(c.seen for c in counts.values()),
            estimate=mean_disagreement(counts),
            upper=upper_bound(counts, self.config.delta) if self._bounded else 1.0,
            wealth=self._wealth.total,
            q=self.q,
            stirs=self._stir.count if self._stir else 0,
            alarmed=self._alarmed,
        )

    def _attend(self, *, roused: bool) -> None:
        """Set q for requests to come."""
        if self.q == self.config.quiet_q:
            self._begin_episode()
            self._raised = -1  # this one came before
        self._raised += 1
        self._attentive = self.config.hold if roused else max(0, self._attentive - 1)
        self.q = 1.0 if self._attentive or self._closely else self.config.quiet_q

    def look_closely(self, *, at_all: bool) -> None:
        """Look at every hit from the next request on, as a trial asks; or no longer."""
        if at_all and self.q < 1:
            self._begin_episode()
            self._raised = 0
        self._closely = at_all
        self.q = 1.0 if self._attentive or at_all else self.config.quiet_q

    def _begin_episode(self) -> None:
        self._episode = 0  # requests since q went up
        self._unknown = [0] * (self.depth + 2)  # of those, by exit: hits that were not looked at
        self._blamed: set[int] = set()  # exits that were seen to disagree

    def _guilty(self) -> tuple[int, ...]:
        """Return the sites that cannot be cleared.

        Those that were seen to disagree since q went up cannot: an alarm comes with one of them, so it names one. Of
        the others, those are cleared that together, at their worst, disagree by epsilon at most. A site's worst is the
        upper confidence bound on the share of requests that leave there unseen. Few requests clear nothing. This says
        whom to blame; the guarantee does not rest on it, for what stays open is watched on.
        """
        places = [POINTS, *range(self.depth)]
        n, risk = self._episode, self.config.delta / len(places)
        worst = {
            site: float(beta.ppf(1 - risk, self._unknown[site] + 1, n - self._unknown[site]))
            if self._unknown[site] < n
            else 1.0
            for site in places
            if site not in self._blamed
        }
        order = sorted(worst, key=worst.__getitem__)
        cleared = sum(total <= self.config.epsilon for total in itertools.accumulate(worst[site] for site in order))
        return tuple(sorted(self._blamed.union(order[cleared:])))
