"""The controller: every request passes through it, before and after it is answered.

    ask         -> a ticket: number, coin, exact cache, nearest cache  (before the network)
    from_cache  -> the input cache has answered
    answered    -> the cascade has answered                            (after a miss, with the base's answer)
    shadowed    -> the base has answered, too, behind a hit
    lost        -> neither will come; a hit whose base answer is lost counts as wrong
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
from collections.abc import Callable, Iterable
from typing import Annotated, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float, Shaped
from pydantic import Field

from gati_jax.bundle.record import Bundle, certified_only, costs_of
from gati_jax.caches import Candidate, choose
from gati_jax.errors import InputError
from gati_jax.options import Strict

from .input_cache import ExactCache, ExactCacheConfig, InputCache, NearestCache, NearestCacheConfig, Ticket
from .monitor import Alarm, CostGuard, CostGuardConfig, Monitor, MonitorConfig, MonitorState, Natural, exit_ms
from .request_log import EXACT, LOST, NEAREST, UNKNOWN, Observation, RequestLog, RequestLogConfig
from .trials import NearestTrial, NearestTrialConfig

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

    @property
    def is_open(self) -> bool:
        """Whether any cache may answer."""
        return bool(np.isfinite(self.thresholds).any())

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


class ControllerState(Strict):
    """What must survive a restart, or each would spend delta anew and open what an alarm has closed."""

    bundle: Annotated[str, Field(max_length=200)]
    """Digest of the certified plan; with another, all begins closed."""
    epsilon: float
    delta: float
    monitor: MonitorState
    number: Natural
    """Of the version in the folder that is served; 0 for the bundle as it was given."""
    closed: Annotated[tuple[int, ...], Field(max_length=4096)]
    """Sites of caches that are closed."""


class AdaptationController:
    """Adapts one bundle to its traffic; see the module."""

    def __init__(
        self,
        bundle: Bundle,
        config: ControllerConfig,
        *,
        level: Callable[[], float | None],
        on_change: Callable[[Served], None] = lambda _: None,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        """Serve the bundle's default plan.

        Args:
            bundle: Certified for at most ``config.monitor.epsilon``, or its caches begin closed.
            config: See ``ControllerConfig``.
            level: Returns the part of delta of a trial of the nearest cache, see ``trial_level``; None: not yet.
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
        self.event_counts: collections.Counter[EventKind] = collections.Counter()
        """Of all events, by kind, not only those that are kept."""
        self._level, self._on_change, self._on_event = level, on_change, on_event
        self._random = np.random.default_rng(config.seed)
        self._numbers = 0  # of requests
        self._waiting: collections.deque[Ticket] = collections.deque()  # requests that are not observed yet, in order
        self.served = served_by(certified_only(bundle))
        self._paused: Served | None = None  # to be resumed
        self._resume_at = 0  # order number
        self._cost_guard = None
        if config.cost_guard is not None and bundle.costs:
            self._costs = costs_of(bundle)
            self._cost_guard = CostGuard(config.cost_guard, self._costs.full_ms)
        self._bundle = f"{bundle.plan.hash}:{bundle.certificate.step}"
        self.number = 0  # of the version that is served, see ``ControllerState``
        self.epoch = 0
        """Counts changes of what is served, the nearest cache included."""
        self.closed_at: int | None = None
        """Requests logged when a cache was last closed; None while all that were certified are open."""
        if (bundle.bound_of(numerics="reference").epsilon or math.inf) > config.monitor.epsilon:
            self._close(range(self.depth), "no certificate for this epsilon")

    @property
    def is_safe(self) -> bool:
        """Whether the base alone answers: every cache is closed, the nearest one too, none is merely paused."""
        return not (self._paused or self.served).is_open and self.trial.state != "open"

    # --- Requests -----------------------------------------------------------------------------------------------------

    def ask(self, images: Shaped[np.ndarray, "n h w c"], now: float) -> list[Ticket]:
        """Take requests before they are answered; a ticket's ``cached`` is the answer, if the input cache has one.

        With several threads, call the parts one by one, the input cache's ``keys`` and ``search`` without the lock.
        Images are uint8 and must not change; ``now`` is in seconds of a monotonic clock.
        """
        tickets = self.admit(images, self.input_cache.keys(images), now)
        self.input_cache.resolve(tickets, self.input_cache.search(tickets))
        return tickets

    def admit(self, images: Shaped[np.ndarray, "n h w c"], keys: list[bytes], now: float) -> list[Ticket]:
        """Number the requests, toss their coins and ask the exact cache, unless the base alone answers."""
        q, lookups, tickets, is_safe = self.monitor.q, self.trial.lookups, list[Ticket](), self.is_safe
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
            tickets.append(ticket)
            if not is_safe:
                self.input_cache.ask_exact(ticket, now)
        self._waiting.extend(tickets)
        return tickets

    def from_cache(self, ticket: Ticket) -> bool:
        """Take note that the input cache has answered; return whether to shadow the request."""
        assert ticket.cached is not None  # noqa: S101 (narrows the type)
        return self._take(ticket, ticket.cached)

    def answered(
        self, ticket: Ticket, exit_: int, score: float, logits: Float[np.ndarray, " classes"], now: float
    ) -> bool:
        """Take the network's answer; return whether to shadow the request.

        The exit is the site, or the depth for the base; score and logits are those of the cache or base that answered.
        """
        class_index = int(np.argmax(logits))
        if exit_ == self.depth:
            self._learn(ticket, logits, now)
            return self._take(ticket, Observation(exit_, math.inf, class_index, 1.0, class_index))
        return self._take(ticket, Observation(exit_, score, class_index, ticket.q, None))

    def shadowed(self, ticket: Ticket, logits: Float[np.ndarray, " classes"], now: float) -> None:
        """Take the base's answer to a request that a cache has answered already."""
        self._learn(ticket, logits, now)
        assert ticket.observation is not None  # noqa: S101 (narrows the type)
        ticket.observation = ticket.observation._replace(base_class=int(np.argmax(logits)))
        ticket.complete = True
        self._advance()

    def lost(self, ticket: Ticket) -> None:
        """Give up on a request that was never answered; or on its base answer, which then counts as wrong."""
        if ticket.observation is not None and not ticket.complete:
            ticket.observation = ticket.observation._replace(base_class=LOST)
        ticket.complete = True
        self._advance()

    def _learn(self, ticket: Ticket, logits: Float[np.ndarray, " classes"], now: float) -> None:
        # During a trial entries must be as far away as in service, so an input that would have hit is not stored.
        store_nearest = self.trial.would_miss(ticket.nearest_score)
        self.input_cache.learn(ticket, logits, now, store_nearest=store_nearest)

    def _take(self, ticket: Ticket, observation: Observation) -> bool:
        shadow = ticket.shadow and observation.base_class is None
        ticket.observation, ticket.complete = observation, not shadow
        self._advance()
        return shadow

    def _advance(self) -> None:
        """Observe the requests that are complete, in order; those that were never answered are left out."""
        while self._waiting and self._waiting[0].complete:
            ticket = self._waiting.popleft()
            if ticket.observation is not None:
                self._observe(ticket, ticket.observation)

    def _observe(self, ticket: Ticket, observation: Observation) -> None:
        exit_ = observation.exit
        self.request_log.add(ticket.image, observation.class_index if exit_ < 0 else UNKNOWN)
        if ticket.version == self.monitor.version:
            alarm = self.monitor.watch(observation)
            if alarm is not None:
                self.on_alarm(alarm)
        self._guard_costs(exit_, frequent=ticket.frequent)
        if self.input_cache.nearest is not None and exit_ != EXACT:
            self._try_nearest(ticket, observation)

    # --- Changes ------------------------------------------------------------------------------------------------------

    def on_alarm(self, alarm: Alarm) -> None:
        """Close what an alarm names, and go on with the monitor's next version."""
        lost = f", {n} lost shadows counted as wrong" if (n := self.monitor.report.lost) else ""
        self.emit("alarm", f"disagreement above {self.config.monitor.epsilon:.2%}{lost}")
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
        served = self._paused or self.served  # what is open, or will be when it is resumed
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
            self._paused = served.closed(named)
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

    def adopt(self, served: Served, text: str, epoch: int | None = None, *, number: int = 0) -> None:
        """Serve other caches or thresholds, certified by a trial, from the next request on.

        Args:
            served: The caches and thresholds.
            text: For the operator.
            epoch: The controller's when the trial began: a certificate beside something else opens nothing.
            number: Of the version in the folder.
        """
        if epoch is not None and epoch != self.epoch:
            self.emit("inconclusive", f"{text}: what is served has changed meanwhile")
            return
        self.closed_at, self._paused, self.number = None, None, number
        self.monitor.next_version()
        self.emit("swap", text)
        self._serve(served)

    # --- Restarts -----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> ControllerState:
        """What to ``resume`` behind a restart; the nearest cache starts empty there, and pauses are over."""
        config, (caches, thresholds) = self.config.monitor, self._paused or self.served
        return ControllerState(
            bundle=self._bundle, epsilon=config.epsilon, delta=config.delta, monitor=self.monitor.state,
            number=self.number, closed=tuple(caches[i].site for i in np.flatnonzero(np.isinf(thresholds))),
        )  # fmt: skip

    def resume(self, state: ControllerState, served: Served, number: int) -> None:
        """Go on where another process stopped, with the version that could be loaded; 0 is the bundle as it was given.

        Another bundle begins closed, and so does any version but the one that was served last: an earlier one was left
        because of an alarm; a later one was saved but never served, perhaps because of an alarm meanwhile.
        """
        if state.bundle != self._bundle:
            self.distrust(state.monitor.version + 1, "what is remembered is of another bundle")
            return
        self.monitor.resume(state.monitor)
        if (state.epsilon, state.delta) != (self.config.monitor.epsilon, self.config.monitor.delta):
            self.monitor.next_version()  # evidence against another hypothesis
        if number:
            self.closed_at, self.number = None, number
            self._serve(served)
        self._close(state.closed if number == state.number else range(self.depth), "before the restart")

    def distrust(self, version: int, why: str) -> None:
        """Begin with all caches closed; the version must be one that the monitor cannot have come to before."""
        self.monitor.next_version(version)
        self._close(range(self.depth), why)

    def _guard_costs(self, exit_: int, *, frequent: bool) -> None:
        """Pause caches that cost more than they save, and resume them."""
        if self._cost_guard is None:
            return
        if self._paused is not None:
            if self.request_log.count >= self._resume_at and self.trial.state != "trial":
                self._resume(self._paused)
            return
        if exit_ < 0 or frequent or not self.served.is_open:
            return
        if pause := self._cost_guard.add(exit_ms(self.served.caches, self._costs, exit_)):
            self._paused, self._resume_at = self.served, self.request_log.count + pause
            self.emit("paused", f"caches cost more than they save: closed for {pause} requests")
            self._serve(self.served.closed())

    def _resume(self, served: Served) -> None:
        self._paused = None
        if self.trial.state == "open":  # certified with the base behind it: beside the caches it needs another trial
            self.closed_at = self.request_log.count
            self.emit("closed", "caches that were paused, until a trial beside the nearest cache")
        else:
            self.emit("resumed", "caches")
            self._serve(served)

    def _try_nearest(self, ticket: Ticket, observation: Observation) -> None:
        before = self.trial.state
        state = self.trial.add(ticket.number, ticket.nearest_class, ticket.nearest_score, observation)
        if state == "open" and before == "trial":
            self.input_cache.threshold = score = self.trial.threshold
            self.epoch += 1
            self.monitor.shadow_all(on=False)
            self.monitor.next_version()
            self.emit("opened", f"nearest cache, from a score of {score:.2f}, after {self.trial.n} requests")
        elif state == "inconclusive":
            self.monitor.shadow_all(on=False)
            self.emit("inconclusive", f"nearest cache stays closed after {self.trial.n} requests")
            self.trial.watch_again()
        elif self.trial.begin(self._level, self._numbers - 1):
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
