"""Arrival times, and the load generator in virtual time, against servers whose latencies follow by hand."""

import asyncio
import selectors
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import arrivals, targets
from benchmarks.driving import Outcome, Record, Reply, Run, closed_loop, open_loop
from benchmarks.load import Load, images_of, make_trace, parser
from benchmarks.summary import highest, summarize
from gati_jax import InputError
from gati_jax.adaptation import Trace, save_trace
from serve.engine.records import Answer, OverloadedError


class Instantly(selectors.SelectSelector):
    """Where a loop would wait, its clock is put forward."""

    def __init__(self):
        super().__init__()
        self.time = 0.0

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "nothing will ever happen"
            self.time += timeout
        return ready


def virtually(main):
    """Run a coroutine in virtual time."""
    selector = Instantly()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.time
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main)


class Server:
    """Answers in turn, each request taking ``service`` seconds; does nothing at all from ``stall`` on for a while."""

    def __init__(self, service, stall=(0.0, 0.0), bound=10**9):
        self.service, self.stall, self.bound, self.free, self.inside, self.most = service, stall, bound, 0.0, 0, 0

    async def __call__(self, row):
        if self.inside >= self.bound:
            raise OverloadedError("full", retry_after=0.05)
        now, (begin, end) = asyncio.get_running_loop().time(), self.stall
        self.inside += 1
        self.most = max(self.most, self.inside)
        start = max(now, self.free)
        self.free = (max(start, end) if start >= begin else start) + self.service
        await asyncio.sleep(self.free - now)
        self.inside -= 1
        return Reply(row % 10, 4)


def evenly(rate, seconds, images=100):
    count = round(rate * seconds)
    return Trace(seconds=np.arange(count) / rate, item=np.arange(count, dtype=np.int32) % np.int32(images))


def no_time():
    return 0.0


def test_a_stall_counts_for_every_request_that_it_delays():
    # 100 requests a second for 10 s, 1 ms each; from 5 s on the server does nothing for 1 s. 100 requests fall into the
    # stall; the one at 5 + i/100 begins at 6 + i/1000. So it waits 1 - i * 0.009 s, and so on until i = 111.1.
    run = virtually(open_loop(Server(0.001, (5.0, 6.0)), evenly(100, 10), cpu=no_time))
    waits = np.array([max(0.0, 1 - i * 0.009) for i in range(500)])
    by_hand = (np.concatenate([np.zeros(500), waits]) + 0.001) * 1e3
    result = summarize(run, slo_ms=1.5)
    assert result["p99_ms"] == pytest.approx(np.percentile(by_hand, 99))
    assert result["p99_ms"] > 900
    assert result["mean_ms"] == pytest.approx(by_hand.mean())
    assert result["goodput_share"] == (1000 - 112) / 1000
    assert result["valid"]
    # What a client sees that waits for the answer before it asks again: one slow answer.
    closed = virtually(closed_loop(Server(0.001, (5.0, 6.0)), range(100), clients=1, seconds=10, cpu=no_time))
    assert summarize(closed)["p99_ms"] == pytest.approx(1.0)


def test_requests_are_sent_on_time_whether_or_not_earlier_ones_are_answered():
    run = virtually(open_loop(Server(0.1), evenly(100, 1), patience=1e3, cpu=no_time))
    assert [record.sent for record in run.records] == pytest.approx([i / 100 for i in range(100)])
    result = summarize(run)
    assert result["throughput"] == pytest.approx(10)  # what the server can do, not what was asked of it
    assert result["rate"] == pytest.approx(100 / 0.99)


def test_refusals_are_no_answers_and_miss_the_slo():
    run = virtually(open_loop(Server(0.1, bound=2), evenly(20, 10), cpu=no_time))
    result = summarize(run, slo_ms=1e3)
    assert result["answered"] + result["refused"] == result["requests"] == 200
    assert result["answered"] == pytest.approx(100, abs=2)
    assert result["goodput_share"] == result["answered"] / 200
    assert result["goodput"] == pytest.approx(10, rel=0.05)


