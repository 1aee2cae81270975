"""The tables that planning works on, a replay and measured times, and the cascade's outcome computed from them.

No network runs here: the replay holds the answers and scores of every candidate for every request, so the effect of
any thresholds can be counted.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64
from scipy.stats import rankdata

from gati_jax.errors import InputError, listed


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplaySource:
    """What a replay was computed from; empty for tables made by hand.

    Args:
        base: Digest of the base's parameters.
        candidates: Name and digest of the parameters of every candidate.
        dtype: Of the images. Rows are compared by their bytes, so uint8 pixels and prepared inputs must not mix.
        logits: Of the base for made-up inputs, see ``gati_jax.models.probe``: parameters alone do not say what is
            computed from them. Empty in older files. Not in the repr, whose text plans
            hash: other machines give other last digits.
        tolerance: Logits that differ by more are another function's.
        sites: The same for what caches see at each site: a number of each row, and their tolerance.
    """

    base: str = ""
    candidates: tuple[tuple[str, str], ...] = ()
    dtype: str = ""
    logits: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    tolerance: float = dataclasses.field(default=0.0, repr=False)
    sites: tuple[tuple[float, ...], ...] = dataclasses.field(default=(), repr=False)

    def take(self, names: Sequence[str]) -> "ReplaySource":
        """Return the source of these candidates only, in this order."""
        digests = dict(self.candidates)
        return dataclasses.replace(self, candidates=tuple((name, digests[name]) for name in names if name in digests))

    def same_function(self, other: "ReplaySource") -> bool:
        """Return whether the bases' logits for the same inputs, and what caches see, are equal; the unknown is."""
        if self.sites and other.sites and len(self.sites) != len(other.sites):
            return False
        mine, others = (*self.logits, self.tolerance), (*other.logits, other.tolerance)
        pairs = [(mine, others)] if self.logits and other.logits else []
        pairs = [*pairs, *zip(self.sites, other.sites, strict=False)]  # one may be unknown
        return all(_close(np.array(one), np.array(two)) for one, two in pairs)

    def check(self, other: "ReplaySource", argument: str) -> None:
        """Check that another replay has the same source.

        Args:
            other: The other replay's.
            argument: Where it came from, for the message.

        Raises:
            InputError: Names what differs.
        """
        pairs = (("the base", self.base, other.base), ("the images' dtype", self.dtype, other.dtype))
        differ = [what for what, one, two in pairs if one != two]
        if not differ and not self.same_function(other):
            differ = ["the base's functions (chain)"]
        mine, others = dict(self.candidates), dict(other.candidates)
        differ += sorted(name for name in mine.keys() | others.keys() if mine.get(name) != others.get(name))
        if differ:
            raise InputError(
                f"{argument}: expected the parameters and images of the plan, got other ones: {', '.join(differ)}"
            )


def _close(one: Float[np.ndarray, " n"], two: Float[np.ndarray, " m"]) -> bool:
    """Return whether numbers are equal within the larger of two tolerances, which come last."""
    return one.shape == two.shape and bool((np.abs(one - two)[:-1] <= max(one[-1], two[-1])).all())


_FEWEST_NEIGHBOURS = 50
NO_ROWS = np.empty(0, np.uint64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayTable:
    """Answers of the base, and classes and scores of every candidate, for n requests.

    Raises:
        InputError: The columns do not belong together.
    """

    names: tuple[str, ...]
    sites: tuple[int, ...]
    depth: int
    """N, the number of blocks of the base."""
    answers: Int[np.ndarray, " n"]
    classes: Int[np.ndarray, "candidates n"]
    scores: Float[np.ndarray, "candidates n"]
    """Out-of-fold where a selector was fitted on the row. Cast to float32 and clipped to its range; NaN becomes
    -infinity, which never hits."""
    rows: UInt64[np.ndarray, " n"]
    """Digests of the requests, by which the rows of two splits are compared."""
    labels: Int[np.ndarray, " n"] | None = None
    source: ReplaySource = ReplaySource()
    fitted_rows: UInt64[np.ndarray, " fitted"] = dataclasses.field(default_factory=lambda: NO_ROWS, repr=False)
    """Digests of the rows that the candidates were fitted on, predictors and selectors alike, where they are known."""

    def __post_init__(self) -> None:
        """Check the columns, and make the scores comparable."""
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

    def __repr__(self) -> str:
        """Describe it in a line."""
        caches = listed(self.names, most=8, room=150) or "none"
        labels = "without labels" if self.labels is None else "with labels"
        return f"ReplayTable({len(self)} rows {labels}; {self.depth} blocks; candidates: {caches})"

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
            self, names=tuple(names), sites=sites, classes=self.classes[index], scores=self.scores[index],
            source=self.source.take(names),
        )  # fmt: skip


