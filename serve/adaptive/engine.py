"""The engine as the service sees it under ``--adapt``, with the controller before and behind it."""

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

import numpy as np
from jaxtyping import Shaped

from gati_jax.adaptation import (
    EXACT,
    NEAREST,
    AdaptationController,
    ControllerState,
    Event,
    EventKind,
    RequestLog,
    Served,
    Ticket,
)

from ..engine.records import Answer, Job, Observer, ServeError, Statistics, Step
from .interfaces import Answering
from .worker import Saver

T = TypeVar("T")
Swap = Callable[[], None]
Build = Callable[[Callable[[Served], None], Callable[[Event], None]], AdaptationController]
ADAPTED, BASE = 0, 1  # routes: of the plan that adapts, and of the base
UNWATCHED = "unwatched"
"""What a response says in place of a version where the monitor has not seen the request."""
SAFE, PART, OPEN, FAILED = STATES = ("safe", "part", "open", "failed")
"""All caches closed, some of them (or all in the network are paused for their cost), none; adaptation has failed. In
the first and the last, the base alone answers: nor do stored answers, exact or nearest."""
LAYERS = {EXACT: "exact", NEAREST: "nearest"}
_SHOWN = 40  # events at a time
_ENDING = 2.0  # seconds for the worker to end behind its present piece, and for the saver to save
_SAVING = 1.0  # seconds that a change waits for a slow disk before it is made all the same
_SURE = 30.0  # logits of answers from the input cache, where only the class is known
_WARNINGS = {"alarm", "closed", "inconclusive"}
_log = logging.getLogger("serve.adaptive.engine")


class Store(Protocol):
    """Where the state is saved: ``StateFolder``."""

    def holds(self, state: ControllerState) -> bool:
        """Whether a restart would serve as this state does."""
        ...

    def write(self, state: ControllerState) -> None:
        """Write the state; raises OSError."""

    def close(self) -> None:
        """Let another process use it."""


