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
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import Chain, CostTable, Head, data
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


def bundle_folder() -> Path:
    return ROOT / "tests/fixtures/v1/bundle"


@functools.cache
def bundle() -> gati_jax.Bundle:
    return gati_jax.load_bundle(bundle_folder())


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


def network(**options: Any) -> Chain:
    given: dict[str, Any] = {"name": "resnet20", "weights": "none.safetensors"} | options
    return gati_jax.load_network(**given)


def linen(**options: Any) -> Chain:
    module = nn.Sequential([nn.Dense(4), nn.Dense(3)])
    variables = {"params": {f"layers_{i}": {"kernel": W[:, : 4 - i], "bias": W[0, : 4 - i]} for i in range(2)}}
    given = {"module": module, "variables": variables, "sites": ["layers_0"], "sample": IMAGES[:2]}
    return gati_jax.from_linen(**given | options)


def evaluated(**options: Any) -> Any:
    return gati_jax.evaluate(**{"bundle": bundle(), "images": PIXELS, "ledger": None, "timed": 0} | options)


NORMALIZATION: Any = {"mean": [0.5], "std": [0.5]}
ANYTHING: Any = "my/bundle"
PLAN, COSTS = bundle().plan, CostTable(device="cpu", batch=1, blocks_ms=(1.0, 1.0), lookup_ms={}, spread=0.0)
TAKES_A_CHAIN = r"chain: expected a gati_jax\.Chain, as gati_jax\.load_network, .* got str 'my/bundle'"
TAKES_A_SHAPE = "input_shape: expected height, width and channels, or the number of tokens, each 1 to 4096, got "
OTHER_KINDS: dict[str, tuple[Callable[[], object], str]] = {
    "fit of a path": (lambda: fit(chain=ANYTHING), TAKES_A_CHAIN),
    "replay of a path": (lambda: gati_jax.replay(ANYTHING, [], IMAGES), TAKES_A_CHAIN),
    "costs of a path": (lambda: gati_jax.measure_costs(ANYTHING, []), TAKES_A_CHAIN),
    "a path as the chain of a bundle": (lambda: gati_jax.load_bundle(bundle_folder(), chain=ANYTHING), TAKES_A_CHAIN),
    "a path as a chain to save": (lambda: gati_jax.save_pretrained(ANYTHING, "none"), TAKES_A_CHAIN),
    "a bundle of a path": (
        lambda: gati_jax.save_bundle("none", ANYTHING, [], PLAN, bundle().certificate),
        TAKES_A_CHAIN,
    ),
    "options as a dict": (lambda: fit(config={"epochs": 1}), r"config: expected gati_jax\.FitConfig\(.* got dict"),
    "costs of a name": (
        lambda: gati_jax.measure_costs(chain(), cast("Any", ["grid"])),
        "candidates: expected what gati_jax.fit returns, got str 'grid'",
    ),
    "tables in the other order": (
        lambda: gati_jax.plan(cast("Any", COSTS), cast("Any", PLAN), epsilon=0.1),
        "table: expected what gati_jax.replay returns, got CostTable",
    ),
    "a certificate of no plan": (
        lambda: gati_jax.certify(ANYTHING, ANYTHING, epsilon=0.1, ledger=None),
        "plan: expected what gati_jax.plan returns, got str",
    ),
    "a certificate of no table": (
        lambda: gati_jax.certify(PLAN, ANYTHING, epsilon=0.1, ledger=None),
        "table: expected what gati_jax.replay returns, got str",
    ),
    "a bundle without a certificate": (
        lambda: gati_jax.save_bundle("none", chain(), [], PLAN, cast("Any", None)),
        "certificate: expected what gati_jax.certify returns, got NoneType None",
    ),
    "a bundle from nowhere": (lambda: gati_jax.load_bundle(cast("Any", None)), "path: expected a path, got NoneType"),
    "an evaluation of a path": (
        lambda: evaluated(bundle=ANYTHING),
        "bundle: expected what gati_jax.load_bundle returns, got str 'my/bundle'",
    ),
    "ragged labels": (
        lambda: evaluated(labels=[[1], [2, 3], [4]]),
        "labels: expected an array, got rows of different lengths",
    ),
    "a text of timed requests": (lambda: evaluated(timed="1"), "timed: expected 0 or more, got str '1'"),
    "batches of no row": (lambda: evaluated(batches=(0,)), r"batches: expected sizes of 1 or more, got tuple \(0,\)"),
    "nothing to fit on": (lambda: fit(images=None), "images: expected an array, got NoneType None"),
    "a data set to fit on": (
        lambda: fit(images=data.Dataset(images=IMAGES)),
        "images: expected an array, got Dataset Dataset.float32.40, 4. without labels.: pass its images",
    ),
    "constants as a dict": (
        lambda: chain(normalization=NORMALIZATION),
        r"normalization: expected gati_jax.Normalization\(mean=.* got dict",
    ),
    "a number as an input's name": (lambda: chain(input_name=3), "input_name: expected up to 100 letters, .* got 3"),
    "a network's constants as a dict": (
        lambda: network(normalization=NORMALIZATION),
        r"normalization: expected gati_jax.Normalization\(mean=.* got dict",
    ),
    "no classes": (lambda: network(classes=0), "classes: expected 2 or more, got int 0"),
    "classes in words": (lambda: network(classes="10"), "classes: expected 2 or more, got str '10'"),
    "a side alone": (lambda: network(input_shape=32), f"{TAKES_A_SHAPE}int 32"),
    "fractions of pixels": (lambda: network(input_shape=(32.0, 32, 3)), f"{TAKES_A_SHAPE}tuple"),
    "a picture of a billion rows": (lambda: network(input_shape=(10**9, 32, 3)), f"{TAKES_A_SHAPE}tuple"),
    "no weights": (lambda: network(weights=None), "weights: expected a path, got NoneType None"),
    "no folder": (lambda: gati_jax.from_pretrained(cast("Any", 3)), "source: expected a path, got int 3"),
    "a file as a folder": (
        lambda: gati_jax.save_pretrained(bundle().chain, __file__),
        "folder: expected a folder, got the file ",
    ),
    "a Linen module's class": (
        lambda: linen(module=nn.Dense),
        "module: expected an instance of a flax.linen.Module, got the class Dense",
    ),
    "no variables": (lambda: linen(variables=None), r"variables: expected {.params.: .* got NoneType None"),
    "parameters as variables": (lambda: linen(variables={"layers_0": W}), "variables: expected .* got keys layers_0"),
    "a Linen site by number": (lambda: linen(sites=[0]), "sites: expected names of submodules, got int 0"),
    "a site twice": (
        lambda: linen(sites=["layers_0", "layers_0"]),
        "sites: expected every submodule once, got layers_0 twice",
    ),
    "an axis in words": (
        lambda: linen(channel_axis="first"),
        "channel_axis: expected a whole number: .* got str 'first'",
    ),
    "a module's constants as a dict": (
        lambda: linen(sample=PIXELS, normalization=NORMALIZATION),
        r"normalization: expected gati_jax.Normalization\(mean=.* got dict",
    ),
    "data without a name": (lambda: data.load(cast("Any", None), "all"), "data.name: expected the name of a data set"),
    "data without a split": (lambda: data.load("digits", cast("Any", None)), "split: expected a form like train"),
    "data at a number": (lambda: data.load("npz", "all", cast("Any", 3)), "data.dir: expected a path, got int 3"),
    "rows of nothing": (
        lambda: data.ImageRows(cast("Any", None)),
        "images: expected a sized, indexable source, got NoneType None",
    ),
}
CASES |= OTHER_KINDS


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
