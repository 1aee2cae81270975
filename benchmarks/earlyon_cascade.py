"""The PyPI package earlyon (0.3.0) on the same network: heads after its stages, trained and calibrated by earlyon.

Its own CIFAR ResNet has projections where ours has none (shortcut A), so we wrap our PyTorch network. Heads learn from
labels, on part of the fit split; thresholds are calibrated on the select split to lose as much accuracy as the bundle
may disagree. In earlyon's batched mode a batch leaves together, when all its rows are confident.
"""

import importlib
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from gati_jax.models import ResNet

EPOCHS, BATCH, LEARNING_RATE = 6, 128, 3e-3


def wrap(network: torch.nn.Module, config: ResNet) -> Any:  # noqa: ANN401 (earlyon is an optional import)
    """Attach a head behind every stage but the last, and one inside the last if it is long enough."""
    types, last = importlib.import_module("earlyon.core.types"), len(config.stages)
    head = importlib.import_module("earlyon.core.exit_head").EarlyExitHead
    wrapper = importlib.import_module("earlyon.core.wrappers").EarlyExitWrapper
    factor = 4 if config.bottleneck else 1
    layers = [(f"layer{k}", config.widths[k - 1] * factor) for k in range(1, last)]
    if config.stages[-1] > 1:
        layers.append((f"layer{last}.{config.stages[-1] // 2 - 1}", config.widths[-1] * factor))
    points = [types.ExitPoint(f"e{i}", name, width) for i, (name, width) in enumerate(layers)]
    heads = {point.name: head(point.in_channels, config.classes) for point in points}
    settings = types.EarlyExitConfig(backbone="custom", num_classes=config.classes, exit_points=points)
    height, width, channels = config.input_shape
    return wrapper(network, heads, lambda x: x, settings, input_shape=(1, channels, height, width))


def fit(
    model: Any,  # noqa: ANN401
    train: tuple[np.ndarray, np.ndarray],
    select: tuple[np.ndarray, np.ndarray],
    drop: float,
) -> Any:  # noqa: ANN401
    """Train the heads on ``train`` and calibrate thresholds on ``select``; both are (images, labels)."""
    torch.manual_seed(0)
    trainer = importlib.import_module("earlyon.training.two_stage_trainer")
    thresholds = importlib.import_module("earlyon.core.thresholds")
    trainer.stage2_train_exits(
        model, _loader(*train, shuffle=True), epochs=EPOCHS, lr=LEARNING_RATE, on_epoch_end=lambda _: None
    )
    model.eval()
    thresholds.calibrate_thresholds(model, _loader(*select, shuffle=False), target_accuracy_drop=drop)
    return model


def predict(model: Any, images: np.ndarray) -> np.ndarray:  # noqa: ANN401
    """Answer one image in single mode, several in batched mode."""
    x = torch.from_numpy(images)
    result: Any = model(x, mode="inference") if len(x) == 1 else model.forward_inference_batched(x)
    return (result.prediction if len(x) == 1 else result.predictions).numpy()


def _loader(images: np.ndarray, labels: np.ndarray, *, shuffle: bool) -> DataLoader[Any]:
    rows = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))
    return DataLoader(rows, batch_size=BATCH, shuffle=shuffle)
