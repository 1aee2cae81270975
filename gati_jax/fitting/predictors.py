"""Train the predictors of one base by distillation: all sites and heads in one pass over the data.

The base takes nearly all of the time. So a batch of augmented images goes through it once, on the fastest backend, and
what predictors read of its activations (means over a grid, say) is kept for a while, in memory that has a bound:
further steps draw their rows from it (data echoing: Choi et al., arXiv:1907.05550).
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from pydantic import Field

from gati_jax import data
from gati_jax.caches import Activations, fold_standardize, predict_all, predictor_inputs, summary_for
from gati_jax.caches.candidate import Logits, Part
from gati_jax.devices import Devices, sharing
from gati_jax.errors import InputError
from gati_jax.models import Chain
from gati_jax.options import Count, NotNegative, Positive, Seed, check_options
from gati_jax.pytrees import Static, tree_bytes

from .base import Images, Inputs, base_runner
from .loop import LoopConfig, LoopState, Step, checkpoint_folder, report_budget, run_loop, within_minutes

_INIT_ROWS = 512  # enough for the features' means and scales
_RECENT_BYTES, _RECENT_BATCHES = 2**28, 32  # at most: a checkpoint has them, too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Random shifts and mirroring of training images."""

    pad: Annotated[int, Field(ge=0, le=64, description="largest shift in each direction, in pixels; zeros move in")] = 0
    flip: Annotated[bool, Field(description="mirror half of the images left to right")] = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)

    def __call__(self, key: PRNGKeyArray, images: Images) -> Images:
        """Augment every image[height, width, channels] on its own; without options, take any input.

        Raises:
            InputError: There are options, but the inputs are not images.
        """
        if not (self.pad or self.flip):
            return images
        if images.ndim != 4:  # noqa: PLR2004
            raise InputError(
                f"augment: expected images[batch, height, width, channels] to shift or flip, got {list(images.shape)}"
            )
        crop_key, flip_key = jax.random.split(key)
        batch, *shape = images.shape
        if self.pad:
            padded = jnp.pad(images, ((0, 0), (self.pad, self.pad), (self.pad, self.pad), (0, 0)))
            corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * self.pad + 1)
            images = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), shape))(padded, corners)
        if self.flip:
            flipped = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
            images = jnp.where(flipped, images[:, :, ::-1], images)
        return images


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How predictors and selectors are trained."""

    epochs: Annotated[Count, Field(description="passes of all predictors over the fit split")] = 5
    batch: Annotated[Count, Field(description="images in a step")] = 128
    reuse: Annotated[
        int,
        Field(
            ge=1,
            le=64,
            description="steps for each batch that the base runs: one on it, the others on rows drawn from recent ones",
        ),
    ] = 1
    optimizer: Annotated[
        Literal["adamw", "sgd"],
        Field(description="adamw, or the paper's sgd with momentum 0.9; linear warm-up and cosine decay with both"),
    ] = "adamw"
    learning_rate: Annotated[Positive, Field(description="at its peak")] = 1e-2
    weight_decay: Annotated[NotNegative, Field(description="decoupled for adamw, L2 for sgd")] = 1e-3
    alpha: Annotated[float, Field(ge=0, le=1, description="weight of the soft term of the distillation loss")] = 0.5
    temperature: Annotated[Positive, Field(description="of the distillation loss")] = 6.0
    augment: Annotated[Augment, Field(description="shifts and mirroring of the fit split")] = Augment()
    folds: Annotated[int, Field(ge=2, le=20, description="of the select split, for out-of-fold selector scores")] = 5
    seed: Annotated[Seed, Field(description="of initial values, order and augmentation")] = 0
    minutes: Annotated[
        Positive | None,
        Field(description="time for the passes, compilation included: as many epochs as fit into it; unset: all"),
    ] = dataclasses.field(default=None, repr=False)
    """Not in the repr, by which fits are told apart: a resumed fit with more time continues the earlier one."""

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)


DEFAULT_CONFIG = FitConfig()


class Trained(NamedTuple):
    """Trained predictors."""

    parts: dict[str, Part]
    """With their variables, ``Standardize`` folded away."""
    epochs: float
    """Passes over the data: fewer than configured if the time was up."""


def optimizer_of(config: FitConfig, steps: Int[Array, ""]) -> optax.GradientTransformation:
    """Return the optimizer for a fit of ``steps`` steps; as their number is traced, another one compiles nothing."""
    warm = steps // 10

    def rate(count: ArrayLike) -> Array:
        step = jnp.asarray(count)
        rising = step / jnp.maximum(warm, 1)
        falling = (1 + jnp.cos(jnp.pi * (step - warm) / jnp.maximum(steps - warm, 1))) / 2
        return config.learning_rate * jnp.where(step < warm, rising, falling)

    if config.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=config.weight_decay)
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(rate, momentum=0.9))


def _on_summaries(parts: Mapping[str, Part]) -> tuple[Inputs, Static]:
    """Return what predictors read, and the parts that read it: their sites are indices of these inputs."""
    reads = {name: (part.site, summary_for(part.predictor)) for name, part in parts.items()}
    inputs = tuple(sorted(set(reads.values())))
    moved = ((name, dataclasses.replace(part, site=inputs.index(reads[name]))) for name, part in parts.items())
    return inputs, Static(tuple(moved))


@functools.partial(jax.jit, static_argnames=("parts", "seed"))
def _init(
    sites: list[Array], base_logits: Array, *, parts: Static, seed: int
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Return initial parameters, and the constants that predictors take from their first activations."""
    keys = jax.random.split(jax.random.key(seed), len(parts.values))
    any_logits = {name: base_logits for name, _ in parts.values}  # of the right shape, for cascaded ones
    params, constants = {}, {}
    for key, (name, part) in zip(keys, parts.values, strict=True):
        constants[name] = dict(part.predictor.init(key, *predictor_inputs(part, sites, any_logits)))
        params[name] = constants[name].pop("params")
    return params, constants


