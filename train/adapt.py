"""Simulate adaptation on a trace: computation saved and disagreement, with more and more mechanisms switched on.

Nothing is served and no time is measured but the controller's: computation takes what the cost table says. Stages:
simulate each set of mechanisms -> summarise over windows -> adaptation.json and a figure over time.
"""

import dataclasses
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

import gati_jax
from gati_jax import InputError
from gati_jax.adaptation import (
    EXACT,
    NEAREST,
    ControllerConfig,
    ExactCacheConfig,
    Mechanisms,
    MonitorConfig,
    NearestCacheConfig,
    RecoveryConfig,
    ReplayCache,
    Replayed,
    Trace,
    TrialConfig,
    load_trace,
    simulate,
)
from gati_jax.evaluation.run import show_rows
from gati_jax.fitting.loop import progress_bar

from . import cli
from .results import Adaptation, EventResult, MechanismsResult, PhaseResult, TraceResult, WindowResult

EXAMPLE = "python -m train.adapt --bundle runs/r56/bundle --trace runs/blur.safetensors --out runs/blur"
WINDOW = 1000  # requests in which disagreement is counted
LAYERS = {"nearest": "nearest cache", "refit": "refitted heads", "exact": "exact cache"}  # in the table's order
MARKS = {"alarm": "#b91c1c", "swap": "#15803d", "opened": "#15803d"}


class Named(NamedTuple):
    """A row of the table of results."""

    name: str
    site_0: bool
    mechanisms: Mechanisms


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments = parser().parse_args(argv)
    bundle = cli.read_bundle(arguments)
    trace = load_trace(arguments.trace)
    if trace.images is None:
        raise InputError(f"--trace: expected images in {arguments.trace}, got rows of a data set alone")
    epsilon = arguments.epsilon or bundle.certificate.epsilon
    show_rows(bundle, trace.images, arguments.ledger, reveal=True)

    # --- Simulate ---------------------------------------------------------------------------------------------------
    replay_cache = ReplayCache(bundle.chain, trace.images)
    folder = arguments.out / "versions"
    runs = {}
    for named in chosen(arguments, epsilon):
        served = bundle if named.site_0 else without_site_0(bundle)
        runs[named.name] = replayed(
            served, trace, named, folder=folder, replay_cache=replay_cache, quiet=arguments.json
        )

    # --- Result -----------------------------------------------------------------------------------------------------
    *_, last = runs.values()
    result = Adaptation(
        trace=TraceResult(file=arguments.trace.name, n=len(trace), items=len(trace.images), about=dict(trace.about)),
        epsilon=epsilon,
        delta=arguments.delta,
        mechanisms=tuple(summary(name, run) for name, run in runs.items()),
        windows=tuple(windows(trace, last, len(bundle.chain))),
        phases=tuple(phases(trace, last)),
        events=tuple(EventResult.model_validate(event) for event in last.events),
        versions=cli.versions(),
        seed=arguments.seed,
        date=datetime.now(UTC).date().isoformat(),
    )
    result.write(arguments.out / "adaptation.json", print_json=arguments.json)
    draw(result, arguments.out / "adaptation.svg")
    if not arguments.json:
        show(result)
        print(f"written: {arguments.out / 'adaptation.json'}, {arguments.out / 'adaptation.svg'}")


def parser() -> cli.Parser:
    """Return the command line's parser."""
    p = cli.parser("Simulate adaptation on a trace.", EXAMPLE)
    cli.add_bundle(p)
    p.add_argument("--trace", type=Path, required=True, metavar="FILE", help="written by benchmarks.traces")
    cli.add_ledger(p)
    p.add_argument("--epsilon", type=cli.share, metavar="E", help="disagreement to promise (default: as certified)")
    p.add_argument(
        "--delta", type=cli.share, default=0.05, metavar="D", help="risk that it is exceeded (default: 0.05)"
    )
    without = f"mechanisms to leave out, of {', '.join(LAYERS)}"
    p.add_argument("--without", nargs="+", choices=LAYERS, default=[], metavar="LAYER", help=without)
    p.add_argument(
        "--share", type=cli.share, default=0.1, metavar="S", help="of the time, for trials and refits (default: 0.1)"
    )
    p.add_argument("--one", action="store_true", help="only the last row: all mechanisms at once")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
    return p


