"""bfloat16: certified by itself, refused otherwise, and computed as it is written."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import Bundle, BundleError, InputError
from gati_jax.caches import lookup
from gati_jax.certification import certify_numerics
from gati_jax.profiling import BFLOAT16, Tile, Tuning, bfloat16_programs, replays_in_bfloat16
from gati_jax.profiling.bfloat16 import bfloat16_sizes, run_in_bfloat16
from gati_jax.profiling.compiler import BRANCHES, ROUNDED
from serve.engine import routes
from serve.engine.records import Job, Step
from serve.engine.runner import JaxRunner
from serve.settings import Settings
from tests.bundle.made import PIXELS, at, edit, sign


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (60, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(residual, images, tmp_path_factory) -> Path:
    """Certified in both: a bundle of a small ResNet with random caches, at an epsilon that they can keep."""
    chain, caches, plan, _ = residual
    table = dataclasses.replace(gati_jax.replay(chain, caches, images), source=plan.source)  # as one made by hand
    halves = replays_in_bfloat16(table, chain, caches, images)
    found = certify_numerics({"default": (plan, 0.95)}, table, {BFLOAT16: (bfloat16_programs(), halves)}, ledger=None)
    path = tmp_path_factory.mktemp("halves") / "bundle"
    both = found["reference"]["default"], found[BFLOAT16]["default"]
    assert [one.certified for one in both] == [True, True]
    gati_jax.save_bundle(path, chain, caches, plan, both[0], bfloat16=[both[1]], ledger=None)
    return path


@pytest.fixture(scope="module")
def bundle(folder) -> Bundle:
    return gati_jax.load_bundle(folder)


@pytest.fixture(scope="module")
def by_hand(bundle, images) -> list[tuple[int, int]]:
    """Class and exit of every image, one operation after another, each rounded: nothing is compiled together."""
    half = lambda tree: jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), tree)  # noqa: E731
    chain, found = bundle.chain, []
    cascade = bundle.cascade
    with jax.disable_jit(), jax.numpy_dtype_promotion("standard"):
        for image in images[:24]:
            x, at_site, answer = chain.prepare(image[None]), 0, None
            for cache, threshold in zip(cascade.caches, np.asarray(cascade.thresholds), strict=True):
                for k in range(at_site, cache.site):
                    x = chain.blocks[k](half(chain.params[k]), x.astype(jnp.bfloat16))
                logits, score = lookup(cache, x.astype(jnp.float32))
                at_site = cache.site
                if answer is None and score[0] >= threshold:
                    answer = int(logits.argmax()), cache.site
            for k in range(at_site, len(chain)):
                x = chain.blocks[k](half(chain.params[k]), x.astype(jnp.bfloat16))
            found.append(answer or (int(chain.classify(x.astype(jnp.float32)).argmax()), len(chain)))
    return found


def test_it_answers_as_operations_one_by_one(bundle, images, by_hand):
    alone = [gati_jax.infer(bundle, image, numerics="bfloat16") for image in images[:24]]
    assert [(int(p.class_index), int(p.exit)) for p in alone] == by_hand
    together = gati_jax.infer_batch(bundle, images[:24], numerics="bfloat16")
    assert (
        list(zip(np.asarray(together.class_index).tolist(), np.asarray(together.exit).tolist(), strict=True)) == by_hand
    )
    assert len({exit_ for _, exit_ in by_hand}) > 1
    exact = gati_jax.infer_batch(bundle, images[:24], numerics="reference")
    difference = np.abs(np.asarray(together.logits) - np.asarray(exact.logits))
    assert 0 < difference.max() < 0.2 * np.ptp(np.asarray(exact.logits))  # another arithmetic, of the same function


def test_what_is_between_spans_is_bfloat16_and_what_answers_is_not(bundle, images):
    half = bundle.bfloat16_of().cascade
    assert [str(spec.dtype) for spec in half.chain.site_specs] == ["float32", "bfloat16"]  # site 0 is the input
    logits, score = lookup(half.caches[-1], jnp.zeros((1, *half.chain.site_specs[1].shape), jnp.bfloat16))
    assert (logits.dtype, score.dtype) == (jnp.float32, jnp.float32)
    assert half.chain(half.chain.prepare(images[:1])).dtype == jnp.float32
    assert half.chain.bytes < 0.6 * bundle.chain.bytes


def test_its_promise_is_its_own(bundle):
    exact, half = bundle.bound_of(numerics="reference"), bundle.bound_of(numerics="bfloat16")
    assert (half.numerics, half.epsilon, half.delta) == ("bfloat16", 0.95, exact.delta)
    assert "bfloat16 arithmetic: at most 95% of answers differ" in str(half)
    assert bundle.bound_of().numerics == "reference"  # it answers only where it is asked for


@pytest.mark.parametrize("ask", ["infer", "bound", "serve"])
@pytest.mark.parametrize("case", ["float32 alone", "another device", "another plan", "inconclusive"])
def test_without_its_own_certificate_it_never_answers(bundle, images, case, ask):
    (half,) = bundle.bfloat16
    none = dataclasses.replace(half, step=-1, disagreements=0)
    certificates, reason = {
        "float32 alone": ((), "has no certificate for it"),
        "another device": ((dataclasses.replace(half, arithmetics=("ab" * 8,)),), "on another device"),
        "another plan": ((dataclasses.replace(half, plan_hash="cd" * 8),), "has no certificate for it"),
        "inconclusive": ((none,), "nothing was certified for it"),
    }[case]
    other = dataclasses.replace(bundle, bfloat16=certificates)
    if ask == "serve" and case in {"float32 alone", "inconclusive"}:
        reason = "expected a bundle that was certified in it"
    asked = {
        "infer": lambda: gati_jax.infer(other, images[0], numerics="bfloat16"),
        "bound": lambda: other.bound_of(numerics="bfloat16"),
        "serve": lambda: routes.load_bfloat16(other),
    }
    with pytest.raises(InputError, match=reason):
        asked[ask]()
    assert int(gati_jax.infer(other, images[0]).exit) >= 0


FORGED = {
    "of float32": at("bfloat16 0 numerics", "reference"),
    "of any device": at("bfloat16 0 arithmetics", []),
    "another name": at("bfloat16 0 name", "other"),
    "another look": at("bfloat16 0 looks", 2),
    "another epsilon": at("bfloat16 0 epsilon", 0.97),
    "a step that is none": at("bfloat16 0 step", 7),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_certificate_is_refused(folder, tmp_path, case):
    copy = tmp_path / "bundle"
    copy.mkdir()
    for file in folder.rglob("*"):
        target = copy / file.relative_to(folder)
        target.mkdir(exist_ok=True) if file.is_dir() else target.write_bytes(file.read_bytes())
    edit(copy / "certificates.json", FORGED[case])
    sign(copy)
    with pytest.raises(BundleError, match=r"inconsistent: (bfloat16|certificate): expected|damaged"):
        gati_jax.load_bundle(copy)


def test_a_server_answers_in_it(bundle, images, by_hand):
    sources = routes.load_bfloat16(bundle)
    assert [(route.name, route.numerics, route.epsilon) for route in sources] == [
        ("default", "bfloat16", 0.95),
        ("base", "bfloat16", None),
    ]
    runner = JaxRunner(sources, capacity=8, buckets=(1,))
    for row in (0, 1, 2):
        job, stage = Job(image=images[row], route=0, arrived=0.0, slot=0), 0
        while True:
            result = runner.dispatch(Step(route=0, stage=stage, bucket=1, jobs=(job,))).result()
            if result.hit[0]:
                break
            stage += 1
        sites = (*sources[0].cascade.sites, len(bundle.chain))
        assert (int(result.class_index[0]), sites[stage]) == by_hand[row]


@pytest.mark.parametrize("other", [{"reference": True}, {"adapt": True}, {"backend": "onnxruntime"}], ids=str)
def test_a_server_takes_it_alone(folder, other):
    with pytest.raises(ValueError, match="--bfloat16: expected it without --"):
        Settings(bundle=(str(folder),), bfloat16=True, **other)


def test_pixels_and_prepared_inputs_are_the_same_to_it(bundle):
    prepared = np.asarray(bundle.chain.prepare(PIXELS[:3]))
    for one, other in zip(
        *(gati_jax.infer_batch(bundle, x, numerics="bfloat16") for x in (PIXELS[:3], prepared)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_on_a_gpu_batches_run_in_the_sizes_that_were_counted(bundle, monkeypatch):
    """A tuning of float32, perhaps made after the certificate, brought its own sizes, in which no row was counted."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    tiles = [Tile(size=n, milliseconds=1.0, options=BRANCHES, algorithms={}, driver="nest") for n in (1, 128)]
    for more, options in (
        ((), ROUNDED),
        ((dataclasses.replace(tiles[1], size=512, driver="loop"),), (*BRANCHES, *ROUNDED)),
    ):
        tuning = Tuning(device="gpu-some", tiles=(*tiles, *more))
        found = run_in_bfloat16(bundle.cascade, tuning).tuning.tiles
        assert [tile.size for tile in found] == list(bfloat16_sizes()) == [1, 8, 32, 256]
        assert [tile.driver for tile in found] == ["nest", "loop", "loop", "loop"]
        assert [tile.options for tile in found] == [(*BRANCHES, *ROUNDED), *[options] * 3]
