"""Fit Freeze Inference's caches: key networks learn the base's answers, then keys of the fit split become points.

Key networks are the hidden layers of FC(units) heads (or of pooled ones), trained like other predictors, all sites in
one pass over the data; their output layers are dropped. One more pass computes all keys, a batch at a time: memory is
n x units floats a site, and never n activations.
"""

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped
from pydantic import AfterValidator, Field

from gati_jax.caches import (
    Candidate,
    Centres,
    Confidence,
    FullyConnected,
    Grid,
    Neighbours,
    key_features,
    nearest,
    points_within,
    squared_distances,
    stored_centres,
    stored_points,
    vote,
)
from gati_jax.caches.candidate import Part
from gati_jax.data import Images, Source
from gati_jax.errors import InputError
from gati_jax.models import Chain, check_chain, warn_of_inputs
from gati_jax.options import Count, check_options

from .base import rows_at_once
from .fit import Candidates, check_splits, train
from .heads import Head, parts_of
from .loop import logged
from .predictors import DEFAULT_CONFIG, FitConfig

Kind = Literal["knn", "kmeans"]
Choice = Literal["random", "condensed", "spread"]
Keys = Float[np.ndarray, "n units"]
Labels = Int[np.ndarray, " n"]
Rows = Int[np.ndarray, " size"]
_ROUNDS = 4  # in which "condensed" adds points
_ROWS = 512  # of a matrix of distances at a time


