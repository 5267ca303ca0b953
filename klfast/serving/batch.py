"""``Batch``: the answers that go through the engine together."""

from __future__ import annotations

import torch

from klfast.engine.engine import Engine
from klfast.engine.state import State
from klfast.serving.answer import Answer

_LEAST_ROOM = 256  # tokens


class Batch:
    """Answers whose next tokens the engine computes together, in the first rows of one state.

    Args:
        engine: runs the steps.
        most: rows of the state.

    Attributes:
        answers: those of the rows.
        state: of all rows; what lies beyond the answers means nothing.
    """

    def __init__(self, engine: Engine, most: int) -> None:
        self.answers: list[Answer] = []
        self.state, self.most = engine.state(most), most
        self._engine, self._room = engine, 0
        self._view: State | None = None  # the rows in use

    def __len__(self) -> int:
        return len(self.answers)

    def add(self, answer: Answer, state: State) -> None:
        """Put an answer with a state of its own into the next row."""
        self._reserve(int(state.seen) + 1)
        self.state.put(len(self.answers), state)
        self.answers.append(answer)
        self._view = None

    def remove(self, row: int) -> None:
        """Take an answer out; the last row moves into its place."""
        last = len(self.answers) - 1
        if row != last:
            self.state.put(row, self.state.sequences(last, last + 1))
            self.answers[row] = self.answers[last]
        self.answers.pop()
        self._view = None

    def take(self, row: int) -> State:
        """Take an answer out, and return its state, with which it can be added again."""
        parts = [part.clone() for part in self.state.since(row, 0)]
        state = State(self.state.specs, parts, self.state.seen[row : row + 1].clone())
        self.remove(row)
        return state

    def step(self) -> torch.Tensor:
        """Feed each answer's newest token; return the next logits, float32 [answers, V]."""
        used = len(self.answers)
        self._reserve(int(self.state.seen[:used].max()) + 1)
        if self._view is None:
            self._view = self.state.sequences(0, used)
        return self._engine(torch.tensor([[answer.last_token] for answer in self.answers]), self._view)

    def _reserve(self, tokens: int) -> None:
        """Make room in all rows: a part of the state that grew on its own would no longer be a part of it."""
        if tokens > self._room:
            room = max(tokens, 2 * self._room, _LEAST_ROOM)
            self._view = None  # also if some tensors grow and then the memory ends
            self.state.reserve(room)
            self._room = room
