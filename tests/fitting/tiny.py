"""A tiny chain and its fit, for tests that need the same fit in several processes.

python tests/fitting/tiny.py FOLDER    fits with a checkpoint in FOLDER after every step
"""

import functools
import importlib
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

import gati_jax
from gati_jax.caches import FullyConnected, SortedSelector

ROWS, CLASSES, HIDDEN = 256, 4, 8


def dense(params, x):
    return jnp.tanh(x @ params)


def relu(params, x):
    return jnp.maximum(x @ params, 0)


def linear(params, x):
    return x @ params


def chain(block=dense) -> gati_jax.Chain:
    """Three blocks 12 -> 10 -> 9 -> 8, then 4 classes."""
    rng, sizes = np.random.default_rng(0), (12, 10, 9, 8, CLASSES)
    params = [
        (2 * rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32) for shape in itertools.pairwise(sizes)
    ]
    return gati_jax.Chain((block,) * 3, linear, params, jax.ShapeDtypeStruct((12,), np.float32))


def images() -> tuple[np.ndarray, np.ndarray]:
    """The fit and the select split."""
    rows = np.random.default_rng(1).standard_normal((ROWS + 60, 12)).astype(np.float32)
    return rows[:ROWS], rows[ROWS:]


def head(*sites: int) -> gati_jax.Head:
    return gati_jax.Head(
        name="fc",
        predictor=lambda classes: FullyConnected(classes, hidden=HIDDEN),
        selector=SortedSelector(hidden=4),
        sites=sites,
    )


CONFIG = gati_jax.FitConfig(epochs=6, batch=32, learning_rate=0.02, seed=3)


def fit(*, sites=(1, 2), config=CONFIG, checkpoint=None, base=None) -> gati_jax.fitting.Candidates:
    rows, select = images()
    return gati_jax.fit(
        base or chain(), rows, select=select, heads=[head(*sites)], config=config, checkpoint=checkpoint, progress=False
    )


if __name__ == "__main__":
    module = importlib.import_module("gati_jax.fitting.predictors")
    vars(module)["LoopConfig"] = functools.partial(module.LoopConfig, checkpoint_seconds=0.0)
    fit(checkpoint=sys.argv[1])
