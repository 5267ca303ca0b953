"""``GraphVectors``: norms, and what is computed element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from openvino import opset13 as op
from torch import nn

from klfast.engine.columns import Columns
from klfast.export.openvino.base import GraphBase
from klfast.export.openvino.memory import columns_of
from klfast.export.openvino.nodes import by_head, constant, flat, silu
from klfast.nn.norm import Norm

_GATES = {
    "silu_gate": silu,
    "sigmoid_gate": op.sigmoid,
    "gelu_gate": lambda a: op.gelu(a, "erf"),
    "gelu_tanh_gate": lambda a: op.gelu(a, "tanh"),
    "relu_gate": op.relu,
    "softplus_gate": op.softplus,
}


class GraphVectors(GraphBase):
    """Norms, combinations, copies."""

    def normalise(
        self, module: nn.Module, x: Columns, out: Columns, gate: Columns | None = None, *, norm: Norm | None = None
    ) -> None:
        """Normalise each row of x, or each of its parts that are as wide as the weight, as a module does."""
        norm = self.read_norm(module, norm)
        value, z = self.memory.read(x), None
        if gate is not None:
            z = (op.sigmoid if norm.gate_activation == "sigmoid" else silu)(self.memory.read(gate))
            if not norm.norm_before_gate:
                value, z = op.multiply(value, z), None
        weight = constant(norm.weight.float() + norm.weight_offset)
        width = len(norm.weight)
        if x.width != width:  # heads
            value = flat(op.multiply(_normed(by_head(value, x.width // width), norm.eps), weight))
        elif norm.group_size in (None, width):
            value = op.multiply(_normed(value, norm.eps), weight)
        else:
            value = op.multiply(flat(_normed(by_head(value, width // norm.group_size), norm.eps)), weight)
        self.memory.write(out, value if z is None else op.multiply(value, z))

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
        """Combine two tensors as csrc/elementwise/combine.h describes."""
        result = _combined(how, self.memory.read(a), self.memory.read(b), factor)
        self.memory.write(out, result)
        if narrow is not None:
            self.memory.write(narrow, result)

    def combine_row(self, how: str, x: Columns, row: float | torch.Tensor, out: Columns) -> None:
        """Combine each row of x with one row, or with a number."""
        other = constant(row.detach() if isinstance(row, torch.Tensor) else torch.tensor(row))
        self.memory.write(out, _combined(how, self.memory.read(x), other))

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
        """Copy channels of each head of x, from ``first`` on, to the heads of ``out``, from ``to`` on."""
        whole = out.width // heads
        width = whole if width is None else width
        picked = columns_of(by_head(self.memory.read(x), 1 if shared else heads), first, first + width)
        if shared:
            picked = op.tile(picked, np.array([1, 1, heads, 1]))
        if width != whole:
            picked = self._among(picked, heads, to, width, out)
        self.memory.write(out, flat(picked))

    def spread_heads(self, heads: int, x: Columns, out: Columns) -> None:
        """Copy the one value of each head of x to all channels of the head of ``out``."""
        each = by_head(self.memory.read(x), heads)
        self.memory.write(out, flat(op.tile(each, np.array([1, 1, 1, out.width // heads]))))

    def _among(self, picked: Any, heads: int, to: int, width: int, out: Columns) -> Any:
        """Return heads of ``out`` with channels ``picked`` [B, T, heads, width] from ``to`` on."""
        whole = out.width // heads
        if not self.memory.holds(out):
            return op.pad(picked, [0, 0, 0, to], [0, 0, 0, whole - to - width], "constant", np.float32(0))
        before = by_head(self.memory.read(out), heads)
        parts = [picked]
        if to:
            parts.insert(0, columns_of(before, 0, to))
        if to + width < whole:
            parts.append(columns_of(before, to + width, whole))
        return op.concat(parts, -1)


def _normed(x: Any, eps: float) -> Any:
    """Return x / sqrt(mean(x^2) + eps) over the last dimension, in the form that OpenVINO's RMSFusion finds."""
    mean = op.reduce_mean(op.power(x, np.float32(2)), np.array([-1]), keep_dims=True)
    return op.multiply(x, op.divide(np.float32(1), op.sqrt(op.add(mean, np.float32(eps)))))


def _combined(how: str, a: Any, b: Any, factor: float = 1.0) -> Any:
    if how == "add":
        return op.add(a, b if factor == 1 else op.multiply(b, np.float32(factor)))
    if how == "average":
        return op.multiply(op.add(a, b), np.float32(0.5))
    return op.multiply(a if how == "multiply" else _GATES[how](a), b)
