"""The metrics for Prometheus, and the protocol's statistics."""

import re

import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

import serve.metrics
from serve.engine.records import Job, Step
from serve.protocol.model import Tally, Times
from tests.serve import fake
from tests.serve.transports import Grpc, Http, ask, tensor


def jobs(count, route=0):
    return tuple(Job(image=np.zeros(1), route=route, arrived=0.0) for _ in range(count))


def samples(front):
    """Return a look-up of samples by name and labels."""
    families = text_string_to_metric_families(front.metrics.page().decode())
    found = {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}
    return lambda name, **labels: found[name, *sorted((key, str(value)) for key, value in labels.items())]


def test_everything_that_happens_is_counted(front):
    metrics, seen = front.metrics, front.observer
    for rows in (1, 3, 4):
        seen.step(Step(1, 0, 4, jobs(rows)), 0.003, failed=False)
    seen.step(Step(1, 2, 1, jobs(1)), 0.001, failed=True)
    for value in (0, 3, 1):
        seen.answered(jobs(1, route=1)[0], fake.answer(value), 0.01)
    metrics.refused("overloaded")
    metrics.request("http", "infer", 429, 0.02)
    with metrics.in_flight("http").track_inprogress():
        assert samples(front)("gati_requests_in_flight", protocol="http") == 1
    got = samples(front)
    assert got("gati_step_seconds_count", model="gati", plan="loose", stage=0, bucket=4) == 3
    assert got("gati_step_seconds_sum", model="gati", plan="loose", stage=0, bucket=4) == pytest.approx(0.009)
    assert got("gati_batch_occupancy_sum", model="gati", stage=0, bucket=4) == 8 / 4
    assert got("gati_failed_steps_total", model="gati", plan="loose", stage=2) == 1
    assert (
        got("gati_left_total", model="gati", plan="loose", exit=0) == 2
    )  # values 0 and 3 leave at site 0, 1 at site 2
    assert got("gati_left_total", model="gati", plan="loose", exit=2) == 1
    assert got("gati_latency_seconds_count", model="gati", plan="loose", exit=0) == 2
    assert got("gati_latency_seconds_bucket", model="gati", plan="loose", exit=0, le=0.008) == 0
    assert got("gati_latency_seconds_bucket", model="gati", plan="loose", exit=0, le=0.016) == 2
    assert got("gati_refused_total", reason="overloaded") == 1
    assert got("gati_requests_total", protocol="http", method="infer", code=429) == 1
    assert got("gati_request_duration_seconds_sum", protocol="http", method="infer") == pytest.approx(0.02)
    assert got("gati_requests_in_flight", protocol="http") == 0


def test_series_are_there_before_anything_happens_and_gauges_are_read_at_each_scrape(front):
    got = samples(front)
    assert got("gati_left_total", model="gati", plan="base", exit=4) == 0
    assert got("gati_failed_steps_total", model="gati", plan="tight", stage=1) == 0
    assert got("gati_refused_total", reason="stopping") == 0
    assert got("gati_queue_depth", model="gati", plan="loose", stage=2) == 5
    assert got("gati_queue_depth", model="gati", plan="tight", stage=0) == 0
    assert (got("gati_slots", model="gati", state="used"), got("gati_slots", model="gati", state="admitted")) == (3, 16)
    assert got("gati_backlog_seconds", model="gati") == 0.25
    assert got("gati_bundle_info", model="gati", version="v7") == 1
    assert got("gati_ready") == 1
    front.service.drain()
    assert samples(front)("gati_ready") == 0


def test_the_documentation_names_every_metric_and_no_other(front):
    metrics = front.metrics
    front.observer.step(Step(0, 0, 1, jobs(1)), 0.001, failed=False)
    metrics.request("http", "infer", 200, 0.1)
    families = {family.name for family in text_string_to_metric_families(metrics.page().decode())}
    families = {name for name in families if not name.startswith("process_")}  # Prometheus' own
    documented = set(re.findall(r"^    (gati_\w+)", serve.metrics.__doc__ or "", re.MULTILINE))
    created = {name for name in families if name.endswith("_created")}
    assert {name.removesuffix("_total") for name in documented} == families - created