def chosen(arguments: Any, epsilon: float) -> list[Named]:  # noqa: ANN401 (a namespace)
    """Return the rows of the table, each with one mechanism more than the one before."""
    on = {layer: name for layer, name in LAYERS.items() if layer not in arguments.without}

    def watched(layers: Collection[str]) -> Mechanisms:
        controller = ControllerConfig(
            monitor=MonitorConfig(epsilon=epsilon, delta=arguments.delta),
            exact=ExactCacheConfig() if "exact" in layers else None,
            nearest=NearestCacheConfig() if "nearest" in layers else None,
            seed=arguments.seed,
        )
        trial = TrialConfig(epsilon=epsilon, delta=arguments.delta)
        recovery = RecoveryConfig(trial=trial, refit="refit" in layers)
        return Mechanisms(controller=controller, recovery=recovery, share=arguments.share)

    if arguments.one:
        return [Named("everything", site_0=True, mechanisms=watched(on))]
    static = Mechanisms(controller=None)
    table = [
        Named("static caches behind the first block", site_0=False, mechanisms=static),
        Named("+ site 0", site_0=True, mechanisms=static),
        Named("+ monitor and trials", site_0=True, mechanisms=watched(())),
    ]
    for i, name in enumerate(on.values()):
        table.append(Named(f"+ {name}", site_0=True, mechanisms=watched([*on][: i + 1])))
    return table


def without_site_0(bundle: gati_jax.Bundle) -> gati_jax.Bundle:
    """Return the bundle with the caches at its input switched off in the default plan."""
    path = bundle.plan.path.copy()
    path[:, [i for i, site in enumerate(bundle.plan.sites) if site == 0]] = np.inf
    return dataclasses.replace(bundle, plan=dataclasses.replace(bundle.plan, path=path))


def replayed(
    bundle: gati_jax.Bundle, trace: Trace, named: Named, *, folder: Path, replay_cache: ReplayCache, quiet: bool
) -> Replayed:
    """Simulate one set of mechanisms; the folder keeps the versions of the last one."""
    with progress_bar(not quiet) as bar:
        task = bar.add_task(named.name, total=len(trace))
        return simulate(
            bundle,
            trace,
            named.mechanisms,
            folder=folder,
            replay_cache=replay_cache,
            progress=lambda done: bar.update(task, completed=done),
        )


def summary(name: str, run: Replayed) -> MechanismsResult:
    """Return a row of the table."""
    mean_ms = float(run.ms.mean())
    return MechanismsResult.of(
        run,
        name=name,
        computation=run.full_ms / mean_ms,
        disagreement=float(run.wrong.mean()),
        worst_window=worst_window(run.wrong),
        shadow_share=float(run.shadow.mean()),
        with_recovery=run.full_ms / (mean_ms + 1e3 * run.recovery_seconds / len(run.ms)),
        alarms=sum(event.kind == "alarm" for event in run.events),
        swaps=sum(event.kind == "swap" for event in run.events),
    )


def worst_window(wrong: np.ndarray) -> float:
    """Return the largest share of disagreements in any WINDOW requests in a row."""
    size = min(WINDOW, len(wrong))
    total = np.concatenate([[0], np.cumsum(wrong)])
    return float((total[size:] - total[:-size]).max() / size)


