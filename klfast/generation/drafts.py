"""Drafts: what a text may go on with, found cheaply."""

from __future__ import annotations

from typing import Protocol

import torch

from klfast.engine.engine import Engine
from klfast.engine.state import Mark


class Drafter(Protocol):
    """What drafts the next tokens of a growing text."""

    def __call__(self, text: list[int], most: int) -> list[int]:
        """Return at most ``most`` tokens, 1 or more; each text continues the one of the call before."""


class PromptLookup:
    """Guesses that after the latest tokens comes what came after them the last time (Saxena 2023, prompt lookup).

    Texts that quote their prompt, code and lists are full of such repetitions; a draft costs next to nothing.
    """

    _RUNS = (3, 2)  # tokens that have to agree, the surest first

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}  # where the latest run of these tokens went on
        self._known = 0  # tokens of the text of which `_next` knows what comes before them

    def __call__(self, text: list[int], most: int) -> list[int]:
        """Return at most ``most`` tokens, none if the latest have not occurred before."""
        for place in range(self._known, len(text)):
            for run in self._RUNS:
                if place >= run:
                    self._next[tuple(text[place - run : place])] = place
        self._known = len(text)
        for run in self._RUNS:
            begin = self._next.get(tuple(text[-run:]))
            if begin is not None:
                found: list[int] = []
                for place in range(begin, begin + most):  # beyond its end, the text goes on with the draft itself
                    found.append(text[place] if place < len(text) else found[place - len(text)])
                return found
        return []


class DraftModel:
    """Guesses what a smaller model would write.

    Args:
        engine: of that model, which has the same tokens.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._state = engine, engine.state()
        self._known = 0  # tokens of the text that the state had at the mark
        self._mark: Mark | None = None

    def __call__(self, text: list[int], most: int) -> list[int]:
        """Return the ``most`` tokens that the model writes greedily."""
        if self._mark is not None:
            self._state.go_back(self._mark)
        logits = self._engine(torch.tensor([text[self._known :]]), self._state)
        self._mark, self._known = self._state.mark(), len(text)
        found = [int(logits.argmax())]
        while len(found) < most:
            found.append(int(self._engine(torch.tensor([found[-1:]]), self._state).argmax()))
        return found