def _distinct(kinds: tuple[str, ...]) -> tuple[str, ...]:
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError("expected knn, kmeans or both")
    return kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """Which neighbour caches are made."""

    kinds: Annotated[
        tuple[Kind, ...],
        AfterValidator(_distinct),
        Field(description="knn, kmeans, or both, which then share their key networks"),
    ] = ("knn", "kmeans")
    key_units: Annotated[int, Field(ge=1, le=65_536, description="length of a key")] = 1024
    cells: Annotated[
        Annotated[int, Field(ge=1, le=1024)] | None,
        Field(description="cells per side of the average pool in front of the key network; unset: none, as published"),
    ] = None
    k: Annotated[Count, Field(description="neighbours that a k-NN cache looks up")] = 50
    budget: Annotated[
        Count | None,
        Field(description="bytes for the points of all k-NN caches, as many at every site; unset: all points"),
    ] = None
    choice: Annotated[Choice, Field(description="of the points within the budget")] = "random"
    centres: Annotated[Count, Field(description="of a k-means cache")] = 100

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)

    def points(self, n: int, sites: int) -> int:
        """Return how many of n points a k-NN cache keeps at each of ``sites`` sites.

        Raises:
            InputError: Fewer than it asks.
        """
        kept = n if self.budget is None else min(n, points_within(self.budget // sites, self.key_units))
        if kept < self.k:
            raise InputError(f"k: expected at most the points of a cache, got {self.k}, and room for {kept} points")
        return kept


DEFAULT_FREEZE = FreezeConfig()


def fit_freeze(
    chain: Chain,
    images: Shaped[np.ndarray, "n ..."] | Source,
    *,
    select: Shaped[np.ndarray, "m ..."] | Source,
    sites: tuple[int, ...] | None = None,
    freeze: FreezeConfig = DEFAULT_FREEZE,
    config: FitConfig = DEFAULT_CONFIG,
    heads: Candidates | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> Candidates:
    """Fit neighbour caches that reproduce the answers of a frozen base. No labels are needed.

    Args:
        chain: The base.
        images: The fit split: uint8 or prepared inputs[n, ...]. Their keys, without augmentation, are the points.
        select: The rows[m, ...] that will set thresholds. Nothing is fitted on them; their digests are kept.
        sites: Where to fit caches; None for sites 1 .. N - 1.
        freeze: Which caches.
        config: How key networks are trained.
        heads: Fitted FC(units) heads (Grid heads with ``freeze.cells``), one at each site, whose hidden layers become
            the key networks; None trains them.
        checkpoint: As in ``fit``.
        progress: Whether to draw a progress bar on a terminal.

    Returns:
        Candidates "knn@k" and "kmeans@k", as ``fit`` returns its own.

    Raises:
        InputError: Images that the chain does not take, overlapping splits, a site that the chain does not have, room
            for fewer points than a cache looks up, or "kmeans" without scikit-learn.
    """
    splits = check_splits(chain, images, select)
    check_chain(chain, splits.images)
    warn_of_inputs(chain, splits.images)
    parts = parts_of(chain, [_key_head(freeze, sites)])
    kept = freeze.points(len(splits.images), len(parts)) if "knn" in freeze.kinds else 0
    if "kmeans" in freeze.kinds and freeze.centres > len(splits.images):
        raise InputError(f"centres: expected at most the {len(splits.images)} images, got {freeze.centres}")
    if heads is None:
        parts, epochs = train(chain, parts, splits, config, checkpoint, progress=progress)
    else:
        parts, epochs = _as_trained(parts, heads), heads.epochs
    networks = {part.site: part.variables["params"]["hidden"] for part in parts.values()}
    del parts  # and with them the output layers
    keys, answers = _all_keys(chain, networks, splits.images, freeze.cells, config.batch)
    items = []
    for kind in freeze.kinds:
        for site, hidden in networks.items():
            predictor, points = _cache(
                kind, keys[site], answers, kept, classes=chain.classes, freeze=freeze, seed=config.seed
            )
            params = {"predictor": {"params": {"hidden": hidden}, "points": points}, "selector": {}}
            items.append(Candidate(f"{kind}@{site}", site, predictor, Confidence(), params))
    fold = np.zeros(len(splits.select_rows), np.int32)
    return splits.candidates(tuple(items), ({},) * len(items), fold, epochs)


def _key_head(freeze: FreezeConfig, sites: tuple[int, ...] | None) -> Head:
    predictor = functools.partial(FullyConnected, hidden=freeze.key_units)
    if freeze.cells is not None:
        predictor = functools.partial(Grid, cells=freeze.cells, hidden=freeze.key_units)
    return Head(name="key", predictor=predictor, selector=Confidence(), sites=sites)


def _as_trained(parts: dict[str, Part], heads: Candidates) -> dict[str, Part]:
    """Return the parts with the variables of heads that are trained already."""
    wanted = {part.site: part.predictor.clone(standardize=False) for part in parts.values()}
    if {head.site: head.predictor for head in heads} != wanted or len(heads) != len(wanted):
        raise InputError(
            f"heads: expected {next(iter(wanted.values()))} at sites {list(wanted)}, got {[h.name for h in heads]}"
        )
    variables = {head.site: head.params["predictor"] for head in heads}
    return {name: dataclasses.replace(part, variables=variables[part.site]) for name, part in parts.items()}


def _all_keys(
    chain: Chain, networks: dict[int, PyTree], images: Images, cells: int | None, batch: int
) -> tuple[dict[int, Keys], Labels]:
    """Return the keys of all images by site, and the base's answers."""

    @jax.jit
    @jax.default_matmul_precision("highest")
    def compute(chain: Chain, networks: dict[int, PyTree], rows: Array) -> tuple[dict[int, Array], Array]:
        activations, logits = chain.activations(chain.prepare(rows))
        keys = {
            site: nn.relu(key_features(activations[site], cells) @ hidden["kernel"] + hidden["bias"][None])
            for site, hidden in networks.items()
        }
        return keys, jnp.argmax(logits, -1)

    keys = {site: np.empty((len(images), len(hidden["bias"])), np.float32) for site, hidden in networks.items()}
    answers = np.empty(len(images), np.int32)
    batch = rows_at_once(chain, batch)
    starts = range(0, len(images), batch)
    for start in logged(starts, len(starts), "computing keys"):
        rows = slice(start, start + batch)
        found, answers[rows] = compute(chain, networks, images[rows])
        for site, some in found.items():
            keys[site][rows] = some
    return keys, answers


def _cache(
    kind: Kind, keys: Keys, answers: Labels, kept: int, *, classes: int, freeze: FreezeConfig, seed: int
) -> tuple[Neighbours | Centres, dict[str, Array]]:
    """Return one site's predictor, and its points."""
    if kind == "kmeans":
        points = stored_centres(*labelled_centres(keys, answers, freeze.centres, classes=classes, seed=seed))
        return Centres(classes, centres=freeze.centres, units=freeze.key_units, cells=freeze.cells), points
    how = freeze.choice if kept < len(keys) else "random"  # which then keeps all
    rows = choose_points(keys, answers, kept, k=freeze.k, classes=classes, how=how, seed=seed)
    predictor = Neighbours(classes, points=kept, k=freeze.k, units=freeze.key_units, cells=freeze.cells)
    return predictor, stored_points(keys[rows], answers[rows])


def labelled_centres(
    keys: Keys, labels: Labels, centres: int, *, classes: int, seed: int
) -> tuple[Float[np.ndarray, "centres units"], Int[np.ndarray, " centres"], Float[np.ndarray, " centres"]]:
    """Cluster at least ``centres`` keys by k-means.

    Returns:
        The centres, the majority label of each one's keys, and the share of its keys that have it; label -1 and share 0
        for a centre without keys, which is possible only with fewer distinct keys than centres.
    """
    try:
        from sklearn.cluster import KMeans  # noqa: PLC0415 (optional)
        from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415
    except ImportError as error:
        raise InputError('kinds: "kmeans" needs scikit-learn (pip install "gati-jax[train]")') from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct keys than centres
        model: Any = KMeans(centres, random_state=seed).fit(keys)
    counts = np.zeros((centres, classes), int)
    np.add.at(counts, (model.labels_, labels), 1)
    total = counts.sum(1)
    majority = np.where(total > 0, counts.argmax(1), -1).astype(np.int32)
    return model.cluster_centers_, majority, (counts.max(1) / np.maximum(total, 1)).astype(np.float32)


def choose_points(
    keys: Keys, labels: Labels, size: int, *, k: int, classes: int, how: Choice = "random", seed: int = 0
) -> Rows:
    """Return the rows that a k-NN cache keeps if it may not keep all points, in ascending order.

    - "random": the same number of every class, or all of a class that has fewer.
    - "condensed": half of them at random; then, in four rounds, those that a cache of the points so far gets wrong, the
      most confident errors first; random ones if there are not enough errors.
    - "spread": within every class, repeatedly the point that is farthest from those already kept (k-centre).

    Args:
        keys: Of all points.
        labels: The base's answers.
        size: How many to keep.
        k: Neighbours that the cache looks up; "condensed" looks up as many.
        classes: Of the base.
        how: See above; docs/results/freeze.md has a measurement, in which "random" was the best or as good.
        seed: Of all random choices.

    Raises:
        InputError: ``size`` is not between 1 and n, or ``how`` is unknown.
    """
    if not 1 <= size <= len(keys):
        raise InputError(f"points: expected 1 to {len(keys)}, got {size}")
    rng = np.random.default_rng(seed)
    shares = _shares(np.bincount(labels, minlength=classes), size)
    if how == "random":
        chosen = _random(labels, shares, rng)
    elif how == "condensed":
        chosen = _condensed(keys, labels, size, k, classes, rng)
    elif how == "spread":
        rows = [np.flatnonzero(labels == label) for label in range(classes)]
        kept = [r[np.asarray(_farthest(keys[r], n))] for r, n in zip(rows, shares.tolist(), strict=True) if n]
        chosen = np.concatenate(kept)
    else:
        raise InputError(f"choice: expected random, condensed or spread, got {how!r}")
    return np.sort(chosen)


def _shares(counts: Int[np.ndarray, " classes"], size: int) -> Int[np.ndarray, " classes"]:
    """Divide ``size`` equally among classes; what a small class cannot use goes to the others."""
    shares = np.zeros_like(counts)
    while (rest := size - int(shares.sum())) > 0:
        open_ = np.flatnonzero(shares < counts)
        each = rest // len(open_)
        extra = each or np.arange(len(open_)) < rest
        shares[open_] = np.minimum(counts[open_], shares[open_] + extra)
    return shares


def _random(labels: Labels, shares: Int[np.ndarray, " classes"], rng: np.random.Generator) -> Rows:
    parts = [rng.choice(np.flatnonzero(labels == i), share, replace=False) for i, share in enumerate(shares)]
    return np.concatenate(parts)


def _condensed(keys: Keys, labels: Labels, size: int, k: int, classes: int, rng: np.random.Generator) -> Rows:
    counts = np.bincount(labels, minlength=classes)
    kept = _random(labels, _shares(counts, min(size, max(k, size // 2))), rng)
    for i in range(_ROUNDS):
        rest = np.setdiff1d(np.arange(len(keys)), kept)
        room = (size - len(kept)) // (_ROUNDS - i)
        if room == 0 or len(rest) == 0:
            continue
        scores = _scores(keys[rest], stored_points(keys[kept], labels[kept]), min(k, len(kept)), classes)
        wrong = scores.argmax(1) != labels[rest]
        order = np.argsort(-np.where(wrong, scores.max(1), -np.inf), kind="stable")
        kept = np.concatenate([kept, rest[order[: min(room, int(wrong.sum()))]]])
    rest = np.setdiff1d(np.arange(len(keys)), kept)
    return np.concatenate([kept, rng.choice(rest, size - len(kept), replace=False)])


def _scores(keys: Keys, stored: dict[str, Array], k: int, classes: int) -> Float[np.ndarray, "n classes"]:
    """Return the log-scores of a k-NN cache of stored points for keys, a few rows at a time."""

    @jax.jit
    def scores(rows: Array, stored: dict[str, Array]) -> Array:
        index, distances = nearest(rows, stored["keys"], stored["norms"], k)
        return vote(stored["labels"][index], distances, classes)

    return np.concatenate([np.asarray(scores(keys[i : i + _ROWS], stored)) for i in range(0, len(keys), _ROWS)])


@functools.partial(jax.jit, static_argnames="size")
def _farthest(keys: Float[Array, "n units"], size: int) -> Int[Array, " size"]:
    """Return the point nearest to the mean, followed by the point that is farthest from all earlier ones, and so on."""
    norms = jnp.sum(keys**2, -1)
    first = jnp.argmin(squared_distances(keys.mean(0)[None], keys, norms)[0])

    def follow(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        chosen, distance = carry
        at = chosen[i - 1]
        distance = jnp.minimum(distance, squared_distances(keys[at][None], keys, norms)[0]).at[at].set(-jnp.inf)
        return chosen.at[i].set(jnp.argmax(distance)), distance

    start = jnp.zeros(size, jnp.int32).at[0].set(first), jnp.full(len(keys), jnp.inf)
    return jax.lax.fori_loop(1, size, follow, start)[0]
