"""Qwen3-Next (transformers.models.qwen3_next): gated delta nets and gated attention, with experts.

Norms are those of Qwen3.5 (modeling_qwen3_next.py, Qwen3NextRMSNorm.forward and Qwen3NextRMSNormGated.forward, 5.23.0).
The rows of in_proj_qkvz go key head by key head, so a use is not one range of rows
(Qwen3NextGatedDeltaNet.fix_query_key_value_ordering).
"""

from __future__ import annotations

from klfast.models.families import common
from klfast.models.families.base import Blocks, Family, Mixer, plain

FAMILY = Family(
    model_type="qwen3_next",
    mixers={"Qwen3NextGatedDeltaNet": Mixer(common.DELTA_FUNCTIONS)},
    norms={"Qwen3NextRMSNorm": common.zero_centred_rms_norm, "Qwen3NextRMSNormGated": common.norm_before_gate},
    blocks=Blocks("layers"),
    logits=plain,
)
