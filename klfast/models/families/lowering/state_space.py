"""Lowerings of Mamba's and Mamba-2's mixers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families.lowering.activations import require_silu


def mamba1(
    build: Builder,
    mixer: Any,
    x: Columns,
    out: Columns,
    *classes: str,
    norm: Callable[[Builder, nn.Module, Columns], None] | None = None,
) -> None:
    """Lower a Mamba mixer (transformers.models.mamba), or one of ``classes``, which follow it.

    ``norm`` lowers the norms of dt, B and C, in place; None without them.
    """
    build.expect(mixer, "MambaMixer", *classes)
    require_silu(mixer.activation)
    inner, rank, states = mixer.intermediate_size, mixer.time_step_rank, mixer.ssm_state_size
    xz, u, y = build.buffer("mamba.xz", 2 * inner), build.buffer("mamba.u", inner), build.buffer("mamba.y", inner)
    parts, dt = build.buffer("mamba.parts", rank + 2 * states), build.buffer("mamba.dt", inner)
    build.project(mixer.in_proj, x, xz)
    x_part, z = xz.split(inner, inner)
    build.convolve(mixer.conv1d, True, x_part, u)
    build.project(mixer.x_proj, u, parts)
    step, B, C = parts.split(rank, states, states)
    if norm is not None:
        for name, columns in (("dt_layernorm", step), ("b_layernorm", B), ("c_layernorm", C)):
            norm(build, getattr(mixer, name), columns)
    build.project(mixer.dt_proj, step, dt, weight_only=True)
    A_log, D = build.parameters(mixer, "A_log", "D")
    [dt_bias] = build.parameters(mixer.dt_proj, "bias")
    build.selective_scan(build.name(mixer), rate(build, A_log), D, dt_bias, u, dt, B, C, z, y)
    build.project(mixer.out_proj, y, out)


def mamba2(
    build: Builder, mixer: Any, x: Columns, out: Columns, *classes: str, factors: torch.Tensor | None = None
) -> None:
    """Lower a Mamba-2 mixer (transformers.models.mamba2), or one of ``classes``, which follow it.

    Without a norm (an nn.Identity) the scan applies the gate. ``factors`` multiply in_proj's results.
    """
    build.expect(mixer, "Mamba2Mixer", *classes)
    require_silu(mixer.activation)
    inner, heads, states = mixer.intermediate_size, mixer.num_heads, mixer.n_groups * mixer.ssm_state_size
    projected = build.buffer("mamba2.projected", 2 * inner + 2 * states + heads)
    mixed, y = build.buffer("mamba2.mixed", inner + 2 * states), build.buffer("mamba2.y", inner)
    build.project(mixer.in_proj, x, projected)
    if factors is not None:
        build.scale(factors, projected, projected)
    z, xBC, dt = projected.split(inner, inner + 2 * states, heads)
    build.convolve(mixer.conv1d, True, xBC, mixed)
    u, B, C = mixed.split(inner, states, states)
    A_log, D, dt_bias = build.parameters(mixer, "A_log", "D", "dt_bias")
    name, limit = build.name(mixer), mixer.time_step_limit
    gate = z if isinstance(mixer.norm, nn.Identity) else None
    build.head_scan(name, rate(build, A_log), D, dt_bias, mixer.head_dim, mixer.n_groups, limit, u, dt, B, C, y, gate)
    if gate is None:
        build.normalise(mixer.norm, y, y, z)
    build.project(mixer.out_proj, y, out)


def rate(build: Builder, A_log: torch.Tensor) -> torch.Tensor:
    """Return A, float32, of a tensor that ``build`` found."""
    return torch.exp(build.copied(A_log).float()).neg_()
