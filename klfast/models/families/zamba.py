"""Zamba (transformers.models.zamba): Mamba in each block, in some after a transformer block whose weights they share.

A mixer has several heads with their own x_proj and dt_proj, which are tensors of three dimensions, not nn.Linear. The
rows of in_proj alternate between the scan's input and the gate, so its uses have no ranges (modeling_zamba.py,
ZambaMambaMixer.forward, 5.23.0). Logits are the head's product (ZambaForCausalLM.forward).
"""

from __future__ import annotations

from typing import Any

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import common, lowering, shared_blocks
from klfast.models.families.base import Blocks, Family, Mixer, plain


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "ZambaForCausalLM")
    return shared_blocks.decoder(build, model, "shared_transf", _mamba, _attention, _mlp)


def _attention(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    module = block.shared_transf.self_attn
    build.expect(module, "ZambaAttention")
    lowering.attention(build, module, x, out)


def _mlp(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    lowering.mlp(build, block.shared_transf.feed_forward, x, out, "ZambaMLP")


def _mamba(build: Builder, block: Any, x: Columns, out: Columns) -> None:
    mixer = block.mamba
    build.expect(mixer, "ZambaMambaMixer")
    lowering.require_silu(mixer.activation)
    inner, heads, width = mixer.intermediate_size, mixer.n_mamba_heads, mixer.mamba_head_dim
    rank, states = mixer.time_step_rank, mixer.ssm_state_size
    xz = build.buffer("mamba.xz", 2 * inner)
    x_part, z, u, y = (build.buffer(f"mamba.{name}", inner) for name in "xzuy")
    parts, dt = build.buffer("mamba.parts", rank + 2 * states), build.buffer("mamba.dt", width)
    step, B, C = parts.split(rank, states, states)
    build.project(mixer.in_proj, x, xz)
    build.pick_heads(inner, 0, xz, x_part)
    build.pick_heads(inner, 1, xz, z)
    build.convolve(mixer.conv1d, True, x_part, u)
    A_log, D, dt_bias = build.parameters(mixer, "A_log", "D", "dt_proj_bias")
    A, name = lowering.rate(build, A_log), build.name(mixer)
    for head, columns in enumerate(zip(*(each.split(*heads * [width]) for each in (u, z, y)), strict=True)):
        own_u, own_z, own_y = columns
        build.project_parameter(mixer, "x_proj_weight", own_u, parts, index=head)
        build.project_parameter(mixer, "dt_proj_weight", step, dt, index=head)
        build.selective_scan(name, A[head], D[head], dt_bias[head], own_u, dt, B, C, own_z, own_y)
    build.project(mixer.out_proj, y, out)


FAMILY = Family(
    model_type="zamba",
    mixers={"ZambaMambaMixer": Mixer(common.MAMBA1_FUNCTIONS)},
    norms={"ZambaRMSNorm": common.rms_norm},
    blocks=Blocks("layers"),
    logits=plain,
    lower=_lower,
)
