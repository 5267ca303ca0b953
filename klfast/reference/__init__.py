"""The ground truth: each op as one plain-torch function, written for clarity; kernels are tested against it."""

from klfast.reference.attention import decode_attention
from klfast.reference.matmul import dequant_matmul, fake_quantize_rows, linear
from klfast.reference.norm import rms_norm

__all__ = ["decode_attention", "dequant_matmul", "fake_quantize_rows", "linear", "rms_norm"]
