"""How far composition proves its choice, on made-up replay tables: the gap that is left, and the time it took.

    python -m benchmarks.compose --sites 8 27 --seeds 3

A request has one difficulty; what a site sees of it is blurred, alike at neighbouring sites and for all heads of a
site, and a head adds a little of its own. The blur is set so that the share of requests above the score at which 99 %
agree is about what was measured on ResNet-56 (3, 24, 57, 73, 83, 93 % at agreements of 60, 76, 88, 91, 94, 97 %).
With ``--independent`` all blur is each head's own: then every further cache helps, and proofs are the hardest.
"""

import argparse
import time

import numpy as np
from jaxtyping import Float
from scipy.special import ndtri

from gati_jax.planning import Budget, CostTable, ReplayTable, compose

ANSWER_BLUR, SCORE_BLUR = 0.6, 0.9  # standard deviations; a request's difficulty has 1
OWN = 0.05  # of the variance of both, what is a head's own
REACH = 0.3  # of the network's depth, over which the blur of a site fades


def made_up(
    sites: int, variants: int, n: int, seed: int, *, independent: bool = False
) -> tuple[ReplayTable, CostTable]:
    """Return a table and times of a base of 1 ms, of which a lookup takes 0.8 to 3.2 %."""
    rng = np.random.default_rng(seed)
    depth = np.repeat((1 + np.arange(sites)) / sites, variants)
    own = 1.0 if independent else OWN
    sizes = rng.random(len(depth))
    agreement = 0.62 + 0.36 * depth**0.7 - 0.1 * (1 - sizes) * rng.random(len(depth)) * (1 - 0.8 * depth)
    difficulty = rng.standard_normal(n)
    seen = difficulty + ANSWER_BLUR * _blur(rng, sites, variants, n, own)
    margin = ndtri(np.minimum(agreement, 0.995))[:, None] * np.hypot(1, ANSWER_BLUR) - seen
    names = tuple(f"head{v}@{s + 1}" for s in range(sites) for v in range(variants))
    blocks = 0.5 + rng.random(sites + 1)
    table = ReplayTable(
        names=names,
        sites=tuple(np.arange(1, sites + 1).repeat(variants).tolist()),
        depth=sites + 1,
        answers=np.zeros(n, np.int32),
        classes=(margin <= 0).astype(np.int32),
        scores=(margin + SCORE_BLUR * _blur(rng, sites, variants, n, own)).astype(np.float32),
        rows=np.arange(n, dtype=np.uint64),
    )
    lookup_ms = dict(zip(names, (0.008 + 0.024 * sizes).tolist(), strict=True))
    return table, CostTable(device="made-up", batch=1, blocks_ms=tuple(blocks / blocks.sum()), lookup_ms=lookup_ms)


def _blur(rng: np.random.Generator, sites: int, variants: int, n: int, own: float) -> Float[np.ndarray, "heads n"]:
    """Draw noise of variance 1, a share ``own`` of it each head's, the rest a walk from site to site."""
    keep = np.exp(-1 / sites / REACH)
    walk = [rng.standard_normal(n)]
    for _ in range(sites - 1):
        walk.append(keep * walk[-1] + np.sqrt(1 - keep**2) * rng.standard_normal(n))
    return np.sqrt(1 - own) * np.repeat(walk, variants, axis=0) + np.sqrt(own) * rng.standard_normal(
        (sites * variants, n)
    )


def main() -> None:
    """Compose on a table for each size and seed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compose", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=int, nargs="+", default=[8, 27])
    parser.add_argument("--variants", type=int, default=6, help="candidates a site")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--share", type=float, default=0.01, help="of requests that may disagree")
    parser.add_argument("--max-sites", type=int, help="at most so many caches")
    parser.add_argument("--thresholds", type=int, default=16, help="a candidate, in the proof")
    parser.add_argument("--seeds", type=int, default=3, help="tables of each size")
    parser.add_argument("--seconds", type=float, default=60.0, help="of CPU time, a table")
    parser.add_argument("--independent", action="store_true", help="all blur is each head's own")
    args = parser.parse_args()
    budget = Budget(disagreements=int(args.share * args.requests), sites=args.max_sites)
    print("sites heads requests seed  may disagree   mean ms  bound ms     gap    nodes  CPU s")
    for sites in args.sites:
        for seed in range(args.seeds):
            table, costs = made_up(sites, args.variants, args.requests, seed, independent=args.independent)
            started = time.process_time()
            found = compose(
                table, costs, budget, seconds=args.seconds, thresholds=args.thresholds, clock=time.process_time
            )
            print(
                f"{sites:5d} {len(table.names):5d} {len(table):8d} {seed:4d} {budget.disagreements:13d}"
                f" {found.mean_ms:9.4f} {found.bound_ms:9.4f} {found.gap:7.2%} {found.nodes:8d}"
                f" {time.process_time() - started:6.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
