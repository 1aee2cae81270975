"""Options and drivers that a compiler may not have: probed, narrowed, and left out with one warning."""

import dataclasses
import functools
import warnings
from importlib.metadata import version

import jax
import numpy as np
import pytest

import gati_jax
from gati_jax.profiling import Tile, TunedCascade, Tuning, autotune, cannot_run, compiler, device_name
from gati_jax.profiling.compiler import BRANCHES, LOOPS, OPTIONS, are_tried, known_options
from gati_jax.runtime import Cascade

pytestmark = pytest.mark.gpu
GRAPHS = BRANCHES[0][0]


def test_what_a_compiler_cannot_capture_is_left_out():
    """Every version of XLA knows these options, on every platform; it refuses types that it does not have."""
    assert known_options(BRANCHES, "cpu") == BRANCHES  # jaxlib 0.10.2 and 0.12.0.1 have all of them
    assert known_options(((GRAPHS, "FUSION,A_NEW_TYPE,WHILE"),), "cpu") == ((GRAPHS, "FUSION,WHILE"),)
    assert known_options((), "cpu") == ()
    for refused in (((GRAPHS, "A_NEW_TYPE"),), (("xla_no_such_option", "1"),)):
        with pytest.raises(gati_jax.InputError, match="options: expected those that this compiler has, got"):
            known_options(refused, "cpu")


def test_onednn_is_tried_only_where_programs_have_it():
    """A compiler without it takes its option all the same, and others use it for some convolutions only."""
    *_, onednn = OPTIONS["cpu"]
    dims = ("NHWC", "HWIO", "NHWC")
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=dims
    )
    x, kernel = np.ones((2, 32, 32, 16), np.float32), np.ones((3, 3, 16, 16), np.float32)
    program = jax.jit(convolve, compiler_options=dict(onednn)).lower(x, kernel)
    if '"__onednn' in program.compile().as_text():  # what the program calls; the text also has names of functions
        assert known_options(onednn, "cpu") == onednn
    else:
        with pytest.raises(gati_jax.InputError, match="options: expected those that this compiler has, got"):
            known_options(onednn, "cpu")


def test_a_tuning_may_name_what_tuning_tries_and_no_more():
    assert all(are_tried(options, platform) for platform, rows in OPTIONS.items() for options in rows)
    assert are_tried(((GRAPHS, "FUSION,WHILE"),), "gpu")
    for other in ("WHILE,FUSION", "FUSION,FUSION", "FUSION,A_NEW_TYPE", ""):
        assert not are_tried(((GRAPHS, other),), "gpu")
    assert not are_tried(BRANCHES, "cpu")
    assert not are_tried((("xla_dump_to", "/tmp"),), "gpu")
    with pytest.raises(gati_jax.InputError, match="options: expected those that tuning tries"):
        Tile(size=1, milliseconds=1.0, options=((GRAPHS, "A_NEW_TYPE"),), algorithms={})


@pytest.mark.parametrize("lost", ["A_NEW_TYPE", "xla_no_such_option"])
def test_a_tuning_whose_options_are_refused_is_left_out_with_one_warning(
    monkeypatch, chain, candidates, tmp_path, lost
):
    """As by another runtime than the one that was tuned; the certified arithmetic answers then."""
    options = ((GRAPHS, f"FUSION,{lost}"),) if lost.isupper() else ((lost, "1"),)
    monkeypatch.setitem(OPTIONS, "cpu", (*OPTIONS["cpu"], options))
    tile = Tile(size=1, milliseconds=1.0, options=options, algorithms={})
    tuning = Tuning(device=device_name(), tiles=(tile, dataclasses.replace(tile, size=4)), jaxlib=version("jaxlib"))
    assert "that this compiler has, got" in cannot_run(tuning, chain, ())
    folder, images = saved(tmp_path, chain, candidates), np.zeros((2, 64), np.float32)
    gati_jax.save_tuning(folder, tuning)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        bundle = gati_jax.load_bundle(folder, chain=chain)
        gati_jax.infer_batch(bundle, images)
        gati_jax.infer(bundle, images[0])
    assert len(seen) == 1
    assert "is left out: expected" in str(seen[0].message)
    assert bundle.tunings == ()


def saved(folder, chain, candidates):
    """A bundle of the first cache."""
    cache = next(iter(candidates))
    path = np.array([[np.inf], [1.0]], np.float32)
    plan = gati_jax.Plan(
        names=(cache.name,), sites=(cache.site,), depth=5, path=path, disagreement=np.array([0.0, 0.0]),
        mean_ms=np.array([5.0, 2.0]), n=1, rows=np.array([1], np.uint64),
    )  # fmt: skip
    certificate = gati_jax.Certificate(
        epsilon=0.1, delta=0.05, step=1, n=100, disagreements=2, p_value=0.01, plan_hash=plan.hash,
        data_fingerprint="ab" * 16,
    )  # fmt: skip
    gati_jax.save_bundle(folder / "bundle", chain, candidates, plan, certificate)
    return folder / "bundle"


@pytest.mark.parametrize("best", ["loop", "nest", "host"])
def test_tuning_takes_the_fastest_driver(chain, candidates, splits, monkeypatch, best):
    """By made-up times; the drivers are those of GPUs, and one with an option that every compiler refuses."""
    drivers = (("nest", BRANCHES), ("loop", LOOPS), ("host", ()), ("host", (("xla_no_such_option", "1"),)))
    monkeypatch.setitem(compiler.DRIVERS, "cpu", drivers)
    monkeypatch.setitem(OPTIONS, "cpu", ((), BRANCHES, LOOPS))
    monkeypatch.setattr(autotune, "_time_networks", lambda networks, tiles, _: np.ones((len(tiles), len(networks))))
    fast = {"loop": "0", "nest": "1", "host": "3"}[best]

    def times(programs, *, rounds):
        assert {name.split()[0] for name in programs} == {"0", "1", "2", "3"}
        return {name: np.full(rounds, 1.0 if name.split()[0] == fast else 2.0) for name in programs}

    monkeypatch.setattr(autotune, "time_interleaved", times)
    tuning = gati_jax.tune(chain, tuple(candidates), sizes=(4,), rounds=1)
    assert [tile.driver for tile in tuning.tiles] == [best, best]
    assert tuning.is_reference == (best == "loop")
    cache = next(iter(candidates))
    threshold = np.median(gati_jax.replay(chain, (cache,), splits["test"]).scores)
    tuned = TunedCascade(Cascade(chain, (cache,), jax.numpy.asarray([threshold], np.float32)), tuning)
    reference = gati_jax.runtime.predict_batch(tuned.cascade, splits["test"][:5])
    for found in (tuned.predict(splits["test"][:5]), *tuned.each_way(splits["test"][:5])):
        np.testing.assert_array_equal(found.exit, reference.exit)
        np.testing.assert_array_equal(found.class_index, reference.class_index)
    assert int(tuned.predict_one(splits["test"][0]).exit) == int(reference.exit[0])
    digests = {
        dataclasses.replace(tuning, tiles=tuple(dataclasses.replace(t, driver=d) for t in tuning.tiles)).programs
        for d in ("loop", "nest", "host")
    }
    assert len(digests) == 3
