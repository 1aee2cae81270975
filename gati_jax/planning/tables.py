"""The two tables that planning works on, and what a cascade would have done on them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from gati_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What a replay was computed from; empty where nobody said, as in tables made by hand.

    Args:
        base: Digest of the base's parameters.
        candidates: Name and digest of every candidate's.
        dtype: Of the images: rows are told apart by their bytes, so uint8 pixels and prepared inputs do not mix.
    """

    base: str = ""
    candidates: tuple[tuple[str, str], ...] = ()
    dtype: str = ""

    def take(self, names: Sequence[str]) -> "Origin":
        """Return the origin of these candidates only, in this order."""
        digests = dict(self.candidates)
        return dataclasses.replace(self, candidates=tuple((name, digests[name]) for name in names if name in digests))

    def check(self, other: "Origin", argument: str) -> None:
        """Compare with what else claims to be of this origin.

        Raises:
            InputError: Names what differs.
        """
        differ = [
            what
            for what, one, two in (("the base", self.base, other.base), ("the images' dtype", self.dtype, other.dtype))
            if one != two
        ]
        mine, others = dict(self.candidates), dict(other.candidates)
        differ += sorted(name for name in mine.keys() | others.keys() if mine.get(name) != others.get(name))
        if differ:
            raise InputError(
                f"{argument}: expected the parameters and images of the plan, got other ones: {', '.join(differ)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayTable:
    """What the base and every candidate say to n requests."""

    names: tuple[str, ...]
    sites: tuple[int, ...]
    depth: int
    """N, the number of blocks of the base."""
    answers: Int[np.ndarray, " n"]
    classes: Int[np.ndarray, "candidates n"]
    scores: Float[np.ndarray, "candidates n"]
    """Out-of-fold where a selector has seen the row. They become float32, at most its largest; NaN becomes -infinity,
    which never hits."""
    rows: UInt64[np.ndarray, " n"]
    """Digests, by which splits are told apart."""
    labels: Int[np.ndarray, " n"] | None = None
    origin: Origin = Origin()

    def __post_init__(self) -> None:
        """Check that the columns belong together."""
        expected = (len(self.names), len(self.answers))
        for field in ("classes", "scores"):
            if (got := getattr(self, field).shape) != expected:
                raise InputError(f"{field}: expected shape [candidates, n] = {list(expected)}, got {list(got)}")
        for field in ("rows", "labels"):
            column = getattr(self, field)
            if column is not None and column.shape != self.answers.shape:
                raise InputError(f"{field}: expected shape {list(self.answers.shape)}, got {list(column.shape)}")
        object.__setattr__(self, "scores", _comparable(self.scores))
        if len(self.sites) != len(self.names) or len(set(self.names)) != len(self.names):
            raise InputError(f"names: expected a site for each, and no name twice, got {self.names} at {self.sites}")

    def __len__(self) -> int:
        """Return n."""
        return len(self.answers)

    @property
    def agrees(self) -> Bool[np.ndarray, "candidates n"]:
        """Whether each candidate's class is the base's answer."""
        return self.classes == self.answers

    def take(self, names: Sequence[str]) -> "ReplayTable":
        """Return the table of these candidates only, in this order.

        Raises:
            InputError: A name is not in the table.
        """
        if missing := [name for name in names if name not in self.names]:
            raise InputError(f"table: expected the candidates {', '.join(missing)}, got {', '.join(self.names)}")
        index = [self.names.index(name) for name in names]
        sites = tuple(self.sites[i] for i in index)
        return dataclasses.replace(
            self,
            names=tuple(names),
            sites=sites,
            classes=self.classes[index],
            scores=self.scores[index],
            origin=self.origin.take(names),
        )


def _comparable(scores: Float[np.ndarray, "candidates n"]) -> Float[np.ndarray, "candidates n"]:
    """Return scores as thresholds are compared with them: a threshold of infinity is off, whatever the score."""
    limits = np.finfo(np.float32)
    held = np.where(np.isneginf(scores), -np.inf, np.clip(scores, limits.min, limits.max))
    return np.where(np.isnan(scores), -np.inf, held).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostTable:
    """Milliseconds on one device at one batch size: medians of interleaved repeats."""

    device: str
    batch: int
    blocks_ms: tuple[float, ...]
    """For each block of the base; the last one's with the classifier's."""
    lookup_ms: Mapping[str, float]
    """For each candidate by name, what a lookup adds to the program around it."""
    spread: float = 0.0
    """Interquartile range over median of the full network's time."""

    def __post_init__(self) -> None:
        """Refuse negative times, and a device that is no file name."""
        if not re.fullmatch(r"\w[\w.+-]{0,99}", self.device) or self.batch < 1:
            raise InputError(
                f"device, batch: expected a plain name and 1 or more, got {self.device!r} and {self.batch}"
            )
        if not self.blocks_ms or not all(0 <= ms < np.inf for ms in (*self.blocks_ms, *self.lookup_ms.values())):
            raise InputError(
                f"costs: expected non-negative milliseconds, got {self.blocks_ms} and {dict(self.lookup_ms)}"
            )

    @property
    def full_ms(self) -> float:
        """The whole base."""
        return sum(self.blocks_ms)

    def until(self, site: int) -> float:
        """Return the time of the blocks before ``site``; ``until(N)`` is the whole base."""
        return float(sum(self.blocks_ms[:site]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a cascade does on a table."""

    exits: Int[np.ndarray, " n"]
    """Index of the candidate that answers; the number of candidates where the base does."""
    disagrees: Bool[np.ndarray, " n"]
    """Whether the given class differs from the base's answer."""
    classes: Int[np.ndarray, " n"]
    """The given class."""

    @property
    def disagreement(self) -> float:
        """The share of requests that disagree."""
        return float(self.disagrees.mean())


def replay_plan(table: ReplayTable, thresholds: Float[np.ndarray, " candidates"]) -> Outcome:
    """Run every request of ``table`` (its candidates in the order of their sites) against ``thresholds``.

    A score at or above its threshold is a hit; infinity turns a cache off.
    """
    base = np.ones((1, len(table)), bool)  # answers whatever comes to it
    exits = np.vstack([table.scores >= thresholds[:, None], base]).argmax(0)
    classes = np.vstack([table.classes, table.answers])[exits, np.arange(len(table))]
    return Outcome(exits=exits, disagrees=classes != table.answers, classes=classes)


def cascade_ms(table: ReplayTable, thresholds: Float[np.ndarray, " candidates"], costs: CostTable) -> float:
    """Return the mean time of the requests of ``table`` under ``thresholds``; caches that are off cost nothing."""
    on = thresholds < np.inf
    kept = table.take([name for name, is_on in zip(table.names, on, strict=True) if is_on])
    exits = replay_plan(kept, thresholds[on]).exits
    share = np.bincount(exits, minlength=len(kept.names) + 1) / len(table)
    return float(share @ exit_ms(kept, costs))


def exit_ms(table: ReplayTable, costs: CostTable) -> Float[np.ndarray, " exits"]:
    """Return the time of a request that leaves at each candidate of ``table``, and, last, at the base."""
    blocks = np.array([costs.until(site) for site in (*table.sites, table.depth)])
    lookups = np.cumsum([0.0, *(costs.lookup_ms[name] for name in table.names)])
    return blocks + np.append(lookups[1:], lookups[-1])
