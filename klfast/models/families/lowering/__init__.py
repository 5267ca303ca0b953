"""Lowerings that several families share: chains of blocks, mixers, attention, feed-forward networks, heads."""

from klfast.models.families.lowering.activations import activation_gate, require_silu, require_squared_relu
from klfast.models.families.lowering.blocks import Lower, Sublayer, base_of, decoder, head, recurrent
from klfast.models.families.lowering.delta_nets import DeltaNames, delta_heads, delta_net, delta_qkv
from klfast.models.families.lowering.feed_forward import fused_mlp, gated_mlp, mlp
from klfast.models.families.lowering.projections import project_adapted, project_twice
from klfast.models.families.lowering.self_attention import AttentionNames, attention, require_usual_attention, rotary
from klfast.models.families.lowering.short_convolution import short_convolution
from klfast.models.families.lowering.state_space import mamba1, mamba2, rate

__all__ = [
    "AttentionNames",
    "DeltaNames",
    "Lower",
    "Sublayer",
    "activation_gate",
    "attention",
    "base_of",
    "decoder",
    "delta_heads",
    "delta_net",
    "delta_qkv",
    "fused_mlp",
    "gated_mlp",
    "head",
    "mamba1",
    "mamba2",
    "mlp",
    "project_adapted",
    "project_twice",
    "rate",
    "recurrent",
    "require_silu",
    "require_squared_relu",
    "require_usual_attention",
    "rotary",
    "short_convolution",
]
