"""States after the beginnings of texts, from which other texts with the same beginning go on."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from klfast.engine.state import State


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the engine knew after some tokens.

    Attributes:
        tokens: their number.
        key: stands for them.
        parent: a shorter beginning of them, which has what is missing here.
        begin: the state's places that the parent has.
        end: the state's places in all.
        tensors: the state's, of one sequence; what grows has the places from ``begin`` to ``end``.
        logits: those of the next token, float32 [1, V].
    """

    tokens: int
    key: bytes
    parent: Prefix | None
    begin: int
    end: int
    tensors: list[torch.Tensor]
    logits: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Size in bytes, without the parent's."""
        return self.logits.nbytes + sum(tensor.nbytes for tensor in self.tensors)

    def line(self) -> Iterator[Prefix]:
        """Yield this prefix, its parent, the parent's, and so on."""
        one: Prefix | None = self
        while one is not None:
            yield one
            one = one.parent

    def restore(self, state: State) -> None:
        """Copy what is known into a state of one sequence."""
        state.reserve(self.end)
        for i, spec in enumerate(state.specs):
            for one in [self] if spec.growing is None else self.line():
                spec.places(state.tensors[i], one.begin, one.end).copy_(one.tensors[i])
        state.seen.fill_(self.end)


class PrefixCache:
    """Keeps states by the tokens that led to them, and forgets those that were used least recently.

    A recurrent state holds all tokens before it, so that only texts are found whose state was kept, not what two texts
    have in common. Keys and values of attention are kept once for all texts that begin with their tokens.

    Args:
        most_bytes: that all states together may take; 0 keeps none.

    Attributes:
        nbytes: what they take now.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self.nbytes = most_bytes, 0
        self._prefixes: OrderedDict[bytes, Prefix] = OrderedDict()  # the latest used last, each after its children
        self._lengths: Counter[int] = Counter()  # of the prefixes

    def __len__(self) -> int:
        return len(self._prefixes)

    def longest(self, tokens: Sequence[int]) -> Prefix | None:
        """Return what is known of the longest beginning of some tokens."""
        _, found = self._search(tokens)
        if found is not None:
            self._touch(found)
        return found

    def put(self, tokens: Sequence[int], state: State, row: int, logits: torch.Tensor) -> None:
        """Keep a copy of a sequence's state after ``tokens``, and of the next token's logits, float32 [1, V].

        Nothing is kept if it would take more than all may, or if there is no memory for it.
        """
        key, parent = self._search(tokens)
        if parent is not None and parent.key == key:
            self._touch(parent)
            return
        begin = 0 if parent is None else parent.end
        views = state.since(row, begin)
        if logits.nbytes + sum(view.nbytes for view in views) > self._most:
            return
        try:
            copies, own = [view.clone() for view in views], logits.clone()
        except RuntimeError:  # torch's, of memory: no reason for the answers that run to end
            return
        prefix = Prefix(len(tokens), key, parent, begin, int(state.seen[row]), copies, own)
        self._prefixes[key] = prefix
        self._lengths[prefix.tokens] += 1
        self.nbytes += prefix.nbytes
        self._touch(prefix)
        while self.nbytes > self._most:
            self._forget()

    def _search(self, tokens: Sequence[int]) -> tuple[bytes, Prefix | None]:
        """Return the key of some tokens, and what is known of their longest beginning."""
        text, digest, fed = array("q", tokens), hashlib.sha256(), 0
        found: Prefix | None = None
        for length in sorted({n for n in self._lengths if n < len(tokens)} | {len(tokens)}):
            digest.update(text[fed:length])
            fed = length
            found = self._prefixes.get(digest.digest(), found)
        return digest.digest(), found

    def _touch(self, prefix: Prefix) -> None:
        """Note the use of a prefix. Its parents count as used after it, so that none is forgotten before it."""
        for one in prefix.line():
            self._prefixes.move_to_end(one.key)

    def _forget(self) -> None:
        """Forget the prefix that was used least recently."""
        _, prefix = self._prefixes.popitem(last=False)
        self.nbytes -= prefix.nbytes
        self._lengths[prefix.tokens] -= 1
        if not self._lengths[prefix.tokens]:
            del self._lengths[prefix.tokens]
