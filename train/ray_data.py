"""Parts of a scoring on the machines of a Ray cluster, by Ray Data; needs the extra ``ray``.

A worker on each machine, or on each GPU, has the bundle and the data, and writes whole parts into the folder that all
machines share. A worker that dies is replaced, and what it was about is done again: a part is there once or not at all.
"""

import argparse
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gati_jax import InputError

from . import cli
from .score import Part, Scoring, answering, score_part

try:
    import ray
    import ray.data
except ImportError as error:
    raise InputError("--ray: expected Ray to be installed, see: pip install 'gati-jax[train,ray]'") from error

_REACHED = 5.0  # seconds


class Worker:
    """Scores parts, with the bundle and the data at hand."""

    def __init__(self, arguments: argparse.Namespace, scoring: Scoring) -> None:
        """Load both."""
        self._scoring, self._split = scoring, scoring.source.load(scoring.rows, own=True)
        self._stack = contextlib.ExitStack()
        self._answer = self._stack.enter_context(answering(arguments, cli.read_bundle(arguments)))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score one part."""
        part = Part(Path(row["path"]), slice(row["start"], row["stop"]))
        score_part(self._answer, self._scoring, self._split, part, lambda _: None)
        return {"rows": row["stop"] - row["start"]}


def score_on_ray(
    arguments: argparse.Namespace, scoring: Scoring, parts: list[Part], advance: Callable[[int], None]
) -> None:
    """Score parts on a cluster, which must reach the bundle, the data and ``--out`` by the same paths.

    Raises:
        InputError: There is no such cluster.
    """
    start(arguments.ray)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # ours counts rows
        rows = [{"path": str(p.path.absolute()), "start": p.rows.start, "stop": p.rows.stop} for p in parts]
        workers, resources = _workers()
        given = argparse.Namespace(bundle=arguments.bundle.absolute(), chain=arguments.chain)
        worker: Any = Worker  # Ray's types know functions alone
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            worker, fn_constructor_args=(given, scoring), concurrency=min(workers, len(rows)), **resources
        )
        for one in done.iter_rows():
            advance(one["rows"])
    finally:
        ray.shutdown()


def start(address: str) -> None:
    """Join a cluster, or start one of this machine alone (``local``), without reports of its use to others.

    Raises:
        InputError: There is none at this address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "//" not in host:  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=_REACHED).close()
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, OverflowError, ValueError) as error:
        raise InputError(f"--ray: expected the address of a Ray cluster, got {address}: {error}") from error


def _workers() -> tuple[int, dict[str, Any]]:
    """Return how many workers there are, and what each takes: a GPU, or the processor of a machine."""
    if gpus := int(ray.cluster_resources().get("GPU", 0)):
        return gpus, {"num_gpus": 1}
    machines = [node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"]]
    return len(machines), {"num_cpus": min(machines)}
