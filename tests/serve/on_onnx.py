"""Runners on ONNX Runtime for the small ResNet, with made-up times."""

import dataclasses

import jax.numpy as jnp
import pytest

import gati_jax
from gati_jax import CostTable
from gati_jax.profiling import onnx_tuning
from serve.engine import routes
from serve.engine.onnx_runner import OnnxRunner
from tests.bundle.made import checked


def tuned(bundle: gati_jax.Bundle, *, differ: int = 3, steady: bool = True) -> gati_jax.Bundle:
    """The bundle with a tuning for ONNX Runtime: checked, and with costs if ``steady``."""
    pytest.importorskip("onnx", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    tuning = onnx_tuning(bundle.chain, bundle.caches, sizes=(1, 5))
    tiles = tuning.tiles
    if steady:  # n blocks take n ms for one request, and three times as long for five; a lookup takes a quarter
        blocks, lookups = range(1, 1 + len(bundle.chain)), [cache.name for cache in bundle.caches]
        tiles = tuple(
            dataclasses.replace(
                tile,
                costs=CostTable(
                    device="test",
                    batch=tile.size,
                    blocks_ms=tuple(float(k * ms) for k in blocks),
                    lookup_ms=dict.fromkeys(lookups, ms / 4),
                ),
            )
            for tile, ms in zip(tiles, (1, 3), strict=True)
        )
    return dataclasses.replace(bundle, tunings=(checked(bundle, dataclasses.replace(tuning, tiles=tiles), differ),))


def sources(bundle: gati_jax.Bundle, *thresholds: float) -> list[routes.CascadeRoute]:
    """Its routes on ONNX Runtime, the first of them with these thresholds."""
    plan, *rest = routes.load(tuned(bundle), backend="onnxruntime")
    if thresholds:
        cascade = dataclasses.replace(plan.cascade, thresholds=jnp.asarray(thresholds, jnp.float32))
        plan = dataclasses.replace(plan, cascade=cascade)
    return [plan, *rest]


def runner(bundle: gati_jax.Bundle, *thresholds: float, capacity: int) -> OnnxRunner:
    """A runner of both of its routes."""
    return OnnxRunner(sources(bundle, *thresholds), capacity=capacity)
