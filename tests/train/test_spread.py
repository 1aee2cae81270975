"""Fits and bases on several devices and in several processes: what one device learns, from the same checkpoints."""

import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file

from gati_jax import InputError
from gati_jax.devices import ONE, Devices, sharing
from tests.train import spread
from tests.train.one_pass import DIGITS, ROOT
from train import base, cli

BASE = [
    *DIGITS, "--data.base_trained_on", '["all[:192]"]', "--data.splits.test", "all[1497:1527]",
    "--base.network", "resnet20", "--base.training.epochs", "2", "--base.training.average", "0.9",
]  # fmt: skip


def run(module, *words, places=()):
    """Run a module of ours, once for each place, at the same time; all must end well."""
    commands = [[sys.executable, "-m", module, *map(str, words), *place] for place in places or [()]]
    processes = [
        subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for command in commands
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(printed)


def two():
    """The places of two processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return [f"{i}/2@127.0.0.1:{port}" for i in range(2)]


def begin(work, folder):
    """Go half-way on one device."""
    with pytest.raises(spread.StoppedError):
        work(folder, half=True)


def check(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("works", "devices", "processes"), [("fit,epochs", 8, 1), ("epochs", 2, 2)])
def test_what_one_device_began_goes_on_elsewhere_as_it_would_here(works, devices, processes, tmp_path):
    here, there, names = tmp_path / "here", tmp_path / "there", works.split(",")
    for name in names:
        begin(spread.WORKS[name], here)
    shutil.copytree(here, there)
    run("tests.train.spread", works, there, devices, places=[(place,) for place in two()] if processes > 1 else ())
    for name in names:
        count, *found = np.load(there / f"{name}.npz").values()
        assert count == devices * processes
        check(found, spread.WORKS[name](here))
        if name == "fit":  # the other way: the last checkpoint of many devices is the end of a fit on one
            check(found, spread.fit(there))


@pytest.mark.slow
def test_two_processes_train_the_base_that_one_trains(tmp_path):
    places = [("--process", place) for place in two()]
    run("train.base", *BASE, "--out", tmp_path / "two", places=places)
    base.main([*BASE, "--out", str(tmp_path / "one")])
    found, expected = (load_file(tmp_path / name / "base.safetensors") for name in ("two", "one"))
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-2, atol=1e-3, err_msg=name)


def test_one_device_takes_arrays_as_they_are():
    rows = np.arange(6.0)
    assert sharing(6) == ONE == Devices()
    assert ONE.count == 1
    assert ONE.split(rows) is rows
    assert ONE.copy(rows) is ONE.collect(rows) is rows


def test_a_mesh_keeps_what_is_where_it_belongs():
    devices = Devices(Mesh(np.array(jax.devices()[:1]), ("rows",)))
    rows = np.arange(6, dtype=np.float32)
    found = jax.jit(lambda x: devices.as_copies(devices.as_rows(x) * 2))(devices.split(rows))
    np.testing.assert_array_equal(devices.collect(found), 2 * rows)
    copied = devices.copy(rows)
    assert devices.copy(copied) is copied


@pytest.mark.parametrize("text", ["2/2@host:1", "0/2", "a/2@host:1", "0/2@host"])
def test_a_place_among_processes_that_is_none_is_one_line(text):
    with pytest.raises(InputError, match="--process: expected auto or I/N@HOST:PORT"):
        base.main([*BASE, "--out", "x", "--process", text])
    assert cli.process("1/3@host:80") == ("host:80", 3, 1)
