"""The command ``gati-jax``: in folders with modules of the same names, from a wheel, and the configs that it writes."""

import itertools
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from gati_jax import InputError, WeightsError
from gati_jax.commands import COMPLETION, SCRIPTS
from gati_jax.models import export_state_dict, init, resnet
from train.config import Config, load
from train.init import main as write_config
from train.zoo import Entry, completed

ROOT = Path(__file__).resolve().parents[1]
IN_THE_WAY = ("train", "serve", "cli", "config", "caches", "settings")
RUN = "from gati_jax.commands import main; main()"


@pytest.fixture
def home(tmp_path) -> Path:
    """A user's folder: modules that bear the names of ours, and must not be imported."""
    for name in IN_THE_WAY:
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('the user\\'s {name}.py')\n")
    return tmp_path


def run(home: Path, *words: str, path: Path = ROOT, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``gati-jax`` as its script does: the current folder is first on the path only where it is asked for."""
    command = [sys.executable, "-P", "-c", before + RUN, *words]
    environment = os.environ | {"PYTHONPATH": str(path), "COLUMNS": "100"}
    return subprocess.run(command, cwd=home, capture_output=True, text=True, env=environment, check=False)


def test_the_command_alone_lists_the_commands_and_loads_nothing(home):
    done = run(home, before="import sys, atexit; atexit.register(lambda: print('jax' in sys.modules)); ")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "False"
    for name in (*SCRIPTS, COMPLETION):
        assert f"\n  {name} " in done.stdout


def test_an_unknown_command_is_one_line(home):
    done = run(home, "evalute")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: arguments: unknown command 'evalute'; did you mean evaluate? (see --help)\n"


def test_a_missing_extra_is_named(home):
    missing = "import sys; sys.modules['rich'] = sys.modules['pydantic'] = None; "
    done = run(home, "fit", "--help", before=missing)
    assert done.returncode == 2
    assert done.stderr.startswith("error: fit needs the package ")
    assert done.stderr.endswith(": pip install 'gati-jax[train]'\n")
    assert done.stderr.count("\n") == 1


def test_flags_complete_in_a_shell_whatever_the_folder_holds(home):
    """Which imports every script."""
    done = run(home, COMPLETION)
    assert (done.returncode, done.stderr) == (0, "")
    (home / "completion").write_text(done.stdout)
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("needs bash")
    ask = 'source completion; COMP_WORDS=(gati-jax {}); COMP_CWORD={}; _gati_jax; echo "${{COMPREPLY[@]}}"'
    for words, expected in [
        ("e", "evaluate export"),
        ("sc", "score"),
        ("serve --grp", "--grpc-port --grpc-streams"),
        ("tune --ch", "--chain"),
        ("fit --plan.ep", "--plan.epsilon"),
        ("train-base --no-such", ""),
        ("completion e", ""),
    ]:
        script = ask.format(words, len(words.split()))
        said = subprocess.run([shell, "-c", script], cwd=home, capture_output=True, text=True, check=True)
        assert (said.stdout.strip(), said.stderr) == (expected, ""), words


def test_a_script_calls_itself_as_it_was_called(home):
    done = run(home, "serve", "--help")
    assert "usage: gati-jax serve" in done.stdout
    assert "gati-jax serve --bundle" in done.stdout
    assert "python -m" not in done.stdout


OWN = """
import jax, jax.numpy as jnp, numpy as np, gati_jax

def block(params, x):
    return x * params

def classify(params, x):
    return x.reshape(len(x), -1) @ params

def network():
    spec = jax.ShapeDtypeStruct((4, 4, 3), "float32")
    one = np.ones((), np.float32)
    return gati_jax.Chain((block,) * 2, classify, (one, one, np.zeros((48, 10), np.float32)), spec)
"""


def fits_own_train_module(home: Path, path: Path) -> None:
    """The user's train.py is what ``--chain train:network`` names; our own train runs it, up to its data's shape."""
    (home / "train.py").write_text(OWN)
    written = run(home, "init", "--data", "digits", "--chain", "train:network", "--out", "own.toml", path=path)
    assert (written.returncode, written.stderr) == (0, ""), written.stderr
    text = (home / "own.toml").read_text()
    for command in ("evaluate", "serve"):  # a bundle does not name the network
        assert f"#   gati-jax {command} --bundle runs/own/bundle --chain train:network" in text
    done = run(home, "fit", "--config", "own.toml", "--out", "out", path=path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: data.splits.fit: the network takes (4, 4, 3), got images (8, 8, 1)"
    )


def test_a_train_py_of_the_user_s_own_may_hold_the_network(home):
    fits_own_train_module(home, ROOT)


@pytest.mark.slow
def test_a_wheel_has_all_of_it(home, tmp_path_factory):
    build = pytest.importorskip("hatchling.build")
    made, installed = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        wheel = made / build.build_wheel(str(made))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    assert {path.name for path in installed.iterdir()} == {"bin", "gati_jax", wheel.name[:14] + ".dist-info"}
    server = installed / "gati_jax" / "commands" / "serve"
    for file in ("page/static/index.html", "page/static/uplot.LICENSE.txt", "monitoring/alerts.yml"):
        assert (server / file).is_file()
    environment = os.environ | {"PYTHONPATH": str(installed)}
    script = [str(installed / "bin" / "gati-jax"), COMPLETION]
    done = subprocess.run(script, cwd=home, capture_output=True, text=True, env=environment, check=True)
    assert "--base.weights" in done.stdout
    fits_own_train_module(home, installed)


# --- init -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet20() -> dict[str, np.ndarray]:
    """Tensors of a ResNet-20 for the digits."""
    network = resnet("resnet20", input_shape=(8, 8, 1))
    shapes = jax.eval_shape(lambda: init(network, jax.random.key(0)))
    return export_state_dict(network, jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes))


ENTRY = {
    "network": "resnet20",
    "classes": 10,
    "input_shape": (8, 8, 1),
    "normalization": {"mean": (0.3,), "std": (0.4,)},
    "dataset": "digits",
    "trained_on": ("all[:700]",),
    "split": 'test"\n[base]\nchain = "os:abort"',
    "accuracy": 0.5,
    "recipe": {},
    "seed": 0,
}


def written(path: Path, *more: str) -> Config:
    write_config(["--data", "digits", "--out", str(path), *more])
    return load(Config, path)


def test_without_weights_the_config_is_the_library_s_own(tmp_path, capsys):
    config = written(tmp_path / "c.toml")
    shipped = load(Config, ROOT / "configs" / "digits.toml")
    assert (config.base, config.fit, config.plan) == (shipped.base, shipped.fit, shipped.plan)
    assert config.data.splits.test == "all[1497:]"
    assert "gati-jax train-base --config" in capsys.readouterr().out


def test_weights_that_describe_themselves_are_believed_but_not_obeyed(tmp_path, resnet20):
    """Their metadata are untrusted: text from them may not become a key."""
    file = tmp_path / "w.safetensors"
    save_file(resnet20, file, metadata=Entry.model_validate(ENTRY).metadata())
    config = written(tmp_path / "c.toml", "--weights", str(file))
    assert config.base.chain is None
    assert config.data.base_trained_on == ("all[:700]",)
    assert completed(config).base.network == "resnet20"
    assert "chain =" not in tomllib.loads((tmp_path / "c.toml").read_text())["base"]


def test_other_weights_are_known_by_their_tensors(tmp_path, resnet20):
    file = tmp_path / "w.safetensors"
    save_file(resnet20, file)
    config = written(tmp_path / "c.toml", "--weights", str(file))
    assert (config.base.network, config.base.input_shape, config.base.classes) == ("resnet20", (8, 8, 1), 10)
    assert "[base.normalization] # CHECK" in (tmp_path / "c.toml").read_text()
    with pytest.raises(InputError, match=r"--out: expected a new file, got .*c\.toml, which is left alone"):
        written(tmp_path / "c.toml")
    save_file(resnet20 | {"fc.weight": np.ones((7, 64), np.float32)}, file)
    with pytest.raises(WeightsError, match="--weights: expected a classifier of the data's 10 classes, got one of 7"):
        written(tmp_path / "other.toml", "--weights", str(file))
    save_file({"alien.weight": np.ones(3, np.float32)}, file)
    with pytest.raises(WeightsError, match=r"--weights: expected the tensors of one of resnet20, .* --chain"):
        written(tmp_path / "other.toml", "--weights", str(file))
    assert not (tmp_path / "other.toml").exists()


def test_a_folder_of_pictures_and_an_archive_are_described(tmp_path, capsys):
    for name, sides in {"photos": (9, 12), "even": (12, 12)}.items():
        for split, label in itertools.product(("train", "val"), ("cat", "dog", "owl")):
            (tmp_path / name / split / label).mkdir(parents=True)
            for i, side in enumerate(sides):
                Image.new("RGB", (side, 12)).save(tmp_path / name / split / label / f"{i}.png")
    for name, size, reading, shape in (
        ("photos", (), (256, 224), (224, 224, 3)),
        ("photos", ("--size", "32"), (32, 32), (32, 32, 3)),
        ("even", (), (None, None), (12, 12, 3)),
    ):
        out = tmp_path / f"{name}{len(size)}.toml"
        write_config(["--data", "folder", "--data-dir", str(tmp_path / name), "--out", str(out), *size])
        config = load(Config, out)
        assert (config.data.resize, config.data.crop) == reading
        assert (config.base.input_shape, config.base.classes) == (shape, 3)
        assert (config.data.splits.fit, config.data.splits.test) == ("train", "val[3:]")
    np.savez(tmp_path / "few.npz", images=np.zeros((40, 6, 5, 1), np.uint8), labels=np.arange(40) % 4)
    write_config(["--data", "npz", "--data-dir", str(tmp_path / "few.npz"), "--out", str(tmp_path / "n.toml")])
    config = load(Config, tmp_path / "n.toml")
    assert (config.base.input_shape, config.base.classes, config.data.splits.fit) == ((6, 5, 1), 4, "all[:20]")
    capsys.readouterr()
    for more, message in (
        (["--data", "npz"], "--data-dir: expected the folder or file of npz, got none"),
        (["--data", "digits", "--size", "8"], "--size: expected it with --data folder"),
    ):
        with pytest.raises(InputError, match=message):
            write_config([*more, "--out", str(tmp_path / "refused.toml")])


@pytest.mark.parametrize("package", ["train", "serve"])
def test_packages_name_themselves_relatively(package):
    """A wheel has them inside gati_jax.commands."""
    for file in sorted((ROOT / package).rglob("*.py")):
        for line in file.read_text(encoding="utf-8").splitlines():
            words = line.split()
            assert not (words[:1] in (["from"], ["import"]) and words[1].partition(".")[0] == package), (file, line)
