"""Training bases where something is wrong: metadata from elsewhere, runs cut off, damaged checkpoints, no numbers."""

import functools
import json
import subprocess
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from benchmarks import table, training
from gati_jax import InputError, WeightsError
from tests.train.one_pass import DIGITS, ROOT, SMALLEST, small_and_repeatable
from tests.train.test_tensorboard import events
from tests.train.test_zoo import TENSORS, bare, entry
from train import base, caches, zoo
from train.config import Fit, NetworkSection
from train.zoo import completed, keep, read_entry

SHORT = [
    *DIGITS, "--data.base_trained_on", '["all[:192]"]', "--data.splits.test", "all[1497:1527]",
    "--base.training.epochs", "3", "--base.training.checkpoint_seconds", "0",
]  # fmt: skip


class KilledError(Exception):
    """What a kill is to a test."""


def tampered(folder, **metadata) -> Path:
    path = folder / "weights.safetensors"
    save_file(TENSORS, path, metadata=entry().metadata() | metadata)
    return path


def train(out, *more):
    with small_and_repeatable(SMALLEST):
        base.main([*SHORT, "--out", str(out), *more])


def cut_off(out, patch, at, *more):
    """Train, and die where ``base`` calls the function of that name."""

    def die(*_, **__):
        raise KilledError

    with patch.context() as p:
        p.setattr(base, at, die)
        with pytest.raises(KilledError):
            train(out, *more)


# --- Untrusted metadata ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["../escaped", "{tmp}/escaped"])
def test_the_zoo_writes_nothing_outside_its_folder(tmp_path, dataset):
    weights = tampered(tmp_path, dataset=dataset.format(tmp=tmp_path))
    with pytest.raises(InputError):
        keep(weights, tmp_path / "zoo")
    assert list(tmp_path.glob("escaped*")) == []


def test_metadata_nested_too_deep_are_damaged_metadata(tmp_path):
    with pytest.raises(WeightsError, match="metadata"):
        read_entry(tampered(tmp_path, recipe="[" * 100_000))


def test_a_negative_input_shape_is_refused_as_bad_input(tmp_path):
    with pytest.raises(WeightsError, match="input_shape"):
        completed(bare(tmp_path, tampered(tmp_path, input_shape="[-8, 8, 1]")))


def test_an_accuracy_that_is_no_share_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="accuracy"):
        read_entry(tampered(tmp_path, accuracy="NaN"))


def test_a_name_that_reads_as_json_comes_back(tmp_path):
    """``train.base`` writes such a file itself; then no script reads it."""
    assert read_entry(tampered(tmp_path, **entry(dataset="123").metadata())) == entry(dataset="123")


def test_the_zoo_s_limit_holds_for_what_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "MAX_BYTES", 5000)
    weights = tampered(tmp_path, recipe=json.dumps({"note": "x" * 10_000}))
    with pytest.raises(InputError, match="out: expected at most"):
        keep(weights, tmp_path / "zoo")


# --- Resuming ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_does_not_pass_its_last_part_for_the_whole_time(tmp_path, monkeypatch):
    """Every epoch takes 10 s by the clock of ``report``; two are done before the kill."""
    report = base.report

    def slow(writer, recipe, batch, seconds, record):
        report(writer, recipe, batch, seconds, record._replace(seconds=10.0))
        if die and record.epoch == 3:
            raise KilledError

    monkeypatch.setattr(base, "report", slow)
    die = True
    with pytest.raises(KilledError):
        train(tmp_path)
    die = False
    train(tmp_path)
    said = json.loads((tmp_path / "base.json").read_text())
    assert said.get("train_seconds") in {None, 30.0}


def test_a_run_cut_off_before_its_result_keeps_the_last_epoch_s_scalars(tmp_path, monkeypatch):
    cut_off(tmp_path, monkeypatch, "evaluate")
    train(tmp_path)
    found = events(tmp_path / "tensorboard")
    hidden = [e.step for e in found if e.HasField("session_log")]
    assert all(step > 3 or step == 1 for step in hidden)  # purged from step 3 on: epoch 3's loss is gone


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, monkeypatch):
    cut_off(tmp_path, monkeypatch, "evaluate")
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file() and path.stat().st_size > 50]
    for path in files:
        path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(InputError, match=r"remove .*checkpoints"):
        train(tmp_path)


def test_other_data_of_the_same_name_are_another_run(tmp_path, monkeypatch):
    """``run_epochs`` asks for an identity of configuration and data."""
    cut_off(tmp_path, monkeypatch, "evaluate")
    load, seen = base.data.load, []

    def changed(*given):
        found = load(*given)
        return type(found)(images=found.images[::-1].copy(), labels=found.labels)

    monkeypatch.setattr(base.data, "load", changed)
    report = base.report
    monkeypatch.setattr(base, "report", lambda *given: (seen.append(given[-1].epoch), report(*given)))
    train(tmp_path)
    assert seen == [1, 2, 3]


# --- The recipe's edges -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_no_numbers_are_not_kept(tmp_path):
    with pytest.raises(InputError):
        train(tmp_path, "--base.training.learning_rate", "1e20")
    assert not (tmp_path / "base.safetensors").exists()


