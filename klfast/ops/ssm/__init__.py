"""The ops of state-space and delta-rule layers; part of klfast.ops.

The wrappers have the signatures of their CUDA originals in the packages causal_conv1d and mamba_ssm, so that they can
replace them; those of the delta rule have the argument names of the package fla. Tensors are float32, bfloat16 or
float16, types may be mixed, any strides; all arithmetic is in float32. The originals' complex numbers raise
InvalidInputError; gradients there are none.
"""

from klfast.ops.ssm.conv import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from klfast.ops.ssm.delta import (
    chunk_gated_delta_rule,
    chunk_kda,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_kda,
    gated_delta_rule_update,
)
from klfast.ops.ssm.scan import mamba_chunk_scan_combined, selective_scan_fn, selective_state_update

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "chunk_gated_delta_rule",
    "chunk_kda",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_kda",
    "gated_delta_rule_update",
    "mamba_chunk_scan_combined",
    "selective_scan_fn",
    "selective_state_update",
]
