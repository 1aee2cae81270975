"""Fit Freeze Inference's caches: key networks learn the base's answers, then keys of the fit split become points.

Key networks are the hidden layers of FC(units) heads (or of pooled ones), trained like any predictors, all sites in one
pass over the data; their output layers are dropped. Then one more pass computes all keys, a batch at a time: what is
held is n x units floats a site, never n activations.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Shaped
from pydantic import AfterValidator, Field

from gati_jax.caches import (
    Candidate,
    Centres,
    Confidence,
    FullyConnected,
    Grid,
    Neighbours,
    key_features,
    points_within,
    squared_distances,
    stored_centres,
    stored_points,
)
from gati_jax.data import fingerprint
from gati_jax.errors import InputError
from gati_jax.models import Chain
from gati_jax.options import Count, check_options
from gati_jax.pytrees import tree_digest

from .fit import Candidates, chain_code, check_splits
from .heads import Head, Part, parts_of
from .predictors import DEFAULT_CONFIG, FitConfig, train_predictors
from .stored_points import Choice, choose_points

Kind = Literal["knn", "kmeans"]


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
        """Check the options.

        Raises:
            InputError: Names the option.
        """
        check_options(self)

    def points(self, n: int, sites: int) -> int:
        """Return how many of n points a k-NN cache keeps at each of ``sites`` sites.

        Raises:
            InputError: Fewer than it asks.
        """
        kept = n if self.budget is None else min(n, points_within(self.budget // sites, self.key_units))
        if kept < self.k:
            raise InputError(
                f"k: expected at most the points of a cache, got {self.k}, and room for {max(0, kept)} points"
            )
        return kept


DEFAULT_FREEZE = FreezeConfig()


def fit_freeze(
    chain: Chain,
    images: Shaped[np.ndarray, "n ..."],
    *,
    select: Shaped[np.ndarray, "m ..."],
    sites: tuple[int, ...] | None = None,
    freeze: FreezeConfig = DEFAULT_FREEZE,
    config: FitConfig = DEFAULT_CONFIG,
    heads: Candidates | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> Candidates:
    """Make neighbour caches that reproduce the answers of a frozen base. No labels are needed.

    Args:
        chain: The base.
        images: The fit split: uint8 or prepared inputs. Its keys, not augmented, are the points.
        select: The rows that will set thresholds. Nothing is fitted on them; they are only remembered.
        sites: Where; None for sites 1 .. N - 1.
        freeze: Which caches.
        config: How key networks are trained.
        heads: Fitted FC(units) heads (Grid heads where ``freeze.cells`` says so), one at each site, whose hidden layers
            become the key networks; None trains them.
        checkpoint: As in ``fit``.
        progress: Whether to draw a progress bar on a terminal.

    Returns:
        Candidates "knn@k" and "kmeans@k", as ``fit`` returns its own.

    Raises:
        InputError: Images that the chain does not take, overlapping splits, a site that the chain does not have, or
            room for fewer points than a cache asks.
    """
    images, select, fit_rows, select_rows = check_splits(chain, images, select)
    parts = parts_of(chain, [_key_head(freeze, sites)])
    kept = freeze.points(len(images), len(parts)) if "knn" in freeze.kinds else 0
    if "kmeans" in freeze.kinds and freeze.centres > len(images):
        raise InputError(f"centres: expected at most the {len(images)} images, got {freeze.centres}")
    epochs = None if heads is None else heads.epochs
    if heads is not None:
        parts = _as_trained(parts, heads)
    else:
        identity = f"{config} {parts} {chain_code(chain)} {fingerprint(fit_rows)} {tree_digest(chain.params)}"
        folder = Path(checkpoint) if checkpoint else None
        parts, epochs = train_predictors(
            chain, parts, images, config, checkpoint=folder, identity=identity, progress=progress
        )
    networks = {name: _key_network(part) for name, part in parts.items()}
    del parts  # and with them the output layers
    keys, answers = _all_keys(chain, networks, images, freeze.cells, config.batch)
    items = [
        _candidate(
            kind, network, keys[name], answers, classes=chain.classes, kept=kept, freeze=freeze, seed=config.seed
        )
        for kind in freeze.kinds
        for name, network in networks.items()
    ]
    return Candidates(
        items=tuple(items),
        fold_selectors=({},) * len(items),
        select_rows=select_rows,
        select_fold=np.zeros(len(select_rows), np.int32),
        fit_rows=fit_rows,
        dtype=str(images.dtype),
        epochs=epochs,
    )


def _key_head(freeze: FreezeConfig, sites: tuple[int, ...] | None) -> Head:
    def predictor(classes: int) -> nn.Module:
        if freeze.cells is None:
            return FullyConnected(classes, hidden=freeze.key_units)
        return Grid(classes, cells=freeze.cells, hidden=freeze.key_units)

    return Head(name="key", predictor=predictor, selector=Confidence(), sites=sites)


def _as_trained(parts: dict[str, Part], heads: Candidates) -> dict[str, Part]:
    """Take key networks from heads that are trained already.

    Raises:
        InputError: They are other heads, or at other sites.
    """
    trained = {head.site: head for head in heads}
    wanted = {part.site: part.predictor.clone(standardize=False) for part in parts.values()}
    if {site: head.predictor for site, head in trained.items()} != wanted or len(heads) != len(wanted):
        raise InputError(
            f"heads: expected {next(iter(wanted.values()))} at sites {list(wanted)}, got {[h.name for h in heads]}"
        )
    variables = {site: head.params["predictor"] for site, head in trained.items()}
    return {name: dataclasses.replace(part, variables=variables[part.site]) for name, part in parts.items()}


def _key_network(part: Part) -> tuple[int, PyTree]:
    variables: Any = part.variables
    return part.site, {"hidden": variables["params"]["hidden"]}


def _all_keys(
    chain: Chain, networks: dict[str, tuple[int, PyTree]], images: np.ndarray, cells: int | None, batch: int
) -> tuple[dict[str, Float[np.ndarray, "n units"]], Int[np.ndarray, " n"]]:
    """Return the keys of all images by site, and the base's answers."""
    sites = {name: site for name, (site, _) in networks.items()}

    @jax.jit
    @jax.default_matmul_precision("highest")
    def compute(chain: Chain, params: dict[str, PyTree], rows: Array) -> tuple[dict[str, Array], Array]:
        at, logits = chain.activations(chain.prepare(rows))
        keys = {}
        for name, site in sites.items():
            hidden = params[name]["hidden"]
            keys[name] = nn.relu(key_features(at[site], cells) @ hidden["kernel"] + hidden["bias"][None])
        return keys, jnp.argmax(logits, -1)

    params = {name: own for name, (_, own) in networks.items()}
    units = {name: own["hidden"]["bias"].shape[0] for name, own in params.items()}
    keys = {name: np.empty((len(images), width), np.float32) for name, width in units.items()}
    answers = np.empty(len(images), np.int32)
    for start in range(0, len(images), batch):
        rows = images[start : start + batch]
        said, answers[start : start + batch] = compute(chain, params, rows)
        for name, some in said.items():
            keys[name][start : start + batch] = some
    return keys, answers


