"""Weights as nodes of a graph: constants, and what makes floats of quantized ones.

OpenVINO's plugins take Constant -> Convert (-> Subtract) -> Multiply (-> Reshape -> Convert) before a product for a
compressed weight, which stays as small in memory (KeepConstAndDecompression and MarkDequantization of OpenVINO 2026.4).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op

from klfast.core.errors import InvalidInputError
from klfast.export.openvino.nodes import integers
from klfast.quant import packing
from klfast.quant.layouts import Layout
from klfast.quant.tensor import QuantizedTensor

_LEAST_GROUP = 4  # with shorter ones, scales alone would take 8 bits a weight or more


def dense(weight: torch.Tensor, name: str) -> Any:
    """Return the float tensor of that name as a node in float32; one of 16 bits is held as float16.

    Raises:
        InvalidInputError: a bfloat16 value is beyond float16.
    """
    weight = weight.detach()
    if weight.dtype == torch.float32:
        return op.constant(weight.contiguous().numpy())
    halves = weight.to(torch.float16)
    if not halves.isfinite().all():
        raise InvalidInputError(
            f"{name} has a value beyond float16, in which OpenVINO holds 16 bits; load the model in float32"
        )
    return op.convert(op.constant(halves.contiguous().numpy()), np.float32)


def quantized(qt: QuantizedTensor, rows: torch.Tensor | None = None) -> Any:
    """Return a matrix without corrected rows as a node [N, K] in float32 that computes code times scale.

    With ``rows``, int64 [E, n], it is these of its rows, [E, n, K].
    """
    n, k = qt.shape
    length = common_group(qt)
    parts = _parts(qt.to_layout(Layout.PLAIN), length)
    leading = [n] if rows is None else list(rows.shape)
    codes, scale, zero_points = (each if rows is None or each is None else each[rows.flatten()] for each in parts)
    assert codes is not None
    assert scale is not None
    halves = scale.half()
    dtype = np.float16 if torch.equal(halves.float(), scale) else np.float32
    shape = [*leading, k] if k == length else [*leading, k // length, length]
    node = op.convert(_integers(codes.view(shape), qt), dtype)
    if zero_points is not None:
        node = op.subtract(node, op.convert(_integers(zero_points.view(*shape[:-1], 1), qt), dtype))
    node = op.multiply(node, op.constant(scale.numpy().astype(dtype).reshape(*shape[:-1], 1)))
    if k != length:
        node = op.reshape(node, integers(*leading, k), special_zero=False)
    return node if dtype is np.float32 else op.convert(node, np.float32)


def common_group(qt: QuantizedTensor) -> int:
    """Return the longest length of equal groups that part a row's groups, of which the last may be shorter."""
    k = qt.shape[1]
    return math.gcd(qt.spec.group_length(k), k)


def misfit(qt: QuantizedTensor) -> str | None:
    """Say why a matrix cannot be a compressed weight; None if it can."""
    length, common = qt.spec.group_length(qt.shape[1]), common_group(qt)
    if common < min(length, _LEAST_GROUP):
        return f"groups of {length} in rows of {qt.shape[1]}"
    return None


def _parts(qt: QuantizedTensor, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return codes from 0, uint8 [N, K], and for groups of ``length`` scales, float32, and zero points, uint8."""
    packed, scale, zero = qt.packed, qt.scale, qt.zero_point
    assert packed is not None
    assert scale is not None
    n, k = qt.shape
    repeats, count = qt.spec.group_length(k) // length, k // length

    def repeated(of_groups: torch.Tensor) -> torch.Tensor:
        return of_groups.repeat_interleave(repeats, 1)[:, :count].contiguous()

    zero_points = None if zero is None else repeated(packing.unpack(zero.T, qt.spec.bits, n).T)
    return packing.unpack(packed, qt.spec.bits, k).contiguous(), repeated(scale.float()), zero_points


def _integers(values: torch.Tensor, qt: QuantizedTensor) -> Any:
    """Return codes or zero points from 0, uint8, as a constant: signed ones less the middle, if symmetric."""
    symmetric, shape = qt.spec.symmetric, ov.Shape(list(values.shape))
    flat = values.reshape(-1)
    if qt.spec.bits == 4:
        flat = flat ^ 8 if symmetric else flat  # in two's complement
        flat = torch.nn.functional.pad(flat, (0, len(flat) % 2)).view(-1, 2)
        packed = ov.Tensor(ov.Type.i4 if symmetric else ov.Type.u4, shape)
        packed.data[:] = (flat[:, 0] | (flat[:, 1] << 4)).numpy().reshape(packed.data.shape)
        return op.constant(packed)
    if symmetric:
        signed = (flat.to(torch.int16) + qt.spec.q_min).to(torch.int8)
        return op.constant(signed.numpy().reshape(values.shape))
    return op.constant(values.numpy())
