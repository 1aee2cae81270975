"""Replay a trace through input cache, cascade, monitor and recovery, offline: every answer and every decision.

Requests are answered one at a time, as a server with one client would. Time is the trace's; recovery may work while its
share of that time allows, by the seconds that its pieces took here.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from gati_jax.bundle.record import Bundle, certified_only, costs_of
from gati_jax.bundle.versions import Versions
from gati_jax.caches import Candidate
from gati_jax.certification import trial_level
from gati_jax.errors import InputError
from gati_jax.fitting import evaluate
from gati_jax.models import Chain
from gati_jax.planning import CostTable

from .controller import AdaptationController, ControllerConfig, Event, served_by
from .monitor import exit_ms
from .recovery import Recovery, RecoveryConfig
from .trace import Trace

_BATCH = 64
_CHUNK = 512  # requests evaluated at once
_EVERY = 100  # requests between two readings of the monitor's bound


class ReplayCache:
    """Outputs of the base and of sets of caches on a trace's images, computed once, in the reference arithmetic."""

    def __init__(self, chain: Chain, images: Shaped[np.ndarray, "items ..."]) -> None:
        """Start empty."""
        self._chain, self._images = chain, images
        self._by_caches: dict[tuple[int, ...], Column] = {}  # by the caches' identities: adaptation may regroup them

    def of(self, caches: tuple[Candidate, ...], items: Int[np.ndarray, " m"]) -> "Column":
        """Return the outputs for these items, and for others that were asked for before."""
        key = tuple(id(cache) for cache in caches)
        column = self._by_caches.get(key)
        if column is None:
            n, form = len(self._images), (len(caches), len(self._images))
            logits = np.zeros((n, self._chain.classes), np.float32)
            column = Column(caches, np.zeros(n, bool), logits, np.zeros(form, np.int32), np.zeros(form, np.float32))
            self._by_caches[key] = column
        missing = np.unique(items[~column.known[items]])
        if len(missing):
            outputs = evaluate(self._chain, caches, self._images[missing], batch=_BATCH)
            column.logits[missing], column.known[missing] = outputs.logits.T, True
            column.classes[:, missing], column.scores[:, missing] = outputs.classes, outputs.scores
        return column


