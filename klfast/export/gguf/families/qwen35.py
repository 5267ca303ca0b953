"""Qwen3.5, with experts or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from klfast.export.gguf.architecture import Architecture, Shape
from klfast.export.gguf.change import ONE_ROW, PLUS_ONE, Change, tiled
from klfast.export.gguf.families import common

if TYPE_CHECKING:
    import gguf


def _describe(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    common.sizes(writer, config, shapes)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    common.rope(writer, config)
    common.ssm(
        writer,
        kernel=config.linear_conv_kernel_dim,
        state=config.linear_key_head_dim,
        inner=config.linear_num_value_heads * config.linear_value_head_dim,
        rank=config.linear_num_value_heads,
        groups=config.linear_num_key_heads,
    )
    writer.add_full_attention_interval(_interval(config))
    writer.add_rope_dimension_sections(_sections(config))


def _sections(config: Any) -> list[int]:
    """Return the pairs for time, height and width, of which text has one number for all."""
    if (given := config.rope_parameters.get("mrope_section")) is not None:
        return [*given, 0]
    pairs = int(config.head_dim * config.rope_parameters["partial_rotary_factor"]) // 2
    third = -(-pairs // 3)
    return [third, third, pairs - 2 * third, 0]


def _interval(config: Any) -> int:
    return int(config.layer_types.index("full_attention")) + 1


def _changes(config: Any) -> Mapping[str, Change]:
    """Return the changes: value heads in turns of their key heads (conversion/qwen.py), norms about 1, decays."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    inner, first = values * config.linear_value_head_dim, 2 * keys * config.linear_key_head_dim
    heads, channels = tiled(values, keys, values), tiled(inner, keys, values)
    after_keys = tiled(inner, keys, values, first)
    return {
        "attn_qkv.weight": Change(rows=after_keys),
        "ssm_conv1d.weight": Change(values=lambda tensor: tensor.squeeze(1)[after_keys.to(tensor.device)]),
        "attn_gate.weight": Change(rows=channels),
        "ssm_out.weight": Change(columns=channels),
        "ssm_alpha.weight": Change(rows=heads),
        "ssm_beta.weight": Change(rows=heads),
        "ssm_a": Change(rows=heads, values=lambda tensor: -tensor.exp()),
        "ssm_dt.bias": Change(rows=heads),
    } | dict.fromkeys(
        (
            f"{norm}.weight"
            for norm in ("attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm", "output_norm")
        ),
        PLUS_ONE,
    )


def _misfit(config: Any) -> str | None:
    widths = config.linear_key_head_dim, config.linear_value_head_dim
    interval = _interval(config) if "full_attention" in config.layer_types else 0
    regular = [
        "linear_attention" if (layer + 1) % (interval or len(config.layer_types) + 1) else "full_attention"
        for layer in range(config.num_hidden_layers)
    ]
    if widths[0] != widths[1]:
        return f"has keys and values of one width, this model {widths[0]} and {widths[1]}"
    if not interval or list(config.layer_types) != regular:
        return "has full attention at equal intervals, this model has not"
    return common.rope_misfit(config)


def _describe_experts(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    _describe(writer, config, shapes)
    common.experts(
        writer,
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        config.shared_expert_intermediate_size,
    )


def _changes_of_experts(config: Any) -> Mapping[str, Change]:
    return {**_changes(config), **common.ROUTER, "ffn_gate_inp_shexp.weight": ONE_ROW}


QWEN35 = Architecture("QWEN35", _describe, _changes, common.DT_BIAS, ("ssm_dt",), _misfit)
QWEN35_MOE = replace(
    QWEN35,
    kind="QWEN35MOE",
    describe=_describe_experts,
    changes=_changes_of_experts,
    renamed=common.DT_BIAS | common.GATE_AND_UP,
)
