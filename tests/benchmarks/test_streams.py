"""CREPE on recordings: what is read, the adaptive procedure served and replayed, and its certificate by recording."""

import json
import wave
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from benchmarks import recency, recordings, streams
from benchmarks.recency import Recency
from gati_jax import Chain, InputError
from gati_jax.caches import Candidate, Confidence, Grid
from gati_jax.evaluation import timing
from gati_jax.fitting.replay import replay_logits
from tests.planning.reference import OFF, make_plan, make_table
from tests.train.one_pass import made_up_costs

RNG = np.random.default_rng(0)
CLASSES, WIDTH = 6, 5


def write(path, samples, *, rate=8000, channels=1, width=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes((np.asarray(samples) * 2**15).astype("<i2").tobytes())


def tone(hertz, seconds, rate=8000):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


# --- Recordings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 16000, 22050])
def test_recordings_are_resampled_into_frames_of_ten_milliseconds(tmp_path, rate):
    write(tmp_path / "deep" / "a.wav", tone(440, 0.5, rate), rate=rate)
    write(tmp_path / "b.wav", tone(300, 0.2, rate), rate=rate)
    found = recordings.read_recordings([tmp_path], seconds=0.3, repeats=True)  # a tone repeats itself
    assert found.names == ("b", "a")  # sorted by path
    assert found.frames.shape == (14 + 24, 1024)  # (0.2 s - 64 ms) / 10 ms + 1; of the other, 0.3 s are read
    assert found.groups.tolist() == [0] * 14 + [1] * 24
    expected = tone(440, 0.5, 16000)[1600:2624]  # away from the ends, which a filter sees less well
    assert np.abs(found.frames[14 + 10] - expected).max() < 0.01


def test_silence_and_repeats_are_left_out(tmp_path):
    write(tmp_path / "a.wav", np.concatenate([np.zeros(4000), tone(440, 0.3)]))
    write(tmp_path / "b.wav", tone(300, 0.3))
    write(tmp_path / "c.wav", tone(300, 0.3))
    found = recordings.read_recordings([tmp_path], seconds=9)
    assert found.names == ("a", "b")
    assert len(gati_jax.data.row_digests(found.frames)) == len(np.unique(found.frames, axis=0))
    assert np.abs(found.frames).max(1).min() > 0
    repeated = recordings.read_recordings([tmp_path], seconds=9, repeats=True)
    assert repeated.names == ("a", "b", "c")
    assert recordings.read_recordings([tmp_path], seconds=9, most=1).names == ("a",)


def test_other_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"recordings: expected 1 to 10000 \.wav files, got 0"):
        recordings.read_recordings([tmp_path], seconds=1)
    write(tmp_path / "a" / "x.wav", np.zeros(2000), channels=2)
    write(tmp_path / "b" / "x.wav", np.zeros(2000), rate=4000)
    write(tmp_path / "c" / "x.wav", np.zeros(100))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.wav").write_bytes(b"RIFF")
    for name, message in {"a": "16 bits", "b": "at 4000", "c": "not silent", "d": r"expected a \.wav file"}.items():
        with pytest.raises(InputError, match=message) as caught:
            recordings.read_recordings([tmp_path / name], seconds=1)
        assert "\n" not in str(caught.value)


# --- The adaptive procedure -------------------------------------------------------------------------------------------


class Linear(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, activation):
        return nn.Dense(self.classes)(activation)


@pytest.fixture(scope="module")
def served() -> Any:
    """A chain of two blocks, a head before each, and frames of four recordings that drift slowly."""
    mix = jnp.asarray(RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32))
    last = jnp.asarray(RNG.normal(size=(WIDTH, CLASSES)).astype(np.float32))
    tanh = lambda params, x: jnp.tanh(x @ params)  # noqa: E731
    chain = Chain((tanh, tanh), lambda params, x: x @ params, (mix, mix.T, last), (WIDTH,))
    caches = []
    for site in (0, 1):
        module = Linear(classes=CLASSES)
        variables = module.init(jax.random.key(site), jnp.zeros((1, WIDTH)))
        variables = jax.tree.map(lambda v: v * 3, variables)
        caches.append(Candidate(f"linear@{site}", site, module, Confidence(), {"predictor": variables, "selector": {}}))
    frames = np.cumsum(RNG.normal(size=(60, WIDTH)).astype(np.float32) * 0.4, axis=0)
    groups = np.repeat([0, 1, 2, 3], [20, 5, 5, 30])
    logits = replay_logits(chain, caches, frames)
    base = np.asarray(chain(jnp.asarray(frames))).argmax(1)
    return chain, caches, frames, groups, logits, base


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_what_is_replayed_is_what_is_served(served, weight):
    chain, caches, frames, groups, logits, base = served
    thresholds, how = np.array([0.99, 0.7, 0.5]), Recency(weight=weight)
    found = recency.simulate(logits, base, groups, thresholds, how)
    assert len(np.unique(found.exits)) == 3
    for level, exits, answers in zip(thresholds, found.exits, found.answers, strict=True):
        server = recency.Server(chain, caches, float(level), how)
        for i, frame in enumerate(frames):
            if i == 0 or groups[i] != groups[i - 1]:
                server.reset()
            assert server.answer(frame) == (answers[i], exits[i])


