"""Configs: overrides of every type, and errors that name the key."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gati_jax import Augment, FitConfig, InputError, Normalization
from gati_jax.models import ViT
from gati_jax.options import describe_options
from tests.train.one_pass import BARE, ROOT
from train import cli
from train.config import Config, build_config, load

CONFIGS = [
    path
    for path in sorted((ROOT / "configs").glob("*.toml"))
    if not path.name.startswith("repro_freeze")  # which test_freeze.py loads
]
UNREADABLE = r"config: cannot read .*given\.toml"
SMALL = f'{BARE}network = "resnet20"\nnormalization = {{ mean = [0.5], std = [0.25] }}\n'


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path / "small.toml"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_builds(config):
    loaded = load(Config, config)
    assert loaded.base.architecture().classes == loaded.base.classes
    assert len(loaded.base.normalize().mean) == loaded.base.input_shape[2]
    assert [head.build().name for head in loaded.fit.heads] == [head.name for head in loaded.fit.heads]
    assert loaded.fit.seed == loaded.seed


def test_a_vit_s_patch_and_depth_reach_its_network():
    more = ["--base.patch", "8", "--base.depth", "6"]
    network = load(Config, ROOT / "configs" / "cifar10_vit_tiny.toml", more).base.architecture()
    assert isinstance(network, ViT)
    assert (network.patch, network.depth, network.width) == (8, 6, 192)


OVERRIDES = {
    "int": ("fit.epochs", "7", 7),
    "float": ("plan.epsilon", "0.125", 0.125),
    "float in scientific notation": ("base.training.learning_rate", "1e-3", 0.001),
    "int for a float": ("base.training.learning_rate", "1", 1.0),
    "bool": ("fit.augment.flip", "true", True),
    "negative number": ("base.normalization.mean", "[-0.5]", (-0.5,)),
    "list of strings": ("data.base_trained_on", '["all[:5]", "all[5:9]"]', ("all[:5]", "all[5:9]")),
    "list of numbers": ("base.input_shape", "[8, 8, 1]", (8, 8, 1)),
    "dash for an underscore": ("data.base-trained-on", '["all"]', ("all",)),
    "path": ("base.weights", "../a b/w.safetensors", Path("../a b/w.safetensors")),
    "quoted path": ("data.dir", '"a/x"', Path("a/x")),
    "string": ("data.name", "cifar10", "cifar10"),
    "string with brackets": ("data.splits.select", "all[3:4]", "all[3:4]"),
    "string with an equals sign": ("base.network", "a=b", "a=b"),
    "key that the file lacks": ("measure_rounds", "9", 9),
}


@pytest.mark.parametrize("case", OVERRIDES)
@pytest.mark.parametrize("form", ["two tokens", "one token"])
def test_override(file, case, form):
    key, text, expected = OVERRIDES[case]
    tokens = [f"--{key}", text] if form == "two tokens" else [f"--{key}={text}"]
    value = load(Config, file, tokens)
    for part in key.replace("-", "_").split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected) or isinstance(expected, Path)


def test_the_last_override_wins_and_nothing_else_changes(file):
    before, after = load(Config, file), load(Config, file, ["--fit.epochs", "3", "--fit.epochs=4", "--seed", "5"])
    assert (after.fit.epochs, after.seed) == (4, 5)
    unchanged = after.model_copy(update={"seed": before.seed, "fit": before.fit})
    assert unchanged == before


def test_a_table_of_heads_can_be_overridden(file):
    heads = '[{name = "a", sites = [1, 2], predictor = {kind = "fc", hidden = 8}}, {name = "b"}]'
    one, two = load(Config, file, ["--fit.heads", heads]).fit.heads
    assert (one.name, one.sites, one.predictor.kind, two.name, two.sites) == ("a", (1, 2), "fc", "b", None)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("fit.epoch", "fit.epochs"),
        ("plan.epsilom", "plan.epsilon"),
        ("base.training.epocs", "base.training.epochs"),
        ("data.splits.selct", "data.splits.select"),
        ("sed", "seed"),
        ("base.normalization.men", "base.normalization.mean"),
        # At home in another section:
        ("fit.epsilon", "plan.epsilon"),
        ("plan.heads", "fit.heads"),
        ("base.momentum", "base.training.momentum"),
        ("data.epochs", "base.training.epochs or fit.epochs"),
        ("fit.augment.cutout", "base.training.cutout"),
        ("fit.heads.0.hidden", "fit.heads.N.sites"),
    ],
)
def test_an_unknown_key_names_the_right_one(file, wrong, right):
    with pytest.raises(InputError) as caught:
        load(Config, file, ["--fit.heads", '[{name = "a"}]', f"--{wrong}", "1"])
    assert str(caught.value) == f"config: unknown key {wrong}; did you mean {right}?"


@pytest.mark.parametrize(("wrong", "near"), [("fits", "fit."), ("planing", "plan."), ("bases", "base.")])
def test_misspelt_section_names_the_section(file, wrong, near):
    (file.parent / "misspelt.toml").write_text(f"{SMALL}\n[{wrong}]\nepochs = 1")
    for path, overrides in ((file, [f"--{wrong}.epochs", "1"]), (file.parent / "misspelt.toml", [])):
        with pytest.raises(InputError, match=f"unknown key {wrong}; did you mean {near}"):
            load(Config, path, overrides)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("fit.epochs", "many"),
        ("fit.epochs", "0"),
        ("fit.epochs", "1.5"),
        ("plan.epsilon", "2"),
        ("plan.epsilon", "nan"),
        ("fit.augment.flip", "perhaps"),
        ("data.name", "5"),
        ("data.base_trained_on", "all"),
        ("base.input_shape", "7"),
        ("base.weights", "3"),
        ("fit.optimizer", "adagrad"),
        ("base.shortcut", "C"),
        ("measure_rounds", "2"),
        ("seed", "-1"),
        ("fit", "3"),
    ],
)
def test_wrong_value_names_its_key_and_what_came(file, key, text):
    with pytest.raises(InputError) as caught:
        load(Config, file, [f"--{key}", text])
    assert str(caught.value).startswith(f"config: {key}")
    assert text.strip("[]") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a@b", "grid+linear"])
@pytest.mark.parametrize("rest", ["heads", "networks"])
def test_a_head_may_not_be_named_as_candidates_are(file, name, rest):
    more = ', network = "resnet20", weights = "w.pth", trained_on = []' if rest == "networks" else ""
    with pytest.raises(InputError, match=rf"fit\.{rest}\.0\.name: .*expected a name without @ and .*, got '"):
        load(Config, file, [f"--fit.{rest}", f'[{{name = "{name}"{more}}}]'])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--fit.epochs", "0", "--plan.epsilon", "2"], r"fit\.epochs.*plan\.epsilon"),  # every problem
        (
            ["--fit.heads", '[{name = "a", selectors = [{kind = "sorted", hidden = 8}, {kind = "sorted"}]}]'],
            r"fit\.heads\.0: selectors: expected distinct names, got sorted, sorted",
        ),
        (["--fit.epochs"], "expected a value behind --fit.epochs"),
        (["--fit.epochs", "1", "--seed"], "expected a value behind --seed"),
        (["fit.epochs", "1"], "expected --section.key value, got 'fit.epochs'"),
        (["--fit.epochs", "1", "2"], "expected --section.key value, got '2'"),
        (["--seed.x", "1"], "config: seed|expected a section, got the value 0"),
        (["--data.name.x", "1"], "expected a section, got the value 'digits', at name of data.name.x"),
    ],
)
def test_overrides_that_are_refused(file, tokens, message):
    with pytest.raises(InputError, match=message):
        load(Config, file, tokens)


def test_a_value_in_a_list_can_be_set_by_its_position():
    path = ROOT / "configs" / "cifar10_resnet56.toml"
    config = load(Config, path, ["--fit.heads.1.name", "narrow", "--fit.heads.1.predictor.hidden", "32"])
    assert [head.name for head in config.fit.heads] == ["wide", "narrow"]
    assert config.fit.heads[1].predictor.model_dump()["hidden"] == 32
    with pytest.raises(InputError, match=r"expected a section, got the value .* at heads of fit\.heads\.2\.name"):
        load(Config, path, ["--fit.heads.2.name", "third"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((text, UNREADABLE) for text in (b"[data", b"a = ", b"x = 1\nx = 2", b"\xff\xfe", "missing", "a folder")),
        (b"[data]\nname = 'digits'", r"data\.splits: Field required.*base: Field required"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, message):
    if content == "a folder":
        (tmp_path / "given.toml").mkdir()
    elif content != "missing":
        (tmp_path / "given.toml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(Config, tmp_path / "given.toml")


def test_a_config_is_frozen_and_comes_back_from_json(file):
    config = load(Config, file)
    for section, key in ((config, "seed"), (config.fit, "epochs"), (config.data.splits, "test")):
        with pytest.raises((ValidationError, dataclasses.FrozenInstanceError), match=r"frozen|cannot assign"):
            setattr(section, key, 1)
    assert Config.model_validate_json(config.model_dump_json()) == config


OPTIONS = {option.key: option for option in describe_options(Config)}


def test_every_key_in_the_help_can_be_set_to_the_default_that_stands_there(file):
    assert {"seed", "data.splits.certify", "fit.augment.pad", "plan.max_sites", "fit.heads.N.name"} <= OPTIONS.keys()
    listed = ["--fit.heads", '[{name = "a"}]', "--base.network", "resnet20"]
    settable = [o for o in OPTIONS.values() if o.default not in {"required", "unset"} and "networks.N" not in o.key]
    tokens = [token for o in settable for token in (f"--{o.key.replace('.N.', '.0.')}", o.default)]
    assert load(Config, file, [*tokens, *listed]) == load(Config, file, listed)


@pytest.mark.parametrize(
    ("record", "section", "options"),
    [
        (FitConfig, "fit", {"epochs": 0, "batch": 0, "learning_rate": 0.0, "alpha": 1.5, "folds": 1,
                            "weight_decay": -1.0, "temperature": 0.0, "seed": -1, "minutes": 0.0}),
        (Augment, "fit.augment", {"pad": -1}),
        (Normalization, "base.normalization", {"std": (0.0,), "mean": (math.nan,), "scale": math.inf}),
    ],
)  # fmt: skip
def test_an_option_has_one_bound_and_one_help(file, record, section, options):
    """As a Python keyword and as a flag: the same message; and each is described."""
    given: dict[str, Any] = {"mean": (0.5,), "std": (0.5,)} if record is Normalization else {}
    for name, bad in options.items():
        with pytest.raises(InputError) as keyword:
            record(**given | {name: bad})
        with pytest.raises(InputError) as flag:
            load(Config, file, [f"--{section}.{name}", str(list(bad) if isinstance(bad, tuple) else bad)])
        assert str(keyword.value).startswith(f"{name}")
        assert str(flag.value) == f"config: {section}.{keyword.value}"
        assert OPTIONS[f"{section}.{name}"].help


def test_help_groups_flags_by_section_with_type_meaning_and_default():
    text = cli.help_of(Config)
    sections = {group.splitlines()[0].partition(" ")[0]: group for group in text.split("\n\n")}
    assert {"[data]", "[base.training]", "[fit]", "[fit.augment]", "[fit.heads.N]", "[plan]"} <= sections.keys()
    for option in OPTIONS.values():
        section = option.key.rpartition(".")[0]
        lines = sections[f"[{section}]" if section else "The"].splitlines()[1:]
        (line,) = (line for line in lines if line.split()[0] == f"--{option.key}")
        assert option.help
        assert option.help in line
        assert option.type in line
        assert f"({option.default})" in line or "unset:" in line


@pytest.mark.parametrize(
    ("flag", "rest"),
    [
        ("--outt", "; did you mean --out?"),
        ("--epochs", "; did you mean --base.training.epochs or --fit.epochs?"),
        ("--fitt.folds", "; did you mean --fit.folds?"),
        ("--zzzz", " (see --help)"),
    ],
)
def test_an_unknown_flag_names_the_nearest(flag, rest):
    """Before a missing one is reported."""
    with pytest.raises(InputError) as caught:
        cli.parse(cli.config_parser(Config, "Test.", "python -m train.test"), Config, [flag, "3"])
    assert f"unknown flag {flag}{rest}" in str(caught.value)


def test_the_fit_takes_the_experiment_s_seed_unless_it_has_its_own(file):
    assert load(Config, file, ["--seed", "5"]).fit.seed == 5
    assert load(Config, file, ["--seed", "5", "--fit.seed", "7"]).fit.seed == 7
    assert build_config(load(Config, file, ["--seed", "5"]).model_dump(mode="json", exclude={"fit"})).fit.seed == 5
