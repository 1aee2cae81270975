"""What a new user may get wrong in a first hour: each in one line that names the argument, before anything long begins.

The calls are made in a process of their own, where no type checker stands in front of the library's own checks.
"""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import Chain, Head
from gati_jax.caches import Grid, SortedSelector
from gati_jax.fitting import untrained
from gati_jax.runtime import predict_batch

ROOT = Path(__file__).resolve().parents[1]
W = np.eye(4, dtype=np.float32)
IMAGES = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)


def dense(params: Any, x: Any) -> Any:
    return x @ params


def chain(**parts: Any) -> Chain:
    return Chain(**{"blocks": (dense, dense), "classifier": dense, "params": (W, W, W), "input_spec": (4,)} | parts)


def from_layers(layers: Any) -> Chain:
    return Chain.from_layers(layers, (4,))


def fit(**options: Any) -> Any:
    return gati_jax.fit(**{"chain": chain(), "images": IMAGES[:20], "select": IMAGES[20:]} | options)


def head(**options: Any) -> Head:
    return Head(**{"name": "h", "predictor": Grid, "selector": SortedSelector()} | options)


@functools.cache
def bundle() -> gati_jax.Bundle:
    return gati_jax.load_bundle(ROOT / "tests/fixtures/v1/bundle")


def infer(image: Any, given: Any = None) -> Any:
    return gati_jax.infer(given or bundle(), image).logits


TRACED = (
    r"image: expected an array, got one that jit, vmap or grad is tracing: .*runtime\.predict_batch\(bundle\.cascade"
)
CASES: dict[str, tuple[Callable[[], object], str]] = {
    "a classifier of one dimension": (
        lambda: fit(chain=chain(classifier=lambda p, x: (x @ p)[:, 0])),
        r"chain: expected logits\[batch, classes\] of two classes or more, got \[8\]",
    ),
    "the same, while costs are asked for": (
        lambda: untrained(chain(classifier=lambda p, x: (x @ p)[:, 0]), [head()]),
        r"chain: expected logits\[batch, classes\] of two classes or more, got \[8\]",
    ),
    "a block that returns a tuple": (
        lambda: fit(chain=chain(blocks=(dense, lambda p, x: (x @ p, x)))),
        r"chain: expected block 2 to return one array\[batch, \.\.\.\], got tuple",
    ),
    "a block that drops the batch": (
        lambda: fit(chain=chain(blocks=(dense, lambda p, x: x[0] @ p))),
        r"chain: expected block 2 to return an array\[batch, \.\.\.\], got \[4\] for a batch of 8",
    ),
    "a block that fails": (
        lambda: chain(blocks=(dense, lambda p, x: x @ p["w"])).site_specs,
        "chain: expected functions of a batch of float32.4., got an error from block 2: ",
    ),
    "params as a dict": (
        lambda: chain(params={"a": W, "b": W, "c": W}),
        "params: expected a sequence of pytrees, one for each block and one for the classifier, got dict",
    ),
    "a function among the parameters": (
        lambda: chain(params=(W, {"w": W, "f": np.tanh}, W)),
        r"params: expected arrays and numbers, got ufunc .* at \[1\]\['f'\]",
    ),
    "random keys among the parameters": (
        lambda: chain(params=(W, {"w": W, "rng": jax.random.key(0)}, W)),
        r"params: expected arrays and numbers, got key<fry>\[\] at \[1\]\['rng'\]",
    ),
    "one layer": (lambda: from_layers([(dense, W)]), "layers: expected a block or more and .* got 1"),
    "a layer of three": (
        lambda: from_layers([(dense, W, W), np.tanh]),
        "layers: expected a function, or a function and its parameters, got tuple",
    ),
    "a layer that is none": (
        lambda: from_layers([{"w": W}, np.tanh]),
        "layers: expected a function, or a function and its parameters, got dict",
    ),
    "one block alone": (lambda: chain(blocks=dense), "blocks: expected a sequence of functions .* got function"),
    "blocks that cannot be called": (lambda: chain(blocks=(W, W)), "blocks: expected functions .* got ndarray"),
    "an array as input_spec": (
        lambda: chain(input_spec=IMAGES),
        r"input_spec: expected the shape of one float32 input, such as \(28, 28, 1\), or .* got ndarray",
    ),
    "an empty batch dimension in input_spec": (
        lambda: chain(input_spec=(None, 4)),
        "input_spec: expected .* got tuple",
    ),
    "a selector's class": (
        lambda: head(selector=SortedSelector),
        r"selector: expected an instance such as SortedSelector\(\), got the class SortedSelector",
    ),
    "a further selector's class": (
        lambda: head(selectors=(("other", SortedSelector),)),
        "selector: expected an instance .* got the class SortedSelector",
    ),
    "a predictor's instance": (
        lambda: head(predictor=Grid(10)),
        r"predictor: expected a function .* such as the class Grid, got Grid .*lambda classes: Grid\(classes, \.\.\.\)",
    ),
    "a predictor's name": (lambda: head(predictor="grid"), "predictor: expected a function .* got str 'grid'"),
    "a predictor that makes none": (
        lambda: fit(heads=[head(predictor=lambda n: n)]),
        "heads: expected h to make a Linen module, got int 4",
    ),
    "heads as a string": (lambda: fit(heads="grid"), "heads: expected a sequence of gati_jax.Head, got str 'grid'"),
    "heads as strings": (lambda: fit(heads=["grid"]), r"heads: expected gati_jax.Head\(name=.* got str 'grid'"),
    "heads as classes": (lambda: fit(heads=[Grid]), r"heads: expected gati_jax.Head\(.* got the class Grid"),
    "one head": (lambda: fit(heads=head()), r"heads: expected a sequence of heads, got one: write \[h\]"),
    "infer inside jit": (lambda: jax.jit(infer)(PIXELS[0]), TRACED),
    "infer inside vmap": (lambda: jax.vmap(infer)(PIXELS), TRACED),
    "infer inside grad": (
        lambda: jax.grad(lambda x: infer(x).sum())(jnp.zeros((4, 4, 3))),
        r"image: .*for gradients bundle\.chain\(inputs\)",
    ),
    "a path instead of a bundle": (
        lambda: infer(PIXELS[0], "my/bundle"),
        "bundle: expected what gati_jax.load_bundle returns, got str 'my/bundle'",
    ),
    "a path instead of images": (
        lambda: gati_jax.infer_batch(bundle(), "cats/"),
        "images: expected an array, got the path 'cats/': read it first",
    ),
    "a Path instead of an image": (
        lambda: gati_jax.infer(bundle(), Path("cat.jpg")),
        r"image: expected an array, got the path .*cat\.jpg.*: read it first",
    ),
    "integers that are no pixels": (
        lambda: gati_jax.infer(bundle(), (PIXELS[0].astype(int) + 1000).tolist()),
        "image: expected whole numbers in 0 .. 255, got 10.. .. 12..",
    ),
}


