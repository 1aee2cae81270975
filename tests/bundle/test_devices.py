"""Tunings in ``tuning/``: left out with a warning where they cannot be of this bundle and this compiler.

They answer by default only where a check bounds how often their answers differ from the certified arithmetic's.
"""

import dataclasses
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gati_jax
from gati_jax import CostTable
from gati_jax.models import Algorithm, layers
from gati_jax.profiling import Tile, Tuning, device_name
from gati_jax.profiling.compiler import OPTIONS
from tests.bundle.made import PIXELS, at, edit


@pytest.fixture
def tuned(saved_residual, residual, tmp_path) -> Path:
    """The tuning of a bundle of a small ResNet of two blocks, made by hand; nothing of it is compiled."""
    chain, caches, *_ = residual
    kinds: dict[str, Algorithm] = {layer.kind: "im2col" for block in layers(chain.network) for layer in block}
    lookup_ms = {cache.name: 0.1 for cache in caches}
    tiles = tuple(
        Tile(
            size=size,
            milliseconds=1.0,
            options=OPTIONS["cpu"][1],
            algorithms=kinds,
            costs=CostTable(device=device_name(), batch=size, blocks_ms=(1.0, 2.0), lookup_ms=lookup_ms),
        )
        for size in (1, 4)
    )
    tuning = Tuning(device=device_name(), tiles=tiles, jaxlib=version("jaxlib"))
    folder = shutil.copytree(saved_residual, tmp_path / "bundle")
    gati_jax.save_tuning(folder, tuning)
    return folder / "tuning" / f"{device_name()}.json"


def wind(content: Any) -> None:
    """Let Winograd's algorithm do the convolution of stride 2, which it cannot."""
    algorithms = content["tuning"]["tiles"][1]["algorithms"]
    algorithms.update({kind: "winograd2" for kind in algorithms if kind.startswith("3x3/2")})


UNFIT = {
    "of another device": (at("tuning device", "cpu-another"), f"expected one of {device_name()}, got cpu-another"),
    "of another compiler": (at("tuning jaxlib", "0.0.1"), "expected one of jaxlib .*, got 0.0.1"),
    "a layer that is none of it": (
        at("tuning tiles 1 algorithms", {"3x3/1 999-999 8x8": "im2col"}),
        "the network has no 3x3/1 999-999 8x8 that im2col could do",
    ),
    "an algorithm that cannot": (wind, "the network has no 3x3/2 .* that winograd2 could do"),
    "options of another platform": (at("tuning tiles 1 options", OPTIONS["gpu"][1]), "are no options for cpu"),
    "costs of another depth": (
        at("tuning tiles 1 costs blocks_ms", [1.0]),
        "expected costs of 2 blocks for 4 rows, got 1 for 4",
    ),
    "costs of another batch": (
        at("tuning tiles 1 costs batch", 8),
        "expected costs of 2 blocks for 4 rows, got 2 for 8",
    ),
    "costs of other caches": (
        at("tuning tiles 1 costs lookup_ms", {"grid@0": 0.1, "pool@1": 0.1}),
        "expected costs of grid@0, grid@1, got grid@0, pool@1",
    ),
}


def test_what_can_be_true_is_believed(tuned):
    bundle = gati_jax.load_bundle(tuned.parents[1])  # warnings are errors
    assert [tuning.device for tuning in bundle.tunings] == [device_name()]
    assert bundle.tuned is not None


@pytest.mark.parametrize("case", UNFIT)
def test_what_cannot_be_true_is_left_out(tuned, case):
    change, reason = UNFIT[case]
    edit(tuned, change)
    with pytest.warns(UserWarning, match=f"the tuning in .* is left out: .*{reason}.*run gati-jax tune"):
        bundle = gati_jax.load_bundle(tuned.parents[1])
    assert (bundle.tunings, bundle.tuned) == ((), None)
    exits = np.asarray(gati_jax.infer_batch(bundle, PIXELS[:3]).exit)  # it answers without
    assert set(exits.tolist()) <= {0, 1, 2}


def test_measured_costs_stay_where_the_tuning_goes(tuned):
    table = {"device": device_name(), "batch": 1, "blocks_ms": (1.0, 1.0), "lookup_ms": {"grid@0": 0.5}}
    edit(tuned, at("costs", [table]))
    edit(tuned, at("tuning jaxlib", "0.0.1"))
    with pytest.warns(UserWarning, match="left out"):
        bundle = gati_jax.load_bundle(tuned.parents[1])
    assert bundle.costs == (CostTable(**table),)


@pytest.mark.parametrize("content", ["", "{", '{"tuning": 3}', '{"tuning": {"device": "cpu", "tiles": []}}'])
def test_the_error_of_a_damaged_file_says_what_to_do(tuned, content):
    tuned.write_text(content)
    with pytest.raises(gati_jax.BundleError, match=rf"{tuned.name}.*only measurements: remove it, and tune again"):
        gati_jax.load_bundle(tuned.parents[1])
    tuned.unlink()
    assert gati_jax.load_bundle(tuned.parents[1]).tunings == ()


NOT_ITS_OWN = {
    "of other programs": at("tuning tiles 1 algorithms", {}),
    "of another plan": at("tuning checks 1 cascade", "0" * 64 + ":1"),
    "of another arithmetic": at("tuning checks 1 arithmetic", "bfloat16"),
    "without the base": at("tuning checks 0 cascade", "0" * 64 + ":1"),
    "as if nothing had been chosen": at("tuning checks 1 comparisons", 1),
}


def second_look(folder: Path) -> gati_jax.Bundle:
    """The bundle, as if its rows could have chosen another plan's cascade as well."""
    bundle = gati_jax.load_bundle(folder)
    return dataclasses.replace(bundle, certificate=dataclasses.replace(bundle.certificate, looks=2))


@pytest.mark.parametrize("case", NOT_ITS_OWN)
def test_a_check_of_something_else_is_none(tuned, case):
    folder = tuned.parents[1]
    bundle = gati_jax.load_bundle(folder)
    (tuning,) = bundle.tunings
    common = {
        "arithmetic": "fast",
        "programs": tuning.programs,
        "device": tuning.device,
        "data_fingerprint": "",
        "n": 9,
    }
    checks = [
        common | {"cascade": cascade, "differ": 0, "delta": 0.01, "comparisons": comparisons}
        for cascade, comparisons in (("base", 1), (f"{bundle.plan.hash}:1", 2))
    ]
    edit(tuned, lambda content: content["tuning"].update(checks=checks))
    assert len(second_look(folder).checks) == 2  # warnings are errors
    edit(tuned, NOT_ITS_OWN[case])
    bundle = second_look(folder)
    with pytest.warns(UserWarning, match="run gati-jax tune"):
        assert bundle.checks == {}
