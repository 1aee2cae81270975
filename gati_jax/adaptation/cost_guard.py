"""The cost guard: pauses the caches for a while where requests cost more with them than without.

A cascade certified on photographs may answer next to no frame of a video; every request then pays for lookups on top of
the whole base. Pausing caches opens nothing and so needs no certificate. Nor does resuming them: they are as certified
as before, and the monitor never stopped.
"""

import dataclasses
from collections.abc import Mapping

from gati_jax.caches import Candidate
from gati_jax.errors import InputError
from gati_jax.planning import CostTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostGuardConfig:
    """When to pause, and for how long."""

    requests: int = 200
    """Requests answered by the network over which their cost is compared with the base's."""
    pause: int = 1000
    """Requests of the first pause; each further one in a row is twice as long."""
    longest: int = 16_000
    """Requests of the longest pause."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            InputError: A number is out of range.
        """
        if not (self.requests >= 1 and 1 <= self.pause <= self.longest):
            got = f"{self.requests}, {self.pause} and {self.longest}"
            raise InputError(f"requests, pause, longest: expected 1 or more, pause at most longest, got {got}")


class CostGuard:
    """Adds up what requests cost, a fixed number of requests at a time."""

    def __init__(self, config: CostGuardConfig, full_ms: float) -> None:
        """Start with no request counted.

        Args:
            config: See ``CostGuardConfig``.
            full_ms: Milliseconds of the base alone.
        """
        self.config, self._full_ms = config, full_ms
        self.pause = config.pause
        """Requests of the next pause."""
        self._n, self._spent = 0, 0.0

    def add(self, ms: float) -> bool:
        """Count a request that the network answered; return whether to pause the caches.

        Args:
            ms: Milliseconds until the exit where it left, lookups included.
        """
        self._n += 1
        self._spent += ms
        if self._n < self.config.requests:
            return False
        wasteful = self._spent > self._n * self._full_ms
        self._n, self._spent = 0, 0.0
        if not wasteful:
            self.pause = self.config.pause
        return wasteful

    def lengthen(self) -> None:
        """Make the next pause, if it follows at once, twice as long."""
        self.pause = min(2 * self.pause, self.config.longest)


def exit_ms(caches: tuple[Candidate, ...], costs: CostTable) -> Mapping[int, float]:
    """Return milliseconds until each exit of a cascade, lookups included; the last is the base's."""
    exits = {*(cache.site for cache in caches), len(costs.blocks_ms)}
    return {
        exit_: costs.until(exit_) + sum(costs.lookup_ms[c.name] for c in caches if c.site <= exit_) for exit_ in exits
    }
