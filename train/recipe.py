"""How a base is trained: one pure step, its schedule and its optimizer.

uint8 rows -> crop, flip -> normalise -> cutout -> network (float32 or bfloat16) -> smoothed cross-entropy
gradients -> weight decay -> SGD with Nesterov momentum, or Muon -> parameters -> their moving average
"""

import contextlib
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt8

from gati_jax import Normalization
from gati_jax.fitting import LoopState, apply_gradients
from gati_jax.models import Architecture, Variables, apply_train, init

from .config import BaseTraining, Config
from .epochs import steps_per_epoch

Metrics = dict[str, Float[Array, ""]]


class Weights(NamedTuple):
    """Trained variables, and their exponential moving average, running statistics included, where one is kept."""

    trained: Variables
    average: Variables | None

    @property
    def final(self) -> Variables:
        """The weights to evaluate and keep."""
        return self.trained if self.average is None else self.average


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that stays the same from step to step."""

    network: Architecture
    normalization: Normalization
    training: BaseTraining
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    seed: int

    @classmethod
    def of(cls, config: Config, n: int) -> "Recipe":
        """Return the recipe of a config, for ``n`` rows to train on."""
        training = config.base.training
        schedule = make_schedule(training, n)
        return cls(
            network=config.base.architecture(),
            normalization=config.base.normalize(),
            training=training,
            optimizer=make_optimizer(training, schedule),
            schedule=schedule,
            seed=config.seed,
        )


def learning_rate(schedule: optax.Schedule, step: int) -> float:
    """Return the rate of a step, 0 the first, on the host; optax's schedules mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        return float(np.asarray(schedule(step)))


def make_schedule(training: BaseTraining, n: int) -> optax.Schedule:
    """Return one cycle: up to the peak, and down by a cosine."""
    steps = training.epochs * steps_per_epoch(n, training.batch)
    return optax.cosine_onecycle_schedule(steps, training.learning_rate, pct_start=training.warm_up)


def make_optimizer(training: BaseTraining, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return SGD with Nesterov momentum, AdamW, or Muon for all kernels but the classifier's; only kernels decay."""
    if training.optimizer == "sgd":
        decay = optax.add_decayed_weights(training.weight_decay, _kernels)
        return optax.chain(decay, optax.sgd(schedule, momentum=training.momentum, nesterov=True))
    if training.optimizer == "adamw":
        return optax.adamw(schedule, b1=training.momentum, weight_decay=training.weight_decay, mask=_kernels)
    rest = training.rest_learning_rate / training.learning_rate  # the same cycle, another height
    return optax.contrib.muon(
        schedule,
        beta=training.momentum,
        weight_decay=training.weight_decay,
        weight_decay_mask=_kernels,
        adam_learning_rate=lambda step: rest * schedule(step),
        muon_weight_dimension_numbers=_convolutions,
    )


def _kernels(params: PyTree) -> PyTree[bool]:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _convolutions(params: PyTree) -> PyTree:
    """Return which leaves are convolutions' kernels, [height, width, in, out]: matrices with patches for rows."""
    patch = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    return jax.tree.map(lambda leaf: patch if leaf.ndim == 4 else None, params)  # noqa: PLR2004


def begin(recipe: Recipe, key: PRNGKeyArray) -> LoopState:
    """Return the state before the first step."""
    # Run once: to optimise its generators of random bits takes the compiler longer than everything else here.
    draw = jax.jit(init, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
    variables = draw(recipe.network, key)
    opt_state = recipe.optimizer.init(_params(variables))
    # Copies: a donated state may hold each array only once.
    weights = Weights(variables, jax.tree.map(jnp.copy, variables) if recipe.training.average else None)
    return LoopState(jnp.zeros((), jnp.int32), weights, opt_state)


def train_step(
    recipe: Recipe, state: LoopState, images: UInt8[Array, "batch *input"], labels: Int[Array, " batch"]
) -> tuple[LoopState, Metrics]:
    """Take one step; return loss and accuracy on the batch before it."""
    x = augmented(recipe, state.step, images)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, recipe.network.classes), recipe.training.label_smoothing)

    def loss(params: tuple[Any, ...]) -> tuple[Float[Array, ""], tuple[Variables, Array]]:
        logits, variables = apply_train(recipe.network, _with_params(state.params.trained, params), x)
        return optax.losses.softmax_cross_entropy(logits, targets).mean(), (variables, logits)

    # In bfloat16, batch norm and the classifier meet float32 parameters: strict promotion would refuse that.
    with jax.numpy_dtype_promotion("standard") if recipe.training.bfloat16 else contextlib.nullcontext():
        params = _params(state.params.trained)
        (value, (variables, logits)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    params, opt_state = apply_gradients(recipe.optimizer, gradients, state.opt_state, params)
    trained = _with_params(variables, params)
    weights = Weights(trained, advance_average(recipe.training.average, state.step, state.params.average, trained))
    accuracy = (jnp.argmax(logits, -1) == labels).mean()
    return LoopState(state.step + 1, weights, opt_state), {"loss": value, "accuracy": accuracy}


def augmented(recipe: Recipe, step: Int[Array, ""] | int, images: UInt8[Array, "batch *input"]) -> Array:
    """Return a step's batch as the network takes it."""
    crop, hole = jax.random.split(jax.random.fold_in(jax.random.key(recipe.seed + 1), step))
    training = recipe.training
    x = cutout(hole, recipe.normalization(training.augment(crop, images)), training.cutout)
    return x.astype(jnp.bfloat16) if training.bfloat16 else x


def advance_average(
    decay: float, step: Int[Array, ""], average: Variables | None, trained: Variables
) -> Variables | None:
    """Return the average after a step; its decay starts low, because the first weights are noise."""
    if average is None:
        return None
    t = step.astype(jnp.float32)
    keep = jnp.minimum(decay, (1 + t) / (10 + t))
    return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, average, trained)


def _params(variables: Variables) -> tuple[Any, ...]:
    return tuple(v["params"] for v in variables)


def _with_params(variables: Variables, params: tuple[Any, ...]) -> Variables:
    return tuple({**v, "params": p} for v, p in zip(variables, params, strict=True))


def cutout(
    key: PRNGKeyArray, images: Float[Array, "batch height width channels"], size: int
) -> Float[Array, "batch height width channels"]:
    """Set a square of every image to zero, the mean after normalisation (DeVries and Taylor, arXiv:1708.04552).

    Args:
        key: Draws the squares' centres, anywhere in the picture: a square may extend beyond the edge.
        images: [batch, height, width, channels].
        size: Side of the square in pixels; 0 leaves the images as they are.
    """
    if not size:
        return images
    batch, height, width, _ = images.shape
    rows, columns = (
        jax.random.randint(k, (batch, 1), 0, n) for k, n in zip(jax.random.split(key), (height, width), strict=True)
    )

    def inside(centre: Array, n: int) -> Array:
        at = jnp.arange(n).reshape(1, n) - centre + size // 2
        return (at >= 0) & (at < size)  # bool[batch, n]

    square = inside(rows, height)[:, :, None, None] & inside(columns, width)[:, None, :, None]
    return jnp.where(square, jnp.zeros((), images.dtype), images)
