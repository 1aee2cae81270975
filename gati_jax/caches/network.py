"""A separately trained small network as a predictor at site 0."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from gati_jax.errors import InputError
from gati_jax.models import (
    Algorithm,
    Architecture,
    Normalization,
    Variables,
    choose_algorithms,
    fold,
    init,
    store_params,
    to_chain,
)

from .candidate import Activation, Logits


class Network(nn.Module):
    """A separately trained network at site 0, which answers the requests it is sure of; see ``import_network``.

    Its input was normalised for the base; ``scale`` and ``shift`` convert it to the normalisation of its own training.
    """

    classes: int
    network: Architecture
    algorithms: tuple[tuple[Algorithm, ...], ...] = ()
    """The convolution algorithms that its kernels are stored for, see ``network_with_algorithms``."""

    @nn.compact
    def __call__(self, activation: Activation) -> Logits:
        """Return class logits."""
        if activation.shape[1:] != self.network.input_shape:
            expected, got = list(self.network.input_shape), list(activation.shape[1:])
            raise InputError(f"network: expected a site with activations of shape {expected}, got {got}")
        scale, shift = (
            self.param(name, constant, self.network.input_shape[-1:], jnp.float32)
            for name, constant in (("scale", nn.initializers.ones), ("shift", nn.initializers.zeros))
        )
        # A variable and not a param: Linen checks params against the shapes that direct convolutions store.
        params = self.variable("params", "network", lambda: fold(init(self.network, self.make_rng("params")))).value
        x = activation * scale.reshape(1, 1, 1, -1) + shift.reshape(1, 1, 1, -1)
        return to_chain(self.network, params, algorithms=self.algorithms)(x)


def import_network(
    network: Architecture, variables: Variables, *, trained: Normalization, base: Normalization
) -> tuple[Network, dict[str, Any]]:
    """Return a trained network as a predictor at site 0, and its variables.

    Args:
        network: Its configuration.
        variables: As ``import_state_dict`` reads them.
        trained: The normalisation of its training images.
        base: The normalisation of the base's inputs.
    """
    m0, s0, m1, s1 = (np.asarray(v, np.float64) for v in (base.mean, base.std, trained.mean, trained.std))
    ratio = trained.scale / base.scale
    params = {"scale": ratio * s0 / s1, "shift": (ratio * m0 - m1) / s1}
    channels = network.input_shape[-1:]
    small = {name: jnp.asarray(np.broadcast_to(v, channels), jnp.float32) for name, v in params.items()}
    return Network(classes=network.classes, network=network), {"params": {**small, "network": fold(variables)}}


def network_with_algorithms(
    predictor: Network, variables: Mapping[str, Any], choice: Mapping[str, Algorithm]
) -> tuple[Network, dict[str, Any]]:
    """Return the same predictor, and its variables, with other convolutions: see ``choose_algorithms``."""
    algorithms = choose_algorithms(predictor.network, choice)
    params = variables["params"]
    stored = store_params(predictor.network, params["network"], algorithms)
    return predictor.clone(algorithms=algorithms), {"params": {**params, "network": stored}}
