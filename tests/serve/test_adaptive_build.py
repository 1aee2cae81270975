"""How an adaptive server starts: from a folder of versions, after a kill, and with large images."""

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gati_jax import InputError
from gati_jax.adaptation import ControllerConfig, MonitorConfig, Recovery, served_by
from gati_jax.bundle import Versions, save_bundle
from gati_jax.bundle.record import certified_only
from gati_jax.pytrees import tree_digest
from serve import adaptive
from serve.metrics import Metrics
from serve.protocol.model import Tally
from tests.adaptation import world

PATIENCE = 60
QUIET = ControllerConfig(monitor=MonitorConfig(epsilon=world.EPSILON, drift=False), exact=None, nearest=None)


def build(folder, bundle=None, **options):
    given = adaptive.AdaptiveOptions(folder=folder, **{"controller": QUIET, **options})
    return adaptive.build(bundle or world.bundle(), given, capacity=8, observer=Metrics(Tally()))


def certified(*, step=None, epsilon=world.EPSILON):
    """The certified plan at an earlier step: other thresholds than those that the bundle came with."""
    bundle = certified_only(world.bundle())
    step = len(bundle.plan.path) - 2 if step is None else step
    certificate = dataclasses.replace(bundle.certificate, step=step, plan_hash=bundle.plan.hash, epsilon=epsilon)
    return dataclasses.replace(bundle, certificate=certificate)


def thresholds(parts):
    return parts.adapting.controller.served.thresholds.tolist()


def given():
    return served_by(certified_only(world.bundle())).thresholds.tolist()


def test_without_versions_the_bundle_is_served_as_it_was_given(tmp_path):
    parts = build(tmp_path)
    assert thresholds(parts) == given()
    assert [source.name for source in parts.sources] == ["default", "base"]
    assert parts.sources[0].epsilon == world.EPSILON
    assert not list(tmp_path.iterdir())


def test_the_current_version_is_served(tmp_path):
    saved = certified()
    Versions(tmp_path, chain=saved.chain).save(saved)
    parts = build(tmp_path)
    assert thresholds(parts) == served_by(saved).thresholds.tolist() != given()
    np.testing.assert_array_equal(parts.sources[0].cascade.thresholds, served_by(saved).thresholds)
    assert parts.adapting.controller.monitor.version == 2


def test_a_version_that_does_not_fit_is_not_served(tmp_path, caplog):
    other = certified()
    chain = dataclasses.replace(other.chain, params=[np.ones((), np.float32), *other.chain.params[1:]])
    moved = dataclasses.replace(other, chain=chain)
    source = dataclasses.replace(moved.plan.source, base=str(tree_digest(chain.params)))
    plan = dataclasses.replace(moved.plan, source=source)
    certificate = dataclasses.replace(moved.certificate, plan_hash=plan.hash)
    Versions(tmp_path / "base", chain=chain).save(dataclasses.replace(moved, plan=plan, certificate=certificate))
    assert thresholds(build(tmp_path / "base")) == given()
    assert "a version is not served" in caplog.text
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "versions.json").write_text('{"history": [1], "newest": 1}')
    assert thresholds(build(tmp_path / "damaged")) == given()
    assert "served as it was given" in caplog.text


def test_a_promise_that_nothing_certifies_has_to_be_named(tmp_path):
    bundle = world.bundle()
    none = dataclasses.replace(bundle, certificate=dataclasses.replace(bundle.certificate, step=-1))
    with pytest.raises(InputError, match="--adapt-epsilon"):
        build(tmp_path, none, controller=None)
    assert build(tmp_path, none, controller=None, epsilon=0.1).adapting.state == "safe"


@pytest.mark.parametrize(("side", "rows"), [(224, (1716, 858)), (448, None)])
def test_bundles_of_large_images_are_served(tmp_path, caplog, side, rows):
    """The log keeps fewer requests, so that its images fit; where a refit finds too few, there are none."""
    caplog.set_level(logging.WARNING)
    small = world.bundle()
    spec = jax.ShapeDtypeStruct((side, side, 3), np.dtype("float32"))
    large = dataclasses.replace(small, chain=dataclasses.replace(small.chain, input_spec=spec))
    parts = build(tmp_path, large, controller=None)
    assert parts.adapting.request_log.capacity == 512 * 2**20 // (side * side * 3)
    assert isinstance(parts.worker.recovery, Recovery)
    assert parts.worker.recovery.rows == rows
    said = [record.getMessage() for record in caplog.records if "no refits" in record.getMessage()]
    assert ["--adapt-without refit" in line for line in said] == [True] * (rows is None)
    caplog.clear()
    build(tmp_path, large, controller=None, without=("refit",))
    assert "no refits" not in caplog.text


KILLED = """
import os, signal, sys
from pathlib import Path
from gati_jax import load_bundle
from gati_jax.bundle import Versions, versions
from tests.adaptation.world import chain

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def save_half(path, *args, real=versions.save_bundle, **kwargs):
    real(path, *args, **kwargs)
    (path / "certificates.json").unlink()
    kill()

def update(folder, where):
    bundle = load_bundle(folder / "next", chain=chain())
    if where == "half":
        versions.save_bundle = save_half
    elif where == "saved":
        Versions._write = kill
    elif where == "entered":
        Versions._prune = kill
    Versions(folder / where, chain=chain()).save(bundle)

for where in sys.argv[2:]:  # one process each, which nothing but the fork slows down: JAX has not started here yet
    if not (child := os.fork()):
        update(Path(sys.argv[1]), where)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, where
"""


def test_a_server_killed_in_an_update_resumes_the_last_good_version(tmp_path):
    """Half a version written; written whole, but not entered; entered, but the old ones not deleted."""
    old, new = certified(step=1), certified()
    save_bundle(tmp_path / "next", new.chain, new.caches, new.plan, new.certificate, costs=new.costs)
    cases = {"half": old, "saved": old, "entered": new}
    for where in cases:
        Versions(tmp_path / where, chain=old.chain).save(old)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), *cases], check=True, cwd=root, env=environment)
    for where, expected in cases.items():
        assert thresholds(build(tmp_path / where)) == served_by(expected).thresholds.tolist(), where
        Versions(tmp_path / where, chain=new.chain).save(new)
        assert thresholds(build(tmp_path / where)) == served_by(new).thresholds.tolist(), where
