"""Make a workload to adapt to, from a seed, and record it in the format of gati_jax/adaptation/trace.py.

    independent   every request another picture
    zipf          5,000 pictures, popular by Zipf's law: exact repeats
    classes       the mix of classes drifts to three of them, stays there, and comes back
    brightness, blur, noise
                  pictures as in "independent"; the corruption sets in by degrees, 1 to 5, stays, and goes away
    video         four cameras at once, each at its own rate, every frame once

Pictures are test images that no fit, plan or certificate has seen, shifted by up to 2 pixels and perhaps mirrored, so
that one row makes 50; those of "zipf" are the rows themselves. A drift begins after a quarter of the requests and has
gone after two thirds.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int16, Int32, UInt8

from benchmarks import arrivals
from gati_jax import InputError, data
from gati_jax.adaptation import Trace, save_trace
from train import cli

from .corruptions import CORRUPTIONS, MOST_SEVERE

EXAMPLE = "python -m benchmarks.traces --kind blur --requests 60000 --data ../shared/data --out runs/blur.safetensors"
KINDS = ("independent", "zipf", "classes", *CORRUPTIONS, "video")
ARRIVALS = ("steady", "poisson", "bursty", "diurnal")
UNSEEN = "test[5000:]"
SHIFT = 2  # pixels, either way
VARIANTS = 2 * (2 * SHIFT + 1) ** 2  # pictures of one row
FEW_CLASSES = 3  # that the mix drifts to
CLIPS = ("big_buck_bunny_scene", "big_buck_bunny_trailer", "city_cc0", "tree")
QUIET, STAYS, GONE = 1 / 4, 5 / 12, 2 / 3  # of the requests, when: the drift begins, is complete, has gone
STARTS_TO_GO = 7 / 12

Images = UInt8[np.ndarray, "items h w c"]


class Content(NamedTuple):
    """What is asked for, but for when."""

    images: Images
    item: Int[np.ndarray, " n"]
    phase: Int[np.ndarray, " n"]
    phases: tuple[str, ...] = ("quiet",)


def pictures(rows: Images, codes: Int[np.ndarray, " n"]) -> Images:
    """Return shifted and mirrored rows; code r * VARIANTS + v is variant v of row r, edges are repeated."""
    row, variant = np.divmod(codes, VARIANTS)
    place, mirrored = np.divmod(variant, 2)
    down, right = np.divmod(place, 2 * SHIFT + 1)
    height, width = rows.shape[1:3]
    padded = np.pad(rows, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), "edge")
    x = np.arange(width)
    x = np.where(mirrored[:, None] == 1, x[::-1], x) + right[:, None]
    y = np.arange(height) + down[:, None]
    return padded[row[:, None, None], y[:, :, None], x[:, None, :]]


def independent(rows: Images, n: int, random: np.random.Generator) -> Content:
    """Every request another picture.

    Raises:
        InputError: There are not so many.
    """
    if n > len(rows) * VARIANTS:
        raise InputError(f"--requests: expected at most {len(rows) * VARIANTS}, as there are pictures, got {n}")
    codes = random.choice(len(rows) * VARIANTS, n, replace=False)
    return Content(pictures(rows, codes), np.arange(n), np.zeros(n, np.int64))


def zipf(rows: Images, n: int, random: np.random.Generator, *, exponent: float) -> Content:
    """The r-th most popular row is asked for in proportion to r ** -exponent."""
    weights = np.arange(1, len(rows) + 1) ** -float(exponent)
    ranks = random.choice(len(rows), n, p=weights / weights.sum())
    return Content(rows, random.permutation(len(rows))[ranks], np.zeros(n, np.int64))


def classes(rows: Images, labels: Int[np.ndarray, " rows"], n: int, random: np.random.Generator) -> Content:
    """The mix drifts to a few classes, by and by, stays, and comes back.

    Raises:
        InputError: There are not so many pictures of the few.
    """
    present = np.unique(labels)
    few = random.choice(present, min(FEW_CLASSES, len(present)), replace=False)
    drift = np.interp(np.arange(n) / n, (QUIET, STAYS, STARTS_TO_GO, GONE), (0, 1, 1, 0))
    of = np.where(random.random(n) < drift, random.choice(few, n), random.choice(present, n))
    codes = np.zeros(n, np.int64)
    for label in present:
        mine, asked = np.flatnonzero(labels == label), np.flatnonzero(of == label)
        if len(asked) > len(mine) * VARIANTS:
            found = f"{len(asked)} of {len(mine) * VARIANTS} of class {label}"
            raise InputError(f"--requests: expected no more than there are pictures, got {found}")
        drawn = random.choice(len(mine) * VARIANTS, len(asked), replace=False)
        codes[asked] = mine[drawn // VARIANTS] * VARIANTS + drawn % VARIANTS
    names = ("quiet", "drifts", "few classes", "comes back", "quiet again")
    phase = np.searchsorted(np.array([QUIET, STAYS, STARTS_TO_GO, GONE]), np.arange(n) / n, side="right")
    return Content(pictures(rows, codes), np.arange(n), phase, names)


def corrupted(rows: Images, n: int, random: np.random.Generator, *, kind: str) -> Content:
    """Pictures under a corruption that sets in by degrees, stays at its worst, and goes away twice as fast."""
    content = independent(rows, n, random)
    rise = np.linspace(QUIET, STAYS, MOST_SEVERE)  # of severities 1 .. 5
    fall = np.linspace(STARTS_TO_GO, GONE, MOST_SEVERE)  # of severities 4 .. 0
    phase = np.searchsorted(np.concatenate([rise, fall]), np.arange(n) / n, side="right")
    severities = (0, *range(1, MOST_SEVERE + 1), *range(MOST_SEVERE - 1, -1, -1))
    images = content.images.copy()
    for number, severity in enumerate(severities):
        if severity and (here := phase == number).any():
            images[here] = CORRUPTIONS[kind](images[here], severity, random)
    names = ["quiet", *(f"{kind} {severity}" for severity in severities[1:-1]), "quiet again"]
    return Content(images, content.item, phase, tuple(names))


def video(clips: Sequence[tuple[Images, float]], n: int | None, random: np.random.Generator) -> Trace:
    """Cameras that run at once, each at its own rate; each starts at some moment at which it ends before the longest.

    Args:
        clips: Frames, and frames a second, of each.
        n: The first so many frames; None for all.
        random: Draws when each starts.
    """
    lengths = [len(frames) / fps for frames, fps in clips]
    starts = [random.uniform(0, max(lengths) - length) for length in lengths]
    times = [start + np.arange(len(frames)) / fps for start, (frames, fps) in zip(starts, clips, strict=True)]
    seconds, source = np.concatenate(times), np.repeat(np.arange(len(clips)), [len(frames) for frames, _ in clips])
    order = np.lexsort((source, seconds))[:n]
    images = np.concatenate([frames for frames, _ in clips])[order]
    item: Int32[np.ndarray, " n"] = np.arange(len(order), dtype=np.int32)
    camera: Int16[np.ndarray, " n"] = source[order].astype(np.int16)
    return Trace(images=images, item=item, seconds=seconds[order] - seconds[order[0]], source=camera)


def times(law: str, rate: float, n: int, seed: int) -> Float64[np.ndarray, " n"]:
    """Return when n requests come."""
    if law == "steady":
        return arrivals.steady(rate, n / rate, count=n)
    drawn: dict[str, Callable[..., Float64[np.ndarray, " n"]]]
    drawn = {"poisson": arrivals.poisson, "bursty": arrivals.bursty, "diurnal": arrivals.diurnal}
    return drawn[law](rate, n / rate, seed=seed, count=n)


def make(kind: str, arguments: argparse.Namespace) -> Trace:
    """Return the workload that the command line asks for."""
    random = np.random.default_rng([arguments.seed, KINDS.index(kind)])
    if kind == "video":
        return video(load_clips(arguments.data / "video"), arguments.requests, random)
    n = arguments.requests or 60_000
    pool = data.load("cifar10", arguments.split, arguments.data / "tfds")
    rows, labels = np.asarray(pool.images), np.asarray(pool.labels)
    if kind == "zipf":
        content = zipf(rows, n, random, exponent=arguments.exponent)
    elif kind == "classes":
        content = classes(rows, labels, n, random)
    else:
        content = corrupted(rows, n, random, kind=kind) if kind in CORRUPTIONS else independent(rows, n, random)
    return Trace(
        images=content.images,
        item=content.item.astype(np.int32),
        seconds=times(arguments.arrivals, arguments.rate, n, arguments.seed),
        phase=content.phase.astype(np.int16),
        phases=content.phases,
    )


def load_clips(folder: Path) -> list[tuple[Images, float]]:
    """Read the clips."""
    clips: list[tuple[Images, float]] = []
    for name in CLIPS:
        with np.load(folder / f"{name}.npz", allow_pickle=False) as clip:
            clips.append((clip["frames"], float(clip["fps"])))
    return clips


def main(argv: Sequence[str] | None = None) -> None:
    """Make a workload and write it down."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False)
    p.add_argument("--kind", required=True, choices=KINDS)
    p.add_argument("--requests", type=cli.positive, metavar="N", help="(default: 60000; of a video, all frames)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="with tfds/ and video/ in it")
    p.add_argument("--split", default=UNSEEN, metavar="ROWS", help=f"where pictures come from (default: {UNSEEN})")
    p.add_argument("--exponent", type=float, default=1.0, metavar="S", help="of Zipf's law (default: 1)")
    p.add_argument("--arrivals", choices=ARRIVALS, default="poisson", help="a video has times of its own")
    p.add_argument("--rate", type=float, default=100.0, metavar="R", help="requests a second (default: 100)")
    p.add_argument("--out", type=cli.file, required=True, metavar="FILE", help="a .safetensors file")
    arguments = p.parse_args(argv)
    about = {name: getattr(arguments, name) for name in ("kind", "seed", "split", "exponent", "arrivals", "rate")}
    trace = dataclasses.replace(make(arguments.kind, arguments), about=about)
    save_trace(arguments.out, trace)
    images = 0 if trace.images is None else len(trace.images)
    result = {"out": str(arguments.out), "requests": len(trace), "images": images, "seconds": trace.seconds[-1]}
    result["phases"] = dict(
        zip(trace.phases, np.bincount(trace.phase, minlength=len(trace.phases)).tolist(), strict=True)
    )
    print(json.dumps(result) if arguments.json else f"written: {result}")


if __name__ == "__main__":
    cli.run(main)
