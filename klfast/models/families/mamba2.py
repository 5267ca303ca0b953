"""Mamba-2 (transformers.models.mamba2)."""

from __future__ import annotations

from klfast.models.families import common
from klfast.models.families.base import Blocks, Family, Mixer, plain

FAMILY = Family(
    model_type="mamba2",
    mixers={"Mamba2Mixer": Mixer(common.MAMBA2_FUNCTIONS)},
    norms={"Mamba2RMSNorm": common.rms_norm, "MambaRMSNormGated": common.gated_rms_norm},
    rows={"Mamba2Mixer": common.mamba2_rows},
    blocks=Blocks("layers"),
    logits=plain,
    masks_prompt_only=True,
    widens_logits=True,
)
