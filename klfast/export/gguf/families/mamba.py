"""Mamba, FalconMamba, Jamba."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from klfast.export.gguf.architecture import Architecture, Shape
from klfast.export.gguf.change import DEPTHWISE, NEGATED_EXP, Change
from klfast.export.gguf.families import common

if TYPE_CHECKING:
    import gguf


def _changes(config: Any) -> Mapping[str, Change]:
    return {"ssm_conv1d.weight": DEPTHWISE, "ssm_a": NEGATED_EXP} | common.ROUTER


def _mamba(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    common.sizes(writer, config, shapes)
    writer.add_head_count(0)
    common.ssm(
        writer,
        kernel=config.conv_kernel,
        state=config.state_size,
        inner=config.intermediate_size,
        rank=config.time_step_rank,
    )
    writer.add_ssm_dt_b_c_rms(config.model_type == "falcon_mamba")


def _mamba_misfit(config: Any) -> str | None:
    if config.intermediate_size != 2 * config.hidden_size:
        return _inner_misfit(config.hidden_size, config.intermediate_size)
    return common.conv_bias_misfit(config.use_conv_bias)


def _falcon_misfit(config: Any) -> str | None:
    if config.mixer_rms_eps != config.layer_norm_epsilon:
        return f"has one eps of norms, this model {config.layer_norm_epsilon} and {config.mixer_rms_eps}"
    return _mamba_misfit(config)


def _jamba(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    common.sizes(writer, config, shapes)
    common.heads(writer, config, shapes)
    common.ssm(
        writer,
        kernel=config.mamba_d_conv,
        state=config.mamba_d_state,
        inner=config.mamba_expand * config.hidden_size,
        rank=config.mamba_dt_rank,
    )
    if any("_exps" in name for name in shapes):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)


def _jamba_misfit(config: Any) -> str | None:
    if config.mamba_expand != 2:
        return _inner_misfit(config.hidden_size, config.mamba_expand * config.hidden_size)
    return common.conv_bias_misfit(config.mamba_conv_bias)


def _inner_misfit(hidden: int, inner: int) -> str:
    return f"has twice as many inner channels as features, this model {inner} of {hidden}"


MAMBA = Architecture("MAMBA", _mamba, _changes, biases=common.SSM_BIASES, misfit=_mamba_misfit)
FALCON_MAMBA = replace(MAMBA, misfit=_falcon_misfit)
JAMBA = Architecture("JAMBA", _jamba, _changes, common.GATE_AND_UP, common.SSM_BIASES, _jamba_misfit)
