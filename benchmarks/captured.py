"""What of a cascade's programs a GPU runs without its host: the operations that XLA captures as CUDA graphs.

Every driver's program is compiled for one request and for a batch, and XLA's own list of what it will launch is read.
What is not captured is launched by the host one by one, and a loop or branch outside of a graph stops for a
synchronisation at every decision. No GPU is needed where the CUDA plugin is installed: ``--target`` is a description
of one, such as xla/backends/gpu/target_config/specs/h200.txtpb among XLA's sources. Without either, programs are only
lowered for CUDA. Weights and caches are made up.
"""

import argparse
import json
import logging
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from gati_jax import Candidate, InputError
from gati_jax.caches import GlobalAverage, SortedSelector
from gati_jax.files import write_atomically
from gati_jax.models import NAMES, architecture, fold, init, to_chain
from gati_jax.profiling.bfloat16 import cascade_in_bfloat16
from gati_jax.profiling.compiler import BRANCHES, DRIVERS, LOOPS, ROUNDED, known_options
from gati_jax.runtime import Cascade, CompilerOptions, compiled
from gati_jax.runtime.batched import BatchedCascade, Schedule, answer_tiled
from gati_jax.runtime.branches import answer_nested, answer_one_nested
from gati_jax.runtime.cascade import answer_only
from train import cli

EXAMPLE = "python -m benchmarks.captured --target h200.txtpb --out captured.json"
LISTED = "*thunk_sequence_after_thunk_passes.txt"
THUNK = re.compile(r"^( *)\d+: (k\w+)")
GRAPH, DECISIONS = "kCommandBuffer", ("kWhile", "kConditional")
BEFORE: CompilerOptions = ((BRANCHES[0][0], "FUSION,CUBLAS,CUDNN,CONDITIONAL,WHILE"),)
"""Without convolutions."""
_log = logging.getLogger("benchmarks.captured")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False)
    p.add_argument("--network", choices=NAMES, default="resnet18", help="(default: resnet18)")
    p.add_argument("--input", type=cli.positive, nargs=3, default=(32, 32, 3), metavar="N", help="(default: 32 32 3)")
    p.add_argument("--batch", type=cli.positive, default=64, metavar="N", help="(default: 64)")
    p.add_argument("--target", type=Path, metavar="FILE", help="a GPU's description; by default the GPU that is here")
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    arguments = p.parse_args(argv)
    cli.report(survey(arguments), show, out=arguments.out, as_json=arguments.json)


