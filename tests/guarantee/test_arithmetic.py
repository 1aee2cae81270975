"""Attacks by the arithmetic that answers, all of which fail.

1. A tuning that nobody has compared with the certified arithmetic answers by default.
2. Rows that it answers otherwise are left out of what is promised.
3. It is tuned again and again until a check looks good.
4. The check is made on rows that prove little: none, copies, rows of the fit, or on another device.
"""

import dataclasses
import sys

import numpy as np
import pytest
from scipy.stats import binom

import gati_jax
from gati_jax.data import row_digests
from gati_jax.display import percent
from gati_jax.profiling import Tile, TunedCascade, Tuning, device_name, tuned_cascade
from gati_jax.runtime import Cascade
from tests.bundle.made import REQUESTS, make

N = len(REQUESTS)


def made_up(*sizes: int, jaxlib: str = "") -> Tuning:
    tiles = tuple(Tile(size=size, milliseconds=size**0.5, options=(), algorithms={}) for size in sizes)
    return Tuning(device=device_name(), tiles=tiles, jaxlib=jaxlib)


def bundle_of(*tunings: Tuning) -> gati_jax.Bundle:
    chain, caches, plan, certificate = make(1)
    return gati_jax.Bundle(chain=chain, caches=caches, plan=plan, certificate=certificate, tunings=tunings)


def check(bundle: gati_jax.Bundle, tuning: Tuning, delta: float = 0.01) -> gati_jax.Bundle:
    """The bundle with this tuning, after a check of it."""
    return dataclasses.replace(bundle, tunings=(gati_jax.check_tuning(bundle, tuning, REQUESTS, delta=delta),))


@pytest.fixture
def named(monkeypatch) -> list[str]:
    """The calls of the tuned arithmetic."""
    calls: list[str] = []
    for name in ("predict", "predict_one"):
        real = getattr(TunedCascade, name)
        monkeypatch.setattr(TunedCascade, name, lambda *given, real=real, name=name: calls.append(name) or real(*given))
    return calls


def test_a_tuning_without_a_check_answers_only_where_it_is_asked_for(named):
    bundle = bundle_of(made_up(1, 4))
    with pytest.warns(UserWarning, match="were not compared .* certified arithmetic; run gati-jax tune"):
        found = gati_jax.infer_batch(bundle, REQUESTS)
    gati_jax.infer(bundle, REQUESTS[0])  # it is said once: warnings are errors
    bound = bundle.bound_of()
    assert named == []
    np.testing.assert_array_equal(found.logits, gati_jax.infer_batch(bundle, REQUESTS, numerics="reference").logits)
    assert (bound.numerics, bound.epsilon, bound.delta) == ("reference", bundle.certificate.epsilon, 0.05)
    gati_jax.infer_batch(bundle, REQUESTS, numerics="fast")
    assert (named, bundle.bound_of(numerics="fast").epsilon) == (["predict"], None)  # of which nothing is known
    nothing = dataclasses.replace(bundle, certificate=dataclasses.replace(bundle.certificate, step=-1))
    with pytest.warns(UserWarning, match="only where it is asked for: nothing is certified"):
        assert nothing.bound_of().numerics == "reference"


