"""FalconMamba (transformers.models.falcon_mamba): Mamba with weightless norms of dt, B and C."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import common, lowering
from klfast.models.families.base import Blocks, Family, Mixer, plain
from klfast.nn.mamba_step import Parts
from klfast.nn.norm import Norm


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


def _lower(build: Builder, model: Any) -> Columns:
    return lowering.recurrent(build, model, "FalconMamba", _mixer)


def _mixer(build: Builder, mixer: Any, x: Columns, out: Columns) -> None:
    lowering.mamba1(build, mixer, x, out, "FalconMambaMixer", norm=_norm)


def _norm(build: Builder, module: Any, x: Columns) -> None:
    build.expect(module, "FalconMambaWeightlessRMSNorm")
    build.normalise(module, x, x, norm=Norm(torch.ones(x.width), module.eps))


FAMILY = Family(
    model_type="falcon_mamba",
    mixers={"FalconMambaMixer": Mixer(common.MAMBA1_FUNCTIONS, _step, left_weight="dt_proj")},
    norms={"FalconMambaRMSNorm": common.rms_norm},
    rows={"FalconMambaMixer": common.mamba1_rows},
    blocks=Blocks("layers"),
    logits=plain,
    masks_prompt_only=True,
    widens_logits=True,
    lower=_lower,
)
