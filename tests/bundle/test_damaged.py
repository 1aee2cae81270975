"""Bundles that are damaged: every one ends in a BundleError."""

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax import BundleError, InputError
from gati_jax.bundle.files import digests
from tests.bundle.made import answers, in_memory, load, make, same_plan, sign


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] or b"no longer empty")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes() or b"\0")
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [remove, truncate, flip])
def test_damage_to_any_listed_file_is_found(saved, tmp_path, damage):
    files = [name for name in digests(saved) if name != "manifest.json" and not name.startswith("tuning/")]
    assert {"plans.json", "certificates.json"} < set(files)
    assert sum(name.startswith("arrays/") for name in files) >= 3
    for i, name in enumerate(files):
        folder = shutil.copytree(saved, tmp_path / str(i))
        damage(folder / name)
        with pytest.raises(BundleError, match=re.escape(name)):
            load(folder)


@pytest.mark.parametrize("length", [0, 1, 0.5, 0.999])
def test_truncated_manifest_is_refused(folder, length):
    content = (folder / "manifest.json").read_bytes().strip()
    (folder / "manifest.json").write_bytes(content[: int(length if length == 1 else length * len(content))])
    with pytest.raises(BundleError, match=r"manifest\.json"):
        load(folder)


@pytest.mark.parametrize("damage", [truncate, lambda file: file.write_bytes(file.read_bytes()[:40])])
def test_truncated_costs_are_refused(folder, damage):
    file = folder / "tuning" / "test.json"
    file.write_bytes(file.read_bytes().strip())
    damage(file)
    with pytest.raises(BundleError, match=r"test\.json"):
        load(folder)


def test_costs_are_optional(folder):
    shutil.rmtree(folder / "tuning")
    assert load(folder).costs == ()


@settings(max_examples=60, deadline=None)
@given(
    at=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255), file=st.sampled_from(["manifest", "tuning/test"])
)
def test_changed_bytes_of_an_unsigned_file_load_or_are_refused(saved, tmp_path_factory, at, bits, file):
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("flipped") / "b")
    content = bytearray((folder / f"{file}.json").read_bytes())
    content[int(at * len(content))] ^= bits
    (folder / f"{file}.json").write_bytes(content)
    try:
        loaded = load(folder)
    except InputError:
        return
    # What still loads may have other names, times or normalization, never other arrays, thresholds or caches.
    assert same_plan(loaded.plan, make(1)[2])
    assert answers(loaded) == answers(in_memory(make(1)))


@pytest.mark.parametrize("name", ["manifest.json", "plans.json", "certificates.json", "tuning/test.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"not JSON", b"[]", b"null", b"3", b"\xff\xfe", b'{"a": 1', b"[" * 100_000, b"9" * 10_000],
    ids=["empty", "text", "list", "null", "number", "bytes", "open", "deep", "long number"],
)
def test_json_files_of_any_content_are_refused(folder, name, content):
    (folder / name).write_bytes(content)
    if name in {"plans.json", "certificates.json"}:
        sign(folder)
    with pytest.raises(BundleError, match=re.escape(Path(name).name)):
        load(folder)


@pytest.mark.parametrize("make_path", [lambda p: p / "nothing", lambda p: p, lambda p: p / "file"])
def test_what_is_no_bundle_is_refused(tmp_path, make_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match=r"expected a bundle folder with a manifest\.json"):
        gati_jax.load_bundle(make_path(tmp_path))
