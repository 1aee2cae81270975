"""Files and folders that are replaced as a whole, and digests, on small trees."""

import contextlib
import hashlib
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gati_jax import BundleError, InputError, load_bundle
from gati_jax.files import check_files, digests, lock_file, present, previous, replacing, write_atomically

names = st.text("abcXYZ.-_ é", min_size=1, max_size=8).filter(lambda name: name.strip(".") != "")
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
trees = st.dictionaries(paths, st.binary(max_size=40), max_size=6)


def write(folder: Path, tree: dict[str, bytes]) -> dict[str, bytes]:
    """Write what fits (no file can be a folder, too); return what was written."""
    written = {}
    for name, content in tree.items():
        with contextlib.suppress(OSError):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            written[name] = content
    return written


def read(folder: Path) -> dict[str, bytes]:
    files = [Path(base) / name for base, _, names in os.walk(folder) for name in names]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def save(path: Path, tree: dict[str, bytes]) -> None:
    with replacing(path) as folder:
        write(folder, tree)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


class Stop(BaseException):
    """Not even an Exception, like KeyboardInterrupt."""


def test_a_file_is_written_with_its_folders_and_replaced(tmp_path):
    path = tmp_path / "a" / "b.json"
    for content in (b"\xff\0", b"other"):
        write_atomically(path, content)
        assert (read(path.parent), mode(path)) == ({"b.json": content}, 0o644)


@pytest.mark.parametrize(("owner", "failing"), [(os, "fsync"), (Path, "replace")], ids=["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupted"])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, owner, failing, error):
    def fail(*_: object) -> None:
        raise error

    write_atomically(tmp_path / "x", b"old")
    monkeypatch.setattr(owner, failing, fail)
    with pytest.raises(type(error)):
        write_atomically(tmp_path / "x", b"new")
    assert read(tmp_path) == {"x": b"old"}


def test_a_locked_file_is_locked_until_it_is_closed(tmp_path):
    path = tmp_path / "lock"
    path.write_text("stays")
    held = lock_file(path)
    with pytest.raises(InputError, match="lock is locked"):
        lock_file(path)
    threading.Timer(0.05, held.close).start()
    lock_file(path, seconds=30.0).close()
    lock_file(path).close()
    assert path.read_text() == "stays"
    with pytest.raises(OSError, match="No such file"):
        lock_file(tmp_path / "a" / "lock")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):
        lock_file(tmp_path / "pipe")


def test_links_that_lead_in_a_circle_are_no_file(tmp_path):
    """Python 3.11 raises a RuntimeError, of which commands know nothing."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(BundleError, match="loop is missing"):
        check_files(tmp_path, {"loop": "1 x"})
    with pytest.raises(BundleError, match="expected a bundle folder"):
        load_bundle(loop)
    with pytest.raises(OSError), replacing(loop / "x"):  # noqa: PT011 (which, depends on the system)
        pass


@settings(max_examples=80, deadline=None)
@given(old=trees, new=trees, fails=st.booleans())
def test_the_new_tree_takes_the_place_of_the_whole_old_one_or_nothing_changes(old, new, fails, tmp_path_factory):
    path = tmp_path_factory.mktemp("t") / "a" / "x"
    old = write(path, old)
    with contextlib.suppress(Stop), replacing(path) as folder:
        new = write(folder, new)
        assert folder.parent == path.parent  # a rename between file systems would not be one step
        assert (read(path), path.exists()) == (old, bool(old))  # until the block ends
        if fails:
            raise Stop
    assert read(path) == (old if fails else new)
    assert list(path.parent.iterdir()) == ([path] if old or not fails else [])
    assert fails or mode(path) == 0o755


def test_two_targets_in_one_folder_do_not_meet(tmp_path):
    """Not even where the name of one, taken for a pattern, is that of the other."""
    (tmp_path / ".[ab].saving-1").mkdir()  # of a save that was killed
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "[ab]") as other:
        (one / "file").write_text("x")
        (other / "file").write_text("y")
    assert read(tmp_path) == {"a/file": b"x", "[ab]/file": b"y"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["[ab]", "a"]
    assert previous(tmp_path / "a") != previous(tmp_path / "[ab]")


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
    assert read(tmp_path) == {"x/file": b"newer"}


def test_what_a_killed_save_left_aside_is_present_and_does_not_stop_the_next(tmp_path):
    path = tmp_path / "x"
    assert present(path) == path  # neither is there: the caller's message names what was asked for
    write(previous(path), {"file": b"older"})
    assert present(path) == previous(path)
    write(path, {"file": b"old"})
    assert present(path) == path
    save(path, {"file": b"new"})
    assert read(tmp_path) == {"x/file": b"new"}


def test_a_link_to_a_folder_can_be_replaced_again_and_again(tmp_path):
    (tmp_path / "v1").mkdir()
    (tmp_path / "current").symlink_to("v1")
    for content in (b"1", b"2", b"3"):
        save(tmp_path / "current", {"file": content})
        assert read(tmp_path / "current") == {"file": content}


@settings(max_examples=60, deadline=None)
@given(tree=trees, data=st.data())
def test_digests_are_sizes_and_sha256_and_any_change_to_a_listed_file_is_named(tree, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t")
    tree = write(folder, tree | {"one": b"at least"})
    listed = {name: f"{len(content)} {hashlib.sha256(content).hexdigest()}" for name, content in tree.items()}
    assert digests(folder) == listed
    check_files(folder, listed)
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


SECRET = f"1 {hashlib.sha256(b's').hexdigest()}"
OUTSIDE = ["../secret", "a/../../secret", "/etc/hostname", "link"]
NO_DIGESTS = ["", " ", "x", "1.5 y", "1", "-1 " + "0" * 64]


@pytest.mark.parametrize(
    ("name", "digest", "message"),
    [
        *((name, SECRET, "no file of the bundle") for name in OUTSIDE),
        *(("file", digest, "file") for digest in NO_DIGESTS),
        *((name, SECRET, "bundle") for name in ("a\0b", "n" * 300, "", ".")),
    ],
)
def test_forged_names_and_digests_are_refused_and_nothing_outside_is_opened(tmp_path, name, digest, message):
    write(tmp_path, {"secret": b"s", "in/file": b"s", "in/a/file": b"s"})
    (tmp_path / "in" / "link").symlink_to("../secret")
    with pytest.raises(BundleError, match=message):
        check_files(tmp_path / "in", {name: digest})
