"""Serving on ONNX Runtime: the engine's answers, faults, and the choice of the backend."""

import numpy as np
import pytest

import gati_jax
from gati_jax import InputError
from gati_jax.runtime import predict_batch
from serve import assemble
from serve.engine import routes
from serve.engine.engine import Engine
from serve.engine.onnx_runner import OnnxRunner
from serve.engine.records import Job, Step, StepError
from serve.engine.runner import BUCKETS, JaxRunner
from serve.settings import Settings, parse
from tests.serve import on_onnx
from tests.serve.fake_runner import pixels
from tests.serve.test_runner import check, through_engine

pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")
INF = np.inf


@pytest.mark.parametrize("overlap", [False, True])
def test_served_requests_are_answered_as_by_the_library(residual, overlap):
    """On both backends of the library; prepared inputs and pixels may be in one step."""
    bundle, images = on_onnx.tuned(residual), pixels(64)
    expected = gati_jax.infer_batch(bundle, images, backend="onnxruntime")
    assert set(np.asarray(expected.exit).tolist()) == {0, 1, 2}
    prepared = np.asarray(bundle.chain.prepare(images))
    mixed = [prepared[i] if i % 3 else images[i] for i in range(64)]
    answers = through_engine(on_onnx.runner(residual, capacity=64), mixed, overlap=overlap)
    check(answers, expected, 1e-4)
    check(answers, gati_jax.infer_batch(bundle, images, numerics="reference"), 1e-4)


@pytest.mark.parametrize("thresholds", [(-INF, -INF), (INF, INF), (INF, -INF)], ids=["all hit", "all miss", "second"])
def test_extremes(residual, thresholds):
    expected = predict_batch(on_onnx.sources(residual, *thresholds)[0].cascade, pixels(20))
    check(through_engine(on_onnx.runner(residual, *thresholds, capacity=20), pixels(20)), expected, 1e-4)
    assert len(set(np.asarray(expected.exit).tolist())) == 1


def test_a_session_that_fails_fails_its_step_alone(residual, monkeypatch):
    """Rows of others, which came in before, are as they were."""
    runner, images = on_onnx.runner(residual, INF, INF, capacity=6), pixels(4)
    jobs = [Job(image=x, route=0, arrived=0.0, slot=slot) for slot, x in zip((5, 0, 2, 3), images, strict=True)]
    runner.dispatch(Step(0, 0, 8, tuple(jobs[:3]))).result()
    expected = runner.dispatch(Step(0, 1, 8, tuple(jobs[:3]))).result()
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_lookups", [[lambda _: 1 / 0] * 2, []])
        with pytest.raises(ZeroDivisionError):
            runner.dispatch(Step(0, 0, 8, (jobs[3], jobs[0])))
    for found, wanted in zip(runner.dispatch(Step(0, 1, 8, tuple(jobs[:3]))).result(), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_only_the_request_of_a_failed_step_has_an_error(residual, monkeypatch):
    """The engine goes on."""
    runner = on_onnx.runner(residual, capacity=6)
    first = runner._spans.first

    def fails(images, stop):
        if (images == 7).all():
            raise RuntimeError("out of memory")
        return first(images, stop)

    monkeypatch.setattr(runner._spans, "first", fails)
    engine = Engine(runner)
    engine.start()
    (failed,) = engine.submit(np.full((1, 8, 8, 3), 7, np.uint8), route=0)
    with pytest.raises(StepError, match="failed: RuntimeError on the way to exit 0"):
        failed.result(60)
    answers = [future.result(60) for future in engine.submit(pixels(6), route=0)]
    check(answers, predict_batch(residual.cascade, pixels(6)), 1e-4)
    assert engine.stop(60)


def test_times_between_measured_batches_are_interpolated(residual):
    """Stages: a lookup at the input; block 1 and a lookup; block 2. One request takes 1, five take 3 times as long."""
    runner = on_onnx.runner(residual, capacity=4)
    factors = {1: 1.0, 2: 1.5, 4: 2.5, 8: 3 * 8 / 5}
    assert runner.routes[0].stage_ms == {
        rows: pytest.approx((0.25 * factor, 1.25 * factor, 2 * factor)) for rows, factor in factors.items()
    }
    assert runner.routes[1].stage_ms == {rows: pytest.approx((3 * factor,)) for rows, factor in factors.items()}


def test_what_is_promised_holds_what_was_compared(residual):
    plan, base = on_onnx.sources(residual)
    upper = on_onnx.tuned(residual).checks_of("onnxruntime")["base"].upper
    assert (plan.epsilon, plan.delta) == pytest.approx((residual.certificate.epsilon + upper, 0.06))
    assert (base.epsilon, base.delta) == (upper, 0.01)


def test_times_that_the_tuning_does_not_have_are_measured_when_the_runner_starts(residual):
    """As of a bundle with several plans, whose tuning has the costs of the default one's caches."""
    bundle = on_onnx.tuned(residual, steady=False)
    found = OnnxRunner(routes.load(bundle, backend="onnxruntime"), capacity=4)
    assert [sorted(route.stage_ms) for route in found.routes] == [list(BUCKETS)] * 2
    assert all(0 < ms < np.inf for route in found.routes for stages in route.stage_ms.values() for ms in stages)
    check(through_engine(found, pixels(4)), gati_jax.infer_batch(residual, pixels(4), numerics="reference"))


@pytest.fixture(scope="module")
def saved(residual, tmp_path_factory):
    """A bundle that was tuned for ONNX Runtime."""
    path = tmp_path_factory.mktemp("tuned") / "bundle"
    gati_jax.save_bundle(path, residual.chain, residual.caches, residual.plan, residual.certificate)
    gati_jax.save_tuning(path, on_onnx.tuned(residual).tunings[0])
    return path


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, OnnxRunner),
        ({"backend": "onnxruntime"}, OnnxRunner),
        ({"backend": "xla"}, JaxRunner),
        ({"reference": True}, JaxRunner),
    ],
)
def test_the_server_takes_the_backend_that_the_bundle_prefers(saved, residual, monkeypatch, options, kind):
    made = []
    for one in (OnnxRunner, JaxRunner):
        new = one.__init__
        monkeypatch.setattr(
            one, "__init__", lambda self, *a, new=new, **k: made.append(type(self)) or new(self, *a, **k)
        )
    monkeypatch.setattr(assemble, "settle", lambda: None)
    parts = assemble.assemble(Settings(bundle=saved, capacity=4, program_cache="off", **options))
    _, backend = parts.service.models.find("gati").start()
    assert made == [kind]
    futures = [backend.engine.submit(image[None], route=0)[0] for image in pixels(4)]
    check([one.result(60) for one in futures], predict_batch(residual.cascade, pixels(4)), 1e-4)
    assert backend.engine.stop(60)


def test_a_backend_that_cannot_serve_is_refused(saved, residual, tmp_path):
    path = tmp_path / "bundle"
    gati_jax.save_bundle(path, residual.chain, residual.caches, residual.plan, residual.certificate)
    with pytest.raises(InputError, match=r"^backend: expected a bundle that was tuned for onnxruntime on this device"):
        assemble.assemble(Settings(bundle=path, backend="onnxruntime"))
    bundle = ["--bundle", str(saved), "--backend"]
    for words, message in (
        (["onnxruntime", "--reference"], "--backend: expected xla, for --reference needs the certified arithmetic"),
        (["onnxruntime", "--adapt"], "--backend: expected xla, for --adapt needs the certified arithmetic"),
        (["tpu"], "--backend: "),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            parse([*bundle, *words], {})
    assert parse([*bundle, "onnxruntime"], {}).backend == "onnxruntime"
