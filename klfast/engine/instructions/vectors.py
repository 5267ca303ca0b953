"""``VectorInstructions``: norms, and what is computed element by element."""

from __future__ import annotations

import torch
from torch import nn

from klfast.backends.cpu.extension import view
from klfast.core.errors import CannotLowerError
from klfast.engine.columns import Columns
from klfast.engine.program import ProgramBase
from klfast.nn.norm import Norm


class VectorInstructions(ProgramBase):
    """Norms, combinations, copies."""

    def read_norm(self, module: nn.Module, norm: Norm | None = None) -> Norm:
        """Return what a module computes, ``norm`` itself if that is given."""
        if norm is not None:
            return norm
        read = self._norm_of(type(module))
        if read is None:
            raise CannotLowerError(f"{self.name(module)} is a {type(module).__name__}")
        return read(module)

    def normalise(
        self, module: nn.Module, x: Columns, out: Columns, gate: Columns | None = None, *, norm: Norm | None = None
    ) -> None:
        """Normalise each row of x, or each of its parts that are as wide as the weight, as a module does.

        ``norm`` says what that is where ``norm_of`` does not know the module's class.
        """
        norm = self.read_norm(module, norm)
        own = norm.weight is module._parameters.get("weight")
        weight = self.parameters(module, "weight")[0] if own else self.keep(norm.weight)
        self.program.normalise(
            self.name(module),
            view(weight),
            norm.group_size or 0,
            norm.eps,
            norm.weight_offset,
            norm.norm_before_gate,
            norm.gate_activation == "sigmoid",
            x.width // len(weight),
            x,
            gate,
            out,
        )

    def combine(
        self,
        how: str,
        a: Columns,
        b: Columns,
        out: Columns,
        *,
        factor: float = 1.0,
        each: int = 1,
        narrow: Columns | None = None,
    ) -> None:
        """Combine two tensors as csrc/elementwise/combine.h describes: "add", "multiply", "silu_gate" and so on.

        ``each`` is the number of rows that a token has in their buffers.
        """
        self.program.combine(how, how, factor, each, a, b, out, narrow)

    def combine_row(self, how: str, x: Columns, row: float | torch.Tensor, out: Columns) -> None:
        """Combine each row of x with one row, or with a number."""
        if not isinstance(row, torch.Tensor):
            row = torch.full((x.width,), row)
        self.program.combine_row(how, how, view(self.keep(row)), x, out)

    def scale(self, factors: float | torch.Tensor, x: Columns, out: Columns) -> None:
        """Multiply each column by its factor, or all by one."""
        self.combine_row("multiply", x, factors, out)

    def pick_heads(
        self,
        heads: int,
        first: int,
        x: Columns,
        out: Columns,
        *,
        to: int = 0,
        width: int | None = None,
        shared: bool = False,
    ) -> None:
        """Copy channels of each head of x, from ``first`` on, to the heads of ``out``, from ``to`` on.

        ``width`` is their number, None for a whole head of ``out``. With ``shared``, x is one head for all of ``out``.
        """
        width = out.width // heads if width is None else width
        self.program.copy_heads("pick_heads", heads, first, to, width, shared, x, out)

    def spread_heads(self, heads: int, x: Columns, out: Columns) -> None:
        """Copy the one value of each head of x to all channels of the head of ``out``: one, then twice as many each."""
        self.pick_heads(heads, 0, x, out, width=1)
        filled, whole = 1, out.width // heads
        while filled < whole:
            width = min(filled, whole - filled)
            self.pick_heads(heads, 0, out, out, to=filled, width=width)
            filled += width
