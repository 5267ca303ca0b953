"""Hymba (klfast.models.hymba): klfast's own code, whose layers pass keys and values to the next one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families import lowering
from klfast.models.families.base import Blocks, Family, Rows, plain, split
from klfast.nn.norm import Norm


class _Mixer(Protocol):
    rows: dict[str, int]


def _rows(mixer: _Mixer) -> Mapping[str, Rows]:
    """Return the rows of queries, keys and values (in layers that own them), the scan's input and the gate."""
    return {"in_proj": split(**mixer.rows)}


def _lower(build: Builder, model: Any) -> Columns:
    build.expect(model, "HymbaForCausalLM")
    base, config = lowering.base_of(build, model), model.config
    x, normed, update = (build.buffer(name, config.hidden_size) for name in ("residual", "normed", "update"))
    memory = None
    if base.memory_tokens is not None:
        [tokens] = build.parameters(base, "memory_tokens")
        memory = build.keep(build.copied(tokens).to(build.dtype))
    build.embed(base.embed_tokens, x, prefix=memory)
    angles = None
    if config.rope:
        angles = build.buffer("angles", config.key_dim, torch.float32)
        exponents = torch.arange(0, config.key_dim, 2).float() / config.key_dim  # as attention.rotary_tables
        build.angles("rotary", 1.0 / config.rope_base**exponents, 1.0, angles)
    cache = (0, 0)
    for index, block in enumerate(base.layers):
        build.expect(block, "HymbaLayer")
        _norm(build, block.input_layernorm, x, normed)
        window = None if config.is_global(index) else config.sliding_window
        cache = _mixer(build, block.mamba, angles, window, config.num_memory_tokens, cache, normed, update)
        build.combine("add", x, update, x)
        _norm(build, block.pre_moe_layernorm, x, normed)
        build.expect(block.moe, "HymbaExperts")
        mlp = block.moe.experts[0]
        build.expect(mlp, "HymbaMLP")
        lowering.gated_mlp(build, mlp.gate_proj, mlp.up_proj, mlp.down_proj, normed, update)
        build.combine("add", x, update, x)
    _norm(build, base.final_layernorm, x, normed)
    return lowering.head(build, model.lm_head, normed)


def _norm(build: Builder, module: Any, x: Columns, out: Columns) -> None:
    build.expect(module, "HymbaRMSNorm")
    build.normalise(module, x, out, norm=Norm(module.weight, module.eps))


def _mixer(
    build: Builder,
    mixer: Any,
    angles: Columns | None,
    window: int | None,
    sinks: int,
    cache: tuple[int, int],
    x: Columns,
    out: Columns,
) -> tuple[int, int]:
    """Lower a mixer; returns the keys and values that it attends to, ``cache`` if it has none of its own."""
    build.expect(mixer, "HymbaMixer")
    name, inner = build.name(mixer), mixer.out_proj.in_features
    width = sum(mixer.rows.values())
    projected = build.buffer(f"hymba.projected.{width}", width)
    build.project(mixer.in_proj, x, projected)
    parts = dict(zip(mixer.rows, projected.split(*mixer.rows.values()), strict=True))
    if mixer.owns_kv:
        groups = parts["k"].width // mixer.key_dim
        if angles is not None:
            build.rotate(groups, angles, parts["k"])
        cache = build.remember(name, groups, parts["k"], parts["v"])
    if angles is not None:
        build.rotate(mixer.heads, angles, parts["q"])
    attended, scanned = build.buffer("hymba.attended", inner), build.buffer("hymba.scanned", inner)
    sinks = 0 if window is None else sinks
    build.attend(name, mixer.heads, mixer.key_dim**-0.5, parts["q"], cache, attended, window=window, sinks=sinks)
    _state_space(build, mixer, parts["x"], parts["z"], scanned)
    _norm(build, mixer.pre_avg_layernorm1, attended, attended)
    _norm(build, mixer.pre_avg_layernorm2, scanned, scanned)
    build.combine("average", attended, scanned, scanned)
    build.project(mixer.out_proj, scanned, out)
    return cache


def _state_space(build: Builder, mixer: Any, x: Columns, z: Columns, out: Columns) -> None:
    u, parts = build.buffer("hymba.u", x.width), build.buffer("hymba.parts", sum(mixer.split))
    build.convolve(mixer.conv1d, True, x, u)
    build.project(mixer.x_proj[0], u, parts)
    step, B, C = parts.split(*mixer.split)
    for norm, columns in ((mixer.dt_layernorm, step), (mixer.B_layernorm, B), (mixer.C_layernorm, C)):
        if norm is not None:
            _norm(build, norm, columns, columns)
    dt = build.buffer("hymba.dt", x.width)
    build.project(mixer.dt_proj[0], step, dt, weight_only=True)
    A_log, D, bias = build.tensors(
        (mixer.A_log._parameters, "0"), (mixer.D._parameters, "0"), (mixer.dt_proj[0]._parameters, "bias")
    )
    build.selective_scan(f"{build.name(mixer)}.scan", lowering.rate(build, A_log), D, bias, u, dt, B, C, z, out)


FAMILY = Family(
    model_type="hymba",
    rows={"HymbaMixer": _rows},
    blocks=Blocks("layers", carry="shared_kv"),
    logits=plain,
    widens_logits=True,
    lower=_lower,
    own_code=True,
)
