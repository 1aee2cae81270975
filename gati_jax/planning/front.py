"""The Pareto front of latency, disagreement and memory."""

from collections.abc import Callable, Mapping, Sequence

from .compose import GRID, Budget, Composition, compose
from .tables import CostTable, ReplayTable


def front(
    table: ReplayTable,
    costs: CostTable,
    disagreements: Sequence[int],
    memory_bytes: Sequence[int | None] = (None,),
    *,
    bytes: Mapping[str, int] | None = None,  # noqa: A002
    worst_ms: float | None = None,
    sites: int | None = None,
    seconds: float = 60.0,
    thresholds: int = GRID,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Composition, ...]:
    """Compose at every pair of a budget of disagreements and one of memory, and keep what nothing else beats.

    Args:
        table: As `compose` takes it, with the arguments that are not explained here.
        costs: Likewise.
        disagreements: The ladder of their budgets.
        memory_bytes: The ladder of memory budgets, None for as much as there is.
        bytes: For each candidate by name.
        worst_ms: For all compositions.
        sites: For all compositions.
        seconds: For all compositions together.
        thresholds: Of each candidate.
        progress: Told how many of how many compositions are done.

    Returns:
        The fastest first. Each is faster, or disagrees less, or takes less memory than any other.
    """
    ladder = [(count, memory) for count in sorted(set(disagreements)) for memory in dict.fromkeys(memory_bytes)]
    found: list[Composition] = []
    for done, (count, memory) in enumerate(ladder):
        budget = Budget(disagreements=count, memory_bytes=memory, worst_ms=worst_ms, sites=sites)
        found.append(compose(table, costs, budget, bytes=bytes, seconds=seconds / len(ladder), thresholds=thresholds))
        if progress:
            progress(done + 1, len(ladder))
    merits = [(c.mean_ms, c.disagreements, c.memory_bytes) for c in found]
    kept = {
        merit: composition
        for merit, composition in zip(merits, found, strict=True)
        if not any(_beats(other, merit) for other in merits)
    }
    return tuple(kept[merit] for merit in sorted(kept))


def _beats(one: tuple[float, int, int], other: tuple[float, int, int]) -> bool:
    """Say whether ``one`` is nowhere worse and somewhere better."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
