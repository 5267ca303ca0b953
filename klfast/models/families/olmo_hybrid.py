"""OLMo hybrid (transformers.models.olmo_hybrid): gated delta nets, some with negative eigenvalues, and attention.

Results of norms have their input's dtype; the one of a head comes before its gate (modeling_olmo_hybrid.py,
OlmoHybridRMSNorm.forward and OlmoHybridRMSNormGated.forward, 5.23.0). Logits are the head's product.
"""

from __future__ import annotations

from klfast.models.families import common
from klfast.models.families.base import Blocks, Family, Mixer, Norm, plain


def _norm(norm: common.RMSNorm) -> Norm:
    return Norm(norm.weight, norm.variance_epsilon, keeps_dtype=True)


FAMILY = Family(
    model_type="olmo_hybrid",
    mixers={"OlmoHybridGatedDeltaNet": Mixer(common.DELTA_FUNCTIONS)},
    norms={"OlmoHybridRMSNorm": _norm, "OlmoHybridRMSNormGated": common.norm_before_gate},
    blocks=Blocks("layers"),
    logits=plain,
)
