"""The whole of adaptation on traces whose truth is known: closing, coming back, refitting, repeats."""

import dataclasses
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import adapted
from gati_jax import FitConfig, InputError
from gati_jax.adaptation import (
    EXACT,
    NEAREST,
    AdaptationController,
    ControllerConfig,
    CostGuardConfig,
    ExactCacheConfig,
    Mechanisms,
    MonitorConfig,
    NearestCacheConfig,
    NearestTrialConfig,
    RecoveryConfig,
    Trace,
    TrialConfig,
    UpdateConfig,
    recovery,
    simulate,
)
from gati_jax.bundle import Versions
from gati_jax.certification import SEQUENTIAL
from tests.adaptation import world
from train import adapt

QUIET = ControllerConfig(monitor=MonitorConfig(epsilon=world.EPSILON, drift=False), exact=None, nearest=None)
RECOVERY = RecoveryConfig(
    trial=TrialConfig(epsilon=world.EPSILON, most=3000, gap=10),
    update=UpdateConfig(fit=FitConfig(epochs=60, batch=64, learning_rate=0.01), least=128, seconds=1.0),
    fit_rows=1024,
    select_rows=512,
)


def kinds(replayed):
    return [event.kind for event in replayed.events]


def first(replayed, kind, after=-1):
    return next(event for event in replayed.events if event.kind == kind and event.number > after)


def replay(folder, trace, *, bundle=None, controller: ControllerConfig | None = QUIET, **mechanisms):
    chosen = Mechanisms(controller=controller, **mechanisms)
    return simulate(bundle or world.bundle(), trace, chosen, folder=folder)


def test_without_a_controller_the_caches_answer_as_they_are(tmp_path):
    trace = world.trace(("dim", 2000), ("bright", 500))
    found = replay(tmp_path, trace, controller=None)
    assert not found.events
    assert not found.shadow.any()
    assert found.wrong[:2000].mean() < world.EPSILON < found.wrong[2000:].mean()
    assert found.ms[:2000].mean() < found.full_ms / 1.5


def test_a_drift_closes_the_caches_and_its_end_opens_them_again(tmp_path):
    trace = world.trace(("dim", 3000), ("bright", 1500), ("dim again", 6000))
    found = replay(tmp_path, trace, recovery=dataclasses.replace(RECOVERY, refit=False), share=1.0)
    alarm, swap = first(found, "alarm").number, first(found, "swap").number
    assert 3000 < alarm < 3500
    assert swap > 4500, "nothing is certified in bright light"
    assert not found.wrong[alarm:swap].any(), "safe mode is the base"
    assert (found.exit[alarm:swap] == 3).all()
    saved = 1 - found.ms / found.full_ms
    assert saved[swap + 1000 :].mean() > 0.7 * saved[:3000].mean()
    after = np.convolve(found.wrong[alarm:], np.ones(1000), "valid")
    assert after.max() < 2 * world.EPSILON * 1000
    loaded = Versions(tmp_path, chain=world.bundle().chain).load_current().bundle
    assert loaded.certificate.certified
    assert loaded.certificate.method == SEQUENTIAL


def test_where_the_drift_stays_refitted_heads_take_over(tmp_path):
    trace = world.trace(("dim", 1000), ("bright", 12_000))
    found = replay(tmp_path, trace, recovery=RECOVERY, share=1.0)
    behind = kinds(found)[kinds(found).index("refit") :]
    assert behind[:3] == ["refit", "trial", "swap"]
    swap = first(found, "swap").number
    assert found.wrong[swap:].mean() < world.EPSILON
    assert found.ms[swap:].mean() < found.full_ms / 1.3


def test_recovery_without_a_share_of_the_time_is_slow(tmp_path):
    trace = world.trace(("dim", 1000), ("bright", 1000), ("dim again", 1500), rate=10_000.0)
    assert "swap" not in kinds(replay(tmp_path, trace, recovery=RECOVERY, share=1e-6))


def popular(n: int, items: int = 50) -> Trace:
    random = np.random.default_rng(0)
    return Trace(
        item=random.integers(0, items, n).astype(np.int32), seconds=np.arange(n) / 100.0, images=world.images(items, 7)
    )


def test_exact_repeats_are_the_bases_own_answers(tmp_path):
    controller = dataclasses.replace(QUIET, exact=ExactCacheConfig(often=2))
    found = replay(tmp_path, popular(2000), controller=controller)
    repeated = found.exit == EXACT
    assert repeated.sum() > 2000 - 3 * 50
    assert not found.wrong[repeated].any()
    # In hindsight: the base answers each item once, at its second asking or, after a miss, at its first.
    assert (found.exit == 3).sum() <= 50


def near_repeats(n: int) -> Trace:
    """Ten scenes of clear contrast, each a little different every time: no exact repeats."""
    random = np.random.default_rng(1)
    scenes = world.images(10, 8).astype(int) // 3
    scenes[:5, :, :2] += 80
    scenes[5:, :, 2:] += 80
    item = np.arange(n, dtype=np.int32)
    flicker = random.integers(-1, 2, (n, *world.SHAPE))
    images = np.clip(scenes[item % 10] + flicker, 0, 255).astype(np.uint8)
    return Trace(item=item, seconds=item / 100.0, images=images)


