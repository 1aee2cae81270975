"""Images in, answers out: the side of the engine that any thread may call. Its own thread is in ``loop``."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import numpy as np
from jaxtyping import Shaped

from .loop import Loop, Shared
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
        ahead: int = 1,
        overlap: bool = False,
    ) -> None:
        """Prepare; nothing runs before ``start``."""
        self.routes = tuple(runner.routes)
        scheduler = Scheduler(self.routes, runner.capacity, max_wait=max_wait_ms / 1e3, admitted=admitted)
        self._shared = Shared(scheduler=scheduler)
        self._clock = clock
        self._observer = observer
        loop = Loop(runner, self._shared, clock=clock, tell=self._tell, ahead=ahead, overlap=overlap)
        self._thread = threading.Thread(target=loop, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(
        self,
        images: Shaped[np.ndarray, "images *input"],
        *,
        route: int,
        deadline: float | None = None,
        request_id: str = "",
    ) -> list[Future[Answer]]:
        """Put images on their way, all or none.

        Args:
            images: Checked already (``gati_jax.models.check_images``); not to be changed before they are answered.
            route: Number of one of the runner's routes.
            deadline: When answers come too late, by the engine's clock.
            request_id: For logs and metrics.

        Returns:
            An answer for each; fails with DeadlineError or StepError. To cancel one abandons its image.

        Raises:
            OverloadedError: Too many are on their way.
            StoppingError: The engine stops, or its thread has ended.
            ValueError: There is no such route, or never room for so many.
        """
        if not 0 <= route < len(self.routes):
            msg = f"route: expected 0 to {len(self.routes) - 1}, got {route}"
            raise ValueError(msg)
        now = self._clock()
        jobs = [Job(image=x, route=route, arrived=now, deadline=deadline, request_id=request_id) for x in images]
        try:
            self._admit(jobs)
        except (OverloadedError, StoppingError) as error:
            reason = "overloaded" if isinstance(error, OverloadedError) else "stopping"
            self._tell(lambda observer: observer.refused(reason))
            raise
        return [job.done for job in jobs]

    def _admit(self, jobs: Sequence[Job]) -> None:
        with self._shared.wake:
            self._shared.count["refused"] += len(jobs)
            if self._shared.stopping:
                msg = "stopping: the server admits nothing more"
                raise StoppingError(msg)
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
