"""Fixtures shared by all tests."""

import pytest
import torch

from klfast import runtime


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", *runtime.available_tiers()])
def tier(request):
    """Run a test once per implementation that this machine has."""
    with runtime.using(request.param):
        yield request.param
