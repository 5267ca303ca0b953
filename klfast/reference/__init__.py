"""The ground truth: each op as one plain-torch function, written for clarity; kernels are tested against it."""

from klfast.reference.attention import decode_attention
from klfast.reference.matmul import (
    by_group,
    dequant_matmul,
    fake_quantize_rows,
    grouped_dequant_matmul,
    linear,
    out_of_range,
)
from klfast.reference.norm import rms_norm

__all__ = [
    "by_group",
    "decode_attention",
    "dequant_matmul",
    "fake_quantize_rows",
    "grouped_dequant_matmul",
    "linear",
    "out_of_range",
    "rms_norm",
]
