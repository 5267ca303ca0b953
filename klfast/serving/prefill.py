"""``Prefill``: a prompt on its way into the batch."""

from __future__ import annotations

from functools import cached_property

import torch

from klfast.engine.engine import Engine
from klfast.engine.state import State
from klfast.serving.answer import Answer
from klfast.serving.prefix_cache import PrefixCache

_POWERS = tuple(2**n for n in range(9, 32))  # tokens


class Prefill:
    """Feeds an answer's prompt to the engine, chunk by chunk, and leaves states in the cache for prompts like it.

    Args:
        engine: runs the chunks.
        start: the engine's state before any token; not changed.
        answer: whose prompt.
        cache: where prompts begin and are kept.

    Attributes:
        fed: tokens of the prompt that the state has.
        logits: of the first token after the prompt, float32 [1, V]; None until the last chunk.
    """

    def __init__(self, engine: Engine, start: State, answer: Answer, cache: PrefixCache) -> None:
        self.answer, self.fed = answer, 0
        self.logits: torch.Tensor | None = None
        self._engine, self._start, self._cache = engine, start, cache
        self._kept = _kept_lengths(len(answer.prompt), answer.shared)

    @cached_property
    def state(self) -> State:
        """The sequence's, with room for the whole prompt."""
        state = self._start.copy()
        state.reserve(int(state.seen[0]) + len(self.answer.prompt))
        return state

    def step(self, most: int) -> int:
        """Feed at most so many tokens, after the longest beginning that the cache has by now; return their number."""
        prompt = self.answer.prompt
        known = self._cache.longest(prompt)
        if known is not None and known.tokens > self.fed:
            known.restore(self.state)
            self.answer.cached_tokens += known.tokens - self.fed
            self.fed = known.tokens
            if self.fed == len(prompt):
                self.logits = known.logits
                return 0
        part = prompt[self.fed : self.fed + self._chunk(most)]
        logits = self._engine(torch.tensor([part]), self.state)
        self.fed += len(part)
        if self.fed in self._kept:
            self._cache.put(prompt[: self.fed], self.state, 0, logits)
        if self.fed == len(prompt):
            self.logits = logits
        return len(part)

    def leads(self, other: Prefill) -> bool:
        """Return whether another prompt had better wait for the next state that this one leaves in the cache."""
        end = self._next_kept
        return other.fed < self.fed and self.answer.prompt[:end] == other.answer.prompt[:end]

    def _chunk(self, most: int) -> int:
        """Return how many tokens go next, of chunks as long as one another: a single one is a decoding step's."""
        left = self._next_kept - self.fed
        chunks = -(-left // most)
        return -(-left // chunks)

    @property
    def _next_kept(self) -> int:
        return next(length for length in self._kept if length > self.fed)


def _kept_lengths(prompt: int, shared: int) -> list[int]:
    """Return how long the beginnings of a prompt are whose states are kept, the shortest first.

    These are what others are likely to share, the whole, and 512, 1,024, 2,048 ... tokens: few, for each costs as much
    memory as any other, but at least half of what two prompts have in common. Of two that differ by one token the
    whole, or else the shared one, stays, and the first token alone is not kept: a chunk of one token would be taken for
    a decoding step.
    """
    lengths = [prompt]
    for length in (shared, *_POWERS):
        if 1 < length < prompt and all(abs(length - other) > 1 for other in lengths):
            lengths.append(length)
    return sorted(lengths)
