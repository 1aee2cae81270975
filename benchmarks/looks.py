"""How often a series of looks at the same certify rows certifies something false: the risk must stay below delta.

The game: 40 caches answer disjoint requests, and a plan takes 20 of them. Every cache disagrees equally often, so that
every plan has the same true risk, ``risk`` times epsilon; at 1 or more, each certificate is false. The player decides
which plan comes next, knowing what the looks before it told. Intervals are Clopper and Pearson's, at 95 %.
"""

import json
import logging
import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool

from gati_jax import InputError, Ledger, Plan, ReplayTable, certify
from gati_jax.fitting.loop import progress_bar
from train import cli

from .alarms import interval

CACHES, TAKEN, EPSILON, DELTA = 40, 20, 0.05, 0.05
EXAMPLE = "python -m benchmarks.looks --rows 1000 --series 1000"
Player = Callable[[np.random.Generator, ReplayTable], bool]


def draw(rng: np.random.Generator, n: int, risk: float) -> ReplayTable:
    """Draw certify rows: each is answered by one cache, wrongly with probability 2 x risk x epsilon."""
    owner, wrong = rng.integers(CACHES, size=n), rng.random(n) < risk * EPSILON * CACHES / TAKEN
    hits = owner == np.arange(CACHES)[:, None]
    return ReplayTable(
        names=tuple(f"c{i}" for i in range(CACHES)),
        sites=tuple(range(1, CACHES + 1)),
        depth=CACHES + 1,
        answers=np.zeros(n, np.int32),
        classes=(hits & wrong).astype(np.int32),
        scores=hits.astype(np.float32),
        rows=np.arange(n, dtype=np.uint64),
    )


def plan_of(taken: Bool[np.ndarray, " caches"]) -> Plan:
    """Return the plan that opens these caches in one step."""
    path = np.stack([np.full(CACHES, np.inf), np.where(taken, 1.0, np.inf)])
    rows = np.arange(10**9, 10**9 + 100, dtype=np.uint64)
    return Plan(
        names=tuple(f"c{i}" for i in range(CACHES)), sites=tuple(range(1, CACHES + 1)), depth=CACHES + 1, path=path,
        disagreement=np.zeros(2), mean_ms=np.zeros(2), n=100, rows=rows,
    )  # fmt: skip


def some(rng: np.random.Generator) -> Bool[np.ndarray, " caches"]:
    """Choose caches at random."""
    return rng.permutation(CACHES) < TAKEN


def fewest_seen(rng: np.random.Generator, table: ReplayTable) -> bool:
    """Look four times and see all counts, then take the caches with the fewest disagreements seen; no ledger counts."""
    seen, score, best = table.classes.sum(1), np.full(CACHES, np.inf), np.zeros(CACHES, bool)
    for _ in range(4):
        taken = some(rng)
        if certify(plan_of(taken), table, EPSILON, DELTA / 5, ledger=None).certified:
            return True
        score[taken] = seen[taken]
    best[np.argsort(score + rng.random(CACHES) / 2)[:TAKEN]] = True
    return certify(plan_of(best), table, EPSILON, DELTA / 5, ledger=None).certified


def ten_looks(rng: np.random.Generator, table: ReplayTable) -> bool:
    """Try ten plans, one after the other, until one passes."""
    ledger = Ledger()
    return any(certify(plan_of(some(rng)), table, EPSILON, DELTA, ledger=ledger).certified for _ in range(10))


def by_failures(rng: np.random.Generator, table: ReplayTable) -> bool:
    """Use the one thing that a failed look tells: take the caches that failed least often."""
    ledger, failed = Ledger(), np.zeros(CACHES)
    for _ in range(10):
        taken = np.zeros(CACHES, bool)
        taken[np.argsort(failed + rng.random(CACHES))[:TAKEN]] = True
        if certify(plan_of(taken), table, EPSILON, DELTA, ledger=ledger).certified:
            return True
        failed += taken
    return False


def revealed(rng: np.random.Generator, table: ReplayTable) -> bool:
    """Have the fourth look revealed, and try to use it: the rows are closed then."""
    ledger = Ledger()
    for reveal in (False, False, False, True):
        if certify(plan_of(some(rng)), table, EPSILON, DELTA, ledger=ledger, reveal=reveal).certified:
            return True
    best = np.zeros(CACHES, bool)
    best[np.argsort(table.classes.sum(1))[:TAKEN]] = True
    try:
        return certify(plan_of(best), table, EPSILON, DELTA, ledger=ledger).certified
    except InputError:
        return False


PLAYERS: dict[str, Player] = {
    "fewest seen, no ledger": fewest_seen,
    "ten looks": ten_looks,
    "ten looks by failures": by_failures,
    "fewest seen, revealed": revealed,
}


def main() -> None:
    """Run the games."""
    p = cli.parser("Count false certificates of series of looks.", EXAMPLE, out=False)
    p.add_argument("--rows", type=cli.positive, default=1000, metavar="N", help="certify rows (default: 1000)")
    p.add_argument("--series", type=cli.positive, default=1000, metavar="N", help="series a game (default: 1000)")
    arguments = p.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("gati_jax").setLevel(logging.ERROR)  # most looks certify nothing, and would say so
    rows = []
    for name, play in PLAYERS.items():
        for risk in (1.0, 1.25):
            rng = np.random.default_rng(0)
            with progress_bar(wanted=True) as bar:
                series = bar.track(range(arguments.series), description=name)
                wrong = sum(play(rng, draw(rng, arguments.rows, risk)) for _ in series)
            low, high = interval(wrong, arguments.series)
            rows.append({"game": name, "risk": risk * EPSILON, "false": wrong / arguments.series, "ci": [low, high]})
    if arguments.json:
        print(json.dumps({"delta": DELTA, "epsilon": EPSILON, "rows": arguments.rows, "games": rows}))
        return
    table = [(r["game"], r["risk"], f"{r['false']:.1%}", f"{r['ci'][0]:.1%} .. {r['ci'][1]:.1%}") for r in rows]
    cli.show(f"False certificates; delta {DELTA:.0%}", ("game", "true risk", "false", "95 % interval"), table)


if __name__ == "__main__":
    cli.run(main)
