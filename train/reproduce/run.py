"""Reproduce the papers' experiment, from exploration to the comparison of policies: DIR/reproduction.json.

Plans are composed on ``select`` and certified on ``certify``. On ``test`` only one thing is chosen, the step of the
figure "read off test", because the papers read theirs off such curves. Costs are measured: every policy is timed up to
each of its exits, all of them taking turns, under one tuning.
"""

import logging
import time
from collections.abc import Iterable, Mapping

import numpy as np

import gati_jax
from gati_jax import Certificate, Chain, InputError, Ledger, ReplayTable, data
from gati_jax.certification import AnyLedger, count_duplicates, find_ledger

from .. import cli, zoo
from ..caches import base_saw_certify, check_open, composition_entry, load_parts, read_base, small_networks
from ..config import Config
from ..exploration import Explored, explore
from . import results
from .evaluation import BASE, OpenCaches, count_exits, evaluate, exit_times, measure_latency
from .figures import draw
from .policies import (
    PlannedPolicy,
    accuracy,
    last_step_on_test,
    logits_of,
    oracle_exits,
    plan_policies,
    step_at_accuracy,
)

EXAMPLE = (
    "python -m train.reproduce --config configs/repro_resnet18.toml --out runs/repro18"
    " --data.dir ../shared/data/tfds --base.weights ../shared/data/weights/resnet18-cifar10.safetensors"
)
ACCURACY_SHARE = 0.97  # the paper's operating point
LARGEST_DISAGREEMENT = 0.10  # of the plans for it: where their paths end
DEFAULT = "default plan"
ROUNDS = 25  # of the times of every exit
_log = logging.getLogger("train.reproduce")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    p = cli.config_parser(Config, "Reproduce the papers' experiment.", EXAMPLE, looks=True)
    arguments, config = cli.parse(p, Config, argv)

    # --- Data and base ----------------------------------------------------------------------------------------------
    config = zoo.completed(config)
    # Exits of many policies are compared in XLA's programs, one request at a time.
    config = config.model_copy(update={"plan": config.plan.model_copy(update={"backend": "xla", "batch": 1})})
    splits = config.data.splits.model_dump()
    data.check_disjoint(splits)
    chain = read_base(config.base)
    parts = load_parts(config.data, splits, chain)
    data.check_no_groups({name: part.groups for name, part in parts.items()})
    if any(part.labels is None for part in parts.values()):
        raise InputError(f"data: expected labels, for accuracies are compared, got none in {config.data.name}")
    # Refused before hours of fitting.
    rows = data.row_digests(parts["certify"].images)
    count_duplicates(rows, drawn=config.plan.repeats)
    check_open(arguments.ledger, rows, arguments.out)

    # --- Exploration ------------------------------------------------------------------------------------------------
    heads = [*(head.build() for head in config.fit.heads), *small_networks(config, chain)]
    started = time.perf_counter()
    found = explore(config, chain, heads, parts, arguments.out)
    _log.info("explored %d candidates in %.0f s", len(found.candidates), time.perf_counter() - started)
    tables = {"select": found.select} | {
        name: gati_jax.replay(chain, found.candidates, parts[name].images, labels=parts[name].labels)
        for name in ("certify", "test")
    }

    # --- Comparison -------------------------------------------------------------------------------------------------
    images = {name: np.asarray(part.images) for name, part in parts.items()}
    result = results.Reproduction(
        **results.describe_run(config.data.name, config.base.network, splits),
        base=results.BaseResult(accuracy=accuracy(tables["test"].answers, tables["test"])),
        explored=results.Exploration(
            epochs=found.candidates.epochs,
            ranking=tuple(results.Ranked(**row) for row in found.ranking(config.plan.epsilon)),
            dropped=found.dropped,
        ),
        **dict(compare(config, chain, found, tables, images, arguments.ledger)),
    )
    path, drawings = arguments.out / "reproduction.json", arguments.out / "figures"
    draw(result, drawings)
    result.write(path, print_json=arguments.json)
    if not arguments.json:
        found.show(f"{config.base.network} on {config.data.name}: candidates", config.plan.epsilon)
        show(result)
        print(f"written: {path}, {drawings}")


