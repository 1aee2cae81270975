"""Probes: chains that are no function of single inputs are refused, and other functions of the same parameters."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import Chain, InputError, Normalization
from gati_jax.bundle import load_bundle
from gati_jax.bundle.manifest import PlanEntry
from gati_jax.models import check_chain, probe_chain, warn_of_inputs
from gati_jax.planning import ReplaySource
from tests.bundle.made import sign
from tests.fitting import tiny

ROWS, SELECT = tiny.images()


def linear(params, x):
    return x @ params


def batch_norm(params, x):
    return (x - x.mean(0, keepdims=True)) / x.std(0, keepdims=True) @ params


def dropout(params, x):
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x, 0) @ params


def relu(params, x):
    return jax.nn.relu(x @ params)


def changed(**parts) -> Chain:
    return dataclasses.replace(tiny.chain(), **parts)


PARAMS = tiny.chain().params
DOORS = {"fit": lambda chain: tiny.fit(base=chain), "replay": lambda chain: gati_jax.replay(chain, (), SELECT)}
NO_FUNCTIONS = {
    "batch norm": (changed(blocks=(tiny.dense, batch_norm, tiny.dense)), "a row alone as in a batch"),
    "dropout": (changed(blocks=(tiny.dense, dropout, tiny.dense)), "a row alone as in a batch"),
    "one logit": (changed(params=(*PARAMS[:3], PARAMS[3][:, :1])), r"two classes or more, got \[8, 1\].*sigmoid"),
    "no class axis": (changed(classifier=lambda p, x: (x @ p)[:, 0]), r"logits\[batch, classes\].*got \[8\]"),
    "a map of logits": (changed(classifier=lambda p, x: (x @ p)[:, None]), r"got \[8, 1, 4\]"),
    "a batch in one": (changed(classifier=lambda p, x: (x @ p).mean(0, keepdims=True)), r"got \[1, 4\]"),
    "a dictionary": (changed(classifier=lambda p, x: {"logits": x @ p}), "classifier to return one array.*got dict"),
    "NaN": (changed(classifier=lambda p, x: jnp.log(-jnp.abs(x @ p))), "finite logits, got NaN or infinity for 8 of 8"),
    "no parameters": (
        changed(
            blocks=tuple(lambda _, x, w=w: jnp.tanh(x @ w) for w in PARAMS[:3]),
            classifier=lambda _, x: x @ PARAMS[3],
            params=((),) * 4,
        ),
        "expected parameters, got none",
    ),
    "another width": (changed(params=(PARAMS[0][1:], *PARAMS[1:])), r"functions of a batch of float32\[12\]"),
}


@pytest.mark.parametrize(("chain", "message"), NO_FUNCTIONS.values(), ids=NO_FUNCTIONS.keys())
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_function_of_single_inputs_is_refused(chain, message, door):
    with pytest.raises(InputError, match=f"^chain: .*{message}") as refused:
        DOORS[door](chain)
    assert "\n" not in str(refused.value)


def test_infinite_logits_of_a_row_that_was_not_probed_are_refused_too():
    images = SELECT.copy()
    images[1] = 1e38  # probes take rows 0, 8, 17, ...
    with pytest.raises(InputError, match=r"^chain: .*NaN or infinity for 1 of 60 images"):
        gati_jax.replay(changed(blocks=(relu,) * 3), (), images)


@pytest.mark.parametrize("n", [1, 2, 60])
def test_a_batch_dependence_shows_on_however_few_or_equal_rows(n):
    chain = changed(blocks=(batch_norm, tiny.dense, tiny.dense))
    with pytest.raises(InputError, match=r"^chain: .*in training mode"):
        gati_jax.replay(chain, (), np.repeat(SELECT[:1], n, axis=0) + np.arange(n, dtype=np.float32)[:, None] * 0.1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("seed", range(3))
def test_honest_chains_of_any_precision_pass(dtype, seed):
    rng = np.random.default_rng(seed)
    params = [jnp.asarray(rng.normal(size=(48, 48)) / 5, dtype) for _ in range(9)]
    spec = jax.ShapeDtypeStruct((48,), dtype)
    check_chain(
        Chain((tiny.dense,) * 8, tiny.linear, params, spec), np.asarray(jnp.asarray(rng.normal(size=(9, 48)), dtype))
    )


def test_integer_inputs_are_probed_by_small_ones():
    spec = jax.ShapeDtypeStruct((6,), np.int32)
    chain = Chain(
        (lambda p, ids: p[ids].mean(1),), linear, (np.eye(5, dtype=np.float32), np.eye(5, dtype=np.float32)), spec
    )
    check_chain(chain)
    logits = np.array(probe_chain(chain).logits).reshape(8, 5)
    np.testing.assert_allclose(logits.sum(1), 1, atol=1e-5)
    assert (logits[:, 2:] == 0).all()


def test_the_probe_is_that_of_the_whole_function():
    """Computed anew in float64; its inputs must stay as they are, for saved probes to mean anything."""
    inputs = ((np.random.PCG64(0).random_raw(96) >> np.uint64(56)).astype(float).reshape(8, 12) + 0.5) / 256
    for params in PARAMS[:3]:
        inputs = np.tanh(inputs @ params)
    expected = inputs @ PARAMS[3]
    found = probe_chain(tiny.chain())
    np.testing.assert_allclose(np.array(found.logits).reshape(8, 4), expected, atol=1e-5)
    assert 0 < found.tolerance < 0.01 * expected.std()


def source_of(chain: Chain) -> ReplaySource:
    return gati_jax.replay(
        chain, (), np.zeros((3, *chain.input_spec.shape), np.uint8 if chain.normalization else np.float32)
    ).source


OTHERS = {
    "relu": changed(blocks=(relu,) * 3),
    "one block": changed(blocks=(tiny.dense, relu, tiny.dense)),
    "leaky": changed(blocks=(lambda p, x: jnp.tanh(x @ p) + 0.01 * (x @ p),) * 3),
    "classes": changed(classifier=lambda p, x: (x @ p)[:, ::-1]),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_another_function_of_the_same_parameters_is_another_source(other):
    mine = source_of(tiny.chain())
    assert source_of(other).base == mine.base
    mine.check(source_of(tiny.chain(lambda p, x: jnp.tanh(jnp.dot(x, p)))), "table")  # the same, written in another way
    with pytest.raises(InputError, match=r"^table: .*the base's functions \(chain\)$"):
        mine.check(source_of(other), "table")
    dataclasses.replace(mine, logits=(), tolerance=0.0, sites=()).check(
        source_of(other), "table"
    )  # an older file does not know


def test_another_normalization_is_another_function():
    def with_mean(mean: float) -> ReplaySource:
        spec = jax.ShapeDtypeStruct((2, 2, 3), np.float32)
        flat = lambda p, x: jnp.tanh(x.reshape(len(x), -1) @ p)  # noqa: E731
        normal = Normalization(mean=(mean,), std=(0.25,))
        return source_of(Chain((flat, tiny.dense, tiny.dense), tiny.linear, PARAMS, spec, normal))

    with_mean(0.5).check(with_mean(0.5), "table")
    with pytest.raises(InputError, match="functions"):
        with_mean(0.5).check(with_mean(0.4), "table")


@pytest.fixture(scope="module")
def planned():
    chain, fitted = tiny.chain(), tiny.fit()
    costs = gati_jax.CostTable(device="test", batch=1, blocks_ms=(1.0,) * 3, lookup_ms={c.name: 0.01 for c in fitted})
    plan = gati_jax.plan(gati_jax.replay(chain, fitted, SELECT), costs, epsilon=0.3)
    fresh = np.random.default_rng(5).standard_normal((300, 12)).astype(np.float32)
    certificate = gati_jax.certify(plan, gati_jax.replay(chain, fitted, fresh), epsilon=0.3, delta=0.1, ledger=None)
    assert certificate.certified
    return chain, fitted, plan, certificate, fresh


def test_other_functions_are_refused_when_certifying_saving_and_loading(planned, tmp_path):
    chain, fitted, plan, certificate, fresh = planned
    other = changed(blocks=(relu,) * 3)
    table = gati_jax.replay(other, fitted, fresh)
    with pytest.raises(InputError, match=r"functions \(chain\)"):
        gati_jax.certify(plan, table, epsilon=0.3, delta=0.1, ledger=None)
    with pytest.raises(InputError, match=r"functions \(chain\)"):
        gati_jax.save_bundle(tmp_path / "other", other, fitted, plan, certificate)
    gati_jax.save_bundle(tmp_path / "b", chain, fitted, plan, certificate)
    assert load_bundle(tmp_path / "b", chain=tiny.chain()).plan.hash == plan.hash
    for wrong, message in (
        (other, "chain: expected the functions that"),
        (NO_FUNCTIONS["batch norm"][0], "chain: .*alone"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            load_bundle(tmp_path / "b", chain=wrong)


def test_a_plan_without_a_probe_loads_with_any_functions_and_keeps_its_hash(planned, tmp_path):
    chain, fitted, plan, certificate, _ = planned
    older = dataclasses.replace(plan, source=dataclasses.replace(plan.source, logits=(), tolerance=0.0, sites=()))
    assert older.hash == plan.hash
    gati_jax.save_bundle(tmp_path / "b", chain, fitted, older, certificate)
    file = tmp_path / "b" / "plans.json"
    written = json.loads(file.read_text())
    for entry in written["plans"]:
        del entry["origin"]["logits"], entry["origin"]["tolerance"], entry["origin"]["sites"]
    file.write_text(json.dumps(written))
    sign(tmp_path / "b")
    assert load_bundle(tmp_path / "b", chain=tiny.chain()).plan.hash == older.hash
    assert load_bundle(tmp_path / "b", chain=changed(blocks=(relu,) * 3)).certificate == certificate
    assert PlanEntry.of(plan).plan().source == plan.source


def test_blocks_that_are_not_the_networks_are_not_saved_as_the_network(planned, tmp_path):
    from gati_jax.models import ResNet  # noqa: PLC0415

    chain, fitted, plan, certificate, _ = planned
    posing = dataclasses.replace(chain, network=ResNet(stages=(1, 1, 1), widths=(4, 8, 8), input_shape=(8, 8, 1)))
    with pytest.raises(InputError, match=r"^chain: .*network=None"):
        gati_jax.save_bundle(tmp_path / "b", posing, fitted, plan, certificate)


NORMAL = Normalization(mean=(0.48, 0.45, 0.41), std=(0.22, 0.23, 0.24))


def picture_chain(normalization: Normalization | None = NORMAL) -> Chain:
    spec = jax.ShapeDtypeStruct((4, 4, 3), np.float32)
    weights = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
    params = (np.float32(1), weights - weights.mean(0, keepdims=True))
    return Chain((lambda p, x: p * x,), lambda p, x: x.reshape(len(x), -1) @ p, params, spec, normalization)


PIXELS = np.random.default_rng(1).integers(0, 256, (120, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    "images",
    [PIXELS / np.float32(255), PIXELS.astype(np.float32), PIXELS / np.float32(255**2)],
    ids=["0..1", "0..255", "twice"],
)
def test_floats_that_skipped_the_normalization_are_warned_of(images):
    with pytest.warns(UserWarning, match=r"^images: .*mean \(0.48, 0.45, 0.41\) and std .*got floats in"):
        warn_of_inputs(picture_chain(), images)


def test_normalized_images_and_pixels_pass_in_silence():
    chain = picture_chain()
    for images in (PIXELS, np.asarray(chain.prepare(PIXELS)), np.asarray(chain.prepare(PIXELS // 4))):
        warn_of_inputs(chain, images)
    warn_of_inputs(picture_chain(None), PIXELS.astype(np.float32))  # nobody said how its inputs are prepared


@pytest.mark.parametrize("name", ["mean", "std"])
def test_constants_of_unscaled_pixels_beside_a_scale_are_warned_of(name):
    wrong = dataclasses.replace(NORMAL, **{name: (122.0, 115.0, 104.0)})
    with pytest.warns(
        UserWarning,
        match=rf"^normalization.{name}: expected that of scaled pixels, at most .* = 1, got \(122.0, 115.0, 104.0\)",
    ):
        check_chain(picture_chain(wrong), PIXELS)
    check_chain(picture_chain(dataclasses.replace(wrong, mean=(122.0,), std=(60.0,), scale=1.0)), PIXELS)


def test_a_base_with_one_answer_is_warned_of_before_it_is_fitted():
    stuck = changed(classifier=lambda p, x: x @ p + jnp.array([[0.0, 0, 99, 0]]))
    with pytest.warns(UserWarning, match=r"^chain: it answers class 2 for 256 of 256 images"):
        tiny.fit(base=stuck)
