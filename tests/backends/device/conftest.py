"""Triton kernels on the device at hand: a GPU, or under TRITON_INTERPRET=1 Triton's interpreter with tensors on the CPU."""

import pytest
import torch

from klfast.dispatch import pins

INTERPRETED = pins.interprets_triton()

with torch.device("cpu"):  # lets torch list its functions that make tensors, before a test puts its own in their place
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
    """Whose configurations are launched: each under the interpreter, on a GPU its own (others have options it lacks)."""
    from klfast.kernels import launch

    monkeypatch.setattr(launch, "family", lambda _: request.param)
    return request.param
