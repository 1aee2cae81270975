"""The certificate beside MAPIE's: the same step of the same tables, or a farther one; and MAPIE's alarms."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

import gati_jax
from gati_jax.planning import replay_plan
from tests.planning.reference import OFF, make_plan, make_table

pytest.importorskip("mapie", reason="needs MAPIE (the extra test)")

from mapie.exchangeability_testing import RiskMonitoring
from mapie.risk_control import BinaryClassificationController, BinaryRisk, accuracy, control_fwer

from benchmarks.mapie_comparison import mapie_first_alarm, mapie_step

DISAGREES = BinaryRisk(lambda base, given: base != given, lambda base, _: np.ones(len(base), bool), False)
KINDS = {"easy": 0.5, "borderline": 1.5, "hard": 15.0}  # the risk of the last step, over epsilon


def one_cache(rng, n, risk):
    """The scores are 1 to 8, and a further one of them hits at each of eight steps."""
    scores = rng.integers(1, 9, (1, n))
    plan = make_plan([[OFF], *([float(level)] for level in range(8, 0, -1))], depth=2)
    return plan, make_table((rng.random((1, n)) < risk).astype(int), scores, depth=2)


def mapie_p_values(plan, table, epsilon):
    """MAPIE's p-value of every step behind the base; its parameter is the step's number."""
    disagrees = [replay_plan(table, thresholds).disagrees for thresholds in plan.path]
    controller = BinaryClassificationController(
        lambda rows, step: disagrees[step][rows].astype(int),  # pyright: ignore[reportArgumentType] (takes one more)
        DISAGREES,
        epsilon,
        best_predict_param_choice=accuracy,
        list_predict_params=np.arange(1, len(plan.path))[:, None],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no step is certified, or all are
        controller.calibrate(np.arange(len(table)), np.zeros(len(table), int))
    assert controller.p_values is not None
    counts = np.array([wrong.sum() for wrong in disagrees[1:]])
    return controller.p_values[:, 0], counts


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(sorted(KINDS)),
    n=st.integers(1, 3000),
    epsilon=st.floats(0.005, 0.05),
    delta=st.floats(0.01, 0.3),
)
def test_one_cache_goes_as_far_as_in_mapie_or_farther(seed, kind, n, epsilon, delta):
    plan, table = one_cache(np.random.default_rng(seed), n, KINDS[kind] * epsilon)
    ours = gati_jax.certify(plan, table, epsilon, delta, ledger=None).step
    lower = delta * (1 - 1e-9)  # MAPIE takes a confidence, and 1 - delta is rounded
    assert ours >= mapie_step(plan, table, epsilon, lower)
    assert ours >= mapie_step(plan, table, epsilon, lower, agreement=True)
    assert ours >= mapie_step(plan, table, epsilon, lower, method="bonferroni_holm")


def test_mapie_certifies_the_same_step_where_it_rounds_nothing():
    """Of 4,096 rows every share is exact."""
    rng, steps = np.random.default_rng(0), {}
    for kind, worst in KINDS.items():
        for _ in range(10):
            plan, table = one_cache(rng, 4096, worst * 0.02)
            ours = gati_jax.certify(plan, table, 0.02, 0.1, ledger=None).step
            assert ours == mapie_step(plan, table, 0.02, 0.1)
            steps.setdefault(kind, set()).add(ours)
    assert (steps["easy"], steps["hard"]) == ({8}, {-1})
    assert len(steps["borderline"]) > 1


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(50, 2000),
    risk=st.floats(0, 0.2),
    epsilon=st.floats(0.01, 0.15),
    delta=st.floats(0.01, 0.3),
)
def test_paths_of_several_caches_as_far_as_in_mapie_or_farther(seed, n, risk, epsilon, delta):
    """Thresholds in any order, so that the disagreement rises and falls on the way."""
    rng = np.random.default_rng(seed)
    table = make_table((rng.random((3, n)) < risk).astype(int), rng.integers(0, 5, (3, n)))
    plan = make_plan(np.vstack([np.full(3, OFF), rng.integers(0, 7, (8, 3))]))
    p_values, counts = mapie_p_values(plan, table, epsilon)
    exact = binom.cdf(counts, n, epsilon)
    # Hoeffding and Bentkus: for losses of 0 and 1 the binomial, in which a count may be rounded up by one.
    assert (p_values >= exact * (1 - 1e-9)).all()
    assert (p_values <= binom.cdf(counts + 1, n, epsilon) * (1 + 1e-9)).all()
    theirs = control_fwer(p_values, delta * (1 - 1e-9), "fixed_sequence")
    assert gati_jax.certify(plan, table, epsilon, delta, ledger=None).step >= max(theirs + 1, default=-1)


@pytest.mark.parametrize(("risk", "quiet"), [(0.0, 0), (0.05, 0), (0.2, 0), (0.2, 400)])
def test_the_benchmark_sees_mapie_s_alarms_where_mapie_does(risk, quiet):
    rng, epsilon = np.random.default_rng(1), 0.05
    losses = rng.random(1200) < np.where(np.arange(1200) < quiet, 0.01, risk)
    monitor = RiskMonitoring(DISAGREES, test_level=0.2, threshold=epsilon, warn=False)
    monitor.update(losses.astype(int), np.zeros(len(losses), int))
    late = np.flatnonzero(monitor.online_risk_lower_bound_sequence_history > epsilon)
    expected = int(late[0]) + 1 if len(late) else None
    assert mapie_first_alarm(losses, epsilon, 0.2) == expected
    assert (expected is not None) == (risk > epsilon)
