"""k-means: Lloyd's algorithm from k-means++, on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gati_jax._errors import InputError
from gati_jax.caches import squared_distances


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
        msg = f"centres: expected 1 to the {len(points)} points, got {centres}"
        raise InputError(msg)
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