def _candidate(
    kind: Kind,
    key_network: tuple[int, PyTree],
    keys: Float[np.ndarray, "n units"],
    answers: Int[np.ndarray, " n"],
    *,
    classes: int,
    kept: int,
    freeze: FreezeConfig,
    seed: int,
) -> Candidate:
    site, params = key_network
    shape = {"units": freeze.key_units, "cells": freeze.cells}
    if kind == "knn":
        how = freeze.choice if kept < len(keys) else "random"  # which then keeps all
        rows = choose_points(keys, answers, kept, k=freeze.k, classes=classes, how=how, seed=seed)
        predictor: nn.Module = Neighbours(classes, points=kept, k=freeze.k, **shape)
        points = stored_points(keys[rows], answers[rows], kept)
    else:
        predictor = Centres(classes, centres=freeze.centres, **shape)
        at, nearest = k_means(keys, freeze.centres, seed=seed)
        labels, share = describe_centres(nearest, answers, freeze.centres, classes)
        points = stored_centres(at, labels, share)
    variables = {"predictor": {"params": params, "points": points}, "selector": {}}
    return Candidate(f"{kind}@{site}", site, predictor, Confidence(), variables)


def k_means(
    points: Float[Array | np.ndarray, "n units"], centres: int, *, seed: int, rounds: int = 50
) -> tuple[Float[Array, "centres units"], Int[Array, " n"]]:
    """Return centres and, for each point, the nearest of them.

    It stops when no point changes its centre. A centre that has lost all its points moves to the point that is farthest
    from its own, so no centre is left without points as long as there are enough distinct ones.

    Args:
        points: To be represented.
        centres: How many.
        seed: Draws the first ones.
        rounds: At most so many.

    Raises:
        InputError: Fewer points than centres.
    """
    if not 1 <= centres <= len(points):
        raise InputError(f"centres: expected 1 to the {len(points)} points, got {centres}")
    points = jnp.asarray(points, jnp.float32)
    norms = jnp.sum(points**2, -1)
    at = _plus_plus(points, norms, centres, jax.random.key(seed))
    nearest, _ = _assign(points, at)
    for _ in range(rounds):
        at, now = _round(points, at, nearest)
        if bool(jnp.array_equal(now, nearest)):
            break
        nearest = now
    return at, nearest


