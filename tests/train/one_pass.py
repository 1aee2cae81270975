"""The scripts on the digits, from the command line to evaluation.json.

A residual network of three blocks stands in for ResNet-20: the same code, a fraction of the compilation. Costs are
measured, then replaced by made-up ones, so that the same fit always gives the same plan.
"""

import contextlib
import dataclasses
import functools
import io
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import gati_jax
from gati_jax import CostTable
from gati_jax.models import Architecture, ResNet

ROOT = Path(__file__).parents[2]
DIGITS = ["--config", str(ROOT / "configs" / "digits.toml")]
TINY = ResNet(stages=(1, 1, 1), widths=(4, 8, 8), shortcut="A", input_shape=(8, 8, 1))
SMALLEST = ResNet(stages=(1,), widths=(4,), input_shape=(8, 8, 1))
HIDDEN, TESTED = 16, 60
HEADS = f'[{{name = "grid", predictor = {{kind = "grid", cells = 4, hidden = {HIDDEN}}}}}]'
FIT = ["--fit.epochs", "6", "--fit.heads", HEADS, "--measure_rounds", "3", "--plan.epsilon", "0.2"]
FREEZE = """
[data]
name = "digits"
base_trained_on = ["all[:900]"]
splits = { build = "all[:500]", seen = "all[500:800]", clean = "all[1000:1300]", serve = "all[1300:1600]" }
[base]
network = "resnet20"
input_shape = [8, 8, 1]
normalization = { scale = 0.0625, mean = [0.305], std = [0.376] }
[fit]
epochs = 1
batch = 50
[freeze]
key_units = 8
k = 5
centres = 20
"""
BARE = """
seed = 0
[data]
name = "digits"
base_trained_on = []
splits = { fit = "all[:897]", select = "all[897:1197]", certify = "all[1197:1497]", test = "all[1497:]" }
[base]
"""
SPLITS = ["--data.splits.test", f"all[1497:{1497 + TESTED}]"]
KEYS = {
    "": "dataset split n versions seed",
    "base": "accuracy",
    "cascade": "accuracy agreement",
    "certificate": "epsilon delta n disagreements method numerics looks holds",
    "exits.0": "exit hits hit_rate agreement",
    "oracle": "saved_share",
    "cost": "blocks_mean saved_share ideal_speedup",
    "cost.measured.0": "device driver numerics dtype batch full_ms cascade_ms speedup conversion lookup_share spread",
    "memory": "base_bytes cache_bytes",
}


def made_up_costs(measured: CostTable) -> CostTable:
    """A block takes a millisecond, a lookup a hundredth."""
    blocks = (1.0,) * len(measured.blocks_ms)
    return dataclasses.replace(
        measured, blocks_ms=blocks, lookup_ms=dict.fromkeys(measured.lookup_ms, 0.01), spread=0.0
    )


@contextlib.contextmanager
def small_and_repeatable(network: Architecture = TINY) -> Generator[None]:
    measure = gati_jax.measure_costs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.config.architecture", lambda *_, **__: network)
        patch.setattr(gati_jax, "measure_costs", lambda *a, **k: made_up_costs(measure(*a, **k)))
        yield


def json_of(main: Callable[[list[str]], None], *arguments: str) -> Any:
    """Run a script with --json; parse all of its standard output, strictly, as one document."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main([*arguments, "--json"])
    return strict(printed.getvalue())


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)  # NaN and Infinity are not JSON


@functools.cache
def load_once(path: Path) -> gati_jax.Bundle:
    return gati_jax.load_bundle(path)


class Run(NamedTuple):
    """One pass through the house."""

    folder: Path
    base: Any
    caches: Any
    evaluation: Any
    loaded: list[str]  # splits that train.caches loaded

    @property
    def bundle(self) -> gati_jax.Bundle:
        return load_once(self.folder / "caches" / "bundle")


def caches_arguments(folder: Path) -> list[str]:
    return [*DIGITS, *SPLITS, *FIT, "--base.weights", str(folder / "base" / "base.safetensors")]


def looks_in(folder: Path) -> list[str]:
    return ["--ledger", str(folder / "looks.json")]


def evaluate_arguments(folder: Path, out: Path) -> list[str]:
    return ["--bundle", str(folder / "caches" / "bundle"), "--out", str(out)]
