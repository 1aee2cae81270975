"""Recovery: refits on a tiny chain whose traffic has drifted, and which requests a trial may take as evidence."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import Bundle, CostTable, FitConfig, InputError, planning
from gati_jax.adaptation import (
    AdaptationController,
    Alarm,
    ControllerConfig,
    MonitorConfig,
    Recovery,
    RecoveryConfig,
    RequestLogConfig,
    Trial,
    TrialConfig,
    UpdateConfig,
    examine,
    refit_caches,
    replan,
    served_by,
    updated,
)
from gati_jax.bundle import Versions, versions
from gati_jax.caches import FullyConnected, unfold_standardize
from gati_jax.fitting import evaluate
from gati_jax.planning import Plan
from gati_jax.pytrees import call
from gati_jax.runtime import Cascade, predict_batch
from gati_jax.runtime import cascade as drivers
from tests.adaptation import world
from tests.fitting import tiny

CONFIG = UpdateConfig(fit=FitConfig(epochs=8, batch=32, learning_rate=0.01), least=64)


def traffic(n: int, seed: int) -> np.ndarray:
    """Drifted: other scales than in the fit, and a shift."""
    return (2.0 * np.random.default_rng(seed).standard_normal((n, 12)) + 1.0).astype(np.float32)


@pytest.fixture(scope="module")
def served() -> Bundle:
    chain, candidates = tiny.chain(), tiny.fit()
    costs = CostTable(device="test", batch=1, blocks_ms=(1.0,) * 3, lookup_ms={c.name: 0.01 for c in candidates})
    table = gati_jax.replay(chain, candidates, tiny.images()[1])
    plan = planning.plan(table, costs, epsilon=0.2, seconds=2.0)
    certify = np.random.default_rng(5).standard_normal((400, 12)).astype(np.float32)
    certificate = gati_jax.certify(plan, gati_jax.replay(chain, candidates, certify), 0.3)
    return Bundle(
        chain=chain, caches=gati_jax.caches.choose(candidates, plan.names), plan=plan, certificate=certificate,
        costs=(costs,),
    )  # fmt: skip


@pytest.fixture(scope="module")
def refitted(served):
    return refit_caches(served, traffic(1024, 1), traffic(256, 2), config=CONFIG)


def cascade_of(bundle: Bundle) -> Cascade:
    """Return the cascade with closed caches left in: of one structure in every version."""
    caches, thresholds = served_by(bundle)
    return Cascade(bundle.chain, caches, jnp.asarray(thresholds))


def agreement(bundle: Bundle, caches: Any, images: np.ndarray) -> np.ndarray:
    outputs = evaluate(bundle.chain, caches, images)
    return (outputs.classes == outputs.answers).mean(axis=1)


def shapes(tree: Any) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def test_heads_learn_the_new_traffic_and_keep_their_shapes(served, refitted):
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(served.caches)]
    later = traffic(2000, 3)
    assert (agreement(served, refitted.items, later) > agreement(served, served.caches, later)).all()
    assert jax.tree.structure(refitted.items) == jax.tree.structure(served.caches), "or programs would compile anew"
    assert shapes(refitted.items) == shapes(served.caches)
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(served.caches)] == before, "those that are served"


def test_a_refit_goes_on_from_where_the_heads_are(served):
    still = dataclasses.replace(CONFIG, fit=dataclasses.replace(CONFIG.fit, learning_rate=1e-9, weight_decay=0.0))
    found = refit_caches(served, traffic(256, 1), traffic(128, 2), config=still)
    images = traffic(64, 4)
    for old, new in zip(served.caches, found, strict=True):
        outputs = [gati_jax.fitting.replay_logits(served.chain, [cache], images) for cache in (old, new)]
        np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-3)


def test_unfolding_changes_nothing_but_the_scale():
    x = jax.random.normal(jax.random.key(0), (50, 6)) * 7.0 + 3.0
    folded = FullyConnected(3, hidden=4, standardize=False)
    variables = folded.init(jax.random.key(1), x)
    module, own = unfold_standardize(folded, variables, x)
    assert module == folded.clone(standardize=True)
    np.testing.assert_allclose(call(module, own, x), call(folded, variables, x), rtol=1e-4, atol=1e-4)


def test_rows_of_the_older_block_select_nothing(served):
    images, later = traffic(256, 1), traffic(128, 2)
    mixed = np.concatenate([later, images[:100]])
    found = refit_caches(served, images, mixed, config=CONFIG)
    assert not np.isin(found.select_rows, found.fit_rows).any()
    assert len(found.select_rows) == 128
    with pytest.raises(InputError, match="older block has not"):
        refit_caches(served, images, images, config=CONFIG)
    with pytest.raises(InputError, match="images"):
        refit_caches(served, images[:20], later, config=CONFIG)


def test_a_refit_pauses_and_can_be_ended(served):
    calls = 0

    class Enough(Exception):  # noqa: N818
        pass

    def pause() -> None:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise Enough

    with pytest.raises(Enough):
        refit_caches(served, traffic(256, 1), traffic(128, 2), config=CONFIG, pause=pause)


def test_from_traffic_to_a_bundle(served, refitted, tmp_path):
    later = traffic(256, 2)
    plan = replan(served, refitted, later, epsilon=0.2, config=CONFIG)
    assert plan.names == served.plan.names
    trial = Trial(refitted.items, plan, version=1, after=0, config=TrialConfig(epsilon=0.3, gap=0, enough=0.5))
    with pytest.raises(InputError, match="certified"):
        updated(served, trial)
    images = traffic(3000, 9)
    assert examine(served, trial, np.arange(1, 3001), images) == "certified"
    bundle = updated(served, trial, created="now")
    thresholds = plan.thresholds(trial.step)
    table = gati_jax.replay(served.chain, refitted.items, images[: bundle.certificate.n])
    wrong = planning.replay_plan(table, thresholds).disagrees
    assert bundle.certificate.disagreements == int(wrong.sum()), "counted again by replay"
    kept = Versions(tmp_path, chain=served.chain)
    kept.save(bundle)
    loaded = kept.load_current().bundle
    assert loaded.certificate == bundle.certificate
    outputs = [predict_batch(cascade_of(one), images[:50]) for one in (bundle, loaded)]
    np.testing.assert_array_equal(outputs[0].exit, outputs[1].exit)
    np.testing.assert_array_equal(outputs[0].class_index, gati_jax.infer_batch(bundle, images[:50]).class_index)


def test_new_versions_run_by_the_old_programs(served, refitted):
    images = traffic(4, 0)
    cascade = cascade_of(served)
    predict_batch(cascade, images)
    new = dataclasses.replace(cascade, caches=refitted.items, thresholds=cascade.thresholds - 1)
    programs = vars(drivers)["_predict_batch"]._cache_size()
    jax.block_until_ready(predict_batch(new, images))
    assert vars(drivers)["_predict_batch"]._cache_size() == programs


# --- Evidence ---------------------------------------------------------------------------------------------------------

DEPTH = 3
QUIET = ControllerConfig(
    monitor=MonitorConfig(epsilon=world.EPSILON, drift=False), exact=None, nearest=None, cost_guard=None
)
TRIAL = TrialConfig(epsilon=world.EPSILON, gap=10)


def two_caches() -> Bundle:
    """The world's bundle with its cache twice: blocks change nothing, so it serves at site 2 as well as at 1."""
    bundle = world.bundle()
    (first,) = bundle.caches
    second = dataclasses.replace(first, name="full@2", site=2)
    t = float(bundle.plan.path[bundle.certificate.step, 0])
    path = np.array([[np.inf, np.inf], [np.inf, t], [t, t]], np.float32)
    plan = Plan(
        names=(first.name, second.name), sites=(1, 2), depth=DEPTH, path=path, disagreement=np.zeros(3),
        mean_ms=np.array([10.0, 6.0, 3.0]), n=2, rows=np.array([7, 8], np.uint64),
    )  # fmt: skip
    certificate = dataclasses.replace(bundle.certificate, step=2, plan_hash=plan.hash)
    (costs,) = bundle.costs
    costs = dataclasses.replace(costs, lookup_ms=dict.fromkeys(plan.names, 0.01))
    return dataclasses.replace(bundle, caches=(first, second), plan=plan, certificate=certificate, costs=(costs,))