def test_a_recording_is_answered_as_if_it_were_alone(served):
    *_, groups, logits, base = served
    how = Recency(weight=0.7)
    together = recency.simulate(logits, base, groups, np.array([0.6]), how)
    for group in range(4):
        own = groups == group
        alone = recency.simulate(logits[:, own], base[own], groups[own], np.array([0.6]), how)
        assert np.array_equal(alone.answers[0], together.answers[0, own])
    forgetful = recency.simulate(logits, base, groups, np.array([0.6]), Recency(weight=0.0))
    assert not np.array_equal(forgetful.answers, together.answers)


def test_the_adaptive_certificate_is_the_one_that_caches_get():
    names, epsilon = np.repeat(np.arange(80), 10), 0.1
    for bad in (0, 2, 5, 9, 14):
        wrong = (names < bad) & (np.arange(800) % 2 == 0)
        table = make_table([wrong], np.ones((1, 800)), depth=2)
        plan = make_plan([[OFF], [1.0]], depth=2)
        theirs = gati_jax.certify(plan, table, epsilon, 0.05, groups=names, ledger=None)
        losses = recency.group_losses(wrong[None].astype(int), np.zeros(800, int), names)
        assert losses.mean() == pytest.approx(bad * 0.5 / 80)
        ours = recency.certified_step(losses, plan.disagreement[1:], epsilon, 0.05)
        assert (ours is not None) == theirs.certified
    rising = np.array([[0.0] * 80, [0.5] * 80, [0.0] * 80])
    assert recency.certified_step(rising, np.zeros(3), epsilon, 0.05) == 0  # nothing behind the first that fails


# --- The whole --------------------------------------------------------------------------------------------------------


def small_network(*_: str) -> Chain:
    """Two blocks on the loudness of 64 parts of a frame."""
    random = np.random.default_rng(1)
    weights = [random.normal(size=shape).astype(np.float32) for shape in ((64, 32), (32, 16), (16, CLASSES))]

    def first(params: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(10 * x.reshape(len(x), 64, 16).mean(-1) @ params)

    return Chain((first, lambda params, x: jnp.tanh(x @ params)), lambda params, x: x @ params, weights, (1024,))


@pytest.mark.slow
def test_the_benchmark_goes_from_recordings_to_a_table_and_a_figure(tmp_path, capsys, monkeypatch):
    measure = gati_jax.measure_costs
    monkeypatch.setattr(gati_jax, "measure_costs", lambda *a, **k: made_up_costs(measure(*a, **k)))
    monkeypatch.setattr(timing, "contenders", lambda *_: {})  # no search for the fastest full network
    monkeypatch.setattr(streams, "pitch_network", small_network)
    monkeypatch.setattr(streams, "_HEADS", ((recordings.Spectrum, {"hidden": 16}), (Grid, {"cells": 4, "hidden": 16})))
    for i in range(40):
        write(tmp_path / "speech" / f"{i:02}.wav", tone(100 + 9 * i, 0.3) + RNG.normal(size=2400) * 0.02)
    write(tmp_path / "music" / "x.wav", tone(440, 31) + RNG.normal(size=248_000) * 0.02)
    folders = ["--recordings", str(tmp_path / "speech"), "--music", str(tmp_path / "music"), "--music-seconds", "0.2"]
    small = ["--epochs", "4", "--reuse", "4", "--rounds", "3", "--timed", "6", "--epsilon", "0.5", "--delta", "0.4"]
    streams.main([*folders, *small, "--json", "--out", str(tmp_path / "x.json"), "--figure", str(tmp_path / "x.svg")])
    found = json.loads(capsys.readouterr().out)
    assert found["recordings"] == {"fit": 20, "select": 6, "certify": 10, "test": 4}
    assert sum(found["adaptive"]["exits"].values()) == pytest.approx(1)
    assert found["static"]["certified"]
    assert found["adaptive"]["measured"]["full_ms"] > 0
    assert found["oracle"]["predicted_speedup"] > 1  # of the made-up costs: a lookup takes a hundredth of a block
    assert found["music"]["recordings"] == 1
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")
    streams.show(found)
    assert "oracle of these caches" in capsys.readouterr().out
