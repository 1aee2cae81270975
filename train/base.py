"""Train a base network on data that stays on the device, whole epochs at a time, resumable to the bit.

DIR/base.safetensors holds the trained state dict under torchvision's names, with metadata (see ``zoo.py``);
DIR/base.json its accuracy and speed, DIR/tensorboard the curves. ``recipe.py`` has the training step.
"""

import contextlib
import functools
import hashlib
import json
import logging
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors.numpy import save_file
from tensorboardX import SummaryWriter

from gati_jax import InputError, Normalization, data
from gati_jax.devices import sharing
from gati_jax.models import Architecture, Variables, apply, export_state_dict
from gati_jax.models.chain import reference
from gati_jax.profiling import device_name

from . import cli
from .config import Config
from .epochs import EpochRecord, run_epochs, scan_epoch, steps_per_epoch
from .recipe import Recipe, begin, learning_rate, train_step
from .zoo import Entry

EXAMPLE = "python -m train.base --config configs/digits.toml --out runs/digits/base --base.training.epochs 20"
NO_EFFECT = {"weights": True, "training": {"checkpoint_seconds": True, "flips": True}}  # on what is trained
_log = logging.getLogger("train.base")  # not __name__, which is "__main__"


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments, config = cli.parse(parser(), Config, argv)
    leads = cli.join(arguments)
    training = config.base.training
    devices = sharing(training.batch, "base.training.batch")
    images, labels, test = load_data(config)

    # --- Training ---------------------------------------------------------------------------------------------------
    recipe, steps = Recipe.of(config, len(images)), steps_per_epoch(len(images), training.batch)
    step = functools.partial(train_step, recipe)
    epoch = scan_epoch(step, n=len(images), batch=training.batch, seed=config.seed, devices=devices)
    checkpoints = arguments.out / "checkpoints"
    seconds: list[float] = []
    with contextlib.closing(Scalars(arguments.out / "tensorboard", silent=not leads)) as writer:
        state = run_epochs(
            epoch,
            begin(recipe, jax.random.key(config.seed)),
            (images, labels),
            steps=steps,
            epochs=training.epochs,
            report=functools.partial(report, writer, recipe, seconds),
            checkpoint=checkpoints,
            checkpoint_seconds=training.checkpoint_seconds,
            identity=identity(config, images, labels),
            description=f"training {config.base.network}",
            devices=devices,
        )
        variables: Variables = state.params.final
        weights = finite(export_state_dict(recipe.network, variables))
        accuracy = evaluate(recipe.network, recipe.normalization, variables, test)
        writer.write(training.epochs, {"test/accuracy": accuracy}, hides=False)

    if not leads:
        return

    # --- Result -----------------------------------------------------------------------------------------------------
    entry = Entry.of(config, accuracy)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "base.safetensors"
    save_file(weights, path, metadata=entry.metadata())
    result = {"network": entry.network, "dataset": entry.dataset, "accuracy": accuracy, "split": entry.split}
    if training.flips:
        result["accuracy_with_flips"] = evaluate(recipe.network, recipe.normalization, variables, test, flips=True)
    result["epochs"] = training.epochs
    if len(seconds) == training.epochs:  # a resumed run knows only the time of its last part
        result["train_seconds"] = sum(seconds)
    if seconds:
        result["images_per_second"] = steps * training.batch / statistics.median(seconds)
    words = sys.argv if argv is None else ["train/base.py", *argv]
    details = {"n": len(test), "device": device_name(), "versions": cli.versions(), "seed": config.seed}
    details["command"] = cli.command_line(words)
    cli.write_result(arguments.out / "base.json", result | details | {"recipe": entry.recipe})
    shutil.rmtree(checkpoints)
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{entry.network} on {entry.dataset} {entry.split}: accuracy {accuracy:.4f} ({path})")


def parser() -> cli.Parser:
    """Return the command line's parser."""
    p = cli.config_parser(Config, "Train a base network.", EXAMPLE)
    cli.add_process(p)
    return p


