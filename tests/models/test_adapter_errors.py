"""Modules of Linen, NNX and Equinox that would make a wrong chain are refused in one line."""

import flax.linen as nn
import jax
import pytest
from flax import nnx

from gati_jax import InputError, from_equinox, from_linen, from_nnx
from tests.models.users_modules import EQUINOX, LINEN, NNX, PICTURES, STATE, VARIABLES, X


class Twice(nn.Module):
    def setup(self):
        self.dense, self.head = nn.Dense(6), nn.Dense(3)

    def __call__(self, x):
        return self.head(self.dense(self.dense(x)))


class Repeated(nn.Module):
    @nn.compact
    def __call__(self, x):
        step = lambda module, x, _: (module(x), None)  # noqa: E731
        body = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(3)(body(nn.Dense(6, name="dense"), x, None)[0])


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return self.pair(x)[0]

    def setup(self):
        self.pair = Both()


class Both(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x), x


class Count:
    calls = 0


class Wavering(nn.Module):
    count = Count()

    @nn.compact
    def __call__(self, x):
        self.count.calls += 1
        return nn.Dense(3)(nn.Dense(3, name="dense")(x)) * float(self.count.calls)


def linen(module, **options):
    def make():
        variables = module().init(jax.random.key(0), X)
        return from_linen(module(), variables, **{"sites": ["dense"], "sample": X, **options})

    return make


class Drawing(nnx.Module):
    """Random also in evaluation."""

    def __init__(self):
        self.dense, self.rngs = nnx.Linear(6, 3, rngs=nnx.Rngs(0)), nnx.Rngs(1)

    def __call__(self, x):
        return self.dense(x) + jax.random.normal(self.rngs(), (len(x), 3))


def own(**options):
    return lambda: from_linen(LINEN, VARIABLES, **{"sites": ["stem"], "sample": X, **options})


REFUSED = {
    "a string": (own(sites="stem"), "sites: expected a list of submodules, got str 'stem'"),
    "none": (own(sites=[]), "sites: expected a list of submodules"),
    "unknown": (own(sites=["stem", "block_7"]), "sites: expected submodules that are called, of stem, .*got block_7"),
    "unknown path": (lambda: from_nnx(NNX, sites=["blocks.7"], sample=X), "of stem, blocks, head, .*got blocks.7"),
    "foreign object": (lambda: from_nnx(NNX, sites=[nnx.Rngs(0)], sample=X), "sites: expected submodules"),
    "order": (own(sites=["blocks_0", "stem"]), "in the order of their calls, stem, blocks_0, got blocks_0, stem"),
    "twice": (linen(Twice), "sites: expected dense to be called once, got 2 calls"),
    "loop": (linen(Repeated), "sites: expected dense to be called once, got calls inside scan"),
    "two outputs": (linen(Pair, sites=["pair"]), "sites: expected pair to return one array, got tuple"),
    "two logits": (linen(Both, sites=["Dense_0"]), "module: expected it to return one array of logits, got tuple"),
    "training": (own(train=True), "module: it (updates its variables|draws random numbers).*such as train=False"),
    "argument": (own(training=False), "module: expected one that takes float32.batch, 6. .*got TypeError"),
    "one row": (own(sample=X[0]), r"sample: expected a few inputs\[n, ...\], got float32\[6\]"),
    "shape": (own(sample=X[:, :5]), r"module: expected one that takes float32\[batch, 5\]"),
    "ragged": (own(sample=[[1.0], [1.0, 2.0]]), "sample: expected an array, got rows of different lengths"),
    "axis": (own(channel_axis=2), r"channel_axis: expected an axis of one input \[6\], got 2"),
    "no axis": (
        lambda: from_equinox(EQUINOX, STATE, sites=["stem"], sample=PICTURES),
        "channel_axis: expected 0 .* or -1 .* got none",
    ),
    "channels first": (
        lambda: from_equinox(EQUINOX, STATE, sites=["stem"], sample=PICTURES.transpose(0, 3, 1, 2), channel_axis=0),
        r"takes float32\[batch, 2, 3, 4\] \(the sample's channels, which are last, at channel_axis\)",
    ),
    "no state": (
        lambda: from_equinox(EQUINOX, sites=["stem"], sample=PICTURES, channel_axis=0),
        "module: .*missing 1 required positional argument: 'state'",
    ),
    "random": (lambda: from_nnx(Drawing(), sites=["dense"], sample=X), "draws random numbers .* in evaluation"),
    "another kind": (lambda: from_nnx(LINEN, sites=["stem"], sample=X), "module: expected an nnx.Module, got"),
    "Equinox's kind": (lambda: from_equinox(NNX, sites=["stem"], sample=X), "module: expected an equinox.Module, got"),
    "calls that differ": (linen(Wavering), "module: expected the same logits from the chain as from its own call"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_make_a_wrong_chain_is_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
