"""A bundle made by hand, and how to damage and forge it."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import Candidate, Certificate, Chain, CostTable, Plan
from gati_jax.caches import FullyConnected, SortedSelector
from gati_jax.certification import ArithmeticCheck
from gati_jax.files import digests
from gati_jax.profiling import Tuning

WIDTH, CLASSES = 4, 3


def block(params, x):
    return jnp.tanh(x @ params["w"])


def classify(params, x):
    return x @ params["w"]


def _shapes(predictor: nn.Module, selector: nn.Module, activation: tuple[int, ...] = (WIDTH,)) -> Any:
    """Shapes of a cache's parameters: tracing is enough, so the victim of the kill test starts no device."""
    logits = (1, getattr(predictor, "classes"))  # noqa: B009 (of every predictor)
    return jax.eval_shape(
        lambda: {
            "predictor": predictor.init(jax.random.key(0), jnp.zeros((1, *activation))),
            "selector": selector.init(jax.random.key(0), jnp.zeros(logits)),
        }
    )


cache_shapes: Any = functools.cache(_shapes)


def drawn(rng: np.random.Generator, shapes: Any) -> Any:
    """Random values in these shapes, biases and statistics included."""
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def cache(rng: np.random.Generator, name: str, site: int, hidden: int = 5) -> Candidate:
    """A cache with random parameters."""
    predictor, selector = FullyConnected(CLASSES, hidden=hidden), SortedSelector()
    return Candidate(name, site, predictor, selector, drawn(rng, cache_shapes(predictor, selector)))


def own_chain(rng: np.random.Generator, width: int = WIDTH) -> Chain:
    params = [{"w": rng.normal(size=(width, width)).astype(np.float32)} for _ in range(3)]
    params.append({"w": rng.normal(size=(width, CLASSES)).astype(np.float32)})
    return Chain((block,) * 3, classify, params, jax.ShapeDtypeStruct((width,), np.dtype("float32")))


def make_plan(caches: tuple[Candidate, ...], depth: int = 3, threshold: float = 2.0) -> Plan:
    """Two caches opened one after the other."""
    path = np.array([[np.inf, np.inf], [threshold, np.inf], [threshold, threshold]], np.float32)
    return Plan(
        names=tuple(c.name for c in caches),
        sites=tuple(c.site for c in caches),
        depth=depth,
        path=path,
        disagreement=np.array([0.0, 0.01, 1 / 3]),
        mean_ms=np.array([3.0, 2.5, 0.1]),
        n=2,
        rows=np.array([1, 2**64 - 1], np.uint64),
    )


def make_certificate(plan: Plan, step: int = 2) -> Certificate:
    return Certificate(
        epsilon=0.1, delta=0.05, step=step, n=100, disagreements=2, p_value=0.01, plan_hash=plan.hash,
        data_fingerprint="ab" * 16, stays_off=("a sentence",),
    )  # fmt: skip


Parts = tuple[Chain, tuple[Candidate, ...], Plan, Certificate]


def make(seed: int) -> Parts:
    """What ``save_bundle`` takes, made by hand: three blocks, caches at sites 1 and 2."""
    rng = np.random.default_rng(seed)
    chain = own_chain(rng)
    caches = (cache(rng, "fc@1", 1), cache(rng, "fc@2", 2))
    plan = make_plan(caches)
    return chain, caches, plan, make_certificate(plan)


PIXELS = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
REQUESTS = np.random.default_rng(9).normal(size=(32, WIDTH)).astype(np.float32)
COSTS = CostTable(device="test", batch=1, blocks_ms=(1.0, 0.1, 1 / 3), lookup_ms={"fc@1": 0.05, "fc@2": 1e-9})


def in_memory(parts: Parts) -> gati_jax.Bundle:
    chain, caches, plan, certificate = parts
    return gati_jax.Bundle(chain=chain, caches=caches, plan=plan, certificate=certificate)


def answers(b: gati_jax.Bundle, requests: np.ndarray = REQUESTS) -> list[bytes]:
    """Classes, exits, scores and logits as bytes: equal only if every bit is."""
    return [np.asarray(column).tobytes() for column in gati_jax.infer_batch(b, requests)]


def load(path: Path) -> gati_jax.Bundle:
    """Load with the structure of the chain, but none of the saved parameters."""
    return gati_jax.load_bundle(path, chain=make(77)[0])


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change what a JSON file holds; ``change`` may return something else to write instead."""
    value = json.loads(file.read_bytes())
    replacement = change(value)
    file.write_text(json.dumps(value if replacement is None else replacement))


def listed(folder: Path) -> dict[str, str]:
    """Digests of the files that a manifest lists."""
    return {k: v for k, v in digests(folder).items() if k != "manifest.json" and not k.startswith("tuning/")}


def sign(folder: Path) -> None:
    """Make the list of digests true again, as a forger would."""
    edit(folder / "manifest.json", lambda manifest: manifest.update(files=listed(folder)))


def at(place: str, value: object) -> Callable[[Any], None]:
    """Set what stands at a place such as "caches 0 site"."""

    def change(tree: Any) -> None:
        *keys, last = (int(key) if key.isdigit() else key for key in place.split(" "))
        for key in keys:
            tree = tree[key]
        tree[last] = value

    return change


def assert_refused(folder: Path, file: str, change: Callable[[Any], Any], message: str, load: Any = load) -> None:
    """Forge a file of a bundle, and the digests of it; check that the bundle is refused."""
    edit(folder / file, change)
    if file != "manifest.json":
        sign(folder)
    with pytest.raises(gati_jax.BundleError, match=message):
        load(folder)


def same_plan(one: Plan, other: Plan) -> bool:
    def values(plan: Plan) -> list[Any]:
        return [v.tobytes() if isinstance(v, np.ndarray) else v for v in vars(plan).values()]

    return values(one) == values(other) and one.hash == other.hash


def checked(bundle: gati_jax.Bundle, tuning: Tuning, differ: int = 3) -> Tuning:
    """As if its answers had been compared on 1000 rows."""
    checks = tuple(
        ArithmeticCheck(
            arithmetic="fast", programs=tuning.programs, device=tuning.device, cascade=cascade, data_fingerprint="",
            n=1000, differ=differ, delta=0.01, comparisons=comparisons,
        )
        for cascade, (_, comparisons) in bundle.compared.items()
    )  # fmt: skip
    return dataclasses.replace(tuning, checks=checks)
