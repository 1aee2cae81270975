"""Freeze Inference's protocol: a table worked out by hand, and the script on the digits."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import ReplayTable
from gati_jax.caches import MIB
from gati_jax.profiling import device_name
from tests.train.one_pass import FREEZE, ROOT, SMALLEST, json_of, small_and_repeatable
from train.config import load
from train.reproduce import freeze, page, published
from train.reproduce.freeze import FreezeExperiment
from train.reproduce.results import Freeze

CONFIG = ROOT / "configs" / "repro_freeze_resnet18.toml"


def test_the_published_experiment_loads():
    config = load(FreezeExperiment, CONFIG)
    assert (config.freeze.k, config.freeze.key_units, config.freeze.centres) == (50, 1024, 100)
    assert config.base.architecture().classes == 10


def test_the_papers_memory_comes_out_of_the_arithmetic_but_for_its_k_means():
    ours = {what: math.prod(factors.values()) / MIB for what, _, factors in published.MEMORY}
    theirs = {what: mb for what, mb, _ in published.MEMORY}
    for what, times in {"raw k-NN": 1, "reduced k-NN": 1, "k-means": 2, "k-means, ResNet-50": 2}.items():
        assert times * ours[what] == theirs[what]
    assert (ours["key networks"], theirs["key networks"]) == (960, None)  # which the paper does not count


def table(classes, scores):
    """Requests whose answer is 0, at sites 1, 2 and 4 of a base of four blocks and an idle one."""
    classes = np.array(classes, np.int32).T
    n = classes.shape[1]
    return ReplayTable(
        names=("a", "b", "c"), sites=(1, 2, 4), depth=5, answers=np.zeros(n, np.int32), classes=classes,
        scores=np.array(scores, np.float32).T, rows=np.arange(n, dtype=np.uint64), labels=np.ones(n, np.int32),
    )  # fmt: skip


def test_a_table_by_hand():
    """Thresholds just above 5, 3 and 7."""
    validation = table([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[5, 9, 9], [6, 3, 9], [1, 1, 7]])
    requests = table(
        [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]], [[6, 0, 0], [5, 4, 0], [5, 4, 9], [0, 3, 8], [0, 3, 7]]
    )
    found = freeze.served(validation, requests, blocks=4)
    assert [e.hits for e in found.exits] == [1, 2, 1, 1]
    assert [e.exit for e in found.exits] == [1, 2, 4, "base"]
    assert [e.agreement for e in found.exits] == [1, 0.5, 1, 1]
    assert found.half_share == 3 / 5
    assert found.before_last_block_share == 3 / 5
    assert found.before_output_share == 4 / 5
    assert (found.agreement, found.accuracy) == (4 / 5, pytest.approx(1 / 5))
    assert found.blocks_mean == (1 + 2 + 2 + 4 + 4) / 5
    oracle = freeze.oracle(requests, blocks=4)
    assert (oracle.half_share, oracle.blocks_mean) == (1.0, (1 + 2 + 1 + 1 + 1) / 5)


def test_a_cache_behind_the_last_block_sees_what_the_classifier_sees():
    spec = jax.ShapeDtypeStruct((3,), np.float32)
    chain = gati_jax.Chain((lambda p, x: x * p,) * 2, lambda p, x: x @ p, (2.0, 3.0, jnp.eye(3)), spec)
    longer, x = freeze.with_exit_behind_last(chain), jnp.ones((1, 3))
    assert len(longer) == 3
    assert np.array_equal(longer(x), chain(x))
    assert longer.activations(x)[0][2].tolist() == [[6, 6, 6]]


def test_the_script_on_the_digits(tmp_path):
    (tmp_path / "digits.toml").write_text(FREEZE)
    params = gati_jax.models.fold(gati_jax.models.init(SMALLEST, jax.random.key(0)))
    with small_and_repeatable(SMALLEST), pytest.MonkeyPatch.context() as patch:
        # Untrained weights: the base's answers do not matter here.
        patch.setattr(freeze, "read_base", lambda base: gati_jax.models.to_chain(SMALLEST, params, base.normalize()))
        arguments = ["--config", str(tmp_path / "digits.toml"), "--out", str(tmp_path / "out")]
        result = json_of(freeze.main, *arguments)
    blocks = len(gati_jax.models.to_chain(SMALLEST, params))
    assert Freeze.model_validate(result).model_dump(mode="json") == result
    assert [result["protocols"][s]["base_saw_thresholds"] for s in ("seen", "clean")] == [True, False]
    protocols: list[Any] = list(result["protocols"].values())
    for kind, protocol in itertools.product(("knn", "kmeans"), protocols):
        own, exits = protocol[kind], protocol[kind]["exits"]
        assert [e["exit"] for e in exits] == [*range(1, blocks + 1), "base"]
        assert sum(e["hits"] for e in exits) == result["n"] == 300
        right = sum(e["hits"] * e["agreement"] for e in exits if e["hits"])
        assert right == pytest.approx(300 * own["agreement"])
        assert own["half_share"] <= own["before_output_share"]
        assert own["half_share"] <= result["oracle"][kind]["half_share"] + 1 - own["agreement"]
    assert all(row["total"] == row["key_network"] + row["points"] for row in result["memory"]["knn"])
    assert result["device"] == device_name()
    page.main(["--freeze", str(tmp_path / "out" / "freeze.json"), "--out", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    for kind, name in (("knn", "k-NN"), ("kmeans", "k-means")):
        agreement = 100 * result["protocols"]["clean"][kind]["agreement"]
        row = next(line for line in text.splitlines() if f"{name}: agreement" in line and "all[1000:1300]" in line)
        assert f"| {agreement:.2f} % | [freeze](#freeze) |" in row