def beside(bundle, folder, *, recent=20_000, trial=TRIAL, **config):
    """Return a controller whose site 1 an alarm has closed, and a recovery that has begun a trial."""
    controller = AdaptationController(
        bundle, dataclasses.replace(QUIET, request_log=RequestLogConfig(recent=recent)), level=lambda: 0.01
    )
    recovery = Recovery(bundle, controller, Versions(folder), RecoveryConfig(trial=trial, **config))
    controller.on_alarm(Alarm((1,), 100.0, 1))
    assert recovery.work()
    return controller, recovery


def test_an_alarm_ends_the_trial_under_way(tmp_path):
    """Site 1 is closed, its trial takes good traffic; then site 2 raises an alarm: what opens must come after it."""
    controller, recovery = beside(two_caches(), tmp_path, refit=False)
    for image in world.images(1000, 50):
        controller.request_log.add(image)
    controller.on_alarm(Alarm((2,), 100.0, 2))
    assert controller.closed_at == 1000
    while recovery.work():
        pass
    assert not np.isfinite(controller.served.thresholds).any(), "not one request has come since the alarm"


def test_a_trial_number_is_given_once_whatever_is_saved_meanwhile(tmp_path, monkeypatch):
    """A save takes seconds in the background; a trial of the nearest cache begins in the thread that serves."""
    kept, given = Versions(tmp_path, chain=world.bundle().chain), []
    save = versions.save_bundle

    def slow(*args, **kwargs):
        given.append(kept.next_trial())
        return save(*args, **kwargs)

    monkeypatch.setattr(versions, "save_bundle", slow)
    given.append(kept.next_trial())
    kept.save(world.bundle())
    given.append(kept.next_trial())
    assert len(set(given)) == 3, f"each spends a part of delta of its own, got {given}"