def compare(
    config: Config,
    chain: Chain,
    found: Explored,
    tables: Mapping[str, ReplayTable],
    images: Mapping[str, np.ndarray],
    ledger: AnyLedger,
) -> results.Comparison:
    """Compose, certify and time the default plan and every policy; ``ledger`` is as for ``certify_each``."""
    epsilon, delta = config.plan.epsilon, config.plan.delta

    # --- Plans ------------------------------------------------------------------------------------------------------
    plan, composition = found.plan(config, epsilon)
    loose, _ = found.plan(config, LARGEST_DISAGREEMENT)
    logits = logits_of(chain, found.candidates, {name: images[name] for name in tables})
    planned = {
        group: [
            PlannedPolicy(
                name=DEFAULT,
                heads="composed",
                plan=default,
                tables={name: table.take(default.names) for name, table in tables.items()},
            ),
            *plan_policies(found.candidates, tables, logits, found.costs, default_sites=default.sites, epsilon=largest),
        ]
        for group, default, largest in (("certified", plan, epsilon), ("accurate", loose, LARGEST_DISAGREEMENT))
    }

    # --- Steps ------------------------------------------------------------------------------------------------------
    certificates = certify_each(planned["certified"], config, ledger)
    if counted := find_ledger(ledger):  # as ``train.evaluate`` does: the results show what all plans do there
        counted.reveal(tables["test"].rows, {DEFAULT: (plan, epsilon)}, delta)
    steps = {
        "certified": [certificates[one.name].step for one in planned["certified"]],
        "accurate": [step_at_accuracy(one, ACCURACY_SHARE) for one in planned["accurate"]],
    }
    chosen = {
        group: [(one, OpenCaches.of(one.plan, step)) for one, step in zip(policies, steps[group], strict=True)]
        for group, policies in planned.items()
    }
    read_off_test = OpenCaches.of(loose, last_step_on_test(planned["accurate"][0], ACCURACY_SHARE))

    # --- Results ----------------------------------------------------------------------------------------------------
    ways = {f"{group} {one.name}": on.names for group, policies in chosen.items() for one, on in policies}
    ms = exit_times(chain, found.candidates, {BASE: (), **ways}, found.tuning.tiles[-1], images["test"][0], ROUNDS)
    oracle = oracle_exits(tables["test"])
    return results.Comparison(
        epsilon=epsilon,
        delta=delta,
        looks=certificates[DEFAULT].looks,
        composition=composition_entry(composition),
        candidates=len(found.candidates),
        oracle=results.OracleResult(
            **dict(count_exits(oracle, found)), half_share=float((oracle <= len(chain) / 2).mean())
        ),
        certified=results.OperatingPoint(
            rows=evaluate(chosen["certified"], ms, "certified", found),
            disagreements={name: (one.disagreements, one.n) for name, one in certificates.items()},
            certificates={name: results.PolicyCertificate.model_validate(one) for name, one in certificates.items()},
        ),
        accurate=results.OperatingPoint(rows=evaluate(chosen["accurate"], ms, "accurate", found)),
        measured=results.Latencies(
            certified=measure_latency(chain, found, chosen["certified"][0][1], images["test"]),
            accurate=measure_latency(chain, found, chosen["accurate"][0][1], images["test"]),
            read_off_test=measure_latency(chain, found, read_off_test, images["test"]),
        ),
    )


def certify_each(policies: Iterable[PlannedPolicy], config: Config, ledger: AnyLedger) -> dict[str, Certificate]:
    """Certify every policy's plan as a user of it alone would do, in a ledger of its own.

    Of all these certificates only the default plan's is valid, because it was fixed beforehand. ``ledger`` counts its
    look, which closes the rows, for the results show what they say of every policy.
    """
    saw = base_saw_certify(config)
    return {
        one.name: gati_jax.certify(
            one.plan, one.tables["certify"], config.plan.epsilon, config.plan.delta,
            ledger=ledger if one.name == DEFAULT else Ledger(), reveal=True, base_saw_data=saw,
            duplicates=True,  # main has checked them
        )
        for one in policies
    }  # fmt: skip


def show(result: results.Reproduction) -> None:
    """Print the comparison."""
    columns = ("policy", "heads", "ms", "gain", "slower by ms", "saved", "disagree", "of base's accuracy")
    for title, group in (
        (f"Certified at {result.epsilon:.1%} disagreement", result.certified),
        (f"At {ACCURACY_SHARE:.0%} of the base's accuracy (chosen on certify by one standard error)", result.accurate),
    ):
        rows = [
            (
                row.policy,
                row.heads,
                f"{row.mean_ms:.3f}",
                f"{row.full_ms / row.mean_ms:.2f}",
                f"{row.slower_by.mean_ms:.3f} [{row.slower_by.low_ms:.3f}, {row.slower_by.high_ms:.3f}]",
                f"{row.saved_share:.1%}",
                f"{row.disagreement:.2%}",
                f"{row.accuracy / result.base.accuracy:.2%}",
            )
            for row in group.rows
        ]
        cli.show(title, columns, rows)
    oracle = result.oracle
    print(f"oracle: saves {oracle.saved_share:.1%}; {oracle.half_share:.2%} could save half of the blocks")
    for name, one in result.measured:
        times = f"{one.full_ms:.2f} -> {one.cascade_ms:.2f} ms on {one.requests} requests, spread {one.spread:.0%}"
        memory = f"caches take {one.memory_share:.1%} of the base's bytes"
        print(f"{name.replace('_', ' ')}: measured {one.speedup:.2f} ({times}); {memory}")
