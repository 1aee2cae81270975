"""What the README says works."""

import re
from pathlib import Path

from tests.conftest import dense_block, linear_classifier

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_python_example_runs_as_written(chain, splits, tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {
        "block": dense_block,
        "classifier": linear_classifier,
        "params": chain.params,
        "fit_images": splits["fit"],
        "select_images": splits["select"],
        "certify_images": splits["certify"],
        "image": splits["test"][0],
    }
    exec(example, names)
    assert 0 <= int(names["p"].class_index) < 10
    assert 0 < int(names["p"].exit) <= len(chain)


def test_commands_name_files_that_exist():
    for path in re.findall(r"(?:configs|docs)/[\w./-]+", README):
        assert (ROOT / path).is_file(), path
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target
    for module in re.findall(r"python -m ([\w.]+)", README):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
