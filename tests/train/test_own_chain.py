"""A network of the user's own through all scripts and the server, named as ``package.module:function``."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import gati_jax
from gati_jax import InputError, data
from gati_jax.adaptation import Trace, save_trace
from gati_jax.imports import load_chain
from serve.assemble import assemble
from serve.settings import parse
from tests.train.one_pass import BARE, json_of, made_up_costs
from train import adapt, caches, evaluate, tune
from train.export.__main__ import main as export

NETWORK = '''
"""Three dense blocks with drawn weights, for the digits' pixels."""

import jax
import jax.numpy as jnp
import numpy as np

import gati_jax

SCALE = 1.0


def flatten(params, x):
    return jnp.tanh(x.reshape(len(x), -1) @ params)


def dense(params, x):
    return jnp.tanh(SCALE * (x @ params))


def classify(params, x):
    return x @ params


def network():
    draw = np.random.default_rng(0)
    params = [draw.normal(size=(64, width)).astype(np.float32) / 8 for width in (64, 64, 64, 10)]
    spec = jax.ShapeDtypeStruct((8, 8, 1), "float32")
    pixels = gati_jax.Normalization(mean=(0.305,), std=(0.376,), scale=1 / 16)
    blocks = (flatten, dense, dense)
    return gati_jax.Chain(blocks, classify, params, spec, normalization=pixels, input_name="digit")


class Other:
    pass


def other():
    return Other()


def sized(width):
    raise AssertionError


def broken():
    raise KeyError("layer4")


