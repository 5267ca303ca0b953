"""Mamba-2 and the hybrids with its layers: Granite-4.0-H, Bamba, Falcon-H1, Nemotron-H."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from klfast.export.gguf.architecture import SILU, Architecture, Shape
from klfast.export.gguf.change import COLUMN, COLUMN_OF_NEGATED_EXP, DEPTHWISE, Change, in_groups
from klfast.export.gguf.families import common

if TYPE_CHECKING:
    import gguf


def _mixer(groups: int) -> dict[str, Change]:
    return {
        "ssm_conv1d.weight": DEPTHWISE,
        "ssm_a": COLUMN_OF_NEGATED_EXP,
        "ssm_d": COLUMN,
        "ssm_norm.weight": in_groups(groups),
    }


def _mamba2(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    common.sizes(writer, config, shapes)
    writer.add_head_count(0)
    common.ssm(
        writer,
        kernel=config.conv_kernel,
        state=config.state_size,
        inner=config.num_heads * config.head_dim,
        rank=config.num_heads,
        groups=config.n_groups,
    )


def _mamba2_misfit(config: Any) -> str | None:
    return common.time_steps_misfit(config) or common.conv_bias_misfit(config.use_conv_bias)


def _with_attention(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    """Write the sizes of Granite and Falcon, whose configurations have the same names."""
    common.sizes(writer, config, shapes)
    common.heads(writer, config, shapes)
    common.ssm(
        writer,
        kernel=config.mamba_d_conv,
        state=config.mamba_d_state,
        inner=config.mamba_n_heads * config.mamba_d_head,
        rank=config.mamba_n_heads,
        groups=config.mamba_n_groups,
    )


def _with_attention_misfit(config: Any) -> str | None:
    return common.time_steps_misfit(config) or common.conv_bias_misfit(config.mamba_conv_bias)


def _granite(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    _with_attention(writer, config, shapes)
    has_positions = config.position_embedding_type == "rope"
    writer.add_rope_scaling_finetuned(has_positions)  # llama.cpp's mark of rotary embeddings in this family
    if has_positions:
        common.rope(writer, config)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)
    if config.num_local_experts:
        common.experts(
            writer,
            config.num_local_experts,
            config.num_experts_per_tok,
            config.intermediate_size,
            config.shared_intermediate_size,
        )


def _granite_changes(config: Any) -> Mapping[str, Change]:
    return _mixer(config.mamba_n_groups) | common.interleaved_heads(config) | common.ROUTER


def _granite_misfit(config: Any) -> str | None:
    if config.position_embedding_type == "rope" and (reason := common.rope_misfit(config)):
        return reason
    return _inner_misfit(config) or _with_attention_misfit(config)


def _inner_misfit(config: Any) -> str | None:
    inner, hidden = config.mamba_n_heads * config.mamba_d_head, config.hidden_size
    if inner == 2 * hidden:
        return None
    return f"has twice as many inner channels as features, this model {inner} of {hidden}"


def _bamba(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    """Write Bamba as a Granite without multipliers."""
    _with_attention(writer, config, shapes)
    writer.add_rope_scaling_finetuned(True)
    common.rope(writer, config)


def _bamba_misfit(config: Any) -> str | None:
    return common.rope_misfit(config) or _inner_misfit(config) or _with_attention_misfit(config)


def _falcon(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    _with_attention(writer, config, shapes)
    common.rope(writer, config)


def _falcon_changes(config: Any) -> Mapping[str, Change]:
    """Return the mixer's changes, and the multipliers of activations as factors of rows (modeling_falcon_h1.py)."""
    inner, states = config.mamba_d_ssm, config.mamba_n_groups * config.mamba_d_state
    counts = torch.tensor([inner, inner, states, states, config.mamba_n_heads])
    rows = torch.tensor(config.ssm_multipliers, dtype=torch.float32).repeat_interleave(counts)
    of_input = config.attention_in_multiplier
    of_gate, of_down = config.mlp_multipliers
    factors = {
        "token_embd.weight": config.embedding_multiplier,
        "output.weight": config.lm_head_multiplier,
        "ssm_in.weight": config.ssm_in_multiplier * rows,
        "ssm_out.weight": config.ssm_out_multiplier,
        "attn_q.weight": of_input,
        "attn_k.weight": of_input * config.key_multiplier,
        "attn_k.bias": config.key_multiplier,
        "attn_v.weight": of_input,
        "attn_output.weight": config.attention_out_multiplier,
        "attn_output.bias": config.attention_out_multiplier,
        "ffn_gate.weight": of_gate,
        "ffn_gate.bias": of_gate,
        "ffn_down.weight": of_down,
        "ffn_down.bias": of_down,
    }
    return _mixer(config.mamba_n_groups) | {name: Change(factor=factor) for name, factor in factors.items()}


