"""Kimi-Linear (transformers.models.kimi_linear): Kimi Delta Attention and latent attention, with experts.

The norm of a head comes before its gate, a sigmoid (modeling_kimi_linear.py, KimiLinearRMSNormGated.forward, 5.23.0).
Logits are the head's product.
"""

from __future__ import annotations

from klfast.models.families import common
from klfast.models.families.base import Blocks, Family, Mixer, plain

FAMILY = Family(
    model_type="kimi_linear",
    mixers={
        "KimiLinearDeltaAttention": Mixer(
            (*common.CONVOLUTIONS, "chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
        )
    },
    norms={"KimiLinearRMSNorm": common.rms_norm, "KimiLinearRMSNormGated": common.norm_before_gate},
    blocks=Blocks("layers"),
    logits=plain,
)
