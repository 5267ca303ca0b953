"""klfast.core.io: a write takes place completely or not at all."""

import errno
import itertools
import os
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from full_disk import files_of_at_most

from klfast.core import io as files
from klfast.core import temporaries
from klfast.core.io import file_atomic, folder_atomic, require_writable, write_atomic


@pytest.mark.parametrize("content", ["text with an é\n", b"\x00bytes", ""])
def test_writes_and_overwrites(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_text("the old content, which is longer than the new one")
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
def test_folder_appears_complete(tmp_path, old):
    path = tmp_path / "folder"
    (tmp_path / "plain").mkdir()
    if old:
        path.mkdir()
        (path / "old").write_text("x")
    build(path)
    assert sorted(p.name for p in path.iterdir()) == ["inner", "new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "plain"]
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def read(path):
    """Return a file's text, or the texts of a folder's files by name; None if there is nothing."""
    if path.is_dir():
        return {str(p.relative_to(path)): p.read_text() for p in sorted(path.rglob("*")) if p.is_file()}
    return path.read_text() if path.exists() else None


STEPS = ("open", "close", "mkdir", "chmod", "rename", "replace", "fsync", "unlink", "rmdir", "listdir", "kill")


class Stopper:
    """Wraps each function of ``os`` that changes a disk; raises at the n-th call, before or after it."""

    def __init__(self, monkeypatch, at, error, after):
        self.left, self.error, self.after, self.fired = at, error, after, None
        for name in STEPS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name, real):
        def call(*args, **options):
            self.left -= 1
            if self.left == 0 and not self.after:
                self.fired = name
                raise self.error
            result = real(*args, **options)
            if self.left == 0:
                self.fired = name
                raise self.error
            return result

        return call


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left on device")], ids=["interrupt", "full"]
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_stopped_at_any_step(tmp_path, what, existing, after, error, exchange):
    """Whichever step fails, all of the old or the new content is there, and nothing else unless the cleanup fails."""
    for n in itertools.count(1):
        parent = tmp_path / str(n)
        parent.mkdir()
        path = parent / "target"
        old, new = ("old", "new") if what == "file" else ({"old": "x"}, {"a": "x", "b": "y"})
        if existing and what == "file":
            path.write_text("old")
        elif existing:
            path.mkdir()
            (path / "old").write_text("x")
        with pytest.MonkeyPatch.context() as patch:
            if not exchange:
                patch.setattr(files, "find_renameat2", lambda: None)
            stopper = Stopper(patch, n, error, after)
            try:
                if what == "file":
                    write_atomic(path, "new")
                else:
                    with folder_atomic(path) as folder:
                        for name, text in new.items():
                            folder.joinpath(name).write_text(text)
            except (type(error), OSError):  # after an interrupted os.close, rmtree closes again, which fails
                assert stopper.fired
        assert read(path) in ([old, new] if existing else [None, new]), (n, stopper.fired)
        others = [p.name for p in parent.iterdir() if p != path]
        assert not others or stopper.fired in ("unlink", "rmdir", "open", "close"), (n, stopper.fired, others)
        assert all(p.startswith(".target.") for p in others)
        if stopper.fired is None:
            assert read(path) == new and n > 3
            break


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
def test_interrupted_at_any_line(tmp_path, exchange, monkeypatch):
    """Ctrl-C may come between any two lines."""
    if not exchange:
        monkeypatch.setattr(files, "find_renameat2", lambda: None)

    def traced(at, action):
        left = at

        def trace(frame, event, _):
            nonlocal left
            if frame.f_code.co_filename not in (files.__file__, temporaries.__file__):
                return None
            left -= event == "line"
            if left == 0 and event == "line":
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            action()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        return left <= 0

    for what, action in (
        ("file", lambda: write_atomic(tmp_path / "file", "new")),
        ("folder", lambda: build(tmp_path / "folder")),
    ):
        path, n, interrupted = tmp_path / what, 0, True
        while interrupted:
            n += 1
            temporaries.remove(path)
            if what == "file":
                path.write_text("old")
            else:
                path.mkdir()
                (path / "old").write_text("x")
            interrupted = traced(n, action)
            assert read(path) in (["old", "new"] if what == "file" else [{"old": "x"}, {"new": "x"}]), n
            for leftover in tmp_path.glob(f".{what}.*"):  # left when the cleanup itself was interrupted
                temporaries.remove(leftover)
        assert n > 20


KILLED = """
import os, signal, sys
from klfast.core import io as files
step, n, kind, path = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
if sys.argv[5] == "renames":
    files.find_renameat2 = lambda: None
real = getattr(os, step)
def die(*args, **options):
    global n
    n -= 1
    if n == 0 and step != "exchange":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)
setattr(os, step, die)
if kind == "file":
    files.write_atomic(path, "new")
else:
    with files.folder_atomic(path) as folder:
        (folder / "new").write_text("x")
"""


@pytest.mark.parametrize(
    ("step", "n", "kind", "how"),
    [
        ("replace", 1, "file", ""),
        ("fsync", 1, "file", ""),
        ("fsync", 1, "folder", ""),
        ("rename", 1, "folder", "renames"),
        ("rename", 2, "folder", "renames"),
    ],
)
def test_next_run_removes_leftovers_of_a_killed_one(tmp_path, step, n, kind, how):
    path = tmp_path / "target"
    if kind == "file":
        path.write_text("old")
    else:
        path.mkdir()
        (path / "old").write_text("x")
    run = subprocess.run([sys.executable, "-c", KILLED, step, str(n), kind, path, how], cwd=os.getcwd())
    assert run.returncode == -signal.SIGKILL
    assert [p for p in tmp_path.iterdir() if p != path]
    old = "old" if kind == "file" else {"old": "x"}
    if (step, n) == ("rename", 2):
        assert not path.exists()
        files.recover(path)
    assert read(path) == old
    (tmp_path / ".target.other.tmp").write_text("somebody else's")
    (tmp_path / ".target2.00000000-1-1-0000000000000000.tmp").write_text("another target's")
    if kind == "file":
        write_atomic(path, "newest")
        assert read(path) == "newest"
    else:
        build(path)
        assert read(path) == {"new": "x"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".target.other.tmp",
        ".target2.00000000-1-1-0000000000000000.tmp",
        "target",
    ]


def test_temporaries_of_running_processes_stay(tmp_path):
    path = tmp_path / "target"
    mine = temporaries.name_beside(path)
    mine.write_text("still being written")
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        machine, _, _, random = mine.suffixes[-2].strip(".").split("-")
        start = temporaries.start_time(sleeper.pid)
        others = [mine.with_name(f".target.{machine}-{sleeper.pid}-{s}-{random}.tmp") for s in (start, 0)]
        reused = mine.with_name(f".target.{machine}-{sleeper.pid}-{start + 1}-{random}.tmp")
        foreign, ancient = (mine.with_name(f".target.{m}-1-1-{random}.tmp") for m in ("01234567", "89abcdef"))
        for p in (*others, reused, foreign, ancient):
            p.write_text("x")
        os.utime(ancient, (1, 1))
        write_atomic(path, "new")
        assert set(tmp_path.iterdir()) == {path, mine, *others, foreign}
    finally:
        sleeper.kill()
        sleeper.wait()


def write_file(path):
    write_atomic(path, "x")


@pytest.mark.parametrize(
    ("act", "name", "kind"),
    [
        (write_file, "folder", IsADirectoryError),
        (write_file, "pipe", OSError),
        (write_file, "/dev/null", OSError),
        (write_file, "absent/a", FileNotFoundError),
        (write_file, "/proc/a", OSError),
        (build, "file", NotADirectoryError),
        (build, "absent/a", FileNotFoundError),
        (require_writable, "absent/a", FileNotFoundError),
        (require_writable, "folder", IsADirectoryError),
        (partial(require_writable, folder=True), "file", NotADirectoryError),
        (require_writable, "/proc/a", OSError),
    ],
)
def test_errors_name_the_target(tmp_path, act, name, kind):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(kind) as caught:
        act(tmp_path / name)
    assert str(caught.value).endswith(f"{name}'") and ".tmp" not in str(caught.value), str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "pipe"]


