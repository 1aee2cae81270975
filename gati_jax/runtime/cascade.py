"""A cascade, the state of a request in it, the one pure step, and the drivers that repeat it for each request alone.

Stage i runs the blocks up to the i-th chosen site and the cache there; the last stage runs the rest of the base. Every
request runs stage 0, so it comes before the loop. Sites have activations of different shapes, but a loop's carry has
one shape: the activation travels in a flat buffer as large as the largest of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from gati_jax.caches import Candidate, lookup
from gati_jax.errors import InputError
from gati_jax.models import Chain
from gati_jax.models.chain import reference
from gati_jax.pytrees import Packed, is_traced, pack, unpack

CompilerOptions = tuple[tuple[str, str], ...]
"""Names and values."""


@functools.cache
def compiled(
    function: Callable[..., Any],
    options: CompilerOptions,
    *,
    static: tuple[str, ...] = (),
    keep_unused: bool = False,
    donate: tuple[str, ...] = (),
) -> jax.stages.Wrapped:
    """Return ``function`` jitted with compiler options; the same function and options give the same object.

    Args:
        function: A function at module level, for the cache would keep whatever a closure holds.
        options: Compiler options.
        static: Names of static arguments.
        keep_unused: Pass arrays to the program even if it does not read them.
        donate: Names of arguments whose memory the results may take.
    """
    return jax.jit(
        function,
        static_argnames=static,
        donate_argnames=donate,
        keep_unused=keep_unused,
        compiler_options=dict(options) or None,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cascade:
    """A base with caches and thresholds, ready to run. Its arrays are leaves: new ones of equal shapes never recompile.

    Args:
        chain: The base.
        caches: Caches in the order of their sites, one at a site.
        thresholds: float32, one for each cache; a score at or above it is a hit.
    """

    chain: Chain
    caches: tuple[Candidate, ...]
    thresholds: Float[Array, " caches"]

    @property
    def sites(self) -> tuple[int, ...]:
        """The sites of the caches."""
        return tuple(cache.site for cache in self.caches)

    @functools.cached_property
    def packed(self) -> Packed["Cascade"]:
        """The same in few arguments, as drivers pass it to their programs."""
        if is_traced(self):
            return pack(self)
        with jax.ensure_compile_time_eval():  # it is kept, also where a program that is being traced asks first
            return pack(self)


class CascadeState(NamedTuple):
    """The state of one request."""

    # Evolving
    stage: Int[Array, ""]  # the next to run
    activation: Float[Array, " buffer"]  # at the last stage's site, flat, padded
    done: Bool[Array, ""]
    # Outputs of the last stage: the answer once done
    exit: Int[Array, ""]  # site number, N for the base
    score: Float[Array, ""]  # infinity from the base
    logits: Float[Array, " classes"]


class StageOutputs(NamedTuple):
    """What one stage computes."""

    activation: Float[Array, "batch *site"]  # at the stage's site
    logits: Float[Array, "batch classes"]  # of the cache there, of the base in the last stage
    score: Float[Array, " batch"]  # of the cache; infinity in the last stage


class Prediction(NamedTuple):
    """The answer to one request (or, with a leading batch dimension, to many)."""

    class_index: Int[Array | np.ndarray, "*batch"]
    exit: Int[Array | np.ndarray, "*batch"]  # site number, or N for the base
    score: Float[Array | np.ndarray, "*batch"]  # log-odds of agreeing with the base; infinity from the base itself
    logits: Float[Array | np.ndarray, "*batch classes"]


def check_cascade(cascade: Cascade) -> None:
    """Check that caches and thresholds fit the chain.

    Raises:
        InputError: Sites out of order or range, cascaded caches, activations that no float32 buffer can carry, or not
            one threshold for each cache.
    """
    sites, specs = cascade.sites, cascade.chain.site_specs
    if sorted(set(sites)) != list(sites) or any(not 0 <= site < len(cascade.chain) for site in sites):
        raise InputError(f"caches: expected rising sites in 0 .. {len(cascade.chain) - 1}, got {sites}")
    if cascaded := [cache.name for cache in cascade.caches if cache.previous is not None]:
        raise InputError(
            f"caches: expected none that takes another's logits (no driver passes them on), got {', '.join(cascaded)}"
        )
    floats = {jnp.dtype(name) for name in ("float32", "float16", "bfloat16")}
    if bad := [site for site in sites if specs[site].dtype not in floats]:
        got = ", ".join(f"{specs[site].dtype} at {site}" for site in bad)
        raise InputError(f"caches: expected float32, float16 or bfloat16 activations, got {got}")
    if cascade.thresholds.shape != (len(sites),):
        raise InputError(
            f"thresholds: expected one for each of {len(sites)} caches, got shape {list(cascade.thresholds.shape)}"
        )


def begin(cascade: Cascade, image: Shaped[Array, "*input"]) -> CascadeState:
    """Return the state of a request after stage 0, which every request runs."""
    sizes = [math.prod(cascade.chain.site_specs[site].shape) for site in cascade.sites]
    dtypes = {cascade.chain.site_specs[site].dtype for site in cascade.sites}
    only_half = dtypes == {jnp.dtype(jnp.bfloat16)}  # then nothing is lost in half the memory
    buffer = jnp.zeros(max(sizes, default=0), jnp.bfloat16 if only_half else jnp.float32)
    return _run_stage(cascade, 0, cascade.chain.prepare(image[None]), buffer)


def step(packed: Packed[Cascade], state: CascadeState) -> CascadeState:
    """Run one more stage. Pure; a driver repeats it until ``done``.

    The cascade comes packed, and every branch unpacks what it needs: arrays that are unpacked outside would be sliced
    out of the packed vector, one by one, for all branches and on every request, whether or not their stage is run.
    """
    cascade = unpack(packed)  # for its structure
    if not cascade.caches:
        return state  # stage 0 was the base, and the request is done

    def stage(index: int) -> Callable[[CascadeState], CascadeState]:
        spec = cascade.chain.site_specs[cascade.sites[index - 1]]
        return lambda state: _run_stage(unpack(packed), index, _from_buffer(state.activation, spec), state.activation)

    return jax.lax.switch(state.stage - 1, [stage(i) for i in range(1, len(cascade.caches) + 1)], state)


def run_stage(cascade: Cascade, index: int, x: Shaped[Array, "batch *site"]) -> StageOutputs:
    """Run one stage: the blocks from the previous site on, then the cache or, in the last stage, the classifier.

    Args:
        cascade: See ``Cascade``.
        index: Number of the stage, from 0.
        x: The activation at the previous stage's site; in stage 0, prepared inputs.
    """
    chain = cascade.chain
    start = cascade.sites[index - 1] if index else 0
    if index == len(cascade.caches):
        x = chain.span(x, start, len(chain))
        logits, score = chain.classify(x), jnp.full(len(x), jnp.inf)
    else:
        x = chain.span(x, start, cascade.sites[index])
        logits, score = lookup(cascade.caches[index], x)
    return StageOutputs(x, logits.astype(jnp.float32), score.astype(jnp.float32))


def _run_stage(
    cascade: Cascade, index: int, x: Shaped[Array, "1 *site"], buffer: Float[Array, " buffer"]
) -> CascadeState:
    outputs = run_stage(cascade, index, x)
    activation = outputs.activation.reshape(-1)
    last = index == len(cascade.caches)
    return CascadeState(
        stage=jnp.int32(index + 1),
        activation=buffer if last else buffer.at[: activation.size].set(activation.astype(buffer.dtype)),
        done=jnp.array(True) if last else outputs.score[0] >= cascade.thresholds[index],  # noqa: FBT003
        exit=jnp.int32((*cascade.sites, len(cascade.chain))[index]),
        score=outputs.score[0],
        logits=outputs.logits[0],
    )


def _from_buffer(buffer: Float[Array, " buffer"], spec: jax.ShapeDtypeStruct) -> Float[Array, "1 ..."]:
    return buffer[: math.prod(spec.shape)].reshape(1, *spec.shape).astype(spec.dtype)


def finish(state: CascadeState) -> Prediction:
    """Turn the state of a request that is done into its answer."""
    return Prediction(jnp.argmax(state.logits, -1).astype(jnp.int32), state.exit, state.score, state.logits)


@reference
def _predict_one(packed: Packed[Cascade], image: Shaped[Array | np.ndarray, "*input"]) -> Prediction:
    state = begin(unpack(packed), jnp.asarray(image))
    return finish(jax.lax.while_loop(lambda state: ~state.done, lambda state: step(packed, state), state))


@jax.jit
@reference
def _predict_batch(packed: Packed[Cascade], images: Shaped[Array | np.ndarray, "batch *input"]) -> Prediction:
    return jax.lax.map(lambda image: _predict_one(packed, image), images)


def predict_one(
    cascade: Cascade, image: Shaped[Array | np.ndarray, "*input"], options: CompilerOptions = ()
) -> Prediction:
    """Answer one request in one program: a ``lax.while_loop`` that stops at the first hit.

    Stages beyond the exit are skipped, not masked: the loop's body is a ``lax.switch`` that runs one stage only.

    Args:
        cascade: See ``Cascade``; its arrays are arguments of the program, its structure selects the program.
        image: One uint8 image or prepared input, without a batch dimension.
        options: Compiler options of the program.
    """
    return compiled(_predict_one, options)(cascade.packed, image)


@reference
def answer_only(packed: Packed[Cascade], images: Shaped[Array | np.ndarray, "1 *input"]) -> Prediction:
    """Answer a batch of one: the program of ``predict_only``, to be traced."""
    return jax.tree.map(lambda column: column[None], _predict_one(packed, images[0]))


def predict_only(
    cascade: Cascade, images: Shaped[Array | np.ndarray, "1 *input"], options: CompilerOptions = ()
) -> Prediction:
    """Answer a batch of one, as ``predict_one`` does; the batch dimension is handled inside the program."""
    return compiled(answer_only, options)(cascade.packed, images)


def predict_batch(cascade: Cascade, images: Shaped[Array | np.ndarray, "batch *input"]) -> Prediction:
    """Answer many requests in one program, one after another; each leaves at its own exit.

    ``vmap`` would run every branch for every row. Here rows share nothing, so skipped blocks are saved time; but a
    device is slower at one row after another than at tiles, see ``predict_tiled``.
    """
    return _predict_batch(cascade.packed, images)


def predict_stepwise(cascade: Cascade, image: Shaped[Array | np.ndarray, "*input"]) -> Prediction:
    """Answer one request by the same step in a plain Python loop: for debugging, and as a check on the jitted loop."""
    with jax.default_matmul_precision("highest"), jax.disable_jit():  # or every lax.switch would compile its branches
        state = begin(cascade, jnp.asarray(image))
        while not state.done:
            state = step(cascade.packed, state)
        return finish(state)
