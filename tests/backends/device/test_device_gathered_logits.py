"""Triton's gathered_logits against products in float64: the CPU kernels' cases, on the device."""

import pytest
import test_gathered_logits as cases
import torch
from test_gathered_logits import test_any_strides_and_no_elements  # noqa: F401

from klfast import ops


@pytest.fixture
def tier():
    return "triton"


@pytest.fixture(autouse=True)
def _on_the_device(device):
    with device:
        yield


@pytest.mark.parametrize(
    ("students", "tokens", "features", "entries"), [((), 3, 37, 5), ((2, 3), 5, 64, 6), ((33,), 2, 99, 129)]
)
def test_random_states(students, tokens, features, entries):
    cases.test_random_states(students, tokens, features, entries, "triton")


def test_a_row_that_the_head_lacks_gives_nan():
    found = ops.gathered_logits(torch.ones(2, 1, 5), torch.ones(7, 5), torch.tensor([[6, 7, -1]]))
    assert found[..., 0].eq(5).all() and found[..., 1:].isnan().all()
