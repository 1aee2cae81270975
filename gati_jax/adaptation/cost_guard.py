"""Whether the caches pay: where requests cost more with them than without, they rest for a while.

A cascade certified on pictures may answer next to no frame of a video, and then every request pays for lookups, or for
a small network, on top of the whole base. Closing caches for that reason opens nothing and so needs no certificate;
neither does waking them: they are as certified as before, and the monitor never stopped.
"""

import dataclasses
from collections.abc import Mapping

from gati_jax.caches import Candidate
from gati_jax.errors import InputError
from gati_jax.planning import CostTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostGuardConfig:
    """When to rest, and for how long."""

    requests: int = 200
    """Answered by the network, over which what they cost is compared with the base alone."""
    rest: int = 1000
    """Requests to rest for at first; each further rest in a row is twice as long."""
    longest: int = 16_000

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            InputError: A number is out of its bounds.
        """
        if not (self.requests >= 1 and 1 <= self.rest <= self.longest):
            got = f"{self.requests}, {self.rest} and {self.longest}"
            raise InputError(f"requests, rest, longest: expected 1 or more, rest at most longest, got {got}")


class CostGuard:
    """Counts what requests cost, window by window."""

    def __init__(self, config: CostGuardConfig, full_ms: float) -> None:
        """Count nothing yet.

        Args:
            config: See ``CostGuardConfig``.
            full_ms: Of the base alone.
        """
        self.config, self._full_ms = config, full_ms
        self.rest = config.rest
        """Requests that the next rest takes."""
        self._n, self._spent = 0, 0.0

    def add(self, ms: float) -> bool:
        """Take a request that the network answered; say whether it is time to rest.

        Args:
            ms: Until the exit where it left, lookups included.
        """
        self._n += 1
        self._spent += ms
        if self._n < self.config.requests:
            return False
        wasteful = self._spent > self._n * self._full_ms
        self._n, self._spent = 0, 0.0
        if not wasteful:
            self.rest = self.config.rest
        return wasteful

    def rested(self) -> None:
        """Make the next rest, if it comes at once, twice as long."""
        self.rest = min(2 * self.rest, self.config.longest)


def exit_ms(caches: tuple[Candidate, ...], costs: CostTable) -> Mapping[int, float]:
    """Return milliseconds until each exit of a cascade, lookups included; the last is the base's."""
    exits = {*(cache.site for cache in caches), len(costs.blocks_ms)}
    return {
        exit_: costs.until(exit_) + sum(costs.lookup_ms[c.name] for c in caches if c.site <= exit_) for exit_ in exits
    }
