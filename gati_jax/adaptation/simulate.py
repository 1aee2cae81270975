"""Replay a trace through front, cascade, monitor and background, offline: every answer and every decision.

Which of the caches answers is decided request by request, as a server would, one at a time. Time is the trace's; the
background may work while its share of that time allows, by the seconds that its pieces took here.
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

from .controller import AdaptationController, ControllerConfig, Event, standing
from .cost_guard import exit_ms
from .recovery import Recovery, RecoveryConfig
from .trace import Trace


class ReplayCache:
    """By set of caches; the reference arithmetic."""

    def __init__(self, chain: Chain, images: Shaped[np.ndarray, "items ..."]) -> None:
        """Know nothing yet.

        Args:
            chain: The base.
            images: Of the trace.
        """
        self._chain, self._images = chain, images
        self._by_caches: dict[tuple[int, ...], Column] = {}  # by the caches' identities: who serves may regroup them

    def of(self, caches: tuple[Candidate, ...], items: Int[np.ndarray, " m"]) -> "Column":
        """Return what is said to these items, and to others that were asked for before."""
        key = tuple(id(cache) for cache in caches)
        column = self._by_caches.get(key)
        if column is None:
            column = self._by_caches[key] = Column(caches, len(self._images), self._chain.classes)
        missing = np.unique(items[~column.known[items]])
        if len(missing):
            said = evaluate(self._chain, caches, self._images[missing], batch=BATCH)
            column.logits[missing], column.known[missing] = said.logits.T, True
            column.classes[:, missing], column.scores[:, missing] = said.classes, said.scores
        return column


@dataclasses.dataclass(eq=False)
class Column:
    """What one set of caches, and the base, say to items; only those that are known."""

    caches: tuple[Candidate, ...]
    """Kept, so that their identities are nobody else's."""
    items: int
    outputs: int

    def __post_init__(self) -> None:
        """Make room."""
        self.known = np.zeros(self.items, bool)
        self.logits: Float[np.ndarray, "items classes"] = np.zeros((self.items, self.outputs), np.float32)
        self.classes: Int[np.ndarray, "caches items"] = np.zeros((len(self.caches), self.items), np.int32)
        self.scores: Float[np.ndarray, "caches items"] = np.zeros((len(self.caches), self.items), np.float32)


_CHUNK = 512  # requests heard at once
_EVERY = 100  # requests between two readings of the monitor's bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanisms:
    """What is switched on."""

    keeper: ControllerConfig | None
    """None: caches as they are, and nobody looks."""
    background: RecoveryConfig | None = None
    """None: what is closed stays closed."""
    share: float = 0.1
    """Of the time, for the background."""


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
    """Of computation, by the cost table, and of the front: spans, lookups, shadows."""
    full_ms: float
    front_ms: float
    """Mean, measured: what ``AdaptationController`` takes for a request."""
    events: tuple[Event, ...]
    background_seconds: float
    """That trials and refits took here."""


