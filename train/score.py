"""Score images in bulk with a bundle: DIR/part-....parquet, and DIR/score.json when all are there.

A part is written as a whole and holds fixed rows, so a run that was killed goes on with the parts that are missing, and
every row is scored once. Each part says in its metadata which scoring it belongs to.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from rich.progress import Progress
from scipy.special import softmax

import gati_jax
from gati_jax import Bundle, InputError, data
from gati_jax.data import Reading
from gati_jax.evaluation.run import show_rows
from gati_jax.files import digests, lock_file, write_atomically
from gati_jax.fitting.loop import progress_bar
from gati_jax.options import Count, Strict
from gati_jax.runtime import Prediction

from . import cli
from .config import build_config, load
from .evaluate import fitted_on
from .results import Record
from .source import Data, DatasetName, Source, Splits

EXAMPLE = "python -m train.score --bundle runs/r56/bundle --out runs/r56/scores --data.split test"
BATCH = 250  # rows answered at once, as ``gati_jax.evaluate`` does
_KEY = b"gati_jax.scoring"
_LOG_SECONDS = 30.0
_log = logging.getLogger("train.score")


class Scored(Reading):
    """What is scored."""

    name: DatasetName | None = Field(
        default=None, description="as in a config; unset: the data that the bundle was fitted on"
    )
    dir: Path | None = Field(default=None, description="folder or file of the data")
    split: str = Field(
        default="test", description="rows such as train[:5000] or all; of the bundle's data also the name of its split"
    )


class Settings(Strict):
    """What is written."""

    data: Scored = Scored()
    plan: str | None = Field(default=None, description="of the bundle's plans; unset: its default")
    top: Count | None = Field(default=None, description="only so many classes a row, the likeliest first; unset: all")
    rows: Annotated[int, Field(ge=1, le=1_000_000)] = Field(default=10_000, description="in a part, in steps of 250")


class Scores(Record):
    """score.json: what was scored, and what came of it."""

    data: str
    split: str
    n: int
    parts: int
    accuracy: float | None  # None without labels
    exits: dict[int, int]  # rows by the site where they left; the largest is the base
    seconds: float | None  # of this run
    rows_per_second: float | None  # None where nothing was left to score
    date: str
    versions: dict[str, str]


class Part(NamedTuple):
    """A file and its rows."""

    path: Path
    rows: slice


class Scoring(NamedTuple):
    """What every part has in common; it can be sent to another machine."""

    source: Source
    rows: str
    settings: Settings
    identity: str


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments, overrides = parser().parse_known_args(argv)
    settings = load(Settings, None, overrides)
    bundle = cli.read_bundle(arguments)
    source, rows = source_of(bundle, arguments.bundle, settings.data)
    split = source.load(rows, own=True)
    split.check("data", bundle.chain.input_spec.shape, bundle.chain.classes)
    if isinstance(source, Data):  # the bundle's own, whose rows may be those that were certified on
        show_rows(bundle, split.images, arguments.ledger, reveal=arguments.reveal)

    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    with lock_file(out / ".lock"):
        for unfinished in out.glob(".part-*"):  # of a run that was killed
            unfinished.unlink()
        parts = parts_of(out, len(split), settings.rows)
        identity = identity_of(arguments.bundle, source, rows, settings, split)
        scoring = Scoring(source, rows, settings, identity)
        missing = [part for part in parts if not is_done(part, identity, split)]
        began = time.monotonic()
        scored = sum(part.rows.stop - part.rows.start for part in missing)
        with progress_bar(wanted=True) as bar:
            advance = RowProgress(bar, len(split), len(split) - scored)
            if arguments.ray is None:
                with answering(arguments, bundle) as answer:
                    for part in missing:
                        score_part(answer, scoring, split, part, advance)
            elif missing:
                from .ray_data import score_on_ray  # noqa: PLC0415 (the extra ray)

                score_on_ray(arguments, scoring, missing, advance)
        seconds = time.monotonic() - began
        result = summary(parts, source.name, rows, (scored, seconds))
    result.write(out / "score.json", print_json=arguments.json)
    if not arguments.json:
        print(describe(result, out))


class RowProgress:
    """Moves a bar, and writes a line every half a minute: a log has no bar.

    Args:
        bar: Where a line moves, on a terminal.
        total: Rows.
        done: Of them, those that an earlier run has scored.
    """

    def __init__(self, bar: Progress, total: int, done: int) -> None:
        """Start the clock."""
        self._bar, self._task = bar, bar.add_task("scoring", total=total, completed=done)
        self._total, self._done, self._before = total, done, done
        self._began = self._said = time.monotonic()

    def __call__(self, n: int) -> None:
        """Count rows that have been scored."""
        self._bar.advance(self._task, n)
        self._done, now = self._done + n, time.monotonic()
        if now - self._said >= _LOG_SECONDS:
            rate = (self._done - self._before) / (now - self._began)
            left = (self._total - self._done) / rate / 60
            _log.info("%d of %d rows, %.0f a second, %.1f minutes left", self._done, self._total, rate, left)
            self._said = now


def parser() -> cli.Parser:
    """Return the command line's parser."""
    p = cli.parser("Score images in bulk: classes, probabilities and exits as Parquet. Run it again to go on.", EXAMPLE)
    cli.add_bundle(p)
    cli.add_looks(p)
    where = "score on the machines of a Ray cluster, by its address; without one, in a cluster of this machine alone"
    p.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS", help=where)
    cli.add_keys(p, Settings, "options")
    return p


