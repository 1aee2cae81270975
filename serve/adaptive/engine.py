"""The engine as the service sees it, with the keeper before and behind it."""

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
from jaxtyping import Shaped

from gati_jax.adaptation import POINTS, REPEATED, AdaptationController, Event, RequestLog, Served, Ticket
from serve.engine.engine import Engine
from serve.engine.records import Answer, Job, Observer, ServeError, Statistics, Step

T = TypeVar("T")
Swap = Callable[[], None]
SAFE, PART, OPEN, FAILED = STATES = ("safe", "part", "open", "failed")
"""All caches closed, some of them, none; adaptation has failed. In the first and the last, the base answers."""
_ENDING = 5.0  # seconds that the background is given to end behind its present piece
_SURE = 30.0  # logits of answers from in front of the network, where only the class is known
_LAYERS = {POINTS: "points", REPEATED: "repeats"}
_WARNINGS = {"alarm", "closed", "empirical"}
_log = logging.getLogger(__name__)


class AdaptiveEngine:
    """Answers by an engine, and adapts. Also the engine's observer.

    Args:
        keep: Makes the keeper, which tells what it serves and what happens to the two functions that it is given.
        observer: Is told what the engine says, too.
        adapted: The route of the plan that adapts.
        base: The base's route.
        classes: Of the network.
        clock: The engine's.
    """

    def __init__(
        self,
        keep: Callable[[Callable[[Served], None], Callable[[Event], None]], AdaptationController],
        *,
        observer: Observer,
        adapted: int = 0,
        base: int,
        classes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; ``serve`` begins."""
        self.events: collections.Counter[str] = collections.Counter()
        self.answered_in_front: collections.Counter[str] = collections.Counter()
        self.failed = False
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._prepare: Callable[[Served], Swap] | None = None
        self._prepared: tuple[Served, Swap] | None = None
        self._noted: dict[str, str] = {}
        self._swapping = 0  # changes that the engine has still to make
        self._observer, self._clock = observer, clock
        self._adapted, self._base = adapted, base
        self._logits = np.eye(classes, dtype=np.float32) * np.float32(_SURE)
        self.keeper = keep(self._changed, self._told)

    def serve(
        self,
        engine: Engine,
        prepare: Callable[[Served], Swap],
        *,
        end: Callable[[float | None], bool] = lambda _: True,
    ) -> None:
        """Stand before an engine, which serves what the keeper wants served.

        Args:
            engine: Not started; this is its observer.
            prepare: Brings caches to the device, in any thread, and returns what is to be done between two steps.
            end: Ends the background, in so many seconds at most.
        """
        self._engine, self._prepare, self._end = engine, prepare, end

    # What the service asks

    def submit(
        self,
        images: Shaped[np.ndarray, "images *input"],
        *,
        route: int,
        deadline: float | None = None,
        request_id: str = "",
    ) -> Sequence[Future[Answer]]:
        """Put images on their way, all or none; see ``Engine.submit``. Only uint8 ones of the plan's route adapt."""
        tickets: list[Ticket] = []
        if route == self._adapted and images.dtype == np.uint8:
            now = self._clock()
            tickets = self._keep(lambda: [self.keeper.ask(image, now) for image in images], [])
        closed, points = self._closed, any(ticket.early and ticket.early.exit == POINTS for ticket in tickets)
        self._noted = {"adaptation": SAFE if closed and not points else str(self.keeper.monitor.version)}
        if not tickets:
            route = self._base if route == self._adapted and closed else route
            return self.engine.submit(images, route=route, deadline=deadline, request_id=request_id)
        asked = [ticket for ticket in tickets if ticket.early is None]
        try:
            answers = self.engine.submit(
                images if len(asked) == len(images) else images[[ticket.early is None for ticket in tickets]],
                route=[self._base if closed or ticket.often else self._adapted for ticket in asked],
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
        later = iter(answers)
        return [next(later) if ticket.early is None else self._early(ticket) for ticket in tickets]

    def abandon(self, futures: Sequence[Future[Answer]]) -> None:
        """Nobody waits for these any more."""
        self.engine.abandon(futures)

    def statistics(self) -> Statistics:
        """Return how the engine stands."""
        return self.engine.statistics()

    def stop(self, timeout: float | None = None) -> bool:
        """Finish what was admitted; False if time ran out."""
        self._end(0.0)
        finished = self.engine.stop(timeout)
        if not self._end(_ENDING):
            _log.warning("adaptation's background was left in the middle of a piece")
        return finished

    def notes(self, route: int) -> dict[str, str]:
        """Return what a response is to say of the request that was submitted last: the version, or "safe"."""
        return self._noted if route == self._adapted else {}

    @property
    def engine(self) -> Engine:
        """The engine behind it."""
        assert self._engine is not None, "nothing is served before serve()"  # noqa: S101 (narrows the type)
        return self._engine

    @property
    def state(self) -> str:
        """One of ``STATES``."""
        closed = np.isinf(self.keeper.served.thresholds)
        return FAILED if self.failed else SAFE if closed.all() else PART if closed.any() else OPEN

    def look(self, read: Callable[[AdaptationController], T]) -> T:
        """Read from the keeper."""
        with self._lock:
            return read(self.keeper)

    # What the engine says, see Observer

    def shadow(self, job: Job, answer: Answer) -> bool:
        """Take note of a cache's answer; say whether the base is to be asked, too."""
        ticket = job.mark
        return isinstance(ticket, Ticket) and self._keep(lambda: self._answered(ticket, answer), otherwise=False)

    def step(self, step: Step, seconds: float, *, failed: bool) -> None:
        """Pass it on."""
        self._observer.step(step, seconds, failed=failed)

    def answered(self, job: Job, answer: Answer, seconds: float) -> None:
        """Take note of the base's answer; of a cache's, ``shadow`` has."""
        ticket = job.mark
        if isinstance(ticket, Ticket) and answer.exit == self.keeper.depth:
            self._keep(lambda: self._answered(ticket, answer), otherwise=False)
        self._observer.answered(job, answer, seconds)

    def shadowed(self, job: Job, answer: Answer | None) -> None:
        """Take note of what the base says to who has been answered."""
        ticket = job.mark
        if not isinstance(ticket, Ticket):
            return
        if answer is None:
            self._lose(ticket)
        else:
            self._keep(lambda: self.keeper.shadowed(ticket, answer.logits, self._clock()), None)
        self._observer.shadowed(job, answer)

    def refused(self, reason: str) -> None:
        """Pass it on."""
        self._observer.refused(reason)

    # What the background wants, see ``background.Kept``

    @property
    def closed_at(self) -> int | None:
        """See ``AdaptationController``."""
        return None if self.failed else self.keeper.closed_at

    @property
    def window(self) -> RequestLog:
        """See ``AdaptationController``; it has a lock of its own."""
        return self.keeper.window

    @property
    def epoch(self) -> int:
        """See ``AdaptationController``."""
        return self.keeper.epoch

    def adopt(self, served: Served, text: str, epoch: int | None = None) -> None:
        """Serve what a trial has certified, from the next request on."""
        if self._prepare is not None:
            self._prepared = served, self._prepare(served)
        self._keep(lambda: self.keeper.adopt(served, text, epoch), None)

    def tell(self, kind: str, text: str) -> None:
        """Let the background say what it does."""
        self._keep(lambda: self.keeper.tell(kind, text), None)

    # The keeper

    def _keep(self, work: Callable[[], T], otherwise: T) -> T:
        """Do something with the keeper, unless that has failed once."""
        with self._lock:
            if self.failed:
                return otherwise
            try:
                return work()
            except Exception:  # noqa: BLE001 (clients are answered all the same)
                self.failed = True
                _log.exception("adaptation has failed; from now on the base answers")
                return otherwise

    @property
    def _closed(self) -> bool:
        """Whether requests that come now are the base's."""
        return self.failed or self._swapping > 0 or not np.isfinite(self.keeper.served.thresholds).any()

    def _answered(self, ticket: Ticket, answer: Answer) -> bool:
        return self.keeper.answered(ticket, answer.exit, answer.score, answer.logits, self._clock())

    def _early(self, ticket: Ticket) -> Future[Answer]:
        assert ticket.early is not None  # noqa: S101 (narrows the type)
        exit_, index, score = ticket.early
        self.answered_in_front[_LAYERS[exit_]] += 1
        done: Future[Answer] = Future()
        done.set_result(Answer(index, exit_, score, self._logits[index]))
        if self._keep(lambda: self.keeper.early(ticket), otherwise=False):
            try:
                self.engine.submit_shadow(ticket.image, route=self._base, mark=ticket)
            except ServeError:
                self._lose(ticket)
        return done

    def _ended(self, done: Future[Answer], ticket: Ticket) -> None:
        if done.cancelled() or done.exception() is not None:
            self._lose(ticket)

    def _lose(self, ticket: Ticket) -> None:
        self._keep(lambda: self.keeper.lost(ticket), None)

    def _changed(self, served: Served) -> None:
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

    def _told(self, event: Event) -> None:
        self.events[event.kind] += 1
        level = logging.WARNING if event.kind in _WARNINGS else logging.INFO
        _log.log(level, "adaptation: %s", event.kind, extra={"what": event.text, "requests": event.number})
