"""Keeps a served bundle true to its traffic: every request goes through here, before and after it is answered.

    ask        -> number, coin, exact repeats, points       (before the network)
    answered   -> the cascade has answered                  (a miss says what the base says)
    shadowed   -> the base has, behind a hit
    in order   -> window, monitor, trial of the points      (a request whose base answer is still to come holds back
                                                             those behind it)

An alarm closes the guilty at once: thresholds go to infinity, or points stop to answer. Caches open again only by a
trial on later traffic (``background.py``), points by one of their own. What is served changes in ``adopt`` and
``_close`` alone; each change is a new version for the monitor, and is told to ``changed``.

No threads, no clock, no device: callers bring them. Calls are short; whoever has several threads holds a lock.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from gati_jax.adaptation.request_log import POINTS, REPEATED, Observation
from gati_jax.bundle.record import Bundle, certified_only, costs_of
from gati_jax.caches import Candidate, choose
from gati_jax.errors import InputError
from gati_jax.pytrees import tree_digest

from .cost_guard import CostGuard, CostGuardConfig, exit_ms
from .input_cache import ExactCache, ExactCacheConfig, InputCache, Ticket
from .monitor import Alarm, Monitor, MonitorConfig
from .nearest_cache import NearestCache, NearestCacheConfig
from .request_log import UNKNOWN, RequestLog, RequestLogConfig
from .trials import NearestTrial, NearestTrialConfig, Seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """What is promised and kept; None switches a layer off."""

    monitor: MonitorConfig
    window: RequestLogConfig = dataclasses.field(default_factory=RequestLogConfig)
    repeats: ExactCacheConfig | None = dataclasses.field(default_factory=ExactCacheConfig)
    points: NearestCacheConfig | None = dataclasses.field(default_factory=NearestCacheConfig)
    thrift: CostGuardConfig | None = dataclasses.field(default_factory=CostGuardConfig)
    """Needs measured costs; without them caches never rest."""
    points_trial: NearestTrialConfig = dataclasses.field(default_factory=NearestTrialConfig)
    seed: int = 0


class Served(NamedTuple):
    """What the network's caches do now."""

    caches: tuple[Candidate, ...]
    thresholds: Float[np.ndarray, " caches"]
    """Infinite where a cache is closed."""


class Event(NamedTuple):
    """Something that an operator wants to know."""

    number: int
    """Requests watched before it."""
    kind: str
    """alarm, closed, opened, trial, empirical, refit, swap, resting, woken."""
    text: str


@dataclasses.dataclass(slots=True)
class _Pending:
    ticket: Ticket
    exit: int
    class_index: int
    score: float
    base_class: int | None
    complete: bool


