"""Networks in plain PyTorch under torchvision's names: what imported networks are compared with."""

from typing import Any

import jax
import numpy as np
import pytest

from gati_jax import models

torch = pytest.importorskip("torch")
nn = torch.nn
torch.set_num_threads(1)  # these networks are tiny: threads would only wait for each other


from benchmarks.torch_network import build  # noqa: E402 (behind importorskip)


def random_network(network, seed=0):
    """Return a network in evaluation mode whose every tensor is random, the running statistics too."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda tensor, low, high: tensor.uniform_(low, high, generator=generator)  # noqa: E731
    model: Any = build(network).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                # Variances near 1e-3, where batch norm's epsilon of 1e-5 shows.
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, 0.04 / fan_in**0.5, generator=generator)
                if module.bias is not None:
                    uniform(module.bias, -0.02, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                uniform(module.weight, 0.3, 1.0)
                uniform(module.bias, -0.3, 0.3)
                uniform(module.running_mean, -0.01, 0.01)
                uniform(module.running_var, 2e-4, 2e-3)
    return model


def torch_shapes(network):
    """Return the shapes of the network's tensors in torch, by name; none is allocated."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build(network).state_dict().items() if tensor.ndim}


def tensor_shapes(network):
    """Return the shapes of the state dict that is exported for the network, by name."""
    abstract = jax.eval_shape(lambda: models.init(network, jax.random.key(0)))
    variables = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract)
    return {name: tensor.shape for name, tensor in models.export_state_dict(network, variables).items()}


def state_dict(model):
    """Return the model's tensors as NumPy arrays."""
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def logits(model, images):
    """Return float64 logits for images[batch, height, width, channels]."""
    with torch.no_grad():
        x = torch.from_numpy(np.moveaxis(np.asarray(images, np.float64), -1, 1).copy())
        return model.double()(x).numpy()
