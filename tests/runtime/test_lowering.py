"""Every program lowers for CUDA, without a GPU: no call back to the host, and nothing that only a CPU has."""

import dataclasses
import re

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
from gati_jax.profiling.compiler import ROUNDED
from gati_jax.runtime import Cascade, compiled, hosted
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


@pytest.fixture(scope="module", params=NETWORKS)
def cascade(request) -> Cascade:
    network, predictor = NETWORKS[request.param]
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


def traced(cascade: Cascade) -> dict[str, jax.stages.Traced]:
    """Every program of the drivers and of the server, by name."""
    images, tiles = np.zeros((4, 8, 8, 3), np.uint8), Schedule.of({1: 1.0, 4: 2.0})
    tiled = BatchedCascade.of(cascade, tiles)
    state = jax.eval_shape(hosted._first, cascade.packed, images, np.int32(4))
    outputs, _ = jax.eval_shape(lambda rows: hosted._run(cascade.packed, rows, index=1, size=2), state[0])
    found = {
        "per sample": compiled(_predict_one, ()).trace(cascade.packed, images[0]),
        "a batch of one": compiled(answer_only, ()).trace(cascade.packed, images[:1]),
        "row by row": _predict_batch.trace(cascade.packed, images),
        "tiles": compiled(answer_tiled, ()).trace(tiled.packed, images, np.int32(4)),
        "nest of one": compiled(answer_one_nested, ()).trace(cascade.packed, images[:1]),
        "nest": compiled(answer_nested, ()).trace(cascade.packed, images, np.int32(4)),
        "the host's first": compiled(hosted._first, ()).trace(cascade.packed, images, np.int32(4)),
        "the host's stage": compiled(hosted._run, (), static=("index", "size")).trace(
            cascade.packed, state[0], index=1, size=2
        ),
        "the host's answers": compiled(hosted._leave, (), static=("index",)).trace(
            cascade.packed, state[0], outputs, state[1], index=1
        ),
        "replay": compiled(_every_output, ROUNDED).trace(cascade.packed, images),
    }
    for stage in range(3):
        leaves, structure = programs.leaves_of(cascade, stage)
        source = programs.slab(cascade, stage - 1, 8) if stage else programs.to_source(cascade.chain, (), 4)
        after = programs.slab(cascade, stage, 8) if stage < 2 else None
        run = compiled(programs._run, (), static=("structure", "stage"), donate=("after",))
        found[f"served stage {stage}"] = run.trace(
            leaves, source, np.arange(4, dtype=np.int32), after, structure=structure, stage=stage
        )
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_everything_lowers_for_cuda(cascade, dtype):
    rounded = dtype == "bfloat16"
    for name, program in traced(cascade_in_bfloat16(cascade) if rounded else cascade).items():
        text = program.lower(lowering_platforms=("cuda",)).as_text()
        assert "callback" not in text, name
        targets = set(re.findall(r"custom_call @([\w.$]+)|call_target_name = \"([^\"]+)\"", text))
        assert {one or other for one, other in targets} <= HARMLESS, name
        products = re.findall(r"stablehlo\.(?:convolution|dot_general).*?: \(tensor<[\dx]*?(\w+)>,", text)
        if name not in {"the host's first", "the host's answers", "served stage 0", "the host's stage"}:
            assert ("bf16" in products) == rounded, name


@pytest.mark.gpu
def test_a_call_back_to_the_host_would_be_seen():
    def tells(x):
        jax.debug.callback(print, x)
        return x

    text = jax.jit(tells).trace(jnp.ones(3)).lower(lowering_platforms=("cuda",)).as_text()
    assert "callback" in text
