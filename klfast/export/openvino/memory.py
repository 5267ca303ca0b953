"""``Memory``: which nodes of a graph the columns of a program's buffers are."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from openvino import opset13 as op

from klfast.engine.columns import Columns


class _Segment(NamedTuple):
    """Columns [first, end) of a buffer, and the node [B, T, end - first] that they are."""

    first: int
    end: int
    node: Any


class Memory:
    """The buffers of a program at one point of it: a graph has no memory, so a write replaces what columns are."""

    def __init__(self) -> None:
        self._segments: dict[int, list[_Segment]] = defaultdict(list)

    def write(self, columns: Columns, node: Any) -> None:
        """Let columns be a node from now on; what other columns of the buffer are stays."""
        first, end = columns.first, columns.first + columns.width
        kept = []
        for each in self._segments[columns.buffer]:
            kept += [_part(each, each.first, min(each.end, first)), _part(each, max(each.first, end), each.end)]
        kept.append(_Segment(first, end, node))
        self._segments[columns.buffer] = sorted(filter(None, kept), key=lambda each: each.first)

    def read(self, columns: Columns) -> Any:
        """Return the node that columns are."""
        first, end = columns.first, columns.first + columns.width
        segments = self._segments[columns.buffer]
        parts = [part for each in segments if (part := _part(each, max(each.first, first), min(each.end, end)))]
        if sum(part.end - part.first for part in parts) != columns.width:
            raise ValueError(f"columns {first} to {end} of buffer {columns.buffer} are read before they are written")
        return parts[0].node if len(parts) == 1 else op.concat([part.node for part in parts], -1)

    def holds(self, columns: Columns) -> bool:
        """Return whether anything has been written to the first of these columns."""
        return any(each.first <= columns.first < each.end for each in self._segments[columns.buffer])


def _part(segment: _Segment, first: int, end: int) -> _Segment | None:
    """Return columns [first, end) of a segment; None if there are none."""
    if first >= end:
        return None
    if (first, end) == (segment.first, segment.end):
        return segment
    return _Segment(first, end, columns_of(segment.node, first - segment.first, end - segment.first))


def columns_of(node: Any, first: int, end: int) -> Any:
    """Return the last dimension's places [first, end)."""
    return op.slice(node, [first], [end], [1], [-1])
