"""What happens to a tensor of the model on its way into the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class Change:
    """Rows are taken, then columns, rows are multiplied, and at last come new values or another shape.

    A quantized matrix goes through all but ``values`` without being rounded again.

    Attributes:
        rows: the source of each row, int64 [N]; of experts [E, N, K] the source among all E N rows. None for all.
        columns: the source of each column, int64 [K]; None for all.
        factor: multiplies every row, or, as float32 [N], each its own.
        values: a function of the whole tensor, in float32; for vectors and convolutions.
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    factor: float | torch.Tensor | None = None
    values: Callable[[torch.Tensor], torch.Tensor] | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the changed tensor: in its own dtype if nothing is computed, else in float32."""
        if self.rows is not None:
            taken = (tensor.flatten(0, 1) if tensor.dim() == 3 else tensor).index_select(0, self.rows.to(tensor.device))
            tensor = taken.view(len(tensor), -1, taken.shape[-1]) if tensor.dim() == 3 else taken
        if self.columns is not None:
            tensor = tensor.index_select(-1, self.columns.to(tensor.device))
        if self.factor is not None:
            tensor = tensor.float() * self.row_factor(tensor)
        return tensor if self.values is None else self.values(tensor.float())

    def row_factor(self, tensor: torch.Tensor) -> float | torch.Tensor:
        """Return the factor in a shape that multiplies the rows of a tensor."""
        if not isinstance(self.factor, torch.Tensor):
            return 1.0 if self.factor is None else self.factor
        return self.factor.view(-1, *[1] * (tensor.dim() - 1)).to(tensor.device)

    def after_rows(self, rows: torch.Tensor) -> Change:
        """Return this change of only these rows of a tensor."""
        return replace(self, rows=rows if self.rows is None else rows[self.rows])


def share(shape: tuple[int, ...], part: int, parts: int) -> torch.Tensor:
    """Return the rows of one of several matrices, one above the other, in a matrix or in each of a stack [E, N, K]."""
    *experts, n, _ = shape
    rows = torch.arange(n * (experts[0] if experts else 1)).view(-1, parts, n // parts)
    return rows[:, part].flatten()


def interleaved(rows: int, heads: int, rotary: int) -> torch.Tensor:
    """Return the rows of queries or keys whose rotary pairs are neighbours, not in the two halves of ``rotary`` rows.

    These are the first of each head.
    """
    turned, others = torch.arange(rows).view(heads, -1).split((rotary, rows // heads - rotary), 1)
    return torch.cat((turned.view(heads, 2, -1).transpose(1, 2).flatten(1), others), 1).flatten()


def tiled(count: int, groups: int, heads: int, first: int = 0) -> torch.Tensor:
    """Return ``first`` places as they are, then ``count`` with the heads of all groups in turns, not group by group."""
    return torch.cat(
        (torch.arange(first), first + torch.arange(count).view(groups, heads // groups, -1).transpose(0, 1).flatten())
    )


NEGATED_EXP = Change(values=lambda tensor: -tensor.exp())
PLUS_ONE = Change(values=lambda tensor: tensor + 1)
IN_FLOAT32 = Change(values=lambda tensor: tensor)
ONE_ROW = Change(values=lambda tensor: tensor.squeeze(0))
DEPTHWISE = Change(values=lambda tensor: tensor.squeeze(1))  # [C, 1, W]
COLUMN = Change(values=lambda tensor: tensor.unsqueeze(-1))
COLUMN_OF_NEGATED_EXP = Change(values=lambda tensor: -tensor.exp().unsqueeze(-1))


def in_groups(groups: int) -> Change:
    """Return the change of a vector to a row for each group."""
    return Change(values=lambda tensor: tensor.view(groups, -1))
