"""The comparison's bookkeeping by hand, and a full network behind the real engine."""

import asyncio
import itertools
import json
import time

import numpy as np
import pytest

from benchmarks import serving, targets
from benchmarks.load import Load, load_of, measure, parser
from benchmarks.onnx_runner import BUCKETS, FullRunner
from benchmarks.onnx_runner import measure as measure_buckets
from gati_jax import InputError
from serve.engine.engine import Engine
from serve.engine.records import Job, Step


def first_value(images):
    """A network whose class is the image's first value."""
    return np.eye(10, dtype=np.float32)[images.reshape(len(images), -1)[:, 0]]


def test_a_full_network_answers_every_row_at_its_last_exit():
    runner = FullRunner(first_value, depth=8, stage_ms=dict.fromkeys(BUCKETS, (1.0,)), name="full")
    assert (runner.routes[0].exits, runner.routes[0].leave) == ((8,), (1.0,))
    jobs = tuple(Job(image=np.full((2, 2, 3), i, np.uint8), route=0, arrived=0.0) for i in (3, 1, 4))
    result = runner.dispatch(Step(0, 0, 4, jobs)).result()
    assert result.class_index.tolist() == [3, 1, 4]
    assert result.logits.shape == (3, 10)
    assert result.hit.all()
    assert np.isposinf(result.score).all()


def test_a_failure_is_the_steps():
    def broken(images):
        raise MemoryError(f"{len(images)} images are too many")

    runner = FullRunner(broken, depth=1, stage_ms={1: (1.0,)})
    with pytest.raises(MemoryError):
        runner.dispatch(Step(0, 0, 1, (Job(image=np.zeros(2, np.uint8), route=0, arrived=0.0),))).result()


def test_buckets_are_timed_in_turns_and_the_first_is_left_out():
    asked, now = [], itertools.count(0)
    clock = lambda: next(now) * 0.001 * (1000 if len(asked) <= len(BUCKETS) else 1)  # noqa: E731
    result = measure_buckets(lambda images: asked.append(len(images)), np.zeros((5, 2)), rounds=3, clock=clock)  # pyright: ignore[reportArgumentType] (a fake)
    assert asked == list(BUCKETS) * 4
    assert result == {bucket: (pytest.approx(1.0),) for bucket in BUCKETS}


def test_load_on_the_real_engine_gets_the_right_answers():
    images = np.repeat(np.arange(10, dtype=np.uint8)[:, None], 4, 1)
    engine = Engine(FullRunner(first_value, depth=8, stage_ms=dict.fromkeys(BUCKETS, (1.0,))))
    engine.start()
    ask = targets.in_process(engine, images, route=0, clock=time.monotonic)
    expected = np.array([*range(9), 0])  # the last is wrong
    for load in (
        Load(kind="poisson", rate=500, seconds=0.4, warm_up=0, slo_ms=1e4),
        Load(kind="closed", clients=7, seconds=0.2, warm_up=0, slo_ms=1e4),
        Load(kind="bursty", rate=500, seconds=0.4, warm_up=0, slo_ms=1e4),
    ):
        result = asyncio.run(measure(ask, load, images=10, expected=expected))
        assert result["answered"] == result["requests"] > 50
        assert result["exits"] == {8: result["answered"]}
        assert result["goodput_share"] == 1
        assert 0.6 < result["agreement"] < 1
    assert engine.stop(5.0)


class Fake:
    """A contender that records its loads, ``factor`` times as slow as the full network."""

    def __init__(self, factor, good=1.0, log=None):
        self.factor, self.good, self.log = factor, good, [] if log is None else log

    def ask(self, line):
        load = Load(**json.loads(line))
        self.log.append((load.kind, load.seed, load.rate, load.slo_ms))
        rate = load.rate or 100.0 / self.factor
        share = 1.0 if rate <= 50 * self.good else 0.5
        return {
            "mean_ms": 10.0 * self.factor * (1 + load.seed), "p99_ms": 20.0 * self.factor, "throughput": rate,
            "goodput": rate * share, "goodput_share": share, "rate": rate, "agreement": 1.0, "generator_cores": 0.1,
            "late_share": 0.0, "exits": {"8": 5}, "invalid_because": ["late"] * (self.factor == 3),
        }  # fmt: skip


