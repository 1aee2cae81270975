"""Work and rest by a clock that the test turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gati_jax import InputError
from serve.adaptive.worker import Throttle


@given(st.floats(0.01, 1), st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_work_takes_its_share_of_the_time(share, pieces):
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    pace = Throttle(share, clock=lambda: now, sleep=sleep).start()
    for piece in pieces:
        now += piece
        pace()
    assert pace.worked == pytest.approx(sum(pieces))
    assert pace.worked == pytest.approx(share * now)
    assert pace.longest == pytest.approx(max(pieces))


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_no_such_share(share):
    with pytest.raises(InputError, match="share"):
        Throttle(share)
