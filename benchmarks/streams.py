"""CREPE on real recordings, static caches beside caches that adapt to each recording, both certified by recording.

Recordings (not frames) are dealt into fit, select, certify and test. Heads are fitted and a plan is composed as for any
network; the certificate says that in the mean over recordings at most epsilon of a recording's frames are answered
otherwise than by the full network. Two procedures share delta: the plan, static, and the same heads with a memory of
the recording's answers so far (``recency``). Exact repeats are left out of the recordings.

Computation is counted twice: in floating-point operations, and by the time of every block and lookup. What was measured
end to end is beside it: the static cascade by ``gati_jax.evaluate``, the adaptive one frame by frame, both beside the
full network. Music, if given, is no part of what is certified: it shows what the promise does not cover.
"""

import argparse
import dataclasses
import functools
import shlex
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import gati_jax
from gati_jax import Bundle, Chain, CostTable, FitConfig, Head, ReplayTable, data
from gati_jax.caches import Candidate, Grid, SortedSelector
from gati_jax.fitting import Candidates
from gati_jax.fitting.replay import replay_logits
from gati_jax.planning.tables import cascade_ms, exit_ms, replay_plan
from gati_jax.profiling import device_name
from gati_jax.pytrees import call
from train import cli

from .recency import Recency, Server, Simulated, certified_step, group_losses, simulate, time_beside
from .recordings import Recordings, Spectrum, pitch_network, read_recordings

EXAMPLE = "python -m benchmarks.streams --recordings runs/debs/usr/share/asterisk/sounds --out streams.json"
SPLITS = {"fit": "all[:50%]", "select": "all[50%:65%]", "certify": "all[65%:90%]", "test": "all[90%:]"}
THRESHOLDS = 1 - np.geomspace(1e-3, 0.7, 40)  # strict to loose
RECENCIES = [Recency(weight=weight, keep=keep) for weight in (0.25, 0.5, 1.0) for keep in (0.5, 0.8)]
_HEADS: tuple[tuple[type[nn.Module], dict[str, int]], ...] = (
    (Spectrum, {"hidden": 512}),
    (Grid, {"cells": 16, "hidden": 256}),
)
AIM = 0.8  # of epsilon, that the memory is chosen for


class Part(NamedTuple):
    """One split, replayed."""

    frames: np.ndarray
    groups: np.ndarray
    table: ReplayTable
    """Of the planned caches."""
    logits: np.ndarray
    """Of the same ones' predictors: [caches, n, answers]."""


class Costs(NamedTuple):
    """The same caches and blocks in two units."""

    ms: CostTable
    operations: CostTable
    """In millions of floating-point operations."""


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser().parse_args(argv)
    chain = pitch_network(arguments.network, arguments.answers)
    speech = read_recordings(arguments.recordings, seconds=arguments.seconds, most=arguments.most)
    parts = {name: split_of(speech, part, arguments.seed) for name, part in SPLITS.items()}
    data.check_whole_groups({name: part.groups for name, part in parts.items()})
    config = FitConfig(
        epochs=arguments.epochs, reuse=arguments.reuse, batch=64, learning_rate=3e-3, seed=arguments.seed
    )
    images = {name: np.asarray(part.images) for name, part in parts.items()}
    candidates = gati_jax.fit(
        chain, images["fit"], select=images["select"], heads=heads(), config=config, checkpoint=arguments.checkpoint
    )
    select = gati_jax.replay(chain, candidates, images["select"])
    ms = gati_jax.measure_costs(chain, candidates, rounds=arguments.rounds, progress=False)
    delta = arguments.delta / 2  # static and adaptive
    plan = gati_jax.plan(select, ms, epsilon=arguments.epsilon, delta=delta, seconds=10.0)
    used = candidates.take(plan.names)
    costs = Costs(ms, operations_of(chain, candidates, ms))

    # From here on nothing may be chosen but on select: the certify recordings are opened, once for each procedure.
    replayed = {name: replayed_part(chain, used, parts[name]) for name in ("select", "certify", "test")}
    certify, test = replayed["certify"], replayed["test"]
    certificate = gati_jax.certify(plan, certify.table, arguments.epsilon, delta, groups=certify.groups, ledger=None)
    thresholds = plan.thresholds(certificate.step)
    recency, tried = chosen(replayed["select"], costs.ms, arguments.epsilon)
    level = adaptive_level(replayed, recency, arguments.epsilon, delta)
    with tempfile.TemporaryDirectory() as folder:
        gati_jax.save_bundle(folder, chain, used, plan, certificate, costs=[ms], ledger=None)
        bundle = gati_jax.load_bundle(folder, chain=chain)
        static = static_row(bundle, test, thresholds, costs) | measured_static(bundle, test, arguments.timed)
    adaptive = None
    if level is not None:
        server = Server(chain, tuple(used), level, recency)
        adaptive = simulated_row(test, level, recency, costs)
        adaptive |= measured_adaptive(server, chain, test, arguments.timed)
    result: dict[str, Any] = asked(arguments, argv) | {
        "recordings": {name: len(np.unique(np.asarray(part.groups))) for name, part in parts.items()},
        "frames": {name: len(part) for name, part in parts.items()},
        "agreement_on_select": dict(zip(select.names, select.agrees.mean(1).tolist(), strict=True)),
        "full": {"ms": ms.full_ms, "million_operations": costs.operations.full_ms, "spread": ms.spread},
        "certificate": certificate.summary(),
        "static": static,
        "oracle": oracle_row(test, costs),
        "memory_tried_on_select": tried,
        "recency": dataclasses.asdict(recency),
        "adaptive": adaptive,
    }
    if arguments.music:
        music = read_recordings(arguments.music, seconds=arguments.music_seconds, skip=30)
        part = replayed_part(chain, used, split_of(music, "all", arguments.seed))
        others = {"recordings": len(music.names), "frames": len(part.frames), "oracle": oracle_row(part, costs)}
        others["static"] = frames_row(part, outcome_of(part, thresholds), costs, thresholds)
        others["adaptive"] = None if level is None else simulated_row(part, level, recency, costs)
        result["music"] = others
    cli.report(result, show, out=arguments.out, as_json=arguments.json)
    if arguments.figure:
        draw(result, arguments.figure)


