"""Fixtures shared by all tests."""

import pytest
import torch

from klfast import runtime


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", *runtime.CPU_TIERS])
def tier(request):
    """Run a test once per implementation that this machine has."""
    name = request.param
    if name != "reference" and (reason := runtime.why_not(name)):
        pytest.skip(f"{name}: {reason}")
    with runtime.using(name):
        yield name