def _comparable(scores: Float[np.ndarray, "candidates n"]) -> Float[np.ndarray, "candidates n"]:
    """Make scores finite where they can hit, so that a threshold of infinity turns a cache off for all of them."""
    limits = np.finfo(np.float32)
    never = np.isneginf(scores) | np.isnan(scores)
    return np.where(never, -np.inf, np.clip(scores, limits.min, limits.max)).astype(np.float32)


def neighbours_resemble(table: ReplayTable) -> float:
    """Return how much the scores of a row and of the next one correlate, among rows of the same answer; 0 by chance.

    Frames of a video and images of a patient often follow each other, and are alike in how sure caches are of them.
    Rows that are sorted by class are not: each score is compared with others of its answer.
    """
    if len(table) < _FEWEST_NEIGHBOURS:
        return 0.0
    ranks = rankdata(table.scores, axis=1)  # scores may have any scale, and be -infinity
    _, group, sizes = np.unique(table.answers, return_inverse=True, return_counts=True)
    ranks -= np.array([np.bincount(group, weights=row)[group] / sizes[group] for row in ranks])
    variance = (ranks**2).mean(1)
    correlation = (ranks[:, 1:] * ranks[:, :-1]).mean(1)[variance > 0] / variance[variance > 0]
    # Of n independent rows it is normal, of variance 1 / n.
    certain = correlation.size and correlation.mean() > 5 / len(table) ** 0.5
    return float(correlation.mean()) if certain else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostTable:
    """Milliseconds on one device at one batch size: medians of interleaved repeats.

    Raises:
        InputError: A time is negative or not finite, or the device's name cannot be a file name.
    """

    device: str
    batch: int
    blocks_ms: tuple[float, ...]
    """For each block of the base; the last one includes the classifier."""
    lookup_ms: Mapping[str, float]
    """By candidate, what a lookup adds to the program around it."""
    spread: float = 0.0
    """Interquartile range over median of the full network's time."""

    def __post_init__(self) -> None:
        """Check the fields."""
        if not re.fullmatch(r"\w[\w.+-]{0,99}", self.device) or self.batch < 1:
            raise InputError(
                f"device, batch: expected a plain name and 1 or more, got {self.device!r} and {self.batch}"
            )
        if not self.blocks_ms or not all(0 <= ms < np.inf for ms in (*self.blocks_ms, *self.lookup_ms.values())):
            raise InputError(
                f"costs: expected non-negative milliseconds, got {self.blocks_ms} and {dict(self.lookup_ms)}"
            )

    def __repr__(self) -> str:
        """Describe it in a line."""
        blocks = f"{len(self.blocks_ms)} blocks in {self.full_ms:.4g} ms"
        return f"CostTable({self.device}, batch {self.batch}: {blocks}, {len(self.lookup_ms)} lookups)"

    @property
    def full_ms(self) -> float:
        """The whole base."""
        return sum(self.blocks_ms)

    def until(self, site: int) -> float:
        """Return the time of the blocks before ``site``; ``until(N)`` is the whole base."""
        return float(sum(self.blocks_ms[:site]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a cascade answers to the requests of a table."""

    exits: Int[np.ndarray, " n"]
    """Index of the candidate that answers; the number of candidates where the base does."""
    disagrees: Bool[np.ndarray, " n"]
    """Whether the answered class differs from the base's."""
    classes: Int[np.ndarray, " n"]

    @property
    def disagreement(self) -> float:
        """The share of requests that disagree."""
        return float(self.disagrees.mean())


def replay_plan(table: ReplayTable, thresholds: Float[np.ndarray, " candidates"]) -> Outcome:
    """Return the outcome of a cascade with these thresholds.

    Args:
        table: Its candidates in the order of their sites.
        thresholds: A score at or above its threshold is a hit; infinity turns a cache off.
    """
    base = np.ones((1, len(table)), bool)  # answers all that reach it
    exits = np.vstack([table.scores >= thresholds[:, None], base]).argmax(0)
    classes = np.vstack([table.classes, table.answers])[exits, np.arange(len(table))]
    return Outcome(exits=exits, disagrees=classes != table.answers, classes=classes)


def cascade_ms(table: ReplayTable, thresholds: Float[np.ndarray, " candidates"], costs: CostTable) -> float:
    """Return the mean time of the requests of ``table`` under ``thresholds``; caches that are off cost nothing."""
    exits = replay_plan(table, thresholds).exits
    share = np.bincount(exits, minlength=len(table.names) + 1) / len(table)
    return float(share @ exit_ms(table, thresholds, costs))


def exit_ms(
    table: ReplayTable, thresholds: Float[np.ndarray, " candidates"], costs: CostTable
) -> Float[np.ndarray, " exits"]:
    """Return the time of a request that leaves at each candidate of ``table``, and, last, at the base."""
    blocks = np.array([costs.until(site) for site in (*table.sites, table.depth)])
    on = zip(table.names, thresholds < np.inf, strict=True)
    lookups = np.cumsum([0.0, *(costs.lookup_ms[name] if is_on else 0.0 for name, is_on in on)])
    return blocks + np.append(lookups[1:], lookups[-1])
