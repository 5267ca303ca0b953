"""Columns of the engine's buffers."""

import pytest

from klfast.engine.columns import Columns


def test_parts_follow_one_another():
    assert Columns(3, 10, 6).split(1, 0, 5) == (Columns(3, 10, 1), Columns(3, 11, 0), Columns(3, 11, 5))


@pytest.mark.parametrize("widths", [(-1, 2, 5), (7, -1, 0), (3, 2), (3, 4), ()])
def test_parts_that_do_not_lie_within_are_refused(widths):
    with pytest.raises(ValueError, match="6 columns cannot be split into"):
        Columns(3, 10, 6).split(*widths)
