"""What may open caches and points, and what may not; and other promises that were once broken."""

import dataclasses
import lzma
import math
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import adapted
from gati_jax import FitConfig, InputError
from gati_jax.adaptation import (
    POINTS,
    REPEATED,
    AdaptationController,
    Alarm,
    ControllerConfig,
    CostGuardConfig,
    ExactCacheConfig,
    Mechanisms,
    MonitorConfig,
    NearestCacheConfig,
    NearestTrialConfig,
    Recovery,
    RecoveryConfig,
    RequestLogConfig,
    Served,
    TrialConfig,
    UpdateConfig,
    load_trace,
    save_trace,
    simulate,
)
from gati_jax.adaptation import recovery as background_module
from gati_jax.adaptation.trials import NearestTrial, Seen
from gati_jax.bundle import Versions
from gati_jax.bundle import versions as versions_module
from gati_jax.planning import Plan
from tests.adaptation import world
from train import adapt

DEPTH = 3
QUIET = ControllerConfig(
    monitor=MonitorConfig(epsilon=world.EPSILON, stir=False), repeats=None, points=None, thrift=None
)
IMAGE = np.zeros(world.SHAPE, np.uint8)


def state(keeper) -> str:
    """How the trial of the points stands; a call, for it changes."""
    return keeper.trial.state


def logits(class_index, margin=1.0):
    return margin * np.eye(2, dtype=np.float32)[class_index]


def two_caches():
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


# --- Recovery and keeper ------------------------------------------------------------------------------------------


def test_an_alarm_ends_the_trial_that_is_under_way(tmp_path):
    """Site 1 is closed; a trial of the home plan hears good traffic; then site 2 raises an alarm.

    What opens caches again must have come after the last alarm.
    """
    bundle = two_caches()
    keeper = AdaptationController(bundle, QUIET, level=lambda: 0.01)
    config = RecoveryConfig(trial=TrialConfig(epsilon=world.EPSILON, gap=10), refit=False)
    beside = Recovery(bundle, keeper, Versions(tmp_path), config)
    keeper._alarm(Alarm((1,), 100.0, 0, 1))
    assert beside.work()
    for image in world.images(1000, 50):
        keeper.window.add(image)
    keeper._alarm(Alarm((2,), 100.0, 0, 2))
    second = keeper.closed_at
    assert second == 1000
    while beside.work():
        pass
    assert not np.isfinite(keeper.served.thresholds).any(), "not one request has come since the alarm"


def test_an_alarm_while_caches_rest_opens_none():
    keeper = AdaptationController(two_caches(), QUIET, level=lambda: 0.01)
    awake = keeper.served
    keeper._resting = awake, 10_000
    keeper.served = Served(awake.caches, np.full_like(awake.thresholds, np.inf))
    keeper._alarm(Alarm((1,), 100.0, 0, 1))
    assert not np.isfinite(keeper.served.thresholds).any()


def test_lost_shadows_are_no_agreement():
    """Points that are always wrong; the base's answer behind every hit is lost: nothing may be certified by that."""
    trial = NearestTrialConfig(known=60, every=20, most=1500)
    config = dataclasses.replace(QUIET, points=NearestCacheConfig(cells=4), points_trial=trial)
    one = AdaptationController(world.bundle(), config, level=lambda: 0.05)
    for number in range(3000):
        ticket = one.ask(IMAGE, float(number))
        trying = state(one) != "watching"
        if ticket.early is not None:
            look = one.early(ticket)
        else:
            look = one.answered(ticket, 1 if trying else DEPTH, 2.0, logits(int(trying)), 0.0)
        if look:
            one.lost(ticket)
        if state(one) == "open":
            break
    assert state(one) != "open", "not one answer of the base was heard during the trial"


def nearest_to(value, values, classes):
    """Return the score and the class of the nearest point."""
    if not len(values):
        return -math.inf, -1
    nearest = int(np.argmin(np.abs(values - value)))
    apart = abs(values[nearest] - value)
    return (math.log(10 / (apart + 0.01)) if apart <= 12 else -math.inf), int(classes[nearest])


