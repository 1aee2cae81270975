"""Images in, answers out: the side of the engine that any thread may call. Its own thread is in ``loop``."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import numpy as np
from jaxtyping import Shaped

from .loop import Between, Loop, Shadow, Shared
from .records import Answer, Job, Observer, OverloadedError, Runner, Statistics, StoppingError
from .scheduler import Scheduler

_log = logging.getLogger(__name__)
_LEAST = 0.1  # seconds: an idle thread needs microseconds to end, and the machine may be busy


class Engine:
    """Answers images by a runner, from any number of threads.

    The lock guards the scheduler and the counters; it is never held while the device works, a future is completed, or
    the observer is told.

    Args:
        runner: Owned by the engine's thread from ``start`` on.
        max_wait_ms: See ``Scheduler``.
        admitted: The most images on their way at once; unless told, the runner's capacity.
        clock: Seconds.
        observer: Is told what happens.
        shadow: Is asked of every answer of a cache whether the base's is wanted, too. If so the client is answered at
            once, and the job goes on as a ghost: it keeps its slot, only the last stage answers it, and the observer is
            told (``shadowed``). Clients go before ghosts, see ``waiting``.
        ahead: Steps on the device at once. With 2, one is prepared while another runs, which keeps a device busy that
            the host is slow to feed; but it chooses among fewer rows, for those of the running step are not there.
        overlap: Whether the next stage may be dispatched before it is known who leaves, see ``Scheduler.overlap``.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_wait_ms: float = 2.0,
        admitted: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        observer: Observer | None = None,
        shadow: Shadow | None = None,
        ahead: int = 1,
        overlap: bool = False,
    ) -> None:
        """Prepare; nothing runs before ``start``."""
        self.routes = tuple(runner.routes)
        scheduler = Scheduler(self.routes, runner.capacity, max_wait=max_wait_ms / 1e3, admitted=admitted)
        self._shared = Shared(scheduler=scheduler)
        self._clock = clock
        self._observer = observer
        loop = Loop(runner, self._shared, clock=clock, tell=self._tell, shadow=shadow, ahead=ahead, overlap=overlap)
        self._thread = threading.Thread(target=loop, name="engine", daemon=True)

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
    ) -> list[Future[Answer]]:
        """Put images on their way, all or none.

        Args:
            images: Checked already (``gati_jax.models.check_images``); not to be changed before they are answered.
            route: Number of one of the runner's routes, for all or for each.
            deadline: When answers come too late, by the engine's clock.
            request_id: For logs and metrics.
            marks: What the observer is to know each by.

        Returns:
            An answer for each; fails with DeadlineError or StepError. To cancel one abandons its image.

        Raises:
            OverloadedError: Too many are on their way.
            StoppingError: The engine stops, or its thread has ended.
            ValueError: There is no such route, or never room for so many.
        """
        now, numbers = self._clock(), [route] * len(images) if isinstance(route, int) else route
        if not all(0 <= number < len(self.routes) for number in numbers):
            raise ValueError(f"route: expected 0 to {len(self.routes) - 1}, got {route}")
        jobs = [
            Job(image=image, route=number, arrived=now, deadline=deadline, request_id=request_id, mark=mark)
            for image, number, mark in zip(images, numbers, marks or [None] * len(images), strict=True)
        ]
        try:
            self._admit(jobs)
        except (OverloadedError, StoppingError) as error:
            reason = "overloaded" if isinstance(error, OverloadedError) else "stopping"
            self._tell(lambda observer: observer.refused(reason))
            raise
        return [job.done for job in jobs]

    def submit_shadow(self, image: Shaped[np.ndarray, "*input"], *, route: int, mark: object = None) -> None:
        """Put the ghost of an image on its way that has been answered elsewhere; the observer is told what comes of it.

        Raises:
            OverloadedError: Too many are on their way.
            StoppingError: The engine stops, or its thread has ended.
        """
        self._admit([Job(image=image, route=route, arrived=self._clock(), mark=mark, ghost=True)])

    def between_steps(self, work: Callable[[], None]) -> Future[None]:
        """Have something done in the engine's thread between two steps, as when parameters are swapped.

        Steps that are on the device, see ``ahead``, belong to what was before.

        Returns:
            Done when that is; fails as ``work`` does, or with StoppingError where there are no more steps.
        """
        between = Between(work, Future())
        with self._shared.wake:
            if self._shared.stopping:
                between.done.set_exception(StoppingError("stopping: nothing is changed any more"))
            else:
                self._shared.between.append(between)
                self._shared.wake.notify()
        return between.done

    def _admit(self, jobs: Sequence[Job]) -> None:
        with self._shared.wake:
            self._shared.count["refused"] += len(jobs)
            if self._shared.stopping:
                raise StoppingError("stopping: the server admits nothing more")
            self._shared.scheduler.admit(jobs)
            self._shared.count["refused"] -= len(jobs)
            self._shared.wake.notify()

    def abandon(self, futures: Iterable[Future[Answer]]) -> None:
        """Give up on answers, as when a client has left: what has not run yet is not run."""
        for future in futures:
            future.cancel()

    def stop(self, timeout: float | None = None) -> bool:
        """Admit nothing more, finish what was admitted, end the thread; say whether there was time enough."""
        with self._shared.wake:
            self._shared.stopping = True
            self._shared.wake.notify()
        if self._thread.ident is not None:
            self._thread.join(None if timeout is None else max(timeout, _LEAST))
        return not self._thread.is_alive()

    def statistics(self) -> Statistics:
        """Return how things stand."""
        with self._shared.wake:
            scheduler = self._shared.scheduler
            return Statistics(
                waiting=scheduler.waiting,
                slots_in_use=scheduler.in_use,
                admitted=scheduler.admitted,
                backlog_ms=scheduler.backlog_ms,
                leave=scheduler.leave,
                running=self._thread.is_alive(),
                **self._shared.count,
            )

    def _tell(self, say: Callable[[Observer], None]) -> None:
        """Tell the observer; its errors are its own."""
        if self._observer is not None:
            try:
                say(self._observer)
            except Exception:  # noqa: BLE001
                _log.exception("the observer failed")