def train_predictors(
    chain: Chain,
    parts: dict[str, Part],
    images: data.Images,
    config: FitConfig,
    *,
    checkpoint: Path | None,
    identity: str,
    progress: bool,
    clock: Callable[[], float] = time.monotonic,
) -> Trained:
    """Train predictors on ``images``; ``checkpoint`` and ``identity`` as for ``run_loop``, ``clock`` for the budget.

    Raises:
        InputError: Fewer images than one batch, or a predictor diverged.
    """
    if len(images) < config.batch:
        raise InputError(f"images: expected at least one batch of {config.batch} rows, got {len(images)}")
    if config.minutes is not None and jax.process_count() > 1:
        raise InputError(f"minutes: expected none with several processes, whose clocks differ, got {config.minutes}")
    devices = sharing(config.batch)
    inputs, static = _on_summaries(parts)
    drawn = np.random.default_rng(config.seed).permutation(len(images))[:_INIT_ROWS]
    first_rows = base_runner(chain, inputs)(images[drawn])
    run = base_runner(chain, inputs, devices)
    params, constants = _init(*first_rows, parts=static, seed=config.seed)
    per_epoch = len(images) // config.batch
    planned = per_epoch * config.epochs
    # The length of a fit is data, and not part of the program: longer fits share it.
    program = dataclasses.replace(config, epochs=1, minutes=None)
    optimizer = optimizer_of(config, jnp.asarray(planned)).init(params)
    recent = _no_recent(*first_rows, config, per_epoch)
    first = devices.copy(LoopState(jnp.zeros((), jnp.int32), params, (optimizer, recent)))
    shared = devices.copy(constants)
    loop = LoopConfig(epochs=config.epochs, batch=config.batch, seed=config.seed, clock=clock)

    def step_of(steps: int) -> Step:
        total = devices.copy(jnp.asarray(steps, jnp.int32))

        def step(state: LoopState, rows: np.ndarray) -> tuple[LoopState, Float[Array, ""]]:
            found = run(_augment(devices.split(rows), state.step, config=program))
            return _step(shared, total, *found, state=state, parts=static, config=program, devices=devices)

        return step

    record = None if checkpoint is None else checkpoint_folder(checkpoint, identity).with_suffix(".budget.json")
    if config.minutes is not None:
        loop = within_minutes(step_of(planned), first, (images,), loop, config.minutes, record)
    state = run_loop(
        step_of(loop.steps or planned),
        first,
        (images,),
        loop,
        checkpoint=checkpoint,
        identity=identity,
        description=f"fitting {len(parts)} predictors",
        progress=progress,
    )
    if config.minutes is not None:
        report_budget(int(state.step), loop, per_epoch, config.minutes, record)
    learned = devices.collect(state.params)
    check_finite(learned)
    variables = merge(learned, constants)
    trained = {}
    for name, part in parts.items():
        predictor, folded = fold_standardize(part.predictor, variables[name])
        trained[name] = dataclasses.replace(part, predictor=predictor, variables=folded)
    return Trained(trained, int(state.step) / per_epoch)


def merge(params: dict[str, PyTree], constants: dict[str, PyTree]) -> dict[str, PyTree]:
    """Return whole variables: parameters, and the constants that were taken from the first activations."""
    return {name: {"params": params[name], **constants[name]} for name in params}


def _no_recent(inputs: list[Array], base_logits: Logits, config: FitConfig, per_epoch: int) -> tuple[Array, ...]:
    """Return room for the inputs and the base logits of recent batches; none where each is used only once."""
    if config.reuse == 1:
        return ()
    arrays = (*inputs, base_logits)
    most = _RECENT_BYTES * len(base_logits) // (tree_bytes(arrays) * config.batch)
    rows = max(1, min(_RECENT_BATCHES, per_epoch, most)) * config.batch
    return tuple(jnp.zeros((rows, *array.shape[1:]), array.dtype) for array in arrays)