ready = network()
constant = 3
'''
HEADS = '[{name = "fc", predictor = {kind = "fc", hidden = 16}}]'
FIT = ["--fit.epochs", "4", "--fit.heads", HEADS, "--measure_rounds", "3", "--plan.epsilon", "0.3"]
FIT += ["--base.accept_low_accuracy", "true", "--plan.backend", "xla", "--plan.seconds", "1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with the user's module, and a config."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "nets").mkdir()
    (folder / "nets" / "own.py").write_text(NETWORK)
    (folder / "late.py").write_text("import nets.own\nimport nothing_like_this\n")
    (folder / "typo.py").write_text("def f(:\n")
    (folder / "script.py").write_text("import sys\nsys.exit(3)\n")
    (folder / "config.toml").write_text(BARE)
    return folder


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    """As with ``gati-jax``, whose path does not begin with the current directory."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in {"", str(Path.cwd())}])


@pytest.fixture(scope="module")
def fitted(home):
    """caches.json of a fit of the own network, by ``--chain``."""
    measure = gati_jax.measure_costs
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(gati_jax, "measure_costs", lambda *a, **k: made_up_costs(measure(*a, **k)))
        arguments = ["--config", "config.toml", *FIT, "--out", "caches", "--ledger", "looks.json"]
        return json_of(caches.main, *arguments, "--chain", "nets.own:network")


BUNDLE = ["--bundle", "caches/bundle"]
CHAIN = ["--chain", "nets.own:network"]


def test_a_fit_of_an_own_network_certifies_caches_of_it(fitted, home):
    bundle = gati_jax.load_bundle(home / "caches" / "bundle", chain=load_chain("nets.own:network"))
    assert fitted["certificate"]["certified"]
    assert bundle.chain.network is None
    assert bundle.provenance.config["base"]["chain"] == "nets.own:network"
    test = data.load("digits", "all[1497:]").images
    answers = np.asarray(bundle.chain(bundle.chain.prepare(test))).argmax(1)
    found = gati_jax.infer_batch(bundle, test)
    assert np.mean(found.class_index == answers) > 0.6
    assert (np.asarray(found.exit) < 3).any()


def test_a_bundle_does_not_say_what_to_import(fitted, monkeypatch):
    """It holds the function's name, as part of the config, and is not trusted with it."""
    del fitted
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    for main in (evaluate.main, tune.main):
        with pytest.raises(InputError, match=r"own chain: pass it .* or as --chain"):
            main([*BUNDLE, *([] if main is tune.main else ["--out", "out"])])


def test_the_config_may_name_the_function(fitted, home):
    """The same plan again: it is no second look, so the same certificate."""
    config = BARE + 'chain = "nets.own:network"\n'
    (home / "with_chain.toml").write_text(config)
    again = json_of(caches.main, "--config", "with_chain.toml", *FIT, "--out", "caches", "--ledger", "looks.json")
    assert again["certificate"] == fitted["certificate"]


@pytest.mark.slow
def test_it_is_tuned(fitted):
    del fitted
    tunings = json_of(tune.main, *BUNDLE, *CHAIN, "--tiles", "1", "--rounds", "1")
    assert [bool(one["onnxruntime"]) for one in tunings] == [False, True]  # XLA, then ONNX Runtime
    assert all(one["checks"] for one in tunings)


def test_evaluate_adapt_and_export_take_it(fitted, home, capsys):
    del fitted
    result = json_of(evaluate.main, *BUNDLE, *CHAIN, "--out", "eval", "--timed", "2", "--ledger", "none")
    assert result["network"] == "nets.own:network"
    assert result["cascade"]["agreement"] > 0.6
    images = np.asarray(data.load("digits", "all[1497:1577]").images)
    item = np.tile(np.arange(len(images), dtype=np.int32), 3)
    save_trace(
        home / "trace.safetensors",
        Trace(
            item=item,
            seconds=np.arange(len(item)) / 10.0,
            images=images,
            phase=np.zeros(len(item), np.int16),
            phases=("all",),
        ),
    )
    trace = ["--trace", "trace.safetensors", "--one", "--out", "adapt", "--ledger", "none"]
    assert json_of(adapt.main, *BUNDLE, *CHAIN, *trace)["trace"]["n"] == len(item)
    assert json_of(export, *BUNDLE, *CHAIN, "--out", "onnx")["one_file"] == "cascade.onnx"
    capsys.readouterr()


def test_the_server_names_the_input_as_the_chain_does(fitted):
    del fitted
    (entry,) = assemble(parse([*BUNDLE, *CHAIN], {})).service.models.entries.values()
    model = entry.model
    (tensor,) = model.metadata().inputs
    assert (tensor.name, tensor.shape, tensor.datatype) == ("digit", [-1, 8, 8, 1], "UINT8")
    assert json.loads(model.config().model_dump_json())["input"][0]["name"] == "digit"


def test_other_functions_of_the_same_parameters_are_refused(fitted, monkeypatch):
    del fitted
    monkeypatch.setattr(sys.modules["nets.own"], "SCALE", 2.0)
    jax.clear_caches()
    with pytest.raises(gati_jax.BundleError, match=r"expected the functions that .* was certified with"):
        evaluate.main([*BUNDLE, *CHAIN, "--out", "out"])


REFUSED = {
    "no colon": ("nets.own.network", "expected package.module:function, got 'nets.own.network'"),
    "a file": ("nets/own.py:network", "expected package.module:function"),
    "no such module": ("nets.ours:network", "cannot import nets.ours: ModuleNotFoundError: No module named"),
    "a module that needs another": ("late:f", r"cannot import late: .*'nothing_like_this' \(.*late.py, line 2\)"),
    "a typo in the module": ("typo:f", r"cannot import typo: SyntaxError: .*typo.py, line 1"),
    "a script": ("script:f", r"cannot import script: SystemExit: 3 \(.*script.py, line 2\)"),
    "no such function": ("nets.own:net", "expected a function net in nets.own, got none"),
    "no function": ("nets.own:constant", "to take no arguments and to return a gati_jax.Chain, got int"),
    "the chain itself": ("nets.own:ready", "got a Chain itself: put it into a function"),
    "a function that needs arguments": ("nets.own:sized", r"expected nets.own:sized to take no arg.* sized\(width\)"),
    "a wrong return": ("nets.own:other", "to return a gati_jax.Chain, got Other from it"),
    "a class": ("nets.own:Other", "got Other from it"),
    "a function that fails": ("nets.own:broken", r"nets.own:broken failed: KeyError: 'layer4' \(.*own.py, line \d+\)"),
}


@pytest.mark.parametrize(("name", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_chain_is_refused_in_one_line(name, message):
    with pytest.raises(InputError, match=rf"^--chain: .*{message}") as caught:
        load_chain(name, "--chain")
    assert "\n" not in str(caught.value)


def test_a_chain_stands_alone_in_a_config(home):
    arguments = ["--config", "config.toml", *CHAIN, "--out", "refused", "--base.network", "resnet20"]
    with pytest.raises(InputError, match=r"chain: expected it alone, .* got it with network"):
        caches.main(arguments)
    assert not (home / "refused").exists()


def test_an_input_s_name_is_checked():
    chain = load_chain("nets.own:network")
    for bad in ("", "two words", "x" * 101):
        with pytest.raises(InputError, match="input_name: expected"):
            dataclasses.replace(chain, input_name=bad)
