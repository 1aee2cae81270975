"""Folders that are replaced as a whole, and digests, on small trees."""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gati_jax import BundleError
from gati_jax.bundle.files import check_files, digests, present, previous, replacing

names = st.text("abcXYZ.-_ é", min_size=1, max_size=8).filter(lambda name: name.strip(".") != "")
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
trees = st.dictionaries(paths, st.binary(max_size=40), max_size=6)


def write(folder: Path, tree: dict[str, bytes]) -> dict[str, bytes]:
    """Write what fits (no file can be a folder, too); return what was written."""
    written = {}
    for name, content in tree.items():
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        except OSError:
            continue
        written[name] = content
    return written


def read(folder: Path) -> dict[str, bytes]:
    files = [Path(base) / name for base, _, names in os.walk(folder) for name in names]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def save(path: Path, tree: dict[str, bytes]) -> None:
    with replacing(path) as folder:
        write(folder, tree)


class Stop(BaseException):
    """Not even an Exception, like KeyboardInterrupt."""


@settings(max_examples=40, deadline=None)
@given(old=trees, new=trees)
def test_the_new_tree_takes_the_place_of_the_whole_old_one(old, new, tmp_path_factory):
    parent = tmp_path_factory.mktemp("t")
    old = write(parent / "x", old)
    with replacing(parent / "x") as folder:
        new = write(folder, new)
        assert read(parent / "x") == old  # until the block ends
    assert read(parent / "x") == new
    assert [path.name for path in parent.iterdir()] == ["x"]


@settings(max_examples=40, deadline=None)
@given(old=trees.filter(bool), new=trees)
def test_a_block_that_fails_changes_nothing(old, new, tmp_path_factory):
    parent = tmp_path_factory.mktemp("t")
    old = write(parent / "x", old)

    def stopped() -> None:
        with replacing(parent / "x") as folder:
            write(folder, new)
            raise Stop

    with pytest.raises(Stop):
        stopped()
    assert read(parent / "x") == old
    assert [path.name for path in parent.iterdir()] == ["x"]


def test_parents_are_made_and_the_folder_is_readable_by_others(tmp_path):
    save(tmp_path / "a" / "b", {"file": b"1"})
    assert read(tmp_path / "a" / "b") == {"file": b"1"}
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755


def test_the_new_folder_is_built_beside_the_old_one(tmp_path):
    """A rename between file systems would not be one step."""
    with replacing(tmp_path / "x") as folder:
        assert folder.parent == tmp_path
        assert not (tmp_path / "x").exists()


def test_two_targets_in_one_folder_do_not_meet(tmp_path):
    with replacing(tmp_path / "x") as one, replacing(tmp_path / "y") as other:
        (one / "file").write_text("x")
        (other / "file").write_text("y")
    assert read(tmp_path) == {"x/file": b"x", "y/file": b"y"}
    assert previous(tmp_path / "x") != previous(tmp_path / "y")


def test_a_name_with_brackets_is_no_pattern(tmp_path):
    (tmp_path / ".a.saving-1").mkdir()
    (tmp_path / ".[ab].saving-2").mkdir()
    with replacing(tmp_path / "[ab]") as folder:
        (folder / "file").write_text("x")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.saving-1", "[ab]"]


@pytest.mark.parametrize("failing", [1, 2], ids=["moving the old aside", "moving the new in"])
def test_a_rename_that_fails_leaves_the_old_one_present(tmp_path, monkeypatch, failing):
    save(tmp_path / "x", {"file": b"old"})
    calls, rename = [], Path.rename

    def fail(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == failing:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        save(tmp_path / "x", {"file": b"new"})
    assert read(present(tmp_path / "x")) == {"file": b"old"}
    save(tmp_path / "x", {"file": b"newer"})
    assert read(present(tmp_path / "x")) == {"file": b"newer"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_present_prefers_the_folder_itself(tmp_path):
    path = tmp_path / "x"
    assert present(path) == path  # neither is there: the caller's message names what was asked for
    previous(path).mkdir()
    assert present(path) == previous(path)
    path.mkdir()
    assert present(path) == path


def test_what_a_killed_save_left_aside_does_not_stop_the_next(tmp_path):
    path = tmp_path / "x"
    write(previous(path), {"file": b"older"})
    write(path, {"file": b"old"})
    save(path, {"file": b"new"})
    assert read(tmp_path) == {"x/file": b"new"}


def test_a_link_to_a_folder_can_be_replaced_again_and_again(tmp_path):
    save(tmp_path / "v1", {"file": b"0"})
    (tmp_path / "current").symlink_to("v1")
    for content in (b"1", b"2", b"3"):
        save(tmp_path / "current", {"file": content})
        assert read(tmp_path / "current") == {"file": content}


@settings(max_examples=40, deadline=None)
@given(tree=trees)
def test_digests_are_sizes_and_sha256(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t")
    tree = write(folder, tree)
    expected = {name: f"{len(content)} {hashlib.sha256(content).hexdigest()}" for name, content in tree.items()}
    assert digests(folder) == expected
    check_files(folder, digests(folder))


@settings(max_examples=60, deadline=None)
@given(tree=trees, data=st.data())
def test_any_change_to_a_listed_file_is_named(tree, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t")
    tree = write(folder, tree | {"one": b"at least"})
    listed = digests(folder)
    name = data.draw(st.sampled_from(sorted(tree)))
    content = data.draw(st.binary(max_size=40).filter(lambda other: other != tree[name]))
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError) as caught:
        check_files(folder, listed)
    assert name in str(caught.value)
    assert ("truncated or changed" in str(caught.value)) == (len(content) != len(tree[name]))
    (folder / name).unlink()
    with pytest.raises(BundleError, match="is missing from"):
        check_files(folder, listed)


@pytest.mark.parametrize("name", ["other", "arrays/other"])
def test_files_that_are_not_listed_are_refused(tmp_path, name):
    write(tmp_path, {"listed": b"1"})
    listed = digests(tmp_path)
    write(tmp_path, {"manifest.json": b"{}", "tuning/cpu.json": b"{}"})
    check_files(tmp_path, listed)
    write(tmp_path, {name: b"2"})
    with pytest.raises(BundleError, match=f"holds {name}, which manifest.json does not list"):
        check_files(tmp_path, listed)


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/hostname", "link"])
def test_nothing_outside_is_opened(tmp_path, name):
    (tmp_path / "secret").write_text("s")
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "link").symlink_to("../secret")
    with pytest.raises(BundleError, match="no file of the bundle"):
        check_files(tmp_path / "in", {name: f"1 {hashlib.sha256(b's').hexdigest()}"})


@pytest.mark.parametrize("digest", ["", " ", "x", "1.5 y", "1", "-1 " + "0" * 64])
def test_a_digest_of_another_form_is_an_error_of_the_bundle(tmp_path, digest):
    write(tmp_path, {"file": b"1"})
    with pytest.raises(BundleError, match="file"):
        check_files(tmp_path, {"file": digest})


@pytest.mark.parametrize("name", ["a\0b", "n" * 300, "", "."])
def test_a_name_that_no_file_has_is_an_error_of_the_bundle(tmp_path, name):
    with pytest.raises(BundleError, match="bundle"):
        check_files(tmp_path, {name: "1 " + "0" * 64})