@pytest.fixture(scope="module")
def messages() -> dict[str, str]:
    """What each call says, in a process without beartype."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_line(messages, name):
    kind, _, text = messages[name].partition(" ")
    assert kind == "InputError", messages[name]
    assert re.match(CASES[name][1], text), text
    assert "\n" not in text


def made(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001 (a foreign one is what the test is about)
        return f"{type(error).__name__} {error}"
    return "nothing"


def test_a_shape_and_numbers_are_taken():
    spelled = chain(params=(jnp.float32(2), W, W), input_spec=jax.ShapeDtypeStruct((4,), jnp.float32))
    short = chain(params=(2.0, W, W), blocks=(lambda p, x: x * p, dense))
    assert short.input_spec == spelled.input_spec
    assert (short.params[0].dtype, short.params[0].weak_type) == (jnp.float32, False)
    np.testing.assert_array_equal(short(jnp.asarray(IMAGES)), IMAGES * 2)
    assert short.bytes == spelled.bytes


def test_lists_of_numbers_are_taken():
    one = gati_jax.infer(bundle(), PIXELS[0].tolist())
    jax.tree.map(np.testing.assert_array_equal, one, gati_jax.infer(bundle(), PIXELS[0]))
    prepared = np.asarray(bundle().chain.prepare(PIXELS))
    many = gati_jax.infer_batch(bundle(), prepared.tolist())
    jax.tree.map(np.testing.assert_array_equal, many, gati_jax.infer_batch(bundle(), prepared))


def test_what_the_message_names_works_inside_jit_vmap_and_grad():
    cascade, inputs = bundle().cascade, jnp.asarray(bundle().chain.prepare(PIXELS))
    expected = gati_jax.infer_batch(bundle(), np.asarray(inputs))
    for run in (
        jax.jit(lambda x: predict_batch(cascade, x)),
        lambda x: jax.tree.map(lambda v: v[:, 0], jax.vmap(lambda row: predict_batch(cascade, row[None]))(x)),
    ):
        found = run(inputs)
        np.testing.assert_array_equal(found.class_index, expected.class_index)
        np.testing.assert_array_equal(found.exit, expected.exit)
    np.testing.assert_array_equal(gati_jax.infer_batch(bundle(), np.asarray(inputs)).exit, expected.exit)  # none leaked
    slope = jax.grad(lambda x: bundle().chain(x).sum())(inputs)
    assert slope.shape == inputs.shape
    assert np.abs(slope).max() > 0


if __name__ == "__main__":
    print(json.dumps({name: made(call) for name, (call, _) in CASES.items()}))  # noqa: T201
