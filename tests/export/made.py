"""Bundles with every kind of network and head, for backends and exports to answer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import gati_jax
from gati_jax import Bundle, Candidate, Normalization, Plan, Prediction
from gati_jax.caches import (
    Centres,
    ClassToken,
    Confidence,
    Conv,
    Convolutional,
    FullyConnected,
    GlobalAverage,
    Grid,
    LinearSelector,
    Neighbours,
    Pool,
    ProbabilitySelector,
    SortedSelector,
    import_network,
    stored_centres,
    stored_points,
)
from gati_jax.models import VGG, AnyNetwork, Bert, ResNet, ViT, fold, init, to_chain
from tests.bundle.made import cache_shapes, make_certificate

CLASSES, N = 5, 96
BASIC = ResNet(stages=(1, 1), widths=(4, 7), shortcut="A", classes=CLASSES, input_shape=(10, 9, 3))
BOTTLENECK = ResNet(stages=(1, 1), widths=(2, 3), bottleneck=True, stem=7, classes=CLASSES, input_shape=(21, 18, 3))
VGGS = VGG(convolutions=(1, 2), channels=(4, 6), classes=CLASSES, input_shape=(11, 9, 3))
VIT = ViT(patch=3, width=8, depth=5, heads=2, hidden=10, classes=CLASSES, input_shape=(9, 12, 3))
BERT = Bert(vocabulary=20, length=7, width=8, depth=3, heads=2, hidden=10, classes=CLASSES)
SMALL = ResNet(stages=(1,), widths=(3,), classes=CLASSES, input_shape=(11, 9, 3))
OF_BASE = Normalization(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), scale=1 / 256)
OF_SMALL = Normalization(mean=(0.4,), std=(0.25,))
Heads = Sequence[tuple[int, nn.Module, nn.Module]]


def drawn(rng: np.random.Generator, shapes: Any) -> Any:
    """Random parameters that keep activations at their size; deviations and variances are positive."""

    def draw(path: Any, leaf: Any) -> np.ndarray:
        value = rng.normal(size=leaf.shape)
        if path[-1].key in {"std", "var"}:
            return np.asarray(np.abs(value) + 0.5, np.float32)
        scale = 1.4 / np.sqrt(np.prod(leaf.shape[:-1])) if path[-1].key == "kernel" else 0.3
        return np.asarray(value * scale, np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def points(rng: np.random.Generator, predictor: nn.Module) -> dict[str, Any]:
    """Stored keys, some of which are rows without a point."""
    if isinstance(predictor, Neighbours):
        keys = np.abs(rng.normal(size=(predictor.points, predictor.units)))
        return {"points": stored_points(keys, rng.integers(-1, CLASSES, predictor.points))}
    if isinstance(predictor, Centres):
        keys, labels = np.abs(rng.normal(size=(predictor.centres, predictor.units))), np.arange(predictor.centres)
        return {"points": stored_centres(keys, labels % (CLASSES + 1) - 1, rng.uniform(0.3, 1, predictor.centres))}
    return {}


def parts(network: AnyNetwork, heads: Heads, normalization: Normalization | None = OF_BASE) -> tuple[Any, Any, Any]:
    """A chain and caches with random parameters, and requests."""
    rng = np.random.default_rng(len(heads))
    params = drawn(rng, jax.eval_shape(lambda: fold(init(network, jax.random.key(0)))))
    chain = to_chain(network, params, normalization)
    images = rng.integers(0, 256, (N, *network.input_shape), np.uint8)
    if normalization is None:
        images = rng.normal(size=images.shape).astype(np.float32)
    return chain, caches_of(chain, heads, rng), images


def caches_of(chain: gati_jax.Chain, heads: Heads, rng: np.random.Generator) -> tuple[Candidate, ...]:
    """Caches with random parameters."""
    caches = []
    for i, (site, predictor, selector) in enumerate(heads):
        variables = drawn(rng, cache_shapes(predictor, selector, chain.site_specs[site].shape))
        variables["predictor"] |= points(rng, predictor)
        caches.append(Candidate(f"cache {i}", site, predictor, selector, variables))
    return tuple(caches)


def planned(chain: gati_jax.Chain, caches: tuple[Candidate, ...], thresholds: np.ndarray) -> Bundle:
    plan = Plan(
        names=tuple(cache.name for cache in caches),
        sites=tuple(cache.site for cache in caches),
        depth=len(chain),
        path=np.array([np.full(len(caches), np.inf), thresholds], np.float32),
        disagreement=np.zeros(2),
        mean_ms=np.ones(2),
        n=1,
        rows=np.array([1], np.uint64),
    )
    return Bundle(chain=chain, caches=caches, plan=plan, certificate=make_certificate(plan, step=1))


def halving(chain: gati_jax.Chain, caches: tuple[Candidate, ...], images: np.ndarray) -> tuple[Bundle, np.ndarray]:
    """A bundle of whose requests about half would leave at each cache, none of them near its threshold."""
    if not caches:
        return planned(chain, caches, np.zeros(0)), images
    scores = np.sort(gati_jax.replay(chain, caches, images).scores, axis=1)
    return planned(chain, caches, (scores[:, N // 2 - 1] + scores[:, N // 2]) / 2), images


def made(network: AnyNetwork, heads: Heads, normalization: Normalization | None = OF_BASE) -> tuple[Bundle, Any]:
    return halving(*parts(network, heads, normalization))


def with_network() -> tuple[Bundle, Any]:
    """A small network as the first cache, as ``parts`` cannot draw it."""
    chain, caches, images = parts(VGGS, [(1, Pool(CLASSES, 40, 6, standardize=False), SortedSelector(4, 3))])
    variables = drawn(np.random.default_rng(5), jax.eval_shape(lambda: init(SMALL, jax.random.key(0))))
    predictor, own = import_network(SMALL, variables, trained=OF_SMALL, base=OF_BASE)
    small = Candidate("small", 0, predictor, ProbabilitySelector(), {"predictor": own, "selector": {}})
    return halving(chain, (small, *caches), images)


class Largest(nn.Module):
    """A head that the library does not know: a layer over the largest feature of each channel."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits."""
        return nn.Dense(self.classes, name="out")(nn.silu(x.max(tuple(range(1, x.ndim - 1)))))


