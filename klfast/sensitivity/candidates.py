"""Candidates of a sweep: one matrix quantized, or the input of one rounded to int8, all else at full precision.

Inputs are rounded beside the exact weight. The errors of a weight and of its input are small and independent, so their
KLs add up. With the quantized weight, the KL that int8 adds would be the small difference of two large ones, noisy, and
another one for each spec.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.core.interrupts import interruptible
from klfast.models.matrices import Matrix
from klfast.quant.rounding import fake_quantize
from klfast.quant.spec import QuantSpec

COMPARED_TOGETHER = 16  # candidates that share one computation of the teacher's logits
_T = TypeVar("_T")


@dataclass(frozen=True)
class Candidate:
    """A named matrix and the spec to quantize it to; only its ``rows`` (first, end), if it has a ``use``.

    With ``inputs_of``, the modules that hold it, their input is rounded to int8 in the spec's groups, not the weight.
    ``blocks`` are the indices of all blocks that use its weight, in order; empty for the head. For a single ``expert``
    the matrix is its stack, and the rows are its own.
    """

    name: str
    matrix: Matrix
    spec: QuantSpec
    blocks: tuple[int, ...] = ()
    use: str | None = None
    rows: tuple[int, int] | None = None
    inputs_of: tuple[nn.Module, ...] = ()
    expert: int | None = None

    def __str__(self) -> str:
        if self.inputs_of:
            return f"{self.name} with int8 activations"
        return f"{self.name}{f' ({self.use} rows)' if self.use else ''} as {self.spec}"

    def changes(self, layer: nn.Module) -> bool:
        """Return True for a linear layer that has this weight, or whose input is rounded."""
        return layer in self.inputs_of or layer.get_parameter("weight") is self.matrix.tensor

    def rounded(self, scale: str) -> torch.Tensor:
        """Return the whole weight [N, K] in its dtype, rounded, with scales that are chosen as in ``klfast.quantize``.

        Raises:
            InvalidInputError: it cannot be, with the candidate's name.
        """
        weight, found = self.matrix.weight.detach(), self._rounded_rows(scale)
        if self.rows is None:
            return found
        first, end = self.rows
        return torch.cat((weight[:first], found, weight[end:]))

    def squared_error(self, scale: str) -> float:
        """Return the sum of the squared errors of the rounded weight."""
        error = self._rounded_rows(scale).sub_(self._own_rows)
        return float(torch.linalg.vector_norm(error, dtype=torch.float32)) ** 2

    @property
    def _own_rows(self) -> torch.Tensor:
        return self.matrix.weight.detach()[slice(*(self.rows or (None,)))]

    def _rounded_rows(self, scale: str) -> torch.Tensor:
        weight = self._own_rows
        try:
            with interruptible():
                return fake_quantize(weight, self.spec, scale=scale).to(weight.dtype)
        except InvalidInputError as error:
            raise InvalidInputError(f"{self}: {error}") from error


def chunks(items: Sequence[_T], size: int) -> list[Sequence[_T]]:
    """Split ``items`` into pieces of at most ``size``."""
    return [items[start : start + size] for start in range(0, len(items), size)]
