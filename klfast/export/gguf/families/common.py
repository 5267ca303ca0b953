"""Sizes and constants that several families have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from klfast.export.gguf.architecture import Shape
from klfast.export.gguf.change import IN_FLOAT32, Change, interleaved

if TYPE_CHECKING:
    import gguf

_UNBOUNDED = 2**20  # the context length of models that have none
_ENDLESS = 100.0  # time steps are about 0.001 to 0.1
_EPS = ("rms_norm_eps", "norm_eps", "layer_norm_epsilon")
ATTENTION_BIASES = ("attn_q", "attn_k", "attn_v")
DENSE_BIASES = ("attn_output", "ffn_gate", "ffn_up", "ffn_down")
SSM_BIASES = ("ssm_conv1d", "ssm_dt")
GATE_AND_UP: dict[str, tuple[str, ...]] = {r"experts\.gate_up_proj": ("experts.gate_proj", "experts.up_proj")}
ROUTER = {"ffn_gate_inp.weight": IN_FLOAT32}  # llama.cpp would round what it multiplies by 16 bits, too
DT_BIAS: dict[str, tuple[str, ...]] = {r"\.dt_bias": (".dt_proj.bias",)}


def sizes(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    """Write what every architecture has."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(getattr(config, "max_position_embeddings", _UNBOUNDED))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(_one_if_equal(_feed_forward(config, shapes)))
    writer.add_layer_norm_rms_eps(next(getattr(config, key) for key in _EPS if hasattr(config, key)))


def heads(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    """Write the heads of queries, and in each layer those of keys and values: 0 where there is no attention."""
    width = head_width(config)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_one_if_equal([rows // width for rows in _rows(config, shapes, "attn_k.weight")]))
    writer.add_key_length(width)
    writer.add_value_length(width)


def experts(writer: gguf.GGUFWriter, count: int, used: int, inner: int, shared: int = 0) -> None:
    """Write the number of experts, how many of them a token meets, and the inner features of one and of the shared."""
    writer.add_expert_count(count)
    writer.add_expert_used_count(used)
    writer.add_expert_feed_forward_length(inner)
    if shared:
        writer.add_expert_shared_feed_forward_length(shared)


def rope(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write the rotary embeddings that ``rope_misfit`` lets through."""
    import gguf

    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(_rotary_width(config))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def rope_misfit(config: Any) -> str | None:
    """Say which rotary embeddings klfast does not write."""
    kind = config.rope_parameters["rope_type"]
    known = ("default", "linear")
    return None if kind in known else f"is written with rotary embeddings {' or '.join(known)}, this model has {kind}"


def ssm(writer: gguf.GGUFWriter, *, kernel: int, state: int, inner: int, rank: int, groups: int | None = None) -> None:
    """Write the sizes of recurrent layers."""
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_state_size(state)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_time_step_rank(rank)
    if groups is not None:
        writer.add_ssm_group_count(groups)


def time_steps_misfit(config: Any) -> str | None:
    """Say that time steps are clamped: llama.cpp does not."""
    low, high = config.time_step_limit
    if low <= 0 and high >= _ENDLESS:
        return None
    return f"does not clamp time steps, this model does, to {low} to {high}"


def conv_bias_misfit(has_bias: bool) -> str | None:
    """Say that convolutions have no bias: llama.cpp adds one."""
    return None if has_bias else "needs a bias in convolutions, this model has none"


def interleaved_heads(config: Any) -> dict[str, Change]:
    """Return the changes of queries and keys for rotary embeddings of neighbours."""
    width, changes = head_width(config), {}
    for name, count in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
        rows = interleaved(count * width, count, _rotary_width(config))
        changes[f"{name}.weight"] = changes[f"{name}.bias"] = Change(rows=rows)
    return changes


def head_width(config: Any) -> int:
    """Return the features of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotary_width(config: Any) -> int:
    return int(head_width(config) * (config.rope_parameters or {}).get("partial_rotary_factor", 1))


def _feed_forward(config: Any, shapes: Mapping[str, Shape]) -> list[int]:
    """Return the inner features of each block's MLP; of experts, those of one."""
    of_experts = [shapes.get(f"blk.{block}.ffn_up_exps.weight", (0, 0))[1] for block in range(config.num_hidden_layers)]
    return [dense or one for dense, one in zip(_rows(config, shapes, "ffn_up.weight"), of_experts, strict=True)]


def _rows(config: Any, shapes: Mapping[str, Shape], name: str) -> list[int]:
    """Return the rows of a matrix in each block; 0 where there is none."""
    return [shapes.get(f"blk.{block}.{name}", (0,))[0] for block in range(config.num_hidden_layers)]


def _one_if_equal(numbers: list[int]) -> int | list[int]:
    return numbers[0] if len(set(numbers)) == 1 else numbers
