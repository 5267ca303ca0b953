"""Zamba2 (transformers.models.zamba2): Mamba-2 in each block, in some after one of a few shared transformer blocks.

Blocks that share a transformer block have adapters of their own in it. The gate comes before the mixer's norm, which
has a mean for each group (modeling_zamba2.py, Zamba2RMSNormGated.forward, 5.23.0). Logits are the head's product
(Zamba2ForCausalLM.forward).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from klfast.models.families import common
from klfast.models.families.base import Blocks, Family, Mixer, Rows, plain, split


class _MLP(Protocol):
    intermediate_size: int


def _mlp_rows(mlp: _MLP) -> Mapping[str, Rows]:
    return {"gate_up_proj": split(gate=mlp.intermediate_size, up=mlp.intermediate_size)}


FAMILY = Family(
    model_type="zamba2",
    mixers={"Zamba2MambaMixer": Mixer(common.MAMBA2_FUNCTIONS)},
    norms={"Zamba2RMSNorm": common.rms_norm, "Zamba2RMSNormGated": common.gated_rms_norm},
    rows={"Zamba2MambaMixer": common.mamba2_rows, "Zamba2MLP": _mlp_rows},
    blocks=Blocks("layers"),
    logits=plain,
)