def asked(arguments: argparse.Namespace, argv: list[str] | None) -> dict[str, Any]:
    """Return what was asked for, where and when."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks.streams", *(sys.argv[1:] if argv is None else argv)]),
        "device": device_name(),
        "date": datetime.now(UTC).date().isoformat(),
        **{name: getattr(arguments, name) for name in ("network", "answers", "epsilon", "delta")},
    }


def parser() -> cli.Parser:
    """Return the command line's parser."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False)
    p.add_argument("--recordings", type=Path, nargs="+", required=True, metavar="DIR", help="of .wav files: certified")
    p.add_argument(
        "--music", type=Path, nargs="+", default=[], metavar="DIR", help="of others, outside the certificate"
    )
    p.add_argument("--network", choices=("tiny", "full"), default="tiny", help="CREPE's size (default: tiny)")
    p.add_argument("--answers", choices=("pitches", "semitones"), default="pitches", help="(default: pitches)")
    p.add_argument("--seconds", type=float, default=1.2, metavar="S", help="read of each recording (default: 1.2)")
    p.add_argument("--music-seconds", type=float, default=20.0, metavar="S", help="of each other one (default: 20)")
    p.add_argument("--most", type=cli.positive, default=1000, metavar="N", help="recordings at most (default: 1000)")
    p.add_argument("--epsilon", type=cli.share, default=0.05, metavar="E", help="disagreement (default: 0.05)")
    p.add_argument("--delta", type=cli.share, default=0.05, metavar="D", help="risk of both together (default: 0.05)")
    p.add_argument("--epochs", type=cli.positive, default=2, metavar="N", help="of the fit (default: 2)")
    p.add_argument("--reuse", type=cli.positive, default=6, metavar="N", help="steps a batch (default: 6)")
    p.add_argument("--rounds", type=cli.positive, default=20, metavar="N", help="of timing (default: 20)")
    p.add_argument("--timed", type=cli.positive, default=400, metavar="N", help="frames timed (default: 400)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of splits and fit (default: 0)")
    p.add_argument("--checkpoint", type=Path, metavar="DIR", help="an interrupted fit resumes from there")
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    p.add_argument("--figure", type=Path, metavar="FILE", help="also draw it, as SVG")
    return p


def heads() -> list[Head]:
    """Return what is fitted: a head on the frame itself, and one behind each layer."""
    spectrum, grid = (functools.partial(kind, **options) for kind, options in _HEADS)
    return [
        Head(name="spectrum", predictor=spectrum, selector=SortedSelector(), sites=(0,)),
        Head(name="grid", predictor=grid, selector=SortedSelector()),
    ]


def split_of(recordings: Recordings, part: str, seed: int) -> data.Dataset:
    """Return whole recordings, their frames in order."""
    return data.load_function(
        lambda: (recordings.frames, None, recordings.groups), part, name="recordings", shuffle_seed=seed
    )


