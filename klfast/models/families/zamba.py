"""Zamba (transformers.models.zamba): Mamba in each block, in some after a transformer block whose weights they share.

A mixer has several heads with their own x_proj and dt_proj, which are tensors of three dimensions, not nn.Linear. The
rows of in_proj alternate between the scan's input and the gate, so its uses have no ranges (modeling_zamba.py,
ZambaMambaMixer.forward, 5.23.0). Logits are the head's product (ZambaForCausalLM.forward).
"""

from __future__ import annotations

from klfast.models.families import common
from klfast.models.families.base import Blocks, Family, Mixer, plain

FAMILY = Family(
    model_type="zamba",
    mixers={"ZambaMambaMixer": Mixer(common.MAMBA1_FUNCTIONS)},
    norms={"ZambaRMSNorm": common.rms_norm},
    blocks=Blocks("layers"),
    logits=plain,
)
