"""What the README and the documentation say works: code blocks run, commands parse, links lead somewhere."""

import contextlib
import functools
import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import gati_jax
from gati_jax import data
from gati_jax.caches import Grid, SortedSelector
from gati_jax.commands import SCRIPTS
from gati_jax.fitting import untrained
from gati_jax.models import ResNet, ViT, fold, init, to_chain
from tests.conftest import dense_block, linear_classifier

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in PAGES if page.parent.name != "remarks"]
SERVER = "localhost:8000"
REFUSED_ON_PURPOSE = {"docs/how-to/serve.md": 1}
MAKEFILE = (ROOT / "Makefile").read_text()


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of a page's shell blocks, indented ones included: as text, and as words."""
    indented = re.findall(r"^ {4}((?:python|make) .*)$", page.read_text(), flags=re.MULTILINE)
    found = []
    for block in (*blocks(page, "bash"), *indented):
        command = ""
        for line in block.splitlines():
            command += line + "\n"
            if line.endswith("\\"):
                continue
            with contextlib.suppress(ValueError):  # in a quotation: the command goes on
                if words := shlex.split(command.replace("\\\n", " "), comments=True):
                    found.append((command, words))
                command = ""
        assert not command.strip(), f"unfinished: {command}"
    return found


with_page = functools.partial(pytest.mark.parametrize, "page", ids=name_of)
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
COMMANDS = {shlex.join(words): words for page in PAGES for _, words in commands(page) if words[0] != "curl"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder as `make quickstart` leaves it, but for a smaller network and a cache with random weights."""
    folder, random = tmp_path_factory.mktemp("clone"), np.random.default_rng(0)
    network = ResNet(stages=(1, 1), widths=(4, 8), shortcut="A", input_shape=(8, 8, 1))
    normalization = gati_jax.Normalization(mean=(0.305,), std=(0.376,), scale=1 / 16)
    weights = drawn(random, jax.eval_shape(lambda: fold(init(network, jax.random.key(0)))))
    chain = to_chain(network, weights, normalization)
    head = gati_jax.Head(name="grid", predictor=lambda n: Grid(n, cells=2, hidden=8), selector=SortedSelector())
    caches = untrained(chain, (head,))
    images = data.load("digits", "all[:400]").images
    costs = gati_jax.CostTable(device="test", batch=1, blocks_ms=(1.0,) * 2, lookup_ms={c.name: 0.1 for c in caches})
    plan = gati_jax.plan(gati_jax.replay(chain, caches, images[:200]), costs, epsilon=0.2)
    certificate = gati_jax.certify(plan, gati_jax.replay(chain, caches, images[200:]), epsilon=0.2)
    gati_jax.save_bundle(folder / "runs/digits/caches/bundle", chain, caches, plan, certificate)
    vit = ViT(patch=2, width=8, depth=2, heads=2, hidden=16, input_shape=(8, 8, 1))
    weights = drawn(random, jax.eval_shape(lambda: fold(init(vit, jax.random.key(0)))))
    *_, last = weights
    made = to_chain(vit, weights, normalization)
    logits = np.asarray(made(made.prepare(np.asarray(images))))
    last["head"]["bias"] -= logits.mean(0)  # so that each class is an answer
    gati_jax.save_pretrained(to_chain(vit, weights, normalization), folder / "my_vit")
    return folder


def drawn(random: np.random.Generator, shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape, scale=0.1).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def server(clone) -> Iterator[str]:
    """The HTTP address of `make serve` on that bundle."""
    with serving("--bundle", str(clone / "runs/digits/caches/bundle")) as address:
        yield address


@contextlib.contextmanager
def serving(*options: str, folder: Path | None = None) -> Generator[str]:
    """Serve, and yield the HTTP address."""
    ports = ["--http-port", "0", "--grpc-port", "0", "--admin-port", "0", "--grace", "0", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "serve", "--program-cache", "off", *options, *ports]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, cwd=folder, **pipes) as process:
        assert process.stdout is not None
        printed = json.loads(process.stdout.readline())
        address = re.sub(r"^https?://", "", printed["http"])
        until = time.monotonic() + 60
        while not is_ready(address):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        yield address
        process.terminate()
        assert process.wait(30) == 0


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=5) as response:
            return response.status == 200
    except urllib.error.URLError:
        return False


@pytest.fixture(scope="module")
def names(digits) -> dict[str, Any]:
    """What blocks take for granted: a user's own network, and images."""
    sizes = (64, 48, 48, 48, 48, 48, 10)
    shapes = [{"w": np.empty((m, n)), "b": np.empty(n)} for m, n in itertools.pairwise(sizes)]
    params = drawn(np.random.default_rng(0), shapes)
    chain = gati_jax.Chain((dense_block,) * 5, linear_classifier, params, jax.ShapeDtypeStruct((64,), "float32"))
    candidates = untrained(chain, (gati_jax.Head(name="grid", predictor=Grid, selector=SortedSelector()),))
    return {
        "block": dense_block,
        "classifier": linear_classifier,
        "params": params,
        "chain": chain,
        "candidates": candidates,
        "costs": gati_jax.CostTable(
            device="test", batch=1, blocks_ms=(1.0,) * 5, lookup_ms={c.name: 0.05 for c in candidates}
        ),
        "fit_images": digits.images[:256],
        "select_images": digits.images[256:384],
        "certify_images": digits.images[384:512],
        "image": digits.images[600],
    }


WITHOUT_JAX = 'import sys; sys.modules.update(dict.fromkeys(["jax", "flax", "gati_jax"]))\n'


@with_page(argvalues=WITH_PYTHON)
def test_python_blocks_run_in_order(page, names, clone, tmp_path, monkeypatch, request):
    shutil.copytree(clone, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names, alone = dict(names), ""
    for block in blocks(page, "python"):
        if alone or "import onnxruntime" in block:  # what follows needs neither JAX nor the library
            alone += block
            continue
        at = request.getfixturevalue("server") if SERVER in block else SERVER
        exec(compile(block.replace(SERVER, at), name_of(page), "exec"), names)
    if alone:
        subprocess.run([sys.executable, "-c", WITHOUT_JAX + alone], check=True)
    if page.name == "README.md":
        assert 0 <= int(names["p"].class_index) < 10
        assert 0 < int(names["p"].exit) <= 5
    errors = 0
    for command, words in commands(page):
        if words[0] == "curl" and shutil.which("curl"):
            at = request.getfixturevalue("server")
            done = subprocess.run(command.replace(SERVER, at), shell=True, check=True, capture_output=True)
            errors += "error" in json.loads(done.stdout)
    assert errors == REFUSED_ON_PURPOSE.get(name_of(page), 0)


OWN_MODULES = [DOCS / "how-to" / f"{name}.md" for name in ("linen", "nnx", "equinox")]


@pytest.mark.parametrize("page", [OWN_MODULES[0], *(pytest.param(p, marks=pytest.mark.slow) for p in OWN_MODULES[1:])])
def test_a_users_own_module_is_served(page, names, tmp_path, monkeypatch):
    """As the page says: its first block in a file of its own, the bundle made by the others, and the command."""
    monkeypatch.chdir(tmp_path)
    first, *others = blocks(page, "python")
    (tmp_path / "my_network.py").write_text(first)
    scope = dict(names)
    for block in (first, *others):
        exec(compile(block, name_of(page), "exec"), scope)
    [command] = [words for _, words in commands(page) if words[:3] == ["python", "-m", "serve"]]
    image = scope["certify_images"][0]
    with serving(*command[3:], folder=tmp_path) as address:
        body = {
            "inputs": [{"name": "images", "datatype": "FP32", "shape": image.shape, "data": image.ravel().tolist()}]
        }
        request = urllib.request.Request(f"http://{address}/v2/models/gati/infer", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=30) as response:
            outputs = {output["name"]: output["data"] for output in json.load(response)["outputs"]}
    assert outputs["class_index"] == [int(scope["prediction"].class_index)]
    assert outputs["exit"] == [int(scope["prediction"].exit)]


def test_the_lines_of_the_users_own_are_few():
    """Beside his module: the function that returns its chain, and all behind it."""
    for page in OWN_MODULES:
        first, *others = blocks(page, "python")
        own = first[first.index("def chain") :] + "".join(block for block in others if "reshape" not in block)
        assert len([line for line in own.splitlines() if line.strip()]) <= 15 - 1  # and import gati_jax


@functools.cache
def options_of(module: str) -> set[str]:
    """The options that `python -m module --help` names."""
    if (ROOT / module.replace(".", "/")).is_dir():
        module = f"{module}.__main__"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit) as end:
            importlib.import_module(module).main()
    assert not end.value.code
    return set(re.findall(r"--[\w.-]+", printed.getvalue()))


def as_module(words: list[str]) -> list[str]:
    """`gati-jax NAME ...` as `python -m MODULE ...`."""
    if words[0] != "gati-jax":
        return words
    return ["python", "-m", SCRIPTS[words[1]].module.removesuffix(".__main__"), *words[2:]]


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_commands_exist_and_take_their_options(words):
    match as_module(words):
        case ["make", target, *variables]:
            assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE)
            for variable in variables:
                assert f"$({variable.partition('=')[0]})" in MAKEFILE or variable.startswith("BUNDLE=")
        case ["python", "-m", module, *rest]:
            for word in rest:
                if word.startswith("--"):
                    key, *_ = re.split(r"\.\d+\.|=", word)  # a position in a list is no key of its own
                    assert key in options_of(module)
                if word.startswith("configs/"):
                    assert (ROOT / word).is_file()
            assert options_of(module)
        case [*before, script, "wheels"] | [*before, script] if (ROOT / script).is_file():
            assert before == ["python"] or {word.partition("=")[0] for word in before} <= {"PYTHON", "DATA"}
        case ["pip", "install", "-e", package]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(package.removeprefix(".[").removesuffix("]").split(",")) <= set(extras)
        case [".", ".venv/python3*/bin/activate"]:
            pass
        case _:
            pytest.fail(f"no check for {words}")


