"""How soon one controller of many replicas raises an alarm, and what is served until every replica has closed.

The monitor is the real one, without its drift detector, as scores are not simulated. Requests come at an even rate; a
share hits, at one site. After a quiet time at a third of epsilon, the risk jumps to a multiple of epsilon. What the
number of replicas changes: a request is observed once it is answered, so as many are on their way as the rate times the
latency, with coins of an older q; and the monitor, which must not bet on a higher q before all of them are through,
assumes that all places of all replicas are taken.
"""

import collections
import dataclasses
from typing import NamedTuple

import numpy as np

from gati_jax.adaptation import Monitor, MonitorConfig, Observation

DEPTH, SITE = 2, 0
BLOCK = 10_000  # requests drawn at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """What the controller sees."""

    rate: float
    """Requests a second of all replicas."""
    latency: float
    """Seconds until a request is observed."""
    hits: float
    """Share that a cache answers."""
    jump: float = 5.0
    """Times epsilon."""
    quiet: int = 20_000
    """Requests before the jump."""
    most: int = 2_000_000
    """Requests after it, if no alarm comes before."""


class Delay(NamedTuple):
    """From the jump to the alarm."""

    requests: int
    """Observed; ``most`` if there was no alarm."""
    raised: bool
    early: bool
    """Whether it came before the jump: a false one, as far as the quiet time goes."""


def delay(traffic: Traffic, config: MonitorConfig, *, seed: int) -> Delay:
    """Watch one stream up to its first alarm."""
    monitor, random = Monitor(dataclasses.replace(config, drift=False), DEPTH), np.random.default_rng(seed)
    coins = collections.deque([monitor.q] * max(1, round(traffic.rate * traffic.latency)))
    quiet, total = traffic.quiet, traffic.quiet + traffic.most
    for begin in range(0, total, BLOCK):
        risk = np.where(np.arange(begin, begin + BLOCK) < quiet, config.epsilon / 3, traffic.jump * config.epsilon)
        hits = random.random(BLOCK) < traffic.hits
        wrong = random.random(BLOCK) < risk / traffic.hits
        columns = zip(hits.tolist(), wrong.tolist(), random.random(BLOCK).tolist(), strict=True)
        for number, (hit, differs, coin) in enumerate(columns, begin):
            coins.append(monitor.q)
            q = coins.popleft()
            known = 0 if coin < q else None
            observed = Observation(SITE, 1.0, int(differs), q, known) if hit else Observation(DEPTH, np.inf, 0, 1.0, 0)
            if monitor.watch(observed) is not None:
                return Delay(max(0, number + 1 - quiet), raised=True, early=number < quiet)
    return Delay(traffic.most, raised=False, early=False)