@pytest.mark.parametrize(
    "more",
    [
        ["--base.training.epochs", "1", "--base.training.batch", "191"],
        ["--base.training.label_smoothing", "0.999"],
        ["--base.training.optimizer", "muon", "--base.training.bfloat16", "true"],
        ["--base.training.average", "0.9999", "--base.training.cutout", "256", "--base.training.batch", "7"],
    ],
)  # fmt: skip
def test_edges(tmp_path, more):
    train(tmp_path, *more, "--base.training.flips", "true")
    said = json.loads((tmp_path / "base.json").read_text())
    assert 0 <= said["accuracy"] <= 1
    assert 0 <= said["accuracy_with_flips"] <= 1


# --- The GPU's script -------------------------------------------------------------------------------------------------


def dry(script: str, folder: Path, failing: str = "") -> list[str]:
    """Run gpu.sh with a ``make`` and a Python that only write down what they are asked for."""
    (folder / "benchmarks").mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks" / "gpu.sh").write_text(script)
    python = folder / ".venv" / "python3" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(
        '#!/bin/bash\necho "$JAX_DEFAULT_MATMUL_PRECISION $*" >>calls\n'
        f'[[ -n "{failing}" && "$*" == *"{failing}"* ]] && exit 1\n'
        'out=; for a in "$@"; do [ "$last" = --out ] && out=$a; last=$a; done\n'
        'case "$*" in *train.base*) mkdir -p "$out"; touch "$out/base.json" "$out/base.safetensors";; '
        '*train.caches*) mkdir -p "$out/bundle";; *train.reproduce*) mkdir -p "$out"; touch "$out/reproduction.json";; '
        "esac\nexit 0\n"
    )
    python.chmod(0o755)
    (folder / "make").write_text("#!/bin/bash\n")
    (folder / "make").chmod(0o755)
    for name in ("runs/gpu", "docs/figures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "calls").unlink(missing_ok=True)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "BASES": "cifar10_resnet18"}
    subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=folder, env=environment, check=False, capture_output=True)
    return (folder / "calls").read_text().splitlines()


SCRIPT = functools.partial((ROOT / "benchmarks" / "gpu.sh").read_text, encoding="utf-8")


def test_bases_bundles_and_reproductions_are_not_made_again(tmp_path):
    """So says the head of gpu.sh."""
    made = ("train.base", "train.caches", "train.reproduce")
    first, again = (dry(SCRIPT(), tmp_path) for _ in range(2))
    assert all(any(name in call for call in first) for name in made)
    assert [call for call in again if any(name in call for name in made)] == []


@pytest.mark.parametrize("failing", ["-m pytest", "benchmarks.training"])
def test_bases_are_trained_even_where_a_test_fails_or_pytorch_does_not_compile(tmp_path, failing):
    assert any("train.base" in call for call in dry(SCRIPT(), tmp_path, failing))


def test_only_the_tests_of_gpu_sh_compute_in_true_float32(tmp_path):
    """On a GPU, float32 convolutions keep ten bits of what they multiply (TF32) unless told otherwise."""
    precise = [call for call in dry(SCRIPT(), tmp_path) if call.startswith("highest ")]
    assert len(precise) == 1
    assert "-m pytest" in precise[0]


@pytest.mark.parametrize(("load", "spread", "count"), [(0.1, 0.1, 0), (0.9, 0.1, 1), (0.1, 0.5, 1), (0.9, 0.5, 2)])
def test_figures_of_a_loaded_machine_or_with_a_large_spread_are_not_valid(load, spread, count):
    assert len(training.doubts(load, {"torch eager": spread})) == count


def test_ratios_are_to_another_reference_where_the_first_is_missing(tmp_path, capsys):
    row = {
        "contender": "torch eager full",
        "batch": 1,
        "mean_ms": 2.0,
        "accuracy": 1.0,
        "agreement": 1.0,
        "peak_mib": 1,
    }
    (tmp_path / "r.json").write_text(json.dumps({"rows": [row, row | {"contender": "gati-jax full", "mean_ms": 1.0}]}))
    table.main([str(tmp_path / "r.json"), "--reference", "torch.compile full", "torch eager full"])
    said = capsys.readouterr().out
    assert "Ratios are to torch eager full" in said
    assert "1.0 ms (0.50)" in said
    with pytest.raises(InputError, match=r"'torch\.compile full'"):
        table.main([str(tmp_path / "r.json"), "--reference", "torch.compile full"])


def test_without_labels_there_is_nothing_to_train_on(tmp_path, monkeypatch):
    load = base.data.load
    monkeypatch.setattr(base.data, "load", lambda *given: type(load(*given))(images=load(*given).images))
    with pytest.raises(InputError, match="labels"):
        train(tmp_path)


def test_what_a_small_network_s_file_says_it_has_seen_counts_too(tmp_path, monkeypatch):
    """As it does for the base: "counts as seen, whatever the config says"."""
    weights = tampered(tmp_path, trained_on='["all[:1497]"]')
    config = bare(tmp_path, weights)
    section = {"name": "small", "network": "resnet20", "trained_on": ["all[:897]"]}
    fit = Fit(networks=(NetworkSection(**section, weights=weights),))

    monkeypatch.setattr(caches, "import_state_dict", lambda *_: ())
    monkeypatch.setattr(caches, "network_head", lambda *_, **__: None)
    with pytest.raises(InputError, match="other rows than select"):
        caches.small_networks(completed(config.model_copy(update={"fit": fit})))
