"""Summarise the requests of a load test, and search for the highest rate that a server sustains."""

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from .driving import Outcome, Record, Run

PERCENTILES = {"p50_ms": 50.0, "p95_ms": 95.0, "p99_ms": 99.0, "p99_9_ms": 99.9}
LATE_SECONDS = 0.005
MOST_LATE = 0.01  # with a larger share sent later than that, the generator was measured and not the server


def summarize(
    run: Run, *, slo_ms: float | None = None, expected: Int[np.ndarray, " rows"] | None = None, warm_up: float = 0.0
) -> dict[str, Any]:
    """Return a run's figures.

    Latency is from the scheduled time to the answer, over the answered requests. ``throughput`` is answers a second
    from the first request to the last answer; ``goodput``, answers within the SLO a second in which requests were
    sent. ``goodput_share`` is over all requests: a refused or lost one misses the SLO.

    Args:
        run: The measured requests.
        slo_ms: The largest latency within the SLO.
        expected: The expected class of each row.
        warm_up: Seconds from the start; requests scheduled within them are left out.
    """
    records = [record for record in run.records if record.scheduled >= warm_up]
    answered = [record for record in records if record.outcome is Outcome.ANSWERED]
    ms = np.array([(record.done - record.scheduled) * 1e3 for record in answered])
    seconds = max(run.seconds - warm_up, 1e-9)
    span = max((record.done for record in answered), default=0.0) - min((r.scheduled for r in records), default=0.0)
    result = {
        "requests": len(records),
        **{o.name.lower(): sum(record.outcome is o for record in records) for o in Outcome},
        "seconds": seconds,
        "rate": len(records) / seconds,
        "throughput": len(answered) / span if answered else 0.0,
        **latencies(ms),
        "exits": dict(sorted(Counter(record.exit for record in answered).items())),
        "generator_cores": run.busy / max([run.seconds, *(record.done for record in run.records)]),
    }
    if slo_ms is not None:
        within = int((ms <= slo_ms).sum())
        result |= {"slo_ms": slo_ms, "goodput": within / seconds, "goodput_share": within / max(1, len(records))}
    if expected is not None:
        same = sum(record.class_index == expected[record.row] for record in answered)
        result["agreement"] = float(same) / len(answered) if answered else None
    return result | _validity(run, records)


def latencies(ms: np.ndarray) -> dict[str, float | None]:
    """Return the mean, linearly interpolated percentiles and the maximum; None for an empty array."""
    if not len(ms):
        return dict.fromkeys(("mean_ms", *PERCENTILES, "max_ms"))
    percentiles = dict(zip(PERCENTILES, np.percentile(ms, list(PERCENTILES.values())).tolist(), strict=True))
    return {"mean_ms": float(ms.mean()), **percentiles, "max_ms": float(ms.max())}


def _validity(run: Run, records: Sequence[Record]) -> dict[str, Any]:
    late = sum(record.sent - record.scheduled > LATE_SECONDS for record in records)
    share = late / max(1, len(records))
    lost, failed = (sum(record.outcome is o for record in records) for o in (Outcome.LOST, Outcome.FAILED))
    reasons = [] if records else ["no requests after the warm-up"]
    if share > MOST_LATE:
        reasons.append(f"{share:.1%} of the requests were sent more than {LATE_SECONDS * 1e3:g} ms late")
    if lost:
        reasons.append(f"{lost} requests were not answered in time to be counted among the latencies")
    if failed:
        reasons.append(f"{failed} requests failed; the first: {run.error}")
    return {"late": late, "late_share": share, "valid": not reasons, "invalid_because": reasons}


async def highest(
    holds: Callable[[float], Awaitable[bool]], start: float, *, tolerance: float = 0.05, most: int = 20
) -> float:
    """Return the highest rate found to hold, by doubling or halving until it is bracketed, then bisection.

    Args:
        holds: Measures whether a rate holds. Measurements may err; every rate is tried once.
        start: The first rate.
        tolerance: The search ends when a rate known not to hold is at most this share above the result.
        most: The largest number of rates to try.

    Returns:
        The rate; 0 if none holds.
    """
    low, high = 0.0, math.inf
    rate = start
    for _ in range(most):
        if await holds(rate):
            low = rate
        else:
            high = rate
        if low and high <= low * (1 + tolerance):
            break
        middle = math.sqrt(low * high) if low else high / 2
        rate = low * 2 if math.isinf(high) else middle
    return low
