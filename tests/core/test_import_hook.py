"""when_imported: an action after another module's import."""

import importlib
import sys

import pytest

from klfast.core.import_hook import no_longer_when_imported, when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a package with a module that is not imported yet, and return the module's name and file."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "watched_package").mkdir()
    (tmp_path / "watched_package" / "__init__.py").touch()
    (tmp_path / "watched_package" / "inner.py").write_text("value = 1\n")
    finders = list(sys.meta_path)
    yield "watched_package.inner", tmp_path / "watched_package" / "inner.py"
    sys.meta_path[:] = finders
    for name in ("watched_package", "watched_package.inner"):
        sys.modules.pop(name, None)


def test_runs_once_after_the_import(module):
    name, file = module
    seen, finders = [], list(sys.meta_path)

    def action(found):
        seen.append((found.__name__, found.value))

    when_imported(name, action)
    when_imported(name, action)
    importlib.import_module("watched_package")
    assert seen == []
    found = importlib.import_module(name)
    assert seen == [(name, 1)] and sys.meta_path == finders
    assert found.__loader__ is found.__spec__.loader and found.__loader__.get_filename() == str(file)
    importlib.reload(found)
    assert len(seen) == 1


def test_runs_at_once_for_an_imported_module(module):
    found, seen = importlib.import_module(module[0]), []
    when_imported(module[0], seen.append)
    assert seen == [found]


def test_two_actions(module):
    first, second = [], []
    when_imported(module[0], first.append)
    when_imported(module[0], second.append)
    importlib.import_module(module[0])
    assert len(first) == len(second) == 1


def test_waits_for_an_import_that_succeeds(module):
    name, file = module
    file.write_text("raise ImportError('not yet')\n")
    seen = []
    when_imported(name, seen.append)
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module(name)
    assert seen == []
    file.write_text("value = 22\n")
    importlib.invalidate_caches()
    importlib.import_module(name)
    assert [found.value for found in seen] == [22]


def test_a_module_that_does_not_exist(module):
    when_imported("watched_package.nowhere", pytest.fail)
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        importlib.import_module("watched_package.nowhere")


def test_can_be_undone(module):
    when_imported(module[0], pytest.fail)
    no_longer_when_imported(module[0], pytest.fail)
    importlib.import_module(module[0])
