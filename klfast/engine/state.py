"""``State``: what an engine carries from token to token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from klfast.backends.cpu.extension import view

_LEAST_CAPACITY = 256  # tokens


class StateSpec(NamedTuple):
    """A tensor of a sequence's state.

    Attributes:
        shape: without the sequences, which come first.
        dtype: of its numbers.
        growing: the dimension of the shape that has a place for each token, whose size here means nothing; None if the
            size is always the same.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    growing: int | None = None

    def sizes(self, sequences: int, tokens: int) -> list[int]:
        """Return the shape of a state's tensor with places for so many tokens."""
        sizes = [sequences, *self.shape]
        if self.growing is not None:
            sizes[self.growing + 1] = tokens
        return sizes

    def places(self, tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Return a part of a state's tensor, from place ``begin`` to ``end``; all of one that does not grow."""
        return tensor if self.growing is None else tensor.narrow(self.growing + 1, begin, end - begin)


class Mark(NamedTuple):
    """A moment of a state, to which it can go back.

    Attributes:
        fixed: copies of the tensors that do not grow, in their order.
        seen: int64 [B], a copy.
    """

    fixed: list[torch.Tensor]
    seen: torch.Tensor


class State:
    """What an engine carries from token to token, for some sequences.

    Attributes:
        specs: what its tensors are.
        tensors: their numbers, sequences first.
        seen: int64 [B], the positions that each sequence has filled: by a learned prefix, if the model has one, and by
            its tokens.
    """

    def __init__(self, specs: Sequence[StateSpec], tensors: Sequence[torch.Tensor], seen: torch.Tensor) -> None:
        self.specs, self.tensors, self.seen = specs, list(tensors), seen
        self._native: tuple[Any, list[torch.Tensor]] | None = None
        self._room = self._places()

    @classmethod
    def empty(cls, specs: Sequence[StateSpec], sequences: int) -> State:
        """Return the state of sequences without tokens."""
        tensors = [torch.zeros(sequences, *spec.shape, dtype=spec.dtype) for spec in specs]
        return cls(specs, tensors, torch.zeros(sequences, dtype=torch.int64))

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens of each sequence, at least doubling what grows."""
        if tokens <= self._room:
            return
        for i, (spec, tensor) in enumerate(zip(self.specs, self.tensors, strict=True)):
            if spec.growing is None or tensor.shape[dim := spec.growing + 1] >= tokens:
                continue
            shape = list(tensor.shape)
            shape[dim] = max(tokens, 2 * shape[dim], _LEAST_CAPACITY)
            grown = torch.zeros(shape, dtype=tensor.dtype)
            grown.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
            self.tensors[i], self._native = grown, None
        self._room = self._places()

    def _places(self) -> float:
        """Return the number of tokens of each sequence that there is room for."""
        grows = ((t, spec.growing) for spec, t in zip(self.specs, self.tensors, strict=True))
        return min((t.shape[growing + 1] for t, growing in grows if growing is not None), default=math.inf)

    def __len__(self) -> int:
        return self.seen.shape[0]  # len() of a tensor takes five times as long

    def native(self) -> tuple[Any, list[torch.Tensor]]:
        """Return the tensors as the extension takes them, and themselves: hold them as long as the extension runs."""
        native = self._native
        if native is None:
            from klfast import _C

            tensors = self.tensors.copy()
            native = self._native = _C.States([view(t) for t in tensors]), tensors
        return native

    def copy(self) -> State:
        """Return a copy that shares nothing."""
        return State(self.specs, [t.clone() for t in self.tensors], self.seen.clone())

    def mark(self) -> Mark:
        """Return the way back to this moment: unlike a copy, it costs the same at any length of the text."""
        return Mark([t.clone() for t in self._fixed()], self.seen.clone())

    def go_back(self, mark: Mark) -> None:
        """Forget what came after a mark of this state."""
        for mine, before in zip(self._fixed(), mark.fixed, strict=True):
            mine.copy_(before)
        self.seen.copy_(mark.seen)  # what lies behind it in a tensor that grows means nothing

    def _fixed(self) -> list[torch.Tensor]:
        return [t for spec, t in zip(self.specs, self.tensors, strict=True) if spec.growing is None]

    def select(self, rows: Sequence[int]) -> State:
        """Return a state of other sequences, each a copy of one of these ``rows``."""
        index = torch.tensor(rows)
        return State(self.specs, [t[index] for t in self.tensors], self.seen[index])

    def reorder(self, rows: Sequence[int]) -> None:
        """Let each sequence go on from that of ``rows[i]``; one that others go on from has to stay itself."""
        for row, source in enumerate(rows):
            if row != source:
                self.put(row, self.sequences(source, source + 1))

    def sequences(self, first: int, last: int) -> State:
        """Return the state of sequences ``first`` to ``last``, which shares its memory until either grows."""
        return State(self.specs, [t[first:last] for t in self.tensors], self.seen[first:last])

    def since(self, row: int, begin: int) -> list[torch.Tensor]:
        """Return one sequence's parts of the tensors, not copied; of what grows only the places from ``begin`` on."""
        end = int(self.seen[row])
        return [
            spec.places(tensor[row : row + 1], begin, end)
            for spec, tensor in zip(self.specs, self.tensors, strict=True)
        ]

    def put(self, row: int, other: State) -> None:
        """Copy the one sequence of another state into a row, which has room for its tokens."""
        tokens = int(other.seen[0])
        for spec, mine, theirs in zip(self.specs, self.tensors, other.tensors, strict=True):
            spec.places(mine[row : row + 1], 0, tokens).copy_(spec.places(theirs, 0, tokens))
        self.seen[row] = tokens

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(t.nbytes for t in self.tensors)