def test_what_a_checked_tuning_promises_holds_the_rows_that_differ(named, monkeypatch):
    """The faulty arithmetic is one whose tile of 4 leaves earlier: a request that comes alone is answered as it was."""
    right, differ, chain, caches = tuned_cascade, 3, *make(1)[:2]
    scores = np.sort(gati_jax.replay(chain, caches, REQUESTS).scores[0])[::-1]
    stay = int((scores >= 2.0).sum())  # those that leave at the first cache; three more do in the wrong arithmetic
    lower = np.mean(scores[stay + differ - 1 : stay + differ + 1])

    def wrong(cascade: Cascade, tile: Tile) -> Cascade:
        found = right(cascade, tile)
        lowered = found.thresholds.at[:1].set(lower) if tile.size > 1 else found.thresholds
        return Cascade(found.chain, found.caches, lowered)

    monkeypatch.setattr(sys.modules[TunedCascade.__module__], "tuned_cascade", wrong)
    bundle = check(bundle_of(), made_up(1, 4), delta=0.02)
    bound, certificate = bundle.bound_of(), bundle.certificate
    assert bound.check is not None
    assert (bound.check.n, bound.check.differ, bound.numerics) == (N, differ, "fast")
    # The rows may have chosen either step of the plan; it is the first tuning that was checked.
    upper = bound.check.upper
    assert binom.cdf(differ, N, upper) == pytest.approx(0.02 * 6 / np.pi**2 / 2)
    assert bound.epsilon == pytest.approx(certificate.epsilon + upper)
    assert bound.epsilon is not None
    assert 0.1 < bound.epsilon < 1
    assert bound.delta == pytest.approx(certificate.delta + 0.02)
    for part in (f"at most {percent(bound.epsilon, up=True)}", "93%", f"{differ} of {N}"):
        assert part in str(bound)
    assert bundle.checks["base"].differ == 0
    assert bundle.bound_of(numerics="reference").epsilon == certificate.epsilon
    named.clear()
    gati_jax.infer_batch(bundle, REQUESTS)
    gati_jax.infer(bundle, REQUESTS[0])
    assert named == ["predict", "predict_one"]


def test_each_other_tuning_that_is_checked_has_a_smaller_part_of_delta(monkeypatch):
    monkeypatch.setattr(TunedCascade, "each_way", lambda *_: [])
    first = check(bundle_of(), made_up(1, 4))
    again = check(first, made_up(1, 4))  # tells nothing new
    other = check(again, made_up(1, 4, jaxlib="0"), delta=0.02)
    numbers = [{c.number for c in bundle.checks.values()} for bundle in (first, again, other)]
    assert numbers == [{1}, {1}, {2}]
    bound = other.bound_of()
    assert bound.check is not None
    assert binom.cdf(0, N, bound.check.upper) == pytest.approx(0.02 * 6 / (2 * np.pi) ** 2 / 2)


def test_a_check_needs_a_promise_rows_and_this_device():
    bundle, tuning = bundle_of(), made_up(1)
    with pytest.raises(gati_jax.InputError, match=r"tuning: expected one of .* 1 row or more, got .* and 0"):
        gati_jax.check_tuning(bundle, tuning, REQUESTS[:0])
    with pytest.raises(gati_jax.InputError, match=r"tuning: expected one of .*, got cpu-another"):
        gati_jax.check_tuning(bundle, dataclasses.replace(tuning, device="cpu-another"), REQUESTS)
    with pytest.raises(gati_jax.InputError, match="delta: expected a number between 0 and 1"):
        gati_jax.check_tuning(bundle, tuning, REQUESTS, delta=0.0)
    plan = dataclasses.replace(bundle.plan, rows=row_digests(REQUESTS[: bundle.plan.n]))
    with pytest.raises(gati_jax.InputError, match=r"images.*select|select.*images"):
        gati_jax.check_tuning(dataclasses.replace(bundle, plan=plan), tuning, REQUESTS)
    failed = dataclasses.replace(bundle.certificate, step=-1)
    with pytest.raises(gati_jax.InputError, match="bundle: expected a certified plan, got none"):
        gati_jax.check_tuning(dataclasses.replace(bundle, certificate=failed), tuning, REQUESTS)
    copies = np.tile(REQUESTS[:50], (40, *[1] * (REQUESTS.ndim - 1)))
    with pytest.raises(gati_jax.InputError, match=r"images: expected distinct rows.* got \d+ of \d+ copies"):
        gati_jax.check_tuning(bundle, tuning, copies)
    fitted = tuple(dataclasses.replace(c, fitted_rows=row_digests(REQUESTS[:50])) for c in bundle.caches)
    with pytest.raises(gati_jax.InputError, match=r"images.*fit|fit.*images"):
        gati_jax.check_tuning(dataclasses.replace(bundle, caches=fitted), tuning, REQUESTS)
