"""klfast.files: a write is whole or not at all."""

import os

import pytest

from klfast.files import folder_atomic, write_atomic


@pytest.mark.parametrize("content", ["text with an é\n", b"\x00bytes", ""])
def test_writes_and_overwrites(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_text("what was there before, and longer than the new content")
    write_atomic(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_text("old")

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_of_new_and_existing_files(tmp_path):
    plain, new, kept = tmp_path / "plain", tmp_path / "new", tmp_path / "kept"
    plain.write_text("")
    write_atomic(new, "x")
    assert new.stat().st_mode == plain.stat().st_mode
    kept.write_text("")
    kept.chmod(0o600)
    write_atomic(kept, "x")
    assert kept.stat().st_mode & 0o777 == 0o600


def test_follows_a_symlink(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_atomic(link, "new")
    assert link.is_symlink() and target.read_text() == "new"


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "absent" / "file", "x")


def build(path):
    with folder_atomic(path) as folder:
        (folder / "new").write_text("x")
        (folder / "inner").mkdir()
        assert not (path / "new").exists()


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_appears_whole(tmp_path, old):
    path = tmp_path / "folder"
    (tmp_path / "plain").mkdir()
    if old:
        path.mkdir()
        (path / "old").write_text("x")
    build(path)
    assert sorted(p.name for p in path.iterdir()) == ["inner", "new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "plain"]
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("x")
    real = getattr(os, failing)

    def full(*args):
        if failing == "fsync" or (args[1] == path and args[0].suffix == ".tmp"):
            raise OSError("no space left on device")
        return real(*args)

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="no space"):
        build(path)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"] and [p.name for p in path.iterdir()] == ["old"]


def test_a_folder_behind_a_symlink(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    build(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target" / "new").is_file()
