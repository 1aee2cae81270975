"""Residual networks in plain PyTorch under torchvision's names: what imported networks are compared with."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = torch.nn
torch.set_num_threads(1)  # these networks are tiny: threads would only wait for each other


class PadChannels(nn.Module):
    """Shortcut option A: subsample, then surround with zero channels."""

    def __init__(self, channels, stride):
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x):
        x = x[:, :, :: self.stride, :: self.stride]
        missing = self.channels - x.shape[1]
        return nn.functional.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))


class Block(nn.Module):
    """A basic block or a bottleneck with the stride on its 3x3 convolution."""

    def __init__(self, inputs, width, stride, bottleneck, shortcut):
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

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.depth == 3:
            y = self.bn3(self.conv3(torch.relu(y)))
        return torch.relu(y + self.downsample(x))


class Network(nn.Module):
    """Stem, stages, global average pooling, linear layer."""

    def __init__(self, network):
        super().__init__()
        width = network.widths[0]
        if network.stem == 7:
            self.conv1, self.maxpool = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)
        else:
            self.conv1, self.maxpool = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.Identity()
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

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def random_network(network, seed=0):
    """Return a network in evaluation mode whose every tensor is random, the running statistics too."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda tensor, low, high: tensor.uniform_(low, high, generator=generator)  # noqa: E731
    model = Network(network).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                # Variances near 1e-3, where batch norm's epsilon of 1e-5 shows.
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, 0.04 / fan_in**0.5, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                uniform(module.weight, 0.3, 1.0)
                uniform(module.bias, -0.3, 0.3)
                uniform(module.running_mean, -0.01, 0.01)
                uniform(module.running_var, 2e-4, 2e-3)
    return model


def state_dict(model):
    """Return the model's tensors as NumPy arrays."""
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def logits(model, images):
    """Return float64 logits for images[batch, height, width, channels]."""
    with torch.no_grad():
        x = torch.from_numpy(np.moveaxis(np.asarray(images, np.float64), -1, 1).copy())
        return model.double()(x).numpy()