def test_recovery_outlives_traffic_that_overtakes_it(tmp_path, monkeypatch):
    """The log is full and the cursor at its end; a request comes between a look at the log and the copy."""
    controller, recovery = beside(world.bundle(), tmp_path, recent=256, refit=False)
    images, log = world.images(1000, 51), controller.request_log
    assert not recovery.work(), "it waits for requests"
    for image in images:
        log.add(image)
    kept = log.kept

    def late(start, stop):
        log.add(images[0])  # from the thread that serves
        return kept(start, stop)

    monkeypatch.setattr(log, "kept", late)
    assert recovery.work()


def test_a_refit_whose_rows_are_overwritten_fails_and_recovery_goes_on(tmp_path, monkeypatch):
    update = UpdateConfig(fit=FitConfig(epochs=1, batch=16), least=16)
    trial = TrialConfig(epsilon=0.05, gap=0, most=1)
    controller, recovery = beside(
        world.bundle(), tmp_path, recent=120, trial=trial, piece=8, update=update, fit_rows=60, select_rows=30
    )
    log, bright = controller.request_log, world.images(200, 52, bright=True)
    assert not recovery.work(), "it waits for requests"
    for image in bright:
        log.add(image)
    recovery.work()
    assert controller.event_counts["inconclusive"] == 1
    kept = log.kept
    monkeypatch.setattr(log, "kept", lambda *block: [log.add(image) for image in bright] and kept(*block))
    assert recovery.work()
    assert [event.kind for event in controller.events][-1] == "refit"
    assert "failed: block" in controller.events[-1].text
    assert recovery.work()
    assert controller.events[-1].kind == "trial", "of the certified plan, once more"


@pytest.mark.parametrize(
    ("capacity", "rows"),
    [(20_000, (2000, 1000)), (4134, (2000, 1000)), (3566, (1716, 858)), (1158, (512, 256)), (1157, None), (1, None)],
)
def test_a_refit_uses_what_the_log_has_room_for(tmp_path, caplog, capacity, rows):
    """A quarter is left for what comes meanwhile; both blocks need 256 rows, and 100 are left out between them."""
    config = RecoveryConfig(trial=TrialConfig(epsilon=world.EPSILON))
    assert config.rows_within(capacity) == rows
    controller = AdaptationController(
        world.bundle(), dataclasses.replace(QUIET, request_log=RequestLogConfig(recent=capacity)), level=lambda: 0.01
    )
    assert Recovery(world.bundle(), controller, Versions(tmp_path), config).rows == rows
    said = [record.getMessage() for record in caplog.records if "--adapt-without refit" in record.getMessage()]
    assert len(said) == (rows is None)


def test_without_room_for_a_refit_the_certified_plan_is_tried_again_and_again(tmp_path):
    trial = TrialConfig(epsilon=world.EPSILON, gap=0, most=8)
    controller, recovery = beside(world.bundle(), tmp_path, recent=4, trial=trial)
    for image in world.images(40, 53):
        for _ in range(4):
            controller.request_log.add(image)
        recovery.work()
    assert controller.event_counts["trial"] >= 3
    assert controller.event_counts["refit"] == 0
