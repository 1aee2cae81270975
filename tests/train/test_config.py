"""Configs: overrides of every type, and errors that name the key."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from gati_jax import InputError
from train.config import Config, describe_keys, load_config

CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
    if not path.name.startswith("repro_freeze")  # which test_freeze.py loads
]
SMALL = """
[data]
name = "digits"
base_trained_on = ["all[:10]"]
splits = { fit = "all[:10]", select = "all[10:20]", certify = "all[20:30]", test = "all[30:40]" }
[base]
network = "resnet20"
normalization = { mean = [0.5], std = [0.25] }
"""


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path / "small.toml"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_builds(config):
    loaded = load_config(config)
    assert loaded.base.architecture().classes == loaded.base.classes
    assert len(loaded.base.normalize().mean) == loaded.base.input_shape[2]
    assert [head.build().name for head in loaded.fit.heads] == [head.name for head in loaded.fit.heads]
    assert loaded.fit.build(3).seed == 3


def test_there_are_configs():
    assert {"digits", "cifar10_resnet56"} <= {path.stem for path in CONFIGS}


OVERRIDES = {
    "int": ("fit.epochs", "7", 7),
    "float": ("plan.epsilon", "0.125", 0.125),
    "float in scientific notation": ("base.training.learning_rate", "1e-3", 0.001),
    "int for a float": ("base.training.learning_rate", "1", 1.0),
    "bool": ("fit.augment.flip", "true", True),
    "negative number": ("base.normalization.mean", "[-0.5]", (-0.5,)),
    "list of strings": ("data.base_trained_on", '["all[:5]", "all[5:9]"]', ("all[:5]", "all[5:9]")),
    "list of numbers": ("base.input_shape", "[8, 8, 1]", (8, 8, 1)),
    "path": ("base.weights", "../a b/w.safetensors", Path("../a b/w.safetensors")),
    "quoted path": ("data.dir", '"a/x"', Path("a/x")),
    "string": ("data.name", "cifar10", "cifar10"),
    "string with brackets": ("data.splits.select", "all[3:4]", "all[3:4]"),
    "string with an equals sign": ("data.name", "a=b", "a=b"),
    "key that the file lacks": ("measure_rounds", "9", 9),
}


@pytest.mark.parametrize("case", OVERRIDES)
@pytest.mark.parametrize("form", ["two tokens", "one token"])
def test_override(file, case, form):
    key, text, expected = OVERRIDES[case]
    tokens = [f"--{key}", text] if form == "two tokens" else [f"--{key}={text}"]
    value = load_config(file, tokens)
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected) or isinstance(expected, Path)


def test_the_last_override_wins_and_nothing_else_changes(file):
    before, after = load_config(file), load_config(file, ["--fit.epochs", "3", "--fit.epochs=4", "--seed", "5"])
    assert (after.fit.epochs, after.seed) == (4, 5)
    unchanged = after.model_copy(update={"seed": before.seed, "fit": before.fit})
    assert unchanged == before


def test_a_dash_is_an_underscore_in_a_key(file):
    assert load_config(file, ["--data.base-trained-on", '["all"]']).data.base_trained_on == ("all",)


def test_a_table_of_heads_can_be_overridden(file):
    heads = '[{name = "a", sites = [1, 2], predictor = {kind = "fc", hidden = 8}}, {name = "b"}]'
    one, two = load_config(file, ["--fit.heads", heads]).fit.heads
    assert (one.name, one.sites, one.predictor.kind, two.name, two.sites) == ("a", (1, 2), "fc", "b", None)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("fit.epoch", "fit.epochs"),
        ("plan.epsilom", "plan.epsilon"),
        ("base.training.epocs", "base.training.epochs"),
        ("data.splits.selct", "data.splits.select"),
        ("sed", "seed"),
        ("base.normalization.men", "base.normalization.mean"),
    ],
)
def test_unknown_key_names_the_nearest(file, wrong, near):
    with pytest.raises(InputError) as caught:
        load_config(file, [f"--{wrong}", "1"])
    assert str(caught.value) == f"config: unknown key {wrong}; did you mean {near}?"


@pytest.mark.parametrize(("wrong", "near"), [("fits", "fit."), ("planing", "plan."), ("bases", "base.")])
def test_misspelt_section_names_the_section(file, wrong, near):
    with pytest.raises(InputError, match=f"unknown key {wrong}; did you mean {near}"):
        load_config(file, [f"--{wrong}.epochs", "1"])
    (file.parent / "misspelt.toml").write_text(f"{SMALL}\n[{wrong}]\nepochs = 1")
    with pytest.raises(InputError, match=f"unknown key {wrong}; did you mean {near}"):
        load_config(file.parent / "misspelt.toml")


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
        ("fit", "3"),
    ],
)
def test_wrong_value_names_its_key_and_what_came(file, key, text):
    with pytest.raises(InputError) as caught:
        load_config(file, [f"--{key}", text])
    assert str(caught.value).startswith(f"config: {key}")
    assert text.strip("[]") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a@b", "grid+linear"])
@pytest.mark.parametrize("rest", ["heads", "networks"])
def test_a_head_may_not_be_named_as_candidates_are(file, name, rest):
    more = ', network = "resnet20", weights = "w.pth", trained_on = []' if rest == "networks" else ""
    with pytest.raises(InputError, match=rf"fit\.{rest}\.0\.name: .*expected a name without @ and .*, got '"):
        load_config(file, [f"--fit.{rest}", f'[{{name = "{name}"{more}}}]'])


def test_further_selectors_of_one_kind_would_replace_one_another(file):
    text = '[{name = "a", selectors = [{kind = "sorted", hidden = 8}, {kind = "sorted", hidden = 32}]}]'
    with pytest.raises(InputError, match=r"fit\.heads\.0: .*expected at most one of a kind, .*got sorted, sorted"):
        load_config(file, ["--fit.heads", text])


def test_a_seed_that_numpy_does_not_take_is_refused(file):
    with pytest.raises(InputError, match="config: seed"):
        load_config(file, ["--seed", "-1"])


def test_every_problem_is_named(file):
    with pytest.raises(InputError, match=r"fit\.epochs.*plan\.epsilon"):
        load_config(file, ["--fit.epochs", "0", "--plan.epsilon", "2"])


def test_missing_keys_are_named(tmp_path):
    (tmp_path / "empty.toml").write_text("[data]\nname = 'digits'")
    with pytest.raises(InputError, match=r"data\.splits: Field required.*base: Field required"):
        load_config(tmp_path / "empty.toml")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--fit.epochs"], "expected a value behind --fit.epochs"),
        (["--fit.epochs", "1", "--seed"], "expected a value behind --seed"),
        (["fit.epochs", "1"], "expected --section.key value, got 'fit.epochs'"),
        (["--fit.epochs", "1", "2"], "expected --section.key value, got '2'"),
        (["--seed.x", "1"], "config: seed|expected a section, got the value 0"),
        (["--data.name.x", "1"], "expected a section, got the value 'digits', at name of data.name.x"),
    ],
)
def test_overrides_of_another_form(file, tokens, message):
    with pytest.raises(InputError, match=message):
        load_config(file, tokens)


def test_a_value_in_a_list_can_be_set_by_its_position():
    path = Path(__file__).parents[2] / "configs" / "cifar10_resnet56.toml"
    config = load_config(path, ["--fit.heads.1.name", "narrow", "--fit.heads.1.predictor.hidden", "32"])
    assert [head.name for head in config.fit.heads] == ["wide", "narrow"]
    assert config.fit.heads[1].predictor.model_dump()["hidden"] == 32
    with pytest.raises(InputError, match=r"expected a section, got the value .* at heads of fit\.heads\.2\.name"):
        load_config(path, ["--fit.heads.2.name", "third"])


@pytest.mark.parametrize("content", [b"[data", b"a = ", b"x = 1\nx = 2", b"\xff\xfe"])
def test_a_syntax_error_names_the_file(tmp_path, content):
    (tmp_path / "broken.toml").write_bytes(content)
    with pytest.raises(InputError, match=r"config: cannot read .*broken\.toml"):
        load_config(tmp_path / "broken.toml")


@pytest.mark.parametrize("name", ["nothing.toml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(InputError, match="config: cannot read"):
        load_config(tmp_path / name)


def test_a_config_is_frozen_and_comes_back_from_json(file):
    config = load_config(file)
    for section, key in ((config, "seed"), (config.fit, "epochs"), (config.data.splits, "test")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_every_described_key_can_be_set():
    """What --help lists must exist, down to the last section."""
    keys = [key for key, _, _ in describe_keys(Config)]
    assert {"seed", "data.splits.certify", "base.training.augment.pad", "plan.max_sites", "fit.heads"} <= set(keys)
    for key in keys:
        model = Config
        *sections, last = key.split(".")
        for section in sections:
            annotation = model.model_fields[section].annotation
            (model,) = (part for part in (annotation, *get_args(annotation)) if isinstance(part, type(Config)))
        assert last in model.model_fields
