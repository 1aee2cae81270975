"""Train the predictors of one base: all sites and heads in one pass over the data.

Activations and base logits are computed inside the jitted step from the same augmented images, and never stored.
The base's parameters are an argument of that step that nothing updates.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from gati_jax._errors import InputError
from gati_jax.caches import fold_standardize, predict_all, predictor_inputs
from gati_jax.models import Chain, fast_forward

from .augment import Augment
from .distill import distillation_loss
from .heads import Part
from .loop import LoopConfig, LoopState, run_loop
from .optimize import apply_gradients

_INIT_ROWS = 512  # enough to tell the features' means and scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How predictors and selectors are trained.

    Args:
        epochs: Passes of all predictors over the fit split.
        batch: Images in a step.
        optimizer: "adamw", or the paper's "sgd" with momentum 0.9; both warm up linearly and decay by a cosine.
        learning_rate: Its peak.
        weight_decay: Decoupled for adamw, L2 for sgd.
        alpha: Weight of the soft term of the distillation loss.
        temperature: Its T.
        augment: Crops and flips.
        folds: Folds of the select split.
        seed: Initial values, order and augmentation.
    """

    epochs: int = 5
    batch: int = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-2
    weight_decay: float = 1e-3
    alpha: float = 0.5
    temperature: float = 6.0
    augment: Augment = Augment()  # noqa: RUF009 (frozen)
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what could not be trained.

        Raises:
            InputError: Names the field.
        """
        if self.optimizer not in {"adamw", "sgd"}:
            msg = f"optimizer: expected adamw or sgd, got {self.optimizer!r}"
            raise InputError(msg)
        if not 0 < self.learning_rate < np.inf:
            msg = f"learning_rate: expected a positive number, got {self.learning_rate}"
            raise InputError(msg)
        for name, least in (("epochs", 1), ("batch", 1), ("folds", 2)):
            if (got := getattr(self, name)) < least:
                msg = f"{name}: expected {least} or more, got {got}"
                raise InputError(msg)


DEFAULT_CONFIG = FitConfig()


def _optimizer(config: FitConfig, n: int) -> optax.GradientTransformation:
    steps = max(1, config.epochs * (n // config.batch))
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, steps // 10, steps)
    if config.optimizer == "adamw":
        return optax.adamw(schedule, weight_decay=config.weight_decay)
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(schedule, momentum=0.9))


def _init(
    chain: Chain, parts: dict[str, Part], images: np.ndarray, config: FitConfig
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Draw initial parameters, and take the constants that predictors read off their first activations."""

    @jax.jit
    def init(chain: Chain, images: Array) -> dict[str, PyTree]:
        sites, base_logits = chain.activations(chain.prepare(images))
        keys = jax.random.split(jax.random.key(config.seed), len(parts))
        any_logits = dict.fromkeys(parts, base_logits)  # of the right shape, for those that see another's
        return {
            name: part.predictor.init(keys[i], *predictor_inputs(part, sites, any_logits))
            for i, (name, part) in enumerate(parts.items())
        }

    variables = init(chain, images)
    params = {name: v["params"] for name, v in variables.items()}
    return params, {name: {k: c for k, c in v.items() if k != "params"} for name, v in variables.items()}


def train_predictors(
    chain: Chain,
    parts: dict[str, Part],
    images: np.ndarray,
    config: FitConfig,
    *,
    checkpoint: Path | None,
    identity: str,
    progress: bool,
) -> dict[str, Part]:
    """Train predictors; return them with their variables, ready for use.

    Raises:
        InputError: Fewer images than one batch, or a predictor diverged.
    """
    if len(images) < config.batch:
        msg = f"images: expected at least one batch of {config.batch} rows, got {len(images)}"
        raise InputError(msg)
    optimizer = _optimizer(config, len(images))
    chain = fast_forward(chain)
    step = jax.jit(functools.partial(_step, dict(parts), config, optimizer), donate_argnames="state")
    drawn = np.random.default_rng(config.seed).permutation(len(images))[:_INIT_ROWS]
    params, constants = _init(chain, parts, images[drawn], config)
    state = run_loop(
        lambda state, rows: step(chain, constants, state=state, images=rows),
        LoopState(jnp.zeros((), jnp.int32), params, optimizer.init(params)),
        (images,),
        LoopConfig(epochs=config.epochs, batch=config.batch, seed=config.seed),
        checkpoint=checkpoint,
        identity=identity,
        description=f"fitting {len(parts)} predictors",
        progress=progress,
    )
    _check_finite(state.params)
    variables = _merge(state.params, constants)
    trained = {}
    for name, part in parts.items():
        predictor, folded = fold_standardize(part.predictor, variables[name])
        trained[name] = dataclasses.replace(part, predictor=predictor, variables=folded)
    return trained


def _merge(params: dict[str, PyTree], constants: dict[str, PyTree]) -> dict[str, PyTree]:
    return {name: {"params": params[name], **constants[name]} for name in params}


def _step(
    parts: dict[str, Part],
    config: FitConfig,
    optimizer: optax.GradientTransformation,
    chain: Chain,
    constants: dict[str, PyTree],
    *,
    state: LoopState,
    images: Array,
) -> tuple[LoopState, Float[Array, ""]]:
    """Advance all predictors by one batch; the sum of losses keeps their gradients independent of one another."""
    key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
    sites, base_logits = chain.activations(chain.prepare(config.augment(key, images)))

    def loss(params: PyTree) -> Float[Array, ""]:
        losses = [
            distillation_loss(logits, base_logits, alpha=config.alpha, temperature=config.temperature)
            for logits in predict_all(parts, _merge(params, constants), sites).values()
        ]
        return jnp.sum(jnp.stack(losses))

    value, gradients = jax.value_and_grad(loss)(state.params)
    params, opt_state = apply_gradients(optimizer, gradients, state.opt_state, state.params)
    return LoopState(state.step + 1, params, opt_state), value / len(parts)


def _check_finite(params: dict[str, PyTree]) -> None:
    leaves = {name: jax.tree.leaves(tree) for name, tree in params.items()}
    if bad := [name for name, arrays in leaves.items() if not all(np.isfinite(a).all() for a in arrays)]:
        msg = f"fit: {', '.join(bad)} diverged: expected finite parameters; is the learning rate too high?"
        raise InputError(msg)
