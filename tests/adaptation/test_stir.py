"""ADWIN behind the monitor: calm on calm traffic, stirred by a shift, and told apart where it is missing."""

import sys

import numpy as np
import pytest

import gati_jax
from gati_jax.adaptation import Monitor, MonitorConfig, Observation
from gati_jax.adaptation.drift import DriftDetector


def stream(seed, n, *, score=0.0, share=0.7):
    rng = np.random.default_rng(seed)
    for hits, value in zip((rng.random(n) < share).tolist(), rng.normal(score, 1, n).tolist(), strict=True):
        yield Observation(1, value, 0, 0.02, None) if hits else Observation(4, float("inf"), 0, 1.0, 0)


@pytest.mark.parametrize("changed", [{"score": -0.7}, {"share": 0.4}])
def test_it_stirs_when_scores_or_exits_change_and_hardly_before(changed):
    pytest.importorskip("river")
    stir = DriftDetector(4)
    before = sum([stir.stirred(observed) for observed in stream(0, 10_000)])
    after = sum([stir.stirred(observed) for observed in stream(1, 2000, **changed)])
    assert before <= 1
    assert after >= 1
    assert stir.count == before + after


def test_a_monitor_without_river_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "river.drift", None)
    with pytest.raises(gati_jax.InputError, match=r"river.*gati-jax\[adapt\]"):
        Monitor(MonitorConfig(), 4)
    Monitor(MonitorConfig(stir=False), 4)
