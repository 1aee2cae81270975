"""Networks as users write them in Linen, NNX and Equinox: shortcuts, batch statistics, dropout."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(5, 6)).astype(np.float32)
PICTURES = RANDOM.normal(size=(5, 4, 2, 3)).astype(np.float32)  # height, width, channels


class Block(nn.Module):
    """A shortcut around a normalised layer with dropout."""

    @nn.compact
    def __call__(self, x, train):
        y = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(x.shape[-1], name="dense")(x))
        return x + nn.Dropout(0.5, deterministic=not train)(nn.relu(y))


class Linen(nn.Module):
    kind: Any = Block

    def setup(self):
        self.stem = nn.Dense(8)
        self.blocks = [self.kind() for _ in range(2)]
        self.head = nn.Dense(3)

    def __call__(self, x, train=False):
        x = jnp.tanh(self.stem(x))
        for block in self.blocks:
            x = 0.5 * block(x, train)  # what happens between submodules belongs to the network, too
        return self.head(x)


def varied(tree):
    """The same tree with other numbers in it: batch statistics that are not 0 and 1."""
    return jax.tree.map(lambda leaf: jnp.asarray(RANDOM.uniform(0.2, 1, leaf.shape), leaf.dtype), tree)


LINEN = Linen()
VARIABLES = varied(LINEN.init(jax.random.key(0), X))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(nnx.relu(self.norm(self.dense(x))))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(6, 8, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.stem(x))
        for block in self.blocks:
            x = 0.5 * block(x)
        return self.head(x)


NNX = Nnx(nnx.Rngs(0))
NNX.blocks[0].norm.mean[...] = jnp.linspace(0.0, 1.0, 8)


class EquinoxBlock(eqx.Module):
    """Channels come first."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(5, 5, 1, key=key)
        self.norm = eqx.nn.BatchNorm(5, axis_name="batch", mode="ema")
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, x, state, key=None):
        y, state = self.norm(self.conv(x), state)
        return x + self.dropout(jax.nn.relu(y), key=key), state


class Equinox(eqx.Module):
    stem: eqx.nn.Conv2d
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.stem = eqx.nn.Conv2d(3, 5, 1, key=keys[0])
        self.blocks = [EquinoxBlock(keys[1]), EquinoxBlock(keys[2])]
        self.head = eqx.nn.Linear(5, 3, key=keys[3])

    def __call__(self, x, state, key=None):
        x = jnp.tanh(self.stem(x))
        for block in self.blocks:
            x, state = block(x, state, key)
        return self.head(x.mean((1, 2))), state


EQUINOX, STATE = eqx.nn.make_with_state(Equinox)(jax.random.key(0))
STATE = varied(STATE)
