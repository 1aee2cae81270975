"""Routes, and the runner against ``infer_batch``: for any buckets, slots and merges, answers are the bundle's."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax import InputError
from gati_jax.certification import CONDITIONAL, ArithmeticCheck, ExitRate
from gati_jax.profiling import Tile, Tuning, device_name
from gati_jax.runtime import Cascade, predict_batch
from serve.engine import policy, routes
from serve.engine.engine import Engine
from serve.engine.programs import settle
from serve.engine.records import Answer, Job, Step
from serve.engine.runner import JaxRunner
from tests.serve import on_onnx
from tests.serve.fake_runner import pixels, route

CAPACITY = 8
INF = np.inf


def made(name, epsilon, *stages, leave=None):
    buckets = {1: stages, 8: tuple(4 * ms for ms in stages)}
    return dataclasses.replace(route(*stages, leave=leave, name=name), epsilon=epsilon, stage_ms=buckets)


# Alone: 2 + 0.5 * 4 = 4 ms; 2 + 0.2 * 4 = 2.8; 6; 0.5 + 0.5 * 1 = 1
ROUTES = (
    made("1%", 0.01, 2.0, 4.0),
    made("5%", 0.05, 2.0, 4.0, leave=(0.8, 1.0)),
    made("base", 0.0, 6.0),
    made("uncertified", None, 0.5, 1.0),
)
TIGHT, LOOSE, BASE = 0, 1, 2


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ({}, 7),  # what the server's default is
        ({"epsilon": 0.05}, LOOSE),
        ({"epsilon": 1.0}, LOOSE),  # the fastest certified one
        ({"epsilon": 0.049}, TIGHT),
        ({"epsilon": 0.001}, BASE),
        ({"epsilon": 0}, BASE),
        ({"deadline_ms": 100.0}, BASE),
        ({"deadline_ms": 5.9}, TIGHT),
        ({"deadline_ms": 3.9}, LOOSE),
        ({"deadline_ms": 0.1}, LOOSE),  # too late for all: the fastest
        ({"deadline_ms": 10.0, "backlog_ms": lambda: 5.0}, TIGHT),
        ({"deadline_ms": 10.0, "backlog_ms": lambda: 7.0}, LOOSE),
        ({"deadline_ms": 3.0, "epsilon": 0.01}, TIGHT),  # late, but no looser than allowed
        ({"deadline_ms": 100.0, "epsilon": 0.05}, BASE),
    ],
)
def test_choices_by_hand(limit, expected):
    assert [routes.expected_ms(one) for one in ROUTES] == pytest.approx([4.0, 2.8, 6.0, 1.0])
    assert routes.choose_route(ROUTES, default=7, **limit) == expected


@given(epsilon=st.none() | st.floats(0, 1), deadline=st.none() | st.floats(0, 20), backlog=st.floats(0, 10))
def test_a_choice_is_certified_for_the_requested_epsilon(epsilon, deadline, backlog):
    chosen = routes.choose_route(ROUTES, epsilon=epsilon, deadline_ms=deadline, default=0, backlog_ms=lambda: backlog)
    assert ROUTES[chosen].epsilon is not None
    if epsilon is not None:
        assert ROUTES[chosen].epsilon <= epsilon


def test_an_epsilon_that_nothing_is_certified_for_is_refused():
    with pytest.raises(ValueError, match=r"epsilon: expected at least 0.01, got 0.001"):
        routes.choose_route(ROUTES[:2], epsilon=0.001)


def test_the_default_is_the_tightest_certified_plan():
    assert routes.default(ROUTES) == TIGHT
    assert routes.default(ROUTES[::-1]) == 3
    assert routes.default(ROUTES[2:]) == 0  # nothing is certified: the base


def test_a_bundle_has_its_plans_and_the_base(residual):
    plan, base = routes.load(residual)
    assert (plan.name, plan.cascade.sites, plan.epsilon) == ("default", (0, 1), residual.certificate.epsilon)
    assert plan.leave == (0.5, 0.5, 1.0)  # without a count
    assert (base.name, base.cascade.sites, base.epsilon, base.leave) == ("base", (), 0.0, (1.0,))
    certificate = functools.partial(dataclasses.replace, residual.certificate)
    load = lambda certificate: routes.load(dataclasses.replace(residual, certificate=certificate))  # noqa: E731
    assert load(certificate(step=-1))[0].epsilon is None
    assert [one.name for one in load(certificate(name="base"))] == ["base", "base-0"]
    exits = [ExitRate(site=site, n=n, disagreements=0, p_value=0.0) for site, n in ((0, 400), (1, 700))]
    counted = certificate(method=CONDITIONAL, exits=tuple(exits), n=1000, disagreements=0, p_value=0.0)
    assert load(counted)[0].leave == pytest.approx((0.4, 300 / 600, 1.0))


# The runner


@pytest.fixture(scope="module")
def runner(residual):
    return JaxRunner(routes.load(residual), capacity=CAPACITY, buckets=(1, 2, 4))


@pytest.fixture(scope="module", params=["xla", "onnxruntime"])
def either(request, residual, runner):
    """A runner of each backend."""
    return runner if request.param == "xla" else on_onnx.runner(residual, capacity=CAPACITY)


def with_thresholds(bundle, *thresholds):
    plan, *rest = routes.load(bundle)
    cascade = dataclasses.replace(plan.cascade, thresholds=jnp.asarray(thresholds, jnp.float32))
    return [dataclasses.replace(plan, cascade=cascade), *rest]


def serve(runner, images, steps, number):
    """Drive images, by slot, through a route: ``steps`` draws which stage runs next, in which bucket, on whom."""
    jobs = [Job(image=x, route=number, arrived=0.0, slot=slot) for slot, x in images.items()]
    answers, waiting, to = {}, list(jobs), runner.routes[number]
    while waiting:
        stage = steps.draw(st.sampled_from(sorted({job.stage for job in waiting})))
        ready = [job for job in waiting if job.stage == stage]
        bucket = steps.draw(st.sampled_from(sorted(to.stage_ms)))
        chosen = tuple(steps.draw(st.permutations(ready))[:bucket])
        result = runner.dispatch(Step(number, stage, bucket, chosen)).result()
        assert result.hit.shape == (len(chosen),)
        for job, hit, class_index, score, logits in zip(chosen, *result[:4], strict=True):
            job.stage += 1
            if hit:
                answers[job] = Answer(class_index, to.exits[stage], score, logits)
                waiting.remove(job)
    return [answers[job] for job in jobs]


def check(answers, expected, tolerance=1e-5):
    """Classes and exits are the same; scores and logits of one arithmetic in batches of other sizes."""
    for name in ("class_index", "exit", "score", "logits"):
        found, wanted = np.stack([getattr(one, name) for one in answers]), np.asarray(getattr(expected, name))
        if name in {"class_index", "exit"}:
            np.testing.assert_array_equal(found, wanted)
        else:
            largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=1.0)
            np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * largest)


@settings(max_examples=40, deadline=None)
@given(
    slots=st.lists(st.integers(0, CAPACITY - 1), unique=True, min_size=1),
    seed=st.integers(0, 9),
    floats=st.lists(st.booleans(), min_size=CAPACITY, max_size=CAPACITY),
    number=st.integers(0, 1),
    steps=st.data(),
)
def test_any_steps_give_the_bundles_answers(residual, either, slots, seed, floats, number, steps):  # noqa: PLR0917
    """Any slots, merges, orders and buckets; some images are pixels, others prepared."""
    images = pixels(len(slots), seed)
    prepared = np.asarray(residual.chain.normalization(images))
    sent = {slot: (prepared if floats[i] else images)[i] for i, slot in enumerate(slots)}
    cascade = (residual.cascade, Cascade(residual.chain, (), jnp.zeros(0)))[number]
    tolerance = 1e-5 if isinstance(either, JaxRunner) else 1e-4
    check(serve(either, sent, steps, number), predict_batch(cascade, images), tolerance)


def through_engine(runner, images, *, one_by_one=False, **options):
    engine = Engine(runner, **options)
    engine.start()
    futures = []
    for image in images:
        futures += engine.submit(image[None], route=0)
        if one_by_one:
            futures[-1].result(60)
    answers = [future.result(60) for future in futures]
    assert engine.stop(60)
    return answers


@pytest.mark.parametrize("overlap", [False, True])
def test_served_digits_are_answered_as_by_the_library(dense, splits, monkeypatch, overlap):
    """One by one no other job waits, so each next stage can be dispatched early, and discarded for every hit."""
    monkeypatch.setattr(policy, "overlap_pays", lambda *_: True)
    runner, images = (
        JaxRunner(routes.load(dense), capacity=300, buckets=(1,) if overlap else None),
        splits["test"][:256],
    )
    early, dispatch = [], runner.dispatch
    monkeypatch.setattr(runner, "dispatch", lambda step: (early.append(step.follows is not None), dispatch(step))[1])
    expected = gati_jax.infer_batch(dense, images, numerics="reference")
    assert set(np.asarray(expected.exit).tolist()) == {1, 2, 3, 4, 5}
    check(through_engine(runner, images, one_by_one=overlap, overlap=overlap), expected)
    assert (sum(early) >= len(images)) == overlap


@pytest.mark.parametrize("thresholds", [(-INF, -INF), (INF, INF), (INF, -INF)], ids=["all hit", "all miss", "second"])
def test_extremes(residual, thresholds):
    sources = with_thresholds(residual, *thresholds)
    runner = JaxRunner(sources, capacity=20, buckets=(1, 4))
    images = pixels(20)
    expected = predict_batch(sources[0].cascade, images)
    check(through_engine(runner, images), expected)
    assert len(set(np.asarray(expected.exit).tolist())) == 1


def test_collections_do_not_walk_through_what_is_compiled(runner):
    assert runner.routes
    try:
        settle()
        frozen, walked = gc.get_freeze_count(), len(gc.get_objects())
    finally:
        gc.unfreeze()
    assert walked < frozen / 10


def test_programs_take_new_parameters_without_compiling(residual):
    runner = JaxRunner(routes.load(residual), capacity=20, buckets=(1, 4))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, residual.chain)
    other = dataclasses.replace(residual, chain=doubled)
    images = pixels(16)
    expected = gati_jax.infer_batch(other, images, numerics="reference")
    before = gati_jax.infer_batch(residual, images, numerics="reference")
    assert not np.allclose(expected.logits, before.logits)
    programs = {id(program.run) for program in runner._programs.values()}
    runner.take(runner.prepare(dict(enumerate(routes.load(other)))))
    assert {id(program.run) for program in runner._programs.values()} == programs
    check(through_engine(runner, images), expected)
    with pytest.raises(InputError, match="expected the same routes"):
        runner.prepare(dict(enumerate(routes.load(residual)[::-1])))


def test_plans_with_the_same_caches_share_programs(residual):
    plan, base = with_thresholds(residual, INF, INF)
    runner = JaxRunner([plan, dataclasses.replace(plan, name="loose"), base], capacity=4, buckets=(1, 2))
    assert len(runner._programs) == 14
    assert len({id(program.run) for program in runner._programs.values()}) == 8
    assert sorted(runner._slabs) == [0, 1]  # of both plans


def make_jobs(*slots, stage=0):
    return tuple(Job(image=pixels(1, slot)[0], route=0, arrived=0.0, slot=slot, stage=stage) for slot in slots)


def test_a_step_writes_the_rows_of_its_jobs_only(residual):
    """Also those of hits, which may continue as shadow jobs; padding writes nothing."""
    jobs = make_jobs(0, 2, 5)
    scores = gati_jax.replay(residual.chain, residual.caches, np.stack([job.image for job in jobs])).scores[0]
    two_hit = np.sort(scores)[:2].mean()
    runner = JaxRunner(with_thresholds(residual, two_hit, INF), capacity=6, buckets=(1, 4))
    before = np.full((6, 8, 8, 3), 7.0, np.float32)
    runner._slabs[0] = jnp.asarray(before)
    result = runner.dispatch(Step(0, 0, 4, jobs)).result()
    assert sorted(result.hit.tolist()) == [False, True, True]
    after = np.asarray(runner._slabs[0])
    assert [slot for slot in range(6) if not np.array_equal(after[slot], before[slot])] == [0, 2, 5]


def test_a_failure_that_spares_the_slab_spares_everyone_else(residual):
    runner = JaxRunner(with_thresholds(residual, INF, INF), capacity=6, buckets=(2,))
    spared, failing = make_jobs(1, 2), make_jobs(3)
    runner.dispatch(Step(0, 0, 2, spared)).result()
    expected = runner.dispatch(Step(0, 1, 2, spared)).result()
    whole, key = runner._programs, (0, 0, 2)
    runner._programs = {**whole, key: dataclasses.replace(whole[key], run=lambda *_: 1 / 0)}
    with pytest.raises(ZeroDivisionError):
        runner.dispatch(Step(0, 0, 2, failing))
    runner._programs = whole
    for found, wanted in zip(runner.dispatch(Step(0, 1, 2, spared)).result(), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("when", ["at once", "later"])
def test_rows_of_a_slab_that_was_lost_are_not_served(residual, when):
    """A donated slab is lost with its step; jobs in it fail, and are never answered from zeros."""
    runner = JaxRunner(with_thresholds(residual, INF, INF), capacity=6, buckets=(2,))
    lost, failing = make_jobs(1, 2), make_jobs(3)
    runner.dispatch(Step(0, 0, 2, lost)).result()
    whole, key = runner._programs, (0, 0, 2)

    def at_once(*args):
        args[-1].delete()  # the slab
        raise RuntimeError("out of memory")

    def later(leaves, source, slots, after):
        said, after = whole[key].run(leaves, source, slots, after)
        said.delete()  # reading it fails, as after an error on the device
        return said, after

    runner._programs = {**whole, key: dataclasses.replace(whole[key], run={"at once": at_once, "later": later}[when])}
    with pytest.raises(RuntimeError, match=r"out of memory|deleted"):
        runner.dispatch(Step(0, 0, 2, failing)).result()
    runner._programs = whole
    with pytest.raises(RuntimeError, match="activations at site 0 were lost"):
        runner.dispatch(Step(0, 1, 2, lost))
    fresh = make_jobs(1)  # takes a slot that was lost, and writes it anew
    runner.dispatch(Step(0, 0, 2, fresh)).result()
    assert runner.dispatch(Step(0, 1, 2, fresh)).result().hit.tolist() == [False]


def test_a_tuning_decides_on_buckets_programs_and_times(residual):
    """Times come from the tuning where every tile has them; options and algorithms always."""
    costs = [
        gati_jax.CostTable(
            device="test", batch=size, blocks_ms=(1.0 * size, 2.0 * size), lookup_ms={"grid@0": 0.25, "grid@1": 0.5}
        )
        for size in (1, 4)
    ]
    tiles = tuple(
        Tile(size=table.batch, milliseconds=table.full_ms, options=(), algorithms={}, costs=table) for table in costs
    )
    tuning = Tuning(device=device_name(), tiles=tiles)
    with pytest.warns(UserWarning, match=r"run gati-jax tune"):  # no check: the certified arithmetic answers
        unchecked = routes.load(dataclasses.replace(residual, tunings=(tuning,)))
    assert [(one.tuning, one.epsilon) for one in unchecked] == [(None, residual.certificate.epsilon), (None, 0.0)]
    checks = tuple(
        ArithmeticCheck(
            arithmetic="fast", programs=tuning.programs, device=tuning.device, cascade=cascade, data_fingerprint="",
            n=1000, differ=differ, delta=0.01, comparisons=1,
        )
        for cascade, differ in ((f"{residual.plan.hash}:1", 20), ("base", 1))
    )  # fmt: skip
    tuned = dataclasses.replace(residual, tunings=(dataclasses.replace(tuning, checks=checks),))
    sources = routes.load(tuned)
    assert [(one.tuning, one.delta) for one in routes.load(tuned, reference=True)] == [(None, 0.05), (None, 0.0)]
    # What differs between the arithmetics is on top of what each route promises, the base included.
    promised = [(residual.certificate.epsilon + checks[0].upper, 0.06), (checks[1].upper, 0.01)]
    assert [(one.epsilon, one.delta) for one in sources] == [pytest.approx(both) for both in promised]
    runner = JaxRunner(sources, capacity=6)
    assert [one.epsilon for one in runner.routes] == [one.epsilon for one in sources]
    # sites 0 and 1 of two blocks: the lookup at the input; block 1 and a lookup; block 2
    assert runner.routes[0].stage_ms == {1: (0.25, 1.5, 2.0), 4: (0.25, 4.5, 8.0)}
    assert runner.routes[1].stage_ms == {1: (3.0,), 4: (12.0,)}
    check(through_engine(runner, pixels(6)), gati_jax.infer_batch(tuned, pixels(6), numerics="fast"))
    with pytest.raises(InputError, match=r"buckets: expected some of \[1, 4\], which have been tuned, got \[2\]"):
        JaxRunner(routes.load(tuned), buckets=(2,))


def test_times_are_measured_where_there_is_no_tuning(runner):
    for one in runner.routes:
        assert sorted(one.stage_ms) == [1, 2, 4]
        assert all(ms > 0 for stages in one.stage_ms.values() for ms in stages)
        assert {len(stages) for stages in one.stage_ms.values()} == {len(one.exits)}


def test_too_many_programs_are_refused(residual):
    with pytest.raises(InputError, match="buckets: expected at most 42 programs, got 3 stages"):
        JaxRunner(routes.load(residual), buckets=range(1, 16))


def test_debug_logs_report_the_progress_of_the_warm_up(residual, caplog):
    caplog.set_level("DEBUG", "serve.engine")
    JaxRunner(routes.load(residual), capacity=4, buckets=(1,))
    progress = [(vars(one)["ready"], vars(one)["programs"]) for one in caplog.records if one.msg == "warming up"]
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
