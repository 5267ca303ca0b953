"""``Batch``: the answers that go through the engine together; ``Prefill``: a prompt on its way there."""

from __future__ import annotations

import torch

from klfast.engine.engine import Engine
from klfast.engine.state import State
from klfast.serving.answer import Answer
from klfast.serving.prefix_cache import PrefixCache

_LEAST_ROOM = 256  # tokens


class Prefill:
    """Feeds an answer's prompt to the engine, chunk by chunk, from the longest beginning that the cache has.

    Args:
        engine: runs the chunks.
        start: the engine's state before any token; not changed.
        answer: whose prompt.
        cache: where prompts begin and are kept.
        chunk: most tokens at a time.

    Attributes:
        state: of the sequence.
        logits: of the first token after the prompt, float32 [1, V]; None until the last chunk.
    """

    def __init__(self, engine: Engine, start: State, answer: Answer, cache: PrefixCache, chunk: int) -> None:
        self.answer, self.state = answer, start
        self.logits: torch.Tensor | None = None
        self._engine, self._cache, self._chunk, self._fed = engine, cache, chunk, 0

    def step(self) -> int:
        """Feed one chunk, the first of which follows what the cache has; return the number of tokens that were fed."""
        prompt = self.answer.prompt
        if not self._fed:
            known = self._cache.longest(prompt)
            if known is not None:
                self.state = known.state
                self._fed = self.answer.cached_tokens = known.tokens
                if self._fed == len(prompt):
                    self.logits = known.logits
                    return 0
            self.state = self.state.copy()
        part = prompt[self._fed : self._fed + self._chunk]
        logits = self._engine(torch.tensor([part]), self.state)
        self._fed += len(part)
        if self._fed == len(prompt):
            self.logits = logits
            self._cache.put(prompt, self.state, 0, logits)
        return len(part)


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
            self._room = max(tokens, 2 * self._room, _LEAST_ROOM)
            self.state.reserve(self._room)
            self._view = None
