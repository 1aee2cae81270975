"""Images in, answers out: the part of the engine that any thread may call. ``loop`` is its own thread."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
from jaxtyping import Shaped

from .loop import BetweenSteps, Loop, Shadow
from .records import Answer, Job, Observer, OverloadedError, Route, Runner, Statistics, StoppingError
from .scheduler import Scheduler
from .turns import Alone, Turn

_LEAST = 0.1  # seconds: an idle thread needs microseconds to end, but the machine may be busy
_REASONS = {OverloadedError: "overloaded", StoppingError: "stopping", ValueError: "too_large"}


class Engine:
    """Answers images by a runner, for any number of threads.

    The lock guards the scheduler and the counters. It is never held while the device works, a future is completed or
    the observer is called.

    Args:
        runner: Owned by the engine's thread from ``start`` on.
        max_wait_ms: See ``Scheduler``.
        clock: Seconds.
        observer: Receives the engine's events.
        shadow: Called for every answer of a cache: whether the base's answer is wanted as well. If so, the client is
            answered at once, and its job continues as a shadow job: it keeps its slot, only the last stage answers it,
            and the observer gets the result (``shadowed``). Clients go before shadow jobs, see ``scheduler``.
        overlap: Whether the next stage may be dispatched before it is known who leaves, see ``Scheduler.overlap``; not
            together with a turn, which ends with a result.
        turn: Of a device that it shares with other engines.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_wait_ms: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        observer: Observer | None = None,
        shadow: Shadow | None = None,
        overlap: bool = False,
        turn: Turn | None = None,
    ) -> None:
        """Prepare; nothing runs before ``start``."""
        self._loop = Loop(
            runner=runner,
            clock=clock,
            observer=observer,
            shadow=shadow,
            overlap=overlap,
            turn=turn or Alone(),
            scheduler=Scheduler(runner.routes, runner.capacity, max_wait=max_wait_ms / 1e3),
        )
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def routes(self) -> tuple[Route, ...]:
        """The runner's routes, as far as they are compiled."""
        return self._loop.scheduler.routes

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(
        self,
        images: Shaped[np.ndarray, "images *input"],
        *,
        route: int | Sequence[int],
        deadline: float | None = None,
        request_id: str = "",
        marks: Sequence[object] | None = None,
        spare: int = 0,
        is_traffic: bool = True,
    ) -> list[Future[Answer]]:
        """Admit a request's images, all or none.

        Args:
            images: Checked already (``gati_jax.models.check_images``); not to be changed before they are answered.
            route: The number of one of the runner's routes, for all images or for each.
            deadline: When answers come too late, by the engine's clock.
            request_id: For logs and metrics.
            marks: By image, see ``Job.mark``.
            spare: Places that must be free besides, for shadow jobs of images that were answered elsewhere.
            is_traffic: See ``Job``.

        Returns:
            A future for each image; fails with DeadlineError or StepError. Cancelling it abandons the image.

        Raises:
            OverloadedError: Too many images are in flight.
            StoppingError: The engine is stopping, or its thread has ended.
            ValueError: No such route, or more images than can ever be admitted.
        """
        now, numbers = self._loop.clock(), [route] * len(images) if isinstance(route, int) else route
        if not all(0 <= number < len(self.routes) for number in numbers):
            raise ValueError(f"route: expected 0 to {len(self.routes) - 1}, got {route}")
        jobs = [
            Job(
                image=image,
                route=number,
                arrived=now,
                deadline=deadline,
                request_id=request_id,
                mark=mark,
                is_traffic=is_traffic,
            )
            for image, number, mark in zip(images, numbers, marks or [None] * len(images), strict=True)
        ]
        try:
            self._admit(jobs, spare)
        except (OverloadedError, StoppingError, ValueError) as error:
            reason = _REASONS[type(error)]
            with self._loop.wake:
                self._loop.count["refused"] += len(jobs) + spare
            self._loop.notify(lambda observer: observer.refused(reason))
            raise
        return [job.done for job in jobs]

    def submit_shadow(self, image: Shaped[np.ndarray, "*input"], *, route: int, mark: object = None) -> None:
        """Admit a shadow job for an image that was answered elsewhere; the observer gets the base's answer.

        Raises:
            OverloadedError: Too many images are in flight.
            StoppingError: The engine is stopping, or its thread has ended.
        """
        self._admit([Job(image=image, route=route, arrived=self._loop.clock(), mark=mark, is_shadow=True)])

    def between_steps(self, work: Callable[[], None]) -> Future[None]:
        """Run something in the engine's thread between two steps, for example a swap of parameters.

        With ``overlap``, a step that is on the device already is not affected.

        Returns:
            Done when ``work`` has run; fails as it does, or with StoppingError if no step will follow.
        """
        item = BetweenSteps(work, Future())
        with self._loop.wake:
            if self._loop.stopping:
                item.done.set_exception(StoppingError("stopping: nothing is changed any more"))
            else:
                self._loop.between.append(item)
                self._loop.wake.notify()
        return item.done

    def widen(self, routes: Sequence[Route]) -> None:
        """Use further buckets of the same routes from the next step on. Between two steps, in the engine's thread."""
        with self._loop.wake:
            self._loop.scheduler.widen(routes)

    def stop(self, timeout: float | None = None) -> bool:
        """Admit nothing more, finish what was admitted and end the thread; return whether that was done in time."""
        with self._loop.wake:
            self._loop.stopping = True
            self._loop.wake.notify()
        if self._thread.ident is not None:
            self._thread.join(None if timeout is None else max(timeout, _LEAST))
        return not self._thread.is_alive()

    @property
    def running(self) -> bool:
        """Whether its thread is alive."""
        return self._thread.is_alive()

    def statistics(self) -> Statistics:
        """Return a snapshot of the queues and counters."""
        with self._loop.wake:
            scheduler = self._loop.scheduler
            return Statistics(
                waiting=scheduler.waiting,
                slots_in_use=scheduler.in_use,
                admitted=scheduler.capacity,
                backlog_ms=scheduler.backlog_ms,
                oldest=scheduler.oldest(self._loop.clock()),
                leave=scheduler.leave,
                batches=tuple(sorted(self.routes[0].stage_ms)),
                running=self.running,
                **self._loop.count,
            )

    def _admit(self, jobs: Sequence[Job], spare: int = 0) -> None:
        with self._loop.wake:
            if self._loop.stopping:
                raise StoppingError("stopping: the server admits nothing more")
            self._loop.scheduler.admit(jobs, spare)
            self._loop.wake.notify()