def source_of(bundle: Bundle, path: Path, scored: Scored) -> tuple[Source, str]:
    """Return the source to score, and its rows.

    Raises:
        InputError: No data are named, and the bundle does not say what it was fitted on.
    """
    known = bundle.provenance.config
    if scored.name is not None and not (known and build_config(known).data.name == scored.name):
        given = scored.model_dump(exclude={"split"}, exclude_unset=True)
        return Source(base_trained_on=(), **given), scored.split
    config = fitted_on(bundle, path, scored.name)
    given = {name: getattr(scored, name) for name in scored.model_fields_set - {"name", "split"}}
    rows = getattr(config.data.splits, scored.split) if scored.split in Splits.model_fields else scored.split
    return config.data.model_copy(update=given), rows


def parts_of(out: Path, n: int, rows: int) -> list[Part]:
    """Return the files of ``n`` rows: each but the last has as many, in whole batches."""
    step = -(-rows // BATCH) * BATCH
    starts = range(0, n, step)
    names = [f"part-{i:05d}-of-{len(starts):05d}.parquet" for i in range(len(starts))]
    return [Part(out / name, slice(i, min(i + step, n))) for name, i in zip(names, starts, strict=True)]


def identity_of(path: Path, source: Source, rows: str, settings: Settings, split: data.Dataset) -> str:
    """Return a digest of all that decides on what is written, but for the images."""
    where = source.model_dump(mode="json", exclude={"base_trained_on", "splits"})
    options = settings.model_dump(mode="json", exclude={"data"})
    about = [digests(path), where, rows, options, len(split), split.labels is not None]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def is_done(part: Part, identity: str, split: data.Dataset) -> bool:
    """Return whether a part has been written.

    Raises:
        InputError: It belongs to another scoring, or its rows have changed since.
    """
    if strange := next((file for file in part.path.parent.glob("part-*") if not _belongs(file, part.path)), None):
        raise InputError(f"--out: expected the parts of this scoring, or none, got {strange}")
    if not part.path.exists():
        return False
    try:
        about = json.loads((pq.read_schema(part.path).metadata or {})[_KEY])
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise InputError(f"--out: expected a part of a scoring, got {part.path}") from error
    if about["identity"] != identity:
        raise InputError(f"--out: expected parts of the same bundle, data and options, got others in {part.path}")
    if about["rows"] != digest_of(split, part.rows, data.row_digests(data.take(split.images, part.rows))):
        raise InputError(f"data: expected the rows that were scored into {part.path}, got others")
    return True


def _belongs(file: Path, part: Path) -> bool:
    return file.name.partition("-of-")[2] == part.name.partition("-of-")[2]


def digest_of(split: data.Dataset, rows: slice, images: np.ndarray) -> str:
    """Return a digest of some rows, from those of their images: all that a part has of the data."""
    columns = [np.asarray(column[rows]).tolist() for column in (split.labels, split.ids) if column is not None]
    return hashlib.sha256(json.dumps([data.fingerprint(images), *columns]).encode()).hexdigest()


Answer = Callable[[np.ndarray, str | None], Future[Prediction]]
"""Answers a batch by a plan, on whichever device is free first."""


@contextlib.contextmanager
def answering(arguments: argparse.Namespace, bundle: Bundle) -> Generator[Answer]:
    """Load a bundle onto every other device of this machine, too; each answers a batch at a time."""
    first, *others = jax.local_devices()
    free: queue.SimpleQueue[tuple[Any, Bundle]] = queue.SimpleQueue()
    free.put((first, bundle))
    for device in others:
        with jax.default_device(device):
            free.put((device, cli.read_bundle(arguments)))

    def answer(images: np.ndarray, plan: str | None) -> Prediction:
        device, own = free.get()
        try:
            with jax.default_device(device):
                return jax.device_get(gati_jax.infer_batch(own, images, plan=plan))
        finally:
            free.put((device, own))

    with ThreadPoolExecutor(free.qsize(), "answering") as pool:
        yield lambda images, plan: pool.submit(answer, images, plan)


def score_part(
    answer: Answer, scoring: Scoring, split: data.Dataset, part: Part, advance: Callable[[int], None]
) -> None:
    """Answer the rows of a part as requests are by default, and write it."""
    order = (np.arange(i, min(i + BATCH, part.rows.stop)) for i in range(part.rows.start, part.rows.stop, BATCH))
    waiting: deque[Future[Prediction]] = deque()
    chunks, digests = [], []

    def finish(most: int) -> None:
        while len(waiting) > most:
            chunks.append(waiting.popleft().result())
            advance(len(chunks[-1].class_index))

    for (batch,) in data.read_batches([split.images], order):
        waiting.append(answer(batch, scoring.settings.plan))
        digests.append(data.row_digests(batch))
        finish(2 * len(jax.local_devices()))  # the next one of each device has been read
    finish(0)
    found = Prediction(*(np.concatenate(columns) for columns in zip(*chunks, strict=True)))
    table = table_of(found, part.rows, split, scoring.settings.top)
    write_part(
        part, table, {"identity": scoring.identity, "rows": digest_of(split, part.rows, np.concatenate(digests))}
    )


def table_of(found: Prediction, rows: slice, split: data.Dataset, top: int | None) -> pa.Table:
    """Return rows as they are written; the score of an answer of the base is null."""
    ids = np.arange(rows.start, rows.stop) if split.ids is None else split.ids[rows]
    scores, probabilities = np.asarray(found.score), softmax(np.asarray(found.logits), axis=1)
    columns: dict[str, Any] = {
        "id": pa.array(ids),
        "class": pa.array(np.asarray(found.class_index, np.int32)),
        "exit": pa.array(np.asarray(found.exit, np.int32)),
        "score": pa.array(scores, mask=~np.isfinite(scores)),
    }
    if split.labels is not None:
        columns["label"] = pa.array(split.labels[rows])
    if top is not None:
        likeliest = np.argsort(-probabilities, axis=1, kind="stable")[:, :top].astype(np.int32)
        columns["top_classes"] = _lists(likeliest)
        probabilities = np.take_along_axis(probabilities, likeliest, 1)
    columns["probabilities"] = _lists(probabilities)
    return pa.table(columns)


def _lists(rows: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def write_part(part: Part, table: pa.Table, about: Mapping[str, str]) -> None:
    """Write a part as a whole, with what it belongs to in its metadata."""
    content = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_KEY: json.dumps(about).encode()}), content)
    write_atomically(part.path, content.getvalue())


