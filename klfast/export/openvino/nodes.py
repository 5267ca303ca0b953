"""Short ways to nodes of a graph that many instructions use."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op
from openvino.utils.node_factory import NodeFactory

_factory = NodeFactory("opset13")


def constant(tensor: torch.Tensor) -> Any:
    """Return a constant in float32."""
    return op.constant(tensor.detach().float().contiguous().numpy())


def integers(*values: int) -> Any:
    """Return a constant int64 [len(values)]."""
    return op.constant(np.array(values, dtype=np.int64))


def reshaped(x: Any, *sizes: int) -> Any:
    """Return x in another shape; a size of 0 keeps that of x there, one of -1 follows from the others."""
    return op.reshape(x, integers(*sizes), special_zero=True)


def sizes(x: Any) -> list[int]:
    """Return the sizes of an output, or of a node's first; 0 for those that are known only when the graph runs."""
    output = x.output(0) if isinstance(x, ov.Node) else x
    return [each.get_length() if each.is_static else 0 for each in output.get_partial_shape()]


def by_head(x: Any, heads: int) -> Any:
    """Return x [B, T, heads D] as [B, T, heads, D]."""
    return reshaped(x, 0, 0, heads, sizes(x)[-1] // heads)


def flat(x: Any) -> Any:
    """Return x [B, T, H, D] as [B, T, H D]."""
    *_, heads, width = sizes(x)
    return reshaped(x, 0, 0, heads * width)


def size(x: Any, dimension: int) -> Any:
    """Return a dimension of x, int64 [1]."""
    return op.gather(op.shape_of(x), integers(dimension), op.constant(0))


def silu(x: Any) -> Any:
    """Return x sigmoid(x), as a node of one input: to that of ``op.swish`` OpenVINO's transformations are blind."""
    return _factory.create("Swish", [x.output(0) if isinstance(x, ov.Node) else x], {})
