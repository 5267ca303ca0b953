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


@given(
    pieces=st.lists(st.tuples(LETTERS, st.booleans()), max_size=8),
    strings=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
)
def test_what_is_not_shown_counts_for_stop_strings(pieces, strings):
    stops, shown = StopText(strings), ""
    for piece, is_shown in pieces:
        shown += stops.push(piece, shown=is_shown)
        if stops.found:
            break
    before, found = truth("".join(piece for piece, _ in pieces), strings)
    flags = [is_shown for piece, is_shown in pieces for _ in piece]
    expected = "".join(letter for letter, is_shown in zip(before, flags, strict=False) if is_shown)
    assert (shown + ("" if stops.found else stops.end()), stops.found) == (expected, found)


@pytest.mark.parametrize(("pieces", "shown"), [(["a", "b"], ["a", "b"]), (["x", "y", "z"], ["", "", "xyz"])])
def test_holds_back_only_what_may_be_a_stop_string(pieces, shown):
    stops = StopText(["xyy"])
    assert [stops.push(piece) for piece in pieces] == shown