def served_by_points(seed, n=15_000):
    """A scene that drifts, with a jolt now and then, under a base whose answer turns every 40 grey levels.

    The very same traffic throughout. The base answers whatever points do not; what it answers becomes a point. Returns
    the share that the trial saw disagree, and what the service then does.
    """
    random, trial, j = np.random.default_rng(seed), NearestTrial(0.01), 0
    values, classes = np.zeros(0), np.zeros(0, int)
    value, way, wrong = 0.0, 1, []
    on_trial = 0.0
    for number in range(n):
        value += way * (4.0 if random.random() < 0.02 else 0.05)
        if not 0 < value < 230:
            way, value = -way, min(max(value, 0.0), 230.0)
        base = int(value // 40) % 2
        score, said = nearest_to(value, values, classes)
        if trial.state == "open":
            hit = score >= trial.threshold
            wrong.append(hit and said != base)
            if hit:
                continue
        if trial.would_miss(score):  # as ``AdaptationController`` stores them
            values, classes = np.append(values, value)[-2000:], np.append(classes, base)[-2000:]
        if trial.state == "open":
            continue
        trial.add(number, Seen(score, said != base, False, 1.0, True))
        if trial.state == "empirical":
            trial.watch_again()
        elif trial.state == "watching" and trial.wants_trial:
            j += 1
            trial.begin(0.05 * 6 / (math.pi * j) ** 2, number)
        elif str(trial.state) == "open":
            on_trial = trial._certifier.losses[trial._certifier.certified] / trial.n
    return on_trial, float(np.mean(wrong)) if wrong else 0.0


def test_points_that_open_serve_as_they_did_on_trial():
    """On trial the base answers everything; were it all stored, the nearest point would be the frame before.

    Once points answer, nothing new is stored until they miss: they answer from farther and farther away.
    """
    found = [served_by_points(seed) for seed in range(3)]
    assert np.mean([service for _, service in found]) <= 0.01, found


def test_two_trials_at_once_do_not_add_up_their_risks():
    """What each trial certifies, it certifies with the other closed; two risks of 0.8 epsilon would make 1.6."""
    trial = NearestTrialConfig(known=60, every=20, most=4000)
    config = dataclasses.replace(QUIET, points=NearestCacheConfig(cells=4), points_trial=trial)
    one = AdaptationController(world.bundle(), config, level=lambda: 0.05)
    home = one.served
    one._alarm(Alarm((1,), 100.0, 0, 1))
    one.trial.state, one.trial._proposed = "watching", 0.0
    one.trial.begin(0.05, one._numbers - 1)
    one.monitor.look_closely(at_all=True)
    number = 0
    while state(one) == "trial" and number < 1500:  # with the base behind the points
        ticket = one.ask(IMAGE, 0.0)
        one.answered(ticket, DEPTH, math.inf, logits(0), 0.0)
        number += 1
        if number == 60:  # the background's trial, which heard no points, succeeds meanwhile
            one.adopt(home, "certified with points closed")
    opened_together = state(one) == "open" and np.isfinite(one.served.thresholds).any()
    heard_together = number - 60
    needed = math.log(1 / 0.05) / -math.log(1 - world.EPSILON)
    assert not opened_together or heard_together >= needed, (number, needed)


def test_metrics_count_no_repeat_as_looked_at():
    one = AdaptationController(
        world.bundle(), dataclasses.replace(QUIET, repeats=ExactCacheConfig()), level=lambda: 0.01
    )
    ticket = one.ask(IMAGE, 0.0)
    one.answered(ticket, DEPTH, math.inf, logits(0), 0.0)
    for _ in range(10):
        assert not one.early(one.ask(IMAGE, 0.0)), "the base is not asked"
    assert REPEATED not in one.monitor.report.shadows


def test_a_trial_number_is_given_once_whatever_is_saved_meanwhile(tmp_path, monkeypatch):
    """A save takes seconds in the background; a trial of points begins in the thread that serves."""
    versions, given = Versions(tmp_path, chain=world.bundle().chain), []
    save = versions_module.save_bundle

    def slow(*args, **kwargs):
        given.append(versions.next_trial())
        return save(*args, **kwargs)

    monkeypatch.setattr(versions_module, "save_bundle", slow)
    given.append(versions.next_trial())
    versions.save(world.bundle())
    given.append(versions.next_trial())
    assert len(set(given)) == 3, f"each spends a part of delta of its own, got {given}"


def test_a_background_that_lags_outlives_traffic_that_goes_on(tmp_path, monkeypatch):
    """The window is full and the cursor at its end; a request comes between two of the background's looks."""
    config = dataclasses.replace(QUIET, window=RequestLogConfig(recent=256, old=0))
    keeper = AdaptationController(world.bundle(), config, level=lambda: 0.01)
    trial = TrialConfig(epsilon=world.EPSILON, gap=10)
    beside = Recovery(world.bundle(), keeper, Versions(tmp_path), RecoveryConfig(trial=trial, refit=False))
    keeper._alarm(Alarm((1,), 100.0, 0, 1))
    assert beside.work()
    images = world.images(1000, 51)
    for image in images:
        keeper.window.add(image)
    recent = keeper.window.recent

    def late(start, stop):
        keeper.window.add(images[0])  # from the thread that serves
        return recent(start, stop)

    monkeypatch.setattr(keeper.window, "recent", late)
    beside.work()


def test_a_window_too_small_to_refit_from_is_refused(tmp_path):
    """Else, after the first empirical trial, nothing is ever tried again."""
    config = dataclasses.replace(QUIET, window=RequestLogConfig(recent=1000))
    keeper = AdaptationController(world.bundle(), config, level=lambda: 0.01)
    with pytest.raises(InputError):
        Recovery(
            world.bundle(),
            keeper,
            Versions(tmp_path),
            RecoveryConfig(trial=TrialConfig(epsilon=world.EPSILON), fit_rows=2000, select_rows=1000),
        )


# --- Cost ----------------------------------------------------------------------------------------------------------


def test_points_that_just_fail_leave_most_of_the_traffic_in_peace():
    """Near repeats that disagree at 1.2 epsilon: trials ask the base about everything, so they must get rarer."""
    random, trial, on_trial, n, j = np.random.default_rng(0), NearestTrial(0.01), 0, 25_000, 0
    for number in range(n):
        on_trial += trial.state == "trial"
        wrong = bool(random.random() < 0.012)
        trial.add(number, Seen(3.0, wrong, False, 1.0, True))
        if trial.state == "empirical":
            trial.watch_again()
        elif trial.state == "open":
            trial.close()
        elif trial.wants_trial:
            j += 1
            trial.begin(0.05 * 6 / (math.pi * j) ** 2, number)
    assert on_trial < n / 2, f"{on_trial / n:.0%} of requests were looked at, in {j} trials"


# --- Simulation -----------------------------------------------------------------------------------------------------


def test_what_comes_while_heads_are_refitted_is_not_heard_by_their_trial(tmp_path, monkeypatch):
    """A refit that takes 20 s of trace time at 100 requests a second: its trial begins 2,000 requests later."""
    module = sys.modules["gati_jax.adaptation.simulate"]
    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now, thread_time=lambda: 0.0)
    monkeypatch.setattr(module, "time", fake)
    refit = background_module.refit_caches

    def slow(*args, **kwargs):
        clock.now += 20.0
        return refit(*args, **kwargs)

    monkeypatch.setattr(background_module, "refit_caches", slow)
    config = RecoveryConfig(
        trial=TrialConfig(epsilon=world.EPSILON, most=3000, gap=10),
        update=UpdateConfig(fit=FitConfig(epochs=60, batch=64, learning_rate=0.01), least=128, seconds=1.0),
        fit_rows=1024,
        select_rows=512,
    )
    trace = world.trace(("dim", 1000), ("bright", 9000))
    found = simulate(world.bundle(), trace, Mechanisms(keeper=QUIET, background=config, share=1.0), folder=tmp_path)
    refitted = next(event.number for event in found.events if event.kind == "refit")
    swap = next(event for event in found.events if event.kind == "swap" and event.number > refitted)
    heard = int(swap.text.split(" after ")[1].split()[0])
    assert swap.number - heard >= refitted + 2000, (refitted, swap.number, heard)