def windows(trace: Trace, run: Replayed, depth: int) -> Iterator[WindowResult]:
    """Summarise every WINDOW requests; fewer, where the trace is so short that there would be few windows."""
    size = min(WINDOW, max(50, len(trace) // 30))
    named = {NEAREST: "nearest", EXACT: "exact", depth: "base"}
    for start in range(0, len(trace), size):
        rows = slice(start, start + size)
        exits, counts = np.unique(run.exit[rows], return_counts=True)
        names = [named.get(e, f"site {e}") for e in exits.tolist()]
        upper = run.upper[rows][np.isfinite(run.upper[rows])]
        yield WindowResult(
            start=start,
            phase=trace.phases[trace.phase[start]],
            saved_share=1 - float(run.ms[rows].mean()) / run.full_ms,
            disagreement=float(run.wrong[rows].mean()),
            bound=float(upper[-1]) if len(upper) else None,
            shadow_share=float(run.shadow[rows].mean()),
            exits=dict(zip(names, counts.tolist(), strict=True)),
        )


def phases(trace: Trace, run: Replayed) -> Iterator[PhaseResult]:
    """Summarise every phase of the trace."""
    for number, name in enumerate(trace.phases):
        rows = trace.phase == number
        if rows.any():
            computation = run.full_ms / float(run.ms[rows].mean())
            wrong = float(run.wrong[rows].mean())
            yield PhaseResult(phase=name, n=int(rows.sum()), computation=computation, disagreement=wrong)


def show(result: Adaptation) -> None:
    """Print the tables."""
    keys = {"computation": "{:.2f}x", "with_recovery": "{:.2f}x", "disagreement": "{:.2%}", "worst_window": "{:.2%}",
            "shadow_share": "{:.2%}", "alarms": "{}", "swaps": "{}"}  # fmt: skip
    rows = [(row.name, *(form.format(getattr(row, key)) for key, form in keys.items())) for row in result.mechanisms]
    title = f"{result.trace.file}: computation saved, at a promise of {result.epsilon:.1%}"
    cli.show(title, ("mechanisms", *keys), rows)
    by_phase = [(p.phase, p.n, f"{p.computation:.2f}x", f"{p.disagreement:.2%}") for p in result.phases]
    cli.show("With everything, phase by phase", ("phase", "requests", "computation", "disagreement"), by_phase)
    for event in result.events:
        print(f"{event.number:>8} {event.kind:<10} {event.text}")


def draw(result: Adaptation, path: Path) -> None:
    """Draw exits, savings, disagreement with its bound, alarms and swaps over time; the same result, the same SVG."""
    mpl.rcParams |= {"svg.hashsalt": "gati-jax", "svg.fonttype": "none"}
    figure = Figure(figsize=(9, 7), layout="constrained")
    left, saved, wrong = figure.subplots(3, 1, sharex=True)
    rows = result.windows
    edges = np.array([*(row.start for row in rows), result.trace.n])
    names = sorted({name for row in rows for name in row.exits}, key=_order)
    shares = np.array([[row.exits.get(name, 0) for row in rows] for name in names], float)
    left.stackplot(edges, _held(shares / shares.sum(0)), labels=names, step="post")
    left.set_ylabel("share that leaves")
    left.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    saved.step(edges, _held([100 * row.saved_share for row in rows]), where="post", color="#c2410c")
    saved.axhline(0, color="#9ca3af", linewidth=0.8)
    saved.set_ylabel("computation saved, %")
    disagrees = _held([100 * row.disagreement for row in rows])
    wrong.step(edges, disagrees, where="post", color="#1f2937", label="disagreement")
    bounds = [np.nan if row.bound is None else 100 * row.bound for row in rows]
    wrong.step(edges, _held(bounds), where="post", color="#9ca3af", label="bound, any time")
    wrong.axhline(100 * result.epsilon, color="#b91c1c", linestyle=":", label="promised")
    wrong.set(ylabel="of requests, %", xlabel="requests", ylim=(0, 500 * result.epsilon))
    wrong.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for event in result.events:
        if event.kind in MARKS:
            for axes in (left, saved, wrong):
                axes.axvline(event.number, color=MARKS[event.kind], linewidth=0.8, alpha=0.7)
    for before, row in zip((None, *rows), rows, strict=False):
        if before is None or row.phase != before.phase:
            left.annotate(row.phase, (row.start, 1.02), fontsize=7, rotation=30, annotation_clip=False)
    figure.savefig(path, metadata={"Date": None})


def _held(values: ArrayLike) -> np.ndarray:
    """Return values with the last one twice: each holds up to the next edge."""
    array = np.asarray(values, float)
    return np.concatenate([array, array[..., -1:]], axis=-1)


def _order(name: str) -> tuple[int, int]:
    """Sort the input cache's layers first, then sites by number, the base last."""
    if name.startswith("site "):
        return 1, int(name[5:])
    return (2, 0) if name == "base" else (0, len(name))


if __name__ == "__main__":
    cli.run(main)