class Margin(nn.Module):
    """A selector that the library does not know."""

    @nn.compact
    def __call__(self, logits: jax.Array) -> jax.Array:
        """Return the lead of the first class over the second."""
        (first, second), _ = (jnp.moveaxis(found, -1, 0) for found in jax.lax.top_k(logits, 2))
        return nn.softplus(first - second)


def own_functions() -> tuple[Bundle, Any]:
    """A chain of functions of sequences, with a head and a selector that the library does not know."""
    rng = np.random.default_rng(3)

    def convolved(kernel: jax.Array, x: jax.Array) -> jax.Array:
        axes = ("NWC", "WIO", "NWC")
        return jax.nn.gelu(jax.lax.conv_general_dilated(x, kernel, (2,), "SAME", dimension_numbers=axes))

    def attended(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        shares = jax.nn.softmax(jnp.einsum("btc,cd,bsd->bts", x, weights["query"], x))
        rows = (shares @ x).reshape(-1, x.shape[-1]) @ weights["value"]  # all steps of all rows
        return x + rows.reshape(x.shape)

    def classified(weights: jax.Array, x: jax.Array) -> jax.Array:
        return (x - x.mean(1, keepdims=True))[:, 0] @ weights + x.max(1)[:, :CLASSES]

    kernel, query, value, last = (
        rng.normal(size=s).astype(np.float32) for s in ((3, 4, 6), (6, 6), (6, 6), (6, CLASSES))
    )
    params = kernel, {"query": query / 6, "value": value / 3}, last
    chain = gati_jax.Chain((convolved, attended), classified, params, (15, 4))
    heads = [(0, Largest(CLASSES), SortedSelector(4, 3)), (1, Grid(CLASSES, 3, 8), Margin())]
    images = rng.normal(size=(N, 15, 4)).astype(np.float32)
    return halving(chain, caches_of(chain, heads, rng), images)


def texts() -> tuple[Bundle, Any]:
    """A BERT, whose inputs are ids, some of them padding."""
    heads = [(1, ClassToken(CLASSES, 6), SortedSelector(4, 3)), (2, Grid(CLASSES, 2, 6), LinearSelector())]
    chain, caches, _ = parts(BERT, heads, None)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, BERT.vocabulary, (N, BERT.length), np.int32)
    return halving(chain, caches, ids * (np.arange(BERT.length) < rng.integers(3, BERT.length + 1, (N, 1))))


