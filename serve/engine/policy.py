"""Which queue to serve, in which bucket: functions of measured times and of the shares that leave.

One device serves queues of requests that may leave after any stage. The order with the least mean latency is known for
such systems (Klimov 1974; Gittins 1979): serve the queue that promises the most departures per millisecond, over the
best number of further stages. Looking beyond the next stage matters: a stage without a hit may precede one where nearly
every request leaves. Two things are added here that those results leave out: buckets, whose time grows more slowly than
their rows, and ageing, without which rare requests that go deep would make up the whole tail.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .records import Route, Step

StageMs = Mapping[int, Sequence[float]]
"""By bucket, milliseconds of every stage."""
WINDOW = 500  # rows: the memory of the shares that leave
MOVED = 0.05  # change of a share after which buckets are chosen anew


class Choice(NamedTuple):
    """How to run a queue."""

    gain: float
    """Requests expected to leave per millisecond."""
    bucket: int


def row_ms(stage_ms: StageMs) -> tuple[float, ...]:
    """Return, for every stage, the milliseconds of a row in the bucket where that is least."""
    by_bucket = [[ms / bucket for ms in stages] for bucket, stages in stage_ms.items()]
    return tuple(min(column) for column in zip(*by_bucket, strict=True))


def remaining_ms(stage_ms: StageMs, leave: Sequence[float]) -> tuple[float, ...]:
    """Return, for every stage, the expected milliseconds of a row from there until it leaves."""
    rest, following = [], 0.0
    for ms, share in zip(reversed(row_ms(stage_ms)), reversed(leave), strict=True):
        following = ms + (1 - share) * following
        rest.append(following)
    return tuple(reversed(rest))


def gain(stage_ms: StageMs, leave: Sequence[float], stage: int, rows: int, bucket: int) -> float:
    """Return the requests expected to leave per millisecond, over the number of further stages where that is most.

    Survivors are expected to be merged with others: further stages cost what a row costs in the best bucket.
    """
    each = row_ms(stage_ms)
    spent, left, alive = stage_ms[bucket][stage], rows * leave[stage], rows * (1 - leave[stage])
    best = left / spent
    for later in range(stage + 1, len(leave)):
        spent += alive * each[later]
        left += alive * leave[later]
        alive *= 1 - leave[later]
        best = max(best, left / spent)
    return best


def choose_bucket(stage_ms: StageMs, leave: Sequence[float], stage: int, waiting: int) -> Choice:
    """Return the bucket in which ``waiting`` rows gain most: padded if that is cheaper, or for some of them only."""
    choices = [
        Choice(gain(stage_ms, leave, stage, min(waiting, bucket), bucket), bucket) for bucket in sorted(stage_ms)
    ]
    return max(choices, key=lambda choice: choice.gain)  # of equals, the smallest


def overlap_pays(leave: float, next_ms: float, turnaround_ms: float) -> bool:
    """Return whether dispatching all rows early saves the survivors more than it wastes on rows that leave."""
    return (1 - leave) * turnaround_ms > leave * next_ms


class Shares:
    """The recent share of jobs that leave, by route and stage, and the choice of buckets that follows from it."""

    def __init__(self, routes: Sequence[Route]) -> None:
        """Start with the shares that the routes expect."""
        self._stage_ms = [route.stage_ms for route in routes]
        self._seen = [list(route.leave) for route in routes]
        self._used = [list(route.leave) for route in routes]  # what the cached choices were made with
        self._choices: dict[tuple[int, int, int], Choice] = {}

    @property
    def leave(self) -> tuple[tuple[float, ...], ...]:
        """The share that leaves, by route and stage."""
        return tuple(tuple(shares) for shares in self._seen)

    def widen(self, routes: Sequence[Route]) -> None:
        """Choose among the buckets that the same routes have now."""
        self._stage_ms = [route.stage_ms for route in routes]
        self._choices = {}

    def choose_bucket(self, route: int, stage: int, waiting: int) -> Choice:
        """Return how a queue is best run."""
        stage_ms = self._stage_ms[route]
        key = route, stage, min(waiting, max(stage_ms))
        if key not in self._choices:
            self._choices[key] = choose_bucket(stage_ms, self._used[route], stage, key[2])
        return self._choices[key]

    def learn(self, step: Step, rows: int, left: int) -> None:
        """Update the running mean by a finished step; cached choices are dropped once it has moved by ``MOVED``.

        ``rows`` are its clients' jobs, of which ``left`` left. Shadow jobs teach nothing: they leave at the end only.
        """
        seen, used = self._seen[step.route], self._used[step.route]
        seen[step.stage] += (left - rows * seen[step.stage]) / (rows + WINDOW)
        if abs(seen[step.stage] - used[step.stage]) > MOVED:
            self._used[step.route] = list(seen)
            self._choices = {key: choice for key, choice in self._choices.items() if key[0] != step.route}
