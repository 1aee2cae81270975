"""The host driver against the others, and how many programs it takes."""

import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax.runtime import Cascade, compile_stages, predict_on_host, predict_one
from gati_jax.runtime.batched import BatchedCascade, Schedule, predict_tiled
from gati_jax.runtime.host import HostCascade

SCHEDULE = Schedule.of({4: 1.0, 1: 0.4})
INF = np.inf


@pytest.fixture(scope="module")
def caches(candidates):
    return tuple(sorted(candidates, key=lambda c: c.site))[:2]


@pytest.fixture(scope="module")
def thresholds(chain, caches, splits):
    """About half leave at the first cache, half of the others at the second."""
    return np.median(gati_jax.replay(chain, caches, splits["test"]).scores, axis=1)


@pytest.mark.parametrize("batch", [1, 3, 4, 9, 16])
@pytest.mark.parametrize("which", ["some", "all hit", "all miss"])
def test_it_answers_as_the_batched_driver_does(chain, caches, splits, thresholds, which, batch):
    here = {"some": thresholds, "all hit": [-INF, -INF], "all miss": [INF, INF]}[which]
    cascade = Cascade(chain, caches, jnp.asarray(here, jnp.float32))
    host = compile_stages({4: cascade, 1: cascade}, SCHEDULE)
    images = splits["test"][:batch]
    found, tiled = predict_on_host(host, images), predict_tiled(BatchedCascade.of(cascade, SCHEDULE), images)
    np.testing.assert_array_equal(found.exit, tiled.exit)
    np.testing.assert_array_equal(found.class_index, tiled.class_index)
    np.testing.assert_allclose(found.logits, tiled.logits, atol=1e-5)
    np.testing.assert_allclose(found.score, tiled.score, atol=1e-5)
    assert [int(predict_one(cascade, image).exit) for image in images] == np.asarray(found.exit).tolist()


def test_programs_are_compiled_before_the_first_request(chain, caches, splits, thresholds):
    cascade = Cascade(chain, caches, jnp.asarray(thresholds, jnp.float32))
    host = compile_stages({4: cascade, 1: cascade}, SCHEDULE)
    assert sorted(host.programs) == [(stage, size) for stage in range(3) for size in (1, 4)]
    assert host.warm_up_seconds > 0
    with pytest.raises(TypeError):  # a compiled program takes what it was compiled for
        host.run(0, splits["test"][:4, :32])


def test_no_images_are_refused(chain, caches, splits):
    cascade = Cascade(chain, caches, jnp.zeros(2))
    host = HostCascade(cascade=cascade, schedule=SCHEDULE, programs={}, leaves={}, warm_up_seconds=0.0)
    with pytest.raises(gati_jax.InputError, match="images: expected at least one, got none"):
        predict_on_host(host, splits["test"][:0])


def test_too_many_programs_are_refused(chain, caches):
    sizes = range(1, 16)
    cascade = Cascade(chain, caches, jnp.zeros(2))
    schedule = Schedule(sizes=tuple(reversed(sizes)), rest=tuple((1, *(0,) * 14) for _ in range(15)))
    with pytest.raises(gati_jax.InputError, match=r"at most 42 programs, got 3 stages of .*: 45"):
        compile_stages(dict.fromkeys(sizes, cascade), schedule)
