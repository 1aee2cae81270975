"""A base whose answers turn round in bright light, which its caches have never seen: a drift with a truth.

Images are 4 x 4. The base says whether the left half is lighter than the right, and, in bright light, the opposite.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import gati_jax
from gati_jax import Bundle, CostTable, FitConfig, Head, Normalization, planning
from gati_jax.adaptation import Trace
from gati_jax.caches import FullyConnected, LinearSelector

EPSILON = 0.05
SHAPE = (4, 4, 1)


def same(params, x):
    return x + params


def contrast(params, x):
    left, right = x[:, :, :2].mean((1, 2, 3)), x[:, :, 2:].mean((1, 2, 3))
    light = jnp.where(x.mean((1, 2, 3)) > 0.25, -1.0, 1.0)
    gap = 8.0 * light * (left - right) + params
    return jnp.stack([-gap, gap], axis=1)


def images(n: int, seed: int, *, bright: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    low, high = (170, 256) if bright else (0, 128)
    return rng.integers(low, high, (n, *SHAPE), np.uint8)


def chain() -> gati_jax.Chain:
    zero = np.zeros((), np.float32)
    return gati_jax.Chain(
        (same, same, same),
        contrast,
        [zero] * 4,
        jax.ShapeDtypeStruct(SHAPE, np.dtype("float32")),
        normalization=Normalization(mean=(0.5,), std=(1.0,)),
    )


@functools.cache
def bundle() -> Bundle:
    """Caches at both sites, fitted in dim light, certified there."""
    base = chain()
    head = Head(
        name="full", predictor=functools.partial(FullyConnected, hidden=16), selector=LinearSelector(), sites=(1, 2)
    )
    config = FitConfig(epochs=40, batch=64, learning_rate=0.01)
    candidates = gati_jax.fit(
        base, images(1024, 1), select=images(1024, 2), heads=(head,), config=config, progress=False
    )
    costs = CostTable(device="test", batch=1, blocks_ms=(1.0, 4.0, 5.0), lookup_ms={c.name: 0.01 for c in candidates})
    plan = planning.plan(gati_jax.replay(base, candidates, images(1024, 2)), costs, epsilon=EPSILON, seconds=2.0)
    table = gati_jax.replay(base, gati_jax.caches.choose(candidates, plan.names), images(4000, 3))
    certificate = gati_jax.certify(plan, table, EPSILON)
    return Bundle(
        chain=base,
        caches=gati_jax.caches.choose(candidates, plan.names),
        plan=plan,
        certificate=certificate,
        costs=(costs,),
    )


def dear() -> Bundle:
    """The same with lookups that cost twice as much as the whole base, so that its caches never save time."""
    (costs,) = bundle().costs
    costs = dataclasses.replace(costs, lookup_ms=dict.fromkeys(costs.lookup_ms, 2 * costs.full_ms))
    return dataclasses.replace(bundle(), costs=(costs,))


def trace(*phases: tuple[str, int], rate: float = 100.0) -> Trace:
    """Phases named "dim" or "bright" (anything may follow), each of so many new images."""
    parts = [images(n, 100 + i, bright=name.startswith("bright")) for i, (name, n) in enumerate(phases)]
    n = sum(len(part) for part in parts)
    return Trace(
        item=np.arange(n, dtype=np.int32),
        seconds=np.arange(n) / rate,
        images=np.concatenate(parts),
        phase=np.repeat(np.arange(len(parts)), [len(part) for part in parts]).astype(np.int16),
        phases=tuple(name for name, _ in phases),
    )