def test_the_same_again_in_the_same_folder_gives_the_same(tmp_path):
    trace = world.trace(("dim", 1000), ("bright", 1000), ("dim again", 2500))
    config = RecoveryConfig(trial=TrialConfig(epsilon=world.EPSILON, most=3000, gap=10), refit=False)
    runs = [
        simulate(world.bundle(), trace, Mechanisms(keeper=QUIET, background=config, share=1.0), folder=tmp_path)
        for _ in range(2)
    ]
    first, second = ([e.text for e in run.events if e.kind in ("trial", "swap")] for run in runs)
    assert first[0] == second[0], "trials are counted from 1 again; when they end is a matter of measured seconds"


def test_who_rests_is_woken_though_points_have_opened():
    """Caches rest, points open meanwhile: somebody has to try the caches again."""
    config = dataclasses.replace(
        QUIET, points=NearestCacheConfig(cells=4), thrift=CostGuardConfig(requests=50, rest=100, longest=100)
    )
    one = AdaptationController(world.bundle(), config, level=lambda: 0.05)
    one._resting = one.served, 100
    one.served = Served(one.served.caches, np.full_like(one.served.thresholds, np.inf))
    one.trial.state, one.trial.threshold, one.front.threshold = "open", 50.0, 50.0
    for image in world.images(5000, 60):
        ticket = one.ask(image, 0.0)
        one.answered(ticket, DEPTH, math.inf, logits(0), 0.0)
    assert one.closed_at is not None or np.isfinite(one.served.thresholds).any()