CASES = {
    "basic, shortcut A": lambda: made(
        BASIC,
        [
            (0, FullyConnected(CLASSES, 6), LinearSelector()),
            (1, Grid(CLASSES, 3, 8), SortedSelector(4, 9)),
        ],
    ),
    "bottleneck, 7x7 stem, floats": lambda: made(
        BOTTLENECK,
        [
            (0, Conv(CLASSES, 5, 3), LinearSelector()),
            (1, Convolutional(CLASSES, (6, 4), 3, 2, 2, 8), ProbabilitySelector()),
        ],
        None,
    ),
    "VGG, stored points": lambda: made(
        VGGS,
        [
            (0, GlobalAverage(CLASSES, 6), SortedSelector(4, 3)),
            (1, Neighbours(CLASSES, points=30, k=4, units=6), Confidence()),
            (2, Centres(CLASSES, centres=12, units=6, cells=2), Confidence()),
        ],
    ),
    "VGG, small network": with_network,
    "ViT": lambda: made(
        VIT,
        [
            (1, ClassToken(CLASSES, 6), SortedSelector(4, 3)),
            (2, Grid(CLASSES, 2, 6), LinearSelector()),
            (3, Convolutional(CLASSES, (4,), 3, 2, 2, 8), ProbabilitySelector()),
            (4, GlobalAverage(CLASSES, 6), SortedSelector(4, 3)),
        ],
    ),
    "BERT": texts,
    "own functions and heads": own_functions,
    "no cache": lambda: made(VGGS, []),
}


def with_two_plans() -> tuple[Bundle, np.ndarray]:
    """Another plan, with another cache at the same site, and with a cache that the first plan has off."""
    heads = [(1, Grid(CLASSES, 2, 6), SortedSelector(4, 3)), (1, GlobalAverage(CLASSES, 6), ProbabilitySelector())]
    bundle, images = made(VGGS, [*heads, (2, Grid(CLASSES, 1, 6), LinearSelector())])
    plans = []
    for columns, name in (([0], "default"), ([1, 2], "other")):
        names, sites = zip(*((bundle.plan.names[i], bundle.plan.sites[i]) for i in columns), strict=True)
        plan = dataclasses.replace(bundle.plan, names=names, sites=sites, path=bundle.plan.path[:, columns])
        plans.append((plan, dataclasses.replace(make_certificate(plan, step=1), name=name, plans=2)))
    (plan, certificate), other = plans
    bundle = dataclasses.replace(bundle, plan=plan, certificate=certificate, also=(other,))
    return bundle, images


def assert_same(found: Any, expected: Any, thresholds: np.ndarray, *, most: float = 0.05) -> None:
    """The same answers, but for a share of at most ``most``, whose score lies at a threshold or whose logits tie."""
    found, expected = (Prediction(*map(np.asarray, answers)) for answers in (found, expected))
    differ = (found.class_index != expected.class_index) | (found.exit != expected.exit)
    close = np.zeros(len(differ), bool)
    for answers in (found, expected):
        close |= np.isclose(answers.score[:, None], thresholds, rtol=1e-4, atol=1e-4).any(1)
        top = np.sort(answers.logits, axis=1)[:, -2:]
        close |= np.isclose(top[:, 0], top[:, 1], rtol=1e-4, atol=1e-4)
    assert not (differ & ~close).any()
    assert differ.mean() <= most
    for name in ("score", "logits"):
        one, other = getattr(found, name)[~differ], getattr(expected, name)[~differ]
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)
