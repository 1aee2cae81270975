"""Training bases where something is wrong: runs cut off, damaged checkpoints, no numbers; the GPU's script."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import table, training
from gati_jax import InputError
from tests.train.one_pass import DIGITS, ROOT, SMALLEST, small_and_repeatable
from tests.train.test_tensorboard import events
from train import base

SHORT = [
    *DIGITS, "--data.base_trained_on", '["all[:192]"]', "--data.splits.test", "all[1497:1527]",
    "--base.training.epochs", "3", "--base.training.checkpoint_seconds", "0",
]  # fmt: skip


class KilledError(Exception):
    """What a kill is to a test."""


def train(out, *more):
    with small_and_repeatable(SMALLEST):
        base.main([*SHORT, "--out", str(out), *more])


@pytest.fixture(scope="module")
def all_epochs(tmp_path_factory):
    """A run that died between its last epoch and its evaluation."""
    folder = tmp_path_factory.mktemp("cut off")

    def die(*_, **__):
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "evaluate", die)
        with pytest.raises(KilledError):
            train(folder)
    return folder


@pytest.fixture
def cut_off(all_epochs, tmp_path):
    return shutil.copytree(all_epochs, tmp_path / "cut off")


# --- Resuming ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_does_not_pass_its_last_part_for_the_whole_time(tmp_path, monkeypatch):
    """Every epoch takes 10 s by the clock of ``report``; two are done before the kill."""
    report, mortal = base.report, [True]

    def slow(writer, recipe, seconds, record):
        report(writer, recipe, seconds, record._replace(seconds=10.0))
        if record.epoch == 3 and mortal:
            raise KilledError

    monkeypatch.setattr(base, "report", slow)
    with pytest.raises(KilledError):
        train(tmp_path)
    mortal.clear()
    train(tmp_path)
    said = json.loads((tmp_path / "base.json").read_text())
    assert said.get("train_seconds") in {None, 30.0}


def test_a_run_cut_off_before_its_result_keeps_the_last_epoch_s_scalars(cut_off):
    train(cut_off)
    hidden = [e.step for e in events(cut_off / "tensorboard") if e.HasField("session_log")]
    assert all(step > 3 or step == 1 for step in hidden)  # purged from step 3 on: epoch 3's loss is gone


def test_a_damaged_checkpoint_is_one_clear_line(cut_off):
    for path in (cut_off / "checkpoints").rglob("*"):
        if path.is_file() and path.stat().st_size > 50:
            path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(InputError, match=r"remove .*checkpoints"):
        train(cut_off)


def test_other_data_of_the_same_name_are_another_run(cut_off, monkeypatch):
    """``run_epochs`` asks for an identity of configuration and data."""
    load, report, seen = base.data.load, base.report, []

    def changed(*given):
        found = load(*given)
        return type(found)(images=found.images[::-1].copy(), labels=found.labels)

    monkeypatch.setattr(base.data, "load", changed)
    monkeypatch.setattr(base, "report", lambda *given: (seen.append(given[-1].epoch), report(*given)))
    train(cut_off)
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


def dry(folder: Path, failing: str = "") -> list[str]:
    """Run gpu_all.sh with a ``make`` and a Python that only write down what they are asked for."""
    stand_ins = {
        "benchmarks/gpu_all.sh": (ROOT / "benchmarks" / "gpu_all.sh").read_text(encoding="utf-8"),
        "make": "#!/bin/bash\n",
        ".venv/python3/bin/python": '#!/bin/bash\necho "$JAX_DEFAULT_MATMUL_PRECISION $*" >>calls\n'
        f'[[ -n "{failing}" && "$*" == *"{failing}"* ]] && exit 1\n'
        'out=; for a in "$@"; do [ "$last" = --out ] && out=$a; last=$a; done\n'
        'case "$*" in *train.base*) mkdir -p "$out"; touch "$out/base.json" "$out/base.safetensors";; '
        '*train.caches*) mkdir -p "$out/bundle";; *train.reproduce*) mkdir -p "$out"; touch "$out/reproduction.json";; '
        "esac\nexit 0\n",
    }
    for name, text in stand_ins.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for name in ("runs/gpu", "docs/figures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "calls").unlink(missing_ok=True)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "BASES": "cifar10_resnet18"}
    subprocess.run(["bash", "benchmarks/gpu_all.sh"], cwd=folder, env=environment, check=False, capture_output=True)
    return (folder / "calls").read_text().splitlines()


def test_bases_bundles_and_reproductions_are_not_made_again_and_only_tests_compute_in_true_float32(tmp_path):
    """On a GPU, float32 convolutions keep ten bits of what they multiply (TF32) unless told otherwise."""
    made = ("train.base", "train.caches", "train.reproduce")
    first, again = (dry(tmp_path) for _ in range(2))
    assert all(any(name in call for call in first) for name in made)
    assert [call for call in again if any(name in call for name in made)] == []
    (precise,) = [call for call in first if call.startswith("highest ")]
    assert "-m pytest" in precise


@pytest.mark.parametrize("failing", ["-m pytest", "benchmarks.training"])
def test_bases_are_trained_even_where_a_test_fails_or_pytorch_does_not_compile(tmp_path, failing):
    assert any("train.base" in call for call in dry(tmp_path, failing))


@pytest.mark.parametrize(("load", "spread", "count"), [(0.1, 0.1, 0), (0.9, 0.1, 1), (0.1, 0.5, 1), (0.9, 0.5, 2)])
def test_figures_of_a_loaded_machine_or_with_a_large_spread_are_not_valid(load, spread, count):
    assert len(training.doubts(load, {"torch eager": spread})) == count


def test_ratios_are_to_another_reference_where_the_first_is_missing(tmp_path, capsys):
    same = {"batch": 1, "accuracy": 1.0, "agreement": 1.0, "peak_mib": 1}
    row = {"contender": "torch eager full", "mean_ms": 2.0} | same
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