def test_ratios_criteria_and_goodput_follow_by_hand(monkeypatch, capsys):
    monkeypatch.setattr(serving, "PAUSE_SECONDS", 0.0)
    workers = {"cascade": Fake(0.4, 2.0), "full": Fake(1.0), "onnx": Fake(3, 1.5)}
    given = ["--bundle", "b", "--rounds", "3", "--shares", "0.25", "0.5", "0.75", "1", "1.1"]
    result = serving.compare(workers, serving.parser().parse_args(given))  # pyright: ignore[reportArgumentType] (fakes)
    cascade, full, onnx = result["rows"]
    assert result["slo_ms"] == 40.0  # 10, 20 and 30 ms alone: twice the median
    assert (cascade["mean_ratio"], cascade["p99_ratio"], cascade["mean_spread"]) == (0.4, pytest.approx(0.4), 0)
    assert full["rate"] == 80.0
    # Rates 25, 50, 75, 100, 110; all good up to 50 times a factor, then half.
    assert (full["goodput"], full["highest_rate"]) == (pytest.approx(55), 50.0)
    assert (onnx["goodput"], onnx["highest_rate"]) == (75.0, 75.0)
    assert (cascade["goodput"], cascade["highest_rate"]) == (100.0, 100.0)
    assert [(round(one["measured"], 2), one["holds"]) for one in result["criteria"]] == [
        (0.4, True), (0.4, True), (1.82, True), (1.33, True),
    ]  # fmt: skip
    assert (full["invalid_because"], onnx["invalid_because"]) == ([], ["late"])
    assert workers["cascade"].log == workers["full"].log == workers["onnx"].log  # the same arrivals for all
    assert {slo for kind, _, _, slo in workers["full"].log if kind == "poisson"} == {40.0}
    serving.show(result | {"network": "resnet18", "machine": "here"})
    text = capsys.readouterr().out
    assert "holds, but see below: goodput, to onnx's: 1.33 (at least 1.2)" in text
    assert "not valid, onnx: late" in text


def test_a_criterion_that_is_missed_fails():
    workers = {"cascade": Fake(0.6), "full": Fake(1.0)}
    args = serving.parser().parse_args(["--bundle", "b", "--rounds", "1", "--shares", "0.5"])
    criteria = serving.compare(workers, args)["criteria"]  # pyright: ignore[reportArgumentType] (fakes)
    assert [one["holds"] for one in criteria] == [False, False, False]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--search", "10"], "--search: expected --slo-ms"),
        (["--clients", "3", "--save-trace", "t.json"], "--save-trace: expected --rate"),
        (["--clients", "3", "--burst", "5"], "--burst: expected --rate or --search"),
        (["--rate", "-1"], "expected a number above 0"),
        (["--rate", "1", "--clients", "1"], "not allowed with"),
        ([], "one of the arguments --rate --trace --clients --search is required"),
    ],
)
def test_command_lines_that_make_no_sense_are_refused(given, complaint):
    with pytest.raises(InputError, match=complaint):
        load_of(parser().parse_args(["--url", "u", "--data", "digits", *given]))


def test_a_command_line_becomes_a_load():
    given = ["--url", "u", "--data", "digits", "--rate", "20", "--burst", "4", "--parameter", "epsilon=0.01"]
    arguments = parser().parse_args([*given, "--parameter", "plan=2%"])
    assert load_of(arguments) == Load(kind="bursty", rate=20.0, burst=4.0, trace="", clients=1)
    assert arguments.parameter == [("epsilon", 0.01), ("plan", "2%")]
