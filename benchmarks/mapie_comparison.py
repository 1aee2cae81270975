"""The certificate and the monitor beside those of MAPIE, on the same tables and the same streams.

``certificates``: one cache, ten thresholds from strict to loose, and a risk that rises with every step to ``worst``
times epsilon; who certifies the farther step? ``false certificates``: the cache disagrees on a millionth more than
epsilon of what it answers, at every threshold, and that share is what is certified (``certify_conditional``), so that
every certificate is false.

``monitors``: independent requests (see `benchmarks.alarms`); MAPIE's ``RiskMonitoring`` is given the threshold epsilon
and every base answer. It then spends a quarter of its ``test_level``: half of it belongs to a reference set, which
there is none of, and its bound has one side of two. So it also runs at 4 delta. What both watch over is not the same:
the monitor bounds the risk of every request given the past, MAPIE the mean risk since the start. Intervals are Clopper
and Pearson's, of 95 %.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import json
import multiprocessing
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from gati_jax import Certificate, InputError, Plan, ReplayTable, certify, certify_conditional
from gati_jax.adaptation import MonitorConfig
from train import cli

from . import alarms
from .alarms import Phase, Run, interval

EXAMPLE = "python -m benchmarks.mapie_comparison --workers 2"
STEPS = 10
WORST = {"easy": 0.5, "borderline": 1.5, "hard": 15.0}  # risk of the last step, over epsilon
RISES, QUIET_RISK, SLIGHT = (2, 3, 5), 0.5, 1.25  # all over epsilon
BURST, PAUSE, BURSTS = 400, 1600, 10  # requests at 4 epsilon, and without a disagreement; mean 0.8 epsilon
Method = Literal["fixed_sequence", "bonferroni_holm"]


def mapie(room: str) -> Any:  # noqa: ANN401 (a module of a package that may be missing)
    """Import a part of MAPIE."""
    try:
        return importlib.import_module(f"mapie.{room}")
    except ImportError as error:
        raise InputError('mapie: expected MAPIE 1.6 (pip install "gati-jax[test]"), got none') from error


# --- Certificates -----------------------------------------------------------------------------------------------------


def draw(rng: np.random.Generator, n: int, risk: float) -> ReplayTable:
    """Draw certify rows of one cache that disagrees with this risk, whatever its score."""
    return ReplayTable(
        names=("cache",), sites=(1,), depth=2, answers=np.zeros(n, np.int32),
        classes=(rng.random((1, n)) < risk).astype(np.int32), scores=rng.random((1, n), np.float32),
        rows=np.arange(n, dtype=np.uint64),
    )  # fmt: skip


def plan_of(steps: int) -> Plan:
    """Return a plan that lets its cache answer a further 1 / steps of the requests at every step."""
    path = np.r_[np.inf, 1 - np.arange(1, steps + 1) / steps].astype(np.float32)[:, None]
    return Plan(
        names=("cache",), sites=(1,), depth=2, path=path, disagreement=np.zeros(steps + 1),
        mean_ms=np.zeros(steps + 1), n=1, rows=np.array([2**60], np.uint64),
    )  # fmt: skip


def mapie_step(
    plan: Plan,
    table: ReplayTable,
    epsilon: float,
    delta: float,
    *,
    method: Method = "fixed_sequence",
    agreement: bool = False,
    conditional: bool = False,
) -> int:
    """Return the last step of a one-cache plan that MAPIE certifies; -1 where it certifies none.

    Args:
        plan: As for ``certify``.
        table: As for ``certify``.
        epsilon: As for ``certify``.
        delta: As for ``certify``.
        method: How MAPIE shares out delta among the steps; Bonferroni-Holm is its default.
        agreement: Whether to control 1 - the disagreement from below, as a performance, and not the risk itself.
        conditional: Whether the risk is that of the requests which the cache answers.
    """
    risk_control = mapie("risk_control")
    risk = risk_control.BinaryRisk(
        lambda wrong, hits: ((wrong == 1) & (hits == 1)) != agreement,
        lambda _, hits: (hits == 1) | (not conditional),
        higher_is_better=agreement,
    )
    controller = risk_control.BinaryClassificationController(
        lambda scores: np.stack([1 - scores, scores], axis=1),
        risk, 1 - epsilon if agreement else epsilon, 1 - delta, risk_control.predicted_positive_fraction,
        list_predict_params=plan.path[1:, 0], fwer_method=method,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no threshold is certified, or all are
        controller.calibrate(table.scores[0], table.classes[0] != table.answers)
    passed = np.flatnonzero(np.isin(plan.path[:, 0], controller.valid_predict_params))
    return int(passed.max(initial=-1))


def compare_certificates(tables: int, rows: int, epsilon: float, delta: float, seed: int) -> list[dict[str, Any]]:
    """Certify the same tables with both; count who goes farther."""
    rng, plan, lines = np.random.default_rng(seed), plan_of(STEPS), []
    ways: dict[str, dict[str, Any]] = {
        "fixed sequence": {},
        "fixed sequence, on agreement": {"agreement": True},
        "Bonferroni-Holm (default)": {"method": "bonferroni_holm"},
    }
    for kind, worst in WORST.items():
        drawn = [draw(rng, rows, worst * epsilon) for _ in range(tables)]
        ours = np.array([certify(plan, table, epsilon, delta, ledger=None).step for table in drawn])
        for way, options in ways.items():
            theirs = np.array([mapie_step(plan, table, epsilon, delta, **options) for table in drawn])
            shares = {"same": ours == theirs, "ours farther": ours > theirs, "MAPIE farther": ours < theirs}
            lines.append({"tables": kind, "MAPIE": way} | {name: float(is_.mean()) for name, is_ in shares.items()})
    return lines


def count_false(tables: int, rows: int, epsilon: float, delta: float, seed: int) -> list[dict[str, Any]]:
    """Certify tables on which every certificate is false."""
    rng, plan = np.random.default_rng(seed), plan_of(STEPS)
    drawn = [draw(rng, rows, epsilon * (1 + 1e-6)) for _ in range(tables)]

    def ours(table: ReplayTable) -> Certificate:
        return certify_conditional(plan, table, epsilon, delta, ledger=None)

    false = {
        "ours": sum(ours(table).certified for table in drawn),
        "MAPIE, fixed sequence": sum(mapie_step(plan, table, epsilon, delta, conditional=True) > 0 for table in drawn),
    }
    return [share_of(who, count, tables) for who, count in false.items()]


# --- Monitors ---------------------------------------------------------------------------------------------------------

Watcher = Callable[[int, tuple[Phase, ...]], Run]


def mapie_first_alarm(losses: Bool[np.ndarray, " n"], epsilon: float, test_level: float) -> int | None:
    """Return the number of the request after which ``RiskMonitoring`` first sees a harmful shift.

    That computes its bound for all requests anew at each update. The bound is below the mean and can only rise at a
    loss, so here it is computed where it matters; a test compares the two.
    """
    t, total = np.arange(1, len(losses) + 1), np.cumsum(losses)
    mean = total / t
    variance = np.cumsum((losses - np.append(0.5, mean[:-1])) ** 2)
    level = test_level / 2 / 2
    bound = mapie("exchangeability_testing.bounds").GammaExponentialMixtureBound(v_opt=1, c=1, alpha_opt=level)
    for i in np.flatnonzero(losses & (mean > epsilon)).tolist():
        if mean[i] - bound(float(variance[i]), level) / t[i] > epsilon:
            return i + 1
    return None


def watch_with_mapie(seed: int, phases: tuple[Phase, ...], *, epsilon: float, test_level: float) -> Run:
    """Serve one stream up to MAPIE's first alarm."""
    drawn = alarms.blocks(phases, np.random.default_rng(seed))
    hits, losses = np.concatenate([(hits, hits & wrong) for hits, _, _, wrong, _ in drawn], axis=1)
    first = mapie_first_alarm(losses, epsilon, test_level)
    seen = len(hits) if first is None else first
    count = int(hits[:seen].sum())
    return Run(seen, first is not None, count, count, 0)