@functools.partial(jax.jit, static_argnames="config")
def _augment(images: Images, step: Int[Array, ""], *, config: FitConfig) -> Images:
    return config.augment(jax.random.fold_in(jax.random.key(config.seed + 1), step), images)


@functools.partial(jax.jit, static_argnames=("parts", "config", "devices"), donate_argnames="state")
def _step(
    constants: dict[str, PyTree],
    steps: Int[Array, ""],
    inputs: list[Array],
    base_logits: Logits,
    *,
    state: LoopState,
    parts: Static,
    config: FitConfig,
    devices: Devices,
) -> tuple[LoopState, Float[Array, ""]]:
    """Advance all predictors by a new batch, then by ``reuse - 1`` batches of rows drawn from the recent ones.

    Returns the loss of the new batch, from which nothing was learned before.
    """
    at, (optimizer, recent) = state.step, state.opt_state
    inputs, base_logits = devices.as_rows((inputs, base_logits))
    learn = functools.partial(advance, constants, steps * config.reuse, parts=parts, config=config)
    learned, loss = learn(inputs, base_logits, state=LoopState(at, state.params, optimizer))
    if recent:
        room = len(recent[0]) // config.batch
        new, start = (*inputs, base_logits), at % room * config.batch
        recent = tuple(jax.lax.dynamic_update_slice_in_dim(*pair, start, 0) for pair in zip(recent, new, strict=True))
        known = jnp.minimum(at + 1, room) * config.batch
        key = jax.random.fold_in(jax.random.key(config.seed + 3), at)
        drawn = jax.random.randint(key, (config.reuse - 1, config.batch), 0, known)

        def again(state: LoopState, rows: Array) -> tuple[LoopState, None]:
            *some, logits = (devices.as_rows(array[rows]) for array in recent)
            return learn(some, logits, state=state)[0], None

        learned, _ = jax.lax.scan(again, learned, drawn)
    return devices.as_copies((LoopState(at + 1, learned.params, (learned.opt_state, recent)), loss))


def advance(
    constants: dict[str, PyTree],
    steps: Int[Array, ""],
    sites: Activations,
    base_logits: Logits,
    *,
    state: LoopState,
    parts: Static,
    config: FitConfig,
) -> tuple[LoopState, Float[Array, ""]]:
    """Advance all predictors by one batch of activations, in a fit of ``steps`` steps.

    The sum of the losses leaves each predictor's gradient independent of the others.
    """

    def loss(params: PyTree) -> Float[Array, ""]:
        losses = [
            distillation_loss(logits, base_logits, alpha=config.alpha, temperature=config.temperature)
            for logits in predict_all(dict(parts.values), merge(params, constants), sites).values()
        ]
        return jnp.sum(jnp.stack(losses))

    value, gradients = jax.value_and_grad(loss)(state.params)
    optimizer = optimizer_of(config, steps)
    params, opt_state = apply_gradients(optimizer, gradients, state.opt_state, state.params)
    return LoopState(state.step + 1, params, opt_state), value / len(parts.values)


def check_finite(params: dict[str, PyTree]) -> None:
    """Check that no predictor diverged.

    Raises:
        InputError: Names those that did.
    """
    if bad := [name for name, tree in params.items() if not all(np.isfinite(a).all() for a in jax.tree.leaves(tree))]:
        raise InputError(f"fit: {', '.join(bad)} diverged: expected finite parameters; is the learning rate too high?")


def distillation_loss(
    logits: Logits, base_logits: Logits, *, alpha: float = 0.5, temperature: float = 6.0
) -> Float[Array, ""]:
    """Return the batch's mean of ``alpha T^2 KL(base_T || predictor_T) + (1 - alpha) CE(predictor, base's answer)``.

    Args:
        logits: The predictor's.
        base_logits: The base's, for the same augmented images.
        alpha: Weight of the soft term.
        temperature: T, by which both logits are divided in the soft term (GATI's released code: alpha 0.5, T 6).
    """
    soft = optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(logits / temperature), jax.nn.log_softmax(base_logits / temperature)
    )
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.argmax(base_logits, -1))
    return jnp.mean(alpha * temperature**2 * soft + (1 - alpha) * hard)


P = TypeVar("P")


def apply_gradients(
    optimizer: optax.GradientTransformation, gradients: P, opt_state: optax.OptState, params: P
) -> tuple[P, Any]:
    """Return updated parameters and optimiser state.

    optax raises floats to the power of an int32 step count, which strict dtype promotion forbids: it is relaxed here
    only.
    """
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradients, opt_state, params)  # pyright: ignore[reportArgumentType] (pytrees)
        return optax.apply_updates(params, updates), opt_state  # pyright: ignore[reportReturnType, reportArgumentType]
