"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress


class StopText:
    """Ends a text in front of the first stop string, however the text is cut into pieces.

    What may be the beginning of a stop string is held back. Of several strings that one counts which is complete first,
    and of those that end together the longest.

    Args:
        strings: the stop strings, none of them empty.

    Attributes:
        found: whether a stop string has been complete.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings, self._held, self.found = strings, "", False
        self._is_shown: list[bool] = []  # of each letter that is held back

    def push(self, piece: str, *, shown: bool = True) -> str:
        """Return the text that this piece settles; without ``shown`` it counts for stop strings alone."""
        text, is_shown = self._held + piece, self._is_shown + [shown] * len(piece)
        hits = [(begin + len(s), begin) for s in self._strings if (begin := text.find(s)) >= 0]
        if hits:
            self.found, self._held = True, ""
            return _visible(text[: min(hits)[1]], is_shown)
        settled = len(text) - max((_overlap(text, s) for s in self._strings), default=0)
        self._held, self._is_shown = text[settled:], is_shown[settled:]
        return _visible(text[:settled], is_shown)

    def end(self) -> str:
        """Return what was held back."""
        return _visible(self._held, self._is_shown)


def _visible(text: str, is_shown: Sequence[bool]) -> str:
    return "".join(compress(text, is_shown))


def _overlap(text: str, string: str) -> int:
    """Return the length of the longest end of the text with which the string begins, without being complete."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
