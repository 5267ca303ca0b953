"""``Engine``: a lowered model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from klfast.core import forks
from klfast.core.errors import InvalidInputError
from klfast.dispatch import pins
from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.engine.program import MOST_SEQUENCES
from klfast.engine.state import State


class Engine:
    """Runs a model's program; threads may share it, and take turns.

    Args:
        builder: what has lowered a model, to logits in float32.
        logits: the buffer of the head's product, of which each sequence has a row.
        scale: multiplies it.
        softcap: logits are softcap tanh(scale y / softcap); None: scale y.
    """

    def __init__(self, builder: Builder, logits: Columns, scale: float = 1.0, softcap: float | None = None) -> None:
        # Not the builder, which knows the model: an engine does not keep that alive.
        self._program, self._rows, self._states = builder.program, builder.rows, builder.states
        self._most = min(builder.rows, MOST_SEQUENCES)
        self._prefix = builder.prefix
        self._checks, self._kept = builder.checks, builder.kept
        self._scale, self._softcap = scale, softcap
        self._logits = self._memory(logits)
        self._corrected = builder.corrected
        self._correction = None if builder.correction is None else self._memory(builder.correction)
        self._lock = forks.lock()

    def _memory(self, of: Columns) -> torch.Tensor:
        """Return a buffer of the program, float32 [rows, width]."""
        return torch.frombuffer(self._program.memory(of), dtype=torch.float32).view(-1, of.width)

    @torch.no_grad()  # parameters that want gradients are taken where nobody records any
    def is_current(self) -> bool:
        """Return whether the model still has the tensors and settings that it was lowered with."""
        return all(check() not in (None, False) for check in self._checks)

    @property
    def nbytes(self) -> int:
        """Memory of the program's buffers in bytes."""
        size: int = self._program.nbytes
        return size

    @property
    def names(self) -> list[str]:
        """The instructions' names, in their order: modules' names, or what they do."""
        return self._program.names()

    def state(self, sequences: int = 1) -> State:
        """Return the state of sequences without tokens."""
        self._require_room(sequences)
        state = State.empty(self._states, sequences)
        if self._prefix:
            first = self._program.vocabulary
            ids = torch.arange(first, first + self._prefix).expand(sequences, -1)
            with self._lock:
                self._feed(ids, state)
        return state

    def _require_room(self, sequences: int) -> None:
        if not 0 < sequences <= self._most:
            raise InvalidInputError(f"an engine runs 1 to {self._most} sequences, got {sequences}")

    def __call__(self, ids: torch.Tensor, state: State) -> torch.Tensor:
        """Feed int64 [B, T] tokens; return the logits after the last ones, float32 [B, V].

        The state moves on in place. Prompts go through in chunks.

        Raises:
            InvalidInputError: a wrong dtype or shape, a token that is not in the vocabulary, or another engine's state.
        """
        ids = self._checked(ids, state)
        with self._lock:
            self._feed(ids, state)
            return self._answers(len(state))

    def each(self, ids: torch.Tensor, state: State) -> torch.Tensor:
        """Feed int64 [B, T] tokens, at most 16 in all; return the logits after each of them, float32 [B, T, V].

        Raises:
            InvalidInputError: too many tokens, or as for a call.
        """
        ids = self._checked(ids, state)
        if ids.numel() > self._most:
            raise InvalidInputError(f"logits of each token are for at most {self._most} tokens, got {ids.numel()}")
        with self._lock:
            state.reserve(int(state.seen.max()) + ids.shape[1])
            self._run(self._program.run, ids, state, True)
            return self._answers(ids.numel()).view(*ids.shape, -1)

    def _answers(self, rows: int) -> torch.Tensor:
        """Return the logits in the first rows of the head's buffer, float32 [rows, V]."""
        logits = self._logits[:rows] * self._scale
        if self._corrected is not None and self._correction is not None:
            logits.index_add_(1, self._corrected, self._correction[:rows], alpha=self._scale)
        return logits if self._softcap is None else logits.div_(self._softcap).tanh_().mul_(self._softcap)

    def profile(self, ids: torch.Tensor, state: State) -> list[tuple[str, float]]:
        """Feed int64 [B, T] tokens, at most as many as a run takes; return each instruction's name and seconds."""
        ids = self._checked(ids, state)
        if ids.numel() > self._rows:
            raise InvalidInputError(f"a run takes at most {self._rows} tokens, got {ids.numel()}")
        with self._lock:
            state.reserve(int(state.seen.max()) + ids.shape[1])
            seconds = self._run(self._program.profile, ids, state)
        return list(zip(self._program.names(), seconds, strict=True))

    def _feed(self, ids: torch.Tensor, state: State) -> None:
        state.reserve(int(state.seen.max()) + ids.shape[1])
        most = self._rows // len(state)
        # As long as one another: the last, were it a single token, would be taken for a decoding step.
        chunks = -(-ids.shape[1] // most)
        for part in ids.tensor_split(chunks, dim=1) if chunks > 1 else (ids,):
            self._run(self._program.run, part.contiguous(), state, False)

    def _checked(self, ids: torch.Tensor, state: State) -> torch.Tensor:
        """Return the ids, contiguous."""
        if ids.dtype != torch.int64 or ids.dim() != 2 or not ids.is_cpu or not ids.numel():
            raise InvalidInputError(
                f"ids must be int64 [B, T] on the CPU with at least one token, got {ids.dtype} {list(ids.shape)} "
                f"on {ids.device}"
            )
        if len(ids) != len(state):
            raise InvalidInputError(f"ids have {len(ids)} rows, but the state has {len(state)} sequences")
        self._require_room(len(state))
        if state.specs is not self._states and state.specs != self._states:
            raise InvalidInputError("the state belongs to another model's engine; make one with engine.state()")
        ids = ids.contiguous()
        if (unknown := self._program.first_unknown(ids.data_ptr(), ids.numel())) >= 0:
            raise InvalidInputError(
                f"token ids must lie in 0..{self._program.vocabulary - 1}, got {int(ids.view(-1)[unknown])}"
            )
        return ids

    def _run(self, work: Callable[..., Any], ids: torch.Tensor, state: State, *how: bool) -> Any:
        """Let the program's ``run`` or ``profile`` feed contiguous ids to a state that has room for them."""
        native, threads, limit = state.native(), torch.get_num_threads(), pins.cpu_tier_limit()
        return work(ids.data_ptr(), state.seen.data_ptr(), *ids.shape, native[0], threads, limit, *how)
