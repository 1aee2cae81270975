"""The engine's thread: schedule -> run -> postprocess, step after step."""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from .records import Answer, DeadlineError, Job, Observer, Runner, Running, StageResult, Step, StepError
from .scheduler import Scheduler

_log = logging.getLogger(__name__)
_MEMORY = 0.05  # weight of the newest turnaround in its running mean
Shadow = Callable[[Job, Answer], bool]
"""Whether a job that a cache has answered is to go on for the base's answer. From the engine's thread."""


class Between(NamedTuple):
    """Something to be done between two steps."""

    work: Callable[[], None]
    done: "Future[None]"

    def run(self) -> None:
        """Do it; what it raises is for who waits."""
        if self.done.set_running_or_notify_cancel():
            try:
                self.work()
            except Exception as error:  # noqa: BLE001 (raised where it is awaited)
                self.done.set_exception(error)
            else:
                self.done.set_result(None)


@dataclasses.dataclass(kw_only=True)
class Shared:
    """What the engine's thread shares with all others; guarded by ``wake``, which is notified of arrivals."""

    scheduler: Scheduler
    wake: threading.Condition = dataclasses.field(default_factory=threading.Condition)
    stopping: bool = False
    count: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    between: collections.deque[Between] = dataclasses.field(default_factory=collections.deque)

    def claim(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs whose clients still wait, who can no longer cancel from now on; count those who do not.

        For ghosts, nobody waits.
        """
        clients = [job for job in jobs if not job.ghost]
        claimed = [job for job in clients if job.done.set_running_or_notify_cancel()]
        self.count["abandoned"] += len(clients) - len(claimed)
        return claimed


class _Dispatched(NamedTuple):
    step: Step
    running: Running
    since: float
    rows: Sequence[int] | None = None
    """Of what the runner will say, those of the step's jobs; None for the first ones."""


class Loop:
    """The body of the engine's thread; see ``Engine`` for the arguments."""

    def __init__(
        self,
        runner: Runner,
        shared: Shared,
        *,
        clock: Callable[[], float],
        tell: Callable[[Callable[[Observer], None]], None],
        shadow: Shadow | None,
        ahead: int,
        overlap: bool,
    ) -> None:
        """Prepare."""
        self._runner = runner
        self._shared = shared
        self._scheduler = shared.scheduler
        self._clock = clock
        self._tell = tell
        self._shadow = shadow
        self._ahead = ahead
        self._overlap = overlap
        self._turnaround = 0.0  # seconds from a result to the next dispatch: what the device idles in between
        self._result_at: float | None = None

    def __call__(self) -> None:
        """Run until stopped and empty. An error that no step is to blame for is a bug; nobody is left waiting then."""
        running: collections.deque[_Dispatched] = collections.deque()
        try:
            while True:
                step = self._schedule(busy=bool(running))
                if step is not None:
                    running.append(self._run(step))
                elif not running:
                    return
                if self._overlap and len(running) <= self._ahead:
                    self._run_on(running)
                if step is None or len(running) >= self._ahead:
                    self._postprocess(running)
        except Exception:  # noqa: BLE001 (the last resort)
            _log.critical("the engine's thread ends", exc_info=True)
            with self._shared.wake:
                self._shared.stopping = True
                lost = self._scheduler.clear()
                between = list(self._shared.between)
            lost += [job for dispatched in running for job in dispatched.step.jobs]
            self._lose(lost)
            for one in between:
                one.done.cancel()
            for job in lost:
                if job.done.running() or (not job.done.done() and job.done.set_running_or_notify_cancel()):
                    job.done.set_exception(StepError("failed: the engine had to stop"))

    def _schedule(self, *, busy: bool) -> Step | None:
        """Drop who waits in vain and return the next step; wait for one unless the device is busy or the end has come.

        No timeout: the scheduler holds nobody back for company, so where anyone waits there is a step.
        """
        while True:
            self._do_between()
            with self._shared.wake:
                now, stopping = self._clock(), self._shared.stopping
                dropped = self._scheduler.drop(now)
                given_up = self._scheduler.drop_ghosts() if stopping else []
                step = self._scheduler.next_step(now)
                if not (dropped or given_up or step or busy or stopping or self._shared.between):
                    self._result_at = None  # the device is idle because nobody came, not because of us
                    self._shared.wake.wait()
                    continue
                expired = self._shared.claim(dropped)
                self._shared.count["expired"] += len(expired)
            self._lose(given_up)
            for job in expired:
                job.done.set_exception(DeadlineError(f"deadline: it passed after {now - job.arrived:.3f} s"))
                self._tell(lambda observer: observer.refused("deadline"))
            if step or busy or (stopping and not self._shared.between):
                return step

    def _do_between(self) -> None:
        while self._shared.between:  # only this thread takes out
            self._shared.between.popleft().run()

    def _run(self, step: Step) -> _Dispatched:
        since = self._clock()
        try:
            dispatched = _Dispatched(step, self._runner.dispatch(step), since)
        except Exception as error:  # noqa: BLE001 (whatever it is, it fails the step, not the thread)
            return _Dispatched(step, _Failed(error), since)
        if self._result_at is not None:
            self._turnaround += _MEMORY * (self._clock() - self._result_at - self._turnaround)
            self._result_at = None
        return dispatched

    def _run_on(self, running: collections.deque[_Dispatched]) -> None:
        """Dispatch the stage behind the last step's before it is known who leaves, where that is expected to pay."""
        with self._shared.wake:
            further = self._scheduler.overlap(running[-1].step, self._turnaround * 1e3)
        if further is not None:
            self._result_at = None  # the device is busy: nothing to be learned of what it idles
            running.append(self._run(further))

    def _postprocess(self, running: collections.deque[_Dispatched]) -> None:
        """Wait for the oldest step; answer who leaves, send on who does not."""
        step, device, since, rows = running[0]
        try:
            result = device.result()
            now = self._result_at = self._clock()
            for job in step.jobs:
                job.computed += now - since
            answers = self._answers(step, result if rows is None else result.take(rows))
        except Exception as error:  # noqa: BLE001 (whatever it is, it fails the step, not the thread)
            if step.jobs:
                _log.exception("step failed: route %d, stage %d, %d images", step.route, step.stage, len(step.jobs))
            self._fail(running, error)
            return
        leaving = [(job, answer) for job, answer in zip(step.jobs, answers, strict=True) if answer is not None]
        ended = [(job, answer) for job, answer in leaving if job.ghost]
        with self._shared.wake:
            claimed = set(self._shared.claim([job for job, _ in leaving]))
        ghosts = self._ghosts_of(step, [(job, answer) for job, answer in leaving if job in claimed])
        with self._shared.wake:
            given_up = self._scheduler.finish(step, [answer is not None for answer in answers], ghosts)
            self._shared.claim(given_up)
            self._shared.count.update(answered=len(claimed), shadowed=len(ended), steps=1)
            self._narrow(running, now)
        if step.jobs:  # else all have left before
            self._tell(lambda observer: observer.step(step, now - since, failed=False))
        for job, answer in leaving:
            if job in claimed:
                job.done.set_result(answer)
                self._tell(lambda observer, job=job, answer=answer: observer.answered(job, answer, now - job.arrived))
        for job, answer in ended:
            self._tell(lambda observer, job=job, answer=answer: observer.shadowed(job, answer))

    def _ghosts_of(self, step: Step, answered: Sequence[tuple[Job, Answer]]) -> set[Job]:
        """Return whose answer, by a cache, is to be compared with the base's."""
        if self._shadow is None or step.stage == len(self._scheduler.routes[step.route].sites):
            return set()
        try:
            return {job for job, answer in answered if self._shadow(job, answer)}
        except Exception:  # noqa: BLE001 (clients get their answers all the same)
            _log.exception("nobody could say what to shadow")
            return set()

    def _lose(self, jobs: Sequence[Job]) -> None:
        """Say of ghosts that they are lost."""
        for job in jobs:
            if job.ghost:
                self._tell(lambda observer, job=job: observer.shadowed(job, None))

    def _narrow(self, running: collections.deque[_Dispatched], now: float) -> None:
        """Take the oldest step out; one that ran on from it keeps who is still on the way, and is timed from now on."""
        done = running.popleft().step
        for i, (step, device, _, _) in enumerate(running):
            if step.follows is done:
                alive = [row for row, job in enumerate(step.jobs) if job.slot >= 0]
                running[i] = _Dispatched(self._scheduler.narrow(step), device, now, alive)

    def _answers(self, step: Step, result: StageResult) -> list[Answer | None]:
        """Return the answer of everyone who leaves, None for who goes on: a ghost does until the last stage.

        Raises:
            ValueError: The runner speaks of another number of jobs.
        """
        route = self._scheduler.routes[step.route]
        exit_, last = route.exits[step.stage], step.stage == len(route.sites)
        rows = zip(result.hit.tolist(), result.class_index.tolist(), result.score.tolist(), result.logits, strict=True)
        if len(result.hit) != len(step.jobs):
            raise ValueError(f"runner: expected {len(step.jobs)} rows, got {len(result.hit)}")
        return [
            Answer(index, exit_, score, logits, job.computed) if last or (hit and not job.ghost) else None
            for job, (hit, index, score, logits) in zip(step.jobs, rows, strict=True)
        ]

    def _fail(self, running: collections.deque[_Dispatched], error: Exception) -> None:
        step, _, since, _ = running[0]
        with self._shared.wake:
            self._scheduler.fail(step)
            claimed = self._shared.claim(step.jobs)
            now = self._clock()
            if step.jobs:  # else its jobs have failed, or left, already
                self._shared.count.update(failed=len(claimed), steps=1, failed_steps=1)
            self._narrow(running, now)
        if not step.jobs:
            return
        self._tell(lambda observer: observer.step(step, now - since, failed=True))
        self._lose(step.jobs)
        exit_ = self._scheduler.routes[step.route].exits[step.stage]
        for job in claimed:
            failure = StepError(f"failed: {type(error).__name__} on the way to exit {exit_}")
            failure.__cause__ = error
            job.done.set_exception(failure)


@dataclasses.dataclass(frozen=True)
class _Failed:
    """A step that could not even be started."""

    error: Exception

    def result(self) -> StageResult:
        raise self.error