def replayed_part(chain: Chain, used: Candidates, part: data.Dataset) -> Part:
    """Run base and caches over a split."""
    frames = np.asarray(part.images)
    table = gati_jax.replay(chain, used, frames)
    return Part(frames, np.asarray(part.groups), table, replay_logits(chain, tuple(used), frames))


# --- Costs ------------------------------------------------------------------------------------------------------------


def operations_of(chain: Chain, candidates: Candidates, ms: CostTable) -> CostTable:
    """Return a cost table in millions of floating-point operations, as the compiler counts them."""
    x, blocks, lookups = jnp.zeros((1, *chain.input_spec.shape)), [], {}
    for site in range(len(chain)):
        for cache in (cache for cache in candidates if cache.site == site):
            lookups[cache.name] = _operations(_predict, cache, x)
        last = site == len(chain) - 1

        def block(params: Any, last_params: Any, x: jax.Array, site: int = site, *, last: bool = last) -> jax.Array:  # noqa: ANN401
            y = chain.blocks[site](params, x)
            return chain.classifier(last_params, y) if last else y

        blocks.append(_operations(block, chain.params[site], chain.params[-1], x))
        x = chain.span(x, site, site + 1)
    return dataclasses.replace(ms, blocks_ms=tuple(blocks), lookup_ms=lookups)


def _predict(cache: Candidate, x: jax.Array) -> jax.Array:
    logits = call(cache.predictor, cache.params["predictor"], x)
    return call(cache.selector, cache.params["selector"], logits)


def _operations(function: Callable[..., jax.Array], *inputs: Any) -> float:  # noqa: ANN401 (pytrees)
    counted: Any = jax.jit(function).lower(*inputs).compile().cost_analysis()
    return float(counted["flops"]) / 1e6


# --- Rows of the table ------------------------------------------------------------------------------------------------


def outcome_of(part: Part, thresholds: np.ndarray) -> Simulated:
    """Return what the static cascade answers."""
    outcome = replay_plan(part.table, thresholds)
    return Simulated(outcome.exits[None], outcome.classes[None])


def frames_row(part: Part, found: Simulated, costs: Costs, thresholds: np.ndarray) -> dict[str, Any]:
    """Return what one way of answering takes and gives: shares of frames, and means over recordings."""
    stops = [*(f"site {site}" for site in part.table.sites), "base"]
    share = np.bincount(found.exits[0], minlength=len(stops)) / len(part.frames)
    losses = group_losses(found.answers, part.table.answers, part.groups)[0]
    each = [exit_ms(part.table, thresholds, table) for table in costs]
    return {
        "exits": {stop: float(s) for stop, s in zip(stops, share, strict=True)},
        "agreement": 1 - float(losses.mean()),
        "agreement_of_frames": float((found.answers[0] == part.table.answers).mean()),
        "computation": costs.operations.full_ms / float(share @ each[1]),
        "predicted_speedup": costs.ms.full_ms / float(share @ each[0]),
        "recordings_above": {f"{most:.0%}": float((losses > most).mean()) for most in (0.05, 0.1, 0.2)},
    }


def static_row(bundle: Bundle, part: Part, thresholds: np.ndarray, costs: Costs) -> dict[str, Any]:
    """Return the row of the certified plan."""
    return {"certified": bundle.certificate.certified} | frames_row(
        part, outcome_of(part, thresholds), costs, thresholds
    )


def measured_static(bundle: Bundle, part: Part, timed: int) -> dict[str, Any]:
    """Return what was measured end to end."""
    found = gati_jax.evaluate(bundle, part.frames, timed=min(timed, len(part.frames)), ledger=None, progress=False)
    if found.cost is None or not found.cost.measured:
        return {}
    first = found.cost.measured[0]
    keys = ("full_ms", "cascade_ms", "speedup", "spread", "interval")
    return {"measured": {key: getattr(first, key) for key in keys}}


def oracle_row(part: Part, costs: Costs) -> dict[str, Any]:
    """Return what would be saved if every frame left at the first planned cache that agrees with the base."""
    perfect = dataclasses.replace(part.table, scores=np.where(part.table.agrees, 1.0, -1.0).astype(np.float32))
    thresholds = np.zeros(len(part.table.names), np.float32)
    return {
        "computation": costs.operations.full_ms / cascade_ms(perfect, thresholds, costs.operations),
        "predicted_speedup": costs.ms.full_ms / cascade_ms(perfect, thresholds, costs.ms),
    }


