"""Which shares of the requests leave where, followed as they are seen, and how queues are best run by them."""

from collections.abc import Sequence

from . import policy
from .records import Route, Step

WINDOW = 500  # rows: the memory of the shares that leave
MOVED = 0.05


class Shares:
    """The traffic as lately seen, by route and stage."""

    def __init__(self, routes: Sequence[Route]) -> None:
        """Start with what the routes expect."""
        self._stage_ms = [route.stage_ms for route in routes]
        self._seen = [list(route.leave) for route in routes]
        self._used = [list(route.leave) for route in routes]  # the same, as choices were made by
        self._choices: dict[tuple[int, int, int], policy.Choice] = {}

    @property
    def leave(self) -> tuple[tuple[float, ...], ...]:
        """The share that leaves, by route and stage."""
        return tuple(tuple(shares) for shares in self._seen)

    def choose(self, route: int, stage: int, waiting: int) -> policy.Choice:
        """Return how a queue is best run."""
        stage_ms = self._stage_ms[route]
        key = route, stage, min(waiting, max(stage_ms))
        if key not in self._choices:
            self._choices[key] = policy.choose(stage_ms, self._used[route], stage, key[2])
        return self._choices[key]

    def learn(self, step: Step, rows: int, left: int) -> None:
        """Follow the traffic: a running mean; choices are made anew once it has moved by a twentieth.

        Args:
            step: What has run.
            rows: Of it, those that clients wait for: ghosts leave nowhere but at the end, whatever the traffic is.
            left: Of these, who left.
        """
        seen, used = self._seen[step.route], self._used[step.route]
        seen[step.stage] += (left - rows * seen[step.stage]) / (rows + WINDOW)
        if abs(seen[step.stage] - used[step.stage]) > MOVED:
            self._used[step.route] = list(seen)
            self._choices = {key: choice for key, choice in self._choices.items() if key[0] != step.route}
