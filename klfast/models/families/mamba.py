"""Mamba (transformers.models.mamba)."""

from __future__ import annotations

from typing import Any

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import common, lowering
from klfast.models.families.base import Blocks, Family, Mixer, plain
from klfast.nn.mamba_step import Parts


def _step(mixer: Any) -> Parts:
    own = mixer._parameters
    return Parts(mixer.conv1d, mixer.x_proj, mixer.dt_proj, (own, "A_log"), (own, "D"))


def _lower(build: Builder, model: Any) -> Columns:
    return lowering.recurrent(build, model, "Mamba", lowering.mamba1)


FAMILY = Family(
    model_type="mamba",
    mixers={"MambaMixer": Mixer(common.MAMBA1_FUNCTIONS, _step, left_weight="dt_proj")},
    norms={"MambaRMSNorm": common.rms_norm},
    rows={"MambaMixer": common.mamba1_rows},
    blocks=Blocks("layers"),
    logits=plain,
    masks_prompt_only=True,
    widens_logits=True,
    lower=_lower,
)
