"""Other implementations of a linear layer: torch in three dtypes, torch's 4- and 8-bit kernels, OpenVINO."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from klfast import reference
from klfast.types import QuantSpec

from .contest import Contender, Unavailable, distance, tolerance
from .weights import Weights


def _contender(calls: list[Callable[[], torch.Tensor]], expected: Callable[[], torch.Tensor], allowed: float, nbytes: int, **more: object) -> Contender:
    return Contender(calls, lambda: distance(calls[0](), expected()), allowed, nbytes, **more)


def torch_linear(x: torch.Tensor, weights: Weights, dtype: torch.dtype) -> Contender:
    copies, x = weights.dense(dtype), x.to(dtype)
    calls = [lambda w=w: F.linear(x, w) for w in copies]
    return _contender(calls, lambda: x.float() @ copies[0].float().T, tolerance(dtype), copies[0].nbytes)


def torch_int4pack(x: torch.Tensor, weights: Weights) -> Contender:
    """bfloat16 x; the same rounded weights as klfast's, where the group size allows it."""
    _require_cpu(x, "_weight_int4pack_mm_for_cpu")
    group = weights.group_size((128, 64, 32))
    if group is None or weights.n % 16:
        raise Unavailable(f"torch's int4pack takes no [{weights.n}, {weights.k}]: N must be a multiple of 16, K of 32")
    qt = weights.quantized(QuantSpec(4, group))
    codes = reference.unpack(qt.packed, 4, weights.k).int() + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale = qt.scale.T.to(x.dtype)
    scales = torch.stack((scale, torch.zeros_like(scale)), -1).contiguous()
    copies = weights.copies("int4pack", packed.nbytes + scales.nbytes, lambda: (packed.clone(), scales.clone()))
    calls = [lambda w=w, s=s: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, group, s) for w, s in copies]
    return _contender(calls, lambda: reference.dequant_matmul(x, qt), 2e-2, packed.nbytes + scales.nbytes)


def torch_int8pack(x: torch.Tensor, weights: Weights) -> Contender:
    """bfloat16 x; one scale a row."""
    _require_cpu(x, "_weight_int8pack_mm")
    if weights.k % 32:
        raise Unavailable(f"torch's int8pack reads beyond the rows of a [{weights.n}, {weights.k}]: K must be a multiple of 32")
    qt = weights.quantized(QuantSpec(8, -1))
    codes, scales = reference.unpack(qt.packed, 8, weights.k), qt.scale[:, 0].to(x.dtype)
    copies = weights.copies("int8pack", codes.nbytes, codes.clone)
    calls = [lambda w=w: torch.ops.aten._weight_int8pack_mm(x, w, scales) for w in copies]
    return _contender(calls, lambda: reference.dequant_matmul(x, qt), 2e-2, codes.nbytes)


def _require_cpu(x: torch.Tensor, op: str) -> None:
    if x.device.type != "cpu" or not hasattr(torch.ops.aten, op):
        raise Unavailable(f"torch {torch.__version__} has no {op} for {x.device.type}")


def openvino_int4(x: torch.Tensor, weights: Weights) -> Contender:
    """The graph that nncf.compress_weights(mode=INT4_SYM) writes, with klfast's rounded weights. OpenVINO rounds x, too."""
    try:
        from .openvino_linear import compiled
    except ImportError as error:
        raise Unavailable(f"OpenVINO is not installed ({error}); pip install openvino") from None
    if x.device.type != "cpu":
        raise Unavailable("OpenVINO is timed on the CPU only")
    group = weights.group_size((128, 64, 32)) or weights.k
    if weights.k % 2:
        raise Unavailable("an odd K leaves half a byte in a row of 4-bit weights")
    qt = weights.quantized(QuantSpec(4, group))
    rows = x.float().numpy()
    # A compiled model takes tens of milliseconds: of small weights fewer copies, an advantage if they stay in cache.
    try:
        calls = [compiled(rows, qt, weights.settings.threads) for _ in range(weights.count(qt.nbytes, most=128))]
    except RuntimeError as error:
        raise Unavailable(f"OpenVINO cannot compile it: {' '.join(str(error).split())}") from None
    return Contender(calls, lambda: distance(torch.from_numpy(calls[0]()), reference.dequant_matmul(x.float(), qt)), 5e-2, qt.nbytes, own_threads=True)