def summary(parts: list[Part], name: str, split: str, speed: tuple[int, float]) -> Scores:
    """Return what all parts hold, as they are on disk; ``speed`` is of this run: rows and seconds."""
    known = [one for one in ("class", "exit", "label") if one in pq.read_schema(parts[0].path).names]
    table = pa.concat_tables(pq.read_table(part.path, columns=known) for part in parts)
    columns = {one: table[one].to_numpy() for one in known}
    sites, hits = np.unique(columns["exit"], return_counts=True)
    right = columns["class"] == columns["label"] if "label" in columns else None
    scored, seconds = speed
    return Scores(
        data=name,
        split=split,
        n=len(table),
        parts=len(parts),
        accuracy=None if right is None else float(np.mean(right)),
        exits=dict(zip(sites.tolist(), hits.tolist(), strict=True)),
        seconds=seconds if scored else None,
        rows_per_second=scored / seconds if scored else None,
        date=datetime.now(UTC).date().isoformat(),
        versions=cli.versions(),
    )


def describe(result: Scores, out: Path) -> str:
    """Return what was scored in a few lines."""
    accuracy = "" if result.accuracy is None else f", accuracy {result.accuracy:.4f}"
    speed = f" ({result.rows_per_second:,.0f} rows/s)" if result.rows_per_second else " (all were there)"
    exits = ", ".join(f"{site}: {hits}" for site, hits in result.exits.items())
    return f"{result.n} rows of {result.data} {result.split}{accuracy}{speed}\nexits: {exits}\nwritten: {out}"


if __name__ == "__main__":
    cli.run(main)