def identity(config: Config, images: np.ndarray, labels: np.ndarray) -> str:
    """Return what tells two runs apart: the config, and a digest of the data, which may differ under one name."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (images, labels):
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    settings = config.model_dump_json(include={"base", "data", "seed"}, exclude={"base": NO_EFFECT})
    return f"{settings} {digest.hexdigest()}"


def finite(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Check that weights are finite."""
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise InputError(
                f"base.training: expected finite weights, got others in {name}; try a smaller learning_rate"
            )
    return weights


def load_data(config: Config) -> tuple[np.ndarray, np.ndarray, data.Dataset]:
    """Return the images and labels to train on, and the test split; check that the network takes them."""
    if not config.data.base_trained_on:
        raise InputError("data.base_trained_on: expected at least one part of the data to train on, got none")
    trained_on = {f"base_trained_on {i}": part for i, part in enumerate(config.data.base_trained_on)}
    data.check_disjoint({"test": config.data.splits.test, **trained_on})
    parts = [config.data.load(part, own=True) for part in trained_on.values()]
    test = config.data.load(config.data.splits.test, own=True)
    if any(part.labels is None for part in (*parts, test)):
        raise InputError(f"data.name: expected images with labels to train and test on, got {config.data.name} without")
    network = config.base.architecture()
    for part in (*parts, test):
        part.check(f"data.name {config.data.name}", network.input_shape, network.classes)
    images = np.concatenate([part.images for part in parts])
    labels = np.concatenate([part.labels for part in parts if part.labels is not None])
    return images, labels, test


class Scalars:
    """Writes scalars for TensorBoard; a resumed run continues at its checkpoint, and hides what came after it."""

    def __init__(self, folder: Path, *, silent: bool = False) -> None:
        """Create nothing below ``folder`` before there is something to write; nothing at all with ``silent``."""
        self._folder, self._silent = folder, silent
        self._writer: SummaryWriter | None = None

    def write(self, epoch: int, values: Mapping[str, float], *, hides: bool = True) -> None:
        """Write one value for every name; the first call also hides what earlier runs wrote of later epochs.

        With ``hides``, it also hides what they wrote of this epoch, 1 the first.
        """
        if self._silent:
            return
        if self._writer is None:
            purge = epoch if hides else epoch + 1
            self._writer = SummaryWriter(str(self._folder), purge_step=purge, flush_secs=10)
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        """Flush what has been written."""
        if self._writer is not None:
            self._writer.close()


def report(writer: Scalars, recipe: Recipe, seconds: list[float], record: EpochRecord) -> None:
    """Log an epoch, write its scalars and remember its time; a loss that is not finite ends the training unsaved."""
    seconds.append(record.seconds)
    means = {name: float(np.mean(values)) for name, values in record.metrics.items()}
    if not np.isfinite(means["loss"]):
        where = f"{means['loss']} in epoch {record.epoch}"
        raise InputError(f"base.training: expected a finite loss, got {where}; try a smaller learning_rate")
    steps = len(record.metrics["loss"])
    speed = steps * recipe.training.batch / record.seconds
    _log.info(
        "epoch %d: loss %.4f, accuracy on batches %.4f, %.0f images/s",
        *(record.epoch, means["loss"], means["accuracy"], speed),
    )
    rate = learning_rate(recipe.schedule, record.epoch * steps - 1)
    figures = {f"train/{name}": mean for name, mean in means.items()}
    writer.write(record.epoch, figures | {"train/learning_rate": rate, "train/images_per_second": speed})


def evaluate(
    network: Architecture,
    normalization: Normalization,
    variables: Variables,
    split: data.Dataset,
    *,
    flips: bool = False,
    batch: int = 500,
) -> float:
    """Return the accuracy on a split, by running statistics in true float32.

    With ``flips``, the logits of every image and of its mirror image are added up.
    """

    @jax.jit
    @reference
    def logits(variables: Variables, images: Array) -> Float[Array, "batch classes"]:
        x = normalization(images)
        found = apply(network, variables, x)
        return found + apply(network, variables, x[:, :, ::-1]) if flips else found

    parts = [split.images[i : i + batch] for i in range(0, len(split), batch)]
    classes = [np.asarray(jnp.argmax(logits(variables, part), -1)) for part in parts]
    return float(np.mean(np.concatenate(classes) == split.labels))


if __name__ == "__main__":
    cli.run(main)
