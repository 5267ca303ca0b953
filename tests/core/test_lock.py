"""klfast.core.lock: one process at a time, and the others hear which."""

import platform
import re

import pytest
from killed import process

from klfast.core import lock
from klfast.core.errors import InvalidInputError


def test_only_one_process_at_a_time_and_the_message_names_it(tmp_path):
    path = tmp_path / "r.json"
    with process(lock.held(path).__enter__) as child:
        said = f"another process ({child} on {platform.node()}) is working on {path}; wait for it, stop it, or"
        with pytest.raises(InvalidInputError, match=re.escape(said)), lock.held(path):
            pass
        assert (tmp_path / "r.json.lock").exists()
    with lock.held(path), pytest.raises(InvalidInputError, match="another process"), lock.held(path):
        pass  # a killed process holds nothing
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_has_not_said_who_it_is(tmp_path):
    with lock.held(tmp_path / "r"):
        (tmp_path / "r.lock").write_text("")
        with pytest.raises(InvalidInputError, match=r"^another process is working on"), lock.held(tmp_path / "r"):
            pass


def test_no_path_needs_no_lock_and_a_missing_folder_is_named(tmp_path):
    with lock.held(None), lock.held(None):
        pass
    with pytest.raises(FileNotFoundError, match=r"absent/r'$"), lock.held(tmp_path / "absent" / "r"):
        pass
