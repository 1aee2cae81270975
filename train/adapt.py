"""Replay a trace through a bundle that adapts to it: what it would have saved, and how often it would have been wrong.

Nothing is served and no time is measured but the controller's: the cost table says what computation takes. Stages:
simulate each set of mechanisms -> summarise over windows -> adaptation.json and a figure over time.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

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
from train import adaptation_figure, cli

EXAMPLE = "python -m train.adapt --bundle runs/r56/bundle --trace runs/blur.safetensors --out runs/blur"
WINDOW = 1000  # requests in which disagreement is counted
LAYERS = ("exact", "nearest", "refit")


class Named(NamedTuple):
    """A set of mechanisms in the table."""

    name: str
    site_0: bool
    mechanisms: Mechanisms


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments = parser().parse_args(argv)
    bundle = gati_jax.load_bundle(arguments.bundle)
    trace = load_trace(arguments.trace)
    if trace.images is None:
        raise InputError(f"--trace: expected images in {arguments.trace}, got rows of a data set alone")
    epsilon = arguments.epsilon or bundle.certificate.epsilon

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
    result = {
        "trace": {
            "file": arguments.trace.name,
            "n": len(trace),
            "items": len(trace.images),
            "about": dict(trace.about),
        },
        "epsilon": epsilon,
        "delta": arguments.delta,
        "mechanisms": [summary(name, run) for name, run in runs.items()],
        "windows": windows(trace, last, len(bundle.chain)),
        "phases": phases(trace, last),
        "events": [event._asdict() for event in last.events],
        "versions": cli.versions(),
        "seed": arguments.seed,
        "date": datetime.now(UTC).date().isoformat(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    cli.write_result(arguments.out / "adaptation.json", result)
    adaptation_figure.draw(result, arguments.out / "adaptation.svg")
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)
        print(f"written: {arguments.out / 'adaptation.json'}, {arguments.out / 'adaptation.svg'}")


def parser() -> cli.Parser:
    """Return what the command line may say."""
    p = cli.parser("Replay a trace through a bundle that adapts to it.", EXAMPLE)
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="folder written by train.caches")
    p.add_argument("--trace", type=Path, required=True, metavar="FILE", help="written by benchmarks.traces")
    p.add_argument("--epsilon", type=cli.share, metavar="E", help="to promise (default: as certified)")
    p.add_argument("--delta", type=cli.share, default=0.05, metavar="D", help="risk of it (default: 0.05)")
    p.add_argument("--without", nargs="+", choices=LAYERS, default=[], metavar="LAYER", help=", ".join(LAYERS))
    p.add_argument("--share", type=cli.share, default=0.1, metavar="S", help="of the time, for trials and refits")
    p.add_argument("--one", action="store_true", help="everything at once alone, not mechanism by mechanism")
    p.add_argument("--seed", type=int, default=0)
    return p


def chosen(arguments: Any, epsilon: float) -> list[Named]:  # noqa: ANN401 (a namespace)
    """Return the sets of mechanisms, each with one more than the one before."""
    on = [layer for layer in LAYERS if layer not in arguments.without]

    def controller(*layers: str) -> ControllerConfig:
        return ControllerConfig(
            monitor=MonitorConfig(epsilon=epsilon, delta=arguments.delta),
            exact=ExactCacheConfig() if "exact" in layers else None,
            nearest=NearestCacheConfig() if "nearest" in layers else None,
            seed=arguments.seed,
        )

    trial = TrialConfig(epsilon=epsilon, delta=arguments.delta)
    whole = Mechanisms(
        controller=controller(*on), recovery=RecoveryConfig(trial=trial, refit="refit" in on), share=arguments.share
    )
    every = Named("everything", site_0=True, mechanisms=whole)
    if arguments.one:
        return [every]

    def watched(*layers: str) -> Mechanisms:
        certified = RecoveryConfig(trial=trial, refit=False)
        return Mechanisms(controller=controller(*layers), recovery=certified, share=arguments.share)

    table = [
        Named("static caches behind the first block", site_0=False, mechanisms=Mechanisms(controller=None)),
        Named("+ site 0", site_0=True, mechanisms=Mechanisms(controller=None)),
        Named("+ monitor and trials", site_0=True, mechanisms=watched()),
    ]
    if "nearest" in on:
        table.append(Named("+ nearest cache", site_0=True, mechanisms=watched("nearest")))
    if "refit" in on:
        refit = dataclasses.replace(whole, controller=controller(*(layer for layer in on if layer != "exact")))
        table.append(Named("+ refitted heads", site_0=True, mechanisms=refit))
    if "exact" in on:
        table.append(Named("+ exact cache", site_0=True, mechanisms=whole))
    return table


def without_site_0(bundle: gati_jax.Bundle) -> gati_jax.Bundle:
    """Return the bundle with what its default plan has at the input switched off."""
    path = bundle.plan.path.copy()
    path[:, [i for i, site in enumerate(bundle.plan.sites) if site == 0]] = np.inf
    return dataclasses.replace(bundle, plan=dataclasses.replace(bundle.plan, path=path))


def replayed(
    bundle: gati_jax.Bundle, trace: Trace, named: Named, *, folder: Path, replay_cache: ReplayCache, quiet: bool
) -> Replayed:
    """Simulate one set of mechanisms; versions of the last one are what stays in the folder."""
    console = Console(stderr=True)
    with Progress(console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task(named.name, total=len(trace))
        return simulate(
            bundle,
            trace,
            named.mechanisms,
            folder=folder,
            replay_cache=replay_cache,
            progress=lambda done: bar.update(task, completed=done),
        )


def summary(name: str, run: Replayed) -> dict[str, Any]:
    """Return a row of the table."""
    worst = worst_window(run.wrong)
    return {
        "name": name,
        "computation": run.full_ms / float(run.ms.mean()),
        "disagreement": float(run.wrong.mean()),
        "worst_window": worst,
        "shadow_share": float(run.shadow.mean()),
        "controller_ms": run.controller_ms,
        "full_ms": run.full_ms,
        "with_recovery": run.full_ms / (float(run.ms.mean()) + 1e3 * run.recovery_seconds / len(run.ms)),
        "recovery_seconds": run.recovery_seconds,
        "alarms": sum(event.kind == "alarm" for event in run.events),
        "swaps": sum(event.kind == "swap" for event in run.events),
    }


def worst_window(wrong: np.ndarray) -> float:
    """Return the largest share of disagreements in any WINDOW requests in a row."""
    size = min(WINDOW, len(wrong))
    total = np.concatenate([[0], np.cumsum(wrong)])
    return float((total[size:] - total[:-size]).max() / size)


def windows(trace: Trace, run: Replayed, depth: int) -> list[dict[str, Any]]:
    """Return what happened in every WINDOW requests; in fewer, where there are not many windows."""
    found, size = [], min(WINDOW, max(50, len(trace) // 30))
    for start in range(0, len(trace), size):
        rows = slice(start, start + size)
        exits, counts = np.unique(run.exit[rows], return_counts=True)
        upper = run.upper[rows][np.isfinite(run.upper[rows])]
        found.append(
            {
                "start": start,
                "phase": trace.phases[trace.phase[start]],
                "saved_share": 1 - float(run.ms[rows].mean()) / run.full_ms,
                "disagreement": float(run.wrong[rows].mean()),
                "bound": float(upper[-1]) if len(upper) else None,
                "shadow_share": float(run.shadow[rows].mean()),
                "exits": {exit_name(e, depth): int(c) for e, c in zip(exits.tolist(), counts.tolist(), strict=True)},
            }
        )
    return found


def exit_name(exit_: int, depth: int) -> str:
    """Return what an exit is called."""
    return {NEAREST: "nearest", EXACT: "exact", depth: "base"}.get(exit_, f"site {exit_}")


def phases(trace: Trace, run: Replayed) -> list[dict[str, Any]]:
    """Return what happened in every phase of the trace."""
    found = []
    for number, name in enumerate(trace.phases):
        rows = trace.phase == number
        if rows.any():
            computation = run.full_ms / float(run.ms[rows].mean())
            wrong = float(run.wrong[rows].mean())
            found.append({"phase": name, "n": int(rows.sum()), "computation": computation, "disagreement": wrong})
    return found


def show(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    keys = ("computation", "with_recovery", "disagreement", "worst_window", "shadow_share", "alarms", "swaps")
    rows: list[Sequence[Any]] = [
        (
            row["name"],
            *(f"{row[key]:.2f}x" for key in keys[:2]),
            *(f"{row[key]:.2%}" for key in keys[2:5]),
            row["alarms"],
            row["swaps"],
        )
        for row in result["mechanisms"]
    ]
    title = f"{result['trace']['file']}: computation saved, at a promise of {result['epsilon']:.1%}"
    cli.show(title, ("mechanisms", *keys), rows)
    by_phase = [(p["phase"], p["n"], f"{p['computation']:.2f}x", f"{p['disagreement']:.2%}") for p in result["phases"]]
    cli.show("With everything, phase by phase", ("phase", "requests", "computation", "disagreement"), by_phase)
    for event in result["events"]:
        print(f"{event['number']:>8} {event['kind']:<10} {event['text']}")


if __name__ == "__main__":
    cli.run(main)
