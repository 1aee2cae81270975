"""The metrics for Prometheus, and the protocol's statistics."""

import re

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import serve.metrics
from serve.engine.records import Job, Step
from serve.protocol.model import Tally, Times
from tests.serve import fake


def jobs(count, route=0):
    return tuple(Job(image=np.zeros(1), route=route, arrived=0.0) for _ in range(count))


def samples(front):
    """Return a look-up of samples by name and labels."""
    families = text_string_to_metric_families(front.metrics.page().decode())
    found = {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}
    return lambda name, **labels: found[name, *sorted((key, str(value)) for key, value in labels.items())]


def test_everything_that_happens_is_counted(front):
    metrics = front.metrics
    for rows in (1, 3, 4):
        metrics.step(Step(1, 0, 4, jobs(rows)), 0.003, failed=False)
    metrics.step(Step(1, 2, 1, jobs(1)), 0.001, failed=True)
    for value in (0, 3, 1):
        metrics.answered(jobs(1, route=1)[0], fake.answer(value), 0.01)
    metrics.refused("overloaded")
    metrics.request("http", "infer", 429)
    got = samples(front)
    assert got("gati_step_seconds_count", plan="loose", stage=0, bucket=4) == 3
    assert got("gati_step_seconds_sum", plan="loose", stage=0, bucket=4) == pytest.approx(0.009)
    assert got("gati_batch_occupancy_sum", stage=0, bucket=4) == 8 / 4
    assert got("gati_failed_steps_total", plan="loose", stage=2) == 1
    assert got("gati_left_total", plan="loose", exit=0) == 2  # values 0 and 3 leave at site 0, 1 at site 2
    assert got("gati_left_total", plan="loose", exit=2) == 1
    assert got("gati_latency_seconds_count", plan="loose", exit=0) == 2
    assert got("gati_latency_seconds_bucket", plan="loose", exit=0, le=0.008) == 0
    assert got("gati_latency_seconds_bucket", plan="loose", exit=0, le=0.016) == 2
    assert got("gati_refused_total", reason="overloaded") == 1
    assert got("gati_requests_total", protocol="http", method="infer", code=429) == 1


def test_series_are_there_before_anything_happens_and_gauges_are_read_at_each_scrape(front):
    got = samples(front)
    assert got("gati_left_total", plan="base", exit=4) == 0
    assert got("gati_failed_steps_total", plan="tight", stage=1) == 0
    assert got("gati_refused_total", reason="stopping") == 0
    assert got("gati_queue_depth", plan="loose", stage=2) == 5
    assert got("gati_queue_depth", plan="tight", stage=0) == 0
    assert (got("gati_slots", state="used"), got("gati_slots", state="admitted")) == (3, 16)
    assert got("gati_backlog_seconds") == 0.25
    assert got("gati_bundle_info", model="gati", version="v7") == 1
    assert got("gati_ready") == 1
    front.service.drain()
    assert samples(front)("gati_ready") == 0


def test_the_documentation_names_every_metric_and_no_other(front):
    metrics = front.metrics
    metrics.step(Step(0, 0, 1, jobs(1)), 0.001, failed=False)
    metrics.request("http", "infer", 200)
    families = {family.name for family in text_string_to_metric_families(metrics.page().decode())}
    documented = set(re.findall(r"^    (gati_\w+)", serve.metrics.__doc__ or "", re.MULTILINE))
    created = {name for name in families if name.endswith("_created")}
    assert {name.removesuffix("_total") for name in documented} == families - created


# The protocol's own statistics


def test_times_add_up_and_steps_are_counted_by_their_rows():
    tally = Tally()
    tally.answered(2, Times(total=0.010, decoding=0.001, computing=0.004, encoding=0.002))
    tally.answered(1, Times(total=0.001, decoding=0.0, computing=0.002, encoding=0.0))  # clocks differ
    tally.failed(0.5)
    for rows in (3, 1, 3):
        tally.step(Step(0, 0, 4, jobs(rows)), 0.25)
    (one,) = tally.snapshot("m", "1").model_stats
    stats, steps = (
        one.inference_stats,
        [(b.batch_size, b.compute_infer.count, b.compute_infer.ns) for b in one.batch_stats],
    )
    assert (stats.success.count, stats.success.ns) == (2, 11_000_000)
    assert stats.queue.ns + stats.compute_input.ns + stats.compute_infer.ns + stats.compute_output.ns == 11_000_000
    assert (stats.fail.count, stats.fail.ns) == (1, 500_000_000)
    assert (one.inference_count, one.execution_count) == (3, 3)
    assert steps == [(1, 1, 250_000_000), (3, 2, 500_000_000)]
