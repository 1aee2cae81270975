"""Every program lowers for CUDA, without a GPU: no call back to the host, and nothing that only a CPU has."""

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax.caches import ClassToken, Grid, LinearSelector, SortedSelector
from gati_jax.models import fold, init, to_chain
from gati_jax.models.architectures import ResNet
from gati_jax.models.transformers import ViT
from gati_jax.profiling.bfloat16 import _every_output, cascade_in_bfloat16
from gati_jax.runtime import Cascade, hosted
from gati_jax.runtime.batched import BatchedCascade, Schedule, answer_tiled
from gati_jax.runtime.branches import answer_nested, answer_one_nested
from gati_jax.runtime.cascade import _predict_batch, _predict_one, answer_only
from serve.engine import programs

NETWORKS = {
    "residual": (
        ResNet(stages=(1, 1), widths=(4, 8), shortcut="B", input_shape=(8, 8, 3)),
        Grid(10, cells=2, hidden=4),
    ),
    "transformer": (
        ViT(patch=4, width=8, depth=2, heads=2, hidden=8, input_shape=(8, 8, 3)),
        ClassToken(10, hidden=4, standardize=False),
    ),
}
HARMLESS = {"mhlo.topk", "Sharding"}
"""Which XLA expands by itself on every platform."""


def cascade_of(name: str) -> Cascade:
    """A cascade with a cache at the input and one behind the first block."""
    network, predictor = NETWORKS[name]
    chain = to_chain(network, fold(init(network, jax.random.key(0))))
    chain = dataclasses.replace(chain, normalization=gati_jax.Normalization(mean=(0.5,), std=(0.5,)))
    caches = []
    for site, selector in ((0, LinearSelector()), (1, SortedSelector())):
        predictor = predictor if site else Grid(10, cells=2, hidden=4)
        activation = jnp.zeros((1, *chain.site_specs[site].shape))
        variables = {
            "predictor": predictor.init(jax.random.key(0), activation),
            "selector": selector.init(jax.random.key(1), jnp.zeros((1, 10))),
        }
        caches.append(gati_jax.Candidate(f"c@{site}", site, predictor, selector, variables))
    return Cascade(chain, tuple(caches), jnp.zeros(2))


def trace(function: Callable[..., Any], *inputs: Any, **static: Any) -> jax.stages.Traced:
    """Trace a program of leaves alone: what JAX keeps of other trees is refused by the checks of their types."""
    leaves, tree = jax.tree.flatten(inputs)
    return jax.jit(lambda leaves: function(*tree.unflatten(leaves), **static)).trace(leaves)


def traced(cascade: Cascade) -> dict[str, jax.stages.Traced]:
    """Every program of the drivers and of the server, by name."""
    images, tiles = np.zeros((4, 8, 8, 3), np.uint8), Schedule.of({1: 1.0, 4: 2.0})
    tiled = BatchedCascade.of(cascade, tiles)
    state = jax.eval_shape(hosted._first, cascade.packed, images, np.int32(4))
    outputs, _ = jax.eval_shape(lambda rows: hosted._run(cascade.packed, rows, index=1, size=2), state[0])
    found = {
        "per sample": trace(_predict_one, cascade.packed, images[0]),
        "a batch of one": trace(answer_only, cascade.packed, images[:1]),
        "row by row": trace(_predict_batch, cascade.packed, images),
        "tiles": trace(answer_tiled, tiled.packed, images, np.int32(4)),
        "nest of one": trace(answer_one_nested, cascade.packed, images[:1]),
        "nest": trace(answer_nested, cascade.packed, images, np.int32(4)),
        "the host's first": trace(hosted._first, cascade.packed, images, np.int32(4)),
        "the host's stage": trace(hosted._run, cascade.packed, state[0], index=1, size=2),
        "the host's answers": trace(hosted._leave, cascade.packed, state[0], outputs, state[1], index=1),
        "replay": trace(_every_output, cascade.packed, images),
    }
    for stage in range(3):
        leaves, structure = programs.leaves_of(cascade, stage)
        source = programs.slab(cascade, stage - 1, 8) if stage else programs.to_source(cascade.chain, (), 4)
        after = programs.slab(cascade, stage, 8) if stage < 2 else None
        slots = np.arange(4, dtype=np.int32)
        found[f"served stage {stage}"] = trace(
            programs._run, leaves, source, slots, after, structure=structure, stage=stage
        )
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("network", "dtype"), [*itertools.product(["residual", "transformer"], ["float32", "bfloat16"])]
)
def test_everything_lowers_for_cuda(network, dtype):
    cascade, rounded = cascade_of(network), dtype == "bfloat16"
    for name, program in traced(cascade_in_bfloat16(cascade) if rounded else cascade).items():
        text = program.lower(lowering_platforms=("cuda",)).as_text()
        assert "callback" not in text, name
        targets = set(re.findall(r"custom_call @([\w.$]+)|call_target_name = \"([^\"]+)\"", text))
        assert {one or other for one, other in targets} <= HARMLESS, name
        products = re.findall(r"stablehlo\.(?:convolution|dot_general).*?: \(tensor<(?:\d+x)*([a-z]\w*)>,", text)
        if name not in {"the host's first", "the host's answers", "served stage 0", "the host's stage"}:
            assert ("bf16" in products) == rounded, name


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it lowers for the device that is here")
def test_a_call_back_to_the_host_would_be_seen():
    def tells(x):
        jax.debug.callback(print, x)
        return x

    with pytest.raises(ValueError, match="different from the lowering platform cuda"):
        jax.jit(tells).trace(jnp.ones(3)).lower(lowering_platforms=("cuda",))
