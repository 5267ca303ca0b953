"""klfast.files: a write is whole or not at all."""

import os

import pytest

from klfast.files import write_atomic


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
