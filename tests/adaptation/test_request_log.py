"""The request log: the latest requests, all of them, in bounded memory and whole rows."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gati_jax import InputError
from gati_jax.adaptation import UNKNOWN, RequestLog, RequestLogConfig


def add(log, numbers):
    """Add requests whose image and cached class say their number."""
    for number in numbers:
        image = np.array([number // 256, number % 256], np.uint8)
        assert log.add(image, number % 7 if number % 3 == 0 else UNKNOWN) == number


def check(block):
    assert (np.diff(block.order) > 0).all()
    np.testing.assert_array_equal(block.images @ np.array([256, 1]), block.order)
    np.testing.assert_array_equal(block.cached, np.where(block.order % 3 == 0, block.order % 7, UNKNOWN))


@settings(deadline=None)
@given(count=st.integers(0, 200), recent=st.integers(1, 30), cut=st.tuples(*[st.integers(-5, 210)] * 2))
def test_the_latest_requests_are_kept(count, recent, cut):
    log = RequestLog((2,), RequestLogConfig(recent=recent))
    add(log, range(count))
    assert (log.count, log.oldest) == (count, max(0, count - recent))
    start, stop = cut
    kept = [number for number in range(log.oldest, count) if start <= number < stop]
    block = log.kept(start, stop)
    check(block)
    assert block.order.tolist() == kept
    if 0 <= start <= stop and kept == list(range(start, stop)):
        assert log.recent(start, stop).order.tolist() == kept
    elif start < stop:
        with pytest.raises(InputError, match="all kept"):
            log.recent(start, stop)


def test_memory_is_bounded():
    assert RequestLog((2, 2), RequestLogConfig(recent=20, most_bytes=80)).capacity == 20
    assert RequestLog((2, 2), RequestLogConfig(recent=20, most_bytes=79)).capacity == 19
    with pytest.raises(InputError, match=r"most_bytes: expected room for one image, 4 bytes, got 3 .*\[2, 2\]"):
        RequestLog((2, 2), RequestLogConfig(most_bytes=3))


def test_a_reader_beside_the_writer_reads_whole_rows():
    log = RequestLog((2,), RequestLogConfig(recent=700))
    writer = threading.Thread(target=add, args=(log, range(5_000)))
    writer.start()
    while writer.is_alive():
        check(log.kept(0, 5_000))
    writer.join()
    check(log.kept(0, 5_000))