class Column(NamedTuple):
    """Outputs of the base and of one set of caches, item by item, where they are known."""

    caches: tuple[Candidate, ...]  # referenced, so that their identities are not used again
    known: Bool[np.ndarray, " items"]
    logits: Float[np.ndarray, "items classes"]  # of the base
    classes: Int[np.ndarray, "caches items"]
    scores: Float[np.ndarray, "caches items"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanisms:
    """Which parts of adaptation are on."""

    controller: ControllerConfig | None
    """None: static caches, without a monitor."""
    recovery: RecoveryConfig | None = None
    """None: what is closed stays closed."""
    share: float = 0.1
    """Of the time, for recovery."""


class Replayed(NamedTuple):
    """What became of every request, in order."""

    exit: Int[np.ndarray, " n"]
    """See ``Observation``."""
    wrong: Bool[np.ndarray, " n"]
    """Whether the answer differs from the base's."""
    shadow: Bool[np.ndarray, " n"]
    """Whether the base answered behind a hit."""
    upper: Float[np.ndarray, " n"]
    """The monitor's bound on the mean disagreement under its present version; NaN where none was read."""
    ms: Float[np.ndarray, " n"]
    """Of computation, by the cost table, and of the controller: spans, lookups, shadows."""
    full_ms: float
    """Of the base alone."""
    controller_ms: float
    """Measured mean of what ``AdaptationController`` takes for a request."""
    events: tuple[Event, ...]
    recovery_seconds: float
    """That trials and refits took here."""


def simulate(
    bundle: Bundle,
    trace: Trace,
    mechanisms: Mechanisms,
    *,
    folder: Path | str,
    replay_cache: ReplayCache | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Replayed:
    """Replay a trace.

    Args:
        bundle: With measured costs; its default plan is served.
        trace: With images.
        mechanisms: What is on.
        folder: For versions; those of an earlier simulation are deleted.
        replay_cache: Of the same base and images, to be shared between simulations.
        progress: Called with the number of requests replayed so far.

    Raises:
        InputError: A trace without images, or of others than the bundle takes; a bundle without costs.
    """
    if trace.images is None:
        raise InputError("trace: expected one with images, got rows of a data set alone")
    replay_cache = replay_cache or ReplayCache(bundle.chain, trace.images)
    shutil.rmtree(folder, ignore_errors=True)
    costs, n = costs_of(bundle), len(trace)
    run = _Run(bundle, trace.images, mechanisms, Versions(folder), costs)
    exits, wrong, shadow = np.zeros(n, np.int32), np.zeros(n, bool), np.zeros(n, bool)
    ms, upper = np.zeros(n), np.full(n, np.nan)
    for i, item in enumerate(trace.item.tolist()):
        now = float(trace.seconds[i])
        run.recover(now)
        column = replay_cache.of(run.served.caches, trace.item[i : i - i % _CHUNK + _CHUNK])
        exits[i], wrong[i], shadow[i], ms[i] = run.serve(item, column, now)
        if run.controller is not None and i % _EVERY == 0:
            upper[i] = run.controller.monitor.report.upper
        if (i + 1) % _CHUNK == 0 or i + 1 == n:
            progress(i + 1)
    controller_ms = run.controller_seconds / n * 1e3
    return Replayed(
        exit=exits, wrong=wrong, shadow=shadow, upper=upper, ms=ms + controller_ms, full_ms=costs.full_ms,
        controller_ms=controller_ms, events=tuple(run.events), recovery_seconds=run.recovery_seconds,
    )  # fmt: skip


class _Run:
    """The state of a simulation."""

    def __init__(
        self, bundle: Bundle, images: np.ndarray, mechanisms: Mechanisms, versions: Versions, costs: CostTable
    ) -> None:
        self._images, self._costs, self._share = images, costs, mechanisms.share
        self._depth = len(bundle.chain)
        self.events: list[Event] = []
        self.controller, self.recovery = None, None
        if mechanisms.controller is not None:
            delta = mechanisms.controller.monitor.delta
            self.controller = AdaptationController(
                bundle,
                mechanisms.controller,
                level=lambda: trial_level(delta, versions.next_trial()),
                on_change=lambda served: setattr(self, "served", served),
                on_event=self.events.append,
            )
            if mechanisms.recovery is not None:
                self.recovery = Recovery(bundle, self.controller, versions, mechanisms.recovery)
        self.served = self.controller.served if self.controller else served_by(certified_only(bundle))
        self.recovery_seconds, self.controller_seconds = 0.0, 0.0
        self._free_at = 0.0  # when recovery may go on

    def recover(self, now: float) -> None:
        """Let recovery do what its share of the time allows."""
        if self.recovery is None:
            return
        while self._free_at <= now:
            began = time.perf_counter()
            if not self.recovery.work():
                return
            took = time.perf_counter() - began
            self.recovery_seconds += took
            self._free_at = max(self._free_at, now) + took / self._share

    def serve(self, item: int, column: Column, now: float) -> tuple[int, bool, bool, float]:
        """Answer a request; return its exit, whether the answer differs, whether it is shadowed, and milliseconds."""
        logits = column.logits[item]
        base = int(np.argmax(logits))
        if self.controller is None:
            exit_, class_index, _, ms = self._network(item, column, base, base_only=False)
            return exit_, class_index != base, False, ms
        began = time.thread_time()
        (ticket,) = self.controller.ask(self._images[item][None], now)
        if ticket.cached is not None:
            exit_, class_index, ms = ticket.cached.exit, ticket.cached.class_index, 0.0
            shadow = self.controller.from_cache(ticket)
        else:
            exit_, class_index, score, ms = self._network(item, column, base, base_only=ticket.frequent)
            given = logits if exit_ == self._depth else np.eye(len(logits), dtype=np.float32)[class_index]
            shadow = self.controller.answered(ticket, exit_, score, given, now)
        if shadow:
            ms = self._costs.full_ms if exit_ < 0 else exit_ms(self.served.caches, self._costs, self._depth)
            self.controller.shadowed(ticket, logits, now)
        self.controller_seconds += time.thread_time() - began
        return exit_, class_index != base, shadow, ms

    def _network(self, item: int, column: Column, base: int, *, base_only: bool) -> tuple[int, int, float, float]:
        """Return exit, class, score and milliseconds of the network's answer; with nothing open, it is the base's."""
        if base_only or not self.served.is_open:
            return self._depth, base, np.inf, self._costs.full_ms
        exit_, class_index, score = self._depth, base, np.inf
        hits = np.flatnonzero(column.scores[:, item] >= self.served.thresholds)
        if len(hits):
            first = int(hits[0])
            exit_, class_index = self.served.caches[first].site, int(column.classes[first, item])
            score = float(column.scores[first, item])
        return exit_, class_index, score, exit_ms(self.served.caches, self._costs, exit_)
