"""One thread that owns the runner: schedule -> run -> postprocess."""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from .records import (
    Answer,
    DeadlineError,
    Job,
    Observer,
    OverloadedError,
    Runner,
    Running,
    StageResult,
    Statistics,
    Step,
    StepError,
    StoppingError,
)
from .scheduler import Scheduler

_log = logging.getLogger(__name__)


class _Dispatched(NamedTuple):
    step: Step
    running: Running
    since: float


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
    ) -> None:
        """Prepare; nothing runs before ``start``."""
        self.routes = tuple(runner.routes)
        self._runner = runner
        self._scheduler = Scheduler(self.routes, runner.capacity, max_wait=max_wait_ms / 1e3, admitted=admitted)
        self._clock = clock
        self._observer = observer
        self._ahead = ahead
        self._wake = threading.Condition()
        self._stopping = False
        self._count: collections.Counter[str] = collections.Counter()
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)

    # From any thread

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
        with self._wake:
            self._count["refused"] += len(jobs)
            if self._stopping:
                msg = "stopping: the server admits nothing more"
                raise StoppingError(msg)
            self._scheduler.admit(jobs)
            self._count["refused"] -= len(jobs)
            self._wake.notify()

    def abandon(self, futures: Iterable[Future[Answer]]) -> None:
        """Give up on answers, as when a client has left: what has not run yet is not run."""
        for future in futures:
            future.cancel()

    def stop(self, timeout: float | None = None) -> bool:
        """Admit nothing more, finish what was admitted, end the thread; say whether there was time enough."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def statistics(self) -> Statistics:
        """Return how things stand."""
        with self._wake:
            scheduler = self._scheduler
            return Statistics(
                waiting=scheduler.waiting,
                slots_in_use=scheduler.in_use,
                admitted=scheduler.admitted,
                backlog_ms=scheduler.backlog_ms,
                leave=scheduler.leave,
                running=self._thread.is_alive(),
                **self._count,
            )

    # The engine's thread

    def _live(self) -> None:
        """Run until stopped and empty. An error that no step is to blame for is a bug; nobody is left waiting then."""
        running: collections.deque[_Dispatched] = collections.deque()
        try:
            while True:
                step = self._schedule(busy=bool(running))
                if step is not None:
                    running.append(self._run(step))
                elif not running:
                    return
                if step is None or len(running) >= self._ahead:
                    self._postprocess(running[0])
                    running.popleft()
        except Exception:  # noqa: BLE001 (the last resort)
            _log.critical("the engine's thread ends", exc_info=True)
            with self._wake:
                self._stopping = True
                lost = self._scheduler.clear()
            lost += [job for dispatched in running for job in dispatched.step.jobs]
            for job in lost:
                if job.done.running() or (not job.done.done() and job.done.set_running_or_notify_cancel()):
                    job.done.set_exception(StepError("failed: the engine had to stop"))

    def _schedule(self, *, busy: bool) -> Step | None:
        """Drop who waits in vain and return the next step; wait for one unless the device is busy or the end has come.

        No timeout: the scheduler holds nobody back for company, so where anyone waits there is a step.
        """
        while True:
            with self._wake:
                now = self._clock()
                dropped, step = self._scheduler.drop(now), self._scheduler.next_step(now)
                if not (dropped or step or busy or self._stopping):
                    self._wake.wait()
                    continue
                expired = self._claim(dropped)
                self._count["expired"] += len(expired)
                ending = self._stopping
            for job in expired:
                job.done.set_exception(DeadlineError(f"deadline: it passed after {now - job.arrived:.3f} s"))
                self._tell(lambda observer: observer.refused("deadline"))
            if step or busy or ending:
                return step

    def _run(self, step: Step) -> _Dispatched:
        since = self._clock()
        try:
            return _Dispatched(step, self._runner.dispatch(step), since)
        except Exception as error:  # noqa: BLE001 (whatever it is, it fails the step, not the thread)
            return _Dispatched(step, _Failed(error), since)

    def _postprocess(self, dispatched: _Dispatched) -> None:
        """Wait for a step; answer who leaves, send on who does not."""
        step, running, since = dispatched
        try:
            result = running.result()
            now = self._clock()
            for job in step.jobs:
                job.computed += now - since
            answers = self._answers(step, result)
        except Exception as error:  # noqa: BLE001 (whatever it is, it fails the step, not the thread)
            _log.exception("step failed: route %d, stage %d, %d images", step.route, step.stage, len(step.jobs))
            self._fail(dispatched, error)
            return
        with self._wake:
            given_up = self._scheduler.finish(step, [answer is not None for answer in answers])
            self._claim(given_up)
            leaving = [(job, answer) for job, answer in zip(step.jobs, answers, strict=True) if answer is not None]
            claimed = set(self._claim([job for job, _ in leaving]))
            self._count["answered"] += len(claimed)
            self._count["steps"] += 1
        self._tell(lambda observer: observer.step(step, now - since, failed=False))
        for job, answer in leaving:
            if job in claimed:
                job.done.set_result(answer)
                self._tell(lambda observer, job=job, answer=answer: observer.answered(job, answer, now - job.arrived))

    def _answers(self, step: Step, result: StageResult) -> list[Answer | None]:
        """Return the answer of everyone who leaves, None for who goes on.

        Raises:
            ValueError: The runner speaks of another number of jobs.
        """
        route = self.routes[step.route]
        exit_, last = route.exits[step.stage], step.stage == len(route.sites)
        rows = zip(result.hit.tolist(), result.class_index.tolist(), result.score.tolist(), result.logits, strict=True)
        if len(result.hit) != len(step.jobs):
            msg = f"runner: expected {len(step.jobs)} rows, got {len(result.hit)}"
            raise ValueError(msg)
        return [
            Answer(index, exit_, score, logits, job.computed) if last or hit else None
            for job, (hit, index, score, logits) in zip(step.jobs, rows, strict=True)
        ]

    def _fail(self, dispatched: _Dispatched, error: Exception) -> None:
        step, _, since = dispatched
        with self._wake:
            self._scheduler.fail(step)
            claimed = self._claim(step.jobs)
            self._count.update(failed=len(claimed), steps=1, failed_steps=1)
        now = self._clock()
        self._tell(lambda observer: observer.step(step, now - since, failed=True))
        for job in claimed:
            failure = StepError(f"failed: {type(error).__name__} on the way to exit {self._exit(step)}")
            failure.__cause__ = error
            job.done.set_exception(failure)

    def _exit(self, step: Step) -> int:
        return self.routes[step.route].exits[step.stage]

    def _claim(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs whose clients still wait, who can no longer cancel from now on; count the others."""
        claimed = [job for job in jobs if job.done.set_running_or_notify_cancel()]
        self._count["abandoned"] += len(jobs) - len(claimed)
        return claimed

    def _tell(self, say: Callable[[Observer], None]) -> None:
        """Tell the observer; its errors are its own."""
        if self._observer is not None:
            try:
                say(self._observer)
            except Exception:  # noqa: BLE001
                _log.exception("the observer failed")


@dataclasses.dataclass(frozen=True)
class _Failed:
    """A step that could not even be started."""

    error: Exception

    def result(self) -> StageResult:
        raise self.error
