"""Sending requests and writing down what became of each, in open and in closed loop.

In open loop a request is sent at its scheduled time whatever became of those before, and its latency counts from that
time: while a server stalls, requests go on coming, and their waiting is seen. A client that waits for an answer before
it sends the next request would leave them out (coordinated omission). Closed loop does that by its nature: its
latencies say how the server does with N clients, not how it does at a rate.
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
LEAST_PAUSE = 0.001


class Reply(NamedTuple):
    """What is kept of an answer."""

    class_index: int
    exit: int


Ask = Callable[[int], Awaitable[Reply]]
"""Ask for the answer to a row; raises what ``serve.engine.records`` has for refusals, anything else for failures."""


class Outcome(enum.IntEnum):
    """What became of a request."""

    ANSWERED = 0
    REFUSED = 1  # at once, or when its deadline had passed
    FAILED = 2
    LOST = 3  # no answer within the patience that was left after the last was sent


class Record(NamedTuple):
    """A request's life; seconds from the start of the run."""

    row: int
    scheduled: float
    sent: float
    done: float
    outcome: Outcome
    class_index: int = -1
    exit: int = -1


class Run(NamedTuple):
    """What was measured."""

    records: Sequence[Record]
    seconds: float
    """How long requests were sent."""
    busy: float
    """Seconds of processor time that the generator took."""
    error: str = ""
    """What the first failed request said."""


class _Log:
    """Asks, and writes down what became of it."""

    def __init__(self, ask: Ask) -> None:
        self.ask, self.records, self.error = ask, list[Record](), ""
        self.clock = asyncio.get_running_loop().time
        self.start = self.clock()

    def now(self) -> float:
        return self.clock() - self.start

    async def one(self, row: int, scheduled: float | None = None) -> float:
        """Return how long a client that was turned away should wait before it asks again."""
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
        except Exception as error:  # noqa: BLE001 (whatever a client throws, the run goes on and says so)
            self.error, outcome, pause = self.error or repr(error), Outcome.FAILED, LEAST_PAUSE
        finally:
            self.records.append(Record(row, scheduled, sent, self.now(), outcome, *reply))
        return pause

    async def finish(self, tasks: Sequence[asyncio.Task[Any]], patience: float) -> None:
        """Wait for what is on its way, then give it up."""
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
        trace: When to send which item.
        patience: Seconds to wait for answers after the last request was sent.
        cpu: Seconds of processor time so far.
    """
    busy, log, tasks = cpu(), _Log(ask), []
    for at, row in zip(trace.seconds.tolist(), trace.item.tolist(), strict=True):
        await asyncio.sleep(max(0.0, at - log.now()))  # at least a turn of the loop, so that others get on
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
    """Let clients ask one request after another.

    Args:
        ask: The server.
        rows: What they ask for, from the beginning again after the last.
        clients: How many there are: never are more requests on their way.
        seconds: How long they go on.
        patience: Seconds to wait for answers after that.
        cpu: Seconds of processor time so far.
    """
    busy, log, wanted = cpu(), _Log(ask), itertools.cycle(rows)

    async def client() -> None:
        while log.now() < seconds:
            await asyncio.sleep(await log.one(next(wanted)))

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    await asyncio.sleep(seconds)
    await log.finish(tasks, patience)
    return Run(log.records, seconds, cpu() - busy, log.error)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run in an event loop that wakes in time: the usual one rounds every sleep up to the next millisecond."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(main)