OPEN_METRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"


def test_openmetrics_if_it_is_asked_for_with_names_that_do_not_clash(front):
    """The parser refuses names that clash: those of one family with what is added to another one's."""
    response = ask(front, "GET", "/metrics", headers={"accept": OPEN_METRICS})
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in open_metrics(response.text)}
    assert families["gati_refused"].type == "counter"
    assert families["gati_request_duration_seconds"].type == "histogram"
    assert {"process_cpu_seconds", "process_resident_memory_bytes", "process_open_fds"} <= families.keys()


@pytest.mark.parametrize(
    "accept", ["", "*/*", "text/plain", "application/json", ";,;", "text/plain;version=x;escaping=\xe9"]
)
def test_everybody_else_gets_prometheus_text(front, accept):
    response = ask(front, "GET", "/metrics", headers={"accept": accept.encode("latin-1")})
    assert (response.status_code, response.headers["content-type"]) == (200, serve.metrics.CONTENT_TYPE)


def test_a_version_that_is_no_number_is_no_fault(front):
    accept = {"accept": "application/openmetrics-text;version=x"}
    assert ask(front, "GET", "/metrics", headers=accept).status_code == 200


def test_refusals_are_counted_by_reason_over_both_transports():
    front, good = fake.Front(token="secret"), {"authorization": "Bearer secret"}
    message = {"inputs": [tensor()]}
    with front.sockets() as ports:
        for transport in (Http(front), Grpc(ports[1])):
            transport.infer(message)
            transport.infer({"inputs": []}, good)
            transport.infer(message, good, model="other")
            assert transport.infer(message, good).status in {200, "OK"}
    ask(front, content=b"x" * 5000, headers=good)
    ask(front, content=b"x", headers=good | {"content-encoding": "br"})
    ask(front, "GET", "/nowhere", headers=good)
    front.service.drain()
    ask(front, "GET", "/v2/health/ready")
    got = samples(front)
    counts = {"unauthorized": 2, "invalid": 2, "unknown_model": 2}
    counts |= dict.fromkeys(("body_too_large", "encoding", "unknown_path", "not_ready"), 1)
    assert {reason: got("gati_refused_total", reason=reason) for reason in counts} == counts
    for protocol, method in (("http", "infer"), ("grpc", "ModelInfer")):
        assert got("gati_request_duration_seconds_count", protocol=protocol, method=method) >= 3
        assert got("gati_requests_in_flight", protocol=protocol) == 0


# The protocol's own statistics


def test_times_add_up_and_steps_are_counted_by_their_rows():
    tally = Tally()
    tally.answered(2, Times(total=0.010, decoding=0.001, computing=0.004, encoding=0.002))
    tally.answered(1, Times(total=0.001, decoding=0.0, computing=0.002, encoding=0.0))  # clocks differ
    tally.failed(0.5)
    for rows in (3, 1, 3):
        tally.step(Step(0, 0, 4, jobs(rows)), 0.25)
    one = tally.snapshot("m", "1")
    stats, steps = (
        one.inference_stats,
        [(b.batch_size, b.compute_infer.count, b.compute_infer.ns) for b in one.batch_stats],
    )
    assert (stats.success.count, stats.success.ns) == (2, 11_000_000)
    assert stats.queue.ns + stats.compute_input.ns + stats.compute_infer.ns + stats.compute_output.ns == 11_000_000
    assert (stats.fail.count, stats.fail.ns) == (1, 500_000_000)
    assert (one.inference_count, one.execution_count) == (3, 3)
    assert steps == [(1, 1, 250_000_000), (3, 2, 500_000_000)]
