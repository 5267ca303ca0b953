"""Where a program's instructions read and write: columns of buffers with a row a token."""

from __future__ import annotations

from typing import NamedTuple


class Columns(NamedTuple):
    """Columns [first, first + width) of a buffer."""

    buffer: int
    first: int
    width: int

    def split(self, *widths: int) -> tuple[Columns, ...]:
        """Return consecutive columns of these widths, at least 0, which must add up to all."""
        if sum(widths) != self.width or any(width < 0 for width in widths):
            raise ValueError(f"{self.width} columns cannot be split into {widths}")
        parts, first = [], self.first
        for width in widths:
            parts.append(Columns(self.buffer, first, width))
            first += width
        return tuple(parts)