def test_the_nearest_cache_opens_after_a_trial_and_answers_near_repeats(tmp_path):
    trial = NearestTrialConfig(known=60, every=20, most=1500)
    controller = dataclasses.replace(QUIET, nearest=NearestCacheConfig(cells=4, capacity=50), nearest_trial=trial)
    found = replay(tmp_path, near_repeats(4000), controller=controller)
    assert kinds(found)[:2] == ["trial", "opened"]
    opened = first(found, "opened").number
    assert not (found.exit[:opened] == NEAREST).any()
    assert (found.exit[opened:] == NEAREST).mean() > 0.5
    assert found.wrong[opened:].mean() < world.EPSILON


def test_the_same_trace_and_seed_give_the_same(tmp_path):
    trace = world.trace(("dim", 600), ("bright", 300))
    monitor = MonitorConfig(epsilon=world.EPSILON, quiet_q=0.3, drift=False)
    controller = dataclasses.replace(QUIET, monitor=monitor, seed=3)
    one, other = (replay(tmp_path / name, trace, controller=controller) for name in "ab")
    for column in ("exit", "wrong", "shadow"):
        np.testing.assert_array_equal(getattr(one, column), getattr(other, column))
    assert one.shadow.any()


def test_a_trace_of_rows_alone_is_refused(tmp_path):
    trace = Trace(item=np.zeros(3, np.int32), seconds=np.zeros(3))
    with pytest.raises(InputError, match="trace: expected one with images"):
        replay(tmp_path, trace)


def test_caches_that_save_no_time_are_paused_and_resumed(tmp_path):
    """Lookups twice as dear as the whole base: however many hit, requests are better off without."""
    controller = dataclasses.replace(QUIET, cost_guard=CostGuardConfig(requests=50, pause=400))
    found = replay(tmp_path, world.trace(("dim", 2000)), bundle=world.dear(), controller=controller)
    assert kinds(found) == ["paused", "resumed", "paused", "resumed", "paused"]
    begins, ends, again, later, _ = (event.number for event in found.events)
    assert (ends - begins, later - again) == (400, 800), "each pause in a row is twice as long"
    assert (found.exit[begins:ends] == 3).all()
    np.testing.assert_allclose(found.ms[begins:ends], found.full_ms + found.controller_ms)
    assert (found.exit[ends:again] < 3).any()


def test_a_trial_of_refitted_heads_leaves_out_what_came_during_the_refit(tmp_path, monkeypatch):
    """A refit that takes 20 s of trace time at 100 requests a second: its trial begins 2,000 requests later."""
    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now, thread_time=lambda: 0.0)
    monkeypatch.setattr(sys.modules["gati_jax.adaptation.simulate"], "time", fake)
    refit = recovery.refit_caches

    def slow(*args, **kwargs):
        clock.now += 20.0
        return refit(*args, **kwargs)

    monkeypatch.setattr(recovery, "refit_caches", slow)
    trace = world.trace(("dim", 500), ("bright", 6500))
    found = replay(tmp_path, trace, recovery=RECOVERY, share=1.0)
    refitted = first(found, "refit").number
    swap = first(found, "swap", after=refitted)
    taken = int(swap.text.split(" after ")[1].split()[0])
    assert swap.number - taken >= refitted + 2000, (refitted, swap.number, taken)


def test_a_simulation_in_the_same_folder_starts_anew(tmp_path):
    trace = world.trace(("dim", 500), ("bright", 500))
    certified = dataclasses.replace(RECOVERY, refit=False)
    one, other = (first(replay(tmp_path, trace, recovery=certified, share=1.0), "trial") for _ in range(2))
    assert one.text == other.text, "trials are counted from 1 again; when they end is a matter of measured seconds"


def test_measured_time_is_that_of_what_is_served(monkeypatch):
    """While caches are closed or paused, the base answers; the benchmark must not go on with the cascade."""
    asked, monitor = [], MonitorConfig(epsilon=world.EPSILON / 10, drift=False)  # less than what is certified
    controller = AdaptationController(world.bundle(), dataclasses.replace(QUIET, monitor=monitor), level=lambda: 0.01)

    def infer(which, _):
        asked.append(which)
        return SimpleNamespace(exit=3, score=np.inf, logits=np.zeros(2, np.float32))

    monkeypatch.setattr(adapted.gati_jax, "infer", infer)
    adapted.serve(controller, "cascade", "base", np.zeros(world.SHAPE, np.uint8), 0.0)  # pyright: ignore[reportArgumentType] (names)
    assert asked == ["base"]


def test_versions_of_the_last_row_are_kept_whatever_is_left_out(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(adapt, "simulate", lambda *_, folder, **__: folders.append(folder))
    command = ["--bundle", "b", "--trace", "t", "--out", str(tmp_path), "--without", "exact"]
    trace = world.trace(("dim", 2))
    for named in adapt.chosen(adapt.parser().parse_args(command), 0.01):
        adapt.replayed(world.bundle(), trace, named, folder=tmp_path / "versions", replay_cache=None, quiet=True)  # pyright: ignore[reportArgumentType] (not used)
    assert folders[-1] == tmp_path / "versions"
