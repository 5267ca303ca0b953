"""FalconMamba (transformers.models.falcon_mamba): Mamba with weightless norms of dt, B and C."""

from __future__ import annotations

from typing import Any

from torch import nn

from klfast.models.families import common
from klfast.models.families.base import Blocks, Family, Mixer, plain
from klfast.nn.mamba_step import Parts


def _step(mixer: Any) -> Parts | None:
    norms = (mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm)
    eps = norms[0].eps
    if any(
        type(norm).__name__ != "FalconMambaWeightlessRMSNorm" or norm.eps != eps or _is_watched(norm) for norm in norms
    ):
        return None
    own = mixer._parameters
    return Parts(mixer.conv1d, mixer.x_proj, mixer.dt_proj, (own, "A_log"), (own, "D"), eps)


def _is_watched(module: nn.Module) -> bool:
    return bool("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


FAMILY = Family(
    model_type="falcon_mamba",
    mixers={"FalconMambaMixer": Mixer(common.MAMBA1_FUNCTIONS, _step, left_weight="dt_proj")},
    norms={"FalconMambaRMSNorm": common.rms_norm},
    rows={"FalconMambaMixer": common.mamba1_rows},
    blocks=Blocks("layers"),
    logits=plain,
    masks_prompt_only=True,
    widens_logits=True,
)