def watch_with_ours(seed: int, phases: tuple[Phase, ...], *, config: MonitorConfig) -> Run:
    """Serve one stream up to the monitor's first alarm."""
    return alarms.simulate(seed, config=config, phases=phases)


def watchers(epsilon: float, delta: float) -> dict[str, Watcher]:
    """Return who watches."""
    config = MonitorConfig(epsilon=epsilon, delta=delta)
    every = dataclasses.replace(config, quiet_q=1.0, drift=False)
    return {
        "ours, q = 1": functools.partial(watch_with_ours, config=every),
        f"ours, q = {config.quiet_q:g} in quiet": functools.partial(watch_with_ours, config=config),
        f"MAPIE, test_level {delta:g}": functools.partial(watch_with_mapie, epsilon=epsilon, test_level=delta),
        f"MAPIE, test_level {4 * delta:g}": functools.partial(watch_with_mapie, epsilon=epsilon, test_level=4 * delta),
    }


def compare_monitors(arguments: Any) -> dict[str, Any]:  # noqa: ANN401 (argparse's own)
    """Serve the same streams under every watcher."""
    epsilon, runs, length = arguments.epsilon, arguments.runs, arguments.length
    no_jump = {
        "epsilon": (Phase(arguments.requests, epsilon),),
        "bursts": (Phase(PAUSE, 0.0), Phase(BURST, 4 * epsilon)) * BURSTS,
    }
    quiets = sorted({0, arguments.quiet})
    jumps = {
        (quiet, rise): (Phase(quiet, QUIET_RISK * epsilon), Phase(length, rise * epsilon))
        for quiet in quiets
        for rise in ((SLIGHT, *RISES) if quiet == 0 else RISES)
    }
    found: dict[str, Any] = {"alarms": [], "delays": []}
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:

        def served(watch: Watcher, phases: tuple[Phase, ...], count: int) -> list[Run]:
            seeds = range(arguments.seed, arguments.seed + count)
            return pool.starmap(watch, ((seed, phases) for seed in seeds), chunksize=4)

        for who, watch in watchers(epsilon, arguments.delta).items():
            for name, phases in no_jump.items():
                count = arguments.streams if name == "epsilon" else runs
                line = share_of(who, sum(run.alarm for run in served(watch, phases, count)), count)
                found["alarms"].append({"streams of": name} | line)
            for (quiet, rise), phases in jumps.items():
                delays = alarms.delays(served(watch, phases, runs), quiet)
                found["delays"].append({"quiet": quiet, "risk": rise, "who": who} | dataclasses.asdict(delays))
    return found


