"""What is kept of the traffic: every recent request, a uniform sample of older ones, and nothing twice."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from gati_jax import InputError
from gati_jax.adaptation import RequestLog, RequestLogConfig


def image(number):
    """Return an image that says which it is."""
    return np.array([number // 256, number % 256], np.uint8)


def filled(count, *, recent=20, old=10, seed=0):
    window = RequestLog((2,), RequestLogConfig(recent=recent, old=old, seed=seed))
    for number in range(count):
        assert window.add(image(number), number % 7 if number % 3 == 0 else -1) == number
    return window


def check(block):
    """Every row is the request that its order number says."""
    assert (np.diff(block.order) > 0).all()
    np.testing.assert_array_equal(block.images @ np.array([256, 1]), block.order)
    np.testing.assert_array_equal(block.answers, np.where(block.order % 3 == 0, block.order % 7, -1))


@given(
    count=st.integers(0, 200),
    recent=st.integers(1, 30),
    old=st.integers(0, 30),
    cut=st.tuples(*[st.integers(-5, 210)] * 2),
)
def test_all_recent_and_as_many_old_ones_as_there_is_room_for(count, recent, old, cut):
    window = filled(count, recent=recent, old=old)
    block = window.kept(0, count)
    check(block)
    assert window.oldest_recent == max(0, count - recent)
    assert block.order[block.order >= window.oldest_recent].tolist() == list(range(window.oldest_recent, count))
    assert (block.order < window.oldest_recent).sum() == min(old, window.oldest_recent)
    start, stop = cut
    part = window.kept(start, stop)
    check(part)
    assert part.order.tolist() == [number for number in block.order if start <= number < stop]


def test_the_sample_is_uniform():
    # 80 of 90 requests have left the ring; each is in the sample of 16 with probability 0.2, so over 200 seeds its
    # count is binomial(200, 0.2): no further than its 1e-6 tails, 160 of them together less than 2e-4 by chance.
    counts = np.zeros(80, int)
    for seed in range(200):
        counts[filled(90, recent=10, old=16, seed=seed).kept(0, 80).order] += 1
    assert counts.sum() == 200 * 16
    assert binom.ppf(1e-6, 200, 0.2) <= counts.min()
    assert counts.max() <= binom.isf(1e-6, 200, 0.2)


def test_a_seed_keeps_the_same():
    one, same, other = (filled(300, seed=seed).kept(0, 280).order.tolist() for seed in (1, 1, 2))
    assert one == same != other


def test_answers_that_come_later_find_their_request():
    window = filled(100)
    numbers = np.arange(100)
    window.answer(numbers, numbers + 1000)  # most are no longer kept
    block = window.kept(0, 100)
    np.testing.assert_array_equal(block.answers, block.order + 1000)
    for number in range(100, 160):
        window.add(image(number), number + 1000)
    later = window.kept(0, 160)  # they have moved to the sample with their requests
    np.testing.assert_array_equal(later.answers, later.order + 1000)


def test_blocks_are_whole_or_refused():
    window = filled(100)
    check(window.recent(80, 100))
    for start, stop in ((79, 90), (90, 101), (-1, 1)):
        with pytest.raises(InputError, match="all kept"):
            window.recent(start, stop)
    fit, select = window.parts(select=8, gap=5)
    assert select.order.tolist() == list(range(92, 100))
    assert fit.order.max() == 86
    assert len(fit.order) == 10 + 7
    with pytest.raises(InputError, match="expected fewer than the 100"):
        window.parts(select=20, gap=80)


def test_memory_is_bounded_from_the_start():
    with pytest.raises(InputError, match=r"most_bytes: expected room .* got 100 for 30 images"):
        RequestLog((2, 2), RequestLogConfig(recent=20, old=10, most_bytes=100))
    with pytest.raises(InputError, match="recent, old"):
        RequestLogConfig(recent=0)


def test_a_reader_beside_the_writer_sees_whole_rows():
    window = RequestLog((2,), RequestLogConfig(recent=700, old=300))
    done = threading.Event()

    def write():
        for number in range(5_000):
            window.add(image(number), number % 7 if number % 3 == 0 else -1)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        check(window.kept(0, 5_000))
    writer.join()
    check(window.kept(0, 5_000))
