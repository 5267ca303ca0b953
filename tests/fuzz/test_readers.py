"""Damaged files, kept because something went wrong with them once, and a few new ones for every reader."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing import Fuzzed
from readers import READERS

FOUND = sorted((Path(__file__).parent / "found").glob("*/*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_new_damage(name, one_thread, tmp_path):
    fuzzed = Fuzzed(name, tmp_path)
    assert fuzzed.fault(fuzzed.paths[0], fuzzed.contents[fuzzed.paths[0]]) is None
    cases = [fuzzed.case(number) for number in range(30)]
    assert [complaint for case in cases if (complaint := fuzzed.fault(*case))] == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris")
def test_guided_damage():
    guided = Path(__file__).with_name("guided.py")
    done = subprocess.run([sys.executable, guided, "plan", "--runs", "20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_damage_of_before(path, one_thread, tmp_path):
    """The folder is the reader's name; a file's says what is wrong with it, then which file it replaces."""
    fuzzed = Fuzzed(path.parent.name, tmp_path)
    [damaged] = [one for one in fuzzed.paths if one.name == path.name.partition("-")[2]]
    assert fuzzed.fault(damaged, path.read_bytes()) is None
