"""Send requests and record the outcome of each, in open and in closed loop.

In open loop a request is sent at its scheduled time, whether or not earlier ones are answered, and its latency counts
from that time: requests keep arriving while a server stalls, and their waiting is measured. A client that waits for an
answer before it sends the next request would omit them (coordinated omission). Closed loop does so by design: its
latencies are those with N clients, not those at a rate.
"""

import asyncio
import enum
import itertools
import selectors
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

from gati_jax.adaptation import Trace
from serve.engine.records import DeadlineError, OverloadedError, StoppingError

T = TypeVar("T")
LEAST_PAUSE = 0.001  # seconds before a refused client asks again


class Reply(NamedTuple):
    """The recorded part of an answer."""

    class_index: int
    exit: int


Ask = Callable[[int], Awaitable[Reply]]
"""Return the answer to a row; raises the errors of ``serve.engine.records`` for refusals, others for failures."""


class Outcome(enum.IntEnum):
    """The outcome of a request."""

    ANSWERED = 0
    REFUSED = 1  # at once, or because its deadline had passed
    FAILED = 2
    LOST = 3  # no answer within ``patience`` after the last request


class Record(NamedTuple):
    """A request with its outcome; times in seconds from the start of the run."""

    row: int
    scheduled: float
    sent: float
    done: float
    outcome: Outcome
    class_index: int = -1
    exit: int = -1


class Run(NamedTuple):
    """The records of a run."""

    records: Sequence[Record]
    seconds: float
    """Duration of the sending."""
    busy: float
    """Seconds of processor time of the generator."""
    error: str = ""
    """The error of the first failed request."""


class _Log:
    """Asks, and records the outcomes."""

    def __init__(self, ask: Ask) -> None:
        self.ask, self.records, self.error = ask, list[Record](), ""
        self.clock = asyncio.get_running_loop().time
        self.start = self.clock()

    def now(self) -> float:
        return self.clock() - self.start

    async def one(self, row: int, scheduled: float | None = None) -> float:
        """Ask, and return the seconds that a refused client waits before it asks again."""
        sent = self.now()
        scheduled = sent if scheduled is None else scheduled
        outcome, reply, pause = Outcome.LOST, Reply(-1, -1), 0.0
        try:
            reply = await self.ask(row)
            outcome = Outcome.ANSWERED
        except OverloadedError as error:
            outcome, pause = Outcome.REFUSED, max(error.retry_after, LEAST_PAUSE)
        except (DeadlineError, StoppingError):
            outcome, pause = Outcome.REFUSED, LEAST_PAUSE
        except Exception as error:  # noqa: BLE001 (reported; the run continues)
            self.error, outcome, pause = self.error or repr(error), Outcome.FAILED, LEAST_PAUSE
        finally:
            self.records.append(Record(row, scheduled, sent, self.now(), outcome, *reply))
        return pause

    async def finish(self, tasks: Sequence[asyncio.Task[Any]], patience: float) -> None:
        """Wait for the requests in flight, then cancel them."""
        _, waiting = await asyncio.wait(tasks, timeout=patience) if tasks else (set(), set())
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def open_loop(
    ask: Ask, trace: Trace, *, patience: float = 30.0, cpu: Callable[[], float] = time.process_time
) -> Run:
    """Send every request at its time.

    Args:
        ask: The server.
        trace: The items and their times.
        patience: Seconds to wait for answers after the last request was sent.
        cpu: Seconds of processor time so far.
    """
    busy, log, tasks = cpu(), _Log(ask), []
    for at, row in zip(trace.seconds.tolist(), trace.item.tolist(), strict=True):
        await asyncio.sleep(max(0.0, at - log.now()))  # at least one turn of the loop, for the other tasks
        tasks.append(asyncio.create_task(log.one(row, at)))
    await log.finish(tasks, patience)
    return Run(log.records, float(trace.seconds[-1]), cpu() - busy, log.error)


async def closed_loop(
    ask: Ask,
    rows: Sequence[int],
    *,
    clients: int,
    seconds: float,
    patience: float = 30.0,
    cpu: Callable[[], float] = time.process_time,
) -> Run:
    """Let each client send one request after another.

    Args:
        ask: The server.
        rows: The rows to ask for, repeated after the last.
        clients: The number of clients, and so the most requests in flight.
        seconds: Duration of the sending.
        patience: Seconds to wait for answers after that.
        cpu: Seconds of processor time so far.
    """
    busy, log, rows_left = cpu(), _Log(ask), itertools.cycle(rows)

    async def client() -> None:
        while log.now() < seconds:
            await asyncio.sleep(await log.one(next(rows_left)))

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    await asyncio.sleep(seconds)
    await log.finish(tasks, patience)
    return Run(log.records, seconds, cpu() - busy, log.error)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run in an event loop with exact timers: the default one rounds every sleep up to the next millisecond."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(main)
