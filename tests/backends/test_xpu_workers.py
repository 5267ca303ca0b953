"""The processes that check the kernels for Intel GPUs continue after a compiler crashes or hangs."""

import functools
import os
import time

import pytest
from xpu.workers import each


def _square(folder, index, fail):
    """Return index^2; the first process that reaches 3 fails."""
    if index == 3 and not (marker := folder / "failed").exists():
        marker.touch()
        fail()
    return index * index


def _crash(folder, index):
    return _square(folder, index, os.abort)


def _hang(folder, index):
    return _square(folder, index, functools.partial(time.sleep, 1000))


@pytest.mark.parametrize("function", [_crash, _hang])
def test_goes_on(function, tmp_path):
    assert list(each(functools.partial(function, tmp_path), 6, limit=3.0)) == [0, 1, 4, 9, 16, 25]
    assert (tmp_path / "failed").exists()
