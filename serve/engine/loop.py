"""The engine's thread: schedule -> run -> postprocess, step after step."""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from .records import Answer, DeadlineError, Job, Lookup, Observer, Runner, Running, StageResult, Step, StepError
from .scheduler import Scheduler
from .turns import Alone, Turn

_log = logging.getLogger("serve.engine.loop")
_MEMORY = 0.05  # weight of the newest turnaround in its running mean
Shadow = Callable[[Job, Answer], bool]
"""Whether a job that a cache has answered continues for the base's answer. Called from the engine's thread."""


class BetweenSteps(NamedTuple):
    """A function to be run between two steps."""

    work: Callable[[], None]
    done: "Future[None]"

    def run(self) -> None:
        """Run it and complete its future."""
        if self.done.set_running_or_notify_cancel():
            try:
                self.work()
            except Exception as error:  # noqa: BLE001 (raised where it is awaited)
                self.done.set_exception(error)
            else:
                self.done.set_result(None)


class _Dispatched(NamedTuple):
    step: Step
    running: Running
    since: float
    rows: Sequence[int] | None = None
    """Rows of the runner's result that belong to the step's jobs; None for all of them."""


@dataclasses.dataclass(kw_only=True, eq=False)
class Loop:
    """The body of the engine's thread, and the state that it shares with all others; see ``Engine`` for the options.

    ``wake`` guards the scheduler and the fields below it, and is notified of arrivals.
    """

    runner: Runner
    clock: Callable[[], float]
    observer: Observer | None
    shadow: Shadow | None
    overlap: bool
    scheduler: Scheduler
    turn: Turn = dataclasses.field(default_factory=Alone)
    wake: threading.Condition = dataclasses.field(default_factory=threading.Condition)
    stopping: bool = False
    count: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    between: collections.deque[BetweenSteps] = dataclasses.field(default_factory=collections.deque)
    turnaround: float = 0.0
    """Mean seconds from a result to the next dispatch, in which the device idles."""
    _result_at: float | None = None

    def __call__(self) -> None:
        """Run until stopped and empty; an error outside of any step is a bug, and fails every job in flight."""
        running: collections.deque[_Dispatched] = collections.deque()
        try:
            while True:
                step = self._schedule(busy=bool(running))
                if step is not None:
                    running.append(self._run(step))
                elif not running:
                    return
                if self.overlap and len(running) == 1:
                    self._run_ahead(running)
                self._postprocess(running)
        except Exception:  # noqa: BLE001 (the last resort)
            _log.critical("the engine's thread ends", exc_info=True)
            self._fail_all(running)

    def _schedule(self, *, busy: bool) -> Step | None:
        """Drop expired jobs and return the next step; wait for one unless the device is busy or the engine is stopping.

        There is no timeout: the scheduler never delays a job for a fuller step, so if any job waits, there is a step.
        """
        while True:
            while self.between:  # only this thread removes items
                self.between.popleft().run()
            with self.wake:
                wanted = self.scheduler.waits
            if wanted:
                self.turn.take()  # and then choose: others may take theirs meanwhile
            with self.wake:
                now, stopping = self.clock(), self.stopping
                dropped = self.scheduler.drop(now)
                lost = self.scheduler.drop_shadows() if stopping else []
                step = self.scheduler.next_step(now) if wanted else None
                missed = not step and self.scheduler.waits  # came in between
                if not (step or busy):
                    self.turn.give_back()
                if not (dropped or lost or step or busy or stopping or missed or self.between):
                    self._result_at = None  # the device idles for want of requests, which is no turnaround
                    self.wake.wait()
                    continue
                expired = self.claim(dropped)
                self.count["expired"] += len(expired)
            self._report_lost(lost)
            for job in expired:
                late = f"deadline: no time is left for an answer after {now - job.arrived:.3f} s"
                job.done.set_exception(DeadlineError(late))
                self.notify(lambda observer: observer.refused("deadline"))
            if step or busy or (stopping and not missed and not self.between):
                return step

    def _run(self, step: Step) -> _Dispatched:
        since = self.clock()
        try:
            dispatched = _Dispatched(step, self.runner.dispatch(step), since)
        except Exception as error:  # noqa: BLE001 (any error fails the step, not the thread)
            failed: Future[StageResult] = Future()
            failed.set_exception(error)
            return _Dispatched(step, failed, since)
        if self._result_at is not None:
            self.turnaround += _MEMORY * (self.clock() - self._result_at - self.turnaround)
            self._result_at = None
        return dispatched

    def _run_ahead(self, running: collections.deque[_Dispatched]) -> None:
        """Dispatch the next stage of the last step before its hits are known, where that is expected to pay."""
        with self.wake:
            further = self.scheduler.overlap(running[-1].step, self.turnaround * 1e3)
        if further is not None:
            self._result_at = None  # the device does not idle: there is no turnaround to measure
            running.append(self._run(further))

    def _postprocess(self, running: collections.deque[_Dispatched]) -> None:
        """Wait for the oldest step, answer the jobs that leave, and queue the others for their next stage."""
        step, device, since, rows = running[0]
        try:
            try:
                result = device.result()
            finally:
                self.turn.give_back()
            now = self._result_at = self.clock()
            for job in step.jobs:
                job.computed += now - since
            answers = self._answers(step, result if rows is None else result.take(rows))
        except Exception as error:  # noqa: BLE001 (any error fails the step, not the thread)
            if step.jobs:
                _log.exception("step failed: route %d, stage %d, %d images", step.route, step.stage, len(step.jobs))
            self._fail(running, error)
            return
        leaving = [(job, answer) for job, answer in zip(step.jobs, answers, strict=True) if answer is not None]
        shadowed = [(job, answer) for job, answer in leaving if job.is_shadow]
        with self.wake:
            claimed = set(self.claim([job for job, _ in leaving]))
        answered = [(job, answer) for job, answer in leaving if job in claimed]
        shadows = self._choose_shadows(step, answered)
        with self.wake:
            left = [answer is not None for answer in answers]
            abandoned = self.scheduler.finish(step, left, shadows, seconds=now - since)
            self.claim(abandoned)
            self.count.update(answered=len(answered), shadowed=len(shadowed), steps=1)
            self._narrow(running, now)
        if step.jobs:  # a step that ran ahead may have none left
            self.notify(lambda observer: observer.step(step, now - since, failed=False))
        for job, answer in answered:
            job.done.set_result(answer)
            self.notify(lambda observer, job=job, answer=answer: observer.answered(job, answer, now - job.arrived))
        for job, answer in shadowed:
            self.notify(lambda observer, job=job, answer=answer: observer.shadowed(job, answer))

    def _answers(self, step: Step, result: StageResult) -> list[Answer | None]:
        """Return the answers of the jobs that leave, None for the others; shadow jobs leave at the last stage only.

        Raises:
            ValueError: The runner's result is for another number of jobs.
        """
        route = self.scheduler.routes[step.route]
        exit_, last = route.exits[step.stage], step.stage == len(route.sites)
        rows = zip(result.hit.tolist(), result.class_index.tolist(), result.score.tolist(), result.logits, strict=True)
        if len(result.hit) != len(step.jobs):
            raise ValueError(f"runner: expected {len(step.jobs)} rows, got {len(result.hit)}")
        if not last:
            for job, score in zip(step.jobs, result.score.tolist(), strict=True):
                job.lookups.append(Lookup(exit_, score, result.threshold))
        return [
            Answer(index, exit_, score, logits, job.computed, tuple(job.lookups))
            if last or (hit and not job.is_shadow)
            else None
            for job, (hit, index, score, logits) in zip(step.jobs, rows, strict=True)
        ]

    def _choose_shadows(self, step: Step, answered: Sequence[tuple[Job, Answer]]) -> set[Job]:
        """Return the jobs, answered by a cache, that continue as shadow jobs."""
        if self.shadow is None or step.stage == len(self.scheduler.routes[step.route].sites):
            return set()
        try:
            return {job for job, answer in answered if self.shadow(job, answer)}
        except Exception:  # noqa: BLE001 (clients get their answers all the same)
            _log.exception("the choice of shadow jobs failed")
            return set()

    def _narrow(self, running: collections.deque[_Dispatched], now: float) -> None:
        """Remove the oldest step; the one that ran ahead of it keeps the remaining jobs and is timed from now on."""
        done = running.popleft().step
        for i, (step, device, _, _) in enumerate(running):
            if step.follows is done:
                alive = [row for row, job in enumerate(step.jobs) if job.slot >= 0]
                running[i] = _Dispatched(self.scheduler.narrow(step), device, now, alive)

    def claim(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs whose clients still wait, and count the others; from now on these clients cannot cancel.

        Shadow jobs have no client.
        """
        clients = [job for job in jobs if not job.is_shadow]
        claimed = [job for job in clients if job.done.set_running_or_notify_cancel()]
        self.count["abandoned"] += len(clients) - len(claimed)
        return claimed

    def notify(self, event: Callable[[Observer], None]) -> None:
        """Pass an event to the observer, whose failures concern nothing else."""
        if self.observer is not None:
            try:
                event(self.observer)
            except Exception:  # noqa: BLE001
                _log.exception("the observer failed")

    # Failures

    def _fail(self, running: collections.deque[_Dispatched], error: Exception) -> None:
        """Fail the jobs of the oldest step."""
        step, _, since, _ = running[0]
        with self.wake:
            self.scheduler.fail(step)
            claimed = self.claim(step.jobs)
            now = self.clock()
            if step.jobs:  # otherwise its jobs have failed or left already
                self.count.update(failed=len(claimed), steps=1, failed_steps=1)
            self._narrow(running, now)
        if not step.jobs:
            return
        self.notify(lambda observer: observer.step(step, now - since, failed=True))
        self._report_lost(step.jobs)
        exit_ = self.scheduler.routes[step.route].exits[step.stage]
        for job in claimed:
            failure = StepError(f"failed: {type(error).__name__} on the way to exit {exit_}")
            failure.__cause__ = error
            job.done.set_exception(failure)

    def _fail_all(self, running: collections.deque[_Dispatched]) -> None:
        """Stop the engine and fail every job in flight."""
        with self.wake:
            self.stopping = True
            lost = self.scheduler.clear()
            between = list(self.between)
        lost += [job for dispatched in running for job in dispatched.step.jobs]
        self._report_lost(lost)
        for item in between:
            item.done.cancel()
        for job in lost:
            if job.done.running() or (not job.done.done() and job.done.set_running_or_notify_cancel()):
                job.done.set_exception(StepError("failed: the engine had to stop"))

    def _report_lost(self, jobs: Sequence[Job]) -> None:
        """Tell the observer which shadow jobs will have no answer."""
        for job in jobs:
            if job.is_shadow:
                self.notify(lambda observer, job=job: observer.shadowed(job, None))
