"""Trials of plans on made-up requests, against a plain computation; and those of the nearest cache."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gati_jax import InputError
from gati_jax.adaptation import Observation, Trial, TrialConfig, threshold_for
from gati_jax.adaptation.trials import NearestTrial
from gati_jax.bundle.checks import check_plans
from gati_jax.certification import SEQUENTIAL, Certificate, SequentialCertifier, trial_level
from gati_jax.fitting import Outputs
from gati_jax.planning import Plan
from tests.bundle.made import cache

RNG = np.random.default_rng(0)
CACHES = (cache(RNG, "a", 1), cache(RNG, "b", 2))
THRESHOLDS = ([math.inf, math.inf], [math.inf, 3.0], [3.0, 3.0], [1.0, 3.0])


def make_plan(path=THRESHOLDS) -> Plan:
    steps = len(path)
    return Plan(
        names=("a", "b"), sites=(1, 2), depth=3, path=np.array(path, np.float32), disagreement=np.zeros(steps),
        mean_ms=np.linspace(3, 1, steps), n=2, rows=np.array([7, 8], np.uint64),
    )  # fmt: skip


def requests(n: int, wrong: float, seed: int = 0) -> Outputs:
    """The base says 0. Cache b is right on what it is sure of; cache a is wrong on a share of scores from 1 to 3."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0, 4, (2, n)).astype(np.float32)
    bad = (scores[0] >= 1) & (scores[0] < 3) & (rng.random(n) < wrong)
    classes = np.stack([bad, np.zeros(n, bool)]).astype(np.int32)
    return Outputs(np.zeros(n, np.int32), classes, scores, np.zeros((2, n), np.float32))


def part(outputs: Outputs, rows: slice) -> Outputs:
    return Outputs(outputs.answers[rows], outputs.classes[:, rows], outputs.scores[:, rows], outputs.logits[:, rows])


def make_trial(caches=CACHES, path=THRESHOLDS, **config) -> Trial:
    config = {"epsilon": 0.02, "delta": 0.1, "gap": 10, "enough": 1.0, **config}
    return Trial(caches, make_plan(path), version=2, after=99, config=TrialConfig(**config))


def add(trial: Trial, orders, outputs: Outputs, rows=None):
    orders = np.asarray(orders)
    return trial.add(orders, np.arange(len(orders), dtype=np.uint64) if rows is None else rows, outputs)


def test_it_walks_as_far_as_a_plain_loop_does():
    outputs, trial = requests(3000, wrong=0.3), make_trial(most=3000)
    add(trial, range(110, 3110), outputs)
    assert trial.n == 3000, "the loose step disagrees on 15 %: undecided to the end"
    plain = SequentialCertifier(3, 0.02, trial_level(0.1, 2))
    for i in range(3000):
        a, wrong = outputs.scores[0, i], bool(outputs.classes[0, i])
        plain.add(np.array([False, wrong and a >= 3, wrong and a >= 1]))
    assert trial.step == plain.certified + 1 == 2
    assert trial.verdict == "certified"


def test_the_certificate_is_one_of_the_plan_and_of_these_rows():
    outputs, rows = requests(900, wrong=0.0), np.arange(900, dtype=np.uint64) // 2
    trial, parts = make_trial(), make_trial()
    add(trial, range(110, 1010), outputs, rows)
    assert trial.n < 900, "it stops when enough is certified"
    certificate = trial.certificate("1%")
    check_plans(((trial.plan, certificate),))
    assert (certificate.method, certificate.version, certificate.name) == (SEQUENTIAL, 2, "1%")
    assert (certificate.disagreements, certificate.repeated) == (0, certificate.n // 2)
    # log(1 / level) / log(1 / (1 - epsilon)) requests that agree are the least that can do.
    assert certificate.n >= math.log(certificate.level) / math.log(1 - 0.02)
    for start in range(0, 900, 7):
        here = slice(start, start + 7)
        add(parts, range(110, 1010)[here], part(outputs, here), rows[here])
    assert parts.certificate("1%") == certificate, "parts give what the whole gives"


def test_the_gap_is_left_out():
    outputs, trial = requests(50, wrong=1.0), make_trial()
    add(trial, range(100, 150), outputs)
    assert trial.n == 40
    for orders in ([149], [151, 150]):
        with pytest.raises(InputError, match="rising numbers behind 149"):
            add(trial, orders, part(outputs, slice(len(orders))))


def test_what_is_not_certified_opens_nothing():
    trial = make_trial(most=150)
    assert add(trial, range(200, 400), requests(200, wrong=0.0)) == "inconclusive"
    certificate = trial.certificate()
    assert (certificate.step, certificate.certified, certificate.n) == (-1, False, 150)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 0},
        {"looks": 2},
        {"plans": 2},
        {"p_value": 0.02},  # above 6 * 0.1 / (2 pi)^2 = 0.0152
        {"n": 200, "p_value": 0.01},  # 0.98^197 = 0.0187: no capital grows so far
        {"method": "fixed-sequence testing, exact binomial"},
    ],
)
def test_a_sequential_certificate_that_cannot_be_is_refused(changes):
    fields = {"epsilon": 0.02, "delta": 0.1, "step": 1, "n": 1000, "disagreements": 3, "p_value": 0.01}
    fields |= {"method": SEQUENTIAL, "version": 2, "plan_hash": "x", "data_fingerprint": "y"}
    assert Certificate(**fields).certified
    with pytest.raises(InputError):
        Certificate(**fields | changes)


