"""``Engine``: a lowered model, and ``State``: what it carries from token to token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from klfast.backends.cpu.extension import view
from klfast.core.errors import InvalidInputError
from klfast.dispatch import pins
from klfast.engine.builder import MOST_SEQUENCES, Builder, StateSpec
from klfast.engine.columns import Columns

_LEAST_CAPACITY = 256  # tokens


class State:
    """What an engine carries from token to token, for some sequences.

    Attributes:
        specs: what its tensors are.
        tensors: their numbers, sequences first.
        seen: int64 [B], the tokens of each sequence so far.
    """

    def __init__(self, specs: Sequence[StateSpec], tensors: Sequence[torch.Tensor], seen: torch.Tensor) -> None:
        self.specs, self.tensors, self.seen = specs, list(tensors), seen
        self._native: Any = None

    @classmethod
    def empty(cls, specs: Sequence[StateSpec], sequences: int) -> State:
        """Return the state of sequences without tokens."""
        tensors = [torch.zeros(sequences, *spec.shape, dtype=spec.dtype) for spec in specs]
        return cls(specs, tensors, torch.zeros(sequences, dtype=torch.int64))

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens of each sequence, at least doubling what grows."""
        for i, (spec, tensor) in enumerate(zip(self.specs, self.tensors, strict=True)):
            if spec.growing is None or tensor.shape[dim := spec.growing + 1] >= tokens:
                continue
            shape = list(tensor.shape)
            shape[dim] = max(tokens, 2 * shape[dim], _LEAST_CAPACITY)
            grown = torch.zeros(shape, dtype=tensor.dtype)
            grown.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
            self.tensors[i], self._native = grown, None

    def __len__(self) -> int:
        return len(self.seen)

    def native(self) -> Any:
        """Return the tensors as the extension takes them."""
        if self._native is None:
            from klfast import _C

            self._native = _C.States([view(t) for t in self.tensors])
        return self._native

    def copy(self) -> State:
        """Return a copy that shares nothing."""
        return State(self.specs, [t.clone() for t in self.tensors], self.seen.clone())

    def sequences(self, first: int, last: int) -> State:
        """Return the state of sequences ``first`` to ``last``, which shares its memory until either grows."""
        return State(self.specs, [t[first:last] for t in self.tensors], self.seen[first:last])

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(t.nbytes for t in self.tensors)


class Engine:
    """Runs a program.

    Args:
        builder: what has lowered a model, to logits in float32.
        logits: the buffer of the head's product, of which each sequence has a row.
        scale: multiplies it.
        softcap: logits are softcap tanh(scale y / softcap); None: scale y.
    """

    def __init__(self, builder: Builder, logits: Columns, scale: float = 1.0, softcap: float | None = None) -> None:
        # Not the builder, which knows the model: an engine does not keep that alive.
        self._program, self._rows, self._states = builder.program, builder.rows, builder.states
        self._checks, self._kept = builder.checks, builder.kept
        self._scale, self._softcap = scale, softcap
        memory = torch.frombuffer(self._program.memory(logits), dtype=torch.float32)
        self._logits = memory.view(-1, logits.width)

    def is_current(self) -> bool:
        """Return whether the model still has the tensors and settings that it was lowered with."""
        return all(check() not in (None, False) for check in self._checks)

    @property
    def nbytes(self) -> int:
        """Memory of the program's buffers in bytes."""
        size: int = self._program.nbytes
        return size

    def state(self, sequences: int = 1) -> State:
        """Return the state of sequences without tokens."""
        if not 0 < sequences <= MOST_SEQUENCES:
            raise InvalidInputError(f"an engine runs 1 to {MOST_SEQUENCES} sequences, got {sequences}")
        return State.empty(self._states, sequences)

    def __call__(self, ids: torch.Tensor, state: State) -> torch.Tensor:
        """Feed int64 [B, T] tokens; return the logits after the last ones, float32 [B, V], valid until the next call.

        The state moves on in place. Prompts go through in chunks.
        """
        sequences, length = ids.shape
        if sequences != len(state):
            raise InvalidInputError(f"ids have {sequences} rows, but the state has {len(state)} sequences")
        state.reserve(int(state.seen.max()) + length)
        chunk = self._rows // sequences
        for first in range(0, length, chunk):
            part = ids[:, first : first + chunk].contiguous()
            self._program.run(*self._arguments(part, state))
            state.seen += part.shape[1]
        logits = self._logits[:sequences]
        if self._scale != 1.0:
            logits.mul_(self._scale)
        return logits if self._softcap is None else logits.div_(self._softcap).tanh_().mul_(self._softcap)

    def profile(self, ids: torch.Tensor, state: State) -> list[tuple[str, float]]:
        """Feed tokens, at most as many as a run takes; return each instruction's name and seconds."""
        state.reserve(int(state.seen.max()) + ids.shape[1])
        seconds = self._program.profile(*self._arguments(ids.contiguous(), state))
        state.seen += ids.shape[1]
        return list(zip(self._program.names(), seconds, strict=True))

    def _arguments(self, ids: torch.Tensor, state: State) -> tuple[Any, ...]:
        threads, limit = torch.get_num_threads(), pins.cpu_tier_limit()
        return ids.data_ptr(), state.seen.data_ptr(), *ids.shape, state.native(), threads, limit
