"""Every op of klfast: its schema, its argument checks, its fake (for torch.compile) and its public wrapper.

Each is defined once with torch.library (klfast/dispatch/registry.py), which runs the checks on every path into the op:
wrapper, torch.ops, tracing.
"""

from klfast import backends
from klfast.ops.attention import decode_attention
from klfast.ops.divergence import gathered_logits, linear_divergence, logit_divergence
from klfast.ops.matmul import dequant_matmul, grouped_dequant_matmul, linear
from klfast.ops.norm import rms_norm
from klfast.ops.ssm import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    chunk_gated_delta_rule,
    chunk_kda,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_kda,
    gated_delta_rule_update,
    mamba_chunk_scan_combined,
    selective_scan_fn,
    selective_state_update,
)

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "chunk_gated_delta_rule",
    "chunk_kda",
    "decode_attention",
    "dequant_matmul",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_kda",
    "gated_delta_rule_update",
    "gathered_logits",
    "grouped_dequant_matmul",
    "linear",
    "linear_divergence",
    "logit_divergence",
    "mamba_chunk_scan_combined",
    "rms_norm",
    "selective_scan_fn",
    "selective_state_update",
]

backends.register_all()
