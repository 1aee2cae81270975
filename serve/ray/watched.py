"""A replica that adapts: the one controller is asked before each request and before each step.

    Service -> WatchedEngine.submit -> Controller.exchange -> Engine.submit, or the input cache's answer
    Engine  -> WatchedEngine.take, before each step: Controller.exchange -> thresholds
    Engine  -> WatchedEngine.shadow, answered, shadowed: reported with the next call
    heartbeat: a call of its own, where there is no other one

So a request is admitted, and a step begins, under what the controller serves at that moment, up to the time that the
call takes to return. A request that comes while the thresholds in the engine are older than those of its call is
answered by the base. Where the controller does not answer in time, all caches are closed here until it does: the base
answers, unwatched, and the controller is told to give up on what it was asked.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from gati_jax import Bundle
from gati_jax.adaptation import NEAREST, served_by
from gati_jax.bundle.record import certified_only

from ..adaptive.build import sources_of
from ..adaptive.engine import ADAPTED, BASE, SAFE, UNWATCHED
from ..engine.engine import Engine
from ..engine.records import Answer, Job, Observer, ServeError, Statistics, Step
from ..engine.routes import CascadeRoute
from ..engine.runner import JaxRunner
from ..protocol.backend import Event
from .exchange import HEARTBEAT, Place, State, Told

_AGAIN = 1.0  # seconds before a controller that did not answer is asked again
_LOOK = 0.02  # seconds until what an idle engine has answered last is told
_log = logging.getLogger("serve.ray.watched")


class UnreachableError(Exception):
    """The controller has not answered, or has failed."""


Send = Callable[[str, list[Told], Shaped[np.ndarray, "images ..."] | None, int], Callable[[], State]]
"""Sends the arguments of ``Controller.exchange``; the function that it returns waits, and raises UnreachableError."""


class _Mark(NamedTuple):
    """An image in the engine that the controller waits for."""

    call: int
    row: int
    shadow: bool


class Line:
    """The way to the controller, for all threads of a replica.

    Args:
        send: Makes a call, and returns what waits for its answer.
        name: The replica's.
    """

    def __init__(self, send: Send, name: str) -> None:
        """Nothing is asked yet."""
        self._send, self._name = send, name
        self._lock, self._calls = threading.Lock(), itertools.count(1)
        self._told: list[Told] = []
        self._failed_at = -np.inf
        self.called = 0.0
        """When the last call was made."""

    @property
    def waits(self) -> bool:
        """Whether there is something to tell."""
        return bool(self._told)

    def tell(self, told: Told) -> None:
        """Report something with the next call."""
        with self._lock:
            self._told.append(told)

    def ask(self, images: Shaped[np.ndarray, "images ..."] | None = None) -> tuple[State, int] | None:
        """Call the controller; return what it serves, and the number of the call; None if it does not answer."""
        if time.monotonic() < self._failed_at + _AGAIN:
            return None
        with self._lock:  # calls arrive in the order in which they are made, and with them what they tell
            call, told, self._told = next(self._calls), self._told, []
            self.called = time.monotonic()
            answer = self._send(self._name, told, images, call)
        try:
            return answer(), call
        except UnreachableError as error:
            self._fail(error, told, [Told(call, row, "lost") for row in range(0 if images is None else len(images))])
            return None

    def _fail(self, error: Exception, told: list[Told], given_up: list[Told]) -> None:
        """Have all closed for a while. What was told may have arrived or not; to tell it again does no harm."""
        if self._failed_at < self.called - 2 * _AGAIN:
            _log.warning("adaptation: the controller does not answer; until it does, the base alone: %.300s", error)
        self._failed_at = time.monotonic()
        with self._lock:
            self._told = [*told, *self._told, *given_up]


class WatchedEngine:
    """The engine as the service sees it, its observer, and what it asks before each step.

    Args:
        line: To the controller.
        depth: Of the network.
        caches: Of the plan.
    """

    def __init__(self, line: Line, *, depth: int, caches: int) -> None:
        """Prepare; ``serve`` starts."""
        self._line, self._depth = line, depth
        self._closed: Float[np.ndarray, " caches"] = np.full(caches, np.inf, np.float32)
        self._applied: tuple[str, int] | None = None  # life and epoch of the thresholds in the engine; None: closed
        self._engine: Engine | None = None
        self._close: Callable[[Float[np.ndarray, " caches"]], None] | None = None
        self._observer: Observer | None = None
        self._notes: dict[str, str] = {}
        self._stopping = threading.Event()

    def report_to(self, observer: Observer) -> None:
        """Pass all that the engine reports on to an observer, too; before the engine starts."""
        self._observer = observer

    def serve(self, engine: Engine, close: Callable[[Float[np.ndarray, " caches"]], None]) -> None:
        """Take an engine, not started, and what changes its thresholds, from its thread; begin to call."""
        self._engine, self._close = engine, close
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    # --- For the service ----------------------------------------------------------------------------------------------

    def submit(
        self,
        images: Shaped[np.ndarray, "images *input"],
        *,
        route: int,
        deadline: float | None = None,
        request_id: str = "",
        is_traffic: bool = True,
    ) -> Sequence[Future[Answer]]:
        """Admit images, all or none; see ``AdaptiveEngine.submit``.

        Places for all are looked for before the controller is asked: this thread alone admits, so that they are free
        afterwards, and no coin has a part in a refusal.
        """
        how: dict[str, Any] = {"deadline": deadline, "request_id": request_id, "is_traffic": is_traffic}
        now = self.engine.statistics()
        adapts = is_traffic and route == ADAPTED and images.dtype == np.uint8
        has_room = len(images) <= now.admitted - now.slots_in_use
        found = self._line.ask(images if adapts and has_room else None) if route == ADAPTED and has_room else None
        if found is None or not adapts:
            is_open = found is not None and not found[0].is_closed and self._is_applied(found[0])
            self._notes = {"adaptation": UNWATCHED if is_open else SAFE}
            return self.engine.submit(images, route=BASE if route == ADAPTED and not is_open else route, **how)
        state, call = found
        self._notes = {"adaptation": state.note}
        return self._admit(images, state, call, how)

    def _admit(
        self, images: Shaped[np.ndarray, "images h w c"], state: State, call: int, how: dict[str, Any]
    ) -> Sequence[Future[Answer]]:
        places, is_applied = state.places, self._is_applied(state)
        marks = [_Mark(call, row, place.shadow) for row, place in enumerate(places)]
        asked = [index for index, place in enumerate(places) if place.stored is None]
        nearest = sum(place.stored is not None and place.stored.exit == NEAREST for place in places)
        try:
            answers = self.engine.submit(
                images[asked],
                route=[places[index].route if is_applied else BASE for index in asked],
                marks=[marks[index] if places[index].watched else None for index in asked],
                spare=nearest,
                **how,
            )
        except BaseException:
            for mark in marks:
                self._lose(mark)
            raise
        for index, answer in zip(asked, answers, strict=True):
            answer.add_done_callback(lambda done, mark=marks[index]: self._ended(done, mark))
        network = iter(answers)
        return [
            next(network) if place.stored is None else self._stored(image, place, place.stored, mark)
            for image, place, mark in zip(images, places, marks, strict=True)
        ]

    def _stored(self, image: Shaped[np.ndarray, "h w c"], place: Place, answer: Answer, mark: _Mark) -> Future[Answer]:
        done: Future[Answer] = Future()
        done.set_result(answer)
        if place.watched:
            try:
                self.engine.submit_shadow(image, route=BASE, mark=mark)
            except ServeError:
                self._lose(mark)
        return done

    @property
    def running(self) -> bool:
        """Whether the engine's thread is alive."""
        return self.engine.running

    def statistics(self) -> Statistics:
        """Return the engine's."""
        return self.engine.statistics()

    def stop(self, timeout: float | None = None) -> bool:
        """Finish what was admitted; return False if time ran out. Shadow jobs are given up, and no call follows."""
        self._stopping.set()
        return self.engine.stop(timeout)

    def notes(self, route: int) -> dict[str, str]:
        """Return a response's parameters for the request that was submitted last."""
        return self._notes if route == ADAPTED else {}

    def events(self) -> Sequence[Event]:
        """Return none: the controller's log has them."""
        return ()

    @property
    def engine(self) -> Engine:
        """The engine behind it."""
        assert self._engine is not None, "nothing is served before serve()"  # noqa: S101 (narrows the type)
        return self._engine

    # --- For the engine, see ``Turn`` and ``Observer`` ----------------------------------------------------------------

    def take(self) -> None:
        """Ask the controller before a step, and have that step run under its answer. In the engine's thread."""
        found = None if self._stopping.is_set() else self._line.ask()
        wanted = (found[0].life, found[0].epoch) if found else None
        if wanted != self._applied and self._close is not None:
            self._close(found[0].thresholds if found else self._closed)
            self._applied = wanted

    def give_back(self) -> None:
        """Nothing was taken from others."""

    def shadow(self, job: Job, answer: Answer) -> bool:
        """Take a cache's answer; return whether to shadow the request: its coin was tossed before."""
        mark = job.mark
        if not isinstance(mark, _Mark):
            return False
        self._tell(mark, "answered", answer)
        return mark.shadow

    def step(self, step: Step, seconds: float, *, failed: bool) -> None:
        """Pass it on."""
        if self._observer is not None:
            self._observer.step(step, seconds, failed=failed)

    def answered(self, job: Job, answer: Answer, seconds: float) -> None:
        """Take the base's answer; ``shadow`` has taken a cache's."""
        if isinstance(job.mark, _Mark) and answer.exit == self._depth:
            self._tell(job.mark, "answered", answer)
        if self._observer is not None:
            self._observer.answered(job, answer, seconds)

    def shadowed(self, job: Job, answer: Answer | None) -> None:
        """Take the base's answer to a request that a cache has answered."""
        if isinstance(job.mark, _Mark):
            self._lose(job.mark) if answer is None else self._tell(job.mark, "shadowed", answer)
        if self._observer is not None:
            self._observer.shadowed(job, answer)

    def refused(self, reason: str) -> None:
        """Pass it on."""
        if self._observer is not None:
            self._observer.refused(reason)

    def _is_applied(self, state: State) -> bool:
        return self._applied == (state.life, state.epoch)

    def _tell(self, mark: _Mark, kind: Any, answer: Answer) -> None:  # noqa: ANN401 (a literal of ``Told``)
        short = answer._replace(lookups=(), logits=np.asarray(answer.logits))
        self._line.tell(Told(mark.call, mark.row, kind, short))

    def _lose(self, mark: _Mark) -> None:
        if not self._stopping.is_set():  # the end of a replica is no sign of disagreement
            self._line.tell(Told(mark.call, mark.row, "lost"))

    def _ended(self, done: Future[Answer], mark: _Mark) -> None:
        if done.cancelled() or done.exception() is not None:
            self._lose(mark)

    def _beat(self) -> None:
        """Call where nothing else does."""
        while not self._stopping.wait(_LOOK):
            if self._line.waits or time.monotonic() > self._line.called + HEARTBEAT:
                self._line.ask()


class ReplicaParts(NamedTuple):
    """What adapts in a replica, before there is an engine."""

    adapting: WatchedEngine
    sources: list[CascadeRoute]

    @property
    def turn(self) -> WatchedEngine:
        """Asked before each step."""
        return self.adapting

    def serve(self, engine: Engine, runner: JaxRunner) -> None:
        """Start the engine."""
        self.adapting.serve(engine, lambda thresholds: runner.close(ADAPTED, thresholds))
        engine.start()

    def close(self) -> None:
        """Nothing is held."""


def parts_of(bundle: Bundle, line: Line, epsilon: float | None) -> ReplicaParts:
    """Prepare to serve a bundle as the controller says; its caches begin closed."""
    certified = certified_only(bundle)
    served = served_by(certified).closed()
    adapting = WatchedEngine(line, depth=len(bundle.chain), caches=len(served.caches))
    return ReplicaParts(adapting, sources_of(certified, served, epsilon or certified.certificate.epsilon))
