"""``GraphAttention``: rotary positions, and attention to keys and values in variables."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from openvino import opset13 as op

from klfast.engine.columns import Columns
from klfast.export.openvino.base import GraphBase
from klfast.export.openvino.nodes import by_head, constant, flat, integers, reshaped, size

_EXCHANGED = np.array([0, 2, 1, 3])  # tokens and heads
_MASKED = -65504.0  # the least float16: plugins that compute in it need a number


class GraphAttention(GraphBase):
    """Rotary positions and attention."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._caches: dict[int, Any] = {}
        self._masks: dict[tuple[int | None, int], Any] = {}
        # By the id of a node, which is kept beside it.
        self._tables: dict[int, tuple[Any, Any]] = {}
        self._turned: dict[int, tuple[Any, Any]] = {}

    def angles(
        self, name: str, frequencies: torch.Tensor, factor: float, out: Columns, rounded_to: torch.dtype | None = None
    ) -> None:
        """Compute cosines and sines of position times frequency, times factor."""
        positions = op.unsqueeze(op.convert(self._positions(), np.float32), op.constant([0, 2]))  # [1, T, 1]
        angles = op.multiply(positions, constant(frequencies))
        half = out.width // 2
        for columns, value in zip(out.split(half, half), (op.cos(angles), op.sin(angles)), strict=True):
            self.memory.write(columns, value if factor == 1 else op.multiply(value, np.float32(factor)))

    def rotate(self, heads: int, angles: Columns, x: Columns) -> None:
        """Apply rotary angles to the first channels of each head of x, in place.

        In the form that OpenVINO's RoPEFusion (fuse_rotary_positional_embeddings.cpp) finds, for which plugins that
        compute in float16 leave the angles in float32 (MarkRopeInputsToKeepInMixedPrecision).
        """
        half = angles.width // 2
        cos, sin = (self._table(columns) for columns in angles.split(half, half))
        turned, rest = self._heads_first(x, heads), []
        if 2 * half < x.width // heads:
            parts = op.variadic_split(turned, op.constant(3), integers(2 * half, -1))
            turned, rest = parts.output(0), [parts.output(1)]
        halves = op.variadic_split(turned, op.constant(3), integers(half, -1))
        across = op.concat([op.multiply(halves.output(1), np.float32(-1)), halves.output(0)], -1)
        y = op.add(op.multiply(turned, cos), op.multiply(across, sin))
        y = op.concat([y, *rest], -1) if rest else y
        value = flat(op.transpose(y, _EXCHANGED))
        self._turned[id(value)] = value, y
        self.memory.write(x, value)

    def _table(self, columns: Columns) -> Any:
        """Return cosines or sines [1, T, C] as [1, 1, T, 2 C], for both halves of the channels."""
        value = self.memory.read(columns)
        if id(value) not in self._tables:
            self._tables[id(value)] = value, op.unsqueeze(op.concat([value, value], -1), op.constant(1))
        return self._tables[id(value)][1]

    def _heads_first(self, columns: Columns, heads: int) -> Any:
        """Return columns as [B, heads, T, D]."""
        value = self.memory.read(columns)
        if id(value) in self._turned:
            return self._turned[id(value)][1]
        return op.transpose(by_head(value, heads), _EXCHANGED)

    def remember(self, name: str, groups: int, k: Columns, v: Columns) -> tuple[int, int]:
        """Keep keys and values of all tokens in the state; returns the numbers of the two tensors."""
        cache = []
        for columns in (k, v):
            index = self.state(groups, 0, columns.width // groups, dtype=torch.float32, growing=1)
            past, put = self.variable(index)
            cached = op.concat([past, self._heads_first(columns, groups)], 2)
            put(cached)
            prefix = self.learned(index)
            self._caches[index] = cached if prefix is None else op.concat([prefix, cached], 2)
            cache.append(index)
        return cache[0], cache[1]

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
        """Attend causally to the keys and values that ``remember`` keeps."""
        query = self._heads_first(q, heads)
        keys, values = (self._of_heads(index, heads) for index in cache)
        mask = self._mask(window, sinks, self._caches[cache[0]])
        y = op.scaled_dot_product_attention(query, keys, values, mask, op.constant(np.float32(scale)), False)
        y.set_friendly_name(f"{name}.attention")
        self.memory.write(out, flat(op.transpose(y, _EXCHANGED)))

    def _of_heads(self, index: int, heads: int) -> Any:
        """Return keys or values [B, heads, S, D], each group's for all of its heads."""
        groups, _, width = self.states[index].shape
        cached = self._caches[index]
        if groups == heads:
            return cached
        shape = op.concat([size(cached, 0), integers(groups, heads // groups), size(cached, 2), integers(width)], 0)
        repeated = op.broadcast(op.unsqueeze(cached, op.constant(2)), shape, broadcast_spec="BIDIRECTIONAL")
        return reshaped(repeated, 0, heads, -1, width)

    def _mask(self, window: int | None, sinks: int, keys: Any) -> Any:
        """Return what is added to scores, [1, 1, T, S]; the same node for layers that see the same."""
        if (window, sinks) not in self._masks:
            query = op.unsqueeze(self._positions(), op.constant(1))
            key = op.unsqueeze(
                _range(op.constant(np.int64(0)), op.squeeze(size(keys, 2), op.constant(0))), op.constant(0)
            )
            seen = op.less_equal(key, query)
            if window is not None:
                near = op.greater_equal(key, op.subtract(query, np.int64(window)))
                seen = op.logical_and(seen, op.logical_or(near, op.less(key, np.int64(sinks))))
            added = op.select(seen, op.constant(np.float32(0)), op.constant(np.float32(_MASKED)))
            self._masks[window, sinks] = op.unsqueeze(added, op.constant([0, 1]))
        return self._masks[window, sinks]

    def _positions(self) -> Any:
        """Return the tokens' positions, int64 [T]."""
        past = op.squeeze(self.past, op.constant(0))
        return _range(past, op.add(past, op.squeeze(size(self.ids, 1), op.constant(0))))


def _range(first: Any, end: Any) -> Any:
    return op.range(first, end, op.constant(np.int64(1)), "i64")