def simulate(
    bundle: Bundle,
    trace: Trace,
    mechanisms: Mechanisms,
    *,
    folder: Path | str,
    heard: ReplayCache | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Replayed:
    """Replay a trace.

    Args:
        bundle: With measured costs; its default plan is served.
        trace: With images.
        mechanisms: What is on.
        folder: Where versions are kept; what a simulation before has left there is deleted.
        heard: What the same base says to the same images, to be shared between simulations.
        progress: Is told how many requests have been replayed.

    Raises:
        InputError: A trace without images, or of others than the bundle takes; a bundle without costs.
    """
    if trace.images is None:
        raise InputError("trace: expected one with images, got rows of a data set alone")
    heard = heard or ReplayCache(bundle.chain, trace.images)
    shutil.rmtree(folder, ignore_errors=True)  # of another simulation
    run = _Run(bundle, trace.images, mechanisms, Versions(folder), costs_of(bundle))
    n = len(trace)
    exits, wrong, shadow = np.zeros(n, np.int32), np.zeros(n, bool), np.zeros(n, bool)
    ms, upper = np.zeros(n), np.full(n, np.nan)
    for start in range(0, n, _CHUNK):
        items = trace.item[start : start + _CHUNK]
        for i, item in enumerate(items.tolist(), start):
            now = float(trace.seconds[i])
            run.work(now)
            column = heard.of(run.served.caches, items[i - start :])
            done = run.serve(item, column, now)
            exits[i], wrong[i], shadow[i], ms[i] = done
            if run.keeper is not None and i % _EVERY == 0:
                upper[i] = run.keeper.monitor.report.upper
        progress(min(n, start + _CHUNK))
    front_ms = run.front_seconds / n * 1e3
    return Replayed(
        exit=exits,
        wrong=wrong,
        shadow=shadow,
        upper=upper,
        ms=ms + front_ms,
        full_ms=run.full_ms,
        front_ms=front_ms,
        events=tuple(run.keeper.events) if run.keeper else (),
        background_seconds=run.background_seconds,
    )


class Done(NamedTuple):
    """One request."""

    exit: int
    wrong: bool
    shadow: bool
    ms: float


class _Run:
    """The state of a simulation."""

    def __init__(
        self, bundle: Bundle, images: np.ndarray, mechanisms: Mechanisms, versions: Versions, costs: CostTable
    ) -> None:
        self._images, self._costs, self._share = images, costs, mechanisms.share
        self._depth, self.full_ms = len(bundle.chain), costs.full_ms
        self.keeper, self.background = None, None
        if mechanisms.keeper is not None:
            delta = mechanisms.keeper.monitor.delta
            self.keeper = AdaptationController(
                bundle,
                mechanisms.keeper,
                level=lambda: trial_level(delta, versions.next_trial()),
                changed=lambda served: setattr(self, "served", served),
            )
            if mechanisms.background is not None:
                self.background = Recovery(bundle, self.keeper, versions, mechanisms.background)
        self.served = self.keeper.served if self.keeper else standing(certified_only(bundle))
        self.background_seconds, self.front_seconds = 0.0, 0.0
        self._free_at = 0.0  # when the background may go on

    def work(self, now: float) -> None:
        """Let the background do what its share of the time allows."""
        if self.background is None:
            return
        while self._free_at <= now:
            began = time.perf_counter()
            if not self.background.work():
                return
            took = time.perf_counter() - began
            self.background_seconds += took
            self._free_at = max(self._free_at, now) + took / self._share

    def serve(self, item: int, column: Column, now: float) -> Done:
        """Answer a request."""
        base = int(np.argmax(column.logits[item]))
        if self.keeper is None:
            exit_, class_index, _ = self._cascade(item, column)
            return Done(exit_, class_index != base, shadow=False, ms=self._ms(exit_))
        began = time.thread_time()
        ticket = self.keeper.ask(self._images[item], now)
        if ticket.early is not None:
            exit_, class_index, ms = ticket.early.exit, ticket.early.class_index, 0.0
            look = self.keeper.early(ticket)
        else:
            exit_, class_index, score = (self._depth, base, np.inf) if ticket.often else self._cascade(item, column)
            ms = self.full_ms if ticket.often else self._ms(exit_)
            logits = column.logits[item]
            if exit_ != self._depth:
                logits = np.zeros_like(logits)
                logits[class_index] = 1.0
            look = self.keeper.answered(ticket, exit_, score, logits, now)
        if look:
            self.keeper.shadowed(ticket, column.logits[item], now)
            ms = self.full_ms if exit_ < 0 else self._ms(self._depth)
        self.front_seconds += time.thread_time() - began
        return Done(exit_, class_index != base, look, ms)

    def _cascade(self, item: int, column: Column) -> tuple[int, int, float]:
        """Return who answers: exit, class and score."""
        scores = column.scores[:, item]
        hits = np.flatnonzero(scores >= self.served.thresholds)
        if not len(hits):
            return self._depth, int(np.argmax(column.logits[item])), np.inf
        first = int(hits[0])
        return self.served.caches[first].site, int(column.classes[first, item]), float(scores[first])

    def _ms(self, exit_: int) -> float:
        """Return the time up to an exit with all lookups before it; with nothing open, requests go to the base."""
        if not np.isfinite(self.served.thresholds).any():
            return self.full_ms
        return exit_ms(self.served.caches, self._costs)[exit_]


BATCH = 64
