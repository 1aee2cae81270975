"""The engine as the service sees it under ``--adapt``, with the controller before and behind it."""

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
from jaxtyping import Shaped

from gati_jax.adaptation import EXACT, NEAREST, AdaptationController, Event, EventKind, RequestLog, Served, Ticket
from serve.engine.engine import Engine
from serve.engine.records import Answer, Job, Observer, ServeError, Statistics, Step

T = TypeVar("T")
Swap = Callable[[], None]
Build = Callable[[Callable[[Served], None], Callable[[Event], None]], AdaptationController]
ADAPTED, BASE = 0, 1  # routes: of the plan that adapts, and of the base
SAFE, PART, OPEN, FAILED = STATES = ("safe", "part", "open", "failed")
"""All caches closed, some of them, none; adaptation has failed. In the first and the last, the base answers."""
LAYERS = {EXACT: "exact", NEAREST: "nearest"}
_ENDING = 5.0  # seconds for the worker to end behind its present piece
_SURE = 30.0  # logits of answers from the input cache, where only the class is known
_WARNINGS = {"alarm", "closed", "inconclusive"}
_log = logging.getLogger(__name__)


class AdaptiveEngine:
    """Answers by an engine, and adapts. Also the engine's observer, and the controller as recovery sees it.

    Args:
        build: Makes the controller, given its ``on_change`` and its ``on_event``.
        observer: Called with all that the engine reports.
        classes: Of the network.
    """

    def __init__(self, build: Build, *, observer: Observer, classes: int) -> None:
        """Prepare; ``serve`` starts."""
        self.cache_answers: collections.Counter[str] = collections.Counter()
        """Answers of the input cache, by layer."""
        self.failed = False
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._prepare: Callable[[Served], Swap] | None = None
        self._prepared: tuple[Served, Swap] | None = None
        self._notes: dict[str, str] = {}
        self._swapping = 0  # changes that the engine has still to make
        self._observer = observer
        self._logits = np.eye(classes, dtype=np.float32) * np.float32(_SURE)
        self.controller = build(self._on_change, self._on_event)

    def serve(
        self, engine: Engine, prepare: Callable[[Served], Swap], *, end: Callable[[float | None], bool] = lambda _: True
    ) -> None:
        """Take an engine, not started, that is to serve what the controller decides; this is its observer.

        ``prepare`` brings caches to the device, in any thread, and returns what is to be done between two steps;
        ``end`` ends the worker, in so many seconds at most.
        """
        self._engine, self._prepare, self._end = engine, prepare, end

    # --- For the service, see its protocol ``Engine`` -----------------------------------------------------------------

    def submit(
        self,
        images: Shaped[np.ndarray, "images *input"],
        *,
        route: int,
        deadline: float | None = None,
        request_id: str = "",
    ) -> Sequence[Future[Answer]]:
        """Admit images, all or none; see ``Engine.submit``. Only uint8 ones of the plan's route adapt."""
        tickets = self._ask(images) if route == ADAPTED and images.dtype == np.uint8 else []
        closed = self._closed
        nearest = any(ticket.cached and ticket.cached.exit == NEAREST for ticket in tickets)
        self._notes = {"adaptation": SAFE if closed and not nearest else str(self.controller.monitor.version)}
        if not tickets:
            route = BASE if route == ADAPTED and closed else route
            return self.engine.submit(images, route=route, deadline=deadline, request_id=request_id)
        asked = [ticket for ticket in tickets if ticket.cached is None]
        try:
            answers = self.engine.submit(
                images if len(asked) == len(images) else images[[ticket.cached is None for ticket in tickets]],
                route=[BASE if closed or ticket.frequent else ADAPTED for ticket in asked],
                deadline=deadline,
                request_id=request_id,
                marks=asked,
            )
        except BaseException:
            for ticket in tickets:
                self._lose(ticket)
            raise
        for ticket, answer in zip(asked, answers, strict=True):
            answer.add_done_callback(lambda done, ticket=ticket: self._ended(done, ticket))
        network = iter(answers)
        return [next(network) if ticket.cached is None else self._from_cache(ticket) for ticket in tickets]

    def statistics(self) -> Statistics:
        """Return the engine's."""
        return self.engine.statistics()

    def stop(self, timeout: float | None = None) -> bool:
        """Finish what was admitted; return False if time ran out."""
        self._end(0.0)
        finished = self.engine.stop(timeout)
        if not self._end(_ENDING):
            _log.warning("adaptation: recovery was stopped in the middle of a piece")
        return finished

    def notes(self, route: int) -> dict[str, str]:
        """Return a response's parameters for the request that was submitted last: the version, or "safe"."""
        return self._notes if route == ADAPTED else {}

    @property
    def engine(self) -> Engine:
        """The engine behind it."""
        assert self._engine is not None, "nothing is served before serve()"  # noqa: S101 (narrows the type)
        return self._engine

    @property
    def state(self) -> str:
        """One of ``STATES``."""
        closed = np.isinf(self.controller.served.thresholds)
        return FAILED if self.failed else SAFE if closed.all() else PART if closed.any() else OPEN

    def read(self, get: Callable[[AdaptationController], T]) -> T:
        """Read from the controller, under the lock."""
        with self._lock:
            return get(self.controller)

    # --- For the engine, see ``Observer`` -----------------------------------------------------------------------------

    def shadow(self, job: Job, answer: Answer) -> bool:
        """Take a cache's answer; return whether to shadow the request."""
        ticket = job.mark
        return isinstance(ticket, Ticket) and self._guarded(lambda: self._answered(ticket, answer), otherwise=False)

    def step(self, step: Step, seconds: float, *, failed: bool) -> None:
        """Pass it on."""
        self._observer.step(step, seconds, failed=failed)

    def answered(self, job: Job, answer: Answer, seconds: float) -> None:
        """Take the base's answer; ``shadow`` has taken a cache's."""
        ticket = job.mark
        if isinstance(ticket, Ticket) and answer.exit == self.controller.depth:
            self._guarded(lambda: self._answered(ticket, answer), otherwise=False)
        self._observer.answered(job, answer, seconds)

    def shadowed(self, job: Job, answer: Answer | None) -> None:
        """Take the base's answer to a request that a cache has answered."""
        ticket = job.mark
        if not isinstance(ticket, Ticket):
            return
        if answer is None:
            self._lose(ticket)
        else:
            self._guarded(lambda: self.controller.shadowed(ticket, answer.logits, time.monotonic()), None)
        self._observer.shadowed(job, answer)

    def refused(self, reason: str) -> None:
        """Pass it on."""
        self._observer.refused(reason)

    # --- For recovery, see ``ControllerView`` -------------------------------------------------------------------------

    @property
    def closed_at(self) -> int | None:
        """See ``AdaptationController``."""
        return None if self.failed else self.controller.closed_at

    @property
    def request_log(self) -> RequestLog:
        """See ``AdaptationController``; it has a lock of its own."""
        return self.controller.request_log

    @property
    def epoch(self) -> int:
        """See ``AdaptationController``."""
        return self.controller.epoch

    def adopt(self, served: Served, text: str, epoch: int | None = None) -> None:
        """Serve what a trial has certified, from the next request on."""
        if self._prepare is not None:
            self._prepared = served, self._prepare(served)
        self._guarded(lambda: self.controller.adopt(served, text, epoch), None)

    def emit(self, kind: EventKind, text: str) -> None:
        """Record an event."""
        self._guarded(lambda: self.controller.emit(kind, text), None)

    # --- The controller -----------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], T], otherwise: T, *, locked: bool = True) -> T:
        """Do something with the controller, unless that has failed once."""
        with self._lock if locked else contextlib.nullcontext():
            if self.failed:
                return otherwise
            try:
                return work()
            except Exception:  # noqa: BLE001 (clients are answered all the same)
                self.failed = True
                _log.exception("adaptation has failed; from now on the base answers")
                return otherwise

    def _ask(self, images: Shaped[np.ndarray, "images h w c"]) -> list[Ticket]:
        """Ask the input cache about a request, all images at once; what takes long without the lock.

        It stays on the caller's thread, the event loop: whether a request is admitted, and where, is decided at once.
        """
        one, cache, now = self.controller, self.controller.input_cache, time.monotonic()
        keys = self._guarded(lambda: cache.keys(images), [], locked=False)
        tickets = self._guarded(lambda: one.admit(images, keys, now), [])
        found = self._guarded(lambda: cache.search(tickets), None, locked=False)
        self._guarded(lambda: cache.resolve(tickets, found), None)
        return tickets

    @property
    def _closed(self) -> bool:
        """Whether requests that come now are the base's."""
        return self.failed or self._swapping > 0 or not self.controller.served.is_open

    def _answered(self, ticket: Ticket, answer: Answer) -> bool:
        return self.controller.answered(ticket, answer.exit, answer.score, answer.logits, time.monotonic())

    def _from_cache(self, ticket: Ticket) -> Future[Answer]:
        assert ticket.cached is not None  # noqa: S101 (narrows the type)
        exit_, score, index, _, _ = ticket.cached
        self.cache_answers[LAYERS[exit_]] += 1
        done: Future[Answer] = Future()
        done.set_result(Answer(index, exit_, score, self._logits[index]))
        if self._guarded(lambda: self.controller.from_cache(ticket), otherwise=False):
            try:
                self.engine.submit_shadow(ticket.image, route=BASE, mark=ticket)
            except ServeError:
                self._lose(ticket)
        return done

    def _ended(self, done: Future[Answer], ticket: Ticket) -> None:
        if done.cancelled() or done.exception() is not None:
            self._lose(ticket)

    def _lose(self, ticket: Ticket) -> None:
        self._guarded(lambda: self.controller.lost(ticket), None)

    def _on_change(self, served: Served) -> None:
        """Have the engine serve this between two steps. The lock is held."""
        if self._engine is None or self._prepare is None:
            return
        prepared, swap = self._prepared or (None, None)
        if swap is None or prepared is not served:
            swap = self._prepare(served)
        self._prepared = None
        self._swapping += 1

        def work() -> None:
            swap()
            with self._lock:
                self._swapping -= 1

        self._engine.between_steps(work)

    def _on_event(self, event: Event) -> None:
        level = logging.WARNING if event.kind in _WARNINGS else logging.INFO
        _log.log(level, "adaptation: %s", event.kind, extra={"what": event.text, "requests": event.number})
