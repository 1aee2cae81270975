"""One contender of ``benchmarks.training`` in a process of its own: each line of standard input times one turn."""

import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from gati_jax.models import architecture
from train import scan_epoch
from train.config import build_config
from train.recipe import Recipe, begin, train_step

from .worker import answers_descriptor

OURS = "gati-jax"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PEAK, DECAY, SMOOTHING = 0.1, 5e-4, 0.1


class Task(NamedTuple):
    """The input of every contender."""

    network: str
    batch: int
    steps: int
    bfloat16: bool
    images: np.ndarray  # uint8[steps * batch, 32, 32, 3]
    labels: np.ndarray


def main() -> None:
    """Answer the parent process, a line of JSON for each turn."""
    name, network, batch, steps, bfloat16 = sys.argv[1:]
    answers = answers_descriptor()
    n, random = int(batch) * int(steps), np.random.default_rng(0)
    images, labels = random.integers(0, 256, (n, 32, 32, 3), np.uint8), random.integers(0, 10, n, np.int32)
    turn = CONTENDERS[name](Task(network, int(batch), int(steps), bfloat16 == "1", images, labels))
    turn()  # compiles and warms up
    print(json.dumps("ready"), file=answers)
    for _ in sys.stdin:
        began = time.perf_counter()
        turn()
        print(json.dumps(time.perf_counter() - began), file=answers)


def _ours(task: Task) -> Callable[[], None]:
    """Return an epoch of ``train.base`` on the images of one turn."""
    training = {
        "epochs": 1000,
        "batch": task.batch,
        "learning_rate": PEAK,
        "weight_decay": DECAY,
        "label_smoothing": SMOOTHING,
        "augment": {"pad": 4, "flip": True},
        "cutout": 8,
        "average": 0.999,
        "bfloat16": task.bfloat16,
    }
    splits = dict.fromkeys(("fit", "select", "certify", "test"), "train")
    config = build_config(
        {
            "data": {"name": "cifar10", "base_trained_on": ["train"], "splits": splits},
            "base": {"network": task.network, "normalization": {"mean": MEAN, "std": STD}, "training": training},
        }
    )
    n = len(task.images)
    recipe = Recipe.of(config, n)
    epoch = scan_epoch(functools.partial(train_step, recipe), n=n, batch=task.batch, seed=0)
    program = jax.jit(epoch, donate_argnums=0)
    state, arrays = begin(recipe, jax.random.key(0)), jax.device_put((task.images, task.labels))

    def turn() -> None:
        nonlocal state
        state, metrics = program(state, *arrays)
        jax.block_until_ready(metrics)

    return turn


def _torch(task: Task, *, channels_last: bool, compiled: bool) -> Callable[[], None]:
    """Return the loop of PyTorch's own tutorial, on batches in memory."""
    torch = importlib.import_module("torch")
    build = importlib.import_module("benchmarks.torch_network").build
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model: Any = build(architecture(task.network)).train().to(device, memory_format=layout)
    step = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), PEAK, momentum=0.9, nesterov=True, weight_decay=DECAY)
    x = (task.images.astype(np.float32) / 255 - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(device, memory_format=layout)
    labels = torch.from_numpy(task.labels.astype(np.int64)).to(device)

    def turn() -> None:
        for rows in torch.arange(len(images)).split(task.batch):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=task.bfloat16):
                logits = step(images[rows[0] : rows[-1] + 1])
            torch.nn.functional.cross_entropy(
                logits.float(), labels[rows[0] : rows[-1] + 1], label_smoothing=SMOOTHING
            ).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return turn


CONTENDERS: dict[str, Callable[[Task], Callable[[], None]]] = {
    OURS: _ours,
    "torch eager": functools.partial(_torch, channels_last=False, compiled=False),
    "torch eager, channels last": functools.partial(_torch, channels_last=True, compiled=False),
    "torch.compile": functools.partial(_torch, channels_last=True, compiled=True),
}

if __name__ == "__main__":
    main()
