"""Train a base network: SGD with Nesterov momentum, one-cycle schedule, crops and flips, resumable.

DIR/base.safetensors holds the trained state dict under torchvision's names, DIR/base.json what it reached.
"""

import dataclasses
import functools
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from safetensors.numpy import save_file

from gati_jax import Augment, InputError, Normalization, data
from gati_jax.fitting import LoopConfig, LoopState, apply_gradients, run_loop
from gati_jax.models import ResNet, apply, apply_train, export_state_dict, init

from . import cli
from .config import BaseTraining, Config

EXAMPLE = "python -m train.base --config configs/digits.toml --out runs/digits/base --base.training.epochs 20"


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments, config = cli.parse_experiment(argv, "Train a base network.", EXAMPLE)
    network, recipe = config.base.resnet(), config.base.training

    images, labels, test = load_data(config)

    # --- Training ---------------------------------------------------------------------------------------------------
    training = Training(
        network=network,
        normalization=config.base.normalize(),
        augment=recipe.augment.build(),
        optimizer=make_optimizer(recipe, len(images)),
        label_smoothing=recipe.label_smoothing,
        seed=config.seed,
    )
    variables = init(network, jax.random.key(config.seed))
    state = LoopState(
        jnp.zeros((), jnp.int32), variables, training.optimizer.init(tuple(v["params"] for v in variables))
    )
    step = jax.jit(functools.partial(train_step, training), donate_argnums=0)
    checkpoints = arguments.out / "checkpoints"
    loop = LoopConfig(epochs=recipe.epochs, batch=recipe.batch, seed=config.seed)
    identity = f"{network} {recipe} {config.data} {config.base.normalization} {config.seed}"
    state = run_loop(
        step,
        state,
        (images, labels),
        loop,
        checkpoint=checkpoints,
        identity=identity,
        description=f"training {config.base.network}",
    )

    # --- Result -----------------------------------------------------------------------------------------------------
    accuracy = evaluate(network, config.base.normalize(), state.params, test)
    result = {
        "network": config.base.network,
        "dataset": config.data.name,
        "accuracy": accuracy,
        "split": config.data.splits.test,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    metadata = {k: str(v) for k, v in result.items()} | {"config": config.model_dump_json()}
    save_file(export_state_dict(network, state.params), arguments.out / "base.safetensors", metadata=metadata)
    cli.write_result(
        arguments.out / "base.json", result | {"n": len(test), "versions": cli.versions(), "seed": config.seed}
    )
    shutil.rmtree(checkpoints)
    if arguments.json:
        print(json.dumps(result))
    else:
        print(
            f"{config.base.network} on {config.data.name} {config.data.splits.test}: accuracy {accuracy:.4f}"
            f" ({arguments.out / 'base.safetensors'})"
        )


def load_data(config: Config) -> tuple[np.ndarray, np.ndarray, data.Dataset]:
    """Return the images and labels to train on, and the test split.

    Raises:
        InputError: Nothing to train on, test rows among it, or images and labels that the network does not take.
    """
    if not config.data.base_trained_on:
        msg = "data.base_trained_on: expected at least one part of the data to train on, got none"
        raise InputError(msg)
    trained_on = {f"base_trained_on {i}": part for i, part in enumerate(config.data.base_trained_on)}
    data.check_disjoint({"test": config.data.splits.test, **trained_on})
    parts = [data.load(config.data.name, part, config.data.dir) for part in trained_on.values()]
    images = np.concatenate([part.images for part in parts])
    labels = np.concatenate([part.labels for part in parts if part.labels is not None])
    network = config.base.resnet()
    got, largest = images.shape[1:], int(labels.max())
    if got != network.input_shape or largest >= network.classes:
        expected = f"{network.input_shape} and {network.classes} classes"
        msg = f"base: the network takes {expected}, {config.data.name} has {got} and {largest + 1}"
        raise InputError(msg)
    return images, labels, data.load(config.data.name, config.data.splits.test, config.data.dir)


def make_optimizer(recipe: BaseTraining, n: int) -> optax.GradientTransformation:
    """Return SGD with Nesterov momentum on a one-cycle schedule; only kernels decay."""
    steps = max(1, recipe.epochs * (n // recipe.batch))
    schedule = optax.cosine_onecycle_schedule(steps, recipe.learning_rate, pct_start=0.2)

    def kernels(params: object) -> object:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.chain(
        optax.add_decayed_weights(recipe.weight_decay, kernels), optax.sgd(schedule, momentum=0.9, nesterov=True)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What stays the same from step to step."""

    network: ResNet
    normalization: Normalization
    augment: Augment
    optimizer: optax.GradientTransformation
    label_smoothing: float
    seed: int


def train_step(
    training: Training, state: LoopState, images: Array, labels: Int[Array, " batch"]
) -> tuple[LoopState, Float[Array, ""]]:
    """Take one step of gradient descent."""
    key = jax.random.fold_in(jax.random.key(training.seed + 1), state.step)
    x = training.normalization(training.augment(key, images))
    targets = optax.smooth_labels(jax.nn.one_hot(labels, training.network.classes), training.label_smoothing)

    def loss(params: tuple[Any, ...]) -> tuple[Float[Array, ""], tuple[Any, ...]]:
        variables = tuple({**v, "params": p} for v, p in zip(state.params, params, strict=True))
        logits, variables = apply_train(training.network, variables, x)
        return optax.losses.softmax_cross_entropy(logits, targets).mean(), variables

    params = tuple(v["params"] for v in state.params)
    (value, variables), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    params, opt_state = apply_gradients(training.optimizer, gradients, state.opt_state, params)
    return LoopState(
        state.step + 1, tuple({**v, "params": p} for v, p in zip(variables, params, strict=True)), opt_state
    ), value


def evaluate(
    network: ResNet, normalization: Normalization, variables: tuple[dict, ...], split: data.Dataset, batch: int = 250
) -> float:
    """Return the accuracy on a split, by running statistics."""
    predict = jax.jit(lambda variables, images: jnp.argmax(apply(network, variables, normalization(images)), -1))
    classes = [np.asarray(predict(variables, split.images[i : i + batch])) for i in range(0, len(split), batch)]
    return float(np.mean(np.concatenate(classes) == split.labels))


if __name__ == "__main__":
    cli.run(main)
