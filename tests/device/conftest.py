"""Triton kernels on the device at hand: a GPU, or under TRITON_INTERPRET=1 Triton's interpreter with tensors on the CPU."""

import pytest
import torch

from klfast import runtime

INTERPRETED = runtime.interprets_triton()


def pytest_collection_modifyitems(items):
    for item in items:
        if not INTERPRETED and "tests/device" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    if INTERPRETED:
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "xpu")


@pytest.fixture(autouse=True)
def _triton():
    with runtime.using("triton"):
        yield