def chosen(part: Part, ms: CostTable, epsilon: float) -> tuple[Recency, list[dict[str, float]]]:
    """Choose on select how answers are remembered: the fastest where the mean loss is at most AIM epsilon."""
    tried, all_on = [], np.zeros(len(part.table.names), np.float32)
    each = exit_ms(part.table, all_on, ms)
    for recency in (Recency(weight=0.0), *RECENCIES):
        found = simulate(part.logits, part.table.answers, part.groups, THRESHOLDS, recency)
        losses = group_losses(found.answers, part.table.answers, part.groups).mean(1)
        times = each[found.exits].mean(1)
        fast = np.where(losses <= AIM * epsilon, times, np.inf).min()
        fast = fast if np.isfinite(fast) else ms.full_ms
        tried.append(dataclasses.asdict(recency) | {"predicted_speedup": ms.full_ms / float(fast)})
    best = max(range(len(tried)), key=lambda i: tried[i]["predicted_speedup"])
    return (Recency(weight=0.0), *RECENCIES)[best], tried


def adaptive_level(parts: dict[str, Part], recency: Recency, epsilon: float, delta: float) -> float | None:
    """Return the certified threshold of the adaptive procedure: its path was fixed on select."""
    losses = {}
    for name in ("select", "certify"):
        part = parts[name]
        found = simulate(part.logits, part.table.answers, part.groups, THRESHOLDS, recency)
        losses[name] = group_losses(found.answers, part.table.answers, part.groups)
    step = certified_step(losses["certify"], losses["select"].mean(1), epsilon, delta)
    return None if step is None else float(THRESHOLDS[step])


def simulated_row(part: Part, level: float, recency: Recency, costs: Costs) -> dict[str, Any]:
    """Return the row of the adaptive procedure, replayed."""
    found = simulate(part.logits, part.table.answers, part.groups, np.array([level]), recency)
    return frames_row(part, found, costs, np.zeros(len(part.table.names), np.float32)) | {"threshold": level}


def measured_adaptive(server: Server, chain: Chain, part: Part, timed: int) -> dict[str, Any]:
    """Return what was measured frame by frame."""
    times = time_beside(server, chain, part.frames[:timed], part.groups[:timed])
    speedup = times.full_ms / times.adaptive_ms
    measured = {"full_ms": times.full_ms, "cascade_ms": times.adaptive_ms, "speedup": speedup, "parts": times.ratios}
    return {"certified": True, "measured": measured}


# --- Shown ------------------------------------------------------------------------------------------------------------


def rows_of(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table's rows."""
    rows = []
    for where, tables in (("", result), ("music: ", result.get("music", {}))):
        for name in ("static", "adaptive"):
            if row := tables.get(name):
                exits = ", ".join(f"{stop} {share:.0%}" for stop, share in row["exits"].items())
                measured = f"{row['measured']['speedup']:.2f}" if "measured" in row else ""
                cells = f"{row['agreement']:.2%}", f"{row['computation']:.2f}", f"{row['predicted_speedup']:.2f}"
                rows.append((where + name, exits, *cells, measured))
        if oracle := tables.get("oracle"):
            cells = "100%", f"{oracle['computation']:.2f}", f"{oracle['predicted_speedup']:.2f}"
            rows.append((where + "oracle of these caches", "", *cells, ""))
    return rows


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    title = f"CREPE {result['network']}, {result['answers']}, at {result['epsilon']:.0%} by recording"
    columns = ("test recordings", "exits", "agreement", "computation", "by parts' times", "measured")
    cli.show(title, columns, rows_of(result))
    print(result["certificate"])
    adaptive = result["adaptive"]
    print("adaptive: " + (f"certified at threshold {adaptive['threshold']:.3f}" if adaptive else "NOT CERTIFIED"))


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw computation saved by each way, and where frames leave; the same result, the same SVG."""
    mpl.rcParams |= {"svg.hashsalt": "gati-jax", "svg.fonttype": "none"}
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = {"static": "#1f2937", "adaptive": "#15803d", "oracle": "#9ca3af"}
    there = {kind: result[kind] for kind in kinds if result[kind]}
    left.bar(list(there), [row["computation"] for row in there.values()], color=[kinds[kind] for kind in there])
    left.axhline(1, color="#9ca3af", linewidth=0.8)
    left.set_ylabel("computation, times less")
    bottom = np.zeros(len(there) - 1)
    rows = [row for row in there.values() if "exits" in row]
    for stop in rows[0]["exits"]:
        shares = np.array([100 * row["exits"][stop] for row in rows])
        right.bar([kind for kind in there if "exits" in there[kind]], shares, bottom=bottom, label=stop)
        bottom += shares
    right.set_ylabel("frames that leave, %")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    cli.run(main)