def _falcon_misfit(config: Any) -> str | None:
    if config.mamba_rms_norm and config.mamba_norm_before_gate:
        return "norms after the gate, this model before it"
    return _with_attention_misfit(config) or common.rope_misfit(config)


def _nemotron(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    common.sizes(writer, config, shapes)
    common.heads(writer, config, shapes)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    common.ssm(
        writer,
        kernel=config.conv_kernel,
        state=config.ssm_state_size,
        inner=config.mamba_num_heads * config.mamba_head_dim,
        rank=config.mamba_num_heads,
        groups=config.n_groups,
    )


def _nemotron_moe(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    _nemotron(writer, config, shapes)
    common.experts(
        writer,
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        config.moe_shared_expert_intermediate_size,
    )
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.moe_latent_size is not None:
        writer.add_moe_latent_size(config.moe_latent_size)


def _nemotron_changes(config: Any) -> Mapping[str, Change]:
    return _mixer(config.n_groups) | common.ROUTER


def _nemotron_misfit(config: Any) -> str | None:
    return common.conv_bias_misfit(config.use_conv_bias)


def _nemotron_moe_misfit(config: Any) -> str | None:
    if "mlp" in config.layers_block_type:
        return "has experts in all of its MLPs, this model in some"
    if config.n_group > 1:
        return f"is written with all experts in one group, this model has {config.n_group}"
    return _nemotron_misfit(config)


def _nemotron_remark(config: Any) -> str | None:
    least = config.time_step_min
    return f"llama.cpp does not raise time steps to time_step_min, {least}, as transformers does" if least > 0 else None


_BIASES = common.SSM_BIASES + common.ATTENTION_BIASES + common.DENSE_BIASES
_SHARED_MLP = {
    r"shared_mlp\.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
    r"shared_mlp\.output_linear": ("mlp.down_proj",),
}
_GRANITE_EXPERTS = {
    r"block_sparse_moe\.router": ("block_sparse_moe.router.layer",),
    r"block_sparse_moe\.experts\.gate_up_proj": ("mlp.experts.gate_proj", "mlp.experts.up_proj"),
    r"block_sparse_moe\.experts\.down_proj": ("mlp.experts.down_proj",),
    r"shared_mlp\.input_linear": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
}
_BAMBA_NAMES = {
    r"feed_forward\.": ("mlp.",),
    "pre_ff_layernorm": ("post_attention_layernorm",),
    "final_layernorm": ("norm",),
}
_NEMOTRON_NAMES = {r"model\.layers\.(?!\d+\.mixer\.experts)": ("backbone.layers.",)}
_NEMOTRON_EXPERTS = {r"mixer\.experts\.": ("mlp.experts.",), "e_score_correction_bias": ("e_score_correction.bias",)}

MAMBA2 = Architecture(
    "MAMBA2", _mamba2, lambda config: _mixer(config.n_groups), common.DT_BIAS, common.SSM_BIASES, _mamba2_misfit
)
GRANITE_HYBRID = Architecture(
    "GRANITE_HYBRID", _granite, _granite_changes, common.DT_BIAS | _SHARED_MLP, _BIASES, _granite_misfit
)
GRANITE_HYBRID_MOE = replace(GRANITE_HYBRID, renamed=common.DT_BIAS | _GRANITE_EXPERTS)
BAMBA = replace(GRANITE_HYBRID, describe=_bamba, renamed=common.DT_BIAS | _BAMBA_NAMES, misfit=_bamba_misfit)
FALCON_H1 = Architecture("FALCON_H1", _falcon, _falcon_changes, common.DT_BIAS, _BIASES, _falcon_misfit)
NEMOTRON_H = Architecture(
    "NEMOTRON_H",
    _nemotron,
    _nemotron_changes,
    common.DT_BIAS | _NEMOTRON_NAMES,
    _BIASES,
    _nemotron_misfit,
    _nemotron_remark,
    activations={"mamba_hidden_act": SILU, "mlp_hidden_act": ("relu2",)},
)
NEMOTRON_H_MOE = replace(
    NEMOTRON_H,
    kind="NEMOTRON_H_MOE",
    describe=_nemotron_moe,
    renamed=common.DT_BIAS | _NEMOTRON_NAMES | _NEMOTRON_EXPERTS,
    biases=(*_BIASES, "exp_probs_b"),
    misfit=_nemotron_moe_misfit,
)
