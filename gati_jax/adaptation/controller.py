"""The controller: every request passes through it, before and after it is answered.

    ask         -> a ticket: number, coin, exact cache, nearest cache  (before the network)
    from_cache  -> the input cache has answered
    answered    -> the cascade has answered                            (after a miss, with the base's answer)
    shadowed    -> the base has answered, too, behind a hit
    in order    -> request log, monitor, cost guard, trial of the nearest cache
                   (a request whose base answer is still to come holds back those behind it)

An alarm closes at once what it names: thresholds become infinite, or the nearest cache stops answering. Caches open
again only by a trial on later traffic (``recovery``), the nearest cache by one of its own. What is served changes in
``_serve`` and ``_close_nearest`` alone; each change is a new version for the monitor, or follows one.

No threads, clock or device: the caller brings them. Calls are short; with several threads, hold a lock (the functions
that need none say so).
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float, Shaped

from gati_jax.bundle.record import Bundle, certified_only, costs_of
from gati_jax.caches import Candidate, choose
from gati_jax.errors import InputError

from .cost_guard import CostGuard, CostGuardConfig, exit_ms
from .input_cache import ExactCache, ExactCacheConfig, InputCache, Match, NearestCache, NearestCacheConfig, Ticket
from .monitor import Alarm, Monitor, MonitorConfig
from .request_log import EXACT, NEAREST, UNKNOWN, Observation, RequestLog, RequestLogConfig
from .trials import NearestTrial, NearestTrialConfig, Seen

EventKind = Literal["alarm", "closed", "opened", "trial", "inconclusive", "refit", "swap", "paused", "resumed"]
EVENT_KINDS: tuple[EventKind, ...] = get_args(EventKind)
_RECENT_EVENTS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """What is promised and kept; None switches a layer off."""

    monitor: MonitorConfig
    request_log: RequestLogConfig = dataclasses.field(default_factory=RequestLogConfig)
    exact: ExactCacheConfig | None = dataclasses.field(default_factory=ExactCacheConfig)
    nearest: NearestCacheConfig | None = dataclasses.field(default_factory=NearestCacheConfig)
    cost_guard: CostGuardConfig | None = dataclasses.field(default_factory=CostGuardConfig)
    """Needs measured costs; without them caches are never paused."""
    nearest_trial: NearestTrialConfig = dataclasses.field(default_factory=NearestTrialConfig)
    seed: int = 0


class Served(NamedTuple):
    """The caches in the network as they are served."""

    caches: tuple[Candidate, ...]
    thresholds: Float[np.ndarray, " caches"]
    """Infinite where a cache is closed."""

    def closed(self, which: Bool[np.ndarray, " caches"] | None = None) -> "Served":
        """Return the same with these caches closed; all unless given."""
        off = True if which is None else which
        return Served(self.caches, np.where(off, np.float32(np.inf), self.thresholds))


class Event(NamedTuple):
    """A change that an operator wants to know of."""

    number: int
    """Requests monitored before it."""
    kind: EventKind
    text: str


class _Paused(NamedTuple):
    served: Served  # to be resumed
    until: int  # order number


@dataclasses.dataclass(slots=True)
class _Pending:
    ticket: Ticket
    exit: int
    class_index: int
    score: float
    base_class: int | None
    complete: bool


class AdaptationController:
    """Adapts one bundle to its traffic; see the module."""

    def __init__(
        self,
        bundle: Bundle,
        config: ControllerConfig,
        *,
        level: Callable[[], float],
        on_change: Callable[["Served"], None] = lambda _: None,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        """Serve the bundle's default plan.

        Args:
            bundle: Certified for at most ``config.monitor.epsilon``, or its caches begin closed.
            config: See ``ControllerConfig``.
            level: Returns the part of delta of a trial of the nearest cache that begins, see ``trial_level``.
            on_change: Called with what is to be served whenever that changes, before the next request is asked.
            on_event: Called with every event.

        Raises:
            InputError: Inputs that are not uint8 images of height, width and channels.
        """
        shape = tuple(bundle.chain.input_spec.shape)
        if bundle.chain.normalization is None or len(shape) != 3:  # noqa: PLR2004 (height, width, channels)
            raise InputError(f"bundle: expected a base of uint8 images [h, w, c], got inputs of {list(shape)}")
        self.config, self.depth = config, len(bundle.chain)
        self.monitor = Monitor(config.monitor, self.depth)
        self.request_log = RequestLog(shape, config.request_log)
        self.input_cache = InputCache(
            ExactCache(config.exact) if config.exact else None,
            NearestCache(shape, config.nearest) if config.nearest else None,
        )
        self.trial = NearestTrial(config.monitor.epsilon, config.nearest_trial)
        self.events: collections.deque[Event] = collections.deque(maxlen=_RECENT_EVENTS)
        """The latest ones."""
        self.event_counts: collections.Counter[EventKind] = collections.Counter()
        """Of all events, by kind."""
        self._level, self._on_change, self._on_event = level, on_change, on_event
        self._random = np.random.default_rng(config.seed)
        self._numbers = 0
        self._pending: dict[int, _Pending | None] = {}
        self._next = 0
        self.served = served_by(certified_only(bundle))
        self._paused: _Paused | None = None
        self._cost_guard = None
        if config.cost_guard is not None and bundle.costs:
            self._costs = costs_of(bundle)
            self._cost_guard = CostGuard(config.cost_guard, self._costs.full_ms)
        self.epoch = 0
        """Counts changes of what is served, the nearest cache included."""
        self.closed_at: int | None = None
        """Requests logged when a cache was last closed; None while all that were certified are open."""
        if not (bundle.certificate.certified and bundle.certificate.epsilon <= config.monitor.epsilon):
            self._close(range(self.depth), "no certificate for this epsilon")

    # --- Requests -----------------------------------------------------------------------------------------------------

    def ask(self, images: Shaped[np.ndarray, "n h w c"], now: float) -> list[Ticket]:
        """Take requests before they are answered; a ticket's ``cached`` is the answer, if the input cache has one.

        With several threads, call the four parts one by one, the first and the third without the lock.

        Args:
            images: uint8; not to be changed.
            now: Seconds of a monotonic clock.
        """
        tickets = self.admit(images, self.keys(images), now)
        self.resolve(tickets, self.search(tickets))
        return tickets

    def keys(self, images: Shaped[np.ndarray, "n h w c"]) -> list[bytes]:
        """Return the images' keys in the exact cache. Needs no lock."""
        return self.input_cache.keys(images)

    def admit(self, images: Shaped[np.ndarray, "n h w c"], keys: list[bytes], now: float) -> list[Ticket]:
        """Number the requests, toss their coins and ask the exact cache."""
        q, lookups, tickets = self.monitor.q, self.trial.lookups, list[Ticket]()
        for image, key in zip(images, keys, strict=True):
            ticket = Ticket(
                number=self._numbers,
                image=image,
                q=q,
                shadow=bool(q >= 1 or self._random.random() < q),
                search=bool(lookups >= 1 or self._random.random() < lookups),
                version=self.monitor.version,
                key=key,
            )
            self._numbers += 1
            self._pending[ticket.number] = None
            tickets.append(ticket)
            self.input_cache.ask_exact(ticket, now)
        return tickets

    def search(self, tickets: Sequence[Ticket]) -> Match | None:
        """Look admitted requests up in the nearest cache. Needs no lock."""
        return self.input_cache.search(tickets)

    def resolve(self, tickets: Sequence[Ticket], found: Match | None) -> None:
        """Take what ``search`` returned."""
        self.input_cache.resolve(tickets, found)

    def from_cache(self, ticket: Ticket) -> bool:
        """Take note that the input cache has answered; return whether to shadow the request."""
        assert ticket.cached is not None  # noqa: S101 (narrows the type)
        exit_, class_index, score = ticket.cached
        if exit_ == EXACT:  # the base's own answer
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
        """Take the network's answer; return whether to shadow the request.

        Args:
            ticket: The request.
            exit_: The site, or the depth for the base.
            score: Of the selector.
            logits: Of the cache or the base that answered.
            now: Seconds.
        """
        class_index = int(np.argmax(logits))
        if exit_ == self.depth:
            self._learn(ticket, logits, now)
            self._settle(ticket, exit_, class_index, math.inf, class_index)
            return False
        return self._hit(ticket, exit_, class_index, score)

    def shadowed(self, ticket: Ticket, logits: Float[np.ndarray, " classes"], now: float) -> None:
        """Take the base's answer to a request that a cache has answered already."""
        self._learn(ticket, logits, now)
        pending = self._pending[ticket.number]
        assert pending is not None  # noqa: S101 (narrows the type)
        pending.base_class, pending.complete = int(np.argmax(logits)), True
        self._advance()

    def lost(self, ticket: Ticket) -> None:
        """Give up on a request that was never answered; or on its base answer, as if it had not been shadowed."""
        pending = self._pending[ticket.number]
        if pending is None:
            del self._pending[ticket.number]
        else:
            pending.complete = True
        self._advance()

    def _learn(self, ticket: Ticket, logits: Float[np.ndarray, " classes"], now: float) -> None:
        # During a trial entries must be as far away as in service, so an input that would have hit is not stored.
        store_nearest = self.trial.would_miss(ticket.nearest_score)
        self.input_cache.learn(ticket, logits, now, store_nearest=store_nearest)

    def _hit(self, ticket: Ticket, exit_: int, class_index: int, score: float) -> bool:
        self._pending[ticket.number] = _Pending(ticket, exit_, class_index, score, None, complete=not ticket.shadow)
        self._advance()
        return ticket.shadow

    def _settle(self, ticket: Ticket, exit_: int, class_index: int, score: float, base_class: int) -> None:
        self._pending[ticket.number] = _Pending(ticket, exit_, class_index, score, base_class, complete=True)
        self._advance()

    def _advance(self) -> None:
        """Observe the requests that are complete, in order."""
        while self._next < self._numbers:
            pending = self._pending.get(self._next)
            if self._next in self._pending and (pending is None or not pending.complete):
                return
            self._pending.pop(self._next, None)
            self._next += 1
            if pending is not None:
                self._observe(pending)

    def _observe(self, p: _Pending) -> None:
        ticket, known = p.ticket, p.base_class is not None
        self.request_log.add(ticket.image, p.class_index if p.exit < 0 else UNKNOWN)
        q = 1.0 if p.exit in (self.depth, EXACT) else ticket.q
        if ticket.version == self.monitor.version:
            alarm = self.monitor.watch(Observation(p.exit, p.score, p.class_index, q, p.base_class))
            if alarm is not None:
                self.on_alarm(alarm)
        self._guard_costs(p)
        if self.input_cache.nearest is not None and p.exit != EXACT:
            wrong = known and p.base_class != p.class_index
            seen = Seen(ticket.nearest_score, known and p.base_class != ticket.nearest_class, wrong, q, known)
            self._try_nearest(ticket.number, seen)

    # --- Changes ------------------------------------------------------------------------------------------------------

    def on_alarm(self, alarm: Alarm) -> None:
        """Close what an alarm names, and go on with the monitor's next version."""
        self.emit("alarm", f"disagreement above {self.config.monitor.epsilon:.2%}")
        if NEAREST in alarm.sites and self.trial.state == "open":
            self._close_nearest()
        self._close(alarm.sites, "alarm")
        self.monitor.next_version()

    def _close_nearest(self) -> None:
        self.trial.close()
        self.input_cache.threshold = math.inf
        self.epoch += 1
        self.emit("closed", "nearest cache")

    def _close(self, sites: Iterable[int], why: str) -> None:
        served = self._paused.served if self._paused else self.served  # what is open, or will be when it is resumed
        named = np.isin([cache.site for cache in served.caches], list(sites))
        closing = named & np.isfinite(served.thresholds)
        if not closing.any():
            return
        names = [cache.name for cache, off in zip(served.caches, closing, strict=True) if off]
        self.closed_at = self.request_log.count
        self.emit("closed", f"{', '.join(names)}: {why}")
        if self._paused is None:
            self._serve(served.closed(named))
        else:
            self._paused = self._paused._replace(served=served.closed(named))
            self.epoch += 1

    def _serve(self, served: Served) -> None:
        """Change what is served; a trial of the nearest cache beside what was served before is over."""
        self.served = served
        self.epoch += 1
        if self.trial.state == "trial":
            self.monitor.shadow_all(on=False)
            self.trial.close()
            self.emit("inconclusive", "nearest cache: other caches are served from now on, the trial is over")
        self._on_change(served)

    def adopt(self, served: Served, text: str, epoch: int | None = None) -> None:
        """Serve other caches or thresholds, certified by a trial, from the next request on.

        Args:
            served: The caches and thresholds.
            text: For the operator.
            epoch: The controller's when the trial began: a certificate beside something else opens nothing.
        """
        if epoch is not None and epoch != self.epoch:
            self.emit("inconclusive", f"{text}: what is served has changed meanwhile")
            return
        self.closed_at, self._paused = None, None
        self.monitor.next_version()
        self.emit("swap", text)
        self._serve(served)

    def _guard_costs(self, p: _Pending) -> None:
        """Pause caches that cost more than they save, and resume them."""
        guard = self._cost_guard
        if guard is None:
            return
        if self._paused is not None:
            if self.request_log.count >= self._paused.until and self.trial.state != "trial":
                self._resume(self._paused.served)
        elif p.exit >= 0 and not p.ticket.frequent and np.isfinite(self.served.thresholds).any():
            ms = exit_ms(self.served.caches, self._costs)[p.exit]
            if guard.add(ms):
                self._paused = _Paused(self.served, self.request_log.count + guard.pause)
                self.emit("paused", f"caches cost more than they save: closed for {guard.pause} requests")
                guard.lengthen()
                self._serve(self.served.closed())

    def _resume(self, served: Served) -> None:
        self._paused = None
        if self.trial.state == "open":  # certified with the base behind it: beside the caches it needs another trial
            self.closed_at = self.request_log.count
            self.emit("closed", "caches that were paused, until a trial beside the nearest cache")
        else:
            self.emit("resumed", "caches")
            self._serve(served)

    def _try_nearest(self, number: int, seen: Seen) -> None:
        before, state = self.trial.state, self.trial.add(number, seen)
        if state == "open" and before == "trial":
            threshold, n = self.trial.threshold, self.trial.n
            self.input_cache.threshold = threshold
            self.epoch += 1
            self.monitor.shadow_all(on=False)
            self.monitor.next_version()
            self.emit("opened", f"nearest cache, from a score of {threshold:.2f}, after {n} requests")
        elif state == "inconclusive":
            self.monitor.shadow_all(on=False)
            self.emit("inconclusive", f"nearest cache stays closed after {self.trial.n} requests")
            self.trial.watch_again()
        elif state == "watching" and self.trial.wants_trial:
            self.trial.begin(self._level(), self._numbers - 1)
            self.monitor.shadow_all(on=True)
            self.emit("trial", "nearest cache: every request is shadowed")

    def emit(self, kind: EventKind, text: str) -> None:
        """Record an event, and pass it on to ``on_event``."""
        event = Event(self.monitor.watched, kind, text)
        self.events.append(event)
        self.event_counts[kind] += 1
        self._on_event(event)


def served_by(bundle: Bundle) -> Served:
    """Return what a bundle's default plan serves; closed caches stay in, for all versions are of one structure."""
    thresholds = np.asarray(bundle.plan.thresholds(bundle.certificate.step), np.float32)
    return Served(choose(bundle.caches, bundle.plan.names), thresholds)
