"""``GraphRecurrences``: convolutions, scans and the delta rule, with their states."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from openvino import opset13 as op
from torch import nn

from klfast.engine.columns import Columns
from klfast.export.openvino import loops
from klfast.export.openvino.base import GraphBase
from klfast.export.openvino.nodes import by_head, constant, flat, integers, silu, size


class GraphRecurrences(GraphBase):
    """Convolutions, scans and the delta rule."""

    def convolve(self, conv: nn.Module, silu_after: bool, x: Columns, out: Columns, first: int = 0) -> None:
        """Apply a causal depthwise nn.Conv1d, its channels from ``first`` on; the state has the last inputs."""
        self.expect(conv, "Conv1d")
        weight, bias = self.parameters(conv, "weight", "bias")
        weight = weight[first : first + x.width].squeeze(1)  # [C, W]
        width = weight.shape[1]
        before, put = self.variable(self.state(width - 1, x.width, dtype=torch.float32))
        sequence = op.concat([before, self.memory.read(x)], 1)
        put(op.slice(sequence, [1 - width], [np.iinfo(np.int64).max], [1], [1]))
        y = None if bias is None else constant(bias[first : first + x.width])
        for step in range(width):
            shifted = op.slice(sequence, integers(step), op.add(size(self.ids, 1), integers(step)), [1], [1])
            term = op.multiply(shifted, constant(weight[:, step]))
            y = term if y is None else op.add(y, term)
        self.memory.write(out, silu(y) if silu_after else y)

    def selective_scan(
        self,
        name: str,
        A: torch.Tensor,
        D: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        x: Columns,
        dt: Columns,
        B: Columns,
        C: Columns,
        z: Columns,
        out: Columns,
    ) -> None:
        """Apply Mamba's recurrence, with A [D, N] in float32, D [D] and the bias of dt [D]."""
        state, put = self.variable(self.state(*A.shape, dtype=torch.float32), lambda first: first.mT)
        u, step = self.memory.read(x), self._steps(self.memory.read(dt), dt_bias)
        b, c = self.memory.read(B), self.memory.read(C)
        y, last = loops.selective_scan(constant(A.mT), step, op.multiply(step, u), b, c, state)
        put(last)
        self.memory.write(out, op.multiply(_with_skip(y, D, u), silu(self.memory.read(z))))

    def head_scan(
        self,
        name: str,
        A: torch.Tensor,
        D: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        dim: int,
        groups: int,
        dt_limit: tuple[float, float],
        x: Columns,
        dt: Columns | None,
        B: Columns,
        C: Columns,
        out: Columns,
        z: Columns | None = None,
    ) -> None:
        """Apply Mamba-2's recurrence to heads of ``dim`` channels, with A, D and the bias of dt [H]."""
        heads, states = len(A), B.width // groups
        index = self.state(heads, dim, states, dtype=torch.float32)
        state, put = self.variable(index, lambda first: first.view(1, groups, -1, states))
        u = self.memory.read(x)
        if dt is None:
            assert dt_bias is not None
            step = op.broadcast(constant(dt_bias), op.concat([op.shape_of(self.ids), integers(heads)], 0))
        else:
            step = self._limited(self._steps(self.memory.read(dt), dt_bias), dt_limit)
        decay, step = (_of_channels(each, dim) for each in (op.exp(op.multiply(step, constant(A))), step))
        b, c = (by_head(self.memory.read(each), groups) for each in (B, C))
        y, last = loops.head_scan(decay, op.multiply(step, u), b, c, state)
        put(last)
        y = _with_skip(y, None if D is None else D.repeat_interleave(dim), u)
        self.memory.write(out, y if z is None else op.multiply(y, silu(self.memory.read(z))))

    def delta_rule(
        self,
        name: str,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        largest_beta: float,
        key_heads: int,
        q: Columns,
        k: Columns,
        v: Columns,
        a: Columns,
        b: Columns,
        out: Columns,
    ) -> None:
        """Apply the gated delta rule, as ``RecurrenceInstructions.delta_rule`` describes it."""
        heads = A_log.numel()
        key_dim, value_dim = k.width // key_heads, v.width // heads
        rate = -torch.exp(A_log.detach().float().flatten()).repeat_interleave(a.width // heads)
        gate = op.multiply(self._steps(self.memory.read(a), dt_bias.flatten()), constant(rate))
        beta = op.sigmoid(self.memory.read(b))
        if largest_beta != 1:
            beta = op.multiply(beta, np.float32(largest_beta))
        state, put = self.variable(self.state(heads, key_dim, value_dim, dtype=torch.float32))
        queries, keys = (_unit(loops.of_heads(by_head(self.memory.read(each), key_heads), heads)) for each in (q, k))
        values = by_head(self.memory.read(v), heads)
        if a.width == heads:
            y, last = loops.delta_rule(queries, keys, values, gate, beta, state)
        else:
            y, last = loops.channel_delta_rule(queries, keys, values, by_head(gate, heads), beta, state)
        put(last)
        self.memory.write(out, flat(y))

    def _steps(self, dt: Any, bias: torch.Tensor | None) -> Any:
        return op.softplus(dt if bias is None else op.add(dt, constant(bias)))

    def _limited(self, step: Any, limit: tuple[float, float]) -> Any:
        """Return steps within limits in prompts, be they of one token: transformers' decoding step knows none."""
        least, most = limit
        if least <= 0 and math.isinf(most):
            return step
        is_prompt = op.logical_or(op.greater(size(self.ids, 1), integers(1)), op.equal(self.past, integers(0)))
        return op.select(is_prompt, op.clamp(step, least, min(most, float(np.finfo(np.float32).max))), step)


def _of_channels(x: Any, times: int) -> Any:
    """Return a number of each head [B, T, H] for each of its channels, [B, T, H times]."""
    return flat(op.tile(op.unsqueeze(x, op.constant(-1)), np.array([1, 1, 1, times])))


def _with_skip(y: Any, D: torch.Tensor | None, x: Any) -> Any:
    return y if D is None else op.add(y, op.multiply(x, constant(D)))


def _unit(x: Any) -> Any:
    """Return vectors of length 1, as FuseL2NormIntoGDN of OpenVINO finds them."""
    squares = op.reduce_sum(op.multiply(x, x), np.array([-1]), keep_dims=True)
    return op.multiply(x, op.divide(np.float32(1), op.sqrt(op.add(squares, np.float32(1e-6)))))