def share_of(who: str, count: int, of: int) -> dict[str, Any]:
    """Return a count as a line of a table."""
    low, high = interval(count, of)
    return {"who": who, "count": count, "of": of, "share": count / of, "low": low, "high": high}


def main() -> None:
    """Compare and print."""
    p = cli.parser("Compare certificates and the monitor with MAPIE's.", EXAMPLE, out=False)
    p.add_argument("--part", choices=("certificates", "monitors", "all"), default="all")
    p.add_argument("--tables", type=cli.positive, default=300, metavar="N", help="of each kind (default: 300)")
    p.add_argument("--false-tables", type=cli.positive, default=2000, metavar="N", help="at epsilon (default: 2000)")
    p.add_argument("--rows", type=cli.positive, default=5000, metavar="N", help="of a table (default: 5000)")
    p.add_argument("--streams", type=cli.positive, default=500, metavar="N", help="at epsilon (default: 500)")
    p.add_argument("--requests", type=cli.positive, default=20_000, metavar="N", help="of each (default: 20000)")
    p.add_argument("--runs", type=cli.positive, default=100, metavar="N", help="streams with a jump (default: 100)")
    p.add_argument("--quiet", type=cli.positive, default=10_000, metavar="N", help="before a jump (default: 10000)")
    p.add_argument("--length", type=cli.positive, default=60_000, metavar="N", help="after it (default: 60000)")
    p.add_argument("--epsilon", type=cli.share, default=0.01, metavar="X", help="default: 0.01")
    p.add_argument("--delta", type=cli.share, default=0.05, metavar="X", help="default: 0.05")
    p.add_argument("--workers", type=cli.positive, default=1, metavar="N", help="processes (default: 1)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    arguments = p.parse_args()
    mapie("risk_control")
    found: dict[str, Any] = {}
    if arguments.part != "monitors":
        terms = arguments.rows, arguments.epsilon, arguments.delta, arguments.seed
        found["certificates"] = compare_certificates(arguments.tables, *terms)
        found["false certificates"] = count_false(arguments.false_tables, *terms)
    if arguments.part != "certificates":
        found |= compare_monitors(arguments)
    version = importlib.metadata.version("mapie")
    if arguments.json:
        print(json.dumps({"mapie": version, "settings": vars(arguments)} | found, indent=2))
        return
    for part, lines in found.items():
        cli.show(f"{part}; MAPIE {version}", list(lines[0]), [list(line.values()) for line in lines])


if __name__ == "__main__":
    cli.run(main)
