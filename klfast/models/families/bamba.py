"""Bamba (transformers.models.bamba): Mamba-2 or attention in each block, each followed by a gated MLP.

The gate comes before the mixer's norm, which has a mean for each group (modeling_bamba.py, BambaRMSNormGated.forward,
5.23.0). Logits are the head's product (BambaForCausalLM.forward).
"""

from __future__ import annotations

from klfast.models.families import common
from klfast.models.families.base import Blocks, Family, Mixer, plain

FAMILY = Family(
    model_type="bamba",
    mixers={"BambaMixer": Mixer(common.MAMBA2_FUNCTIONS)},
    norms={"BambaRMSNorm": common.rms_norm, "BambaRMSNormGated": common.gated_rms_norm},
    rows={"BambaMixer": common.mamba2_rows},
    blocks=Blocks("layers"),
    logits=plain,
)