def test_errors_without_a_number_name_the_target_too(tmp_path):
    """NumPy's errors of a full disk have none."""

    def write():
        with file_atomic(tmp_path / "file") as beside, open(beside, "wb") as file:
            np.zeros(1000).tofile(file)

    with files_of_at_most(100), pytest.raises(OSError, match=r"1000 requested and \d+ written: '.*file'$"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_require_writable_leaves_no_trace(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    require_writable(tmp_path / "file")
    require_writable(tmp_path / "folder", folder=True)
    require_writable(tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_old_folder_that_cannot_be_restored_is_kept_and_named(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("x")
    monkeypatch.setattr(files, "find_renameat2", lambda: None)
    real, calls = os.rename, []

    def rename(*args):
        calls.append(args)
        if len(calls) > 1:
            raise PermissionError(errno.EACCES, "Permission denied")
        real(*args)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(PermissionError, match=r"its old content is now in .*\.old: '.*folder'"):
        build(path)
    kept = next(tmp_path.glob(".folder.*.old"))
    assert read(kept) == {"old": "x"}


def test_longest_name_that_the_system_allows(tmp_path):
    path = tmp_path / ("é" * 127)
    write_atomic(path, "x")
    assert read(path) == "x"


def test_umask_is_never_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("another thread could create a file meanwhile"))
    write_atomic(tmp_path / "file", "x")
    build(tmp_path / "folder")


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_that_was_removed_and_made_again_is_not_taken(tmp_path, old):
    """Half of the files would be missing; libraries make folders that they miss."""
    path = tmp_path / "folder"
    if old:
        build(path)

    def lose():
        with folder_atomic(path) as folder:
            (folder / "first").write_text("x")
            temporaries.remove(folder)
            folder.mkdir()
            (folder / "second").write_text("x")

    with pytest.raises(FileNotFoundError, match=r"folder'$"):
        lose()
    assert read(path) == ({"new": "x"} if old else None)
    assert [one.name for one in tmp_path.iterdir()] == ["folder"] * old


def test_folder_behind_a_symlink(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    build(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target" / "new").is_file()
