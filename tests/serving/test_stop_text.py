"""Stop strings in a text that arrives in pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klfast.serving.stop_text import StopText

LETTERS = st.text("abc", max_size=12)


def truth(text, strings):
    """Return the text in front of the stop string that ends first, of several the longest; all text without one."""
    for end in range(len(text) + 1):
        if ended := [s for s in strings if text[:end].endswith(s)]:
            return text[: end - max(map(len, ended))], True
    return text, False


@given(pieces=st.lists(LETTERS, max_size=8), strings=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3))
def test_equals_a_search_of_the_whole(pieces, strings):
    stops, shown = StopText(strings), ""
    for piece in pieces:
        shown += stops.push(piece)
        if stops.found:
            break
    expected, found = truth("".join(pieces), strings)
    assert (shown + ("" if stops.found else stops.end()), stops.found) == (expected, found)


@pytest.mark.parametrize(("pieces", "shown"), [(["a", "b"], ["a", "b"]), (["x", "y", "z"], ["", "", "xyz"])])
def test_holds_back_only_what_may_be_a_stop_string(pieces, shown):
    stops = StopText(["xyy"])
    assert [stops.push(piece) for piece in pieces] == shown