def test_a_path_of_the_base_alone_has_no_trial():
    with pytest.raises(InputError, match="steps"):
        make_trial(path=THRESHOLDS[:1])
    with pytest.raises(InputError, match="caches"):
        make_trial(CACHES[:1])


# --- The nearest cache ------------------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.sampled_from([1.0, 1.0, 5.0])), max_size=40),
    risk=st.sampled_from([0.01, 0.1, 0.3]),
)
def test_the_lowest_threshold_within_the_risk(rows, risk):
    scores, wrong, weights = (np.array([row[i] for row in rows], kind) for i, kind in enumerate((float, bool, float)))

    def share(threshold):
        hits = scores >= threshold
        return ((weights * wrong)[hits].sum() + weights.max()) / (weights.sum() + weights.max())

    allowed = [threshold for threshold in set(scores) if share(threshold) <= risk]
    lower = [t for t in allowed if all(share(above) <= risk for above in set(scores) if above >= t)]
    assert threshold_for(scores, wrong, weights, risk=risk) == min(lower, default=np.inf)


def observe(trial, number, nearest_class, score, base, levels):
    """Do what the controller does after every request, here one of the base; ``levels`` are those of trials to come."""
    if trial.add(number, nearest_class, score, Observation(3, math.inf, base, 1.0, base)) == "inconclusive":
        trial.watch_again()
    else:
        trial.begin(lambda: next(levels), number)


def fresh():
    """Return a new trial, and the levels of all to come."""
    return NearestTrial(0.01), (trial_level(0.05, number) for number in itertools.count(1))


def served_by_nearest(seed, n=8000):
    """A scene that drifts, with a jolt now and then, under a base whose answer turns every 40 grey levels.

    The very same traffic throughout. The base answers whatever the cache does not, and what it answers may become an
    entry, as the controller stores them. Returns how often the service is wrong once the cache has opened.
    """
    random, (trial, levels) = np.random.default_rng(seed), fresh()
    values, classes, stored = np.zeros(2000), np.zeros(2000, int), 0
    value, way, wrong = 0.0, 1, []
    for number in range(n):
        value += way * (4.0 if random.random() < 0.02 else 0.05)
        if not 0 < value < 230:
            value, way = min(max(value, 0.0), 230.0), -way
        base = int(value // 40) % 2
        score, answer = -math.inf, -1
        if size := min(stored, 2000):
            nearest = int(np.argmin(np.abs(values[:size] - value)))
            apart = abs(values[nearest] - value)
            answer = int(classes[nearest])
            score = math.log(10 / (apart + 0.01)) if apart <= 12 else -math.inf
        if trial.state == "open":
            hit = score >= trial.threshold
            wrong.append(hit and answer != base)
            if hit:
                continue
        if trial.would_miss(score):
            values[stored % 2000], classes[stored % 2000], stored = value, base, stored + 1
        if trial.state != "open":
            observe(trial, number, answer, score, base, levels)
    return float(np.mean(wrong)) if wrong else None


def test_the_nearest_cache_serves_as_it_did_on_trial():
    """On trial the base answers everything; were it all stored, the nearest entry would be the frame before.

    In service nothing new is stored until the cache misses, so it answers from farther and farther away.
    """
    found = [served_by_nearest(seed) for seed in range(3)]
    opened = [share for share in found if share is not None]
    assert opened, "at least one opens"
    assert np.mean(opened) <= 0.01, found


def test_a_cache_that_just_fails_is_tried_ever_more_rarely():
    """Near repeats that disagree at 1.2 epsilon: a trial shadows every request, so trials must get rarer."""
    random, (trial, levels), on_trial, n = np.random.default_rng(0), fresh(), 0, 25_000
    for number in range(n):
        on_trial += trial.state == "trial"
        observe(trial, number, int(random.random() < 0.012), 3.0, 0, levels)
        if trial.state == "open":
            trial.close()
    assert 0 < on_trial < n / 2, f"{on_trial / n:.0%} of requests were shadowed"
