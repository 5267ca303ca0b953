"""Other implementations of a linear layer: torch in three dtypes, torch's 4- and 8-bit kernels, OpenVINO."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from klfast import reference
from klfast.benchkit.runner import Contender, UnavailableError, distance, tolerance
from klfast.benchkit.weights import Weights
from klfast.quant import packing
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor


def _contender(
    calls: Sequence[Callable[[], torch.Tensor]], expected: Callable[[], torch.Tensor], allowed: float, nbytes: int
) -> Contender:
    return Contender(calls, lambda: distance(calls[0](), expected()), allowed, nbytes)


def torch_linear(x: torch.Tensor, weights: Weights, dtype: torch.dtype) -> Contender:
    """Return nn.Linear in ``dtype``."""
    copies, x = weights.dense(dtype), x.to(dtype)
    calls = [functools.partial(layer(nn.Linear, w), x) for w in copies]
    return _contender(calls, lambda: x.float() @ copies[0].float().T, tolerance(dtype), copies[0].nbytes)


def layer(kind: type[nn.Linear], weight: nn.Parameter) -> nn.Linear:
    """Return a layer as a model calls it, with Python objects as cold as its weight."""
    made = kind(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = weight
    return made


def torch_int4pack(x: torch.Tensor, weights: Weights) -> Contender:
    """Return torch's int4pack for bfloat16 x, with klfast's rounded weights where the group size allows it."""
    op, pack = _INT4PACK[x.device.type]
    _require(x, op)
    group = weights.group_size((128, 64, 32))
    if group is None or weights.n % 16:
        raise UnavailableError(
            f"torch's int4pack does not take [{weights.n}, {weights.k}]: N must be a multiple of 16, K of 32"
        )
    qt = weights.quantized(QuantSpec(4, group))
    parts = pack(qt, x.dtype)
    copies = weights.copies("int4pack", sum(t.nbytes for t in parts), lambda: [t.clone() for t in parts])
    multiply = getattr(torch.ops.aten, op)
    calls = [functools.partial(multiply, x, w, group, *rest) for w, *rest in copies]
    return _contender(calls, lambda: reference.dequant_matmul(x, qt), 2e-2, sum(t.nbytes for t in parts))


def _int4pack_cpu(qt: QuantizedTensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(shifted_codes(qt).int(), 1)
    return packed, scales_and_zeros_of(qt, dtype)


def _int4pack_cuda(qt: QuantizedTensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Pack with the largest number of inner tiles, of 16 values along K, that divides K."""
    tiles = next(tiles for tiles in (8, 4, 2) if qt.shape[1] % (16 * tiles) == 0)
    codes = shifted_codes(qt)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], tiles)
    return packed, scales_and_zeros_of(qt, dtype)


def int4pack_xpu(qt: QuantizedTensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return the words that klfast saves, and scales and zero points [K / group, N]."""
    packed, scale = _packed_and_scale(qt)
    scale = scale.T.to(dtype).contiguous()
    return packed, scale, torch.full_like(scale, 8, dtype=torch.int8)


def shifted_codes(qt: QuantizedTensor) -> torch.Tensor:
    """Return codes as uint8 [N, K], with 8 for 0."""
    return packing.unpack(_packed_and_scale(qt)[0], 4, qt.shape[1])


def _packed_and_scale(qt: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert qt.packed is not None and qt.scale is not None  # packed integers have both
    return qt.packed, qt.scale


def scales_and_zeros_of(qt: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Return scales and zeros [K / group, N, 2]; a zero is the value of code 8."""
    scale = _packed_and_scale(qt)[1].T.to(dtype)
    return torch.stack((scale, torch.zeros_like(scale)), -1).contiguous()


# Device -> torch's op, and the function that makes its arguments: the packed weight, then (after the group size)
# scales.
_INT4PACK = {
    "cpu": ("_weight_int4pack_mm_for_cpu", _int4pack_cpu),
    "cuda": ("_weight_int4pack_mm", _int4pack_cuda),
    "xpu": ("_weight_int4pack_mm_with_scales_and_zeros", int4pack_xpu),
}


def torch_int8pack(x: torch.Tensor, weights: Weights) -> Contender:
    """Return torch's int8pack for bfloat16 x, with one scale per row."""
    _require(x, "_weight_int8pack_mm", ("cpu",))
    if weights.k % 32:
        raise UnavailableError(
            f"torch's int8pack reads beyond the rows of a [{weights.n}, {weights.k}]: K must be a multiple of 32"
        )
    qt = weights.quantized(QuantSpec(8, -1))
    packed, scale = _packed_and_scale(qt)
    codes = (packing.unpack(packed, 8, weights.k).to(torch.int16) - 128).to(torch.int8)
    scales = scale[:, 0].to(x.dtype)
    copies = weights.copies("int8pack", codes.nbytes, codes.clone)
    calls = [functools.partial(torch.ops.aten._weight_int8pack_mm, x, w, scales) for w in copies]
    return _contender(calls, lambda: reference.dequant_matmul(x, qt), 2e-2, codes.nbytes)


def _require(x: torch.Tensor, op: str, devices: tuple[str, ...] = ("cpu", "cuda", "xpu")) -> None:
    if x.device.type not in devices or not hasattr(torch.ops.aten, op):
        raise UnavailableError(f"torch {torch.__version__} has no {op} for {x.device.type}")


def openvino_int4(x: torch.Tensor, weights: Weights) -> Contender:
    """Return the graph of nncf.compress_weights(mode=INT4_SYM) with klfast's weights. OpenVINO rounds x, too."""
    try:
        from klfast.benchkit.openvino_linear import compiled
    except ImportError as error:
        raise UnavailableError(f"OpenVINO is not installed ({error}); pip install openvino") from None
    if x.device.type != "cpu":
        raise UnavailableError("OpenVINO is timed on the CPU only")
    group = weights.group_size((128, 64, 32)) or weights.k
    if weights.k % 2:
        raise UnavailableError("an odd K leaves half a byte in a row of 4-bit weights")
    qt = weights.quantized(QuantSpec(4, group))
    rows = x.float().numpy()
    # Compiling takes tens of milliseconds, so small weights get fewer copies: an advantage if they stay in cache.
    try:
        calls = [compiled(rows, qt, weights.settings.threads) for _ in range(weights.count(qt.nbytes, most=128))]
    except RuntimeError as error:
        raise UnavailableError(f"OpenVINO cannot compile it: {' '.join(str(error).split())}") from None
    return Contender(
        calls,
        lambda: distance(torch.from_numpy(calls[0]()), reference.dequant_matmul(x.float(), qt)),
        5e-2,
        qt.nbytes,
        own_threads=True,
    )
