"""LFM2, with experts or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from klfast.export.gguf.architecture import Architecture, Shape
from klfast.export.gguf.change import DEPTHWISE, Change
from klfast.export.gguf.families import common

if TYPE_CHECKING:
    import gguf


def _describe(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    common.sizes(writer, config, shapes)
    common.heads(writer, config, shapes)
    common.rope(writer, config)
    writer.add_shortconv_l_cache(config.conv_L_cache)


def _changes(config: Any) -> Mapping[str, Change]:
    return {"shortconv.conv.weight": DEPTHWISE}


def _describe_experts(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    import gguf

    _describe(writer, config, shapes)
    common.experts(writer, config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size)
    writer.add_leading_dense_block_count(config.num_dense_layers)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _experts_misfit(config: Any) -> str | None:
    if not config.norm_topk_prob or config.routed_scaling_factor != 1:
        return "has weights of experts that add up to one, this model has not"
    if not config.use_expert_bias:
        return "needs a bias of the router, this model has none"
    return common.rope_misfit(config)


_NO_SETTING: dict[str, tuple[str, ...]] = {}  # it is silu whatever the configuration says (modeling_lfm2.py)

LFM2 = Architecture("LFM2", _describe, _changes, misfit=common.rope_misfit, activations=_NO_SETTING)
LFM2_MOE = Architecture(
    "LFM2MOE",
    _describe_experts,
    lambda config: {**_changes(config), **common.ROUTER},
    common.GATE_AND_UP | {r"expert_bias": ("expert_bias.bias",)},
    ("exp_probs_b",),
    _experts_misfit,
    activations=_NO_SETTING,
)
