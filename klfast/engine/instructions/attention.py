"""``AttentionInstructions``: rotary positions, and attention to keys and values in the state."""

from __future__ import annotations

import torch

from klfast.backends.cpu.extension import DTYPE_CODES, view
from klfast.core.errors import CannotLowerError
from klfast.engine.columns import Columns
from klfast.engine.program import ProgramBase


class AttentionInstructions(ProgramBase):
    """Rotary positions and attention."""

    def angles(
        self, name: str, frequencies: torch.Tensor, factor: float, out: Columns, rounded_to: torch.dtype | None = None
    ) -> None:
        """Compute cosines and sines of position times frequency, float32, times factor.

        They are rounded to a dtype; None for that of activations.
        """
        frequencies, code = self.keep(frequencies), DTYPE_CODES[rounded_to or self.dtype]
        self.program.angles(name, view(frequencies), len(frequencies), factor, code, out)

    def rotate(self, heads: int, angles: Columns, x: Columns) -> None:
        """Apply rotary angles to the first channels of each head of x, in place."""
        if angles.width > (dim := x.width // heads):
            raise CannotLowerError(f"heads of {dim} channels are turned by {angles.width // 2} frequencies")
        self.program.rotate("rotate", heads, angles, x)

    def remember(self, name: str, groups: int, k: Columns, v: Columns) -> tuple[int, int]:
        """Keep keys and values of all tokens in the state; returns the numbers of the two tensors."""
        keys, values = (self.state(groups, 0, c.width // groups, dtype=self.dtype, growing=1) for c in (k, v))
        for state, columns in ((keys, k), (values, v)):
            self.program.remember(f"{name}.cache", state, groups, columns)
        return keys, values

    def attend(
        self,
        name: str,
        heads: int,
        scale: float,
        q: Columns,
        cache: tuple[int, int],
        out: Columns,
        *,
        window: int | None = None,
        sinks: int = 0,
    ) -> None:
        """Attend causally to the keys and values that ``remember`` keeps.

        With a ``window``, a token sees itself, so many tokens before it, and the first ``sinks``.
        """
        keys, values = cache
        groups, widths = self.states[keys].shape[0], [self.states[state].shape[-1] for state in cache]
        back = -1 if window is None else window
        self.program.attend(name, heads, groups, *widths, back, sinks, scale, keys, values, q, out)
