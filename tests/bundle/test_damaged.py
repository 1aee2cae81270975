"""Bundles that are damaged: every one ends in a BundleError."""

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax import BundleError, InputError
from tests.bundle.made import answers, in_memory, listed, load, make, same_plan, sign


def flipped(content: bytes) -> bytes:
    content = content or b"\0"
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [None, lambda content: content[:-1] or b"no longer empty", flipped])
def test_damage_to_any_listed_file_is_found(saved, tmp_path, damage):
    files = listed(saved)
    assert {"plans.json", "certificates.json"} < set(files)
    assert sum(name.startswith("arrays/") for name in files) >= 3
    for i, name in enumerate(files):
        folder = shutil.copytree(saved, tmp_path / str(i))
        (folder / name).write_bytes(damage((folder / name).read_bytes())) if damage else (folder / name).unlink()
        with pytest.raises(BundleError, match=re.escape(name)):
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


DAMAGED = {
    "empty": lambda _: b"",
    "text": lambda _: b"not JSON",
    "list": lambda _: b"[]",
    "null": lambda _: b"null",
    "number": lambda _: b"3",
    "bytes": lambda _: b"\xff\xfe",
    "open": lambda _: b'{"a": 1',
    "deep": lambda _: b"[" * 100_000,
    "long number": lambda _: b"9" * 10_000,
    "its first byte": lambda content: content[:1],
    "its first line": lambda content: content[:40],
    "half of it": lambda content: content[: len(content) // 2],
    "all but its last byte": lambda content: content[:-1],
}


@pytest.mark.parametrize("name", ["manifest.json", "plans.json", "certificates.json", "tuning/test.json"])
@pytest.mark.parametrize("case", DAMAGED)
def test_json_files_of_any_content_are_refused(folder, name, case):
    (folder / name).write_bytes(DAMAGED[case]((folder / name).read_bytes().strip()))
    if name in {"plans.json", "certificates.json"}:
        sign(folder)
    with pytest.raises(BundleError, match=re.escape(Path(name).name)):
        load(folder)


@pytest.mark.parametrize("name", ["nothing", "", "file"])
def test_what_is_no_bundle_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match=r"expected a bundle folder with a manifest\.json"):
        gati_jax.load_bundle(tmp_path / name)
