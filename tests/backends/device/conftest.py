"""Triton kernels on the available device: a GPU, or Triton's interpreter on CPU tensors (TRITON_INTERPRET=1)."""

import pytest
import torch

from klfast.dispatch import pins

INTERPRETED = pins.interprets_triton()

with torch.device("cpu"):  # makes torch list its factory functions before a test replaces any
    torch.empty(0)


def pytest_collection_modifyitems(items):
    for item in items:
        if not INTERPRETED and "tests/backends/device" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    if INTERPRETED:
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "xpu")


@pytest.fixture(autouse=True)
def _triton():
    with pins.using("triton"):
        yield


@pytest.fixture(params=["nvidia", "intel"] if INTERPRETED else ["nvidia" if torch.cuda.is_available() else "intel"])
def family(request, monkeypatch):
    """Return the GPU family of the configurations: every one under the interpreter, on a GPU only its own."""
    from klfast.kernels import launch

    monkeypatch.setattr(launch, "family", lambda _: request.param)
    return request.param