def test_versions_of_the_last_row_are_kept_whatever_is_left_out(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(adapt, "simulate", lambda *_, folder, **__: folders.append(folder))
    arguments = adapt.parser().parse_args(
        ["--bundle", "b", "--trace", "t", "--out", str(tmp_path), "--without", "repeats"]
    )
    trace = world.trace(("dim", 2))
    for named in adapt.chosen(arguments, 0.01):
        adapt.replayed(world.bundle(), trace, named, folder=tmp_path / "versions", heard=None, quiet=True)  # pyright: ignore[reportArgumentType] (not asked)
    assert folders[-1] == tmp_path / "versions"


def test_measured_time_is_that_of_what_is_served(monkeypatch):
    """While caches rest, the base answers; the benchmark must not go on with the cascade."""
    keeper, asked = AdaptationController(world.bundle(), QUIET, level=lambda: 0.01), []
    off = Served(keeper.served.caches, np.full_like(keeper.served.thresholds, np.inf))
    keeper._resting, keeper.served = (keeper.served, 10_000), off

    def infer(which, _):
        asked.append(which)
        return SimpleNamespace(exit=DEPTH, score=math.inf, logits=logits(0))

    monkeypatch.setattr(adapted.gati_jax, "infer", infer)
    adapted.serve(keeper, "cascade", "base", IMAGE, 0.0)  # pyright: ignore[reportArgumentType] (names)
    assert asked == ["base"]


# --- Traces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_damaged_member_is_refused_however_it_is_packed(tmp_path, method):
    good = tmp_path / "good.npz"
    save_trace(good, world.trace(("dim", 200)))
    bad = tmp_path / "bad.npz"
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(bad, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        at = new.getinfo("images.npy")
        start = at.header_offset + 30 + len(at.filename) + 9
        size = at.compress_size
    content = bytearray(bad.read_bytes())
    errors = []
    for offset in range(0, size - 16, 37):
        spoilt = content.copy()
        spoilt[start + offset : start + offset + 4] = b"\xff\xff\xff\xff"
        bad.write_bytes(spoilt)
        try:
            load_trace(bad)
        except InputError:
            continue
        except (lzma.LZMAError, MemoryError) as error:
            errors.append(error)
    assert not errors, errors[0]


def test_the_points_exit_is_what_the_text_of_an_alarm_names():
    """An alarm says that it closes what was open, and names nothing that is not there."""
    told = []
    one = AdaptationController(world.bundle(), QUIET, level=lambda: 0.01, told=told.append)
    one._alarm(Alarm((POINTS, 0, 1, 2), 100.0, 0, 1))
    text = next(event.text for event in told if event.kind == "alarm")
    assert "points" not in text, "there are none"
    assert "site 0" not in text, "no cache is there"