def survey(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compile every program and read what was captured."""
    place, device = _place(arguments.target)
    exact = made_up(arguments.network, tuple(arguments.input))
    rows: list[dict[str, Any]] = []
    result = {"network": arguments.network, "batch": arguments.batch, "device": device, "jax": jax.__version__}
    for dtype, cascade, more in (("float32", exact, ()), ("bfloat16", cascade_in_bfloat16(exact), ROUNDED)):
        for name, function, inputs in programs(cascade, arguments.batch):
            for options in ((), BEFORE, BRANCHES, LOOPS):
                if not wanted(name, dtype, options):
                    continue
                began, known = time.monotonic(), known_options(options, jax.default_backend())
                found = launches(function, jax.tree.map(place, inputs), (*known, *more))
                row = {"program": name, "dtype": dtype, "options": dict(known).get(BRANCHES[0][0], ""), **found}
                rows.append(row | {"seconds": round(time.monotonic() - began, 1)})
                _log.info("%s", rows[-1])
                if arguments.out:
                    write_atomically(arguments.out, json.dumps(result | {"rows": rows}, indent=2).encode())
    return result | {"rows": rows}


def wanted(program: str, dtype: str, options: CompilerOptions) -> bool:
    """Whether a driver is run with these options, or is to be compared in float32."""
    return (options in {(), BEFORE} and dtype == "float32") or (program.partition(" ")[0], options) in DRIVERS["gpu"]


def made_up(network: str, input_shape: tuple[int, int, int]) -> Cascade:
    """Return a cascade with a cache behind the first quarter, half and three quarters of the blocks."""
    built = architecture(network, classes=10, input_shape=input_shape)
    params = jax.tree.map(jnp.asarray, fold(init(built, jax.random.key(0))))
    chain = to_chain(built, params)
    caches = []
    for site in sorted({max(1, len(chain) * i // 4) for i in (1, 2, 3)}):
        predictor, selector = GlobalAverage(10, hidden=64, standardize=False), SortedSelector()
        activation = jnp.zeros((1, *chain.site_specs[site].shape))
        variables = {
            "predictor": predictor.init(jax.random.key(site), activation),
            "selector": selector.init(jax.random.key(0), jnp.zeros((1, 10))),
        }
        caches.append(Candidate(f"gap@{site}", site, predictor, selector, variables))
    return Cascade(chain, tuple(caches), jnp.zeros(len(caches)))


def programs(cascade: Cascade, batch: int) -> list[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Return names, functions and inputs of the programs for one request and for a batch."""
    images = np.zeros((batch, *cascade.chain.input_spec.shape), np.float32)
    tiles = Schedule.of({size: 1 + size / batch for size in {max(1, batch // 4), batch}})
    return [
        ("loop 1", answer_only, (cascade.packed, images[:1])),
        ("nest 1", answer_one_nested, (cascade.packed, images[:1])),
        (f"loop {batch}", answer_tiled, (BatchedCascade.of(cascade, tiles).packed, images, np.int32(batch))),
        (f"nest {batch}", answer_nested, (cascade.packed, images, np.int32(batch))),
    ]


def launches(function: Callable[..., Any], inputs: tuple[Any, ...], options: CompilerOptions) -> dict[str, Any]:
    """Return how many operations of each kind are captured in graphs, and how many are not."""
    with tempfile.TemporaryDirectory() as folder:
        traced = compiled(function, (*options, ("xla_dump_to", folder))).trace(*inputs)
        elsewhere = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(inputs))
        here = jax.default_backend() == "gpu"
        lowered = traced.lower(lowering_platforms=None if here else ("cuda",))
        if not (here or elsewhere):
            return {"captured": None, "outside": None}  # no compiler for a GPU
        lowered.compile()
        files = sorted(Path(folder).glob(LISTED))
        if not files:
            raise InputError(f"--target: expected a compiler that lists what it launches ({LISTED}), got none of that")
        captured, outside = count_thunks(files[-1].read_text(encoding="utf-8"))
    return {"captured": dict(captured), "outside": dict(outside)}


def count_thunks(text: str) -> tuple[Counter[str], Counter[str]]:
    """Count the operations inside and outside of graphs by kind, in XLA's list: what is indented further is inside."""
    captured, outside = Counter[str](), Counter[str]()
    graph: int | None = None
    for line in text.splitlines():
        if not (found := THUNK.match(line)):
            continue
        indent, kind = len(found[1]), found[2]
        if graph is not None and indent <= graph:
            graph = None
        (outside if graph is None else captured)[kind] += 1
        if kind == GRAPH and graph is None:
            graph = indent
    return captured, outside


def _place(target: Path | None) -> tuple[Callable[[Any], Any], str]:
    """Return what puts an argument onto the device that is compiled for, and the device's name."""
    if target is None:
        return lambda x: x, jax.devices()[0].device_kind
    try:
        text = target.read_text(encoding="utf-8")
        topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1")
    except (OSError, jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"--target: expected a GPU's description and jax[cuda13], got {error}") from error
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    return lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding), topology.devices[0].device_kind


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    columns = ("program", "dtype", "captured types", "graphs", "captured", "outside", "decisions by the host")
    rows = []
    for row in result["rows"]:
        if row["captured"] is None:
            rows.append((row["program"], row["dtype"], row["options"] or "default", "-", "-", "-", "-"))
            continue
        outside = Counter(row["outside"])
        graphs, host = outside.pop(GRAPH, 0), sum(outside[kind] for kind in DECISIONS)
        counts = (str(graphs), str(sum(row["captured"].values())), str(outside.total()), str(host))
        rows.append((row["program"], row["dtype"], row["options"] or "default", *counts))
    cli.show(f"captured on {result['device']}, jax {result['jax']}", columns, rows)


if __name__ == "__main__":
    cli.run(main)