def describe_centres(
    nearest: Int[Array | np.ndarray, " n"], labels: Int[Array | np.ndarray, " n"], centres: int, classes: int
) -> tuple[Int[np.ndarray, " centres"], Float[np.ndarray, " centres"]]:
    """Return each centre's majority label, and the share of its points that have it; -1 and 0 without points."""
    counts = np.zeros((centres, classes), int)
    np.add.at(counts, (np.asarray(nearest), np.asarray(labels)), 1)
    total = counts.sum(1)
    share = counts.max(1) / np.maximum(total, 1)
    return np.where(total > 0, counts.argmax(1), -1).astype(np.int32), share.astype(np.float32)


@functools.partial(jax.jit, static_argnames="centres")
def _plus_plus(
    points: Float[Array, "n units"], norms: Float[Array, " n"], centres: int, key: PRNGKeyArray
) -> Float[Array, "centres units"]:
    """Draw each next centre with a chance that grows with the squared distance to the nearest one so far."""
    keys = jax.random.split(key, centres)
    first = jax.random.randint(keys[0], (), 0, len(points))
    at = jnp.zeros((centres, points.shape[1]), jnp.float32).at[0].set(points[first])

    def draw(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        at, distance = carry
        distance = jnp.minimum(distance, squared_distances(at[i - 1][None], points, norms)[0])
        chosen = jax.random.categorical(keys[i], jnp.log(distance + 1e-12))  # all 0 where all points are centres
        return at.at[i].set(points[chosen]), distance

    at, _ = jax.lax.fori_loop(1, centres, draw, (at, jnp.full(len(points), jnp.inf)))
    return at


def _assign(
    points: Float[Array, "n units"], at: Float[Array, "centres units"]
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    distances = squared_distances(points, at, jnp.sum(at**2, -1))
    return jnp.argmin(distances, 1).astype(jnp.int32), distances.min(1)


@jax.jit
def _round(
    points: Float[Array, "n units"], at: Float[Array, "centres units"], nearest: Int[Array, " n"]
) -> tuple[Float[Array, "centres units"], Int[Array, " n"]]:
    """Move every centre to the mean of its points, an empty one to the farthest point; assign the points anew."""
    count = jnp.zeros(len(at)).at[nearest].add(1.0)
    total = jnp.zeros_like(at).at[nearest].add(points)
    mean = total / jnp.maximum(count, 1)[:, None]
    own = jnp.sum((points - at[nearest]) ** 2, -1)
    _, farthest = jax.lax.top_k(own, len(at))  # the i-th empty centre takes the i-th farthest point
    empty = count == 0
    rank = jnp.cumsum(empty) - 1
    moved = jnp.where(empty[:, None], points[farthest[jnp.maximum(rank, 0)]], mean)
    return moved, _assign(points, moved)[0]