def test_unanswered_requests_are_lost_and_reported():
    async def silent(row):
        if row == 3:
            await asyncio.Event().wait()
        if row == 5:
            raise ValueError("row 5 is odd")
        return Reply(row, 1)

    run = virtually(open_loop(silent, evenly(10, 1), patience=2.0, cpu=no_time))
    result = summarize(run, expected=np.array([0, 1, 2, 3, 9, 5, 6, 7, 8, 9]), slo_ms=1.0)
    assert (result["answered"], result["lost"], result["failed"]) == (8, 1, 1)
    assert result["agreement"] == 7 / 8
    assert result["goodput_share"] == 0.8
    assert not result["valid"]
    assert [reason[:17] for reason in result["invalid_because"]] == ["1 requests were n", "1 requests failed"]
    assert "row 5 is odd" in result["invalid_because"][1]


@settings(deadline=None)
@given(clients=st.integers(1, 12), service=st.floats(0.001, 0.2), bound=st.integers(1, 12))
def test_closed_loop_has_no_more_requests_in_flight_than_clients(clients, service, bound):
    server = Server(service, bound=bound)
    run = virtually(closed_loop(server, range(7), clients=clients, seconds=2.0, patience=10, cpu=no_time))
    assert server.most == min(clients, bound)
    # From a client to its next request the former is over.
    edges = sorted([(record.sent, 1) for record in run.records] + [(record.done, -1) for record in run.records])
    assert max(np.cumsum([edge for _, edge in edges])) <= clients
    assert {record.row for record in run.records} <= set(range(7))
    assert summarize(run)["throughput"] <= 1 / service * (1 + 1e-9)


def test_late_sends_make_a_run_invalid():
    def of(late):
        records = [
            Record(0, i, i + (0.006 if i < late else 0.004), i + 0.01, Outcome.ANSWERED, 1, 2) for i in range(100)
        ]
        return summarize(Run(records, 100.0, 50.0))

    assert of(1)["valid"]
    assert (of(1)["late"], of(2)["valid"]) == (1, False)
    assert of(2)["invalid_because"] == ["2.0% of the requests were sent more than 5 ms late"]
    assert of(2)["mean_ms"] == pytest.approx(10)  # from the scheduled time all the same
    assert of(2)["generator_cores"] == 0.5
    assert of(2)["exits"] == {2: 100}


def test_the_warm_up_is_left_out():
    server = Server(0.001, (0.0, 1.0))
    result = summarize(virtually(open_loop(server, evenly(100, 10), cpu=no_time)), warm_up=2.0)
    assert (result["requests"], result["max_ms"]) == (800, pytest.approx(1.0))
    assert summarize(Run([], 1.0, 0.0), warm_up=2.0)["invalid_because"] == ["no requests after the warm-up"]


@settings(deadline=None)
@given(limit=st.floats(0.5, 1e4), start=st.floats(0.1, 1e4), tolerance=st.floats(0.01, 0.3))
def test_the_search_encloses_the_highest_rate(limit, start, tolerance):
    tried = []

    async def holds(rate):
        tried.append(rate)
        return rate <= limit

    found = asyncio.run(highest(holds, start, tolerance=tolerance, most=60))
    assert found <= limit <= found * (1 + tolerance) * (1 + 1e-9)
    assert len(set(tried)) == len(tried)


def test_the_search_gives_up():
    for always, found in ((False, 0), (True, 1600)):

        async def holds(rate, always=always):
            return rate > 0 and always

        assert asyncio.run(highest(holds, 100, most=5)) == found


class FakeEngine:
    """Answers when its future is completed; the clock stands at 7."""

    def __init__(self):
        self.taken = []

    def submit(self, images, *, route, deadline=None, request_id=""):
        del request_id
        self.taken.append((images, route, deadline, Future()))
        if len(self.taken) > 1:
            raise OverloadedError("full", retry_after=1.0)
        return [self.taken[-1][-1]]


def test_an_engine_in_this_process():
    images, engine = np.arange(12, dtype=np.uint8).reshape(3, 4), FakeEngine()

    async def main():
        ask = targets.in_process(engine, images, route=1, deadline_ms=500, clock=lambda: 7.0)
        asked = asyncio.ensure_future(ask(2))
        await asyncio.sleep(0)
        ((given, route, deadline, future),) = engine.taken
        assert (given.tolist(), route, deadline) == ([[8, 9, 10, 11]], 1, 7.5)
        future.set_result(Answer(3, 5, 0.5, np.zeros(10, np.float32)))
        assert await asked == Reply(3, 5)
        with pytest.raises(OverloadedError):
            await ask(0)

    asyncio.run(main())