class AdaptationController:
    """See the module."""

    def __init__(
        self,
        bundle: Bundle,
        config: ControllerConfig,
        *,
        level: Callable[[], float],
        changed: Callable[["Served"], None] = lambda _: None,
        told: Callable[[Event], None] = lambda _: None,
    ) -> None:
        """Serve the bundle's default plan.

        Args:
            bundle: Certified for at most ``config.monitor.epsilon``, or its caches begin closed.
            config: See ``ControllerConfig``.
            level: Returns the part of delta of the trial that begins now, see ``planning.trial_level``.
            changed: Is told whenever other caches or thresholds are to be served, before the next request is asked.
            told: Is told of events.

        Raises:
            InputError: Images that are not uint8 pixels of height, width and channels.
        """
        shape = tuple(bundle.chain.input_spec.shape)
        if bundle.chain.normalization is None or len(shape) != 3:  # noqa: PLR2004 (height, width, channels)
            raise InputError(f"bundle: expected a base of uint8 images [h, w, c], got inputs of {list(shape)}")
        self.config, self.depth = config, len(bundle.chain)
        self.base = str(tree_digest(bundle.chain.params))
        self.monitor = Monitor(config.monitor, self.depth)
        self.window = RequestLog(shape, config.window)
        repeats = ExactCache(self.base, config.repeats) if config.repeats else None
        points = NearestCache(shape, self.base, config.points) if config.points else None
        self.front = InputCache(repeats, points)
        self.trial = NearestTrial(config.monitor.epsilon, config.points_trial)
        self.events: list[Event] = []
        self._level, self._changed, self._told = level, changed, told
        self._random = np.random.default_rng(config.seed)
        self._numbers = 0
        self._pending: dict[int, _Pending | None] = {}
        self._next = 0
        self.served = standing(certified_only(bundle))
        self._resting: tuple[Served, int] | None = None  # what wakes up, and at which request
        self._thrift = None
        if config.thrift is not None and bundle.costs:
            self._costs = costs_of(bundle)
            self._thrift = CostGuard(config.thrift, self._costs.full_ms)
        self.epoch = 0
        """Counts changes of what is served, points included."""
        self.closed_at: int | None = None
        """Requests watched when a cache was last closed; None while all that were certified are open."""
        if not (bundle.certificate.certified and bundle.certificate.epsilon <= config.monitor.epsilon):
            self._close(range(self.depth), "no certificate for this epsilon")

    # Requests

    def ask(self, image: Shaped[np.ndarray, "h w c"], now: float) -> Ticket:
        """Take a request, before it is answered; ``early`` of the ticket is the answer, if the front has one.

        Args:
            image: uint8; not to be changed.
            now: Seconds of a clock that never falls.
        """
        q = self.monitor.q
        ticket = Ticket(
            self._numbers, image, q, look=bool(q >= 1 or self._random.random() < q), version=self.monitor.version
        )
        self._numbers += 1
        self._pending[ticket.number] = None
        lookups = self.trial.lookups
        self.front.ask(ticket, now, points=lookups >= 1 or self._random.random() < lookups)
        return ticket

    def early(self, ticket: Ticket) -> bool:
        """Take note that the front has answered; say whether the base is to be asked all the same (``shadowed``)."""
        assert ticket.early is not None  # noqa: S101 (narrows the type)
        exit_, class_index, score = ticket.early
        if exit_ == REPEATED:  # the base's own answer
            self._settle(ticket, exit_, class_index, score, class_index)
            return False
        return self._hit(ticket, exit_, class_index, score)

    def answered(
        self,
        ticket: Ticket,
        exit_: int,
        score: float,
        logits: Float[np.ndarray, " classes"],
        now: float,
    ) -> bool:
        """Take note of what the network has answered; say whether the base is to be asked all the same.

        Args:
            ticket: The request.
            exit_: The site, or the depth for the base.
            score: Of the selector.
            logits: Of whoever answered.
            now: Seconds.
        """
        class_index = int(np.argmax(logits))
        if exit_ == self.depth:
            store = self.trial.would_miss(ticket.point_score)  # on trial points are to be as far away as in service
            self.front.learn(ticket, logits, now, base=self.base, store=store)
            self._settle(ticket, exit_, class_index, math.inf, class_index)
            return False
        return self._hit(ticket, exit_, class_index, score)

    def shadowed(self, ticket: Ticket, logits: Float[np.ndarray, " classes"], now: float) -> None:
        """Take the base's answer to a request that a cache has answered already."""
        self.front.learn(ticket, logits, now, base=self.base, store=self.trial.would_miss(ticket.point_score))
        pending = self._pending[ticket.number]
        assert pending is not None  # noqa: S101 (narrows the type)
        pending.base_class, pending.complete = int(np.argmax(logits)), True
        self._advance()

    def lost(self, ticket: Ticket) -> None:
        """Give up on a request that was never answered, or on its base answer, as if nobody had looked."""
        pending = self._pending[ticket.number]
        if pending is None:
            del self._pending[ticket.number]
        else:
            pending.complete = True
        self._advance()

    def _hit(self, ticket: Ticket, exit_: int, class_index: int, score: float) -> bool:
        self._pending[ticket.number] = _Pending(ticket, exit_, class_index, score, None, complete=not ticket.look)
        self._advance()
        return ticket.look

    def _settle(self, ticket: Ticket, exit_: int, class_index: int, score: float, base_class: int) -> None:
        self._pending[ticket.number] = _Pending(ticket, exit_, class_index, score, base_class, complete=True)
        self._advance()

    def _advance(self) -> None:
        """Watch what is complete, in order."""
        while self._next < self._numbers:
            pending = self._pending.get(self._next)
            if self._next in self._pending and (pending is None or not pending.complete):
                return
            self._pending.pop(self._next, None)
            self._next += 1
            if pending is not None:
                self._watch(pending)

    def _watch(self, p: _Pending) -> None:
        ticket, known = p.ticket, p.base_class is not None
        self.window.add(
            ticket.image,
            UNKNOWN if p.base_class is None else p.base_class,
            p.class_index if p.exit < 0 else UNKNOWN,
        )
        q = 1.0 if p.exit in (self.depth, REPEATED) else ticket.q
        if ticket.version == self.monitor.version:
            alarm = self.monitor.watch(Observation(p.exit, p.score, p.class_index, q, p.base_class))
            if alarm is not None:
                self._alarm(alarm)
        self._rest(p)
        if self.front.points is not None and p.exit != REPEATED:
            wrong = known and p.base_class != p.class_index
            seen = Seen(ticket.point_score, known and p.base_class != ticket.point_class, wrong, q, known)
            self._try_points(ticket.number, seen)

    # Changes

    def _alarm(self, alarm: Alarm) -> None:
        self._tell("alarm", f"disagreement above {self.config.monitor.epsilon:.2%}")
        if POINTS in alarm.guilty and self.trial.state == "open":
            self._close_points()
        self._close(alarm.guilty, "alarm")
        self.monitor.next_version()

    def _close_points(self) -> None:
        self.trial.close()
        self.front.threshold = math.inf
        self.epoch += 1
        self._tell("closed", "points")

    def _close(self, sites: "tuple[int, ...] | range", why: str) -> None:
        resting = self._resting
        standing_ = self.served if resting is None else resting[0]  # what is open, or will be when it wakes
        guilty = np.isin([cache.site for cache in standing_.caches], list(sites))
        closing = guilty & np.isfinite(standing_.thresholds)
        if not closing.any():
            return
        left = Served(standing_.caches, np.where(guilty, np.float32(np.inf), standing_.thresholds))
        names = [cache.name for cache, off in zip(standing_.caches, closing, strict=True) if off]
        self.closed_at = self.window.count
        self._tell("closed", f"{', '.join(names)}: {why}")
        if resting is None:
            self._serve(left)
        else:
            self._resting = left, resting[1]
            self.epoch += 1

    def _serve(self, served: Served) -> None:
        """Change what is served: whoever is trying something tries it beside what is served no longer."""
        self.served = served
        self.epoch += 1
        if self.trial.state == "trial":
            self.monitor.look_closely(at_all=False)
            self.trial.close()
            self._tell("empirical", "points: other caches are served from now on, the trial is over")
        self._changed(served)

    def adopt(self, served: Served, text: str, epoch: int | None = None) -> None:
        """Serve other caches or thresholds from the next request on; certified by a trial.

        Args:
            served: These.
            text: For the operator.
            epoch: The keeper's, as the trial began: what it has certified beside something else opens nothing.
        """
        if epoch is not None and epoch != self.epoch:
            self._tell("empirical", f"{text}: something else is served meanwhile")
            return
        self.closed_at, self._resting = None, None
        self.monitor.next_version()
        self._tell("swap", text)
        self._serve(served)

    def _rest(self, p: _Pending) -> None:
        """Let caches rest that cost more than they save, and wake them again."""
        if self._thrift is None:
            return
        if self._resting is not None:
            served, until = self._resting
            if self.window.count >= until and self.trial.state != "trial":
                self._resting = None
                if self.trial.state == "open":  # certified with the base behind them: both together need a trial
                    self.closed_at = self.window.count
                    self._tell("closed", "caches that rested, until a trial beside the points")
                else:
                    self._tell("woken", "caches")
                    self._serve(served)
        elif p.exit >= 0 and not p.ticket.often and np.isfinite(self.served.thresholds).any():
            ms = exit_ms(self.served.caches, self._costs)[p.exit]
            if self._thrift.add(ms):
                self._resting = self.served, self.window.count + self._thrift.rest
                self._tell("resting", f"caches cost more than they save: closed for {self._thrift.rest} requests")
                self._thrift.rested()
                self._serve(Served(self.served.caches, np.full_like(self.served.thresholds, np.inf)))

    def _try_points(self, number: int, seen: Seen) -> None:
        before, state = self.trial.state, self.trial.add(number, seen)
        if state == "open" and before == "trial":
            self.front.threshold = self.trial.threshold
            self.epoch += 1
            self.monitor.look_closely(at_all=False)
            self.monitor.next_version()
            self._tell("opened", f"points, from a score of {self.trial.threshold:.2f}, after {self.trial.n} requests")
        elif state == "empirical":
            self.monitor.look_closely(at_all=False)
            self._tell("empirical", f"points stay closed after {self.trial.n} requests")
            self.trial.watch_again()
        elif state == "watching" and self.trial.wants_trial:
            self.trial.begin(self._level(), self._numbers - 1)
            self.monitor.look_closely(at_all=True)
            self._tell("trial", "points: the base is asked about every request")

    def _tell(self, kind: str, text: str) -> None:
        event = Event(self.monitor.watched, kind, text)
        self.events.append(event)
        self._told(event)

    def tell(self, kind: str, text: str) -> None:
        """Let the background say what it does."""
        self._tell(kind, text)


def standing(bundle: Bundle) -> Served:
    """Return what a bundle's default plan serves; closed caches stay in, for all versions are of one structure."""
    thresholds = np.asarray(bundle.plan.thresholds(bundle.certificate.step), np.float32)
    return Served(choose(bundle.caches, bundle.plan.names), thresholds)
