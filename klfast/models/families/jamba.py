"""Jamba (transformers.models.jamba): Mamba or attention in each block, each followed by a gated MLP or experts.

Unlike in Mamba, dt, B and C have norms with weights (modeling_jamba.py, JambaMambaMixer.forward, 5.23.0). Logits are
the head's product (JambaForCausalLM.forward).
"""

from __future__ import annotations

from klfast.models.families import common
from klfast.models.families.base import Blocks, Family, Mixer, plain

FAMILY = Family(
    model_type="jamba",
    mixers={"JambaMambaMixer": Mixer(common.MAMBA1_FUNCTIONS, left_weight="dt_proj")},
    norms={"JambaRMSNorm": common.rms_norm},
    rows={"JambaMambaMixer": common.mamba1_rows},
    blocks=Blocks("layers"),
    logits=plain,
)