# Arrivals


@pytest.mark.parametrize("make", [arrivals.poisson, arrivals.bursty, arrivals.diurnal])
def test_a_seed_gives_one_trace(make):
    one, same, other = (arrivals.of_rows(make(500, 10, seed=seed), images=20, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.seconds, same.seconds)
    np.testing.assert_array_equal(one.item, same.item)
    assert len(one) != len(other) or (one.seconds != other.seconds).any()
    assert set(one.item) == set(range(20))
    assert 0 <= one.seconds[0] <= one.seconds[-1] <= 10


def test_poisson_gaps_are_exponential():
    gaps = np.diff(arrivals.poisson(200, 500, seed=0))
    n = len(gaps)
    assert abs(n - 100_000) < 5 * np.sqrt(100_000)
    # Kolmogorov-Smirnov against 1 - exp(-200 t); 1.95 / sqrt(n) is exceeded once in a thousand.
    law = 1 - np.exp(-200 * np.sort(gaps))
    assert np.abs(law - (np.arange(n) + 0.5) / n).max() < 1.95 / np.sqrt(n)


def test_bursts_have_the_stated_mean_rate_and_dispersion():
    rate, ratio, share, burst, window = 100.0, 5.0, 0.2, 0.5, 20.0
    times = arrivals.bursty(rate, 20_000, seed=3, ratio=ratio, share=share, burst_seconds=burst)
    counts = np.histogram(times, np.arange(0, 20_001, window))[0]
    # Calm 100 / 1.8, bursts 5 times that. The rate's autocovariance is share (1 - share) (h - c)^2 exp(-s / tau) with
    # 1 / tau = 1 / 0.5 + 1 / 2; integrated twice over a window it adds to the Poisson variance.
    calm, tau = rate / 1.8, 0.4
    rates_variance = share * (1 - share) * (4 * calm) ** 2
    variance = rate * window + 2 * rates_variance * tau * (window - tau * (1 - np.exp(-window / tau)))
    assert counts.mean() == pytest.approx(rate * window, abs=5 * np.sqrt(variance / len(counts)))
    assert counts.var() == pytest.approx(variance, rel=0.25)
    assert variance > 10 * rate * window  # a Poisson process would fail this


def test_a_trace_may_not_ask_for_what_is_not_there(tmp_path):
    save_trace(tmp_path / "t.safetensors", Trace(item=np.array([3], np.int32), seconds=np.zeros(1)))
    load = Load(kind="trace", trace=str(tmp_path / "t.safetensors"))
    assert make_trace(load, 4).item.tolist() == [3]
    with pytest.raises(InputError, match="expected items below 3, the number of images, got 3"):
        make_trace(load, 3)


def test_images_come_from_the_trace_or_from_a_data_set(tmp_path):
    images = np.zeros((1, 2, 2, 3), np.uint8)
    for name, own in (("with", images), ("without", None)):
        save_trace(tmp_path / f"{name}.safetensors", Trace(item=np.zeros(1, np.int32), seconds=np.zeros(1), images=own))
    command = ["--url", "u", "--trace"]
    with_images = parser().parse_args([*command, str(tmp_path / "with.safetensors")])
    np.testing.assert_array_equal(images_of(with_images), images)
    without = str(tmp_path / "without.safetensors")
    digits = parser().parse_args([*command, without, "--data", "digits", "--split", "all[:5]"])
    assert images_of(digits).shape == (5, 8, 8, 1)
    for words, found in (([without], "neither"), ([str(tmp_path / "with.safetensors"), "--data", "digits"], "both")):
        with pytest.raises(InputError, match=f"--data: expected .* got {found}"):
            images_of(parser().parse_args([*command, *words]))


@pytest.mark.parametrize("wrong", [{"rate": 0}, {"seconds": -1}, {"burst_seconds": 0}, {"share": 1.0}, {"rate": 1e9}])
def test_arguments_out_of_bounds_are_named(wrong):
    with pytest.raises(InputError, match=f"^{next(iter(wrong))}: expected"):
        arrivals.bursty(**({"rate": 10.0, "seconds": 10.0, "seed": 0} | wrong))
