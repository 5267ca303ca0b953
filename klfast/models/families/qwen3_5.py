"""Qwen3.5, dense and with experts (transformers.models.qwen3_5, qwen3_5_moe): gated delta nets and gated attention.

Norms of blocks store their weights around zero; the one of a head comes before its gate (modeling_qwen3_5.py,
Qwen3_5RMSNorm.forward and Qwen3_5RMSNormGated.forward, 5.23.0). Logits are the head's product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from klfast.models.families import common
from klfast.models.families.base import Blocks, Family, Mixer, Rows, plain, split


class _DeltaNet(Protocol):
    key_dim: int
    value_dim: int


def _rows(mixer: _DeltaNet) -> Mapping[str, Rows]:
    return {"in_proj_qkv": split(q=mixer.key_dim, k=mixer.key_dim, v=mixer.value_dim)}


FAMILY = Family(
    model_type="qwen3_5_text",
    mixers={"Qwen3_5GatedDeltaNet": Mixer(common.DELTA_FUNCTIONS)},
    norms={"Qwen3_5RMSNorm": common.zero_centred_rms_norm, "Qwen3_5RMSNormGated": common.norm_before_gate},
    rows={"Qwen3_5GatedDeltaNet": _rows},
    blocks=Blocks("layers"),
    logits=plain,
)
MOE = Family(
    model_type="qwen3_5_moe_text",
    mixers={"Qwen3_5MoeGatedDeltaNet": Mixer(common.DELTA_FUNCTIONS)},
    norms={"Qwen3_5MoeRMSNorm": common.zero_centred_rms_norm, "Qwen3_5MoeRMSNormGated": common.norm_before_gate},
    rows={"Qwen3_5MoeGatedDeltaNet": _rows},
    blocks=Blocks("layers"),
    logits=plain,
)