@with_page(argvalues=PAGES)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target
    rooms = "configs|docs|gati_jax|serve|train|benchmarks|tests"
    for path in re.findall(rf"(?<![\w/.])((?:{rooms})/[\w./-]+\.(?:py|toml|md|sh|svg))\b", text):
        assert (ROOT / path).is_file() or f"]({path})" in text, path
    for target in re.findall(r"`make (\w+)", text):
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE), target
    for module in re.findall(r"(?:python -m|<!-- \w+:) ([\w.]*\w)", text):
        if module not in {"NAME", "python", "benchmarks.NAME"}:
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), module


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        if page.is_relative_to(DOCS):
            assert re.search(rf"[ :]{re.escape(page.relative_to(DOCS).as_posix())}$", navigation, flags=re.MULTILINE), (
                page
            )


def test_metrics_are_those_of_the_server():
    page = (DOCS / "reference" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `(gati_\w+)`", page, flags=re.MULTILINE))
    source = "".join(path.read_text() for path in sorted((ROOT / "serve").rglob("*.py")))
    stems = {re.sub("_(total|info)$", "", name) for name in documented}
    for stem in stems:
        assert f'"{stem}"' in source or f'"{stem.removeprefix("gati_adaptation_")}"' in source, stem
    named = re.findall(r'"(gati_(?!jax)\w+)"', source)
    assert {re.sub("_(total|info|bucket|sum|count)$", "", name) for name in named} <= stems
    for other in PAGES:
        assert set(re.findall(r"`(gati_(?!jax)\w+?)(?:\{|`)", other.read_text())) <= documented, other


def test_figure_is_drawn_from_the_results_in_the_repository():
    spec = importlib.util.spec_from_file_location("cascade_figure", DOCS / "figures" / "cascade.py")
    assert spec is not None
    assert spec.loader is not None
    figure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure)
    exits, milliseconds = figure.read()
    assert sum(exits.values()) == pytest.approx(1)
    assert figure.draw(exits, milliseconds) == (DOCS / "figures" / "cascade.svg").read_text()
