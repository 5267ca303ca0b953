"""Packed sequences: several that lie one behind the other along time, as ``cu_seqlens`` or ``seq_idx`` say.

The ops take one sequence a row, so that what is packed goes through them sequence by sequence, as views of the whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from klfast.core.errors import InvalidInputError
from klfast.dispatch.checks import check_integers, require_memory


class Sequence(NamedTuple):
    """Steps ``first`` to ``end - 1`` of a row; ``number`` is negative for padding."""

    row: int
    first: int
    end: int
    number: int

    def of(self, t: torch.Tensor) -> torch.Tensor:
        """Return the sequence's part of a tensor [B, L, ...], as a batch of 1."""
        return t[self.row : self.row + 1, self.first : self.end]


def by_limits(op: str, cu_seqlens: torch.Tensor, batch: int, length: int) -> list[Sequence]:
    """Return the sequences that lie between the limits ``cu_seqlens``, int [N + 1], of a batch of 1.

    Raises:
        InvalidInputError: limits that do not rise from 0 to ``length``.
    """
    check_integers(op, "cu_seqlens", cu_seqlens, cu_seqlens.numel())
    limits = _values(op, "cu_seqlens", cu_seqlens)
    if batch != 1 or len(limits) < 2 or limits[0] != 0 or limits[-1] != length or limits != sorted(limits):
        raise InvalidInputError(
            f"{op}: cu_seqlens must rise from 0 to {length}, the length of one packed batch, "
            f"got {limits} for a batch of {batch}"
        )
    return [Sequence(0, *limit, number) for number, limit in enumerate(itertools.pairwise(limits))]


def by_index(op: str, seq_idx: torch.Tensor, batch: int, length: int) -> list[Sequence]:
    """Return the runs of equal numbers in each row of ``seq_idx``, int [B, L].

    Raises:
        InvalidInputError: numbers that fall along a row or come back; negative ones (padding) may stand anywhere.
    """
    check_integers(op, "seq_idx", seq_idx, batch, length)
    found = []
    for row, numbers in enumerate(_values(op, "seq_idx", seq_idx)):
        first, last = 0, -1
        for number, run in itertools.groupby(numbers):
            if 0 <= number <= last:
                raise InvalidInputError(
                    f"{op}: seq_idx must rise along each row, apart from negative numbers (padding); "
                    f"got {number} after {last} in row {row}"
                )
            end = first + sum(1 for _ in run)
            found.append(Sequence(row, first, end, number))
            first, last = end, max(last, number)
    return found


def same(a: Iterable[Sequence], b: Iterable[Sequence]) -> bool:
    """Return True if two divisions have the same sequences, apart from empty ones and numbers."""
    lists = [[sequence[:3] for sequence in each if sequence.first < sequence.end] for each in (a, b)]
    return lists[0] == lists[1]


def _values(op: str, name: str, t: torch.Tensor) -> list[Any]:
    if not torch.compiler.is_compiling():
        require_memory(op, **{name: t})
    found: list[Any] = t.tolist()
    return found
