"""Mamba-2 (transformers.models.mamba2)."""

from __future__ import annotations

from typing import Any

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import common, lowering
from klfast.models.families.base import Blocks, Family, Mixer, plain


def _lower(build: Builder, model: Any) -> Columns:
    return lowering.recurrent(build, model, "Mamba2", lowering.mamba2)


FAMILY = Family(
    model_type="mamba2",
    mixers={"Mamba2Mixer": Mixer(common.MAMBA2_FUNCTIONS)},
    norms={"Mamba2RMSNorm": common.rms_norm, "MambaRMSNormGated": common.gated_rms_norm},
    rows={"Mamba2Mixer": common.mamba2_rows},
    blocks=Blocks("layers"),
    logits=plain,
    masks_prompt_only=True,
    widens_logits=True,
    lower=_lower,
)