class AdaptiveEngine:
    """Answers by an engine, and adapts. Also the engine's observer, and the controller as recovery sees it.

    Args:
        build: Makes the controller, given its ``on_change`` and its ``on_event``.
        classes: Of the network.
        store: Keeps what must survive a restart.
    """

    def __init__(self, build: Build, *, classes: int, store: Store) -> None:
        """Prepare; ``serve`` starts."""
        self.cache_answers: collections.Counter[str] = collections.Counter()
        """Answers of the input cache, by layer."""
        self.failed = False
        self.unsaved = False
        """Whether what is to be served is not on disk yet: until then the base alone answers."""
        self.saver = Saver(self.save)
        self._lock, self._saving = threading.Lock(), threading.Lock()  # the second is taken first
        self._store = store
        self._stopping = False
        self._engine: Answering | None = None
        self._prepare: Callable[[Served], Swap] | None = None
        self._prepared: tuple[Served, Swap] | None = None
        self._notes: dict[str, str] = {}
        self._swapping = 0  # changes that the engine has still to make
        self._observer: Observer | None = None
        self._logits = np.eye(classes, dtype=np.float32) * np.float32(_SURE)
        self.controller = build(self._on_change, self._on_event)
        self._seen: tuple[int, int] | None = None  # epoch and version at the last change

    def report_to(self, observer: Observer) -> None:
        """Pass all that the engine reports on to an observer, too; before the engine starts."""
        self._observer = observer

    def serve(
        self,
        engine: Answering,
        prepare: Callable[[Served], Swap],
        *,
        end: Callable[[float | None], bool] = lambda _: True,
    ) -> None:
        """Take an engine, not started, that is to serve what the controller decides; start to save changes.

        ``prepare`` brings caches to the device, in any thread, and returns what is to be done between two steps;
        ``end`` ends the worker, in so many seconds at most.
        """
        self._engine, self._prepare, self._end = engine, prepare, end
        self.saver.start()

    # --- For the service, see its protocol ``Engine`` -----------------------------------------------------------------

    def submit(
        self,
        images: Shaped[np.ndarray, "images *input"],
        *,
        route: int,
        deadline: float | None = None,
        request_id: str = "",
        is_traffic: bool = True,
    ) -> Sequence[Future[Answer]]:
        """Admit images, all or none; see ``Engine.submit``. Only traffic adapts: uint8 images of the plan's route.

        The nearest cache answers only where a place is free for a shadow, whether or not the coin asks for one: if
        refusals depended on the coin, those that are served would be the ones that are not compared.
        """
        adapts = is_traffic and route == ADAPTED and images.dtype == np.uint8
        tickets = self._ask(images) if adapts else []
        try:
            with self._lock:  # nothing else is admitted until the shadow jobs have taken the spare places
                base_alone = self._base_alone
                closed = base_alone or self._swapping > 0 or not self.controller.served.is_open
                if base_alone:
                    for ticket in tickets:
                        ticket.cached = None
                asked = [ticket for ticket in tickets if ticket.cached is None]
                stored = [ticket for ticket in tickets if ticket.cached is not None and ticket.cached.exit == NEAREST]
                version = str(self.controller.monitor.version) if tickets else UNWATCHED
                self._notes = {"adaptation": SAFE if closed and len(asked) == len(tickets) else version}
                if not tickets:
                    route = BASE if route == ADAPTED and closed else route
                    return self.engine.submit(
                        images, route=route, deadline=deadline, request_id=request_id, is_traffic=is_traffic
                    )
                answers = self.engine.submit(
                    images if len(asked) == len(images) else images[[ticket.cached is None for ticket in tickets]],
                    route=[BASE if closed or ticket.frequent else ADAPTED for ticket in asked],
                    deadline=deadline,
                    request_id=request_id,
                    marks=asked,
                    spare=len(stored),
                )
                cached = [self._from_cache(ticket) for ticket in tickets if ticket.cached is not None]
        except BaseException:
            for ticket in tickets:
                self._lose(ticket)
            raise
        for ticket, answer in zip(asked, answers, strict=True):
            answer.add_done_callback(lambda done, ticket=ticket: self._ended(done, ticket))
        network, known = iter(answers), iter(cached)
        return [next(network if ticket.cached is None else known) for ticket in tickets]

    @property
    def running(self) -> bool:
        """Whether the engine's thread is alive."""
        return self.engine.running

    def statistics(self) -> Statistics:
        """Return the engine's."""
        return self.engine.statistics()

    def stop(self, timeout: float | None = None) -> bool:
        """Finish what was admitted; return False if time ran out.

        Shadow jobs are given up. That is no sign of disagreement, and must not add up over restarts: the monitor sees
        no request from the first of them on.
        """
        self._stopping = True
        self._end(0.0)
        finished = self.engine.stop(timeout)
        self.saver.stop(_ENDING)
        if self._end(_ENDING):
            self._store.close()
        else:
            _log.warning("adaptation: recovery was stopped in the middle of a piece")
        return finished

    def notes(self, route: int) -> dict[str, str]:
        """Return a response's parameters for the request that was submitted last: the version, or "safe"."""
        return self._notes if route == ADAPTED else {}

    def events(self) -> Sequence[Event]:
        """Return the latest events, the newest last."""
        return self.read(lambda controller: tuple(controller.events))[-_SHOWN:]

    @property
    def engine(self) -> Answering:
        """The engine behind it."""
        assert self._engine is not None, "nothing is served before serve()"  # noqa: S101 (narrows the type)
        return self._engine

    @property
    def state(self) -> str:
        """One of ``STATES``."""
        if self.failed or self._base_alone:
            return FAILED if self.failed else SAFE
        return PART if np.isinf(self.controller.served.thresholds).any() else OPEN

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
        if self._observer is not None:
            self._observer.step(step, seconds, failed=failed)

    def answered(self, job: Job, answer: Answer, seconds: float) -> None:
        """Take the base's answer; ``shadow`` has taken a cache's."""
        ticket = job.mark
        if isinstance(ticket, Ticket) and answer.exit == self.controller.depth:
            self._guarded(lambda: self._answered(ticket, answer), otherwise=False)
        if self._observer is not None:
            self._observer.answered(job, answer, seconds)

    def shadowed(self, job: Job, answer: Answer | None) -> None:
        """Take the base's answer to a request that a cache has answered."""
        ticket = job.mark
        if not isinstance(ticket, Ticket):
            return
        if answer is None and not self._stopping:
            self._lose(ticket)
        elif answer is not None:
            self._guarded(lambda: self.controller.shadowed(ticket, answer.logits, time.monotonic()), None)
        if self._observer is not None:
            self._observer.shadowed(job, answer)

    def refused(self, reason: str) -> None:
        """Pass it on."""
        if self._observer is not None:
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

    def adopt(self, served: Served, text: str, epoch: int | None = None, *, number: int = 0) -> None:
        """Serve what a trial has certified, from the next request on."""
        if self._prepare is not None:
            self._prepared = served, self._prepare(served)
        self._guarded(lambda: self.controller.adopt(served, text, epoch, number=number), None)

    def emit(self, kind: EventKind, text: str) -> None:
        """Record an event."""
        self._guarded(lambda: self.controller.emit(kind, text), None)

    # --- Restarts -----------------------------------------------------------------------------------------------------

    def resume(self, work: Callable[[AdaptationController], None]) -> None:
        """Have the controller go on where another process stopped, before anything is served, and save its state.

        Raises:
            OSError: See ``save``.
        """
        self._guarded(lambda: work(self.controller), None)
        self.save()

    def save(self) -> None:
        """Write down what must survive a restart.

        Raises:
            OSError: It cannot be written; the base alone answers until what has changed can be.
        """
        with self._saving:  # one after the other: never an older state over a newer one
            with self._lock:
                if self.failed:
                    return
                state = self.controller.state
            try:
                self._store.write(state)
            finally:
                with self._lock:
                    self.unsaved = not self.failed and not self._store.holds(self.controller.state)

    def _note_change(self) -> None:
        """Have a change saved, if a restart would not know of it. The lock is held."""
        self.unsaved = not self._store.holds(self.controller.state)
        if self.unsaved:
            self.saver.changed()

    # --- The controller -----------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], T], otherwise: T, *, take: bool = True, changes: bool = True) -> T:
        """Do something with the controller, unless that has failed once; take the lock for it, unless it is held.

        What ``changes`` what is served is saved, by another thread: an alarm must not be forgotten.
        """
        with self._lock if take else contextlib.nullcontext():
            if self.failed:
                return otherwise
            try:
                done = work()
                seen = (self.controller.epoch, self.controller.monitor.version)
                if changes and seen != self._seen:
                    self._seen = seen
                    self._note_change()
            except Exception:  # noqa: BLE001 (clients are answered all the same)
                self.failed = True
                _log.exception("adaptation has failed; from now on the base answers")
                return otherwise
            return done

    def _ask(self, images: Shaped[np.ndarray, "images h w c"]) -> list[Ticket]:
        """Ask the input cache about a request, all images at once; what takes long without the lock.

        It stays on the caller's thread, the event loop: whether a request is admitted, and where, is decided at once.
        """
        one, cache, now = self.controller, self.controller.input_cache, time.monotonic()
        keys = self._guarded(lambda: cache.keys(images), [], take=False, changes=False)
        tickets = self._guarded(lambda: one.admit(images, keys, now), [])
        found = self._guarded(lambda: cache.search(tickets), None, take=False, changes=False)
        self._guarded(lambda: cache.resolve(tickets, found), None)
        return tickets

    @property
    def _base_alone(self) -> bool:
        """Whether the base alone answers requests that come now; stored answers count as caches."""
        return self.failed or self.unsaved or self.controller.is_safe

    def _answered(self, ticket: Ticket, answer: Answer) -> bool:
        return self.controller.answered(ticket, answer.exit, answer.score, answer.logits, time.monotonic())

    def _from_cache(self, ticket: Ticket) -> Future[Answer]:
        """Answer, and shadow where the coin asks for it. The lock is held."""
        assert ticket.cached is not None  # noqa: S101 (narrows the type)
        exit_, score, index, _, _ = ticket.cached
        self.cache_answers[LAYERS[exit_]] += 1
        done: Future[Answer] = Future()
        done.set_result(Answer(index, exit_, score, self._logits[index]))
        if self._guarded(lambda: self.controller.from_cache(ticket), otherwise=False, take=False):
            try:
                self.engine.submit_shadow(ticket.image, route=BASE, mark=ticket)
            except ServeError:  # the engine's thread has ended meanwhile
                self._guarded(lambda: self.controller.lost(ticket), None, take=False)
        return done

    def _ended(self, done: Future[Answer], ticket: Ticket) -> None:
        if done.cancelled() or done.exception() is not None:
            self._lose(ticket)

    def _lose(self, ticket: Ticket) -> None:
        self._guarded(lambda: self.controller.lost(ticket), None)

    def _on_change(self, served: Served) -> None:
        """Have the engine serve this between two steps, once it is saved. The lock is held."""
        if self._engine is None or self._prepare is None:
            return
        self._note_change()
        wait = self.unsaved
        prepared, swap = self._prepared or (None, None)
        if swap is None or prepared is not served:
            swap = self._prepare(served)
        self._prepared = None
        self._swapping += 1

        def work() -> None:
            if wait:  # no client may read that all is safe where a restart, now, would not know it
                self.saver.wait(_SAVING)
            swap()
            with self._lock:
                self._swapping -= 1

        # What a swap that has failed leaves on the device is not known: the base answers, and an operator is told.
        self._engine.between_steps(lambda: self._guarded(work, None, take=False, changes=False))

    def _on_event(self, event: Event) -> None:
        level = logging.WARNING if event.kind in _WARNINGS else logging.INFO
        _log.log(level, "adaptation: %s", event.kind, extra={"what": event.text, "requests": event.number})
