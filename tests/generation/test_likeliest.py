"""The most likely token, by the extension, against torch.max."""

import pytest
import torch

from klfast.backends.cpu.largest import largest
from klfast.dispatch import pins

WIDTHS = (1, 7, 33, 1024, 1025, 5000)


def assert_as_torch(rows):
    values, columns = largest(rows)
    expected = rows.max(-1)
    torch.testing.assert_close(values, expected.values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(columns, expected.indices)


@pytest.fixture(autouse=True, params=pins.available_tiers())
def tier(request):
    with pins.using(request.param):
        yield


@pytest.mark.parametrize("width", WIDTHS)
def test_the_largest_of_each_row(width):
    rows = torch.randn(4, width)
    rows[1] = rows[1].abs().neg()
    rows[2] = 1.5  # of equal values the first
    rows[3] = -torch.inf
    assert_as_torch(rows)
    assert_as_torch(rows[:, -1:])
    assert_as_torch(torch.randn(width, 3).t())


@pytest.mark.parametrize("place", [0, 5, 1023, 1024, 4999])
@pytest.mark.parametrize("value", [9.0, torch.inf, torch.nan])
def test_one_value_anywhere(value, place):
    rows = torch.randn(2, 5000)
    rows[1, place] = value
    assert_as_torch(rows)
    rows[1, 4998] = torch.inf  # which hides no NaN
    assert_as_torch(rows)
    rows[1, 4998] = torch.nan  # the first counts
    assert_as_torch(rows)
