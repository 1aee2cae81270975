"""Networks in plain PyTorch, under torchvision's names: the input of other runtimes, and the reference of tests."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from gati_jax import InputError, WeightsError
from gati_jax.models import VGG, Architecture, ResNet, ViT


class PadChannels(nn.Module):
    """Shortcut option A: subsample, then surround with zero channels."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        missing = self.channels - x.shape[1]
        return nn.functional.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))


class Block(nn.Module):
    """A basic block or a bottleneck with the stride on its 3x3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool, shortcut: str) -> None:  # noqa: FBT001
        super().__init__()
        outputs = 4 * width if bottleneck else width
        self.depth = 3 if bottleneck else 2
        if bottleneck:
            self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs)
        else:
            self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        if stride == 1 and inputs == outputs:
            self.downsample = nn.Identity()
        elif shortcut == "A":
            self.downsample = PadChannels(outputs, stride)
        else:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.depth == 3:
            y = self.bn3(self.conv3(torch.relu(y)))
        return torch.relu(y + self.downsample(x))


class Network(nn.Module):
    """Stem, stages, global average pooling, linear layer."""

    def __init__(self, network: ResNet) -> None:
        super().__init__()
        width, channels = network.widths[0], network.input_shape[-1]
        if network.stem == 7:
            self.conv1, self.maxpool = nn.Conv2d(channels, width, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)
        else:
            self.conv1, self.maxpool = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        inputs, self.stages = width, len(network.stages)
        for stage, (count, width) in enumerate(zip(network.stages, network.widths, strict=True)):
            blocks = []
            for k in range(count):
                stride = 2 if k == 0 and stage > 0 else 1
                blocks.append(Block(inputs, width, stride, network.bottleneck, network.shortcut))
                inputs = 4 * width if network.bottleneck else width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, network.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


class VGGNetwork(nn.Module):
    """torchvision's VGG with batch norm and biases, then one linear layer."""

    def __init__(self, network: VGG) -> None:
        super().__init__()
        inputs, parts = network.input_shape[-1], []
        for channels, pool in network.shapes:
            parts += [nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            parts += [nn.MaxPool2d(2)] if pool else []
            inputs = channels
        self.features = nn.Sequential(*parts)
        self.classifier = nn.Linear(inputs, network.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def build(network: Architecture) -> nn.Module:
    """Return the network with fresh weights."""
    if isinstance(network, ViT):
        raise InputError("network: expected a ResNet or a VGG, got a ViT, for which there is no plain PyTorch here")
    return VGGNetwork(network) if isinstance(network, VGG) else Network(network)


def load(network: Architecture, tensors: Mapping[str, np.ndarray]) -> nn.Module:
    """Return the network with these weights, in evaluation mode."""
    model = build(network)
    renamed = {name.replace("linear.", "fc."): torch.from_numpy(np.array(v)) for name, v in tensors.items()}
    wrong = model.load_state_dict(renamed, strict=False)
    if names := [*wrong.unexpected_keys, *(k for k in wrong.missing_keys if not k.endswith("num_batches_tracked"))]:
        raise WeightsError(f"weights: missing or unexpected: {', '.join(names)}")
    return model.eval()
