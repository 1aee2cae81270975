"""Hostile settings and what many tests share.

Every test runs with strict dtype promotion, rank promotion that raises, warnings as errors, and every jaxtyping
annotation of the library checked by beartype.
"""

import gc
import os
import sys
from pathlib import Path
from typing import Any

# Programs compile three times as fast without LLVM's optimisations, and most tests compile far longer than they run.
# Your own XLA_FLAGS, also empty ones, are kept: .ci/run tests the runtime, exports and HTTP with all optimisations.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import install_import_hook

install_import_hook("gati_jax", "beartype.beartype")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import gati_jax  # noqa: E402
from gati_jax import data  # noqa: E402
from gati_jax.fitting import apply_gradients  # noqa: E402

LONG = {"test_small_first.py", "test_autotune.py", "test_pass.py", "test_drivers.py", "test_docs.py"}
"""Files of minutes: they come first, so that all workers end at about the same time."""
MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 20_000
"""Of a process's memory: Linux allows 65,530, a program takes a dozen, and without room the compiler crashes."""
SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Forget the programs of earlier files where there are many."""
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with CIFAR-10 and trained networks, where there is one."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data (CIFAR-10 as TFDS folders and pretrained networks)")
    return SHARED


@pytest.fixture(scope="session")
def torch():
    """PyTorch on one thread, for it shares the processors with JAX."""
    found = pytest.importorskip("torch")
    found.set_num_threads(1)
    return found


@pytest.fixture(scope="session")
def torchvision(torch):
    """Some wheels do not fit this PyTorch and lack their operators, two of which the import asks for."""
    try:
        yield pytest.importorskip("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")  # the operators live as long as this
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        yield pytest.importorskip("torchvision")


def _fresh_ledger(tmp_path_factory):
    """Count looks from one on, and not in the ledger of the person who runs the tests."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GATI_JAX_LEDGER", str(tmp_path_factory.mktemp("looks") / "looks.json"))
        yield


_of_all = pytest.fixture(_fresh_ledger, autouse=True, scope="session")
_of_a_module = pytest.fixture(_fresh_ledger, autouse=True, scope="module")
_of_a_test = pytest.fixture(_fresh_ledger, autouse=True)


def dense_block(params, x):
    """A block that the library does not know."""
    return jnp.tanh(x @ params["w"] + params["b"].reshape(1, -1))


def linear_classifier(params, x):
    return x @ params["w"] + params["b"].reshape(1, -1)


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    """scikit-learn's digits, flat: float32[1797, 64] in 0 .. 1."""
    loaded = data.load("digits", "all")
    assert loaded.labels is not None
    return data.Dataset(images=np.asarray(loaded.images).reshape(-1, 64).astype(np.float32) / 16, labels=loaded.labels)


@pytest.fixture(scope="session")
def chain(digits) -> gati_jax.Chain:
    """A user's own network: five dense blocks, trained on the first 800 digits."""
    keys = jax.random.split(jax.random.key(0), 6)
    sizes = (64, 48, 48, 48, 48, 48, 10)
    params = [
        {"w": jax.random.normal(key, (m, n)) / np.sqrt(m).astype(np.float32), "b": jnp.zeros(n)}
        for key, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]
    x, y = jnp.asarray(digits.images[:800]), jnp.asarray(digits.labels[:800])
    optimizer = optax.adam(3e-3)

    def build(params):
        return gati_jax.Chain((dense_block,) * 5, linear_classifier, params, jax.ShapeDtypeStruct((64,), jnp.float32))

    @jax.jit
    def step(params, state):
        loss = lambda p: optax.losses.softmax_cross_entropy_with_integer_labels(build(p)(x), y).mean()  # noqa: E731
        return apply_gradients(optimizer, jax.grad(loss)(params), state, params)

    state = optimizer.init(params)
    for _ in range(150):
        params, state = step(params, state)
    return build(params)


@pytest.fixture(scope="session")
def sorting(chain) -> gati_jax.Chain:
    """The user's network behind an operation that ONNX does not have as JAX does."""

    def sorted_block(params: Any, x: jax.Array) -> jax.Array:
        return chain.blocks[0](params, jnp.sort(x))

    return gati_jax.Chain((sorted_block, *chain.blocks[1:]), chain.classifier, chain.params, chain.input_spec)


@pytest.fixture(scope="session")
def heads() -> tuple[gati_jax.Head, ...]:
    """A small head for flat activations."""
    from gati_jax.caches import FullyConnected, SortedSelector  # noqa: PLC0415

    return (
        gati_jax.Head(
            name="fc", predictor=lambda classes: FullyConnected(classes, hidden=32), selector=SortedSelector()
        ),
    )


@pytest.fixture(scope="session")
def splits(digits) -> dict[str, np.ndarray]:
    """Disjoint parts of the digits; the base was trained on ``fit``."""
    return {
        "fit": digits.images[:800],
        "select": digits.images[800:1100],
        "certify": digits.images[1100:1450],
        "test": digits.images[1450:],
    }


@pytest.fixture(scope="session")
def candidates(chain, splits, heads):
    """Caches at sites 1 .. 4 of the chain."""
    config = gati_jax.FitConfig(epochs=20, batch=50, seed=0)
    return gati_jax.fit(chain, splits["fit"], select=splits["select"], heads=heads, config=config, progress=False)


@pytest.fixture(scope="session")
def costs(candidates) -> gati_jax.CostTable:
    """Made-up costs: a block takes 1 ms, a lookup 0.05."""
    return gati_jax.CostTable(
        device="test", batch=1, blocks_ms=(1.0,) * 5, lookup_ms={c.name: 0.05 for c in candidates}
    )


@pytest.fixture(scope="session")
def planned(chain, candidates, splits, costs):
    """A plan on ``select`` and its certificate on ``certify``."""
    plan = gati_jax.plan(gati_jax.replay(chain, candidates, splits["select"]), costs, epsilon=0.08)
    table = gati_jax.replay(chain, candidates, splits["certify"])
    return plan, gati_jax.certify(plan, table, epsilon=0.08, delta=0.1, ledger=None)


@pytest.fixture
def bundle_path(tmp_path, chain, candidates, planned, costs) -> Path:
    """A saved bundle of the user's own chain."""
    gati_jax.save_bundle(tmp_path / "bundle", chain, candidates, *planned, costs=[costs])
    return tmp_path / "bundle"
