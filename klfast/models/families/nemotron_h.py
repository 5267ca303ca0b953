"""Nemotron-H (transformers.models.nemotron_h): each block is one mixer: Mamba-2, attention, an MLP or experts.

The gate comes before the mixer's norm, which has a mean for each group (modeling_nemotron_h.py,
NemotronHRMSNormGated.forward, 5.23.0); the other norms multiply by their weight before they round
(NemotronHRMSNorm.forward). Logits are the head's product, cast to float32 (NemotronHForCausalLM.forward).
"""

from __future__ import annotations

from klfast.models.families import common
from klfast.models.families.base import Blocks, Family, Mixer, Norm, plain


def _norm(norm: common.RMSNorm) -> Norm:
    return Norm(norm.weight, norm.variance_epsilon, keeps_dtype=True)


FAMILY = Family(
    model_type="nemotron_h",
    mixers={"NemotronHMamba2Mixer": Mixer(common.MAMBA2_FUNCTIONS)},
    norms={"NemotronHRMSNorm": _norm, "NemotronHRMSNormGated": common.gated_rms_norm},
    rows={"NemotronHMamba2Mixer": common.mamba2_rows},
    blocks=Blocks("layers"),
    logits=plain,
    widens_logits=True,
)
