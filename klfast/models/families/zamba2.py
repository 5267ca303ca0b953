"""Zamba2 (transformers.models.zamba2): Mamba-2 in each block, in some after one of a few shared transformer blocks.

Blocks that share a transformer block have adapters of their own in it. The gate comes before the mixer's norm, which
has a mean for each group (modeling_zamba2.py, Zamba2RMSNormGated.forward, 5.23.0). Logits are the head's product
(Zamba2ForCausalLM.forward).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import common, lowering, shared_blocks
from klfast.models.families.base import Blocks, Family, Mixer, Rows, plain, split


class _MLP(Protocol):
    intermediate_size: int


def _mlp_rows(mlp: _MLP) -> Mapping[str, Rows]:
    return {"gate_up_proj": split(gate=mlp.intermediate_size, up=mlp.intermediate_size)}


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "Zamba2ForCausalLM")
    angles = lowering.rotary(build, model.model.rotary_emb) if model.config.use_mem_rope else None
    attention = functools.partial(_attention, angles)
    return shared_blocks.decoder(build, model, "shared_transformer", _mamba, attention, _mlp)


def _attention(angles: Columns | None, build: Builder, block: Any, x: Columns, out: Columns) -> None:
    module = block.shared_transformer.self_attn
    build.expect(module, "Zamba2Attention")
    if module.config.use_shared_attention_adapter:
        use = module.layer_dic[block.mamba_decoder.layer_idx]
        adapters = [getattr(module, f"linear_{name}_adapter_list")[use] for name in "qkv"]
        lowering.attention(build, module, x, out, angles, adapters=adapters)
    else:
        lowering.attention(build, module, x, out, angles)


def _mlp(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    mlp = block.shared_transformer.feed_forward
    build.expect(mlp, "Zamba2MLP")
    adapter = mlp.gate_up_proj_adapter_list[mlp.layer_dic[block.mamba_decoder.layer_idx]]
    lowering.fused_mlp(build, mlp.gate_up_proj, mlp.down_proj, mlp.act_fn, x, out, adapter)


def _mamba(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    lowering.mamba2(build, block.mamba, x, out, "Zamba2MambaMixer")


FAMILY = Family(
    model_type="zamba2",
    mixers={"Zamba2MambaMixer": Mixer(common.MAMBA2_FUNCTIONS)},
    norms={"Zamba2RMSNorm": common.rms_norm, "Zamba2RMSNormGated": common.gated_rms_norm},
    rows={"Zamba2MambaMixer": common.mamba2_rows, "Zamba2MLP": _mlp_rows},
    blocks=Blocks("layers"),
    logits=plain,
    lower=_lower,
)
