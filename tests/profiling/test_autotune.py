"""Tuning: what it finds answers as the reference does, survives in a bundle, and cannot be forged."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax.caches import GlobalAverage, SortedSelector
from gati_jax.models import Chain, ResNet, fold, init, layers, to_chain
from gati_jax.profiling import Tile, TunedCascade, Tuning, autotune, device_name
from gati_jax.profiling.compiler import OPTIONS
from gati_jax.runtime import Cascade, CompilerOptions, predict_one
from tests.bundle.made import edit
from train import tune as script

NETWORK = ResNet(stages=(1, 1), widths=(4, 8), shortcut="B", input_shape=(8, 8, 3))
KINDS = {layer.kind: layer for block in layers(NETWORK) for layer in block}
WINOGRAD = {kind: "winograd2" if "winograd2" in layer.applicable else "im2col" for kind, layer in KINDS.items()}


@pytest.fixture(scope="module")
def base() -> Chain:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: fold(init(NETWORK, jax.random.key(0))))
    return to_chain(NETWORK, jax.tree.map(lambda v: (rng.normal(size=v.shape) / 4).astype(np.float32), shapes))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(11, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def cascade(base, images) -> Cascade:
    """One cache at site 1 that is sure of about half of the images."""
    predictor, selector = GlobalAverage(10, hidden=8), SortedSelector()
    site = base.activations(jnp.asarray(images))[0][1]
    keys = jax.random.split(jax.random.key(2))
    variables = predictor.init(keys[0], site)
    params = {"predictor": variables, "selector": selector.init(keys[1], jnp.zeros((1, 10)))}
    cache = gati_jax.Candidate("gap@1", 1, predictor, selector, params)
    scores = gati_jax.replay(base, (cache,), images).scores[0]
    return Cascade(base, (cache,), jnp.asarray([np.sort(scores)[5:7].mean()], jnp.float32))


def made_up(*sizes: int, algorithms=WINOGRAD) -> Tuning:
    tiles = tuple(Tile(size=s, milliseconds=1 + s / 4, options=(), algorithms=algorithms) for s in sizes)
    return Tuning(device=device_name(), tiles=tiles)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 11])
def test_a_tuned_cascade_answers_as_the_reference(cascade, images, count):
    found = TunedCascade(cascade, made_up(1, 4)).predict(images[:count])
    for row, image in enumerate(images[:count]):
        alone = predict_one(cascade, image)
        assert (int(found.exit[row]), int(found.class_index[row])) == (int(alone.exit), int(alone.class_index))
        np.testing.assert_allclose(found.logits[row], alone.logits, atol=1e-3 * np.ptp(alone.logits))
    assert len(set(np.asarray(TunedCascade(cascade, made_up(1, 4)).predict(images).exit).tolist())) == 2


COMPILE = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by an entry for everything that is handed to the compiler."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs  # JAX names it
        if event == COMPILE:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_warm_bucket_compiles_nothing_more_for_any_batch_size(cascade, images, monkeypatch, compilations):
    """Not even what cuts the padding off, or puts parts together."""
    monkeypatch.setattr(sys.modules[TunedCascade.__module__], "LARGEST_BUCKET", 8)
    jax.clear_caches()  # another test may have compiled the same
    tuned = TunedCascade(cascade, made_up(1, 2))
    for count in (1, 8):
        jax.block_until_ready(tuned.predict(images[:count]))
    assert compilations  # they are seen
    compilations.clear()
    for count in (1, 5, 6, 7, 8, 9):
        found = tuned.predict(images[:count])
        assert {len(np.asarray(column)) for column in found} == {count}
    assert not compilations
    assert tuned.batched(8) is tuned.batched(8)
    tuned.predict(images[:3])  # another bucket
    assert compilations


def test_more_rows_than_the_largest_bucket_are_answered_in_parts_and_no_rows_refused(cascade, images, monkeypatch):
    monkeypatch.setattr(sys.modules[TunedCascade.__module__], "LARGEST_BUCKET", 4)
    tuned = TunedCascade(cascade, made_up(1, 2))
    whole = tuned.predict(images)
    np.testing.assert_array_equal(whole.exit, [int(predict_one(cascade, image).exit) for image in images])
    with pytest.raises(gati_jax.InputError, match="images: expected at least one, got none"):
        tuned.predict(images[:0])


def test_tune_finds_something_for_every_size(base, monkeypatch):
    monkeypatch.setattr(autotune, "_supported", lambda: list(OPTIONS["cpu"][:2]))  # all of them: tests/train
    found = gati_jax.tune(base, sizes=(2,), rounds=1)
    assert [tile.size for tile in found.tiles] == [1, 2]
    assert found.device == device_name()
    for tile in found.tiles:
        assert tile.milliseconds > 0
        assert all(algorithm in KINDS[kind].applicable for kind, algorithm in tile.algorithms.items())


def test_algorithms_that_lose_too_many_digits_are_not_taken(base, monkeypatch):
    times = {"winograd4": 1.0, "winograd2": 2.0, "im2col": 3.0, "direct": 4.0}

    def made_up_times(programs, *, rounds):
        return {name: np.full(rounds, times.get(name, float(len(name)))) for name in programs}

    monkeypatch.setattr(autotune, "time_interleaved", made_up_times)
    monkeypatch.setattr(autotune, "_supported", lambda: [()])
    (tile,) = gati_jax.tune(base, sizes=(1,), rounds=1).tiles
    assert set(tile.algorithms.values()) == {"winograd4", "im2col"}
    monkeypatch.setattr(autotune, "TOLERANCE", 0.0)
    (tile,) = gati_jax.tune(base, sizes=(1,), rounds=1).tiles
    assert tile.algorithms == {}


A, B = OPTIONS["cpu"][:2]


def test_tiles_that_share_a_program_share_its_options(base):
    """By made-up times for one, two and eight rows under two sets of options."""

    @settings(max_examples=40, deadline=None)
    @given(ms=st.lists(st.floats(0.1, 10), min_size=6, max_size=6, unique=True))
    def holds(ms):  # without the network among the arguments, which Hypothesis would describe
        _check_shared_options(base, ms)

    holds()


def _check_shared_options(base, ms):
    made_up_ms: dict[tuple[int, CompilerOptions], float] = dict(
        zip(itertools.product((1, 2, 8), (A, B)), ms, strict=True)
    )

    def times(networks, tiles, _rounds):
        return np.array([[made_up_ms[tile.size, tile.options]] * len(networks) for tile in tiles])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotune, "_time_networks", times)
        patch.setattr(autotune, "_supported", lambda: [A, B])
        patch.setattr(autotune, "_refine", lambda *_: {})
        patch.setattr(autotune, "_error", lambda *_: 0.0)
        one, two, eight = gati_jax.tune(base, sizes=(8, 2), rounds=1).tiles
    assert one.options == min((A, B), key=lambda o: made_up_ms[1, o])
    assert two.options == eight.options
    taken, other = (made_up_ms[2, o] * made_up_ms[8, o] for o in ((A, B) if two.options == A else (B, A)))
    assert taken <= other * (1 + 1e-9)
    assert [tile.milliseconds for tile in (one, two, eight)] == [
        made_up_ms[tile.size, tile.options] for tile in (one, two, eight)
    ]


@pytest.mark.parametrize("sizes", [(8, 5000), (0,), (-3, 1), tuple(range(2, 18))], ids=str)
def test_sizes_that_cannot_be_are_refused_before_anything_is_timed(base, monkeypatch, sizes):
    monkeypatch.setattr(autotune, "_time_networks", lambda *_: pytest.fail("timed"))
    with pytest.raises(gati_jax.InputError, match="sizes: expected up to 16 of 1 to 4096 rows, 1 among them, got"):
        gati_jax.tune(base, sizes=sizes)


@pytest.mark.parametrize(
    ("ms", "error", "chosen"),
    [((1.0, 1.25), 0.0, True), ((1.0, 1.15), 0.0, False), ((2.0, 1.0), 0.0, False), ((1.0, 9.0), 0.01, False)],
    ids=["faster", "hardly faster", "slower", "wrong"],
)
def test_the_reference_programs_are_left_for_much_faster_ones_alone(base, monkeypatch, ms, error, chosen):
    monkeypatch.setattr(
        autotune,
        "_starts",
        lambda _, sizes, __: [dataclasses.replace(made_up(1).tiles[0], size=size) for size in sizes],
    )
    monkeypatch.setattr(autotune, "_time_networks", lambda *_: np.reshape(ms, (2, 1)))
    monkeypatch.setattr(autotune, "_error", lambda *_: error)
    found = autotune.probe(base, sizes=(4,))
    assert [tile.size for tile in found.tiles] == [1, 4]
    assert {bool(tile.algorithms) for tile in found.tiles} == {chosen}
    assert {tile.milliseconds for tile in found.tiles} == {ms[0] if chosen else ms[1]}
    assert found.is_reference != chosen


def test_a_chain_of_other_functions_is_tuned_without_algorithms(chain):
    found = gati_jax.tune(chain, sizes=(2,), rounds=1)
    assert [dict(tile.algorithms) for tile in found.tiles] == [{}, {}]


def test_a_tuning_is_kept_in_the_bundle_and_used(bundle_path, chain, splits, capsys):
    bundle = gati_jax.load_bundle(bundle_path, chain=chain)
    assert bundle.tuned is None
    with pytest.raises(gati_jax.InputError, match="numerics: this bundle has not been tuned"):
        gati_jax.infer(bundle, splits["test"][0], numerics="fast")
    found = made_up(1, 4, algorithms={})
    found = gati_jax.check_tuning(bundle, found, splits["test"][20:50])
    gati_jax.save_tuning(bundle_path, found)
    again = gati_jax.load_bundle(bundle_path, chain=chain)
    assert again.tunings == (found,)
    assert again.bound_of().numerics == "fast"
    assert again.costs == bundle.costs
    fast, reference = (gati_jax.infer_batch(again, splits["test"][:20], numerics=n) for n in (None, "reference"))
    np.testing.assert_array_equal(fast.class_index, reference.class_index)
    np.testing.assert_allclose(fast.logits, reference.logits, atol=1e-4)
    assert int(gati_jax.infer(again, splits["test"][0]).exit) == int(reference.exit[0])
    script.show(found)
    assert "direct" in capsys.readouterr().out


FORGED = {
    "other options": lambda t: t["tiles"][0].update(options=[["xla_dump_to", "elsewhere"]]),
    "no tile for one": lambda t: t["tiles"][0].update(size=3),
    "thousands of tiles": lambda t: t.update(tiles=[{**t["tiles"][0], "size": s} for s in range(1, 3000)]),
    "no tiles": lambda t: t.update(tiles=[]),
    "an algorithm that is none": lambda t: t["tiles"][0].update(algorithms={"3x3/1 4-4 8x8": "fft"}),
    "a time that is none": lambda t: t["tiles"][0].update(milliseconds=-1),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_tuning_is_refused(bundle_path, chain, case):
    gati_jax.save_tuning(bundle_path, made_up(1, 4))
    file = bundle_path / "tuning" / f"{device_name()}.json"
    edit(file, lambda content: FORGED[case](content["tuning"]))
    with pytest.raises(gati_jax.BundleError, match=file.name):
        gati_jax.load_bundle(bundle_path, chain=chain)


def test_no_bundle_no_tuning(tmp_path):
    with pytest.raises(gati_jax.BundleError, match=r"manifest\.json"):
        gati_jax.save_tuning(tmp_path, made_up(1))
    assert not list(tmp_path.iterdir())
    with pytest.raises(gati_jax.InputError, match="rising sizes from 1"):
        dataclasses.replace(made_up(1), tiles=())
